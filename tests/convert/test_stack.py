"""Rows of our weights out of the source's, in any blocks: held against the whole, stacked and picked at once."""

import pytest
import torch

from trtllm_cli.convert import stack as stack_module
from trtllm_cli.convert.families.family import Source
from trtllm_cli.convert.reader import Reader
from trtllm_cli.convert.shard import cut
from trtllm_cli.convert.stack import Stack
from trtllm_cli.errors import SnapshotError, UnsupportedError
from trtllm_cli.graph import Weight
from trtllm_cli.mapping import Mapping
from trtllm_cli.model_config import ModelConfig
from trtllm_cli.tensor_file import TensorInfo

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM", dtype="float32", vocab_size=11, hidden_size=12, num_hidden_layers=1,
    num_attention_heads=6, num_key_value_heads=3, head_size=2, hidden_act="silu",
)  # fmt: skip


class MemoryReader(Reader):
    """Tensors in memory. Counts the rows that are read."""

    def __init__(self, path, **tensors):
        self.path, self.read = path, 0
        self.values = tensors
        self.tensors = {n: TensorInfo(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items()}

    def rows(self, name, start, stop):
        value = self.values[name]
        self.read += stop - start
        return (value if value.dim() < 2 else value.flatten(0, -2))[start:stop]


def rows_of(stack, step, dtype="float32"):
    """All rows, in blocks of `step`."""
    return torch.cat([stack.plain(i, min(stack.rows, i + step), dtype) for i in range(0, stack.rows, step)])


def interleaved(config):
    """The even rows of each expert's eight, then the odd ones."""
    return torch.arange(16).view(2, 4, 2).transpose(1, 2).flatten()


def shuffled(config):
    return torch.randperm(10, generator=torch.Generator().manual_seed(1))


CASES = {
    "stacked": (("a", "b"), {}, (10, 12), None, lambda t: torch.cat([t["a"], t["b"]])),
    "reordered": (("a", "b"), {"rows": shuffled}, (10, 12), None, lambda t: torch.cat([t["a"], t["b"]])[shuffled(0)]),
    "plus": (("a",), {"plus": 1.0}, (4, 12), None, lambda t: t["a"] + 1),
    "transposed": (("a",), {"transposed": True}, (12, 4), None, lambda t: t["a"].T),
    "experts": (("e",), {}, (2, 12, 8), "expert_rows", lambda t: t["e"].flatten(0, 1)),
    "transposed experts, interleaved": (
        ("e",), {"transposed": True, "rows": interleaved}, (2, 8, 12), "expert_halves",
        lambda t: t["e"].transpose(1, 2).reshape(16, 12)[interleaved(0)],
    ),
    "vectors of experts, interleaved": (
        ("v",), {"rows": interleaved}, (2, 8), "expert_halves", lambda t: t["v"].flatten()[interleaved(0)]
    ),
    "vectors of experts, stored one by one": (
        ("x", "y"), {}, (2, 8), "expert_rows", lambda t: torch.cat([t["x"], t["y"]])
    ),
}  # fmt: skip


@pytest.fixture
def reader(tmp_path):
    torch.manual_seed(0)
    shapes = {"a": (4, 12), "b": (6, 12), "e": (2, 12, 8), "v": (2, 8), "x": (8,), "y": (8,)}
    return MemoryReader(tmp_path, **{name: torch.randn(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize("step", [1, 3, 100])
@pytest.mark.parametrize("case", CASES)
def test_blocks_are_the_whole(reader, case, step):
    names, how, shape, shard, expected = CASES[case]
    stack = Stack(reader, Source(names, **how), Weight("float32", shape, ("w",), shard), CONFIG)
    assert torch.equal(rows_of(stack, step), expected(reader.values))


def test_only_the_rows_that_are_needed_are_read(reader):
    """A strided index reads its span; what is far apart is read apart; a transposed matrix is read once."""
    weight = Weight("float32", (10, 12), ("w",))
    stack = Stack(reader, Source(("a", "b")), weight, CONFIG)
    stack.plain(3, 5, "float32")
    assert reader.read == 2
    reader.read = 0
    far = Stack(
        reader, Source(("a", "b"), rows=lambda config: torch.tensor([0, 9])), Weight("float32", (2, 12), ("w",)), CONFIG
    )
    far.plain(0, 2, "float32")
    assert reader.read == 2
    reader.read = 0
    transposed = Stack(reader, Source(("e",), transposed=True), Weight("float32", (2, 8, 12), ("w",)), CONFIG)
    rows_of(transposed, 3)
    assert reader.read == 2 * 12


def test_numbers_that_cannot_be(reader):
    weight = Weight("float16", (10, 12), ("w",))
    stack = Stack(reader, Source(("a", "b")), weight, CONFIG)
    reader.values["b"][2, 3] = 1e6
    stack.plain(0, 6, "float16")
    with pytest.raises(UnsupportedError, match="`b` has 1e\\+06, more than float16"):
        stack.plain(6, 7, "float16")
    reader.values["b"][2, 3] = float("nan")
    with pytest.raises(SnapshotError, match="`b` holds a NaN"):
        stack.plain(0, 10, "float32")


def test_near_rows_are_read_with_what_lies_between(reader, monkeypatch):
    far_apart = Source(("a", "b"), rows=lambda config: torch.tensor([0, 3, 6, 9]))
    for near, read in ((2, 4), (3, 4 + 4)):
        monkeypatch.setattr(stack_module, "NEAR", near)
        reader.read = 0
        Stack(reader, far_apart, Weight("float32", (4, 12), ("w",)), CONFIG).plain(0, 4, "float32")
        assert reader.read == read


@pytest.mark.parametrize("tp", [1, 2, 6])
@pytest.mark.parametrize(
    ("shape", "shard"),
    [
        ((24, 4), "qkv"),
        ((24,), "qkv"),
        ((11, 4), "rows"),
        ((4, 12), "columns"),
        ((2, 24, 3), "expert_halves"),
        ((2, 24), "expert_halves"),
        ((2, 12, 3), "expert_rows"),
        ((2, 3, 12), "expert_columns"),
        ((5, 3), None),
    ],
)
def test_ranks_put_together_are_the_whole(shape, shard, tp):
    """In any blocks; KV heads that several ranks hold are the same, and what pads the vocabulary is left out."""
    config = CONFIG.model_copy(update={"mapping": Mapping.of(tp)})
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    flat_rows = (
        48 if len(shape) == 2 and shard == "expert_halves" else shape[0] if len(shape) < 3 else shape[0] * shape[1]
    )
    flat = whole.reshape(flat_rows, -1)
    for rank in config.mapping.ranks:
        weight = Weight("int64", rank_shape(shape, shard, tp, config), ("w",), shard)
        rank_cut = cut(weight, flat_rows, config, rank)
        made = torch.zeros(weight.shape, dtype=torch.int64).reshape(rank_cut.rows, -1)
        for start in range(0, flat_rows, 5):
            for row, piece in rank_cut.pieces(flat[start : start + 5], start):
                assert piece.is_contiguous()
                made[row : row + len(piece)] = piece
        assert torch.equal(made.reshape(weight.shape), expected_part(whole, shard, config, rank)), rank


@pytest.mark.parametrize(("tp", "ep"), [(2, 2), (4, 2), (4, 4), (8, 4)])
@pytest.mark.parametrize(
    ("shape", "shard"),
    [
        ((8, 16, 3), "expert_halves"),
        ((8, 16), "expert_halves"),
        ((8, 6, 3), "expert_rows"),
        ((8, 3, 8), "expert_columns"),
        ((8, 3), "experts"),  # a bias; and scales of each output, whose rows are counted through as the weight's
        ((8, 1), "experts"),
    ],
)
def test_experts_of_a_rank(shape, shard, tp, ep):
    config = CONFIG.model_copy(update={"mapping": Mapping.of(tp, moe_ep_size=ep)})
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    rows = 8 if shard == "experts" else whole.numel() // (shape[2] if len(shape) == 3 else 1)
    for rank in config.mapping.ranks:
        e, t, part = rank.rank % ep, rank.rank // ep, tp // ep
        held = whole[e * 8 // ep : (e + 1) * 8 // ep]
        match shard:
            case "expert_halves":
                want = torch.cat([half.chunk(part, dim=1)[t] for half in held.chunk(2, dim=1)], dim=1)
            case "expert_rows":
                want = held.chunk(part, dim=1)[t]
            case "expert_columns":
                want = held.chunk(part, dim=2)[t]
            case _:
                want = held
        for flat_rows in {rows, whole.numel()} if shard == "experts" else {rows}:
            flat, rank_cut = (
                whole.reshape(flat_rows, -1),
                cut(Weight("int64", want.shape, ("w",), shard), flat_rows, config, rank),
            )
            made = torch.full_like(want, -1).reshape(rank_cut.rows, -1)
            for start in range(0, flat_rows, 5):
                for row, piece in rank_cut.pieces(flat[start : start + 5], start):
                    made[row : row + len(piece)] = piece
            assert torch.equal(made.reshape(want.shape), want), rank


def rank_shape(shape, shard, tp, config):
    axis = {"rows": 0, "columns": 1, "expert_halves": 1, "expert_rows": 1, "expert_columns": 2}.get(shard)
    if shard == "qkv":
        return ((config.heads_per_rank + 2 * config.kv_heads_per_rank) * config.head_size, *shape[1:])
    return tuple(-(-n // tp) if i == axis else n for i, n in enumerate(shape))


def expected_part(whole, shard, config, rank):
    tp, t = config.mapping.tp_size, rank.tp_rank
    if shard is None:
        return whole
    if shard == "rows":
        padded = torch.cat([whole, torch.zeros((-len(whole) % tp, *whole.shape[1:]), dtype=whole.dtype)])
        return padded.chunk(tp)[t]
    if shard == "qkv":
        q, k, v = (part.unflatten(0, (-1, 2)) for part in whole.split([12, 6, 6]))
        held = [(t * 3 // tp + i) for i in range(config.kv_heads_per_rank)]
        return torch.cat([part.flatten(0, 1) for part in (q.chunk(tp)[t], k[held], v[held])])
    if shard == "expert_halves":
        return torch.cat([half.chunk(tp, dim=1)[t] for half in whole.chunk(2, dim=1)], dim=1)
    return whole.chunk(tp, dim={"columns": 1, "expert_rows": 1, "expert_columns": 2}[shard])[t]
