"""What a quantized snapshot's format says: which tensors stand for a weight, and what they are in our layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from trtllm_cli.quant_config import KvCacheQuantAlgo, LayerQuant
from trtllm_cli.tensor_file import TensorInfo

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Unpacked:
    """A weight as models/stored.py declares it: by the last part of each tensor's name.

    `parts` have a row for each output; `fixed` do not. With `layer` None the only part is the plain `weight`.
    """

    layer: LayerQuant | None
    parts: dict[str, torch.Tensor]
    fixed: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Described:
    """What is known of a quantized weight before it is read."""

    shape: tuple[int, ...]  # [out, in]
    layer: LayerQuant | None  # None: it will come dequantized; `why` says why
    tensors: tuple[str, ...]  # of the snapshot, that it is made of
    why: str = ""


class Read(Protocol):
    """Reads a tensor of the snapshot whole."""

    def __call__(self, name: str) -> torch.Tensor:
        """The tensor, as it is stored."""


class Scheme(Protocol):
    """One format of quantized snapshots. A module is a linear's name, without `.weight`."""

    kv_cache: KvCacheQuantAlgo | None

    def describe(self, module: str, tensors: Mapping[str, TensorInfo], read: Read) -> Described | None:
        """The module's weight, or None where its weight is plain. Only small tensors are read."""

    def unpack(self, module: str, described: Described, read: Read) -> Unpacked:
        """The module's weight in our layout."""
