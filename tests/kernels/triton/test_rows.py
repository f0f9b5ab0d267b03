"""The kernels of rows.py against the reference, and their machine code."""

import pytest
import torch

from trtllm_cli.kernels import quantization, reference
from trtllm_cli.kernels.rope import cos_sin_table
from trtllm_cli.kernels.rope_spec import RopeSpec
from trtllm_cli.kernels.triton import device, rows
from trtllm_cli.models.stored import FP8_BLOCK

BF16, F32, FP8, INT8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int8
TOLERANCE = {F32: 3e-6, BF16: 8e-3}  # the interpreter cuts bf16 off where a GPU rounds
LARGEST = {FP8: 448.0, INT8: 127.0}


def error(out, expected):
    return float((out.float() - expected).norm() / expected.norm())


def poison(shape, dtype, device):
    return torch.full(shape, 77 if dtype == INT8 else torch.nan, dtype=F32, device=device).to(dtype)


def check_quantized(out, expected, step):
    """`out * step` is `expected` rounded by `step`: at most half a step of int8, or 1/16 of the value, away."""
    largest = LARGEST[out.dtype]
    clamped = expected.clamp(-largest * step, largest * step)
    half = torch.maximum(clamped.abs() / 16, step * 2.0**-10) if out.dtype == FP8 else step * 0.5
    assert ((out.float() * step - clamped).abs() <= half * 1.002).all()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("width", [64, 200])
