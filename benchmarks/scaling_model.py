"""What a transformer takes on so many GPUs, on paper: the time of a step under any split, and what follows from it.

A step's time is the sum over a stage's layers of

- **products**: for each linear an overhead, and the larger of its bytes over the rate at which weights are read and its
  operations over the rate at which they are done. Of experts those count that some token of the step goes to.
- **attention**: the same with keys and values for new tokens, and with operations for prompts.
- **kernels**: the small ones between (norms, rotary positions, activations), an overhead each and their bytes.
- **links**: two all-reduces a layer among tensor-parallel ranks, the gathering of logits, sending on to the next stage.
- **host**: launching the step.

Ranks are numbered as in trtllm_cli/mapping.py: the ranks of a stage are neighbours. Experts as in models/moe.py: every
rank of a stage routes all tokens, computes its part of its experts, and one all-reduce sums. Stages work on a step each
(a micro-batch), as many as there are stages, and wait for each other for a share of the time (`pipeline_share`).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from scaling_figures import BYTES, Curve, Figures, InputError

LONGEST = 4096  # tokens: a split is legal where the cache has room for one such sequence


@dataclass(frozen=True)
class Experts:
    """The experts that stand in place of the MLP, after `dense_layers` ordinary layers."""

    count: int
    chosen: int
    inner: int
    shared_inner: int = 0
    dense_layers: int = 0


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention, with absorbed matrices (trtllm_cli/models/deepseek.py)."""

    q_rank: int
    kv_rank: int
    nope: int
    rope: int
    v: int


