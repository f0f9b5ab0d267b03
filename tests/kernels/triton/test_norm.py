"""rms_norm and layer_norm against the reference, and their machine code."""

import pytest
import torch

from trtllm_cli.kernels import reference
from trtllm_cli.kernels.triton import norm

BF16, F32, FP8, INT8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int8
TOLERANCE = {F32: 2e-6, BF16: 8e-3}  # the interpreter cuts bf16 off where a GPU rounds


def error(out, expected):
    return float((out.float() - expected).norm() / expected.norm())


def poison(shape, dtype, device):
    return torch.full(shape, 77 if dtype == INT8 else torch.nan, dtype=F32, device=device).to(dtype)


def check_quantized(out, expected, step, dtype):
    """`out * step` is `expected` rounded by `step`: at most half a step of int8, or 1/16 of the value, away."""
    largest = 127.0 if dtype == INT8 else 448.0
    clamped = expected.clamp(-largest * step, largest * step)
    slack = step * 0.501 if dtype == INT8 else torch.maximum(clamped.abs() / 16 * 1.001, step * 2.0**-10 * 1.001)
    assert ((out.float() * step - clamped).abs() <= slack).all()


def run(launch, kind, tokens, width, *, heads=1, x_dtype=BF16, residual_dtype=None, out_dtype=BF16, quant="none",
        weight_dtype=BF16, bias=False, x_stride=None, out_stride=None, seed=0):  # fmt: skip
    """(what the kernel gives, what the reference gives), as (normed, sum, steps)."""
    torch.manual_seed(seed)
    d, row = launch.device, heads * width
    x_wide = torch.randn(tokens, x_stride or row, device=d).to(x_dtype)
    x = x_wide[:, :row]
    residual = torch.randn(tokens, row, device=d).mul(3).to(residual_dtype or BF16)
    weight = (torch.rand(width if kind == "rms" else row, device=d) + 0.5).to(weight_dtype)
    bias_row = torch.randn(row, device=d).to(weight_dtype)
    out_wide = poison((tokens, out_stride or row), out_dtype, d)
    total = poison((tokens, row), residual_dtype or BF16, d)
    scale = torch.tensor([0.01 if out_dtype == INT8 else 0.004], device=d)
    steps = poison((tokens, width // 128) if quant == "group" else (tokens,), F32, d)
    eps = 1e-5
    blocks = {"NUM_HEADS": heads, "WIDTH": width, "BLOCK_HEADS": _power(heads), "BLOCK": _power(width)}
    constants = {
        **blocks, "X_STRIDE": x_stride or row, "OUT_STRIDE": out_stride or row, "QUANT": quant,
        "HAS_RESIDUAL": residual_dtype is not None,
    }  # fmt: skip
    full = x.float() + residual.float() if residual_dtype is not None else x.float()
    if kind == "rms":
        launch(norm.rms_norm, (tokens,), x_wide, residual, weight, out_wide, total, scale, steps, eps,
               **constants)  # fmt: skip
        expected = reference.rms_norm(full, weight.float(), eps, heads if heads > 1 else None)
    else:
        launch(norm.layer_norm, (tokens,), x_wide, residual, weight, bias_row, out_wide, total, scale, steps, eps,
               HAS_BIAS=bias, **constants)  # fmt: skip
        expected = reference.layer_norm(full, weight.float(), bias_row.float() if bias else None, eps, heads)
    if out_stride is not None:
        rest = out_wide[:, row:].float()
        assert rest.isnan().all()  # nothing behind the row is written
    return (out_wide[:, :row], total, steps), (expected, full, scale)


def _power(n):
    return 1 << (n - 1).bit_length()


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (3, 96), (2, 1000)])
@pytest.mark.parametrize(("x_dtype", "residual_dtype", "out_dtype"),
                         [(BF16, None, BF16), (F32, F32, F32), (BF16, F32, BF16), (F32, BF16, F32)])  # fmt: skip
def test_norm(launch, kind, tokens, width, x_dtype, residual_dtype, out_dtype):
    (out, total, _), (expected, full, _) = run(
        launch, kind, tokens, width, x_dtype=x_dtype, residual_dtype=residual_dtype, out_dtype=out_dtype,
        weight_dtype=out_dtype, bias=residual_dtype is None,
    )  # fmt: skip
    assert error(out, expected) < TOLERANCE[out_dtype]
    if residual_dtype is not None:
        assert error(total, full) < TOLERANCE[residual_dtype]
    else:
        assert total.float().isnan().all()


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("dtype", [FP8, INT8])
@pytest.mark.parametrize("quant", ["static", "token"])
def test_quantized(launch, kind, dtype, quant):
    (out, total, steps), (expected, full, scale) = run(
        launch, kind, 3, 160, residual_dtype=F32, out_dtype=dtype, quant=quant, bias=True
    )
    assert error(total, full) < 1e-6
    if quant == "token":
        largest = 127.0 if dtype == INT8 else 448.0
        torch.testing.assert_close(steps, expected.abs().amax(1) / largest, rtol=1e-5, atol=0)
        check_quantized(out, expected, steps[:, None], dtype)
    else:
        assert steps.isnan().all()
        assert (expected.abs() > (127 if dtype == INT8 else 448) * scale).any()  # some are clamped
        check_quantized(out, expected, scale, dtype)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("width", [384, 512])
