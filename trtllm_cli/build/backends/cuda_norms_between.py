"""RMS norms of the residual stream that the linears around them compute, for few tokens: no kernel between these two.

The one in front adds its outputs to the residual and leaves sums of squares; the one behind divides by the root of
their mean (kernels/triton/stream_linear.py). A kernel of its own takes some microseconds to be waited for, to read and
to write what the linears have in registers anyway. A sum over ranks that lies between them is the first one's too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from trtllm_cli.build.backends.cuda_collectives import CollectiveLaunches
from trtllm_cli.build.backends.cuda_linear_steps import LinearLaunches
from trtllm_cli.build.backends.cuda_linears import (
    RANK_ROLES,
    STREAMED,
    LinearShape,
    Norm,
    Tactic,
    argument,
    launch_of,
    norms,
)
from trtllm_cli.build.backends.cuda_program import RESIDUAL, Launch
from trtllm_cli.build.lowered import Working
from trtllm_cli.graph import Node

# Of a step in which it is so. FP8's programs each norm and quantize all tokens' inputs: of two that takes longer than a
# kernel of its own, in whole steps on an H200.
MOST_TOKENS = {"bf16": 8, "fp8": 1, "int4": 8}


@dataclass(frozen=True)
class NormBetween:
    """Nodes that follow each other, the last with its gated activation, and the linears' tactics for few tokens."""

    before: Node
    reduce: Node | None
    norm: Node
    after: Node
    act: Node | None
    ways: list[tuple[int, Tactic, Tactic]]  # (most tokens, before's, after's), ascending

    @property
    def nodes(self) -> list[Node]:
        """That have steps: a sum's is the norm's."""
        return [self.before, self.norm, self.act or self.after]

    @property
    def most(self) -> int:
        """Tokens up to which it is so."""
        return self.ways[-1][0]


@dataclass
class NormsBetween(LinearLaunches, CollectiveLaunches):
    """Steps of such nodes, before the steps of each by itself, which are for more tokens."""

    _between: dict[str, NormBetween] = field(default_factory=dict)  # by first outputs of all three

    def choose_tactics(self, working: Working | None = None) -> None:
        """Of all linears, and which norms these compute."""
        self.tactics.prepare(self.linear_shapes(), working)
        for node in self.graph.nodes:
            found = self._norm_between(node) if node.op == "linear" else None
            if found is not None:
                self._between.update({member.outputs[0]: found for member in found.nodes})

    def lower_node(self, node: Node) -> None:
        """Its steps."""
        between = self._between_of(node)
        if between is not None and node is between.before:
            self._add_step(between)
        first = len(self.steps)
        getattr(self, f"_{node.op}")(node)
        if between is not None:
            for step in self.steps[first:]:
                step["ways"].insert(0, [between.most, []])
                if "others" in step:
                    step["others"].insert(0, [])

    def computed_elsewhere(self, node: Node) -> int:
        """See LinearLaunches. Where ranks do not see each other's memory, a linear in front of a sum is by itself."""
        between = self._between_of(node)
        return between.most if between and between.reduce is None else 0

    def _between_of(self, node: Node) -> NormBetween | None:
        return self._between.get(node.outputs[0]) if node.outputs else None

    def _norm_between(self, before: Node) -> NormBetween | None:
        """The norm behind a linear, and what follows it, if both linears are to compute it."""
        reduce = self.only_reader(before.outputs[0], "all_reduce")
        norm = self._norm_after(reduce) if reduce else self.only_reader(before.outputs[0], "add_rms_norm")
        after = norm and self.only_reader(norm.outputs[0], "linear")
        if norm is None or after is None or before.outputs[0] in self._between or after.output in self.logits:
            return None  # the head has so many programs that what each does besides takes longer than a kernel
        act = self._activation_after(after)
        residual, new_residual = norm.inputs["residual"], norm.outputs[1]
        if (
            (norm.attrs.get("num_heads") or 1) > 1
            or self._fused(act) is not act
            or (act is not None and self.following[after.output] is not act)
            or [self.dtype(name) for name in (residual, new_residual)] != [RESIDUAL] * 2
            or self.ref(residual) != self.ref(new_residual)  # else this may lie where the linear's inputs are
            or self.dtype(before.output) != "bfloat16"
            or len({self.rows(node.outputs[0]) for node in (before, norm, after)}) > 1
            or norm.inputs.get("out_scale") != after.inputs.get("x_scale")
        ):
            return None
        of_before, of_after = self._few_shape(before, None), self._few_shape(after, act)
        most = self.most_rows(reduce, in_words=True) if reduce else self.build_config.max_num_tokens
        ways = self._ways_between(of_before, of_after, most)
        return NormBetween(before, reduce, norm, after, act, ways) if ways else None

    def _ways_between(self, before: LinearShape, after: LinearShape, most: int) -> list[tuple[int, Tactic, Tactic]]:
        """Where both are streamed, of at most so many tokens."""
        ways: list[tuple[int, Tactic, Tactic]] = []
        of = [self.tactics.ways(shape) for shape in (before, after)]
        limit = min(most, MOST_TOKENS.get(after.form, 0))
        for most in sorted({min(most, limit) for ways_of in of for most, _ in ways_of}):
            first, second = (next((tactic for m, tactic in ways_of if m >= most), None) for ways_of in of)
            if first is None or second is None or not {first.kernel, second.kernel} <= set(STREAMED):
                break
            if not norms(after, second):
                break
            ways.append((most, first, second))
        return ways

    def _add_step(self, between: NormBetween) -> None:
        """A step for few tokens in place of those that follow it."""
        before, reduce, norm, after, act = between.before, between.reduce, between.norm, between.after, between.act
        rows = self.rows(before.output)
        weight_type, weight = self.vector(norm.inputs["weight"])
        of_before, of_after = self._few_shape(before, None), self._few_shape(after, act)
        weights, weights_after = (self._pack(node, self._shape(node)) for node in (before, after))
        adding, exchanged = Norm(weight_type=weight_type), {}
        if reduce is not None:
            group, (args, sizes) = reduce.attrs["group"], self.exchanged_by(reduce, in_words=True)
            adding = adding._replace(ranks=len(group), rank=group.index(self.rank), staging=sizes["STAGING"])
            exchanged = {role: args[argument(role)][1] for role in RANK_ROLES}

        def launches(first: Tactic, second: Tactic) -> list[Launch]:
            adds = launch_of(of_before, first, adding)
            assert isinstance(adds.grid[0], int)
            squares = self.room("squares", 4 * between.most * adds.grid[0])
            divides = launch_of(of_after, second, Norm(squares=adds.grid[0]))
            sums = {
                "residual": self.ref(norm.inputs["residual"]), "new_residual": self.ref(norm.outputs[1]),
                "norm_weight": weight, "squares": squares, "y": self.ref(norm.inputs["x"]), **exchanged,
            }  # fmt: skip
            normed = {"x": self.ref(norm.inputs["x"]), "squares": squares, "eps": norm.attrs["eps"]}
            return [
                self._few(before, adds, weights, None, rows, sums),
                self._few(after, divides, weights_after, act, rows, normed),
            ]

        ways = [(most, launches(first, second)) for most, first, second in between.ways]
        op = "+".join(node.op for node in (before, reduce, norm, after, act) if node is not None)
        self.ways(
            op, rows, [*ways, (None, [])], without_peers=None if reduce is None else [], instead=len(between.nodes)
        )
