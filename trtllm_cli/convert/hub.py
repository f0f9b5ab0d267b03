"""From the Hugging Face hub to a snapshot on disk: resumable across runs, verified, fetched once.

`huggingface_hub` says what a repository holds, finds the token and words the hub's refusals. The bytes are ours to move
(see transfer.py): it starts each file again after a killed run, and does not notice bytes altered at the same size.

A new snapshot is collected in `.NAME.partial` beside its place, and renamed when every file is there and verified.
"""

from __future__ import annotations

import concurrent.futures
import os
import shutil
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trtllm_cli.artifact import human_bytes, locked, os_errors
from trtllm_cli.convert.file_selection import listed, select
from trtllm_cli.convert.hub_api import HubApi, check_repo_id, is_offline
from trtllm_cli.convert.retry import Patience
from trtllm_cli.convert.transfer import INCOMPLETE, Progress, RemoteFile, Transfer
from trtllm_cli.errors import DownloadError, OutputExistsError, ResourceError, SnapshotError, UsageError
from trtllm_cli.snapshot import (
    COMMIT,
    DEFAULT_REVISION,
    MANIFEST,
    FileEntry,
    Manifest,
    Snapshot,
    cached_commit,
    cached_commits,
    find_damage,
    read_manifest,
    remember_commit,
    repo_dir,
    write_manifest,
)

SPARE = 64 << 20  # bytes that a download leaves free on the disk


@dataclass(frozen=True)
class DownloadOptions:
    """What to fetch, where to, and how."""

    revision: str | None = None  # branch, tag or commit; default: main
    include: tuple[str, ...] = ()  # globs; default: see file_selection.py
    exclude: tuple[str, ...] = ()
    output_dir: Path | None = None  # default: the cache
    token: str | None = None  # default: HF_TOKEN, or the one that `hf auth login` keeps
    offline: bool = False
    workers: int = 4  # files at a time
    force: bool = False  # fetch everything again
    verify: bool = False  # hash what is there already, not only compare sizes
    endpoint: str | None = None  # default: HF_ENDPOINT, or https://huggingface.co
    patience: Patience | None = None


@dataclass(frozen=True)
class Download:
    """A finished download."""

    snapshot: Snapshot
    manifest: Manifest
    fetched: tuple[str, ...]  # the files that this call fetched; none when everything was there

    @property
    def path(self) -> Path:
        """What convert reads: the directory, or its GGUF file."""
        return self.snapshot.model_path


def download(repo_id: str, options: DownloadOptions | None = None, progress: Progress | None = None) -> Download:
    """Makes sure that the snapshot is on disk, complete and verified.

    Raises DownloadError (the hub refuses or cannot be reached), SnapshotError (damaged, and offline), ResourceError
    (disk, permissions), OutputExistsError, UsageError.
    """
    return _Downloader(repo_id, options or DownloadOptions(), progress or Progress()).run()


