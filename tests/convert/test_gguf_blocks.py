"""GGUF's blocks as our groups: the numbers that gguf's own dequantization gives."""

import gguf
import numpy as np
import pytest
import torch

from tests.convert.gguf_maker import write_model
from tests.tiny_models import tiny_model
from trtllm_cli.checkpoint import Checkpoint
from trtllm_cli.convert.gguf_blocks import LAYERS, unpack
from trtllm_cli.convert.pipeline import ConvertOptions, convert
from trtllm_cli.convert.source_weight import dequantize_rows
from trtllm_cli.errors import UsageError


@pytest.mark.parametrize("kind", LAYERS, ids=lambda k: k.name)
def test_blocks_keep_their_numbers(kind):
    weight = np.random.default_rng(0).standard_normal((5, 96), dtype=np.float32)
    weight[1] = 0.0
    weight[2, :32] = 0.75  # a block of equal numbers
    weight[3, 32:64] = -0.75
    raw = gguf.quantize(weight, kind)
    parts = unpack(bytearray(raw.tobytes()), 5, kind)
    got, want = dequantize_rows(LAYERS[kind], parts, {}), torch.from_numpy(gguf.dequantize(raw, kind).copy())
    if kind == gguf.GGMLQuantizationType.Q4_1:  # its zero is m / d, and comes back as m within float32's rounding
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        assert torch.equal(got[2, :32], want[2, :32])
    else:
        assert torch.equal(got, want)


SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_key_value_heads": 4}


def tensors(path):
    checkpoint = Checkpoint.open(path)
    with checkpoint.tensors(checkpoint.config.mapping.ranks[0]) as file:
        return checkpoint.config, {
            n: torch.frombuffer(file.read(n), dtype=getattr(torch, i.dtype)).view(i.shape)
            for n, i in file.tensors.items()
        }


@pytest.mark.parametrize("kind", LAYERS, ids=lambda k: k.name)
def test_a_files_weights_are_kept_its_tied_head_included(tmp_path, kind):
    write_model(tmp_path / "m.gguf", tiny_model("llama", **SHAPE, tie_word_embeddings=True), kind=kind)
    convert(tmp_path / "m.gguf", tmp_path / "plain", ConvertOptions(dtype="float32"))
    convert(tmp_path / "m.gguf", tmp_path / "kept", ConvertOptions(dtype="float32", keep_quantized=True))
    (_, plain), (config, kept) = tensors(tmp_path / "plain"), tensors(tmp_path / "kept")
    linears = [n for n in plain if n.endswith(".weight") and "norm" not in n and "ln_f" not in n and "embed" not in n]
    for name in [*linears, "lm_head.weight"]:
        module = name.removesuffix(".weight")
        layer = config.quantization.layer_quant(module)
        parts = {n.rpartition(".")[2]: t for n, t in kept.items() if n.startswith(f"{module}.")}
        want = plain.get(name, plain["transformer.vocab_embedding.weight"])
        torch.testing.assert_close(dequantize_rows(layer, parts, {}), want, rtol=1e-6, atol=1e-6)
    assert torch.equal(kept["transformer.vocab_embedding.weight"], plain["transformer.vocab_embedding.weight"])


def test_a_file_without_such_weights_has_nothing_to_keep(tmp_path):
    write_model(tmp_path / "m.gguf", tiny_model("llama", **SHAPE))
    with pytest.raises(UsageError, match="no weights that can be kept"):
        convert(tmp_path / "m.gguf", tmp_path / "ckpt", ConvertOptions(keep_quantized=True))
    assert not (tmp_path / "ckpt").exists()
