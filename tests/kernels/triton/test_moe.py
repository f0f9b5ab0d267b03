"""The kernels of moe.py against the reference, and their machine code."""

import pytest
import torch

from trtllm_cli.kernels import reference
from trtllm_cli.kernels.quantization import dequantize
from trtllm_cli.kernels.triton import moe

BF16, F32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
TOLERANCE = {F32: 1e-5, BF16: 8e-3}  # the interpreter cuts bf16 off where a GPU rounds


def error(out, expected):
    return float((out.float() - expected).norm() / expected.norm())


def poison(shape, dtype, device):
    return torch.full(shape, torch.nan, device=device).to(dtype)


def power(n):
    return 1 << (n - 1).bit_length()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def launch_route(
    launch, logits, bias, slots, *, top_k, scoring, renormalize, scaling, num_groups=None, top_groups=None
):
    tokens, experts = logits.shape
    groups, d = num_groups or 1, launch.device
    weights, ids = poison((tokens, top_k), F32, d), torch.full((tokens, top_k), -77, dtype=torch.int32, device=d)
    none = torch.zeros(1, device=d)
    launch(
        moe.route, (tokens,), logits, none if bias is None else bias, none if slots is None else slots, weights, ids,
        scaling, NUM_EXPERTS=experts, TOP_K=top_k, BLOCK_K=power(top_k), NUM_GROUPS=groups, TOP_GROUPS=top_groups or 1,
        BLOCK_GROUPS=power(groups), BLOCK_GROUP=power(experts // groups), SCORING=scoring, RENORMALIZE=renormalize,
        HAS_BIAS=bias is not None, HAS_SLOTS=slots is not None, num_warps=1,
    )  # fmt: skip
    return weights, ids


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(
    ("experts", "top_k", "groups"),
    [(8, 2, {}), (6, 3, {}), (32, 5, {"num_groups": 4, "top_groups": 2}), (18, 4, {"num_groups": 3, "top_groups": 2})],
)
@pytest.mark.parametrize("biased", [False, True])
def test_route(launch, scoring, renormalize, experts, top_k, groups, biased):
    d = launch.device
    logits = torch.randn(5, experts, device=d).mul(2)
    bias = torch.randn(experts, device=d).mul(0.3) if biased else None
    options = {"top_k": top_k, "scoring": scoring, "renormalize": renormalize, "scaling": 2.5, **groups}
    weights, ids = launch_route(launch, logits, bias, None, **options)
    expected_weights, expected_ids = reference.route(logits, bias, **options)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-7)


def test_route_among_equals(launch):
    logits = torch.zeros(2, 12, device=launch.device)
    logits[1, 7] = logits[1, 9] = 1.0
    _, ids = launch_route(launch, logits, None, None, top_k=4, scoring="softmax", renormalize=True, scaling=1.0)
    assert ids.tolist() == [[0, 1, 2, 3], [7, 9, 0, 1]]
    grouped = {"num_groups": 4, "top_groups": 2}
    _, ids = launch_route(
        launch, logits, None, None, top_k=4, scoring="sigmoid", renormalize=True, scaling=1.0, **grouped
    )
    assert ids.tolist() == [[0, 1, 2, 3], [7, 9, 6, 8]]


def test_padding_goes_to_no_expert(launch):
    logits = torch.randn(4, 8, device=launch.device).to(BF16)
    slots = torch.tensor([3, -1, 0, -1], dtype=torch.int32, device=launch.device)
    options = {"top_k": 2, "scoring": "softmax", "renormalize": True, "scaling": 1.0}
    weights, ids = launch_route(launch, logits, None, slots, **options)
    expected_weights, expected_ids = reference.route(logits.float(), None, **options)
    assert torch.equal(ids[::2], expected_ids[::2])
    torch.testing.assert_close(weights[::2], expected_weights[::2])
    assert (ids[1::2] == -1).all()
    assert (weights[1::2] == 0).all()


