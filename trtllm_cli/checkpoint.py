"""The checkpoint: `config.json` + `rank{N}.safetensors` + `tokenizer/`, with TensorRT-LLM's field and tensor names.

`SHA256SUMS` (the format of the `sha256sum` tool) covers the rank files that we wrote; checkpoints from other tools
have none, and are read all the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from trtllm_cli.artifact import read_json, sha256, validate, write_json
from trtllm_cli.errors import CheckpointError
from trtllm_cli.foreign_layout import ForeignTensors, has_pre_quant_scales
from trtllm_cli.mapping import Rank
from trtllm_cli.model_config import ModelConfig
from trtllm_cli.tensor_file import TensorFile

SUMS = "SHA256SUMS"
TOKENIZER = "tokenizer"
PRODUCER = "trtllm-cli"  # config.json's producer.name in what we write


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory whose config is read and whose rank files are there."""

    path: Path
    config: ModelConfig
    sha256: dict[str, str]  # rank file name -> hex; empty when there is no SHA256SUMS

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Reads `config.json`. Raises CheckpointError for anything missing, wrong or unknown."""
        if not path.is_dir():
            raise CheckpointError(
                f"no such checkpoint directory: {path}", where="--checkpoint-dir", fix="trtllm convert SNAPSHOT"
            )
        data = read_json(path / "config.json", CheckpointError)
        if "model_type" in data and "architecture" not in data:
            raise CheckpointError(
                f"{path} is a Hugging Face snapshot, not a checkpoint",
                where=str(path / "config.json"),
                fix=f"trtllm convert {path} --output-dir ckpt",
            )
        if "pretrained_config" in data:
            raise CheckpointError(
                f"{path} is an engine, not a checkpoint",
                where="--checkpoint-dir",
                fix="give the checkpoint it was built from",
            )
        config = validate(ModelConfig, data, path / "config.json", CheckpointError)
        checkpoint = cls(path, config, read_sums(path / SUMS))
        for rank in config.mapping.ranks:
            if not checkpoint.rank_file(rank).is_file():
                raise CheckpointError(
                    f"{checkpoint.rank_file(rank).name} is missing: the config says {config.mapping.world_size} ranks",
                    where=str(path),
                    fix="convert again",
                )
        return checkpoint._with_pre_quant_scale()

    def _with_pre_quant_scale(self) -> Checkpoint:
        """ModelOpt's config does not say that SmoothQuant scales activations; its tensors do."""
        quantization = self.config.quantization
        if not (quantization.quant_algo or "").startswith("W8A8_SQ") or quantization.pre_quant_scale:
            return self
        if not has_pre_quant_scales(self.rank_file(self.config.mapping.ranks[0]), CheckpointError):
            return self
        said = quantization.model_copy(update={"pre_quant_scale": True})
        return replace(self, config=self.config.model_copy(update={"quantization": said}))

    def rank_file(self, rank: Rank) -> Path:
        """Where the rank's tensors are."""
        return self.path / f"rank{rank.rank}.safetensors"

    def tensors(self, rank: Rank) -> TensorFile:
        """The rank's tensors, open for reading, in our layout."""
        if (self.config.producer or {}).get("name") == PRODUCER or not self.config.quantization.is_quantized:
            return TensorFile(self.rank_file(rank), CheckpointError)
        return ForeignTensors(self.rank_file(rank), CheckpointError, self.config.quantization)

    def verify(self) -> None:
        """Raises CheckpointError when a rank file is not what convert wrote. Reads them all; nothing without sums."""
        for rank in self.config.mapping.ranks if self.sha256 else ():
            file = self.rank_file(rank)
            if (expected := self.sha256.get(file.name)) is None:
                sums = self.path / SUMS
                raise CheckpointError(f"{SUMS} does not list {file.name}", where=str(sums), fix=CheckpointError.remake)
            if (found := sha256(file)) != expected:
                raise CheckpointError(
                    f"{file.name} was altered: its SHA-256 is {found[:16]}…, it was written with {expected[:16]}…",
                    where=str(file),
                    fix="convert again (or remove SHA256SUMS if the change is yours)",
                )

    @property
    def tokenizer_dir(self) -> Path | None:
        """The tokenizer's directory, or None where the checkpoint carries none."""
        directory = self.path / TOKENIZER
        return directory if directory.is_dir() else None


def write_config(path: Path, config: ModelConfig) -> None:
    """Writes `config.json`, the last thing that a complete checkpoint gets."""
    write_json(path / "config.json", config.model_dump(mode="json", exclude_none=True))


def read_sums(path: Path) -> dict[str, str]:
    """File name -> SHA-256 of a `sha256sum` list, or nothing where there is no such file."""
    if not path.is_file():
        return {}
    sums = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not (match := re.fullmatch(r"([0-9a-f]{64})  ([\w.-]+)", line)):
            raise CheckpointError(
                f"{path.name} has a line that is no checksum: {line[:80]!r}",
                where=str(path),
                fix=CheckpointError.remake,
            )
        sums[match[2]] = match[1]
    return sums


def write_sums(path: Path, sums: dict[str, str]) -> None:
    """Writes a list that `sha256sum --check` reads."""
    path.write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())), encoding="utf-8")
