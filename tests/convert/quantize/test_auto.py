"""Formats by layer: the budget is kept, bits go where they help, and the estimate is of the right size."""

import pytest
import torch

from tests.tiny_configs import config, random_weights
from trtllm_cli.convert.quantize.auto import Choice, auto_quantize, fisher_information, within_budget
from trtllm_cli.convert.quantize.formats import linears
from trtllm_cli.errors import UsageError
from trtllm_cli.evaluate.program import Program
from trtllm_cli.models import trace_model
from trtllm_cli.quant_config import LayerQuant

FP8, INT4 = LayerQuant(quant_algo="FP8"), LayerQuant(quant_algo="W4A16")


def choices(low, middle):
    return [Choice(None, 16.0, 0.0), Choice(FP8, 8.0, middle), Choice(INT4, 4.0, low)]


def test_bits_go_where_they_help():
    options = {"a": choices(1.0, 0.1), "b": choices(0.01, 0.001), "c": choices(1.0, 0.9)}
    sizes = {"a": 100, "b": 100, "c": 100}

    def picked(bits):
        return {name: choice.bits for name, choice in within_budget(options, sizes, bits).items()}

    assert picked(4.0) == {"a": 4.0, "b": 4.0, "c": 4.0}
    assert picked(5.4) == {"a": 8.0, "b": 4.0, "c": 4.0}
    assert picked(9.4) == {"a": 8.0, "b": 4.0, "c": 16.0}  # 8 bits help c little: no step of its own
    assert picked(16.0) == {"a": 16.0, "b": 16.0, "c": 16.0}
    with pytest.raises(UsageError, match="at least 4.00"):
        within_budget(options, sizes, 3.5)


@pytest.fixture(scope="module")
def model():
    c = config("llama")
    graph = trace_model(c, c.mapping.ranks[0])
    weights = random_weights(graph)
    windows = torch.randint(0, 96, (4, 16), generator=torch.Generator().manual_seed(0))
    return c, Program(graph, weights.__getitem__), windows


def test_fisher_information_foretells_the_divergence(model):
    """Noise on one layer's outputs: half its squares times the information is about the KL that it causes."""
    _, program, _windows = model
    name = "transformer.layers.1.mlp.proj"
    many = torch.randint(0, 96, (40, 16), generator=torch.Generator().manual_seed(1))
    information = fisher_information(program, many, [name])[name]
    noise = 0.05
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        wanted = program(many).double().log_softmax(-1)
        hook = program.linears[name].register_forward_hook(
            lambda _, __, y: y + noise * torch.randn(y.shape, generator=random)
        )
        got = program(many).double().log_softmax(-1)
        hook.remove()
    kl = float((wanted.exp() * (wanted - got)).sum(-1).mean())
    estimate = float(information.sum()) * noise**2 / 2
    assert 0.6 < estimate / kl < 1.7


def test_auto_quantize(model):
    c, program, windows = model
    known = linears(c)

    def made(bits):
        return auto_quantize(program, windows, known, ("int4_awq", "fp8"), bits)

    six, nine = made(6.5), made(9.0)
    assert six.bits <= 6.5
    assert 6.5 < nine.bits <= 9.0
    assert 0 < nine.loss < six.loss
    assert set(six.counts) >= {"FP8", "W4A16_AWQ"}
    assert all(name in six.quantized.calibration.layers for name in six.quantized.config.quantized_layers)
    assert "lm_head" not in six.quantized.config.quantized_layers
