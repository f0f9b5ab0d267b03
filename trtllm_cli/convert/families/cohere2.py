"""Command-R7B: Command-R with three sliding layers to each full one, which has no positions."""

from __future__ import annotations

from typing import Any

from trtllm_cli.convert.families.cohere import COHERE_WITHOUT_EFFECT, read_cohere
from trtllm_cli.convert.families.family import Family, read_windows
from trtllm_cli.convert.families.fields import Fields


def _read(fields: Fields) -> dict[str, Any]:
    fields.fill({"sliding_window": 4096, "sliding_window_pattern": 4})
    config, pattern = read_cohere(fields), fields.integer("sliding_window_pattern")
    return {**config, **read_windows(fields, config["num_hidden_layers"], pattern)}


FAMILY = Family("Cohere2ForCausalLM", "cohere2", _read, without_effect=COHERE_WITHOUT_EFFECT)
