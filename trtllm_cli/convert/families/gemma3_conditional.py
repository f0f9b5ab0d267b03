"""Gemma 3 with eyes, 4B and larger: the text model of a snapshot that has a vision tower, too."""

from __future__ import annotations

from typing import Any

from trtllm_cli.convert.families.family import COMPUTED_BUFFERS, NEUTRAL, WITHOUT_EFFECT, Family
from trtllm_cli.convert.families.fields import Fields
from trtllm_cli.convert.families.gemma2 import GEMMA_TENSORS
from trtllm_cli.convert.families.gemma3 import read_gemma3


def _read(fields: Fields) -> dict[str, Any]:
    text = fields.table("text_config")
    if text is None:
        raise fields.wrong("text_config", "an object with the text model's fields")
    config = read_gemma3(text)
    text.refuse_unread(WITHOUT_EFFECT, NEUTRAL)
    if fields.flag("tie_word_embeddings", True) != config["share_embedding_table"]:
        raise fields.unsupported("tie_word_embeddings", "text_config says otherwise")
    return config


FAMILY = Family(
    "Gemma3ForConditionalGeneration",
    "gemma3",
    _read,
    GEMMA_TENSORS,
    leftovers=(
        *COMPUTED_BUFFERS,
        *(f"{prefix}{part}.*" for prefix in ("", "model.") for part in ("vision_tower", "multi_modal_projector")),
    ),
    renames=(
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^(language_model\.model|model\.language_model)\.", "model."),
    ),
    without_effect=frozenset(
        {
            "vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index",
            "boi_token_id", "eoi_token_id", "image_token_id",
        }
    ),
    note="the snapshot's vision tower was left out: the checkpoint is of the text model, and takes no images",
)  # fmt: skip
