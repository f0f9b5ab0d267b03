"""MXFP4 as gpt-oss is published: E2M1 numbers in blocks of 32 inputs that share a power of two (OCP MX, E8M0).

A weight X is stored as `X_blocks`, uint8 [experts, out, in / 32, 16], the even input in the low nibble, and `X_scales`,
uint8 [experts, out, in / 32], a block's exponent plus 127. It stands for X of the plain snapshot, [experts, in, out].
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_cli.convert.families.fields import Fields
from trtllm_cli.convert.reader import Reader
from trtllm_cli.convert.source_weight import PlainWeight, SourceWeight
from trtllm_cli.errors import SnapshotError
from trtllm_cli.quant_config import LayerQuant
from trtllm_cli.tensor_file import TensorInfo

if TYPE_CHECKING:
    import torch

METHOD = "mxfp4"
BLOCK = 32  # inputs that share a scale
_BIAS = 127  # of the exponent
_WITHOUT_EFFECT = {"quant_method", "modules_to_not_convert", "dequantize"}


def is_mxfp4(config: Mapping[str, Any]) -> bool:
    """Whether a snapshot's config.json says that its experts are in MXFP4."""
    data = config.get("quantization_config")
    return isinstance(data, dict) and data.get("quant_method") == METHOD


class Mxfp4Reader(Reader):
    """A snapshot whose experts are in MXFP4, as plain numbers. One expert's rows are in memory at a time."""

    quant_method = METHOD

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.path, self.config_path, self.tensors = reader.path, reader.config_path, reader.tensors
        self.config = {name: value for name, value in reader.config.items() if name != "quantization_config"}
        quantization = Fields(reader.config["quantization_config"], reader.config_path, "quantization_config.")
        quantization.refuse_unread(_WITHOUT_EFFECT, {})
        packed = [name.removesuffix("_blocks") for name in self.tensors if name.endswith("_blocks")]
        self._packed = {name: Mxfp4Weight(self, name) for name in packed}
        used = {tensor for name in packed for tensor in self.tensors_of(name)}
        plain = {name: info.shape for name, info in self.tensors.items() if name not in used}
        self._weights = {**plain, **{name: weight.shape for name, weight in self._packed.items()}}

    @property
    def weights(self) -> Mapping[str, tuple[int, ...]]:
        """See Reader."""
        return self._weights

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See Reader."""
        return self._reader.rows(name, start, stop)

    def weight(self, name: str) -> SourceWeight:
        """See Reader."""
        return self._packed.get(name) or PlainWeight(self, name)

    def tensors_of(self, name: str) -> tuple[str, ...]:
        """See Reader."""
        return (f"{name}_blocks", f"{name}_scales") if name in self._packed else (name,)

    def write_tokenizer(self, directory: Path) -> list[str]:
        """See Reader."""
        return self._reader.write_tokenizer(directory)

    def default_dtype(self) -> str:
        """See Reader."""
        return self._reader.default_dtype()

    def close(self) -> None:
        """See Reader."""
        self._reader.close()


class Mxfp4Weight:
    """The weights of all experts, [experts, in, out], dequantized as they are read; float32 holds them exactly."""

    dtype = "float32"
    layer: LayerQuant | None = None
    why_plain = "MXFP4 is not one of TensorRT-LLM's formats"
    parts: Mapping[str, TensorInfo] = {}
    fixed: Mapping[str, torch.Tensor] = {}

    def __init__(self, reader: Reader, name: str) -> None:
        self._reader, self.name = reader, name
        blocks, scales = (reader.tensors.get(f"{name}_{part}") for part in ("blocks", "scales"))
        if (
            blocks is None
            or scales is None
            or len(blocks.shape) != 4
            or blocks.shape != (*scales.shape, BLOCK // 2)
            or {blocks.dtype, scales.dtype} != {"uint8"}
        ):
            raise SnapshotError(
                f"`{name}_blocks` and `{name}_scales` do not belong together: {blocks} and {scales}",
                where=str(reader.path),
                fix=SnapshotError.remake,
            )
        experts, self._out, self._groups = scales.shape
        self.shape: tuple[int, ...] = (experts, self._groups * BLOCK, self._out)

    def plain_rows(self, start: int, stop: int) -> torch.Tensor:
        """Inputs start..stop, counted through all experts, as [n, out]."""
        import torch

        height, rows = self.shape[1], []
        while start < stop:
            expert, first = divmod(start, height)
            last = min(height, first + stop - start)
            rows.append(self._expert(expert)[:, first:last].T)
            start += last - first
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def part_rows(self, part: str, start: int, stop: int) -> torch.Tensor:
        """It has no parts that a checkpoint could keep."""
        raise AssertionError(f"{self.name} comes plain: it has no {part}[{start}:{stop}]")

    def _expert(self, expert: int) -> torch.Tensor:
        """float32 [out, in]."""
        import torch

        from trtllm_cli.kernels.quantization import dequantize

        outs, blocks = (expert * self._out, (expert + 1) * self._out), self._out * self._groups
        exponents = self._reader.rows(f"{self.name}_scales", *outs).float() - _BIAS
        packed = self._reader.rows(f"{self.name}_blocks", expert * blocks, (expert + 1) * blocks)
        return dequantize(packed.reshape(self._out, -1), "fp4", torch.exp2(exponents), group_size=BLOCK)
