"""What a benchmark sends: requests with prompts of known tokens and exact output lengths.

A dataset is a JSON Lines file with TensorRT-LLM's fields, one request a line:

    {"task_id": 0, "input_ids": [17, 3, 911], "output_tokens": 128}
    {"task_id": 1, "prompt": "Once upon a time", "output_tokens": 128}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeGuard

import numpy as np
import numpy.typing as npt

from trtllm_cli.errors import RequestError, UsageError

Encode = Callable[[str], list[int]]

_TEXT_FIELDS = ("prompt", "text", "input", "content", "question")


@dataclass(frozen=True)
class Sample:
    """One request: its prompt, as tokens or as text that is not tokenized yet, and its output length in tokens."""

    task_id: int
    output_tokens: int
    input_ids: tuple[int, ...] = ()
    prompt: str | None = None

    def to_line(self) -> str:
        """Its line in a dataset."""
        prompt = {"prompt": self.prompt} if self.prompt is not None else {"input_ids": list(self.input_ids)}
        return json.dumps({"task_id": self.task_id, **prompt, "output_tokens": self.output_tokens}, ensure_ascii=False)


@dataclass(frozen=True)
class NormalLengths:
    """Lengths around `mean`, rounded; none below 1."""

    mean: float
    stdev: float = 0.0
    what: str = "input"  # names the flags in errors

    def __post_init__(self) -> None:
        if self.mean < 1:
            raise UsageError(f"the mean is {self.mean:g}, it must be at least 1 token", where=f"--{self.what}-mean")
        if self.stdev < 0:
            raise UsageError(f"the deviation is {self.stdev:g}, it must be 0 or more", where=f"--{self.what}-stdev")

    def draw(self, rng: np.random.Generator, n: int) -> list[int]:
        """`n` lengths."""
        drawn: npt.NDArray[np.float64] = rng.normal(self.mean, self.stdev, n)
        return [max(1, round(float(x))) for x in drawn]


@dataclass(frozen=True)
class UniformLengths:
    """Lengths from `low` to `high`, both counted in, all equally likely."""

    low: int
    high: int
    what: str = "input"

    def __post_init__(self) -> None:
        if self.low < 1:
            raise UsageError(f"the least length is {self.low}, it must be at least 1 token", where=f"--{self.what}-min")
        if self.high < self.low:
            raise UsageError(
                f"--{self.what}-max {self.high} is less than --{self.what}-min {self.low}", where=f"--{self.what}-max"
            )

    def draw(self, rng: np.random.Generator, n: int) -> list[int]:
        """`n` lengths."""
        return [int(x) for x in rng.integers(self.low, self.high, n, endpoint=True)]


Lengths = NormalLengths | UniformLengths


def synthetic(num_requests: int, inputs: Lengths, outputs: Lengths, vocab_size: int, *, seed: int = 0) -> list[Sample]:
    """Requests of random tokens. The same arguments give the same requests, on every machine."""
    if num_requests < 1:
        raise UsageError(f"{num_requests} requests are none", where="--num-requests", fix="ask for at least 1")
    if vocab_size < 1:
        raise UsageError(f"a vocabulary of {vocab_size} has no tokens", where="--vocab-size")
    rng = np.random.default_rng(seed)
    input_lengths = inputs.draw(rng, num_requests)
    output_lengths = outputs.draw(rng, num_requests)
    return [
        Sample(task_id=i, output_tokens=output, input_ids=tuple(rng.integers(0, vocab_size, length).tolist()))
        for i, (length, output) in enumerate(zip(input_lengths, output_lengths, strict=True))
    ]


def from_lines(
    path: Path, encode: Encode | None, outputs: Lengths, *, num_requests: int | None = None, seed: int = 0
) -> list[Sample]:
    """One request for each line of a text or JSON Lines file; with `encode` None the prompts stay text.

    A JSON line's own "output_tokens" wins over `outputs`. Raises UsageError when the file has fewer than
    `num_requests` lines.
    """
    texts = _read_texts(path)[:num_requests]
    if num_requests is not None and len(texts) < num_requests:
        raise UsageError(
            f"{path} has {len(texts)} prompts, {num_requests} were asked for",
            where="--num-requests",
            fix=f"ask for at most {len(texts)}, or cut the text by length with --input-mean",
        )
    lengths = outputs.draw(np.random.default_rng(seed), len(texts))
    samples = []
    for i, ((text, own), drawn) in enumerate(zip(texts, lengths, strict=True)):
        output = drawn if own is None else own
        if encode is None:
            samples.append(Sample(task_id=i, output_tokens=output, prompt=text))
        else:
            samples.append(Sample(task_id=i, output_tokens=output, input_ids=tuple(encode(text))))
    return samples


def from_running_text(
    path: Path, encode: Encode, inputs: Lengths, outputs: Lengths, *, num_requests: int | None = None, seed: int = 0
) -> list[Sample]:
    """The whole text in one row of tokens, cut into prompts of the lengths that `inputs` draws.

    Without `num_requests`, as many as the text gives. Raises UsageError when it gives fewer than asked for.
    """
    tokens = encode("\n".join(text for text, _ in _read_texts(path)))
    rng = np.random.default_rng(seed)
    pieces: list[tuple[int, ...]] = []
    start = 0
    while num_requests is None or len(pieces) < num_requests:
        (length,) = inputs.draw(rng, 1)
        if start + length > len(tokens):
            break
        pieces.append(tuple(tokens[start : start + length]))
        start += length
    if not pieces or (num_requests is not None and len(pieces) < num_requests):
        raise UsageError(
            f"{path} has {len(tokens)} tokens, enough for {len(pieces)} such prompts",
            where="--num-requests",
            fix="give a longer text, fewer requests or shorter prompts",
        )
    lengths = outputs.draw(rng, len(pieces))
    return [
        Sample(task_id=i, output_tokens=output, input_ids=piece)
        for i, (piece, output) in enumerate(zip(pieces, lengths, strict=True))
    ]


def write_dataset(samples: Iterable[Sample], out: TextIO) -> None:
    """One line for each request."""
    for sample in samples:
        out.write(sample.to_line() + "\n")


def read_dataset(path: Path, *, num_requests: int | None = None) -> list[Sample]:
    """The first `num_requests` requests of a dataset, or all. Raises UsageError that names the line."""
    samples = []
    for where, line in _lines(path):
        samples.append(_parse_line(line, where))
        if len(samples) == num_requests:
            break
    if not samples:
        raise UsageError(f"{path} holds no requests", where="--dataset")
    if num_requests is not None and len(samples) < num_requests:
        raise UsageError(
            f"{path} has {len(samples)} requests, {num_requests} were asked for",
            where="--num-requests",
            fix=f"ask for at most {len(samples)}, or leave the flag out",
        )
    return samples


def tokenize(samples: Sequence[Sample], encode: Encode | None) -> list[Sample]:
    """The samples with their text tokenized. Raises UsageError for text where there is no tokenizer."""
    done = []
    for sample in samples:
        if sample.prompt is None:
            done.append(sample)
            continue
        if encode is None:
            raise UsageError(
                "the dataset has text prompts, and the engine carries no tokenizer",
                where="--dataset",
                fix="make a dataset of tokens: trtllm bench prepare-dataset real-dataset --tokenizer DIR ...",
            )
        ids = tuple(encode(sample.prompt))
        if not ids:
            raise UsageError(f"the prompt of task {sample.task_id} has no tokens", where="--dataset")
        done.append(Sample(task_id=sample.task_id, output_tokens=sample.output_tokens, input_ids=ids))
    return done


def check_fits(samples: Sequence[Sample], *, max_input_len: int, max_seq_len: int, vocab_size: int) -> None:
    """Raises RequestError for the first request that the engine could not serve, before anything is measured."""
    for sample in samples:
        task, length, output = f"task {sample.task_id}", len(sample.input_ids), sample.output_tokens
        total = length + output
        if length > max_input_len:
            raise RequestError(
                f"{task} has {length} prompt tokens; the engine takes {max_input_len}",
                where="--dataset",
                fix=f"shorten it, or build with --max-input-len {length}",
            )
        if total > max_seq_len:
            raise RequestError(
                f"{task} needs {length} + {output} = {total} tokens; the engine's max_seq_len is {max_seq_len}",
                where="--dataset",
                fix=f"shorten it, or build with --max-seq-len {total}",
            )
        if (top := max(sample.input_ids)) >= vocab_size:
            raise RequestError(
                f"{task} has token {top}; the engine's vocabulary has {vocab_size}",
                where="--dataset",
                fix="prepare the dataset with this engine's tokenizer or --vocab-size",
            )


def _parse_line(line: str, where: str) -> Sample:
    data = _parse_json(line, where)
    unknown = set(data) - {"task_id", "input_ids", "prompt", "output_tokens", "lora_request"}
    if unknown or data.get("lora_request") is not None:
        field = sorted(unknown)[0] if unknown else "lora_request"
        raise UsageError(f"field `{field}` is not one that a request has here", where=where, fix="remove it")
    task_id, output = data.get("task_id", 0), data.get("output_tokens")
    if not _is_int(task_id):
        raise UsageError(f"`task_id` is {task_id!r}, not an integer", where=where)
    if not _is_int(output) or output < 1:
        raise UsageError(f"`output_tokens` is {output!r}, it must be an integer of at least 1", where=where)
    ids, prompt = data.get("input_ids"), data.get("prompt")
    if ids is None and isinstance(prompt, str) and prompt:
        return Sample(task_id=task_id, output_tokens=output, prompt=prompt)
    if isinstance(ids, list) and ids and all(_is_int(i) and i >= 0 for i in ids):
        return Sample(task_id=task_id, output_tokens=output, input_ids=tuple(ids))
    raise UsageError("a request needs `input_ids`, a list of token ids, or `prompt`, a text", where=where)


def _read_texts(path: Path) -> list[tuple[str, int | None]]:
    """Each prompt of a text or JSON Lines file, with the output length that it names."""
    if path.suffix not in (".jsonl", ".json", ".ndjson"):
        texts: list[tuple[str, int | None]] = [(line, None) for _, line in _lines(path)]
    else:
        texts = [_text_of(_parse_json(line, where), where) for where, line in _lines(path)]
    if not texts:
        raise UsageError(f"{path} has no text", where="--dataset")
    return texts


def _text_of(data: dict[str, Any], where: str) -> tuple[str, int | None]:
    output = data.get("output_tokens")
    if output is not None and (not _is_int(output) or output < 1):
        raise UsageError(f"`output_tokens` is {output!r}, it must be an integer of at least 1", where=where)
    for field in _TEXT_FIELDS:
        if isinstance(text := data.get(field), str) and text:
            return text, output
    raise UsageError(f"the line has none of the text fields {', '.join(_TEXT_FIELDS)}", where=where)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Where each line that is not blank stands, and the line."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", line.rstrip("\n")
    except FileNotFoundError:
        raise UsageError(f"no such dataset: {path}", where="--dataset", fix="check the path") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text", where="--dataset") from None
    except OSError as e:
        raise UsageError(f"{path} cannot be read: {e.strerror}", where="--dataset") from None


def _parse_json(line: str, where: str) -> dict[str, Any]:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UsageError(f"the line is not valid JSON: {e}", where=where) from None
    if not isinstance(data, dict):
        raise UsageError(f"the line holds a JSON {type(data).__name__}, not an object", where=where)
    return data


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
