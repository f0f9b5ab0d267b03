import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fake_runner import FakeRunner, expected_tokens
from tests.late_stage import LateStage
from trtllm_cli.engine import BuildConfig
from trtllm_cli.errors import RequestError
from trtllm_cli.run.communicator import SingleRank
from trtllm_cli.run.executor import DEFAULT_MAX_TOKENS, Executor
from trtllm_cli.run.request import SamplingParams

VOCAB, BLOCK = 64, 4


def make(
    num_blocks=64, *, vocab_size=VOCAB, eos=(), prefix=True, chunked=True, policy="max_utilization", stages=1, **limits
):
    defaults = {"max_batch_size": 4, "max_seq_len": 64, "max_num_tokens": 16, "max_input_len": 48}
    config = BuildConfig(
        **{**defaults, **limits}, tokens_per_block=BLOCK, weight_dtype="float32", kv_cache_dtype="float32"
    )
    runner, comm = FakeRunner(vocab_size, BLOCK, has_logits=stages == 1), SingleRank()
    runner.allocate_kv_cache(num_blocks)
    if stages > 1:
        last = FakeRunner(vocab_size, BLOCK)
        last.allocate_kv_cache(num_blocks)
        comm = LateStage(last, config)
    executor = Executor(
        config, runner, comm, vocab_size=vocab_size, num_blocks=num_blocks, eos_token_ids=eos,
        enable_prefix_cache=prefix, enable_chunked_prefill=chunked, policy=policy,
        num_stages=stages, logits_rank=min(stages - 1, 1),
    )  # fmt: skip
    return executor, runner


class Log:
    """Runs steps, collects tokens and ends by (request, index), and checks what must hold at every step."""

    def __init__(self, executor, runner):
        self.executor, self.runner = executor, runner
        self.tokens, self.logprobs, self.ends, self.stop_reasons = {}, {}, {}, {}

    def step(self):
        config, before = self.executor.config, len(self.runner.steps)
        events = self.executor.step()
        for inputs in self.runner.steps[before:]:
            assert inputs.num_tokens <= config.max_num_tokens
            assert inputs.num_seqs <= config.max_batch_size
        for event in events:
            key = event.request_id, event.index
            assert key not in self.ends, "news of a sequence that has ended"
            if event.token_id is not None:
                self.tokens.setdefault(key, []).append(event.token_id)
                self.logprobs.setdefault(key, []).append(event.logprobs)
            if event.finish_reason:
                self.ends[key], self.stop_reasons[key] = event.finish_reason, event.stop_reason
        self.executor.check_integrity()
        return events

    def drain(self, limit=2000):
        for _ in range(limit):
            if not self.executor.has_work:
                return self
            self.step()
        raise AssertionError(f"work is left after {limit} steps")


def run(executor, runner, requests):
    for i, (prompt, params) in enumerate(requests):
        executor.add_request(i, prompt, params)
    return Log(executor, runner).drain()


def prompt_of(length, seed=0, vocab=VOCAB):
    return np.random.default_rng(seed).integers(0, vocab, length).tolist()


# Everything at once.

