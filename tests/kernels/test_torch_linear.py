"""torch's own kernels against plain float32, packed and widened."""

import pytest
import torch

from trtllm_cli.kernels.quantization import dequantize_int4, dequantize_int8, quantize_int4, quantize_int8
from trtllm_cli.kernels.torch_linear import TorchLinear


@pytest.mark.parametrize("widen", [False, True])
@pytest.mark.parametrize("fmt", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize(("out", "depth"), [(64, 128), (24, 96)])
def test_a_linear_is_x_times_its_weight(fmt, widen, out, depth):
    torch.manual_seed(0)
    weight, x = torch.randn(out, depth) / depth**0.5, torch.randn(5, depth)
    parts = (weight,)
    if fmt == "bfloat16":
        parts = (weight.bfloat16(),)
    elif fmt == "int8":
        parts = quantize_int8(weight)
    elif fmt == "int4":
        parts = quantize_int4(weight, 32)
    plain = {"int8": dequantize_int8, "int4": dequantize_int4}.get(fmt, lambda w: w.float())(*parts)
    got = TorchLinear(fmt, parts[0], depth, *parts[1:], widen=widen)(x)
    want = x @ plain.T
    assert float((got - want).norm() / want.norm()) < (1e-5 if widen or fmt == "float32" else 2e-2)
    assert got.dtype == torch.float32
