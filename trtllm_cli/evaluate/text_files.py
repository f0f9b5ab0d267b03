"""Texts from where people have them: files of several kinds, the hub, and the two sets that the package ships."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from trtllm_cli.errors import ResourceError, UsageError

CALIBRATION, HELDOUT = "calibration", "heldout"  # the shipped sets, which share no text; see data/README.txt
MAX_CHARS = 1 << 24  # of a source; far more than a measurement or a calibration looks at
FIELDS = ("text", "article", "content", "prompt", "question", "input")  # where a record's text may be, by preference
_NEW_DOCUMENT = "\f"
_EXTRA = 'pip install "trtllm-cli[quantize]"'


def load_texts(source: str | Path) -> list[str]:
    """The documents of `source`, none empty, up to MAX_CHARS in all.

    `source` is CALIBRATION or HELDOUT, a file (.jsonl, .parquet; any other is plain text, in which a form feed begins
    a new document), or a data set on the hub, NAME[:CONFIG[:SPLIT]], read with the `datasets` library. Raises
    UsageError for what cannot be read as text, ResourceError for a library that is missing.
    """
    path = Path(source)
    if source in (CALIBRATION, HELDOUT):
        shipped = resources.files("trtllm_cli.evaluate").joinpath("data", f"{source}.txt.gz")
        texts: Iterable[str] = gzip.decompress(shipped.read_bytes()).decode().split(_NEW_DOCUMENT)
    elif path.is_file():
        texts = _of_file(path)
    elif path.suffix or path.is_absolute() or path.exists():
        raise UsageError(f"no such file: {path}", where="--text", fix="give a .txt, .jsonl or .parquet file")
    else:
        texts = _of_hub(str(source))
    found = list(_limited(text for text in texts if text.strip()))
    if not found:
        raise UsageError(f"{source} holds no text", where="--text", fix="give a file with text in it")
    return found


def _limited(texts: Iterable[str]) -> Iterator[str]:
    left = MAX_CHARS
    for text in texts:
        # JSON can hold half of a surrogate pair, which no tokenizer takes.
        yield text[:left].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        left -= len(text)
        if left <= 0:
            return


def _of_file(path: Path) -> Iterable[str]:
    match path.suffix.lower():
        case ".jsonl" | ".ndjson":
            return _json_lines(path)
        case ".parquet":
            return _parquet(path)
    return _plain_text(path).split(_NEW_DOCUMENT)


def _plain_text(path: Path) -> str:
    """The file's beginning as UTF-8."""
    with path.open("rb") as file:
        data = file.read(4 * MAX_CHARS + 1)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        if len(data) > 4 * MAX_CHARS and e.start >= len(data) - 4:  # cut within a character
            return data[: e.start].decode("utf-8")
        raise _not_text(path, e) from None


def _not_text(path: Path, e: UnicodeDecodeError) -> UsageError:
    return UsageError(
        f"{path} is not UTF-8 text: byte {e.start} is 0x{e.object[e.start]:02x}",
        where="--text",
        fix="convert it to UTF-8, or give a .txt, .jsonl or .parquet file",
    )


def _json_lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except UnicodeDecodeError as e:
                raise _not_text(path, e) from None
            except (ValueError, RecursionError) as e:
                raise UsageError(f"line {number} is not JSON: {e}", where=str(path), fix="one JSON value a line") from e
            if (text := _text_of(record)) is None:
                raise UsageError(
                    f"line {number} has no text",
                    where=str(path),
                    fix=f'give lines like {{"text": "..."}}; also read: {", ".join(FIELDS[1:])}, messages',
                )
            yield text


def _text_of(record: Any) -> str | None:
    """A record's text: itself, one of FIELDS, or the contents of its messages."""
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        return None
    for field in FIELDS:
        if isinstance(record.get(field), str):
            return str(record[field])
    messages = record.get("messages")
    if isinstance(messages, list):
        contents = [m["content"] for m in messages if isinstance(m, dict) and isinstance(m.get("content"), str)]
        return "\n".join(contents) or None
    return None


def _parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ResourceError("reading .parquet files needs pyarrow", where=str(path), fix=_EXTRA) from None
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            columns = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
            column = next((name for name in FIELDS if name in columns), columns[0] if len(columns) == 1 else None)
            if column is None:
                found = ", ".join(schema.names)
                raise UsageError(
                    f"{path} has no column of text that stands out (its columns: {found})",
                    where="--text",
                    fix=f"name the column one of {', '.join(FIELDS)}",
                )
            for batch in file.iter_batches(columns=[column]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (pa.ArrowException, OSError) as e:
        raise UsageError(
            f"{path} is damaged: {str(e).splitlines()[0]}", where="--text", fix="fetch or make the file again"
        ) from None


def _of_hub(name: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise ResourceError(
            f"no such file: {name}; to read a data set of that name from the hub, the `datasets` library is needed",
            where="--text",
            fix="give a .txt, .jsonl or .parquet file, or pip install datasets",
        ) from None
    repo, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    try:
        for record in datasets.load_dataset(repo, config or None, split=split or "train", streaming=True):
            if (text := _text_of(record)) is not None:
                yield text
    except Exception as e:  # the library raises anything, from the network's errors to its own
        raise UsageError(
            f"the data set {name} cannot be read: {str(e).splitlines()[0] if str(e) else type(e).__name__}",
            where="--dataset",
            fix="NAME[:CONFIG[:SPLIT]] such as Salesforce/wikitext:wikitext-2-raw-v1:test, or give a file",
        ) from None
