"""One table of what the scripts here have measured: python -m benchmarks.h200.results DIRECTORY

Reads every JSON file of the directory that serving.py, ttft.py, startup.py, attention.py and two_gpus.py have written
(of the same row the newest) and writes benchmarks/h200/results.md. Ratios above 1 are ahead, of times and of rates.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.common import say, table
from benchmarks.h200 import attention, floors
from benchmarks.h200.machine import machine_line
from benchmarks.h200.serving import row_of

Row = dict[str, Any]
ORDER = [*dict.fromkeys(case for case, _, _ in floors.ROWS)]


def read(directory: Path) -> list[dict[str, Any]]:
    """The files' contents, the oldest first; what is no result of these scripts is left out."""
    found = []
    for path in sorted(directory.glob("*.json")):
        data = json.loads(path.read_text())
        if isinstance(data, dict) and {"script", "machine", "rows"} <= data.keys():
            found.append(data)
    return sorted(found, key=lambda data: data["machine"]["date"])


def merge(results: list[dict[str, Any]]) -> list[Row]:
    """The newest of each row, in the order of the table."""
    rows: dict[tuple[Any, ...], Row] = {}
    for data in results:
        for row in data["rows"] if data["script"] != "two_gpus" else []:
            key = (row["case"], row["shape"], row["format"], row["kv"], row.get("requests"))
            rows[key] = {**row, **_beside_others(row), "date": data["machine"]["date"][:10]}
    places = {case: i for i, case in enumerate(ORDER)}
    formats = list(floors.FORMATS)
    return sorted(
        rows.values(),
        key=lambda r: (places.get(r["case"], len(places)), r["case"], r["shape"], formats.index(r["format"]), r["kv"],
                       r.get("requests") or 0),
    )  # fmt: skip


def _beside_others(row: Row) -> Row:
    """A row's figure beside the goal, the peers and the floor as they are today."""
    what = [row[name] for name in ("case", "shape", "format", "kv")]
    floor = None if row["floor"] is None else floors.floor(*what, requests=row.get("requests"))
    return row_of(*what, row["value"], floor, {})


def _beside(row: Row, name: str, ratio: str) -> str:
    return f"{floors.figure(row[name])} (×{row[ratio]:.2f})" if row[name] is not None else "–"


def markdown(results: list[dict[str, Any]]) -> str:
    """The document."""
    machines = list(dict.fromkeys(machine_line(data["machine"]) for data in results))
    text = "# On an H200\n\n"
    text += "Ratios above 1 are ahead of what they are beside. What each row is: README.md; the floors: NOTES.md.\n\n"
    text += "".join(f"- {line}\n" for line in machines) + "\n"
    rows, notes = [], []
    for row in merge(results):
        what = [row["case"] + (f" ({row['requests']} requests)" if row.get("requests") else "")]
        what += [row["shape"], row["format"], row["kv"], floors.figure(row["value"]), row["unit"]]
        pairs = [("goal", "of_goal"), ("vllm", "of_vllm"), ("tensorrt_llm", "of_tensorrt_llm"), ("floor", "of_floor")]
        rows.append([*what, *(_beside(row, *pair) for pair in pairs), row["date"]])
        if row["note"]:
            notes.append(f"- {row['case']} {row['format']}: {row['note']}.\n")
    headings = ["row", "model", "weights", "KV", "measured", "unit", "goal", "vLLM", "TensorRT-LLM", "floor", "date"]
    text += table(headings, rows) if rows else ""
    text += "\n" + "".join(dict.fromkeys(notes)) if notes else ""
    both = [row for data in results if data["script"] == "two_gpus" for row in data["rows"]]
    if both:
        kinds = ("part", "shape", "format", "kind", "size", "bytes", "requests")
        newest = {tuple(row.get(key) for key in kinds): row for row in both}
        text += "\n## Two H200\n\n" + two_gpus(list(newest.values()))
    attentions = [data for data in results if data["script"] == "attention"]
    if attentions:
        text += "\n## Attention\n\nThe best tiles of each case.\n\n" + attention.best_table(attentions[-1]["best"])
    return text


def two_gpus(rows: list[Row]) -> str:
    """What two_gpus.py measured: all-reduces, steps, and the 70B shape."""
    reduces = [row for row in rows if row["part"] == "reduce"]
    steps = [row for row in rows if row["part"] == "steps"]
    served = [row for row in rows if row["part"] == "serve"]
    text = ""
    if reduces:
        lines = []
        for row in reduces:
            # In words with flags, or rows without: an engine takes the one that is faster for the size.
            times = [
                min((row[way] for way in (name, f"{name}, rows") if way in row), default=None)
                for name in ("all_reduce", "all_reduce_add_rms_norm")
            ]
            ours = ["–" if us is None else f"{us:.1f}" for us in times]
            ahead = f"×{row['nccl'] / times[0]:.2f}" if times[0] else "–"
            lines.append([f"{row['bytes'] >> 10} KiB", *ours, f"{row['nccl']:.1f}", ahead])
        headings = ["all-reduce of", "one-shot, us", "with add and norm, us", "NCCL, us", "ahead of NCCL"]
        text += table(headings, lines) + "\n"
    if steps:
        lines = []
        for row in steps:
            times = [f"{row['one_ms']:.2f}", f"{row['two_ms']:.2f}", f"×{row['times']:.2f}"]
            lines.append([f"{row['kind']} {row['size']}", row["shape"], row["format"], *times])
        text += table(["step", "model", "weights", "one GPU, ms", "two, ms", "faster"], lines)
    for row in served:
        text += (
            f"\n70B shape, FP8 weights and KV, 128 in, 128 out, {row['requests']} requests: {row['output_tok_s']:,.0f} "
            f"tok/s, ×{row['of_tensorrt_llm']:.2f} of TensorRT-LLM's published figure.\n"
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results.md")
    a = parser.parse_args()
    results = read(a.directory)
    if not results:
        parser.error(f"no results in {a.directory}")
    text = markdown(results)
    a.output.write_text(text)
    say(text)


if __name__ == "__main__":
    main()
