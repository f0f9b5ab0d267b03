import json

import pytest

from tests.run.tiny import CHATML, byte_level, sentencepiece, smollm2, write_tokenizer  # noqa: F401
from trtllm_cli.errors import EngineError, RequestError, UsageError
from trtllm_cli.run.tokenizer import Tokenizer


def test_encode_adds_what_the_post_processor_adds(tmp_path):
    plain = Tokenizer.load(write_tokenizer(tmp_path / "a", byte_level()))
    with_bos = Tokenizer.load(write_tokenizer(tmp_path / "b", byte_level(bos=True)))
    ids = plain.encode("hello")
    bos = with_bos.backend.token_to_id("<s>")
    assert with_bos.encode("hello") == [bos, *ids]
    assert with_bos.encode("hello", add_special_tokens=False) == ids
    assert plain.decode(ids) == "hello"


def test_truncation_and_padding_in_the_file_are_not_obeyed(tmp_path):
    backend = byte_level()
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, backend))
    assert tokenizer.decode(tokenizer.encode("hello world")) == "hello world"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config": {"eos_token_id": 5}}, {5}),
        ({"generation_config": {"eos_token_id": [5, 6]}}, {5, 6}),
        ({"generation_config": {}}, set()),
        ({"config": {"eos_token_id": 7}}, {7}),
        ({"generation_config": {"eos_token_id": 5}, "config": {"eos_token_id": 7}}, {5}),
        ({"special_tokens_map": {"eos_token": {"content": "<|im_end|>"}}}, {"<|im_end|>"}),
        ({"generation_config": {"eos_token_id": 5}, "tokenizer_config": {"eos_token": "<s>"}}, {5, "<s>"}),
        ({"tokenizer_config": {"eos_token": "not there"}}, set()),
    ],
)
def test_end_tokens_are_those_of_generation_and_of_the_tokenizer(tmp_path, files, expected):
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, byte_level(), **files))
    wanted = {tokenizer.backend.token_to_id(e) if isinstance(e, str) else e for e in expected}
    assert tokenizer.eos_token_ids == wanted


def test_a_wrong_end_token_is_an_error(tmp_path):
    with pytest.raises(EngineError, match="eos_token_id"):
        Tokenizer.load(write_tokenizer(tmp_path, byte_level(), generation_config={"eos_token_id": "</s>"}))


def test_a_vocabulary_larger_than_the_models_is_refused(tmp_path):
    directory = write_tokenizer(tmp_path, byte_level())
    size = byte_level().get_vocab_size()
    Tokenizer.load(directory, vocab_size=size)
    with pytest.raises(EngineError, match=f"wrong tokenizer: its token ids go up to {size - 1}"):
        Tokenizer.load(directory, vocab_size=size - 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: None, "no such tokenizer directory"),
        (lambda d: d.mkdir(), "no tokenizer.json"),
        (lambda d: (d.mkdir(), (d / "tokenizer.model").touch()), "only the older tokenizer.model"),
        (lambda d: (d.mkdir(), (d / "tokenizer.json").write_text("{")), "cannot be read"),
        (lambda d: (d.mkdir(), (d / "tokenizer.json").write_text('{"model": 1}')), "cannot be read"),
        (lambda d: write_tokenizer(d, byte_level(), tokenizer_config={"chat_template": 3}), "chat_template"),
        (lambda d: write_tokenizer(d, byte_level(), tokenizer_config={"chat_template": [{"name": "x"}]}), "lacks"),
        (lambda d: write_tokenizer(d, byte_level(), tokenizer_config=[]), "holds a JSON list"),
    ],
)
def test_a_directory_that_is_no_tokenizer(tmp_path, make, message):
    make(tmp_path / "tokenizer")
    with pytest.raises(EngineError, match=message):
        Tokenizer.load(tmp_path / "tokenizer")


def test_text_that_is_not_unicode_is_an_error(tmp_path):
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, byte_level()))
    with pytest.raises(RequestError, match="surrogate"):
        tokenizer.encode("a\ud800")


def test_the_template_file_wins_over_the_configs(tmp_path):
    directory = write_tokenizer(tmp_path, byte_level(), tokenizer_config={"chat_template": "old"})
    assert Tokenizer.load(directory).render_chat([{"role": "user", "content": "hi"}]) == "old"
    (directory / "chat_template.jinja").write_text("new {{ messages[0].content }}")
    assert Tokenizer.load(directory).render_chat([{"role": "user", "content": "hi"}]) == "new hi"


def test_named_templates_and_special_tokens(tmp_path):
    named = [{"name": "default", "template": "{{ bos_token }}d"}, {"name": "tool_use", "template": "t"}]
    config = {"chat_template": named, "bos_token": {"content": "<s>"}}
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, byte_level(), tokenizer_config=config))
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.render_chat(messages) == "<s>d"
    assert tokenizer.render_chat(messages, tools=[{"type": "function"}]) == "t"


def test_a_conversation_is_encoded_without_a_second_bos(tmp_path):
    directory = write_tokenizer(
        tmp_path, byte_level(bos=True), tokenizer_config={"chat_template": "<s>" + CHATML, "bos_token": "<s>"}
    )
    tokenizer = Tokenizer.load(directory)
    ids = tokenizer.encode_chat([{"role": "user", "content": "hello"}])
    assert ids.count(tokenizer.backend.token_to_id("<s>")) == 1
    assert tokenizer.decode(ids, skip_special_tokens=False).endswith("<|im_start|>assistant\n")


def test_without_a_template_a_conversation_is_an_error(tmp_path):
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, sentencepiece()))
    assert not tokenizer.has_chat_template
    with pytest.raises(UsageError, match="no chat template"):
        tokenizer.encode_chat([{"role": "user", "content": "hi"}])


@pytest.mark.real_model
def test_a_real_tokenizer_agrees_with_transformers(smollm2):  # noqa: F811
    from transformers import PreTrainedTokenizerFast

    ours = Tokenizer.load(smollm2, vocab_size=49152)
    theirs = PreTrainedTokenizerFast.from_pretrained(str(smollm2))
    for text in ("Why is the sky blue?", " two  spaces\n\ttab", "naïve 日本語 🙂", "<|im_start|>user", "1234567 x=1;"):
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True)
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "?"},
    ]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.encode_chat(messages) == expected
    assert ours.eos_token_ids == {json.loads((smollm2 / "generation_config.json").read_text())["eos_token_id"]}
