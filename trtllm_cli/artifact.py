"""What every artifact on disk shares: written beside its place and renamed when complete, read with clear errors.

A stage writes into `.NAME.partial`, a sibling of its output, and renames it at the end. A killed stage so leaves
nothing that looks finished, and the next run of the same command removes what it left.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from trtllm_cli.errors import ArtifactError, OutputExistsError, ResourceError

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

    ModelT = TypeVar("ModelT", bound=BaseModel)

Kind = Literal["snapshot", "gguf", "checkpoint", "engine"]

HASH_CHUNK = 1 << 22  # bytes


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
        raise error(f"{path.name} is missing", where=str(path)) from None
    except (ValueError, RecursionError) as e:
        raise error(f"{path.name} is not valid JSON: {e}", where=str(path), fix="fetch or make it again") from None
    except OSError as e:
        raise error(f"{path.name} cannot be read: {e.strerror}", where=str(path)) from None
    if not isinstance(data, dict):
        raise error(f"{path.name} holds a JSON {type(data).__name__}, not an object", where=str(path))
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
        raise error(f"{path.name} is not as expected: {describe(e)}", where=str(path)) from None


def describe(e: ValidationError) -> str:
    """One line for a pydantic error: each field, what is wrong with it, and what was found."""
    parts = []
    for item in e.errors():
        field = ".".join(str(p) for p in item["loc"]) or "the whole"
        if item["type"] == "missing":
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


@contextlib.contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Turns the system's word on writing `path` (full, read-only, no permission) into a ResourceError."""
    try:
        yield
    except OSError as e:
        if e.errno == errno.ENOSPC:
            raise ResourceError(
                f"the disk is full: {path}", fix="free some room, or choose another --output-dir"
            ) from e
        if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ResourceError(
                f"cannot write {path}: {e.strerror}", fix="choose another --output-dir, or mend the permissions"
            ) from e
        if e.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EDQUOT, errno.EFBIG):
            raise ResourceError(f"cannot write {path}: {e.strerror}", fix="choose another --output-dir") from e
        raise


def check_output(output_dir: Path, *, force: bool) -> None:
    """Raises OutputExistsError if `output_dir` is there, unless it is an empty directory or `force` is given.

    With `force`, only something that a stage wrote (or an empty directory) is ever replaced.
    """
    if not output_dir.exists():
        return
    if output_dir.is_dir() and not any(output_dir.iterdir()):
        return
    if not force:
        raise OutputExistsError(
            f"{output_dir} exists already", where="--output-dir", fix="pass --force to replace it, or choose another"
        )
    if not output_dir.is_dir() or not (output_dir / "config.json").is_file():
        raise OutputExistsError(
            f"{output_dir} is not something that trtllm wrote, so --force will not replace it",
            where="--output-dir",
            fix="choose another directory, or remove it yourself",
        )


@contextlib.contextmanager
def writing(output_dir: Path, *, force: bool = False) -> Iterator[Path]:
    """Yields a fresh directory to write into, which becomes `output_dir` when the block ends without an error.

    On an error it is removed. A partial directory that a killed run left is removed first; one that a live process
    holds raises ResourceError.
    """
    output_dir = Path(os.path.abspath(output_dir))
    check_output(output_dir, force=force)
    partial = output_dir.with_name(f".{output_dir.name}.partial")
    with os_errors(output_dir):
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ResourceError(
                f"another process is writing {output_dir}", fix="wait for it, or choose another --output-dir"
            ) from None
        try:
            with os_errors(output_dir):
                _empty(partial)
                yield partial
                _replace(partial, output_dir)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _empty(directory: Path) -> None:
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _replace(partial: Path, output_dir: Path) -> None:
    """Renames `partial` to `output_dir`, moving what is there out of the way first."""
    if output_dir.exists():
        old = output_dir.with_name(f".{output_dir.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        output_dir.rename(old)
        partial.rename(output_dir)
        shutil.rmtree(old, ignore_errors=True)
    else:
        partial.rename(output_dir)


def human_bytes(n: float) -> str:
    """`n` bytes for people, in binary units: 512 B, 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"
