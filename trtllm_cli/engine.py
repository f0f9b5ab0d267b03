"""The engine: `config.json` + `rank{N}.engine` + `tokenizer/`.

`rank{N}.engine` is a safetensors file: kernel-ready weights, compiled kernels as byte tensors, and the plan as JSON in
its metadata under "plan". It needs no model code, no compiler and no Hugging Face library to run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trtllm_cli.artifact import human_bytes, read_json, tree_sha256, validate, write_json
from trtllm_cli.errors import EngineError
from trtllm_cli.mapping import Rank
from trtllm_cli.model_config import ModelConfig
from trtllm_cli.tensor_file import TensorFile

# 2: tree_sha256; 3: a cuda plan has copies, exchange memory and what samples specially; 4: and launches of decode steps
FORMAT_VERSION = 4
TOKENIZER = "tokenizer"
KERNELS = "kernels.so"  # the tensor that is a rank's machine code

Backend = Literal["cpu", "cuda"]
WeightDType = Literal["float32", "bfloat16", "int8", "int4"]
KvCacheDType = Literal["float32", "bfloat16", "int8", "fp8"]  # fp8: E4M3


class BuildConfig(BaseModel):
    """The limits and choices that an engine was built with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_batch_size: int = Field(default=8, ge=1)
    max_seq_len: int = Field(ge=1)  # tokens of a request, prompt and output together
    max_num_tokens: int = Field(default=512, ge=1)  # tokens of one step, over all requests
    max_input_len: int = Field(ge=1)  # tokens of a prompt
    tokens_per_block: int = Field(default=32, ge=1)
    weight_dtype: WeightDType  # of the layers that the checkpoint has not quantized
    group_size: int | None = Field(default=None, ge=1)  # of weight_dtype int8 and int4; None: a scale an output
    kv_cache_dtype: KvCacheDType

    @property
    def blocks_per_sequence(self) -> int:
        """KV cache blocks of a request of max_seq_len."""
        return -(-self.max_seq_len // self.tokens_per_block)

    @model_validator(mode="after")
    def _limits_agree(self) -> BuildConfig:
        if self.max_input_len > self.max_seq_len:
            raise ValueError(f"max_input_len {self.max_input_len} is more than max_seq_len {self.max_seq_len}")
        if self.max_num_tokens < self.max_batch_size:
            raise ValueError(
                f"max_num_tokens {self.max_num_tokens} is less than max_batch_size {self.max_batch_size}: "
                "a step could not hold one token of each request"
            )
        return self


class RankFile(BaseModel):
    """One rank's file as it was when the engine was written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^rank\d+\.engine$")
    size: int = Field(ge=0)  # bytes
    tree_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")  # of the whole file; see artifact.tree_sha256
    program_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")  # see program_digest


class EngineConfig(BaseModel):
    """An engine's config.json, but for `sha256`, which is the digest of these fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int
    version: str  # of the trtllm that built it
    backend: Backend
    target: dict[str, str]  # what the backend compiled for; the cpu backend: {"arch", "kernels", "features"}
    pretrained_config: ModelConfig
    build_config: BuildConfig
    rank_files: list[RankFile]
    notes: dict[str, Any] = {}  # what the build measured and chose, for people


@dataclass(frozen=True)
class Engine:
    """An engine directory whose config is read and whose files have their recorded sizes."""

    path: Path
    config: EngineConfig

    @classmethod
    def open(cls, path: Path) -> Engine:
        """Reads `config.json`. Raises EngineError: what was found, what is needed, the command that makes it."""
        if not path.is_dir():
            found, fix = "no such engine directory", _build_command("CKPT", path)
            if path.exists():
                found, fix = "not an engine, which is a directory", "give the directory that trtllm build wrote"
            raise EngineError(f"{found}: {path}", where="--engine-dir", fix=fix)
        data = read_json(path / "config.json", EngineError)
        if "pretrained_config" not in data:
            kind, fix = "a checkpoint", _build_command(path, "engine")
            if "model_type" in data or "architecture" not in data:
                kind, fix = "a snapshot", f"trtllm convert {path} --output-dir ckpt, then trtllm build"
            raise EngineError(f"{path} is {kind}, not an engine", where="--engine-dir", fix=fix)
        if "format_version" not in data:
            raise EngineError(
                f"{path} was built by TensorRT-LLM {data.get('version', '(unknown version)')}; "
                "its engines hold TensorRT plans that only that version can run",
                where=str(path / "config.json"),
                fix="build the same checkpoint here: " + _build_command("CKPT", "engine"),
            )
        found = data["format_version"]
        if found != FORMAT_VERSION:
            raise EngineError(
                f"{path} has engine format version {found} (built by trtllm {data.get('version')}); "
                f"this trtllm reads version {FORMAT_VERSION}",
                where=str(path / "config.json"),
                fix=_build_command("CKPT", path) + " --force",
            )
        backend = data.get("backend")
        if backend not in Backend.__args__:  # type: ignore[attr-defined]
            raise EngineError(
                f"{path} was built for the backend {backend!r}; this trtllm runs {', '.join(Backend.__args__)}",  # type: ignore[attr-defined]
                where=str(path / "config.json"),
                fix=_build_command("CKPT", path) + " --backend cpu --force",
            )
        digest = data.pop("sha256", None)
        config = validate(EngineConfig, data, path / "config.json", EngineError)
        if digest != config_digest(data):
            raise EngineError(
                "config.json was edited: it says something else than when the engine was built",
                where=str(path / "config.json"),
                fix="restore it; an engine's limits are changed by building it again: "
                + _build_command("CKPT", path)
                + " --force",
            )
        engine = cls(path, config)
        engine._check_files()
        return engine

    def _check_files(self) -> None:
        expected = self.config.pretrained_config.mapping.world_size
        if len(self.config.rank_files) != expected:
            raise EngineError(
                f"the config lists {len(self.config.rank_files)} rank files for {expected} ranks",
                where=str(self.path / "config.json"),
            )
        for entry in self.config.rank_files:
            file = self.path / entry.name
            size = file.stat().st_size if file.is_file() else None
            if size != entry.size:
                found = "missing" if size is None else f"{human_bytes(size)} ({size} bytes)"
                raise EngineError(
                    f"{entry.name} is damaged: {found}, it was built with {entry.size} bytes",
                    where=str(file),
                    fix="copy the engine again, or rebuild it: " + _build_command("CKPT", self.path) + " --force",
                )

    def rank_file(self, rank: Rank) -> Path:
        """Where the rank's weights, kernels and plan are."""
        return self.path / f"rank{rank.rank}.engine"

    def tensors(self, rank: Rank) -> TensorFile:
        """The rank's tensors, open for reading. Raises EngineError where its header or kernels are not as built."""
        file = TensorFile(self.rank_file(rank), EngineError)
        try:
            expected = self.config.rank_files[rank.rank].program_sha256
            if (found := program_digest(file)) != expected:
                raise self._altered(rank, found, expected)
        except BaseException:
            file.close()
            raise
        return file

    def plan(self, file: TensorFile) -> dict[str, Any]:
        """The plan in a rank file's metadata."""
        try:
            plan = json.loads(file.metadata["plan"])
        except (KeyError, ValueError, RecursionError):
            plan = None
        if not isinstance(plan, dict):
            raise EngineError(f"{file.path.name} holds no plan", where=str(file.path), fix="rebuild the engine")
        return plan

    def verify(self, rank: Rank, threads: int | None = None, stopped: Callable[[], bool] = lambda: False) -> None:
        """Raises EngineError unless the rank's file has its recorded digest. Reads the whole file.

        `threads` and `stopped` are tree_sha256's; a check that is stopped finds nothing.
        """
        expected = self.config.rank_files[rank.rank].tree_sha256
        found = tree_sha256(self.rank_file(rank), threads, stopped)
        if found is not None and found != expected:
            raise self._altered(rank, found, expected)

    def _altered(self, rank: Rank, found: str, expected: str) -> EngineError:
        file = self.rank_file(rank)
        return EngineError(
            f"{file.name} was altered: its digest is {found[:16]}…, it was built with {expected[:16]}…",
            where=str(file),
            fix="copy the engine again, or rebuild it: " + _build_command("CKPT", self.path) + " --force",
        )

    @property
    def digest(self) -> str:
        """The same for engines that are the same: config.json's digest, which covers those of the rank files."""
        return config_digest(self.config.model_dump(mode="json", exclude_none=True))

    @property
    def tokenizer_dir(self) -> Path | None:
        """The tokenizer's directory, or None where the engine carries none."""
        directory = self.path / TOKENIZER
        return directory if directory.is_dir() else None


def write_config(path: Path, config: EngineConfig) -> None:
    """Writes `config.json`, the last thing that a complete engine gets."""
    data = config.model_dump(mode="json", exclude_none=True)
    write_json(path / "config.json", {**data, "sha256": config_digest(data)})


def tensor_view(file: TensorFile, name: str) -> memoryview:
    """A rank file's tensor, mapped. Raises EngineError when the plan names one that is not there."""
    if name not in file.tensors:
        raise EngineError(f"{file.path.name} has no tensor `{name}`", where=str(file.path), fix="rebuild the engine")
    return file.view(name)


def program_digest(file: TensorFile) -> str:
    """SHA-256 of a rank file's header, which holds the plan, and of its kernels.

    These are checked before anything runs: a damaged weight gives wrong numbers, which wait for the whole file's hash,
    but a damaged program may do anything.
    """
    digest = hashlib.sha256(file.header_bytes())
    if KERNELS in file.tensors:
        digest.update(file.view(KERNELS))
    return digest.hexdigest()


def config_digest(data: dict[str, Any]) -> str:
    """SHA-256 of config.json's fields but `sha256`, so that an edit shows."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _build_command(checkpoint: Path | str, engine: Path | str) -> str:
    return f"trtllm build --checkpoint-dir {checkpoint} --output-dir {engine}"
