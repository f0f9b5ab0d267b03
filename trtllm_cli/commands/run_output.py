"""Where generated text goes: a terminal, a pipe, JSON Lines. Several texts grow together and never mix in a line."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

if TYPE_CHECKING:
    from rich.live import Live

    from trtllm_cli.commands.prompts import PromptItem
    from trtllm_cli.run.request import CompletionOutput, RequestOutput

PANE_LINES = 4  # that a pane has at least, its border among them
TITLE_WIDTH = 60

# Control characters as their visible pictures (U+2400 on), but newline and tab; C1 ones as a replacement character.
_HARMLESS = {c: 0x2400 + c for c in range(0x20) if c not in (0x09, 0x0A)} | {0x7F: 0x2421}
_HARMLESS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def harmless(text: str) -> str:
    """The text with nothing in it that a terminal obeys."""
    return text.translate(_HARMLESS)


@contextlib.contextmanager
def quiet_keyboard() -> Iterator[None]:
    """While text is printed, keys that are typed do not show in the midst of it; they are still read afterwards."""
    fd = sys.stdin.fileno() if sys.stdin.isatty() else None
    if fd is None or os.tcgetpgrp(fd) != os.getpgrp():  # in the background the terminal is not ours to change
        yield
        return
    import termios

    before = termios.tcgetattr(fd)
    silent = termios.tcgetattr(fd)
    silent[3] &= ~termios.ECHO
    try:
        termios.tcsetattr(fd, termios.TCSADRAIN, silent)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


@dataclass(frozen=True)
class View:
    """What to call the prompts and their answers."""

    titles: Sequence[str]
    counts: Sequence[int]  # answers to each
    ids: bool = False  # show token ids: there is no tokenizer to make text of them

    def label(self, index: int, output: CompletionOutput) -> str:
        """The prompt's number, and the answer's where there are several."""
        return f"{index}" if self.counts[index] == 1 else f"{index}.{output.index}"

    def text(self, output: CompletionOutput) -> str:
        """What to show of an answer, or of a delta of one."""
        return "".join(f"{token} " for token in output.token_ids) if self.ids else output.text


class Printer(AbstractContextManager["Printer"]):
    """Shows the answers of several prompts as they grow. This one shows nothing."""

    def delta(self, index: int, delta: RequestOutput) -> None:
        """News of the prompt `index`."""

    def finished(self, index: int, output: RequestOutput) -> None:
        """The whole answer, after its last delta."""

    def close(self) -> None:
        """Leaves the stream tidy, also after an interruption."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(e, BrokenPipeError):
            self.close()


class Plain(Printer):
    """One answer, and nothing but it."""

    def __init__(self, out: TextIO, view: View) -> None:
        self._out = out
        self._view = view
        self._clean = out.isatty()
        self._last = "\n"

    def delta(self, index: int, delta: RequestOutput) -> None:  # noqa: ARG002
        """Writes the new text at once."""
        if text := self._view.text(delta.outputs[0]):
            self._last = text[-1]
            self._out.write(harmless(text) if self._clean else text)
            self._out.flush()

    def close(self) -> None:
        """Ends the line."""
        if self._last != "\n":
            self._out.write("\n")
        self._out.flush()


class Lines(Printer):
    """Several answers, a line at a time, each with a label in front."""

    def __init__(self, out: TextIO, view: View) -> None:
        self._out = out
        self._view = view
        self._clean = out.isatty()
        self._unfinished: dict[str, str] = {}

    def delta(self, index: int, delta: RequestOutput) -> None:
        """Writes the lines that the new text completes."""
        output = delta.outputs[0]
        label = self._view.label(index, output)
        *lines, rest = (self._unfinished.pop(label, "") + self._view.text(output)).split("\n")
        if output.finish_reason is not None and rest:
            lines.append(rest)
        elif rest:
            self._unfinished[label] = rest
        for line in lines:
            self._write(label, line)

    def close(self) -> None:
        """Writes what an interruption left unfinished."""
        for label, line in self._unfinished.items():
            self._write(label, line)
        self._unfinished.clear()
        self._out.flush()

    def _write(self, label: str, line: str) -> None:
        self._out.write(f"[{label}] {harmless(line) if self._clean else line}\n")
        self._out.flush()


class InOrder(Printer):
    """Whole answers, in the order of the prompts, each when it and those before it are complete."""

    def __init__(self, inner: Printer) -> None:
        self._inner = inner
        self._next = 0
        self._waiting: dict[int, RequestOutput] = {}

    def finished(self, index: int, output: RequestOutput) -> None:
        """Passes it on when its turn comes."""
        self._waiting[index] = output
        while (ready := self._waiting.pop(self._next, None)) is not None:
            for one in ready.outputs:
                self._inner.delta(self._next, _only(ready, one))
            self._inner.finished(self._next, ready)
            self._next += 1

    def close(self) -> None:
        """Closes what it passes on to."""
        self._inner.close()