def sort(launch, ids, first, experts, block_m, *, chunk=64, parallel=False):
    """(sorted [blocks, block_m], experts of blocks)."""
    d, pairs = launch.device, ids.numel()
    blocks = min(pairs, pairs // block_m + experts + 1)
    placed = torch.full((blocks, block_m), -77, dtype=torch.int32, device=d)
    names = torch.full((blocks,), -77, dtype=torch.int32, device=d)
    constants = {"NUM_EXPERTS": experts, "BLOCK_M": block_m, "BINS": max(32, power(experts + 2)), "CHUNK": chunk}
    if not parallel:
        launch(moe.sort_pairs, (1,), ids, placed, names, pairs, blocks, first, **constants)
        return placed, names
    chunks = -(-pairs // chunk)
    counts = torch.full((constants["BINS"], chunks), -77, dtype=torch.int32, device=d)
    totals = torch.full((constants["BINS"],), -77, dtype=torch.int32, device=d)
    launch(moe.count_pairs, (chunks,), ids, counts, placed, pairs, blocks, first, **constants)
    launch(moe.scan_counts, (constants["BINS"],), counts, totals, chunks, BLOCK=power(chunks))
    launch(moe.place_pairs, (chunks,), ids, counts, totals, placed, names, pairs, blocks, first, **constants)
    return placed, names


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize(("pairs", "first", "experts", "block_m"), [(1, 0, 4, 16), (70, 2, 5, 16), (300, 0, 8, 32),
                                                                   (200, 0, 60, 4), (64, 8, 8, 16)])  # fmt: skip
def test_sort(launch, parallel, pairs, first, experts, block_m):
    ids = torch.randint(-1, 11, (pairs,), dtype=torch.int32, device=launch.device)
    placed, names = sort(launch, ids, first, experts, block_m, parallel=parallel)
    local = ids - first
    local = torch.where((local >= 0) & (local < experts), local, experts)
    expected, wanted_names = [], []
    for expert in range(experts + 1):
        chosen = (local == expert).nonzero().flatten().tolist()
        padded = -(-len(chosen) // block_m) * block_m
        expected += chosen + [-1] * (padded - len(chosen))
        wanted_names += [expert] * (padded // block_m)
    assert len(wanted_names) <= len(names)
    assert names.tolist() == wanted_names + [-1] * (len(names) - len(wanted_names))
    assert placed.flatten().tolist() == expected + [-1] * (placed.numel() - len(expected))


FORMATS = {
    "plain": ("none", "none", None),
    "fp8 by expert": ("fp8", "expert", None),
    "fp8 by row": ("fp8", "row", None),
    "int8 by row": ("int8", "row", None),
    "int8 by group": ("int8", "group", 32),
    "int8 by group with zeros": ("int8", "group", 16),
    "int4": ("int4", "group", 64),
    "int4 with zeros": ("int4", "group", 16),
}


def make_weight(name, experts, out, width, device):
    """(what the kernel is given, constexprs, the float32 weight)."""
    quant, scales, group = FORMATS[name]
    zeros = "zeros" in name
    if quant == "none":
        weight = torch.randn(experts, out, width, device=device)
    elif quant == "fp8":
        weight = torch.randn(experts, out, width, device=device).to(FP8)
    elif quant == "int8":
        weight = torch.randint(-127, 128, (experts, out, width), device=device).to(torch.int8)
    else:
        weight = torch.randint(0, 256, (experts, out, width // 2), device=device).to(torch.uint8)
    shape = {
        "none": (1,),
        "expert": (experts, 1),
        "row": (experts, out),
        "group": (experts, out, -(-width // (group or 1))),
    }
    scale = torch.rand(shape[scales], device=device) + 0.1
    zero = torch.randint(0, 15, shape[scales], device=device).float() if zeros else None
    plain = dequantize(weight, None if quant == "none" else quant, scale, zero, None, group)
    constants = {"QUANT": quant, "SCALES": scales, "GROUP": group or 0, "HAS_ZERO": zeros}
    return (weight, scale.flatten(), scale.flatten() if zero is None else zero), constants, plain


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("way", ["sorted", "pairs"])
@pytest.mark.parametrize(("shared", "width", "out"), [(True, 80, 40), (False, 64, 48)])
def test_expert_linear(launch, name, way, shared, width, out):
    d, tokens, top_k, experts, first = launch.device, 5, 3, 4, 2
    ids = torch.stack([torch.randperm(7, device=d)[:top_k] for _ in range(tokens)]).to(torch.int32)  # 2 to 5 are here
    ids[3] = -1
    x = torch.randn(tokens, width if shared else top_k * width, device=d)
    parts, constants, plain = make_weight(name, experts, out, width, d)
    bias = torch.randn(experts, out, device=d)
    y = poison((tokens, top_k * out), F32, d)
    none = torch.ones(1, device=d)
    constants = {**constants, "IN": width, "OUT": out, "NUM_EXPERTS": experts, "HAS_BIAS": True, "X_SCALES": "none",
                 "PAIRS_PER_ROW": top_k if shared else 1, "BLOCK_N": 32, "BLOCK_K": 32}  # fmt: skip
    if way == "sorted":
        placed, names = sort(launch, ids, first, experts, 16)
        launch(moe.expert_linear, (len(names) * -(-out // 32),), x, placed, names, *parts, bias, none, y, len(names),
               BLOCK_M=16, GROUP_M=4, **constants)  # fmt: skip
    else:
        launch(moe.expert_linear_pairs, (ids.numel(), -(-out // 32)), x, ids, *parts, bias, none, y, first, **constants)
    expected = reference.expert_linear(x, ids, plain, bias, first)
    assert error(y, expected) < TOLERANCE[F32] * (1 if launch.device == "cpu" else 200)  # a GPU multiplies in TF32
    assert (y[3] == 0).all()


@pytest.mark.parametrize("name", ["plain", "fp8 by row", "int8 by row", "int4"])
@pytest.mark.parametrize("way", ["sorted", "pairs"])
def test_expert_linear_of_bf16(launch, name, way):
    """As an engine has them: x, plain weights and what is dequantized for a tensor core in bf16."""
    d, tokens, top_k, experts, width, out = launch.device, 3, 2, 3, 64, 32
    ids = torch.stack([torch.randperm(experts, device=d)[:top_k] for _ in range(tokens)]).to(torch.int32)
    x = torch.randn(tokens, width, device=d).to(BF16)
    (weight, *scales), constants, plain = make_weight(name, experts, out, width, d)
    if name == "plain":
        weight = weight.to(BF16)
        plain = weight.float()
    y, none = poison((tokens * top_k, out), BF16, d), torch.ones(1, device=d)
    constants = {**constants, "IN": width, "OUT": out, "NUM_EXPERTS": experts, "HAS_BIAS": False, "X_SCALES": "none",
                 "PAIRS_PER_ROW": top_k, "BLOCK_N": 32, "BLOCK_K": 32}  # fmt: skip
    if way == "sorted":
        placed, names = sort(launch, ids, 0, experts, 16)
        launch(moe.expert_linear, (len(names),), x, placed, names, weight, *scales, none, none, y, len(names),
               BLOCK_M=16, GROUP_M=8, **constants)  # fmt: skip
    else:
        launch(moe.expert_linear_pairs, (ids.numel(), 1), x, ids, weight, *scales, none, none, y, 0, **constants)
    expected = reference.expert_linear(x.float(), ids, plain)
    assert error(y, expected.reshape(tokens * top_k, out)) < TOLERANCE[BF16]


@pytest.mark.parametrize("way", ["sorted", "pairs"])
@pytest.mark.parametrize("x_scales", ["one", "row"])
@pytest.mark.parametrize("shared", [True, False])
def test_expert_linear_of_fp8(launch, way, x_scales, shared):
    d, tokens, top_k, experts, width, out = launch.device, 4, 2, 3, 64, 32
    ids = torch.stack([torch.randperm(experts, device=d)[:top_k] for _ in range(tokens)]).to(torch.int32)
    rows = tokens if shared else tokens * top_k
    x = torch.randn(rows, width, device=d).to(FP8)
    x_scale = torch.rand(rows if x_scales == "row" else 1, device=d) + 0.1
    parts, constants, plain = make_weight("fp8 by row", experts, out, width, d)
    y, none = poison((tokens * top_k, out), BF16, d), torch.ones(1, device=d)
    constants = {**constants, "IN": width, "OUT": out, "NUM_EXPERTS": experts, "HAS_BIAS": False, "X_SCALES": x_scales,
                 "PAIRS_PER_ROW": top_k if shared else 1, "BLOCK_N": 32, "BLOCK_K": 32}  # fmt: skip
    if way == "sorted":
        placed, names = sort(launch, ids, 0, experts, 16)
        launch(moe.expert_linear, (len(names),), x, placed, names, *parts, none, x_scale, y, len(names), BLOCK_M=16,
               GROUP_M=8, **constants)  # fmt: skip
    else:
        launch(moe.expert_linear_pairs, (ids.numel(), 1), x, ids, *parts, none, x_scale, y, 0, **constants)
    wide = (x.float() * (x_scale[:, None] if x_scales == "row" else x_scale)).reshape(tokens, -1)
    expected = reference.expert_linear(wide, ids, plain)
    assert error(y, expected.reshape(tokens * top_k, out)) < TOLERANCE[BF16]


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_combine(launch, dtype):
    d = launch.device
    x, weights = torch.randn(3, 4 * 100, device=d).to(dtype), torch.rand(3, 4, device=d)
    out = poison((3, 100), dtype, d)
    launch(moe.combine, (3, 2), x, weights, out, WIDTH=100, TOP_K=4, BLOCK=64)
    expected = (x.float().unflatten(-1, (4, -1)) * weights.unsqueeze(-1)).sum(1)
    assert error(out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [1, 19])
def test_head_linear(launch, transposed, tokens):
    d, heads, width, out = launch.device, 3, 40, 24
    x = torch.randn(tokens, heads * width + 8, device=d)
    weight = torch.randn(heads * (width if transposed else out), out if transposed else width, device=d)
    y = poison((tokens, heads * out), F32, d)
    launch(moe.head_linear, (-(-tokens // 16), 2, heads), x, weight, y, tokens, IN=width, OUT=out,
           X_STRIDE=heads * width + 8, OUT_STRIDE=heads * out, TRANSPOSED=transposed, BLOCK_M=16, BLOCK_N=16,
           BLOCK_K=32)  # fmt: skip
    parts = weight.unflatten(0, (heads, -1))
    parts = parts.transpose(1, 2) if transposed else parts
    expected = torch.einsum("thi,hoi->tho", x[:, : heads * width].unflatten(-1, (heads, -1)), parts).flatten(1)
    assert error(y, expected) < TOLERANCE[F32] * (1 if launch.device == "cpu" else 200)


INTS = dict.fromkeys(("num_pairs", "max_blocks", "first_expert"), "i32")
# Mixtral 8x7B's gate and up, DeepSeek-V3's router.
LINEAR = {
    "IN": 4096,
    "OUT": 28672,
    "NUM_EXPERTS": 8,
    "PAIRS_PER_ROW": 2,
    "HAS_ZERO": False,
    "HAS_BIAS": False,
    "PDL": True,
}
KINDS = {  # types of x and the weight, and constexprs
    "bf16": ("*bf16", "*bf16", {"QUANT": "none", "SCALES": "none", "GROUP": 0, "X_SCALES": "none"}),
    "fp8": ("*fp8e4nv", "*fp8e4nv", {"QUANT": "fp8", "SCALES": "row", "GROUP": 0, "X_SCALES": "row"}),
    "fp8 weight": ("*bf16", "*fp8e4nv", {"QUANT": "fp8", "SCALES": "expert", "GROUP": 0, "X_SCALES": "none"}),
    "int8": ("*bf16", "*i8", {"QUANT": "int8", "SCALES": "row", "GROUP": 0, "X_SCALES": "none"}),
    "int4": ("*bf16", "*u8", {"QUANT": "int4", "SCALES": "group", "GROUP": 128, "X_SCALES": "none"}),
}


def linear_args(kind, first):
    x, weight, constants = KINDS[kind]
    args = {"x_ptr": x, **first, "weight_ptr": weight, "scale_ptr": "*fp32", "zero_ptr": "*fp32", "bias_ptr": "*bf16",
            "x_scale_ptr": "*fp32", "out_ptr": "*bf16"}  # fmt: skip
    return args, {**LINEAR, **constants}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("few", [True, False])
def test_machine_code_of_expert_linear(compile_kernel, kind, few):
    args, constexprs = linear_args(kind, {"sorted_ptr": "*i32", "block_experts_ptr": "*i32"})
    wide = 256 if kind == "fp8" else 128
    blocks = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": wide} if few else {"BLOCK_M": 128, "BLOCK_N": 128,
                                                                       "BLOCK_K": wide // 2}  # fmt: skip
    compiled = compile_kernel(
        moe.expert_linear, {**args, "max_blocks": "i32"}, {**constexprs, **blocks, "GROUP_M": 8},
        num_warps=4 if few else 8, num_stages=4,
    )  # fmt: skip
    assert compiled.spills == 0
    assert compiled.shared <= 113 * 1024 or not few  # two programs a multiprocessor
    assert compiled.shared <= 227 * 1024
    assert "wgmma.mma_async" in compiled.ptx
    assert ("e4m3.e4m3" in compiled.ptx) == (kind == "fp8")
    assert "cp.async.cg.shared.global" in compiled.ptx  # x, 16 bytes each
    if kind in ("bf16", "fp8"):
        assert "cp.async.ca" not in compiled.ptx  # the weight too


@pytest.mark.parametrize("kind", KINDS)
def test_machine_code_of_expert_linear_pairs(compile_kernel, kind):
    args, constexprs = linear_args(kind, {"ids_ptr": "*i32"})
    compiled = compile_kernel(
        moe.expert_linear_pairs, {**args, "first_expert": "i32"}, {**constexprs, "BLOCK_N": 16, "BLOCK_K": 256}
    )
    assert compiled.spills == 0
    assert compiled.registers <= 80  # six programs a multiprocessor
    assert "ld.global.v4.b32" in compiled.ptx


def test_machine_code_of_the_rest(compile_kernel):
    route = compile_kernel(
        moe.route,
        {"logits_ptr": "*bf16", "bias_ptr": "*fp32", "slot_mapping_ptr": "*i32", "weights_ptr": "*fp32",
         "ids_ptr": "*i32", "scaling": "fp32"},
        {"NUM_EXPERTS": 256, "TOP_K": 8, "BLOCK_K": 8, "NUM_GROUPS": 8, "TOP_GROUPS": 4, "BLOCK_GROUPS": 8,
         "BLOCK_GROUP": 32, "SCORING": "sigmoid", "RENORMALIZE": True, "HAS_BIAS": True, "HAS_SLOTS": True,
         "PDL": True},
        num_warps=1,
    )  # fmt: skip
    assert route.spills == route.shared == 0  # one warp needs no shared memory
    constexprs = {"NUM_EXPERTS": 256, "BLOCK_M": 64, "BINS": 512, "CHUNK": 128, "PDL": True}
    names = {"ids_ptr": "*i32", "sorted_ptr": "*i32", **INTS}
    triples = {"ids_ptr": "*i32", "counts_ptr": "*i32", "totals_ptr": "*i32"}
    heads = {"IN": 128, "OUT": 512, "X_STRIDE": 128 * 192, "OUT_STRIDE": 128 * 512, "BLOCK_M": 16, "BLOCK_N": 128,
             "BLOCK_K": 64, "PDL": True}  # fmt: skip
    head_args = {"x_ptr": "*bf16", "weight_ptr": "*bf16", "out_ptr": "*bf16", "num_tokens": "i32"}
    kernels = [
        (moe.sort_pairs, {**names, "block_experts_ptr": "*i32"}, constexprs),
        (moe.count_pairs, {**names, "counts_ptr": "*i32"}, constexprs),
        (moe.scan_counts, {"counts_ptr": "*i32", "totals_ptr": "*i32", "chunks": "i32"}, {"BLOCK": 512, "PDL": True}),
        (moe.place_pairs, {**names, **triples, "block_experts_ptr": "*i32"}, constexprs),
        (moe.combine, {"x_ptr": "*bf16", "weights_ptr": "*fp32", "out_ptr": "*bf16"},
         {"WIDTH": 4096, "TOP_K": 8, "BLOCK": 1024, "PDL": True}),
        (moe.head_linear, head_args, {**heads, "TRANSPOSED": False}),
        (moe.head_linear, head_args, {**heads, "TRANSPOSED": True}),
    ]  # fmt: skip
    for kernel, args, constants in kernels:
        compiled = compile_kernel(kernel, args, constants)
        assert compiled.spills == 0, kernel
        assert "griddepcontrol.wait" in compiled.ptx, kernel
