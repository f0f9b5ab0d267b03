"""Families with experts: which layers have them, by their configs; and what cannot be honoured."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.convert.helpers import join_ranks, read_checkpoint
from tests.convert.quantized_reader import QuantizedReader
from tests.models.test_against_transformers import PROMPT, relative
from tests.models.test_sharded import ranks_logits
from tests.tiny_models import VOCAB_SIZE, save_tiny_model
from trtllm_cli.checkpoint import Checkpoint
from trtllm_cli.convert import pipeline
from trtllm_cli.convert.families import family_of
from trtllm_cli.convert.families.fields import Fields
from trtllm_cli.convert.hf_reader import HfReader
from trtllm_cli.convert.pipeline import ConvertOptions, convert
from trtllm_cli.convert.reader import open_reader
from trtllm_cli.errors import SnapshotError, UnsupportedError, UsageError
from trtllm_cli.mapping import Mapping
from trtllm_cli.model_config import ModelConfig, MoeConfig
from trtllm_cli.quant_config import LayerQuant

GOLDEN = Path(__file__).parents[2] / "golden" / "checkpoints"
PATH = Path("config.json")


def golden(name, **changes):
    """A published model's config with other values; None takes a field away."""
    config = {**json.loads((GOLDEN / f"{name}.hf.json").read_text()), **changes}
    return {k: v for k, v in config.items() if v is not None}


def read(config):
    return ModelConfig(**family_of(config, PATH).config_fields(Fields(config, PATH)), dtype="bfloat16")


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("mixtral-8x7b", "Mixtral"),
        ("qwen3-30b-a3b", "Qwen3Moe"),
        ("qwen1.5-moe-a2.7b", "Qwen2Moe"),
        ("gpt-oss-20b", "GptOss"),
    ],
)
def test_defaults_are_those_of_transformers(name, model_type):
    import transformers

    needed = {
        "architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads",
    }  # fmt: skip
    if model_type == "DeepseekV2":
        needed.add("num_experts_per_tok")
    config = {k: v for k, v in golden(name).items() if k in needed}
    kind = getattr(transformers, f"{model_type}Config")
    assert read(config) == read(kind(**config).to_dict())


@pytest.mark.parametrize(
    ("step", "dense", "expected"),
    [(1, [], []), (1, [0, 2], [0, 2]), (2, [], [0, 2, 4]), (2, [1], [0, 1, 2, 4]), (3, None, [0, 1, 3, 4])],
)
def test_layers_without_experts(step, dense, expected):
    config = read(golden("qwen3-30b-a3b", num_hidden_layers=6, decoder_sparse_step=step, mlp_only_layers=dense))
    assert config.moe.dense_layers == expected
    assert [i for i in range(6) if config.moe_of(i) is None] == expected


