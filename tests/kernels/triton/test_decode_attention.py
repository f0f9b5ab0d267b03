"""Attention of one token a sequence over paged caches, against the reference."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import triton.runtime.interpreter as interpreter

from trtllm_cli.kernels import reference
from trtllm_cli.kernels.triton import decode_attention

_patch_tensor = interpreter._patch_lang_tensor


def _with_index(tensor, scope):
    """Mends the interpreter: numpy 2.4 makes no int of a scalar that was loaded, an array of one element."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _with_index

GARBAGE = 10**6  # an entry of a block table that is not to be read


@dataclass
class Case:
    """A step: for each sequence its length after it, and how many of its tokens are new."""

    lengths: list[int]
    new: list[int]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    v_head_dim: int = 16
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype = torch.float32
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    fp8_out: bool = False
    padding: int = 0  # sequences behind the last
    device: str = "cpu"
    inputs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        torch.manual_seed(sum(self.lengths) + self.head_dim)
        d = self.device
        pages = [-(-n // self.block_size) for n in self.lengths]
        ids = torch.randperm(sum(pages)).int().split(pages)
        table = torch.full((len(pages) + self.padding, max(pages) + 1), GARBAGE, dtype=torch.int32)
        for s, row in enumerate(ids):
            table[s, : len(row)] = row
        starts = torch.tensor([0, *self.new, *[0] * self.padding]).cumsum(0).int()
        lens = torch.tensor([*self.lengths, *[0] * self.padding], dtype=torch.int32)
        self.inputs = {"block_tables": table.to(d), "query_start": starts.to(d), "seq_lens": lens.to(d)}
        self.inputs["sinks"] = (torch.randn(self.heads, device=d) * 2).to(self.dtype)
        self.inputs["kv_scale"] = torch.tensor([0.02, 0.03], device=d)
        self.scale = self.head_dim**-0.5
        self.q = torch.randn(sum(self.new), self.heads * self.head_dim, device=d).to(self.dtype)
        self.k, self.v = (self.cache(sum(pages), w) for w in (self.head_dim, self.v_head_dim))
        out_type = torch.float8_e4m3fn if self.fp8_out else self.dtype
        self.out_scale = torch.tensor([0.01], device=d)
        self.out = torch.full((len(self.q), self.heads * self.v_head_dim), torch.nan, device=d).to(out_type)

    @property
    def quantized(self):
        return self.cache_dtype != self.dtype

    def cache(self, num_blocks, width):
        """Random, but NaN (or the largest number) where no sequence's token is."""
        x = torch.randn(num_blocks, self.kv_heads, self.block_size, width)
        if self.quantized:
            x *= 40
        empty = torch.ones(num_blocks, self.block_size, dtype=torch.bool)
        for row, length in zip(self.inputs["block_tables"].cpu(), self.lengths, strict=False):
            tokens = torch.arange(length)
            empty[row[tokens // self.block_size].long(), tokens % self.block_size] = False
        x = x.clamp(-127, 127).masked_fill(empty[:, None, :, None], 127.0 if x.dtype == torch.int8 else torch.nan)
        if self.cache_dtype == torch.int8:
            x = x.nan_to_num(127.0).round()
        return x.to(self.device).to(self.cache_dtype)

    def expected(self):
        """Of all tokens, by the reference."""
        attrs = {"num_heads": self.heads, "num_kv_heads": self.kv_heads, "scale": self.scale}
        attrs |= {"window": self.window} if self.window else {}
        attrs |= {"softcap": self.softcap} if self.softcap else {}
        attrs |= {"kv_quant": "some"} if self.quantized else {}
        inputs = {k: v.float() if k == "sinks" else v for k, v in self.inputs.items() if k != "sinks" or self.sinks}
        caches = [c.float().transpose(1, 2).flatten(0, 1) for c in (self.k, self.v)]
        return reference.paged_attention(self.q.float(), *caches, inputs, attrs, self.block_size)

    def check(self, computed):
        """That the tokens of `computed`, and no others, have been given their outputs."""
        expected = self.expected()
        found = self.out.float() * (self.out_scale if self.fp8_out else 1.0)
        assert found[~computed].isnan().all()
        limit = 0.04 if self.fp8_out else 1e-5 if self.dtype == torch.float32 else 6e-3
        error = (found[computed] - expected[computed]).norm() / expected[computed].norm()
        assert error.item() < limit

    def common(self):
        """The constants of both kernels."""
        return {
            "NUM_KV_HEADS": self.kv_heads, "GROUP": self.heads // self.kv_heads, "HEAD_DIM": self.head_dim,
            "V_HEAD_DIM": self.v_head_dim, "BLOCK_SIZE": self.block_size, "WINDOW": self.window,
            "SOFTCAP": self.softcap > 0, "SINKS": self.sinks, "KV_QUANT": self.quantized,
        }  # fmt: skip

    def tensors(self):
        """The first arguments of both kernels."""
        i = self.inputs
        return (
            self.q, self.k, self.v, i["block_tables"], i["query_start"], i["seq_lens"], i["sinks"], i["kv_scale"],
            self.out_scale, self.out,
        )  # fmt: skip


def decode(launch, case, splits=1, block_n=16, block_g=16, times=1, row_seqs=None):
    """Runs the kernel and checks all that it wrote; with `row_seqs` of all tokens, each a row of its own."""
    of_rows, d = row_seqs is not None, case.device
    seqs = len(row_seqs) if of_rows else len(case.lengths) + case.padding
    tiles = case.kv_heads * -(-(case.heads // case.kv_heads) // block_g)
    rows = seqs * case.heads * splits
    partial = torch.zeros(rows * case.v_head_dim, dtype=torch.int64, device=d)
    lse = torch.zeros(rows, dtype=torch.int64, device=d)
    phases = [(True, True)] if splits == 1 else [(True, False), (False, True)]
    single = torch.tensor([n == 1 or of_rows for n in case.new for _ in range(n)], device=d)
    for time in range(times):
        step = torch.full((1,), 1 + time, dtype=torch.int32, device=d)
        for push, pull in phases:
            launch(
                decode_attention.decode_attention, (splits, seqs, tiles), *case.tensors(),
                row_seqs if of_rows else step, partial, lse, step, 3, 2, case.inputs["block_tables"].shape[1],
                case.scale, case.softcap, BLOCK_G=block_g, BLOCK_N=block_n, NUM_SPLITS=splits, OF_ROWS=of_rows,
                PUSH=push, PULL=pull, **case.common(),
            )  # fmt: skip
    case.check(single)


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize(("block_size", "block_n"), [(16, 16), (16, 32), (32, 16), (8, 32)])
def test_sizes_of_blocks_tiles_and_splits(launch, splits, block_size, block_n):
    case = Case([16, 37], [1, 1], block_size=block_size, padding=1, device=launch.device)
    decode(launch, case, splits, block_n, times=1 + (splits == 2))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("fp8_out", [False, True])
def test_types(launch, splits, cache_dtype, fp8_out):
    dtype = torch.float32 if cache_dtype == torch.float32 else torch.bfloat16
    case = Case(
        [50, 9],
        [1, 1],
        dtype=dtype,
        cache_dtype=cache_dtype,
        heads=2,
        kv_heads=1,
        fp8_out=fp8_out,
        device=launch.device,
    )
    decode(launch, case, splits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize(("v_head_dim", "block_g"), [(64, 16), (128, 16), (80, 16), (50, 16), (64, 32)])
def test_values_of_one_byte_by_words(launch, dtype, cache_dtype, v_head_dim, block_g):
    """And where they are not: 50 is not whole words, and 32 rows go another way."""
    shape = {"heads": 4, "kv_heads": 1, "head_dim": 32, "v_head_dim": v_head_dim, "dtype": dtype}
    case = Case([50, 9], [1, 1], cache_dtype=cache_dtype, **shape, device=launch.device)
    decode(launch, case, block_n=32, block_g=block_g)


OPTIONS = [
    {"window": 1},
    {"window": 20},
    {"window": 300},
    {"softcap": 2.0},
    {"sinks": True},
    {"window": 33, "softcap": 1.5, "sinks": True, "cache_dtype": torch.int8},
]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("options", OPTIONS)
def test_options(launch, splits, options):
    decode(launch, Case([66, 7], [1, 1], heads=2, kv_heads=1, **options, device=launch.device), splits)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "v_head_dim"), [(6, 2, 40, 40), (7, 1, 80, 48), (20, 1, 36, 20), (2, 2, 24, 32)]
)
def test_widths_and_groups(launch, splits, heads, kv_heads, head_dim, v_head_dim):
    """Also heads of one KV head in two tiles, the second partly empty."""
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "v_head_dim": v_head_dim}
    case = Case([33, 18], [1, 1], **shape, sinks=True, fp8_out=splits == 2, device=launch.device)
    decode(launch, case, splits)


@pytest.mark.parametrize("splits", [1, 2])
def test_prefills_of_a_mixed_step_are_left_alone(launch, splits):
    decode(launch, Case([40, 25, 9, 17], [3, 1, 9, 1], kv_heads=1, padding=2, device=launch.device), splits)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("options", [{}, {"window": 10}, {"cache_dtype": torch.float8_e4m3fn}])
def test_rows_of_any_sequence(launch, splits, options):
    """Each sees what its own token does: several of a sequence, and of another none."""
    d = launch.device
    case = Case([40, 25, 9], [3, 1, 4], kv_heads=1, **options, device=d)
    expected = case.expected()
    seqs, new, rows = [0, 0, 0, 1, 2, 2, 2, 2], case.inputs["query_start"].tolist(), [2, 3, 0, 6]
    case.q, case.out = case.q[rows].contiguous(), case.out[: len(rows)].contiguous()
    lengths = [case.lengths[seqs[row]] - (new[seqs[row] + 1] - 1 - row) for row in rows]
    case.inputs["seq_lens"] = torch.tensor(lengths, dtype=torch.int32, device=d)
    case.new, case.expected = [len(rows)], lambda: expected[rows]
    row_seqs = torch.tensor([seqs[row] for row in rows], dtype=torch.int32, device=d)
    decode(launch, case, splits, row_seqs=row_seqs)


POINTERS = {
    "q_ptr": "*bf16", "block_tables_ptr": "*i32", "query_start_ptr": "*i32", "seq_lens_ptr": "*i32",
    "sinks_ptr": "*bf16", "kv_scale_ptr": "*fp32", "out_scale_ptr": "*fp32", "out_ptr": "*bf16",
    "max_blocks": "i32", "scale": "fp32", "softcap": "fp32",
}  # fmt: skip
LLAMA = {
    "NUM_KV_HEADS": 8, "GROUP": 4, "HEAD_DIM": 128, "V_HEAD_DIM": 128, "BLOCK_SIZE": 64, "WINDOW": 0, "SOFTCAP": False,
    "SINKS": False, "BLOCK_G": 16, "BLOCK_N": 64, "PDL": True,
}  # fmt: skip
BOTH = {"PUSH": True, "PULL": True, "OF_ROWS": False}
SCRATCH = {
    "row_seqs_ptr": "*i32", "partial_ptr": "*i64", "lse_ptr": "*i64", "step_ptr": "*i32", "calls": "i32", "call": "i32"
}  # fmt: skip


@pytest.mark.parametrize("splits", [1, 16])
@pytest.mark.parametrize("cache", ["*bf16", "*fp8e4nv", "*i8"])
def test_compiles_for_the_real_shapes(compile_kernel, splits, cache):
    types = {**POINTERS, **SCRATCH, "k_cache_ptr": cache, "v_cache_ptr": cache}
    constants = {**LLAMA, **BOTH, "NUM_SPLITS": splits, "KV_QUANT": cache != "*bf16"}
    compiled = compile_kernel(
        decode_attention.decode_attention, args=types, constexprs=constants, num_warps=2, num_stages=3
    )
    assert compiled.spills == 0
    assert ("prmt.b32 both" in compiled.ptx) == (cache == "*fp8e4nv")
    assert compiled.shared < 113 * 1024  # two programs fit a multiprocessor
    for instruction in ("mma.sync", "cp.async.cg", "griddepcontrol.wait"):
        assert instruction in compiled.ptx
    assert ("ld.volatile.global" in compiled.ptx) == (splits > 1)


def test_compiles_for_latent_attention(compile_kernel):
    types = {**POINTERS, **SCRATCH, "k_cache_ptr": "*bf16", "v_cache_ptr": "*bf16"}
    shape = {"NUM_KV_HEADS": 1, "GROUP": 128, "HEAD_DIM": 576, "V_HEAD_DIM": 512, "BLOCK_N": 32}
    constants = {**LLAMA, **BOTH, **shape, "NUM_SPLITS": 8, "KV_QUANT": False}
    compiled = compile_kernel(
        decode_attention.decode_attention, args=types, constexprs=constants, num_warps=4, num_stages=2
    )
    assert compiled.spills == 0
    assert compiled.shared < 227 * 1024
