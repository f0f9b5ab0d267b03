"""Collectives on GPUs: our kernels over each other's memory for what is small, NCCL for what is large or far away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton

from trtllm_cli.build.backends.cuda_program import RESIDUAL, Dim, Launch
from trtllm_cli.build.backends.cuda_rows import BLOCK, RowLaunches
from trtllm_cli.errors import UnsupportedError
from trtllm_cli.graph import Node

# Bytes that a rank has in an all-reduce up to which it is one-shot (benchmarks/h200/two_gpus.py). Between two ranks it
# moves no more bytes than any other way does; among more, what a rank sends to all the others together is to be little.
ONE_SHOT = 128 << 20
ONE_SHOT_OF_MORE = 4 << 20
IN_WORDS = 512 << 10  # up to which each word has its flag, of an all-gather too
ROW_BLOCK = 4096  # elements that a program sums of what goes without
_SLOTS = 2  # calls that staging memory is for at a time
_WIDEST_NORM = 16384  # elements of a row that a program has in registers


class CollectiveLaunches(RowLaunches):
    """Launches of kernels/triton/collectives.py, and of NCCL."""

    def _all_reduce(self, node: Node) -> None:
        if self._norm_after(node) is not None:
            return
        x, width = node.inputs["x"], self.width(node.output)

        def one_shot(in_words: bool) -> Launch:
            block = min(BLOCK if in_words else ROW_BLOCK, triton.next_power_of_2(width))
            args, sizes = self.exchanged_by(node, in_words=in_words)
            return self.launch(
                "collectives", "all_reduce", [self._dim(x), -(-width // block)],
                {**args, "out_ptr": self._out(node.output)},
                BLOCK=block, WIDTH=width, PUSH=True, PULL=True, **sizes, **self._group(node),
            )  # fmt: skip

        self._reduce(node, one_shot, [self._over_group(node)])

    def _add_rms_norm(self, node: Node) -> None:
        reduce = self.producers.get(node.inputs["x"])
        if reduce is None or reduce.op != "all_reduce" or self._norm_after(reduce) is not node:
            super()._add_rms_norm(node)
            return
        width, out = self.width(node.outputs[0]), node.outputs[0]
        about = {
            "residual_ptr": self._out(node.inputs["residual"]), "weight_ptr": self.vector(node.inputs["weight"]),
            "out_ptr": self._out(out), "new_residual_ptr": self._out(node.outputs[1]), **self._steps_of(node),
            "eps": ("fp32", node.attrs["eps"]),
        }  # fmt: skip

        def one_shot(in_words: bool) -> Launch:
            args, sizes = self.exchanged_by(reduce, in_words=in_words)
            return self.launch(
                "collectives", "all_reduce_add_rms_norm", [self._dim(out)], {**args, **about},
                num_warps=16 if width >= 2048 else 4, WIDTH=width, BLOCK=triton.next_power_of_2(width),
                QUANT=self.quant_of(node), PUSH=True, PULL=True, **sizes, **self._group(reduce),
            )  # fmt: skip

        many = [self._over_group(reduce), *self.norm_launches(node, "rms_norm", few=False)]
        self._reduce(reduce, one_shot, many, op=f"{reduce.op}+{node.op}")

    def _norm_after(self, node: Node) -> Node | None:
        """The norm that is computed together with this sum: the next node, and its only reader."""
        readers = self.consumers.get(node.output, [])
        follower = self.following.get(node.output)
        if len(readers) != 1 or readers[0] is not follower or follower.op != "add_rms_norm":
            return None
        fits = self.width(node.output) <= _WIDEST_NORM and self._is_words(node)
        return follower if fits and follower.inputs["x"] == node.output else None

    def _reduce(self, node: Node, one_shot: Callable[[bool], Launch], by_nccl: list[Launch], op: str = "") -> None:
        """Few rows in words with flags, more without, what is not one-shot by NCCL."""
        ways: list[tuple[int | None, list[Launch]]] = []
        few, some = self.most_rows(node, in_words=True), self.most_rows(node, in_words=False)
        if few:
            ways.append((few, [one_shot(True)]))
        if some > few:
            ways.append((some, [one_shot(False)]))
        self.ways(op or node.op, self.rows(node.output), [*ways, (None, by_nccl)], without_peers=by_nccl)

    def most_rows(self, node: Node, *, in_words: bool) -> int:
        """Rows up to which a sum is one-shot, in words with flags or without; 0: never."""
        if not self._is_words(node):
            return 0
        others = len(node.attrs["group"]) - 1
        most = ONE_SHOT if others == 1 else ONE_SHOT_OF_MORE // others
        rows = (min(most, IN_WORDS) if in_words else most) // self._row_bytes(node.inputs["x"])
        return min(rows, self.build_config.max_num_tokens)

    def _row_bytes(self, name: str) -> int:
        return self.width(name) * self.bytes_of(name)

    def _is_words(self, node: Node) -> bool:
        """Whether a row of its input is whole words of four bytes."""
        return self._row_bytes(node.inputs["x"]) % 4 == 0

    def _all_gather(self, node: Node) -> None:
        x, group = node.inputs["x"], self._group(node)
        width = self.width(x)
        block = min(BLOCK, triton.next_power_of_2(width))
        symbol = self.rows(x)
        arrivals = self.exchanged("arrivals", 4 * group["RANKS"])
        args = {"arrivals_ptr": ("*i32", arrivals), "deltas_ptr": self.deltas(arrivals, group["RANKS"])}
        once: list[Dim] = [[symbol, 1 << 30]]  # no program where there are no rows
        sync = self.launch("collectives", "sync_ranks", once, args, num_warps=1, PUSH=True, PULL=True, **group)
        out = self._out(node.output)
        copied = {"x_ptr": self._out(x), "deltas_ptr": self.deltas(out[1], group["RANKS"]), "out_ptr": out}
        grid: list[Dim] = [self._dim(x), -(-width // block)]
        copy = self.launch("collectives", "all_gather", grid, copied, WIDTH=width, BLOCK=block, **group)
        ways: list[tuple[int | None, list[Launch]]] = [(None, [sync, copy, sync])]
        few = min(IN_WORDS // self._row_bytes(node.inputs["x"]), self.build_config.max_batch_size)
        if few and self._reduces and self._is_words(node):
            ways.insert(0, (few, [self._gathered_in_words(node, few)]))
        self.ways(node.op, symbol, ways, without_peers=[self._over_group(node)])

    def _gathered_in_words(self, node: Node, rows: int) -> Launch:
        """Of so many rows at most; an all-reduce of the step is in front."""
        x, out, group = node.inputs["x"], node.output, self._group(node)
        words = self._row_bytes(x) // 4
        staging = -(-rows * words // 4) * 4
        ref = self.exchanged(f"gathered words of {4 * words}", (group["RANKS"] - 1) * staging * 8)
        args: dict[str, tuple[str, Any]] = {
            "x_ptr": ("*i32", self.ref(x)), "staging_ptr": ("*i64", ref), "step_ptr": ("*i32", "i:step"),
            "deltas_ptr": self.deltas(ref, group["RANKS"]), "out_ptr": ("*i32", self.ref(out)),
        }  # fmt: skip
        block = min(BLOCK, triton.next_power_of_2(words))
        return self.launch(
            "collectives", "all_gather_words", [self._dim(out), -(-words // block)], args, WORDS=words, STAGING=staging,
            BLOCK=block, PUSH=True, PULL=True, **group,
        )  # fmt: skip

    def _send(self, node: Node) -> None:
        x = node.inputs["x"]
        if self.dtype(x) != RESIDUAL:
            raise UnsupportedError(
                f"{self.graph.name}: what one stage hands to the next is not the residual stream",
                fix="convert without --pp-size, or build for CPUs: --backend cpu",
            )
        self.step(node.op, [self._call(node, x, x=self.ref(x), whom=node.attrs["to"])])

    def _recv(self, node: Node) -> None:
        y = node.output
        self.step(node.op, [self._call(node, y, y=self.ref(y), whom=node.attrs["source"])])

    def _over_group(self, node: Node) -> Launch:
        x = node.inputs["x"]
        return self._call(node, x, x=self.ref(x), y=self.ref(node.output), whom=node.attrs["group"])

    def _call(self, node: Node, tensor: str, **operands: Any) -> Launch:
        """A call of NCCL on what is like `tensor`."""
        about = {"rows": self.rows(tensor), "width": self.width(tensor), "dtype": self.dtype(tensor)}
        return {"call": node.op, **about, **operands}

    def _group(self, node: Node) -> dict[str, Any]:
        group = node.attrs["group"]
        return {"RANKS": len(group), "RANK": group.index(self.rank)}

    def exchanged_by(self, node: Node, *, in_words: bool) -> tuple[dict[str, tuple[str, Any]], dict[str, Any]]:
        """What a one-shot all-reduce reads and where it exchanges it, and how large that is."""
        # Whose turn a slot is follows from the calls before, of which steps leave out an even number (gather_early).
        others, rows = len(node.attrs["group"]) - 1, self.most_rows(node, in_words=in_words)
        row_bytes, width = self._row_bytes(node.inputs["x"]), self.width(node.output)
        # All that share memory agree on where things lie there: a sum's programs may be fewer than there are flags.
        sizes = {
            "STAGING": -(-rows * row_bytes // 16) * 4,
            "FLAGS": 0 if in_words else rows * -(-width // ROW_BLOCK),
        }
        words = 2 * sizes["STAGING"] if in_words else sizes["STAGING"] + sizes["FLAGS"]
        name = f"{'words' if in_words else 'rows'} of {row_bytes}"
        staging = self.exchanged(name, _SLOTS * others * words * 4)
        args = {
            "x_ptr": self._out(node.inputs["x"]), "staging_ptr": ("*i64" if in_words else "*i32", staging),
            "deltas_ptr": self.deltas(staging, others + 1), "step_ptr": ("*i32", "i:step"),
            "calls": ("i32", len(self._reduces)), "call": ("i32", self._reduces.index(node.output)),
        }  # fmt: skip
        return args, sizes

    @property
    def _reduces(self) -> list[str]:
        """The step's all-reduces, which number their calls."""
        return [node.output for node in self.graph.nodes if node.op == "all_reduce"]
