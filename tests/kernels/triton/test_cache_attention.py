"""Attention whose cache is on its way before the kernel in front has ended, against the reference."""

import pytest
import torch
from triton.runtime.errors import InterpreterError

from tests import gluon_interpreter
from tests.kernels.triton.test_decode_attention import LLAMA, OPTIONS, POINTERS, SCRATCH, Case
from trtllm_cli.build.backends.cuda_attention import ROPE_POINTERS
from trtllm_cli.kernels.triton import cache_attention

ROPE = {**ROPE_POINTERS, "eps": "fp32"}
BF16 = {"dtype": torch.bfloat16, "cache_dtype": torch.bfloat16, "head_dim": 32, "v_head_dim": 32}


def attend(launch, case, warps=1, block_n=16, stages=2, block_g=8, splits=1, launched=None, share=0, times=1):
    """Runs the kernel and checks all that it wrote."""
    tiles = case.kv_heads * -(-(case.heads // case.kv_heads) // block_g)
    common, d, seqs = case.common(), case.device, len(case.lengths) + case.padding
    assert common.pop("V_HEAD_DIM") == case.head_dim
    partial = torch.zeros(seqs * case.heads * splits * case.head_dim, dtype=torch.int64, device=d)
    lse = torch.zeros(seqs * case.heads * splits, dtype=torch.int64, device=d)
    phases = [(True, True)] if splits == 1 or d == "cuda" else [(True, False), (False, True)]
    for time in range(times):
        step = torch.full((1,), 1 + time, dtype=torch.int32, device=d)
        for push, pull in phases:
            launch(
                cache_attention.cache_attention, (launched or splits, tiles, seqs), *case.tensors(), partial, lse, step,
                *[step] * 5, 3, 2, case.inputs["block_tables"].shape[1], case.scale, case.softcap, 0.0, ROPE=False,
                NORM=False, BLOCK_G=block_g, BLOCK_N=block_n, STAGES=stages, NUM_SPLITS=splits, SHARE=share, PUSH=push,
                PULL=pull, num_warps=warps, **common,
            )  # fmt: skip
    case.check(torch.tensor([n == 1 for n in case.new for _ in range(n)], device=d))


@pytest.mark.parametrize(("warps", "block_n", "stages"), [(1, 16, 2), (1, 32, 1), (2, 32, 3), (4, 64, 2)])
@pytest.mark.parametrize("block_size", [8, 16, 64])
def test_sizes_of_blocks_and_tiles(launch, warps, block_n, stages, block_size):
    """Of lengths whose last tile is whole, has one token, is the only one; with fewer and more tiles than have room."""
    lengths = [1, 16, 17, 64, 65, 129, 300]
    case = Case(lengths, [1] * len(lengths), block_size=block_size, padding=1, device=launch.device, **BF16)
    attend(launch, case, warps, block_n, stages)


@pytest.mark.parametrize(
    ("splits", "launched", "share", "options"),
    [
        (4, 4, 32, {}),
        (4, 2, 32, {}),
        (4, 1, 32, {}),
        (8, 8, 48, {}),
        (2, 2, 400, {}),
        (4, 4, 32, {"window": 100, "sinks": True}),
        (4, 4, 32, {"cache_dtype": torch.float8_e4m3fn}),
    ],
)
def test_long_sequences_are_shared_out(launch, splits, launched, share, options):
    """Among as many programs as they have tokens for, and as the grid has."""
    lengths = [180, 1, 33, 64]
    case = Case(
        lengths, [1] * len(lengths), heads=3, kv_heads=1, padding=1, device=launch.device, **{**BF16, **options}
    )
    attend(launch, case, splits=splits, launched=launched, share=share, times=2)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("fp8_out", [False, True])
def test_types_and_widths(launch, cache_dtype, head_dim, fp8_out):
    shape = {"head_dim": head_dim, "v_head_dim": head_dim, "heads": 4, "kv_heads": 1}
    case = Case([150, 9], [1, 1], dtype=torch.bfloat16, cache_dtype=cache_dtype, fp8_out=fp8_out, **shape,
                device=launch.device)  # fmt: skip
    attend(launch, case, warps=2, block_n=32, stages=2)


@pytest.mark.parametrize("options", OPTIONS)
def test_options(launch, options):
    options = {**BF16, **options}
    attend(launch, Case([166, 7], [1, 1], heads=2, kv_heads=1, **options, device=launch.device))


@pytest.mark.parametrize(("group", "block_g"), [(3, 8), (8, 8), (12, 8), (12, 16)])
def test_groups(launch, group, block_g):
    case = Case([33, 80], [1, 1], heads=2 * group, kv_heads=2, sinks=True, device=launch.device, **BF16)
    attend(launch, case, block_g=block_g)


def test_prompts_of_a_mixed_step_are_left_alone(launch):
    attend(launch, Case([40, 25, 9, 17], [3, 1, 9, 1], kv_heads=1, padding=2, device=launch.device, **BF16))


@pytest.mark.parametrize(
    ("line", "instead", "says"),
    [
        ("                async_copy.wait_group(0)", "                pass", "not landed|has not been written"),
        (
            "                async_copy.wait_group(STAGES - 1)",
            "                pass",
            "not landed|has not been written",
        ),
        (
            "            barrier()\n            i =",
            "            i =",
            "no barrier between a write and a read",
        ),
        ("                barrier()\n", "", "no barrier between a read and a write"),
        ("        barrier()\n        q_low", "        q_low", "no barrier between a write and a read"),
    ],
)
def test_what_is_not_waited_for_is_seen(tmp_path, line, instead, says):
    kernel = gluon_interpreter.load_changed(cache_attention, line, instead, tmp_path).cache_attention
    case = Case([300], [1], heads=1, kv_heads=1, **BF16)
    with pytest.raises((InterpreterError, AssertionError), match=says):
        attend(lambda _, *args, **named: gluon_interpreter.launch(kernel, *args, PDL=False, **named), case, warps=2,
               block_n=32)  # fmt: skip


@pytest.mark.parametrize("cache", ["*bf16", "*fp8e4nv", "*i8"])
@pytest.mark.parametrize(("warps", "splits"), [(1, 1), (2, 1), (2, 8)])
@pytest.mark.parametrize("rope", [False, True])
def test_compiles_for_the_real_shapes(compile_kernel, cache, warps, splits, rope):
    types = {**POINTERS, **SCRATCH, **ROPE, "k_cache_ptr": cache, "v_cache_ptr": cache}
    constants = {name: value for name, value in LLAMA.items() if name != "V_HEAD_DIM"}
    constants |= {"BLOCK_G": 8, "BLOCK_N": 32, "STAGES": 3, "KV_QUANT": cache != "*bf16", "PUSH": True, "PULL": True}
    constants |= {"NUM_SPLITS": splits, "SHARE": 4096, "ROPE": rope, "NORM": False}
    del types["row_seqs_ptr"]
    compiled = compile_kernel(cache_attention.cache_attention, args=types, constexprs=constants, num_warps=warps)
    assert compiled.spills <= (8 if cache == "*i8" else 0)
    assert compiled.shared < (55 if cache == "*bf16" else 30) * 1024  # four fit a multiprocessor, or seven
    assert ("ld.volatile.global" in compiled.ptx) == (splits > 1)
    wait, copies = compiled.ptx.rindex("griddepcontrol.wait"), "cp.async.cg"
    assert compiled.ptx[:wait].count(copies) > compiled.ptx[wait:].count(copies)  # most tiles are in front
    if cache == "*fp8e4nv":  # bytes are read as words or more
        assert "ldmatrix.sync.aligned.m8n8.x4.shared" in compiled.ptx
        assert "prmt.b32 both" in compiled.ptx
        assert "ld.shared.b8" not in compiled.ptx


def test_a_window_of_one_token_compiles(compile_kernel):
    """Whose only tile is the last one: the compiler failed where that was found in another way."""
    types = {**POINTERS, **SCRATCH, **ROPE, "k_cache_ptr": "*bf16", "v_cache_ptr": "*bf16"}
    constants = {name: value for name, value in LLAMA.items() if name != "V_HEAD_DIM"}
    constants |= {"HEAD_DIM": 32, "BLOCK_SIZE": 16, "BLOCK_G": 8, "BLOCK_N": 16, "STAGES": 2, "NUM_SPLITS": 1}
    constants |= {"WINDOW": 1, "SHARE": 0, "ROPE": False, "NORM": False, "PUSH": True, "PULL": True, "KV_QUANT": False}
    del types["row_seqs_ptr"]
    compile_kernel(cache_attention.cache_attention, args=types, constexprs=constants, num_warps=1)
