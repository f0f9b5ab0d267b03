"""Attention of prompts by specialized warps, against the reference."""

import pytest
import torch
from triton.runtime.errors import InterpreterError

from tests import gluon_interpreter
from tests.kernels.triton.test_decode_attention import LLAMA, POINTERS, Case
from tests.kernels.triton.test_prefill_attention import PROMPTS, prompts_of, widen
from trtllm_cli.kernels.triton import prompt_attention


def attend(launch, case, block_n=64, stages=2, first=0):
    """Runs the kernel and checks all that it wrote."""
    prompts, group = prompts_of(case, first), case.heads // case.kv_heads
    pack = max(p for p in (1, 2, 4, 8) if group % p == 0)
    common = case.common()
    assert common.pop("V_HEAD_DIM") == case.head_dim
    grid = (case.heads // pack, len(case.q) // (128 // pack) + prompts[1])
    q, k, v, *others = case.tensors()
    new, stride = widen(case, block_n) if case.quantized else ((q, q), 0)
    launch(
        prompt_attention.prompt_attention, grid, q, k, v, *new, *others, *prompts, case.inputs["block_tables"].shape[1],
        case.scale, case.softcap, NEW_STRIDE=stride, PACK=pack, BLOCK_N=block_n, STAGES=stages, REGISTERS=208,
        num_warps=4, **common,
    )  # fmt: skip
    computed = [n > 1 for n in case.new for _ in range(n)]
    case.check(torch.tensor(computed, device=case.device))


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("block_n", "stages"), [(64, 3), (128, 2)])
def test_types_and_widths(launch, cache_dtype, head_dim, block_n, stages):
    new = [1, 150, 20, 7, 64]
    lengths = [c + n for c, n in zip([30, 0, 133, 16, 3], new, strict=True)]
    case = Case(lengths, new, cache_dtype=cache_dtype, dtype=torch.bfloat16, heads=4, kv_heads=2, head_dim=head_dim,
                v_head_dim=head_dim, block_size=64, padding=1, device=launch.device)  # fmt: skip
    attend(launch, case, block_n, stages)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 5},
        {"window": 70, "sinks": True},
        {"softcap": 2.0},
        {"fp8_out": True},
        {"window": 33, "softcap": 1.5, "sinks": True, "cache_dtype": torch.int8},
    ],
)
def test_options(launch, options):
    options = {"cache_dtype": torch.float8_e4m3fn, **options}
    case = Case([166, 71], [100, 71], heads=8, kv_heads=1, head_dim=64, v_head_dim=64, block_size=64,
                dtype=torch.bfloat16, **options, device=launch.device)  # fmt: skip
    attend(launch, case)


def test_prompts_behind_sequences_of_one_token(launch):
    """Which have no tiles where they come first, and none to compute where they come between."""
    new = [1, 1, 1, 40, 1, 150]
    lengths = [c + n for c, n in zip([9, 70, 0, 33, 5, 0], new, strict=True)]
    case = Case(lengths, new, cache_dtype=torch.bfloat16, dtype=torch.bfloat16, head_dim=64, v_head_dim=64,
                block_size=64, device=launch.device)  # fmt: skip
    attend(launch, case, first=3)


@pytest.mark.parametrize("block_size", [16, 32, 256])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_sizes_of_blocks(launch, block_size, cache_dtype):
    case = Case([300, 90], [150, 90], cache_dtype=cache_dtype, dtype=torch.bfloat16, heads=2, kv_heads=2, head_dim=64,
                v_head_dim=64, block_size=block_size, device=launch.device)  # fmt: skip
    attend(launch, case, 128, 2)


@pytest.mark.parametrize(
    ("line", "instead", "says"),
    [
        ("mbarrier.wait(full.index(2 * slot), (i // STAGES) & 1)", "pass", "what is read has not landed"),
        ("mbarrier.wait(free.index(2 * slot + part), turn ^ 1)", "pass", "all warps wait for each other"),
        ("mbarrier.arrive(free.index(2 * slot), count=1)", "pass", "all warps wait for each other"),
        (
            "async_copy.mbarrier_arrive(full.index(2 * slot + part), increment_count=False)",
            "pass",
            "wait for each other",
        ),
        ("acc = warpgroup_mma_wait(0, (acc,))", "pass", "never waited for|a product under way"),
        ("    barrier()", "    pass", "no barrier between a write and a read"),
    ],
)
def test_what_is_not_waited_for_is_seen(tmp_path, line, instead, says):
    kernel = gluon_interpreter.load_changed(prompt_attention, line, instead, tmp_path).prompt_attention
    case = Case([400], [400], cache_dtype=torch.bfloat16, dtype=torch.bfloat16, heads=1, kv_heads=1, head_dim=64,
                v_head_dim=64, block_size=64)  # fmt: skip
    with pytest.raises((InterpreterError, AssertionError), match=says):
        attend(lambda _, *args, **named: gluon_interpreter.launch(kernel, *args, PDL=False, **named), case)


@pytest.mark.parametrize("cache", ["*bf16", "*fp8e4nv", "*i8"])
@pytest.mark.parametrize("window", [0, 1024])
def test_compiles_for_the_real_shapes(compile_kernel, cache, window):
    types = {**POINTERS, **PROMPTS, "k_cache_ptr": cache, "v_cache_ptr": cache}
    tiles = {"PACK": 4, "BLOCK_N": 128, "STAGES": 2, "REGISTERS": 232, "NEW_STRIDE": 0 if cache == "*bf16" else 8320}
    llama = {name: value for name, value in LLAMA.items() if name not in ("BLOCK_G", "V_HEAD_DIM")}
    constants = {**llama, **tiles, "WINDOW": window, "KV_QUANT": cache != "*bf16"}
    kernel = compile_kernel(prompt_attention.prompt_attention, types, constants, num_warps=4)
    assert kernel.num_warps == 12
    assert kernel.shared < 227 * 1024
    assert kernel.spills <= 200  # which of a row's tokens are hidden, in tiles along the diagonal
    for warps, registers in (("inc", 232), ("dec", 40)):
        assert f"setmaxnreg.{warps}.sync.aligned.u32 \t{registers}" in kernel.ptx
    assert kernel.ptx.count("wgmma.wait_group.sync.aligned 1") == 2  # each warpgroup's next scores are under way
    assert "cp.async.mbarrier.arrive.noinc" in kernel.ptx
