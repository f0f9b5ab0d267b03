"""Engines whose experts are divided among ranks, the ranks as threads, against the same model on one rank."""

import numpy as np
import pytest

from tests.engines import build_engine, runner_logits
from tests.models.test_sharded import EXPERTS
from tests.run.test_ranks import all_ranks_logits
from tests.tiny_models import save_tiny_model
from trtllm_cli.convert.pipeline import ConvertOptions, convert


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    """name of a case -> (snapshot, the logits of its engine on one rank)."""
    made = {}

    def get(name):
        if name not in made:
            base = tmp_path_factory.mktemp(name)
            family, settings = EXPERTS[name]
            save_tiny_model(base / "snapshot", family, tokenizer=False, **settings)
            convert(base / "snapshot", base / "ckpt", ConvertOptions())
            made[name] = base / "snapshot", runner_logits(build(base / "ckpt", base / "engine"))
        return made[name]

    return get


def build(checkpoint, engine, **options):
    return build_engine(checkpoint, engine, **{"weight_dtype": "float32", "kv_cache_dtype": "float32", **options})


def check(engine, want, rtol=1e-4, atol=1e-5):
    for logits in all_ranks_logits(engine):
        for got, expected in zip(logits, want, strict=True):
            np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("split", [(2, 1, 2), (4, 1, 2)], ids=["ep2", "tp2ep2"])
@pytest.mark.parametrize("name", EXPERTS)
def test_ranks_together_give_what_one_rank_gives(name, split, snapshots, tmp_path):
    snapshot, one = snapshots(name)
    tp, pp, ep = split
    convert(snapshot, tmp_path / "ckpt", ConvertOptions(tp_size=tp, pp_size=pp, moe_ep_size=ep))
    check(build(tmp_path / "ckpt", tmp_path / "engine"), one)


@pytest.mark.parametrize(
    ("kernels", "options"),
    [
        ("native", {"tp_size": 2, "pp_size": 2, "moe_ep_size": 2}),
        ("native", {"tp_size": 4, "moe_tp_size": 2}),
        ("torch", {"tp_size": 4, "moe_ep_size": 2}),
    ],
)
def test_stages_sizes_and_kernels(kernels, options, snapshots, tmp_path):
    snapshot, one = snapshots("gpt_oss-even")
    convert(snapshot, tmp_path / "ckpt", ConvertOptions(**options))
    check(build(tmp_path / "ckpt", tmp_path / "engine", kernels=kernels), one)


def test_each_expert_on_a_rank_of_its_own(snapshots, tmp_path):
    """A rank may have nothing to do for a step's tokens."""
    snapshot, one = snapshots("deepseek_v2-even")
    convert(snapshot, tmp_path / "ckpt", ConvertOptions(tp_size=8, moe_ep_size=8))
    check(build(tmp_path / "ckpt", tmp_path / "engine"), one)


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("qformat", ["int8_wo", "int4_wo", "fp8_pc_pt"])
@pytest.mark.parametrize("name", ["qwen3_moe-even", "gpt_oss-even"])
def test_quantized_experts(name, qformat, kernels, snapshots, tmp_path):
    snapshot, _ = snapshots(name)
    groups = {"group_size": 8} if qformat != "fp8_pc_pt" else {"exclude": ("*.attention.*",)}  # rounds x on each rank
    results = []
    for size in (1, 2):
        options = ConvertOptions(tp_size=size, moe_ep_size=size, qformat=qformat, **groups)
        convert(snapshot, tmp_path / f"ckpt{size}", options)
        results.append(build(tmp_path / f"ckpt{size}", tmp_path / f"engine{size}", kernels=kernels))
    one, two = results
    assert one.config.pretrained_config.quantization == two.config.pretrained_config.quantization
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if kernels == "torch" else {}  # torch rounds each rank's x to bfloat16
    check(two, all_ranks_logits(one)[0], **tolerance)
