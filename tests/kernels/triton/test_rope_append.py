"""What q, k and v become before attention, against the reference."""

import pytest
import torch

from trtllm_cli.kernels import reference
from trtllm_cli.kernels.quantization import round_to
from trtllm_cli.kernels.triton import rope_append

FORMATS = {torch.float8_e4m3fn: "fp8", torch.int8: "int8"}


def error(out, ref):
    return ((out.float() - ref).norm() / ref.norm()).item()


def empty_cache(num_blocks, num_kv_heads, block_size, width, dtype, device):
    """Every element a sentinel that no test appends."""
    fill = 77 if dtype == torch.int8 else torch.nan
    return torch.full((num_blocks, num_kv_heads, block_size, width), fill, device=device).to(dtype)


def check_cache(cache, rows, slots, scale, tolerance):
    """The tokens' rows [num_tokens, num_kv_heads, width] are at their slots, and nothing is anywhere else."""
    block_size = cache.shape[2]
    flat = cache.float().transpose(1, 2).flatten(0, 1)  # [slots, num_kv_heads, width]
    kept = slots >= 0
    fmt = FORMATS.get(cache.dtype)
    expected = round_to(rows / scale, fmt) if fmt else rows
    found = flat[slots[kept].long()]
    assert error(found, expected[kept]) < tolerance
    other = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
    other[slots[kept].long()] = False
    assert ((flat[other].isnan()) | (flat[other] == 77)).all()
    assert block_size * cache.shape[0] == len(flat)


