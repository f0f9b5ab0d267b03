"""A GGUF file as if it were a Hugging Face snapshot: its metadata as a config, its tensors under HF's names.

llama.cpp's converter renames tensors, and for Llama permutes the rows of q and k, because its rotary embedding turns
neighbours where Hugging Face's turns halves; to Gemma's norms it adds one. All of it is undone here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_cli.convert.gguf_architectures import ARCHITECTURES
from trtllm_cli.convert.gguf_file import GgufFile
from trtllm_cli.convert.gguf_metadata import Metadata
from trtllm_cli.convert.gguf_tokenizer import GgufTokenizer
from trtllm_cli.convert.reader import Reader
from trtllm_cli.convert.source_weight import PlainWeight, SourceWeight
from trtllm_cli.errors import SnapshotError, UnsupportedError
from trtllm_cli.tensor_file import TensorInfo

if TYPE_CHECKING:
    import torch

_ROPE_FACTORS = "rope_freqs.weight"


class GgufReader(Reader):
    """A GGUF file, under Hugging Face's names."""

    def __init__(self, path: Path) -> None:
        self.path = self.config_path = path
        self._file = GgufFile(path)
        try:
            self._fields = self._file.metadata
            self._metadata = Metadata(path, self._fields)
            name = self._metadata.architecture
            if name not in ARCHITECTURES:
                raise UnsupportedError(
                    f"GGUF files of the architecture {name!r} are not supported",
                    where=f"{path}: general.architecture",
                    fix=f"supported: {', '.join(ARCHITECTURES)}",
                )
            self.architecture = ARCHITECTURES[name]
            if self._fields.get("split.count", 1) not in (0, 1):
                raise UnsupportedError(
                    "the GGUF file is one of several parts",
                    where=f"{path}: split.count",
                    fix="join the parts first: llama-gguf-split --merge",
                )
            self._gguf_names: dict[str, str] = {}
            self._first_rows: dict[str, int] = {}  # of one expert's weight, in the tensor that all share
            self.tensors: dict[str, TensorInfo] = {}
            for name in self._file.tensors:
                if name != _ROPE_FACTORS:
                    self._add(hf_name(name, self.architecture.names), name)
            self.config = self._config()
            self._metadata.refuse_unread()
        except BaseException:
            self.close()
            raise

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows as Hugging Face orders them."""
        if self.architecture.norms_plus_one and name.split(".")[-2].endswith("norm"):
            return self._file.rows(self._gguf_names[name], start, stop).float() - 1
        first = self._first_rows.get(name, 0)
        return self._in_order(name, partial(self._file.rows, self._gguf_names[name]), first + start, first + stop)

    def weight(self, name: str) -> SourceWeight:
        """See Reader. Blocks that are like our groups can be had as they are."""
        from trtllm_cli.convert.gguf_blocks import LAYERS, BlockWeight

        layer = LAYERS.get(self._file.tensors[self._gguf_names[name]].kind)
        if layer is None or len(self.tensors[name].shape) != 2:
            return PlainWeight(self, name)
        return BlockWeight(self, name, layer)

    def part_rows(self, name: str, part: str, start: int, stop: int) -> torch.Tensor:
        """Rows of one part of a BlockWeight, as Hugging Face orders them."""
        stored, first = self._gguf_names[name], self._first_rows.get(name, 0)
        return self._in_order(name, lambda a, b: self._file.parts(stored, a, b)[part], first + start, first + stop)

    def _in_order(self, name: str, read: Callable[[int, int], torch.Tensor], start: int, stop: int) -> torch.Tensor:
        """What `read` gives for rows start..stop of Hugging Face's order."""
        head_dim = self._permuted_head(name)
        if head_dim is None:
            return read(start, stop)
        # whole heads, [heads, head_dim / 2, 2, ...]: neighbours; to halves
        first = start // head_dim * head_dim
        heads = read(first, -(-stop // head_dim) * head_dim)
        pairs = heads.unflatten(0, (-1, head_dim // 2, 2))
        return pairs.transpose(1, 2).reshape(heads.shape)[start - first : stop - first]

    def _permuted_head(self, name: str) -> int | None:
        """The height of a head, where the file has the rows of each in another order."""
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if not self.architecture.permuted or heads is None:
            return None
        rows, count = self.tensors[name].shape[0], self.config[heads]
        if rows % count or rows // count % 2:
            raise SnapshotError(f"tensor `{self._gguf_names[name]}` does not divide into heads", where=str(self.path))
        head_dim: int = rows // count
        return head_dim

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

    def _add(self, name: str, gguf_name: str) -> None:
        """Enters a tensor of the file; one of all experts, [experts, out, in], as a tensor of each."""
        from gguf import GGMLQuantizationType

        tensor = self._file.tensors[gguf_name]
        dtype, shape, names = "float16" if tensor.kind == GGMLQuantizationType.F16 else "float32", tensor.shape, [name]
        if "{e}" in name:
            experts = self._metadata.integer("expert_count")
            if len(shape) != 3 or shape[0] != experts:
                raise SnapshotError(f"tensor `{gguf_name}` is not one of {experts} experts", where=str(self.path))
            names, shape = [name.replace("{e}", str(e)) for e in range(experts)], shape[1:]
            self._first_rows |= {each: e * shape[0] for e, each in enumerate(names)}
        self._gguf_names |= dict.fromkeys(names, gguf_name)
        self.tensors |= dict.fromkeys(names, TensorInfo(dtype, shape))

    def _config(self) -> dict[str, Any]:
        m = self._metadata
        heads, hidden = m.integer("attention.head_count"), m.integer("embedding_length")
        head_dim = m.integer("attention.key_length", hidden // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if m.integer(key, head_dim) != head_dim:
                raise m.unsupported(key, f"heads are {head_dim} wide")
        if "model.embed_tokens.weight" not in self.tensors:
            raise SnapshotError("tensor `token_embd.weight` is missing", where=str(self.path))
        positions, (epsilon, norm_epsilon) = m.integer("context_length"), self.architecture.norm_epsilon
        config = {
            "architectures": [self.architecture.architecture],
            "model_type": self.architecture.model_type,
            "hidden_size": hidden,
            "intermediate_size": m.integer("feed_forward_length"),
            "num_hidden_layers": m.integer("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": m.integer("attention.head_count_kv", heads),
            "head_dim": head_dim,
            norm_epsilon: m.number(epsilon),
            "max_position_embeddings": positions,
            "vocab_size": self.tensors["model.embed_tokens.weight"].shape[0],
            "tie_word_embeddings": "lm_head.weight" not in self.tensors,
            "rope_theta": m.number("rope.freq_base", 10000.0),
            "rope_scaling": self._rope_scaling(head_dim, positions),
        }
        config |= {flag: tensor in self.tensors for flag, tensor in self.architecture.biases.items()}
        return config if self.architecture.more is None else config | self.architecture.more(m, config)

    def _rope_scaling(self, head_dim: int, positions: int) -> dict[str, Any] | None:
        kind = self._metadata.text("rope.scaling.type", "none")
        if _ROPE_FACTORS in self._file.tensors:
            if kind != "none":
                raise UnsupportedError(f"rotary scaling {kind!r} with {_ROPE_FACTORS}", where=str(self.path))
            return self._llama3_scaling(head_dim)
        match kind:
            case "none":
                return None
            case "linear":
                return {"rope_type": "linear", "factor": self._metadata.number("rope.scaling.factor")}
            case "yarn":
                scaling = {"rope_type": "yarn", "factor": self._metadata.number("rope.scaling.factor")}
                original = self._metadata.integer("rope.scaling.original_context_length", positions)
                return scaling | {"original_max_position_embeddings": original}
        raise self._metadata.unsupported("rope.scaling.type", "this scaling is not supported in GGUF files")

    def _llama3_scaling(self, head_dim: int) -> dict[str, Any]:
        """The settings of Llama 3.1's scaling, of which the file keeps only the divisor of each frequency.

        All published models share three of the four settings; the file's divisors must be what those give.
        """
        import torch

        from trtllm_cli.kernels.rope import RopeSpec, cos_sin_table
        from trtllm_cli.model_config import RopeScaling

        divisors = self._file.rows(_ROPE_FACTORS, 0, self._file.tensors[_ROPE_FACTORS].shape[-1]).float()
        factor = round(float(divisors.max()), 4)
        scaling = {
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        }  # fmt: skip
        if divisors.shape == (head_dim // 2,) and factor >= 1:
            base = self._metadata.number("rope.freq_base", 10000.0)
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


def hf_name(name: str, names: Mapping[str, str]) -> str:
    """Hugging Face's name of a GGUF tensor, by GgufArchitecture.names; the name itself where there is none."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in names:
        return name
    layer = f"model.layers.{match[1]}." if match[1] is not None else ""
    return f"{layer}{names[match[2]]}.{match[3]}"
