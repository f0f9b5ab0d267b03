"""The snapshot: a Hugging Face directory at one commit, and the manifest that says what is in it.

`trtllm download` writes `.trtllm-snapshot.json` last. A directory without one, such as a user's own, is read all the
same: there is just nothing to hold its files against.

Cached snapshots lie in `CACHE/snapshots/ORG--NAME/COMMIT`; `refs.json` beside them remembers which commit a branch or
tag was when it was last fetched, so that they are found without a network.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from trtllm_cli.artifact import human_bytes, os_errors, read_json, sha256, validate, write_json
from trtllm_cli.errors import SnapshotError

MANIFEST = ".trtllm-snapshot.json"
DEFAULT_REVISION = "main"
COMMIT = re.compile(r"[0-9a-f]{40}")


class FileEntry(BaseModel):
    """One file as it was fetched."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(ge=0)  # bytes
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """What a snapshot holds: the same words whichever mirror of the hub it came from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    repo_id: str
    revision: str  # as it was asked for: a branch, a tag or a commit
    commit: str = Field(pattern=r"^[0-9a-f]{40}$")
    files: dict[str, FileEntry]
    not_fetched: dict[str, int] = {}  # what else the repository has at this commit: name -> bytes

    @field_validator("files")
    @classmethod
    def _names_stay_inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            if not is_safe_name(name):
                raise ValueError(f"the file name {name!r} leads out of the snapshot")
        return files

    @property
    def names(self) -> list[str]:
        """Every file of the repository at this commit, fetched or not."""
        return sorted({*self.files, *self.not_fetched})

    @property
    def size(self) -> int:
        """Bytes of all the files that were fetched."""
        return sum(f.size for f in self.files.values())


@dataclass(frozen=True)
class Snapshot:
    """A snapshot directory, with its manifest where it has one."""

    path: Path
    manifest: Manifest | None

    @classmethod
    def open(cls, path: Path) -> Snapshot:
        """Reads the manifest. Raises SnapshotError if `path` is no directory or its manifest is damaged."""
        if not path.is_dir():
            raise SnapshotError(f"no such snapshot directory: {path}", fix="trtllm download REPO_ID")
        return cls(path, read_manifest(path))

    @property
    def model_path(self) -> Path:
        """What the next stage reads: the directory, or the GGUF file that is all there is (of several, the first)."""
        if not (self.path / "config.json").is_file() and (ggufs := sorted(self.path.rglob("*.gguf"))):
            return ggufs[0]
        return self.path

    def verify(self, *, hashes: bool = True) -> None:
        """Holds the files against the manifest. Raises SnapshotError that names each missing or altered file."""
        if self.manifest is None:
            raise SnapshotError(
                f"{self.path} has no {MANIFEST}, so there is nothing to verify it against",
                fix="fetch it with trtllm download",
            )
        if damage := find_damage(self.path, self.manifest, hashes=hashes):
            listing = "; ".join(f"{name} {what}" for name, what in damage.items())
            m = self.manifest
            cached = self.path == repo_dir(m.repo_id) / m.commit
            raise SnapshotError(
                f"the snapshot is damaged: {listing}",
                where=str(self.path),
                fix=f"trtllm download {m.repo_id} --revision {m.commit} --verify"
                + ("" if cached else f" --output-dir {self.path}"),
            )


def find_damage(path: Path, manifest: Manifest, *, hashes: bool = True) -> dict[str, str]:
    """File name -> what is wrong with it, of the files under `path` that are not as the manifest has them.

    Without `hashes` only the sizes are compared, which takes no time and does not see altered bytes.
    """
    damage = {}
    for name, entry in manifest.files.items():
        file = path / name
        if not file.is_file():
            damage[name] = "is missing"
        elif (size := file.stat().st_size) != entry.size:
            damage[name] = f"has {human_bytes(size)} ({size} bytes) instead of {entry.size} bytes"
        elif hashes and sha256(file) != entry.sha256:
            damage[name] = "has the right size, but its bytes were altered"
    return damage


def read_manifest(path: Path) -> Manifest | None:
    """The manifest of the snapshot directory, or None where it has none. Raises SnapshotError for a damaged one."""
    file = path / MANIFEST
    if not file.is_file():
        return None
    return validate(Manifest, read_json(file, SnapshotError), file, SnapshotError)


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Writes the manifest, in one step: a reader sees the old one or the new."""
    _write_whole(path / MANIFEST, manifest.model_dump(mode="json"))


def is_safe_name(name: str) -> bool:
    """Whether a repository's file name stays inside the directory that it is written to."""
    parts = name.split("/")
    return (
        not any(part in ("", ".", "..") for part in parts)
        and not PurePosixPath(name).is_absolute()
        and not re.match(r"[A-Za-z]:", name)
        and name.isprintable()
        and "\\" not in name
    )


def cache_dir() -> Path:
    """Where artifacts are kept between runs: TRTLLM_CACHE, or `trtllm` in XDG_CACHE_HOME, or in ~/.cache."""
    if own := os.environ.get("TRTLLM_CACHE"):
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared and os.path.isabs(shared) else Path.home() / ".cache") / "trtllm"


def repo_dir(repo_id: str) -> Path:
    """Where the cached snapshots of the repository are."""
    return cache_dir() / "snapshots" / repo_id.replace("/", "--")


def cached_commits(repo_id: str) -> dict[str, str]:
    """Revision -> the commit that it was when it was last fetched into the cache."""
    refs = repo_dir(repo_id) / "refs.json"
    if not refs.is_file():
        return {}
    data = read_json(refs, SnapshotError)
    return {r: c for r, c in data.items() if isinstance(c, str) and COMMIT.fullmatch(c)}


def cached_commit(repo_id: str, revision: str | None) -> str | None:
    """The commit that `revision` (default: main) stands for as far as the cache knows; a commit is itself."""
    if revision and COMMIT.fullmatch(revision):
        return revision
    return cached_commits(repo_id).get(revision or DEFAULT_REVISION)


def remember_commit(repo_id: str, revision: str, commit: str) -> None:
    """Notes in the cache which commit `revision` is."""
    known = cached_commits(repo_id)
    if known.get(revision) != commit:
        _write_whole(repo_dir(repo_id) / "refs.json", {**known, revision: commit})


def _write_whole(path: Path, data: object) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(temporary, data)
        temporary.replace(path)
