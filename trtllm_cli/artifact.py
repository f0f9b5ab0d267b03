"""What every artifact on disk shares: written beside its place and renamed when complete, read with clear errors.

A stage writes into `.NAME.partial`, a sibling of its output, and renames it at the end. A killed stage so leaves
nothing that looks finished, and the next run of the same command removes what it left, or goes on with it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from trtllm_cli.errors import ArtifactError, OutputExistsError, ResourceError, UsageError
from trtllm_cli.machine import available_cores

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

    ModelT = TypeVar("ModelT", bound=BaseModel)

Kind = Literal["snapshot", "gguf", "checkpoint", "engine"]

HASH_CHUNK = 1 << 22  # bytes
PIECE = 64 << 20  # bytes of a file that tree_sha256 hashes by themselves
_PIECE_CHUNK = 1 << 20  # bytes read at once: they stay in the cache


def detect(path: Path) -> Kind:
    """Says which artifact `path` is. Raises ArtifactError if it is none, or not there."""
    if not path.exists():
        raise ArtifactError(f"no such file or directory: {path}", fix="check the path")
    if path.is_file():
        if path.suffix == ".gguf":
            return "gguf"
        raise ArtifactError(f"{path} is a file, and not a .gguf", fix="give a directory or a .gguf file")
    if not (path / "config.json").is_file():
        if any(path.glob("*.gguf")):
            raise ArtifactError(f"{path} is a directory of .gguf files", fix="give the .gguf file itself")
        raise ArtifactError(
            f"{path} has no config.json, so it is no snapshot, checkpoint or engine",
            fix="if a stage was interrupted, run the same command again",
        )
    config = read_json(path / "config.json", ArtifactError)
    if "pretrained_config" in config:
        return "engine"
    if "architecture" in config and "model_type" not in config:
        return "checkpoint"
    return "snapshot"


def read_json(path: Path, error: type[ArtifactError]) -> dict[str, Any]:
    """The JSON object in `path`. Raises `error` if it is missing, not JSON, or not an object."""
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise error(f"{path.name} is missing", where=str(path), fix=error.remake) from None
    except (ValueError, RecursionError) as e:
        raise error(f"{path.name} is not valid JSON: {e}", where=str(path), fix=error.remake) from None
    except OSError as e:
        raise error(f"{path.name} cannot be read: {e.strerror}", where=str(path), fix=error.remake) from None
    if not isinstance(data, dict):
        found = type(data).__name__
        raise error(f"{path.name} holds a JSON {found}, not an object", where=str(path), fix=error.remake)
    return data


def write_json(path: Path, data: Any) -> None:
    """Writes `data` as indented UTF-8 JSON with a newline at the end."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def validate(model: type[ModelT], data: Any, path: Path, error: type[ArtifactError]) -> ModelT:
    """`data` as a `model`; a pydantic error becomes one `error` naming the file, each field and what is wrong."""
    from pydantic import ValidationError

    try:
        return model.model_validate(data)
    except ValidationError as e:
        raise error(f"{path.name} is not as expected: {describe(e)}", where=str(path), fix=error.remake) from None


def describe(e: ValidationError) -> str:
    """One line for a pydantic error: each field, what is wrong with it, and what was found."""
    parts = []
    for item in e.errors():
        field = ".".join(str(p) for p in item["loc"])
        if item["type"] == "value_error":  # our own words, on fields that do not go together
            parts.append(item["msg"].removeprefix("Value error, "))
        elif item["type"] == "missing":
            parts.append(f"field `{field}` is missing")
        elif item["type"] == "extra_forbidden":
            parts.append(f"field `{field}` is unknown")
        else:
            found = repr(item["input"])
            found = found if len(found) <= 60 else found[:57] + "..."
            parts.append(f"field `{field}`: {item['msg']} (found {found})")
    return "; ".join(parts)


