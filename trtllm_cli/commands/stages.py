"""From a model's name or path to an engine, running only the stages that are missing.

What each stage makes is kept in the cache, under a key of everything that it depends on:

    CACHE/snapshots/ORG--NAME/COMMIT
    CACHE/checkpoints/NAME/KEY         the model (commit; or path, sizes and times) and the convert options
    CACHE/engines/NAME/KEY             the same, the build options, and this machine's kind of processor

A model of the hub stays at the commit that it was first fetched at, so that a second call needs no network;
`trtllm download ID` moves it to the newest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trtllm_cli.artifact import Kind
    from trtllm_cli.build.builder import BuildOptions
    from trtllm_cli.commands.console import StageBar
    from trtllm_cli.convert.hub import DownloadOptions
    from trtllm_cli.convert.pipeline import ConvertOptions


def ensure_engine(
    model: str,
    *,
    download: DownloadOptions | None = None,
    convert: ConvertOptions | None = None,
    build: BuildOptions | None = None,
    quiet: bool = False,
) -> Path:
    """The directory of an engine of `model`: a hub id, snapshot, .gguf file, checkpoint, or an engine itself.

    Where `convert` says that the weights are random, of a config.json or a directory with one. Stages that were run
    before with the same options are not run again. Raises what the stages raise, and UsageError
    if `model` is neither a path nor an id.
    """
    from trtllm_cli.artifact import detect
    from trtllm_cli.build.builder import BuildOptions
    from trtllm_cli.convert.hub import DownloadOptions
    from trtllm_cli.convert.pipeline import ConvertOptions

    options = (download or DownloadOptions(), convert or ConvertOptions(), build or BuildOptions())
    path = Path(model).expanduser()
    if options[1].random is not None:
        name = path.stem if path.is_file() and path.name != "config.json" else path.resolve().parent.name
        return _Stages(*options, f"{name}-random", quiet).local(path, "snapshot")
    if path.exists() or not _may_be_id(model):
        kind = detect(path)
        if kind == "engine":
            return path
        return _Stages(*options, path.resolve().name.removesuffix(".gguf"), quiet).local(path, kind)
    from trtllm_cli.convert.hub_api import check_repo_id

    repo_id = check_repo_id(model)
    return _Stages(*options, repo_id.replace("/", "--"), quiet).hub(repo_id)


def _may_be_id(model: str) -> bool:
    """Whether a name that is not on disk reads as a hub id and not as a mistyped path."""
    if model.startswith(("http://", "https://")):
        return True
    return not model.startswith(("/", ".", "~")) and model.count("/") <= 1 and not model.endswith(".gguf")


@dataclass(frozen=True)
class _Stages:
    """The stages of one model."""

    download: DownloadOptions
    convert: ConvertOptions
    build: BuildOptions
    name: str  # of the model, in the cache
    quiet: bool

    def local(self, path: Path, kind: Kind) -> Path:
        """An engine of a snapshot, GGUF file or checkpoint on disk."""
        source = fingerprint(path)
        if kind == "checkpoint":
            return self._engine(key(source), lambda: path)
        return self._converted(source, lambda: path)

    def hub(self, repo_id: str) -> Path:
        """An engine of a model of the hub."""
        from trtllm_cli.snapshot import cached_commit

        commit = cached_commit(repo_id, self.download.revision) or self._fetch(repo_id, self.download)[0]
        chosen = {"include": self.download.include, "exclude": self.download.exclude}
        source = {"repo_id": repo_id, "commit": commit, **chosen}
        return self._converted(source, lambda: self._fetch(repo_id, replace(self.download, revision=commit))[1])

    def _fetch(self, repo_id: str, options: DownloadOptions) -> tuple[str, Path]:
        """The commit, and the snapshot or GGUF file."""
        from trtllm_cli.commands.download_progress import reporting
        from trtllm_cli.convert import hub

        started = time.monotonic()
        with reporting(quiet=self.quiet) as progress:
            result = hub.download(repo_id, options, progress)
        if result.fetched:
            self._say("download", f"{repo_id} at commit {result.manifest.commit}", started)
        return result.manifest.commit, result.path

    def _converted(self, source: dict[str, Any], snapshot: Any) -> Path:
        from trtllm_cli.version import __version__

        checkpoint_key = key({**source, "convert": _values(self.convert), "version": __version__})
        return self._engine(checkpoint_key, lambda: self._checkpoint(checkpoint_key, snapshot))

    def _checkpoint(self, checkpoint_key: str, snapshot: Any) -> Path:
        from trtllm_cli.checkpoint import Checkpoint
        from trtllm_cli.convert import pipeline
        from trtllm_cli.errors import CheckpointError
        from trtllm_cli.snapshot import cache_dir

        output = cache_dir() / "checkpoints" / self.name / checkpoint_key
        if (output / "config.json").is_file():
            with contextlib.suppress(CheckpointError):  # damaged: it is made again
                return Checkpoint.open(output).path
        source = snapshot()
        started = time.monotonic()
        with self._bar("convert") as update:
            report = pipeline.convert(
                source, output, replace(self.convert, force=True), lambda _, done, total: update(done, total)
            )
        self._say("convert", f"{source} to {output}", started, report.notes)
        return output

    def _engine(self, checkpoint_key: str, checkpoint: Any) -> Path:
        from trtllm_cli.build import builder
        from trtllm_cli.engine import FORMAT_VERSION, Engine
        from trtllm_cli.errors import EngineError
        from trtllm_cli.snapshot import cache_dir
        from trtllm_cli.version import __version__

        own = {"version": __version__, "format": FORMAT_VERSION, "machine": machine(), "build": _values(self.build)}
        output = cache_dir() / "engines" / self.name / key({"checkpoint": checkpoint_key, **own})
        if (output / "config.json").is_file():
            with contextlib.suppress(EngineError):  # damaged: it is made again
                Engine.open(output)
                return output
        source = checkpoint()
        started = time.monotonic()
        with self._bar("build") as update:
            report = builder.build(source, output, replace(self.build, force=True), update, update.working)
        self._say("build", f"{source} to {output}", started, report.plan.notes)
        return output

    @contextlib.contextmanager
    def _bar(self, stage: str) -> Iterator[StageBar]:
        """A progress bar of a stage."""
        from trtllm_cli.commands.console import StageBar, progress_bytes

        with progress_bytes(quiet=self.quiet) as bars:
            yield StageBar(bars, stage, f"{stage}: ")

    def _say(self, stage: str, what: str, started: float, notes: list[str] | None = None) -> None:
        from trtllm_cli.commands.console import stderr

        if self.quiet:
            return
        stderr().print(f"{stage}: {what}, {time.monotonic() - started:.1f} s", markup=False)
        for note in notes or []:
            stderr().print(f"note: {note}", markup=False)


def key(values: Any) -> str:
    """A short name for everything that an artifact depends on."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint(path: Path) -> dict[str, Any]:
    """What identifies a local model: its path, and the sizes and times of its files."""
    path = path.resolve()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {"path": str(path), "files": [_stamp(p) for p in files]}


def _stamp(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return str(path), stat.st_size, stat.st_mtime_ns


def _values(options: Any) -> dict[str, Any]:
    """The options that decide what is made; a file among them counts with its time and size."""
    values = {k: v for k, v in asdict(options).items() if k != "force"}
    return {k: _stamp(v.resolve()) if isinstance(v, Path) and v.is_file() else v for k, v in values.items()}


def machine() -> str:
    """The processor's kind: an engine holds kernels for it, and a cache may be shared by several machines."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return f"{platform.machine()} {' '.join(sorted(line.partition(':')[2].split()))}"
    return f"{platform.machine()} {platform.processor()}"
