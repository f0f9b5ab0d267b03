"""Trying again: what may pass with time, what will not, and how long to wait."""

from __future__ import annotations

import contextlib
import email.utils
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub.utils import hf_raise_for_status

LONGEST_ASKED_WAIT = 600.0  # seconds: a hub that says "retry after" more than this is not waited for


@dataclass(frozen=True)
class Patience:
    """How long to wait for the hub, and how often to try again."""

    timeout: float = 10.0  # seconds without a byte
    attempts: int = 6  # failures in a row, without a byte of progress between them
    first_wait: float = 1.0  # seconds; doubled with each failure
    longest_wait: float = 30.0

    @classmethod
    def from_environment(cls) -> Patience:
        """The defaults, with HF_HUB_DOWNLOAD_TIMEOUT."""
        value = os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT", "")
        return cls(timeout=float(value)) if re.fullmatch(r"\d*\.?\d+", value) and float(value) > 0 else cls()

    def ends(self, failures: int, asked: float | None) -> bool:
        """Whether to give up after this many failures in a row, or because the hub asks to wait too long."""
        return failures >= self.attempts or (asked or 0) > LONGEST_ASKED_WAIT

    def wait(self, failures: int, asked: float | None) -> float:
        """Seconds before the next try, after this many failures in a row; `asked` is the hub's own wish."""
        return asked if asked is not None else min(self.longest_wait, self.first_wait * 2 ** (failures - 1))


class TryAgain(Exception):  # noqa: N818
    """A failure that time may mend. `wait`: the seconds that the hub asks for; `answered`: whether it was the hub."""

    def __init__(self, reason: str, wait: float | None = None, *, answered: bool = True) -> None:
        super().__init__(reason)
        self.wait = wait
        self.answered = answered


def check_status(response: Any) -> None:
    """Raises TryAgain for what may pass (rate limits, 5xx, an expired CDN link), HfHubHTTPError for what will not."""
    status = response.status_code
    if status == 429:
        raise TryAgain("the hub limits the rate of requests (HTTP 429)", asked_wait(response.headers))
    expired = status == 403 and response.history and "x-error-code" not in response.headers
    if status in (408, 425) or status >= 500 or expired:
        raise TryAgain(f"the hub answered HTTP {status}", asked_wait(response.headers))
    if status >= 400:
        response.read()
        hf_raise_for_status(response)


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that the hub asks to wait: Retry-After (seconds or a date) or the hub's `ratelimit` header."""
    value = headers.get("retry-after", "").strip()
    if value.isdecimal():
        return float(value)
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    match = re.search(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("ratelimit", ""))
    return float(match[1]) if match else None


def describe_failure(e: Exception) -> str:
    """What a transport's exception means, in words."""
    name = type(e).__name__
    if "Timeout" in name:
        return "no answer within the time limit" if name != "ReadTimeout" else "the connection stalled"
    return str(e) or name
