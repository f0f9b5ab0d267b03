"""A GGUF file as if it were a Hugging Face snapshot: its metadata as a config, its tensors under HF's names.

llama.cpp's converter renames tensors, and for Llama permutes the rows of q and k, because its rotary embedding turns
neighbours where Hugging Face's turns halves. Both are undone here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_cli.convert.gguf_file import GgufFile
from trtllm_cli.convert.gguf_tokenizer import GgufTokenizer
from trtllm_cli.errors import SnapshotError, UnsupportedError
from trtllm_cli.tensor_file import TensorInfo

if TYPE_CHECKING:
    import torch

_ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Metadata of the model that says nothing about the numbers, with the values at which the rest of it says nothing.
_WITHOUT_EFFECT = {"vocab_size", "tensor_data_layout"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
    "use_parallel_residual": (False,),
    "rope.scaling.finetuned": (True, False),
}
_ROPE_FACTORS = "rope_freqs.weight"


class GgufReader:
    """A GGUF file, under Hugging Face's names."""

    def __init__(self, path: Path) -> None:
        self.path = self.config_path = path
        self._file = GgufFile(path)
        try:
            self._fields = self._file.metadata
            self.architecture = self._text("general.architecture")
            if self.architecture not in _ARCHITECTURES:
                raise UnsupportedError(
                    f"GGUF files of the architecture {self.architecture!r} are not supported",
                    where=f"{path}: general.architecture",
                    fix=f"supported: {', '.join(_ARCHITECTURES)}",
                )
            if self._fields.get("split.count", 1) not in (0, 1):
                raise UnsupportedError(
                    "the GGUF file is one of several parts",
                    where=f"{path}: split.count",
                    fix="join the parts first: llama-gguf-split --merge",
                )
            self._read: set[str] = set()
            self._gguf_names = {hf_name(name): name for name in self._file.tensors if name != _ROPE_FACTORS}
            self.tensors = {name: self._info(gguf_name) for name, gguf_name in self._gguf_names.items()}
            self.config = self._config()
            self._refuse_unread()
        except BaseException:
            self.close()
            raise

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor in blocks of rows, as Hugging Face orders them."""
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if self.architecture != "llama" or heads is None:
            yield from self._file.blocks(self._gguf_names[name])
            return
        head_dim = self.tensors[name].shape[0] // self.config[heads]
        if self.tensors[name].shape[0] != head_dim * self.config[heads] or head_dim % 2:
            raise SnapshotError(f"tensor `{self._gguf_names[name]}` does not divide into heads", where=str(self.path))
        for block in self._file.blocks(self._gguf_names[name], rows_multiple=head_dim):
            # [heads, head_dim / 2, 2, ...]: neighbours; to halves
            pairs = block.unflatten(0, (-1, head_dim // 2, 2))
            yield pairs.transpose(1, 2).reshape(block.shape)

    def write_tokenizer(self, directory: Path) -> list[str]:
        """Writes the tokenizer that the metadata describes."""
        if "tokenizer.ggml.model" not in self._fields:
            return []
        return GgufTokenizer(self.path, self._fields).write(directory, self.config["max_position_embeddings"])

    def default_dtype(self) -> str:
        """float16 or float32 where the file is stored so, else bfloat16."""
        from gguf import GGMLQuantizationType

        kinds = [t.kind for t in self._file.tensors.values() if len(t.shape) > 1]
        common = max(set(kinds), key=kinds.count, default=None)
        if common == GGMLQuantizationType.F32:
            return "float32"
        return "float16" if common == GGMLQuantizationType.F16 else "bfloat16"

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _info(self, gguf_name: str) -> TensorInfo:
        from gguf import GGMLQuantizationType

        tensor = self._file.tensors[gguf_name]
        return TensorInfo("float16" if tensor.kind == GGMLQuantizationType.F16 else "float32", tensor.shape)

    def _get(self, key: str, kind: type | tuple[type, ...], expected: str, default: Any = None) -> Any:
        name = f"{self.architecture}.{key}"
        self._read.add(name)
        value = self._fields.get(name)
        if value is None:
            if default is not None:
                return default
            raise SnapshotError(
                f"the metadata field `{name}` is missing", where=str(self.path), fix="fetch the file again"
            )
        if not isinstance(value, kind) or isinstance(value, bool):
            raise SnapshotError(f"the metadata field `{name}` is not {expected}", where=str(self.path))
        return value

    def _integer(self, key: str, default: int | None = None) -> int:
        value: int = self._get(key, int, "an integer", default)
        if value < 1:
            raise SnapshotError(f"the metadata field `{self.architecture}.{key}` is {value}", where=str(self.path))
        return value

    def _number(self, key: str, default: float | None = None) -> float:
        # stored as float32, whose shortest text is what its author wrote: 1e-05, not 9.999999747378752e-06
        return float(f"{self._get(key, (int, float), 'a number', default):.7g}")

    def _text(self, name: str) -> str:
        value = self._fields.get(name)
        if not isinstance(value, str):
            raise SnapshotError(f"the metadata field `{name}` is missing or no text", where=str(self.path))
        return value

    def _config(self) -> dict[str, Any]:
        architecture, model_type = _ARCHITECTURES[self.architecture]
        heads, hidden = self._integer("attention.head_count"), self._integer("embedding_length")
        head_dim = self._integer("attention.key_length", hidden // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._integer(key, head_dim) != head_dim:
                raise UnsupportedError(
                    f"`{self.architecture}.{key}` is {self._integer(key)}, but heads are {head_dim} wide",
                    where=str(self.path),
                )
        if "model.embed_tokens.weight" not in self.tensors:
            raise SnapshotError("tensor `token_embd.weight` is missing", where=str(self.path))
        positions = self._integer("context_length")
        config = {
            "architectures": [architecture],
            "model_type": model_type,
            "hidden_size": hidden,
            "intermediate_size": self._integer("feed_forward_length"),
            "num_hidden_layers": self._integer("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._integer("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon"),
            "max_position_embeddings": positions,
            "vocab_size": self.tensors["model.embed_tokens.weight"].shape[0],
            "tie_word_embeddings": "lm_head.weight" not in self.tensors,
            "rope_theta": self._number("rope.freq_base", 10000.0),
            "rope_scaling": self._rope_scaling(head_dim, positions),
        }
        if self.architecture != "qwen2":
            config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in self.tensors
        if self.architecture == "llama":
            config["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in self.tensors
        return config

    def _rope_scaling(self, head_dim: int, positions: int) -> dict[str, Any] | None:
        kind = self._get("rope.scaling.type", str, "text", "none")
        if _ROPE_FACTORS in self._file.tensors:
            if kind != "none":
                raise UnsupportedError(f"rotary scaling {kind!r} with {_ROPE_FACTORS}", where=str(self.path))
            return self._llama3_scaling(head_dim)
        match kind:
            case "none":
                return None
            case "linear":
                return {"rope_type": "linear", "factor": self._number("rope.scaling.factor")}
            case "yarn":
                scaling = {"rope_type": "yarn", "factor": self._number("rope.scaling.factor")}
                return scaling | {
                    "original_max_position_embeddings": self._integer("rope.scaling.original_context_length", positions)
                }
        raise UnsupportedError(
            f"rotary scaling {kind!r} is not supported in GGUF files",
            where=f"{self.path}: {self.architecture}.rope.scaling.type",
            fix="convert the model's Hugging Face snapshot instead",
        )

    def _llama3_scaling(self, head_dim: int) -> dict[str, Any]:
        """The settings of Llama 3.1's scaling, of which the file keeps only the divisor of each frequency.

        All published models share three of the four settings; the file's divisors must be what those give.
        """
        import torch

        from trtllm_cli.kernels.rope import RopeSpec, cos_sin_table
        from trtllm_cli.model_config import RopeScaling

        divisors = torch.cat([block.float() for block in self._file.blocks(_ROPE_FACTORS)])
        factor = round(float(divisors.max()), 4)
        scaling = {
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        }  # fmt: skip
        if divisors.shape == (head_dim // 2,) and factor >= 1:
            base = self._number("rope.freq_base", 10000.0)
            angles = []
            for setting in (None, RopeScaling.model_validate(scaling)):
                spec = RopeSpec(dim=head_dim, base=base, layout="neox", max_position_embeddings=2, scaling=setting)
                angles.append(torch.asin(cos_sin_table(spec, 2)[1, head_dim // 2 :].double()))
            if torch.allclose(angles[0] / angles[1], divisors.double(), rtol=1e-3):
                return scaling
        raise UnsupportedError(
            f"the rotary divisors in {_ROPE_FACTORS} are not those of a Llama 3 model",
            where=str(self.path),
            fix="convert the model's Hugging Face snapshot instead",
        )

    def _refuse_unread(self) -> None:
        prefix = f"{self.architecture}."
        for name, value in self._fields.items():
            key = name.removeprefix(prefix)
            if key == name or name in self._read or key in _WITHOUT_EFFECT or value in _NEUTRAL.get(key, ()):
                continue
            raise UnsupportedError(
                f"the metadata field `{name}` is {value!r}, which cannot be honoured", where=str(self.path),
                fix="convert the model's Hugging Face snapshot instead",
            )  # fmt: skip


def hf_name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor; the name itself where there is none."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _NAMES:
        return name
    layer = f"model.layers.{match[1]}." if match[1] is not None else ""
    return f"{layer}{_NAMES[match[2]]}.{match[3]}"
