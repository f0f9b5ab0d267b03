"""One file from the hub to disk: resumed where an earlier run stopped, verified before it gets its name.

Bytes go to `NAME.incomplete`; `NAME.incomplete.json` beside it says what they are the beginning of. A later run asks
for the rest with a Range request, and starts over if the server's file is not the same any more. The content hash
comes from the repository's listing: sha256 of a large (LFS) file, git's blob hash of a small one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import get_session

from trtllm_cli.artifact import HASH_CHUNK, os_errors
from trtllm_cli.convert.retry import Patience, TryAgain, check_status, describe_failure
from trtllm_cli.errors import DownloadError
from trtllm_cli.snapshot import FileEntry

if TYPE_CHECKING:
    from io import FileIO

INCOMPLETE = ".incomplete"
RECORD = ".incomplete.json"
SEGMENT = 32 << 30  # bytes of one request at most: the hub's CDN refuses plain requests for more than 50 GB


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at one commit, as the hub lists it."""

    name: str  # path in the repository
    size: int  # bytes
    sha256: str | None  # of LFS files
    blob_id: str | None  # git's hash, of the others

    @property
    def oid(self) -> str:
        """What identifies the content."""
        return self.sha256 or self.blob_id or ""


class Progress:
    """Told what happens; this one keeps it to itself. Called from several threads."""

    def begin(self, files: int, size: int) -> None:
        """`files` files of `size` bytes together are about to be fetched."""

    def start(self, name: str, size: int) -> None:
        """The file of `size` bytes is on its way."""

    def advance(self, name: str, count: int) -> None:
        """`count` more bytes of `name` came over the network and are on disk."""

    def skip(self, name: str, count: int) -> None:
        """`count` bytes of `name` are here from an earlier run; negative: they were thrown away."""

    def finish(self, name: str) -> None:
        """`name` is complete and verified."""

    def note(self, message: str) -> None:
        """Something worth telling: a retry, a file that was altered."""


class Stopped(Exception):  # noqa: N818
    """Another file failed, or the user interrupted: this one ends where it is, to be resumed."""


