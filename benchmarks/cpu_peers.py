"""SmolLM2-135M on this CPU: trtllm beside transformers, llama.cpp, OpenVINO GenAI and onnxruntime-genai.

    python benchmarks/cpu_peers.py                                  # the peers of this interpreter
    python benchmarks/cpu_peers.py --peer-python VENV/bin/python    # or of another; see README.md

All run the same weights, made from one GGUF file, with the same prompts, greedily, in a process of their own. Rounds
are interleaved: each engine has its turn in each round, and is stopped (SIGSTOP) while the others have theirs. What is
reported is the median over rounds. What else the machine does is measured too: turns wait for it to be quiet, as long
as --patience lasts, and one with company is left out.
"""

import argparse
import os
import statistics
import time

import common
from peers import Worker, add_arguments, begin, chosen, machine_cpu_seconds, python_of

PROMPT, DECODE, BATCH = 128, 64, 8  # tokens, tokens, sequences
COMPANY = 0.05  # of the machine, used by others: above it, a turn is not counted


def median(peer, what):
    """Over the quiet turns, or over all where fewer than 3 are."""
    quiet = [t[what] for t in peer.turns if t["company"] <= COMPANY]
    values = quiet if len(quiet) >= 3 else [t[what] for t in peer.turns]
    return statistics.median(values) if values else None


class Patience:
    """Waits for a quiet machine, `seconds` in all."""

    def __init__(self, seconds):
        self.left = seconds

    def wait(self):
        """Returns when the machine did next to nothing for half a second, or no patience is left."""
        while self.left > 0:
            busy, start = machine_cpu_seconds(), time.perf_counter()
            time.sleep(0.5)
            elapsed = time.perf_counter() - start
            if (machine_cpu_seconds() - busy) / elapsed / os.cpu_count() <= COMPANY:
                return
            self.left -= elapsed


def take_turn(peer, prompts, turn):
    """One engine's part of a round."""
    worker = peer.worker
    worker.go_on()
    machine, own, start = machine_cpu_seconds(), worker.cpu_seconds(), time.perf_counter()
    pick = [prompts[(turn * 5 + i) % len(prompts)] for i in range(BATCH + 4)]
    prefill = [worker.run([p], 0)["prefill_s"] for p in pick[:3]]
    one = worker.run([pick[3]], DECODE)
    many = worker.run(pick[4:], DECODE)
    elapsed = time.perf_counter() - start
    others = machine_cpu_seconds() - machine - (worker.cpu_seconds() - own)
    worker.pause()
    peer.turns.append(
        {
            "prefill": PROMPT / statistics.median([*prefill, one["prefill_s"]]),
            "decode_1": DECODE / one["decode_s"],
            "decode_8": BATCH * DECODE / many["decode_s"],
            "prefill_8": BATCH * PROMPT / many["prefill_s"],
            "company": round(max(0.0, others) / elapsed / os.cpu_count(), 3),
        }
    )


def warm_up(peer, prompts):
    """Runs each kind of work once; notes tokens, to compare. False, with the reason noted, where that fails."""
    try:
        for prompt in prompts[:3]:
            peer.tokens += peer.worker.run([prompt], 31)["tokens"]
        peer.worker.run(prompts[:BATCH], 4)
        peer.worker.pause()
    except Exception as e:  # a peer that fails is left out, and said
        peer.reason = str(e).strip().splitlines()[-1]
        common.say(f"leaving out {peer.name}: {e}")
    return not peer.reason


def measure_start(peer, python, threads, log, prompt):
    """A fresh process to its first token, and its peak memory after a request."""
    worker = Worker(python, peer, threads, log)
    try:
        worker.run([prompt], 0)
        peer.starts.append(time.perf_counter() - worker.started)
        worker.run([prompt], DECODE)
        peer.peak_rss.append(worker.ask(do="memory")["peak_rss_bytes"])
    finally:
        worker.close()


def agreement(peer, reference):
    """How many tokens are those of the reference, until the first that differs, of how many."""
    same = 0
    for ours, theirs in zip(peer.tokens, reference.tokens, strict=True):
        same += next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(theirs))
    return same, sum(map(len, reference.tokens))


def comparisons(peers):
    """Ours over theirs, at like precision; int8 and int4 beside transformers' bf16, which has no such formats."""
    rows = []
    for ours in (p for p in peers if p.kind == "trtllm" and p.turns):
        for theirs in (p for p in peers if p.kind != "trtllm" and p.turns):
            alike = theirs.like == ours.like
            if alike or (theirs.name == "transformers bf16" and ours.like in ("8 bit", "4 bit")):
                ratios = {w: median(ours, w) / median(theirs, w) for w in ("prefill", "decode_1", "decode_8")}
                rows.append({"ours": ours.name, "theirs": theirs.name, "like": alike, **ratios})
    return rows


