"""The `trtllm` command: its verbs, and how errors become exit codes.

A verb's module is imported when the verb is called, and nothing else, so that `trtllm --help` answers at once.
"""

from __future__ import annotations

import difflib
import importlib
import io
import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_cli.errors import INTERNAL, ResourceError, UsageError, describe_error
from trtllm_cli.version import __version__

if TYPE_CHECKING:
    from trtllm_cli.run.launched import Launched
    from trtllm_cli.run.world import World

# Verb -> what the help says of it. Its module is commands/VERB.py, which holds a function VERB or a Typer `app`.
VERBS = {
    "download": "Fetch a model from the Hugging Face hub: resumable, verified.",
    "convert": "Turn a Hugging Face snapshot or a GGUF file into a checkpoint.",
    "quantize": "Calibrate a model and write a quantized checkpoint, with a report of what that cost.",
    "build": "Compile a checkpoint into an engine.",
    "run": "Generate text with an engine; --streaming prints tokens as they come.",
    "bench": "Measure an engine: throughput, latency, and the datasets for them.",
    "eval": "Measure quality: perplexity, and what quantization changed.",
    "inspect": "Say what a snapshot, checkpoint or engine is, and what to do with it next.",
}
# What several ranks do together; everything else is done once, without mpirun.
RANKED = (["run"], ["bench", "throughput"], ["bench", "latency"])
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
LAST_TURN = 3  # seconds; ranks that could say the same speak a second after one another, as they start unevenly

HELP = f"""\
Usage: trtllm VERB [OPTIONS] ...

From a Hugging Face checkpoint to a compiled LLM inference engine, and running it.
Each stage reads one artifact on disk and writes the next: snapshot, checkpoint, engine.

Verbs:
{"".join(f"  {verb:10}{text}{chr(10)}" for verb, text in VERBS.items())}
Options:
  --version   Print the version.
  --debug     Show the traceback of an error; works with every verb.
  --rank-timeout SECONDS
              With several ranks: end them all when one gets nothing done for so long. Default: 6.
  -h, --help  Show this message; `trtllm VERB --help` shows a verb's options and examples.

Examples:
  trtllm download HuggingFaceTB/SmolLM2-135M-Instruct --output-dir snapshot
  trtllm convert snapshot --output-dir ckpt --dtype bfloat16
  trtllm build --checkpoint-dir ckpt --output-dir engine --max-batch-size 8 --max-seq-len 2048
  trtllm run --engine-dir engine --streaming "Why is the sky blue?"

  All of them in one:
  trtllm run --model HuggingFaceTB/SmolLM2-135M-Instruct --streaming "Why is the sky blue?"

  On several ranks, for an engine of a checkpoint that was converted with --tp-size or --pp-size:
  mpirun -n 4 trtllm run --engine-dir engine_tp2_pp2 --streaming "Why is the sky blue?"

Exit codes: 0 done, 2 wrong usage, 3 a missing or damaged artifact, 4 unsupported input, 5 the hub, 6 the machine
(disk, memory, tools), 7 a request past the engine's limits, 8 a quality bound is exceeded, 9 a rank was
killed or hangs, {INTERNAL} a bug in trtllm, {INTERRUPTED} interrupted.
"""


def main() -> None:
    """Runs the command line and exits with its code."""
    sys.exit(call(sys.argv[1:]))


def call(args: Sequence[str]) -> int:
    """Runs the command line `args` (without the program's name); the exit code."""
    settings, launched, world = Settings(), None, None
    try:
        argv, settings = normalize(args)
        launched = _launched()
        if launched is not None:
            world = _join(launched, argv, settings)
        code = _dispatch(argv)
    except BaseException as e:
        error = _failure(e)
        if settings.debug and not isinstance(e, KeyboardInterrupt | SystemExit):
            import traceback

            traceback.print_exc()
        if world is not None and error.code and not world.is_over:
            world.fail(error.text or "interrupted", error.code)
        if world is None and launched is not None and error.code:
            # Whatever it is, the others may meet it as well: the launcher ends them when the first has told.
            time.sleep(min(launched.rank, LAST_TURN))
            error = _Failure(error.code, error.text and f"rank {launched.rank}: {error.text}")
        if error.text:
            _print_error(error.text, "internal error" if error.code == INTERNAL else "error")
        code = error.code
    if world is not None:
        world.leave()
    return code


@dataclass(frozen=True)
class Settings:
    """The options that work with every verb."""

    debug: bool = False
    rank_timeout: float | None = None  # seconds


def normalize(args: Sequence[str]) -> tuple[list[str], Settings]:
    """The arguments with `--some_flag` written `--some-flag`, and those of every verb taken out and returned."""
    out: list[str] = []
    debug, timeout = bool(os.environ.get("TRTLLM_DEBUG")), os.environ.get("TRTLLM_RANK_TIMEOUT")
    rest = iter(args)
    for arg in rest:
        if arg == "--":
            out += [arg, *rest]
            break
        flag, equals, value = arg.partition("=")
        flag = flag.replace("_", "-") if arg.startswith("--") else flag
        if arg == "--debug":
            debug = True
        elif flag == "--rank-timeout":
            timeout = value if equals else next(rest, "")
        elif flag == "--mpirun-args" and not equals:  # what follows is another program's flags
            out += [flag, *itertools.islice(rest, 1)]
        else:
            out.append(flag + equals + value)
    return out, Settings(debug, None if timeout is None else _seconds(timeout))


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < float("inf"):
        raise UsageError(f"a timeout of {text!r} seconds", where="--rank-timeout", fix="give 1 or more, such as 60")
    return value


