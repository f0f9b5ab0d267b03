"""Which algorithm of the library's is taken for a plan's products."""

import json

import pytest
import torch

from tests.batches import Sequences
from tests.engines import build_engine
from tests.interpreter_device import InterpreterDevice, fake_compile
from tests.tiny_models import save_tiny_model
from trtllm_cli.build.backends import cuda, cuda_tactics
from trtllm_cli.convert.pipeline import ConvertOptions, convert
from trtllm_cli.kernels.compile_cache import cache_dir
from trtllm_cli.run.backends import cuda_products
from trtllm_cli.run.backends.cuda import CudaRunner
from trtllm_cli.run.backends.cuda_products import ProductLaunch, chosen, kind_of
from trtllm_cli.run.communicator import SingleRank

ROWS = {"num_tokens": 100, "num_logits": 8}
N, K = 64, 32


def call(layer=0, **fields):
    return {
        "call": "mm", "x": "b:0", "x_dtype": "bfloat16", "w": f"w:{layer}", "y": "b:1", "y_dtype": "bfloat16",
        "rows": "num_tokens", "n": N, "k": K, "bias": None, **fields,
    }  # fmt: skip


def step(launches, **fields):
    kernel = {"kernel": 0, "grid": [1], "args": []}
    return {"op": "linear", "by": "num_tokens", "ways": [[2, [kernel]], [None, launches]], **fields}


class Device:
    """Algorithms are named for how long they take, by the product's rows."""

    blas = "a library"
    torch_device = torch.device("cpu")

    def __init__(self, times):
        self._times, self.timed, self.taken = times, [], []
        self._enqueued = []

    def algorithms(self, product):
        return list(self._times)

    def product(self, product, algorithm):
        return lambda: self._enqueued.append((product, algorithm))

    def milliseconds(self, enqueue):
        self._enqueued = []
        enqueue()
        (rows,) = {len(product.x) for product, _ in self._enqueued}
        (algorithm,) = {algorithm for _, algorithm in self._enqueued}
        assert all(product.x.float().std() > 0.5 for product, _ in self._enqueued)
        self.timed.append((rows, algorithm, [product.w.data_ptr() for product, _ in self._enqueued]))
        return self._times[algorithm](rows)


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda_products, "_FEWEST_WEIGHTS", N * K)
    monkeypatch.setattr(cuda_products, "_FEW", 4)
    monkeypatch.setattr(cuda_products, "_ROWS", (8, 16, 32, 64, 96, 128))


@pytest.fixture
def tensor():
    made = {}

    def at(ref, dtype, shape):
        return made.setdefault((str(ref), dtype, shape), torch.zeros(shape, dtype=getattr(torch, dtype)))

    return at


A, B, C = "a" * 128, "b" * 128, "c" * 128
TIMES = {A: lambda _: 1.0, B: lambda rows: 0.9 if rows > 32 else 1.1, C: lambda rows: 0.99}


def found_by(device, steps, tensor, gpu="a GPU"):
    return chosen(steps, gpu, ROWS, device, tensor, lambda: None)


def test_the_fastest_is_taken_for_each_number_of_rows(tensor):
    device = Device(TIMES)
    found = found_by(device, [step([call(0)]), step([call(1)])], tensor)
    assert found == {
        kind_of(call()): [(4, ""), (8, A), (16, A), (32, A), (64, B), (96, B), (100, B)]
    }  # C is not 2% faster
    assert {len(weights) for _, _, weights in device.timed} == {2}  # of both layers, one after another
    assert all(len(set(weights)) == 2 for _, _, weights in device.timed)
    launch = ProductLaunch(device, call(0), tensor, ROWS, found)
    for rows, algorithm in ((1, ""), (4, ""), (5, A), (32, A), (33, B), (100, B)):
        launch.resize({"num_tokens": rows})
        device._enqueued = []
        launch.enqueue()
        ((product, taken),) = device._enqueued
        assert (len(product.x), len(product.y), taken) == (rows, rows, algorithm)


def test_a_step_without_logits_has_no_product_of_them(tensor):
    device = Device(TIMES)
    launch = ProductLaunch(device, call(rows="num_logits"), tensor, ROWS, {})
    launch.resize({"num_tokens": 4, "num_logits": 0})
    launch.enqueue()
    assert not device._enqueued


