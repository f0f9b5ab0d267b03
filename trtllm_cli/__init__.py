"""trtllm: from a Hugging Face checkpoint to a compiled inference engine, and running it.

    from trtllm_cli import LLM, SamplingParams

Importing this package imports nothing heavy; `LLM` and `SamplingParams` are loaded when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trtllm_cli.version import __version__

if TYPE_CHECKING:
    from trtllm_cli.run.llm import LLM, AsyncLLM
    from trtllm_cli.run.request import CompletionOutput, RequestOutput, SamplingParams

__all__ = ["LLM", "AsyncLLM", "CompletionOutput", "RequestOutput", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "trtllm_cli.run.llm",
    "AsyncLLM": "trtllm_cli.run.llm",
    "CompletionOutput": "trtllm_cli.run.request",
    "RequestOutput": "trtllm_cli.run.request",
    "SamplingParams": "trtllm_cli.run.request",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
