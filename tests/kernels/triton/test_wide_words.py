import re
from dataclasses import replace

import pytest
import torch
from triton.runtime.errors import InterpreterError

from tests import gluon_interpreter
from tests.kernels.triton.test_linear import LLAMA, check_stream, error, run, weight_only
from trtllm_cli.build.backends import cuda_linears
from trtllm_cli.build.backends.cuda_linears import LinearShape, Tactic
from trtllm_cli.kernels.triton import wide_words


def wide(launch, group, has_zero, gated, has_bias, tiles, m, rounds):
    _, r, _, pieces, split, warps = tiles
    d, k = launch.device, 128 * pieces * split * rounds
    n = 16 * r * warps * (2 if gated else 1) * (2 if split == 1 else 1)
    shape, packed, plain = weight_only("int4", n, k, group, has_zero)
    way = cuda_linears.launch_of(replace(shape, has_bias=has_bias, gated=gated), Tactic("wide", tiles))
    x, bias = torch.randn(m, k, device=d).bfloat16(), torch.randn(n, device=d).bfloat16()
    weights = {role: tensor.to(d) for role, tensor in packed.items()}
    check_stream(launch, way, x.float() @ plain.to(d).T, has_bias, gated, x=x, bias=bias, **weights)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(
    ("gated", "has_bias", "has_zero"), [("", False, False), ("", True, True), ("silu", True, True)]
)
def test_groups(launch, group, gated, has_bias, has_zero):
    torch.manual_seed(11)
    wide(launch, group, has_zero, gated, has_bias, (16, 1, 2, 1, 1, 4), 13, 3)
    if has_zero:
        wide(launch, group, has_zero, gated, has_bias, (128, 1, 2, 1, 1, 8), 70, 2)


@pytest.mark.parametrize(
    ("tiles", "m", "rounds"),
    [
        ((8, 1, 2, 1, 1, 4), 17, 4), ((16, 2, 3, 1, 1, 4), 16, 5), ((32, 1, 2, 1, 2, 8), 45, 2),
        ((64, 2, 2, 1, 2, 8), 50, 3), ((64, 1, 4, 1, 3, 4), 64, 4), ((16, 1, 2, 2, 1, 8), 11, 3),
        ((16, 2, 1, 2, 4, 4), 16, 1), ((32, 1, 2, 1, 1, 16), 32, 2),
        ((128, 1, 2, 1, 2, 8), 200, 2), ((128, 1, 3, 1, 1, 8), 130, 3),
    ],
)  # fmt: skip
@pytest.mark.parametrize("gated", ["", "gelu_pytorch_tanh"])
def test_tiles(launch, tiles, m, rounds, gated):
    torch.manual_seed(12)
    wide(launch, 128, False, gated, True, tiles, m, rounds)


def test_fp8_out(launch):
    torch.manual_seed(13)
    d, m, n, k = launch.device, 19, 128, 512
    shape, packed, plain = weight_only("int4", n, k, 64, True)
    way = cuda_linears.launch_of(replace(shape, out_type="*fp8e4nv"), Tactic("wide", (32, 1, 3, 1, 1, 8)))
    x = torch.randn(m, k, device=d).bfloat16()
    y = torch.full((m, n), torch.nan, device=d).to(torch.float8_e4m3fn)
    out_scale = torch.full((1,), 0.1, device=d)
    run(launch, way, m, x=x, y=y, out_scale=out_scale, **{role: tensor.to(d) for role, tensor in packed.items()})
    assert error(y, (x.float() @ plain.to(d).T / 0.1).clamp(-448, 448)) < 4e-2


@pytest.mark.parametrize(
    ("linear", "tiles", "group", "has_zero", "programs"),
    [
        ("qkv", (16, 1, 4, 2, 4, 4), 128, False, 4), ("dense", (32, 2, 4, 1, 4, 4), 128, False, 3),
        ("gate_up", (16, 1, 4, 1, 1, 4), 128, False, 4), ("gate_up", (64, 1, 4, 1, 1, 8), 128, False, 1),
        ("proj", (64, 2, 4, 1, 4, 8), 128, False, 1), ("qkv", (64, 1, 2, 2, 4, 8), 64, True, 1),
        ("proj", (32, 1, 3, 2, 4, 4), 32, True, 2), ("gate_up", (64, 1, 4, 1, 1, 8), 32, True, 1),
    ],
)  # fmt: skip
def test_words_go_from_shared_memory_to_tensor_cores(compile_kernel, linear, tiles, group, has_zero, programs):
    """All but x, whose barriers are two a round; so many programs have room for their registers."""
    n, k, gated = LLAMA[linear]
    shape = LinearShape("int4", n, k, group=group, has_zero=has_zero, gated=gated)
    assert cuda_linears.adapted(shape, Tactic("wide", tiles)) == Tactic("wide", tiles)
    source = cuda_linears.launch_of(shape, Tactic("wide", tiles)).source
    kernel = compile_kernel(
        wide_words.wide_words, dict(source.args), dict(source.constants), num_warps=source.num_warps, num_stages=1
    )
    bm, r, stages, pieces, _, warps = tiles
    parts = r * pieces * (2 if gated else 1)
    assert kernel.spills == 0
    assert kernel.registers * 32 * warps * programs <= 65536
    ahead, after = kernel.ptx.split("griddepcontrol.wait")
    scales = -(-parts * (128 // group) // 8) * (2 if has_zero else 1)
    assert len(re.findall(r"cp\.async\.c[ag]\.shared\.global", ahead)) == stages * (2 * parts + scales)
    assert "ld.global.v4" not in ahead  # of weights, which would take registers
    loop = after[: after.index("wgmma.wait_group.sync.aligned 0")]
    assert len(re.findall(r"\bbar(?:rier)?\.sync", loop)) == 2
    assert not re.search(r"st\.shared|shfl", loop)
    assert loop.count("stmatrix") == max(16 * pieces * bm // (32 * warps), 1)  # of x
    assert re.findall(r"wgmma\.mma_async\S* +\{[^}]*\}, *(\S)", loop) == ["{"] * (8 * parts)


CHANGES = [
    ("        barrier()  # also", "        pass  # also", "no barrier between a "),
    ("        barrier()\n        if STAGES", "        if STAGES", "no barrier between a "),
    ("        fence_async_shared()", "        pass", "no fence between a write and a product"),
    ("wait_group(STAGES - 1)", "wait_group(STAGES)", "what is read has not landed"),
    ("waited(1 if parts > 1 else 0, sums)", "waited(2, sums)", "a product under way reads what is overwritten"),
]


@pytest.mark.parametrize(("line", "instead", "says"), CHANGES)
def test_what_is_not_waited_for_is_seen(tmp_path, line, instead, says):
    shape, packed, _ = weight_only("int4", 64, 1024, 128, False)
    way = cuda_linears.launch_of(shape, Tactic("wide", (8, 1, 2, 1, 1, 4)))
    x, y = torch.randn(8, 1024).bfloat16(), torch.empty(8, 64, dtype=torch.bfloat16)
    none = torch.zeros(1)
    values = {"x": x, "y": y, "num_tokens": 8, **packed, "w": packed["w"].view(torch.int32)}
    kernel = gluon_interpreter.load_changed(wide_words, line, instead, tmp_path).wide_words
    constants = dict(way.source.constants) | {"PDL": False}
    with pytest.raises(InterpreterError, match=says):
        gluon_interpreter.launch(
            kernel, (1, 1, way.grid[2]), *(values.get(role, none) for role in way.operands), num_warps=4, **constants
        )
