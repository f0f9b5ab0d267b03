"""The flags of `run` and `bench` for how much memory an engine takes."""

from __future__ import annotations

from typing import Annotated

import typer

_MEMORY = "Memory"

KvCacheMemory = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_MEMORY,
        help="Memory of the KV cache, such as 2GiB. Default: what a full batch needs, in at most half of what is free; "
        "on a GPU, most of what is free.",
    ),
]
GpuMemoryFraction = Annotated[
    float | None,
    typer.Option(
        "--kv-cache-free-gpu-memory-fraction",
        rich_help_panel=_MEMORY,
        help="On a GPU: the KV cache's share of the memory that is free once all else is there. Default: 0.9.",
    ),
]
MaxGpuMemory = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_MEMORY,
        help="On a GPU: most memory for weights, activations, KV cache and 1 GiB for libraries, such as 40GiB.",
    ),
]
MaxNumBlocks = Annotated[
    int | None,
    typer.Option(rich_help_panel=_MEMORY, help="Most blocks of the KV cache. Default: what fits its memory."),
]
