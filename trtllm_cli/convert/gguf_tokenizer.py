"""The tokenizer in a GGUF file's metadata, rebuilt as the files that Hugging Face's tools read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_cli.convert.tokenizer_build import (
    NORMAL,
    PRE_TOKENIZERS,
    Vocabulary,
    byte_level,
    sentencepiece_bpe,
    write_tokenizer,
)
from trtllm_cli.convert.tokenizer_files import write_generation_config
from trtllm_cli.errors import SnapshotError, UnsupportedError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


class GgufTokenizer:
    """What `tokenizer.ggml.*` says."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.path, self._metadata = path, metadata
        self.model = self._get("model", str)
        self.tokens: list[str] = self._list("tokens", str)
        self.types: list[int] = self._list("token_type", int) or [NORMAL] * len(self.tokens)
        if not self.tokens or len(self.types) != len(self.tokens):
            raise SnapshotError("the vocabulary is empty, or its lists differ in length", where=str(path))

    def write(self, directory: Path, max_length: int) -> list[str]:
        """Writes the files into `directory`; their names."""
        tokenizer, vocabulary = self.build()
        template = self._metadata.get("tokenizer.chat_template")
        write_tokenizer(
            directory,
            tokenizer,
            vocabulary,
            max_length=max_length,
            template=template if isinstance(template, str) else None,
        )
        ends = [i for i in (vocabulary.special.get("eos"), self._id("eot")) if i is not None]
        ends = list(dict.fromkeys(ends))
        ids = {
            "bos_token_id": vocabulary.special.get("bos"),
            "eos_token_id": ends if len(ends) > 1 else ends[0] if ends else None,
            "pad_token_id": vocabulary.special.get("pad"),
        }
        write_generation_config(directory, ids)
        return sorted(entry.name for entry in directory.iterdir())

    def build(self) -> tuple[Tokenizer, Vocabulary]:
        """The tokenizer and the vocabulary that it was made from. Raises UnsupportedError for other kinds of model."""
        special = {role: i for role, name in _SPECIAL.items() if (i := self._id(name)) is not None}
        add_eos = self._get("add_eos_token", bool, False)
        try:
            if self.model == "gpt2":
                return self._byte_level(special, add_eos)
            if self.model == "llama":
                return self._sentencepiece(special, add_eos)
        except (ValueError, TypeError) as e:
            raise SnapshotError(f"the file's tokenizer cannot be built: {e}", where=str(self.path)) from None
        except UnsupportedError:
            raise
        except Exception as e:  # the tokenizers package raises bare Exception
            raise SnapshotError(f"the file's tokenizer cannot be built: {e}", where=str(self.path)) from None
        raise UnsupportedError(
            f"GGUF tokenizers of the kind {self.model!r} are not supported",
            where=f"{self.path}: tokenizer.ggml.model",
            fix="convert the model's Hugging Face snapshot instead",
        )

    def _byte_level(self, special: dict[str, int], add_eos: bool) -> tuple[Tokenizer, Vocabulary]:
        name = self._get("pre", str, "default")
        if name not in PRE_TOKENIZERS:
            raise UnsupportedError(
                f"the pre-tokenizer {name!r} is not known here",
                where=f"{self.path}: tokenizer.ggml.pre",
                fix=f"known: {', '.join(PRE_TOKENIZERS)}; or convert the model's Hugging Face snapshot instead",
            )
        pre = PRE_TOKENIZERS[name]
        vocabulary = Vocabulary(
            self.tokens, self.types, special, self._get("add_bos_token", bool, pre.adds_bos), add_eos
        )
        merges = [self._merge(text) for text in self._list("merges", str)]
        return byte_level(vocabulary, merges, pre), vocabulary

    def _sentencepiece(self, special: dict[str, int], add_eos: bool) -> tuple[Tokenizer, Vocabulary]:
        scores = self._list("scores", float)
        if len(scores) != len(self.tokens):
            raise SnapshotError("the vocabulary has no score for each token", where=str(self.path))
        special = {"bos": 1, "eos": 2, "unk": 0} | special
        vocabulary = Vocabulary(self.tokens, self.types, special, self._get("add_bos_token", bool, True), add_eos)
        prefix_space = self._get("add_space_prefix", bool, True)
        return sentencepiece_bpe(vocabulary, scores, prefix_space=prefix_space), vocabulary

    def _merge(self, text: str) -> tuple[str, str]:
        left, space, right = text.partition(" ")
        if not (left and space and right):
            raise SnapshotError(f"the merge {text!r} is not two tokens", where=str(self.path))
        return left, right

    def _id(self, name: str) -> int | None:
        value = self._metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is None:
            return None
        if not isinstance(value, int) or not 0 <= value < len(self.tokens):
            raise SnapshotError(f"tokenizer.ggml.{name}_token_id is {value!r}: no such token", where=str(self.path))
        return value

    def _get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self._metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, kind):
            raise SnapshotError(f"tokenizer.ggml.{key} is missing or of the wrong type", where=str(self.path))
        return value

    def _list(self, key: str, kind: type) -> list[Any]:
        value = self._metadata.get(f"tokenizer.ggml.{key}", [])
        if not isinstance(value, list) or (value and not isinstance(value[0], kind)):
            raise SnapshotError(f"tokenizer.ggml.{key} is not a list of the right type", where=str(self.path))
        return value
