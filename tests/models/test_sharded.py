"""Every family split over ranks, through convert and Reference, computes what transformers computes."""

import pytest
import torch

from tests.batches import Sequences, as_torch
from tests.convert.helpers import read_checkpoint
from tests.models.test_against_transformers import PROMPT, SETTINGS, TOLERANCE, relative
from tests.thread_ranks import TensorRank, run_ranks
from tests.tiny_models import FAMILIES, VOCAB_SIZE, save_tiny_model
from trtllm_cli.checkpoint import Checkpoint
from trtllm_cli.convert.pipeline import ConvertOptions, convert
from trtllm_cli.kernels.reference import Reference
from trtllm_cli.models import trace_model

# Each family with experts, as many as two groups of ranks can divide.
EXPERTS = {
    f"{family}-even": (family, settings)
    for family, settings in {
        "mixtral": {"num_local_experts": 6}, "qwen2_moe": {}, "qwen3_moe": {}, "deepseek_v2": {}, "deepseek_v3": {},
        "gpt_oss": {"num_local_experts": 6},
    }.items()
}  # fmt: skip
CASES = {**{family: (family, {}) for family in FAMILIES}, **SETTINGS, **EXPERTS}


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    """name of a case -> (snapshot, the logits of PROMPT by transformers)."""
    made = {}

    def get(name):
        if name not in made:
            family, settings = CASES[name]
            path = tmp_path_factory.mktemp(name)
            with torch.inference_mode():
                logits = save_tiny_model(path, family, tokenizer=False, **settings)(torch.tensor([PROMPT])).logits[0]
            made[name] = path, logits.numpy()
        return made[name]

    return get


def ranks_logits(checkpoint, chunks):
    """The logits of a sequence's tokens, and which ranks gave them; each rank a thread."""
    config, tensors = checkpoint.config, read_checkpoint(checkpoint)
    batch = Sequences()
    steps = [as_torch(batch.step({0: chunk}, all_logits=True)) for chunk in chunks]

    @torch.inference_mode()
    def work(comm):
        graph = trace_model(config, config.mapping.ranks[comm.rank])
        program = Reference(graph, tensors[comm.rank], num_slots=256, block_size=4, comm=TensorRank(comm))
        outputs = [program.step(inputs) for inputs in steps]
        return torch.cat([logits for (logits,) in outputs]).numpy() if graph.outputs else None

    return run_ranks(config.mapping.world_size, work)


def check(snapshot, want, path, **options):
    convert(snapshot, path, ConvertOptions(**options))
    checkpoint = Checkpoint.open(path)
    got = ranks_logits(checkpoint, [PROMPT[:9], PROMPT[9:]])
    last_stage = range(checkpoint.config.mapping.world_size)[-checkpoint.config.mapping.tp_size :]
    for rank, logits in enumerate(got):
        assert (logits is not None) == (rank in last_stage)
        if logits is not None:
            assert relative(logits[:, :VOCAB_SIZE], want) < TOLERANCE


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (4, 1), (1, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, tp, pp, snapshots, tmp_path):
    check(*snapshots(family), tmp_path / "ckpt", tp_size=tp, pp_size=pp)


@pytest.mark.parametrize("name", SETTINGS)
def test_setting(name, snapshots, tmp_path):
    check(*snapshots(name), tmp_path / "ckpt", tp_size=2, pp_size=2)


@pytest.mark.parametrize(("tp", "ep", "pp"), [(2, 2, 1), (4, 2, 1), (2, 2, 2)])
@pytest.mark.parametrize("name", EXPERTS)
def test_expert_parallel(name, tp, ep, pp, snapshots, tmp_path):
    check(*snapshots(name), tmp_path / "ckpt", tp_size=tp, pp_size=pp, moe_ep_size=ep)
    ranks = Checkpoint.open(tmp_path / "ckpt").config.mapping.ranks
    assert (ranks[0].mapping.moe_tp, ranks[0].mapping.moe_ep) == (tp // ep, ep)


@pytest.mark.parametrize("dim", [0, 1])
def test_split_embedding(dim, snapshots, tmp_path):
    options = {"use_parallel_embedding": True, "embedding_sharding_dim": dim}
    check(*snapshots("llama"), tmp_path / "ckpt", tp_size=2, **options)
