"""A conversation to the text that a model was tuned on, as its own chat template writes it.

The template is jinja2 that came with the weights: a stranger's code. It renders as under transformers, in a sandbox
that bounds what it may cost (template_sandbox.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any

from jinja2.exceptions import TemplateError, TemplateSyntaxError

from trtllm_cli.errors import EngineError, RequestError, TrtllmError
from trtllm_cli.run.template_sandbox import BoundedEnvironment, BudgetError

BASE_BUDGET = 4_000_000  # what any template may do: about so many characters, passes and calls together
BUDGET_PER_CHARACTER = 64  # and so much more for each character of the conversation


class _RefusedError(TemplateError):
    """The template called `raise_exception`."""


class ChatTemplate:
    """A compiled chat template. Thread-safe."""

    def __init__(self, source: str, *, where: str) -> None:
        """`where` is the file, for errors. Raises EngineError if the source is no valid template."""
        self._where = where
        self._env = BoundedEnvironment(
            filters={"tojson": _tojson}, functions={"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        )
        try:
            with self._env.budget(BASE_BUDGET):
                self._template = self._env.from_string(self._env.parse_bounded(source))
        except TemplateSyntaxError as e:
            raise self._error(f"the chat template is broken: {e.message} (line {e.lineno})") from None
        except (BudgetError, RecursionError, MemoryError) as e:
            raise self._error(f"the chat template is refused: {e}") from None
        except Exception as e:  # a template can make the compiler compute, and so fail, in any way
            raise self._error(f"the chat template is broken: {str(e) or type(e).__name__}") from None

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The conversation as text, by default up to where the answer begins.

        Raises RequestError if the template refuses the conversation or fails on it, EngineError if it does too much.
        """
        data = {"tools": None, "documents": None, **plain(variables), "messages": plain(check_messages(messages))}
        data["add_generation_prompt"] = add_generation_prompt
        size = len(json.dumps(data["messages"])) + len(json.dumps(data["tools"]))
        try:
            with self._env.budget(BASE_BUDGET + BUDGET_PER_CHARACTER * size):
                return "".join(self._template.generate(data))
        except _RefusedError as e:
            raise RequestError(f"the chat template refuses this conversation: {e.message}", where=self._where) from None
        except BudgetError as e:
            raise self._error(f"the chat template is stopped: {e}") from None
        except RecursionError:
            raise self._error("the chat template is stopped: it calls itself without end") from None
        except TrtllmError:
            raise
        except Exception as e:
            line = _template_line(e.__traceback__)
            at = f" (line {line})" if line else ""
            raise RequestError(f"the chat template fails on this conversation: {e}{at}", where=self._where) from None

    def _error(self, message: str) -> EngineError:
        return EngineError(message, where=self._where, fix="mend the template, or give plain prompts without it")


def check_messages(messages: Any) -> Sequence[Mapping[str, Any]]:
    """The messages, if they are a list of objects that each have a role. Raises RequestError otherwise."""
    if not isinstance(messages, list | tuple) or not messages:
        raise RequestError("a conversation must be a list of at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(f"message {i} is a {type(message).__name__}, not an object with `role` and `content`")
        if not isinstance(message.get("role"), str):
            raise RequestError(f"message {i} has no `role`", fix="give it one: system, user, assistant or tool")
    return messages


def plain(value: Any, depth: int = 0) -> Any:
    """A copy made of nothing but JSON's types: the sandbox need not know of any other's methods."""
    if depth > 64:
        raise RequestError("a message is nested too deeply")
    match value:
        case None | bool():
            return value
        case str():
            return str.__str__(value)
        case int():
            return int(value)
        case float():
            return float(value)
        case Mapping():
            return {plain(k, depth + 1): plain(v, depth + 1) for k, v in value.items()}
        case list() | tuple():
            return [plain(v, depth + 1) for v in value]
    raise RequestError(f"a message holds a {type(value).__name__}, which JSON cannot say")


def _template_line(trace: TracebackType | None) -> int | None:
    """The line of the template that an error passed last."""
    line = None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML escapes, as transformers' templates expect it."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise _RefusedError(str(message))


def _strftime_now(form: str) -> str:
    if len(form) > 256:
        raise BudgetError("a long date format")
    return datetime.now().strftime(form)