def sha256(path: Path) -> str:
    """The file's SHA-256 in hex, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as f:
        while chunk := f.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def tree_sha256(path: Path, threads: int | None = None, stopped: Callable[[], bool] = lambda: False) -> str | None:
    """SHA-256, in hex, of the SHA-256s of the file's pieces of PIECE bytes, the last one shorter, one after another.

    `threads` (None: as many as cores) work on a piece each; hashlib leaves them the interpreter. They ask before each
    read whether it is `stopped`, and the result is None then. They are daemons, so that they keep no process alive.
    """
    count = -(-path.stat().st_size // PIECE)
    threads = min(threads or available_cores(), count)
    digests = [b""] * count
    errors: list[BaseException] = []
    halted = False

    def work(first: int) -> None:
        buffer = memoryview(bytearray(_PIECE_CHUNK))
        try:
            for piece in range(first, count, threads):
                digest, position, end = hashlib.sha256(), piece * PIECE, (piece + 1) * PIECE
                while not (halted or stopped()) and (
                    size := os.preadv(file, [buffer[: min(_PIECE_CHUNK, end - position)]], position)
                ):
                    digest.update(buffer[:size])
                    position += size
                digests[piece] = digest.digest()
        except BaseException as e:
            errors.append(e)

    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    workers = [threading.Thread(target=work, args=(i,), name="trtllm-sha256", daemon=True) for i in range(threads)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:  # of an interrupt, too
        halted = True
        for worker in workers:
            if worker.ident is not None:
                worker.join()
        os.close(file)
    if errors:
        raise errors[0]
    return None if stopped() else hashlib.sha256(b"".join(digests)).hexdigest()


@contextlib.contextmanager
def os_errors(path: Path, flag: str = "--output-dir") -> Iterator[None]:
    """Turns the system's word on writing `path`, which `flag` gave, into a ResourceError: full, no permission, ..."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.EACCES, errno.EPERM) and not _is_beside(e.filename, path):
            raise ResourceError(f"cannot read {e.filename}: {e.strerror}", fix="mend the permissions") from e
        if e.errno == errno.ENOSPC:
            raise ResourceError(f"the disk is full: {path}", fix=f"free some room, or choose another {flag}") from e
        if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ResourceError(
                f"cannot write {path}: {e.strerror}", fix=f"choose another {flag}, or mend the permissions"
            ) from e
        if e.errno in _CANNOT_BE or (e.errno == errno.ENOENT and _is_beside(e.filename, path)):
            raise ResourceError(f"cannot write {path}: {e.strerror}", fix=f"choose another {flag}") from e
        raise


_CANNOT_BE = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EDQUOT, errno.EFBIG)


def _is_beside(name: Any, path: Path) -> bool:
    """Whether the file that an OSError names is in `path`, beside it or above it; it is when none is named."""
    if not isinstance(name, str | bytes):
        return True
    named, path = Path(os.path.abspath(os.fsdecode(name))), Path(os.path.abspath(path))
    return named.is_relative_to(path.parent) or path.is_relative_to(named)


def check_output(output_dir: Path, *, force: bool, source: Path | None = None) -> None:
    """Raises OutputExistsError if `output_dir` is there, unless it is an empty directory or `force` is given.

    With `force`, only something that a stage wrote (or an empty directory) is ever replaced. Raises UsageError if
    `output_dir` is the stage's `source`, in it or around it.
    """
    if source is not None:
        _check_apart(source, output_dir)
    with os_errors(output_dir):
        if not output_dir.exists():
            return
        names = sorted(entry.name for entry in output_dir.iterdir()) if output_dir.is_dir() else [output_dir.name]
    if not names:
        return
    if not force:
        raise OutputExistsError(
            f"{output_dir} exists already", where="--output-dir", fix="pass --force to replace it, or choose another"
        )
    if not _is_ours(output_dir, names):
        strays = [name for name in names if not _OURS.fullmatch(name)]
        holds = f" (it holds {strays[0]})" if strays and output_dir.is_dir() else ""
        raise OutputExistsError(
            f"{output_dir} is not something that trtllm wrote, so --force will not replace it{holds}",
            where="--output-dir",
            fix="choose another directory, or remove it yourself",
        )


