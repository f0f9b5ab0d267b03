"""The executor's token events to what a caller reads: text, cut at stop strings, as deltas or as a whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trtllm_cli.run.detokenizer import StopStrings
from trtllm_cli.run.request import CompletionOutput, Logprob, RequestOutput, RequestTimes, SamplingParams, TokenEvent

if TYPE_CHECKING:
    from trtllm_cli.errors import TrtllmError
    from trtllm_cli.run.detokenizer import Detokenizer
    from trtllm_cli.run.tokenizer import Tokenizer

Sink = Callable[["RequestOutput | Exception"], None]  # where a request's deltas go, or the error that ended it


class SequenceText:
    """One of a request's n sequences: its text so far, and whether it has ended."""

    def __init__(self, index: int, params: SamplingParams, tokenizer: Tokenizer | None) -> None:
        self.ended = False
        self._index = index
        self._params = params
        self._tokenizer = tokenizer
        self._detokenizer: Detokenizer | None = None
        if tokenizer is not None:
            self._detokenizer = tokenizer.detokenizer(skip_special_tokens=params.skip_special_tokens)
        self._stops = StopStrings(params.stop, include=params.include_stop_str_in_output)
        self._num_tokens = 0

    def take(self, event: TokenEvent) -> CompletionOutput:
        """What is new with this event. A stop string in it ends the sequence, whatever the event says."""
        token = event.token_id
        delta = CompletionOutput(
            self._index, "", [] if token is None else [token], None, event.finish_reason, event.stop_reason
        )
        stop = None
        if token is not None:
            self._num_tokens += 1
            # The token that ends an answer is no part of its text.
            hidden = event.finish_reason == "stop" and not self._params.include_stop_str_in_output
            if self._detokenizer is not None and not hidden:
                delta.text, stop = self._shown(self._detokenizer.push(token))
        if event.logprobs is not None:
            delta.logprobs = [[self._named(entry) for entry in event.logprobs]]
        if event.finish_reason and stop is None and self._detokenizer is not None:
            rest, stop = self._shown(self._detokenizer.finish())
            delta.text += rest
            if stop is None:
                delta.text += self._stops.finish()
        if stop is not None:
            delta.finish_reason, delta.stop_reason = "stop", stop
        self.ended = delta.finish_reason is not None
        return delta

    def _shown(self, text: str) -> tuple[str, str | None]:
        if self._num_tokens <= self._params.min_tokens:
            return text, None
        return self._stops.push(text)

    def _named(self, entry: Logprob) -> Logprob:
        if self._tokenizer is None:
            return entry
        text = self._tokenizer.decode([entry.token_id], skip_special_tokens=False)
        return dataclasses.replace(entry, token=text)


@dataclass
class LiveRequest:
    """A request on its way through the executor."""

    id: int
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    tokenizer: Tokenizer | None
    sink: Sink
    name: str = ""  # what errors call it
    times: RequestTimes = field(default_factory=RequestTimes)
    cached_tokens: int = 0

    def __post_init__(self) -> None:
        self.sequences = [SequenceText(i, self.params, self.tokenizer) for i in range(self.params.n)]

    @property
    def ended(self) -> bool:
        """Whether all its sequences have."""
        return all(sequence.ended for sequence in self.sequences)

    def take(self, event: TokenEvent, now: float) -> RequestOutput:
        """The delta of one event: only what is new, `finished` with the last."""
        if event.token_id is not None:
            self.times.first_token = self.times.first_token or now
            self.times.last_token = now
        sequence = self.sequences[event.index]
        delta = sequence.take(event)
        ended = sequence.ended and self.ended
        return RequestOutput(
            self.id, self.prompt, self.prompt_token_ids, [delta], self.cached_tokens, ended, self.times
        )

    def empty_output(self) -> RequestOutput:
        """What `accumulate` starts from."""
        outputs = [CompletionOutput(i) for i in range(self.params.n)]
        return RequestOutput(self.id, self.prompt, self.prompt_token_ids, outputs, times=self.times)


def named_error(e: TrtllmError, name: str) -> TrtllmError:
    """The error, saying which request it is of."""
    return type(e)(f"{name}: {e.message}", where=e.where, fix=e.fix) if name else e


def accumulate(total: RequestOutput, delta: RequestOutput) -> None:
    """Adds a delta of the same request to what it has so far."""
    for new in delta.outputs:
        output = total.outputs[new.index]
        output.text += new.text
        output.token_ids += new.token_ids
        if new.logprobs is not None:
            output.logprobs = (output.logprobs or []) + new.logprobs
        output.finish_reason, output.stop_reason = new.finish_reason, new.stop_reason
    total.cached_tokens, total.finished = delta.cached_tokens, delta.finished
