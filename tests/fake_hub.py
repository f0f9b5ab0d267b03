"""A small local server that speaks the part of the Hugging Face hub's protocol that downloads need.

    GET  /api/models/ID/revision/REV?blobs=true    the commit, and the files with size and hash
    GET  /ID/resolve/COMMIT/PATH                   a small file: the bytes. A large (LFS) one: 302 to the CDN
    GET  /cdn/SHA256                               on another port, so that it is another origin; takes Range

Errors carry X-Error-Code as the hub's do. `faults` makes requests for a path fail on purpose; `log` has every
request.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LFS_FROM = 2048  # bytes: files at least this large are LFS files


@dataclass
class Fault:
    """What goes wrong with one request for a path's bytes."""

    status: int | None = None  # answer this instead
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None  # close the connection after this many bytes of the body
    stall: float = 0.0  # seconds without a byte, after `cut_after` bytes or at once
    ignore_range: bool = False  # answer 200 with the whole file
    body: bytes | None = None  # other bytes than the listed ones


@dataclass
class Request:
    """One request as it came."""

    path: str
    range: str | None
    token: str | None

    @property
    def start(self) -> int:
        """The first byte asked for."""
        return int(self.range.split("=")[1].split("-")[0]) if self.range else 0


@dataclass
class Repo:
    """A model repository: its files at each commit."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated_for: str | None = None  # the only token that may read it
    etags: dict[str, str] = field(default_factory=dict)  # path -> instead of the content's hash

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        """Adds a commit and points `ref` at it."""
        digest = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[digest] = files
        self.refs[ref] = digest
        return digest


class FakeHub:
    """The hub (`endpoint`) and its CDN, served from threads."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.log: list[Request] = []
        self.faults: dict[str, list[Fault]] = {}  # path in a repository, or "api" -> one fault a request
        self.most_at_once = self._now = 0  # requests to the CDN
        self._lock = threading.Lock()
        self.rate: float | None = None  # bytes a second of each response
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), self._handler(kind)) for kind in ("hub", "cdn")]
        self.endpoint, self.cdn = (f"http://127.0.0.1:{s.server_port}" for s in self._servers)

    def add(self, repo_id: str, files: dict[str, bytes], **settings) -> str:
        """Adds a repository of one commit, which is returned."""
        self.repos[repo_id] = Repo(**settings)
        return self.repos[repo_id].commit(files)

    def requests(self, name: str) -> list[Request]:
        """The requests for this file's bytes, where they were served."""
        digests = {sha256(f[name]) for r in self.repos.values() for f in r.commits.values() if name in f}
        wanted = {f"/cdn/{d}/{name}" for d in digests}
        large = [r for r in self.log if r.path in wanted]
        return large or [r for r in self.log if r.path.endswith(f"/{name}")]

    @contextlib.contextmanager
    def running(self) -> Iterator[FakeHub]:
        """Serves until the block ends."""
        threads = [threading.Thread(target=s.serve_forever, args=(0.02,), daemon=True) for s in self._servers]
        for server, thread in zip(self._servers, threads, strict=True):
            server.daemon_threads = True
            thread.start()
        try:
            yield self
        finally:
            for server, thread in zip(self._servers, threads, strict=True):
                server.shutdown()
                server.server_close()
                thread.join()

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Counts how many requests are served at the same time."""
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            yield
        finally:
            with self._lock:
                self._now -= 1

    def _handler(hub, kind: str):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args) -> None:
                pass

            def do_GET(self) -> None:
                path = unquote(urlsplit(self.path).path)
                token = (self.headers.get("authorization") or "").removeprefix("Bearer ") or None
                hub.log.append(Request(path, self.headers.get("range"), token))
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    if kind == "cdn":
                        with hub.counted():
                            self.serve_cdn(path)
                    elif match := re.fullmatch(r"/api/models/(.+)/revision/(.+)", path):
                        self.serve_info(match[1], match[2], token)
                    elif match := re.fullmatch(r"/(.+?)/resolve/([0-9a-f]{40})/(.+)", path):
                        self.serve_file(match[1], match[2], match[3], token)
                    else:
                        self.refuse(404, "EntryNotFound")

            def refuse(self, status: int, code: str | None = None, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for key, value in {**({"X-Error-Code": code} if code else {}), **(headers or {})}.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def fault(self, name: str) -> Fault:
                waiting = hub.faults.get(name)
                return waiting.pop(0) if waiting else Fault()

            def repo(self, repo_id: str, token: str | None) -> Repo | None:
                repo = hub.repos.get(repo_id)
                if repo is None:
                    self.refuse(404 if token else 401, "RepoNotFound")
                    return None
                return repo

            def may_read(self, repo: Repo, token: str | None) -> bool:
                if repo.gated_for and token != repo.gated_for:
                    self.refuse(403 if token else 401, "GatedRepo")
                    return False
                return True

            def serve_info(self, repo_id: str, revision: str, token: str | None) -> None:
                fault = self.fault("api")
                time.sleep(fault.stall)
                if fault.status:
                    return self.refuse(fault.status, headers=fault.headers)
                if (repo := self.repo(repo_id, token)) is None:
                    return None
                commit = repo.refs.get(revision, revision)
                if commit not in repo.commits:
                    return self.refuse(404, "RevisionNotFound")
                if not self.may_read(repo, token):
                    return None
                siblings = [describe(name, data) for name, data in repo.commits[commit].items()]
                body = fault.body or json.dumps({"id": repo_id, "sha": commit, "siblings": siblings}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                return self.send_body(body, Fault())

            def serve_file(self, repo_id: str, commit: str, name: str, token: str | None) -> None:
                if (repo := self.repo(repo_id, token)) is None or not self.may_read(repo, token):
                    return None
                data = repo.commits[commit].get(name)
                if data is None:
                    return self.refuse(404, "EntryNotFound")
                if len(data) >= LFS_FROM:
                    self.send_response(302)
                    self.send_header("Location", f"{hub.cdn}/cdn/{sha256(data)}/{name}")
                    self.send_header("X-Linked-ETag", f'"{repo.etags.get(name, sha256(data))}"')
                    self.send_header("X-Linked-Size", str(len(data)))
                    self.send_header("X-Repo-Commit", commit)
                    self.send_header("Content-Length", "0")
                    return self.end_headers()
                return self.serve_bytes(name, data, repo.etags.get(name, git_blob(data)))

            def serve_cdn(self, path: str) -> None:
                _, _, digest, name = path.split("/", 3)
                everything = (f[name] for r in hub.repos.values() for f in r.commits.values() if name in f)
                data = next(d for d in everything if sha256(d) == digest)
                self.serve_bytes(name, data, "the-cdn-has-etags-of-its-own")

            def serve_bytes(self, name: str, data: bytes, etag: str) -> None:
                fault = self.fault(name)
                if fault.status:
                    return self.refuse(fault.status, headers=fault.headers)
                if fault.body is not None:
                    data = fault.body
                match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range") or "")
                if match and not fault.ignore_range:
                    start, end = int(match[1]), min(int(match[2] or len(data)) + 1, len(data))
                    if start >= len(data):
                        return self.refuse(416)
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
                    data = data[start:end]
                else:
                    self.send_response(200)
                self.send_header("ETag", f'"{etag}"')
                self.send_header("Accept-Ranges", "bytes")
                return self.send_body(data, fault)

            def send_body(self, data: bytes, fault: Fault) -> None:
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                broken = fault.cut_after is not None or fault.stall
                sent = data[: fault.cut_after or 0] if broken else data
                step = max(1, int(hub.rate / 50)) if hub.rate else len(sent) or 1
                for i in range(0, len(sent), step):
                    self.wfile.write(sent[i : i + step])
                    if hub.rate:
                        time.sleep(1 / 50)
                if broken:
                    self.wfile.flush()
                    time.sleep(fault.stall)
                    self.close_connection = True

        return Handler


def describe(name: str, data: bytes) -> dict:
    """A file as the hub lists it."""
    entry = {"rfilename": name, "size": len(data), "blobId": git_blob(data)}
    if len(data) >= LFS_FROM:
        pointer = b"version https://git-lfs.github.com/spec/v1\n"
        entry["blobId"] = git_blob(pointer)
        entry["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 134}
    return entry


def sha256(data: bytes) -> str:
    """The hash that an LFS file goes by."""
    return hashlib.sha256(data).hexdigest()


def git_blob(data: bytes) -> str:
    """The hash that a small file goes by."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def pattern_bytes(size: int, seed: int = 0) -> bytes:
    """Bytes that differ everywhere, the same each time."""
    out = bytearray()
    while len(out) < size:
        out += hashlib.sha256(f"{seed}:{len(out)}".encode()).digest()
    return bytes(out[:size])


def llama_files(**more: bytes) -> dict[str, bytes]:
    """A small repository as models have them: weights several times over."""
    return {
        "config.json": b'{"model_type": "llama"}',
        "tokenizer.json": pattern_bytes(3000, 1),
        "README.md": b"# A model\n",
        "model.safetensors": pattern_bytes(300_000, 2),
        "pytorch_model.bin": pattern_bytes(5000, 3),
        "original/consolidated.00.pth": pattern_bytes(5000, 4),
        "onnx/model.onnx": pattern_bytes(5000, 5),
        ".gitattributes": b"*.safetensors filter=lfs\n",
        **more,
    }


def main() -> None:
    """Serves on its own, for another process: prints the endpoint."""
    hub = FakeHub()
    hub.add("org/model", llama_files())
    with hub.running():
        print(hub.endpoint, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
