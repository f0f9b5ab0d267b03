"""The flags of `convert` and `bench` for a model of random weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trtllm_cli.errors import UsageError

if TYPE_CHECKING:
    from trtllm_cli.convert.options import RandomWeights

FLAG = "--random-weights"


def option(text: str) -> Any:
    """A flag in their panel."""
    return typer.Option(rich_help_panel="Random weights", help=text, show_default=False)


Name = Annotated[
    str | None,
    option(
        "Instead of a model: the shape of one, such as llama-3.1-8b (any other word lists them), a config.json, or a "
        "directory with one. Its weights are made up, for measuring speed."
    ),
]
NumLayers = Annotated[int | None, option("With --random-weights: only so many of the layers.")]
QFormat = Annotated[
    str | None, option("With --random-weights: fp8, fp8_pc_pt, int8_wo, int4_wo or another of `trtllm convert`'s.")
]
Seed = Annotated[int | None, option("With --random-weights: another number gives other weights. Default: 0.")]


@dataclass(frozen=True)
class RandomFlags:
    """As they were given; None where they were not."""

    random_weights: str | None = None
    num_layers: int | None = None
    qformat: str | None = None
    seed: int | None = None

    def read(self, **others: object) -> tuple[Path, RandomWeights] | None:
        """The config.json and how its weights are made up; None without --random-weights.

        `others` are the flags that say what else the model is. Raises UsageError for those that do not go together,
        and for a name that is none.
        """
        if self.random_weights is None:
            for name in ("num_layers", "qformat", "seed"):
                if getattr(self, name) is not None:
                    flag = "--" + name.replace("_", "-")
                    raise UsageError(f"{flag} is for {FLAG}", where=flag, fix=f"leave it out, or give {FLAG} NAME")
            return None
        if given := [name for name, value in others.items() if value is not None]:
            other = "SOURCE" if given[0] == "source" else "--" + given[0].replace("_", "-")
            raise UsageError(f"{FLAG} and {other} are both given", where=FLAG, fix="leave one of them out")
        from trtllm_cli.convert.options import RandomWeights
        from trtllm_cli.convert.random_weights import find_shape

        return find_shape(self.random_weights), RandomWeights(self.seed or 0, self.num_layers)
