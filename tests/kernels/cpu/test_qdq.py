"""Rounding of activations, and columns in another order: the reference's bits."""

import numpy as np
import pytest
import torch
from harness import address, as_torch, rows_batch, run

from trtllm_cli.kernels import quantization
from trtllm_cli.kernels.cpu import row_steps


def round_natively(pool, x, fmt, scale=None, group_size=None):
    out = np.full(x.shape, np.nan, np.float32)
    step = row_steps.qdq_step(address(x), address(out), width=x.shape[1], fmt=fmt, scale=address(scale),
                              group_size=group_size)  # fmt: skip
    run(pool, [step], rows_batch(len(x)))
    return out


@pytest.mark.parametrize("fmt", ["fp8", "int8", "fp4"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("group_size", [None, 16, 32])
@pytest.mark.parametrize("width", [5, 64, 100])
def test_rounding_is_the_references(pool, rng, fmt, scaled, group_size, width):
    x = rng.standard_normal((70, width), np.float32) * np.exp(4 * rng.standard_normal((70, width), np.float32))
    x[3] = 0
    x[:, 2] *= 1e-6
    scale = np.array([0.037], np.float32) if scaled else None
    got = round_natively(pool, x, fmt, scale, group_size)
    want = quantization.qdq(as_torch(x), None if scale is None else as_torch(scale), fmt, group_size)
    assert np.array_equal(got, want.numpy())
    for rows in (1, 3):
        assert round_natively(pool, x[:rows].copy(), fmt, scale, group_size).tobytes() == got[:rows].tobytes()


@pytest.mark.parametrize("fmt", ["fp8", "int8", "fp4"])
def test_every_number_and_every_tie_between_two(pool, fmt):
    if fmt == "int8":
        numbers = torch.arange(-127.0, 128)
    elif fmt == "fp4":
        numbers = quantization.fp4_values(torch.arange(16))
    else:
        numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()].sort().values
    middle = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, middle, middle.nextafter(middle + 1), middle.nextafter(middle - 1), numbers * 1e4])[None]
    group = None if fmt != "fp4" else 6  # its largest number in each group, so that the step is 1
    if group:
        x = torch.nn.functional.pad(x[0][x[0].abs() <= 6].unflatten(0, (-1, 1)), (0, 5), value=6.0).reshape(1, -1)
    x = x.contiguous().numpy()
    scale = None if group else np.ones(1, np.float32)
    got = round_natively(pool, x, fmt, scale, group)
    want = quantization.qdq(as_torch(x), None if scale is None else as_torch(scale), fmt, group)
    assert np.array_equal(got, want.numpy())


def test_columns_in_another_order(pool, rng):
    x, order = rng.standard_normal((33, 50), np.float32), rng.permutation(50).astype(np.int32)[:41]
    out = np.empty((33, 41), np.float32)
    step = row_steps.gather_columns_step(address(x), address(out), address(order), width=41, x_stride=50)
    run(pool, [step], rows_batch(33))
    assert np.array_equal(out, x[:, order])