def markdown(data):
    text = "# SmolLM2-135M on a CPU, beside other engines\n\n"
    text += f"{common.machine_line(data['machine'])}.\n\n"
    text += (
        f"{data['threads']} threads, {data['rounds']} interleaved rounds, medians. Prompts of {PROMPT} tokens; prefill "
        f"is of one; decode is {DECODE} tokens after it, greedy; batch {BATCH} counts the tokens of all. Start is from "
        "the start of a process (Python and its imports included, files in the page cache) to the first token of a "
        f"{PROMPT}-token prompt. Peak RSS is of one request. The last column: tokens until the first that differs from "
        "transformers fp32's, of 3 × 32.\n\n"
    )
    if data["noisy_turns"]:
        text += (
            f"**The machine was not quiet**: in {data['noisy_turns']} of {data['turns']} turns others used more than "
            f"{COMPANY:.0%} of it. Those turns are left out where an engine has 3 quiet ones.\n\n"
        )
    headings = ["engine", "class", "prefill tok/s", "decode tok/s", f"decode, batch {BATCH}"]
    headings += ["start s", "peak RSS MB", "same tokens"]
    rows = []
    for p in data["peers"]:
        if p["median"]:
            m = p["median"]
            speeds = (f"{m['prefill']:.0f}", f"{m['decode_1']:.1f}", f"{m['decode_8']:.0f}")
            start = f"{p['start_s']:.2f}" if p["start_s"] else "–"
            rss = f"{p['peak_rss_bytes'] / 1e6:.0f}" if p["peak_rss_bytes"] else "–"
            rows.append([p["name"], p["class"], *speeds, start, rss, "/".join(map(str, p["same_tokens"] or [])) or "–"])
    text += common.table(headings, rows) + "\n"
    text += "Ours over theirs (above 1: trtllm is faster):\n\n"
    rows = [
        [
            r["ours"],
            r["theirs"] + ("" if r["like"] else " *"),
            *(f"{r[w]:.2f}" for w in ("prefill", "decode_1", "decode_8")),
        ]
        for r in data["comparisons"]
    ]
    text += common.table(["", "over", "prefill", "decode", f"decode, batch {BATCH}"], rows)
    text += "\n\\* not of like precision: transformers has no such format here.\n\n"
    text += "Versions: " + "; ".join(dict.fromkeys(p["version"] for p in data["peers"] if p["version"])) + ".\n"
    details = {p["kind"]: p["detail"] for p in data["peers"] if p["detail"]}
    text += "".join(f"{kind} runs with: {detail}.\n" for kind, detail in details.items())
    for p in data["peers"]:
        if p["left_out"]:
            text += f"\nLeft out: {p['name']}: {p['left_out']}\n"
    return text


def collect(args, peers):
    return {
        "machine": common.machine(),
        "threads": args.threads,
        "rounds": args.rounds,
        "prompt_tokens": PROMPT,
        "decode_tokens": DECODE,
        "batch": BATCH,
        "turns": sum(len(p.turns) for p in peers),
        "noisy_turns": sum(t["company"] > COMPANY for p in peers for t in p.turns),
        "peers": [
            {
                "name": p.name,
                "kind": p.kind,
                "class": p.like,
                "version": p.version,
                "detail": p.detail,
                "left_out": p.reason,
                "median": {w: median(p, w) for w in ("prefill", "decode_1", "decode_8")} if p.turns else None,
                "start_s": statistics.median(p.starts) if p.starts else None,
                "peak_rss_bytes": max(p.peak_rss, default=None),
                "same_tokens": p.same,
                "turns": p.turns,
            }
            for p in peers
        ],
        "comparisons": comparisons(peers),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--starts", type=int, default=3, help="fresh processes of each, to measure the start")
    parser.add_argument("--patience", type=float, default=60, help="seconds to wait for a quiet machine, in all")
    parser.add_argument("--name", default="cpu_peers", help="of the result files")
    args = parser.parse_args()

    gguf = args.gguf or common.packaged_gguf()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    peers = chosen(args)
    prompts = common.prompts(gguf, args.work_dir, PROMPT)
    patience = Patience(args.patience)
    try:
        with (args.work_dir / "workers.log").open("w") as log:
            running = [p for p in peers if begin(p, args, gguf, log) and warm_up(p, prompts)]
            reference = next((p for p in running if p.name == "transformers fp32"), None)
            for peer in running if reference else ():
                peer.same = agreement(peer, reference)
            for turn in range(args.rounds):
                for peer in running:
                    patience.wait()
                    take_turn(peer, prompts, turn)
                busiest = max((p.turns[-1]["company"] for p in running), default=0)
                common.say(f"round {turn + 1} of {args.rounds}: others used at most {busiest:.0%} of the machine")
            for number in range(args.starts):
                for peer in running:
                    patience.wait()
                    measure_start(peer, python_of(peer, args), args.threads, log, prompts[number])
                common.say(f"start {number + 1} of {args.starts}")
    finally:
        for peer in peers:
            if peer.worker is not None:
                peer.worker.close()
    data = collect(args, peers)
    common.write_results(args.name, data, markdown(data))


if __name__ == "__main__":
    main()
