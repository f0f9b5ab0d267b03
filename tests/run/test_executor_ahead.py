"""An executor one step ahead of a runner that samples gives the tokens of one that knows each before the next step."""

import functools
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fake_runner import FakePendingTokens, FakeRunner, FakeSamplingRunner, expected_tokens
from tests.run import test_executor
from tests.run.test_executor import BLOCK, VOCAB, prompt_of, run
from tests.thread_ranks import thread_ranks
from trtllm_cli.engine import BuildConfig
from trtllm_cli.errors import EngineError
from trtllm_cli.run.communicator import SingleRank
from trtllm_cli.run.executor import Executor
from trtllm_cli.run.request import SamplingParams
from trtllm_cli.run.step_inputs import InputBuilder
from trtllm_cli.run.worker import follow


def make(
    num_blocks=64, *, eos=(), prefix=True, chunked=True, policy="max_utilization", comm=None, kind=FakeSamplingRunner,
    **limits,
):  # fmt: skip
    defaults = {"max_batch_size": 4, "max_seq_len": 64, "max_num_tokens": 16, "max_input_len": 48}
    config = BuildConfig(
        **{**defaults, **limits}, tokens_per_block=BLOCK, weight_dtype="float32", kv_cache_dtype="float32"
    )
    runner = kind(VOCAB, BLOCK, max_batch_size=config.max_batch_size)
    runner.allocate_kv_cache(num_blocks)
    executor = Executor(
        config, runner, comm or SingleRank(), vocab_size=VOCAB, num_blocks=num_blocks, eos_token_ids=eos,
        enable_prefix_cache=prefix, enable_chunked_prefill=chunked, policy=policy,
    )  # fmt: skip
    return executor, runner


class Log(test_executor.Log):
    """Checks besides how many steps are under way between the executor's steps."""

    def step(self):
        events = super().step()
        assert len({(e.request_id, e.index) for e in events}) == len(events), "two tokens at once"
        assert len(self.runner.under_way) <= 1
        assert self.executor.has_work or not self.runner.under_way
        return events


def ahead(executor, runner, requests):
    for i, (prompt, params) in enumerate(requests):
        executor.add_request(i, prompt, params)
    return Log(executor, runner).drain()


@functools.cache
def synchronous(prompt, params, eos=()):
    """Tokens, ends and log probabilities, by index, of a request that an executor of logits computes alone."""
    executor, runner = test_executor.make(400, max_batch_size=16, max_num_tokens=100, eos=eos)
    log = run(executor, runner, [(list(prompt), params)])
    return {i: (log.tokens[0, i], log.ends[0, i], log.stop_reasons[0, i], log.logprobs[0, i]) for i in range(params.n)}


# Everything at once.

HOST = [{"logprobs": 5}, {"logprobs": 4, "frequency_penalty": 0.5}, {"min_tokens": 3, "stop_token_ids": (5, 9, 40)},
        {"logprobs": 4, "repetition_penalty": 1.5, "temperature": 1.0}]  # fmt: skip
DEVICE = [{}, {"temperature": 1.0}, {"temperature": 0.5, "top_k": 8}, {"temperature": 2.0, "top_p": 0.75},
          {"temperature": 1.0, "min_p": 0.125, "top_k": 20, "top_p": 0.5}, {"stop_token_ids": (5, 9, 40)},
          {"ignore_eos": True, "min_tokens": 2}, {"temperature": 1e-6}]  # fmt: skip
SPECIAL = [{"logprobs": 1}, {"logprobs": 0}, {"frequency_penalty": 0.5}, {"min_tokens": 3},
           {"repetition_penalty": 1.5, "temperature": 1.0},
           {"presence_penalty": -2.0, "min_tokens": 2, "logprobs": 3, "temperature": 0.5},
           {"repetition_penalty": 4.0, "frequency_penalty": 2.0, "temperature": 1.0, "top_k": 8}]  # fmt: skip
few_tokens = st.lists(st.integers(0, 2), min_size=1, max_size=20)  # a tiny alphabet: prefixes meet


