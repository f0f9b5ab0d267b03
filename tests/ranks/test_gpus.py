"""Engines of several ranks on several GPUs, under mpirun."""

import functools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.ranks.conftest import run

SCRIPT = Path(__file__).with_name("gpu_logits.py")
TRTLLM = (sys.executable, "-m", "trtllm_cli")
pytestmark = [
    pytest.mark.gpu, pytest.mark.mpi, pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two NVIDIA GPUs"),
]  # fmt: skip


@pytest.fixture(scope="module")
def engine_of(built, snapshot):
    """`engine_of(*split)`: a cuda engine; `split` is for convert."""

    @functools.cache
    def build(*split):
        name = "".join(map(str, split)) or "one"
        return built(snapshot, name, *split, dtype="bfloat16", how=("--backend", "cuda"))

    return build


def logits_of(engine, ranks=1, mpirun=None, env=None):
    command = (sys.executable, SCRIPT, engine)
    env = {"PYTHONPATH": ":".join(filter(None, sys.path)), **(env or {})}
    done = mpirun(ranks, *command, env=env) if mpirun else run(command, env=env)
    assert done.code == 0, done.err
    found = json.loads(done.out.strip().splitlines()[-1])
    return [np.array(x) for x in found["logits"]], found["has_peers"]


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_two_gpus_give_what_one_gives(mpirun, engine_of, tp, pp):
    one, _ = logits_of(engine_of())
    two, has_peers = logits_of(engine_of("--tp-size", tp, "--pp-size", pp), 2, mpirun)
    for got, want in zip(two, one, strict=True):
        assert np.linalg.norm(got - want) / np.linalg.norm(want) < 2e-2
    if not has_peers and tp > 1:
        pytest.skip("through NCCL alone: these GPUs do not see each other's memory")


def test_two_gpus_run(mpirun, engine_of):
    engine = engine_of("--tp-size", 2)
    command = (*TRTLLM, "run", "--engine-dir", engine, "--max-output-len", "8", "--ignore-eos", "--json", "abc")
    done = mpirun(2, *command)
    assert done.code == 0, done.err
    assert len(json.loads(done.out)["outputs"][0]["token_ids"]) == 8
    bench = (*TRTLLM, "bench", "throughput", "--engine-dir", engine, "--input-len", "8", "--output-len", "8", "--json")
    done = mpirun(2, *bench, "--num-requests", "6")
    assert done.code == 0, done.err
    assert json.loads(done.out)["world_info"]["tp_size"] == 2
