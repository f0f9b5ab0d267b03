"""Snapshots that are quantized already: which format one has, by its config.json or hf_quant_config.json."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm_cli.artifact import read_json
from trtllm_cli.convert.families.fields import Fields
from trtllm_cli.errors import SnapshotError, UnsupportedError

if TYPE_CHECKING:
    from trtllm_cli.convert.prequantized.scheme import Scheme

MODELOPT_CONFIG = "hf_quant_config.json"
_METHODS = "awq, gptq, compressed-tensors, fp8, fbgemm_fp8, modelopt, mxfp4 (gpt-oss)"
# What else config.json may name, and what to do instead.
_REFUSED = {
    "bitsandbytes": (
        "its weights are made when a model is loaded, in a layout that only it reads",
        "convert the model that it was made from; --qformat int4_wo or int8_wo takes as little memory",
    ),
}


def find_scheme(path: Path, config: dict[str, Any]) -> tuple[Scheme, str] | None:
    """The format of a quantized snapshot directory and its name, None of a plain one.

    Raises UnsupportedError for one that is not known.
    """
    modelopt = path / MODELOPT_CONFIG
    if modelopt.is_file():
        return _modelopt(read_json(modelopt, SnapshotError), modelopt), "modelopt"
    data, where = config.get("quantization_config"), path / "config.json"
    if data is None:
        data = config.get("compression_config")
    if data is None:
        return None
    if not isinstance(data, dict):
        raise SnapshotError("field `quantization_config` should be an object", where=str(where))
    fields = Fields(data, where, "quantization_config.")
    method = str(fields.text("quant_method", ""))
    match method:
        case "gptq":
            from trtllm_cli.convert.prequantized.gptq import Gptq

            return Gptq(fields), method
        case "awq":
            from trtllm_cli.convert.prequantized.awq import Awq

            return Awq(fields), method
        case "compressed-tensors":
            from trtllm_cli.convert.prequantized.compressed_tensors import CompressedTensors

            return CompressedTensors(fields), method
        case "fp8" | "fbgemm_fp8":
            from trtllm_cli.convert.prequantized.float8 import Float8

            return Float8(fields), method
        case "modelopt" | "modelopt_fp4":
            return _modelopt(data, where), method
        case "mxfp4":
            return None  # experts only, and no linears: mxfp4.py
        case _:
            why, fix = _REFUSED.get(method, (f"known are {_METHODS}", "convert the unquantized model"))
            raise UnsupportedError(
                f"the snapshot is quantized by {method or 'an unnamed method'}: {why}",
                where=f"{where}: quantization_config.quant_method",
                fix=fix,
            )


def _modelopt(data: dict[str, Any], where: Path) -> Scheme:
    from trtllm_cli.convert.prequantized.modelopt import ModelOpt

    inner = data.get("quantization", data)
    if not isinstance(inner, dict):
        raise SnapshotError("field `quantization` should be an object", where=str(where))
    return ModelOpt(Fields(inner, where, "quantization."))
