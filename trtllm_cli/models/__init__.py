"""The model families: one file each, written against functional.py. Tracing one gives the Graph of a rank."""

from __future__ import annotations

import importlib
import runpy
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_cli.errors import UnsupportedError, UsageError
from trtllm_cli.functional import Trace, trace
from trtllm_cli.graph import Graph

if TYPE_CHECKING:
    from trtllm_cli.mapping import Rank
    from trtllm_cli.model_config import ModelConfig

# A model records its ops and returns its graph: `define(t, config, rank) -> t.finish(...)`.
Define = Callable[[Trace, "ModelConfig", "Rank"], Graph]

# Architecture (a checkpoint's `architecture`) -> module that defines it.
MODELS = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "llama",
    "Qwen3ForCausalLM": "llama",
}


def trace_model(config: ModelConfig, rank: Rank, define: Define | None = None) -> Graph:
    """The graph of one rank. Raises UnsupportedError for an architecture that nothing defines."""
    if define is None:
        if config.architecture not in MODELS:
            raise UnsupportedError(
                f"the architecture {config.architecture} is not supported",
                where="config.json: architecture",
                fix=f"supported: {', '.join(MODELS)}; or define it yourself and pass --model-file",
            )
        define = importlib.import_module(f"trtllm_cli.models.{MODELS[config.architecture]}").define
    with trace(f"{config.architecture}.rank{rank.rank}") as t:
        return define(t, config, rank)


def load_model_file(path: Path) -> Define:
    """The `define` function of a user's own model file. Runs the file: it is code, named by the user."""
    if not path.is_file():
        raise UsageError(f"no such file: {path}", where="--model-file")
    try:
        define = runpy.run_path(str(path)).get("define")
    except Exception as e:
        raise model_file_error(e, path) from e
    if not callable(define):
        raise UsageError(f"{path} has no function `define(t, config, rank)`", where="--model-file")
    return define


def model_file_error(e: Exception, path: Path | None) -> UsageError:
    """What a user's own model file raised, and the line of it where that happened."""
    lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if path and f.filename == str(path)]
    if isinstance(e, SyntaxError):
        lines = [e.lineno]
    line = f", line {lines[-1]}" if lines and lines[-1] else ""
    return UsageError(
        f"the model file fails: {type(e).__name__}: {e.args[0] if e.args else e}",
        where=f"--model-file {path}{line}",
        fix="mend the file; --debug shows the traceback",
    )
