"""What the first load on a GPU chooses, and what the ones after it read."""

import json

import numpy as np
import pytest

from tests.batches import Sequences
from tests.engines import build_engine
from tests.interpreter_device import InterpreterDevice, fake_compile
from tests.tiny_models import save_tiny_model
from trtllm_cli.build.backends import cuda
from trtllm_cli.convert.pipeline import ConvertOptions, convert
from trtllm_cli.kernels.compile_cache import cache_dir
from trtllm_cli.run.backends.cuda import CudaRunner
from trtllm_cli.run.backends.cuda_settle import settled
from trtllm_cli.run.communicator import SingleRank

ROWS = {"num_tokens": 64, "num_logits": 4}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def launch(kernel, weight):
    return {"kernel": kernel, "grid": [1, 1, 1], "args": [weight]}


def product(weight):
    return {"call": "mm", "n": 8, "k": 8, "w": weight}


def step(layer, by="num_tokens"):
    """Two ways and their others, of one layer's weights."""
    ways = [[4, [launch(0, layer)]], [16, [launch(1, layer)]], [None, [product(layer)]]]
    others = [[[launch(2, layer)], [product(layer)]], [[launch(3, layer)], [product(layer)]]]
    return {"op": "linear", "by": by, "ways": ways, "others": others}


PLAN = "{}"


class Times:
    """Milliseconds by what a step is; notes what was asked for."""

    def __init__(self, **times):
        self.times, self.asked = times, []

    def __call__(self, steps, rows):
        for s in steps:
            ((most, launches),) = s["ways"]
            assert most is None
        name = str(launches[0].get("kernel", "mm"))
        self.asked.append((name, rows, len(steps)))
        return self.times.get(name, 1.0)


def kernels(s):
    return [launches[0].get("kernel", "mm") for _, launches in s["ways"]]


def test_the_fastest_takes_the_place_in_all_layers():
    plain = {"op": "norm", "by": "num_tokens", "ways": [[None, [launch(9, 0)]]]}
    times = Times(**{"2": 0.5, "mm": 0.8, "3": 0.98})
    found = settled([step(0), plain, step(1)], PLAN, "a GPU", ROWS, times)
    assert kernels(found[0]) == [2, "mm", "mm"]  # 0.98 is as fast as 1.0, 0.8 is not
    assert found[2]["ways"][0][1] == [launch(2, 1)]
    assert found[1] is plain
    assert times.asked == [("0", 4, 2), ("2", 4, 2), ("mm", 4, 2), ("1", 16, 2), ("3", 16, 2), ("mm", 16, 2)]


def test_what_hardly_differs_stays():
    found = settled([step(0)], PLAN, "a GPU", ROWS, Times(**{"2": 0.98, "3": 0.98, "mm": 0.98}))
    assert kernels(found[0]) == [0, 1, "mm"]


def test_no_more_rows_than_there_can_be():
    times = Times()
    settled([step(0, "num_logits")], PLAN, "a GPU", ROWS, times)
    assert {rows for _, rows, _ in times.asked} == {4}
    assert len(times.asked) == 3  # the second way is for more


def test_layers_that_have_room_for_fewer_rows_are_not_timed():
    """As the last one's buffers, where few sequences fit; it takes what the others do."""
    times = Times(**{"2": 0.5})
    found = settled([step(0), step(1), step(2, "num_logits")], PLAN, "a GPU", ROWS, times)
    assert {(rows, layers) for _, rows, layers in times.asked} == {(4, 2), (16, 2)}
    assert [kernels(s)[0] for s in found] == [2, 2, 2]


def test_the_next_load_reads_what_was_found():
    times = Times(**{"2": 0.5})
    first = settled([step(0)], PLAN, "a GPU", ROWS, times)
    again = Times()
    assert settled([step(0)], PLAN, "a GPU", ROWS, again) == first
    assert not again.asked
    settled([step(0)], PLAN, "another GPU", ROWS, again)
    assert again.asked


@pytest.mark.parametrize("text", ["", "{", "[]", '{"x": [0]}', "everything"])
def test_what_is_no_choice_is_made_again(text):
    settled([step(0)], PLAN, "a GPU", ROWS, Times())
    (file,) = (cache_dir() / "settled").iterdir()
    kind = next(iter(json.loads(file.read_text())))
    for bad in [text] if text != "everything" else [json.dumps({kind: x}) for x in (None, ["1"], [-1], 7)]:
        file.write_text(bad)
        times = Times(**{"2": 0.5})
        assert kernels(settled([step(0)], PLAN, "a GPU", ROWS, times)[0])[0] == 2
        assert times.asked
    file.write_text(json.dumps({kind: [9]}))  # of no such launch
    assert kernels(settled([step(0)], PLAN, "a GPU", ROWS, Times())[0])[0] == 0


def test_steps_without_others_cost_nothing():
    steps = [{"op": "norm", "by": "num_tokens", "ways": [[None, []]]}]
    assert settled(steps, PLAN, "a GPU", ROWS, Times()) == steps
    assert not cache_dir().exists()


@pytest.mark.parametrize("fixed", [False, True])
def test_an_engine_whose_first_load_chooses(tmp_path, monkeypatch, fixed):
    """Other kernels, and the same logits."""
    monkeypatch.setattr(cuda, "compile_kernels", fake_compile)
    save_tiny_model(tmp_path / "snapshot", "llama", num_hidden_layers=2)
    convert(tmp_path / "snapshot", tmp_path / "ckpt", ConvertOptions(dtype="bfloat16"))
    engine = build_engine(
        tmp_path / "ckpt", tmp_path / "engine", backend="cuda", kernels="auto", tokens_per_block=16, fixed_tactics=fixed
    )
    assert engine.config.notes["linear_tactics"]["settled_at_first_load"] is not fixed
    logits, ways = [], []
    for last in (False, True):  # whether what is timed last wins
        times = iter(range(1000))

        def milliseconds(self, enqueue, last=last, times=times):
            return 2.0 ** (-next(times) if last else 0)

        monkeypatch.setattr(InterpreterDevice, "milliseconds", milliseconds)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache {last}"))
        rank = engine.config.pretrained_config.mapping.ranks[0]
        runner = CudaRunner(engine, rank, InterpreterDevice(), SingleRank())
        runner.allocate_kv_cache(64)
        logits.append(runner.forward(Sequences(block_size=16).step({0: [5, 3]})).copy())
        ways.append(json.dumps([s["ways"] for s in runner._steps]))
        runner.close()
    assert (ways[0] == ways[1]) is fixed
    assert np.linalg.norm(logits[0] - logits[1]) <= 1e-2 * np.linalg.norm(logits[0])
    assert cache_dir() == tmp_path / "cache True" / "trtllm"
