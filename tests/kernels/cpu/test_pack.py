import pytest
import torch

from trtllm_cli.kernels import quantization
from trtllm_cli.kernels.cpu.pack import pack_int4, pack_linear, unpack_linear


@pytest.fixture
def weight():
    return torch.randn(45, 77, generator=torch.Generator().manual_seed(0))


def test_floats_come_back(weight):
    assert torch.equal(unpack_linear(pack_linear(weight, "float32"), "float32", 45, 77), weight)
    assert torch.equal(unpack_linear(pack_linear(weight, "bfloat16"), "bfloat16", 45, 77), weight.bfloat16().float())


def test_layouts(weight):
    assert pack_linear(weight, "float32")["weight"].shape == (3, 77, 16)
    assert pack_linear(weight, "bfloat16")["weight"].shape == (3, 39, 16, 2)
    int8 = pack_linear(weight, "int8")
    assert (int8["weight"].shape, int8["weight"].dtype) == ((3, 77, 16), torch.int8)
    assert int8["scale"].shape == (3, 16)
    assert pack_linear(weight, "int4")["weight"].shape == (3, 3 * (4 * 64 + 64))
    assert pack_linear(weight, "int4", 20)["weight"].shape == (3, 4 * (3 * 64 + 64))


def test_int8_is_within_half_a_step(weight):
    values, scale = quantization.quantize_int8(weight)
    error = (quantization.dequantize_int8(values, scale) - weight).abs()
    assert (error <= scale[:, None] * 0.5001).all()
    assert torch.equal(unpack_linear(pack_linear(weight, "int8"), "int8", 45, 77),
                       quantization.dequantize_int8(values, scale))  # fmt: skip


@pytest.mark.parametrize("group_size", [8, 20, 32, 77, 128])
def test_int4_is_within_half_a_step(weight, group_size):
    values, scale, zero = quantization.quantize_int4(weight, group_size)
    w = quantization.dequantize_int4(values, scale, zero, group_size, 77)
    step = scale.repeat_interleave(group_size, dim=1)[:, :77]
    assert ((w - weight).abs() <= step * 0.501).all()
    packed = unpack_linear(pack_linear(weight, "int4", group_size), "int4", 45, 77, group_size)
    assert (packed - w).abs().max() < 4e-3  # float16 scales and minima


@pytest.mark.parametrize(
    ("magnitude", "tolerance"), [(1, 1e-6), (2.0**-20, 1e-6), (2.0**13, 1e-6), (1e-6, 1e-2), (1e4, 1e-2)]
)
def test_weights_on_q4_1_levels_come_back(magnitude, tolerance):
    g = torch.Generator().manual_seed(0)
    d = (torch.rand(40, 6, 1, generator=g) + 0.1).half().float()
    m = -(torch.rand(40, 6, 1, generator=g)).half().float()
    q = torch.randint(0, 16, (40, 6, 32), generator=g).float()
    q[..., 0], q[..., 1] = 0, 15
    weight = (q * d + m).flatten(1) * magnitude
    back = unpack_linear(pack_linear(weight, "int4", 32), "int4", 40, 192, 32)
    assert ((back - weight).abs() <= tolerance * magnitude).all()


@pytest.mark.parametrize("value", [0.0, 0.3, -0.7])
def test_groups_of_one_value(value):
    weight = torch.full((16, 64), value)
    back = unpack_linear(pack_linear(weight, "int4"), "int4", 16, 64)
    assert torch.allclose(back, weight, rtol=1e-3, atol=0)
    assert torch.allclose(unpack_linear(pack_linear(weight, "int8"), "int8", 16, 64), weight, rtol=1e-6, atol=0)


def test_no_zero_means_eight():
    values = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    scale = torch.ones(16, 1)
    packed = pack_int4(values, scale, None, 32, 32)
    assert torch.equal(packed["weight"], pack_int4(values, scale, torch.full((16, 1), 8.0), 32, 32)["weight"])
    w = unpack_linear(packed, "int4", 16, 32, 32)
    assert w[0, :4].tolist() == [-8, -8, -7, -8]


def test_nibbles_round_trip():
    values = torch.randint(0, 16, (3, 7), dtype=torch.uint8)
    assert torch.equal(quantization.unpack_nibbles(quantization.pack_nibbles(values), 7), values)