def add(kinds):
    params = st.builds(
        lambda kind, max_tokens, **more: SamplingParams(
            **more, max_tokens=max(max_tokens, kind.get("min_tokens", 1)), **kind
        ),
        st.sampled_from(kinds), st.integers(1, 16), n=st.sampled_from([1, 1, 2, 3]), seed=st.integers(0, 3),
    )  # fmt: skip
    return st.tuples(st.just("add"), few_tokens, params)


step = st.tuples(st.just("step"), st.integers(1, 8))
cancel = st.tuples(st.just("cancel"), st.integers(0, 30))
finish = st.tuples(st.just("finish"), st.integers(0, 30), st.integers(0, 2))


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    actions=st.one_of(
        st.lists(st.one_of(add(DEVICE), add(DEVICE), step, cancel, finish), min_size=1, max_size=25),
        st.lists(st.one_of(add(DEVICE), add(SPECIAL), step, cancel, finish), min_size=1, max_size=25),
        st.lists(st.one_of(add(SPECIAL), add(DEVICE + HOST), step, step, cancel, finish), min_size=1, max_size=25),
    ),
    num_blocks=st.integers(9, 24),
    batch=st.integers(1, 5),
    extra=st.integers(0, 20),
    prefix=st.booleans(),
    chunked=st.booleans(),
    policy=st.sampled_from(["max_utilization", "guaranteed_no_evict"]),
)
def test_whatever_happens_each_sequence_gets_the_tokens_of_the_synchronous_executor(
    actions, num_blocks, batch, extra, prefix, chunked, policy
):
    eos = (3, 17)
    executor, runner = make(
        num_blocks, eos=eos, prefix=prefix, chunked=chunked, policy=policy,
        max_batch_size=batch, max_num_tokens=max(batch, 20 if not chunked else 1) + extra,
    )  # fmt: skip
    log, requests, ended, cancelled = Log(executor, runner), [], set(), set()
    for action, *args in actions:
        if action == "add":
            executor.add_request(len(requests), *args)
            requests.append(args)
        elif action == "step":
            for _ in range(args[0]):
                log.step()
        elif action == "cancel":
            executor.cancel(args[0])
            cancelled.add(args[0])
        elif log.tokens.get((args[0], args[1])) and (args[0], args[1]) not in log.ends and args[0] not in cancelled:
            executor.finish(args[0], args[1], "stop", "found")
            ended.add((args[0], args[1]))
        executor.check_integrity()
    log.drain()
    for request, (prompt, params) in enumerate(requests):
        for index, wanted in synchronous(tuple(prompt), params, eos).items():
            key = request, index
            got, logprobs = log.tokens.get(key, []), log.logprobs.get(key, [])
            assert logprobs == wanted[3][: len(got)]
            if key in ended or log.ends[key] == "cancelled":
                assert got == wanted[0][: len(got)]
            else:
                assert (got, log.ends[key], log.stop_reasons[key]) == wanted[:3]
    assert not executor._unforked
    assert not executor._sampled_here
    stats = executor.stats
    assert (stats.num_running, stats.num_waiting, stats.blocks_used) == (0, 0, 0)
    assert stats.blocks_peak <= stats.blocks_total == num_blocks
    if policy == "guaranteed_no_evict":
        assert stats.preemptions == 0
    assert stats.steps == len(runner.steps) == runner.num_started + runner.num_forwards
    assert stats.prefill_tokens + stats.decode_tokens == sum(i.num_tokens for i in runner.steps)


SAMPLED = SamplingParams(max_tokens=24, temperature=1.0, top_p=0.75)
REQUESTS = [(prompt_of(20, i % 2) + prompt_of(i, 100 + i), replace(SAMPLED, seed=i, n=1 + i % 3)) for i in range(10)]


@pytest.mark.parametrize(
    "setting",
    [
        {"num_blocks": 400, "max_batch_size": 32, "max_num_tokens": 1000},
        {"prefix": False},
        {"max_num_tokens": 4},
        {"chunked": False, "max_num_tokens": 32},
        {"num_blocks": 14},
        {"num_blocks": 14, "prefix": False, "max_num_tokens": 5},
        {"num_blocks": 14, "policy": "guaranteed_no_evict"},
        {"max_batch_size": 1},
    ],
    ids=str,
)
def test_text_does_not_depend_on_scheduling(setting):
    executor, runner = make(**setting)
    log = ahead(executor, runner, REQUESTS)
    for i, (prompt, params) in enumerate(REQUESTS):
        assert {k: log.tokens[i, k] for k in range(params.n)} == {
            k: tokens for k, (tokens, *_) in synchronous(tuple(prompt), params).items()
        }
    assert runner.num_forwards == 0
    if setting.get("num_blocks") == 14:
        assert (executor.stats.preemptions > 0) == ("policy" not in setting)


