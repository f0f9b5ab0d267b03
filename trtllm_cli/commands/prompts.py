"""What `trtllm run` is to generate from: arguments, text files, JSON Lines, standard input."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_cli.commands.standard_input import read_all
from trtllm_cli.errors import UsageError

if TYPE_CHECKING:
    from trtllm_cli.run.llm import Prompt
    from trtllm_cli.run.request import SamplingParams

CONTENT = ("prompt", "messages", "input_ids")  # of a JSON line: one of them
ALIASES = {"output_tokens": "max_tokens", "max_output_len": "max_tokens", "random_seed": "seed"}
STDIN = "-"


@dataclass(frozen=True)
class PromptItem:
    """One prompt, what its line says beside it, and where it stands, for errors."""

    prompt: Prompt
    where: str
    overrides: dict[str, Any] = field(default_factory=dict)  # SamplingParams fields
    task_id: Any = None


def read_prompts(
    arguments: Sequence[str], input_file: str | None, token_ids: str | None, *, stdin: bool = False
) -> list[PromptItem]:
    """All prompts, in order. With `stdin`, and nothing else given, the whole of standard input is one.

    Raises UsageError, naming file and line, for what cannot be read as a prompt.
    """
    items = [PromptItem(text, f"prompt {i}") for i, text in enumerate(arguments)]
    if token_ids is not None:
        ids = parse_ids(token_ids, "--input-token-ids")
        if not ids:
            raise UsageError("no token ids", where="--input-token-ids", fix="write them like 1,2,3")
        items.append(PromptItem(ids, "--input-token-ids"))
    if input_file is not None:
        items += _read_file(input_file)
    if not items and stdin and input_file is None and (text := _decode(read_all(), "standard input")).strip():
        items.append(PromptItem(text.rstrip("\n"), "standard input"))
    return items


def parse_ids(text: str, where: str) -> list[int]:
    """Token ids with commas or spaces between them."""
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise UsageError(f"{text!r} is no list of token ids", where=where, fix="write them like 1,2,3") from None


def as_chat(item: PromptItem, system: str | None) -> PromptItem:
    """A text prompt as what the user says to the model; anything else as it is."""
    if not isinstance(item.prompt, str):
        return item
    messages = [{"role": "user", "content": item.prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return dataclasses.replace(item, prompt=messages)


def params_of(item: PromptItem, base: SamplingParams) -> SamplingParams:
    """The prompt's sampling parameters: the flags', but for what its line says."""
    if not item.overrides:
        return base
    from pydantic import TypeAdapter, ValidationError

    from trtllm_cli.artifact import describe
    from trtllm_cli.run.request import SamplingParams

    overrides = dict(item.overrides)
    if isinstance(overrides.get("stop"), str):
        overrides["stop"] = [overrides["stop"]]
    try:
        checked = TypeAdapter(SamplingParams).validate_python(overrides)
        return dataclasses.replace(base, **{name: getattr(checked, name) for name in overrides})
    except ValidationError as e:
        raise UsageError(describe(e), where=item.where) from None
    except UsageError as e:
        raise UsageError(e.message, where=f"{item.where}, {e.where}", fix=e.fix) from None


def _read_file(name: str) -> Iterator[PromptItem]:
    if name == STDIN:
        text, where = _decode(read_all(), "standard input"), "standard input"
        json_lines = text.lstrip().startswith("{")
    else:
        path, where = Path(name), name
        if path.suffix not in (".txt", ".jsonl"):
            raise UsageError(
                f"{name} is neither a .txt file (a prompt a line) nor a .jsonl file (a JSON object a line)",
                where="--input-file",
            )
        json_lines = path.suffix == ".jsonl"
        try:
            text = _decode(path.read_bytes(), name)
        except OSError as e:
            raise UsageError(f"cannot read {name}: {e.strerror}", where="--input-file") from None
    read = _json_item if json_lines else PromptItem
    lines = (
        (line, f"{where}, line {i}") for i, line in enumerate(text.splitlines() if json_lines else text.split("\n"), 1)
    )
    items = [read(line.rstrip("\r"), place) for line, place in lines if line.strip()]
    if not items:
        raise UsageError(f"{where} holds no prompt", where="--input-file")
    return iter(items)


def _json_item(line: str, where: str) -> PromptItem:
    try:
        data: Any = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UsageError(f"not valid JSON: {e}", where=where) from None
    if not isinstance(data, dict):
        raise UsageError(f"a JSON {type(data).__name__}, not an object", where=where)
    given = [name for name in CONTENT if name in data]
    if len(given) != 1:
        raise UsageError(
            f"the line has {' and '.join(given) if given else 'no prompt'}",
            where=where,
            fix=f"give one of {', '.join(CONTENT)}",
        )
    prompt = data.pop(given[0])
    _check_content(given[0], prompt, where)
    task_id = data.pop("task_id", None)
    overrides = {ALIASES.get(str(name), str(name)): value for name, value in data.items()}
    _check_names(overrides, where)
    return PromptItem(prompt, where, overrides, task_id)


def _check_content(name: str, value: Any, where: str) -> None:
    ok = {
        "prompt": lambda: isinstance(value, str),
        "messages": lambda: _list_of(value, dict) and bool(value),
        "input_ids": lambda: _list_of(value, int) and not _list_of(value, bool) and bool(value),
    }[name]()
    if not ok:
        kind = {"prompt": "text", "messages": "a list of messages", "input_ids": "a list of token ids"}[name]
        raise UsageError(f"`{name}` must be {kind}", where=where)


def _list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _check_names(names: Iterable[str], where: str) -> None:
    from trtllm_cli.run.request import SamplingParams

    known = [f.name for f in dataclasses.fields(SamplingParams)]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *CONTENT], 1)
            fix = f"did you mean {near[0]}?" if near else f"beside the prompt a line may have {', '.join(known)}"
            raise UsageError(f"unknown field `{name}`", where=where, fix=fix)


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = 1 + data[: e.start].count(b"\n")
        raise UsageError(f"not UTF-8 text: byte 0x{data[e.start]:02x}", where=f"{where}, line {line}") from None
