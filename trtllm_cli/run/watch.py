"""Ranks that watch over each other: one that fails, dies or hangs ends them all, and its message is the one told.

Every rank has a thread that tells rank 0, over a TCP connection of its own, what it is doing (`Activity`); rank 0's
thread, the hub, tells that it lives. The hub takes the first failure that it hears of, prints it and ends the world. It
counts as a failure

- that a rank says so: it raised;
- that a connection ends: the rank was killed, or crashed;
- that a rank is not heard of for `timeout` seconds: its process is frozen;
- that a rank computes and gets nothing done in that time: it hangs;
- that every rank waits for another in that time.

The launcher notices no more than that a process has ended, and MPI itself would wait for ever.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from trtllm_cli.errors import RankError
from trtllm_cli.run.communicator import Activity

BEAT = 0.5  # seconds
TICK = 0.1  # seconds: how soon a failure is seen at the latest
# Seconds that rank 0 has to say the same: what is wrong for every rank is then told as no rank's own.
GRACE = 0.25
LAST_WORDS = 3.0  # seconds until a rank that has failed ends, told or not
_MAX_LINE = 1 << 20  # bytes


@dataclass(frozen=True)
class Failure:
    """Why the world ends."""

    rank: int
    text: str
    code: int  # of the process's exit

    def told(self, hosts: Sequence[str] = ()) -> str:
        """The text, with whose it is; `hosts` of the ranks, where they are not all one."""
        where = f" on {hosts[self.rank]}" if len(set(hosts)) > 1 else ""
        return f"rank {self.rank}{where}: {self.text}"


class Watch(Protocol):
    """One rank's thread."""

    def fail(self, failure: Failure) -> None:
        """Ends the world with this failure, unless there was one before. Returns at once."""
        ...

    def say(self, word: str) -> None:
        """Lets rank 0 know."""
        ...

    def close(self) -> None:
        """Ends watching, when every rank is done."""
        ...


Report = Callable[[str], None]  # prints why the world ends
End = Callable[[int], None]  # ends this process, and the world's others where it can; does not return


@dataclass
class _Seen:
    """What the hub knows of a rank."""

    heard: float
    since: float  # when it last got something done, or began or ceased to wait
    progress: int = -1
    waits: bool = False
    stage: str = "start"
    said: set[str] = field(default_factory=set)
    connection: _Line | None = None
    failed: bool = False  # has said so: no more is expected of it, but it is to be told the end
    left: bool = False

    def update(self, progress: int, waits: bool, stage: str) -> None:
        now = time.monotonic()
        self.heard = now
        if (progress, waits) != (self.progress, self.waits):
            self.since = now
        self.progress, self.waits, self.stage = progress, waits, stage


