"""A real small model on a GPU and on the CPU, greedy: python -m benchmarks.h200.real_model MODEL.gguf

The same checkpoint is built for both. Up to the first token that differs the texts are equal; what is printed of that
token is by how much the CPU preferred its own to the GPU's (a difference of log probabilities): a near-tie or not.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import say
from benchmarks.h200.machine import machine
from trtllm_cli import LLM, SamplingParams
from trtllm_cli.cli import call

PROMPTS = [
    "Why is the sky blue?", "Write a short story about a lighthouse keeper.", "List five uses of a paper clip.",
    "Explain how a bicycle stays upright.", "What is the capital of France, and what is it known for?",
    "Translate to French: The weather is nice today.", "Give me a recipe for pancakes.", "What is 17 times 23?",
    "Describe the water cycle.", "Who wrote Romeo and Juliet, and when?", "How do vaccines work?",
    "Write a haiku about autumn.", "What are prime numbers?", "Summarize the plot of Moby Dick.",
    "How does a computer store numbers?", "Name three programming languages and what each is good for.",
]  # fmt: skip
NEAR = 0.1  # nats: bfloat16's rounding moves a logit of 20 by so much


def build(gguf: Path, into: Path, convert: list[str], options: list[str]) -> tuple[Path, Path]:
    """Engines for the CPU and the GPU."""
    ckpt = into / "ckpt"
    assert call(["convert", str(gguf), "--output-dir", str(ckpt), *convert]) == 0
    engines = []
    for backend in ("cpu", "cuda"):
        engine = into / backend
        done = call(["build", "--checkpoint-dir", str(ckpt), "-o", str(engine), "--backend", backend, *options])
        assert done == 0
        engines.append(engine)
    return engines[0], engines[1]


def generate(engine: Path, params: SamplingParams) -> list[Any]:
    llm = LLM(engine)
    try:
        prompts = [[{"role": "user", "content": text}] for text in PROMPTS]
        return [output.outputs[0] for output in llm.chat(prompts, params)]
    finally:
        llm.close()


def compare(name: str, cpu: list[Any], gpu: list[Any]) -> dict[str, Any]:
    """How far the texts agree, and what the CPU thought of each first difference."""
    equal, gaps = 0, []
    for ours, theirs in zip(cpu, gpu, strict=True):
        pairs = list(zip(ours.token_ids, theirs.token_ids, strict=False))
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if at is None:
            equal += 1
            continue
        likely = {entry.token_id: entry.logprob for entry in ours.logprobs[at]}
        gaps.append(likely[ours.token_ids[at]] - likely.get(theirs.token_ids[at], -float("inf")))
    tokens = sum(len(ours.token_ids) for ours in cpu)
    row = {
        "case": name, "prompts": len(cpu), "tokens": tokens, "equal": equal, "gaps": gaps,
        "not_near": sum(gap > NEAR for gap in gaps),
    }  # fmt: skip
    say(
        f"{name}: {equal} of {len(cpu)} texts equal, of {tokens} tokens in all; the others first differ where the CPU "
        f"preferred its token by {', '.join(f'{gap:.3f}' for gap in sorted(gaps)) or '-'} nats; {row['not_near']} of "
        "these are no near-tie"
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--output", default="", help="JSON")
    a = parser.parse_args()
    params = SamplingParams(max_tokens=a.tokens, temperature=0.0, logprobs=5)
    rows = []
    cases = {"bfloat16": ["--dtype", "bfloat16", "--dequantize"]}
    for name, convert in cases.items():
        with tempfile.TemporaryDirectory() as directory:
            cpu, cuda = build(a.gguf, Path(directory), convert, ["--max-seq-len", "512"])
            theirs, ours = generate(cuda, params), generate(cpu, params)
            rows.append(compare(name, ours, theirs))
            say(theirs[0].text[:200])
    if a.output:
        Path(a.output).parent.mkdir(parents=True, exist_ok=True)
        Path(a.output).write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
