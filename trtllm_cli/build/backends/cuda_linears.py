"""Which kernel computes a linear for few tokens, with which tiles; for more the runtime calls cuBLASLt.

_SHIPPED is what was the fastest on an H200 (benchmarks/h200/step_sweep.py and linear_sweep.py print its rows), compiled
by Triton 3.6; of what others compile it is the best guess. cuda_tactics.py puts what was measured for a shape itself,
with the Triton that is installed, in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import gcd, log2
from typing import Literal, NamedTuple

import torch

from trtllm_cli.kernels.cuda.kernel import Constant, KernelSource, room_for_tiles, stages_that_fit

Form = Literal["bf16", "fp8", "int8", "int4"]
PerWhat = Literal["none", "one", "row", "group"]
Dim = int | tuple[str, int]  # a number, or a symbol and how many of it a program takes

KERNEL_MODULES = ("linear", "stream_linear", "stream_words", "wide_linear", "wide_words")
STREAMS = "sm_90a"  # the architecture whose instructions these multiply by, their weights asked for ahead of time:
STREAMED = ("stream", "words")  # which compute norms too
AHEAD = (*STREAMED, "wide")
KERNELS = (*AHEAD, "vector", "skinny", "fragment")
MOST_TOKENS = 256  # that any of the kernels here is for: those whose tiles have 128
_MOST_IN_SMALL_TILES = 64  # that the others are for
COUNTERS = 8192  # kernels/triton/linear.py's
_PIECE = 128  # inputs of wide_words, bytes of the other kernels'
_FEWEST_PROGRAMS = 64  # that are worth streaming weights for: fewer leave most multiprocessors without any


@dataclass(frozen=True)
class LinearShape:
    """Everything about a linear that its kernel is specialized for. `n` counts both halves of a gated one."""

    form: Form
    n: int
    k: int
    group: int = 0  # inputs that share a scale, of int8 (0: all) and int4: 32, 64 or 128; of fp8 with scales of groups
    has_zero: bool = False
    w_scale: PerWhat = "none"
    x_scale: PerWhat = "none"
    has_bias: bool = False
    gated: str = ""  # the activation
    x_type: str = "*bf16"
    bias_type: str = "*bf16"
    out_type: str = "*bf16"


@dataclass(frozen=True)
class LinearLaunch:
    """A kernel and its grid; `operands` are the roles of its arguments, in order."""

    source: KernelSource
    grid: tuple[Dim, ...]
    operands: tuple[str, ...]
    scratch: int = 0  # bytes, role "scratch"; the first 4 * COUNTERS are zero at first, and the kernel leaves them zero


class Norm(NamedTuple):
    """What a streamed linear computes of the RMS norms behind it and in front of it (kernels/triton/stream_linear.py).

    Behind it `weight_type`, Triton's type of that norm's weight; in front `squares`, sums that a token's row has. What
    is in front of a norm may be summed over `ranks`, of which this is `rank`, with so many words of `staging` memory.
    """

    weight_type: str = ""
    squares: int = 0
    ranks: int = 1
    rank: int = 0
    staging: int = 0

    @property
    def constants(self) -> dict[str, Constant]:
        """Of the kernels."""
        meets = self.ranks > 1
        return {
            "SUMS": bool(self.weight_type), "SQUARES": self.squares, "RANKS": self.ranks, "RANK": self.rank,
            "STAGING": self.staging, "PUSH": meets, "PULL": meets,
        }  # fmt: skip


_NO_NORM = Norm()


class Tactic(NamedTuple):
    """A kernel, and its tiles as its function below takes them."""

    kernel: str  # one of KERNELS
    tiles: tuple[int, ...]

    def __str__(self) -> str:
        return " ".join(map(str, (self.kernel, *self.tiles)))


_Table = dict[tuple[int, int, bool], list[tuple[int, str, tuple[int, ...]]]]
# By form, then by outputs, inputs and whether gated, of Llama-3.1-8B (and 1B): most tokens, kernel, tiles. Left out is
# what cuBLASLt does as fast within 3%, with the 3 us that a gated activation by itself takes; int8 and int4 compete
# with cuBLASLt on dequantized weights. Up to 8 tokens what counts is a whole step's time: what takes less of a
# multiprocessor has more of its weights on their way when the kernel in front ends, and kernels that are the fastest by
# themselves make steps up to 10% longer. Of several for as many tokens it is the first that shape and architecture
# allow.
_SHIPPED: dict[str, _Table] = {
    "bf16": {
        (6144, 4096, False): [
            (1, "stream", (1, 8, 3, 1, 4)), (2, "stream", (2, 4, 4, 1, 4)),
            (4, "stream", (4, 4, 6, 1, 4)), (8, "stream", (8, 2, 6, 1, 4)),
        ],
        (4096, 4096, False): [
            (1, "stream", (1, 8, 4, 1, 4)), (2, "stream", (2, 4, 4, 1, 4)),
            (4, "stream", (4, 4, 6, 1, 4)), (8, "stream", (8, 2, 6, 1, 4)),
            (16, "skinny", (16, 64, 128, 2, 5, 4)),
        ],
        (14336, 4096, True): [
            (1, "stream", (1, 8, 6, 1, 4)), (2, "stream", (2, 4, 6, 1, 4)),
            (4, "stream", (4, 4, 4, 1, 4)), (8, "stream", (8, 4, 4, 1, 4)),
            (16, "skinny", (16, 64, 128, 1, 5, 4)), (64, "skinny", (64, 64, 128, 1, 4, 4)),
        ],
        (4096, 14336, False): [
            (1, "stream", (1, 8, 6, 1, 4)), (2, "stream", (2, 4, 4, 1, 4)),
            (4, "stream", (4, 2, 6, 1, 4)), (8, "stream", (8, 4, 4, 1, 4)),
            (16, "skinny", (16, 64, 128, 2, 5, 4)), (64, "skinny", (64, 64, 128, 2, 4, 4)),
        ],
        (128256, 4096, False): [(1, "stream", (1, 8, 2, 1, 4)), (2, "vector", (2, 4, 1024, 4, 2))],
        (8192, 2048, True): [
            (1, "stream", (1, 8, 3, 1, 4)), (2, "stream", (2, 4, 6, 1, 4)),
            (4, "stream", (4, 4, 4, 1, 4)), (8, "stream", (8, 4, 4, 1, 4)),
            (16, "skinny", (16, 64, 128, 1, 5, 4)), (64, "skinny", (64, 64, 128, 1, 4, 4)),
        ],
        (2048, 8192, False): [
            (1, "stream", (1, 8, 8, 1, 4)), (2, "stream", (2, 4, 4, 1, 4)),
            (4, "stream", (4, 2, 6, 1, 4)), (8, "stream", (8, 4, 4, 1, 4)),
            (16, "skinny", (16, 64, 128, 2, 5, 4)), (64, "skinny", (64, 64, 128, 2, 4, 4)),
        ],
    },
    "fp8": {
        (6144, 4096, False): [
            (1, "stream", (1, 8, 2, 1, 4)), (2, "stream", (2, 4, 6, 1, 4)),
            (4, "stream", (4, 4, 4, 1, 4)), (8, "stream", (8, 4, 4, 1, 4)),
            (16, "stream", (16, 2, 6, 1, 4)), (32, "wide", (32, 1, 6, 1, 1, 4)), (64, "wide", (64, 1, 6, 1, 1, 4)),
        ],
        (4096, 4096, False): [
            (1, "stream", (1, 8, 1, 4, 4)), (2, "stream", (2, 4, 6, 1, 4)),
            (4, "stream", (4, 4, 6, 1, 4)), (8, "stream", (8, 2, 6, 1, 4)),
            (16, "stream", (16, 2, 6, 1, 4)),
        ],
        (14336, 4096, True): [
            (1, "stream", (1, 8, 1, 4, 4)), (2, "stream", (2, 4, 3, 1, 4)),
            (4, "stream", (4, 4, 3, 1, 4)), (8, "stream", (8, 2, 6, 1, 4)),
            (16, "stream", (16, 2, 4, 1, 4)), (32, "skinny", (64, 64, 128, 1, 5, 4)),
            (64, "wide", (64, 1, 4, 1, 1, 4)), (64, "skinny", (64, 64, 128, 1, 5, 4)),
        ],
        (4096, 14336, False): [
            (1, "stream", (1, 8, 3, 2, 4)), (2, "stream", (2, 4, 4, 1, 4)),
            (4, "stream", (4, 2, 6, 1, 4)), (8, "stream", (8, 4, 4, 1, 4)),
            (16, "stream", (16, 2, 6, 1, 4)),
        ],
    },
    "int4": {
        (6144, 4096, False): [
            (1, "words", (1, 6, 1, 4)), (2, "words", (2, 8, 1, 4)), (8, "fragment", (8, 1, 2, 2, 1, 8)),
            (16, "wide", (16, 1, 4, 2, 4, 4)), (32, "wide", (32, 1, 3, 2, 4, 4)), (32, "fragment", (16, 1, 2, 4, 1, 4)),
            (64, "wide", (64, 1, 2, 2, 2, 8)), (256, "wide", (128, 1, 4, 1, 2, 8)),
        ],
        (4096, 4096, False): [
            (1, "words", (1, 2, 2, 8)), (2, "words", (2, 8, 1, 4)), (8, "fragment", (8, 1, 2, 4, 1, 8)),
            (16, "wide", (16, 1, 4, 2, 4, 4)), (16, "fragment", (16, 1, 2, 2, 1, 8)),
            (32, "wide", (32, 1, 2, 2, 4, 8)), (32, "fragment", (32, 1, 1, 4, 1, 8)),
            (64, "wide", (64, 1, 3, 1, 4, 8)), (128, "wide", (128, 1, 4, 1, 4, 8)),
            (256, "wide", (128, 1, 4, 1, 2, 8)),
        ],
        (14336, 4096, True): [
            (1, "words", (1, 4, 1, 4)), (2, "words", (2, 4, 1, 4)), (8, "fragment", (8, 1, 2, 2, 1, 2)),
            (16, "wide", (16, 1, 4, 1, 2, 4)), (16, "fragment", (16, 1, 1, 2, 1, 4)),
            (32, "wide", (32, 1, 4, 1, 1, 8)), (64, "wide", (64, 1, 3, 1, 1, 8)), (64, "fragment", (32, 2, 1, 1, 1, 4)),
            (256, "wide", (128, 1, 3, 1, 1, 8)),
        ],
        (4096, 14336, False): [
            (1, "words", (1, 7, 1, 8)), (2, "words", (2, 8, 1, 4)), (8, "fragment", (8, 1, 2, 4, 1, 8)),
            (16, "wide", (16, 1, 4, 2, 4, 4)), (16, "fragment", (16, 1, 2, 2, 1, 8)),
            (32, "wide", (32, 1, 2, 2, 4, 8)), (64, "wide", (64, 1, 2, 2, 4, 8)), (64, "fragment", (32, 2, 1, 2, 1, 8)),
            (256, "wide", (128, 1, 2, 2, 4, 8)),
        ],
    },
    "fp8 group": {
        (4096, 4096, False): [
            (16, "skinny", (16, 64, 128, 4, 5, 4)), (32, "skinny", (32, 64, 128, 4, 5, 4)),
            (64, "skinny", (64, 64, 128, 4, 4, 4)),
        ],
        (14336, 4096, True): [
            (16, "skinny", (16, 64, 128, 1, 6, 4)), (32, "skinny", (32, 64, 128, 1, 5, 4)),
            (64, "skinny", (64, 64, 128, 2, 4, 4)),
        ],
    },
}  # fmt: skip


def shipped_tactics(shape: LinearShape, arch: str = STREAMS) -> list[tuple[int, Tactic]]:
    """(most tokens, tactic), ascending: of the nearest shape that ships; beyond the last one cuBLASLt is faster."""
    outputs, gated = _outputs(shape), bool(shape.gated)

    def distance(measured: tuple[int, int, bool]) -> float:
        return abs(log2(measured[0] / outputs)) + abs(log2(measured[1] / shape.k)) + 100 * (measured[2] != gated)

    table = _table(shape)
    ways: list[tuple[int, Tactic]] = []
    for most, kernel, tiles in table[min(table, key=distance)]:
        if ways and ways[-1][0] == most:
            continue
        tactic = adapted(shape, Tactic(kernel, tiles)) if kernel not in AHEAD or arch == STREAMS else None
        if tactic is None and kernel == "stream":
            plain = _without_streams(shape, most)
            tactic = plain and adapted(shape, plain)
        if tactic is not None:
            ways = [*(way for way in ways if way[1] != tactic), (most, tactic)]
    return ways


def chosen_by_steps(shape: LinearShape, tokens: int) -> Tactic | None:
    """The streamed tactic that made whole steps of this very shape the shortest, if one did."""
    for most, kernel, tiles in _table(shape).get((_outputs(shape), shape.k, bool(shape.gated)), []):
        if tokens <= most:
            return adapted(shape, Tactic(kernel, tiles)) if kernel in AHEAD else None
    return None


def _table(shape: LinearShape) -> _Table:
    """What ships for its form."""
    return _SHIPPED["int4" if weight_only(shape) else "fp8 group" if is_grouped(shape) else shape.form]


def _without_streams(shape: LinearShape, tokens: int) -> Tactic | None:
    """What takes the place of stream_linear where the shape or the architecture does not allow it."""
    if tokens <= 2:
        return Tactic("vector", (tokens, 2, 2048, 4, 2))
    return Tactic("fragment", (8, 1, 1, 4, 1, 8)) if shape.form == "fp8" and tokens <= 8 else None


def adapted(shape: LinearShape, tactic: Tactic) -> Tactic | None:
    """The kernel with tiles that this shape allows, or None."""
    if is_grouped(shape) and (tactic.kernel != "skinny" or tactic.tiles[2] != shape.group):
        return None
    if tactic.kernel == "stream":
        bm, parts, stages, pieces, warps = tactic.tiles
        if not _streams(shape, parts, warps):
            bm, parts = 2 * bm, parts // 2  # as wide a product, of rows that are no whole pieces for so many parts
        if not _streams(shape, parts, warps):
            return None
        stages, pieces = _in_whole_rounds(_pieces(shape) // parts, stages, pieces)
        if stages == 1 and _pieces(shape) > parts * pieces:
            stages = 2  # as not all is one round
        tiles = (bm, parts, stages, pieces, warps)
        return Tactic("stream", tiles) if _stream_fits(shape, *tiles) else None
    if tactic.kernel == "words":
        bm, stages, groups, warps = tactic.tiles
        if _word_groups(shape, warps) < 2:
            warps = 4
        of_warp = _word_groups(shape, warps)
        stages, groups = _in_whole_rounds(of_warp, stages, groups if of_warp > groups else 1)
        return Tactic("words", (bm, stages, groups, warps)) if _words_fit(shape, bm, stages, groups, warps) else None
    if tactic.kernel == "wide":
        return _adapted_wide(shape, *tactic.tiles)
    if tactic.kernel == "vector":
        bm, bn, bk, *rest = tactic.tiles
        while shape.k % bk and bk > 64:
            bn, bk = 2 * bn, bk // 2
        return None if shape.k % bk else Tactic("vector", (bm, bn, bk, *rest))
    if tactic.kernel == "skinny":
        bm, bn, bk, split, *rest = tactic.tiles
        return Tactic("skinny", (bm, bn, bk, split if _split_fits(shape, bm, bn) else 1, *rest))
    bm, r, u, depth, split, warps = tactic.tiles
    if shape.k % 16:
        return None
    if shape.form == "int8" or (weight_only(shape) and _group(shape) % (64 * u) and _group(shape) != shape.k):
        u = 1  # a round of int8 then has as many bytes as one of int4, or groups are short
    return Tactic("fragment", (bm, r, u, depth, split if _split_fits(shape, bm, 16 * r) else 1, warps))


def _adapted_wide(
    shape: LinearShape, bm: int, r: int, stages: int, pieces: int, split: int, warps: int
) -> Tactic | None:  # fmt: skip
    """Programs with fewer outputs, smaller rounds, and fewer programs to a sum, if need be."""
    of_row, fewest = _wide_pieces(shape), 1 if shape.form == "int4" else 3  # stages
    while _outputs(shape) % (16 * warps * r) and (r, warps) != (1, 4):
        r, warps = (r // 2, warps) if r > 1 else (r, warps // 2)
    pieces = gcd(pieces, of_row)
    split = gcd(split, of_row // pieces) if _split_fits(shape, bm, 16 * warps * r) else 1
    stages = min(stages, of_row // (pieces * split))
    fits = fewest <= stages and _wide_room(shape, bm, r, stages, pieces, warps) <= room_for_tiles(STREAMS)
    fits = fits and _has_programs(shape, 16 * warps * r, split)
    return Tactic("wide", (bm, r, stages, pieces, split, warps)) if fits else None


def _in_whole_rounds(count: int, stages: int, of_round: int) -> tuple[int, int]:
    """As much under way of so many pieces, in rounds of fewer if need be, that are all whole."""
    fewer = gcd(count, of_round)
    return min(stages * of_round // fewer, count // fewer), fewer


def fitted(shape: LinearShape, tactic: Tactic, arch: str) -> Tactic:
    """The tactic with no more stages than the architecture's shared memory has room for."""
    if tactic.kernel != "skinny":
        return tactic
    bm, bn, bk, split, stages, warps = tactic.tiles
    tiles = (bm + (2 * bn if shape.gated else bn)) * bk * (1 if shape.form == "fp8" else 2)
    return Tactic("skinny", (bm, bn, bk, split, stages_that_fit(arch, stages, tiles), warps))


