"""rope_append and paged_attention together, against dense attention in torch."""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from harness import address, as_torch, ints, run

from trtllm_cli.kernels.cpu import attention_steps
from trtllm_cli.run.model_inputs import ModelInputs


@dataclass(frozen=True)
class Case:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int = 16
    window: int | None = None
    rotary_dim: int | None = None
    layout: str = "neox"
    cache_dtype: str = "float32"
    qk_norm: bool = False

    @property
    def width(self):
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


CASES = [
    Case(9, 3, 64, 32),
    Case(9, 3, 64, 32, cache_dtype="bfloat16"),
    Case(4, 4, 16, 8),
    Case(8, 1, 40, 16, window=20),
    Case(6, 2, 32, 64, window=70, cache_dtype="bfloat16"),
    Case(4, 2, 80, 24, rotary_dim=32),
    Case(4, 2, 64, 128, layout="gptj"),
    Case(16, 2, 128, 1, qk_norm=True),
    Case(2, 1, 18, 20, rotary_dim=6, layout="gptj", qk_norm=True, cache_dtype="bfloat16"),
]


class Layer:
    """A layer with its cache; sequences are rows of qkv, kept whole for the reference."""

    def __init__(self, case, lengths, seed=0):
        rng = np.random.default_rng(seed)
        self.case, self.lengths = case, lengths
        self.qkv = [rng.standard_normal((n, case.width), np.float32) for n in lengths]
        self.rotary_dim = case.rotary_dim or case.head_dim
        angles = rng.random((max(lengths), self.rotary_dim // 2), np.float32) * 6
        self.table = np.ascontiguousarray(np.concatenate([np.cos(angles), np.sin(angles)], axis=1))
        self.q_norm, self.k_norm = rng.standard_normal((2, case.head_dim), np.float32) if case.qk_norm else (None, None)
        counts = [-(-n // case.block_size) for n in lengths]
        ids = rng.permutation(sum(counts)).astype(np.int32)  # blocks of a sequence lie anywhere
        self.tables = np.zeros((len(lengths), max(counts)), np.int32)
        for s, n in enumerate(counts):
            self.tables[s, :n], ids = ids[:n], ids[n:]
        self.block_bytes = attention_steps.kv_bytes_per_block(case.num_kv_heads, case.head_dim, case.block_size,
                                                      case.cache_dtype)  # fmt: skip
        self.cache = np.zeros(sum(counts) * self.block_bytes, np.uint8)

    def inputs(self, parts):
        """The batch of rows [begin, end) of each sequence; parts {sequence: (begin, end)}."""
        positions = np.concatenate([np.arange(*p) for p in parts.values()])
        owners = np.concatenate([np.full(e - b, s) for s, (b, e) in parts.items()])
        blocks = self.tables[owners, positions // self.case.block_size]
        return ModelInputs(
            input_ids=ints(np.zeros(len(positions))),
            positions=ints(positions),
            slot_mapping=ints(blocks * self.case.block_size + positions % self.case.block_size),
            block_tables=ints(self.tables[list(parts)]),
            query_start=ints(np.cumsum([0, *(e - b for b, e in parts.values())])),
            seq_lens=ints([e for _, e in parts.values()]),
            logits_indices=ints([]),
        )

    def step(self, pool, parts):
        """The attention of those rows, by sequence."""
        c = self.case
        qkv = np.concatenate([self.qkv[s][b:e] for s, (b, e) in parts.items()])
        q = np.full((len(qkv), c.num_heads * c.head_dim), np.nan, np.float32)
        out = np.full_like(q, np.nan)
        shape = {"num_heads": c.num_heads, "num_kv_heads": c.num_kv_heads, "head_dim": c.head_dim,
                 "block_size": c.block_size, "cache_dtype": c.cache_dtype}  # fmt: skip
        steps = [
            attention_steps.rope_append_step(
                address(qkv), address(q), address(self.cache), address(self.table), **shape,
                rotary_dim=self.rotary_dim, layout=c.layout, q_norm=address(self.q_norm), k_norm=address(self.k_norm),
                eps=1e-6,
            ),
            attention_steps.paged_attention_step(
                address(q), address(out), address(self.cache), **shape, scale=c.head_dim**-0.5, window=c.window
            ),
        ]  # fmt: skip
        run(pool, steps, self.inputs(parts))
        return dict(zip(parts, np.split(out, np.cumsum([e - b for b, e in parts.values()])[:-1]), strict=True))

    def reference(self, s):
        """[length, num_heads * head_dim] of sequence s."""
        c = self.case
        heads = as_torch(self.qkv[s]).unflatten(1, (-1, c.head_dim))
        q, k, v = heads.split([c.num_heads, c.num_kv_heads, c.num_kv_heads], 1)
        q, k = self.rotated(self.normed(q, self.q_norm)), self.rotated(self.normed(k, self.k_norm))
        if c.cache_dtype == "bfloat16":
            k, v = k.bfloat16().float(), v.bfloat16().float()
        group = c.num_heads // c.num_kv_heads
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * c.head_dim**-0.5
        at = torch.arange(len(q))
        seen = at[:, None] >= at[None]
        if c.window:
            seen &= at[:, None] - at[None] < c.window
        p = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", p, v.repeat_interleave(group, 1)).flatten(1).numpy()

    def normed(self, x, weight):
        return x if weight is None else x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * as_torch(weight)

    def rotated(self, x):
        cos, sin = as_torch(self.table[: len(x), None]).chunk(2, dim=-1)
        part, rest = x[..., : self.rotary_dim], x[..., self.rotary_dim :]
        a, b = part.chunk(2, -1) if self.case.layout == "neox" else (part[..., 0::2], part[..., 1::2])
        turned = (a * cos - b * sin, b * cos + a * sin)
        both = torch.cat(turned, -1) if self.case.layout == "neox" else torch.stack(turned, -1).flatten(-2)
        return torch.cat([both, rest], -1)

    def check(self, s, begin, got):
        # Rounding k to bfloat16 may fall the other way where its rotation differs in the last bit.
        tolerance = 2e-5 if self.case.cache_dtype == "float32" else 4e-3
        np.testing.assert_allclose(got, self.reference(s)[begin : begin + len(got)], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_whole_prompts_then_a_ragged_batch_then_decode(pool, case):
    layer = Layer(case, [150, 1, 37, 64])
    whole = layer.step(pool, {0: (0, 100), 1: (0, 1), 2: (0, 30)})
    mixed = layer.step(pool, {2: (30, 37), 0: (100, 149), 3: (0, 63)})
    last = layer.step(pool, {3: (63, 64), 0: (149, 150)})
    for step, begins in ((whole, {0: 0, 1: 0, 2: 0}), (mixed, {2: 30, 0: 100, 3: 0}), (last, {3: 63, 0: 149})):
        for s, got in step.items():
            layer.check(s, begins[s], got)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_bits_however_the_prompt_is_cut_and_whoever_is_beside_it(pools, case):
    layer = Layer(case, [133, 50])
    whole = layer.step(pools[0], {0: (0, 133), 1: (0, 50)})
    for pool, cuts in ((pools[1], [0, 133]), (pools[1], [0, 7, 64, 65, 66, 120, 133]), (pools[0], range(134))):
        again = Layer(case, [133, 50])
        parts = [again.step(pool, {0: cut})[0] for cut in itertools.pairwise(cuts)]
        assert np.concatenate(parts).tobytes() == whole[0].tobytes()


def test_what_old_blocks_hold_does_not_matter(pool):
    layer = Layer(Case(4, 2, 32, 16), [40])
    layer.cache.view(np.float32)[:] = np.nan
    layer.check(0, 0, layer.step(pool, {0: (0, 40)})[0])


def test_no_table_rotates_nothing(pool):
    case = Case(2, 2, 32)
    layer = Layer(case, [20])
    layer.table = None
    got = layer.step(pool, {0: (0, 20)})[0]
    layer.rotated = lambda x: x
    layer.check(0, 0, got)


def test_a_copied_block_serves_as_the_first(pool):
    layer = Layer(Case(4, 2, 32, 16, cache_dtype="bfloat16"), [40])
    first = layer.step(pool, {0: (0, 40)})[0]
    used = layer.tables.copy()
    layer.cache = np.concatenate([layer.cache, np.zeros_like(layer.cache)])
    layer.tables = used + used.size
    for source, destination in zip(used.flat, layer.tables.flat, strict=True):
        attention_steps.copy_block(address(layer.cache), layer.block_bytes, int(source), int(destination))
    assert layer.step(pool, {0: (39, 40)})[0].tobytes() == first[39:].tobytes()


def test_long_context(pool):
    case = replace(CASES[0], cache_dtype="bfloat16")
    layer = Layer(case, [1100])
    layer.check(0, 0, layer.step(pool, {0: (0, 1100)})[0])