class Transfer:
    """Fetches one file into `target`."""

    def __init__(
        self,
        file: RemoteFile,
        url: str,
        target: Path,
        *,
        headers: Mapping[str, str],
        patience: Patience,
        progress: Progress,
        stop: threading.Event,
    ) -> None:
        self.file = file
        self.url = url
        self.target = target
        self.part = target.with_name(target.name + INCOMPLETE)
        self.record = target.with_name(target.name + RECORD)
        self.headers = dict(headers)
        self.patience = patience
        self.progress = progress
        self.stop = stop
        self.have = 0  # bytes in `part`
        self.resumed = False  # whether some of them are from an earlier run
        self.etag: str | None = None
        self._reset_digest()

    def run(self) -> FileEntry:
        """Fetches what is missing. Raises DownloadError, ResourceError, HfHubHTTPError (a refusal), or Stopped."""
        self.progress.start(self.file.name, self.file.size)
        if entry := self._keep_existing():
            return entry
        with os_errors(self.target):
            self.target.parent.mkdir(parents=True, exist_ok=True)
            out = self.part.open("ab", buffering=0)
        with out:
            self._resume(out)
            self._receive_all(out)
            if not self._matches() and self.resumed:
                self.progress.note(f"{self.file.name}: the part from an earlier run was altered; starting over")
                self._start_over(out)
                self._receive_all(out)
            if not self._matches():
                found = self._digest.hexdigest()
                self._start_over(out)
                raise DownloadError(
                    f"{self.file.name} is damaged: its bytes are not the ones that the repository lists "
                    f"({'sha256' if self.file.sha256 else 'git blob'} {found}, expected {self.file.oid})",
                    where=self.url,
                    fix="run the same command again; if it stays, a proxy or mirror between here and the hub alters it",
                )
            with os_errors(self.target):
                os.fsync(out.fileno())
        with os_errors(self.target):
            self.part.replace(self.target)
            self.record.unlink(missing_ok=True)
        self.progress.finish(self.file.name)
        return FileEntry(size=self.file.size, sha256=self._sha256.hexdigest())

    def _keep_existing(self) -> FileEntry | None:
        """A whole file that an earlier run left is kept if its bytes are right."""
        if not self.target.is_file():
            return None
        if self.target.stat().st_size == self.file.size:
            self._hash_file(self.target)
            if self._matches():
                self.progress.skip(self.file.name, self.file.size)
                self.progress.finish(self.file.name)
                return FileEntry(size=self.file.size, sha256=self._sha256.hexdigest())
            self.progress.note(f"{self.file.name}: its bytes were altered since it was fetched; fetching it again")
        else:
            self.progress.note(f"{self.file.name}: its size changed since it was fetched; fetching it again")
        self._reset_digest()
        return None

    def _resume(self, out: FileIO) -> None:
        """Takes up what an earlier run left, if it is the beginning of the same file."""
        self.have = os.fstat(out.fileno()).st_size
        record = self._read_record()
        same = record.get("oid") == self.file.oid and record.get("size") == self.file.size
        if not same or self.have > self.file.size:
            if self.have and record:
                self.progress.note(f"{self.file.name}: another version was begun earlier; starting over")
            self.have = 0
            self._start_over(out)
            return
        self.etag = record.get("etag")
        self.resumed = self.have > 0
        self._hash_file(self.part)
        self.progress.skip(self.file.name, self.have)

    def _read_record(self) -> dict[str, Any]:
        try:
            data = json.loads(self.record.read_bytes())
        except (OSError, ValueError):
            return {}
        return data if isinstance(data, dict) else {}

    def _write_record(self) -> None:
        record = {"oid": self.file.oid, "size": self.file.size, "etag": self.etag}
        with os_errors(self.record):
            self.record.write_text(json.dumps(record), encoding="utf-8")

    def _start_over(self, out: FileIO) -> None:
        with os_errors(self.part):
            out.truncate(0)
        self.record.unlink(missing_ok=True)
        self.progress.skip(self.file.name, -self.have)
        self.have, self.resumed, self.etag = 0, False, None
        self._reset_digest()

    def _receive_all(self, out: FileIO) -> None:
        """Requests the rest until it is there. Only failures without any progress between them count."""
        furthest, failures = self.have, 0
        while self.have < self.file.size:
            asked = None
            try:
                goal = min(self.have + SEGMENT, self.file.size)
                self._receive(out, goal)
                if self.have >= goal:
                    continue
                reason = f"the connection ended after {self.have} of {self.file.size} bytes"
            except TryAgain as e:
                reason, asked = str(e), e.wait
            except HfHubHTTPError:
                raise
            except HTTPError as e:
                reason = describe_failure(e)
            failures = 1 if self.have > furthest else failures + 1
            furthest = max(furthest, self.have)
            self._pause(failures, reason, asked)

    def _pause(self, failures: int, reason: str, asked: float | None) -> None:
        if self.patience.ends(failures, asked):
            when = f" in {asked:.0f} s" if asked else ""
            raise DownloadError(
                f"{self.file.name} cannot be fetched: {reason} ({failures} tries without progress)",
                where=self.url,
                fix=f"run the same command again{when}: it goes on from {self.have} bytes",
            )
        seconds = self.patience.wait(failures, asked)
        self.progress.note(f"{self.file.name}: {reason}; trying again in {seconds:.0f} s")
        if self.stop.wait(seconds):
            raise Stopped

    def _receive(self, out: FileIO, goal: int) -> None:
        """One request for the bytes up to `goal`, and what it brings."""
        headers = {**self.headers, "Accept-Encoding": "identity"}
        if self.have or goal < self.file.size:
            headers["Range"] = f"bytes={self.have}-{goal - 1}"
        with get_session().stream(
            "GET", self.url, headers=headers, timeout=self.patience.timeout, follow_redirects=True
        ) as response:
            if response.status_code == 416:
                self._start_over(out)
                raise TryAgain("the server does not have the bytes that are missing (HTTP 416)")
            check_status(response)
            if usable := self._align(response, out):
                self._write_record()
                for chunk in response.iter_bytes():
                    if self.stop.is_set():
                        raise Stopped
                    self._append(out, chunk)
        if not usable:
            self._receive(out, min(SEGMENT, self.file.size))

    def _align(self, response: Any, out: FileIO) -> bool:
        """Whether the body goes where we are; starts over first if the server's file is another, or comes whole.

        False: it is a part from the middle of another file, and has to be asked for from its beginning.
        """
        etag = file_etag(response)
        start = content_start(response)
        if self.have and None not in (self.etag, etag) and etag != self.etag:
            self.progress.note(f"{self.file.name}: the server's file changed (its ETag did); starting over")
            self._start_over(out)
            if start:
                return False
        elif self.have and start == 0:
            self.progress.note(f"{self.file.name}: the server sends it only whole; starting over")
            self._start_over(out)
        if start != self.have:
            raise TryAgain(f"the server sent bytes from {start} on, not from {self.have}")
        self.etag = etag
        return True

    def _append(self, out: FileIO, chunk: bytes) -> None:
        if self.have + len(chunk) > self.file.size:
            sent = self.have + len(chunk)
            self._start_over(out)
            raise DownloadError(
                f"{self.file.name} is damaged: the server sends {sent} bytes or more, "
                f"the repository lists {self.file.size}",
                where=self.url,
                fix="run the same command again; if it stays, a proxy or mirror between here and the hub alters it",
            )
        with os_errors(self.part):
            view = memoryview(chunk)
            while view:
                view = view[out.write(view) :]
        self._update_digest(chunk)
        self.have += len(chunk)
        self.progress.advance(self.file.name, len(chunk))

    def _reset_digest(self) -> None:
        self._sha256 = hashlib.sha256()
        self._git = hashlib.sha1(b"blob %d\0" % self.file.size, usedforsecurity=False)

    @property
    def _digest(self) -> Any:
        return self._sha256 if self.file.sha256 else self._git

    def _update_digest(self, data: bytes) -> None:
        self._sha256.update(data)
        if not self.file.sha256:
            self._git.update(data)

    def _hash_file(self, path: Path) -> None:
        self._reset_digest()
        for piece in _pieces(path):
            if self.stop.is_set():
                raise Stopped
            self._update_digest(piece)

    def _matches(self) -> bool:
        return self._digest.hexdigest() == self.file.oid


def file_etag(response: Any) -> str | None:
    """The file's own ETag: on the hub's redirect to the CDN it is X-Linked-ETag; the CDN's ETag is another matter."""
    for hop in (*response.history, response):
        if linked := hop.headers.get("x-linked-etag"):
            return _bare(linked)
    return None if response.history else _bare(response.headers.get("etag"))


def _bare(etag: str | None) -> str | None:
    return etag.removeprefix("W/").strip('"') if etag else None


def content_start(response: Any) -> int:
    """At which byte of the file the body begins."""
    if response.status_code != 206:
        return 0
    match = re.match(r"bytes (\d+)-", response.headers.get("content-range", ""))
    if not match:
        raise TryAgain("the server sent a part without saying which (no Content-Range)")
    return int(match[1])


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as f:
        while piece := f.read(HASH_CHUNK):
            yield piece