def check_new(new, caches, slots, stride):
    """With a stride the tokens' rows are also side by side, as the caches hold them, and nothing else is."""
    kept = slots >= 0
    for rows, cache in zip(new, caches, strict=True):
        written = torch.zeros(rows.shape[1], dtype=torch.bool, device=rows.device)
        if stride:
            written[: len(slots)] = kept
            at = slots[kept].long()
            held = cache[at // cache.shape[2], :, at % cache.shape[2]].transpose(0, 1)
            assert torch.equal(rows[:, written], held.bfloat16())
        assert rows[:, ~written].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "dim", "layout", "norm", "tokens", "group"),
    [
        (4, 2, 16, 16, "neox", False, 1, 2),
        (4, 2, 16, 16, "gptj", True, 2, 4),
        (3, 1, 24, 12, "neox", True, 4, 2),  # partial, and neither heads nor widths are powers of two
        (3, 1, 24, 20, "gptj", False, 2, 1),
        (2, 2, 16, 0, "neox", True, 1, 2),
        (2, 2, 20, 0, "neox", False, 2, 2),
    ],
)
@pytest.mark.parametrize("stride", [0, 7])
def test_rope_append(launch, dtype, cache_dtype, heads, kv_heads, head_dim, dim, layout, norm, tokens, group, stride):
    torch.manual_seed(heads * head_dim + dim)
    d, block_size, num_tokens, eps = launch.device, 4, 5, 1e-5
    qkv = torch.randn(num_tokens, (heads + 2 * kv_heads) * head_dim, device=d).to(dtype)
    q_norm, k_norm = (torch.rand(2, head_dim, device=d) + 0.5).to(dtype)
    angles = torch.rand(9, max(dim // 2, 1), device=d) * 6
    table = torch.cat([angles.cos(), angles.sin()], 1)
    positions = torch.tensor([8, 0, 3, 4, 0], dtype=torch.int32, device=d)
    slots = torch.tensor([11, 0, -1, 6, 13], dtype=torch.int32, device=d)
    kv_scale = torch.tensor([0.03, 0.02], device=d)
    cache_dtype = cache_dtype or dtype
    caches = [empty_cache(4, kv_heads, block_size, head_dim, cache_dtype, d) for _ in range(2)]
    new = [torch.full((kv_heads, 7, head_dim), torch.nan, dtype=torch.bfloat16, device=d) for _ in range(2)]
    out = torch.full((num_tokens, heads * head_dim), torch.nan, dtype=dtype, device=d)
    grid = (-(-num_tokens // tokens), -(-heads // group) + 2 * -(-kv_heads // group))
    launch(
        rope_append.rope_append, grid, qkv, q_norm, k_norm, table, positions, slots, kv_scale, out, *caches, *new,
        num_tokens, eps, NUM_HEADS=heads, NUM_KV_HEADS=kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, DIM=dim,
        NEOX=layout == "neox", NORM=norm, KV_QUANT=cache_dtype != dtype, NEW_STRIDE=stride, TOKENS=tokens, HEADS=group,
    )  # fmt: skip
    check_new(new, caches, slots, stride)
    q, k, v = qkv.float().split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=-1)
    if norm:
        q = reference.rms_norm(q, q_norm.float(), eps, heads)
        k = reference.rms_norm(k, k_norm.float(), eps, kv_heads)
    if dim:
        q, k = (reference.rope(x, positions, table, n, layout) for x, n in ((q, heads), (k, kv_heads)))
    close = 1e-5 if dtype == torch.float32 else 4e-3
    assert error(out, q) < close
    # A value next to the middle of two steps may go to either.
    close = 0.02 if cache_dtype != dtype and (norm or dim) else close
    check_cache(caches[0], k.unflatten(1, (kv_heads, -1)), slots, kv_scale[0], close)
    check_cache(caches[1], v.unflatten(1, (kv_heads, -1)), slots, kv_scale[1], 4e-3)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize(
    ("kv_heads", "head_dim", "v_head_dim", "tokens", "group"), [(3, 16, 16, 2, 2), (1, 36, 20, 1, 1)]
)
@pytest.mark.parametrize("stride", [0, 6])
def test_append_alone(launch, cache_dtype, kv_heads, head_dim, v_head_dim, tokens, group, stride):
    torch.manual_seed(head_dim)
    d, num_tokens = launch.device, 3
    k, v = (torch.randn(num_tokens, kv_heads * w, device=d).bfloat16() for w in (head_dim, v_head_dim))
    slots = torch.tensor([5, -1, 2], dtype=torch.int32, device=d)
    kv_scale = torch.tensor([0.004, 0.03], device=d)  # k saturates
    caches = [empty_cache(2, kv_heads, 4, w, cache_dtype, d) for w in (head_dim, v_head_dim)]
    new = [torch.full((kv_heads, 6, w), torch.nan, device=d).bfloat16() for w in (head_dim, v_head_dim)]
    launch(
        rope_append.append, (-(-num_tokens // tokens), 2 * -(-kv_heads // group)), k, v, slots, kv_scale, *caches, *new,
        num_tokens, NUM_KV_HEADS=kv_heads, HEAD_DIM=head_dim, V_HEAD_DIM=v_head_dim, BLOCK_SIZE=4,
        KV_QUANT=cache_dtype != torch.bfloat16, NEW_STRIDE=stride, TOKENS=tokens, HEADS=group,
    )  # fmt: skip
    check_new(new, caches, slots, stride)
    for cache, rows, scale in zip(caches, (k, v), kv_scale, strict=True):
        check_cache(cache, rows.float().unflatten(1, (kv_heads, -1)), slots, scale, 1e-6)


def test_a_slot_past_two_gigabytes(launch):
    if launch.device == "cpu":
        pytest.skip("the cache would take 8 GB of memory")
    d, block_size, head_dim = launch.device, 64, 128
    k, v = torch.randn(2, 1, 8 * head_dim, device=d).bfloat16()
    caches = [torch.zeros(33000, 8, block_size, head_dim, dtype=torch.bfloat16, device=d) for _ in range(2)]
    slots = torch.tensor([32999 * block_size + 5], dtype=torch.int32, device=d)
    launch(
        rope_append.append, (1, 2), k, v, slots, torch.ones(2, device=d), *caches, k, v, 1,
        NUM_KV_HEADS=8, HEAD_DIM=head_dim, V_HEAD_DIM=head_dim, BLOCK_SIZE=block_size, KV_QUANT=False, NEW_STRIDE=0,
        TOKENS=1, HEADS=8,
    )  # fmt: skip
    assert torch.equal(caches[0][32999, :, 5].flatten(), k[0])
    assert torch.equal(caches[1][32999, :, 5].flatten(), v[0])


LLAMA = {
    "NUM_HEADS": 32, "NUM_KV_HEADS": 8, "HEAD_DIM": 128, "BLOCK_SIZE": 64, "DIM": 128, "NEOX": True, "NORM": False,
    "TOKENS": 1, "HEADS": 8, "PDL": True,
}  # fmt: skip


@pytest.mark.parametrize("cache", ["*bf16", "*fp8e4nv", "*i8"])
@pytest.mark.parametrize("tokens", [1, 4])
def test_compiles_for_the_real_shapes(compile_kernel, cache, tokens):
    types = dict.fromkeys(("qkv_ptr", "q_norm_ptr", "k_norm_ptr", "q_ptr"), "*bf16")
    types |= {"table_ptr": "*fp32", "positions_ptr": "*i32", "slot_mapping_ptr": "*i32", "kv_scale_ptr": "*fp32"}
    types |= {"k_cache_ptr": cache, "v_cache_ptr": cache, "k_new_ptr": "*bf16", "v_new_ptr": "*bf16"}
    types |= {"num_tokens": "i32", "eps": "fp32"}
    quantized = cache != "*bf16"
    constants = {**LLAMA, "TOKENS": tokens, "KV_QUANT": quantized, "NEW_STRIDE": 8256 if quantized else 0}
    compiled = compile_kernel(rope_append.rope_append, args=types, constexprs=constants)
    assert compiled.spills == 0
    assert compiled.registers <= 128
    assert "ld.global.v4.b32" in compiled.ptx
    assert "griddepcontrol.wait" in compiled.ptx
