"""Tensor and pipeline parallel engines, their ranks as threads, against the same model on one rank."""

import numpy as np
import pytest

from tests.batches import Sequences
from tests.engines import STEPS, build_engine, runner_logits
from tests.thread_ranks import run_ranks
from tests.tiny_models import save_tiny_model
from trtllm_cli.convert.pipeline import ConvertOptions, convert
from trtllm_cli.run.backends import load_runner


def all_ranks_logits(engine):
    """The last stage's logits of each step."""

    def work(comm):
        runner = load_runner(engine, engine.config.pretrained_config.mapping.ranks[comm.rank], comm, num_threads=1)
        runner.allocate_kv_cache(64)
        batch = Sequences()
        logits = []
        for new in STEPS:
            x = runner.forward(batch.step(new))
            logits.append(None if x is None else x.copy())
        runner.close()
        return logits

    world = engine.config.pretrained_config.mapping.world_size
    return [logits for logits in run_ranks(world, work) if logits[0] is not None]


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    path = tmp_path_factory.mktemp("snapshot")
    save_tiny_model(path, "qwen2", tie_word_embeddings=True)  # 8 heads, 4 KV heads, biases, an odd vocabulary
    return path


@pytest.fixture(scope="module")
def one_rank(snapshot, tmp_path_factory):
    base = tmp_path_factory.mktemp("one")
    convert(snapshot, base / "ckpt", ConvertOptions())
    return runner_logits(build_engine(base / "ckpt", base / "engine", weight_dtype="float32"))


NATIVE = [("native", *split) for split in ((2, 1), (4, 1), (8, 1), (1, 2), (1, 3), (2, 2))]


@pytest.mark.parametrize(("kernels", "tp", "pp"), [*NATIVE, ("torch", 2, 2)])
def test_ranks_together_give_what_one_rank_gives(tmp_path, snapshot, one_rank, tp, pp, kernels):
    convert(snapshot, tmp_path / "ckpt", ConvertOptions(tp_size=tp, pp_size=pp))
    engine = build_engine(tmp_path / "ckpt", tmp_path / "engine", weight_dtype="float32", kernels=kernels)
    last_stage = all_ranks_logits(engine)
    assert len(last_stage) == tp
    for logits in last_stage:
        for got, want in zip(logits, one_rank, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dim", [0, 1])
def test_a_split_embedding(tmp_path, snapshot, one_rank, dim):
    options = ConvertOptions(tp_size=2, use_parallel_embedding=True, embedding_sharding_dim=dim)
    convert(snapshot, tmp_path / "ckpt", options)
    engine = build_engine(tmp_path / "ckpt", tmp_path / "engine", weight_dtype="float32")
    for logits in all_ranks_logits(engine):
        for got, want in zip(logits, one_rank, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("qformat", ["int8_wo", "int4_wo"])
def test_quantized_shards(tmp_path, snapshot, qformat):
    results = []
    for tp in (1, 2):
        convert(snapshot, tmp_path / f"ckpt{tp}", ConvertOptions(tp_size=tp, qformat=qformat, group_size=16))
        engine = build_engine(tmp_path / f"ckpt{tp}", tmp_path / f"engine{tp}", kv_cache_dtype="float32")
        results.append(all_ranks_logits(engine)[0])
    for one, two in zip(*results, strict=True):
        np.testing.assert_allclose(two, one, rtol=2e-3, atol=2e-3)
