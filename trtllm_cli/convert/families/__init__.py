"""What convert knows of each architecture family: one file each, and the registry, a table of strings."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from trtllm_cli.convert.families.family import Family
from trtllm_cli.errors import SnapshotError, UnsupportedError

# Architecture (an entry of config.json's `architectures`) -> module here that holds its FAMILY.
FAMILIES = {
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "FalconForCausalLM": "falcon",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3_conditional",
    "GPT2LMHeadModel": "gpt2",
    "GPTJForCausalLM": "gptj",
    "GPTNeoXForCausalLM": "gpt_neox",
    "GptOssForCausalLM": "gpt_oss",
    "CohereForCausalLM": "cohere",
    "Cohere2ForCausalLM": "cohere2",
    "GraniteForCausalLM": "granite",
    "Olmo2ForCausalLM": "olmo2",
    "Olmo3ForCausalLM": "olmo3",
    "LlamaForCausalLM": "llama",
    "Phi3ForCausalLM": "phi3",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "StableLmForCausalLM": "stablelm",
    "Starcoder2ForCausalLM": "starcoder2",
}


def family_of(config: dict[str, Any], path: Path) -> Family:
    """The family of a snapshot's config. Raises UnsupportedError for an architecture that nothing here knows."""
    architectures, model_type = config.get("architectures"), config.get("model_type")
    if architectures is None:
        matches = [f for name in FAMILIES if (f := family(name)).model_type == model_type]
        if not matches:
            raise SnapshotError(
                "the field `architectures` is missing", where=str(path), fix='add it, such as ["LlamaForCausalLM"]'
            )
        return matches[0]
    if not isinstance(architectures, list) or len(architectures) != 1 or not isinstance(architectures[0], str):
        raise SnapshotError(
            f"field `architectures` should be a list of one name, found {architectures!r}", where=str(path)
        )
    (name,) = architectures
    if name not in FAMILIES:
        raise UnsupportedError(
            f"the architecture {name} is not supported",
            where=f"{path}: architectures",
            fix=f"supported: {', '.join(FAMILIES)}",
        )
    found = family(name)
    if model_type is not None and model_type != found.model_type:
        raise UnsupportedError(
            f"the architecture is {name}, but model_type is {model_type!r} instead of {found.model_type!r}",
            where=f"{path}: model_type",
            fix="convert the snapshot as its publisher wrote it",
        )
    return found


def family(architecture: str) -> Family:
    """The family that FAMILIES names for this architecture."""
    found = importlib.import_module(f"trtllm_cli.convert.families.{FAMILIES[architecture]}").FAMILY
    assert isinstance(found, Family)
    return found
