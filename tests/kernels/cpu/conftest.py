"""The compiled kernels, once for all tests, and numpy arrays that steps may point to."""

import numpy as np
import pytest
import torch

from trtllm_cli.kernels.cpu import compiler, library


@pytest.fixture(scope="session", autouse=True)
def _torch_leaves_the_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def kernels():
    return library.Library.load(compiler.compile_library(compiler.host_features()))


@pytest.fixture(scope="session", params=[1, 2], ids=lambda n: f"{n}-threads")
def pool(kernels, request):
    with kernels.pool(request.param) as p:
        yield p


@pytest.fixture(scope="session")
def pools(kernels):
    """One and two threads: their results must have the same bits."""
    with kernels.pool(1) as one, kernels.pool(2) as two:
        yield one, two


@pytest.fixture
def rng():
    return np.random.default_rng(0)
