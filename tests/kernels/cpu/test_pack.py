"""What the packers announce is what they make."""

import pytest
import torch

from trtllm_cli.kernels.cpu.pack import pack_linear, packed_infos
from trtllm_cli.tensor_file import TensorInfo


@pytest.mark.parametrize("fmt", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize(("out", "depth"), [(16, 32), (17, 33), (1, 1), (96, 40), (33, 129)])
@pytest.mark.parametrize("group_size", [16, 32])
def test_announced_is_made(fmt, out, depth, group_size):
    made = pack_linear(torch.randn(out, depth), fmt, group_size)
    found = {role: TensorInfo(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for role, t in made.items()}
    assert packed_infos(fmt, out, depth, group_size) == found
    assert all(t.is_contiguous() for t in made.values())
