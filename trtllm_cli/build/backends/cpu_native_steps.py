"""What lowering to native steps needs whatever the op: buffers, operands and the list of steps.

A native plan is the list of `kernels.cpu.steps` by name and argument. Arguments that are addresses at run time are
strings here: "b:N" a buffer, "w:NAME" a tensor of the engine, "kv:N" a layer's KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trtllm_cli.build.backends.weights import Lowering
from trtllm_cli.build.passes.plan_buffers import BufferPlan


@dataclass
class NativeSteps(Lowering):
    """The steps so far, and the memory plan."""

    buffers: BufferPlan = field(default_factory=lambda: BufferPlan((), {}))
    steps: list[dict[str, Any]] = field(default_factory=list)

    def _buffer(self, tensor: str) -> str:
        return f"b:{self.buffers.of[tensor]}"

    def _operand(self, name: str) -> str:
        """An activation, or a vector among the weights."""
        return self.add_vector(name) if name in self.graph.weights else self._buffer(name)

    def _step(self, op: str, **args: Any) -> None:
        self.steps.append({"op": op, "args": {k: v for k, v in args.items() if v is not None}})

    def _rows(self, tensor: str) -> str:
        return str(self.graph.type_of(tensor).shape[0])

    def _width(self, tensor: str) -> int:
        width = self.graph.type_of(tensor).shape[-1]
        assert isinstance(width, int)
        return width

    def _into(self, tensor: str, destination: str) -> None:
        """Copies `tensor` where the plan could not give `destination` its buffer."""
        if self._buffer(tensor) != self._buffer(destination):
            width = self._width(tensor)
            self._step(
                "copy_rows",
                x=self._buffer(tensor),
                out=self._buffer(destination),
                width=width,
                x_stride=width,
                out_stride=width,
                rows=self._rows(tensor),
            )
