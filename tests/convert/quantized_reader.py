"""A reader whose linears are quantized already, in memory: what a quantized snapshot's reader is to convert."""

from __future__ import annotations

from trtllm_cli.convert.quantize.rows import LayerCalibration, row_quantizer
from trtllm_cli.convert.reader import Reader
from trtllm_cli.convert.source_weight import PlainWeight, SourceWeight, dequantize_rows, num_rows
from trtllm_cli.quant_config import LayerQuant
from trtllm_cli.tensor_file import TensorInfo


class MemoryWeight:
    """A weight that a row quantizer has made the parts of."""

    dtype = "float32"

    def __init__(self, name, weight, layer, why_plain=""):
        self.name, self.shape, self.why_plain = name, tuple(weight.shape), why_plain
        calibration = LayerCalibration(1.0, None, float(weight.abs().max()))
        quantizer = row_quantizer(layer, self.shape, calibration)
        self.made, self.fixed, self.quantized = quantizer(weight), dict(quantizer.fixed), layer
        self.layer = None if why_plain else layer
        self.parts = {n: TensorInfo(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in self.made.items()}

    def part_rows(self, part, start, stop):
        return self.made[part][start:stop]

    def plain_rows(self, start, stop):
        return dequantize_rows(self.quantized, {n: t[start:stop] for n, t in self.made.items()}, self.fixed)


class QuantizedReader(Reader):
    """`reader`, its layers' linears quantized as `layer_of(name)` says; None leaves one plain."""

    quant_method = "test"

    def __init__(self, reader, layer_of, why_plain=lambda name: ""):
        self.reader = reader
        self.path, self.config_path, self.config = reader.path, reader.config_path, reader.config
        self._weights: dict[str, SourceWeight] = {}
        self.tensors = {}
        for name, info in reader.tensors.items():
            layer: LayerQuant | None = layer_of(name) if name.endswith("_proj.weight") else None
            if layer is None:
                self._weights[name], self.tensors[name] = PlainWeight(reader, name), info
            else:
                weight = MemoryWeight(name, reader.rows(name, 0, num_rows(info.shape)), layer, why_plain(name))
                self._weights[name] = weight
                for part in self.tensors_of(name):
                    self.tensors[part] = TensorInfo("uint8", (1,))

    def rows(self, name, start, stop):
        return self.reader.rows(name, start, stop)

    @property
    def weights(self):
        return {name: weight.shape for name, weight in self._weights.items()}

    def weight(self, name):
        return self._weights[name]

    def tensors_of(self, name):
        weight = self._weights[name]
        if isinstance(weight, PlainWeight):
            return (name,)
        return tuple(f"{name.removesuffix('weight')}{part}" for part in [*weight.made, *weight.fixed])

    def write_tokenizer(self, directory):
        return self.reader.write_tokenizer(directory)

    def default_dtype(self):
        return self.reader.default_dtype()

    def close(self):
        self.reader.close()