def _launched() -> Launched | None:
    """What a launcher says, where it has started several processes."""
    from trtllm_cli.run.launched import Launched

    launched = Launched.find()
    return None if launched is None or launched.size == 1 else launched


def _join(launched: Launched, argv: Sequence[str], settings: Settings) -> World:
    """Meets the other ranks. Only rank 0 prints."""
    if launched.rank != 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    else:
        sys.stdout = _Pipe(sys.stdout.buffer, encoding=sys.stdout.encoding, line_buffering=True)
    if list(argv[:1]) not in RANKED and list(argv[:2]) not in RANKED:
        verb = " ".join(argv[:1])
        raise UsageError(
            f"{launched.launcher} started {launched.size} processes, and trtllm {verb} is done by one",
            where=launched.launcher,
            fix=f"run trtllm {verb} by itself: only run and bench take several ranks",
        )
    from trtllm_cli.machine import available_cores
    from trtllm_cli.run import world

    if _is_for_gpu(argv):
        import torch  # noqa: F401 - for seconds no other thread runs meanwhile, and this rank would be taken for dead
    joined = world.join(launched, _print_error, settings.rank_timeout)
    note = launched.binding_note(available_cores(), available_cores(os.getppid()))
    if note and launched.rank == 0:
        print(f"note: {note}", file=sys.stderr)
    return joined


def _is_for_gpu(argv: Sequence[str]) -> bool:
    """Whether the engine that a command names runs on a GPU. What is wrong with it is said by who opens it."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    path = next((value for flag, value in itertools.pairwise(words) if flag == "--engine-dir"), None)
    try:
        return path is not None and json.loads(Path(path, "config.json").read_bytes())["backend"] == "cuda"
    except (OSError, ValueError, KeyError, TypeError):
        return False


class _Pipe(io.TextIOWrapper):
    """Standard output under a launcher: Open MPI makes it a terminal, although its own may be a file or a pipe."""

    def isatty(self) -> bool:
        return False


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"trtllm {__version__}")
        return 0
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, 1)
        fix = f"did you mean `trtllm {near[0]}`?" if near else f"the verbs are {', '.join(VERBS)}"
        raise UsageError(f"no such verb: {verb}", fix=fix)
    code = _command(verb).main(rest, prog_name=f"trtllm {verb}", standalone_mode=False)
    sys.stdout.flush()
    return code if isinstance(code, int) else 0


def _command(verb: str) -> Any:
    """The verb as a click command."""
    import typer

    module = importlib.import_module(f"trtllm_cli.commands.{verb}")
    app = getattr(module, "app", None)
    if app is None:
        app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
        app.command(verb, context_settings={"help_option_names": ["-h", "--help"]})(getattr(module, verb))
    return typer.main.get_command(app)


@dataclass(frozen=True)
class _Failure:
    """How a command ended: the exit code, and what is to be said of it."""

    code: int
    text: str = ""


def _failure(e: BaseException) -> _Failure:
    if isinstance(e, BrokenPipeError) or (isinstance(e, SystemExit) and isinstance(e.__context__, BrokenPipeError)):
        # The reader of our output has gone (typer's word for it is SystemExit); Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _Failure(0)
    if isinstance(e, SystemExit):
        return _Failure(int(e.code or 0))
    name = type(e).__name__
    if isinstance(e, KeyboardInterrupt) or name == "Abort":  # typer's word for Ctrl-C at a prompt
        return _Failure(INTERRUPTED)
    if name == "Exit":
        return _Failure(int(getattr(e, "exit_code", 0)))
    if name == "NoArgsIsHelpError":  # a verb of several, alone: its help is printed by now
        return _Failure(UsageError.exit_code)
    if hasattr(e, "format_message"):  # typer's own: an unknown flag, a missing argument
        e = _usage_error(e)
    if isinstance(e, MemoryError):
        e = ResourceError(f"out of memory: {e}", fix="lower --max-batch-size or --max-seq-len, or use a larger machine")
    text, code = describe_error(e)
    return _Failure(code, text)


def _usage_error(e: Any) -> UsageError:
    """typer's exception in our words."""
    context = getattr(e, "ctx", None)
    help_command = f"`{context.command_path if context else 'trtllm'} --help`"
    near = [f"--{str(flag).lstrip('-')}" for flag in getattr(e, "possibilities", None) or ()]
    fix = f"did you mean {' or '.join(near)}? {help_command} lists the flags" if near else f"see {help_command}"
    text = str(getattr(e, "message", "") if near else e.format_message()).rstrip(".")
    return UsageError(text[:1].lower() + text[1:], fix=fix)


def _print_error(text: str, title: str = "error") -> None:
    from trtllm_cli.commands.console import stderr

    stderr().print(f"[bold red]{title}:[/] ", end="")
    stderr().print(text, markup=False)