# How far ahead.


def test_the_next_step_is_enqueued_before_a_steps_tokens_are_asked_for():
    executor, runner = make()
    executor.add_request(0, [1, 2, 3], SamplingParams(max_tokens=5))
    seen = []
    while executor.has_work:
        executor.step()
        seen.append((runner.num_started, len(runner.steps)))
    assert seen == [(2, 1), (3, 2), (4, 3), (5, 4), (5, 5)]  # started, computed; none beyond the last token


def test_a_request_that_comes_is_in_the_next_step_that_starts():
    executor, runner = make()
    executor.add_request(0, [1, 2, 3], SamplingParams(max_tokens=20))
    executor.step()
    executor.add_request(1, [4, 5], SamplingParams(max_tokens=20))
    for _ in range(4):
        executor.step()
    assert [np.diff(i.query_start).tolist() for i in runner.steps] == [[3], [1], [1, 2], [1, 1], [1, 1]]


def test_what_a_step_under_way_gives_for_a_sequence_that_has_ended_is_dropped():
    prompt = [1, 2, 3]
    stop = expected_tokens(prompt, 4, VOCAB)[3]
    executor, runner = make(eos=[stop], max_batch_size=1)
    requests = [(prompt, SamplingParams(max_tokens=20)), ([7, 8], SamplingParams(max_tokens=6, ignore_eos=True))]
    log = ahead(executor, runner, requests)  # the second gets the first's row and blocks, with a step of it under way
    assert log.tokens == {(0, 0): expected_tokens(prompt, 4, VOCAB), (1, 0): expected_tokens([7, 8], 6, VOCAB)}
    assert log.ends == {(0, 0): "stop", (1, 0): "length"}
    assert runner.num_started == 5 + 6


def test_a_preempted_sequence_gets_the_token_of_the_step_under_way():
    executor, runner = make(9, max_num_tokens=8, prefix=False, max_batch_size=2)
    requests = [(prompt_of(4, i), SamplingParams(max_tokens=24)) for i in range(2)]
    for i, request in enumerate(requests):
        executor.add_request(i, *request)
    log, told = Log(executor, runner), []
    while not executor.stats.preemptions:
        told = log.step()
    assert [e.request_id for e in told] == [0, 1]
    log.drain()
    assert log.tokens == {(i, 0): expected_tokens(p, 24, VOCAB) for i, (p, _) in enumerate(requests)}


def test_a_preempted_sequence_may_turn_out_to_have_ended():
    executor, runner = make(9, max_num_tokens=8, prefix=False, max_batch_size=2)
    prompts = [prompt_of(4, i) for i in range(2)]
    wanted = [expected_tokens(p, 24, VOCAB) for p in prompts]
    last = 12  # of its tokens: the one under way when both need a fifth block
    log = Log(executor, runner)
    executor.add_request(0, prompts[0], SamplingParams(max_tokens=24))
    executor.add_request(1, prompts[1], SamplingParams(max_tokens=24, stop_token_ids=(wanted[1][last],)))
    while not log.ends.get((1, 0)):
        assert not executor.stats.preemptions
        log.step()
    assert executor.stats.preemptions == 1
    assert executor.stats.num_waiting == 0
    log.drain()
    assert log.tokens == {(0, 0): wanted[0], (1, 0): wanted[1][: last + 1]}


def test_forks_are_sampled_with_their_prompt_where_there_are_rows():
    executor, runner = make(max_batch_size=2)
    executor.add_request(0, prompt_of(10), SamplingParams(max_tokens=4, n=3, temperature=1.0, seed=2))
    log = Log(executor, runner)
    assert [(e.request_id, e.index) for e in log.step()] == [(0, 0), (0, 1)]
    assert len(log.drain().tokens[0, 2]) == 4
    assert len(runner.copies) == 1


