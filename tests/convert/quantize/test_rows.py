"""Every row quantizer: the parts that the models declare, errors within bounds, blocks that do not matter."""

import pytest
import torch

from tests.convert.quantize.linears import compute, linear_graph, linear_weight
from trtllm_cli.convert.quantize.rows import LayerCalibration, effective_bits, row_quantizer
from trtllm_cli.errors import UnsupportedError
from trtllm_cli.kernels.quantization import dequantize
from trtllm_cli.quant_config import LayerQuant

ROWS, COLUMNS = 24, 160
SMOOTH = {"pre_quant_scale": True}
# fields of LayerQuant, and the largest relative error of the layer's output
LAYERS = [
    ({"quant_algo": "W8A16"}, 0.01),
    ({"quant_algo": "W8A16", "per_group": True, "group_size": 32}, 0.008),
    ({"quant_algo": "W8A16", "per_group": True, "group_size": 32, "has_zero_point": True}, 0.008),
    ({"quant_algo": "W4A16", "group_size": 32, "has_zero_point": True}, 0.08),
    ({"quant_algo": "W4A16_GPTQ", "group_size": 40, "has_zero_point": True}, 0.09),
    ({"quant_algo": "W4A16", "group_size": 32}, 0.12),
    ({"quant_algo": "W4A16_AWQ", "group_size": 32, "has_zero_point": True, **SMOOTH}, 0.1),
    ({"quant_algo": "W4A8_AWQ", "group_size": 32, "has_zero_point": True, **SMOOTH}, 0.1),
    ({"quant_algo": "FP8"}, 0.05),
    ({"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, 0.05),
    ({"quant_algo": "FP8_BLOCK_SCALES"}, 0.05),
    ({"quant_algo": "W8A8_SQ_PER_CHANNEL", **SMOOTH}, 0.03),
    ({"quant_algo": "W8A8_SQ_PER_TENSOR_PLUGIN", **SMOOTH}, 0.04),
    ({"quant_algo": "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", **SMOOTH}, 0.03),
    ({"quant_algo": "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN", **SMOOTH}, 0.03),
    ({"quant_algo": "W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN", **SMOOTH}, 0.04),
    ({"quant_algo": "NVFP4"}, 0.2),
]
IDS = [" ".join(str(v) for v in fields.values()) for fields, _ in LAYERS]


def weight(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / COLUMNS**0.5


def calibration(layer, w, x):
    pre = torch.linspace(0.5, 2, COLUMNS) if layer.pre_quant_scale else None
    scaled_x, scaled_w = (x, w) if pre is None else (x * pre, w / pre)
    return LayerCalibration(float(scaled_x.abs().max()), pre, float(scaled_w.abs().max()), scaled_x.square().mean(0))


@pytest.mark.parametrize(("fields", "most"), LAYERS, ids=IDS)
def test_parts_are_as_declared_and_near(fields, most):
    layer = LayerQuant(**fields)
    w, x = weight(ROWS, COLUMNS), weight(4, COLUMNS, seed=1)
    quantizer = row_quantizer(layer, (ROWS, COLUMNS), calibration(layer, w, x))
    parts = quantizer.fixed | quantizer(w)
    graph = linear_graph(layer, ROWS, COLUMNS)
    declared = {n.removeprefix("l."): (v.dtype, v.shape) for n, v in graph.weights.items() if n != "x"}
    assert {n: (str(p.dtype).removeprefix("torch."), tuple(p.shape)) for n, p in parts.items()} == declared
    got, wanted = compute(graph, parts, x), x @ w.T
    assert 0 < (got - wanted).norm() / wanted.norm() < most


@pytest.mark.parametrize(("fields", "most"), LAYERS, ids=IDS)
def test_blocks_of_rows_and_dtypes(fields, most):
    """Rows in any blocks give the same, also bfloat16 ones."""
    layer = LayerQuant(**fields)
    w = weight(ROWS, COLUMNS).bfloat16()
    quantizer = row_quantizer(layer, (ROWS, COLUMNS), calibration(layer, w.float(), weight(4, COLUMNS, seed=1)))
    whole, first, rest = quantizer(w), quantizer(w[:5]), quantizer(w[5:].float())
    for name, part in whole.items():
        joined = torch.cat([first[name].view(torch.uint8), rest[name].view(torch.uint8)])
        assert torch.equal(part.view(torch.uint8), joined)


@pytest.mark.parametrize("fields", [f for f, _ in LAYERS if "pre_quant_scale" not in f], ids=str)
def test_experts(fields):
    """Rows of all experts; what is a scalar is one for each."""
    layer = LayerQuant(**fields)
    w = weight(3, ROWS, COLUMNS)
    quantizer = row_quantizer(layer, w.shape, LayerCalibration(1.0, None, float(w.abs().max())))
    parts = quantizer.fixed | {n: p.unflatten(0, (3, ROWS)) for n, p in quantizer(w.flatten(0, 1)).items()}
    graph = linear_graph(layer, ROWS, COLUMNS, experts=3)
    declared = {n.removeprefix("l."): v.shape for n, v in graph.weights.items() if n != "x"}
    assert {n: tuple(p.shape) for n, p in parts.items()} == declared


@pytest.mark.parametrize("fields", [f for f, _ in LAYERS], ids=IDS)
def test_rows_of_zeros(fields):
    layer = LayerQuant(**fields)
    w = torch.zeros(2, COLUMNS)
    made = row_quantizer(layer, w.shape, calibration(layer, w, w))(w)
    for part in made.values():
        assert torch.isfinite(part.float()).all()
    if "int4" not in layer.quant_algo and made["weight"].dtype != torch.uint8:
        assert not made["weight"].float().any()


@pytest.mark.parametrize("levels", [5, 9, 12, 16])
def test_levels_stay_exactly_as_they_are(levels):
    """A group that uses some of 16 even levels, as GGUF's Q4_1 has them, loses nothing."""
    random = torch.Generator().manual_seed(levels)
    q = torch.randint(0, levels, (6, 64), generator=random)
    q[:, 0::32], q[:, 1::32] = 0, levels - 1
    w = q * 0.125 - 0.75
    layer = LayerQuant(quant_algo="W4A16", group_size=32, has_zero_point=True)
    made = row_quantizer(layer, w.shape)(w)
    back = dequantize(made["weight"], "int4", made["weights_scaling_factor"], made["zero"], None, 32)
    assert (back - w).abs().max() < 1e-6


def test_search_is_better_than_the_extremes():
    """One far weight in each group: it is clipped, as the others are more; what matters more is nearer."""
    w = weight(64, 64)
    w[:, 7] = 0.5
    layer = LayerQuant(quant_algo="W4A16", group_size=64, has_zero_point=True)

    def error(calibration, importance):
        made = row_quantizer(layer, w.shape, calibration)(w)
        back = dequantize(made["weight"], "int4", made["weights_scaling_factor"], made["zero"], None, 64)
        return float(((back - w).square() * importance).sum())

    from trtllm_cli.kernels.quantization import dequantize, quantize_int4

    flat = torch.ones(64)
    values, scale, zero = quantize_int4(w, 64)
    plain = float((dequantize(values, "int4", scale, zero, group_size=64) - w).square().sum())
    assert error(None, flat) < 0.9 * plain
    importance = torch.rand(64, generator=torch.Generator().manual_seed(1)) ** 4
    assert error(LayerCalibration(importance=importance), importance) < 0.95 * error(None, importance)


@pytest.mark.parametrize("algo", ["FP8_PER_CHANNEL_PER_TOKEN", "FP8_BLOCK_SCALES", "NVFP4"])
def test_importance(algo):
    """Where some inputs matter more, they are nearer."""
    w, layer = weight(16, COLUMNS), LayerQuant(quant_algo=algo)
    importance = torch.rand(COLUMNS, generator=torch.Generator().manual_seed(2)) ** 8

    def error(calibration):
        quantizer = row_quantizer(layer, w.shape, calibration)
        graph = linear_graph(layer, 16, COLUMNS)
        parts = quantizer.fixed | quantizer(w)
        back = linear_weight(graph, parts)
        return float(((back - w).square() * importance).sum())

    largest = float(w.abs().max())
    assert error(LayerCalibration(1.0, None, largest, importance)) < 0.9 * error(LayerCalibration(1.0, None, largest))


def test_fp4_codes_are_the_nearest():
    from trtllm_cli.kernels.quantization import fp4_codes, fp4_values, round_to

    values = torch.linspace(-7, 7, 561)
    assert torch.equal(fp4_values(fp4_codes(values)), round_to(values, "fp4"))


def test_effective_bits():
    def bits(**fields):
        return effective_bits(LayerQuant(**fields), (64, 128))

    assert bits(quant_algo="W4A16", group_size=32, has_zero_point=True) == 4 + 64 / 32
    assert bits(quant_algo="NVFP4") == 4.5
    assert bits(quant_algo="FP8") == 8


def test_what_is_not_made():
    for layer in (LayerQuant(quant_algo="INT8"), LayerQuant(quant_algo="W4A16_GPTQ", act_order=True)):
        with pytest.raises(UnsupportedError, match=layer.quant_algo):
            row_quantizer(layer, (8, 8))
