"""What the packers announce is what they make, and what they make is the weight."""

import gguf
import numpy as np
import pytest
import torch

from trtllm_cli.kernels.cpu.pack import pack, pack_linear, packed_infos, unpack_linear
from trtllm_cli.kernels.linear_format import LinearFormat
from trtllm_cli.kernels.quantization import pack_nibbles
from trtllm_cli.tensor_file import TensorInfo


@pytest.mark.parametrize(
    ("name", "group_size"),
    [("float32", None), ("bfloat16", None), ("int8", None), ("int8", 16), ("int8", 32), ("int4", 16), ("int4", 32)],
)
@pytest.mark.parametrize(("out", "depth"), [(16, 32), (17, 33), (1, 1), (96, 40), (33, 129)])
def test_announced_is_made(name, group_size, out, depth):
    fmt = LinearFormat(name, group_size)
    made = pack_linear(torch.randn(out, depth), fmt)
    found = {role: TensorInfo(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for role, t in made.items()}
    assert packed_infos(fmt, out, depth) == found
    assert all(t.is_contiguous() for t in made.values())


def random_halves(rng, shape):
    """Finite float16 numbers of every size, both signs, some zeros."""
    halves = rng.integers(0, 0x7C00, shape, np.uint16)
    halves[rng.random(shape) < 0.1] = 0
    return (halves | rng.integers(0, 2, shape, np.uint16) << 15).astype("<u2")


def test_gguf_blocks_come_through_exactly():
    """Q4_0, Q4_1 and Q8_0 with any float16 scale, 0 included, are the weights that gguf makes of them."""
    rng = np.random.default_rng(0)
    out, groups = 40, 6
    kinds = gguf.GGMLQuantizationType
    small = (random_halves(rng, (out, groups, 1)).view("<f2") * np.float16(2**-4)).view("<u2")  # sums stay finite
    nibbles = rng.integers(0, 256, (out, groups, 16), np.uint8)
    ordered = torch.from_numpy(np.concatenate([nibbles & 15, nibbles >> 4], axis=2).reshape(out, -1))
    scale = torch.from_numpy(small.view("<f2")[..., 0].astype(np.float32))
    four = pack_nibbles(ordered)

    blocks = np.concatenate([small.view(np.uint8), nibbles], axis=2).reshape(out, -1)
    want = gguf.dequantize(blocks, kinds.Q4_0)
    fmt = LinearFormat("int4", 32, has_zero=True)
    for zero in ({}, {"zero": torch.full((out, groups), 8.0)}):
        packed = pack(fmt, {"weight": four, "scale": scale, **zero}, 32 * groups)
        assert np.array_equal(unpack_linear(packed, fmt, out, 32 * groups).numpy(), want)

    low = random_halves(rng, (out, groups, 1))
    blocks = np.concatenate([small.view(np.uint8), low.view(np.uint8), nibbles], axis=2).reshape(out, -1)
    want = gguf.dequantize(blocks, kinds.Q4_1)
    minimum = torch.from_numpy(low.view("<f2")[..., 0].astype(np.float32))
    # A block whose scale is 0 is its minimum all over: level 1 of that scale.
    flat = scale == 0
    zero = torch.where(flat, 0.0, -minimum / torch.where(flat, 1.0, scale))
    levels = torch.where(flat.repeat_interleave(32, dim=1), 1, ordered).to(torch.uint8)
    parts = {"weight": pack_nibbles(levels), "scale": torch.where(flat, minimum, scale), "zero": zero}
    assert np.array_equal(unpack_linear(pack(fmt, parts, 32 * groups), fmt, out, 32 * groups).numpy(), want)

    values = rng.integers(-128, 128, (out, groups, 32), np.int8)
    blocks = np.concatenate([small.view(np.uint8), values.view(np.uint8)], axis=2).reshape(out, -1)
    want = gguf.dequantize(blocks, kinds.Q8_0)
    fmt = LinearFormat("int8", 32)
    parts = {"weight": torch.from_numpy(values.reshape(out, -1)), "scale": scale}
    assert np.array_equal(unpack_linear(pack(fmt, parts, 32 * groups), fmt, out, 32 * groups).numpy(), want)


@pytest.mark.parametrize("half", [False, True], ids=["float32 scales", "float16 scales"])
@pytest.mark.parametrize(("name", "zeros"), [("int4", True), ("int4", False), ("int8", False), ("int8", True)])
def test_scales_lose_less_than_2_to_the_minus_11(name, zeros, half):
    rng = torch.Generator().manual_seed(0)
    fmt = LinearFormat(name, 32, has_zero=zeros)
    scale = torch.rand(30, 4, generator=rng) * 10.0 ** torch.randint(-4, 2, (30, 4), generator=rng)
    if half:
        scale = scale.half().float()
    weight = torch.randint(0, 256, (30, 64), generator=rng, dtype=torch.uint8)
    if name == "int8":
        weight = torch.randint(-127, 128, (30, 128), generator=rng, dtype=torch.int8)
    parts = {"weight": weight, "scale": scale}
    if zeros:
        parts["zero"] = torch.randint(0, 16, (30, 4), generator=rng).float()
    got = unpack_linear(pack(fmt, parts, 128), fmt, 30, 128)
    wide = scale.repeat_interleave(32, dim=1)
    zero = parts.get("zero", torch.full((30, 4), 8.0 if name == "int4" else 0.0)).repeat_interleave(32, dim=1)
    error = (got - fmt.dequantize(parts, 128)).abs()
    value = fmt.dequantize(parts, 128) / wide + zero  # the stored number
    assert (error <= 2.0**-11 * wide * (value.abs() + zero) * 1.001).all()
    if half and not zeros:
        assert error.max() == 0


def test_fp8_and_fp4_come_through_exactly():
    rng = torch.Generator().manual_seed(0)
    every = torch.arange(256, dtype=torch.uint8)
    every[(every & 0x7F) == 0x7F] = 0  # no NaN
    weight = every.repeat(3, 1).view(torch.float8_e4m3fn)
    for scale, group in (
        (torch.tensor([0.3]), None),
        (torch.rand(3), None),
        (torch.rand(3, 2), 128),
        (torch.rand(3, 3), 100),
    ):
        fmt = LinearFormat("fp8", group)
        parts = {"weight": weight, "scale": scale}
        packed = pack(fmt, parts, 256)
        torch.testing.assert_close(unpack_linear(packed, fmt, 3, 256), fmt.dequantize(parts, 256), rtol=2**-23, atol=0)
    fmt = LinearFormat("fp4", 16)
    nibbles = torch.randint(0, 256, (20, 32), generator=rng, dtype=torch.uint8)
    scale = (448 * torch.rand(20, 4, generator=rng)).to(torch.float8_e4m3fn)
    parts = {"weight": nibbles, "scale": scale, "global_scale": torch.tensor([0.0123])}
    packed = pack(fmt, parts, 64)
    torch.testing.assert_close(unpack_linear(packed, fmt, 20, 64), fmt.dequantize(parts, 64), rtol=2**-22, atol=0)
    assert packed_infos(fmt, 20, 64)["weight"].shape == tuple(packed["weight"].shape)