few_tokens = st.lists(st.integers(0, 2), min_size=1, max_size=20)  # a tiny alphabet: prefixes meet
add = st.tuples(st.just("add"), few_tokens, st.integers(1, 16), st.integers(1, 3), st.integers(0, 4))
actions = st.lists(
    st.one_of(
        add,
        add,
        st.tuples(st.just("step"), st.integers(1, 8)),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("finish"), st.integers(0, 30), st.integers(0, 2)),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    actions=actions,
    num_blocks=st.integers(9, 24),
    batch=st.integers(1, 5),
    extra=st.integers(0, 20),
    prefix=st.booleans(),
    chunked=st.booleans(),
    policy=st.sampled_from(["max_utilization", "guaranteed_no_evict"]),
    stages=st.integers(1, 3),
)
def test_whatever_happens_each_sequence_gets_its_tokens(
    actions, num_blocks, batch, extra, prefix, chunked, policy, stages
):
    eos = 3
    executor, runner = make(
        num_blocks, eos=[eos], prefix=prefix, chunked=chunked, policy=policy, stages=stages,
        max_batch_size=batch, max_num_tokens=max(batch, 20 if not chunked else 1) + extra,
    )  # fmt: skip
    log, wanted, ended = Log(executor, runner), {}, set()
    for action, *args in actions:
        if action == "add":
            prompt, max_tokens, n, min_tokens = args
            min_tokens = min(min_tokens, max_tokens)
            request = len({r for r, _ in wanted})
            executor.add_request(request, prompt, SamplingParams(max_tokens=max_tokens, n=n, min_tokens=min_tokens))
            for index in range(n):
                wanted[request, index] = expected_tokens(prompt, max_tokens, VOCAB, [eos], min_tokens)
        elif action == "step":
            for _ in range(args[0]):
                log.step()
        elif action == "cancel":
            executor.cancel(args[0])
        elif log.tokens.get((args[0], args[1])) and (args[0], args[1]) not in log.ends:
            executor.finish(args[0], args[1], "stop", "found")
            ended.add((args[0], args[1]))
        executor.check_integrity()
    log.drain()
    executor.close()
    assert log.ends.keys() | ended == wanted.keys()
    for key, tokens in wanted.items():
        got = log.tokens.get(key, [])
        if key in ended or log.ends[key] == "cancelled":
            assert got == tokens[: len(got)]
        else:
            assert got == tokens
            assert log.ends[key] == ("stop" if tokens[-1] == eos else "length")
    stats = executor.stats
    assert (stats.num_running, stats.num_waiting, stats.blocks_used) == (0, 0, 0)
    assert stats.blocks_peak <= stats.blocks_total == num_blocks
    if policy == "guaranteed_no_evict":
        assert stats.preemptions == 0
    if not prefix:
        assert stats.prefix_hit_tokens == 0
    assert stats.prefill_tokens + stats.decode_tokens == sum(i.num_tokens for i in runner.steps)


# The same text whatever the scheduling.

SAMPLED = SamplingParams(
    max_tokens=24, temperature=1.0, top_p=0.9, seed=11, repetition_penalty=1.2, frequency_penalty=0.3, logprobs=2, n=2
)
REQUESTS = [(prompt_of(20, i % 2) + prompt_of(i, 100 + i), replace(SAMPLED, seed=i, n=1 + i % 3)) for i in range(10)]


@pytest.fixture(scope="module")
def roomy():
    executor, runner = make(400, max_batch_size=32, max_num_tokens=1000)
    log = run(executor, runner, REQUESTS)
    assert executor.stats.preemptions == 0
    return log


@pytest.mark.parametrize(
    "setting",
    [
        {"prefix": False},
        {"max_num_tokens": 4},
        {"chunked": False, "max_num_tokens": 32},
        {"num_blocks": 14},
        {"num_blocks": 14, "prefix": False, "max_num_tokens": 5},
        {"num_blocks": 14, "policy": "guaranteed_no_evict"},
        {"max_batch_size": 1},
        {"stages": 2},
        {"stages": 3, "num_blocks": 14},
        {"stages": 2, "num_blocks": 14, "policy": "guaranteed_no_evict", "max_num_tokens": 5},
    ],
    ids=str,
)
def test_sampled_text_does_not_depend_on_scheduling(roomy, setting):
    executor, runner = make(**setting)
    log = run(executor, runner, REQUESTS)
    assert log.tokens == roomy.tokens
    assert log.ends == roomy.ends
    if setting.get("num_blocks") == 14:
        assert (executor.stats.preemptions > 0) == ("policy" not in setting)


def test_sequences_of_a_prompt_differ_by_seed():
    executor, runner = make()
    log = run(executor, runner, [([1, 2], SamplingParams(temperature=1.0, seed=5, n=3, max_tokens=8))])
    others = [
        run(*make(), [([1, 2], SamplingParams(temperature=1.0, seed=5 + i, max_tokens=8))]).tokens[0, 0]
        for i in range(3)
    ]
    assert [log.tokens[0, i] for i in range(3)] == others
    assert len(set(map(tuple, others))) == 3


def test_a_drawn_seed_gives_the_text_again():
    executor, runner = make()
    executor.add_request(0, [1], SamplingParams(temperature=1.0, max_tokens=8))
    seed = executor.seed(0)
    log = Log(executor, runner).drain()
    assert executor.seed(0) == seed  # still known
    again = run(*make(), [([1], SamplingParams(temperature=1.0, max_tokens=8, seed=seed))])
    assert again.tokens == log.tokens
    executor.step()
    with pytest.raises(KeyError):
        executor.seed(0)


# Scheduling.


