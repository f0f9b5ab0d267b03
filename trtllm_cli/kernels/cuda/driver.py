"""The CUDA driver through ctypes: load cubins and launch them. Needs libcuda and nothing else.

Memory, streams and graphs are torch's; a launch is given torch's stream, and is captured like any other.
Driver API: docs.nvidia.com/cuda/cuda-driver-api.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import (
    POINTER,
    Structure,
    Union,
    byref,
    c_char_p,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_uint,
    c_uint64,
    c_void_p,
)
from functools import cache
from typing import Any

from trtllm_cli.errors import DeviceError, EngineError
from trtllm_cli.kernels.cuda.kernel import ARCHITECTURES, CompiledKernel

# What cubins need: the ABI of the compiler that made them, and programmatic launches inside graphs.
LEAST_DRIVER = 12080  # CUDA 12.8, as cuDriverGetVersion counts

_SUCCESS = 0
_ATTRIBUTE_MAJOR, _ATTRIBUTE_MINOR = 75, 76
_MAX_DYNAMIC_SHARED, _PREFERRED_SHARED_CARVEOUT = 8, 9
_ALL_SHARED = 100  # percent
_PROGRAMMATIC_STREAM_SERIALIZATION = 6
_LAZY_ENABLE_PEER_ACCESS = 1
_STATIC_SHARED_LIMIT = 48 * 1024


class _IpcHandle(Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * 64),)


class _AttributeValue(Union):
    _fields_ = (("flag", c_int), ("pad", ctypes.c_char * 64))


class _Attribute(Structure):
    _fields_ = (("id", c_int), ("pad", ctypes.c_char * 4), ("value", _AttributeValue))


class _Config(Structure):
    _fields_ = (
        *((f"grid_{axis}", c_uint) for axis in "xyz"),
        *((f"block_{axis}", c_uint) for axis in "xyz"),
        ("shared", c_uint),
        ("stream", c_void_p),
        ("attributes", POINTER(_Attribute)),
        ("num_attributes", c_uint),
    )


_PARAMETERS: dict[str, Any] = {"ptr": c_void_p, "i32": c_int32, "i64": c_int64, "fp32": c_float}


class Driver:
    """The current device's driver. torch has made its context already."""

    def __init__(self, lib: ctypes.CDLL, device: int) -> None:
        self._lib = lib
        handle = c_int()
        self.check(lib.cuDeviceGet(byref(handle), device))
        major, minor = c_int(), c_int()
        self.check(lib.cuDeviceGetAttribute(byref(major), _ATTRIBUTE_MAJOR, handle))
        self.check(lib.cuDeviceGetAttribute(byref(minor), _ATTRIBUTE_MINOR, handle))
        self.capability = (major.value, minor.value)
        name = ctypes.create_string_buffer(256)
        self.check(lib.cuDeviceGetName(name, len(name), handle))
        self.name = name.value.decode()

    @classmethod
    @cache
    def open(cls, device: int = 0) -> Driver:
        """The driver of a device. Raises DeviceError where there is none, or it is too old."""
        try:
            lib = ctypes.CDLL("libcuda.so.1")
        except OSError:
            raise DeviceError(
                "there is no NVIDIA driver on this machine (libcuda.so.1 is missing)",
                fix="run the engine where there is an NVIDIA GPU, or build one with --backend cpu",
            ) from None
        if code := lib.cuInit(0):
            raise DeviceError(f"the NVIDIA driver does not start: {_describe(lib, code)}", fix="see nvidia-smi")
        version = c_int()
        lib.cuDriverGetVersion(byref(version))
        if version.value < LEAST_DRIVER:
            raise DeviceError(
                f"the NVIDIA driver is for CUDA {_dotted(version.value)}, "
                f"engines need {_dotted(LEAST_DRIVER)} or newer",
                fix="install a newer driver (570 or later)",
            )
        return cls(lib, device)

    @property
    def arch(self) -> str:
        """What to compile for: "sm_90a" on an H100 or H200."""
        major, minor = self.capability
        names = (name for name, capability in ARCHITECTURES.items() if capability == self.capability)
        return next(names, f"sm_{major}{minor}")

    def load(self, kernel: CompiledKernel, *, all_shared: bool = False) -> LoadedKernel:
        """The kernel on the device. Raises EngineError where the driver refuses the code.

        `all_shared`: multiprocessors that run it are to share all of their memory, not as little as it needs, so that
        programs of the kernel behind it, which want to begin before it has ended, have room for their tiles.
        """
        library, handle, function = c_void_p(), c_void_p(), c_void_p()
        code = self._lib.cuLibraryLoadData(byref(library), kernel.cubin, None, None, 0, None, None, 0)
        if code:
            raise EngineError(
                f"the driver does not load `{kernel.entry}`: {_describe(self._lib, code)}", fix="rebuild the engine"
            )
        self.check(self._lib.cuLibraryGetKernel(byref(handle), library, kernel.entry.encode()))
        self.check(self._lib.cuKernelGetFunction(byref(function), handle))
        if kernel.shared > _STATIC_SHARED_LIMIT:
            self.check(self._lib.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, kernel.shared))
        if all_shared:
            self.check(self._lib.cuFuncSetAttribute(function, _PREFERRED_SHARED_CARVEOUT, _ALL_SHARED))
        return LoadedKernel(self, kernel, function)

    def share(self, address: int) -> tuple[bytes, int]:
        """What another process needs to see the memory that an address is in, and how far into it the address is.

        Raises DeviceError for memory that cannot be shared.
        """
        handle, base, size = _IpcHandle(), c_uint64(), c_size_t()
        self.check(self._lib.cuMemGetAddressRange_v2(byref(base), byref(size), c_uint64(address)))
        self.check(self._lib.cuIpcGetMemHandle(byref(handle), c_uint64(address)))
        return bytes(handle.reserved), address - base.value

    def open_shared(self, handle: bytes) -> int:
        """Where another process's memory begins in this one's addresses. Raises DeviceError where it cannot be seen."""
        base = c_uint64()
        known = _IpcHandle((ctypes.c_ubyte * 64)(*handle))
        self.check(self._lib.cuIpcOpenMemHandle_v2(byref(base), known, _LAZY_ENABLE_PEER_ACCESS))
        return base.value

    def close_shared(self, base: int) -> None:
        """Forgets what `open_shared` gave."""
        self.check(self._lib.cuIpcCloseMemHandle(c_uint64(base)))

    def launch(self, config: _Config, function: c_void_p, parameters: Any) -> None:
        """Enqueues a prepared launch."""
        code = self._lib.cuLaunchKernelEx(byref(config), function, parameters, None)
        if code:
            self.check(code)

    def check(self, code: int) -> None:
        """Raises DeviceError for what the driver answers, unless it is success."""
        if code != _SUCCESS:
            raise DeviceError(f"the GPU failed: {_describe(self._lib, code)}", fix="see nvidia-smi and dmesg")


