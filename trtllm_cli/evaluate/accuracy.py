"""What quantization changed: perplexity, divergence, and the error of every layer, so that a bad one is found."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from trtllm_cli.errors import AccuracyError
from trtllm_cli.evaluate.layer_errors import LayerErrors
from trtllm_cli.evaluate.program import Program
from trtllm_cli.evaluate.scoring import Divergence, Progress
from trtllm_cli.evaluate.text import Window

MAX_PPL_INCREASE = 0.20  # by default; what 4-bit weights without calibration cost a small model at worst
_LAYER = re.compile(r"transformer\.layers\.(\d+)\.(.+)")
_STANDS_OUT = 3.0  # times the median error: a layer to exclude


@dataclass(frozen=True)
class LinearError:
    """||y_q - y|| / ||y|| of a linear's outputs over all tokens, given the reference's input."""

    module: str  # transformer.layers.3.mlp.fc
    error: float

    @property
    def layer(self) -> int | None:
        """Its decoder layer; None for the head."""
        match = _LAYER.fullmatch(self.module)
        return int(match[1]) if match else None

    @property
    def kind(self) -> str:
        """What it is in its layer: mlp.fc."""
        match = _LAYER.fullmatch(self.module)
        return match[2] if match else self.module


@dataclass(frozen=True)
class AccuracyReport:
    """Two models on the same text."""

    divergence: Divergence
    num_windows: int
    linears: tuple[LinearError, ...] = ()  # in the model's order; none where the two differ in structure
    stream: tuple[float, ...] = ()  # by decoder layer: the relative error of the residual stream after it
    bytes_before: int | None = None  # of the weights
    bytes_after: int | None = None
    max_ppl_increase: float = MAX_PPL_INCREASE  # 0.2: by a fifth
    names: tuple[str, str] = ("reference", "quantized")

    def worst(self, count: int = 5) -> list[LinearError]:
        """The linears with the largest errors; none that are unchanged."""
        changed = [e for e in self.linears if e.error != 0]
        return sorted(changed, key=lambda e: math.inf if math.isnan(e.error) else e.error, reverse=True)[:count]

    @property
    def reasons(self) -> list[str]:
        """Why the quantized model is not good enough; nothing where it is."""
        before, after = self.divergence.reference.perplexity, self.divergence.other.perplexity
        rise = self.divergence.perplexity_increase
        broken = [(name, ppl) for name, ppl in zip(self.names, (before, after), strict=True) if not math.isfinite(ppl)]
        if broken:
            name, ppl = broken[0]
            found = [f"the perplexity of {name} is {ppl}: it computes no numbers that make sense"]
        elif rise > self.max_ppl_increase:
            found = [
                f"perplexity rose by {rise:.1%}, from {before:.3f} to {after:.3f}; "
                f"at most {self.max_ppl_increase:.1%} is allowed"
            ]
        else:
            return []
        if worst := self.worst(3):
            found.append("largest errors: " + ", ".join(f"{e.module} ({e.error:.1%})" for e in worst))
        return found

    @property
    def failed(self) -> bool:
        """Whether perplexity rose by more than `max_ppl_increase`, or is no number."""
        return bool(self.reasons)

    @property
    def outstanding(self) -> list[LinearError]:
        """Linears whose error is far above the others'."""
        errors = [e.error for e in self.linears if e.error != 0 and math.isfinite(e.error)] or [0.0]
        return [e for e in self.worst() if not e.error < _STANDS_OUT * statistics.median(errors)]

    @property
    def advice(self) -> str:
        """What to try when it failed."""
        if outstanding := self.outstanding:
            flags = " ".join(f"--exclude {e.module}" for e in outstanding)
            return f"quantize again and leave out what stands out ({flags}), with smaller groups, or another --qformat"
        return (
            "no single layer stands out: quantize again with smaller groups (--group-size), a --qformat of more bits, "
            "or one that is calibrated"
        )

    def raise_if_failed(self) -> None:
        """Raises AccuracyError with the reasons."""
        if reasons := self.reasons:
            raise AccuracyError("; ".join(reasons), where="--max-ppl-increase", fix=self.advice)


def compare(
    reference: Program,
    quantized: Program,
    windows: Sequence[Window],
    progress: Progress | None = None,
    *,
    bytes_before: int | None = None,
    bytes_after: int | None = None,
    max_ppl_increase: float = MAX_PPL_INCREASE,
    names: tuple[str, str] = ("reference", "quantized"),
) -> AccuracyReport:
    """Runs both programs over the windows and compares them layer by layer. They have the same vocabulary."""
    errors = LayerErrors(reference, quantized)
    found = errors.run(windows, progress)
    linears = tuple(LinearError(module, error) for module, error in errors.linears.items())
    stream = tuple(errors.stream[layer] for layer in sorted(errors.stream))
    return AccuracyReport(
        found, len(windows), linears, stream, bytes_before, bytes_after, max_ppl_increase=max_ppl_increase, names=names
    )
