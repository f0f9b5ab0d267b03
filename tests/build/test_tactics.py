"""The choice by timing: what is timed, and what is taken."""

import pytest

from tests.engines import build_engine, save_checkpoint
from tests.tiny_configs import config, random_weights
from trtllm_cli.build import tactics
from trtllm_cli.models import trace_model


def test_auto_keeps_the_times_that_it_chose_by(tmp_path):
    c = config("llama")
    graph = trace_model(c, c.mapping.ranks[0])
    ckpt = save_checkpoint(tmp_path / "ckpt", c, graph, random_weights(graph))
    for weight_dtype in ("float32", "int4"):
        engine = build_engine(ckpt, tmp_path / weight_dtype, kernels="auto", weight_dtype=weight_dtype)
        times = engine.config.notes["linears_ms"]
        assert times.keys() == {"native", "torch"}
        assert all(set(t) == {"1", "32"} and min(t.values()) > 0 for t in times.values())
        assert engine.config.target["kernels"] == tactics.faster(times)


@pytest.mark.parametrize(
    ("native", "torch", "winner"),
    [
        ((1, 10), (2, 20), "native"),
        ((2, 20), (1, 10), "torch"),
        ((1, 30), (2, 10), "torch"),
        ((1, 15), (2, 10), "native"),
    ],
)
def test_the_faster_is_by_decode_and_prefill_alike(native, torch, winner):
    times = {"native": dict(zip(("1", "32"), native, strict=True)), "torch": dict(zip(("1", "32"), torch, strict=True))}
    assert tactics.faster(times) == winner
