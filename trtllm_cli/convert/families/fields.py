"""A snapshot's config.json, read field by field: each with its type, and what nobody reads is refused."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from trtllm_cli.errors import SnapshotError, UnsupportedError

_REQUIRED: Any = object()


class Fields:
    """The fields of one JSON object. A reader takes each by name and type; `refuse_unread` ends it."""

    def __init__(self, data: Mapping[str, Any], path: Path, prefix: str = "") -> None:
        self.data, self.path, self.prefix = data, path, prefix
        self._read: set[str] = set()

    def fill(self, defaults: Mapping[str, Any]) -> None:
        """Gives fields that are missing, but not those that are null, the values that the family's class has."""
        self.data = {**defaults, **self.data}

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.data.get(name) is not None

    def raw(self, name: str) -> Any:
        """The field as it is, None where it is missing; counts as read."""
        self._read.add(name)
        return self.data.get(name)

    def integer(self, name: str, default: Any = _REQUIRED, *, minimum: int = 1, maximum: int = 1 << 40) -> Any:
        """An integer from `minimum` to `maximum`; null and missing give the default."""
        value = self._take(name, default, "an integer", lambda v: isinstance(v, int) and not isinstance(v, bool))
        if value is not default and value < minimum:
            raise self.wrong(name, f"an integer of at least {minimum}")
        if value is not default and value > maximum:
            raise self.wrong(name, f"an integer up to {maximum}")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> Any:
        """An integer or float, as a float."""
        value = self._take(name, default, "a number", _is_number)
        return value if value is default else float(value)

    def flag(self, name: str, default: Any = _REQUIRED) -> Any:
        """true or false."""
        return self._take(name, default, "true or false", lambda v: isinstance(v, bool))

    def text(self, name: str, default: Any = _REQUIRED) -> Any:
        """A string."""
        return self._take(name, default, "a string", lambda v: isinstance(v, str))

    def numbers(self, name: str) -> list[float]:
        """A list of numbers."""

        def check(v: Any) -> bool:
            return isinstance(v, list) and all(map(_is_number, v))

        return [float(x) for x in self._take(name, _REQUIRED, "a list of numbers", check)]

    def texts(self, name: str, default: Any = _REQUIRED) -> Any:
        """A list of strings."""
        return self._take(
            name,
            default,
            "a list of strings",
            lambda v: isinstance(v, list) and all(isinstance(x, str) for x in v),
        )

    def table(self, name: str) -> Fields | None:
        """A JSON object, or None where the field is null or missing."""
        value = self._take(name, None, "an object", lambda v: isinstance(v, dict))
        return None if value is None else Fields(value, self.path, f"{self.prefix}{name}.")

    def wrong(self, name: str, expected: str) -> SnapshotError:
        """The error for a field of the wrong type or value."""
        found = repr(self.data.get(name))
        found = found if len(found) <= 60 else found[:57] + "..."
        return SnapshotError(
            f"field `{self.prefix}{name}` should be {expected}, found {found}",
            where=f"{self.path}: {self.prefix}{name}",
            fix="fetch the file again, or mend the field",
        )

    def unsupported(self, name: str, why: str, fix: str | None = None) -> UnsupportedError:
        """The error for a field whose value cannot be honoured."""
        return UnsupportedError(
            f"`{self.prefix}{name}` is {self.data.get(name)!r}: {why}",
            where=f"{self.path}: {self.prefix}{name}",
            fix=fix,
        )

    def refuse_unread(self, without_effect: Collection[str], neutral: Mapping[str, tuple[Any, ...]]) -> None:
        """Refuses each field that was not read, is not known to be without effect, or is not at a neutral value."""
        for name, value in self.data.items():
            if name in self._read or name in without_effect or (name in neutral and value in neutral[name]):
                continue
            if name in neutral:
                values = " or ".join(repr(v) for v in neutral[name])
                raise self.unsupported(name, f"only {values} can be honoured")
            if value is None:
                continue
            raise self.unsupported(
                name,
                "this field is not known here, and may change the numbers",
                fix="remove the field from the file if you know that it has no effect on the model's outputs",
            )

    def _take(self, name: str, default: Any, expected: str, check: Any) -> Any:
        value = self.raw(name)
        if value is None:
            if default is _REQUIRED:
                raise SnapshotError(
                    f"the field `{self.prefix}{name}` is missing",
                    where=f"{self.path}: {self.prefix}{name}",
                    fix="fetch the file again, or add the field",
                )
            return default
        if not check(value):
            raise self.wrong(name, expected)
        return value


def _is_number(value: Any) -> bool:
    """Whether it is a finite number; Python's JSON also reads NaN and Infinity."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