def test_decodes_and_prefill_chunks_share_a_step():
    executor, runner = make(max_num_tokens=8, max_batch_size=4)
    executor.add_request(0, prompt_of(3, 1), SamplingParams(max_tokens=6))
    executor.step()
    executor.add_request(1, prompt_of(20, 2), SamplingParams(max_tokens=6))
    executor.add_request(2, prompt_of(4, 3), SamplingParams(max_tokens=6))
    for _ in range(3):
        executor.step()
    lengths = [np.diff(i.query_start).tolist() for i in runner.steps]
    assert lengths == [[3], [1, 7], [1, 7], [1, 6, 1]]
    assert [i.logits_indices.tolist() for i in runner.steps] == [[2], [0], [0], [0, 6]]


def test_without_chunks_a_prompt_waits_for_a_step_that_holds_it():
    executor, runner = make(max_num_tokens=8, chunked=False)
    executor.add_request(0, prompt_of(3, 1), SamplingParams(max_tokens=3))
    executor.add_request(1, prompt_of(8, 2), SamplingParams(max_tokens=2))
    executor.add_request(2, prompt_of(1, 3), SamplingParams(max_tokens=2))
    Log(executor, runner).drain()
    assert [np.diff(i.query_start).tolist() for i in runner.steps] == [[3], [1], [1], [8], [1, 1], [1]]


def test_a_preempted_sequence_that_outgrew_a_step_is_prefilled_in_chunks():
    executor, runner = make(9, max_num_tokens=8, chunked=False, prefix=False, max_batch_size=2)
    requests = [(prompt_of(4, i), SamplingParams(max_tokens=24)) for i in range(2)]
    log = run(executor, runner, requests)
    assert executor.stats.preemptions > 0
    assert log.tokens == {(i, 0): expected_tokens(p, 24, VOCAB) for i, (p, _) in enumerate(requests)}


def test_first_come_first_served():
    executor, _ = make(12, max_batch_size=2)
    requests = [(prompt_of(4 + 5 * (i % 4), i), SamplingParams(max_tokens=3 + i % 5)) for i in range(12)]
    for i, (prompt, params) in enumerate(requests):
        executor.add_request(i, prompt, params)
    firsts = []
    while executor.has_work:
        firsts += [e.request_id for e in executor.step() if e.request_id not in firsts]
    assert firsts == list(range(12))


def test_a_flood_of_small_requests_does_not_starve_a_large_one():
    executor, runner = make(16, max_num_tokens=8)
    log = Log(executor, runner)
    for i in range(4):
        executor.add_request(i, [1, i], SamplingParams(max_tokens=5))
    executor.add_request(100, prompt_of(40), SamplingParams(max_tokens=20))
    for i in range(200, 300):
        executor.add_request(i, [2, i % VOCAB], SamplingParams(max_tokens=5))
        log.step()
    assert log.ends[100, 0] == "length"
    assert log.tokens[100, 0] == expected_tokens(prompt_of(40), 20, VOCAB)


def test_prefix_cache_spares_work_and_says_so():
    executor, runner = make()
    prompt = prompt_of(18)
    log = run(executor, runner, [(prompt, SamplingParams(max_tokens=2))])
    assert executor.cached_tokens(0) == 0
    executor.add_request(1, [*prompt, 5], SamplingParams(max_tokens=2))
    log.step()
    assert executor.cached_tokens(1) == 16
    log.drain()
    assert executor.stats.prefix_hit_tokens == 16
    assert log.tokens[1, 0] == expected_tokens([*prompt, 5], 2, VOCAB)


def test_generated_tokens_are_reused_by_the_next_turn():
    executor, runner = make()
    prompt = prompt_of(6)
    log = run(executor, runner, [(prompt, SamplingParams(max_tokens=11))])
    executor.add_request(1, prompt + log.tokens[0, 0] + [1, 2], SamplingParams(max_tokens=1))
    executor.step()
    assert executor.cached_tokens(1) == 16


def test_forks_share_the_prompt_and_copy_its_last_block():
    executor, runner = make()
    run(executor, runner, [(prompt_of(10), SamplingParams(max_tokens=4, n=3))])
    assert len(runner.copies) == 2
    assert executor.stats.prefill_tokens == 10
    assert executor.stats.blocks_peak == 2 + 3 * 2


def test_a_fork_preempted_before_its_copy_leaves_none_behind():
    executor, runner = make(8, max_batch_size=3, prefix=False)
    requests = [(prompt_of(14, i), SamplingParams(max_tokens=8, n=3)) for i in range(2)]
    log = run(executor, runner, requests)
    assert executor.stats.preemptions > 0
    assert log.tokens == {(i, k): expected_tokens(p, 8, VOCAB) for i, (p, _) in enumerate(requests) for k in range(3)}


