import re
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest
import torch

from tests.interpreter_device import function_of
from tests.kernels.triton.test_collectives import PHASES, STAGING, Ranks
from trtllm_cli.build.backends import cuda_linears
from trtllm_cli.build.backends.cuda_linears import LinearShape, Tactic
from trtllm_cli.kernels import reference
from trtllm_cli.kernels.cuda.compile_worker import check_assembly
from trtllm_cli.kernels.quantization import dequantize, quantize_int4, quantize_int8
from trtllm_cli.kernels.triton import collectives, linear, stream_linear, stream_words

LLAMA = {
    "qkv": (6144, 4096, ""),
    "dense": (4096, 4096, ""),
    "gate_up": (28672, 4096, "silu"),
    "proj": (4096, 14336, ""),
}


def error(out, ref):
    return ((out.float() - ref).norm() / ref.norm()).item()


def run(launch, way, tokens, phase=MappingProxyType({}), **roles):
    """A way of cuda_linears with tensors by role; twice if it splits sums: its counters are zero afterwards."""
    constants = dict(way.source.constants) | {"PDL": False, **phase}
    none = torch.zeros(1, device=launch.device)
    scratch = torch.full((max(way.scratch // 4, 1),), torch.nan, device=launch.device)
    scratch[: cuda_linears.COUNTERS] = 0
    values = {"scratch": scratch, "num_tokens": tokens, "eps": 0.0, "calls": 0, "call": 0} | roles
    if dict(way.source.args)["w_ptr"] == "*i32":
        values["w"] = values["w"].view(torch.int32)
    grid = tuple(-(-tokens // dim[1]) if isinstance(dim, tuple) else dim for dim in way.grid)
    kernel = function_of(way.source.module, way.source.function)
    args = [values.get(role, none) for role in way.operands]
    for _ in range(2 if way.scratch else 1):
        launch(kernel, grid, *args, num_warps=way.source.num_warps, num_stages=way.source.num_stages, **constants)
        assert not scratch[: cuda_linears.COUNTERS].any()


def tried(shape, kernel):
    """The kernel with small tiles, some of them several at a time or split."""
    match kernel:
        case "vector":
            return cuda_linears.vector(shape, 1, 32, 64, 4, 2)
        case "vector, one round":
            return cuda_linears.vector(shape, 1, 16, 128, 4, 2)
        case "vector, odd rounds":
            return cuda_linears.vector(shape, 1, 16, 64, 4, 4)
        case "vector, 4 tokens":
            return cuda_linears.vector(shape, 4, 16, 64, 4, 2)
        case "skinny":
            return cuda_linears.skinny(shape, 16, 32, 64, 1, 3, 4)
        case "skinny, split":
            return cuda_linears.skinny(shape, 16, 32, 32, 3, 3, 4)
        case "fragment":
            return cuda_linears.fragment(shape, 8, 1, 1, 1, 1, 2)
        case "fragment, ring":
            return cuda_linears.fragment(shape, 8, 2, 1, 2, 1, 1)
        case "fragment, split":
            return cuda_linears.fragment(shape, 16, 1, 2 if shape.form == "bf16" else 1, 1, 2, 1)


@pytest.mark.parametrize(
    "kernel",
    [
        "vector",
        "vector, one round",
        "vector, 4 tokens",
        "skinny",
        "skinny, split",
        "fragment",
        "fragment, ring",
        "fragment, split",
    ],
)
@pytest.mark.parametrize("form", ["bf16", "fp8"])
@pytest.mark.parametrize(("gated", "has_bias"), [("", False), ("", True), ("silu", False), ("gelu_pytorch_tanh", True)])
def test_plain_forms(launch, kernel, form, gated, has_bias):
    torch.manual_seed(0)
    d = launch.device
    m, n, k = (1 if kernel in ("vector", "vector, one round") else 3), 96, 128
    x, w = torch.randn(m, k, device=d), torch.randn(n, k, device=d) / k**0.5
    bias = torch.randn(n, device=d).bfloat16()
    w_scale, x_scale = torch.rand(n, device=d) + 0.5, torch.rand(m, device=d) + 0.5
    kind = torch.float8_e4m3fn if form == "fp8" else torch.bfloat16
    x, w = x.to(kind), w.to(kind)
    ref = x.float() @ w.float().T
    if form == "fp8":
        ref = ref * w_scale * x_scale[:, None]
    if has_bias:
        ref = ref + bias.float()
    if gated:
        ref = reference.activate(ref[:, : n // 2], gated) * ref[:, n // 2 :]
    y = torch.full(ref.shape, torch.nan, dtype=torch.bfloat16, device=d)
    scale = "row" if form == "fp8" else "none"
    shape = LinearShape(form, n, k, w_scale=scale, x_scale=scale, has_bias=has_bias, gated=gated)
    roles = {"x": x, "w": w, "w_scale": w_scale, "x_scale": x_scale, "bias": bias, "y": y}
    run(launch, tried(shape, kernel), m, **roles)
    assert error(y, ref) < 6e-3


@pytest.mark.parametrize(
    "tiles",
    [
        (1, 8, 2, 1, 4), (1, 8, 4, 1, 8), (2, 4, 3, 1, 4), (8, 2, 4, 1, 4), (8, 1, 2, 1, 4), (16, 4, 2, 1, 4),
        (32, 1, 3, 1, 8), (1, 8, 2, 2, 4), (1, 8, 3, 2, 4), (1, 8, 1, 4, 4), (2, 4, 2, 4, 4),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["bf16", "fp8"])
@pytest.mark.parametrize(("gated", "has_bias"), [("", False), ("", True), ("silu", True)])
def test_stream(launch, tiles, form, gated, has_bias):
    torch.manual_seed(7)
    _, parts, stages, pieces, warps = tiles
    rounds = 1 if stages == 1 else 5
    scale, kind = ("row", torch.float8_e4m3fn) if form == "fp8" else ("none", torch.bfloat16)
    k = rounds * pieces * parts * 128 // kind.itemsize
    d, n = launch.device, 512 if launch.device == "cuda" else 32 * warps // parts
    shape = LinearShape(
        form, n, k, w_scale=scale, x_scale=scale, has_bias=has_bias, gated=gated,
        x_type="*fp8e4nv" if form == "fp8" else "*bf16",
    )  # fmt: skip
    way = cuda_linears.launch_of(shape, Tactic("stream", tiles))
    for m in (1, tiles[0] + 1):
        x, w = torch.randn(m, k, device=d).to(kind), torch.randn(n, k, device=d).to(kind)
        w_scale, x_scale = torch.rand(n, device=d) + 0.5, torch.rand(m, device=d) + 0.5
        bias = torch.randn(n, device=d).bfloat16()
        ref = x.float() @ w.float().T
        if form == "fp8":
            ref = ref * w_scale * x_scale[:, None]
        check_stream(launch, way, ref, has_bias, gated, x=x, w=w, w_scale=w_scale, x_scale=x_scale, bias=bias)


@pytest.mark.parametrize(
    "tiles",
    [
        (2, 2, 1, 4), (2, 3, 1, 4), (2, 8, 1, 4), (4, 4, 1, 4), (8, 2, 1, 4), (2, 4, 2, 4), (1, 2, 2, 8), (1, 3, 1, 8),
        (1, 6, 1, 4), (1, 2, 2, 4),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("group", "k"), [(64, 3072), (128, 6144), (64, 4096)])
@pytest.mark.parametrize(
    ("gated", "has_bias", "has_zero"), [("", False, False), ("", True, True), ("silu", True, True)]
)
def test_stream_words(launch, tiles, group, k, gated, has_bias, has_zero):
    torch.manual_seed(8)
    d, n = launch.device, 512 if launch.device == "cuda" else 32
    shape, packed, plain = weight_only("int4", n, k, group, has_zero)
    way = cuda_linears.launch_of(replace(shape, has_bias=has_bias, gated=gated), Tactic("words", tiles))
    for m in (1, tiles[0] + 1):
        x, bias = torch.randn(m, k, device=d).bfloat16(), torch.randn(n, device=d).bfloat16()
        weights = {role: tensor.to(d) for role, tensor in packed.items()}
        check_stream(launch, way, x.float() @ plain.to(d).T, has_bias, gated, x=x, bias=bias, **weights)


@pytest.mark.parametrize("group", [64, 128])
def test_stream_words_of_inputs_of_all_sizes(launch, group):
    """Each group has a step of its own, and what is no number gives no number."""
    torch.manual_seed(9)
    d, n, k = launch.device, 512 if launch.device == "cuda" else 16, 3072
    shape, packed, plain = weight_only("int4", n, k, group, False)
    way = cuda_linears.launch_of(shape, Tactic("words", (4, 2, 1, 4)))
    x = torch.randn(4, k, device=d).unflatten(1, (-1, group))
    x[0] *= torch.tensor([0.0, 1e-38, 1e-20, 1e20], device=d).repeat(k // group // 4)[:, None]
    x[1] *= 1e-20
    x[2, 3, 5], x[3, 7, 11] = torch.nan, -torch.inf
    x = x.flatten(1).bfloat16()
    y = torch.full((4, n), torch.nan, dtype=torch.bfloat16, device=d)
    with np.errstate(invalid="ignore"):
        run(launch, way, 4, x=x, y=y, **{role: tensor.to(d) for role, tensor in packed.items()})
    ref = x.float() @ plain.to(d).T
    for i in (0, 1):
        assert error(y[i].float() / ref[i].abs().max(), ref[i] / ref[i].abs().max()) < 6e-3
    assert y[2].isnan().all()
    assert not y[3].isfinite().any()


def check_stream(launch, way, ref, has_bias, gated, **roles):
    """Against torch's product, as the slow twins in linear.py are."""
    if has_bias:
        ref = ref + roles["bias"].float()
    if gated:
        half = ref.shape[1] // 2
        ref = reference.activate(ref[:, :half], gated) * ref[:, half:]
    y = torch.full(ref.shape, torch.nan, dtype=torch.bfloat16, device=launch.device)
    run(launch, way, len(y), y=y, **roles)
    assert error(y, ref) < 6e-3


@pytest.mark.parametrize("form", ["bf16", "fp8", "int4"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_norm_between_streamed_linears(launch, form, tokens):
    """The linear in front adds to the residual and leaves sums of squares, the one behind divides by what they give."""
    torch.manual_seed(9)
    d, k, n, eps = launch.device, 1024, 96, 1e-3
    width = {"bf16": 512, "fp8": 1024, "int4": 768}[form]  # of the residual; int4: no power of two of sums
    kernel, tiles = ("words", (2, 2, 1, 4)) if form == "int4" else ("stream", (2, 4, 2, 1, 4))
    scales = {"w_scale": "one", "x_scale": "one", "x_type": "*fp8e4nv"} if form == "fp8" else {}
    of = {"form": form, **({"group": 64} if form == "int4" else {}), **scales}
    before, after = LinearShape(n=width, k=k, has_bias=True, **of), LinearShape(n=2 * n, k=width, gated="silu", **of)

    def weights(shape):
        if form == "int4":
            _, packed, plain = weight_only("int4", shape.n, shape.k, 64, False)
            return {role: tensor.to(d) for role, tensor in packed.items()}, plain.to(d)
        w = (torch.randn(shape.n, shape.k, device=d) / shape.k**0.5).to(kind)
        one = torch.full((1,), 0.5, device=d)
        return {"w": w, "w_scale": one}, w.float() * (one if form == "fp8" else 1)

    kind = torch.float8_e4m3fn if form == "fp8" else torch.bfloat16
    x_scale = torch.full((1,), 0.03, device=d)
    x = torch.randn(tokens, k, device=d).to(kind)
    bias, weight = torch.randn(width, device=d).bfloat16(), (torch.rand(width, device=d) + 0.5).bfloat16()
    residual = 3 * torch.randn(tokens, width, device=d)
    (packed, plain), (packed_after, plain_after) = weights(before), weights(after)
    sums = residual + x.float() @ plain.T * (x_scale if form == "fp8" else 1) + bias.float()
    adds = cuda_linears.launch_of(before, Tactic(kernel, tiles), cuda_linears.Norm(weight_type="*bf16"))
    programs = adds.grid[0]
    y = torch.full((tokens, width), torch.nan, dtype=torch.bfloat16, device=d)
    squares = torch.full((tokens, programs), torch.nan, device=d)
    to_norm = {"residual": residual, "new_residual": residual, "norm_weight": weight, "squares": squares}
    run(launch, adds, tokens, x=x, x_scale=x_scale, bias=bias, y=y, **packed, **to_norm)
    assert error(residual, sums) < 1e-3
    assert error(y, sums * weight.float()) < 4e-3
    assert error(squares.sum(1), sums.square().sum(1)) < 1e-3

    normed = sums * torch.rsqrt(sums.square().mean(1, keepdim=True) + eps) * weight.float()
    if form == "fp8":
        normed = (normed / x_scale).to(kind).float() * x_scale
    products = normed @ plain_after.T
    ref = reference.activate(products[:, :n], "silu") * products[:, n:]
    divides = cuda_linears.launch_of(after, Tactic(kernel, tiles), cuda_linears.Norm(squares=programs))
    out = torch.full((tokens, n), torch.nan, dtype=torch.bfloat16, device=d)
    run(launch, divides, tokens, x=y, x_scale=x_scale, y=out, squares=squares, eps=eps, **packed_after)
    assert error(out, ref) < (2e-2 if form == "fp8" else 8e-3)  # some sums are rounded to other FP8 numbers


@pytest.mark.parametrize(("form", "ranks", "tokens"), [("bf16", 2, 1), ("bf16", 3, 3), ("fp8", 2, 2), ("int4", 2, 1)])
def test_streamed_linears_sum_over_ranks(launch, form, ranks, tokens):
    """As all_reduce_add_rms_norm does, of the same words: one rank has its sum by that."""
    torch.manual_seed(10)
    d, k, width = launch.device, 1024 if form == "fp8" else 512, 256
    kernel, tiles = ("words", (2, 2, 1, 4)) if form == "int4" else ("stream", (2, 4, 2, 1, 4))
    scales = {"w_scale": "one", "x_scale": "one", "x_type": "*fp8e4nv"} if form == "fp8" else {}
    shape = LinearShape(form, width, k, group=64 if form == "int4" else 0, **scales)
    kind = torch.float8_e4m3fn if form == "fp8" else torch.bfloat16
    world, one = Ranks(ranks, d), torch.ones(1, device=d)
    deltas = world.deltas(world.staging)
    weight, residual = (torch.rand(width, device=d) + 0.5).bfloat16(), 3 * torch.randn(tokens, width, device=d)
    made = []  # each rank's part
    for _ in range(ranks):
        x = torch.randn(tokens, k, device=d).to(kind)
        if form == "int4":
            _, packed, plain = weight_only("int4", width, k, 64, False)
            packed, plain = {role: tensor.to(d) for role, tensor in packed.items()}, plain.to(d)
        else:
            packed = {"w": torch.randn(width, k, device=d).to(kind), "w_scale": one}
            plain = packed["w"].float()
        made.append((x, packed, x.float() @ plain.T))
    sums = residual + sum(y.bfloat16().float() for _, _, y in made)
    found = []
    for rank in range(ranks):
        norm = cuda_linears.Norm("*bf16", ranks=ranks, rank=rank, staging=STAGING)
        way = cuda_linears.launch_of(shape, Tactic(kernel, tiles), norm)
        squares = torch.full((tokens, way.grid[0]), torch.nan, device=d)
        y = torch.full((tokens, width), torch.nan, dtype=torch.bfloat16, device=d)
        found.append((way, y, residual.clone(), squares))
    for call in (3, 4, 5):  # each slot, and the first again
        for phase in PHASES:
            for rank, (way, y, total, squares) in enumerate(found):
                x, packed, part = made[rank]
                total.copy_(residual)
                about = (world.staging[rank], deltas[rank], world.step, 7, call)
                if rank == 1:
                    out, eps = torch.empty_like(y), 1e-5
                    launch(
                        collectives.all_reduce_add_rms_norm, (tokens,), part.bfloat16(), *about, total, weight, out,
                        total, one, one, eps, WIDTH=width, RANKS=ranks, RANK=rank, STAGING=STAGING, FLAGS=0,
                        BLOCK=width, QUANT="none", **phase,
                    )  # fmt: skip
                    continue
                of_ranks = dict(zip(cuda_linears.RANK_ROLES, about, strict=True))
                to_norm = {"residual": total, "new_residual": total, "norm_weight": weight, "squares": squares}
                run(launch, way, tokens, phase, x=x, x_scale=one, y=y, **packed, **to_norm, **of_ranks)
        for rank, (_, y, total, squares) in enumerate(found):
            assert error(total, sums) < 2e-3  # a part that is rounded to another bf16 number
            if rank != 1:
                assert error(y, sums * weight.float()) < 5e-3
                assert error(squares.sum(1), sums.square().sum(1)) < 2e-3

    way, y, total, squares = found[0]  # alone
    total.copy_(residual)
    x, packed, part = made[0]
    to_norm = {"residual": total, "new_residual": total, "norm_weight": weight, "squares": squares}
    of_ranks = dict(zip(cuda_linears.RANK_ROLES, (world.staging[0], deltas[0], world.step, 0, 0), strict=True))
    run(launch, way, tokens, {"PUSH": False}, x=x, x_scale=one, y=y, **packed, **to_norm, **of_ranks)
    assert error(total, residual + part) < 1e-3


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize(("gated", "has_bias"), [("", True), ("silu", False)])
def test_fp8_with_scales_of_groups(launch, split, gated, has_bias):
    torch.manual_seed(1)
    d, m, n, k, group = launch.device, 21, 72, 96, 32
    x, w = (torch.randn(*size, device=d).to(torch.float8_e4m3fn) for size in ((m, k), (n, k)))
    w_scale, x_scale = (torch.rand(rows, k // group, device=d) + 0.5 for rows in (n, m))
    bias = torch.randn(n, device=d).bfloat16()
    wide = (t.float() * s.repeat_interleave(group, 1) for t, s in ((x, x_scale), (w, w_scale)))
    ref = next(wide) @ next(wide).T + (bias.float() if has_bias else 0)
    if gated:
        ref = reference.activate(ref[:, : n // 2], gated) * ref[:, n // 2 :]
    shape = LinearShape("fp8", n, k, group=group, w_scale="group", x_scale="group", has_bias=has_bias, gated=gated)
    packed = cuda_linears.pack_weight(shape, {"weight": w, "scale": w_scale})
    for role, tensor in cuda_linears.packed_tensors(shape).items():
        assert (packed[role].shape, packed[role].dtype) == (tensor.shape, tensor.dtype)
    y = torch.full(ref.shape, torch.nan, dtype=torch.bfloat16, device=d)
    roles = {"x": x, "w": packed["weight"], "w_scale": packed["scale"], "x_scale": x_scale, "bias": bias, "y": y}
    run(launch, cuda_linears.skinny(shape, 16, 32, group, split, 3, 4), m, **roles)
    assert error(y, ref) < 6e-3


@pytest.mark.parametrize("kernel", ["vector, odd rounds", "skinny", "skinny, split", "fragment", "fragment, ring"])
@pytest.mark.parametrize("form", ["bf16", "fp8"])
def test_rounds_that_do_not_fill_the_last_one(launch, kernel, form):
    torch.manual_seed(4)
    d, n, k = launch.device, 40, 320 if "vector" in kernel else 176
    m = 1 if "vector" in kernel else 9
    kind = torch.float8_e4m3fn if form == "fp8" else torch.bfloat16
    x, w = torch.randn(m, k, device=d).to(kind), torch.randn(n, k, device=d).to(kind)
    y = torch.full((m, n), torch.nan, dtype=torch.bfloat16, device=d)
    run(launch, tried(LinearShape(form, n, k), kernel), m, x=x, w=w, y=y)
    assert error(y, x.float() @ w.float().T) < 6e-3


def weight_only(form, n, k, group, has_zero):
    """The packed weight by role, and it as float32."""
    w = torch.randn(n, k) / k**0.5
    if form == "int8":
        stored, scale = quantize_int8(w, group)
        zero = torch.zeros_like(scale)
    else:
        stored, scale, zero = quantize_int4(w, group or k)
        zero = zero if has_zero else torch.full_like(zero, 8)
    shape = LinearShape(form, n, k, group=group or 0, has_zero=has_zero)
    plain = dequantize(
        stored, form, scale, zero if form == "int4" else None, None, group or (k if form == "int4" else None)
    )
    parts = cuda_linears.pack_weight(shape, {"weight": stored, "scale": scale, "zero": zero})
    return shape, {"w": parts["weight"], "w_scale": parts["scale"], "w_zero": parts["zero"]}, plain


GROUPS = [
    ("int8", 64, 256, False), ("int8", None, 192, False),
    ("int4", 64, 320, True), ("int4", 128, 512, True), ("int4", 128, 512, False), ("int4", 128, 448, True),
    ("int4", None, 256, True), ("int8", 32, 192, False), ("int4", 32, 320, True), ("int4", 32, 256, False),
]  # fmt: skip


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize(("form", "group", "k", "has_zero"), GROUPS)
def test_weight_only(launch, form, group, k, has_zero, split):
    torch.manual_seed(1)
    d, m, n = launch.device, 5, 40
    shape, packed, plain = weight_only(form, n, k, group, has_zero)
    x = torch.randn(m, k, device=d).bfloat16()
    y = torch.full((m, n), torch.nan, dtype=torch.bfloat16, device=d)
    u = 2 if group == 128 else 1
    way = cuda_linears.fragment(shape, 8, split, u, 2, split, 2)
    run(launch, way, m, x=x, y=y, **{role: tensor.to(d) for role, tensor in packed.items()})
    assert error(y, x.float() @ plain.to(d).T) < 6e-3


@pytest.mark.parametrize(
    ("form", "group", "k", "depth"),
    [("int4", 64, 704, 2), ("int8", 64, 640, 4), ("bf16", 0, 1136, 4), ("fp8", 0, 2304, 2)],
)
def test_rounds_in_a_loop_and_behind_it(launch, form, group, k, depth):
    torch.manual_seed(6)
    d, m, n = launch.device, 2, 16
    x = torch.randn(m, k, device=d).bfloat16()
    if group:
        shape, packed, plain = weight_only(form, n, k, group, form == "int4")
        roles = {role: tensor.to(d) for role, tensor in packed.items()}
    else:
        shape = LinearShape(form, n, k)
        x = x.to(torch.float8_e4m3fn) if form == "fp8" else x
        roles = {"w": torch.randn(n, k, device=d).to(x.dtype)}
        plain = roles["w"].float()
    y = torch.full((m, n), torch.nan, dtype=torch.bfloat16, device=d)
    run(launch, cuda_linears.fragment(shape, 8, 1, 1, depth, 1, 1), m, x=x, y=y, **roles)
    assert error(y, x.float() @ plain.to(d).T) < 6e-3


@pytest.mark.parametrize(("form", "group", "k", "has_zero"), GROUPS)
def test_dequantized_weight(launch, form, group, k, has_zero):
    torch.manual_seed(3)
    n = 40
    shape, packed, plain = weight_only(form, n, k, group, has_zero)
    out = torch.full((n, k), torch.nan, dtype=torch.bfloat16, device=launch.device)
    way = cuda_linears.dequantized(shape)
    run(launch, way, 1, out=out, **{role: tensor.to(launch.device) for role, tensor in packed.items()})
    assert error(out.cpu(), plain) < 5e-3  # the interpreter cuts where the GPU rounds


def test_gated_weight_only(launch):
    torch.manual_seed(5)
    d, m, n, k = launch.device, 3, 64, 128
    shape, packed, plain = weight_only("int4", n, k, 64, True)
    shape = LinearShape("int4", n, k, group=64, has_zero=True, gated="silu")
    x = torch.randn(m, k, device=d).bfloat16()
    y = torch.full((m, n // 2), torch.nan, dtype=torch.bfloat16, device=d)
    way = cuda_linears.fragment(shape, 8, 1, 1, 1, 2, 1)
    run(launch, way, m, x=x, y=y, **{role: tensor.to(d) for role, tensor in packed.items()})
    ref = x.float() @ plain.to(d).T
    assert error(y, reference.activate(ref[:, : n // 2], "silu") * ref[:, n // 2 :]) < 6e-3


@pytest.mark.parametrize("kernel", ["skinny", "fragment"])
def test_many_tokens_in_tiles_and_fp8_out(launch, kernel):
    torch.manual_seed(2)
    d, m, n, k = launch.device, 21, 32, 80
    x, w = torch.randn(m, k, device=d).bfloat16(), torch.randn(n, k, device=d).bfloat16()
    y = torch.full((m, n), torch.nan, device=d).to(torch.float8_e4m3fn)
    out_scale = torch.full((1,), 0.1, device=d)
    run(launch, tried(LinearShape("bf16", n, k, out_type="*fp8e4nv"), kernel), m, x=x, w=w, y=y, out_scale=out_scale)
    ref = (x.float() @ w.float().T / 0.1).clamp(-448, 448)
    assert error(y, ref) < 4e-2


TTGIR = """
#blocked = #ttg.blocked<{sizePerThread = [8], threadsPerWarp = [32], warpsPerCTA = [4], order = [0]}>
#linear = #ttg.linear<{register = [[1], [2], [4], [8]], lane = [[16], [32], [64], [128], [256]], warp = [], block = []}>
#linear1 = #ttg.linear<{register = [[16], [1], [2], [4]], lane = [[8], [32], [64], [128], [256]], warp = [], block = []}>
  %0 = tt.elementwise_inline_asm "TEXT" {constraints = "=r,r", packed_element = 8 : i32, pure = true} %1 : tensor<512xi32, LAYOUT> -> tensor<512xbf16, LAYOUT> loc(#loc1)
"""  # noqa: E501


@pytest.mark.parametrize(
    ("text", "layout", "fits"),
    [
        ("{ // side by side", "#blocked", True), ("{ // side by side", "#linear", True),
        ("{ // side by side", "#linear1", False), ("{ // side by side", "#unknown", False), ("{ any", "#linear1", True),
    ],
)  # fmt: skip
def test_assembly_gets_what_is_side_by_side(text, layout, fits):
    ttgir = TTGIR.replace("TEXT", text).replace("LAYOUT", layout)
    if fits:
        check_assembly(ttgir)
    else:
        with pytest.raises(ValueError, match="does not keep 8 elements side by side"):
            check_assembly(ttgir)


def shipped(shape):
    return [(most, cuda_linears.launch_of(shape, tactic)) for most, tactic in cuda_linears.shipped_tactics(shape)]


def test_few_tokens_takes_what_was_measured():
    """Of the shapes that were, and of others something that their kernels allow; each with its own tokens."""
    for form, group in (("bf16", 0), ("fp8", 0), ("int8", 0), ("int4", 128), ("int4", 64)):
        for n, k, gated in [
            *LLAMA.values(),
            (128256, 4096, ""),
            (3072, 2048, ""),
            (57344, 8192, "silu"),
            (40, 176, ""),
        ]:
            ways = shipped(LinearShape(form, n, k, group=group, gated=gated))
            most = [count for count, _ in ways]
            assert most == sorted(set(most))
            assert not most or most[-1] <= cuda_linears.MOST_TOKENS
            for count, way in ways:
                constants = dict(way.source.constants)
                if way.source.function == "vector_linear":
                    assert k % constants["BK"] == 0
                    assert constants["BM"] == count
                if group and way.source.function == "fragment_linear":
                    assert group % (64 * constants["U"]) == 0 or constants["U"] == 1
        measured = shipped(LinearShape(form, 4096, 4096, group=group))
        assert measured[0][0] == (8 if form == "int8" else 1)


def test_no_kernel_where_none_takes_the_shape():
    assert cuda_linears.shipped_tactics(LinearShape("fp8", 40, 72)) == []


LOADS = {"bf16": 2, "fp8": 1, "int4": 2}  # U


@pytest.mark.parametrize("form", ["bf16", "fp8", "int4"])
def test_weights_go_straight_to_tensor_cores(compile_kernel, form):
    n, k, gated = LLAMA["dense"]
    x_type, group = ("*fp8e4nv" if form == "fp8" else "*bf16"), (128 if form == "int4" else 0)
    shape = LinearShape(form, n, k, group=group, gated=gated, x_type=x_type)
    source = cuda_linears.fragment(shape, 8, 1, LOADS[form], 2, 1, 8).source
    kernel = compile_kernel(
        linear.fragment_linear, dict(source.args), dict(source.constants), num_warps=8, num_stages=1
    )
    assert kernel.spills == 0
    before_the_sum = kernel.ptx[: kernel.ptx.rindex("mma.sync")]
    assert not re.search(r"st\.shared|shfl|bar\.sync", before_the_sum)
    weights = n * k * {"bf16": 2, "fp8": 1, "int4": 0.5}[form] / (n // 16 * 256)
    assert kernel.ptx.count("ld.global.v4") >= weights / 16


def test_one_tokens_kernel_adds_in_registers(compile_kernel):
    n, k, _ = LLAMA["dense"]
    source = cuda_linears.vector(LinearShape("fp8", n, k, x_type="*fp8e4nv"), 1, 4, 2048, 4, 2).source
    kernel = compile_kernel(linear.vector_linear, dict(source.args), dict(source.constants), num_warps=4, num_stages=1)
    assert kernel.spills == 0
    assert kernel.ptx.count("st.shared") <= 8
    assert kernel.ptx.count("ld.global.v4") == 8 + 2  # weights, inputs


@pytest.mark.parametrize("group", [32, 64, 128, 0])
@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("gated", ["", "silu"])
def test_weight_only_compiles_with_groups_of(compile_kernel, form, group, gated):
    """Which fails where assembly would be given another order than it is written for."""
    shape = LinearShape(form, 512, 1024, group=group, has_zero=form == "int4", gated=gated)
    way = cuda_linears.fragment(shape, 16, 1, 1, 2, 1, 4)
    kernels = [compile_kernel(linear.fragment_linear, dict(way.source.args), dict(way.source.constants), num_warps=4)]
    plain = cuda_linears.dequantized(shape).source
    kernels.append(compile_kernel(linear.dequantize_weight, dict(plain.args), dict(plain.constants), num_warps=4))
    for kernel in kernels:
        assert "0x43004300" in kernel.ptx.upper().replace("0X", "0x") or "1124090624" in kernel.ptx
        assert ("// side by side" in kernel.ptx) == (group != 32)
        assert kernel.spills == 0


@pytest.mark.parametrize(
    ("form", "linear_name", "tiles", "asked", "barriers"),
    [
        ("bf16", "dense", (1, 8, 4, 1, 4), 4 * 4, 8),
        ("fp8", "qkv", (1, 8, 2, 1, 4), 2 * 4, 5),
        ("fp8", "dense", (1, 8, 1, 4, 4), 4 * 4, 3),
        ("fp8", "gate_up", (1, 8, 3, 1, 4), 2 * 3 * 4, 10),
        ("bf16", "proj", (8, 4, 4, 1, 4), 4 * 4, 10),
        ("int4", "dense", (2, 8, 1, 4), 8 * 2, 3),
        ("int4", "dense", (1, 8, 1, 4), 8 * 2, 3),
        ("int4", "dense", (1, 2, 2, 8), 2 * 2 * 2, 3),
        ("int4", "gate_up", (2, 4, 1, 4), 2 * 4 * 2, 6),
    ],
)
def test_streamed_weights_are_asked_for_ahead_of_the_kernel_in_front(
    compile_kernel, form, linear_name, tiles, asked, barriers
):  # fmt: skip
    """The first stages' copies, 16 bytes each, of which a thread has so many; then nothing is left but the products.

    Barriers behind the wait are counted, as the compiler puts some of its own where it sees a hazard.
    """
    n, k, gated = LLAMA[linear_name]
    x_type, group = ("*fp8e4nv" if form == "fp8" else "*bf16"), (128 if form == "int4" else 0)
    scale = "one" if form == "fp8" else "none"
    shape = LinearShape(form, n, k, group=group, w_scale=scale, x_scale=scale, gated=gated, x_type=x_type)
    source = cuda_linears.launch_of(shape, Tactic("words" if form == "int4" else "stream", tiles)).source
    function = stream_words.stream_words if form == "int4" else stream_linear.stream_linear
    kernel = compile_kernel(
        function, dict(source.args), dict(source.constants), num_warps=source.num_warps, num_stages=1
    )
    ahead, after = kernel.ptx.split("griddepcontrol.wait")
    assert len(re.findall(r"\bbar(?:rier)?\.sync", after)) == barriers
    scales = len(re.findall(r"cp\.async\.c[ag]\.shared\.global", ahead)) - asked
    assert scales == (0 if form != "int4" else 2 if gated else 1)
    assert not re.search(r"ld\.global.*v4", ahead)  # of weights, which would take registers
    assert kernel.spills == 0
    assert kernel.registers <= 128
    assert "wgmma.mma_async" in after
    if form == "int4":
        loop = after[after.index("wgmma.mma_async") :]
        assert not re.search(r"st\.shared|shfl", loop[: loop.rindex("wgmma.mma_async")])
        assert "s32.s8.s8" in loop
    elif form == "fp8":
        assert "e4m3.e4m3" in after  # nothing is converted


@pytest.mark.parametrize(
    ("form", "tiles"), [("fp8", (1, 8, 1, 4, 4)), ("bf16", (8, 4, 4, 1, 4)), ("int4", (1, 2, 2, 8))]
)
def test_sums_over_ranks_take_no_barrier(compile_kernel, form, tiles):
    """A thread sends its own words and waits for those in their places."""
    n, k, _ = LLAMA["dense"]
    x_type, scale = ("*fp8e4nv", "one") if form == "fp8" else ("*bf16", "none")
    group = 128 if form == "int4" else 0
    shape = LinearShape(form, n, k, group=group, w_scale=scale, x_scale=scale, x_type=x_type)
    barriers = []
    for ranks in (1, 2):
        norm = cuda_linears.Norm("*bf16", ranks=ranks, staging=STAGING)
        source = cuda_linears.launch_of(shape, Tactic("words" if form == "int4" else "stream", tiles), norm).source
        function = stream_words.stream_words if form == "int4" else stream_linear.stream_linear
        kernel = compile_kernel(
            function, dict(source.args), dict(source.constants), num_warps=source.num_warps, num_stages=1
        )
        after = kernel.ptx.split("griddepcontrol.wait")[1]
        barriers.append(len(re.findall(r"\bbar(?:rier)?\.sync", after)))
        assert len(re.findall(r"ld\.volatile\.global\.b64", after)) == tiles[0] * (ranks - 1)
        assert kernel.spills == 0
    assert barriers[0] == barriers[1]
