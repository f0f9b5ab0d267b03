"""`quantize` from end to end on tiny models: what is written, what it computes, and that failure leaves nothing."""

import json

import pytest
import torch

from tests.tiny_models import save_tiny_model
from trtllm_cli.checkpoint import Checkpoint
from trtllm_cli.convert.pipeline import ConvertOptions, convert
from trtllm_cli.convert.quantize import load
from trtllm_cli.convert.quantize.pipeline import QuantizeOptions, quantize
from trtllm_cli.errors import AccuracyError, ResourceError, UsageError
from trtllm_cli.evaluate.whole_model import program_of

FEW = {"calib_size": 4, "calib_max_seq_length": 32}


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "snapshot"
    save_tiny_model(path, "qwen3", hidden_size=64, intermediate_size=128)
    return path


@pytest.fixture(scope="module")
def plain(snapshot, tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "ckpt"
    convert(snapshot, path)
    return program_of(Checkpoint.open(path))


def options(qformat=None, **fields):
    own = {k: fields.pop(k) for k in list(fields) if k in ConvertOptions.__dataclass_fields__}
    return QuantizeOptions(ConvertOptions(qformat=qformat, **own), **{**FEW, **fields})


@pytest.mark.parametrize(
    ("qformat", "algo", "most"),
    [
        ("int8_wo", "W8A16", 0.02), ("int4_wo", "W4A16", 0.35), ("fp8_pc_pt", "FP8_PER_CHANNEL_PER_TOKEN", 0.15),
        ("fp8_block", "FP8_BLOCK_SCALES", 0.15), ("fp8", "FP8", 0.15),
        ("int8_sq", "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", 0.05),
        ("int8_sq_static", "W8A8_SQ_PER_CHANNEL", 0.3), ("int4_awq", "W4A16_AWQ", 0.4),
        ("w4a8_awq", "W4A8_AWQ", 0.4), ("nvfp4", "NVFP4", 0.4),
    ],
)  # fmt: skip
def test_formats(snapshot, plain, tmp_path, qformat, algo, most):
    report, _ = quantize(snapshot, tmp_path / "ckpt", options(qformat, report=False))
    checkpoint = Checkpoint.open(tmp_path / "ckpt")
    assert checkpoint.config.quantization.quant_algo == report.convert.quant_algo == algo
    ids = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(0))
    got, wanted = program_of(checkpoint)(ids), plain(ids)
    assert 0 < (got - wanted).norm() / wanted.norm() < most
    assert report.calibration_tokens == (0 if qformat == "int8_wo" else 4 * 32)


def test_ranks_cache_and_head(tmp_path):
    """Two ranks and two stages give what one gives; a tied head gets tensors of its own."""
    save_tiny_model(tmp_path / "s", "llama", tie_word_embeddings=True)
    common = {"kv_cache": "fp8", "quantize_lm_head": True, "exclude": ("*.0.mlp.proj",), "report": False}
    quantize(tmp_path / "s", tmp_path / "one", options("fp8", **common))
    quantize(tmp_path / "s", tmp_path / "four", options("fp8", tp_size=2, pp_size=2, **common))
    one, four = Checkpoint.open(tmp_path / "one"), Checkpoint.open(tmp_path / "four")
    assert one.config.quantization.kv_cache_quant_algo == "FP8"
    assert not one.config.share_embedding_table
    assert one.config.quantization.layer_quant("transformer.layers.0.mlp.proj") is None
    with one.tensors(one.config.mapping.ranks[0]) as file:
        assert file.tensors["lm_head.weight"].dtype == "float8_e4m3fn"
        assert file.tensors["transformer.layers.0.mlp.proj.weight"].dtype == "float32"
        assert file.tensors["transformer.layers.1.attention.kv_cache_scaling_factor"].dtype == "float32"
    ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(program_of(four)(ids), program_of(one)(ids))


