"""rope_append and paged_attention together, against dense attention in torch."""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from harness import address, as_torch, ints, rows_batch, run

from trtllm_cli.kernels.cpu import attention_steps
from trtllm_cli.kernels.quantization import round_to
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
    v_head_dim: int | None = None
    softcap: float | None = None
    sinks: bool = False
    fused: bool = True  # rope_append, or rope of q and of k and then kv_append

    @property
    def v_dim(self):
        return self.v_head_dim or self.head_dim

    @property
    def widths(self):
        """Of q, k and v."""
        return self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, self.num_kv_heads * self.v_dim


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
    Case(4, 2, 256, 16, softcap=1.5, window=33),
    Case(4, 1, 96, 16, sinks=True, cache_dtype="bfloat16"),
    Case(3, 3, 80, 32, sinks=True, window=17, softcap=2.0, fused=False),
    Case(128, 1, 72, 32, v_head_dim=64, rotary_dim=8, layout="gptj", fused=False),
    Case(53, 1, 24, 8, v_head_dim=40, cache_dtype="bfloat16", fused=False),
    Case(10, 1, 576, 32, v_head_dim=512, rotary_dim=64, layout="gptj", cache_dtype="bfloat16", fused=False),
    Case(9, 3, 64, 32, cache_dtype="int8"),
    Case(9, 3, 64, 32, cache_dtype="fp8", window=50),
    Case(2, 1, 18, 20, rotary_dim=6, cache_dtype="fp8", sinks=True),
    Case(60, 1, 24, 16, v_head_dim=40, cache_dtype="int8", fused=False),
]


