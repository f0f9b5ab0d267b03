"""A quantized snapshot as a Reader: its linears under the names that they have in a plain one, in our layout."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from threading import local
from typing import TYPE_CHECKING

from trtllm_cli.convert.prequantized.scheme import Described, Parts, Scheme, part_infos
from trtllm_cli.convert.reader import Reader
from trtllm_cli.convert.source_weight import PlainWeight, SourceWeight, dequantize_rows, num_rows
from trtllm_cli.errors import SnapshotError
from trtllm_cli.quant_config import LayerQuant
from trtllm_cli.tensor_file import TensorInfo

if TYPE_CHECKING:
    import torch

# What a quantized linear has in the place of, or as, its weight.
_WEIGHTS = re.compile(r"(.+)\.(qweight|weight_packed|weight)$")
_KV_SCALE = re.compile(r".*\.layers\.(\d+)\..*\b([kv])_scale$")  # `self_attn.k_scale`, `self_attn.k_proj.k_scale`
# Scales that stand for nothing when a config switches their use off.
_IDLE = re.compile(r".*\.(q_scale|prob_output_scale|output_scale|prob_scale)$")
_KEPT = 2  # unpacked weights in memory at a time: a block of rows may have some of two


class QuantizedReader(Reader):
    """A snapshot whose format is `scheme`. Weights are unpacked whole, when their first row is read."""

    def __init__(self, reader: Reader, scheme: Scheme, method: str) -> None:
        self._reader, self._scheme = reader, scheme
        self.path, self.config_path = reader.path, reader.config_path
        self.config = {k: v for k, v in reader.config.items() if k not in ("quantization_config", "compression_config")}
        self.tensors = reader.tensors
        self.quant_method, self.kv_cache = method, scheme.kv_cache
        self._described = self._describe()
        used = {name for described in self._described.values() for name in described.tensors}
        self._scales: set[str] = set()  # tensors of the KV cache
        self.kv_scales = self._kv_scales(used)
        self.tensors = {n: i for n, i in reader.tensors.items() if n not in self._scales and not _IDLE.match(n)}
        plain = {n: i.shape for n, i in self.tensors.items() if n not in used}
        self._weights = {**plain, **{f"{module}.weight": d.shape for module, d in self._described.items()}}
        self._unpacked = _Unpacked()

    @property
    def weights(self) -> Mapping[str, tuple[int, ...]]:
        """See Reader."""
        return self._weights

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See Reader."""
        return self._reader.rows(name, start, stop)

    def weight(self, name: str) -> SourceWeight:
        """See Reader."""
        module = name.removesuffix(".weight")
        if module not in self._described:
            return PlainWeight(self, name)
        return QuantizedWeight(self, module, self._described[module])

    def tensors_of(self, name: str) -> tuple[str, ...]:
        """See Reader."""
        described = self._described.get(name.removesuffix(".weight"))
        return described.tensors if described else (name,)

    def write_tokenizer(self, directory: Path) -> list[str]:
        """See Reader."""
        return self._reader.write_tokenizer(directory)

    def default_dtype(self) -> str:
        """See Reader."""
        return self._reader.default_dtype()

    def close(self) -> None:
        """See Reader."""
        self._unpacked.modules.clear()
        self._reader.close()

    def unpacked(self, module: str) -> Parts:
        """A module's parts with rows. Each thread keeps its last few."""
        modules = self._unpacked.modules
        if module not in modules:
            if len(modules) == _KEPT:
                modules.popitem(last=False)
            modules[module] = self._scheme.unpack(module, self._described[module], self.whole)
        return modules[module]

    def fixed(self, module: str) -> Parts:
        """A module's parts without rows."""
        return self._scheme.fixed(module, self._described[module], self.whole)

    def whole(self, name: str) -> torch.Tensor:
        """A stored tensor."""
        if name not in self.tensors:
            raise SnapshotError(f"tensor `{name}` is missing", where=str(self.path), fix=SnapshotError.remake)
        shape = self.tensors[name].shape
        return self._reader.rows(name, 0, num_rows(shape)).reshape(shape)

    def _describe(self) -> dict[str, Described]:
        modules = dict.fromkeys(m[1] for name in self.tensors if (m := _WEIGHTS.match(name)))
        found = {}
        for module in modules:
            try:
                described = self._scheme.describe(module, self.tensors, self.whole)
            except SnapshotError as e:
                raise SnapshotError(e.message, where=e.where or str(self.path), fix=e.fix) from None
            if described is not None:
                found[module] = described
        return found

    def _kv_scales(self, used: set[str]) -> dict[int, tuple[float, float]]:
        """The layers' scales of cached keys and values."""
        pairs: dict[int, dict[str, float]] = {}
        for name in self.tensors:
            if name not in used and (match := _KV_SCALE.match(name)):
                self._scales.add(name)
                pairs.setdefault(int(match[1]), {})[match[2]] = float(self.whole(name).float().max())
        if self.kv_cache is None:
            return {}
        for layer, pair in pairs.items():
            if pair.keys() != {"k", "v"}:
                raise SnapshotError(f"layer {layer} has no scales for both k and v", where=str(self.path))
        return {layer: (pair["k"], pair["v"]) for layer, pair in pairs.items()}


class _Unpacked(local):
    """The unpacked modules of a thread, the latest last."""

    def __init__(self) -> None:
        self.modules: OrderedDict[str, Parts] = OrderedDict()


class QuantizedWeight:
    """One linear of a quantized snapshot."""

    dtype = "float32"

    def __init__(self, reader: QuantizedReader, module: str, described: Described) -> None:
        self._reader, self._module = reader, module
        self.name, self.shape, self.why_plain = f"{module}.weight", described.shape, described.why
        self.layer: LayerQuant | None = described.layer
        self.parts: Mapping[str, TensorInfo] = part_infos(described.layer, described.shape) if described.layer else {}

    @property
    def fixed(self) -> Mapping[str, torch.Tensor]:
        """See SourceWeight."""
        return self._reader.fixed(self._module) if self.layer else {}

    def plain_rows(self, start: int, stop: int) -> torch.Tensor:
        """See SourceWeight."""
        parts = {part: rows[start:stop] for part, rows in self._reader.unpacked(self._module).items()}
        return dequantize_rows(self.layer, parts, self.fixed) if self.layer else parts["weight"]

    def part_rows(self, part: str, start: int, stop: int) -> torch.Tensor:
        """See SourceWeight."""
        return self._reader.unpacked(self._module)[part][start:stop]
