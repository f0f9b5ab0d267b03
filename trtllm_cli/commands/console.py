"""Where commands print: results to stdout, everything for people's eyes to stderr."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console
    from rich.progress import Progress


@functools.cache
def stdout() -> Console:
    """For results. Off a terminal it wraps nothing and colours nothing."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


@functools.cache
def stderr() -> Console:
    """For progress, notes and errors."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def tell(notes: Iterable[str]) -> None:
    """Notes for users."""
    for note in notes:
        stderr().print(f"note: {note}", markup=False)


class StageBar:
    """A bar of bytes done, and in its place what else a stage does: kernels that are compiled or timed."""

    def __init__(self, bars: Progress, name: str, before_work: str = "") -> None:
        self._bars, self._name, self._before_work = bars, name, before_work
        self._task = bars.add_task(name, total=None)

    def __call__(self, done: int, total: int) -> None:
        """Bytes done, and in all."""
        self._bars.update(self._task, description=self._name, completed=done, total=total)

    def working(self, what: str, done: int, total: int) -> None:
        """Other work, by the piece."""
        self._bars.update(self._task, description=f"{self._before_work}{what}: {done} of {total}")


def progress_bytes(*, quiet: bool = False) -> Progress:
    """A progress bar over bytes, on stderr; silent off a terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=stderr(),
        transient=True,
        disable=quiet or not stderr().is_terminal,
    )


def progress_tokens() -> Progress:
    """A progress bar over tokens, on stderr; silent off a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        TimeRemainingColumn(),
        console=stderr(),
        transient=True,
        disable=not stderr().is_terminal,
    )
