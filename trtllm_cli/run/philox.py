"""Randomness without state: each number is a function of a key and a counter, so a GPU can compute the same ones.

Philox4x32-10 is from Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]
Float64Array = npt.NDArray[np.float64]

_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
_ROUNDS = 10

GROUP = 128  # consecutive token ids


def philox4x32(counter: UInt64Array, key: UInt64Array) -> UInt64Array:
    """Four words [4, n] for counters [4, n] and keys [2, n], all of 32 bits."""
    even, odd = counter[0::2], counter[1::2]
    for _ in range(_ROUNDS):
        product = even * _MULTIPLIERS
        even, odd = (product >> _SHIFT)[::-1] ^ odd ^ key, (product & _LOW)[::-1]
        key = (key + _WEYL) & _LOW
    return np.stack((even[0], odd[0], even[1], odd[1]))


def gumbel(seed: UInt64Array, position: UInt64Array, token_id: UInt64Array) -> Float64Array:
    """Standard Gumbel noise [n] for token ids at output positions of sequences with these seeds.

    As a race: -log of a token's arrival time, and times are exponential. Of each GROUP of ids one is first, at a time
    with the mean 1 / GROUP; by memorylessness the others arrive after fresh exponential times more. The times are
    independent all the same, and `group_bounds` can rule most tokens out by their group's first arrival.

    Words, under the 64-bit seed as key: a token's own time is word id % 4 of the counter (id // 4, position, 0, 0); a
    pair of groups' times and who is first (modulo GROUP) are words 0 to 3 of the counter (group // 2, position, 1, 0).
    """
    n = len(token_id)
    group = token_id // np.uint64(GROUP)
    counter = np.zeros((4, 2 * n), np.uint64)
    counter[0, :n], counter[0, n:] = token_id >> np.uint64(2), group >> np.uint64(1)
    counter[1, :n] = counter[1, n:] = position
    counter[2, n:] = 1
    words = philox4x32(counter, np.tile(_key(seed), 2))
    own = words[(token_id & np.uint64(3)).astype(np.intp), np.arange(n)]
    pair = 2 * (group & np.uint64(1)).astype(np.intp)
    group_words = words[:, n:]
    first = group_words[pair + 1, np.arange(n)] % np.uint64(GROUP) == token_id % np.uint64(GROUP)
    time = _exponential(group_words[pair, np.arange(n)]) / GROUP
    return -np.log(np.where(first, time, time + _exponential(own)))


def group_bounds(seed: UInt64Array, position: UInt64Array, num_groups: int) -> Float64Array:
    """The largest noise of each group of token ids, that of the group's first, for sequences [n]: [n, num_groups]."""
    n, pairs = len(seed), (num_groups + 1) // 2
    counter = np.zeros((4, n * pairs), np.uint64)
    counter[0], counter[1], counter[2] = np.tile(np.arange(pairs), n), np.repeat(position, pairs), 1
    words = philox4x32(counter, np.repeat(_key(seed), pairs, axis=1))
    return -np.log(_exponential(words[0::2].T.reshape(n, 2 * pairs)[:, :num_groups]) / GROUP)


def _key(seed: UInt64Array) -> UInt64Array:
    return np.stack((seed & _LOW, seed >> _SHIFT))


def _exponential(word: UInt64Array) -> Float64Array:
    """Unit mean, from 32 random bits."""
    return -np.log((word + 0.5) * 2.0**-32)
