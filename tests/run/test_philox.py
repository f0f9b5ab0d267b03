import math

import numpy as np
import pytest

from trtllm_cli.run.philox import GROUP, group_bounds, gumbel, philox4x32


# Random123's kat_vectors, philox4x32 10.
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers(counter, key, words):
    c, k = np.array(counter, np.uint64)[:, None], np.array(key, np.uint64)[:, None]
    twice = philox4x32(np.tile(c, 2), np.tile(k, 2))
    assert [f"{int(w):08x}" for w in twice[:, 0]] == words.split()
    assert (twice[:, 0] == twice[:, 1]).all()


def noise_of(seed: int, position: int, ids) -> np.ndarray:
    ids = np.asarray(ids, np.uint64)
    return gumbel(np.full(len(ids), seed, np.uint64), np.full(len(ids), position, np.uint64), ids)


def plain_noise(seed: int, position: int, token: int) -> float:
    """The definition in gumbel's docstring, one token at a time."""

    def words(*counter: int) -> list[int]:
        key = np.array([[seed % 2**32], [seed >> 32]], np.uint64)
        return [int(w) for w in philox4x32(np.array(counter, np.uint64)[:, None], key)[:, 0]]

    def exponential(word: int) -> float:
        return -math.log((word + 0.5) / 2**32)

    group = token // GROUP
    first_time, who = words(group // 2, position, 1, 0)[2 * (group % 2) :][:2]
    time = exponential(first_time) / GROUP
    if who % GROUP != token % GROUP:
        time += exponential(words(token // 4, position, 0, 0)[token % 4])
    return -math.log(time)


def test_noise_is_as_documented():
    for seed in (0, 5, 2**40 + 17, 2**64 - 1):
        for position in (0, 1, 99_999):
            ids = [0, 1, 2, 3, 127, 128, 129, 255, 256, 5000, 151_935]
            plain = [plain_noise(seed, position, i) for i in ids]
            np.testing.assert_allclose(noise_of(seed, position, ids), plain, rtol=1e-12)


def test_noise_is_a_function_of_each_token_alone():
    whole = noise_of(3, 7, range(1000))
    some = np.array([999, 3, 500, 3])
    assert (noise_of(3, 7, some) == whole[some]).all()
    assert not (noise_of(3, 8, range(1000)) == whole).any()
    assert not (noise_of(4, 7, range(1000)) == whole).any()


def test_noise_is_gumbel():
    noise = np.concatenate([noise_of(seed, position, range(600)) for seed in range(20) for position in range(10)])
    uniform = np.sort(np.exp(-np.exp(-noise)))
    distance = np.abs(uniform - (np.arange(len(uniform)) + 0.5) / len(uniform)).max()
    assert distance < 1.63 / math.sqrt(len(uniform))  # Kolmogorov-Smirnov at 1 %


def test_noise_of_neighbours_is_independent():
    ids, positions = np.meshgrid(np.arange(256, dtype=np.uint64), np.arange(2000, dtype=np.uint64))
    noise = gumbel(np.ones(ids.size, np.uint64), positions.ravel(), ids.ravel()).reshape(2000, 256)
    uniform = np.exp(-np.exp(-noise))
    correlation = np.corrcoef(uniform, rowvar=False) - np.eye(256)
    assert np.abs(correlation).max() < 5.5 / math.sqrt(2000)


def test_group_bounds_are_each_groups_largest_noise():
    seeds, positions = np.array([9, 2**63], np.uint64), np.array([4, 0], np.uint64)
    bounds = group_bounds(seeds, positions, 5)
    assert bounds.shape == (2, 5)
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        noise = noise_of(int(seed), int(position), range(5 * GROUP)).reshape(5, GROUP)
        assert (noise.max(axis=1) == bounds[row]).all()
