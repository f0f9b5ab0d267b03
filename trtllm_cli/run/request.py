"""What a caller asks for and what comes back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from trtllm_cli.errors import UsageError

MAX_N = 1024  # answers to one prompt

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when a sequence ends; names as TensorRT-LLM's and vLLM's users know them.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 do nothing. `seed` None draws one. Raises UsageError
    for a value out of range.
    """

    max_tokens: int | None = None  # None: 128, or what max_seq_len leaves if that is less
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output, as transformers'
    presence_penalty: float = 0.0  # over output, as OpenAI's
    frequency_penalty: float = 0.0  # over output, as OpenAI's
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    n: int = 1  # sequences for the prompt; sequence i uses seed + i
    logprobs: int | None = None  # the chosen token's and this many of the most likely; None: none
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, value, ok, allowed in (
            ("max_tokens", self.max_tokens, self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            ("min_tokens", self.min_tokens, self.min_tokens >= 0, "at least 0"),
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (off) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < float("inf"), "more than 0"),
            ("presence_penalty", self.presence_penalty, -2 <= self.presence_penalty <= 2, "from -2 to 2"),
            ("frequency_penalty", self.frequency_penalty, -2 <= self.frequency_penalty <= 2, "from -2 to 2"),
            ("seed", self.seed, self.seed is None or 0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
            ("n", self.n, 1 <= self.n <= MAX_N, f"from 1 to {MAX_N}"),
            ("logprobs", self.logprobs, self.logprobs is None or 0 <= self.logprobs <= 20, "from 0 to 20"),
        ):
            if not ok:
                raise UsageError(f"{name} is {value}, it must be {allowed}", where=name)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise UsageError(
                f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}", where="min_tokens"
            )
        if any(not s for s in self.stop):
            raise UsageError("a stop string is empty", where="stop")


@dataclass(frozen=True)
class Logprob:
    """A token's log probability before temperature and filters, after penalties."""

    token_id: int
    logprob: float
    token: str = ""  # its text, filled in by the detokenizer


@dataclass(slots=True)
class TokenEvent:
    """One step's news of one sequence, from the executor: at most one new token."""

    request_id: int
    index: int  # which of the request's n sequences
    token_id: int | None
    logprobs: list[Logprob] | None = None  # the chosen token first
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token or string that ended it


@dataclass(slots=True)
class CompletionOutput:
    """One finished or growing sequence."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[list[Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class RequestTimes:
    """Seconds on `time.perf_counter`'s clock."""

    arrival: float = 0.0
    first_token: float | None = None
    last_token: float | None = None


@dataclass(slots=True)
class RequestOutput:
    """What a request has so far; `finished` when all its sequences are."""

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    finished: bool = False
    times: RequestTimes = field(default_factory=RequestTimes)
