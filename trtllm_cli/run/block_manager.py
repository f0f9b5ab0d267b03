"""Paged KV cache bookkeeping: which block holds what, for whom, and what may be reused.

A block is in one of three places:

    free      nobody's, content worthless
    held      one or more sequences refer to it
    cached    nobody refers to it, but it is full and a later prompt may begin with its content;
              evicted, least recently used first, when no block is free

A full block is known by (name of the content before it, its tokens). Each newly known content gets a new name, an int,
so a key stands for a whole prefix. Lookups compare the tokens themselves: equal hashes cannot mix two prompts up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trtllm_cli.run.sequence import Sequence

Key = tuple[int, tuple[int, ...]]

ROOT = 0  # the name of the empty prefix


class BlockManager:
    """Hands out `num_blocks` blocks of `block_size` tokens each."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_cache: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_cache = enable_prefix_cache
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: recently used memory is warm
        self._cached: dict[int, None] = {}  # in order of release: the first is evicted first
        self._refs = [0] * num_blocks
        self._keys: list[Key | None] = [None] * num_blocks  # of blocks that the prefix cache knows
        self._names = [ROOT] * num_blocks  # of the prefix that ends with the block
        self._known: dict[Key, int] = {}
        self._next_name = ROOT + 1

    @property
    def num_available(self) -> int:
        """Blocks that can be had now: the free and the evictable."""
        return len(self._free) + len(self._cached)

    @property
    def num_held(self) -> int:
        """Blocks that sequences refer to."""
        return self.num_blocks - self.num_available

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def match_length(self, token_ids: list[int]) -> int:
        """Tokens that the prefix cache would spare a sequence."""
        return len(self._match(token_ids)[0]) * self.block_size

    def admit(self, seq: Sequence, *, spare: int = 0) -> bool:
        """Gives `seq` blocks for all its tokens, those of a known prefix from the cache, and sets `num_computed`.

        False, and nothing is taken, unless `spare` blocks stay available besides.
        """
        assert not seq.blocks
        found, name = self._match(seq.token_ids)
        fresh = self.blocks_for(len(seq.token_ids)) - len(found)
        revived = sum(self._refs[block] == 0 for block in found)
        if fresh + revived + spare > self.num_available:
            return False
        for block in found:
            self._share(block)
        seq.blocks = found + [self._take() for _ in range(fresh)]
        seq.num_registered, seq.prefix = len(found), name
        seq.num_computed = len(found) * self.block_size
        return True

    def grow(self, seq: Sequence) -> bool:
        """Makes room for all of the sequence's tokens. False when there is no block to be had."""
        if len(seq.blocks) * self.block_size >= len(seq.token_ids):
            return True
        if not self.num_available:
            return False
        seq.blocks.append(self._take())
        return True

    def register(self, seq: Sequence) -> None:
        """Makes the sequence's newly full blocks known to the prefix cache. Call it when they are computed.

        A block with a token that is not known yet has to wait.
        """
        if not self.enable_prefix_cache:
            return
        size, last = self.block_size, min(seq.num_computed, seq.num_known)
        while (end := (seq.num_registered + 1) * size) <= last:
            key = (seq.prefix, tuple(seq.token_ids[end - size : end]))
            block = self._known.setdefault(key, seq.blocks[seq.num_registered])
            if block == seq.blocks[seq.num_registered]:
                self._keys[block] = key
                self._names[block] = self._next_name
                self._next_name += 1
            seq.prefix = self._names[block]  # where another block has this content already, its name is ours too
            seq.num_registered += 1

    def fork(self, parent: Sequence, child: Sequence) -> tuple[int, int] | None:
        """Shares the parent's full blocks with `child`; a partly filled last block gets a copy of its own.

        The (source, destination) to copy, if any. There must be a block available where one is needed.
        """
        full, partial = divmod(parent.num_computed, self.block_size)
        child.blocks = parent.blocks[:full]
        for block in child.blocks:
            self._share(block)
        child.num_computed = parent.num_computed
        child.num_registered, child.prefix = parent.num_registered, parent.prefix
        if not partial:
            return None
        child.blocks.append(self._take())
        return parent.blocks[full], child.blocks[full]

    def release(self, seq: Sequence) -> None:
        """Gives the sequence's blocks back; known ones stay cached until evicted, the ends of prefixes first."""
        for block in reversed(seq.blocks):
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if self._keys[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None
        seq.blocks = []
        seq.num_computed = seq.num_registered = 0
        seq.prefix = ROOT

    def check_integrity(self, sequences: Iterable[Sequence] = ()) -> None:
        """Asserts that every block is in exactly one place and that only full blocks are shared."""
        held: Counter[int] = Counter()
        for seq in sequences:
            held.update(seq.blocks)
            assert len(seq.blocks) == len(set(seq.blocks)), f"a sequence holds a block twice: {seq.blocks}"
            assert len(seq.blocks) * self.block_size >= seq.num_computed
        for seq in sequences:
            for block in seq.blocks[seq.num_computed // self.block_size :]:
                assert held[block] == 1, f"block {block} is shared and will be written"
        assert self._refs == [held[block] for block in range(self.num_blocks)], "reference counts are off"
        places = [*self._free, *self._cached, *held]
        assert sorted(places) == list(range(self.num_blocks)), "a block is lost, or in two places"
        known = {block: key for block, key in enumerate(self._keys) if key is not None}
        assert {block: key for key, block in self._known.items()} == known, "the prefix cache's tables disagree"
        assert all(token >= 0 for _, tokens in self._known for token in tokens), "a token that is not known was hashed"
        assert self._cached.keys() <= known.keys()
        assert not known.keys() & set(self._free)

    def _match(self, token_ids: list[int]) -> tuple[list[int], int]:
        """The cached blocks that `token_ids` begins with, and their content's name.

        At least one token is left over: its logits are wanted.
        """
        found: list[int] = []
        name = ROOT
        if self.enable_prefix_cache:
            size = self.block_size
            for end in range(size, len(token_ids), size):
                block = self._known.get((name, tuple(token_ids[end - size : end])))
                if block is None:
                    break
                found.append(block)
                name = self._names[block]
        return found, name

    def _share(self, block: int) -> None:
        if self._refs[block] == 0:
            del self._cached[block]
        self._refs[block] += 1

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block = next(iter(self._cached))
            del self._cached[block]
            key = self._keys[block]
            assert key is not None
            del self._known[key]
            self._keys[block] = None
        assert self._refs[block] == 0
        self._refs[block] = 1
        return block
