"""A step's plan as the message that goes to the other ranks."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from trtllm_cli.run.sampling_inputs import SamplingInputs
from trtllm_cli.run.step_plan import END, StepPlan

INT32 = np.iinfo(np.int32)
PARTS = ("tokens", "sequences", "additions", "copies")


def part(width, min_count=0):
    """As many rows as may be of so many numbers; of tokens a row is a number."""
    count = st.integers(min_count, 20)
    shape = count if width is None else count.map(lambda n: (n, width))
    return arrays.arrays(np.int32, shape, elements=st.integers(INT32.min, INT32.max))


PLANS = st.builds(StepPlan, tokens=part(None), sequences=part(4), additions=part(3), copies=part(2))


def make(tokens, sequences, additions=(), copies=()):
    return StepPlan(
        np.array(tokens, np.int32),
        np.array(sequences, np.int32).reshape(-1, 4),
        np.array(additions, np.int32).reshape(-1, 3),
        np.array(copies, np.int32).reshape(-1, 2),
    )


PREFILL_AND_DECODE = make([7, 8, 9, 4], [(2, 0, 3, 0), (0, 11, 1, 1)], [(2, 0, 5), (2, 1, 6), (0, 2, 9)], [(3, 9)])


@given(PLANS)
def test_a_plan_is_read_as_it_was_sent(plan):
    read, sampling = StepPlan.of_message(plan.message())
    assert sampling is None
    for name in PARTS:
        got, want = getattr(read, name), getattr(plan, name)
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, want, strict=True)


@given(PLANS)
def test_a_message_is_int32_and_has_no_more_than_the_numbers(plan):
    message = plan.message()
    assert message.dtype == np.int32
    assert message.flags.c_contiguous
    assert message.size == 5 + sum(getattr(plan, name).size for name in PARTS)


def test_the_layout_is_fixed():
    assert PREFILL_AND_DECODE.message().tolist() == [
        4, 2, 3, 1, -1,
        7, 8, 9, 4,
        2, 0, 3, 0,  0, 11, 1, 1,
        2, 0, 5,  2, 1, 6,  0, 2, 9,
        3, 9,
    ]  # fmt: skip


@given(st.integers(0, 5), st.randoms(use_true_random=False))
def test_samples_go_with_a_plan(count, random):
    ints = [np.array([random.randrange(-(2**31), 2**31) for _ in range(count)], np.int32) for _ in range(4)]
    seeds = np.array([random.randrange(2**64) for _ in range(count)], np.uint64)
    floats = [np.array([random.random() for _ in range(count)], np.float32) for _ in range(3)]
    more = {} if count % 2 else {
        "penalized": ints[0][:1], "history_tokens": ints[1], "banned": np.stack(ints[:2], axis=1),
        "histories": np.stack(ints[:3], axis=1), "frequency_penalties": floats[0][:2],
    }  # fmt: skip
    sampling = SamplingInputs(*ints[:2], seeds, ints[2], floats[0], ints[3], *floats[1:], **more)
    plan, read = StepPlan.of_message(PREFILL_AND_DECODE.message(sampling))
    np.testing.assert_array_equal(plan.tokens, PREFILL_AND_DECODE.tokens)
    for field in dataclasses.fields(SamplingInputs):
        np.testing.assert_array_equal(getattr(read, field.name), getattr(sampling, field.name), strict=True)


def test_a_decode_step_of_eight_sequences_is_small():
    plan = make(range(8), [(row, 100 + row, 1, 1) for row in range(8)], [(3, 7, 40)])
    assert plan.message().nbytes < 250


def test_a_step_is_never_mistaken_for_the_end():
    assert len(END) == 0
    assert len(make([], []).message()) > 0


@given(PLANS, st.data())
def test_a_message_of_another_length_than_it_says_is_refused(plan, data):
    message = plan.message()
    cut = data.draw(st.integers(1, len(message) - 1), label="cut")
    with pytest.raises((AssertionError, ValueError)):
        StepPlan.of_message(message[:cut])
    more = data.draw(part(None, min_count=1), label="more")
    with pytest.raises(AssertionError, match=f"a message of {len(message) + len(more)} numbers"):
        StepPlan.of_message(np.concatenate([message, more]))


@given(PLANS, st.integers(0, 3), st.integers(1, 1000))
def test_a_count_that_was_changed_is_noticed(plan, at, by):
    message = plan.message()
    message[at] += by
    with pytest.raises((AssertionError, ValueError)):
        StepPlan.of_message(message)


def test_a_plan_says_what_it_is_about():
    assert PREFILL_AND_DECODE.stage == "prefill"
    assert PREFILL_AND_DECODE.num_logits == 1
    decode = make([7, 8], [(0, 3, 1, 1), (1, 9, 1, 1)])
    assert decode.stage == "decode"
    assert decode.num_logits == 2
