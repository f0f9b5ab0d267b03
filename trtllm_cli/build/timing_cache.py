"""The timing cache: how long each tactic took for a linear, on which GPU, by which kernels and compiler; a JSON file.

    format_version  1
    linears         [{"gpu", "arch", "kernels", "triton", "shape", "times"}], one for each `TimedOn` and shape
    times           [{"tokens", "cublas_us", "tactics": {"vector 1 2 2048 4 2": 12.3}}]: microseconds

Whoever reads a cache and writes it again keeps what is of other GPUs, kernels and compilers. What is in a file decides
which tactics are taken, and so what an engine's plan is; no tactic is compiled because a file names it.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from trtllm_cli.artifact import human_bytes, os_errors, read_json, validate
from trtllm_cli.build.backends.cuda_linears import Form, LinearShape, PerWhat
from trtllm_cli.errors import TimingCacheError
from trtllm_cli.kernels.compile_cache import cache_dir, keep

FORMAT_VERSION: Final = 1
_MOST_BYTES = 64 << 20  # of a file: thousands of shapes
_NUMBER = r"( [1-9]\d{0,4})"
_TILES = {  # how many
    "stream": "{5}", "words": "{4}", "wide": "{6}", "vector": "{5}", "skinny": "{6}", "fragment": "{6}",
}  # fmt: skip
_TACTIC = f"^({'|'.join(kernel + _NUMBER + count for kernel, count in _TILES.items())})$"

Microseconds = Annotated[float, Field(gt=0, le=1e9)]  # so no NaN, which is not greater
TacticName = Annotated[str, StringConstraints(pattern=_TACTIC)]
_Count = Annotated[int, Field(ge=1, lt=1 << 31)]
_Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TimedOn(_Strict):
    """What times are of, beside the linear itself: others' say nothing here."""

    gpu: _Name  # as its driver calls it
    arch: _Name
    kernels: str = Field(pattern=r"^[0-9a-f]{64}$")  # kernels.cuda.compiler.source_digest
    triton: _Name


class TimedShape(_Strict):
    """What a linear's speed depends on, of LinearShape's fields."""

    form: Form
    n: _Count
    k: _Count
    group: int = Field(ge=0, lt=1 << 31)
    has_zero: bool
    w_scale: PerWhat
    x_scale: PerWhat
    gated: str = Field(max_length=50)

    @classmethod
    def of(cls, shape: LinearShape) -> TimedShape:
        """Of any linear."""
        return cls(**{name: getattr(shape, name) for name in cls.model_fields})

    @property
    def linear(self) -> LinearShape:
        """The linear that is timed: no bias, no residual, bfloat16 out."""
        return LinearShape(**self.model_dump(), x_type="*fp8e4nv" if self.form == "fp8" else "*bf16")

    def __str__(self) -> str:
        """For people: "bf16 28672x4096 silu", "int4 4096x4096 groups of 128 with zeros"."""
        group = f" groups of {self.group}" if self.group else ""
        zero = " with zeros" if self.has_zero else ""
        scales = f" scales {self.w_scale} {self.x_scale}" if self.form == "fp8" else ""
        return f"{self.form} {self.n}x{self.k}{group}{zero}{scales} {self.gated}".rstrip()


class TokenTimes(_Strict):
    """Of one number of tokens; None: it does not run on this GPU."""

    tokens: _Count
    cublas_us: Microseconds | None  # of int8 and int4 with the dequantization, of a gated linear without the activation
    tactics: dict[TacticName, Microseconds | None]

    def updated(self, tactics: Mapping[str, float | None]) -> TokenTimes:
        """With times of tactics that it has not, or in place of those that it has; by name."""
        return self.model_copy(update={"tactics": dict(sorted({**self.tactics, **tactics}.items()))})


class LinearTimes(TimedOn):
    """The times of one linear."""

    shape: TimedShape
    times: list[TokenTimes]

    @property
    def timed_on(self) -> TimedOn:
        """Where."""
        return TimedOn(**{name: getattr(self, name) for name in TimedOn.model_fields})


class TimingCache(_Strict):
    """A file, or what several hold together; see `merged`."""

    format_version: Literal[1] = FORMAT_VERSION
    linears: list[LinearTimes] = []

    def find(self, on: TimedOn, shape: TimedShape) -> dict[int, TokenTimes]:
        """The times of a linear by the number of tokens."""
        entries = [entry for entry in self.linears if entry.shape == shape and entry.timed_on == on]
        return {times.tokens: times for entry in entries for times in entry.times}


def merged(caches: Iterable[TimingCache]) -> TimingCache:
    """All that they hold, a later one's times in place of an earlier one's; in the same order whatever theirs is."""
    found: dict[tuple[str, ...], tuple[LinearTimes, dict[int, TokenTimes]]] = {}
    for entry in (entry for cache in caches for entry in cache.linears):
        _, times = found.setdefault(_order(entry), (entry, {}))
        for new in entry.times:
            old = times.get(new.tokens, new)
            times[new.tokens] = new.model_copy(update={"tactics": old.tactics}).updated(new.tactics)
    linears = [
        entry.model_copy(update={"times": [times[tokens] for tokens in sorted(times)]})
        for _, (entry, times) in sorted(found.items())
    ]
    return TimingCache(linears=linears)


def _order(entry: LinearTimes) -> tuple[str, ...]:
    """By GPU, then by shape: forms by name, sizes by number."""
    on = (entry.gpu, entry.arch, entry.kernels, entry.triton)
    shape = entry.shape.model_dump()
    return (*on, *(f"{value:010d}" if type(value) is int else str(value) for value in shape.values()))


def read(path: Path) -> TimingCache:
    """The cache in a file. Raises TimingCacheError that says what is wrong with it."""
    try:
        status = path.stat()
    except OSError:
        status = None  # reading it says why
    if status is not None and not (stat.S_ISREG(status.st_mode) and status.st_size <= _MOST_BYTES):
        what = f"has {human_bytes(status.st_size)}" if stat.S_ISREG(status.st_mode) else "is not a file"
        raise TimingCacheError(
            f"{path.name} {what}, so it is no timing cache", where=str(path), fix=TimingCacheError.remake
        )
    data = read_json(path, TimingCacheError)
    found = data.get("format_version")
    if found != FORMAT_VERSION:
        raise TimingCacheError(
            f"{path.name} has no format version, so it is no timing cache"
            if found is None
            else f"{path.name} is a timing cache of format version {found!r:.50}; this trtllm reads {FORMAT_VERSION}",
            where=str(path),
            fix=TimingCacheError.remake,
        )
    return validate(TimingCache, data, path, TimingCacheError)


def update(path: Path, cache: TimingCache, flag: str) -> None:
    """Writes what the file that `flag` names holds, if it is there, and `cache`. Whole or not at all."""
    old = [read(path)] if os.path.exists(path) else []
    path = Path(os.path.realpath(path))  # a link stays
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with os_errors(path, flag):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(_bytes(merged([*old, cache])))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _bytes(cache: TimingCache) -> bytes:
    return (json.dumps(cache.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n").encode()


def _user_path() -> Path:
    return cache_dir() / "timing.json"


def read_user_cache() -> TimingCache:
    """What was timed on this machine before; nothing where that cannot be read."""
    try:
        return read(_user_path())
    except TimingCacheError:
        return TimingCache()


def update_user_cache(cache: TimingCache) -> None:
    """Adds to it; a cache that cannot be written is no error."""
    keep(_user_path(), _bytes(merged([read_user_cache(), cache])))
