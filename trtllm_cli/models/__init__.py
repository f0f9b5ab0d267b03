"""The model families: one file each, written against functional.py. Tracing one gives the Graph of a rank."""

from __future__ import annotations

import importlib
import runpy
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_cli.errors import UnsupportedError, UsageError
from trtllm_cli.functional import Trace, trace
from trtllm_cli.graph import Graph

if TYPE_CHECKING:
    from trtllm_cli.mapping import Rank
    from trtllm_cli.model_config import ModelConfig

# A model records its ops and returns its graph: `define(t, config, rank) -> t.finish(...)`.
Define = Callable[[Trace, "ModelConfig", "Rank"], Graph]

# Architecture (a checkpoint's `architecture`) -> module that defines it.
MODELS = {
    "DeepseekV2ForCausalLM": "deepseek",
    "DeepseekV3ForCausalLM": "deepseek",
    "FalconForCausalLM": "falcon",
    "Gemma2ForCausalLM": "gemma",
    "Gemma3ForCausalLM": "gemma",
    "Gemma3ForConditionalGeneration": "gemma",  # its text model
    "GPT2LMHeadModel": "gpt2",
    "GPTJForCausalLM": "gptj",
    "GPTNeoXForCausalLM": "gpt_neox",
    "GptOssForCausalLM": "gpt_oss",
    "CohereForCausalLM": "cohere",
    "Cohere2ForCausalLM": "cohere",
    "GraniteForCausalLM": "granite",
    "Olmo2ForCausalLM": "olmo2",
    "Olmo3ForCausalLM": "olmo2",
    "LlamaForCausalLM": "llama",
    "Phi3ForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "llama",
    "Qwen2MoeForCausalLM": "mixtral",
    "Qwen3ForCausalLM": "llama",
    "Qwen3MoeForCausalLM": "mixtral",
    "StableLmForCausalLM": "stablelm",
    "Starcoder2ForCausalLM": "starcoder2",
}


def trace_model(config: ModelConfig, rank: Rank, define: Define | None = None) -> Graph:
    """The graph of one rank. Raises UnsupportedError for an architecture that nothing defines."""
    if define is None:
        if config.architecture not in MODELS:
            raise UnsupportedError(
                f"the architecture {config.architecture} is not supported",
                where="config.json: architecture",
                fix=f"supported: {', '.join(MODELS)}; or define it yourself and pass --model-file",
            )
        module = importlib.import_module(f"trtllm_cli.models.{MODELS[config.architecture]}")
        _refuse_unhonoured(config, module.HONOURS)
        define = module.define
    with trace(f"{config.architecture}.rank{rank.rank}") as t:
        return define(t, config, rank)


# Settings that change what a model computes and that not every family has: a family's module names those that it reads
# in HONOURS, and a checkpoint that sets another is refused.
_SETTINGS = (
    "rope_local_base_freq", "norm_bias", "lm_head_bias", "attn_logit_softcapping", "final_logit_softcapping",
    "embedding_multiplier", "attention_multiplier", "residual_multiplier", "output_multiplier_scale",
    "parallel_residual", "moe", "mla", "qk_layernorm", "attn_bias", "dense_bias", "mlp_bias", "sliding_window",
    "rotary_scaling", "scale_attn_by_inverse_layer_idx", "parallel_norms",
)  # fmt: skip


def _refuse_unhonoured(config: ModelConfig, honours: frozenset[str]) -> None:
    for name in _SETTINGS:
        value = getattr(config, name)
        if name not in honours and value != type(config).model_fields[name].default:
            raise UnsupportedError(
                f"`{name}` is {value!r}, which {config.architecture} does not have here",
                where=f"config.json: {name}",
                fix="see that the config belongs to the model, or define the model yourself and pass --model-file",
            )


def load_model_file(path: Path) -> Define:
    """The `define` function of a user's own model file. Runs the file: it is code, named by the user."""
    if not path.is_file():
        raise UsageError(f"no such file: {path}", where="--model-file")
    try:
        define = runpy.run_path(str(path)).get("define")
    except Exception as e:
        raise model_file_error(e, path) from e
    if not callable(define):
        raise UsageError(f"{path} has no function `define(t, config, rank)`", where="--model-file")
    return define


def model_file_error(e: Exception, path: Path | None) -> UsageError:
    """What a user's own model file raised, and the line of it where that happened."""
    lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if path and f.filename == str(path)]
    if isinstance(e, SyntaxError):
        lines = [e.lineno]
    line = f", line {lines[-1]}" if lines and lines[-1] else ""
    return UsageError(
        f"the model file fails: {type(e).__name__}: {e.args[0] if e.args else e}",
        where=f"--model-file {path}{line}",
        fix="mend the file; --debug shows the traceback",
    )
