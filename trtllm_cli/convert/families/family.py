"""What a family is: how its config reads as a ModelConfig, and which of its tensors make which of ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

from trtllm_cli.convert.families.fields import Fields
from trtllm_cli.convert.families.rope import read_rope

if TYPE_CHECKING:
    import torch

    from trtllm_cli.model_config import ModelConfig


@dataclass(frozen=True)
class Source:
    """How one of our tensors is made of theirs: stacked on dim 0, then some small steps.

    `names` are their tensors; {i} is the layer, and a name with {e} stands for one tensor of each expert: all names of
    expert 0 first, then all of expert 1; likewise {q} for query heads and {k} for KV heads. What they stack to is seen
    as rows [..., width]: an expert stack that is one tensor already, [experts, out, in], counts as experts * out rows.
    Of a vector, and of one for each expert, [experts, out], the rows are its numbers.
    """

    names: tuple[str, ...]
    # Which rows of the stack are ours, in our order: int64 [our rows]. None: all, as they are.
    rows: Callable[[ModelConfig], torch.Tensor] | None = None
    # Rows of each of `names`, where they are neither one, nor q, k and v, nor equal parts.
    heights: Callable[[ModelConfig], tuple[int, ...]] | None = None
    transposed: bool = False  # theirs is [..., in, out] (GPT-2's Conv1D, gpt-oss's experts); one name only
    plus: float = 0.0  # added to each number: Gemma's norms store w - 1


TensorTable = Mapping[str, tuple[str, ...] | Source]
# Our name -> Hugging Face's names, stacked on dim 0 in this order; {i} is the layer. Biases are looked for only where
# the model has them.
DECODER_TENSORS: dict[str, tuple[str, ...] | Source] = {
    "transformer.vocab_embedding.weight": ("model.embed_tokens.weight",),
    "transformer.layers.{i}.input_layernorm.weight": ("model.layers.{i}.input_layernorm.weight",),
    "transformer.layers.{i}.attention.qkv.weight": (
        "model.layers.{i}.self_attn.q_proj.weight",
        "model.layers.{i}.self_attn.k_proj.weight",
        "model.layers.{i}.self_attn.v_proj.weight",
    ),
    "transformer.layers.{i}.attention.qkv.bias": (
        "model.layers.{i}.self_attn.q_proj.bias",
        "model.layers.{i}.self_attn.k_proj.bias",
        "model.layers.{i}.self_attn.v_proj.bias",
    ),
    "transformer.layers.{i}.attention.dense.weight": ("model.layers.{i}.self_attn.o_proj.weight",),
    "transformer.layers.{i}.attention.dense.bias": ("model.layers.{i}.self_attn.o_proj.bias",),
    "transformer.layers.{i}.attention.q_layernorm.weight": ("model.layers.{i}.self_attn.q_norm.weight",),
    "transformer.layers.{i}.attention.k_layernorm.weight": ("model.layers.{i}.self_attn.k_norm.weight",),
    "transformer.layers.{i}.post_layernorm.weight": ("model.layers.{i}.post_attention_layernorm.weight",),
    "transformer.layers.{i}.mlp.fc.weight": ("model.layers.{i}.mlp.gate_proj.weight",),
    "transformer.layers.{i}.mlp.fc.bias": ("model.layers.{i}.mlp.gate_proj.bias",),
    "transformer.layers.{i}.mlp.gate.weight": ("model.layers.{i}.mlp.up_proj.weight",),
    "transformer.layers.{i}.mlp.gate.bias": ("model.layers.{i}.mlp.up_proj.bias",),
    "transformer.layers.{i}.mlp.proj.weight": ("model.layers.{i}.mlp.down_proj.weight",),
    "transformer.layers.{i}.mlp.proj.bias": ("model.layers.{i}.mlp.down_proj.bias",),
    "transformer.ln_f.weight": ("model.norm.weight",),
    "lm_head.weight": ("lm_head.weight",),
}

# Buffers that old versions of transformers saved, and that are computed from the config.
COMPUTED_BUFFERS = (
    "model.layers.*.self_attn.rotary_emb.inv_freq",
    "model.rotary_emb.inv_freq",
)

# Fields of any config.json that say nothing about a decoder's forward pass: where the file came from, training,
# what transformers returns, and old places of generation settings.
WITHOUT_EFFECT = {
    "architectures", "model_type", "dtype", "torch_dtype", "auto_map", "_name_or_path", "name_or_path", "_commit_hash",
    "transformers_version", "transformers.js_config", "model_name", "license", "unsloth_fixed", "unsloth_version",
    "is_llama_config", "initializer_range", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop",
    "dropout", "attn_pdrop", "rope_dropout", "use_cache", "pretraining_tp", "gradient_checkpointing", "torchscript",
    "use_bfloat16", "neftune_noise_alpha", "_attn_implementation", "attn_implementation",
    "_attn_implementation_autoset", "_flash_attn_2_enabled", "use_flash_attn", "use_flash_attention", "flash_attention",
    "return_dict", "output_attentions", "output_hidden_states", "output_scores", "return_dict_in_generate",
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id",
    "tokenizer_class", "prefix", "is_decoder", "is_encoder_decoder", "tie_encoder_decoder",
    "cross_attention_hidden_size", "add_cross_attention", "chunk_size_feed_forward", "pruned_heads", "problem_type",
    "task_specific_params", "id2label", "label2id", "finetuning_task", "tf_legacy_loss", "max_length", "min_length",
    "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p",
    "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "bad_words_ids", "num_return_sequences", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
    "output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "aux_loss_alpha", "seq_aux",
    "quantization_config", "compression_config",  # what they say, the reader has read
}  # fmt: skip

# Fields that do change the numbers, with the values at which they do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (None, 1, 1.0),
    "rotary_pct": (None, 1, 1.0),
    "rope_interleaved": (None, False),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logits_scaling": (None, 1, 1.0),
    "logit_scale": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "query_pre_attn_scalar": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "clip_qkv": (None,),
    "qk_layernorm": (None, False),
}

MAX_LAYERS = 10_000

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}


def module_tensors(
    ours: str,
    theirs: str,
    modules: Mapping[str, str],
    *,
    rows: Callable[[ModelConfig], torch.Tensor] | None = None,
    transposed: bool = False,
) -> dict[str, Source]:
    """The weight and the bias of each of `modules`, from our name to theirs, under the prefixes `ours` and `theirs`."""
    table = {}
    for our_name, their_name in modules.items():
        weight, bias = (f"{theirs}.{their_name}.{kind}" for kind in ("weight", "bias"))
        table[f"{ours}.{our_name}.weight"] = Source((weight,), rows=rows, transposed=transposed)
        table[f"{ours}.{our_name}.bias"] = Source((bias,), rows=rows)
    return table


@dataclass(frozen=True)
class Family:
    """One architecture: `read` takes a config's fields and gives ModelConfig's, without dtype and mapping.

    `tensors` is as DECODER_TENSORS, a tuple standing for a Source of these names; `embedding` and `head` are their
    tensors that are one where the model is tied. Where a layer has experts, `expert_tensors` come first. `leftovers`
    are patterns of tensors that a snapshot may hold and that nothing needs.
    """

    architecture: str
    model_type: str
    read: Callable[[Fields], dict[str, Any]]
    tensors: TensorTable = field(default_factory=lambda: DECODER_TENSORS)
    expert_tensors: TensorTable = field(default_factory=dict)
    leftovers: tuple[str, ...] = COMPUTED_BUFFERS
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    # Names that are stored under others: (pattern, replacement) of `re.sub`, tried in order on each of a snapshot's
    # names, such as a prefix that only some publishers write.
    renames: tuple[tuple[str, str], ...] = ()
    without_effect: frozenset[str] = frozenset()  # fields that change nothing in this family
    extra_layers: bool = False  # layers past the last are for multi-token prediction, and left out
    note: str | None = None  # what the user should know of each conversion

    def config_fields(self, fields: Fields) -> dict[str, Any]:
        """ModelConfig's fields; anything in the file that cannot be honoured is an UnsupportedError."""
        out = {"architecture": self.architecture, **self.read(fields)}
        fields.refuse_unread(WITHOUT_EFFECT | self.without_effect, NEUTRAL)
        return out

    def is_left_out(self, name: str, num_layers: int) -> bool:
        """Whether nothing needs their tensor `name`, in a model of so many layers."""
        return self.is_extra(name, num_layers) or any(fnmatch(name, pattern) for pattern in self.leftovers)

    def is_extra(self, name: str, num_layers: int) -> bool:
        """Whether it belongs to a layer past the last that the family leaves out."""
        found = re.match(r"model\.layers\.(\d+)\.", name)
        return self.extra_layers and found is not None and int(found[1]) >= num_layers

    def source(self, name: str, layer: int | None, config: ModelConfig) -> Source:
        """How our tensor `name`, whose layer number is written {i}, is made, with every number filled in."""
        moe = None if layer is None else config.moe_of(layer)
        found = (moe and self.expert_tensors.get(name)) or self.tensors[name]
        source = Source(found) if isinstance(found, tuple) else found
        names = [n.replace("{i}", str(layer)) for n in source.names]
        counts = {
            "{e}": moe.num_experts if moe else 0,
            "{q}": config.num_attention_heads,
            "{k}": config.num_key_value_heads,
        }
        for mark, count in counts.items():
            if any(mark in n for n in names):
                names = [n.replace(mark, str(number)) for number in range(count) for n in names]
        return replace(source, names=tuple(names))


