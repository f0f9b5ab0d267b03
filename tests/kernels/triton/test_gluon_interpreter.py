"""What the interpreter of Gluon kernels sees: each thing that a kernel must wait for, left out of it."""

from pathlib import Path

import pytest
import torch
from triton.runtime.errors import InterpreterError

from tests import gluon_interpreter
from trtllm_cli.kernels.triton import stream_linear

CHANGES = [
    ("        barrier()", "        pass", "no barrier between a write and a read"),
    ("        fence_async_shared()", "        pass", "no fence between a write and a product"),
    ("async_copy.wait_group(max(STAGES - 2, 0))", "async_copy.wait_group(STAGES - 1)", "what is read has not landed"),
    ("        async_copy.wait_group(0)", "        pass", "what is read has not landed"),
    ("acc = warpgroup_mma_wait(0, [acc])", "pass", "a product under way reads what is overwritten"),
    ("first, ahead, (r - 1) % STAGES", "first, ahead, r % STAGES", "no barrier between a read and a write"),
]


def compute(module):
    m, n, k, warps = 1, 32, 512, 4
    x, w = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
    y = torch.full((m, n), torch.nan, dtype=torch.bfloat16)
    none = torch.zeros(1)
    gluon_interpreter.launch(
        module.stream_linear, (n * 2 // (16 * warps), 1), x, w, none, none, none, none, y, none, none,
        none, none, 0.0, m, none, none, none, 0, 0, num_warps=warps, N=n, K=k, BM=4, PARTS=2, STAGES=3, ROUND=1,
        W_SCALE="none", X_SCALE="none", HAS_BIAS=False, GATED="", SUMS=False, SQUARES=0, RANKS=1, RANK=0, STAGING=0,
        PUSH=False, PULL=False, PDL=False,
    )  # fmt: skip
    return y, x.float() @ w.float().T


@pytest.mark.parametrize(("line", "instead", "says"), CHANGES)
def test_what_is_not_waited_for_is_seen(tmp_path, line, instead, says):
    module = gluon_interpreter.load_changed(stream_linear, line, instead, tmp_path)
    with pytest.raises(InterpreterError, match=says):
        compute(module)


def test_what_is_waited_for_is_computed():
    y, ref = compute(gluon_interpreter.load(stream_linear.__name__, Path(stream_linear.__file__)))
    assert (y.float() - ref).norm() < 6e-3 * ref.norm()