def test_wherever_a_step_may_have_products(tensor):
    """As another choice, or where ranks do not see each other's memory."""
    kernel = step([])["ways"][0][1]
    steps = [step([call(n=2 * N)], others=[[], [kernel, [call()]]]), step(kernel, without_peers=[call(k=2 * K)])]
    found = found_by(Device(TIMES), steps, tensor)
    assert found.keys() == {kind_of(call(n=2 * N)), kind_of(call()), kind_of(call(k=2 * K))}


def test_small_steps_have_none_timed(tensor, monkeypatch):
    monkeypatch.setattr(cuda_products, "_FEW", 100)
    device = Device(TIMES)
    assert found_by(device, [step([call()])], tensor) == {}
    assert not device.timed


def test_kinds_by_what_they_compute(tensor):
    device = Device(TIMES)
    bias, narrow = call(bias="w:bias"), call(n=N // 2)
    head = call(rows="num_logits", y_dtype="float32")
    found = found_by(device, [step([c]) for c in (call(), bias, narrow, head)], tensor)
    assert found.keys() == {kind_of(c) for c in (call(), bias, head)}  # the narrow one has too few weights
    assert found[kind_of(head)] == [(4, ""), (8, A)]


def test_what_was_found_is_kept(tensor):
    first = found_by(Device(TIMES), [step([call()])], tensor)
    again = Device(TIMES)
    assert json.dumps(found_by(again, [step([call()])], tensor)) == json.dumps(first)
    assert not again.timed
    found_by(again, [step([call()])], tensor, gpu="another GPU")
    assert again.timed


@pytest.mark.parametrize("bad", ["{", "[]", '{"x": 1}', None])
def test_a_spoilt_note_is_written_again(tensor, bad):
    first = found_by(Device(TIMES), [step([call()])], tensor)
    (file,) = (cache_dir() / "products").iterdir()
    file.write_text(json.dumps({kind_of(call()): [[16, "zz"]]}) if bad is None else bad)
    again = Device(TIMES)
    assert found_by(again, [step([call()])], tensor) == first
    assert again.timed


def test_without_a_choice(tensor):
    """No library, or no algorithms of it: as torch does."""
    assert found_by(Device({}), [step([call()])], tensor) == {kind_of(call()): [(4, "")]}
    device = Device(TIMES)
    device.blas = ""
    assert found_by(device, [step([call()])], tensor) == {}
    launch = ProductLaunch(device, call(), tensor, ROWS, {})
    launch.resize({"num_tokens": 5})
    launch.enqueue()
    assert device._enqueued[-1][1] == ""


class Timed(InterpreterDevice):
    """Its library has two algorithms, of which the second is the faster one."""

    is_checked = True
    blas = "a library"

    def __init__(self):
        super().__init__()
        self.asked = []

    def algorithms(self, product):
        return [A, B]

    def product(self, product, algorithm):
        enqueue = super().product(product, algorithm)

        def noted():
            self.asked.append(algorithm)
            enqueue()

        return noted

    def milliseconds(self, enqueue):
        self.asked.clear()
        enqueue()
        return 1.0 if self.asked[0] == B else 2.0


@pytest.mark.parametrize("fixed", [False, True])
def test_an_engine_computes_by_what_was_chosen(tmp_path, monkeypatch, fixed):
    """Unless it was built so that its loads choose nothing."""
    monkeypatch.setattr(cuda, "compile_kernels", fake_compile)
    monkeypatch.setattr(cuda_tactics.LinearTactics, "ways", lambda self, shape: [])
    save_tiny_model(tmp_path / "snapshot", "llama", num_hidden_layers=1)
    convert(tmp_path / "snapshot", tmp_path / "ckpt", ConvertOptions(dtype="bfloat16"))
    engine = build_engine(
        tmp_path / "ckpt", tmp_path / "engine", backend="cuda", kernels="auto", tokens_per_block=16, fixed_tactics=fixed
    )  # fmt: skip
    runner = CudaRunner(engine, engine.config.pretrained_config.mapping.ranks[0], Timed(), SingleRank())
    runner.allocate_kv_cache(64)
    runner._device.asked.clear()
    runner.forward(Sequences(block_size=16).step({0: [5, 3, 2, 8, 1, 9, 4]}))
    assert set(runner._device.asked) == ({""} if fixed else {"", B})  # the head has one row
    runner.close()
