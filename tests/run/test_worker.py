import threading

import numpy as np
import pytest

from tests.fake_runner import FakeRunner, expected_tokens
from tests.thread_ranks import thread_ranks
from trtllm_cli.engine import BuildConfig
from trtllm_cli.run.executor import Executor
from trtllm_cli.run.request import SamplingParams
from trtllm_cli.run.step_inputs import InputBuilder
from trtllm_cli.run.worker import follow


@pytest.mark.parametrize("logits_rank", [0, 1], ids=["tensor parallel", "pipeline parallel"])
def test_the_other_rank_does_the_same_steps(logits_rank):
    config = BuildConfig(
        max_batch_size=4, max_seq_len=64, max_num_tokens=8, max_input_len=40, tokens_per_block=4,
        weight_dtype="float32", kv_cache_dtype="float32",
    )  # fmt: skip
    comms = thread_ranks(2)
    runners = [FakeRunner(has_logits=rank >= logits_rank) for rank in range(2)]
    for runner in runners:
        runner.allocate_kv_cache(12)
    follower = threading.Thread(
        target=follow, args=(runners[1], comms[1], InputBuilder.of(config), logits_rank), daemon=True
    )
    follower.start()
    executor = Executor(
        config, runners[0], comms[0], vocab_size=64, num_blocks=12, num_stages=1 + logits_rank, logits_rank=logits_rank
    )
    prompts = [[i, 1, 2, 3, i, i] * (1 + i) for i in range(5)]
    for i, prompt in enumerate(prompts):
        executor.add_request(i, prompt, SamplingParams(max_tokens=9, n=2))
    tokens: dict[tuple[int, int], list[int]] = {}
    while executor.has_work:
        for event in executor.step():
            tokens.setdefault((event.request_id, event.index), []).append(event.token_id)
    executor.close()
    follower.join(20)
    assert not follower.is_alive()
    assert tokens == {(i, k): expected_tokens(p, 9, 64) for i, p in enumerate(prompts) for k in range(2)}
    assert runners[0].copies == runners[1].copies != []
    assert len(runners[0].steps) == len(runners[1].steps)
    assert np.array_equal(runners[0].tokens, runners[1].tokens)
