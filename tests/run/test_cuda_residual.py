"""The residual stream on the cuda backend: bfloat16 in large steps with prompts, float32 in all others."""

import numpy as np
import pytest

from tests.engines import build_engine, random_checkpoint
from tests.interpreter_device import fake_compile
from tests.run.test_cuda_backend import build_tiny, expected_logits, logits_of
from tests.run.test_cuda_families import FAMILIES, model
from tests.run.test_cuda_ranks import LIMITS, build, check, logits_of_parts
from tests.tiny_models import save_tiny_model
from trtllm_cli.build.backends import cuda as cuda_lowering
from trtllm_cli.build.backends import cuda_program, cuda_rows
from trtllm_cli.run.backends import cuda as cuda_runner
from trtllm_cli.run.backends.cuda_program import key_of
from trtllm_cli.run.communicator import SingleRank

MOST_WIDE = 3
# A prompt and a part of one; a step that is small enough, with a prompt, and its rest; sequences of one token.
STEPS = [
    {0: [1, 2, 3, 4, 5, 6, 7], 1: [9, 8]}, {0: [11], 1: [5, 4]}, {1: [3, 2, 1, 5, 6], 0: [4], 2: [7, 8]},
    {1: [3], 0: [4], 2: [6], 3: [9]}, {3: [5], 1: [2]},
]  # fmt: skip
# None of more tokens but decode steps: of four sequences, at last.
SMALL = [{0: [1, 2, 3]}, {1: [9, 8]}, {2: [7], 0: [5]}, {3: [6], 1: [4], 2: [3], 0: [2]}]


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    monkeypatch.setattr(cuda_lowering, "compile_kernels", fake_compile)
    monkeypatch.setattr(cuda_runner, "_GRAPH_STEP", 1)  # steps with prompts are as large as they are
    monkeypatch.setattr(cuda_rows, "_FEW", 2)


@pytest.fixture
def narrow(monkeypatch):
    """From here on engines are built whose large steps, with prompts, are narrow."""
    return lambda most=MOST_WIDE: monkeypatch.setattr(cuda_program, "_MOST_WIDE", most)


def engine_of(root, name):
    return build_engine(root / "ckpt", root / name, backend="cuda", kernels="auto", **LIMITS)


def plans(engine):
    """Each rank's, with kernels' sources for their places, and of arguments name, type and value."""
    for rank in engine.config.pretrained_config.mapping.ranks:
        with engine.tensors(rank) as file:
            plan = engine.plan(file)
        for step in plan["steps"]:
            for launch in {id(launch): launch for _, launches in step["ways"] for launch in launches}.values():
                if "kernel" in launch:
                    kernel = plan["kernels"][launch["kernel"]]
                    types = dict(kernel["source"]["args"])
                    launch["kernel"] = kernel["source"]
                    values = zip(kernel["names"], launch["args"], strict=True)
                    launch["args"] = {name: (types[name], value) for name, value in values}
        yield {**plan, "kernels": None}


def launches(plan, tokens, *, mixed):
    """Of a step, without what tells it from the others."""
    counts = dict.fromkeys(("num_tokens", "num_seqs", "num_logits", "num_prompts", "num_alone"), tokens)
    taken = zip(plan["steps"], key_of(plan["steps"], counts), strict=True)
    made = [launch for step, way in taken for launch in step["ways"][way][1]]
    other = "decode" if mixed else "mixed"
    return [{**launch, "when": ""} for launch in made if launch.get("when") != other]


def residual_types(made):
    """Of the residual stream, where an embedding, norms and gathers write and read it; of gathered queries too."""
    roles = {"embedding": ("out_ptr",), "rms_norm": ("residual_ptr", "new_residual_ptr"), "gather_rows": ("x_ptr",)}
    for launch in made:
        function, args = launch.get("kernel", {}).get("function"), launch.get("args", {})
        is_first = function == "rms_norm" and args["residual_ptr"][1] is None
        yield from (args[role][0] for role in (("x_ptr",) if is_first else roles.get(function, ())))