@pytest.mark.parametrize("qformat", ["fp8", "int4_awq", "int8_sq", "nvfp4"])
def test_experts(tmp_path, qformat):
    """They are quantized too; the router is not."""
    save_tiny_model(tmp_path / "s", "qwen3_moe", moe_intermediate_size=32)
    convert(tmp_path / "s", tmp_path / "plain")
    quantize(tmp_path / "s", tmp_path / "ckpt", options(qformat, report=False))
    checkpoint = Checkpoint.open(tmp_path / "ckpt")
    program, reference = program_of(checkpoint), program_of(Checkpoint.open(tmp_path / "plain"))
    experts = list(program.expert_linears)
    assert experts
    layers = {name: checkpoint.config.quantization.layer_quant(name) for name in program.linears}
    assert all(checkpoint.config.quantization.layer_quant(name) for name in experts)
    assert all((layer is None) == ("router" in name or name == "lm_head") for name, layer in layers.items())
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    got, wanted = program(ids), reference(ids)
    assert 0 < (got - wanted).norm() / wanted.norm() < 0.6


def test_experts_of_ranks(tmp_path):
    """Calibrated for the whole model, and the report is made of ranks that divide the experts."""
    save_tiny_model(tmp_path / "s", "qwen3_moe", moe_intermediate_size=32)
    quantize(tmp_path / "s", tmp_path / "one", options("fp8", report=False))
    quantize(tmp_path / "s", tmp_path / "four", options("fp8", tp_size=4, moe_ep_size=2))
    one, four = (program_of(Checkpoint.open(tmp_path / name)) for name in ("one", "four"))
    ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(four(ids), one(ids))


def test_report(snapshot, tmp_path):
    report, accuracy = quantize(snapshot, tmp_path / "ckpt", options("fp8"))
    written = json.loads((tmp_path / "ckpt" / "report.json").read_text())
    assert written == report.accuracy
    assert written["perplexity_increase"] == pytest.approx(accuracy.divergence.perplexity_increase)
    assert len(written["linears"]) >= 3 * 5
    assert (tmp_path / "ckpt" / "report.png").read_bytes().startswith(b"\x89PNG")
    Checkpoint.open(tmp_path / "ckpt")


def test_too_far_off_leaves_nothing(snapshot, tmp_path):
    with pytest.raises(AccuracyError, match="perplexity rose") as e:
        quantize(snapshot, tmp_path / "out" / "ckpt", options("nvfp4", max_ppl_increase=-0.5))
    assert "transformer.layers." in e.value.message
    assert list((tmp_path / "out").iterdir()) == []


def test_auto(snapshot, tmp_path):
    report, _ = quantize(
        snapshot, tmp_path / "ckpt", options(auto_quantize_bits=6.5, autoq_formats=("int4_awq", "fp8"), report=False)
    )
    config = Checkpoint.open(tmp_path / "ckpt").config.quantization
    assert config.quant_algo == "MIXED_PRECISION"
    assert {layer.quant_algo for layer in config.quantized_layers.values()} == {"W4A16_AWQ", "FP8"}
    assert any("bits a weight on average" in note for note in report.notes)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "no format"),
        ({"qformat": "fp8", "auto_quantize_bits": 6.0}, "both given"),
        ({"qformat": "fp9"}, "fp9"),
        ({"qformat": "fp8", "calib_size": 0}, "--calib-size"),
        ({"qformat": "fp8", "calibrator": "x"}, "--calibrator"),
        ({"qformat": "fp8", "autoq_formats": ("fp8",)}, "--autoq-format"),
        ({"qformat": "fp8", "device": "tpu"}, "--device"),
        ({"qformat": "fp8", "calib_dataset": "none.jsonl"}, "none.jsonl"),
        ({"qformat": "fp8", "calib_size": 10**6}, "too few"),
        ({"auto_quantize_bits": 2.0}, "cannot be reached"),
        ({"qformat": "fp8", "exclude": ("*.nothing",)}, "no layer's name"),
    ],
)
def test_bad_input(snapshot, tmp_path, fields, says):
    with pytest.raises(UsageError, match=says):
        quantize(snapshot, tmp_path / "ckpt", options(**fields))
    assert list(tmp_path.iterdir()) == []


def test_calibration_text_of_ones_own(snapshot, tmp_path):
    (tmp_path / "mine.txt").write_text("all work and no play " * 100)
    report, _ = quantize(
        snapshot, tmp_path / "ckpt", options("fp8", calib_dataset=str(tmp_path / "mine.txt"), report=False)
    )
    assert report.calibration_tokens == 128


def test_no_memory(snapshot, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "_available_bytes", lambda: 1000)
    with pytest.raises(ResourceError, match="calibrating holds the model"):
        quantize(snapshot, tmp_path / "ckpt", options("fp8"))
