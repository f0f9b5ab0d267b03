"""How a download's progress is shown: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from rich.progress import Progress as Bars
from rich.progress import TaskID

from trtllm_cli.artifact import human_bytes
from trtllm_cli.commands.console import progress_bytes, stderr, tell
from trtllm_cli.convert.transfer import Progress

LINE_EVERY = 10.0  # seconds between lines, where there is no terminal


@contextlib.contextmanager
def reporting(*, quiet: bool = False) -> Iterator[Progress]:
    """What to give to a download: bars, lines, or nothing."""
    if quiet:
        yield Progress()
    elif stderr().is_terminal:
        with progress_bytes() as bars:
            yield BarProgress(bars)
    else:
        yield LineProgress()


class BarProgress(Progress):
    """A bar for the whole, and one for each file on its way."""

    def __init__(self, bars: Bars) -> None:
        self.bars = bars
        self.lock = threading.Lock()
        self.whole: TaskID | None = None
        self.files: dict[str, TaskID] = {}

    def begin(self, files: int, size: int) -> None:
        """The bar for the whole."""
        self.whole = self.bars.add_task(f"{files} files", total=size)

    def start(self, name: str, size: int) -> None:
        """The file's bar."""
        with self.lock:
            self.files[name] = self.bars.add_task("  " + short(name), total=size)

    def advance(self, name: str, count: int) -> None:
        """Moves both bars."""
        for task in self._tasks(name):
            self.bars.advance(task, count)

    def skip(self, name: str, count: int) -> None:
        """Moves both bars; what came over no network does not count as speed."""
        for task in self._tasks(name):
            self.bars.reset(task, completed=int(self.bars.tasks[self.bars.task_ids.index(task)].completed) + count)

    def _tasks(self, name: str) -> list[TaskID]:
        return [t for t in (self.whole, self.files.get(name)) if t is not None]

    def finish(self, name: str) -> None:
        """Takes the file's bar away."""
        with self.lock:
            if (task := self.files.pop(name, None)) is not None:
                self.bars.remove_task(task)

    def note(self, message: str) -> None:
        """A line above the bars."""
        tell([message])


class LineProgress(Progress):
    """A line for each finished file, and one for the whole every few seconds."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.size = self.done = self.received = 0  # bytes
        self.sizes: dict[str, int] = {}
        self.started = self.last = time.monotonic()

    def begin(self, files: int, size: int) -> None:
        """Says what is about to be fetched."""
        self.size, self.started = size, time.monotonic()
        stderr().print(f"fetching {files} files, {human_bytes(size)}", markup=False)

    def start(self, name: str, size: int) -> None:
        """Remembers the size for the file's line."""
        self.sizes[name] = size

    def advance(self, name: str, count: int) -> None:  # noqa: ARG002
        """Counts, and says now and then how far it is."""
        with self.lock:
            self.done += count
            self.received += count
            now = time.monotonic()
            if now - self.last < LINE_EVERY:
                return
            self.last = now
            speed = self.received / max(now - self.started, 1e-9)
            left = (self.size - self.done) / max(speed, 1e-9)
            line = f"{human_bytes(self.done)} of {human_bytes(self.size)}, {human_bytes(speed)}/s, {left:.0f} s left"
        stderr().print(line, markup=False)

    def skip(self, name: str, count: int) -> None:  # noqa: ARG002
        """Counts what is here already."""
        with self.lock:
            self.done += count

    def finish(self, name: str) -> None:
        """The file's line."""
        stderr().print(f"{name}: {human_bytes(self.sizes.get(name, 0))}, verified", markup=False)

    def note(self, message: str) -> None:
        """A line of its own."""
        tell([message])


def short(name: str, width: int = 40) -> str:
    """The end of a long name."""
    return name if len(name) <= width else "…" + name[-(width - 1) :]
