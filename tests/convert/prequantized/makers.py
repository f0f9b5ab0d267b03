"""Quantized linears in each format's own layout, packed here step by step, and the weights that they stand for."""

import torch


def words(values, bits):
    """[n, m] small integers to int32 [n, m * bits / 32], the first in the lowest bits; as slow and plain as can be."""
    per_word = 32 // bits
    out = torch.zeros(values.shape[0], values.shape[1] // per_word, dtype=torch.int64)
    for j in range(values.shape[1]):
        out[:, j // per_word] |= values[:, j].long() << (bits * (j % per_word))
    return torch.where(out >= 2**31, out - 2**32, out).to(torch.int32)


def integers(out_features, in_features, bits, seed=0):
    return torch.randint(0, 1 << bits, (out_features, in_features), generator=torch.Generator().manual_seed(seed))


def positive(*shape, seed=1):
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 0.01 + 0.001).half()


def gptq(out_features, in_features, group, *, bits=4, symmetric=True, act_order=False, version=1, seed=0, g_idx=None):
    """(tensors by part, the float weight)."""
    q = integers(out_features, in_features, bits, seed)
    groups = in_features // group
    zeros = torch.full((groups, out_features), 1 << (bits - 1))
    if not symmetric:
        zeros = integers(groups, out_features, bits, seed + 2)
    scales = positive(groups, out_features, seed=seed + 1)
    g_idx = torch.arange(in_features) // group if g_idx is None else g_idx
    if act_order:
        g_idx = g_idx[torch.randperm(in_features, generator=torch.Generator().manual_seed(seed))]
    weight = (q - zeros[g_idx].T).float() * scales[g_idx].T.float()
    stored = (zeros - 1) % (1 << bits) if version == 1 else zeros
    return {
        "qweight": words(q, bits).T.contiguous(),
        "qzeros": words(stored, bits),
        "scales": scales,
        "g_idx": g_idx.int(),
    }, weight


def awq(out_features, in_features, group, seed=0):
    q, zeros = integers(in_features, out_features, 4, seed), integers(in_features // group, out_features, 4, seed + 1)
    scales = positive(in_features // group, out_features, seed=seed + 2)
    place = [0, 2, 4, 6, 1, 3, 5, 7]

    def pack(values):
        eights = values.unflatten(1, (-1, 8))[:, :, place]  # the nibble i of a word is column place[i]
        return words(eights.flatten(1), 4)

    g = torch.arange(in_features) // group
    weight = ((q - zeros[g]).float() * scales[g].float()).T
    return {"qweight": pack(q), "qzeros": pack(zeros), "scales": scales}, weight


def packed(out_features, in_features, group, *, bits=4, symmetric=True, seed=0):
    """compressed-tensors' pack-quantized."""
    q = integers(out_features, in_features, bits, seed)
    scales = positive(out_features, in_features // group, seed=seed + 1).bfloat16()
    g = torch.arange(in_features) // group
    zeros = torch.full((out_features, in_features // group), 1 << (bits - 1))
    tensors = {
        "weight_packed": words(q, bits), "weight_scale": scales,
        "weight_shape": torch.tensor([out_features, in_features]),
    }  # fmt: skip
    if not symmetric:
        zeros = integers(out_features, in_features // group, bits, seed + 2)
        tensors["weight_zero_point"] = words(zeros.T, bits).T.contiguous()
    return tensors, (q - zeros[:, g]).float() * scales[:, g].float()


def float8(out_features, in_features, scale, seed=0):
    """FP8 numbers, and what they stand for: `scale` broadcasts over [out, in]."""
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)) * 50
    q = weight.to(torch.float8_e4m3fn)
    return q, q.float() * scale.float()