def test_tokens_generated_ahead_are_reused_by_the_next_turn():
    executor, runner = make()
    prompt = prompt_of(6)
    log = ahead(executor, runner, [(prompt, SamplingParams(max_tokens=11))])
    executor.add_request(1, prompt + log.tokens[0, 0] + [1, 2], SamplingParams(max_tokens=1))
    executor.step()
    assert executor.cached_tokens(1) == 16


@pytest.mark.parametrize("end", ["cancel", "finish"])
def test_a_request_that_is_ended_with_a_step_under_way_frees_all_at_once(end):
    executor, runner = make()
    executor.add_request(0, prompt_of(10), SamplingParams(max_tokens=20))
    log = Log(executor, runner)
    log.step()
    executor.cancel(0) if end == "cancel" else executor.finish(0, 0)
    assert executor.stats.blocks_used == 0
    assert executor.has_work
    assert [e.finish_reason for e in log.step()] == (["cancelled"] if end == "cancel" else [])
    assert not executor.has_work
    assert not runner.under_way


# Steps that are not run ahead.


def test_steps_with_a_request_that_the_runner_cannot_sample_for_wait_for_all_tokens():
    executor, runner = make()
    log = Log(executor, runner)
    executor.add_request(0, [1, 2, 3], SamplingParams(max_tokens=12))
    log.step()
    assert (runner.num_started, runner.num_forwards) == (2, 0)
    executor.add_request(1, prompt_of(20), SamplingParams(max_tokens=3, logprobs=5))
    log.step()  # the first chunk of its prompt, of which nothing is sampled
    assert (runner.num_started, runner.num_forwards) == (3, 0)
    log.step()  # the rest has to wait
    assert (runner.num_started, runner.num_forwards) == (3, 0)
    assert not runner.under_way
    for forwards in range(1, 4):
        log.step()
        assert (runner.num_started, runner.num_forwards) == (3, forwards)
    log.step()
    assert (runner.num_started, runner.num_forwards) == (5, 3)
    log.drain()
    assert log.tokens == {
        (0, 0): expected_tokens([1, 2, 3], 12, VOCAB),
        (1, 0): expected_tokens(prompt_of(20), 3, VOCAB),
    }


def test_a_step_that_is_put_off_keeps_its_copies():
    executor, runner = make(max_num_tokens=10)
    requests = [(prompt_of(10), SamplingParams(max_tokens=5, n=2)), ([1, 2], SamplingParams(max_tokens=2, logprobs=5))]
    log = ahead(executor, runner, requests)  # the second comes right after the first is forked
    assert len(runner.copies) == 1
    assert log.tokens == {
        (i, k): synchronous(tuple(p), q)[k][0] for i, (p, q) in enumerate(requests) for k in range(q.n)
    }


@pytest.mark.parametrize(
    ("eos", "min_tokens", "forwards"),
    [((), 4, 0), ((3, 17), 4, 0), ((3, 17, 9), 0, 0), ((3, 17, 9), 4, 4)],
    ids=["no bans", "bans", "stops", "more bans than the runner takes"],
)
def test_what_is_banned_until_min_tokens(eos, min_tokens, forwards):
    executor, runner = make(eos=eos)
    log = ahead(executor, runner, [([1, 2], SamplingParams(min_tokens=min_tokens, max_tokens=4))])
    assert runner.num_forwards == forwards
    assert log.tokens[0, 0] == expected_tokens([1, 2], 4, VOCAB, eos, min_tokens)


def test_penalties_go_on_where_steps_were_sampled_here():
    """Of what the runner has not sampled itself it is told again."""
    executor, runner = make(num_blocks=200, max_batch_size=5)
    penalties = SamplingParams(max_tokens=30, repetition_penalty=2.0, frequency_penalty=1.0, temperature=1.0, seed=5)
    requests = [(prompt_of(5, 1), penalties), ([1, 2, 3], replace(penalties, seed=6, n=2))]
    log = Log(executor, runner)
    for i, request in enumerate(requests):
        executor.add_request(i, *request)
    for i in range(2, 4):
        for _ in range(6):
            log.step()
        executor.cancel(1) if i == 3 else None
        executor.add_request(i, prompt_of(3, i), SamplingParams(max_tokens=2, logprobs=20))
    log.drain()
    assert runner.num_forwards > 2
    assert runner.num_started > 12
    assert log.tokens[0, 0] == synchronous(tuple(requests[0][0]), penalties)[0][0]
    for i, (tokens, *_) in synchronous((1, 2, 3), requests[1][1]).items():
        got = log.tokens[1, i]
        assert len(got) > 6
        assert got == tokens[: len(got)]


