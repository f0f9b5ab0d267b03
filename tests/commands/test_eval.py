"""`trtllm eval`: perplexity of checkpoints and engines, what changed between two, and bad input."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from trtllm_cli import cli
from trtllm_cli.checkpoint import Checkpoint
from trtllm_cli.evaluate.text import heldout_windows, load_tokenizer
from trtllm_cli.evaluate.whole_model import program_of

USAGE, ARTIFACT, UNSUPPORTED, ACCURACY = 2, 3, 4, 8
SMALL = ("--num-windows", "2", "--seq-len", "24")
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 3


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    """The tiny ones, an int8 and an int4 checkpoint, and an engine of bfloat16."""
    root = tmp_path_factory.mktemp("eval")
    for name in ("checkpoint", "halves", "engine", "two-ranks", "snapshot"):
        (root / name).symlink_to(tiny / name)
    for name, args in {"int8": ["int8_wo"], "int4": ["int4_wo", "--group-size", "32"]}.items():
        assert cli.call(["convert", str(root / "snapshot"), "-o", str(root / name), "--qformat", *args]) == 0
    (root / "text.txt").write_text(TEXT)
    return root


@pytest.fixture
def small(models):
    return (*SMALL, "--text", models / "text.txt", "--num-threads", "1")


def test_perplexity_of_a_checkpoint(models, small, trtllm):
    said = trtllm("eval", "ppl", models / "checkpoint", *small, "--json")
    assert said.code == 0, said.err
    result = json.loads(said.out)
    checkpoint = Checkpoint.open(models / "checkpoint")
    found = heldout_windows([TEXT], load_tokenizer(checkpoint.tokenizer_dir, 259), 2, 24)
    ids = torch.tensor([w.ids for w in found])
    with torch.inference_mode():
        logits = program_of(checkpoint)(ids)[:, :-1]
        want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).exp()
    assert result["perplexity"] == pytest.approx(float(want), rel=1e-4)
    assert (result["num_tokens"], result["num_windows"], result["seq_len"]) == (46, 2, 24)


def test_an_engine_scores_as_its_checkpoint(models, small, trtllm):
    """In chunks of four rows, the engine's batch size."""
    values = [json.loads(trtllm("eval", "ppl", models / n, *small, "--json").out) for n in ("checkpoint", "engine")]
    assert values[0]["perplexity"] == pytest.approx(values[1]["perplexity"], rel=1e-4)


def test_ranks_are_joined(models, small, trtllm):
    values = [json.loads(trtllm("eval", "ppl", models / n, *small, "--json").out) for n in ("checkpoint", "halves")]
    assert values[0]["perplexity"] == pytest.approx(values[1]["perplexity"], rel=1e-5)


def test_defaults(models, trtllm):
    """The shipped text; windows as long as the model can take."""
    said = trtllm("eval", "ppl", models / "checkpoint", "--num-windows", "1", "--num-threads", "1")
    assert said.code == 0, said.err
    assert said.out.startswith(f"Perplexity of {models / 'checkpoint'}: ")
    assert "over 255 tokens in 1 windows of 256 (heldout)" in said.out


def test_overlapping_windows(models, small, trtllm):
    said = trtllm("eval", "ppl", models / "checkpoint", *small, "--stride", "4", "--json")
    assert json.loads(said.out)["num_tokens"] == 23 + 4
    assert json.loads(said.out)["stride"] == 4


def test_compare_two_checkpoints(models, small, trtllm, tmp_path):
    said = trtllm("eval", "compare", models / "checkpoint", models / "int8", *small, "-o", tmp_path / "out")
    assert said.code == 0, said.err
    assert "transformer.layers." in said.out
    assert "checkpoint" in said.out
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert len(report["linears"]) == 2 * 5 + 1
    assert 0 < report["linears"]["transformer.layers.1.mlp.fc"] < 0.02
    assert report["linears"]["lm_head"] == 0
    assert len(report["stream"]) == 2
    assert (report["failed"], report["max_ppl_increase"]) == (False, 0.2)
    assert report["quantized"]["bytes"] < report["reference"]["bytes"]
    assert (tmp_path / "out/report.png").read_bytes()[:4] == b"\x89PNG"