@pytest.mark.parametrize("end", ["finish", "cancel"])
def test_a_fork_that_ends_before_its_copy_takes_the_copy_along(end):
    executor, runner = make()
    executor.add_request(0, prompt_of(10), SamplingParams(max_tokens=4, n=2))
    executor.add_request(1, prompt_of(3), SamplingParams(max_tokens=4))
    executor.step()
    if end == "finish":
        executor.finish(0, 1)
    else:
        executor.cancel(0)
    Log(executor, runner).drain()
    assert runner.copies == []


def test_a_newcomer_leaves_room_for_those_that_run():
    executor, runner = make(9, max_batch_size=2)
    run(executor, runner, [(prompt_of(32), SamplingParams(max_tokens=4)), ([1], SamplingParams(max_tokens=2))])
    assert executor.stats.preemptions == 0
    assert all(inputs.num_seqs == 1 for inputs in runner.steps)


def test_a_preempted_request_keeps_its_first_count_of_cached_tokens():
    executor, runner = make(12, max_batch_size=2)
    for i in range(2):
        executor.add_request(i, prompt_of(8, i), SamplingParams(max_tokens=30))
    log = Log(executor, runner)
    while not executor.stats.preemptions:
        log.step()
    while executor.stats.num_waiting:
        log.step()
    assert executor.stats.prefix_hit_tokens > 0
    assert executor.cached_tokens(1) == 0


# Ends.


@pytest.mark.parametrize("phase", ["waiting", "prefilling", "decoding", "preempted", "forked", "ended", "unknown"])
def test_cancel_in_each_phase(phase):
    executor, runner = make(12, max_num_tokens=8, max_batch_size=2)
    log = Log(executor, runner)
    other = prompt_of(5, 9)
    executor.add_request(0, other, SamplingParams(max_tokens=30))
    n = 2 if phase == "forked" else 1
    prompt = prompt_of(12, 1)
    executor.add_request(1, prompt, SamplingParams(max_tokens=30, n=n))
    if phase == "prefilling":
        log.step()
        assert executor._requests[1].sequences[0].num_computed == 3
    elif phase in ("decoding", "forked"):
        while not log.tokens.get((1, 0)):
            log.step()
    elif phase == "preempted":
        while not executor.stats.preemptions:
            log.step()
        assert executor.stats.num_waiting == 1
    elif phase == "ended":
        log.drain()
    executor.cancel(1 if phase != "unknown" else 77)
    executor.cancel(1 if phase != "unknown" else 77)
    assert executor.has_work == (phase != "ended")
    log.drain()
    end = "length" if phase in ("ended", "unknown") else "cancelled"
    assert log.ends == {(0, 0): "length"} | {(1, i): end for i in range(n)}
    assert log.tokens[0, 0] == expected_tokens(other, 30, VOCAB)
    executor.add_request(1, prompt, SamplingParams(max_tokens=3))  # the id is free again, and the cache is sound
    assert Log(executor, runner).drain().tokens[1, 0] == expected_tokens(prompt, 3, VOCAB)


def test_cancel_before_the_fork_ends_all_its_sequences():
    executor, runner = make()
    executor.add_request(5, [1], SamplingParams(n=3))
    executor.cancel(5)
    assert Log(executor, runner).drain().ends == {(5, i): "cancelled" for i in range(3)}
    assert not runner.steps


def test_cancel_after_one_sequence_ended_tells_of_the_others_only():
    executor, _ = make()
    executor.add_request(0, [1], SamplingParams(n=3, max_tokens=9))
    executor.step()
    executor.finish(0, 1, "stop", "word")
    executor.cancel(0)
    assert [(e.index, e.finish_reason) for e in executor.step()] == [(0, "cancelled"), (2, "cancelled")]


def test_finish_is_silent_and_final():
    executor, _ = make()
    executor.add_request(0, [1], SamplingParams(max_tokens=9))
    executor.step()
    executor.finish(0, 0, "stop", "word")
    executor.finish(0, 0)
    assert not executor.has_work
    assert executor.step() == []
    executor.check_integrity()


def greedy(prompt, n):
    return expected_tokens(prompt, n, VOCAB)


