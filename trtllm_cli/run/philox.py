"""Philox4x32-10, a random number generator without state: numbers are a function of a key and a counter.

Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011). A GPU computes the same numbers.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
_ROUNDS = 10


def philox4x32(
    counter: tuple[UInt64Array, UInt64Array, UInt64Array, UInt64Array], key: tuple[UInt64Array, UInt64Array]
) -> tuple[UInt64Array, UInt64Array, UInt64Array, UInt64Array]:
    """Four 32-bit words for each counter of four and key of two; the arrays hold 32-bit words and broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


def gumbel(seed: UInt64Array, position: UInt64Array, token_id: UInt64Array) -> npt.NDArray[np.float64]:
    """Standard Gumbel noise for token `token_id` at output position `position` of the sequence seeded `seed`.

    Word token_id % 4 of the counter (token_id // 4, position, 0, 0) under the 64-bit seed as key, as a uniform number
    u = (word + 1/2) / 2^32, then -log(-log(u)). The arrays broadcast.
    """
    zero = np.zeros(1, np.uint64)
    words = philox4x32((token_id >> np.uint64(2), position, zero, zero), (seed & _LOW, seed >> _SHIFT))
    lane = (token_id & np.uint64(3)).astype(np.intp)
    word = np.choose(lane, words)
    uniform = (word.astype(np.float64) + 0.5) * 2.0**-32
    return -np.log(-np.log(uniform))


MAX_GUMBEL = float(-np.log(-np.log1p(-(2.0**-33))))  # of the largest word, about 22.9
MIN_GUMBEL = float(-np.log(33 * np.log(2.0)))  # of the smallest, about -3.1