ReadRope = Callable[[Fields, int, int], dict[str, Any]]


def read_decoder(
    fields: Fields,
    *,
    num_kv_heads: int | None,
    max_positions: int,
    activation: str = "hidden_act",
    norm_epsilon: str = "rms_norm_eps",
    rope: ReadRope = read_rope,
) -> dict[str, Any]:
    """What the Llama-like families share. `num_kv_heads` and `max_positions` are the family's defaults.

    `activation` and `norm_epsilon` are the names of two fields. `rope` takes (fields, head_dim, max_positions).
    """
    heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    if "num_key_value_heads" in fields.data:
        num_kv_heads = heads  # what null means
    head_dim = fields.integer("head_dim", None)
    if head_dim is None:
        if hidden % heads:
            raise fields.wrong("hidden_size", f"a multiple of num_attention_heads = {heads}")
        head_dim = hidden // heads
    max_positions = fields.integer("max_position_embeddings", max_positions)
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden,
        "num_hidden_layers": fields.integer("num_hidden_layers", maximum=MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.integer("num_key_value_heads", heads if num_kv_heads is None else num_kv_heads),
        "head_size": head_dim,
        "intermediate_size": fields.integer("intermediate_size"),
        "hidden_act": read_activation(fields, activation),
        "norm_epsilon": fields.number(norm_epsilon, 1e-6),
        "max_position_embeddings": max_positions,
        "position_embedding_type": "rope_gpt_neox",
        "share_embedding_table": fields.flag("tie_word_embeddings", False),
        **rope(fields, head_dim, max_positions),
    }


