"""Datasets: what is drawn, what a line is, and what is said of a bad one."""

import io
import json

import pytest

from trtllm_cli.bench.workload import (
    NormalLengths,
    Sample,
    UniformLengths,
    check_fits,
    from_lines,
    from_running_text,
    read_dataset,
    synthetic,
    tokenize,
    write_dataset,
)
from trtllm_cli.errors import RequestError, UsageError


def encode(text):
    return [ord(c) for c in text]


def text_of(samples):
    out = io.StringIO()
    write_dataset(samples, out)
    return out.getvalue()


def test_a_line_is_tensorrt_llms():
    ids = Sample(task_id=3, output_tokens=7, input_ids=(1, 2))
    text = Sample(task_id=4, output_tokens=8, prompt="Hé")
    assert text_of([ids, text]) == (
        '{"task_id": 3, "input_ids": [1, 2], "output_tokens": 7}\n{"task_id": 4, "prompt": "Hé", "output_tokens": 8}\n'
    )


def test_exact_lengths_without_deviation():
    samples = synthetic(5, NormalLengths(12), NormalLengths(3, what="output"), vocab_size=50)
    assert [len(s.input_ids) for s in samples] == [12] * 5
    assert [s.output_tokens for s in samples] == [3] * 5
    assert [s.task_id for s in samples] == list(range(5))
    assert all(0 <= t < 50 for s in samples for t in s.input_ids)


def test_same_seed_same_requests():
    def make(seed):
        return synthetic(4, NormalLengths(20, 5), UniformLengths(1, 9, "output"), 1000, seed=seed)

    assert make(1) == make(1)
    assert make(1) != make(2)


def test_normal_lengths_are_around_the_mean_and_never_below_one():
    samples = synthetic(2000, NormalLengths(5, 4), NormalLengths(100, 10), 10)
    inputs = [len(s.input_ids) for s in samples]
    outputs = [s.output_tokens for s in samples]
    assert min(inputs) == 1
    assert sum(outputs) / len(outputs) == pytest.approx(100, abs=1)


def test_uniform_lengths_reach_both_ends():
    lengths = {s.output_tokens for s in synthetic(300, UniformLengths(2, 2), UniformLengths(3, 6), 10)}
    assert lengths == {3, 4, 5, 6}


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (lambda: NormalLengths(0), "--input-mean"),
        (lambda: NormalLengths(3, -1, "output"), "--output-stdev"),
        (lambda: UniformLengths(0, 3), "--input-min"),
        (lambda: UniformLengths(5, 3, "output"), "--output-max"),
        (lambda: synthetic(0, NormalLengths(1), NormalLengths(1), 10), "--num-requests"),
        (lambda: synthetic(1, NormalLengths(1), NormalLengths(1), 0), "--vocab-size"),
    ],
)
def test_bad_lengths_name_the_flag(make, where):
    with pytest.raises(UsageError) as e:
        make()
    assert e.value.where == where


def test_dataset_round_trip(tmp_path):
    samples = [*synthetic(3, UniformLengths(1, 9), NormalLengths(4), 99), Sample(3, 5, prompt="to\nbe")]
    path = tmp_path / "d.jsonl"
    path.write_text(text_of(samples) + "\n")
    assert read_dataset(path) == samples
    assert read_dataset(path, num_requests=2) == samples[:2]
    with pytest.raises(UsageError, match="has 4 requests, 5 were asked for"):
        read_dataset(path, num_requests=5)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not valid JSON"),
        ("[]", "not an object"),
        ("[" * 100_000, "not valid JSON"),
        ('{"input_ids": [1]}', "output_tokens"),
        ('{"input_ids": [1], "output_tokens": 0}', "at least 1"),
        ('{"input_ids": [1], "output_tokens": true}', "at least 1"),
        ('{"input_ids": [], "output_tokens": 1}', "needs `input_ids`"),
        ('{"input_ids": [-1], "output_tokens": 1}', "needs `input_ids`"),
        ('{"input_ids": ["1"], "output_tokens": 1}', "needs `input_ids`"),
        ('{"prompt": "", "output_tokens": 1}', "needs `input_ids`"),
        ('{"prompt": "a", "output_tokens": 1, "top_k": 2}', "`top_k`"),
        ('{"prompt": "a", "output_tokens": 1, "lora_request": {"id": 1}}', "`lora_request`"),
        ('{"task_id": "x", "prompt": "a", "output_tokens": 1}', "`task_id`"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, says):
    path = tmp_path / "d.jsonl"
    path.write_text('{"input_ids": [1], "output_tokens": 1}\n' + line + "\n")
    with pytest.raises(UsageError) as e:
        read_dataset(path)
    assert says in e.value.message
    assert e.value.where == f"{path}:2"


def test_no_such_dataset(tmp_path):
    with pytest.raises(UsageError, match="no such dataset"):
        read_dataset(tmp_path / "none")
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(UsageError, match="holds no requests"):
        read_dataset(tmp_path / "empty")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_dataset(tmp_path / "bytes")


def test_whole_lines_of_text(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("one\n\ntwo words\nthree\n")
    samples = from_lines(path, encode, NormalLengths(6, what="output"), num_requests=2)
    assert [s.input_ids for s in samples] == [tuple(encode("one")), tuple(encode("two words"))]
    assert from_lines(path, None, NormalLengths(6))[2] == Sample(2, 6, prompt="three")
    with pytest.raises(UsageError, match="has 3 prompts"):
        from_lines(path, encode, NormalLengths(6), num_requests=4)


def test_json_lines_of_text(tmp_path):
    path = tmp_path / "t.jsonl"
    rows = [{"text": "a", "id": 1}, {"prompt": "b", "output_tokens": 3}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert from_lines(path, None, NormalLengths(9)) == [Sample(0, 9, prompt="a"), Sample(1, 3, prompt="b")]
    path.write_text('{"title": "x"}')
    with pytest.raises(UsageError, match="none of the text fields"):
        from_lines(path, None, NormalLengths(9))


def test_running_text_is_cut_by_length(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("abcd\nefgh\nij")
    samples = from_running_text(path, encode, NormalLengths(4), NormalLengths(2, what="output"))
    assert [s.input_ids for s in samples] == [tuple(encode(t)) for t in ("abcd", "\nefg", "h\nij")]
    with pytest.raises(UsageError, match="12 tokens, enough for 3"):
        from_running_text(path, encode, NormalLengths(4), NormalLengths(2), num_requests=4)


def test_tokenize():
    text, ids = Sample(0, 5, prompt="ab"), Sample(1, 5, input_ids=(9,))
    assert tokenize([text, ids], encode) == [Sample(0, 5, input_ids=(97, 98)), ids]
    assert tokenize([ids], None) == [ids]
    with pytest.raises(UsageError, match="carries no tokenizer"):
        tokenize([text], None)


@pytest.mark.parametrize(
    ("sample", "says"),
    [
        (Sample(7, 1, input_ids=(1,) * 9), "task 7 has 9 prompt tokens; the engine takes 8"),
        (Sample(7, 5, input_ids=(1,) * 8), "8 \\+ 5 = 13 tokens; the engine's max_seq_len is 12"),
        (Sample(7, 1, input_ids=(5, 64)), "token 64; the engine's vocabulary has 64"),
    ],
)
def test_what_does_not_fit_is_said_before_measuring(sample, says):
    check_fits([Sample(0, 4, input_ids=(63,) * 8)], max_input_len=8, max_seq_len=12, vocab_size=64)
    with pytest.raises(RequestError, match=says):
        check_fits([sample], max_input_len=8, max_seq_len=12, vocab_size=64)
