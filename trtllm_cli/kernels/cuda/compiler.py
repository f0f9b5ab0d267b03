"""Compiles Triton kernels to cubins for a named architecture, at build time, with or without a GPU.

Workers are processes (`compile_worker.py`), as many as cores. What was compiled before, from the same sources by the
same compiler, comes from the user's cache.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import queue
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from trtllm_cli.errors import ResourceError
from trtllm_cli.kernels.compile_cache import cache_dir, keep
from trtllm_cli.kernels.cuda.kernel import CompiledKernel, KernelSource
from trtllm_cli.machine import available_cores

PACKAGE = "trtllm_cli.kernels.triton"
_TRITONS = ("3.6", "3.7", "3.8", "3.9")  # with which all kernels compile and the tests pass
_MEASURED = "3.6.0"  # whose machine code made the figures
_TORCH = "torch==2.11.*"  # asks for that one


def compile_kernels(
    sources: Sequence[KernelSource], arch: str, progress: Callable[[int, int], None] | None = None
) -> dict[KernelSource, CompiledKernel]:
    """Machine code for each of `sources`. Raises ResourceError where there is no compiler, or it fails."""
    wanted = list(dict.fromkeys(sources))
    compiled = {source: found for source in wanted if (found := _find(source, arch)) is not None}
    missing = [source for source in wanted if source not in compiled]
    if missing:
        _check_compiler()
        with _Workers(min(available_cores(), len(missing))) as workers:
            for source, kernel in zip(missing, workers.map(missing, arch), strict=True):
                compiled[source] = kernel
                if progress is not None:
                    progress(len(compiled), len(wanted))
    return compiled


@cache
def triton_version() -> str | None:
    """The installed compiler's version, or None."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def source_digest(*modules: str) -> str:
    """Of modules of kernels and of what they import of the others."""
    digest, wanted, seen = hashlib.sha256(), [*modules], set()
    while wanted:
        name = wanted.pop()
        if name not in seen:
            seen.add(name)
            text = _source_file(name).read_bytes()
            digest.update(name.encode() + b"\0" + text + b"\0")
            wanted += sorted(re.findall(rf"from {PACKAGE}\.(\w+) import", text.decode()))
    digest.update((Path(__file__).parent / "compile_worker.py").read_bytes())
    return digest.hexdigest()


def _full_name(module: str) -> str:
    """Of a module of kernels; a name with dots is a full one, of a test."""
    return module if "." in module else f"{PACKAGE}.{module}"


def _source_file(module: str) -> Path:
    if "." not in module:
        return Path(__file__).parent.parent / "triton" / f"{module}.py"
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


def _check_compiler() -> None:
    """Raises ResourceError where Triton is not there, or another than the kernels were compiled with: what Gluon has
    is named differently from version to version, and older ones do not have it.
    """
    version = triton_version()
    if version is None:
        raise ResourceError(
            "the cuda backend compiles its kernels with triton, which is not installed",
            fix=f"pip install 'trtllm-cli[cuda]', or triton=={_MEASURED}",
        )
    if not version.startswith(tuple(f"{series}." for series in _TRITONS)):
        raise ResourceError(
            f"the cuda backend compiles its kernels with {_tritons()}; {version} is installed, as torch "
            f"{importlib.metadata.version('torch')} may ask for",
            fix=f"build in an environment of its own, with {_TORCH} and 'trtllm-cli[cuda]' (README, Install); running "
            "the engine needs no triton",
        )


def _tritons() -> str:
    return f"triton {_TRITONS[0]} to {_TRITONS[-1]}"


class _Workers:
    """Compiler processes, a request at a time each."""

    def __init__(self, count: int) -> None:
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        env["TRITON_DISABLE_LINE_INFO"] = "1"  # else cubins hold source paths
        root = str(Path(__file__).parents[3])
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (root, env.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "trtllm_cli.kernels.cuda.compile_worker"]
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                             env=env, text=True)
            for _ in range(count)
        ]  # fmt: skip
        self._free: queue.SimpleQueue[subprocess.Popen[str]] = queue.SimpleQueue()
        for process in self._processes:
            self._free.put(process)
        self._pool = ThreadPoolExecutor(count)

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        for process in self._processes:
            process.kill()
            process.communicate()

    def map(self, sources: Sequence[KernelSource], arch: str) -> Any:
        """The compiled kernels, in order."""
        return self._pool.map(lambda source: self._compile(source, arch), sources)

    def _compile(self, source: KernelSource, arch: str) -> CompiledKernel:
        request = {**source.to_json(), "module": _full_name(source.module), "arch": arch, "ptx": True}
        process = self._free.get()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        self._free.put(process)
        answer = json.loads(line) if line else {"error": "the compiler process ended"}
        if "error" in answer:
            raise ResourceError(
                f"triton {triton_version()} cannot compile `{source.function}` for {arch}: {answer['error']}",
                fix=f"the kernels are written for {_tritons()}",
            )
        kernel = _kernel(answer)
        keep(_path(source, arch), json.dumps(answer).encode())
        return kernel


def _kernel(answer: dict[str, Any]) -> CompiledKernel:
    return CompiledKernel.from_json(answer, base64.b64decode(answer["cubin"]))


def _path(source: KernelSource, arch: str) -> Path:
    key = json.dumps([source.to_json(), arch, triton_version(), source_digest(source.module)])
    return cache_dir() / "cubins" / f"{source.function}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _find(source: KernelSource, arch: str) -> CompiledKernel | None:
    """What the cache has."""
    try:
        return _kernel(json.loads(_path(source, arch).read_bytes()))
    except (OSError, ValueError, TypeError, KeyError):
        return None
