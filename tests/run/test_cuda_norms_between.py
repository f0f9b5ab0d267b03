"""Norms that the linears around them compute, in whole plans."""

import functools
import threading

import numpy as np
import pytest

from tests.batches import Sequences
from tests.engines import build_engine
from tests.interpreter_device import InterpreterDevice, fake_compile
from tests.run.test_cuda_check import load
from tests.thread_ranks import run_ranks
from tests.tiny_models import save_tiny_model
from trtllm_cli.build.backends import cuda, cuda_linears, cuda_norms_between, cuda_program, cuda_rows, cuda_tactics
from trtllm_cli.build.backends.cuda_linears import Tactic, adapted
from trtllm_cli.convert.options import RandomWeights
from trtllm_cli.convert.pipeline import ConvertOptions, convert
from trtllm_cli.run.backends import cuda as cuda_runner
from trtllm_cli.run.backends import cuda_check

SIZES = {
    "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
}  # fmt: skip
WIDE = {"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 8}  # a rank's rows, or FP8's, are as long
STREAM = Tactic("stream", (2, 4, 2, 1, 4))
CHAINS = ["linear+add_rms_norm+linear+gated_act", "linear+add_rms_norm+linear", "linear+add_rms_norm+linear+gated_act"]


@pytest.fixture(autouse=True)
def streamed(tmp_path, monkeypatch):
    """Every linear is streamed, for up to 3 tokens; kernels are interpreted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda, "compile_kernels", fake_compile)
    monkeypatch.setattr(cuda_linears, "_FEWEST_PROGRAMS", 1)

    def ways(self, shape):
        tactic = adapted(shape, STREAM)
        return [(3, tactic)] if tactic else []

    monkeypatch.setattr(cuda_tactics.LinearTactics, "ways", ways)
    monkeypatch.setattr(cuda_tactics.LinearTactics, "others", lambda self, shape, most: None)


def checkpoint(root, qformat, name="llama", tp_size=1, **sizes):
    save_tiny_model(root / "snapshot", name, **{**SIZES, **sizes})
    random = RandomWeights() if qformat else None  # with scales as calibration would find them
    source = root / "snapshot" / "config.json" if random else root / "snapshot"
    options = ConvertOptions(dtype="bfloat16", qformat=qformat, random=random, tp_size=tp_size)
    convert(source, root / "ckpt", options)
    return root / "ckpt"


def engine_of(ckpt, path):
    return build_engine(ckpt, path, backend="cuda", kernels="auto", tokens_per_block=16)


# A prompt, which has too many tokens for these kernels, and steps of one and of two sequences.
STEPS = [{0: [5, 3, 9, 2]}, {0: [4]}, {0: [1], 1: [7]}, {0: [8], 1: [6]}]


def logits_of(runner, steps=STEPS):
    """Of all steps."""
    of = Sequences(block_size=16)
    found = [runner.forward(of.step(step)).copy() for step in steps]
    runner.close()
    return np.concatenate(found)


def chains_of(engine):
    with engine.tensors(engine.config.pretrained_config.mapping.ranks[0]) as file:
        return [step["op"] for step in engine.plan(file)["steps"] if "instead" in step]


@pytest.mark.parametrize(("qformat", "layers"), [(None, 2), ("fp8", 1)])
def test_a_plan_with_and_without(tmp_path, monkeypatch, qformat, layers):
    ckpt = checkpoint(tmp_path, qformat, num_hidden_layers=layers, **(WIDE if qformat else {}))
    engine = engine_of(ckpt, tmp_path / "engine")
    assert chains_of(engine) == CHAINS[: 2 * layers - 1]
    found = logits_of(load(engine, InterpreterDevice))
    monkeypatch.setattr(cuda_norms_between.NormsBetween, "_norm_between", lambda self, node: None)
    plain = engine_of(ckpt, tmp_path / "plain")
    assert chains_of(plain) == []
    expected = logits_of(load(plain, InterpreterDevice))
    assert not np.array_equal(found, expected)
    assert np.linalg.norm(found - expected) < (3e-2 if qformat == "fp8" else 1e-2) * np.linalg.norm(expected)


def test_a_first_load_compares_them(tmp_path, monkeypatch):
    engine = engine_of(checkpoint(tmp_path, None, num_hidden_layers=1), tmp_path / "engine")
    runner = load(engine)
    assert runner.notes == []
    expected = logits_of(runner)
    monkeypatch.setattr(cuda_check, "apart", lambda *_: 1.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    runner = load(engine)
    assert "stream_linear for 256 outputs" in " ".join(runner.notes)
    found = logits_of(runner)
    assert not np.array_equal(found, expected)
    assert np.linalg.norm(found - expected) < 1e-2 * np.linalg.norm(expected)


def test_what_takes_their_place_has_the_residual_stream_of_small_steps(tmp_path, monkeypatch):
    """In steps with prompts, the larger of which have it in bfloat16."""
    monkeypatch.setattr(cuda_program, "_MOST_WIDE", 3)
    monkeypatch.setattr(cuda_rows, "_FEW", 3)
    monkeypatch.setattr(cuda_runner, "_GRAPH_STEP", 1)  # such steps are as large as they are
    engine = engine_of(checkpoint(tmp_path, None, num_hidden_layers=2), tmp_path / "engine")
    steps = [{0: [5, 3]}, {0: [4, 9, 2, 6]}]
    expected = logits_of(load(engine, InterpreterDevice), steps)
    monkeypatch.setattr(cuda_check, "apart", lambda *_: 1.0)
    runner = load(engine)
    assert runner.notes != []
    found = logits_of(runner, steps)
    assert np.linalg.norm(found - expected) < 1e-2 * np.linalg.norm(expected)


def test_norms_that_others_read_too_are_by_themselves(tmp_path):
    """Gemma 2's linears are followed by a norm of their own, before the sum."""
    engine = engine_of(checkpoint(tmp_path, None, "gemma2"), tmp_path / "engine")
    assert chains_of(engine) == []


def work_of_ranks(engine, device):
    """Each rank's logits, runner, and whether it called NCCL."""

    def work(comm):
        runner = load(engine, functools.partial(device, comm), comm)
        return logits_of(runner), runner, bool(runner._device.calls)

    return zip(*run_ranks(2, work), strict=True)


def test_linears_in_front_sum_over_ranks(tmp_path, monkeypatch):
    ckpt = checkpoint(tmp_path, None, num_hidden_layers=1, tp_size=2, **WIDE)
    engine = engine_of(ckpt, tmp_path / "engine")
    assert chains_of(engine) == ["linear+all_reduce+add_rms_norm+linear+gated_act"]
    (found, again), _, calls = work_of_ranks(engine, InterpreterDevice)
    assert np.array_equal(found, again)
    assert calls == (False, False)
    (alone, _), _, calls = work_of_ranks(engine, functools.partial(InterpreterDevice, sees_peers=False))
    assert calls == (True, True)
    monkeypatch.setattr(cuda_norms_between.NormsBetween, "_norm_between", lambda self, node: None)
    (expected, _), _, _ = work_of_ranks(engine_of(ckpt, tmp_path / "plain"), InterpreterDevice)
    for logits in (found, alone):
        assert not np.array_equal(logits, expected)
        assert np.linalg.norm(logits - expected) < 1e-2 * np.linalg.norm(expected)


def test_ranks_whose_first_loads_find_different_things(tmp_path, monkeypatch):
    """One that computes such a sum by a kernel of its own exchanges the same words."""
    engine = engine_of(checkpoint(tmp_path, None, num_hidden_layers=1, tp_size=2, **WIDE), tmp_path / "engine")
    (expected, _), _, _ = work_of_ranks(engine, InterpreterDevice)
    apart = cuda_check.apart
    differs = []

    class Checked(InterpreterDevice):
        is_checked = True

        def __init__(self, comm):
            super().__init__(comm)
            ranks[threading.get_ident()] = comm.rank

    def of_rank(*found):
        differs.append(apart(*found))
        return float(ranks[threading.get_ident()])

    ranks = {}
    monkeypatch.setattr(cuda_check, "apart", of_rank)
    (found, other), runners, calls = work_of_ranks(engine, Checked)
    assert max(differs) < 0.01
    assert calls == (False, False)
    assert [any("instead" in step for step in runner._steps) for runner in runners] == [True, False]
    assert [bool(runner.notes) for runner in runners] == [False, True]
    for logits in (found, other):
        assert np.linalg.norm(logits - expected) < 1e-2 * np.linalg.norm(expected)