def launch_of(shape: LinearShape, tactic: Tactic, norm: Norm = _NO_NORM) -> LinearLaunch:
    """The launch of a tactic that is adapted to the shape; of a streamed one also with norms."""
    if tactic.kernel in STREAMED:
        return (stream if tactic.kernel == "stream" else words)(shape, *tactic.tiles, norm=norm)
    assert norm == _NO_NORM
    make: dict[str, Callable[..., LinearLaunch]] = {
        "wide": wide, "vector": vector, "skinny": skinny, "fragment": fragment,
    }  # fmt: skip
    return make[tactic.kernel](shape, *tactic.tiles)


def is_grouped(shape: LinearShape) -> bool:
    """Whether weights and inputs are FP8 with scales of groups of inputs."""
    return shape.w_scale == "group"


def for_many(shape: LinearShape) -> Tactic:
    """For any number of tokens of what cuBLASLt does not compute: FP8 with scales of groups."""
    return Tactic("skinny", (128, 64, shape.group, 1, 4, 8 if shape.gated else 4))


def weight_only(shape: LinearShape) -> bool:
    """Whether the weight is packed for the kernels, and cuBLASLt needs it dequantized."""
    return shape.form in ("int8", "int4")


def pack_weight(shape: LinearShape, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A weight's tensors by role as the kernels read them.

    int8 and int4 become pieces in the order of kernels/triton/linear.py, their scales (and zeros) [ceil(N / 16),
    groups, 16], one group where there is a scale per output. Scales of FP8's groups become [groups, N].
    """
    packed = dict(parts)
    if is_grouped(shape):
        packed["scale"] = parts["scale"].float().t().contiguous()
    if not weight_only(shape):
        return packed
    weight = parts["weight"]
    rows, columns = _up(shape.n, 16), _up(shape.k, 64)
    if shape.form == "int4":
        numbers = weight.new_zeros(rows, columns)
        numbers[: shape.n, : 2 * weight.shape[1]] = torch.stack([weight & 15, weight >> 4], -1).flatten(1)
        # outputs as [blocks, 2, 8], of the second the two are in a byte; inputs as [pieces, 2, 4, 2, 2, 2]
        parted = numbers.unflatten(1, (-1, 2, 4, 2, 2, 2)).unflatten(0, (-1, 2, 8))
        pieces = (parted[:, 0] | parted[:, 1] << 4).permute(0, 2, 1, 4, 3, 6, 7, 5)
    else:
        numbers = torch.zeros(rows, columns, dtype=torch.uint8, device=weight.device)
        numbers[: shape.n, : shape.k] = weight.view(torch.uint8)
        # outputs as [blocks, 2, 8], inputs as [pieces, 4, 2, 2, 2]
        pieces = numbers.unflatten(1, (-1, 4, 2, 2, 2)).unflatten(0, (-1, 2, 8)).permute(0, 3, 2, 4, 6, 1, 7, 5)
    packed["weight"] = pieces.contiguous().flatten()
    for role in ("scale", "zero"):
        if role in parts:
            values = parts[role].float().reshape(shape.n, -1)
            padded = values.new_ones(rows, values.shape[1])
            padded[: shape.n] = values
            packed[role] = padded.unflatten(0, (-1, 16)).transpose(1, 2).contiguous()
    return packed


def packed_tensors(shape: LinearShape) -> dict[str, torch.Tensor]:
    """A packed weight's tensors by role, without numbers."""

    def empty(dtype: torch.dtype, *size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    n, k = shape.n, shape.k
    groups = empty(torch.float32, n, k // _group(shape))
    match shape.form:
        case "bf16":
            parts = {"weight": empty(torch.bfloat16, n, k)}
        case "fp8":
            scales = groups if is_grouped(shape) else empty(torch.float32, 1 if shape.w_scale == "one" else n)
            parts = {"weight": empty(torch.float8_e4m3fn, n, k), "scale": scales}
        case "int8":
            parts = {"weight": empty(torch.int8, n, k), "scale": groups}
        case "int4":
            parts = {"weight": empty(torch.uint8, n, k // 2), "scale": groups}
            if shape.has_zero:
                parts["zero"] = groups
    return pack_weight(shape, parts)


def dequantized(shape: LinearShape) -> LinearLaunch:
    """The kernel that writes int8 or int4 weights as bf16 [N, K], role "out"."""
    roles = ("w", "w_scale", "w_zero", "out")
    u = 2 if _group(shape) % 128 == 0 or _group(shape) == shape.k else 1
    source = KernelSource.of(
        "linear", "dequantize_weight", _args(shape, roles), num_warps=4, num_stages=1, N=shape.n, K=shape.k, U=u,
        FORM=shape.form, GROUP=_group(shape), HAS_ZERO=shape.has_zero, PDL=True,
    )  # fmt: skip
    return LinearLaunch(source, (-(-shape.n // 16), -(-shape.k // (64 * u))), roles)


def _pieces(shape: LinearShape) -> int:
    """Of 128 bytes in a row of bf16 or fp8 weights; 0 where they are no whole ones."""
    pieces, rest = divmod(shape.k * (1 if shape.form == "fp8" else 2), 128)
    return 0 if rest else pieces


def _streams(shape: LinearShape, parts: int, warps: int) -> bool:
    """Whether stream_linear takes the shape with rows in so many parts, each of two pieces at least."""
    if not _is_plain(shape) or parts == 0:
        return False
    pieces = _pieces(shape)
    return pieces >= 2 * parts and pieces % parts == 0 and _has_programs(shape, 16 * warps // parts)


def _is_plain(shape: LinearShape) -> bool:
    """Whether tensor cores multiply weights and inputs as they are, and what they sum is one scale's."""
    return not is_grouped(shape) and shape.x_type == {"bf16": "*bf16", "fp8": "*fp8e4nv"}.get(shape.form)


def _stream_fits(shape: LinearShape, bm: int, parts: int, stages: int, pieces: int, warps: int) -> bool:
    """Whether rows are whole rounds, more than one if not all of them are under way, and what is has room."""
    rounds, rest = divmod(_pieces(shape) // parts, pieces)
    inputs = 128 * parts * bm * stages * pieces
    fits = _weights_under_way(shape, stages * pieces, warps) + inputs <= room_for_tiles(STREAMS)
    return fits and rest == 0 and (stages > 1 or rounds == 1)


def norms(shape: LinearShape, tactic: Tactic) -> bool:
    """Whether a streamed tactic can norm its inputs: FP8's are quantized before the products, and all need room."""
    if shape.form != "fp8":
        return True
    bm, _, stages, pieces, warps = tactic.tiles
    room = _weights_under_way(shape, stages * pieces, warps) + bm * shape.k
    return shape.x_scale == "one" and room <= room_for_tiles(STREAMS)


def _weights_under_way(shape: LinearShape, pieces: int, warps: int) -> int:
    """Bytes of a program's weights in shared memory, so many pieces of each row."""
    return 128 * 16 * warps * (2 if shape.gated else 1) * pieces


def _word_groups(shape: LinearShape, warps: int) -> int:
    """Groups of inputs that each warp has of int4 weights; 0 where stream_words does not take them."""
    if shape.form != "int4" or shape.group not in (64, 128) or shape.x_type != "*bf16":
        return 0
    groups, rest = divmod(shape.k, warps * shape.group)
    return 0 if rest else groups


def _words_fit(shape: LinearShape, bm: int, stages: int, groups: int, warps: int) -> bool:
    """Whether stream_words computes the shape, and all of x has room beside the weights."""
    of_warp, halves = _word_groups(shape, warps), 2 if shape.gated else 1
    scales = halves * 64 * warps * (1 << max(of_warp - 1, 0).bit_length())
    scales, sums = (2 * scales, 2) if shape.has_zero else (scales, 1)
    inputs = bm * (2 * shape.k + 4 * sums * warps * of_warp)  # and their steps and sums
    room = stages * groups * halves * 8 * warps * shape.group + scales + inputs
    fits = room <= room_for_tiles(STREAMS) and of_warp % groups == 0
    return fits and stages > 1 and _has_programs(shape, 16)


def _wide_pieces(shape: LinearShape) -> int:
    """Of a row's inputs for wide_words or wide_linear; 0 where they do not take the shape."""
    if shape.form == "int4":
        takes = shape.group in (32, 64, 128) and shape.x_type == "*bf16" and shape.k % _PIECE == 0
        return shape.k // _PIECE if takes else 0
    return _pieces(shape) if _is_plain(shape) else 0


def _wide_room(shape: LinearShape, bm: int, r: int, stages: int, pieces: int, warps: int) -> int:
    """Bytes of shared memory that they have their tiles in."""
    if shape.form != "int4":
        return _weights_under_way(shape, stages * pieces * r, warps) + stages * pieces * (_PIECE * bm)
    blocks = r * warps * (2 if shape.gated else 1)
    scales = 64 * (_PIECE // shape.group) * (2 if shape.has_zero else 1)
    return stages * pieces * blocks * (8 * _PIECE + scales) + 2 * pieces * (2 * _PIECE * bm)


def _has_programs(shape: LinearShape, outputs: int, split: int = 1) -> bool:
    """Whether the shape gives programs of so many outputs, `split` of them to a sum, enough to do."""
    programs, rest = divmod(_outputs(shape), outputs)
    return rest == 0 and programs * split >= _FEWEST_PROGRAMS


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _outputs(shape: LinearShape) -> int:
    return shape.n // 2 if shape.gated else shape.n


def _group(shape: LinearShape) -> int:
    return shape.group or shape.k


def _split_fits(shape: LinearShape, bm: int, bn: int) -> bool:
    """Whether there are counters for all output tiles."""
    return -(-_outputs(shape) // bn) * _tiles_of_tokens(bm) <= COUNTERS


def _tiles_of_tokens(bm: int) -> int:
    """At most, of so many tokens each."""
    return -(-(MOST_TOKENS if bm >= 128 else _MOST_IN_SMALL_TILES) // bm)


_TYPES = {
    "w_scale": "*fp32", "w_zero": "*fp32", "x_scale": "*fp32", "out_scale": "*fp32", "scratch": "*fp32", "out": "*bf16",
    "residual": "*fp32", "new_residual": "*fp32", "squares": "*fp32", "eps": "fp32", "num_tokens": "i32",
    "staging": "*i64", "deltas": "*i64", "step": "*i32", "calls": "i32", "call": "i32",
}  # fmt: skip
_NORM_ROLES = ("residual", "new_residual", "norm_weight", "squares", "eps")
RANK_ROLES = ("staging", "deltas", "step", "calls", "call")  # of collectives.py
_NUMBERS = ("num_tokens", "eps", "calls", "call")


def argument(role: str) -> str:
    """The name of a kernel's argument."""
    return role if role in _NUMBERS else f"{role}_ptr"


def _args(shape: LinearShape, roles: tuple[str, ...], norm: Norm = _NO_NORM) -> dict[str, str]:
    plain = {"bf16": "*bf16", "fp8": "*fp8e4nv", "int8": "*i32", "int4": "*i32"}[shape.form]
    types = {
        **_TYPES, "x": "*bf16" if norm.squares else shape.x_type, "w": plain, "bias": shape.bias_type,
        "y": shape.out_type, "norm_weight": norm.weight_type or "*bf16",
    }  # fmt: skip
    return {argument(role): types[role] for role in roles}


def _common(shape: LinearShape) -> dict[str, Constant]:
    return {
        "N": shape.n, "K": shape.k, "W_SCALE": shape.w_scale, "X_SCALE": shape.x_scale, "HAS_BIAS": shape.has_bias,
        "GATED": shape.gated, "PDL": True,
    }  # fmt: skip


def _of_words(shape: LinearShape) -> dict[str, Constant]:
    """_common of kernels for int4 alone."""
    return {name: value for name, value in _common(shape).items() if name not in ("W_SCALE", "X_SCALE")}


def _scratch(shape: LinearShape, outputs: int, tokens: int, split: int) -> int:
    """Bytes of a launch with tiles [outputs, tokens]."""
    if split == 1:
        return 0
    assert _split_fits(shape, tokens, outputs), "too many output tiles"
    tiles = -(-_outputs(shape) // outputs) * _tiles_of_tokens(tokens)
    return 4 * (COUNTERS + tiles * split * outputs * tokens * (2 if shape.gated else 1))


def stream(
    shape: LinearShape, bm: int, parts: int, stages: int, pieces: int, warps: int, *, norm: Norm
) -> LinearLaunch:  # fmt: skip
    """Tiles [16 warps / parts outputs, bm tokens], bf16 or fp8.

    Of each row's parts `stages` times so many `pieces` are under way to shared memory.
    """
    roles = ("x", "w", "w_scale", "x_scale", "bias", "out_scale", "y", *_NORM_ROLES, "num_tokens", *RANK_ROLES)
    source = KernelSource.of(
        "stream_linear", "stream_linear", _args(shape, roles, norm), num_warps=warps, num_stages=1, BM=bm, PARTS=parts,
        STAGES=stages, ROUND=pieces, **norm.constants, **_common(shape),
    )  # fmt: skip
    return LinearLaunch(source, (_outputs(shape) * parts // (16 * warps), ("num_tokens", bm)), roles)


def words(shape: LinearShape, bm: int, stages: int, groups: int, warps: int, *, norm: Norm) -> LinearLaunch:
    """Tiles [16 outputs, bm tokens], int4, a part of the inputs a warp.

    Of each part `stages` times so many `groups` are under way to shared memory.
    """
    roles = ("x", "w", "w_scale", "w_zero", "bias", "out_scale", "y", *_NORM_ROLES, "num_tokens", *RANK_ROLES)
    source = KernelSource.of(
        "stream_words", "stream_words", _args(shape, roles, norm), num_warps=warps, num_stages=1, BM=bm, STAGES=stages,
        ROUND=groups, GROUP=shape.group, HAS_ZERO=shape.has_zero, **norm.constants, **_of_words(shape),
    )  # fmt: skip
    return LinearLaunch(source, (_outputs(shape) // 16, ("num_tokens", bm)), roles)


def wide(
    shape: LinearShape, bm: int, r: int, stages: int, pieces: int, split: int, warps: int
) -> LinearLaunch:  # fmt: skip
    """Tiles [16 r warps outputs, bm tokens], bf16, fp8 or int4; `stages` times so many `pieces` have room."""
    of_weight, name, common = ("w_scale", "x_scale"), "wide_linear", _common(shape)
    if shape.form == "int4":
        of_weight, name = ("w_scale", "w_zero"), "wide_words"
        common = {**_of_words(shape), "GROUP": shape.group, "HAS_ZERO": shape.has_zero}
    roles = ("x", "w", *of_weight, "bias", "out_scale", "scratch", "y", "num_tokens")
    source = KernelSource.of(
        name, name, _args(shape, roles), num_warps=warps, num_stages=1, BM=bm, R=r, STAGES=stages, ROUND=pieces,
        SPLIT=split, **common,
    )  # fmt: skip
    grid = (split, ("num_tokens", bm), _outputs(shape) // (16 * r * warps))
    return LinearLaunch(source, grid, roles, _scratch(shape, 16 * r * warps, bm, split))


def vector(shape: LinearShape, bm: int, bn: int, bk: int, warps: int, depth: int) -> LinearLaunch:
    """At most bm tokens, bf16 or fp8, tiles [bn, bk], `depth` of them in flight."""
    roles = ("x", "w", "w_scale", "x_scale", "bias", "out_scale", "y", "num_tokens")
    source = KernelSource.of(
        "linear", "vector_linear", _args(shape, roles), num_warps=warps, num_stages=1, BM=bm, BN=bn, BK=bk,
        DEPTH=depth, **_common(shape),
    )  # fmt: skip
    return LinearLaunch(source, (-(-_outputs(shape) // bn), 1), roles)


def skinny(shape: LinearShape, bm: int, bn: int, bk: int, split: int, stages: int, warps: int) -> LinearLaunch:
    """Tiles [bn outputs, bm tokens] through shared memory, bf16 or fp8."""
    roles = ("x", "w", "w_scale", "x_scale", "bias", "out_scale", "scratch", "y", "num_tokens")
    source = KernelSource.of(
        "linear", "skinny_linear", _args(shape, roles), num_warps=warps, num_stages=stages, BM=bm, BN=bn, BK=bk,
        SPLIT=split, **_common(shape),
    )  # fmt: skip
    grid = (-(-_outputs(shape) // bn), ("num_tokens", bm), split)
    return LinearLaunch(source, grid, roles, _scratch(shape, bn, bm, split))


def fragment(shape: LinearShape, bm: int, r: int, u: int, depth: int, split: int, warps: int) -> LinearLaunch:
    """Tiles [16 r outputs, bm tokens] straight to tensor cores, any form; K is a multiple of 16."""
    roles = ("x", "w", "w_scale", "w_zero", "x_scale", "bias", "out_scale", "scratch", "y", "num_tokens")
    source = KernelSource.of(
        "linear", "fragment_linear", _args(shape, roles), num_warps=warps, num_stages=1, BM=bm, R=r, U=u, DEPTH=depth,
        SPLIT=split, WARPS=warps, FORM=shape.form, GROUP=_group(shape), HAS_ZERO=shape.has_zero,
        **_common(shape),
    )  # fmt: skip
    grid = (-(-_outputs(shape) // (16 * r)), ("num_tokens", bm), split)
    return LinearLaunch(source, grid, roles, _scratch(shape, 16 * r, bm, split))