def test_eos_ends_without_a_reason_and_stop_tokens_with_their_own():
    tokens = greedy([1, 2, 3], 8)
    eos, stop = tokens[4], tokens[2]
    executor, runner = make(eos=[eos])
    log = run(
        executor, runner,
        [
            ([1, 2, 3], SamplingParams(max_tokens=8)),
            ([1, 2, 3], SamplingParams(max_tokens=8, stop_token_ids=(stop,))),
            ([1, 2, 3], SamplingParams(max_tokens=8, ignore_eos=True)),
            ([1, 2, 3], SamplingParams(max_tokens=8, ignore_eos=True, stop_token_ids=(stop,))),
            ([1, 2, 3], SamplingParams(max_tokens=8, min_tokens=8)),
        ],
    )  # fmt: skip
    assert log.tokens[0, 0] == tokens[: tokens.index(eos) + 1]
    assert log.tokens[1, 0] == log.tokens[3, 0] == tokens[: tokens.index(stop) + 1]
    assert log.tokens[2, 0] == tokens
    assert log.tokens[4, 0] == expected_tokens([1, 2, 3], 8, VOCAB, [eos], 8)
    assert [log.ends[i, 0] for i in range(5)] == ["stop", "stop", "length", "stop", "length"]
    assert [log.stop_reasons[i, 0] for i in range(5)] == [None, stop, None, stop, None]


def test_min_tokens_then_stop():
    prompt = [4, 4]
    for min_tokens in range(12):
        eos = greedy(prompt, 1)[0]
        log = run(*make(eos=[eos]), [(prompt, SamplingParams(max_tokens=30, min_tokens=min_tokens))])
        assert log.tokens[0, 0] == expected_tokens(prompt, 30, VOCAB, [eos], min_tokens)
        assert eos not in log.tokens[0, 0][:min_tokens]


def test_logprobs_come_with_the_tokens():
    executor, _ = make()
    executor.add_request(0, [1], SamplingParams(max_tokens=2, logprobs=3))
    [event] = executor.step()
    assert event.logprobs[0].token_id == event.token_id == event.logprobs[1].token_id
    assert len(event.logprobs) == 4


# Limits.


@pytest.mark.parametrize(
    ("prompt", "params", "setting", "message", "fix"),
    [
        ([], {}, {}, "empty", "at least one"),
        ([1, VOCAB], {}, {}, f"token id {VOCAB} is outside", "tokenizer"),
        ([-1], {}, {}, "token id -1 is outside", "tokenizer"),
        ([1], {"stop_token_ids": (99,)}, {}, "token id 99 is outside", "tokenizer"),
        ([1] * 49, {}, {}, "49 tokens, this engine's max_input_len is 48", "--max-input-len 49"),
        ([1] * 48, {}, {"max_seq_len": 48}, "no room for output", "--max-seq-len"),
        ([1] * 40, {"max_tokens": 25}, {}, "make 65, this engine's max_seq_len is 64", "at most 24.*--max-seq-len 65"),
        ([1] * 40, {"min_tokens": 25}, {}, "min_tokens 25 make 65", "--max-seq-len 65"),
        ([1] * 37, {}, {"num_blocks": 9}, "whole cache holds 36", "more memory"),
        ([1] * 30, {"max_tokens": 8}, {"num_blocks": 9}, "needs 37 tokens of KV cache", "more memory"),
        ([1] * 17, {}, {"chunked": False}, "max_num_tokens of 16", "--max-num-tokens 17"),
    ],
    ids=lambda v: None if isinstance(v, (list, dict)) else v,
)
def test_requests_that_can_never_run_are_refused(prompt, params, setting, message, fix):
    executor, _ = make(**setting)
    with pytest.raises(RequestError, match=message) as caught:
        executor.add_request(0, prompt, SamplingParams(**params))
    assert caught.match(f"(?s)fix: .*{fix}")
    assert not executor.has_work


@pytest.mark.parametrize(
    ("length", "num_blocks", "max_seq_len", "generated"),
    [(4, 64, 256, DEFAULT_MAX_TOKENS), (48, 64, 64, 16), (36, 9, 64, 1), (30, 9, 64, 7)],
)
def test_default_max_tokens_is_cut_to_what_is_left(length, num_blocks, max_seq_len, generated):
    log = run(*make(num_blocks, max_seq_len=max_seq_len), [(prompt_of(length), SamplingParams())])
    assert log.tokens[0, 0] == greedy(prompt_of(length), generated)


def test_the_largest_request_fits_exactly():
    log = run(*make(9), [(prompt_of(30), SamplingParams(max_tokens=7))])
    assert log.tokens[0, 0] == greedy(prompt_of(30), 7)


def test_serving_needs_no_torch():
    code = "import sys, trtllm_cli.run.executor; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