class Layer:
    """A layer with its cache; sequences are rows of qkv, kept whole for the reference."""

    def __init__(self, case, lengths, seed=0):
        rng = np.random.default_rng(seed)
        self.case, self.lengths = case, lengths
        self.qkv = [rng.standard_normal((n, sum(case.widths)), np.float32) for n in lengths]
        self.rotary_dim = case.rotary_dim or case.head_dim
        angles = rng.random((max(lengths), self.rotary_dim // 2), np.float32) * 6
        self.table = np.ascontiguousarray(np.concatenate([np.cos(angles), np.sin(angles)], axis=1))
        self.q_norm, self.k_norm = rng.standard_normal((2, case.head_dim), np.float32) if case.qk_norm else (None, None)
        self.sinks = rng.standard_normal(case.num_heads, np.float32) if case.sinks else None
        self.kv_scale = np.float32([0.03, 0.017]) if case.cache_dtype in ("int8", "fp8") else None
        counts = [-(-n // case.block_size) for n in lengths]
        ids = rng.permutation(sum(counts)).astype(np.int32)  # blocks of a sequence lie anywhere
        self.tables = np.zeros((len(lengths), max(counts)), np.int32)
        for s, n in enumerate(counts):
            self.tables[s, :n], ids = ids[:n], ids[n:]
        self.block_bytes = attention_steps.kv_bytes_per_block(
            case.num_kv_heads, case.head_dim, case.block_size, case.cache_dtype, case.v_head_dim
        )
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

    def step(self, pool, parts, wanted=None):
        """The attention of those rows, by sequence; with `wanted` of just these rows of the step."""
        c = self.case
        qkv = np.concatenate([self.qkv[s][b:e] for s, (b, e) in parts.items()])
        q = np.full((len(qkv), c.widths[0]), np.nan, np.float32)
        out = np.full((len(qkv), c.num_heads * c.v_dim), np.nan, np.float32)
        cache = {"num_kv_heads": c.num_kv_heads, "head_dim": c.head_dim, "block_size": c.block_size,
                 "cache_dtype": c.cache_dtype, "kv_scale": address(self.kv_scale)}  # fmt: skip
        rotation = {"rotary_dim": self.rotary_dim, "layout": c.layout}
        if c.fused:
            steps = [
                attention_steps.rope_append_step(
                    address(qkv), address(q), address(self.cache), address(self.table), num_heads=c.num_heads, **cache,
                    **rotation, q_norm=address(self.q_norm), k_norm=address(self.k_norm), eps=1e-6,
                )
            ]  # fmt: skip
        else:
            old_q, k, v = (np.ascontiguousarray(x) for x in np.split(qkv, np.cumsum(c.widths)[:2], axis=1))
            rotation |= {"head_dim": c.head_dim}
            table = address(self.table)
            steps = [
                attention_steps.rope_step(address(old_q), address(q), table, num_heads=c.num_heads, **rotation),
                attention_steps.rope_step(address(k), address(k), table, num_heads=c.num_kv_heads, **rotation),
                attention_steps.kv_append_step(
                    address(k), address(v), address(self.cache), v_head_dim=c.v_head_dim, **cache
                ),
            ]
        steps.append(
            attention_steps.paged_attention_step(
                address(q), address(out), address(self.cache), num_heads=c.num_heads, **cache, scale=c.head_dim**-0.5,
                v_head_dim=c.v_head_dim, window=c.window, softcap=c.softcap, sinks=address(self.sinks),
            )
        )  # fmt: skip
        run(pool, steps, self.inputs(parts))
        if wanted is not None:
            out = np.full((len(wanted), c.num_heads * c.v_dim), np.nan, np.float32)
            q = np.ascontiguousarray(q[wanted])
            attention = attention_steps.paged_attention_step(
                address(q), address(out), address(self.cache), num_heads=c.num_heads, **cache, scale=c.head_dim**-0.5,
                v_head_dim=c.v_head_dim, window=c.window, softcap=c.softcap, sinks=address(self.sinks),
                rows="num_logits",
            )  # fmt: skip
            run(pool, [attention], replace(self.inputs(parts), logits_indices=ints(wanted)))
            return out
        return dict(zip(parts, np.split(out, np.cumsum([e - b for b, e in parts.values()])[:-1]), strict=True))

    def reference(self, s):
        """[length, num_heads * v_dim] of sequence s."""
        c = self.case
        q, k, v = as_torch(self.qkv[s]).split(c.widths, 1)
        q, k = q.unflatten(1, (c.num_heads, -1)), k.unflatten(1, (c.num_kv_heads, -1))
        q, k = self.rotated(self.normed(q, self.q_norm)), self.rotated(self.normed(k, self.k_norm))
        k, v = self.kept(k, 0), self.kept(v.unflatten(1, (c.num_kv_heads, -1)), 1)
        group = c.num_heads // c.num_kv_heads
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * c.head_dim**-0.5
        if c.softcap:
            scores = c.softcap * torch.tanh(scores / c.softcap)
        at = torch.arange(len(q))
        seen = at[:, None] >= at[None]
        if c.window:
            seen &= at[:, None] - at[None] < c.window
        scores = scores.masked_fill(~seen, float("-inf"))
        if c.sinks:
            sinks = as_torch(self.sinks)[:, None, None].expand(-1, len(q), 1)
            scores = torch.cat([scores, sinks], -1)
        p = scores.softmax(-1)[..., : len(q)]
        return torch.einsum("hqk,khd->qhd", p, v.repeat_interleave(group, 1)).flatten(1).numpy()

    def kept(self, x, which):
        """k or v as the cache holds it."""
        dtype = self.case.cache_dtype
        if dtype in ("int8", "fp8"):
            return round_to(x / self.kv_scale[which], dtype) * self.kv_scale[which]
        return x.to(getattr(torch, dtype)).float()

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
        # Rounding k may fall the other way where its rotation differs in the last bit.
        tolerance = {"float32": 2e-5, "bfloat16": 4e-3, "int8": 2e-2, "fp8": 5e-2}[self.case.cache_dtype]
        np.testing.assert_allclose(got, self.reference(s)[begin : begin + len(got)], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("wanted", [[], [69], [0, 1, 2, 40, 69, 70, 82], [*range(83)], [82, 5, 6, 30]])
def test_wanted_rows_are_those_of_all(pool, case, wanted):
    """Bit for bit, wherever they are: one after another, at the end of a sequence and the beginning of the next."""
    parts = {1: (0, 70), 0: (30, 43)}
    layer = Layer(case, [50, 70])
    layer.step(pool, {0: (0, 30)})
    whole = np.concatenate(list(layer.step(pool, parts).values()))
    assert np.array_equal(layer.step(pool, parts, wanted), whole[wanted])


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


@pytest.mark.parametrize(("fmt", "largest"), [("int8", 200.0), ("fp8", 700.0)])
def test_the_cache_rounds_as_the_reference(pool, fmt, largest):
    """Values of the first token come back alone: ties, numbers below the smallest normal, and what is too large."""
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = grid[grid.isfinite()].sort().values.unique() if fmt == "fp8" else torch.arange(-127.0, 128.0)
    values = torch.cat([grid, (grid[1:] + grid[:-1]) / 2, (grid * 3 + 0.001) / 2, torch.tensor([largest, -largest])])
    values = torch.cat([values, torch.zeros(-len(values) % 16)])
    dim, scale = len(values), np.float32([1.0, 0.25])
    shape = {"num_kv_heads": 1, "head_dim": dim, "block_size": 16, "cache_dtype": fmt, "kv_scale": address(scale)}
    cache = np.zeros(attention_steps.kv_bytes_per_block(1, dim, 16, fmt), np.uint8)
    k, v, out = np.zeros((1, dim), np.float32), (values * 0.25).numpy()[None], np.full((1, dim), np.nan, np.float32)
    steps = [
        attention_steps.kv_append_step(address(k), address(v), address(cache), **shape),
        attention_steps.paged_attention_step(address(k), address(out), address(cache), num_heads=1, scale=1.0, **shape),
    ]
    run(pool, steps, rows_batch(1))
    assert (as_torch(out[0]) == round_to(values, fmt) * 0.25).all()


def test_not_a_number_stays_one_in_fp8(pool):
    shape = {"num_kv_heads": 1, "head_dim": 16, "block_size": 16, "cache_dtype": "fp8"}
    cache = np.zeros(attention_steps.kv_bytes_per_block(1, 16, 16, "fp8"), np.uint8)
    k, v, out = np.zeros((1, 16), np.float32), np.full((1, 16), np.nan, np.float32), np.zeros((1, 16), np.float32)
    steps = [
        attention_steps.kv_append_step(address(k), address(v), address(cache), **shape),
        attention_steps.paged_attention_step(address(k), address(out), address(cache), num_heads=1, scale=1.0, **shape),
    ]
    run(pool, steps, rows_batch(1))
    assert np.isnan(out).all()