def test_embedding(launch, dtype, width):
    d = launch.device
    weight = torch.randn(10, width, device=d).to(BF16)
    ids = torch.tensor([5, 14, 4, -1, 15, -3, 12, -2], dtype=torch.int32, device=d)  # this rank's are 5 to 14
    last = torch.tensor([7, 4, 9], dtype=torch.int32, device=d)
    out = poison((len(ids), width), dtype, d)
    launch(rows.embedding, (len(ids), -(-width // 128)), ids, last, weight, out, 5, 10, WIDTH=width, BLOCK=128)
    expected = torch.zeros(len(ids), width, device=d)
    for row, token in enumerate([5, 14, 4, 7, 15, 9, 12, 4]):
        if 5 <= token < 15:
            expected[row] = weight[token - 5].float()
    assert torch.equal(out.float(), expected)


def launch_gated(launch, gate, up, out, scale, steps, width, strides, offsets, activation, quant):
    block = 1 << (width - 1).bit_length() if quant == "token" else 64
    launch(rows.gated_act, (len(out), -(-width // block)), gate, up, out, scale, steps, WIDTH=width,
           GATE_STRIDE=strides[0], UP_STRIDE=strides[1], GATE_OFFSET=offsets[0], UP_OFFSET=offsets[1], BLOCK=block,
           ACTIVATION=activation, QUANT=quant)  # fmt: skip


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu", "swiglu_oai"])
@pytest.mark.parametrize(("dtype", "out_dtype"), [(BF16, BF16), (F32, F32)])
def test_gated_act(launch, activation, dtype, out_dtype):
    d = launch.device
    x = torch.randn(3, 2 * 100, device=d).mul(4).to(dtype)
    out, none = poison((3, 100), out_dtype, d), torch.zeros(1, device=d)
    launch_gated(launch, x, x, out, none, none, 100, (200, 200), (0, 100), activation, "none")
    gate, up = x.float().chunk(2, dim=-1)
    assert error(out, reference.gated_act(gate, up, activation)) < TOLERANCE[out_dtype]


def test_gated_act_of_two_tensors(launch):
    d = launch.device
    gate, up = torch.randn(2, 64, device=d), torch.randn(2, 80, device=d)
    out, none = poison((2, 64), F32, d), torch.zeros(1, device=d)
    launch_gated(launch, gate, up, out, none, none, 64, (64, 80), (0, 16), "silu", "none")
    assert error(out, reference.gated_act(gate, up[:, 16:], "silu")) < TOLERANCE[F32]


def test_gated_act_of_experts(launch):
    d, top_k = launch.device, 3
    x = torch.randn(2, top_k * 2 * 48, device=d)
    out, none = poison((2 * top_k, 48), F32, d), torch.zeros(1, device=d)
    launch_gated(launch, x, x, out, none, none, 48, (96, 96), (48, 0), "swiglu_oai", "none")
    up, gate = x.unflatten(-1, (top_k, -1)).chunk(2, dim=-1)
    assert error(out, reference.gated_act(gate, up, "swiglu_oai").flatten(0, 1)) < TOLERANCE[F32]


@pytest.mark.parametrize("dtype", [FP8, INT8])
@pytest.mark.parametrize("quant", ["static", "token"])
def test_gated_act_quantized(launch, dtype, quant):
    d = launch.device
    x = torch.randn(3, 200, device=d).to(BF16)
    out, steps, scale = poison((3, 100), dtype, d), poison((3,), F32, d), torch.tensor([0.01], device=d)
    launch_gated(launch, x, x, out, scale, steps, 100, (200, 200), (0, 100), "silu", quant)
    expected = reference.gated_act(*x.float().chunk(2, dim=-1), "silu")
    if quant == "token":
        torch.testing.assert_close(steps, expected.abs().amax(1) / LARGEST[dtype], rtol=1e-5, atol=0)
        check_quantized(out, expected, steps[:, None])
    else:
        assert steps.isnan().all()
        check_quantized(out, expected, scale)


@pytest.mark.parametrize(("op", "number"), [("scale", -0.3), ("softcap", 5.0), ("silu", 0.0), ("gelu", 0.0),
                                            ("gelu_pytorch_tanh", 0.0), ("relu", 0.0)])  # fmt: skip
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_unary(launch, op, number, dtype):
    d = launch.device
    x = torch.randn(2, 112, device=d).mul(6).to(dtype)
    out = poison((2, 100), dtype, d)
    launch(rows.unary, (2, 2), x, out, number, WIDTH=100, X_STRIDE=112, BLOCK=64, OP=op)
    x = x[:, :100].float()
    expected = {"scale": x * number, "softcap": 5.0 * torch.tanh(x / 5.0)}.get(op)
    assert error(out, reference.activate(x, op) if expected is None else expected) < TOLERANCE[dtype]


def test_activations_far_out(launch):
    d = launch.device
    x = torch.tensor([[-1e4, -100.0, -1e-6, 0.0, 1e-6, 100.0, 1e4, 3.0]], device=d)
    for op in ("silu", "gelu", "gelu_pytorch_tanh", "softcap"):
        out = poison((1, 8), F32, d)
        launch(rows.unary, (1, 1), x, out, 30.0, WIDTH=8, X_STRIDE=8, BLOCK=8, OP=op)
        expected = 30.0 * torch.tanh(x / 30.0) if op == "softcap" else reference.activate(x, op)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=3e-6)


def test_groups_are_those_of_checkpoints():
    assert device.GROUP.value == FP8_BLOCK


def group_steps(x, dtype):
    """[rows, groups of 128]."""
    return (x.unflatten(1, (-1, 128)).abs().amax(2) / LARGEST[dtype]).clamp(min=1e-30)


@pytest.mark.parametrize("dtype", [FP8, INT8])
@pytest.mark.parametrize("block", [128, 256, 512])
def test_quantize_groups(launch, dtype, block):
    d = launch.device
    x = torch.randn(3, 384, device=d)
    x[1, 128:256] = 0
    out, steps = poison((3, 384), dtype, d), torch.full((3, 3), torch.nan, device=d)
    one = torch.ones(1, device=d)
    grid = (3, -(-384 // block))
    launch(rows.quantize, grid, x, out, one, steps, WIDTH=384, X_STRIDE=384, BLOCK=block, QUANT="group")
    torch.testing.assert_close(steps, group_steps(x, dtype))
    check_quantized(out, x, steps.repeat_interleave(128, 1))


@pytest.mark.parametrize("block", [128, 512])
def test_gated_act_in_groups(launch, block):
    d = launch.device
    x = torch.randn(2, 768, device=d)
    out, steps = poison((2, 384), FP8, d), torch.full((2, 3), torch.nan, device=d)
    launch(
        rows.gated_act, (2, -(-384 // block)), x, x, out, torch.ones(1, device=d), steps, WIDTH=384, GATE_STRIDE=768,
        UP_STRIDE=768, GATE_OFFSET=0, UP_OFFSET=384, BLOCK=block, ACTIVATION="silu", QUANT="group",
    )  # fmt: skip
    expected = reference.activate(x[:, :384], "silu") * x[:, 384:]
    torch.testing.assert_close(steps, group_steps(expected, FP8), rtol=1e-5, atol=1e-9)
    check_quantized(out, expected, steps.repeat_interleave(128, 1))


@pytest.mark.parametrize("op", ["add", "mul"])
@pytest.mark.parametrize("row", [False, True])
@pytest.mark.parametrize(("x_dtype", "y_dtype", "out_dtype"), [(BF16, BF16, BF16), (F32, BF16, F32)])
def test_binary(launch, op, row, x_dtype, y_dtype, out_dtype):
    d = launch.device
    x = torch.randn(3, 100, device=d).to(x_dtype)
    y = torch.randn(1 if row else 3, 100, device=d).to(y_dtype)
    out = poison((3, 100), out_dtype, d)
    launch(rows.binary, (3, 2), x, y, out, WIDTH=100, X_STRIDE=100, Y_STRIDE=0 if row else 100, BLOCK=64, OP=op)
    expected = x.float() + y.float() if op == "add" else x.float() * y.float()
    assert error(out, expected) < TOLERANCE[out_dtype]


@pytest.mark.parametrize("dtype", [FP8, INT8])
@pytest.mark.parametrize(("quant", "block"), [("static", 32), ("token", 128), ("token", 32)])
def test_quantize(launch, dtype, quant, block):
    d = launch.device
    x = torch.randn(3, 112, device=d)
    x[2] = 0
    out, steps, scale = poison((3, 100), dtype, d), poison((3,), F32, d), torch.tensor([0.015], device=d)
    grid = (3, -(-100 // block) if quant == "static" else 1)
    launch(rows.quantize, grid, x, out, scale, steps, WIDTH=100, X_STRIDE=112, BLOCK=block, QUANT=quant)
    x = x[:, :100]
    step = scale if quant == "static" else steps[:, None]
    check_quantized(out, x, step)
    fmt = "fp8" if dtype == FP8 else "int8"
    assert error(out.float() * step, quantization.qdq(x, scale if quant == "static" else None, fmt)) < 1e-3
    if quant == "token":
        torch.testing.assert_close(steps[:2], x[:2].abs().amax(1) / LARGEST[dtype], rtol=1e-6, atol=0)


@pytest.mark.parametrize("fmt", ["fp8", "int8", "fp4"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("width", "group"), [(96, None), (100, 16)])
def test_qdq(launch, fmt, scaled, width, group):
    d = launch.device
    x = torch.randn(3, width, device=d)
    x[1] *= 1e-3
    scale = torch.tensor([0.02 if fmt != "fp4" else 0.003], device=d)
    out, size = poison((3, width), F32, d), group or width
    block = 1 << (size - 1).bit_length()
    grid = (3, -(-width // (2 * size)) if group else 1)
    launch(rows.qdq, grid, x, scale, out, WIDTH=width, X_STRIDE=width, GROUP=size, BLOCK_GROUPS=2 if group else 1,
           BLOCK=block, FMT=fmt, HAS_SCALE=scaled)  # fmt: skip
    expected = quantization.qdq(x, scale if scaled else None, fmt, group)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-9)


def test_rounding_as_torch_does(launch):
    """Every E4M3 number, what lies halfway between two, and a little to either side."""
    d = launch.device
    numbers = torch.arange(0, 127, dtype=torch.uint8).view(FP8).float()
    halves = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, halves, halves * (1 + 2.0**-20), halves * (1 - 2.0**-20), torch.tensor([464.0, 1e4])])
    x = torch.cat([x, -x]).to(d)[None]
    width = x.shape[1]
    one, out = torch.ones(1, device=d), poison((1, width), FP8, d)
    launch(rows.quantize, (1, 1), x, out, one, one, WIDTH=width, X_STRIDE=width, BLOCK=1024, QUANT="static")
    assert torch.equal(out.float(), x.clamp(-448, 448).to(FP8).float())


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_gathers(launch, dtype):
    d = launch.device
    x = torch.randn(4, 120, device=d).to(dtype)
    order = torch.randperm(100, device=d).to(torch.int32)
    out = poison((4, 100), dtype, d)
    launch(rows.gather_columns, (4, 2), x, order, out, WIDTH=100, X_STRIDE=120, BLOCK=64)
    assert torch.equal(out, x[:, order.long()])
    indices = torch.tensor([3, 0, 3], dtype=torch.int32, device=d)
    out = poison((3, 100), dtype, d)
    launch(rows.gather_rows, (3, 2), x, indices, out, WIDTH=100, X_STRIDE=120, BLOCK=64)
    assert torch.equal(out, x[indices.long(), :100])


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_concat(launch, dtype):
    d, heads = launch.device, 3
    x, y = torch.randn(2, 70, device=d).to(dtype), torch.randn(2, 40, device=d).to(dtype)
    out = poison((2, 90), dtype, d)
    launch(rows.concat, (2, 3), x, y, out, X_WIDTH=20, Y_WIDTH=10, X_STRIDE=70, Y_STRIDE=40, NUM_HEADS=heads, BLOCK=32)
    parts = (x[:, :60].unflatten(-1, (heads, -1)), y[:, :30].unflatten(-1, (heads, -1)))
    assert torch.equal(out, torch.cat(parts, dim=-1).flatten(-2))


@pytest.mark.parametrize("layout", ["neox", "gptj"])
@pytest.mark.parametrize(("head_dim", "rotary"), [(32, 32), (20, 12)])
@pytest.mark.parametrize("in_place", [False, True])
def test_rope(launch, layout, head_dim, rotary, in_place):
    d, heads = launch.device, 3
    table = cos_sin_table(RopeSpec(dim=rotary, base=1e4, layout=layout, max_position_embeddings=64), 64).to(d)
    positions = torch.tensor([0, 63, 17], dtype=torch.int32, device=d)
    stride = heads * head_dim + (0 if in_place else 8)
    x = torch.randn(3, stride, device=d)
    expected = reference.rope(x[:, : heads * head_dim], positions, table, heads, layout)
    out = x if in_place else poison((3, heads * head_dim), F32, d)
    rest = head_dim - rotary
    launch(rows.rope, (3, 2), x, positions, table, out, NUM_HEADS=heads, HEAD_DIM=head_dim, ROTARY_DIM=rotary,
           X_STRIDE=stride, BLOCK_HEADS=2, BLOCK_HALF=1 << (rotary // 2 - 1).bit_length(),
           BLOCK_REST=1 << (rest - 1).bit_length() if rest else 0, LAYOUT=layout)  # fmt: skip
    assert error(out, expected) < TOLERANCE[F32]


def test_copy_blocks(launch):
    d = launch.device
    parts = [torch.randint(-99, 99, (6, words), dtype=torch.int32, device=d) for words in (64, 24, 40)]
    expected = [p.clone() for p in parts]
    pairs = torch.tensor([[0, 3], [0, 5], [2, 1]], dtype=torch.int32, device=d)
    for part in expected:
        part[3], part[5], part[1] = part[0].clone(), part[0].clone(), part[2].clone()
    addresses = torch.tensor([p.data_ptr() for p in parts], dtype=torch.int64, device=d)
    words = torch.tensor([p.shape[1] for p in parts], dtype=torch.int32, device=d)
    launch(rows.copy_blocks, (len(pairs), len(parts), 2), pairs, addresses, words, BLOCK=32)
    for part, wanted in zip(parts, expected, strict=True):
        assert torch.equal(part, wanted)


LLAMA = {
    "embedding": (
        {"ids_ptr": "*i32", "last_tokens_ptr": "*i32", "weight_ptr": "*bf16", "out_ptr": "*bf16", "vocab_start": "i32",
         "num_rows": "i32"},
        {"WIDTH": 4096, "BLOCK": 1024},
    ),
    "gated_act": (
        {"gate_ptr": "*bf16", "up_ptr": "*bf16", "out_ptr": "*bf16", "out_scale_ptr": "*fp32",
         "row_scale_ptr": "*fp32"},
        {"WIDTH": 14336, "GATE_STRIDE": 28672, "UP_STRIDE": 28672, "GATE_OFFSET": 0, "UP_OFFSET": 14336, "BLOCK": 1024,
         "ACTIVATION": "silu", "QUANT": "none"},
    ),
    "quantize": (
        {"x_ptr": "*bf16", "out_ptr": "*fp8e4nv", "out_scale_ptr": "*fp32", "row_scale_ptr": "*fp32"},
        {"WIDTH": 4096, "X_STRIDE": 4096, "BLOCK": 4096, "QUANT": "token"},
    ),
    "gather_rows": (
        {"x_ptr": "*bf16", "indices_ptr": "*i32", "out_ptr": "*bf16"}, {"WIDTH": 4096, "X_STRIDE": 4096, "BLOCK": 1024},
    ),
    "copy_blocks": ({"pairs_ptr": "*i32", "parts_ptr": "*i64", "part_words_ptr": "*i32"}, {"BLOCK": 4096}),
    "binary": (
        {"x_ptr": "*bf16", "y_ptr": "*bf16", "out_ptr": "*bf16"},
        {"WIDTH": 4096, "X_STRIDE": 4096, "Y_STRIDE": 4096, "BLOCK": 1024, "OP": "add"},
    ),
    "rope": (
        {"x_ptr": "*bf16", "positions_ptr": "*i32", "table_ptr": "*fp32", "out_ptr": "*bf16"},
        {"NUM_HEADS": 32, "HEAD_DIM": 128, "ROTARY_DIM": 128, "X_STRIDE": 6144, "BLOCK_HEADS": 16, "BLOCK_HALF": 64,
         "BLOCK_REST": 0, "LAYOUT": "neox"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LLAMA)
def test_machine_code_for_llama(compile_kernel, name):
    args, constexprs = LLAMA[name]
    compiled = compile_kernel(getattr(rows, name), args=args, constexprs={**constexprs, "PDL": True}, num_warps=4)
    assert compiled.spills == 0
    assert compiled.registers <= 64
    assert "ld.global.v4.b32" in compiled.ptx  # 16 bytes
    assert "ld.global.b16" not in compiled.ptx
    assert "griddepcontrol.wait" in compiled.ptx


@pytest.mark.parametrize(("out", "quant", "block", "num_warps"), [("*fp8e4nv", "static", 1024, 4),
                                                                 ("*fp8e4nv", "token", 16384, 16)])  # fmt: skip
def test_machine_code_of_quantized_gated_act(compile_kernel, out, quant, block, num_warps):
    args, constexprs = LLAMA["gated_act"]
    constexprs = {**constexprs, "QUANT": quant, "BLOCK": block, "PDL": True}
    compiled = compile_kernel(rows.gated_act, {**args, "out_ptr": out}, constexprs, num_warps=num_warps)
    assert compiled.spills == 0
    assert "ld.global.v4.b32" in compiled.ptx
    assert "e4m3x2.f32" in compiled.ptx
