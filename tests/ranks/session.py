"""Requests of every kind to one engine: started on one rank or under mpirun, it prints the same.

python session.py ENGINE
"""

import json
import sys

from trtllm_cli import LLM, SamplingParams

SHARED = list(range(1, 20))  # two blocks and a bit
PROMPTS = [[*SHARED, 30], [5, 4, 3], list(range(60, 90)), [7] * 11, [*SHARED, 40, 41], [200, 100, 50, 25]]


def main():
    with LLM(sys.argv[1]) as llm:
        greedy = SamplingParams(max_tokens=24, ignore_eos=True)
        # More prompts than fit in a batch, ending one by one.
        lengths = [SamplingParams(max_tokens=6 + 3 * i, ignore_eos=True) for i in range(len(PROMPTS))]
        together = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, lengths)]
        each = [llm.generate(prompt, params)[0] for prompt, params in zip(PROMPTS, lengths, strict=True)]
        alone = [output.outputs[0].token_ids for output in each]
        sampled = llm.generate(PROMPTS[1], SamplingParams(max_tokens=12, n=2, temperature=0.9, seed=3, ignore_eos=True))
        # A request that is cancelled among others.
        with llm.stream(PROMPTS[3], greedy) as cancelled:
            first = [token for _ in range(3) for token in next(cancelled).outputs[0].token_ids]
        after = llm.generate(PROMPTS[3], greedy)[0]
        again = llm.generate(PROMPTS[0], greedy)[0]
        stats = llm.stats
    print(
        json.dumps(
            {
                "together": together,
                "alone": alone,
                "sampled": [output.token_ids for output in sampled[0].outputs],
                "cancelled": first,
                "after": after.outputs[0].token_ids,
                "cached": again.cached_tokens,
                "again": again.outputs[0].token_ids,
                "held": stats.blocks_used,
            }
        )
    )


if __name__ == "__main__":
    main()
