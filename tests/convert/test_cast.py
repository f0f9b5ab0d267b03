"""Finite checks: every infinity and NaN of every dtype is found, and no other number is taken for one."""

from pathlib import Path

import pytest
import torch

from trtllm_cli.convert.cast import cast
from trtllm_cli.errors import SnapshotError

DTYPES = ["float64", "float32", "bfloat16", "float16"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_bit_pattern_of_a_half_precision_number_is_judged_as_torch_does(dtype):
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(getattr(torch, dtype))
    finite = torch.isfinite(numbers)
    assert cast(numbers[finite], dtype, "w", Path("f")).equal(numbers[finite])
    for bad in numbers[~finite].split(1)[::17]:
        with pytest.raises(SnapshotError, match="`w` holds a NaN or an infinity"):
            cast(torch.cat((numbers[finite][:9], bad)), dtype, "w", Path("f"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan"), -float("nan")])
def test_the_same_dtype_is_checked_too(dtype, bad):
    info = torch.finfo(getattr(torch, dtype))
    rows = torch.tensor([[info.max, info.min], [0.0, -0.0]], dtype=getattr(torch, dtype))
    assert cast(rows, dtype, "w", Path("f")) is rows
    assert cast(rows[:, ::2], dtype, "w", Path("f")).is_contiguous()
    rows[1, 1] = bad
    with pytest.raises(SnapshotError, match="`w` holds a NaN or an infinity"):
        cast(rows, dtype, "w", Path("f"))
