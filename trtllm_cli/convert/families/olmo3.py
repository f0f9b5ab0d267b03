"""OLMo 3: OLMo 2 with a sliding window in three layers of four, where rotary scaling does not apply."""

from __future__ import annotations

from typing import Any

from trtllm_cli.convert.families.family import Family, read_windows
from trtllm_cli.convert.families.fields import Fields
from trtllm_cli.convert.families.olmo2 import OLMO2_TENSORS, read_olmo2
from trtllm_cli.convert.families.rope import read_layered_rope

_THETA = 500_000.0


def _read(fields: Fields) -> dict[str, Any]:
    if fields.has("rope_local_base_freq"):
        raise fields.unsupported("rope_local_base_freq", "Olmo3ForCausalLM has no such field")
    # transformers gives sliding layers the default where rope_theta stands outside of rope_parameters
    fields.fill({"sliding_window": 4096, "rope_theta": _THETA, "rope_local_base_freq": _THETA})
    config = read_olmo2(fields, read_layered_rope)
    return {**config, **read_windows(fields, config["num_hidden_layers"], 4)}


FAMILY = Family("Olmo3ForCausalLM", "olmo3", _read, tensors=OLMO2_TENSORS)
