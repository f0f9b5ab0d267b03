"""torch's own kernels against plain float32, packed and widened."""

import pytest
import torch

from trtllm_cli.kernels.linear_format import LinearFormat
from trtllm_cli.kernels.torch_linear import TorchLinear

FORMATS = [
    LinearFormat("float32"), LinearFormat("bfloat16"), LinearFormat("int8"), LinearFormat("int8", 32),
    LinearFormat("int4", 32), LinearFormat("int4", 48), LinearFormat("fp8"), LinearFormat("fp8", 48),
]  # fmt: skip


@pytest.mark.parametrize("widen", [False, True])
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f"{f.name}-{f.group_size}")
@pytest.mark.parametrize(("out", "depth"), [(64, 128), (24, 96)])
def test_a_linear_is_x_times_its_weight(fmt, widen, out, depth):
    torch.manual_seed(0)
    weight, x = torch.randn(out, depth) / depth**0.5, torch.randn(5, depth)
    parts = fmt.quantize(weight)
    got = TorchLinear(fmt, parts, depth, widen=widen)(x)
    want = x @ fmt.dequantize(parts, depth).T
    assert float((got - want).norm() / want.norm()) < (1e-5 if widen or fmt.name == "float32" else 2e-2)
    assert got.dtype == torch.float32
    assert float((fmt.dequantize(parts, depth) - weight).norm() / weight.norm()) < 0.12  # four bits
