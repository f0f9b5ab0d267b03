"""What Triton's versions name differently in Gluon, by one name, so that kernels compile with each of them."""

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # of a program's threads; the latter name in 3.6
copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # in 3.6 and 3.7

_memory = gl.shared_memory_descriptor
reinterpret = getattr(_memory, "reinterpret", None) or _memory._reinterpret  # (memory, dtype, shape, layout); until 3.8
