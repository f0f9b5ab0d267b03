"""What the engines say, beside transformers in float32: tokens, logits and perplexity.

    python benchmarks/cpu_quality.py --peer-python VENV/bin/python    # see README.md

Greedy: 20 prompts, 64 tokens each; the float32 engine must give transformers' tokens, one request at a time and all in
flight together. Teacher forcing: windows of a novel; how often the likeliest next token is transformers', and the
perplexity. An engine is scored by its prefill (whole windows) and by its decode (a token of each window a step), which
use different kernels.
"""

import argparse
import math

import common
import numpy as np
from peers import add_arguments, begin, chosen

PROMPTS, TOKENS = 20, 64
LENGTHS = (8, 24, 48, 96)  # of prompts, tokens
WINDOW = 256  # tokens
REFERENCE = "transformers fp32"


def greedy_prompts(ids):
    """20 pieces of the text, five each of four lengths."""
    stride = len(ids) // PROMPTS
    return [ids[i * stride : i * stride + LENGTHS[i // 5]] for i in range(PROMPTS)]


def compare_greedy(reference, ours):
    """The requests whose tokens are all the same, and of the others the place of the first that differs."""
    firsts = [
        next((i for i, (a, b) in enumerate(zip(theirs, mine, strict=True)) if a != b), None)
        for theirs, mine in zip(reference, ours, strict=True)
    ]
    return {
        "same": sum(f is None for f in firsts),
        "of": len(firsts),
        "first_difference": {str(i): f for i, f in enumerate(firsts) if f is not None},
    }


def measure_greedy(reference, ours, prompts):
    theirs = []
    for length in LENGTHS:  # those of one length together: no padding, so nothing that is not theirs
        theirs += reference.worker.run([p for p in prompts if len(p) == length], TOKENS - 1)["tokens"]
    alone = [ours.worker.run([p], TOKENS - 1)["tokens"][0] for p in prompts]
    together = ours.worker.run(prompts, TOKENS - 1)["tokens"]
    return {"one at a time": compare_greedy(theirs, alone), "all in flight": compare_greedy(theirs, together)}


def relative_error(ours, reference):
    """Of logits: the norm of the difference over the norm, and the largest difference over the largest logit."""
    square = reference_square = largest = largest_reference = 0.0
    for a, b in zip(ours, reference, strict=True):  # a window at a time: the whole is large
        difference = a.astype(np.float64) - b
        square += float((difference**2).sum())
        reference_square += float((b.astype(np.float64) ** 2).sum())
        largest = max(largest, float(np.abs(difference).max()))
        largest_reference = max(largest_reference, float(np.abs(b).max()))
    return {"norm": math.sqrt(square / reference_square), "max": largest / largest_reference}


def score(peer, windows, work, chunk=0):
    """One row of the table."""
    file = work / f"logits-{'reference' if peer.name == REFERENCE else 'other'}.npy"
    answer = peer.worker.ask(do="score", windows=windows, chunk=chunk, save=str(file))
    tokens = sum(len(w) - 1 for w in windows)
    row = {"name": peer.name, "class": peer.like, "path": "decode" if chunk else "prefill", "argmax": answer["argmax"]}
    row["perplexity"] = math.exp(sum(answer["nll"]) / tokens)
    if peer.name != REFERENCE and (work / "logits-reference.npy").is_file():
        reference = np.load(work / "logits-reference.npy", mmap_mode="r")
        row["logits_error"] = relative_error(np.load(file, mmap_mode="r"), reference)
    return row


def markdown(data):
    text = "# What the engines say, beside transformers in float32\n\n"
    text += f"SmolLM2-135M-Instruct. {common.machine_line(data['machine'])}.\n\n"
    for how, result in data["greedy"].items():
        text += f"- Greedy, float32 engine, {how}: {result['same']} of {result['of']} requests of {TOKENS} tokens are "
        text += "token for token those of transformers fp32."
        if result["first_difference"]:
            text += (
                " First difference: " + ", ".join(f"#{k} at {v}" for k, v in result["first_difference"].items()) + "."
            )
        text += "\n"
    text += (
        f"\nTeacher forcing over {data['tokens']} tokens of Moby Dick, chapter 1, in windows of {WINDOW}. The model's "
        "weights come from a Q4_1 file (4 bits, groups of 32), so formats like it lose next to nothing: llama.cpp's "
        "Q4_1 is exact in its weights, trtllm's int4 nearly so. From weights of full precision they would lose more. "
        "Logits: relative error over all of them, in norm, and the largest over the largest logit. llama.cpp rounds "
        "activations too in Q8_0 and Q4_1.\n\n"
    )
    rows = []
    for r in data["rows"]:
        error = r.get("logits_error")
        errors = ("–", "–") if error is None else (f"{error['norm']:.1e}", f"{error['max']:.1e}")
        same = "–" if r["agreement"] is None else f"{r['agreement']:.2%}"
        rows.append([r["name"], r["path"], r["class"], same, f"{r['perplexity']:.3f}", *errors])
    headings = ["engine", "path", "class", "same argmax", "perplexity", "logits, norm", "logits, max"]
    return text + common.table(headings, rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--name", default="cpu_quality", help="of the result files")
    args = parser.parse_args()

    gguf = args.gguf or common.packaged_gguf()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    ids = common.text_tokens(gguf, args.work_dir)
    windows = [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW + 1, WINDOW)]
    peers = chosen(args, leave_out=("openvino",))  # it gives no logits
    peers.sort(key=lambda p: p.name != REFERENCE)
    (args.work_dir / "logits-reference.npy").unlink(missing_ok=True)
    rows, greedy, reference = [], {}, None
    with (args.work_dir / "workers.log").open("w") as log:
        for peer in peers:
            if not begin(peer, args, gguf, log, max_batch_size=WINDOW):
                continue
            common.say(f"scoring {peer.name}")
            rows.append(score(peer, windows, args.work_dir))
            if peer.kind == "trtllm":
                rows.append(score(peer, windows, args.work_dir, chunk=1))
            if peer.name == REFERENCE:
                reference = peer
                continue
            if peer.name == "trtllm float32" and reference is not None:
                greedy = measure_greedy(reference, peer, greedy_prompts(ids))
            peer.worker.close()
    if reference is not None:
        reference.worker.close()
    for name in ("reference", "other"):
        (args.work_dir / f"logits-{name}.npy").unlink(missing_ok=True)
    theirs = next((r["argmax"] for r in rows if r["name"] == REFERENCE), None)
    for row in rows:
        mine = np.array(row.pop("argmax"))
        row["agreement"] = None if theirs is None else float((mine == np.array(theirs)).mean())
    data = {
        "machine": common.machine(),
        "versions": {p.name: p.version for p in peers if p.version},
        "left_out": {p.name: p.reason for p in peers if p.reason},
        "tokens": sum(len(w) - 1 for w in windows),
        "window": WINDOW,
        "greedy": greedy,
        "rows": rows,
    }
    common.write_results(args.name, data, markdown(data))


if __name__ == "__main__":
    main()
