"""The arithmetic of a measurement: when tokens came in, what a report says. Plain Python, no torch, no numpy.

    TTFT = first token - arrival
    E2E  = last token - arrival
    TPOT = (E2E - TTFT) / (N - 1)      N output tokens; a request of one token has none
    ITL  = each gap between two tokens of a request

Times are seconds on one monotonic clock; what leaves this module is in milliseconds and tokens per second.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from pydantic import BaseModel, ConfigDict

FORMULAS = {
    "TTFT": "first token - arrival",
    "E2E": "last token - arrival",
    "TPOT": "(E2E - TTFT) / (N - 1), of requests with N > 1 output tokens",
    "ITL": "the gap between two neighbouring tokens of a request, over all requests",
    "Total Latency": "last token of all - first arrival",
    "Request Throughput": "requests / Total Latency",
    "Total Output Throughput": "output tokens / Total Latency",
    "Total Token Throughput": "(input + output tokens) / Total Latency",
    "Per User Output Throughput": "average over requests of N / E2E",
    "Per User Output Speed": "1 / average TPOT",
    "Per GPU Output Throughput": "Total Output Throughput / world size",
    "Average concurrency": "sum of E2E / Total Latency",
    "Percentiles": "linear between the two nearest of the sorted values, as numpy's",
}


@dataclass
class RequestRecord:
    """One request as it was measured."""

    task_id: int
    input_tokens: int
    arrival: float
    token_times: list[float] = field(default_factory=list)  # one per output token, in order
    token_ids: list[int] = field(default_factory=list)
    scheduled: float | None = None  # when its first prefill step began, if known

    @property
    def output_tokens(self) -> int:
        """Output tokens so far."""
        return len(self.token_times)

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.token_times[0] - self.arrival

    @property
    def e2e(self) -> float:
        """Seconds to the last token."""
        return self.token_times[-1] - self.arrival

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first; None for a request of one token."""
        return (self.e2e - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def itl(self) -> list[float]:
        """Seconds between neighbouring tokens."""
        return [b - a for a, b in pairwise(self.token_times)]


class Distribution(BaseModel):
    """How a number is spread; TensorRT-LLM's keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    minimum: float
    maximum: float
    average: float
    p50: float
    p90: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Distribution | None:
        """The distribution of `values`, or None where there are none."""
        ordered = sorted(values)
        if not ordered:
            return None
        return cls(
            minimum=ordered[0],
            maximum=ordered[-1],
            average=math.fsum(ordered) / len(ordered),
            **{f"p{q}": percentile(ordered, q) for q in (50, 90, 95, 99)},
        )


def percentile(ordered: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100) of sorted values, linear between the two nearest as numpy's default."""
    place = (len(ordered) - 1) * q / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


class Performance(BaseModel):
    """What the whole system did. Field names are TensorRT-LLM's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    total_latency_ms: float
    avg_request_latency_ms: float
    request_throughput_req_s: float
    system_output_throughput_tok_s: float
    system_total_throughput_tok_s: float
    output_throughput_per_user_tok_s: float
    output_throughput_per_gpu_tok_s: float
    request_latency_percentiles_ms: Distribution


class StreamingMetrics(BaseModel):
    """What each user saw. TPOT, ITL and the output speed are None where every request had one output token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    token_output_speed_tok_s: float | None
    avg_ttft_ms: float
    avg_tpot_ms: float | None
    avg_itl_ms: float | None
    ttft_percentiles_ms: Distribution
    tpot_percentiles_ms: Distribution | None
    itl_percentiles_ms: Distribution | None


def performance(records: Sequence[RequestRecord], world_size: int) -> Performance:
    """The system's numbers over finished requests; at least one."""
    assert all(r.token_times for r in records)
    total = max(r.token_times[-1] for r in records) - min(r.arrival for r in records)
    output_tokens = sum(r.output_tokens for r in records)
    input_tokens = sum(r.input_tokens for r in records)
    latency = _milliseconds(r.e2e for r in records)
    assert latency is not None
    return Performance(
        total_latency_ms=total * 1e3,
        avg_request_latency_ms=latency.average,
        request_throughput_req_s=len(records) / total,
        system_output_throughput_tok_s=output_tokens / total,
        system_total_throughput_tok_s=(input_tokens + output_tokens) / total,
        output_throughput_per_user_tok_s=math.fsum(r.output_tokens / r.e2e for r in records) / len(records),
        output_throughput_per_gpu_tok_s=output_tokens / total / world_size,
        request_latency_percentiles_ms=latency,
    )


def streaming(records: Sequence[RequestRecord]) -> StreamingMetrics:
    """Each user's numbers over finished requests; at least one."""
    ttft = _milliseconds(r.ttft for r in records)
    tpot = _milliseconds(t for r in records if (t := r.tpot) is not None)
    itl = _milliseconds(gap for r in records for gap in r.itl)
    assert ttft is not None
    return StreamingMetrics(
        token_output_speed_tok_s=1e3 / tpot.average if tpot and tpot.average > 0 else None,
        avg_ttft_ms=ttft.average,
        avg_tpot_ms=tpot.average if tpot else None,
        avg_itl_ms=itl.average if itl else None,
        ttft_percentiles_ms=ttft,
        tpot_percentiles_ms=tpot,
        itl_percentiles_ms=itl,
    )


def average_concurrency(records: Sequence[RequestRecord]) -> float:
    """Requests in flight on average (Little's law)."""
    total = max(r.token_times[-1] for r in records) - min(r.arrival for r in records)
    return math.fsum(r.e2e for r in records) / total


def _milliseconds(seconds: Iterable[float]) -> Distribution | None:
    return Distribution.of(s * 1e3 for s in seconds)
