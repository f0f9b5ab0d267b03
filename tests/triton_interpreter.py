"""Mends Triton's interpreter, in all versions that kernels compile with. Its `tl.dot` multiplies the bits of bfloat16
numbers, as integers; float32 becomes bfloat16 by rounding down; its scalars, which are arrays of one element, are no
indices to numpy 2.4; 3.9 takes no mask from a scalar; 3.8 finds no largest of NaN alone. And it makes anew what is the
same each time: a patched language at each call of a device function, a table of dtypes at each look into it, types of
shapes.
"""

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton.ir import ROUNDING_MODE
from triton.language import core
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_TORCH = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
_SIGNED = {1: np.int8, 2: np.int16, 4: np.int32}


def widened(x: TensorHandle) -> np.ndarray:
    kind = _TORCH.get(x.dtype.scalar)
    if kind is None:
        return x.data
    return _as_torch(x.data, kind).float().numpy()


def _as_torch(bits: np.ndarray, kind: torch.dtype) -> torch.Tensor:
    bits = np.ascontiguousarray(bits)
    return torch.from_numpy(bits.view(_SIGNED[bits.itemsize])).view(kind)


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    with np.errstate(invalid="ignore", over="ignore"):  # of infinities and NaN, as on the device
        product = np.matmul(widened(a), widened(b), dtype=d.data.dtype)
    return TensorHandle(product + d.data, d.dtype.scalar)


InterpreterBuilder.create_dot = _dot

_patch_tensor = interpreter._patch_lang_tensor


def _patch(tensor, scope):
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch

_patch_language, _patched = interpreter._patch_lang, set()


def _call(self, *args, **kwargs):
    if self.fn not in _patched:
        _patch_language(self.fn)
        _patched.add(self.fn)
    return self.rewrite()(*args, **kwargs)


interpreter.InterpretedFunction.__call__ = _call

_NUMPY = {
    tl.int1: "bool", tl.int8: "int8", tl.uint8: "uint8", tl.int16: "int16", tl.uint16: "uint16", tl.int32: "int32",
    tl.uint32: "uint32", tl.int64: "int64", tl.uint64: "uint64", tl.float16: "float16", tl.float32: "float32",
    tl.float64: "float64", tl.bfloat16: "uint16", tl.float8e5: "uint8", tl.float8e4nv: "uint8",
}  # fmt: skip
_numpy_of = {kind.name: np.dtype(name) for kind, name in _NUMPY.items()}


def _numpy_dtype(kind):
    scalar = kind.element_ty if isinstance(kind, tl.block_type) else kind
    return np.dtype(np.uint64) if isinstance(scalar, tl.pointer_type) else _numpy_of[scalar.name]


interpreter._get_np_dtype = _numpy_dtype

_type_of_values, _types_of_shapes = core._type_for_tuple_values, {}


def _type_for_tuple_values(values, fields=None):
    sizes = tuple(v.value if isinstance(v, tl.constexpr) else v for v in values)
    if fields is not None or any(type(size) is not int for size in sizes):
        return _type_of_values(values, fields)
    if sizes not in _types_of_shapes:
        _types_of_shapes[sizes] = _type_of_values(values)
    return _types_of_shapes[sizes]


core._type_for_tuple_values = _type_for_tuple_values

_generic_reduce = interpreter.ReduceOps.generic_reduce


def _reduce(self, tensors):
    """Neighbours at once, until one is left; else it would be an element at a time."""
    if self.axis is None:
        return _generic_reduce(self, tensors)
    data = [np.moveaxis(x.handle.data, self.axis, 0) for x in tensors]
    while len(data[0]) > 1:
        assert len(data[0]) % 2 == 0
        pairs = [self.to_tensor(x[i::2], tensor.dtype) for i in (0, 1) for x, tensor in zip(data, tensors, strict=True)]
        combined = self.combine_fn.fn(*pairs)
        data = [x.handle.data for x in (combined if isinstance(combined, tuple) else (combined,))]
    kept = [np.moveaxis(x, 0, self.axis) if self.keep_dims else x[0] for x in data]
    return [self.to_tensor(x, tensor.dtype) for x, tensor in zip(kept, tensors, strict=True)]


interpreter.ReduceOps.generic_reduce = _reduce

_min_max = interpreter.ReduceOps.min_max
_WITH_NAN = {np.nanmin: np.min, np.nanmax: np.max, np.nanargmin: np.argmin, np.nanargmax: np.argmax}


def _min_max_at(self, values, val_reduce_op, idx_reduce_op=None):
    """As before 3.8, which passes over NaN: numpy ends with an error where there is nothing else."""
    if idx_reduce_op is not None:
        val_reduce_op, idx_reduce_op = (_WITH_NAN.get(op, op) for op in (val_reduce_op, idx_reduce_op))
    return _min_max(self, values, val_reduce_op, idx_reduce_op)


interpreter.ReduceOps.min_max = _min_max_at


def _splat(self, ret_ty, arg):
    """Of ret_ty's kind: what comes from comparing scalars says that it is of the kind that was compared."""
    return TensorHandle(np.full(ret_ty.shape, arg.data.reshape(-1)[0], _numpy_dtype(ret_ty)), ret_ty.scalar)


InterpreterBuilder.create_splat = _splat

_BITS = {tl.float32: torch.int32, tl.bfloat16: torch.int16, tl.float8e4nv: torch.int8, tl.float8e5: torch.int8}
_convert_float, _FLOATS = interpreter._convert_float, {tl.float32: torch.float32, **_TORCH}


def _convert(data, source, destination, rounding_mode):
    """Nearest even, and what is too large for FP8 becomes its largest number, as on the device."""
    if rounding_mode not in (None, ROUNDING_MODE.RTNE) or source not in _FLOATS or destination not in _FLOATS:
        return _convert_float(data, source, destination, rounding_mode)
    x = _as_torch(data, _FLOATS[source])
    if destination == tl.float8e4nv:
        x = x.clamp(-448.0, 448.0)
    return x.to(_FLOATS[destination]).view(_BITS[destination]).numpy()


interpreter._convert_float = _convert
