"""Runs steps on numpy arrays and torch tensors."""

import numpy as np
import torch

from trtllm_cli.kernels.cpu import library
from trtllm_cli.kernels.cpu.pack import pack, pack_linear, step_arguments, unpack_linear
from trtllm_cli.run.model_inputs import ModelInputs


def ints(values):
    return np.ascontiguousarray(values, dtype=np.int32)


def address(x):
    if x is None:
        return None
    assert x.flags.c_contiguous if isinstance(x, np.ndarray) else x.is_contiguous()
    return x.ctypes.data if isinstance(x, np.ndarray) else x.data_ptr()


def rows_batch(num_tokens, num_logits=0, logits_indices=None, input_ids=None):
    """A batch for steps that look at rows only."""
    indices = np.zeros(num_logits) if logits_indices is None else logits_indices
    return ModelInputs(
        input_ids=ints(np.zeros(num_tokens) if input_ids is None else input_ids),
        positions=ints(np.zeros(num_tokens)),
        slot_mapping=ints(np.zeros(num_tokens)),
        block_tables=ints(np.zeros((1, 1))),
        query_start=ints([0, num_tokens]),
        seq_lens=ints([num_tokens]),
        logits_indices=ints(indices),
    )


def run(pool, steps, inputs):
    pool.run(library.plan(steps), library.TlBatch.of(inputs))


class PackedLinear:
    """A packed weight that knows its step's arguments. `parts` are a weight that is quantized already."""

    def __init__(self, weight, fmt, parts=None):
        self.fmt = fmt
        self.out_features, self.in_features = weight.shape
        self.packed = pack_linear(weight, fmt) if parts is None else pack(fmt, parts, self.in_features)
        self.arguments = step_arguments(fmt) | {"in_features": self.in_features, "out_features": self.out_features}

    @property
    def plain(self):
        """The float32 weight that the kernels multiply by."""
        return unpack_linear(self.packed, self.fmt, self.out_features, self.in_features)

    def __call__(self, pool, x, bias=None, out=None, **more):
        """out [rows, out_features] of the numpy x; `out` is accumulated into where it is given."""
        accumulate = out is not None
        if out is None:
            out = np.full((len(x), self.out_features), np.nan, np.float32)
        step = library.linear_step(
            address(x), address(out), address(self.packed["weight"]), scale=address(self.packed.get("scale")),
            bias=address(bias), accumulate=accumulate, **self.arguments, **more,
        )  # fmt: skip
        run(pool, [step], rows_batch(len(x)))
        return out


def random_parts(fmt, out_features, in_features, rng):
    """A random weight in its format, as a checkpoint has it: numpy's generator, torch tensors."""
    groups = -(-in_features // fmt.group_size) if fmt.group_size else None
    shape = (out_features,) if groups is None else (out_features, groups)
    parts = {"scale": as_torch(rng.random(shape, np.float32) + 0.1)}
    match fmt.name:
        case "int8":
            parts["weight"] = as_torch(rng.integers(-127, 128, (out_features, in_features), np.int8))
        case "fp8":
            codes = rng.integers(0, 127, (out_features, in_features), np.uint8)
            codes |= rng.integers(0, 2, codes.shape, np.uint8) << 7
            parts["weight"] = as_torch(codes).view(torch.float8_e4m3fn)
        case "int4" | "fp4":
            parts["weight"] = as_torch(rng.integers(0, 256, (out_features, in_features // 2), np.uint8))
    if fmt.name == "fp4":
        parts["scale"] = parts["scale"].to(torch.float8_e4m3fn)
        parts["global_scale"] = torch.tensor([0.3])
    if fmt.has_zero:
        parts["zero"] = as_torch(rng.integers(0, 16, shape).astype(np.float32))
    return parts


def as_torch(x):
    return torch.from_numpy(np.asarray(x))
