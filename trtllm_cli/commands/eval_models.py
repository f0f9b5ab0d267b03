"""What `trtllm eval` measures: a checkpoint or an engine, opened."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_cli.artifact import detect, human_bytes
from trtllm_cli.errors import ArtifactError, ResourceError, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from trtllm_cli.checkpoint import Checkpoint
    from trtllm_cli.engine import Engine
    from trtllm_cli.evaluate.program import Program
    from trtllm_cli.evaluate.scoring import Scorer
    from trtllm_cli.model_config import ModelConfig


@dataclass(frozen=True)
class Compute:
    """How checkpoints are computed, and engines run."""

    device: str  # "cpu", "cuda"
    dtype: str
    num_threads: int | None

    @classmethod
    def of(cls, device: str, dtype: str, num_threads: int | None) -> Compute:
        """Of the flags; "auto" is a GPU where there is one. Raises UsageError for what there is not."""
        import torch

        if device not in ("auto", "cpu", "cuda"):
            raise UsageError(f"--device is {device!r}", where="--device", fix="choose auto, cpu or cuda")
        if dtype not in ("float32", "bfloat16", "float16"):
            raise UsageError(f"--dtype is {dtype!r}", where="--dtype", fix="choose float32, bfloat16 or float16")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        elif device == "cuda" and not torch.cuda.is_available():
            raise UsageError("torch sees no CUDA device", where="--device", fix="--device cpu")
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        return cls(device, dtype, num_threads)


@dataclass(frozen=True)
class Model:
    """A checkpoint or an engine whose config is read."""

    path: Path
    artifact: Checkpoint | Engine

    @classmethod
    def open(cls, path: Path) -> Model:
        """Raises ArtifactError for anything else."""
        kind = detect(path)
        if kind == "engine":
            from trtllm_cli.engine import Engine

            return cls(path, Engine.open(path))
        if kind != "checkpoint":
            raise ArtifactError(
                f"{path} is a {'GGUF file' if kind == 'gguf' else kind}; checkpoints and engines are evaluated",
                fix=f"trtllm convert {path} --output-dir ckpt",
            )
        from trtllm_cli.checkpoint import Checkpoint

        return cls(path, Checkpoint.open(path))

    @property
    def name(self) -> str:
        """For people."""
        return self.path.resolve().name

    @property
    def checkpoint(self) -> Checkpoint | None:
        """It, unless it is an engine."""
        from trtllm_cli.checkpoint import Checkpoint

        return self.artifact if isinstance(self.artifact, Checkpoint) else None

    @property
    def config(self) -> ModelConfig:
        """The model's."""
        from trtllm_cli.engine import Engine

        return self.artifact.config.pretrained_config if isinstance(self.artifact, Engine) else self.artifact.config

    @property
    def longest(self) -> int:
        """Tokens of the longest window that it can compute."""
        from trtllm_cli.engine import Engine
        from trtllm_cli.kernels.rope_spec import RopeSpec

        limit = RopeSpec.of(self.config).max_prompt_len or self.config.max_position_embeddings
        if isinstance(self.artifact, Engine):
            return min(limit, self.artifact.config.build_config.max_seq_len)
        return limit

    @property
    def weight_bytes(self) -> int:
        """Of the rank files."""
        ranks = self.config.mapping.ranks
        return sum(self.artifact.rank_file(rank).stat().st_size for rank in ranks)

    def tokenizer(self, directory: Path | None) -> Tokenizer:
        """The tokenizer in `directory`, or its own."""
        from trtllm_cli.evaluate.text import load_tokenizer

        return load_tokenizer(directory or self.artifact.tokenizer_dir, self.config.vocab_size)

    def program(self, compute: Compute) -> Program:
        """A checkpoint, loaded. Raises ResourceError where it cannot fit into memory."""
        import torch

        from trtllm_cli.evaluate.whole_model import program_of

        checkpoint = self.checkpoint
        assert checkpoint is not None
        if compute.device == "cpu":
            _check_memory(checkpoint, compute.dtype)
        checkpoint.verify()
        return program_of(checkpoint, getattr(torch, compute.dtype), compute.device)

    @contextmanager
    def scorer(self, compute: Compute) -> Iterator[Scorer]:
        """Either, as something that predicts tokens."""
        from trtllm_cli.engine import Engine
        from trtllm_cli.evaluate.scoring import ProgramScorer
        from trtllm_cli.run.scorer import EngineScorer

        if not isinstance(self.artifact, Engine):
            yield ProgramScorer(self.program(compute))
            return
        scorer = EngineScorer.open(self.artifact, compute.num_threads)
        try:
            yield scorer
        finally:
            scorer.close()


def _check_memory(checkpoint: Checkpoint, dtype: str) -> None:
    """Every weight is held in `dtype`, whatever the checkpoint stores it in."""
    from trtllm_cli.evaluate.whole_model import whole_graph
    from trtllm_cli.run.kv_budget import available_memory
    from trtllm_cli.tensor_file import ITEMSIZE

    packed = {"uint8": 2}  # two numbers to a byte
    numbers = sum(math.prod(w.shape) * packed.get(w.dtype, 1) for w in whole_graph(checkpoint.config).weights.values())
    needed, free = numbers * ITEMSIZE[dtype], available_memory()
    if free is not None and needed > free:
        raise ResourceError(
            f"{checkpoint.path} takes {human_bytes(needed)} as {dtype}, {human_bytes(free)} of memory is free",
            where="--dtype",
            fix="--dtype bfloat16 takes half" if dtype == "float32" else "free some memory, or use a larger machine",
        )


def check_same_vocabulary(a: Model, b: Model, tokenizer_dir: Path | None) -> None:
    """Raises UsageError unless a token id means the same to both."""
    sizes = (a.config.vocab_size, b.config.vocab_size)
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"the vocabularies differ: {a.path} has {sizes[0]} tokens, {b.path} has {sizes[1]}",
            fix="compare a model with what was made of it",
        )
    if tokenizer_dir is not None or None in (a.artifact.tokenizer_dir, b.artifact.tokenizer_dir):
        return
    if a.tokenizer(None).get_vocab() != b.tokenizer(None).get_vocab():
        raise UsageError(
            f"the vocabularies differ: the tokenizers of {a.path} and {b.path} give the same ids to other tokens",
            fix="compare a model with what was made of it",
        )