def test_logits_of_narrow_steps(tmp_path, narrow):
    """They are the reference's, and those of a stream that is float32 throughout."""
    wide, graph, weights = build_tiny(tmp_path, "llama", {"num_hidden_layers": 2})
    narrow()
    engine = engine_of(tmp_path, "narrow")
    found, others = logits_of(engine, STEPS), logits_of(wide, STEPS)
    check(found, expected_logits(graph, weights, STEPS))
    check(found, others, 1e-2)
    for got, other in zip(found, others, strict=True):
        assert not np.array_equal(got, other)
        assert np.array_equal(got.argmax(-1), other.argmax(-1))
    for got, other in zip(logits_of(engine, SMALL), logits_of(wide, SMALL), strict=True):
        assert np.array_equal(got, other)


@pytest.mark.parametrize("family", ["llama", "deepseek_v2"])
def test_parts_of_prompts_whose_logits_nobody_wants(tmp_path, monkeypatch, narrow, family):
    """All steps but the last are narrow."""
    monkeypatch.setattr(cuda_runner, "_MOST_AT_ONCE", 0)  # they are enqueued kernel by kernel
    save_tiny_model(tmp_path / "snapshot", family)
    wide = build(tmp_path / "wide", tmp_path / "snapshot")
    narrow(2)
    engine = build(tmp_path / "narrow", tmp_path / "snapshot")
    found, others = (logits_of_parts(e, SingleRank()) for e in (engine, wide))
    assert [len(logits) for logits in found] == [0, 0, 1, 1]
    check(found[2:], others[2:])
    assert not any(np.array_equal(got, other) for got, other in zip(found[2:], others[2:], strict=True))


def test_launches_of_narrow_steps_and_of_all_others(tmp_path, narrow):
    """The others' are as they would be without narrow ones."""
    (wide,) = plans(build_tiny(tmp_path, "llama")[0])
    narrow()
    (plan,) = plans(engine_of(tmp_path, "narrow"))
    for tokens in range(1, 65):
        assert launches(plan, tokens, mixed=False) == launches(wide, tokens, mixed=False)
        same = launches(plan, tokens, mixed=True) == launches(wide, tokens, mixed=True)
        assert same == (tokens <= MOST_WIDE)
    assert plan["buffers"] == wide["buffers"]
    assert plan["scratch"] == wide["scratch"]
    large = [*residual_types(launches(plan, 64, mixed=True))]
    assert large == 12 * ["*bf16"] + 4 * ["*fp32"]  # the last layer's second norm and the one behind it are of few rows


def test_engines_for_small_steps_have_no_narrow_ones(tmp_path, narrow):
    wide, _, _ = build_tiny(tmp_path, "llama")
    narrow(LIMITS["max_num_tokens"])
    assert [*plans(engine_of(tmp_path, "narrow"))] == [*plans(wide)]


@pytest.mark.parametrize("mapping", [{"tp_size": 2}, {"pp_size": 2}])
def test_several_ranks_have_no_narrow_steps(tmp_path, narrow, mapping):
    save_tiny_model(tmp_path / "snapshot", "llama")
    wide = build(tmp_path / "wide", tmp_path / "snapshot", options=mapping)
    narrow()
    engine = build(tmp_path / "narrow", tmp_path / "snapshot", options=mapping)
    found, others = [*plans(engine)], [*plans(wide)]
    assert len(found) == 2
    assert found == others


@pytest.mark.parametrize("family", ["GPTNeoX", "GPT2LMHeadModel", "Granite", "Olmo2"])
def test_sums_that_are_not_norms_are_float32(tmp_path, narrow, family):
    """Parallel blocks, layer norms, factors, and linears that read the residual stream itself."""
    random_checkpoint(tmp_path / "ckpt", model(family, **FAMILIES[family])[0])
    wide = engine_of(tmp_path, "wide")
    narrow()
    assert [*plans(engine_of(tmp_path, "narrow"))] == [*plans(wide)]