# What a checkpoint or an engine consists of.
_OURS = re.compile(r"config\.json|SHA256SUMS|tokenizer|rank\d+\.(safetensors|engine)")


def _is_ours(directory: Path, names: list[str]) -> bool:
    """Whether a stage wrote the directory: nothing else is in it, and it is no config.json of something else."""
    if not directory.is_dir() or "config.json" not in names or not all(_OURS.fullmatch(name) for name in names):
        return False
    if any(name.startswith("rank") for name in names):
        return True
    try:
        config = read_json(directory / "config.json", ArtifactError)
    except ArtifactError:
        return False
    return "architecture" in config or "pretrained_config" in config


def _check_apart(source: Path, output_dir: Path) -> None:
    """Raises UsageError unless neither path is the other or in it."""
    a, b = Path(os.path.realpath(source)), Path(os.path.realpath(output_dir))
    if a == b:
        how = "is the input itself"
    elif b.is_relative_to(a):
        how = f"is inside the input {source}"
    elif a.is_relative_to(b) and output_dir.exists():
        how = f"holds the input {source}, which replacing it would delete"
    else:
        return
    raise UsageError(
        f"the output {output_dir} {how}", where="--output-dir", fix="choose another directory, beside the input"
    )


@contextlib.contextmanager
def locked(directory: Path, doing: str) -> Iterator[int]:
    """Holds a directory for this process; its descriptor. Raises ResourceError when another one is `doing` it."""
    with os_errors(directory):
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ResourceError(
                f"another process is {doing}", fix="wait for it, or choose another --output-dir"
            ) from None
        yield lock
    finally:
        os.close(lock)


def partial_of(output_dir: Path) -> Path:
    """Where `writing` writes what becomes `output_dir`."""
    output_dir = Path(os.path.realpath(output_dir))
    return output_dir.with_name(f".{output_dir.name}.partial")


@contextlib.contextmanager
def writing(
    output_dir: Path,
    *,
    force: bool = False,
    source: Path | None = None,
    resumes: Callable[[Path], bool] | None = None,
) -> Iterator[Path]:
    """Yields a fresh directory to write into, which becomes `output_dir` when the block ends without an error.

    On an error it is removed. A partial directory that a killed run left is emptied first, unless `resumes` says of it
    that a run can go on with it; if so it is also left when this one is interrupted. One that a live process holds
    raises ResourceError. `source` is what the stage reads, and is kept apart from the output.
    """
    check_output(output_dir, force=force, source=source)
    output_dir = Path(os.path.realpath(output_dir))  # a link stays, and what it points to is replaced
    partial = partial_of(output_dir)
    with os_errors(output_dir):
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
    with locked(partial, f"writing {output_dir}") as lock:
        if not partial.exists() or not os.path.samestat(os.fstat(lock), partial.stat()):
            raise ResourceError(
                f"another process was writing {output_dir} a moment ago", fix="run the same command again"
            )
        try:
            check_output(output_dir, force=force)  # again: now nobody else writes it
            with os_errors(output_dir):
                if resumes is None or not resumes(partial):
                    _empty(partial)
                yield partial
                _replace(partial, output_dir)
        except KeyboardInterrupt:
            if resumes is None or not resumes(partial):
                shutil.rmtree(partial, ignore_errors=True)
            raise
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _empty(directory: Path) -> None:
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _replace(partial: Path, output_dir: Path) -> None:
    """Renames `partial` to `output_dir`, moving what is there out of the way first."""
    old = output_dir.with_name(f".{output_dir.name}.old")
    shutil.rmtree(old, ignore_errors=True)  # of a run that was killed just here
    if output_dir.exists():
        output_dir.rename(old)
    partial.rename(output_dir)
    shutil.rmtree(old, ignore_errors=True)


def human_bytes(n: float) -> str:
    """`n` bytes for people, in binary units: 512 B, 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"
