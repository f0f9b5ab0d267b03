"""The metadata of a GGUF file's model: each field by name and type, and what nobody reads is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trtllm_cli.errors import SnapshotError, UnsupportedError

# Metadata of the model that says nothing about the numbers, with the values at which the rest of it says nothing.
_WITHOUT_EFFECT = {"vocab_size", "tensor_data_layout"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
    "use_parallel_residual": (False,),
    "rope.scaling.finetuned": (True, False),
}


class Metadata:
    """The fields under a GGUF file's architecture."""

    def __init__(self, path: Path, fields: Mapping[str, Any]) -> None:
        self.path, self._fields = path, fields
        self._read: set[str] = set()
        architecture = fields.get("general.architecture")
        if not isinstance(architecture, str):
            raise SnapshotError("the metadata field `general.architecture` is missing or no text", where=str(path))
        self.architecture = architecture

    def has(self, key: str) -> bool:
        """Whether the field is there."""
        return f"{self.architecture}.{key}" in self._fields

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer of at least 1. SnapshotError where it is missing and has no default."""
        value: int = self._get(key, int, "an integer", default)
        if value < 1:
            raise SnapshotError(f"the metadata field `{self.architecture}.{key}` is {value}", where=str(self.path))
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number."""
        # stored as float32, whose shortest text is what its author wrote: 1e-05, not 9.999999747378752e-06
        return float(f"{self._get(key, (int, float), 'a number', default):.7g}")

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value: str = self._get(key, str, "text", default)
        return value

    def unsupported(self, key: str, why: str) -> UnsupportedError:
        """The error for a field that cannot be honoured."""
        name = f"{self.architecture}.{key}"
        return UnsupportedError(
            f"the metadata field `{name}` is {self._fields.get(name)!r}: {why}",
            where=str(self.path),
            fix="convert the model's Hugging Face snapshot instead",
        )

    def refuse_unread(self) -> None:
        """Refuses each field that was not read and is not known to say nothing."""
        prefix = f"{self.architecture}."
        for name, value in self._fields.items():
            key = name.removeprefix(prefix)
            if key == name or name in self._read or key in _WITHOUT_EFFECT or value in _NEUTRAL.get(key, ()):
                continue
            raise self.unsupported(key, "this cannot be honoured")

    def _get(self, key: str, kind: type | tuple[type, ...], expected: str, default: Any = None) -> Any:
        name = f"{self.architecture}.{key}"
        self._read.add(name)
        value = self._fields.get(name)
        if value is None:
            if default is not None:
                return default
            raise SnapshotError(
                f"the metadata field `{name}` is missing", where=str(self.path), fix="fetch the file again"
            )
        if not isinstance(value, kind) or isinstance(value, bool):
            raise SnapshotError(f"the metadata field `{name}` is not {expected}", where=str(self.path))
        return value