def test_quantized_in_groups(launch, kind, width):
    (out, total, steps), (expected, full, _) = run(
        launch, kind, 3, width, residual_dtype=F32, out_dtype=FP8, quant="group", bias=True
    )
    assert error(total, full) < 1e-6
    largest = expected.unflatten(1, (-1, 128)).abs().amax(2)
    torch.testing.assert_close(steps, largest / 448.0, rtol=1e-5, atol=0)
    check_quantized(out, expected, steps.repeat_interleave(128, 1), FP8)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize(("heads", "width"), [(4, 32), (3, 20)])
def test_heads_of_a_wider_row(launch, kind, heads, width):
    row = heads * width
    (out, _, _), (expected, _, _) = run(
        launch, kind, 3, width, heads=heads, x_stride=row + 16, out_stride=row + 8, out_dtype=F32
    )
    assert error(out, expected) < TOLERANCE[F32]


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_a_row_of_zeros(launch, kind):
    d = launch.device
    x, ones = torch.zeros(1, 32, device=d), torch.ones(32, device=d)
    out, steps = poison((1, 32), FP8, d), poison((1,), F32, d)
    constants = {"NUM_HEADS": 1, "WIDTH": 32, "BLOCK_HEADS": 1, "BLOCK": 32, "X_STRIDE": 32, "OUT_STRIDE": 32,
                 "HAS_RESIDUAL": False, "QUANT": "token"}  # fmt: skip
    if kind == "rms":
        launch(norm.rms_norm, (1,), x, x, ones, out, x, ones, steps, 1e-6, **constants)
    else:
        launch(norm.layer_norm, (1,), x, x, ones, ones, out, x, ones, steps, 1e-6, HAS_BIAS=False, **constants)
    assert (out.float() == 0).all()
    assert steps > 0


def test_the_sum_may_replace_the_residual(launch):
    torch.manual_seed(0)
    d = launch.device
    x, residual, weight = torch.randn(2, 64, device=d), torch.randn(2, 64, device=d), torch.rand(64, device=d)
    full, out = x + residual, poison((2, 64), F32, d)
    launch(norm.rms_norm, (2,), x, residual, weight, out, residual, weight, weight, 1e-5, NUM_HEADS=1,
           WIDTH=64, BLOCK_HEADS=1, BLOCK=64, X_STRIDE=64, OUT_STRIDE=64, HAS_RESIDUAL=True,
           QUANT="none")  # fmt: skip
    assert error(residual, full) < 1e-6
    assert error(out, reference.rms_norm(full, weight, 1e-5)) < TOLERANCE[F32]


@pytest.mark.parametrize("num_warps", [16, 4])
@pytest.mark.parametrize(("residual", "out", "quant"), [("*bf16", "*bf16", "none"), ("*fp32", "*fp8e4nv", "static"),
                                                       ("*bf16", "*fp8e4nv", "token")])  # fmt: skip
def test_machine_code_for_llama(compile_kernel, num_warps, residual, out, quant):
    compiled = compile_kernel(
        norm.rms_norm,
        args={"x_ptr": "*bf16", "residual_ptr": residual, "weight_ptr": "*bf16", "out_ptr": out,
              "new_residual_ptr": residual, "out_scale_ptr": "*fp32", "row_scale_ptr": "*fp32",
              "eps": "fp32"},
        constexprs={"NUM_HEADS": 1, "WIDTH": 4096, "BLOCK_HEADS": 1, "BLOCK": 4096, "X_STRIDE": 4096,
                    "OUT_STRIDE": 4096, "HAS_RESIDUAL": True, "QUANT": quant, "PDL": True},
        num_warps=num_warps,
    )  # fmt: skip
    assert compiled.spills == 0
    assert compiled.registers * 32 * num_warps <= 32768  # two programs a multiprocessor at least
    assert "ld.global.v4.b32" in compiled.ptx  # 16 bytes
    assert "ld.global.b16" not in compiled.ptx
    assert "griddepcontrol.wait" in compiled.ptx