class Hub:
    """Rank 0's. The others connect to `addresses` with the `token`."""

    def __init__(
        self, world_size: int, activity: Activity, timeout: float, report: Report, end: End, *, local: bool
    ) -> None:
        """`local`: every rank is on this host."""
        self.token = secrets.token_hex(16)
        self._activity, self._timeout, self._report, self._end = activity, timeout, report, end
        self._listener = socket.create_server(("127.0.0.1" if local else "", 0), backlog=world_size)
        self._listener.setblocking(False)
        port = self._listener.getsockname()[1]
        hosts = ["127.0.0.1"] if local else own_addresses()
        self.addresses = [(host, port) for host in hosts]
        self.hosts: Sequence[str] = ()  # of the ranks; set once they are known
        now = time.monotonic()
        self._ranks = [_Seen(now, now) for _ in range(world_size)]
        self._failures: list[tuple[float, Failure]] = []
        self._lock = threading.Lock()  # over _failures
        self._heard = threading.Condition()  # of new words
        self._closing = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="trtllm-watch", daemon=True)
        self._thread.start()

    def fail(self, failure: Failure) -> None:
        """See Watch."""
        with self._lock:
            self._failures.append((time.monotonic(), failure))

    def say(self, word: str) -> None:
        """See Watch."""
        with self._heard:
            self._ranks[0].said.add(word)
            self._heard.notify_all()

    def wait_for(self, word: str) -> None:
        """Returns when every rank has said it."""
        with self._heard:
            self._heard.wait_for(lambda: all(word in seen.said for seen in self._ranks))

    def close(self) -> None:
        """See Watch."""
        self._closing.set()
        self._thread.join()
        for seen in self._ranks:
            if seen.connection is not None:
                with contextlib.suppress(OSError):
                    seen.connection.send({"bye": True})
                seen.connection.close()
        self._listener.close()
        self._selector.close()

    # --- in the thread

    def _run(self) -> None:
        beaten = 0.0
        while not self._closing.is_set():
            for key, _ in self._selector.select(TICK):
                if key.data is None:
                    self._accept()
                else:
                    self._read(key.data)
            now = time.monotonic()
            if now - beaten >= BEAT:
                beaten = now
                self._ranks[0].update(self._activity.done(), self._activity.waits, self._activity.stage)
                self._tell({"beat": True})
                self._judge(now)
            self._end_if_failed(now)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it has gone again, or there are too many
            return
        line = _Line(connection)
        self._selector.register(connection, selectors.EVENT_READ, line)

    def _read(self, line: _Line) -> None:
        try:
            messages = line.receive()
            for message in messages or ():
                self._take(line, message)
        except Exception:  # a stranger, who may say anything, or a rank that is gone
            messages = None
        if messages is None:
            self._selector.unregister(line.socket)
            line.close()
            rank = line.rank
            if rank is not None and not self._ranks[rank].left:
                seen = self._ranks[rank]
                seen.left = True
                if not seen.failed:
                    self.fail(Failure(rank, _ended(seen.stage), RankError.exit_code))

    def _take(self, line: _Line, message: dict[str, Any]) -> None:
        if line.rank is None:  # nothing counts before the token
            if not hmac.compare_digest(str(message["token"]), self.token):
                raise ValueError("not one of ours")
            line.rank = int(message["rank"])
            self._ranks[line.rank].connection = line
        seen = self._ranks[line.rank]
        seen.heard = time.monotonic()
        if "progress" in message:
            seen.update(message["progress"], message["waits"], message["stage"])
        if "said" in message:
            with self._heard:
                seen.said.add(message["said"])
                self._heard.notify_all()
        if "failed" in message:
            self.fail(Failure(line.rank, str(message["failed"]), int(message["code"])))
            seen.failed = True
        seen.left = seen.left or "bye" in message

    def _tell(self, message: dict[str, Any]) -> None:
        for seen in self._ranks:
            if seen.connection is not None and not seen.left:
                with contextlib.suppress(OSError):  # it is read as an end, or is missed
                    seen.connection.send(message)

    def _judge(self, now: float) -> None:
        idle = self._activity.idle
        for rank, seen in enumerate(self._ranks):
            if seen.left or seen.failed:
                continue
            if now - seen.heard > self._timeout:
                return self.fail(Failure(rank, _silent(now - seen.heard, seen.stage), RankError.exit_code))
            if not seen.waits and now - seen.since > self._timeout:
                return self.fail(Failure(rank, _stuck(now - seen.since, seen.stage), RankError.exit_code))
        if not idle and all(seen.waits and now - seen.since > self._timeout for seen in self._ranks):
            stages = ", ".join(f"rank {rank} in {seen.stage}" for rank, seen in enumerate(self._ranks))
            text = f"every rank waits for another since {self._timeout:.0f} s ({stages})"
            self.fail(Failure(0, text, RankError.exit_code))
        return None

    def _end_if_failed(self, now: float) -> None:
        with self._lock:
            if not self._failures:
                return
            at, first = self._failures[0]
            own = any(failure.rank == 0 and failure.text == first.text for _, failure in self._failures)
            others = any(failure.rank != 0 and failure.text == first.text for _, failure in self._failures)
            if now - at < GRACE and not (own and others):
                return
        self._report(first.text if own and others else first.told(self.hosts))
        self._tell({"end": first.code})
        self._end(first.code)


