"""Collectives between ranks, all played by one processor: what each pushes, and then what each pulls."""

import re

import pytest
import torch

from tests.kernels.triton.test_norm import TOLERANCE, check_quantized, error
from trtllm_cli.kernels import reference
from trtllm_cli.kernels.triton import collectives

BF16, F32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
STAGING = 4096  # words
PHASES = ({"PUSH": True, "PULL": False}, {"PUSH": False, "PULL": True})


FLAGS = 64  # at least as many as there are programs


class Ranks:
    """Memory of one layout for each rank, and what the kernels are told of it."""

    def __init__(self, ranks, device, flags=0):
        self.count, self.device, self.flags = ranks, device, flags
        size, dtype = 2 * (ranks - 1) * (STAGING + flags), torch.int32 if flags else torch.int64
        self.staging = [torch.zeros(size, dtype=dtype, device=device) for _ in range(ranks)]
        self.step = torch.ones(1, dtype=torch.int32, device=device)

    def deltas(self, tensors):
        """Of each rank, how far the others' tensors are from its own."""
        at = [t.data_ptr() for t in tensors]
        return [torch.tensor([there - here for there in at], device=self.device) for here in at]

    def all_reduce(self, launch, xs, call, calls=5, block=128, out_dtype=BF16):
        outs = [torch.full(x.shape, torch.nan, device=self.device, dtype=out_dtype) for x in xs]
        rows, width = xs[0].shape
        deltas = self.deltas(self.staging)
        for phase in PHASES:
            for rank in range(self.count):
                launch(
                    collectives.all_reduce, (rows, -(-width // block)), xs[rank], self.staging[rank], deltas[rank],
                    self.step, calls, call, outs[rank], WIDTH=width, RANKS=self.count, RANK=rank, STAGING=STAGING,
                    FLAGS=self.flags, BLOCK=block, **phase,
                )  # fmt: skip
        return outs


@pytest.mark.parametrize("flags", [0, FLAGS])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("dtype", "width", "rows"), [(BF16, 256, 3), (BF16, 300, 1), (F32, 200, 5), (F32, 33, 2)])
def test_all_reduce_sums_over_the_ranks(launch, flags, ranks, dtype, width, rows):
    torch.manual_seed(0)
    world = Ranks(ranks, launch.device, flags)
    for call in range(3):  # each slot, and the first again
        xs = [torch.randn(rows, width, device=launch.device).to(dtype) for _ in range(ranks)]
        outs = world.all_reduce(launch, xs, call, out_dtype=dtype)
        expected = xs[0].float()
        for x in xs[1:]:
            expected = expected + x.float()
        for out in outs:
            assert torch.equal(out, outs[0])
            assert error(out, expected) < TOLERANCE[dtype]


def test_all_reduce_goes_by_the_flags_of_its_own_call(launch):
    """What lies in the staging memory from an earlier step is not taken for this one's."""
    world = Ranks(2, launch.device)
    ones = [torch.ones(1, 128, dtype=BF16, device=launch.device)] * 2
    for step in range(1, 4):
        world.step.fill_(step)
        for call in range(3):
            world.all_reduce(launch, [x * (10 * step + call) for x in ones], call, calls=3)
            flags = (world.staging[0].view(2, STAGING)[(3 * step + call) & 1, :64] >> 32).tolist()
            assert set(flags) == {3 * step + call}


@pytest.mark.parametrize("flags", [0, FLAGS])
@pytest.mark.parametrize(
    ("quant", "width"),
    [("none", 256), ("none", 192), ("static", 256), ("static", 192), ("token", 256), ("token", 192), ("group", 256)],
)
def test_all_reduce_add_rms_norm(launch, flags, quant, width):
    torch.manual_seed(1)
    ranks, rows, d = 2, 3, launch.device
    world = Ranks(ranks, d, flags)
    deltas = world.deltas(world.staging)
    xs = [torch.randn(rows, width, device=d).to(BF16) for _ in range(ranks)]
    residual, weight = torch.randn(rows, width, device=d), torch.rand(width, device=d).to(BF16)
    out_dtype = BF16 if quant == "none" else FP8
    outs = [torch.zeros(rows, width, device=d).to(out_dtype) for _ in range(ranks)]
    totals = [residual.clone() for _ in range(ranks)]  # where the residual is
    parts = 2 if quant == "group" else 1
    steps = [torch.full((rows, parts), torch.nan, device=d) for _ in range(ranks)]
    scale = torch.tensor([0.01], device=d)
    for phase in PHASES:
        for rank in range(ranks):
            launch(
                collectives.all_reduce_add_rms_norm, (rows,), xs[rank], world.staging[rank], deltas[rank], world.step,
                2, 1, totals[rank], weight, outs[rank], totals[rank], scale, steps[rank], 1e-5, WIDTH=width,
                RANKS=ranks, RANK=rank, STAGING=STAGING, FLAGS=flags, BLOCK=256, QUANT=quant, **phase,
            )  # fmt: skip
    total = xs[0].float() + xs[1].float() + residual
    expected = reference.rms_norm(total, weight.float(), 1e-5)
    for rank in range(ranks):
        assert error(totals[rank], total) < TOLERANCE[F32]
        if quant == "none":
            assert error(outs[rank], expected) < TOLERANCE[BF16]
        else:
            step = scale if quant == "static" else steps[rank].repeat_interleave(width // parts, 1)
            if quant != "static":
                torch.testing.assert_close(steps[rank], expected.unflatten(1, (parts, -1)).abs().amax(2) / 448.0)
            check_quantized(outs[rank], expected, step, FP8)


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_gather_puts_the_ranks_side_by_side(launch, ranks):
    torch.manual_seed(2)
    rows, width, d = 3, 80, launch.device
    world = Ranks(ranks, d)
    xs = [torch.randn(rows, width, device=d) for _ in range(ranks)]
    outs = [torch.full((rows, ranks * width), torch.nan, device=d) for _ in range(ranks)]
    deltas = world.deltas(outs)
    for rank in range(ranks):
        launch(
            collectives.all_gather, (rows, 2), xs[rank], deltas[rank], outs[rank], WIDTH=width, RANKS=ranks, RANK=rank,
            BLOCK=64,
        )  # fmt: skip
    for out in outs:
        assert torch.equal(out, torch.cat(xs, 1))


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_gather_of_words(launch, ranks):
    torch.manual_seed(2)
    rows, width, d = 2, 80, launch.device
    world = Ranks(ranks, d)
    deltas = world.deltas(world.staging)
    for step in (1, 2):
        world.step.fill_(step)
        xs = [torch.randn(rows, width, device=d) for _ in range(ranks)]
        outs = [torch.full((rows, ranks * width), torch.nan, device=d) for _ in range(ranks)]
        for phase in PHASES:
            for rank in range(ranks):
                launch(
                    collectives.all_gather_words, (rows, 2), xs[rank].view(torch.int32), world.staging[rank],
                    deltas[rank], world.step, outs[rank].view(torch.int32), WORDS=width, RANKS=ranks, RANK=rank,
                    STAGING=STAGING, BLOCK=64, **phase,
                )  # fmt: skip
        for out in outs:
            assert torch.equal(out, torch.cat(xs, 1))


def test_ranks_that_wait_for_each_other(launch):
    ranks, d = 3, launch.device
    world = Ranks(ranks, d)
    arrivals = [torch.zeros(4, dtype=torch.int32, device=d) for _ in range(ranks)]
    deltas = world.deltas(arrivals)
    for phase in PHASES:
        for rank in range(ranks):
            launch(collectives.sync_ranks, (1,), arrivals[rank], deltas[rank], RANKS=ranks, RANK=rank, **phase)
        expected = [[int(phase["PUSH"] and rank != other) for other in range(ranks)] for rank in range(ranks)]
        assert [a[:ranks].tolist() for a in arrivals] == expected


@pytest.mark.parametrize(("arch", "ranks"), [("sm_80", 2), ("sm_90a", 2), ("sm_90a", 4), ("sm_120a", 2)])
def test_compiles_for(compile_kernel, arch, ranks):
    common = {"RANKS": ranks, "RANK": 1, "PDL": arch != "sm_80"}
    both = {"PUSH": True, "PULL": True}
    pointers = {"x_ptr": "*bf16", "staging_ptr": "*i64", "deltas_ptr": "*i64", "step_ptr": "*i32", "out_ptr": "*bf16"}
    numbers = {"calls": "i32", "call": "i32"}
    norm = {
        **pointers, **numbers, "residual_ptr": "*fp32", "weight_ptr": "*bf16", "new_residual_ptr": "*fp32",
        "out_scale_ptr": "*fp32", "row_scale_ptr": "*fp32", "eps": "fp32",
    }  # fmt: skip
    sizes = {"WIDTH": 4096, "STAGING": 1 << 18, "FLAGS": 0, **both}
    rows = {"staging_ptr": "*i32"}, {"FLAGS": 256}
    kernels = [
        (collectives.all_reduce, {**pointers, **numbers}, {"BLOCK": 1024, **sizes}),
        (collectives.all_reduce, {**pointers, **numbers, **rows[0]}, {"BLOCK": 4096, **sizes, **rows[1]}),
        (collectives.all_reduce_add_rms_norm, norm, {"BLOCK": 4096, "QUANT": "none", **sizes}),
        (
            collectives.all_reduce_add_rms_norm, {**norm, **rows[0]},
            {"BLOCK": 4096, "QUANT": "none", **sizes, **rows[1]},
        ),
        (collectives.sync_ranks, {"arrivals_ptr": "*i32", "deltas_ptr": "*i64"}, both),
        (
            collectives.all_gather, {"x_ptr": "*fp32", "deltas_ptr": "*i64", "out_ptr": "*fp32"},
            {"WIDTH": 64128, "BLOCK": 1024},
        ),
    ]  # fmt: skip
    for kernel, args, constants in kernels:
        compiled = compile_kernel(kernel, args, {**constants, **common}, num_warps=16, arch=arch)
        assert compiled.spills == 0
        if "staging_ptr" in args:
            by_words = constants["FLAGS"] == 0
            assert ("ld.volatile.global" in compiled.ptx) == by_words
            assert ("st.global.wt" in compiled.ptx) == by_words
            assert ("atom.global.sys.release.exch" in compiled.ptx) != by_words
            assert ("ld.global.sys.acquire" in compiled.ptx) != by_words
            assert by_words or "st.global.v4.b32" in compiled.ptx
        if kernel is collectives.sync_ranks:
            assert re.search(r"(atom|red)\.global\.(sys\.release\.add|release\.sys)", compiled.ptx)
