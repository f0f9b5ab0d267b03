"""ModelOpt as the calibrator, and as a second opinion: our stored weights are its fake-quantized ones."""

import sys

import pytest
import torch

from tests.tiny_configs import config, random_weights
from trtllm_cli.convert.quantize.calibrate import CalibrationOptions, calibrate
from trtllm_cli.convert.quantize.formats import quant_config
from trtllm_cli.convert.quantize.rows import row_quantizer
from trtllm_cli.errors import ResourceError, UnsupportedError
from trtllm_cli.evaluate.program import Program
from trtllm_cli.kernels.quantization import dequantize
from trtllm_cli.models import trace_model

MODEL = config("llama")
PROJ, FC = "transformer.layers.1.mlp.proj", "transformer.layers.1.mlp.fc"
MODELOPT = CalibrationOptions(calibrator="modelopt")


@pytest.fixture(scope="module")
def program():
    graph = trace_model(MODEL, MODEL.mapping.ranks[0])
    return Program(graph, random_weights(graph).__getitem__)


@pytest.fixture(scope="module")
def windows():
    return torch.randint(0, 96, (4, 16), generator=torch.Generator().manual_seed(0))


def test_missing(program, windows, monkeypatch):
    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization", None)
    with pytest.raises(ResourceError, match="nvidia-modelopt") as e:
        calibrate(program, windows, quant_config("fp8", None, MODEL)[0], MODELOPT)
    assert "pip install 'trtllm-cli[quantize]'" in e.value.fix


@pytest.mark.slow
@pytest.mark.parametrize("qformat", ["fp8", "int8_sq", "int4_awq", "w4a8_awq", "nvfp4"])
def test_ranges_and_scales(program, windows, qformat, capfd):
    """Each layer's, and the program is left as it was."""
    pytest.importorskip("modelopt")
    quantization, _ = quant_config(qformat, 16, MODEL, exclude=["*.0.mlp.proj"])
    before = program(windows)
    made = calibrate(program, windows, quantization, MODELOPT)
    assert capfd.readouterr() == ("", "")
    assert torch.equal(program(windows), before)
    assert set(made.layers) == {n for n in program.linears if quantization.layer_quant(n)}
    if qformat in ("fp8", "w4a8_awq"):  # ModelOpt's own patterns would leave `mlp.gate` out
        assert all(layer.input_amax for layer in made.layers.values())
    found = made.layers[PROJ]
    assert (found.pre_scale is not None) == (qformat in ("int8_sq", "int4_awq", "w4a8_awq"))
    ours = calibrate(program, windows, quantization).layers[PROJ]
    if qformat in ("fp8", "nvfp4"):
        assert found.input_amax == pytest.approx(ours.input_amax)
        weight = program.linears[PROJ].weight
        assert found.weight_amax == pytest.approx(float(weight.abs().max()))
    else:
        assert found.pre_scale.shape == ours.pre_scale.shape


@pytest.mark.slow
@pytest.mark.parametrize("qformat", ["fp8", "int8_sq"])
def test_stored_weights_are_modelopts(program, windows, qformat):
    """With its ranges, what we store is what its weight quantizer makes."""
    pytest.importorskip("modelopt")
    from trtllm_cli.convert.quantize.modelopt import quantize

    quantization, _ = quant_config(qformat, None, MODEL)
    model = quantize(program, windows, quantization)
    theirs = model.linears[FC].weight_quantizer(model.linears[FC].weight)
    calibration = calibrate(program, windows, quantization, MODELOPT).layers[FC]
    weight = program.linears[FC].weight
    quantizer = row_quantizer(quantization.layer_quant(FC), tuple(weight.shape), calibration)
    parts = quantizer.fixed | quantizer(weight)
    fmt = "fp8" if qformat == "fp8" else "int8"
    ours = dequantize(parts["weight"], fmt, parts["weights_scaling_factor"])
    assert (ours - theirs).norm() / theirs.norm() < 1e-3


@pytest.mark.slow
def test_formats_without_a_preset(program, windows):
    pytest.importorskip("modelopt")
    with pytest.raises(UnsupportedError, match="W4A16"):
        calibrate(program, windows, quant_config("int4_wo", 16, MODEL)[0], MODELOPT)