def test_a_preempted_sequence_is_counted_anew():
    executor, runner = make(9, max_num_tokens=8, prefix=False, max_batch_size=2)
    params = SamplingParams(max_tokens=24, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.5)
    log = ahead(executor, runner, [(prompt_of(4, i), params) for i in range(2)])
    assert executor.stats.preemptions
    assert runner.num_forwards == 0
    assert log.tokens == {(i, 0): synchronous(tuple(prompt_of(4, i)), params)[0][0] for i in range(2)}


def test_several_ranks_sample_the_same_tokens():
    """Rank 0 tells the others of each step's samples, and they need not tell what they sampled."""
    leader, follower = thread_ranks(2)
    executor, runner = make(comm=leader)
    executor.add_request(0, [1, 2], SamplingParams(max_tokens=3, repetition_penalty=1.5, logprobs=2))
    executor.add_request(1, [3, 1], SamplingParams(max_tokens=3, temperature=1.0, seed=4))
    tokens = defaultdict(list)
    while executor.has_work:
        for event in executor.step():
            tokens[event.request_id].append(event.token_id)
    executor.close()
    assert runner.num_forwards == 0
    other = FakeSamplingRunner(VOCAB, BLOCK, max_batch_size=executor.config.max_batch_size)
    other.allocate_kv_cache(64)
    follow(other, follower, InputBuilder.of(executor.config), logits_rank=0)
    assert other.num_started == runner.num_started
    assert other.sampled == runner.sampled
    assert sorted(runner.sampled) == sorted(tokens[0] + tokens[1])


def test_what_ranks_are_told_has_gone_before_a_gpu_is_waited_for():
    """Rank 0's GPU waits for the others', and meanwhile rank 0 sends nothing on."""
    done = []

    class OnGpu(FakeSamplingRunner):
        notes = ()

        def gpu_memory(self):
            raise AssertionError

        def start(self, inputs, sampling):
            done.append("start")
            return super().start(inputs, sampling)

    leader, _ = thread_ranks(2)
    leader.flush = lambda: done.append("flush")
    executor, _ = make(comm=leader, kind=OnGpu)
    executor.add_request(0, [1, 2], SamplingParams(max_tokens=2))
    while executor.has_work:
        executor.step()
    assert done == ["flush", "start"] * 2


def test_a_runner_of_logits_is_not_run_ahead():
    executor, runner = test_executor.make()
    assert type(runner) is FakeRunner
    executor.add_request(0, [1, 2], SamplingParams(max_tokens=3))
    executor.step()
    assert len(runner.steps) == 1


# What the runner is told.


def test_sampling_inputs():
    executor, runner = make()
    given = []
    start = runner.start
    runner.start = lambda inputs, sampling: (given.append((inputs, sampling)), start(inputs, sampling))[1]
    huge = 2**63 - 1
    executor.add_request(0, [1, 2, 3], SamplingParams(temperature=0.5, top_k=2**40, top_p=0.75, min_p=0.125, seed=huge,
                                                      n=2))  # fmt: skip
    executor.add_request(1, [4, 5], SamplingParams(seed=7, temperature=1e-6))
    executor.step()
    plain = ("penalized", "repetition_penalties", "presence_penalties", "frequency_penalties", "histories",
             "history_tokens", "banned", "logprobs")  # fmt: skip
    (first, sampling), (second, again) = given
    assert {name: array.tolist() for name, array in vars(sampling).items()} == {
        "logits_rows": [0, 0, 1],
        "rows": [0, 2, 1],
        "seeds": [huge, huge + 1, 7],
        "positions": [0, 0, 0],
        "temperatures": [0.5, 0.5, 0],
        "top_k": [2**31 - 1, 2**31 - 1, 0],
        "top_p": [0.75, 0.75, 1],
        "min_p": [0.125, 0.125, 0],
        **{name: [] for name in plain},
    }
    assert first.input_ids.tolist() == [1, 2, 3, 4, 5]
    assert second.input_ids.tolist() == [-1, -3, -2]
    assert again.positions.tolist() == [1, 1, 1]
    assert again.logits_rows.tolist() == [0, 1, 2]