@pytest.mark.parametrize(
    ("name", "changes", "error"),
    [
        ("qwen3-30b-a3b", {"mlp_only_layers": [48]}, SnapshotError),
        ("qwen3-30b-a3b", {"mlp_only_layers": "0"}, SnapshotError),
        ("qwen3-30b-a3b", {"num_local_experts": 64}, UnsupportedError),
        ("qwen3-30b-a3b", {"shared_expert_intermediate_size": 64}, UnsupportedError),
        ("qwen1.5-moe-a2.7b", {"layer_types": ["sliding_attention"] * 24}, UnsupportedError),
        ("qwen1.5-moe-a2.7b", {"use_sliding_window": True, "sliding_window": 0}, SnapshotError),
        ("mixtral-8x7b", {"num_local_experts": 0}, SnapshotError),
        ("deepseek-v2-lite", {"topk_method": "noaux_tc"}, UnsupportedError),
        ("deepseek-v2-lite", {"scoring_func": "sigmoid"}, UnsupportedError),
        ("deepseek-v2-lite", {"norm_topk_prob": True}, UnsupportedError),
        ("deepseek-v2-lite", {"mlp_bias": True}, UnsupportedError),
        ("deepseek-v2-lite", {"moe_layer_freq": 2}, UnsupportedError),
        ("deepseek-v2-lite", {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": None}, SnapshotError),
        ("deepseek-v3", {"num_key_value_heads": 8}, UnsupportedError),
        ("deepseek-v3", {"topk_method": "greedy"}, UnsupportedError),
        ("gpt-oss-20b", {"swiglu_limit": 5.0}, UnsupportedError),
        ("gpt-oss-20b", {"swiglu_alpha": 1.0}, UnsupportedError),
        ("gpt-oss-20b", {"layer_types": ["chunked_attention"] * 24}, UnsupportedError),
    ],
)
def test_refuses_by_name(name, changes, error):
    with pytest.raises(error, match=next(reversed(changes))):
        read(golden(name, **changes))


def test_config_of_tensorrt_llm():
    """The fields of a Qwen2-MoE checkpoint that TensorRT-LLM's convert_checkpoint.py writes."""
    config = {
        "architecture": "Qwen2MoeForCausalLM", "dtype": "bfloat16", "vocab_size": 100, "hidden_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_act": "silu", "intermediate_size": 96,
        "qwen_type": "qwen2_moe", "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 48,
        "moe": {"num_experts": 8, "top_k": 2, "normalization_mode": 0, "sparse_mixer_epsilon": 0.01, "tp_mode": 0},
    }  # fmt: skip
    assert ModelConfig.model_validate(config).moe == MoeConfig(
        num_experts=8, top_k=2, intermediate_size=32, renormalize=False,
        shared_expert_intermediate_size=48, shared_expert_gate=True,
    )  # fmt: skip
    config["moe"]["normalization_mode"] = 2
    with pytest.raises(ValueError, match="normalization_mode"):
        ModelConfig.model_validate(config)


@pytest.mark.parametrize(
    "bad",
    [
        {"top_k": 9},
        {"num_groups": 2},
        {"num_groups": 3, "top_groups": 1},
        {"num_groups": 4, "top_groups": 1, "top_k": 3},
        {"num_groups": 8, "top_groups": 4, "scoring": "sigmoid"},
    ],
)
def test_routing_that_cannot_be(bad):
    with pytest.raises(ValueError, match="top_k|num_groups|group"):
        MoeConfig(**{"num_experts": 8, "top_k": 2, "intermediate_size": 4, **bad})


def test_tensor_parallelism_divides_the_experts():
    fields = read(golden("qwen3-30b-a3b")).model_dump()
    fields["mapping"] = {"world_size": 4, "tp_size": 4}
    ModelConfig.model_validate(fields)
    fields["moe"]["intermediate_size"] = 770
    with pytest.raises(ValueError, match="experts' intermediate_size"):
        ModelConfig.model_validate(fields)


def test_expert_parallelism_divides_the_experts():
    fields = read(golden("qwen3-30b-a3b")).model_dump()
    fields["mapping"] = {"world_size": 8, "tp_size": 4, "pp_size": 2, "moe_ep_size": 2}
    ModelConfig.model_validate(fields)
    fields["moe"]["num_experts"] = 127
    with pytest.raises(ValueError, match="moe_ep_size 2 does not divide the 127 experts"):
        ModelConfig.model_validate(fields)
    fields["moe"] |= {"num_experts": 128, "intermediate_size": 769}
    with pytest.raises(ValueError, match="moe_tp_size 2 does not divide the experts' intermediate_size 769"):
        ModelConfig.model_validate(fields)
    fields["moe"] |= {"intermediate_size": 770, "shared_expert_intermediate_size": 6}
    with pytest.raises(ValueError, match="tp_size 4 does not divide the shared experts' intermediate_size 6"):
        ModelConfig.model_validate(fields)
    fields["moe"] = None
    with pytest.raises(ValueError, match="moe_ep_size is 2, and Qwen3MoeForCausalLM has no experts"):
        ModelConfig.model_validate(fields)


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        (
            "mixtral",
            {"tp_size": 2, "moe_ep_size": 2},
            ["5 experts cannot be divided among 2", "--tp-size 2 it can be 1"],
        ),
        ("qwen3_moe", {"tp_size": 4, "moe_ep_size": 4}, ["6 experts cannot", "--tp-size 4 it can be 1, 2"]),
        ("qwen3_moe", {"tp_size": 4, "moe_tp_size": 4, "moe_ep_size": 2}, ["4 x moe_ep_size 2 is not tp_size 4"]),
        ("qwen3_moe", {"moe_ep_size": 2}, ["moe_ep_size 2 does not divide tp_size 1", "another --tp-size"]),
        ("qwen3_moe", {"tp_size": 2, "moe_ep_size": 0}, ["--moe-ep-size is 0", "1 or more"]),
        ("llama", {"tp_size": 2, "moe_ep_size": 2}, ["LlamaForCausalLM has no experts", "leave --moe-ep-size out"]),
        ("llama", {"moe_ep_size": 2}, ["LlamaForCausalLM has no experts"]),
        ("llama", {"tp_size": 2, "moe_tp_size": 1}, ["LlamaForCausalLM has no experts", "leave --moe-tp-size out"]),
    ],
)
def test_sizes_of_expert_parallelism_that_cannot_be(family, options, words, tmp_path):
    save_tiny_model(tmp_path / "snapshot", family, tokenizer=False)
    with pytest.raises(UsageError) as e:
        convert(tmp_path / "snapshot", tmp_path / "ckpt", ConvertOptions(**options))
    assert all(word in str(e.value) for word in words), str(e.value)
    assert not (tmp_path / "ckpt").exists()