def test_compare_with_an_engine(models, small, trtllm, tmp_path):
    said = trtllm("eval", "compare", models / "int8", models / "engine", *small, "-o", tmp_path / "out", "--json")
    assert said.code == 0, said.err
    report = json.loads(said.out)
    assert report["linears"] == {}
    assert 0 < report["mean_kl"] < 0.01
    assert not (tmp_path / "out/report.png").exists()
    said = trtllm("eval", "compare", models / "engine", models / "engine", *small)
    assert said.code == 0
    assert "No errors by layer: engines are compared as a whole" in said.err


def spoiled(source, target, name):
    """A copy of a checkpoint in which one tensor's numbers are eight times as large."""
    shutil.copytree(source, target)
    (target / "SHA256SUMS").unlink()
    checkpoint = Checkpoint.open(target)
    with checkpoint.tensors(checkpoint.config.mapping.ranks[0]) as file:
        start, info = len(file.header_bytes()) + file._offsets[name], file.tensors[name]
    data = bytearray((target / "rank0.safetensors").read_bytes())
    numbers = np.frombuffer(data, np.float32, info.nbytes // 4, start)
    numbers *= 8
    (target / "rank0.safetensors").write_bytes(data)
    return target


def test_a_bound_that_is_exceeded(models, small, trtllm, tmp_path):
    bad = spoiled(models / "int8", tmp_path / "bad", "lm_head.weight")
    args = ("eval", "compare", models / "checkpoint", bad, *small)
    said = trtllm(*args, "--max-ppl-increase", "0.5%", "-o", tmp_path / "out")
    assert said.code == ACCURACY
    assert "perplexity rose by" in said.err
    assert "(--exclude lm_head)" in said.err
    assert json.loads((tmp_path / "out/report.json").read_text())["failed"] is True
    assert trtllm(*args, "--max-ppl-increase", "100000%").code == 0


def test_a_model_of_nothing_but_nan_fails(models, small, trtllm, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(models / "checkpoint", bad)
    (bad / "SHA256SUMS").unlink()
    data = (bad / "rank0.safetensors").read_bytes()
    (bad / "rank0.safetensors").write_bytes(data[:-4096] + b"\xff" * 4096)
    said = trtllm("eval", "ppl", bad, *small)
    assert (said.code, "no numbers that make sense" in said.err) == (ACCURACY, True)
    assert trtllm("eval", "compare", models / "checkpoint", bad, *small).code == ACCURACY


def refused(said, code, *words):
    assert said.code == code, said.err
    assert all(word in said.err for word in words), said.err
    assert said.out == ""


BAD_TEXTS = {
    "empty.txt": (b"", "holds no text"),
    "short.txt": (b"Hello", "5 tokens, too few for one window of 24"),
    "latin.txt": (b"caf\xe9 " * 50, "not UTF-8"),
    "broken.jsonl": (b"{", "line 1 is not JSON"),
    "damaged.parquet": (b"PAR1" * 9, "is damaged"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_bad_texts(models, trtllm, tmp_path, name):
    data, words = BAD_TEXTS[name]
    (tmp_path / name).write_bytes(data)
    refused(trtllm("eval", "ppl", models / "checkpoint", *SMALL, "--text", tmp_path / name), USAGE, words, "--text"
            if name != "broken.jsonl" else name)  # fmt: skip


def test_a_parquet_file(models, trtllm, tmp_path):
    pq.write_table(pa.table({"text": [TEXT]}), tmp_path / "a.parquet")
    assert trtllm("eval", "ppl", models / "checkpoint", *SMALL, "--text", tmp_path / "a.parquet").code == 0


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("ppl", "snapshot"), ARTIFACT, ("is a snapshot", "trtllm convert")),
        (("ppl", "nowhere"), ARTIFACT, ("no such file or directory",)),
        (("ppl", "checkpoint", "--text", "nowhere"), USAGE, ("no such file: nowhere", "--text")),
        (("ppl", "checkpoint", "--text", "a", "--dataset", "b"), USAGE, ("both given",)),
        (("ppl", "checkpoint", "--seq-len", "999"), USAGE, ("more than the 256 that", "--seq-len")),
        (("ppl", "engine", "--seq-len", "65"), USAGE, ("more than the 64 that", "--seq-len")),
        (("ppl", "checkpoint", "--stride", "999"), USAGE, ("a stride of 999", "--stride")),
        (("ppl", "checkpoint", "--dtype", "int2"), USAGE, ("--dtype is 'int2'",)),
        (("ppl", "checkpoint", "--device", "tpu"), USAGE, ("--device is 'tpu'",)),
        (("ppl", "two-ranks"), UNSUPPORTED, ("split over 2 ranks",)),
        (("compare", "checkpoint", "int8", "--max-ppl-increase", "lots"), USAGE, ("'lots' is no share",)),
        (("compare", "checkpoint", "int8", "--max-ppl-increase", "-5%"), USAGE, ("no share",)),
    ],
    ids=str,
)
def test_bad_arguments(models, trtllm, args, code, words):
    verb, *rest = (models / a if (models / a).exists() and a != "a" else a for a in args)
    refused(trtllm("eval", verb, *rest), code, *words)


def test_a_checkpoint_without_tokenizer(models, small, trtllm, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(models / "checkpoint", bare)
    shutil.rmtree(bare / "tokenizer")
    refused(trtllm("eval", "ppl", bare, *small), USAGE, "no tokenizer", "--tokenizer-dir")
    assert trtllm("eval", "ppl", bare, *small, "--tokenizer-dir", models / "snapshot").code == 0
    assert trtllm("eval", "compare", bare, models / "checkpoint", *small).code == 0


def test_vocabularies_must_be_the_same(models, small, trtllm, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(models / "checkpoint", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    refused(trtllm("eval", "compare", models / "checkpoint", other, *small), USAGE, "has 259 tokens", "has 300")
    (other / "config.json").write_text(json.dumps(config))
    tokenizer = (other / "tokenizer/tokenizer.json").read_text()
    (other / "tokenizer/tokenizer.json").write_text(tokenizer.replace("<|im_end|>", "<|end|>"))
    refused(trtllm("eval", "compare", models / "checkpoint", other, *small), USAGE, "the same ids to other tokens")


def test_an_altered_checkpoint_is_refused(models, small, trtllm, tmp_path):
    altered = tmp_path / "altered"
    shutil.copytree(models / "checkpoint", altered)
    file = altered / "rank0.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    refused(trtllm("eval", "ppl", altered, *small), ARTIFACT, "was altered")


def test_a_model_too_large_for_memory_is_refused(models, small, trtllm, monkeypatch):
    monkeypatch.setattr("trtllm_cli.run.kv_budget.available_memory", lambda: 1000)
    refused(trtllm("eval", "ppl", models / "checkpoint", *small), 6, "of memory is free", "--dtype bfloat16")


def test_a_report_that_cannot_be_written(models, small, trtllm, tmp_path):
    (tmp_path / "file").write_text("")
    said = trtllm("eval", "compare", models / "checkpoint", models / "int8", *small, "-o", tmp_path / "file")
    refused(said, 6, "cannot write")


def test_bfloat16(models, small, trtllm):
    values = [
        json.loads(trtllm("eval", "ppl", models / "checkpoint", *small, "--dtype", dtype, "--json").out)["perplexity"]
        for dtype in ("float32", "bfloat16")
    ]
    assert values[0] != values[1]
    assert values[0] == pytest.approx(values[1], rel=0.05)