class Spoke:
    """Another rank's."""

    def __init__(
        self,
        rank: int,
        addresses: Sequence[tuple[str, int]],
        token: str,
        activity: Activity,
        timeout: float,
        report: Report,
        end: End,
    ) -> None:
        """Connects to the hub. Raises RankError where that cannot be reached."""
        self.rank, self._activity, self._timeout, self._report, self._end = rank, activity, timeout, report, end
        self._line = _Line(_connect(addresses, timeout))
        self._lock = threading.Lock()  # over what is sent
        self._closing = threading.Event()
        self._failed: int | None = None  # the exit code of the failure that this rank has told of
        self.hosts: Sequence[str] = ()  # of the ranks; set once they are known
        self._send({"token": token, "rank": rank})
        self._thread = threading.Thread(target=self._run, name="trtllm-watch", daemon=True)
        self._thread.start()

    def fail(self, failure: Failure) -> None:
        """See Watch."""
        self._failed = failure.code
        with contextlib.suppress(OSError):
            self._send({"failed": failure.text, "code": failure.code})

    def say(self, word: str) -> None:
        """See Watch."""
        self._send({"said": word})

    def close(self) -> None:
        """See Watch."""
        self._closing.set()
        with contextlib.suppress(OSError):
            self._send({"bye": True})
        self._thread.join()
        self._line.close()

    def _send(self, message: dict[str, Any]) -> None:
        with self._lock:
            self._line.send(message)

    def _run(self) -> None:
        heard, beaten = time.monotonic(), 0.0
        with selectors.DefaultSelector() as selector:
            selector.register(self._line.socket, selectors.EVENT_READ)
            while not self._closing.is_set():
                if selector.select(TICK):
                    heard = time.monotonic()
                    if not self._read():
                        return
                now = time.monotonic()
                if now - beaten >= BEAT:
                    beaten = now
                    state = {
                        "progress": self._activity.done(),
                        "waits": self._activity.waits,
                        "stage": self._activity.stage,
                    }
                    with contextlib.suppress(OSError):  # what was sent before is still to be read
                        self._send(state)
                if now - heard > self._timeout and not selector.select(0):  # nor waits to be read, after a long sleep
                    self._end_without_hub(_silent(now - heard, "watching"))

    def _read(self) -> bool:
        """Takes in what the hub says. False when it is done."""
        try:
            messages = self._line.receive()
        except OSError:
            messages = None
        if messages is None:
            if not self._closing.is_set():
                self._end_without_hub(_ended(self._activity.stage))
            return False
        for message in messages:
            if "bye" in message:
                return False
            if "end" in message:
                self._end(int(message["end"]))
        return True

    def _end_without_hub(self, text: str) -> None:
        """Rank 0 is gone: the lowest of the others tells, unless it is gone as well."""
        if self._failed is not None:  # because of us; it has told
            self._end(self._failed)
        time.sleep(GRACE * (self.rank - 1))
        if not self._closing.is_set():
            self._report(Failure(0, text, RankError.exit_code).told(self.hosts))
            self._end(RankError.exit_code)


class _Line:
    """A connection of JSON lines."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.rank: int | None = None  # of the other end, once it has said the token
        self.socket.settimeout(1.0)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._rest = b""

    def send(self, message: dict[str, Any]) -> None:
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have come, where something has; None at the end."""
        data = self.socket.recv(1 << 16)
        if not data or len(self._rest) > _MAX_LINE:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        self.socket.close()


def own_addresses() -> list[str]:
    """This host's IPv4 addresses, those that other hosts can reach first."""
    import fcntl
    import struct

    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                request = struct.pack("256s", name[:15].encode())
                found.append(socket.inet_ntoa(fcntl.ioctl(probe.fileno(), 0x8915, request)[20:24]))  # SIOCGIFADDR
    return sorted(found, key=lambda address: address.startswith("127."))


def _connect(addresses: Sequence[tuple[str, int]], timeout: float) -> socket.socket:
    for address in addresses:
        with contextlib.suppress(OSError):
            return socket.create_connection(address, timeout=min(2.0, timeout / len(addresses)))
    tried = ", ".join(f"{host}:{port}" for host, port in addresses)
    raise RankError(
        f"cannot reach rank 0 at {tried}",
        fix="let the hosts open TCP connections to each other; ranks watch over each other so",
    )


def _ended(stage: str) -> str:
    return f"its process ended without a word: it was killed, or crashed (stage: {stage})"


def _silent(seconds: float, stage: str) -> str:
    return f"not heard of for {seconds:.0f} s: its process is frozen, or its host is gone (stage: {stage}){SLOW}"


def _stuck(seconds: float, stage: str) -> str:
    return f"it hangs: nothing got done for {seconds:.0f} s (stage: {stage}){SLOW}"


SLOW = "\n  fix: where that is only slow, allow for it with --rank-timeout SECONDS"
