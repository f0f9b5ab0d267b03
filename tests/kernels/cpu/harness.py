"""Runs steps on numpy arrays and torch tensors."""

import numpy as np
import torch

from trtllm_cli.kernels.cpu import library
from trtllm_cli.kernels.cpu.pack import pack_linear
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
    """A packed weight that knows its step's arguments."""

    def __init__(self, weight, fmt, group_size=None, packed=None):
        self.packed = packed or pack_linear(weight, fmt, group_size)
        self.out_features, self.in_features = weight.shape
        self.arguments = {"fmt": fmt, "in_features": self.in_features, "out_features": self.out_features}
        if fmt == "int4":
            self.arguments["group_size"] = group_size

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


def as_torch(x):
    return torch.from_numpy(np.asarray(x))
