"""Sources that are quantized already: their weights are kept as they are, or made plain and a note says why."""

import pytest
import torch

from tests.convert.helpers import join_ranks, read_checkpoint
from tests.convert.quantized_reader import QuantizedReader
from tests.tiny_models import save_tiny_model
from trtllm_cli.checkpoint import Checkpoint
from trtllm_cli.convert import pipeline
from trtllm_cli.convert.pipeline import ConvertOptions, convert
from trtllm_cli.convert.quantize.rows import Quantized
from trtllm_cli.convert.quantized_source import config_of, patterns
from trtllm_cli.convert.reader import open_reader
from trtllm_cli.errors import SnapshotError, UnsupportedError, UsageError
from trtllm_cli.kernels.quantization import dequantize
from trtllm_cli.quant_config import LayerQuant, QuantConfig

INT4 = LayerQuant(quant_algo="W4A16", group_size=16, has_zero_point=True)
FP8 = LayerQuant(quant_algo="FP8")


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    path = tmp_path_factory.mktemp("snapshot")
    save_tiny_model(path, "qwen3", tokenizer=False)
    return path


@pytest.fixture
def reader(snapshot):
    opened = open_reader(snapshot)
    yield opened
    opened.close()


@pytest.fixture
def convert_quantized(snapshot, tmp_path, monkeypatch):
    """Converts the snapshot as if it were quantized so; (config, tensors of the whole model, report)."""

    def run(layer_of, name="kept", why_plain=lambda name: "", **options):
        with monkeypatch.context() as m:
            m.setattr(pipeline, "open_reader", lambda path: QuantizedReader(open_reader(path), layer_of, why_plain))
            report = convert(snapshot, tmp_path / name, ConvertOptions(**options))
        checkpoint = Checkpoint.open(tmp_path / name)
        return checkpoint.config, join_ranks(checkpoint.config, read_checkpoint(checkpoint)), report

    return run


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    "layer",
    [
        INT4,
        LayerQuant(quant_algo="W8A16"),
        LayerQuant(quant_algo="W8A16", group_size=8, per_group=True),
        LayerQuant(quant_algo="FP8_PER_CHANNEL_PER_TOKEN"),
    ],
    ids=lambda layer: layer.quant_algo,
)
def test_parts_are_kept(snapshot, tmp_path, convert_quantized, layer, tp):
    """What the same quantizer makes of the plain model."""
    config, _, report = convert_quantized(lambda name: layer, tp_size=tp)
    expected = QuantConfig(**dict(layer), exclude_modules=["lm_head"])
    assert config.quantization == expected
    assert report.quant_algo == layer.quant_algo
    convert(snapshot, tmp_path / "made", ConvertOptions(tp_size=tp), quantization=Quantized(expected))
    made = Checkpoint.open(tmp_path / "made")
    assert made.config == config
    for rank in config.mapping.ranks:
        ours = Checkpoint.open(tmp_path / "kept").rank_file(rank)
        assert ours.read_bytes() == made.rank_file(rank).read_bytes()
    assert report.notes == ["the snapshot has no tokenizer: the checkpoint works with token ids only"]


def test_one_scale_of_three(reader, convert_quantized):
    """q, k and v have scales of their own: all get the largest."""
    config, tensors, report = convert_quantized(lambda name: FP8, tp_size=2)
    assert config.quantization.quant_algo == "FP8"
    with_names = [note for note in report.notes if "largest" in note]
    assert "transformer.layers.*.attention.qkv" in with_names[0]
    assert "mlp" not in with_names[0]
    heights = {"q": 128, "k": 64, "v": 64}
    parts = [reader.rows(f"model.layers.1.self_attn.{c}_proj.weight", 0, rows) for c, rows in heights.items()]
    weight, scale = (tensors[f"transformer.layers.1.attention.qkv.{p}"] for p in ("weight", "weights_scaling_factor"))
    assert scale == max(part.abs().max() for part in parts) / 448
    plain = torch.cat(parts)
    assert (dequantize(weight, "fp8", scale) - plain).norm() / plain.norm() < 0.05


