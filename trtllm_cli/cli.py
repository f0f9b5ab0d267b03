"""The `trtllm` command: its verbs, and how errors become exit codes.

A verb's module is imported when the verb is called, and nothing else, so that `trtllm --help` answers at once.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from trtllm_cli.errors import ResourceError, TrtllmError, UsageError
from trtllm_cli.version import __version__

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
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
INTERNAL = 70  # EX_SOFTWARE of sysexits.h: our own bug

HELP = f"""\
Usage: trtllm VERB [OPTIONS] ...

From a Hugging Face checkpoint to a compiled LLM inference engine, and running it.
Each stage reads one artifact on disk and writes the next: snapshot, checkpoint, engine.

Verbs:
{"".join(f"  {verb:10}{text}{chr(10)}" for verb, text in VERBS.items())}
Options:
  --version   Print the version.
  --debug     Show the traceback of an error; works with every verb.
  -h, --help  Show this message; `trtllm VERB --help` shows a verb's options and examples.

Examples:
  trtllm download HuggingFaceTB/SmolLM2-135M-Instruct --output-dir snapshot
  trtllm convert snapshot --output-dir ckpt --dtype bfloat16
  trtllm build --checkpoint-dir ckpt --output-dir engine --max-batch-size 8 --max-seq-len 2048
  trtllm run --engine-dir engine --streaming "Why is the sky blue?"

  All of them in one:
  trtllm run --model HuggingFaceTB/SmolLM2-135M-Instruct --streaming "Why is the sky blue?"

Exit codes: 0 done, 2 wrong usage, 3 a missing or damaged artifact, 4 unsupported input, 5 the hub, 6 the machine
(disk, memory, tools), 7 a request past the engine's limits, 8 a quality bound is exceeded,
{INTERNAL} a bug in trtllm, {INTERRUPTED} interrupted.
"""


def main() -> None:
    """Runs the command line and exits with its code."""
    sys.exit(call(sys.argv[1:]))


def call(args: Sequence[str]) -> int:
    """Runs the command line `args` (without the program's name); the exit code."""
    argv, debug = normalize(args)
    try:
        return _dispatch(argv)
    except BrokenPipeError:
        # The reader of our output has gone; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as e:
        # typer's word for a closed pipe
        return 0 if isinstance(e.__context__, BrokenPipeError) else int(e.code or 0)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as e:
        if debug:
            import traceback

            traceback.print_exc()
        return _report(e)


def normalize(args: Sequence[str]) -> tuple[list[str], bool]:
    """The arguments with `--some_flag` written `--some-flag`, and `--debug` taken out and returned."""
    out: list[str] = []
    debug = bool(os.environ.get("TRTLLM_DEBUG"))
    for i, arg in enumerate(args):
        if arg == "--":
            return [*out, *args[i:]], debug
        if arg == "--debug":
            debug = True
        elif arg.startswith("--"):
            flag, equals, value = arg.partition("=")
            out.append(flag.replace("_", "-") + equals + value)
        else:
            out.append(arg)
    return out, debug


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


def _report(e: Exception) -> int:
    """Prints an error for people; the exit code."""
    name = type(e).__name__
    if name == "Abort":  # typer's word for Ctrl-C at a prompt
        return INTERRUPTED
    if name == "Exit":
        return int(getattr(e, "exit_code", 0))
    if name == "NoArgsIsHelpError":  # a verb of several, alone: its help is printed by now
        return UsageError.exit_code
    if hasattr(e, "format_message"):  # typer's own: an unknown flag, a missing argument
        e = _usage_error(e)
    if isinstance(e, MemoryError):
        e = ResourceError(f"out of memory: {e}", fix="lower --max-batch-size or --max-seq-len, or use a larger machine")
    if isinstance(e, TrtllmError):
        _print_error("error", str(e))
        return e.exit_code
    _print_error("internal error", f"{name}: {e}\n  this is a bug in trtllm; --debug shows where it happened")
    return INTERNAL


def _usage_error(e: Any) -> UsageError:
    """typer's exception in our words."""
    context = getattr(e, "ctx", None)
    help_command = f"`{context.command_path if context else 'trtllm'} --help`"
    near = [f"--{str(flag).lstrip('-')}" for flag in getattr(e, "possibilities", None) or ()]
    fix = f"did you mean {' or '.join(near)}? {help_command} lists the flags" if near else f"see {help_command}"
    text = str(getattr(e, "message", "") if near else e.format_message()).rstrip(".")
    return UsageError(text[:1].lower() + text[1:], fix=fix)


def _print_error(title: str, text: str) -> None:
    from trtllm_cli.commands.console import stderr

    stderr().print(f"[bold red]{title}:[/] ", end="")
    stderr().print(text, markup=False)