def read_activation(fields: Fields, field: str = "hidden_act") -> str:
    """`hidden_act`, or what the family calls it, in our words."""
    name = fields.text(field) if field in fields.data else "silu"  # null is no activation in transformers
    if name not in _ACTIVATIONS:
        raise fields.unsupported(field, f"the activations known here are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def read_layer_types(fields: Fields, num_layers: int, default: list[str]) -> list[str]:
    """`layer_types`: "full_attention" or "sliding_attention" for each layer."""
    types: list[str] = fields.texts("layer_types", default)
    if len(types) != num_layers:
        raise fields.wrong("layer_types", f"a list of num_hidden_layers = {num_layers} names")
    if unknown := set(types) - {"full_attention", "sliding_attention"}:
        raise fields.unsupported("layer_types", f"{sorted(unknown)[0]!r} is not supported")
    return types


def read_windows(fields: Fields, num_layers: int, pattern: int) -> dict[str, Any]:
    """`sliding_window` and `layer_types` of a family in which, by default, every `pattern`-th layer does not slide."""
    default = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(num_layers)]
    window, types = fields.integer("sliding_window", None), read_layer_types(fields, num_layers, default)
    if window is None and "sliding_attention" in types:
        raise fields.wrong("sliding_window", "an integer, as there are layers that slide")
    return window_fields(window, types)


def window_fields(window: int | None, types: list[str]) -> dict[str, Any]:
    """ModelConfig's `sliding_window` and `layer_types`, said as briefly as they can be."""
    if "sliding_attention" not in types:
        return {}
    if "full_attention" not in types:
        return {"sliding_window": window}
    return {"sliding_window": window, "layer_types": types}
