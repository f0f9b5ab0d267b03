"""Attention of prompts by specialized warps, against the reference."""

import pytest
import torch

from tests.kernels.triton.test_decode_attention import Case
from tests.kernels.triton.test_prefill_attention import prompts_of, widen
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
