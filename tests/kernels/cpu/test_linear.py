import numpy as np
import pytest
import torch
from harness import PackedLinear, address, as_torch, rows_batch, run

from trtllm_cli.kernels import quantization
from trtllm_cli.kernels.cpu import library
from trtllm_cli.kernels.cpu.pack import pack_int4, pack_int8, unpack_linear

FORMATS = [("float32", None), ("bfloat16", None), ("int8", None), ("int4", 32), ("int4", 24), ("int4", 1000)]
SHAPES = [(64, 64), (48, 576), (17, 33), (1, 5), (130, 300), (320, 1000)]  # out, in


def close(got, want, x, w):
    """Within float32's rounding of a sum of in_features products."""
    scale = as_torch(np.abs(x)) @ w.abs().T
    return bool((torch.abs(as_torch(got) - want) <= 3e-6 * scale + 1e-7).all())


@pytest.mark.parametrize(("fmt", "group_size"), FORMATS)
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_every_number_of_rows_gives_x_times_the_weight(pool, rng, fmt, group_size, out_features, in_features):
    weight = torch.from_numpy(rng.standard_normal((out_features, in_features), np.float32))
    linear = PackedLinear(weight, fmt, group_size)
    w = unpack_linear(linear.packed, fmt, out_features, in_features, group_size)
    for rows in (0, 1, 2, 3, 4, 5, 6, 7, 13, 100):
        x = rng.standard_normal((rows, in_features), np.float32)
        assert close(linear(pool, x), as_torch(x) @ w.T, x, w), rows


@pytest.mark.parametrize(("fmt", "group_size"), FORMATS)
def test_bias_accumulation_and_strides(pool, rng, fmt, group_size):
    weight = torch.from_numpy(rng.standard_normal((40, 72), np.float32))
    linear = PackedLinear(weight, fmt, group_size)
    w = unpack_linear(linear.packed, fmt, 40, 72, group_size)
    for rows in (1, 5, 20):
        wide = rng.standard_normal((rows, 80), np.float32)
        x = wide[:, :72]
        bias = rng.standard_normal(40, np.float32)
        before = rng.standard_normal((rows, 50), np.float32)
        out = before.copy()
        linear(pool, wide, bias=bias, out=out, x_stride=80, out_stride=50)
        want = as_torch(before[:, :40]) + as_torch(x) @ w.T + as_torch(bias)
        assert close(out[:, :40], want, np.abs(x) + 1, w)
        assert (out[:, 40:] == before[:, 40:]).all()


@pytest.mark.parametrize(("fmt", "group_size"), FORMATS)
def test_a_row_has_the_same_bits_whatever_stands_beside_it(pools, rng, fmt, group_size):
    weight = torch.from_numpy(rng.standard_normal((200, 613), np.float32))
    linear = PackedLinear(weight, fmt, group_size)
    x = rng.standard_normal((230, 613), np.float32)
    whole = linear(pools[0], x)
    assert linear(pools[1], x).tobytes() == whole.tobytes()
    for rows in (1, 2, 3, 4, 5, 6, 7, 64):
        for pool in pools:
            assert linear(pool, x[11 : 11 + rows].copy()).tobytes() == whole[11 : 11 + rows].tobytes(), rows


def test_rows_may_be_those_of_the_logits(pool, rng):
    weight = torch.from_numpy(rng.standard_normal((20, 30), np.float32))
    linear = PackedLinear(weight, "float32")
    x = rng.standard_normal((3, 30), np.float32)
    out = np.zeros((4, 20), np.float32)
    step = library.linear_step(address(x), address(out), address(linear.packed["weight"]), rows="num_logits",
                               **linear.arguments)  # fmt: skip
    run(pool, [step], rows_batch(50, num_logits=3))
    np.testing.assert_allclose(out[:3], x @ weight.numpy().T, rtol=1e-5, atol=1e-5)
    assert (out[3] == 0).all()


def test_weights_that_come_quantized(pool, rng):
    x = rng.standard_normal((2, 64), np.float32)
    values = torch.from_numpy(rng.integers(-127, 128, (24, 64), np.int8))
    scale = torch.from_numpy(rng.random(24, np.float32))
    w = quantization.dequantize_int8(values, scale)
    got = PackedLinear(values, "int8", packed=pack_int8(values, scale))(pool, x)
    assert close(got, as_torch(x) @ w.T, x, w)

    nibbles = torch.from_numpy(rng.integers(0, 256, (24, 32), np.uint8))
    scale = torch.from_numpy(rng.random((24, 2), np.float32)).half().float()
    for zero in (None, torch.from_numpy(rng.integers(0, 16, (24, 2)).astype(np.float32))):
        w = quantization.dequantize_int4(nibbles, scale, zero, 32)
        packed = pack_int4(nibbles, scale, zero, 32, 64)
        got = PackedLinear(torch.empty(24, 64), "int4", 32, packed=packed)(pool, x)
        np.testing.assert_allclose(got, as_torch(x) @ w.T, rtol=1e-3, atol=2e-2)  # the minimum is a float16