def test_sizes_that_change_nothing_without_experts(tmp_path):
    save_tiny_model(tmp_path / "snapshot", "llama", tokenizer=False)
    convert(tmp_path / "snapshot", tmp_path / "ckpt", ConvertOptions(tp_size=2, moe_tp_size=2, moe_ep_size=1))
    assert Checkpoint.open(tmp_path / "ckpt").config.mapping == Mapping.of(2)


# A token goes to every expert: rounding cannot change the choice.
ALL_EXPERTS = {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 8}


@torch.inference_mode()
def snapshot_of(path, family, **settings):
    """A tiny model's snapshot, and transformers' logits of PROMPT."""
    model = save_tiny_model(path, family, tokenizer=False, **settings)
    return model(torch.tensor([PROMPT])).logits[0].numpy()


@pytest.mark.parametrize(("family", "settings"), [("qwen2_moe", {}), ("gpt_oss", {}), ("deepseek_v3", ALL_EXPERTS)])
def test_quantized_experts(family, settings, tmp_path):
    """On two ranks; what chooses the experts stays as it is."""
    want = snapshot_of(tmp_path / "snapshot", family, **settings)
    convert(tmp_path / "snapshot", tmp_path / "ckpt", ConvertOptions(qformat="fp8_pc_pt", tp_size=2))
    checkpoint = Checkpoint.open(tmp_path / "ckpt")
    tensors = read_checkpoint(checkpoint)[1]
    kept = {name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
    assert {f"transformer.layers.2.mlp.{m}.weight" for m in ("fc", "proj")} <= kept
    assert not any("router" in name or "shared_expert_gate" in name for name in kept)
    assert tensors["transformer.layers.2.mlp.router.weight"].dtype == torch.float32
    got = ranks_logits(checkpoint, [PROMPT])
    assert relative(got[0][:, :VOCAB_SIZE], want) < 0.15


KEPT = [
    LayerQuant(quant_algo="W4A16", group_size=8, has_zero_point=True),
    LayerQuant(quant_algo="W8A16"),
    LayerQuant(quant_algo="FP8"),
    LayerQuant(quant_algo="FP8_PER_CHANNEL_PER_TOKEN"),
    LayerQuant(quant_algo="NVFP4", group_size=16),
]


@pytest.mark.parametrize("layer", KEPT, ids=lambda layer: layer.quant_algo)
@pytest.mark.parametrize(("tp", "ep"), [(2, 2), (4, 2)])
def test_experts_that_are_quantized_already_are_cut_by_expert(layer, tp, ep, tmp_path, monkeypatch):
    """Numbers, groups, scales of outputs and those that are one for each expert: all as one rank has them, cut."""
    save_tiny_model(tmp_path / "snapshot", "qwen3_moe", tokenizer=False, moe_intermediate_size=64)

    def kept(path):
        return QuantizedReader(open_reader(path), lambda name: layer if ".experts." in name else None)

    monkeypatch.setattr(pipeline, "open_reader", kept)
    convert(tmp_path / "snapshot", tmp_path / "one")
    convert(tmp_path / "snapshot", tmp_path / "many", ConvertOptions(tp_size=tp, moe_ep_size=ep))
    (one,), many = (read_checkpoint(Checkpoint.open(tmp_path / name)) for name in ("one", "many"))
    config = Checkpoint.open(tmp_path / "many").config
    assert config.quantization.layer_quant("transformer.layers.0.mlp.fc") == layer
    joined = join_ranks(config, many)
    for name, tensor in one.items():
        if ".mlp." in name:
            assert joined[name].dtype == tensor.dtype
            assert torch.equal(joined[name].view(torch.uint8), tensor.view(torch.uint8)), name
            if ".router." not in name:
                assert all(len(rank[name]) == 6 // ep for rank in many)


def quantize_experts(snapshot, seed=0):
    """Replaces the snapshot's experts by random numbers in MXFP4, in place; the same snapshot's plain tensors."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(seed)
    tensors, plain = load_file(snapshot / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(120, 124, (experts, outputs, inputs // 32), generator=generator, dtype=torch.uint8)
        plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        assert plain[name].shape == (experts, inputs, outputs)
    config = json.loads((snapshot / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (snapshot / "config.json").write_text(json.dumps(config))
    save_file(tensors, snapshot / "model.safetensors")
    return {**{n: t for n, t in tensors.items() if t.dtype != torch.uint8}, **plain}


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 1), (2, 2)])
def test_mxfp4_is_read_as_transformers_does(tp, ep, tmp_path, monkeypatch):
    for name in ("packed", "plain"):
        save_tiny_model(tmp_path / name, "gpt_oss", tokenizer=False, dtype=torch.bfloat16, num_local_experts=6)
    save_file(quantize_experts(tmp_path / "packed"), tmp_path / "plain" / "model.safetensors")
    most, rows = {}, HfReader.rows

    def watched(self, name, start, stop):
        got = rows(self, name, start, stop)
        most[name] = max(most.get(name, 0), got.nbytes)
        return got

    with monkeypatch.context() as m:
        m.setattr(HfReader, "rows", watched)
        report = convert(tmp_path / "packed", tmp_path / "from-packed", ConvertOptions(tp_size=tp, moe_ep_size=ep))
    convert(tmp_path / "plain", tmp_path / "from-plain", ConvertOptions(tp_size=tp, moe_ep_size=ep))
    for rank in range(tp):
        got, want = (tmp_path / name / f"rank{rank}.safetensors" for name in ("from-packed", "from-plain"))
        assert got.read_bytes() == want.read_bytes()
    assert Checkpoint.open(tmp_path / "from-packed").config == Checkpoint.open(tmp_path / "from-plain").config
    assert [note for note in report.notes if "MXFP4" in note and "transformer.layers.*.mlp.fc" in note]
    assert most["model.layers.0.mlp.experts.gate_up_proj_blocks"] == 2 * 96 * 64 // 2  # one expert at a time


def test_mxfp4_that_is_incomplete(tmp_path):
    save_tiny_model(tmp_path / "snapshot", "gpt_oss", tokenizer=False, dtype=torch.bfloat16)
    quantize_experts(tmp_path / "snapshot")
    file = tmp_path / "snapshot" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.experts.down_proj_scales"
    for broken in (None, tensors[name][:, 1:].contiguous(), tensors[name].float()):
        save_file(
            {**{n: t for n, t in tensors.items() if n != name}, **({} if broken is None else {name: broken})}, file
        )
        with pytest.raises(SnapshotError, match="down_proj_scales"):
            convert(tmp_path / "snapshot", tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


def test_layers_for_multi_token_prediction_are_left_out(tmp_path):
    snapshot = tmp_path / "snapshot"
    save_tiny_model(snapshot, "deepseek_v3", tokenizer=False)
    file = snapshot / "model.safetensors"
    tensors = load_file(file)
    convert(snapshot, tmp_path / "before")
    save_file({**tensors, "model.layers.3.eh_proj.weight": torch.ones(64, 128)}, file)
    report = convert(snapshot, tmp_path / "after")
    assert any("layers from 3 on, for multi-token prediction" in note for note in report.notes)
    assert (tmp_path / "before/rank0.safetensors").read_bytes() == (tmp_path / "after/rank0.safetensors").read_bytes()
    save_file({**tensors, "model.layers.2.eh_proj.weight": torch.ones(64, 128)}, file)
    with pytest.raises(SnapshotError, match=r"layers\.2\.eh_proj"):
        convert(snapshot, tmp_path / "wrong")


def quantize_in_blocks(snapshot):
    """Rounds the snapshot's projections to FP8 in blocks of 128 x 128, in place, as DeepSeek publishes them, with a
    layer past the last; the same snapshot's plain tensors."""
    tensors, plain = {}, {}
    for name, w in load_file(snapshot / "model.safetensors").items():
        if "_proj" not in name:
            tensors[name] = plain[name] = w
            continue
        rows, columns = w.shape
        blocks = [[part.abs().max() / 448 for part in row.split(128, 1)] for row in w.split(128)]
        scale = torch.tensor(blocks)
        each = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        tensors[name], tensors[f"{name}_scale_inv"] = (w / each).to(torch.float8_e4m3fn), scale
        plain[name] = tensors[name].float() * each
    extra = {name.replace("layers.2.", "layers.3."): t.clone() for name, t in tensors.items() if "layers.2." in name}
    save_file({**tensors, **extra}, snapshot / "model.safetensors")
    config = json.loads((snapshot / "config.json").read_text())
    config["quantization_config"] = {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    }  # fmt: skip
    (snapshot / "config.json").write_text(json.dumps(config))
    return plain


def test_deepseek_as_it_is_published(tmp_path):
    sizes = {"hidden_size": 192, "moe_intermediate_size": 160, "kv_lora_rank": 136}
    for name in ("packed", "plain"):
        save_tiny_model(tmp_path / name, "deepseek_v3", tokenizer=False, **sizes)
    save_file(quantize_in_blocks(tmp_path / "packed"), tmp_path / "plain" / "model.safetensors")
    report = convert(tmp_path / "packed", tmp_path / "dequantized", ConvertOptions(dequantize=True))
    convert(tmp_path / "plain", tmp_path / "from-plain")
    (got,), (want,) = (read_checkpoint(Checkpoint.open(tmp_path / name)) for name in ("dequantized", "from-plain"))
    assert set(got) == set(want)
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    assert any("multi-token prediction" in note for note in report.notes)
    convert(tmp_path / "packed", tmp_path / "kept")
    checkpoint = Checkpoint.open(tmp_path / "kept")
    assert checkpoint.config.quantization.quant_algo == "FP8_BLOCK_SCALES"
    (kept,) = read_checkpoint(checkpoint)
    for name in ("attention.q_b_nope_proj", "mlp.fc", "mlp.shared_expert.gate"):
        name = f"transformer.layers.1.{name}"
        weight, scale = kept[f"{name}.weight"].float(), kept[f"{name}.weights_scaling_factor"]
        plain = weight * scale.repeat_interleave(128, -1)[..., : weight.shape[-1]]
        assert torch.equal(plain, want[f"{name}.weight"])


def test_quantized_latent_attention(tmp_path, monkeypatch):
    """Parts of a quantized linear keep its numbers; what is multiplied by head is made plain."""
    want = snapshot_of(tmp_path / "snapshot", "deepseek_v3", **ALL_EXPERTS)
    layer = LayerQuant(quant_algo="FP8_PER_CHANNEL_PER_TOKEN")
    reader = QuantizedReader(open_reader(tmp_path / "snapshot"), lambda name: layer if "_proj" in name else None)
    monkeypatch.setattr(pipeline, "open_reader", lambda path: reader)
    report = convert(tmp_path / "snapshot", tmp_path / "ckpt", ConvertOptions(tp_size=2))
    assert any("plain" in note and "k_b_proj" in note and "v_b_proj" in note for note in report.notes)
    checkpoint = Checkpoint.open(tmp_path / "ckpt")
    tensors = read_checkpoint(checkpoint)[0]
    attention = "transformer.layers.1.attention"
    assert tensors[f"{attention}.q_b_nope_proj.weight"].dtype == torch.float8_e4m3fn
    assert tensors[f"{attention}.k_b_proj.weight"].dtype == torch.float32
    got = ranks_logits(checkpoint, [PROMPT])
    assert relative(got[0][:, :VOCAB_SIZE], want) < 0.15
