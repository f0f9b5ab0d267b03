import numpy as np
import pytest
import torch
from harness import address, as_torch, rows_batch, run

from trtllm_cli.kernels.cpu import row_steps

nnf = torch.nn.functional
ACTIVATIONS = {
    "silu": nnf.silu,
    "gelu": nnf.gelu,
    "gelu_pytorch_tanh": lambda x: nnf.gelu(x, approximate="tanh"),
    "relu": nnf.relu,
}


def normed(x, weight, eps):
    x = as_torch(x)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * as_torch(weight)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embedding(pool, rng, dtype):
    table = torch.from_numpy(rng.standard_normal((50, 67), np.float32)).to(getattr(torch, dtype))
    ids = rng.integers(0, 120, 90)
    out = np.full((90, 67), np.nan, np.float32)
    step = row_steps.embedding_step(address(out), address(table), vocab_size=50, hidden_size=67, dtype=dtype,
                                  vocab_start=40)  # fmt: skip
    run(pool, [step], rows_batch(90, input_ids=ids))
    here = (ids >= 40) & (ids < 90)
    assert (out[here] == table.float().numpy()[ids[here] - 40]).all()
    assert (out[~here] == 0).all()


@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("width", [64, 576, 83])
def test_rms_norm(pool, rng, rows, width):
    x = rng.standard_normal((rows, width), np.float32) * 3
    weight = rng.standard_normal(width, np.float32)
    out = np.zeros_like(x)
    run(pool, [row_steps.rms_norm_step(address(x), address(out), address(weight), width=width, eps=1e-5)],
        rows_batch(rows))  # fmt: skip
    np.testing.assert_allclose(out, normed(x, weight, 1e-5), rtol=2e-6, atol=1e-6)


def test_rms_norm_of_each_head_in_place(pool, rng):
    x = rng.standard_normal((5, 12 * 24), np.float32)
    weight = rng.standard_normal(24, np.float32)
    want = normed(x.reshape(5, 12, 24), weight, 1e-6).numpy().reshape(5, -1)
    step = row_steps.rms_norm_step(address(x), address(x), address(weight), width=12 * 24, eps=1e-6, num_heads=12)
    run(pool, [step], rows_batch(5))
    np.testing.assert_allclose(x, want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 40])
def test_add_rms_norm(pool, rng, rows):
    x, residual = rng.standard_normal((2, rows, 200), np.float32)
    weight = rng.standard_normal(200, np.float32)
    want = x + residual
    step = row_steps.add_rms_norm_step(address(x), address(residual), address(x), address(weight), width=200, eps=1e-5)
    run(pool, [step], rows_batch(rows))
    assert (residual == want).all()
    np.testing.assert_allclose(x, normed(want, weight, 1e-5), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "width"), [(1, 96), (3, 45), (60, 128)])
def test_gated_act(pool, rng, activation, rows, width):
    x = rng.standard_normal((rows, 2 * width), np.float32) * 4
    x[0, :4] = (-200.0, -30.0, 30.0, 200.0)
    out = np.zeros((rows, width), np.float32)
    step = row_steps.gated_act_step(address(x), address(out), intermediate_size=width, activation=activation)
    run(pool, [step], rows_batch(rows))
    want = ACTIVATIONS[activation](as_torch(x[:, :width]).double()) * as_torch(x[:, width:])
    # gelu's 1 + erf cancels for negative gates: half a unit of float32 times gate and up, which are below 20 here
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("broadcast", [False, True])
def test_add(pool, rng, broadcast):
    x = rng.standard_normal((30, 333), np.float32)
    y = rng.standard_normal((1 if broadcast else 30, 333), np.float32)
    want = x + y
    run(pool, [row_steps.add_step(address(x), address(y), address(x), width=333, broadcast=broadcast)], rows_batch(30))
    assert (x == want).all()


def test_gather_rows(pool, rng):
    x = rng.standard_normal((40, 33), np.float32)
    out = np.zeros((3, 33), np.float32)
    run(pool, [row_steps.gather_rows_step(address(x), address(out), width=33)],
        rows_batch(40, num_logits=3, logits_indices=[39, 0, 7]))  # fmt: skip
    assert (out == x[[39, 0, 7]]).all()


def test_copy_rows(pool, rng):
    x = rng.standard_normal((6, 40), np.float32)
    out = np.zeros((6, 25), np.float32)
    step = row_steps.copy_rows_step(x[:, 10:].ctypes.data, address(out), width=20, x_stride=40, out_stride=25)
    run(pool, [step], rows_batch(6))
    assert (out[:, :20] == x[:, 10:30]).all()
    assert (out[:, 20:] == 0).all()
