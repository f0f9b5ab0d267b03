"""The tactics that are timed for a linear: those that won, or came near it, in sweeps on an H200.

One to three dozen kernels a shape: each has to be compiled, and a build waits for that.
"""

from __future__ import annotations

from collections.abc import Iterator

from trtllm_cli.build.backends.cuda_linears import (
    AHEAD,
    STREAMS,
    Form,
    LinearShape,
    Tactic,
    adapted,
    is_grouped,
    weight_only,
)

TOKENS = (1, 2, 4, 8, 16, 32, 64)  # that are timed; a tactic is for all up to its own
_MORE = (128, 256)  # that are too where there are candidates: of int4, which cuBLASLt has to have as bfloat16
_WIDE = 16384  # outputs that have tiles enough for all multiprocessors without splitting sums

# By form and most tokens; int8 has int4's.
_Tiles = dict[tuple[Form, int], list[tuple[int, ...]]]
_STREAM: _Tiles = {
    ("bf16", 1): [
        (1, 8, 3, 1, 4), (1, 8, 2, 1, 4), (1, 8, 4, 1, 4), (1, 8, 6, 1, 4), (1, 8, 8, 1, 4),
        (1, 8, 1, 8, 4), (1, 8, 2, 4, 4), (1, 8, 3, 2, 4),
    ],
    ("bf16", 2): [(2, 4, 4, 1, 4), (2, 4, 6, 1, 4)],
    ("bf16", 4): [(4, 4, 4, 1, 4), (4, 4, 6, 1, 4), (4, 2, 6, 1, 4)],
    ("bf16", 8): [(8, 2, 6, 1, 4), (8, 4, 4, 1, 4)],
    ("fp8", 1): [
        (1, 8, 3, 1, 4), (1, 8, 2, 1, 4), (1, 8, 4, 1, 4), (1, 8, 6, 1, 4),
        (1, 8, 1, 4, 4), (1, 8, 2, 2, 4), (1, 8, 3, 2, 4),
    ],
    ("fp8", 2): [(2, 4, 3, 1, 4), (2, 4, 4, 1, 4), (2, 4, 6, 1, 4)],
    ("fp8", 4): [(4, 4, 3, 1, 4), (4, 4, 4, 1, 4), (4, 4, 6, 1, 4), (4, 2, 6, 1, 4)],
    ("fp8", 8): [(8, 2, 6, 1, 4), (8, 4, 4, 1, 4)],
    ("fp8", 16): [(16, 2, 4, 1, 4), (16, 2, 6, 1, 4)],
}  # fmt: skip
_WORDS: _Tiles = {
    ("int4", 1): [
        (1, 4, 1, 4), (1, 6, 1, 4), (1, 8, 1, 4), (1, 4, 2, 4), (2, 4, 1, 4),
        (1, 3, 1, 8), (1, 4, 1, 8), (1, 7, 1, 8), (1, 2, 2, 8),
    ],
    ("int4", 2): [(2, 4, 1, 4), (2, 8, 1, 4), (2, 2, 2, 8)],
    ("int4", 4): [(4, 4, 1, 4)],
    ("int4", 8): [(8, 4, 1, 4)],
}  # fmt: skip
_WIDE_TILES: _Tiles = {
    ("bf16", 16): [(16, 1, 6, 1, 2, 4)],
    ("bf16", 32): [(32, 1, 6, 1, 2, 4)],
    ("bf16", 64): [(64, 1, 4, 1, 1, 4), (64, 1, 6, 1, 2, 4)],
    ("fp8", 16): [(16, 1, 6, 1, 2, 4)],
    ("fp8", 32): [(32, 1, 6, 1, 1, 4), (32, 1, 6, 1, 2, 4)],
    ("fp8", 64): [(64, 1, 6, 1, 1, 4), (64, 1, 6, 1, 2, 4)],
    ("int4", 8): [(8, 1, 4, 2, 4, 4)],
    ("int4", 16): [(16, 1, 4, 2, 4, 4), (16, 1, 4, 2, 2, 4)],
    ("int4", 32): [(32, 1, 3, 2, 4, 4), (32, 1, 2, 2, 4, 8), (32, 1, 2, 2, 2, 8)],
    ("int4", 64): [(64, 1, 2, 2, 4, 4), (64, 1, 2, 2, 4, 8), (64, 1, 2, 2, 2, 8), (64, 1, 3, 1, 4, 8)],
    ("int4", 128): [(128, 1, 4, 1, 4, 8), (128, 1, 2, 2, 4, 8), (128, 1, 4, 1, 2, 8)],
}  # fmt: skip
_GATED_WIDE_TILES: _Tiles = {
    ("bf16", 16): [(16, 1, 5, 1, 1, 4)],
    ("bf16", 32): [(32, 1, 5, 1, 1, 4)],
    ("bf16", 64): [(64, 1, 6, 1, 1, 4)],
    ("fp8", 64): [(64, 1, 4, 1, 1, 4)],
    ("int4", 8): [(8, 1, 4, 1, 2, 4)],
    ("int4", 16): [(16, 1, 4, 1, 2, 4), (16, 1, 4, 1, 4, 4), (16, 1, 3, 2, 1, 4)],
    ("int4", 32): [(32, 1, 4, 1, 1, 8), (32, 1, 4, 1, 2, 4), (32, 1, 4, 1, 1, 4)],
    ("int4", 64): [(64, 1, 3, 1, 1, 8), (64, 1, 4, 1, 1, 8), (64, 1, 4, 1, 1, 4)],
    ("int4", 128): [(128, 1, 3, 1, 1, 8)],
}  # fmt: skip
_VECTOR: _Tiles = {
    ("bf16", 1): [(1, 2, 2048, 4, 2)],
    ("bf16", 2): [(2, 2, 2048, 4, 2), (2, 4, 1024, 4, 2)],
    ("bf16", 4): [(4, 2, 2048, 4, 2), (4, 4, 1024, 4, 2)],
    ("fp8", 1): [(1, 2, 2048, 4, 2)],
    ("fp8", 2): [(2, 4, 2048, 4, 2), (2, 2, 2048, 4, 2)],
    ("fp8", 4): [(4, 4, 2048, 4, 1)],
}
_FRAGMENT: _Tiles = {
    ("bf16", 8): [(8, 1, 2, 4, 1, 8)],
    ("fp8", 8): [(8, 1, 1, 4, 1, 8), (8, 1, 1, 4, 1, 4)],
    ("int4", 8): [(8, 1, 2, 2, 1, 8), (8, 1, 2, 3, 1, 8), (8, 1, 2, 4, 1, 8), (8, 1, 2, 4, 1, 4), (8, 1, 2, 3, 2, 4)],
    ("int4", 16): [(16, 1, 2, 2, 1, 8), (16, 2, 2, 2, 1, 8), (16, 1, 2, 4, 1, 4)],
    ("int4", 32): [(32, 1, 1, 4, 1, 8), (32, 2, 1, 2, 1, 8)],
}
_GATED_FRAGMENT: _Tiles = {
    ("bf16", 8): [(8, 1, 2, 2, 1, 4)],
    ("fp8", 8): [(8, 1, 1, 4, 1, 4), (8, 1, 1, 2, 1, 4)],
    ("int4", 8): [
        (8, 1, 2, 2, 1, 4), (8, 1, 2, 4, 1, 4), (8, 1, 2, 2, 1, 2), (8, 1, 2, 3, 1, 2), (8, 1, 2, 4, 1, 2),
        (8, 1, 2, 2, 1, 8),
    ],
    ("int4", 16): [(16, 1, 2, 2, 1, 4), (16, 1, 2, 2, 1, 2), (16, 1, 1, 2, 1, 4), (16, 2, 1, 2, 1, 4)],
    ("int4", 32): [(32, 1, 1, 2, 1, 4), (32, 2, 1, 1, 1, 4)],
}  # fmt: skip
_SKINNY: _Tiles = {
    ("bf16", 16): [(16, 64, 128, 1, 5, 4), (16, 64, 128, 2, 5, 4)],
    ("fp8", 16): [(16, 64, 128, 1, 6, 4), (16, 64, 128, 2, 6, 4)],
    ("bf16", 32): [(32, 64, 128, 2, 4, 4)],
    ("bf16", 64): [(64, 64, 128, 2, 4, 4), (64, 64, 128, 1, 4, 4)],
    ("fp8", 32): [(64, 64, 128, 1, 5, 4)],
    ("fp8", 64): [(64, 64, 128, 1, 5, 4)],
}
# With scales of groups, by most tokens.
_GROUPED = {
    16: [(16, 64, 128, 1, 6, 4), (16, 64, 128, 2, 5, 4), (16, 64, 128, 4, 5, 4)],
    32: [(32, 64, 128, 1, 5, 4), (32, 64, 128, 4, 5, 4)],
    64: [(64, 64, 128, 1, 5, 4), (64, 64, 128, 2, 4, 4), (64, 64, 128, 4, 4, 4)],
}
_SPLIT = {"wide": 4, "skinny": 3, "fragment": 4}  # where the tiles say into how many parts sums are split


