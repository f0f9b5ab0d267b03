"""A source without weights: a config.json, and random numbers in place of the tensors that its family would have.

For measuring speed, which depends on a model's shape and hardly on its numbers. `shapes/` has the config.json of some
published models by name.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_cli.artifact import read_json, validate
from trtllm_cli.convert.families import family_of
from trtllm_cli.convert.families.fields import Fields
from trtllm_cli.convert.hf_reader import named_dtype
from trtllm_cli.convert.options import RandomWeights
from trtllm_cli.convert.plan import source_of, source_shapes, whole_weights
from trtllm_cli.convert.reader import Reader
from trtllm_cli.errors import SnapshotError, UnsupportedError, UsageError
from trtllm_cli.model_config import ModelConfig
from trtllm_cli.tensor_file import TensorInfo

if TYPE_CHECKING:
    import torch

STD = 0.02  # standard deviation of the weights, as most models are initialized
POOL = (1 << 24) - 3  # numbers: a prime, so that no width of a matrix divides it and rows do not come again soon
_LAYER_COUNTS = ("num_hidden_layers", "n_layer")
_SHAPES = Path(__file__).parent / "shapes"


def shape_names() -> list[str]:
    """The models whose config.json is here."""
    return sorted(path.stem for path in _SHAPES.glob("*.json"))


def find_shape(name: str) -> Path:
    """The config.json of a model by its name here, or the path of one, or of a snapshot directory.

    Raises UsageError that lists the names.
    """
    if name.lower() in shape_names():
        return _SHAPES / f"{name.lower()}.json"
    path = Path(name).expanduser()
    if (path.suffix == ".json" and path.is_file()) or (path / "config.json").is_file():
        return path
    raise UsageError(
        f"no model shape is called {name!r}, and there is no config.json",
        where="--random-weights",
        fix=f"give the path of a config.json or of a directory with one, or one of {', '.join(shape_names())}",
    )


class RandomReader(Reader):
    """A config.json with weights made up: normal with standard deviation STD, a norm's weights around one.

    Random are POOL numbers, drawn once from the seed. A tensor is a run of them, around and around, that begins at a
    place which its name gives. So its rows are made for the price of a copy, whichever are asked for and in whatever
    order, and the same for the same seed everywhere; but tensors of more than POOL numbers repeat, and any two overlap.
    """

    def __init__(self, path: Path, random: RandomWeights) -> None:
        import numpy as np
        import torch

        self.path, self.config_path = path, path / "config.json" if path.is_dir() else path
        self.config = _shortened(read_json(self.config_path, SnapshotError), random.num_layers, self.config_path)
        if self.config.get("quantization_config") is not None:
            raise UnsupportedError(
                "the config's weights are quantized; random ones are made plain",
                where=f"{self.config_path}: quantization_config",
                fix="take the field out of a copy of config.json, and choose a --qformat",
            )
        dtype = self.default_dtype()
        self.tensors: dict[str, TensorInfo] = {}
        self._centers: dict[str, float] = {}  # of the tensors that are not around 0
        self._declare_tensors(dtype)
        drawn = np.random.default_rng(random.seed).standard_normal(POOL, dtype=np.float32)
        self._pool = torch.from_numpy(drawn).mul_(STD).to(getattr(torch, dtype))
        self.largest = float(self._pool.abs().max())  # magnitude of a weight

    def _declare_tensors(self, dtype: str) -> None:
        family = family_of(self.config, self.config_path)
        fields = family.config_fields(Fields(self.config, self.config_path)) | {"dtype": dtype}
        model = validate(ModelConfig, fields, self.config_path, SnapshotError)
        for ours, weight in whole_weights(model).items():
            source = source_of(family, ours, model, tied=model.share_embedding_table)
            for name, shapes in zip(source.names, source_shapes(source, weight, model), strict=True):
                self.tensors[name] = TensorInfo(dtype, shapes[0])
                if len(weight.shape) == 1 and ours.endswith(".weight"):  # a norm's, the only vectors of this name
                    self._centers[name] = 1.0 - source.plus

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See Reader. Where it can be, a view of the pool: not to be written to."""
        import torch

        shape = self.tensors[name].shape
        width = shape[-1:] if len(shape) > 1 else ()
        first = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) + start * math.prod(width)
        left = (stop - start) * math.prod(width)
        runs = []
        while left:
            first %= POOL
            runs.append(self._pool[first : first + left])
            first, left = first + len(runs[-1]), left - len(runs[-1])
        made = (runs[0] if len(runs) == 1 else torch.cat(runs)).reshape(stop - start, *width)
        return made + self._centers[name] if name in self._centers else made

    def write_tokenizer(self, directory: Path) -> list[str]:  # noqa: ARG002 - the protocol's
        """There is none."""
        return []

    def default_dtype(self) -> str:
        """The config's dtype, or else bfloat16."""
        return named_dtype(self.config, self.config_path) or "bfloat16"

    def close(self) -> None:
        """Nothing is open."""


def _shortened(config: dict[str, Any], num_layers: int | None, path: Path) -> dict[str, Any]:
    """The config with only so many layers. Raises UsageError where it has fewer, or does not say how many."""
    if num_layers is None:
        return config
    if isinstance(text := config.get("text_config"), dict):  # of a model with eyes
        return {**config, "text_config": _shortened(text, num_layers, path)}
    field = next((name for name in _LAYER_COUNTS if isinstance(config.get(name), int)), None)
    if field is None or not 1 <= num_layers <= config[field]:
        found = f"the model has {config[field]}" if field else f"{path} does not say how many the model has"
        raise UsageError(
            f"--num-layers is {num_layers}, and {found}", where="--num-layers", fix="give from 1 to what it has"
        )
    short = {**config, field: num_layers}
    if isinstance(types := config.get("layer_types"), list):
        short["layer_types"] = types[:num_layers]
    return short