class Headed(Printer):
    """Whole answers on a terminal, each under a line with its prompt."""

    def __init__(self, out: TextIO, view: View) -> None:
        self._out = out
        self._view = view

    def delta(self, index: int, delta: RequestOutput) -> None:
        """Writes the answer with its heading."""
        output = delta.outputs[0]
        title = self._view.titles[index]
        self._out.write(f"── [{self._view.label(index, output)}] {harmless(title)}\n")
        self._out.write(harmless(self._view.text(output)).rstrip("\n") + "\n\n")
        self._out.flush()


class Panes(Printer):
    """Several answers on a terminal, a pane each while they grow; whole and in order at the end."""

    def __init__(self, out: TextIO, view: View, outputs: Sequence[RequestOutput]) -> None:
        from rich.console import Console
        from rich.live import Live

        self._out = out
        self._view = view
        self._outputs = outputs  # that the deltas are added to, elsewhere
        self._console = Console(file=out, highlight=False)
        self._live: Live = Live(
            console=self._console, get_renderable=self._render, transient=True, refresh_per_second=10
        )

    @classmethod
    def fit(cls, count: int, out: TextIO) -> bool:
        """Whether the terminal is high enough for that many."""
        try:
            return os.get_terminal_size(out.fileno()).lines >= count * PANE_LINES + 1
        except OSError:
            return False

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def close(self) -> None:
        """Takes the panes away and writes the answers."""
        self._live.stop()
        headed = Headed(self._out, self._view)
        for index, output in enumerate(self._outputs):
            for one in output.outputs:
                if one.token_ids or one.finish_reason:
                    headed.delta(index, _only(output, one))

    def _render(self) -> Any:
        from rich.console import Group
        from rich.panel import Panel
        from rich.text import Text

        answers = [(i, one) for i, output in enumerate(self._outputs) for one in output.outputs]
        lines = max(1, (self._console.size.height - 1) // len(answers) - 2)
        width = self._console.size.width - 4
        panes = []
        for index, one in answers:
            text = Text(harmless(self._view.text(one)).expandtabs(4)[-lines * width * 2 :])
            last = text.wrap(self._console, width)[-lines:]
            title = Text(harmless(f"[{self._view.label(index, one)}] {self._view.titles[index]}"))
            panes.append(Panel(Text("\n").join(last), title=title, title_align="left", height=lines + 2))
        return Group(*panes)


class JsonLines(Printer):
    """A JSON object for each prompt, in their order, each flushed when written."""

    def __init__(self, out: TextIO, items: Sequence[PromptItem]) -> None:
        self._out = out
        self._items = items

    def finished(self, index: int, output: RequestOutput) -> None:
        """Writes the line."""
        self._out.write(json.dumps(record(index, self._items[index], output), ensure_ascii=False) + "\n")
        self._out.flush()


class Both(Printer):
    """Two printers as one."""

    def __init__(self, *printers: Printer) -> None:
        self._printers = printers

    def delta(self, index: int, delta: RequestOutput) -> None:
        """To each."""
        for printer in self._printers:
            printer.delta(index, delta)

    def finished(self, index: int, output: RequestOutput) -> None:
        """To each."""
        for printer in self._printers:
            printer.finished(index, output)

    def close(self) -> None:
        """Each."""
        for printer in self._printers:
            printer.close()

    def __enter__(self) -> Self:
        for printer in self._printers:
            printer.__enter__()
        return self


def title_of(item: PromptItem) -> str:
    """A prompt in one short line."""
    prompt: Any = item.prompt
    if not isinstance(prompt, str):
        prompt = str(prompt[-1].get("content", "")) if isinstance(prompt[-1], dict) else f"{len(prompt)} token ids"
    line = " ".join(prompt.split())
    return line if len(line) <= TITLE_WIDTH else line[: TITLE_WIDTH - 1] + "…"


def record(index: int, item: PromptItem, output: RequestOutput) -> dict[str, Any]:
    """A prompt and its answers, for programs. Times are in seconds."""
    name = "prompt" if isinstance(item.prompt, str) else "messages" if isinstance(item.prompt[0], dict) else "input_ids"
    times = output.times
    made: dict[str, Any] = {"index": index}
    if item.task_id is not None:
        made["task_id"] = item.task_id
    made |= {
        name: item.prompt,
        "prompt_tokens": len(output.prompt_token_ids),
        "cached_tokens": output.cached_tokens,
        "outputs": [_answer(one) for one in output.outputs],
        "ttft": None if times.first_token is None else round(times.first_token - times.arrival, 6),
        "e2e": None if times.last_token is None else round(times.last_token - times.arrival, 6),
    }
    return made


def _answer(output: CompletionOutput) -> dict[str, Any]:
    made: dict[str, Any] = {
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
    }
    if output.logprobs is not None:
        made["logprobs"] = [
            [{"token_id": e.token_id, "token": e.token, "logprob": e.logprob} for e in entry]
            for entry in output.logprobs
        ]
    return made


def _only(request: RequestOutput, output: CompletionOutput) -> RequestOutput:
    return dataclasses.replace(request, outputs=[output])
