"""Calibration on tiny models: statistics as worked out by hand, searches that do not lose, outputs of whole models."""

import pytest
import torch

from tests.tiny_configs import config, random_weights
from trtllm_cli.convert.quantize.calibrate import calibrate
from trtllm_cli.convert.quantize.formats import quant_config
from trtllm_cli.convert.quantize.rows import Calibration, LayerCalibration, row_quantizer
from trtllm_cli.convert.quantize.search import Weighted, calibrate_group, output_error
from trtllm_cli.convert.quantize.statistics import InputStats, collect, shared_inputs
from trtllm_cli.evaluate.program import Program
from trtllm_cli.models import trace_model
from trtllm_cli.quant_config import LayerQuant, QuantConfig

MODEL = config("llama")
QKV = "transformer.layers.0.attention.qkv"


@pytest.fixture(scope="module")
def weights():
    made = random_weights(trace_model(MODEL, MODEL.mapping.ranks[0]))
    for name, weight in made.items():
        if name.endswith("layernorm.weight"):
            weight[3] = 5.0  # an outlier, as large models have them
    return made


@pytest.fixture(scope="module")
def program(weights):
    return Program(trace_model(MODEL, MODEL.mapping.ranks[0]), weights.__getitem__)


@pytest.fixture(scope="module")
def windows():
    return torch.randint(0, 96, (6, 16), generator=torch.Generator().manual_seed(0))


def test_statistics(program, windows):
    """Those of the first layer's input, which is the normed embedding, and of its k and v."""
    found = collect(program, windows, {QKV, "lm_head"}, batch_size=4, kv=True, progress=None)
    stats = found.inputs[0]
    embedded = dict(program.named_buffers())["transformer.vocab_embedding.weight"][windows.flatten()]
    norm = dict(program.named_buffers())["transformer.layers.0.input_layernorm.weight"]
    x = embedded * torch.rsqrt(embedded.square().mean(-1, keepdim=True) + 1e-5) * norm
    torch.testing.assert_close(stats.largest, x.abs().amax(0))
    torch.testing.assert_close(stats.mean_abs, x.abs().mean(0))
    torch.testing.assert_close(stats.mean_square, x.square().mean(0))
    assert all((row == x).all(1).any() or (row - x).abs().amax(1).min() < 1e-5 for row in stats.rows)
    v = (x @ program.linears[QKV].weight.T)[:, -16:]
    assert found.kv["transformer.layers.0.attention"][1] == pytest.approx(float(v.abs().max()))
    assert len(found.kv) == 3
    assert found.inputs[1].count > 0  # the head's


def test_linears_that_share_their_input(program):
    groups = shared_inputs(program, set(program.linears))
    assert [QKV] in groups
    assert ["transformer.layers.0.mlp.fc", "transformer.layers.0.mlp.gate"] in groups


@pytest.mark.parametrize(
    ("qformat", "most"),
    [("fp8", 0.2), ("int8_sq", 0.1), ("int4_awq", 0.25), ("w4a8_awq", 0.25), ("nvfp4", 0.5), ("fp8_pc_pt", 0.15)],
)
def test_whole_models(program, weights, windows, qformat, most):
    """The program of the quantized checkpoint says what the plain one does, nearly."""
    quantization, _ = quant_config(qformat, 16, MODEL)
    calibration = calibrate(program, windows, quantization)
    graph = trace_model(MODEL.model_copy(update={"quantization": quantization}), MODEL.mapping.ranks[0])
    quantized = Program(graph, stored(weights, quantization, calibration).__getitem__)
    got, wanted = quantized(windows), program(windows)
    assert 0 < (got - wanted).norm() / wanted.norm() < most
    fc, gate = (calibration.layers[f"transformer.layers.1.mlp.{name}"] for name in ("fc", "gate"))
    assert fc.input_amax == gate.input_amax
    assert fc.pre_scale is gate.pre_scale


def stored(weights, quantization, calibration):
    out = {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        layer = quantization.layer_quant(module)
        if "norm" in name or "ln_f" in name or "embedding" in name or layer is None:
            out[name] = weight
            continue
        quantizer = row_quantizer(layer, tuple(weight.shape), calibration.layers.get(module))
        out |= {f"{module}.{part}": t for part, t in (quantizer.fixed | quantizer(weight)).items()}
    return out


@pytest.mark.parametrize(("algo", "top"), [("FP8", 448), ("INT8", 127)])
def test_kv_scales(program, windows, algo, top):
    found = collect(program, windows, set(), batch_size=4, kv=True, progress=None)
    made = calibrate(program, windows, QuantConfig(kv_cache_quant_algo=algo))
    assert isinstance(made, Calibration)
    assert made.layers == {}
    module = "transformer.layers.2.attention"
    assert made.kv_scales[module] == pytest.approx(tuple(n / top for n in found.kv[module]))


@pytest.mark.parametrize("algo", ["W4A16_AWQ", "W8A8_SQ_PER_CHANNEL"])
def test_search_is_better_than_no_scaling(algo):
    """With inputs that differ a hundredfold in size."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(300, 64, generator=random) * torch.logspace(-1, 1, 64)
    stats = InputStats(["a"])
    stats.add(x, 128)
    layer = LayerQuant(quant_algo=algo, group_size=64, pre_quant_scale=True)
    linear = Weighted("a", layer, torch.randn(32, 64, generator=random))
    plain = LayerCalibration(float(x.abs().max()), torch.ones(64), 1.0)
    found = calibrate_group(stats, [linear])["a"]
    assert output_error(linear, found, x) < 0.8 * output_error(linear, plain, x)


def test_progress(program, windows):
    seen = []
    calibrate(program, windows, quant_config("fp8", None, MODEL)[0], None, lambda *args: seen.append(args))
    assert ("calibrate", 2, 2) in seen
    assert seen[-1][1] == seen[-1][2]
