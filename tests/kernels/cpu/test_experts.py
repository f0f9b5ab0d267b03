"""A mixture of experts' steps against the reference, and their batch invariance."""

import numpy as np
import pytest
import torch
from harness import address, as_torch, random_parts, rows_batch, run

from trtllm_cli.kernels import reference
from trtllm_cli.kernels.cpu import expert_steps, row_steps
from trtllm_cli.kernels.cpu.pack import pack, step_arguments
from trtllm_cli.kernels.linear_format import LinearFormat
from trtllm_cli.kernels.quantization import qdq

FORMATS = [
    LinearFormat("float32"), LinearFormat("bfloat16"), LinearFormat("int8"), LinearFormat("int8", 16),
    LinearFormat("int4", 16), LinearFormat("int4", 16, has_zero=True), LinearFormat("fp8"), LinearFormat("fp8", 24),
    LinearFormat("fp4", 16),
]  # fmt: skip


def ids(fmt):
    return f"{fmt.name}-{fmt.group_size}" + ("-zero" if fmt.has_zero else "")


class Experts:
    """Random experts, packed one after another."""

    def __init__(self, fmt, experts, out_features, in_features, rng):
        self.fmt, self.shape = fmt, (experts, out_features, in_features)
        plain = as_torch(rng.standard_normal(self.shape, np.float32))
        if fmt.name in ("float32", "bfloat16"):
            parts = [fmt.quantize(w) for w in plain]
        else:
            parts = [random_parts(fmt, out_features, in_features, rng) for _ in range(experts)]
            for p in parts:
                p["scale"] = p["scale"].half().float() if fmt.name in ("int8", "int4") else p["scale"]
        self.weight = torch.stack([fmt.dequantize(p, in_features) for p in parts])
        packed = [pack(fmt, p, in_features) for p in parts]
        self.packed = {role: torch.stack([p[role] for p in packed]) for role in packed[0]}
        self.bias = rng.standard_normal((experts, out_features), np.float32)

    def __call__(self, pool, x, choices, bias=True, first_expert=0):
        """NaN where nothing is written."""
        tokens, top_k = choices.shape
        experts, out_features, in_features = self.shape
        out = np.full((tokens, top_k * out_features), np.nan, np.float32)
        step = expert_steps.expert_linear_step(
            address(x), address(choices), address(out), address(self.packed["weight"]),
            scale=address(self.packed.get("scale")), bias=address(self.bias) if bias else None,
            in_features=in_features, out_features=out_features, num_experts=experts, top_k=top_k,
            x_per_choice=x.shape[1] != in_features, first_expert=first_expert, **step_arguments(self.fmt),
        )  # fmt: skip
        run(pool, [step], rows_batch(tokens))
        return out


def choose(rng, tokens, top_k, experts):
    return np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)]).astype(np.int32)


@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
@pytest.mark.parametrize(("out_features", "in_features"), [(40, 48), (17, 70)])
@pytest.mark.parametrize("per_choice", [False, True])
def test_each_token_by_its_experts(pool, rng, fmt, out_features, in_features, per_choice):
    experts = Experts(fmt, 6, out_features, in_features, rng)
    for tokens in (1, 5, 40, 100):
        choices = choose(rng, tokens, 3, 6)
        x = rng.standard_normal((tokens, in_features * (3 if per_choice else 1)), np.float32)
        got = as_torch(experts(pool, x, choices))
        want = reference.expert_linear(as_torch(x), as_torch(choices), experts.weight, as_torch(experts.bias))
        assert float((got - want).norm() / want.norm()) < (5e-4 if fmt.has_zero else 1e-5), tokens


@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
def test_a_token_has_the_same_bits_in_any_batch(pools, rng, fmt):
    experts = Experts(fmt, 40, 200, 176, rng)
    choices, x = choose(rng, 230, 4, 40), rng.standard_normal((230, 176), np.float32)
    choices[:, 0] = 39  # one expert has more rows than are multiplied at once
    choices[:, 1:] %= 39
    whole = experts(pools[0], x, choices, bias=False)
    assert experts(pools[1], x, choices, bias=False).tobytes() == whole.tobytes()
    for rows in (1, 2, 7, 15, 64):
        for pool in pools:
            part = experts(pool, x[11 : 11 + rows].copy(), choices[11 : 11 + rows].copy(), bias=False)
            assert part.tobytes() == whole[11 : 11 + rows].tobytes(), rows


def test_experts_that_nobody_chose_are_not_read(pool, rng):
    experts = Experts(LinearFormat("float32"), 5, 20, 30, rng)
    experts.packed["weight"][[0, 2, 3]] = torch.nan
    x, choices = rng.standard_normal((3, 30), np.float32), np.array([[4, 1]] * 3, np.int32)
    assert np.isfinite(experts(pool, x, choices)).all()


