"""The tokenizer that goes with a checkpoint: copied, or made from a SentencePiece model."""

import json
import struct

import pytest
from tokenizers import Tokenizer

from tests.convert.gguf_maker import sentencepiece_vocabulary
from tests.convert.test_gguf import TEXTS
from tests.tiny_models import save_tiny_tokenizer
from trtllm_cli.convert.gguf_tokenizer import GgufTokenizer
from trtllm_cli.convert.tokenizer_files import copy_tokenizer
from trtllm_cli.errors import SnapshotError, UnsupportedError


@pytest.fixture
def places(tmp_path):
    for name in ("source", "out"):
        (tmp_path / name).mkdir()
    return tmp_path / "source", tmp_path / "out"


def test_files_are_copied_as_they_are(places):
    source, out = places
    save_tiny_tokenizer(source)
    (source / "special_tokens_map.json").write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (source / "additional_chat_templates" / "other.py").write_text("no")
    (source / "model.py").write_text("no")
    files = copy_tokenizer(source, out, {})
    assert files == [
        "additional_chat_templates/tool_use.jinja", "chat_template.jinja", "generation_config.json",
        "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    for name in files:
        assert (out / name).read_bytes() == (source / name).read_bytes()


def test_without_generation_config_the_models_config_tells(places):
    source, out = places
    save_tiny_tokenizer(source)
    (source / "generation_config.json").unlink()
    copy_tokenizer(source, out, {"eos_token_id": [1, 2], "bos_token_id": None})
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [1, 2]}


def test_no_tokenizer(places):
    assert copy_tokenizer(*places, {}) == []
    assert not list(places[1].iterdir())


def test_kinds_that_cannot_be_converted(places):
    (places[0] / "tekken.json").write_text("{}")
    with pytest.raises(UnsupportedError, match=r"tekken\.json"):
        copy_tokenizer(*places, {})


def test_damaged_tokenizer_json(places):
    (places[0] / "tokenizer.json").write_text("{")
    with pytest.raises(SnapshotError, match=r"tokenizer\.json"):
        copy_tokenizer(*places, {})


# SentencePiece.


def varint(number):
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def message(*fields):
    """A protobuf message of (number, value) pairs: int, float, str or bytes."""
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        elif isinstance(value, float):
            out += varint(number << 3 | 5) + struct.pack("<f", value)
        else:
            data = value.encode() if isinstance(value, str) else value
            out += varint(number << 3 | 2) + varint(len(data)) + data
    return out


def sentencepiece_model(fields, model_type=2):
    pieces = zip(
        fields["tokenizer.ggml.tokens"],
        fields["tokenizer.ggml.scores"],
        fields["tokenizer.ggml.token_type"],
        strict=True,
    )
    parts = [(1, message((1, token), (2, score), *([(3, kind)] if kind != 1 else []))) for token, score, kind in pieces]
    return message(*parts, (2, message((3, model_type), (43, (1 << 64) - 1))), (3, message((3, 1))))


def test_sentencepiece_model(places, tmp_path):
    """The same vocabulary as in a GGUF file, whose tokenizer is held against transformers'."""
    source, out = places
    fields = sentencepiece_vocabulary()
    (source / "tokenizer.model").write_bytes(sentencepiece_model(fields))
    first = len(fields["tokenizer.ggml.tokens"])
    later = {str(first): {"content": "<|im_end|>", "special": True}, "0": {"content": "<unk>"}, "x": 1}
    config = {"added_tokens_decoder": later, "eos_token": {"content": "<|im_end|>"}, "chat_template": "c"}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    files = copy_tokenizer(source, out, {"eos_token_id": 2})
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(files)
    ours = Tokenizer.from_file(str(out / "tokenizer.json"))
    gguf, _ = GgufTokenizer(tmp_path, fields).build()
    for text in TEXTS:
        assert ours.encode(text).ids == gguf.encode(text).ids
    assert ours.encode("x<|im_end|>").ids[-1] == first
    assert json.loads((out / "tokenizer_config.json").read_text()) == config


def test_sentencepiece_without_settings(places):
    source, out = places
    (source / "tokenizer.model").write_bytes(sentencepiece_model(sentencepiece_vocabulary()))
    copy_tokenizer(source, out, {})
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == ("<s>", "</s>", "<unk>")
    assert "pad_token" not in config


def test_unigram_is_refused(places):
    (places[0] / "tokenizer.model").write_bytes(sentencepiece_model(sentencepiece_vocabulary(), model_type=1))
    with pytest.raises(UnsupportedError, match="not BPE"):
        copy_tokenizer(*places, {})


def test_damaged_sentencepiece_models(places):
    source, out = places
    whole = sentencepiece_model(sentencepiece_vocabulary())
    for blob in (b"", b"\xff" * 50, b"hello", whole[:1000], whole[:-3]):
        (source / "tokenizer.model").write_bytes(blob)
        with pytest.raises((SnapshotError, UnsupportedError)):
            copy_tokenizer(source, out, {})
