"""The error of each layer of a quantized model.

A linear's error is measured given the *reference's* input: the quantized layer (rounding of its activations included)
is fed what the unquantized model feeds its own, and the outputs are compared. Given each model's own stream, all layers
after a bad one would look bad too. How errors add up is measured beside it: the residual stream after each decoder
layer, of each model's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trtllm_cli.evaluate.graph_parts import Linear
from trtllm_cli.evaluate.program import Program
from trtllm_cli.evaluate.scoring import ROWS, Divergence, PairTally, Progress, predicted, total_scored
from trtllm_cli.evaluate.text import Window
from trtllm_cli.graph import Dim


@dataclass
class _Relative:
    """||got - wanted|| / ||wanted|| over everything that is added; sums in float64."""

    difference: float = 0.0
    norm: float = 0.0

    def add(self, wanted: Tensor, got: Tensor) -> None:
        wanted = wanted.float()
        self.difference += float((got.to(wanted.device).float() - wanted).double().square().sum())
        self.norm += float(wanted.double().square().sum())

    @property
    def value(self) -> float:
        if self.norm == 0:
            return 0.0 if self.difference == 0 else float("inf")
        return float((self.difference / self.norm) ** 0.5)


class LayerErrors:
    """Runs two programs over windows. What the two have in common by name and width is compared."""

    def __init__(self, reference: Program, quantized: Program) -> None:
        self._reference, self._quantized = reference, quantized
        self._watched: dict[str, str] = {}  # reference's output of a linear -> module
        self._kept: dict[str, int] = {}  # reference's tensor that linears are given -> how many
        for module, linear in reference.layers.items():
            other = quantized.layers.get(module)
            if other is None or _widths(reference, linear) != _widths(quantized, other):
                continue
            self._watched[linear.node.output] = module
            for name in filter(None, (linear.root, linear.experts)):
                self._kept[name] = self._kept.get(name, 0) + 1
        self._linears = {module: _Relative() for module in self._watched.values()}
        mine, theirs = reference.layer_outputs, quantized.layer_outputs
        self._layers = {mine[i]: i for i in mine} if mine.keys() == theirs.keys() else {}
        self._their_layers = {theirs[i]: i for i in theirs} if self._layers else {}
        self._stream = {i: _Relative() for i in self._layers.values()}
        self._held: dict[str, tuple[Tensor, int]] = {}  # of _kept, and how many linears have yet to read it
        self._wanted: dict[int, Tensor] = {}  # the reference's stream by layer

    @property
    def linears(self) -> dict[str, float]:
        """Relative error of each linear's output, in the reference's order."""
        return {module: error.value for module, error in self._linears.items()}

    @property
    def stream(self) -> dict[int, float]:
        """Relative error of the residual stream after each decoder layer."""
        return {layer: error.value for layer, error in self._stream.items()}

    @torch.inference_mode()
    def run(self, windows: Sequence[Window], progress: Progress | None = None) -> Divergence:
        """Both models over the windows, one after another."""
        tally = PairTally()
        for window in windows:
            ids = torch.tensor([window.ids])
            wanted = self._reference.hidden(ids, self._see)[0]
            got = self._quantized.hidden(ids, self._see_other)[0]
            pieces = zip(predicted(self._logits(wanted), window), predicted(self._others(got), window), strict=True)
            for (p, targets), (q, _) in pieces:
                tally.add(p, q, targets)
            if progress:
                progress(tally.reference.tokens, total_scored(windows))
        return tally.divergence

    def _logits(self, hidden: Tensor) -> Iterator[Tensor]:
        for rows in hidden.split(ROWS):
            yield self._reference.head(rows, self._see)

    def _others(self, hidden: Tensor) -> Iterator[Tensor]:
        for rows in hidden.split(ROWS):
            yield self._quantized.head(rows)

    def _see(self, name: str, value: Tensor) -> None:
        """The reference has made a tensor."""
        if name in self._kept:
            self._held[name] = (value, self._kept[name])
        if name in self._layers:
            self._wanted[self._layers[name]] = value
        if module := self._watched.get(name):
            linear = self._reference.layers[module]
            x = self._take(linear.root)
            ids = self._take(linear.experts) if linear.experts else None
            self._linears[module].add(value, self._quantized.feed(module, x, ids))

    def _see_other(self, name: str, value: Tensor) -> None:
        """The quantized model has made a tensor."""
        if (layer := self._their_layers.get(name)) is not None:
            self._stream[layer].add(self._wanted.pop(layer), value)

    def _take(self, name: str) -> Tensor:
        """A tensor that linears are given; dropped with the last of them."""
        value, left = self._held.pop(name)
        if left > 1:
            self._held[name] = (value, left - 1)
        return value


def _widths(program: Program, linear: Linear) -> tuple[Dim, Dim]:
    graph = program.graph
    return graph.type_of(linear.root).shape[-1], graph.type_of(linear.node.output).shape[-1]