def test_layers_that_differ(reader, convert_quantized):
    """int4 MLPs and fp8 attention; v is stored otherwise than q and k in one layer, which becomes plain."""

    def layer_of(name):
        if name == "model.layers.1.self_attn.v_proj.weight":
            return INT4
        return FP8 if "self_attn" in name else INT4

    config, tensors, report = convert_quantized(layer_of)
    q = config.quantization
    assert q.quant_algo == "MIXED_PRECISION"
    assert q.layer_quant("transformer.layers.0.attention.qkv") == FP8
    assert q.layer_quant("transformer.layers.2.mlp.proj") == INT4
    assert q.layer_quant("transformer.layers.1.attention.qkv") is None
    assert tensors["transformer.layers.1.attention.qkv.weight"].dtype == torch.float32
    (note,) = [note for note in report.notes if "made plain" in note]
    assert "transformer.layers.1.attention.qkv" in note
    assert "not quantized alike" in note
    plain = reader.rows("model.layers.1.self_attn.v_proj.weight", 0, 64)
    assert torch.allclose(tensors["transformer.layers.1.attention.qkv.weight"][-64:], plain, atol=0.05)


def test_what_only_comes_plain(convert_quantized):
    config, tensors, report = convert_quantized(
        lambda name: INT4, why_plain=lambda name: "odd groups" if "down_proj" in name else ""
    )
    assert config.quantization.exclude_modules == ["transformer.layers.*.mlp.proj", "lm_head"]
    assert any("odd groups: transformer.layers.*.mlp.proj" in note for note in report.notes)
    assert tensors["transformer.layers.0.mlp.proj.weight"].dtype == torch.float32


def test_dequantized_first(reader, convert_quantized):
    with pytest.raises(UsageError, match="quantized already") as e:
        convert_quantized(lambda name: FP8, qformat="int4_wo")
    assert "--dequantize" in str(e.value)
    config, tensors, _ = convert_quantized(lambda name: INT4, dequantize=True)
    assert config.quantization == QuantConfig()
    plain = reader.rows("model.layers.0.mlp.down_proj.weight", 0, 64)
    assert torch.allclose(tensors["transformer.layers.0.mlp.proj.weight"], plain, atol=0.05)
    config, _, _ = convert_quantized(lambda name: INT4, "again", dequantize=True, qformat="int8_wo")
    assert config.quantization.quant_algo == "W8A16"


def test_a_part_with_a_nan(snapshot, tmp_path, monkeypatch):
    def damaged(path):
        reader = QuantizedReader(open_reader(path), lambda name: INT4)
        reader.weight("model.layers.1.mlp.up_proj.weight").made["weights_scaling_factor"][3] = float("nan")
        return reader

    monkeypatch.setattr(pipeline, "open_reader", damaged)
    with pytest.raises(SnapshotError, match=r"layers.1.mlp.up_proj.weight.* NaN"):
        convert(snapshot, tmp_path / "ckpt")


def test_blocks_of_inputs_that_would_lie_on_two_ranks(convert_quantized):
    with pytest.raises(UnsupportedError, match="two of 2 ranks"):
        convert_quantized(lambda name: LayerQuant(quant_algo="FP8_BLOCK_SCALES"), tp_size=2)


def test_config_of():
    modules = [f"transformer.layers.{i}.mlp.{m}" for i in range(2) for m in ("fc", "router")] + ["lm_head"]
    kept = {m: INT4 for m in modules if m.endswith("fc")}
    assert config_of(kept, modules, None).exclude_modules == ["transformer.layers.*.mlp.router", "lm_head"]
    assert config_of({}, modules, "FP8") == QuantConfig(kv_cache_quant_algo="FP8")
    assert patterns(modules[:1], modules) == modules[:1]
