"""Flags that take one of a few words."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, get_args

from trtllm_cli.errors import UsageError


def choice(value: str | None, allowed: Any, flag: str) -> Any:
    """`value`, which must be one of `allowed` (a Literal or words), or None. Raises UsageError naming the flag."""
    words: Sequence[str] = allowed if isinstance(allowed, tuple) else get_args(allowed)
    if value is None or value in words:
        return value
    near = difflib.get_close_matches(value, words, 1)
    fix = f"did you mean {near[0]}?" if near else f"one of {', '.join(words)}"
    raise UsageError(f"{flag} is {value!r}, it must be one of {', '.join(words)}", where=flag, fix=fix)