def test_sampling_inputs_of_penalties_bans_and_logprobs():
    executor, runner = make(eos=[9])
    given = []
    start = runner.start
    runner.start = lambda inputs, sampling: (given.append(vars(sampling)), start(inputs, sampling))[1]
    executor.add_request(0, [1, 2, 3], SamplingParams(repetition_penalty=1.5, frequency_penalty=-0.5, n=2, logprobs=2,
                                                      ignore_eos=True))  # fmt: skip
    executor.add_request(1, [4, 5], SamplingParams(min_tokens=2, stop_token_ids=(6,), logprobs=0))
    executor.add_request(2, [7], SamplingParams(presence_penalty=0.25))
    for _ in range(2):
        executor.step()
    first, second, third = given

    def special(sampling):
        return {name: array.tolist() for name, array in list(sampling.items())[8:]}

    assert first["logits_rows"].tolist() == [0, 0, 1, 2]
    assert first["rows"].tolist() == [0, 3, 1, 2]
    assert special(first) == {
        "penalized": [0, 3],  # both answers' logits are the same, and changed once
        "repetition_penalties": [1.5, 1.0],
        "presence_penalties": [0.0, 0.25],
        "frequency_penalties": [-0.5, 0.0],
        "histories": [[0, 3, 3], [3, 3, 3], [2, 1, 1]],
        "history_tokens": [1, 2, 3, 1, 2, 3, 7],
        "banned": [[1, 6], [1, 9]],
        "logprobs": [[0, 2], [1, 2], [2, 0]],
    }
    assert second["rows"].tolist() == [0, 3, 1, 2]
    assert special(second) == {
        "penalized": [0, 1, 3],
        "repetition_penalties": [1.5, 1.5, 1.0],
        "presence_penalties": [0.0, 0.0, 0.25],
        "frequency_penalties": [-0.5, -0.5, 0.0],
        "histories": [],
        "history_tokens": [],
        "banned": [[2, 6], [2, 9]],
        "logprobs": [[0, 2], [1, 2], [2, 0]],
    }
    assert special(third) == {**special(second), "banned": []}


# Failures.


@pytest.mark.parametrize("where", ["start", "tokens"])
def test_a_step_that_fails_raises(where, monkeypatch):
    executor, runner = make()
    executor.add_request(0, [1, 2], SamplingParams(max_tokens=9))
    executor.step()

    def fail(*args):
        raise RuntimeError("out of order")

    monkeypatch.setattr(FakeSamplingRunner if where == "start" else FakePendingTokens, where, fail)
    with pytest.raises(RuntimeError, match="out of order"):
        executor.step()
    executor.close()
    assert len(runner.under_way) == (1 if where == "start" else 2)


def test_logits_that_are_not_finite_raise():
    executor, runner = make()
    executor.add_request(0, [1, 2], SamplingParams(max_tokens=9))
    executor.step()
    runner._compute = lambda inputs, sampling: (np.full(len(sampling.rows), -1, np.int32), [None] * len(sampling.rows))
    with pytest.raises(EngineError, match="not finite"):
        executor.step()


def test_what_is_not_finite_of_a_sequence_that_has_ended_does_not_matter():
    executor, runner = make()
    executor.add_request(0, [1, 2], SamplingParams(max_tokens=9))
    executor.step()
    executor.finish(0, 0)
    runner._compute = lambda inputs, sampling: (np.full(len(sampling.rows), -1, np.int32), [None] * len(sampling.rows))
    assert executor.step() == []


def test_closing_does_not_wait_for_what_is_under_way():
    executor, runner = make()
    executor.add_request(0, [1, 2], SamplingParams(max_tokens=9))
    executor.step()
    executor.close()
    assert len(runner.under_way) == 1
