import numpy as np
import pytest
import torch
from harness import PackedLinear, address, as_torch, random_parts, rows_batch, run

from trtllm_cli.kernels.cpu import library
from trtllm_cli.kernels.cpu.pack import pack_linear
from trtllm_cli.kernels.linear_format import LinearFormat

FORMATS = [
    LinearFormat("float32"), LinearFormat("bfloat16"), LinearFormat("int8"), LinearFormat("int8", 32),
    LinearFormat("int8", 20), LinearFormat("int8", 64, has_zero=True), LinearFormat("int4", 32),
    LinearFormat("int4", 24), LinearFormat("int4", 1000), LinearFormat("fp8"), LinearFormat("fp8", 128),
    LinearFormat("fp8", 40),
]  # fmt: skip
SHAPES = [(64, 64), (48, 576), (17, 33), (1, 5), (130, 300), (320, 1000)]  # out, in


def ids(fmt):
    return f"{fmt.name}-{fmt.group_size}" + ("-zero" if fmt.has_zero else "")


def made(fmt, out_features, in_features, rng):
    """A random weight: quantized from float32, or in formats that only checkpoints have, as they have it."""
    if fmt.name in ("fp8", "fp4") or (fmt.name == "int8" and fmt.has_zero):
        parts = random_parts(fmt, out_features, in_features, rng)
        return PackedLinear(torch.empty(out_features, in_features), fmt, parts)
    return PackedLinear(torch.from_numpy(rng.standard_normal((out_features, in_features), np.float32)), fmt)


def close(got, want, x, w):
    """Within float32's rounding of a sum of in_features products."""
    scale = as_torch(np.abs(x)) @ w.abs().T
    return bool((torch.abs(as_torch(got) - want) <= 3e-6 * scale + 1e-7).all())


@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_every_number_of_rows_gives_x_times_the_weight(pool, rng, fmt, out_features, in_features):
    linear = made(fmt, out_features, in_features, rng)
    w = linear.plain
    for rows in (0, 1, 2, 3, 4, 5, 6, 7, 13, 100):
        x = rng.standard_normal((rows, in_features), np.float32)
        if fmt.has_zero:
            x = np.abs(x)  # or the zeros cancel most of the sum
        assert close(linear(pool, x), as_torch(x) @ w.T, x, w.abs() + 64 * fmt.has_zero), rows


@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
def test_bias_accumulation_and_strides(pool, rng, fmt):
    linear = made(fmt, 40, 72, rng)
    w = linear.plain
    for rows in (1, 5, 20):
        wide = rng.standard_normal((rows, 80), np.float32)
        x = wide[:, :72]
        bias = rng.standard_normal(40, np.float32)
        before = rng.standard_normal((rows, 50), np.float32)
        out = before.copy()
        linear(pool, wide, bias=bias, out=out, x_stride=80, out_stride=50)
        want = as_torch(before[:, :40]) + as_torch(x) @ w.T + as_torch(bias)
        assert close(out[:, :40], want, np.abs(x) + 1, w.abs() + 64 * fmt.has_zero)
        assert (out[:, 40:] == before[:, 40:]).all()


@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
def test_a_row_has_the_same_bits_whatever_stands_beside_it(pools, rng, fmt):
    linear = made(fmt, 200, 613, rng)
    x = rng.standard_normal((230, 613), np.float32)
    whole = linear(pools[0], x)
    assert linear(pools[1], x).tobytes() == whole.tobytes()
    for rows in (1, 2, 3, 4, 5, 6, 7, 64):
        for pool in pools:
            assert linear(pool, x[11 : 11 + rows].copy()).tobytes() == whole[11 : 11 + rows].tobytes(), rows


@pytest.mark.parametrize("fmt", [LinearFormat("float32"), LinearFormat("bfloat16")], ids=ids)
@pytest.mark.parametrize(("heads", "out_features", "in_features"), [(3, 20, 7), (5, 16, 40)])
def test_a_stack_of_linears_takes_each_its_columns(pools, rng, fmt, heads, out_features, in_features):
    weights = as_torch(rng.standard_normal((heads, out_features, in_features), np.float32)).bfloat16().float()
    packed = torch.stack([pack_linear(w, fmt)["weight"] for w in weights])
    for rows in (1, 5, 40):
        x = rng.standard_normal((rows, heads * in_features), np.float32)
        want = torch.einsum("thi,hoi->tho", as_torch(x).unflatten(1, (heads, -1)), weights).flatten(1)
        outs = []
        for pool in pools:
            out = np.full((rows, heads * out_features), np.nan, np.float32)
            step = library.linear_step(address(x), address(out), address(packed), fmt=fmt.name, stack=heads,
                                       in_features=in_features, out_features=out_features)  # fmt: skip
            run(pool, [step], rows_batch(rows))
            torch.testing.assert_close(as_torch(out), want, rtol=1e-5, atol=1e-5)
            outs.append(out.tobytes())
        assert outs[0] == outs[1]


def test_rows_may_be_those_of_the_logits(pool, rng):
    weight = torch.from_numpy(rng.standard_normal((20, 30), np.float32))
    linear = PackedLinear(weight, LinearFormat("float32"))
    x = rng.standard_normal((3, 30), np.float32)
    out = np.zeros((4, 20), np.float32)
    step = library.linear_step(address(x), address(out), address(linear.packed["weight"]), rows="num_logits",
                               **linear.arguments)  # fmt: skip
    run(pool, [step], rows_batch(50, num_logits=3))
    np.testing.assert_allclose(out[:3], x @ weight.numpy().T, rtol=1e-5, atol=1e-5)
    assert (out[3] == 0).all()


@pytest.mark.parametrize(
    "fmt",
    [
        LinearFormat("int8"), LinearFormat("int8", 32), LinearFormat("int4", 32), LinearFormat("int4", 32, True),
        LinearFormat("fp8"), LinearFormat("fp8", 128), LinearFormat("fp4", 16),
    ],
    ids=ids,
)  # fmt: skip
def test_weights_that_come_quantized(pool, rng, fmt):
    parts = random_parts(fmt, 24, 192, rng)
    parts["scale"] = parts["scale"].to(parts["scale"].dtype if fmt.name == "fp4" else torch.float16).float()
    w = fmt.dequantize(parts, 192)
    linear = PackedLinear(torch.empty(24, 192), fmt, parts)
    for rows in (1, 5, 40):
        x = rng.standard_normal((rows, 192), np.float32)
        got, want = as_torch(linear(pool, x)), as_torch(x) @ w.T
        tolerance = 5e-4 if fmt.has_zero else 1e-5  # an integer zero times the scale becomes a float16
        assert float((got - want).norm() / want.norm()) < tolerance
