"""Which ranks work together: TensorRT-LLM's groups, its files' ways to say so, and what is refused."""

import pytest
from pydantic import ValidationError

from trtllm_cli.mapping import Mapping


def test_groups_of_experts_are_those_that_tensorrt_llm_documents():
    """Its example of 2 nodes with 16 GPUs, moe_tp_size 2, moe_ep_size 4, pp_size 2."""
    assert Mapping.of(8, 2, moe_tp_size=2, moe_ep_size=4).groups == {
        "tp": (tuple(range(8)), tuple(range(8, 16))),
        "pp": ((0, 8), (1, 9), (2, 10), (3, 11), (4, 12), (5, 13), (6, 14), (7, 15)),
        "moe_tp": ((0, 4), (1, 5), (2, 6), (3, 7), (8, 12), (9, 13), (10, 14), (11, 15)),
        "moe_ep": ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15)),
    }


@pytest.mark.parametrize("ep", [1, 2, 4, 8])
@pytest.mark.parametrize("pp", [1, 2])
def test_every_ranks_place(ep, pp):
    """moe_tp_rank = tp_rank // moe_ep_size, moe_ep_rank = tp_rank % moe_ep_size."""
    mapping = Mapping.of(8, pp, moe_ep_size=ep)
    assert (mapping.moe_tp, mapping.moe_ep) == (8 // ep, ep)
    for rank in mapping.ranks:
        stage, tp_rank = divmod(rank.rank, 8)
        assert (rank.moe_tp_rank, rank.moe_ep_rank) == (tp_rank // ep, tp_rank % ep)
        assert rank.moe_tp_group == tuple(range(stage * 8 + tp_rank % ep, stage * 8 + 8, ep))
        start = stage * 8 + tp_rank // ep * ep
        assert rank.moe_ep_group == tuple(range(start, start + ep))
        assert rank.pp_group == tuple(tp_rank + 8 * i for i in range(pp))
        assert list(rank.experts(16)) == [e for e in range(16) if e // (16 // ep) == rank.moe_ep_rank]
    for groups in mapping.groups.values():
        assert sorted(rank for group in groups for rank in group) == list(range(8 * pp))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, (4, 1)),
        ({"moe_tp_size": 0, "moe_ep_size": 0}, (4, 1)),
        ({"moe_tp_size": -1, "moe_ep_size": -1}, (4, 1)),
        ({"moe_tp_size": 4, "moe_ep_size": 1}, (4, 1)),
        ({"moe_ep_size": 2}, (2, 2)),
        ({"moe_tp_size": -1, "moe_ep_size": 4}, (1, 4)),
        ({"moe_tp_size": 2}, (2, 2)),
        ({"moe_tp_size": 1, "moe_ep_size": 4}, (1, 4)),
    ],
)
def test_sizes_that_a_file_may_leave_out(sizes, expected):
    mapping = Mapping.model_validate({"world_size": 4, "tp_size": 4, **sizes})
    assert (mapping.moe_tp, mapping.moe_ep) == expected
    assert mapping == Mapping.of(4, 1, *expected)
    assert Mapping.model_validate_json(mapping.model_dump_json()) == mapping
    written = (mapping.moe_tp_size, mapping.moe_ep_size)
    assert written == (expected if expected[1] > 1 else (0, 0))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"moe_tp_size": 2, "moe_ep_size": 4}, "moe_tp_size 2 x moe_ep_size 4 is not tp_size 4"),
        ({"moe_tp_size": 1, "moe_ep_size": 1}, "moe_tp_size 1 x moe_ep_size 1 is not tp_size 4"),
        ({"moe_ep_size": 3}, "moe_ep_size 3 does not divide tp_size 4"),
        ({"moe_tp_size": 8}, "moe_tp_size 8 does not divide tp_size 4"),
        ({"moe_ep_size": -2}, "moe_ep_size"),
        ({"moe_cluster_size": 2}, "`moe_cluster_size` is 2, which is not supported"),
        ({"enable_attention_dp": True}, "`enable_attention_dp` is True"),
        ({"attn_tp_size": 2}, "`attn_tp_size` is 2"),
    ],
)
def test_what_is_refused(sizes, message):
    with pytest.raises(ValidationError, match=message):
        Mapping.model_validate({"world_size": 4, "tp_size": 4, **sizes})


def test_fields_that_tensorrt_llm_writes_and_that_say_nothing():
    """What its Mapping.to_dict gives for two ranks without experts, the rank taken out as its checkpoints do."""
    written = {
        "world_size": 2, "gpus_per_node": 8, "cp_size": 1, "tp_size": 2, "pp_size": 1, "moe_tp_size": 2,
        "moe_cluster_size": 1, "moe_ep_size": 1, "attn_tp_size": 2, "attn_cp_size": 1, "cp_config": {},
        "enable_attention_dp": False, "enable_lm_head_tp_in_adp": False,
    }  # fmt: skip
    assert Mapping.model_validate(written) == Mapping.of(2)
