"""Every function that makes a step, by the name that plans have for it."""

from __future__ import annotations

from collections.abc import Callable

from trtllm_cli.kernels.cpu import attention_steps, expert_steps, library, row_steps
from trtllm_cli.kernels.cpu.library import TlStep

_MODULES = (library, row_steps, expert_steps, attention_steps)

STEPS: dict[str, Callable[..., TlStep]] = {
    name.removesuffix("_step"): make
    for module in _MODULES
    for name, make in vars(module).items()
    if name.endswith("_step") and name != "make_step"
}
