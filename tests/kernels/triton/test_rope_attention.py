"""Rotary positions, append and attention as one kernel, against the kernels that do them one after another."""

import pytest
import torch

from trtllm_cli.kernels.triton import cache_attention, decode_attention, rope_append, rope_attention

KV_HEADS = 2


@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        ([1, 40, 17], {}),
        ([90], {"splits": 8}),  # most splits take one tile
        ([90, 33], {"splits": 2}),  # and here three
        ([50, 7], {"norm": True, "group": 3}),
        ([64, 65, 1], {"window": 20, "softcap": 30.0}),
        ([70, 2], {"cache": torch.float8_e4m3fn}),
        ([100, 31], {"cache": torch.float8_e4m3fn, "splits": 2, "head_dim": 64}),
        ([30, 60], {"cache": torch.int8, "sinks": True}),
        ([45, 45], {"out": torch.float8_e4m3fn, "splits": 1}),
        ([33, 80], {"group": 12}),  # two tiles of heads
        ([33, 80], {"group": 12, "block_g": 16}),
        ([300, 130, 65], {"warps": 4, "splits": 2, "stages": 1}),
        ([260, 40], {"warps": 2, "splits": 2, "stages": 3, "window": 150, "head_dim": 64}),
        ([180, 1], {"warps": 4, "cache": torch.float8_e4m3fn, "head_dim": 128, "norm": True}),
        ([80], {"warps": 2, "size": 8, "splits": 2}),  # a warp's tokens lie in two blocks
    ],
)
@pytest.mark.parametrize("ahead", [False, True])
def test_as_one_after_another(launch, lengths, options, ahead):
    """By the kernel for few sequences, and by the one that reads all older tokens of a part ahead."""
    torch.manual_seed(len(lengths) + sum(lengths))
    d, o = launch.device, {"group": 2, "head_dim": 32, "splits": 4, "cache": torch.bfloat16, **options}
    dim, splits, size, padding = o["head_dim"], o["splits"], o.get("size", 16), 1
    heads, seqs = KV_HEADS * o["group"], len(lengths)
    quantized = o["cache"] != torch.bfloat16
    pages = [-(-n // size) for n in lengths]
    table = torch.full((seqs + padding, max(pages) + 1), 10**6, dtype=torch.int32)
    for row, ids in zip(table, torch.randperm(sum(pages)).int().split(pages), strict=False):
        row[: len(ids)] = ids
    last = torch.tensor([n - 1 for n in lengths])
    slots = (table[torch.arange(seqs), last // size] * size + last % size).int()
    starts = torch.tensor([*range(seqs + 1), *[seqs] * padding], dtype=torch.int32, device=d)
    lens = torch.tensor([*lengths, *[0] * padding], dtype=torch.int32, device=d)
    positions, slots, table = last.int().to(d), slots.to(d), table.to(d)
    qkv = torch.randn(seqs, (heads + 2 * KV_HEADS) * dim, device=d).bfloat16()
    norms = [torch.rand(dim, device=d).bfloat16() + 0.5 for _ in range(2)]
    angles = torch.randn(max(lengths), dim // 2, device=d)
    angles = torch.cat([angles.cos(), angles.sin()], 1)
    sinks, kv_scale, out_scale = torch.randn(heads, device=d), torch.tensor([0.02, 0.03], device=d), torch.ones(1) / 64
    caches = [torch.randn(sum(pages), KV_HEADS, size, dim, device=d) * (40 if quantized else 1) for _ in range(2)]
    caches = [c.clamp(-127, 127).to(o["cache"]) for c in caches]
    for cache in caches:  # the new token's rows are not to be read
        cache.view(torch.uint8 if quantized else torch.int16).transpose(1, 2).flatten(0, 1)[slots.long()] = 0x7F
    window, softcap, norm = o.get("window", 0), o.get("softcap", 0.0), o.get("norm", False)
    out_type, partial = o.get("out", torch.bfloat16), (seqs + padding) * heads * splits

    def outputs():
        out = torch.zeros(seqs, heads * dim, device=d).to(out_type)
        scratch = torch.zeros(partial * dim, dtype=torch.int64, device=d), torch.zeros(partial, dtype=torch.int64).to(d)
        return [c.clone() for c in caches], out, scratch

    common = {
        "NUM_KV_HEADS": KV_HEADS, "HEAD_DIM": dim, "BLOCK_SIZE": size, "KV_QUANT": quantized,
    }  # fmt: skip
    attention = common | {
        "GROUP": o["group"], "WINDOW": window, "SOFTCAP": softcap > 0, "SINKS": "sinks" in o, "NUM_SPLITS": splits,
    }  # fmt: skip
    step = torch.full((1,), 3, dtype=torch.int32, device=d)
    warps, block_g = o.get("warps", 1), o.get("block_g", 8)
    batch, scales = (table, starts, lens, sinks, kv_scale, out_scale.to(d)), (table.shape[1], dim**-0.5, softcap)
    phases = [(True, True)] if d == "cuda" else [(True, False), (False, True)]

    def grid(heads_at_once):
        return splits, seqs + padding, KV_HEADS * -(-o["group"] // heads_at_once)

    (k, v), expected, scratch = outputs()
    q = torch.zeros(seqs, heads * dim, device=d).bfloat16()
    launch(
        rope_append.rope_append, (seqs, heads + 2 * KV_HEADS), qkv, *norms, angles, positions, slots, kv_scale, q, k, v,
        q, q, seqs, 1e-5, NUM_HEADS=heads, DIM=dim, NEOX=True, NORM=norm, NEW_STRIDE=0, TOKENS=1, HEADS=1,
        **common,
    )  # fmt: skip
    for push, pull in phases:
        launch(
            decode_attention.decode_attention, grid(16), q, k, v, *batch, expected, step, *scratch, step, 5, 2, *scales,
            V_HEAD_DIM=dim, BLOCK_G=16, BLOCK_N=16, OF_ROWS=False, PUSH=push, PULL=pull, **attention,
        )  # fmt: skip
    (new_k, new_v), found, scratch = outputs()
    rope, tiles = (*norms, angles, positions, slots), {"BLOCK_N": 16 * warps, "STAGES": o.get("stages", 2)}
    for push, pull in phases:
        if ahead:
            parts, seqs_padded, groups = grid(block_g)
            launch(
                cache_attention.cache_attention, (parts, groups, seqs_padded), qkv, new_k, new_v, *batch, found,
                *scratch, step, *rope, 5, 2, *scales, 1e-5, ROPE=True, NORM=norm, BLOCK_G=block_g, SHARE=32, PUSH=push,
                PULL=pull, num_warps=warps, **tiles, **attention,
            )  # fmt: skip
        else:
            launch(
                rope_attention.rope_decode_attention, grid(block_g), qkv, *rope, new_k, new_v, *batch, found, *scratch,
                step, 5, 2, *scales, 1e-5, NORM=norm, BLOCK_G=block_g, PUSH=push, PULL=pull, num_warps=warps, **tiles,
                **attention,
            )  # fmt: skip
    for one, other in ((new_k, k), (new_v, v)):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    assert expected.float().isfinite().all()
    assert expected.float().norm() > 1
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    assert error.item() < (0.03 if out_type == torch.float8_e4m3fn else 4e-3)


@pytest.mark.parametrize("cache", ["*bf16", "*fp8e4nv"])
def test_the_cache_is_read_ahead_of_the_linear_in_front(compile_kernel, cache):
    types = {
        "qkv_ptr": "*bf16", "q_norm_ptr": "*bf16", "k_norm_ptr": "*bf16", "table_ptr": "*fp32", "positions_ptr": "*i32",
        "slot_mapping_ptr": "*i32", "k_cache_ptr": cache, "v_cache_ptr": cache, "block_tables_ptr": "*i32",
        "query_start_ptr": "*i32", "seq_lens_ptr": "*i32", "sinks_ptr": "*bf16", "kv_scale_ptr": "*fp32",
        "out_scale_ptr": "*fp32", "out_ptr": "*bf16", "partial_ptr": "*i64", "lse_ptr": "*i64", "step_ptr": "*i32",
        "calls": "i32", "call": "i32", "max_blocks": "i32", "scale": "fp32", "softcap": "fp32", "eps": "fp32",
    }  # fmt: skip
    constants = {
        "NUM_KV_HEADS": 8, "GROUP": 4, "HEAD_DIM": 128, "BLOCK_SIZE": 64, "WINDOW": 0, "SOFTCAP": False, "SINKS": False,
        "KV_QUANT": cache != "*bf16", "NORM": False, "BLOCK_G": 8, "BLOCK_N": 64, "NUM_SPLITS": 8, "STAGES": 2,
        "PUSH": True, "PULL": True, "PDL": True,
    }  # fmt: skip
    kernel = compile_kernel(rope_attention.rope_decode_attention, types, constants, num_warps=4)
    assert kernel.spills == 0
    before, behind = kernel.ptx.split("griddepcontrol.wait")[:2]
    tile = 2 * 64 * 128 * (2 if cache == "*bf16" else 1)  # keys and values
    assert before.count("cp.async.cg.shared.global") >= tile / (4 * 32 * 16)
    values = "ldmatrix.sync.aligned.m8n8.x4.trans" if cache == "*bf16" else "cvt.rn.f16x2.e4m3x2"
    assert values in before  # values are operands already
    path = behind[: behind.index("st.global")]  # to what other programs are shown, of one tile
    path = path[: path.index("cp.async")] + path[path.rindex("cp.async") :]
    assert "ld.global" not in path[path.index("mma.sync") :]  # the new token's were asked
    assert path.count("bar.sync") <= 3
