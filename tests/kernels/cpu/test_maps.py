"""Layer norms and what is done to each element by itself, against kernels.reference."""

import numpy as np
import pytest
import torch
from harness import address, as_torch, rows_batch, run

from trtllm_cli.kernels import reference
from trtllm_cli.kernels.cpu import row_steps

ACTIVATIONS = ["silu", "gelu", "gelu_pytorch_tanh", "relu"]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("rows", "heads", "part"), [(1, 1, 576), (7, 1, 83), (40, 3, 20), (2, 4, 64)])
def test_layer_norm(pool, rng, rows, heads, part, biased):
    width = heads * part
    x = rng.standard_normal((rows, width), np.float32) * 3 + 5
    weight, bias = rng.standard_normal((2, width), np.float32)
    out = np.full_like(x, np.nan)
    step = row_steps.layer_norm_step(
        address(x), address(out), address(weight), bias=address(bias) if biased else None, width=width, eps=1e-5,
        num_heads=heads,
    )  # fmt: skip
    run(pool, [step], rows_batch(rows))
    want = reference.layer_norm(
        as_torch(x).double(), as_torch(weight), as_torch(bias) if biased else None, 1e-5, heads
    )  # fmt: skip
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)


def test_a_layer_norm_has_the_same_bits_in_any_batch(pools, rng):
    x = rng.standard_normal((33, 70), np.float32)
    weight, bias = rng.standard_normal((2, 70), np.float32)

    def normed(pool, x):
        out = np.empty_like(x)
        step = row_steps.layer_norm_step(
            address(x), address(out), address(weight), bias=address(bias), width=70, eps=1e-5
        )
        run(pool, [step], rows_batch(len(x)))
        return out

    together = normed(pools[1], x)
    assert all(normed(pools[0], x[i : i + 1].copy()).tobytes() == together[i].tobytes() for i in range(33))


@pytest.mark.parametrize("biased", [True, False])
def test_add_layer_norm(pool, rng, biased):
    x, residual = rng.standard_normal((2, 9, 200), np.float32)
    weight, bias = rng.standard_normal((2, 200), np.float32)
    total = x + residual
    step = row_steps.add_layer_norm_step(
        address(x), address(residual), address(x), address(weight), bias=address(bias) if biased else None, width=200,
        eps=1e-5,
    )  # fmt: skip
    run(pool, [step], rows_batch(9))
    assert (residual == total).all()
    want = reference.layer_norm(as_torch(total), as_torch(weight), as_torch(bias) if biased else None, 1e-5)
    np.testing.assert_allclose(x, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "swiglu_oai"])
@pytest.mark.parametrize("joint", [True, False])
def test_gated_act(pool, rng, activation, joint):
    gate, up = rng.standard_normal((2, 11, 45), np.float32) * 4
    gate[0, :6] = (-200.0, -30.0, 30.0, 200.0, 7.0, np.nan)
    up[0, :6] = (9.0, -9.0, 9.0, -9.0, np.nan, 1.0)
    both = np.concatenate([gate, up], axis=1)
    want = reference.gated_act(as_torch(gate).double(), as_torch(up).double(), activation)
    out = np.full((11, 45), np.nan, np.float32) if joint else gate
    step = row_steps.gated_act_step(
        address(both if joint else gate), address(out), up=None if joint else address(up), intermediate_size=45,
        activation=activation,
    )  # fmt: skip
    run(pool, [step], rows_batch(11))
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_act(pool, rng, activation):
    x = rng.standard_normal((5, 300), np.float32) * 4
    want = reference.activate(as_torch(x).double(), activation)
    run(pool, [row_steps.act_step(address(x), address(x), width=300, activation=activation)], rows_batch(5))
    np.testing.assert_allclose(x, want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("broadcast", [False, True])
def test_mul(pool, rng, broadcast):
    x = rng.standard_normal((30, 333), np.float32)
    y = rng.standard_normal((1 if broadcast else 30, 333), np.float32)
    want = x * y
    run(pool, [row_steps.mul_step(address(x), address(y), address(x), width=333, broadcast=broadcast)], rows_batch(30))
    assert (x == want).all()


def test_scale_and_softcap(pool, rng):
    x = rng.standard_normal((6, 101), np.float32) * 40
    want = 30 * torch.tanh(as_torch(x).double() * 0.25 / 30)
    steps = [
        row_steps.scale_step(address(x), address(x), width=101, factor=0.25),
        row_steps.softcap_step(address(x), address(x), width=101, cap=30.0),
    ]
    run(pool, steps, rows_batch(6))
    np.testing.assert_allclose(x, want, rtol=2e-6, atol=1e-5)


def test_positions_as_ids(pool, rng):
    table = rng.standard_normal((12, 20), np.float32)
    batch = rows_batch(6)
    batch.positions[:] = (3, 0, 9, 8, 1, 2)
    out = np.full((6, 20), np.nan, np.float32)
    step = row_steps.embedding_step(
        address(out), address(table), vocab_size=12, hidden_size=20, vocab_start=-2, ids="positions"
    )
    run(pool, [step], batch)
    assert (out == table[batch.positions + 2]).all()
