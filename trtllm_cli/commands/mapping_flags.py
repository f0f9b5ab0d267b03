"""The flags of `convert` and `quantize` that divide a model among ranks."""

from __future__ import annotations

from typing import Annotated

import typer

TpSize = Annotated[int, typer.Option(help="Tensor-parallel ranks: each layer is split over them.")]
PpSize = Annotated[int, typer.Option(help="Pipeline stages: the layers are divided among them.")]
MoeTpSize = Annotated[
    int | None,
    typer.Option(
        help="Of the tensor-parallel ranks, those that share an expert.", show_default="--tp-size / --moe-ep-size"
    ),
]
MoeEpSize = Annotated[
    int | None,
    typer.Option(
        help="Of the tensor-parallel ranks, those among which the experts are divided.",
        show_default="1, or --tp-size / --moe-tp-size",
    ),
]
