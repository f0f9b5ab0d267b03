"""Makes `tokenizer.json` from a vocabulary and merges, as GGUF files and SentencePiece models store them.

The split patterns are those of the tokenizers' publishers, under llama.cpp's names for them (`llama-vocab.cpp`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_cli.artifact import write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Token types of GGUF and SentencePiece.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """How a byte-level vocabulary's text is cut before merging."""

    split: str | None = None  # a regular expression; None: GPT-2's
    digits: bool = False  # each digit on its own first
    ignore_merges: bool = False  # a piece that is a token stays whole, whatever the merges say
    nfc: bool = False  # text is normalized
    adds_bos: bool = False  # when the file does not say


_LLAMA3 = PreTokenizer(_LLAMA3_SPLIT, ignore_merges=True, adds_bos=True)
_QWEN2 = PreTokenizer(_QWEN2_SPLIT, nfc=True)
_GPT2, _DIGITS = PreTokenizer(), PreTokenizer(digits=True)

# tokenizer.ggml.pre -> how to cut.
PRE_TOKENIZERS = {
    "default": _GPT2, "gpt-2": _GPT2,
    "smollm": _DIGITS, "starcoder": _DIGITS, "refact": _DIGITS, "command-r": _DIGITS,
    "llama3": _LLAMA3, "llama-v3": _LLAMA3, "llama-bpe": _LLAMA3,
    "dbrx": PreTokenizer(_LLAMA3_SPLIT), "smaug-bpe": PreTokenizer(_LLAMA3_SPLIT),
    "qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2,
    "tekken": PreTokenizer(_TEKKEN_SPLIT, ignore_merges=True, adds_bos=True),
}  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """The tokens by id, with what is known of each; `special` maps "bos", "eos", "unk", "pad" to ids."""

    tokens: Sequence[str]
    types: Sequence[int]
    special: dict[str, int]
    add_bos: bool
    add_eos: bool = False

    def token(self, role: str) -> str | None:
        """The text of a special token."""
        return self.tokens[self.special[role]] if role in self.special else None


def byte_level(vocabulary: Vocabulary, merges: Sequence[tuple[str, str]], pre: PreTokenizer) -> Tokenizer:
    """GPT-2's kind: text as bytes, each written as a printable character."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=list(merges), ignore_merges=pre.ignore_merges))
    steps: list[Any] = []
    if pre.digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if pre.split is not None:
        steps.append(pre_tokenizers.Split(Regex(pre.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.split is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    _finish(tokenizer, vocabulary)
    return tokenizer


def sentencepiece_bpe(vocabulary: Vocabulary, scores: Sequence[float], *, prefix_space: bool) -> Tokenizer:
    """Llama 2's kind: spaces as U+2581, unknown characters as byte tokens, merges in the order of the scores."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    merges = merges_of(ids, dict(zip(vocabulary.tokens, scores, strict=True)))
    unknown = vocabulary.token("unk")
    model = models.BPE(vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    scheme = "first" if prefix_space else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix_space:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    _finish(tokenizer, vocabulary)
    return tokenizer


def merges_of(ids: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """The merges that a scored vocabulary implies: every way to make a token of two others, the best score first."""
    merges = []
    for token, score in scores.items():
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = sorted((p for p in pairs if p[0] in ids and p[1] in ids), key=lambda p: (ids[p[0]], ids[p[1]]))
        merges += [(score, left, right) for left, right in pairs]
    merges.sort(key=lambda m: (m[0], len(m[1]), len(m[2])), reverse=True)
    return [(left, right) for _, left, right in merges]


def _finish(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Tokens that are never cut, and those put around every text."""
    from tokenizers import AddedToken, processors

    special_ids = set(vocabulary.special.values())
    special, plain = [], []
    for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind in (CONTROL, UNKNOWN) or (i in special_ids and kind != NORMAL):
            special.append(AddedToken(token, normalized=False, special=True))
        elif kind == USER_DEFINED:
            plain.append(AddedToken(token, normalized=False, special=False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)
    before = [role for role in ("bos",) if vocabulary.add_bos and role in vocabulary.special]
    after = [role for role in ("eos",) if vocabulary.add_eos and role in vocabulary.special]
    if before or after:
        ids = {role: (vocabulary.token(role), vocabulary.special[role]) for role in before + after}

        def around(text: str, suffix: str) -> list[str]:
            parts = [*(ids[r][0] for r in before), text, *(ids[r][0] for r in after)]
            return [f"{part}{suffix}" for part in parts]

        tokenizer.post_processor = processors.TemplateProcessing(
            single=around("$A", ":0"), pair=around("$A", ":0") + around("$B", ":1"), special_tokens=list(ids.values())
        )


def write_tokenizer(
    directory: Path, tokenizer: Tokenizer, vocabulary: Vocabulary, *, max_length: int | None, template: str | None
) -> None:
    """tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja."""
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {f"{role}_token": text for role in vocabulary.special if (text := vocabulary.token(role)) is not None}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    config |= {"add_bos_token": vocabulary.add_bos, "add_eos_token": vocabulary.add_eos}
    config["clean_up_tokenization_spaces"] = False
    if max_length is not None:
        config["model_max_length"] = max_length
    write_json(directory / "tokenizer_config.json", config)
    write_json(directory / "special_tokens_map.json", special)
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
