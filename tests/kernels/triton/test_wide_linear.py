import re

import pytest
import torch

from tests.kernels.triton.test_linear import LLAMA, check_stream, error, run
from trtllm_cli.build.backends import cuda_linears
from trtllm_cli.build.backends.cuda_linears import LinearShape, Tactic
from trtllm_cli.kernels.triton import wide_linear

FP8 = torch.float8_e4m3fn


def shape_of(form, n, k, *, gated="", scale="row", **options):
    """As lowering describes it; FP8 with scales of rows or one scale."""
    scales = {"w_scale": scale, "x_scale": scale, "x_type": "*fp8e4nv"} if form == "fp8" else {}
    return LinearShape(form, n, k, gated=gated, **scales, **options)


@pytest.mark.parametrize(
    ("tiles", "m", "count"),
    [
        ((8, 1, 3, 1, 1, 4), 17, 4), ((16, 2, 3, 1, 1, 4), 16, 5), ((32, 1, 4, 1, 2, 8), 45, 5),
        ((64, 2, 3, 1, 2, 4), 50, 3), ((64, 1, 4, 1, 3, 4), 64, 4), ((32, 1, 3, 2, 1, 4), 33, 5),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["bf16", "fp8"])
@pytest.mark.parametrize(("gated", "has_bias"), [("", True), ("gelu_pytorch_tanh", False)])
def test_tiles(launch, tiles, m, count, form, gated, has_bias):
    torch.manual_seed(12)
    _, r, _, pieces, split, warps = tiles
    kind = FP8 if form == "fp8" else torch.bfloat16
    d, k = launch.device, 128 // kind.itemsize * pieces * split * count
    n = 16 * r * warps * (2 if gated else 1) * (2 if split == 1 else 1)
    way = cuda_linears.launch_of(shape_of(form, n, k, gated=gated, has_bias=has_bias), Tactic("wide", tiles))
    x, w = torch.randn(m, k, device=d).to(kind), (torch.randn(n, k, device=d) / k**0.5).to(kind)
    bias = torch.randn(n, device=d).bfloat16()
    w_scale, x_scale = torch.rand(n, device=d) + 0.5, torch.rand(m, device=d) + 0.5
    ref = x.float() @ w.float().T
    if form == "fp8":
        ref = ref * w_scale * x_scale[:, None]
    check_stream(launch, way, ref, has_bias, gated, x=x, w=w, w_scale=w_scale, x_scale=x_scale, bias=bias)


def test_one_scale_and_fp8_out(launch):
    torch.manual_seed(13)
    d, m, n, k = launch.device, 19, 128, 512
    way = cuda_linears.launch_of(
        shape_of("fp8", n, k, scale="one", out_type="*fp8e4nv"), Tactic("wide", (32, 1, 3, 1, 1, 8))
    )  # fmt: skip
    x, w = torch.randn(m, k, device=d).to(FP8), torch.randn(n, k, device=d).to(FP8)
    y = torch.full((m, n), torch.nan, device=d).to(FP8)
    scales = {role: torch.full((1,), value, device=d) for role, value in (("w_scale", 0.1), ("x_scale", 0.2))}
    run(launch, way, m, x=x, w=w, y=y, out_scale=torch.full((1,), 0.1, device=d), **scales)
    assert error(y, (x.float() @ w.float().T * 0.2).clamp(-448, 448)) < 4e-2


@pytest.mark.parametrize(
    ("form", "linear_name", "tiles", "products"),
    [
        ("fp8", "gate_up", (64, 1, 5, 1, 1, 8), 8), ("fp8", "gate_up", (64, 1, 3, 2, 1, 4), 16),
        ("fp8", "qkv", (64, 1, 6, 1, 1, 4), 4), ("fp8", "dense", (32, 1, 6, 1, 2, 4), 4),
        ("fp8", "proj", (64, 1, 5, 1, 4, 8), 4), ("bf16", "gate_up", (64, 1, 5, 1, 1, 8), 8),
    ],
)  # fmt: skip
def test_machine_code_of_real_shapes(compile_kernel, form, linear_name, tiles, products):
    """Products follow each other, wait for those before alone, and nothing lies between them in a loop."""
    n, k, gated = LLAMA[linear_name]
    source = cuda_linears.launch_of(shape_of(form, n, k, gated=gated, scale="one"), Tactic("wide", tiles)).source
    kernel = compile_kernel(
        wide_linear.wide_linear, dict(source.args), dict(source.constants), num_warps=source.num_warps, num_stages=1
    )  # fmt: skip
    ahead, after = kernel.ptx.split("griddepcontrol.wait")
    _, r, stages, pieces, split, warps = tiles
    rows = 16 * r * warps * (2 if gated else 1)
    assert len(re.findall(r"cp\.async\.c[ag]\.shared\.global", ahead)) == stages * pieces * rows * 8 // (32 * warps)
    assert kernel.spills == 0
    assert kernel.registers <= (128 if split == 1 else 144)
    assert len(re.findall(r"wgmma\.mma_async", after)) == products
    loop = after[after.index("wgmma.mma_async") : after.rindex("wgmma.mma_async")]
    assert not re.search(r"st\.shared|shfl|ld\.shared|bar\.sync", loop)
    assert f"wgmma.wait_group.sync.aligned {products // 4}" in after