class LoadedKernel:
    """A kernel on the device."""

    def __init__(self, driver: Driver, kernel: CompiledKernel, function: c_void_p) -> None:
        self.driver, self.kernel, self.function = driver, kernel, function

    def prepare(self, grid: Sequence[int], values: Sequence[int | float]) -> Launch:
        """A launch with these arguments: addresses and numbers in the kernel's order."""
        return Launch(self, grid, values)


class Launch:
    """A kernel with its grid and arguments, as the driver takes them; enqueueing it costs one call."""

    def __init__(self, loaded: LoadedKernel, grid: Sequence[int], values: Sequence[int | float]) -> None:
        kernel = loaded.kernel
        assert len(values) == len(kernel.params), f"{kernel.entry}: {len(values)} arguments for {len(kernel.params)}"
        self._driver, self._function = loaded.driver, loaded.function
        # Triton's kernels end with two pointers to scratch memory, which these do not use.
        boxes = [_PARAMETERS[kind](value) for kind, value in zip(kernel.params, values, strict=True)]
        self._boxes = [*boxes, c_void_p(), c_void_p()]
        self._parameters = (c_void_p * len(self._boxes))(*(ctypes.addressof(box) for box in self._boxes))
        self._config = _Config(*grid, 32 * kernel.num_warps, 1, 1, kernel.shared)
        if kernel.uses_pdl:
            self._attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION)
            self._attribute.value.flag = 1
            self._config.attributes, self._config.num_attributes = ctypes.pointer(self._attribute), 1

    def set_stream(self, stream: int) -> None:
        """Where `enqueue` puts it."""
        self._config.stream = stream

    def resize(self, grid: Sequence[int], values: Sequence[tuple[int, int]]) -> None:
        """Another grid, and other values of some of the arguments: (place, value)."""
        self._config.grid_x, self._config.grid_y, self._config.grid_z = grid
        for place, value in values:
            self._boxes[place].value = value

    def enqueue(self) -> None:
        """Puts it on its stream, or into the graph that the stream captures."""
        self._driver.launch(self._config, self._function, self._parameters)


def _describe(lib: ctypes.CDLL, code: int) -> str:
    text = c_char_p()
    lib.cuGetErrorString(code, byref(text))
    return f"{(text.value or b'unknown error').decode()} (CUDA error {code})"


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


@cache
def gpu_arch() -> str | None:
    """What to compile for on this machine: its first NVIDIA GPU's architecture, None where there is none that runs."""
    try:
        return Driver.open().arch
    except DeviceError:
        return None
