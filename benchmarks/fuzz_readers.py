"""Mutated files for every reader: none may crash it, hang it, make it take much memory, or write where it should not.

    python benchmarks/fuzz_readers.py --count 10000

Each reader runs in a process of its own with a limited address space, `--jobs` at a time, on the mutations that
tests/fuzzing.py makes from a tiny model's files. What went wrong is printed with its seed, and the exit code is 1.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import common

ROOT = Path(__file__).parent.parent
ADDRESS_SPACE = 8 << 30  # bytes; importing torch takes about 5 GB of it
PIECE = 1000  # inputs a process: a crash then loses few of the others
TIMEOUT = 1200  # seconds for a piece


def piece(name, count, seed):
    """Runs in its own process: one reader on some inputs; prints the outcome as JSON."""
    sys.path.insert(0, str(ROOT))
    import torch

    from tests.fuzzing import READERS, limit_memory, run

    torch.set_num_threads(1)
    limit_memory(ADDRESS_SPACE)
    reader = next(r for r in READERS if r.name == name)
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(vars(run(reader, count, Path(directory), seed))))


def measure(name, count, first_seed):
    """All pieces of one reader; the row, and what went wrong."""
    total = {"name": name, "inputs": 0, "accepted": 0, "refused": 0, "slowest": 0.0, "most_bytes": 0}
    faults, started = [], time.perf_counter()
    for i, start in enumerate(range(0, count, PIECE)):
        size, seed = min(PIECE, count - start), first_seed + i
        command = [sys.executable, __file__, "--piece", name, "--count", str(size), "--seed", str(seed)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        except subprocess.TimeoutExpired:
            faults.append(f"{name}, seed {seed}: no end after {TIMEOUT} s")
            continue
        if done.returncode:
            faults.append(f"{name}, seed {seed}: exit {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
            continue
        got = json.loads(done.stdout.splitlines()[-1])
        total["inputs"] += size
        for key in ("accepted", "refused"):
            total[key] += got[key]
        for key in ("slowest", "most_bytes"):
            total[key] = max(total[key], got[key])
    total["seconds"] = round(time.perf_counter() - started, 1)
    common.say(f"{name}: {total['inputs']} inputs, {len(faults)} faults")
    return total, faults


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="inputs for each reader")
    parser.add_argument("--jobs", type=int, default=2, help="readers at a time")
    parser.add_argument("--seed", type=int, default=1000, help="of the first thousand inputs; the next has the next")
    parser.add_argument("--piece", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.piece:
        return piece(args.piece, args.count, args.seed)
    sys.path.insert(0, str(ROOT))
    from tests.fuzzing import READERS

    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(lambda r: measure(r.name, args.count, args.seed), READERS))
    rows, faults = [row for row, _ in results], [fault for _, found in results for fault in found]
    data = {"machine": common.machine(), "address_space": ADDRESS_SPACE, "rows": rows, "faults": faults}
    cells = [
        (r["name"], r["inputs"], r["accepted"], r["refused"], f"{r['slowest']:.2f}", f"{r['most_bytes'] / 2**20:.1f}")
        for r in rows
    ]
    headings = ("reader", "inputs", "read", "refused", "slowest s", "most MiB allocated")
    text = f"""# Mutated input

{common.machine_line(data["machine"])}

Every input is read to the end or refused with one error of trtllm's own; a refusal leaves no output, and nothing is
written outside of it. Address space is limited to {ADDRESS_SPACE >> 30} GiB. Faults: {len(faults)}.

{common.table(headings, cells)}"""
    common.write_results("fuzz_readers", data, text)
    for fault in faults:
        common.say(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