def candidates(shape: LinearShape, tokens: int, arch: str = STREAMS) -> list[Tactic]:
    """What is timed for a linear of so many tokens; none where no kernel takes the shape."""
    listed = (tactic for tactic in _listed(shape, tokens) if tactic.kernel not in AHEAD or arch == STREAMS)
    found = (adapted(shape, tactic) for tactic in listed)
    return list(dict.fromkeys(tactic for tactic in found if tactic is not None))


def timed_tokens(shape: LinearShape, arch: str = STREAMS) -> list[int]:
    """The numbers of tokens that a linear is timed for."""
    return [*TOKENS, *(tokens for tokens in _MORE if candidates(shape, tokens, arch))]


def _listed(shape: LinearShape, tokens: int) -> Iterator[Tactic]:
    form: Form = "int4" if weight_only(shape) else shape.form
    if is_grouped(shape):
        most = min((most for most in _GROUPED if tokens <= most), default=0)
        yield from (Tactic("skinny", tiles) for tiles in _GROUPED.get(most, []))
        return
    lists = {
        "stream": _STREAM,
        "words": _WORDS,
        "wide": _GATED_WIDE_TILES if shape.gated else _WIDE_TILES,
        "vector": _VECTOR,
        "fragment": _GATED_FRAGMENT if shape.gated else _FRAGMENT,
        "skinny": _SKINNY,
    }
    for kernel, of_form in lists.items():
        for (of, most), every in of_form.items():
            # The narrowest tiles that hold the tokens; wider ones of other kernels too; int4 may read weights twice.
            fits = most // 2 < tokens <= most or (kernel == "skinny" and most == 16 and 1 < tokens <= 16)
            twice = form == "int4" and tokens == 2 * most and (kernel != "wide" or most == 128)
            if of == form and (fits or twice or (most == 8 and tokens <= 8 and kernel not in AHEAD)):
                for tiles in every:
                    if shape.n <= _WIDE or shape.gated or kernel not in _SPLIT or tiles[_SPLIT[kernel]] == 1:
                        yield Tactic(kernel, tiles)
