"""Steps of parts of prompts, whose logits nobody wants, on the cuda backend: they leave most of the last layer out."""

import numpy as np
import pytest

from tests.interpreter_device import fake_compile
from tests.run.test_cuda_ranks import build, check, logits_of_parts
from tests.tiny_models import save_tiny_model
from trtllm_cli.build.backends import cuda as cuda_lowering
from trtllm_cli.run.backends import cuda as cuda_runner
from trtllm_cli.run.communicator import SingleRank


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "gpt_neox"])
def test_what_is_left_out_changes_nothing(tmp_path, monkeypatch, family):
    """Experts, latent attention, and an MLP beside attention."""
    monkeypatch.setattr(cuda_lowering, "compile_kernels", fake_compile)
    monkeypatch.setattr(cuda_runner, "_MOST_AT_ONCE", 0)  # steps with prompts are as large as they are
    save_tiny_model(tmp_path / "snapshot", family)
    engine = build(tmp_path, tmp_path / "snapshot")
    every, some = (logits_of_parts(engine, SingleRank(), every=every) for every in (True, False))
    assert [len(logits) for logits in some] == [0, 0, 1, 1]
    assert all(np.isfinite(logits).all() for logits in every)
    check(some[2:], [every[2][:1], every[3]])