@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
@pytest.mark.parametrize("per_choice", [False, True])
def test_choices_of_other_ranks_experts_are_zeros(pools, rng, fmt, per_choice):
    """Experts 3 to 5 of 9 are here; x of the others' choices is never looked at where each choice has its own."""
    experts = Experts(fmt, 3, 40, 48, rng)
    for tokens in (1, 5, 40, 150):
        choices = choose(rng, tokens, 4, 9)
        choices[0] = [0, 8, 2, 6]  # nothing here
        x = rng.standard_normal((tokens, 48 * (4 if per_choice else 1)), np.float32)
        here = as_torch((choices >= 3) & (choices < 6)).unsqueeze(-1)
        every = torch.zeros(9, 40, 48)
        every[3:6], biases = experts.weight, torch.zeros(9, 40)
        biases[3:6] = as_torch(experts.bias)
        want = reference.expert_linear(as_torch(x), as_torch(choices), every, biases).unflatten(1, (4, 40))
        reference_here = reference.expert_linear(
            as_torch(x), as_torch(choices), experts.weight, as_torch(experts.bias), first_expert=3
        )
        assert torch.equal(reference_here.unflatten(1, (4, 40)), want)
        if per_choice:
            x.reshape(tokens, 4, 48)[~here.squeeze(-1).numpy()] = np.nan
        outs = [experts(pool, x, choices, first_expert=3) for pool in pools]
        assert outs[0].tobytes() == outs[1].tobytes()
        got = as_torch(outs[0]).unflatten(1, (4, 40))
        assert not got.masked_select(~here).view(torch.int32).any()  # not even a sign
        assert float((got - want).norm()) <= (5e-4 if fmt.has_zero else 1e-5) * float(want.norm()), tokens
        for rows in (1, 2, 7):
            part = experts(pools[1], x[-rows:].copy(), choices[-rows:].copy(), first_expert=3)
            assert part.tobytes() == outs[0][-rows:].tobytes(), rows


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu", "swiglu_oai"])
def test_zeros_stay_zeros_between_an_experts_linears(pool, activation):
    """Through the activation, the rounding to a step found for each part, and the sum."""
    x, middle = np.zeros((3, 2 * 2 * 20), np.float32), np.full((3, 2 * 20), np.nan, np.float32)
    weights, out = np.full((3, 2), 0.5, np.float32), np.full((3, 20), np.nan, np.float32)
    steps = [
        expert_steps.expert_gated_act_step(address(x), address(middle), width=40, top_k=2, activation=activation),
        *(
            row_steps.qdq_step(address(middle), address(middle), width=40, fmt=fmt, group_size=20, scale=scale)
            for fmt, scale in (("fp8", None), ("int8", None), ("fp4", address(np.ones(1, np.float32))))
        ),
        expert_steps.combine_step(address(middle), address(weights), address(out), width=20, top_k=2),
    ]  # fmt: skip
    run(pool, steps, rows_batch(3))
    assert not middle.any()
    assert not out.any()
    for fmt in ("fp8", "int8", "fp4"):
        assert not qdq(torch.zeros(3, 40), None, fmt, 20).any()


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("groups", [None, (4, 2), (8, 3)])
@pytest.mark.parametrize("biased", [False, True])
def test_routing(pool, rng, scoring, renormalize, groups, biased):
    logits = 2 * rng.standard_normal((50, 24), np.float32)
    logits[7] = 0.25  # all alike: the first ones
    bias = rng.standard_normal(24, np.float32) if biased else None
    weights, ids = np.empty((50, 5), np.float32), np.empty((50, 5), np.int32)
    how = {"top_k": 5, "scoring": scoring, "renormalize": renormalize, "scaling": 2.5}
    if groups:
        how |= {"num_groups": groups[0], "top_groups": groups[1]}
    step = expert_steps.route_step(address(logits), address(weights), address(ids), num_experts=24,
                                   bias=address(bias), **how)  # fmt: skip
    run(pool, [step], rows_batch(50))
    want_weights, want_ids = reference.route(as_torch(logits), None if bias is None else as_torch(bias), **how)
    assert np.array_equal(ids, want_ids.numpy())
    np.testing.assert_allclose(weights, want_weights.numpy(), rtol=2e-6)


@pytest.mark.parametrize("activation", ["silu", "gelu", "swiglu_oai"])
@pytest.mark.parametrize("width", [5, 32])
def test_activation_and_sum(pools, rng, activation, width):
    x, weights = 3 * rng.standard_normal((9, 3 * 2 * width), np.float32), rng.random((9, 3), np.float32)
    up, gate = as_torch(x).unflatten(1, (3, -1)).chunk(2, dim=-1)
    parts = reference.gated_act(gate, up, activation)
    want = (parts * as_torch(weights).unsqueeze(-1)).sum(1)
    outs = []
    for pool in pools:
        middle, out = np.empty((9, 3 * width), np.float32), np.empty((9, width), np.float32)
        steps = [
            expert_steps.expert_gated_act_step(address(x), address(middle), width=3 * width, top_k=3,
                                               activation=activation),
            expert_steps.combine_step(address(middle), address(weights), address(out), width=width, top_k=3),
        ]  # fmt: skip
        run(pool, steps, rows_batch(9))
        torch.testing.assert_close(as_torch(middle), parts.flatten(1), rtol=3e-6, atol=3e-6)
        torch.testing.assert_close(as_torch(out), want, rtol=5e-6, atol=5e-6)
        outs.append(out.tobytes())
    assert outs[0] == outs[1]