@dataclass(frozen=True)
class Model:
    """A decoder's shape."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    experts: Experts | None = None
    latent: Latent | None = None

    @classmethod
    def of(cls, data: dict[str, Any]) -> Model:
        """From scaling_inputs.json."""
        parts = {"experts": Experts, "latent": Latent}
        try:
            made = {name: kind(**data[name]) for name, kind in parts.items() if name in data}
            model = cls(**{**data, **made})
        except TypeError as e:
            raise InputError(f"not a model's shape: {data} ({e})") from e
        numbers = [n for part in (data, *(data[name] for name in made)) for n in part.values() if type(n) is not dict]
        if not all(type(n) is int and n > 0 for n in numbers):
            raise InputError(f"not a model's shape: {data} (sizes are positive whole numbers)")
        return model


@dataclass(frozen=True)
class Split:
    """Ranks of one replica: tp to a stage, pp stages, experts divided ep ways within a stage."""

    tp: int = 1
    pp: int = 1
    ep: int = 1

    @property
    def ranks(self) -> int:
        """GPUs of a replica."""
        return self.tp * self.pp

    def __str__(self) -> str:
        parts = [f"{name}{n}" for name, n in (("TP", self.tp), ("PP", self.pp), ("EP", self.ep)) if n > 1]
        return " ".join(parts) or "TP1"


@dataclass(frozen=True)
class Time:
    """Seconds, by what takes them."""

    products: float = 0.0
    attention: float = 0.0
    kernels: float = 0.0
    links: float = 0.0
    host: float = 0.0

    def __add__(self, other: Time) -> Time:
        return Time(*(a + b for a, b in zip(self._parts, other._parts, strict=True)))

    def __mul__(self, n: float) -> Time:
        return Time(*(a * n for a in self._parts))

    @property
    def _parts(self) -> tuple[float, ...]:
        return self.products, self.attention, self.kernels, self.links, self.host

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self._parts)


@dataclass(frozen=True)
class Step:
    """What a step computes: new tokens of sequences with so many keys each, and tokens of prompts."""

    decodes: float = 0.0  # sequences, one new token each
    context: float = 0.0  # keys of each, on average
    prefill: float = 0.0  # tokens of prompts
    prefill_keys: float = 0.0  # keys that each of those sees, on average
    logits: float = 0.0  # rows that go through the head

    @property
    def rows(self) -> float:
        """Tokens."""
        return self.decodes + self.prefill


@dataclass(frozen=True)
class Throughput:
    """A saturated replica."""

    tokens_per_second: float  # of output
    batch: int  # sequences under way


@dataclass(frozen=True)
class Plan:
    """A model on a split."""

    model: Model
    split: Split
    figures: Figures
    weights: str = "bf16"
    kv: str = "bf16"

    # What a rank holds

    @cached_property
    def _attention_linears(self) -> list[tuple[int, int, str]]:
        """Outputs, inputs and dtype of the linears around attention on one rank."""
        m, tp = self.model, self.split.tp
        heads = m.heads // tp
        if m.latent is None:
            qkv = (heads + 2 * max(1, m.kv_heads // tp)) * m.head_dim
            return [(qkv, m.hidden, self.weights), (m.hidden, heads * m.head_dim, self.weights)]
        a = m.latent
        return [  # what makes the latents is whole on every rank
            (a.q_rank, m.hidden, self.weights),
            (a.kv_rank + a.rope, m.hidden, self.weights),
            (heads * a.nope, a.q_rank, self.weights),
            (heads * a.rope, a.q_rank, self.weights),
            (heads * a.kv_rank, a.nope, "bf16"),
            (heads * a.v, a.kv_rank, "bf16"),
            (m.hidden, heads * a.v, self.weights),
        ]

    def _mlp_linears(self, inner: int) -> list[tuple[int, int, str]]:
        part = inner // self.split.tp
        return [(2 * part, self.model.hidden, self.weights), (self.model.hidden, part, self.weights)]

    def _linear_bytes(self, linears: list[tuple[int, int, str]]) -> int:
        return sum(out * columns * BYTES[dtype] for out, columns, dtype in linears)

    @cached_property
    def _expert_bytes(self) -> float:
        """Bytes of a rank's part of one expert."""
        e, part = self.model.experts, self.split.tp // self.split.ep
        return 3 * e.inner // part * self.model.hidden * BYTES[self.weights] if e else 0.0

    def layer_bytes(self, *, dense: bool) -> float:
        """Bytes of a layer's weights on one rank."""
        m = self.model
        if dense or m.experts is None:
            return self._linear_bytes(self._attention_linears + self._mlp_linears(m.inner))
        e = m.experts
        fixed = self._linear_bytes(self._attention_linears + self._mlp_linears(e.shared_inner))
        return fixed + 4 * e.count * m.hidden + e.count // self.split.ep * self._expert_bytes

    @cached_property
    def stages(self) -> list[tuple[int, int]]:
        """Dense layers, and layers with experts, of each stage; the first have one more where it does not divide."""
        dense = self.model.experts.dense_layers if self.model.experts else self.model.layers
        base, extra = divmod(self.model.layers, self.split.pp)
        ends = [base * i + min(i, extra) for i in range(self.split.pp + 1)]
        return [(max(0, min(end, dense) - start), end - max(start, min(end, dense))) for start, end in pairwise(ends)]

    @cached_property
    def kv_bytes(self) -> int:
        """Bytes of a token's keys and values, in one layer on one rank."""
        m = self.model
        numbers = m.latent.kv_rank + m.latent.rope if m.latent else 2 * max(1, m.kv_heads // self.split.tp) * m.head_dim
        return numbers * BYTES[self.kv]

    @cached_property
    def kv_tokens(self) -> float:
        """Tokens that the cache has room for, on the fullest rank; negative where the weights alone do not fit."""
        table, room = 2 * self.model.vocab * self.model.hidden, []
        for i, (dense, sparse) in enumerate(self.stages):
            held = dense * self.layer_bytes(dense=True) + sparse * self.layer_bytes(dense=False)
            held += table if i == 0 else 0  # the embedding is whole on every rank of the first stage
            held += table / self.split.tp if i == self.split.pp - 1 else 0
            free = self.figures.memory * self.figures.usable_memory - self.figures.reserved_memory - held
            room.append(free / (self.kv_bytes * (dense + sparse)))
        return min(room)

    # What things take

    def product(self, rows: float, outputs: float, inputs: float, dtype: str, read: float | None = None) -> float:
        """Seconds of a product; `read` is the bytes of weights, where it is not one weight."""
        f = self.figures
        weights = outputs * inputs * BYTES[dtype] if read is None else read
        moved = weights + rows * (inputs * BYTES[dtype] + 2 * outputs)
        reading = moved / (f.memory_bandwidth * f.weight_read_share)
        return f.product_overhead + max(reading, 2 * rows * outputs * inputs / f.rate(dtype))

    def _kernels(self, count: int, numbers: float) -> float:
        """Seconds of `count` small kernels that move so many bfloat16 numbers in all."""
        return count * self.figures.kernel_overhead + 2 * numbers / self.figures.memory_bandwidth

    def _collective(self, curves: dict[int, Curve], size: float, turns: int) -> float:
        """Seconds of a collective that goes `turns` times around a stage's ranks.

        Within a node as among the most GPUs it was measured on, with the bytes that a ring puts on each link and a hop
        for each GPU more. Between nodes a tree's hops, and a ring's bytes over all of the nodes' adapters: each rank
        reduces its part within the node first.
        """
        f, tp = self.figures, self.split.tp
        inside = min(tp, f.gpus_per_node)
        nodes, seconds = tp // inside, 0.0
        if inside > 1:
            known = max(n for n in curves if n <= inside)
            seconds += curves[known](size * (inside - 1) / inside * known / (known - 1))
            seconds += turns * (inside - known) * f.nvlink_hop
        if nodes > 1:
            seconds += turns * math.log2(nodes) * f.network_hop
            seconds += turns * size * (nodes - 1) / nodes / (inside * f.network_bandwidth * f.network_share)
        return seconds

    def all_reduce(self, size: float) -> float:
        """Seconds among a stage's ranks, `size` bytes on each."""
        return self._collective(self.figures.all_reduce, size, 2)

    def _all_gather(self, size: float) -> float:
        """Seconds among a stage's ranks, `size` bytes in all."""
        return self._collective(self.figures.all_gather, size, 1)

    def _send(self, stage: int, rows: float) -> float:
        """Seconds from `stage` to the next: every rank sends all of the hidden states to its neighbour there."""
        f, size = self.figures, rows * self.model.hidden * 2
        if (stage + 1) * self.split.tp % f.gpus_per_node and self.split.tp < f.gpus_per_node:
            return f.send_recv(size)
        return f.send_recv(1) + f.network_hop + size / (f.network_bandwidth * f.network_share)

    def _attend(self, step: Step) -> float:
        """Seconds of attention in one layer."""
        m, f = self.model, self.figures
        heads = m.heads // self.split.tp
        of_key = 2 * heads * (2 * m.latent.kv_rank + m.latent.rope if m.latent else 2 * m.head_dim)
        seconds = 0.0
        if step.decodes:
            keys = step.decodes * step.context
            reading = keys * self.kv_bytes / (f.memory_bandwidth * f.kv_read_share)
            seconds += f.attention_overhead + max(reading, keys * of_key / f.attention_rate)
        if step.prefill:
            seconds += f.attention_overhead + step.prefill * step.prefill_keys * of_key / f.attention_rate
        return seconds

    def _experts(self, rows: float) -> Time:
        """The experts' linears on the rank of a stage that has most to do."""
        m, e, s = self.model, self.model.experts, self.split
        assert e is not None
        held, part = e.count // s.ep, e.inner // (s.tp // s.ep)
        touched = held * (1 - (1 - e.chosen / e.count) ** rows)
        touched = busiest(touched, s.ep, min(held, rows * min(held, e.chosen)))
        pairs = busiest(rows * e.chosen / s.ep, s.ep, rows * min(held, e.chosen))
        read = touched * self._expert_bytes
        up = self.product(pairs, 2 * part, m.hidden, self.weights, read * 2 / 3)
        down = self.product(pairs, m.hidden, part, self.weights, read / 3)
        router = self.product(rows, e.count, m.hidden, "bf16", 4 * e.count * m.hidden)
        # choosing, taking each expert's rows, activation, weighted sum
        small = self._kernels(4, pairs * (2 * m.hidden + 3 * part) + rows * e.count)
        return Time(products=router + up + down, kernels=small)

    def layer(self, step: Step, *, dense: bool) -> Time:
        """One layer on the rank that takes longest."""
        m, tp, rows = self.model, self.split.tp, step.rows
        linears = list(self._attention_linears)
        # two norms with the residual before them; rotary positions and the cache
        count, numbers = 3, 8 * m.hidden + 2 * linears[0][0]
        if m.latent:
            count, numbers = count + 3, numbers + 4 * (m.latent.q_rank + m.latent.kv_rank)
        inner = m.inner if dense or m.experts is None else m.experts.shared_inner
        if inner:
            linears += self._mlp_linears(inner)
            count, numbers = count + 1, numbers + 3 * inner // tp
        products = sum(self.product(rows, out, columns, dtype) for out, columns, dtype in linears)
        time = Time(
            products=products,
            attention=self._attend(step),
            kernels=self._kernels(count, rows * numbers),
            links=2 * self.all_reduce(rows * m.hidden * 2),
        )
        return time if dense or m.experts is None else time + self._experts(rows)

    def stage_times(self, step: Step) -> list[Time]:
        """Each stage's time for a step, with sending it on."""
        m, f = self.model, self.figures
        dense = self.layer(step, dense=True)
        sparse = self.layer(step, dense=False) if m.experts else Time()
        times = []
        for i, (with_mlp, with_experts) in enumerate(self.stages):
            time = dense * with_mlp + sparse * with_experts + Time(host=f.step_overhead)
            if i < self.split.pp - 1:
                time += Time(links=self._send(i, step.rows))
            else:
                head = self.product(step.logits, m.vocab / self.split.tp, m.hidden, "bf16")
                time += Time(products=head, links=self._all_gather(step.logits * m.vocab * 4))
            times.append(time)
        return times

    # What follows

    def token_time(self, context: float) -> Time:
        """From one token to the next, of the only sequence there is."""
        return sum(self.stage_times(Step(decodes=1, context=context, logits=1)), Time())

    def first_token_time(self, isl: int, prompts: int = 1) -> Time:
        """From prompts to their first tokens, nothing else running.

        Stages fill one after another: of a prompt in `n` pieces the last leaves after n + pp - 1 turns of the slowest
        stage. The best number of pieces is taken; each reads all weights, so it is few.
        """
        best: Time | None = None
        for pieces in (1, 2, 4, 8, 16):
            rows = isl * prompts / pieces
            if rows > self.figures.max_num_tokens:
                continue
            stages = self.stage_times(Step(prefill=rows, prefill_keys=isl / 2, logits=prompts / pieces))
            slowest = max(stages, key=lambda t: t.total)
            time = sum(stages, Time()) + slowest * (pieces - 1)
            if best is None or time.total < best.total:
                best = time
        assert best is not None
        return best

    def saturated(self, isl: int, osl: int, pace: float = 0.0) -> Throughput | None:
        """Requests without end: every step has a token of each sequence, and as many of prompts as leave with them.

        The largest batch that memory and the limits allow and that gives each sequence `pace` tokens a second: more
        sequences share one reading of the weights. None where there is none.
        """
        f, pp = self.figures, self.split.pp
        tokens = 1 + isl / osl  # of each sequence in a step
        most = int(min(self.kv_tokens / (isl + osl) / pp, f.max_num_tokens / tokens, f.max_batch_size))

        def turn(at_once: int) -> float:
            """Seconds until each of the micro-batches of so many sequences has had its step."""
            prefill = at_once * isl / osl
            step = Step(at_once, isl + osl / 2, prefill, isl / 2, at_once + at_once / osl)
            return pp * max(t.total for t in self.stage_times(step)) / f.pipeline_share[pp]

        if pace:
            most = bisect.bisect_right(range(1, most + 1), 1 / pace, key=turn)
        return Throughput(most * pp / turn(most), most * pp) if most >= 1 else None

    def at_once(self, count: int, isl: int, osl: int) -> float:
        """Output tokens a second of so many requests that start together, the prompts first."""
        decode = self.stage_times(Step(decodes=count, context=isl + osl / 2, logits=count))
        prefill = self.first_token_time(isl, count).total
        return count * osl / (prefill + (osl - 1) * sum(t.total for t in decode))


def busiest(mean: float, ways: int, most: float) -> float:
    """The most that one of `ways` ranks gets where each gets `mean` on average by chance, and at most `most`.

    m + sqrt(2 m ln n): balls into bins, Raab and Steger 1998.
    """
    return min(most, mean + math.sqrt(2 * mean * math.log(ways))) if ways > 1 else mean


def legal_splits(plan: Plan, ranks: int) -> Iterator[Plan]:
    """All splits of a replica of `ranks` that trtllm_cli/model_config.py allows and that memory has room for."""
    m = plan.model
    for tp in (2**i for i in range(ranks.bit_length())):
        pp = ranks // tp
        widths = [m.heads, m.inner, *([m.experts.shared_inner] if m.experts else [])]
        if tp * pp != ranks or pp not in plan.figures.pipeline_share or any(width % tp for width in widths):
            continue
        if m.kv_heads % tp and tp % m.kv_heads:
            continue
        for ep in (2**i for i in range(tp.bit_length())):
            if ep > 1 and (m.experts is None or m.experts.count % ep):
                continue
            if m.experts and m.experts.inner % (tp // ep):
                continue
            split = replace(plan, split=Split(tp, pp, ep))
            if split.kv_tokens >= LONGEST:
                yield split