class _Downloader:
    def __init__(self, repo_id: str, options: DownloadOptions, progress: Progress) -> None:
        self.repo_id = check_repo_id(repo_id)
        self.options = options
        self.progress = progress
        self.revision = options.revision or DEFAULT_REVISION
        self.offline = options.offline or is_offline()
        self.hub = HubApi(
            options.endpoint, options.token, options.patience or Patience.from_environment(), self.progress
        )
        if self.offline and options.force:
            raise UsageError("--force fetches everything again, --offline forbids it", where="--force")
        if options.workers < 1:
            raise UsageError(f"--workers is {options.workers}, and has to be at least 1", where="--workers")

    def run(self) -> Download:
        """Offline, or pinned to a commit that is here already: no network. Otherwise the hub is asked."""
        if self.offline:
            return self._from_disk()
        if COMMIT.fullmatch(self.revision) and not self.options.force and (found := self._known_commit()):
            return found
        commit, files = self.hub.list_files(self.repo_id, self.revision)
        destination = self._destination(commit)
        manifest = self._manifest_at(destination, commit)
        chosen = select(files, self.options.include, self.options.exclude, self._where(commit))
        intact = self._intact(destination, manifest, chosen) if manifest else {}
        wanted = [files[name] for name in chosen if name not in intact]
        if wanted or manifest is None:
            if manifest is None:
                self._check_output(destination, commit)
            manifest = self._fetch(destination, manifest, commit, files, wanted)
        if self.options.output_dir is None:
            remember_commit(self.repo_id, self.revision, commit)
        return Download(Snapshot(destination, manifest), manifest, tuple(f.name for f in wanted))

    def _where(self, commit: str) -> str:
        return f"{self.repo_id} ({self.revision}: {commit[:12]})" if self.revision != commit else f"{self.repo_id}"

    def _destination(self, commit: str) -> Path:
        return Path(os.path.abspath(self.options.output_dir or repo_dir(self.repo_id) / commit))

    # What is on disk already

    def _manifest_at(self, path: Path, commit: str) -> Manifest | None:
        """The manifest of a snapshot of this commit at `path`, unless everything is to be fetched again."""
        if self.options.force:
            return None
        try:
            manifest = read_manifest(path)
        except SnapshotError as e:
            raise OutputExistsError(
                f"the snapshot's manifest is damaged: {e.message}",
                where=e.where,
                fix="pass --force to fetch everything again",
            ) from None
        return manifest if manifest and (manifest.repo_id, manifest.commit) == (self.repo_id, commit) else None

    def _intact(self, path: Path, manifest: Manifest, chosen: Sequence[str]) -> set[str]:
        """The chosen files that are here and as they were fetched."""
        here = {n: manifest.files[n] for n in chosen if n in manifest.files}
        damage = find_damage(path, manifest.model_copy(update={"files": here}), hashes=self.options.verify)
        for name, what in damage.items():
            self.progress.note(f"{name} {what}")
        return here.keys() - damage.keys()

    def _known_commit(self) -> Download | None:
        """The snapshot of the commit that was asked for, if it is here, whole, and holds every file asked for."""
        path = self._destination(self.revision)
        if not (manifest := self._manifest_at(path, self.revision)):
            return None
        chosen = select(manifest.names, self.options.include, self.options.exclude, self._where(self.revision))
        if len(self._intact(path, manifest, chosen)) < len(chosen):
            return None
        return Download(Snapshot(path, manifest), manifest, ())

    def _from_disk(self) -> Download:
        """What `--offline` finds. Raises DownloadError if it is not here, SnapshotError if it is damaged."""
        commit = cached_commit(self.repo_id, self.revision)
        path = self.options.output_dir or (repo_dir(self.repo_id) / commit if commit else None)
        manifest = read_manifest(path) if path else None
        if path is None or manifest is None or not self._is_asked_for(manifest):
            raise self._not_here()
        chosen = select(manifest.names, self.options.include, self.options.exclude, self._where(manifest.commit))
        if absent := [n for n in chosen if n not in manifest.files]:
            raise DownloadError(
                f"the snapshot of {self._where(manifest.commit)} has not all the files, and --offline forbids fetching "
                f"them: {listed(absent)}",
                where=str(path),
                fix="run it once without --offline (and without HF_HUB_OFFLINE)",
            )
        if len(self._intact(path, manifest, chosen)) < len(chosen):
            Snapshot(path, manifest).verify(hashes=self.options.verify)
        return Download(Snapshot(Path(os.path.abspath(path)), manifest), manifest, ())

    def _is_asked_for(self, manifest: Manifest) -> bool:
        return manifest.repo_id == self.repo_id and (
            self.options.output_dir is None or self.revision in (manifest.revision, manifest.commit)
        )

    def _not_here(self) -> DownloadError:
        known = ", ".join(f"{r} ({c[:12]})" for r, c in cached_commits(self.repo_id).items())
        return DownloadError(
            f"{self.repo_id} at revision {self.revision} is not on this machine, and --offline forbids fetching it",
            where=str(self.options.output_dir or repo_dir(self.repo_id)),
            fix="run it once without --offline (and without HF_HUB_OFFLINE)"
            + (f", or take a revision that is here: {known}" if known else ""),
        )

    def _check_output(self, path: Path, commit: str) -> None:
        """Only a snapshot that we fetched is ever replaced, and only with --force."""
        if not path.is_dir():
            if path.exists():
                raise OutputExistsError(
                    f"{path} is a file", where="--output-dir", fix="choose a directory that is not there yet"
                )
            return
        if not any(path.iterdir()):
            return
        if not (path / MANIFEST).is_file():
            raise OutputExistsError(
                f"{path} holds something that trtllm did not download, so it will not be touched",
                where="--output-dir",
                fix="choose another directory, or remove it yourself",
            )
        if not self.options.force and (other := read_manifest(path)):
            raise OutputExistsError(
                f"{path} holds {other.repo_id} at commit {other.commit[:12]}, "
                f"asked for is {self.repo_id} at commit {commit[:12]}",
                where="--output-dir",
                fix=f"pass --force to replace it, --revision {other.commit} to keep it, or choose another directory",
            )

    # Fetching

    def _fetch(
        self,
        destination: Path,
        old: Manifest | None,
        commit: str,
        files: Mapping[str, RemoteFile],
        wanted: Sequence[RemoteFile],
    ) -> Manifest:
        """Fetches `wanted` into a snapshot that is there already (`old`), or into a new one."""
        work = destination if old else destination.with_name(f".{destination.name}.partial")
        with os_errors(destination):
            work.mkdir(parents=True, exist_ok=True)
        with locked(work, f"downloading to {destination}"):
            if self.options.force:
                _clear(work)
            self._check_space(work, wanted)
            self.progress.begin(len(wanted), sum(f.size for f in wanted))
            fetched = self._fetch_files(work, commit, wanted)
            entries = {**(old.files if old else {}), **fetched}
            manifest = Manifest(
                repo_id=self.repo_id,
                revision=self.revision,
                commit=commit,
                files=dict(sorted(entries.items())),
                not_fetched={n: f.size for n, f in sorted(files.items()) if n not in entries},
            )
            if old is None:
                _prune(work, entries.keys())
            write_manifest(work, manifest)
            if old is None:
                with os_errors(destination):
                    _put_in_place(work, destination)
        return manifest

    def _check_space(self, work: Path, wanted: Sequence[RemoteFile]) -> None:
        need = sum(max(0, f.size - _bytes_here(work / f.name)) for f in wanted)
        free = shutil.disk_usage(work).free
        if need and need + SPARE > free:
            raise ResourceError(
                f"the download needs {human_bytes(need)}, and {human_bytes(free)} are free at {work.parent}",
                fix="free some room, choose another --output-dir (or TRTLLM_CACHE), or fetch less with --include",
            )

    def _fetch_files(self, work: Path, commit: str, wanted: Sequence[RemoteFile]) -> dict[str, FileEntry]:
        """Fetches all files, several at a time, the largest first. The first failure stops the others."""
        headers = self.hub.headers()
        stop = threading.Event()

        def fetch(file: RemoteFile) -> FileEntry:
            target = work / file.name
            transfer = Transfer(
                file,
                self.hub.file_url(self.repo_id, commit, file.name),
                target,
                headers=headers,
                patience=self.hub.patience,
                progress=self.progress,
                stop=stop,
            )
            with os_errors(target), self.hub.refusals(self.repo_id, self.revision):
                return transfer.run()

        with concurrent.futures.ThreadPoolExecutor(self.options.workers, "download") as pool:
            futures: dict[concurrent.futures.Future[FileEntry], RemoteFile] = {}
            try:
                for file in sorted(wanted, key=lambda f: -f.size):
                    futures[pool.submit(fetch, file)] = file
                for future in concurrent.futures.as_completed(futures):
                    future.result()
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)
        return {futures[f].name: f.result() for f in futures}


def _bytes_here(target: Path) -> int:
    for path in (target, target.with_name(target.name + INCOMPLETE)):
        if path.is_file():
            return path.stat().st_size
    return 0


def _clear(directory: Path) -> None:
    with os_errors(directory):
        for entry in directory.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def _prune(directory: Path, keep: Iterable[str]) -> None:
    """Removes what an earlier, other download left in the partial directory."""
    names = set(keep)
    with os_errors(directory):
        for path in sorted(directory.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.relative_to(directory).as_posix() not in names:
                path.unlink()


def _put_in_place(work: Path, destination: Path) -> None:
    """Renames the finished directory, moving out of the way what it replaces."""
    if not destination.exists():
        work.rename(destination)
        return
    old = destination.with_name(f".{destination.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    destination.rename(old)
    work.rename(destination)
    shutil.rmtree(old, ignore_errors=True)
