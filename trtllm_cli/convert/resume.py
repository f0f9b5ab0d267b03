"""What an interrupted convert leaves for the next: which rank files, and which weights of the others, are finished.

It is kept in a small file in the partial directory, and counts only for the same source, options and version.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_cli.artifact import read_json, write_json
from trtllm_cli.errors import ArtifactError
from trtllm_cli.version import __version__

if TYPE_CHECKING:
    from trtllm_cli.convert.decide import Decided
    from trtllm_cli.convert.options import ConvertOptions
    from trtllm_cli.convert.quantize.rows import Calibration
    from trtllm_cli.tensor_file import TensorFileWriter

STATE = ".convert.json"
COMMIT_SECONDS = 10.0  # of work that a killed run may lose
_FORMAT = 1


def identity(source: Path, options: ConvertOptions, decided: Decided) -> str:
    """A digest of everything that the rank files depend on. Files count by name, size and time of change."""
    files = [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.is_file())
    facts = {
        "format": _FORMAT,
        "version": __version__,
        "source": [(os.path.realpath(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files],
        "options": {k: v for k, v in asdict(options).items() if k not in ("force", "workers", "resume")},
        "config": decided.config.model_dump(mode="json"),
        "calibration": _digest(decided.quantized.calibration),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _digest(calibration: Calibration) -> str:
    """A digest of calibration's numbers."""
    import torch

    digest = hashlib.sha256(repr(sorted(calibration.kv_scales.items())).encode())
    for module, layer in sorted(calibration.layers.items()):
        digest.update(module.encode())
        for name, value in sorted(vars(layer).items()):
            digest.update(name.encode())
            is_tensor = isinstance(value, torch.Tensor)
            digest.update(value.contiguous().numpy().tobytes() if is_tensor else repr(value).encode())
    return digest.hexdigest()


@dataclass
class State:
    """What is finished. `ranks` are whole files and their SHA-256, `weights` those that all other open files have."""

    directory: Path
    key: str
    ranks: dict[str, str] = field(default_factory=dict)
    weights: set[str] = field(default_factory=set)
    _committed: float = field(default_factory=time.monotonic)
    _new: set[str] = field(default_factory=set)

    def load(self) -> bool:
        """Takes up what an earlier run of the same work left in the directory; whether there is anything."""
        try:
            found: dict[str, Any] = read_json(self.directory / STATE, ArtifactError)
        except ArtifactError:
            return False
        if found.get("key") != self.key:
            return False
        ranks, weights = found.get("ranks"), found.get("weights")
        if not isinstance(ranks, dict) or not isinstance(weights, list):
            return False
        if not all((self.directory / name).is_file() for name in ranks):
            return False
        self.ranks, self.weights = {str(k): str(v) for k, v in ranks.items()}, {str(name) for name in weights}
        return bool(self.ranks or self.weights)

    def add(self, weight: str, writers: Iterable[TensorFileWriter]) -> None:
        """A weight is in all files of `writers`. Now and then they are brought to the disk, and it is written down."""
        self._new.add(weight)
        if time.monotonic() - self._committed < COMMIT_SECONDS:
            return
        for writer in writers:
            writer.flush()
        self.weights |= self._new
        self._write()

    def finish(self, ranks: dict[str, str]) -> None:
        """These files are complete, and on the disk."""
        self.ranks |= ranks
        self.weights.clear()
        self._write()

    def remove(self) -> None:
        """Everything is done."""
        (self.directory / STATE).unlink(missing_ok=True)

    def _write(self) -> None:
        self._new.clear()
        new = self.directory / f"{STATE}.new"
        write_json(new, {"key": self.key, "ranks": self.ranks, "weights": sorted(self.weights)})
        new.replace(self.directory / STATE)
        self._committed = time.monotonic()
