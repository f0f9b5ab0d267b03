"""Mutated inputs for each reader, and what it must do with them: work, or refuse with a TrtllmError.

tests/convert/test_hostile_input.py runs a few hundred for each reader, benchmarks/fuzz_readers.py ten thousand.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import shutil
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.convert.gguf_maker import write_model
from tests.tiny_models import save_tiny_model
from trtllm_cli.convert.pipeline import ConvertOptions, convert
from trtllm_cli.errors import TrtllmError
from trtllm_cli.tensor_file import TensorFile

SHAPE = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
LIMIT_SECONDS = 20.0  # for one input; they take milliseconds
LIMIT_BYTES = 256 << 20  # that Python allocates for one input; the files are a few hundred KB at most
_NUMBERS = (0, 1, -1, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63), 0.5, 1e308, -1e308)
_STRANGE: tuple[object, ...] = (
    *_NUMBERS, None, True, False, "", "\0", "../../escaped", "/tmp/escaped", "a" * 5000, "é\ud800", [], {}, [[]],
    [None], {"": None}, [10**20] * 3, "nan", "NaN", float("nan"), float("inf"),
)  # fmt: skip


@dataclass
class Outcome:
    """What a run of mutated inputs came to."""

    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0  # seconds
    most_bytes: int = 0  # allocated by Python for one input
    refusals: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Reader:
    """A snapshot in `files`, the one among them that is mutated, and what reads it."""

    name: str
    make: Callable[[Path], None]  # writes the good snapshot into a directory
    target: str  # the file's name
    read: Callable[[Path, Path], object]  # (snapshot directory, output path)
    mutate: Callable[[bytes, random.Random], bytes]


def run(reader: Reader, count: int, directory: Path, seed: int = 0) -> Outcome:
    """Reads `count` mutations. AssertionError for anything but success and a TrtllmError, and for leftovers.

    `directory` is emptied of what it makes; a file that appears anywhere else in it than the output is an error.
    """
    good = directory / "good"
    good.mkdir()
    reader.make(good)
    data = (good / reader.target).read_bytes()
    rng = random.Random(seed)
    outcome = Outcome()
    before = _listing(directory)
    out = directory / "out"
    tracemalloc.start()
    try:
        for i in range(count):
            mutated = reader.mutate(data, rng)
            (good / reader.target).write_bytes(mutated)
            _read_one(reader, good, out, outcome, f"{reader.name}, seed {seed}, input {i}")
            assert _listing(directory) == before, f"{reader.name}, seed {seed}, input {i}: files were left behind"
    finally:
        tracemalloc.stop()
    return outcome


def _read_one(reader: Reader, good: Path, out: Path, outcome: Outcome, what: str) -> None:
    tracemalloc.reset_peak()
    base, started = tracemalloc.get_traced_memory()[0], time.monotonic()
    try:
        reader.read(good, out)
        outcome.accepted += 1
    except TrtllmError as e:
        outcome.refused += 1
        outcome.refusals[type(e).__name__] += 1
        assert not out.exists(), f"{what}: refused, but there is an output"
    except Exception as e:
        raise AssertionError(f"{what}: {type(e).__name__}: {e}") from e
    seconds, most = time.monotonic() - started, tracemalloc.get_traced_memory()[1] - base
    assert seconds < LIMIT_SECONDS, f"{what}: took {seconds:.1f} s"
    assert most < LIMIT_BYTES, f"{what}: allocated {most} bytes"
    outcome.slowest, outcome.most_bytes = max(outcome.slowest, seconds), max(outcome.most_bytes, most)
    if out.exists():
        shutil.rmtree(out)


def _listing(directory: Path) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*"))


def limit_memory(nbytes: int) -> None:
    """Caps this process's address space, so that an allocation that a file asks for fails instead of thrashing."""
    resource.setrlimit(resource.RLIMIT_AS, (nbytes, nbytes))


