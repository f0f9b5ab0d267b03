"""A request and its sequences, as the scheduler and the executor keep them: lists and ints."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trtllm_cli.run.request import SamplingParams
    from trtllm_cli.run.sampler import SamplingState


class State(Enum):
    """Where a sequence is in its life."""

    WAITING = auto()  # holds no blocks
    RUNNING = auto()  # holds blocks and a row of the batch
    FINISHED = auto()


@dataclass(eq=False, slots=True)
class Request:
    """What the sequences of one prompt share."""

    id: int
    order: int  # of arrival: the scheduler serves in this order
    params: SamplingParams
    num_prompt: int  # tokens
    max_len: int  # tokens of prompt and output at which a sequence ends
    seed: int  # of sequence 0; sequence i uses seed + i
    eos: frozenset[int]  # empty under ignore_eos
    stops: frozenset[int]  # eos and stop_token_ids
    cached_tokens: int | None = None  # of the prompt, found in the prefix cache; None until admitted
    sequences: list[Sequence] = field(default_factory=list)  # all that were made, by index


@dataclass(eq=False, slots=True)
class Sequence:
    """One growing list of tokens and the blocks that hold its keys and values.

    The first `num_computed` tokens are in the KV cache, or will be when the steps under way are done. The last token
    never is: it is the next step's input. So `num_computed` is one less than the length while decoding, further behind
    while prefilling, and equal while the step that gives the next token is under way.

    Where the runner samples, the last `num_unknown` tokens may be stand-ins for tokens that steps under way will give:
    -(row + 1), as which a step's inputs have them too. So the sequence can be scheduled before its token is there.
    """

    request: Request
    index: int  # which of the request's n
    token_ids: list[int]  # prompt, then output
    state: State = State.WAITING
    num_computed: int = 0
    num_unknown: int = 0  # stand-ins at the end of token_ids
    blocks: list[int] = field(default_factory=list)
    num_registered: int = 0  # leading blocks that the prefix cache knows
    prefix: int = 0  # the prefix cache's name of what those hold
    row: int = -1  # of the batch's arrays, while running
    num_row_blocks: int = 0  # blocks that are written in that row
    sampling: SamplingState | None = None  # made by the executor with the first token

    @property
    def priority(self) -> tuple[int, int]:
        """Less is served first, and preempted last."""
        return (self.request.order, self.index)

    @property
    def num_remaining(self) -> int:
        """Tokens to compute before the next can be sampled."""
        return len(self.token_ids) - self.num_computed

    @property
    def is_pending(self) -> bool:
        """Whether its next token is being computed: until it is there, nothing can be done with the sequence."""
        return self.state is State.RUNNING and self.num_remaining == 0

    @property
    def num_known(self) -> int:
        """Tokens before the stand-ins."""
        return len(self.token_ids) - self.num_unknown

    def expect_token(self) -> None:
        """Notes that a step under way samples the next token. The last that it may have needs no stand-in: nothing is
        computed of it, and the sequence is pending until it is there.
        """
        if len(self.token_ids) + 1 < self.request.max_len:
            self.token_ids.append(-(self.row + 1))
            self.num_unknown += 1

    def receive_token(self, token: int) -> None:
        """Puts a sampled token in its place: steps end in the order in which they began."""
        if self.num_unknown:
            self.token_ids[-self.num_unknown] = token
            self.num_unknown -= 1
        else:
            self.token_ids.append(token)
