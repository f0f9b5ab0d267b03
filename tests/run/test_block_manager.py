import pytest

from trtllm_cli.run.block_manager import BlockManager
from trtllm_cli.run.request import SamplingParams
from trtllm_cli.run.sequence import Request, Sequence


def sequence(*token_ids: int) -> Sequence:
    request = Request(0, 0, SamplingParams(), len(token_ids), 100, 0, frozenset(), frozenset())
    return Sequence(request, 0, list(token_ids))


def compute(blocks: BlockManager, seq: Sequence) -> None:
    seq.num_computed = len(seq.token_ids)
    blocks.register(seq)


def admitted(blocks: BlockManager, *token_ids: int) -> Sequence:
    seq = sequence(*token_ids)
    assert blocks.admit(seq)
    return seq


def test_a_full_prefix_is_found_again():
    blocks = BlockManager(8, 2)
    first = admitted(blocks, 1, 2, 3, 4, 5)
    compute(blocks, first)
    again = admitted(blocks, 1, 2, 3, 4, 6)
    assert again.num_computed == 4
    assert again.blocks[:2] == first.blocks[:2]
    assert again.blocks[2] != first.blocks[2]
    blocks.check_integrity([first, again])


def test_nothing_is_found_before_it_is_computed():
    blocks = BlockManager(8, 2)
    admitted(blocks, 1, 2, 3)
    assert admitted(blocks, 1, 2, 3).num_computed == 0


def test_the_last_token_is_always_left_to_compute():
    blocks = BlockManager(8, 2)
    compute(blocks, admitted(blocks, 1, 2, 3, 4))
    assert admitted(blocks, 1, 2, 3, 4).num_computed == 2
    assert blocks.match_length([1, 2, 3, 4]) == 2
    assert blocks.match_length([1, 2, 3, 4, 5]) == 4


def test_the_same_tokens_after_another_prefix_are_another_content():
    blocks = BlockManager(8, 2)
    compute(blocks, admitted(blocks, 1, 1, 7, 7))
    compute(blocks, admitted(blocks, 2, 2, 7, 7))
    assert blocks.match_length([7, 7, 0]) == 0
    assert blocks.match_length([2, 2, 7, 7, 0]) == 4


class Collides(int):
    """A token id whose hash says nothing."""

    def __hash__(self):
        return 0


def test_equal_hashes_do_not_mix_prompts_up():
    blocks = BlockManager(8, 1)
    compute(blocks, admitted(blocks, *map(Collides, (1, 2, 3))))
    assert blocks.match_length([*map(Collides, (1, 3, 3, 4))]) == 1
    assert blocks.match_length([*map(Collides, (2, 2, 3, 4))]) == 0
    assert blocks.match_length([*map(Collides, (1, 2, 3, 4))]) == 3


def test_one_content_computed_twice_keeps_one_name():
    blocks = BlockManager(8, 2)
    first, second = admitted(blocks, 1, 2, 3, 4), admitted(blocks, 1, 2, 5, 6)
    compute(blocks, first)
    compute(blocks, second)
    assert blocks.match_length([1, 2, 5, 6, 0]) == 4
    third = admitted(blocks, 1, 2, 5, 6, 0)
    assert third.blocks[:2] == [first.blocks[0], second.blocks[1]]
    blocks.check_integrity([first, second, third])


def test_the_least_recently_used_goes_first_and_ends_before_beginnings():
    blocks = BlockManager(4, 1)
    old, young = admitted(blocks, 1, 2), admitted(blocks, 3, 4)
    compute(blocks, old)
    compute(blocks, young)
    blocks.release(old)
    blocks.release(young)
    assert blocks.num_held == 0
    admitted(blocks, 9)
    assert [blocks.match_length([*p, 0]) for p in ([1, 2], [3, 4])] == [1, 2]
    admitted(blocks, 8)
    assert [blocks.match_length([*p, 0]) for p in ([1, 2], [3, 4])] == [0, 2]
    admitted(blocks, 7)
    assert [blocks.match_length([*p, 0]) for p in ([1, 2], [3, 4])] == [0, 1]


def test_admission_counts_the_cached_blocks_that_it_revives():
    blocks = BlockManager(3, 1)
    seq = admitted(blocks, 1, 2, 3)
    compute(blocks, seq)
    blocks.release(seq)
    assert not blocks.admit(sequence(1, 2, 3, 4))
    assert not blocks.admit(sequence(1, 2, 3), spare=1)
    blocks.check_integrity()
    assert admitted(blocks, 1, 2, 3).num_computed == 2


def test_grow_takes_a_block_only_when_one_is_needed():
    blocks = BlockManager(2, 2)
    seq = admitted(blocks, 1)
    for token, held in ((2, 1), (3, 2), (4, 2)):
        seq.token_ids.append(token)
        assert blocks.grow(seq)
        assert len(seq.blocks) == held
    seq.token_ids.append(5)
    assert not blocks.grow(seq)


@pytest.mark.parametrize(("length", "copies"), [(3, True), (4, False)])
def test_fork_shares_full_blocks_and_copies_a_partial_one(length, copies):
    blocks = BlockManager(8, 2)
    parent = admitted(blocks, *range(length))
    compute(blocks, parent)
    child = sequence(*range(length))
    copy = blocks.fork(parent, child)
    assert (copy is not None) == copies
    full = length // 2
    assert child.blocks[:full] == parent.blocks[:full]
    if copy:
        assert copy == (parent.blocks[-1], child.blocks[-1])
    blocks.check_integrity([parent, child])
    blocks.release(parent)
    blocks.check_integrity([child])
    blocks.release(child)
    blocks.check_integrity()
    assert blocks.num_available == 8


def test_without_prefix_cache_nothing_is_kept():
    blocks = BlockManager(4, 1, enable_prefix_cache=False)
    seq = admitted(blocks, 1, 2)
    compute(blocks, seq)
    blocks.release(seq)
    assert blocks.match_length([1, 2, 3]) == 0
    blocks.check_integrity()


def test_integrity_check_notices():
    blocks = BlockManager(4, 2)
    seq = admitted(blocks, 1, 2, 3)
    compute(blocks, seq)
    with pytest.raises(AssertionError, match="reference counts"):
        blocks.check_integrity()
    seq.blocks.append(seq.blocks[0])
    with pytest.raises(AssertionError, match="twice"):
        blocks.check_integrity([seq])
