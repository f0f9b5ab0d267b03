"""The line that `trtllm run` ends with: how long, how fast, how much."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trtllm_cli.artifact import human_bytes

if TYPE_CHECKING:
    from trtllm_cli.run.llm import LLM
    from trtllm_cli.run.request import RequestOutput


def summary(outputs: Sequence[RequestOutput], llm: LLM) -> str:
    """One line.

    TTFT is from a request's arrival to its first token, the mean over requests. Decode speed is the tokens after each
    first one, over all sequences, in the time from the earliest first token to the last token.
    """
    times = [output.times for output in outputs if output.times.first_token is not None]
    first = [t.first_token for t in times if t.first_token is not None]
    last = [t.last_token for t in times if t.last_token is not None]
    made = sum(len(one.token_ids) for output in outputs for one in output.outputs)
    answers = sum(bool(one.token_ids) for output in outputs for one in output.outputs)
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    cached = sum(output.cached_tokens for output in outputs)
    parts = []
    if len(outputs) > 1:
        parts.append(f"{len(outputs)} prompts")
    parts.append(_count(prompt, "prompt token") + (f" ({cached} cached)" if cached else ""))
    parts.append(_count(made, "output token"))
    if first:
        ttft = sum(f - t.arrival for f, t in zip(first, times, strict=True)) / len(first)
        parts.append(f"TTFT {_seconds(ttft)}")
        elapsed = max(last) - min(first)
        if made > answers and elapsed > 0:
            parts.append(f"decode {(made - answers) / elapsed:.1f} tok/s")
    stats = llm.stats
    parts.append(f"KV cache {stats.blocks_peak / llm.num_blocks:.0%} of {human_bytes(llm.kv_cache_bytes)}")
    if stats.preemptions:
        parts.append(_count(stats.preemptions, "preemption"))
    return " · ".join(parts)


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"
