"""Attention of many new tokens a sequence over paged caches, against the reference."""

import functools

import pytest
import torch

from tests.kernels.triton.test_decode_attention import LLAMA, POINTERS, Case
from trtllm_cli.kernels.triton import prefill_attention


def prompts_of(case, first=0):
    """The arguments that say which sequences are prompts: all from the first on."""
    seqs = len(case.lengths) + case.padding
    return torch.tensor([first], dtype=torch.int32, device=case.device), seqs - first, seqs


def prefill(launch, case, block_q=8, pack=2, block_n=16, skip_decodes=True, widened=False, first=0):
    """Runs the kernel and checks all that it wrote."""
    prompts = prompts_of(case, first)
    q, k, v, *others = case.tensors()
    new, stride = (q, q), 0
    if widened:
        new, stride = widen(case, block_n)
    launch(
        prefill_attention.prefill_attention, (case.heads // pack, len(case.q) // block_q + prompts[1]), q, k, v,
        *new, *others, *prompts, case.inputs["block_tables"].shape[1], case.scale, case.softcap, NEW_STRIDE=stride,
        SKIP_DECODES=skip_decodes, PACK=pack, BLOCK_Q=block_q, BLOCK_N=block_n, **case.common(),
    )  # fmt: skip
    computed = [n > 1 or not skip_decodes for n in case.new for _ in range(n)]
    case.check(torch.tensor(computed, device=case.device))


def widen(case, block_n):
    """The step's keys and values as rope_append leaves them beside the cache, in which nothing of them is left."""
    case.expected = functools.partial(lambda found: found, case.expected())
    tables = case.inputs["block_tables"].long()
    places = [(tables[seq][at // case.block_size], at % case.block_size)
              for seq, (length, count) in enumerate(zip(case.lengths, case.new, strict=True))
              for at in [torch.arange(length - count, length, device=case.device)]]  # fmt: skip
    blocks, offsets = (torch.cat(part) for part in zip(*places, strict=True))
    stride = len(blocks) + block_n
    new = []
    for cache in (case.k, case.v):
        rows = torch.full((case.kv_heads, stride, cache.shape[-1]), torch.nan, device=case.device).to(case.dtype)
        rows[:, : len(blocks)] = cache[blocks, :, offsets].transpose(0, 1).to(case.dtype)
        new.append(rows)
        spoilt = cache.float()
        spoilt[blocks, :, offsets] = 99.0
        cache.copy_(spoilt.to(cache.dtype))
    return new, stride


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("options", [{}, {"window": 5}, {"window": 30}, {"softcap": 2.0, "sinks": True}])
def test_keys_and_values_of_the_step_side_by_side(launch, cache_dtype, options):
    new = [1, 38, 20, 7, 16]
    lengths = [c + n for c, n in zip([30, 0, 33, 16, 3], new, strict=True)]
    case = Case(lengths, new, cache_dtype=cache_dtype, heads=4, kv_heads=2, padding=1, **options, device=launch.device)
    prefill(launch, case, widened=True)


@pytest.mark.parametrize("new", [[1, 20, 1, 7, 1], [17, 16, 1, 1, 2], [5, 1, 9, 8, 3]])
@pytest.mark.parametrize("skip_decodes", [True, False])
def test_ragged_steps(launch, new, skip_decodes):
    cached = [0, 5, 20, 16, 0]
    case = Case(
        [c + n for c, n in zip(cached, new, strict=True)], new, heads=2, kv_heads=1, padding=2, device=launch.device
    )
    prefill(launch, case, skip_decodes=skip_decodes)


@pytest.mark.parametrize(("block_q", "pack"), [(16, 1), (8, 2), (32, 1)])
@pytest.mark.parametrize(("block_size", "block_n"), [(16, 16), (16, 32), (32, 16), (8, 32)])
def test_sizes_of_blocks_and_tiles(launch, block_q, pack, block_size, block_n):
    case = Case([50, 9], [38, 9], heads=2, kv_heads=1, block_size=block_size, device=launch.device)
    prefill(launch, case, block_q, pack, block_n)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("fp8_out", [False, True])
def test_types(launch, cache_dtype, fp8_out):
    dtype = torch.float32 if cache_dtype == torch.float32 else torch.bfloat16
    case = Case(
        [50, 9],
        [21, 9],
        dtype=dtype,
        cache_dtype=cache_dtype,
        heads=2,
        kv_heads=1,
        fp8_out=fp8_out,
        device=launch.device,
    )
    prefill(launch, case)


@pytest.mark.parametrize("options", [{"window": 1}, {"window": 5}, {"window": 48}, {"window": 300}, {"softcap": 2.0},
                                     {"sinks": True}, {"window": 39, "softcap": 1.5, "sinks": True}])  # fmt: skip
def test_options(launch, options):
    prefill(launch, Case([71, 9], [23, 9], heads=2, kv_heads=1, **options, device=launch.device))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "v_head_dim", "pack"),
    [(3, 1, 40, 40, 1), (4, 1, 80, 48, 4), (4, 1, 36, 20, 2), (2, 2, 24, 32, 1)],
)
def test_widths_and_groups(launch, heads, kv_heads, head_dim, v_head_dim, pack):
    case = Case(
        [21, 9], [7, 9], heads=heads, kv_heads=kv_heads, head_dim=head_dim, v_head_dim=v_head_dim, sinks=True,
        device=launch.device,
    )  # fmt: skip
    prefill(launch, case, block_q=16 // pack, pack=pack)


PROMPTS = {
    "first_prompt_ptr": "*i32", "num_prompts": "i32", "num_seqs": "i32", "k_new_ptr": "*bf16", "v_new_ptr": "*bf16"
}  # fmt: skip


@pytest.mark.parametrize("cache", ["*bf16", "*fp8e4nv", "*i8"])
@pytest.mark.parametrize("window", [0, 1024])
def test_compiles_for_the_real_shapes(compile_kernel, cache, window):
    types = {**POINTERS, **PROMPTS, "k_cache_ptr": cache, "v_cache_ptr": cache}
    tiles = {"BLOCK_Q": 32, "PACK": 4, "SKIP_DECODES": True, "NEW_STRIDE": 0 if cache == "*bf16" else 8256}
    llama = {name: value for name, value in LLAMA.items() if name != "BLOCK_G"}
    compiled = compile_kernel(
        prefill_attention.prefill_attention, args=types,
        constexprs={**llama, **tiles, "WINDOW": window, "KV_QUANT": cache != "*bf16"}, num_warps=8, num_stages=3,
    )  # fmt: skip
    assert compiled.spills == 0
    assert compiled.shared < 227 * 1024
    for instruction in ("wgmma.mma_async", "cp.async.cg", "griddepcontrol.wait"):
        assert instruction in compiled.ptx
