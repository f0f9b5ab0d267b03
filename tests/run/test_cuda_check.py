"""What the first load on a GPU finds out about kernels that compute wrong numbers, and what the ones after it read."""

import json

import numpy as np
import pytest
import torch

from tests import interpreter_device
from tests.batches import Sequences
from tests.engines import build_engine
from tests.interpreter_device import InterpreterDevice, fake_compile
from tests.tiny_models import save_tiny_model
from trtllm_cli.build.backends import cuda, cuda_linears, cuda_tactics
from trtllm_cli.build.backends.cuda_linears import Tactic
from trtllm_cli.convert.pipeline import ConvertOptions, convert
from trtllm_cli.kernels.compile_cache import cache_dir
from trtllm_cli.run.backends.cuda import CudaRunner
from trtllm_cli.run.backends.cuda_check import apart
from trtllm_cli.run.communicator import SingleRank

STEP = {0: [5, 3]}


class Checked(InterpreterDevice):
    is_checked = True


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda, "compile_kernels", fake_compile)


def engine_of(root, monkeypatch, qformat=None):
    """A tiny engine with one way for up to 4 tokens, and torch's product."""

    def ways(self, shape):
        return [(4, cuda_linears.adapted(shape, Tactic("skinny", (16, 32, 64, 1, 3, 4))))]

    monkeypatch.setattr(cuda_tactics.LinearTactics, "ways", ways)
    monkeypatch.setattr(cuda_tactics.LinearTactics, "others", lambda self, shape, most: None)
    save_tiny_model(root / "snapshot", "llama", num_hidden_layers=2)
    convert(root / "snapshot", root / "ckpt", ConvertOptions(dtype="bfloat16", qformat=qformat))
    return build_engine(root / "ckpt", root / "engine", backend="cuda", kernels="auto", tokens_per_block=16)


def load(engine, device=Checked, comm=SingleRank()):  # noqa: B008
    runner = CudaRunner(engine, engine.config.pretrained_config.mapping.ranks[comm.rank], device(), comm)
    runner.allocate_kv_cache(64)
    return runner


def logits_and_ways(runner):
    logits = runner.forward(Sequences(block_size=16).step(STEP)).copy()
    ways = [len(s["ways"]) > 1 and s["ways"][0][1] != s["ways"][1][1] for s in runner._steps if "linear" in s["op"]]
    runner.close()
    return logits, ways


def broken(monkeypatch, outputs):
    """From here on the kernel for linears of so many outputs leaves some of them out."""
    real = interpreter_device.gluon_interpreter.launch

    def launch(kernel, grid, *args, num_warps, **constants):
        real(kernel, grid, *args, num_warps=num_warps, **constants)
        if kernel.fn.__name__ == "skinny_linear" and constants["N"] == outputs:
            args[kernel.arg_names.index("y_ptr")][:7] = 0

    monkeypatch.setattr(interpreter_device.gluon_interpreter, "launch", launch)


@pytest.mark.parametrize("qformat", [None, "fp8_pc_pt"])
def test_what_is_right_stays(tmp_path, monkeypatch, qformat):
    engine = engine_of(tmp_path, monkeypatch, qformat)
    runner = load(engine)
    assert runner.notes == []
    assert runner._device.launches > 5  # of five kinds
    assert (48 in runner._graph_sizes) == (qformat is None)
    logits, ours = logits_and_ways(runner)
    assert all(ours)
    (file,) = (cache_dir() / "checked").iterdir()
    found = [by for of in json.loads(file.read_text()).values() for by in of]
    assert len(found) == 5
    assert max(found) < 0.01
    unchecked, _ = logits_and_ways(load(engine, InterpreterDevice))
    assert np.array_equal(logits, unchecked)


def test_what_is_wrong_gives_way_to_torchs_product(tmp_path, monkeypatch):
    engine = engine_of(tmp_path, monkeypatch)
    expected, _ = logits_and_ways(load(engine, InterpreterDevice))
    broken(monkeypatch, 128)
    runner = load(engine)
    (note,) = runner.notes
    assert "skinny_linear for 128 outputs of 64 inputs computes wrong numbers on this GPU" in note
    logits, ours = logits_and_ways(runner)
    assert ours.count(False) == 2  # of both layers
    assert np.linalg.norm(logits - expected) < 2e-2 * np.linalg.norm(expected)


def test_the_next_load_reads_what_was_found(tmp_path, monkeypatch):
    engine = engine_of(tmp_path, monkeypatch)
    first = load(engine)
    launched = first._device.launches
    assert launched > 0
    first.close()
    again = load(engine)
    assert again._device.launches == 0
    again.close()
    (file,) = (cache_dir() / "checked").iterdir()
    text = file.read_text()
    for bad in ("", "[]", "{}", text.replace("0.", "x", 1), text.replace("[", "[0.0, ", 1), text.replace("[", '["', 1)):
        file.write_text(bad)
        runner = load(engine)
        assert runner._device.launches == launched
        runner.close()
        assert file.read_text() == text


def test_apart():
    x = torch.randn(4, 64)
    assert apart(x, x) == 0
    assert apart(torch.zeros_like(x), x) == pytest.approx(1)
    assert apart(torch.full_like(x, torch.nan), x) > 1e8
    assert apart(x, torch.full_like(x, torch.inf)) == 0
    some = torch.where(x > 1, torch.nan, x)
    assert apart(some, some) == 0
    assert apart(some, x) > 1e8
    assert apart(x, torch.zeros_like(x)) > 1e8
    y = (x * 20).to(torch.float8_e4m3fn)
    near = torch.where(torch.rand(x.shape) < 0.5, x * 20 * 1.06, x * 20).to(torch.float8_e4m3fn)
    assert apart(near, y) < 0.01
    assert apart((x * 30).to(torch.float8_e4m3fn), y) > 0.9
    assert apart(torch.full_like(x, torch.nan).to(torch.float8_e4m3fn), y) == 1
