"""Triton's kernels run in its interpreter here; what compiles them does so in processes of its own."""

import os

import pytest

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported


@pytest.fixture(autouse=True)
def nothing_is_timed(monkeypatch):
    """Builds do not time kernels where the tests' machine has a GPU, nor read its user's timing cache."""
    monkeypatch.setattr("trtllm_cli.build.backends.cuda_timing.find_timer", lambda arch: None)
