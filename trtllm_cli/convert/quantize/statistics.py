"""What calibration text does to a model: for each input of a linear its magnitudes and some of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trtllm_cli.evaluate.graph_parts import module_names

if TYPE_CHECKING:
    from trtllm_cli.evaluate.program import Program

SAMPLES = 256  # rows of each input that are kept, evenly over the text
Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much


@dataclass
class InputStats:
    """One tensor that linears read: of every token, per input."""

    modules: list[str]  # the linears that read it
    amax: Tensor | None = None  # float32 [in]: largest magnitude
    total: Tensor | None = None  # float32 [in]: sum of magnitudes
    squares: Tensor | None = None  # float32 [in]: sum of squares
    count: int = 0
    kept: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, samples: int) -> None:
        """Counts rows [n, in] in, and keeps `samples` of them."""
        x = x.detach().float()
        magnitude = x.abs()
        parts = magnitude.amax(0), magnitude.sum(0), x.square().sum(0)
        if self.amax is None or self.total is None or self.squares is None:
            self.amax, self.total, self.squares = parts
        else:
            self.amax = torch.maximum(self.amax, parts[0])
            self.total, self.squares = self.total + parts[1], self.squares + parts[2]
        self.count += len(x)
        chosen = torch.linspace(0, len(x) - 1, min(samples, len(x)), device=x.device).long()
        self.kept.append(x[chosen].cpu())

    @property
    def largest(self) -> Tensor:
        """float32 [in] on the CPU."""
        assert self.amax is not None
        return self.amax.cpu()

    @property
    def mean_abs(self) -> Tensor:
        """float32 [in] on the CPU."""
        assert self.total is not None
        return self.total.cpu() / self.count

    @property
    def mean_square(self) -> Tensor:
        """float32 [in] on the CPU."""
        assert self.squares is not None
        return self.squares.cpu() / self.count

    @property
    def rows(self) -> Tensor:
        """The kept rows, float32 [about SAMPLES, in]."""
        return torch.cat(self.kept)


@dataclass
class Statistics:
    """What one pass over the text found."""

    inputs: list[InputStats]
    kv: dict[str, list[float]]  # "transformer.layers.N.attention" -> largest |k| and |v|, as the cache holds them


def collect(
    program: Program, windows: Tensor, modules: set[str], *, batch_size: int, kv: bool, progress: Progress | None
) -> Statistics:
    """Runs `windows` (int64 [count, length]) through the program and watches the inputs of `modules`, and k and v."""
    found = Statistics([], {})
    groups = shared_inputs(program, modules)
    found.inputs = [InputStats(names) for names in groups]
    batches = windows.split(batch_size)
    each = -(-SAMPLES // len(batches))
    names = _cache_inputs(program) if kv else {}

    def on_output(name: str, value: Tensor) -> None:
        for module, place in names.get(name, ()):
            largest = found.kv.setdefault(module, [0.0, 0.0])
            largest[place] = max(largest[place], float(value.abs().max()))

    with torch.inference_mode(), _watched(program, found.inputs, each):
        for i, batch in enumerate(batches):
            hidden = program.hidden(batch, on_output if kv else None)
            if "lm_head" in modules:
                program.head(hidden[:, :: max(1, hidden.shape[1] // 32)])
            if progress is not None:
                progress("calibrate", i + 1, len(batches))
    return found


@contextmanager
def _watched(program: Program, inputs: list[InputStats], each: int) -> Iterator[None]:
    modules: dict[str, Any] = {**program.linears, **program.expert_linears}
    hooks = []
    for stats in inputs:
        module = modules[stats.modules[0]]
        width = module.weight.shape[-1]

        def watch(_: Any, args: tuple[Any, ...], stats: InputStats = stats, width: int = width) -> None:
            stats.add(args[0].reshape(-1, width), each)

        hooks.append(module.register_forward_pre_hook(watch))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def shared_inputs(program: Program, modules: set[str]) -> list[list[str]]:
    """The linears among `modules`, those that read the same tensor together: they must agree on what becomes of it."""
    names, groups = module_names(program.graph), dict[str, list[str]]()
    for node in program.graph.nodes:
        if node.op in ("linear", "expert_linear") and names[node.output] in modules:
            groups.setdefault(node.inputs["x"], []).append(names[node.output])
    return list(groups.values())


def _cache_inputs(program: Program) -> dict[str, list[tuple[str, int]]]:
    """Tensor of the graph -> the attentions whose k (0) or v (1) it is."""
    found: dict[str, list[tuple[str, int]]] = {}
    for node in program.graph.nodes:
        if node.op == "attention":
            module = f"transformer.layers.{node.attrs['layer']}.attention"
            for place, role in enumerate(("k", "v")):
                found.setdefault(node.inputs[role], []).append((module, place))
    return found