# Mutations


def flip_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to eight wounds: bits, bytes, 32 and 64-bit numbers, pieces cut out, doubled or inserted, the end cut."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        if not out:
            break
        at = _position(len(out), rng)
        match rng.randrange(8):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at] = rng.choice((0, 255, 127, 128, rng.randrange(256)))
            case 2 | 3:
                size = rng.choice((2, 4, 8))
                value = rng.choice(
                    (0, 1, (1 << (8 * size - 1)) - 1, 1 << (8 * size - 1), (1 << 8 * size) - 1, len(out))
                )
                out[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
            case 4:
                del out[at : at + rng.randint(1, 64)]
            case 5:
                out[at:at] = out[at : at + rng.randint(1, 64)]
            case 6:
                out[at:at] = rng.randbytes(rng.randint(1, 16))
            case 7:
                if rng.random() < 0.2:
                    del out[at:]
    return bytes(out)


def _position(length: int, rng: random.Random) -> int:
    """Mostly near the beginning, where headers are."""
    return min(int(length * rng.random() ** rng.choice((1, 3, 6))), length - 1)


def change_json(data: bytes, rng: random.Random) -> bytes:
    """One to four values replaced, dropped, doubled or renamed; now and then bytes of the text as well."""
    tree = json.loads(data)
    for _ in range(rng.randint(1, 4)):
        places = list(_places(tree))
        if not places:
            break
        holder, key = rng.choice(places)
        match rng.randrange(5):
            case 0 | 1 | 2:
                holder[key] = copy.deepcopy(rng.choice(_STRANGE))
            case 3:
                del holder[key]
            case 4 if isinstance(holder, dict):
                name = rng.choice(("__proto__", "", "x" * 3000, str(key).upper(), "quantization_config"))
                holder[name] = copy.deepcopy(holder[key])
            case _:
                holder[key] = [holder[key]] * rng.randint(0, 3)
    text = json.dumps(tree).encode("utf-8", "surrogatepass")
    if rng.random() < 0.2:
        return flip_bytes(text, rng)
    return b"[" * 100_000 + text if rng.random() < 0.01 else text


def _places(tree: object) -> Iterator[tuple[dict[object, object] | list[object], object]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from _places(value)


# Readers


def _snapshot(directory: Path, **options: object) -> None:
    save_tiny_model(directory, "llama", **SHAPE, **options)


def _bin_snapshot(directory: Path) -> None:
    _snapshot(directory, tokenizer=False)
    from safetensors.torch import load_file

    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def _gguf(directory: Path) -> None:
    from tests.tiny_models import tiny_model

    write_model(directory / "model.gguf", tiny_model("llama", **SHAPE, tie_word_embeddings=True))


def _read_tensors(directory: Path, out: Path) -> None:
    with TensorFile(directory / "model.safetensors") as file:
        for name in file.tensors:
            file.read(name)


def _convert(directory: Path, out: Path) -> None:
    gguf = directory / "model.gguf"
    convert(gguf if gguf.is_file() else directory, out, ConvertOptions(dtype="float32"))


READERS = (
    Reader("safetensors header", _snapshot, "model.safetensors", _read_tensors, flip_bytes),
    Reader("safetensors", _snapshot, "model.safetensors", _convert, flip_bytes),
    Reader("gguf", _gguf, "model.gguf", _convert, flip_bytes),
    Reader("config.json", _snapshot, "config.json", _convert, change_json),
    Reader(
        "index.json", lambda d: _snapshot(d, shard_size="4KB"), "model.safetensors.index.json", _convert, change_json
    ),
    Reader("tokenizer.json", _snapshot, "tokenizer.json", _convert, change_json),
    Reader("tokenizer_config.json", _snapshot, "tokenizer_config.json", _convert, change_json),
    Reader("pickle", _bin_snapshot, "pytorch_model.bin", _convert, flip_bytes),
)
