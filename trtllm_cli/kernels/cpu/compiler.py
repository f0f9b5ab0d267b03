"""Compiles the C++ kernels for named CPU features, at build time; the result is kept in the user's cache.

The features are named, not taken from `-march=native`, so that an engine says what it needs, and another machine can
refuse it with a clear message.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from trtllm_cli.errors import ResourceError
from trtllm_cli.kernels.compile_cache import cache_dir, keep

# Features that the kernels make use of, with the compiler's flag.
FEATURE_FLAGS = {
    "avx2": "-mavx2",
    "fma": "-mfma",
    "f16c": "-mf16c",
    "avx512f": "-mavx512f",
    "avx512bw": "-mavx512bw",
    "avx512dq": "-mavx512dq",
    "avx512vl": "-mavx512vl",
}
_FLAGS = (
    "-std=c++17", "-O2", "-ftree-vectorize", "-fPIC", "-pthread", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden", "-Wall", "-Wextra",
)  # fmt: skip
_LINK_FLAGS = ("-shared", "-pthread", "-static-libgcc", "-Wl,-O1", "-Wl,--build-id=none", "-Wl,-s")
_SOURCES = Path(__file__).parent


def find_compiler() -> Path | None:
    """The C++ compiler: $CXX, else g++, else clang++; None where there is none."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return Path(found)
    return None


@cache
def host_features() -> tuple[str, ...]:
    """Those of FEATURE_FLAGS that this machine's CPU has, in that order."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ()
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    return tuple(f for f in FEATURE_FLAGS if f in flags)


def host_arch() -> str:
    """This machine's architecture, as `platform.machine` names it: x86_64, aarch64."""
    return platform.machine()


def missing_features(features: Sequence[str]) -> tuple[str, ...]:
    """Those of an engine's features that this machine lacks."""
    return tuple(f for f in features if f not in host_features())


def compile_library(features: Sequence[str]) -> bytes:
    """The shared library with all kernels, for this machine's architecture and these of FEATURE_FLAGS.

    Takes some seconds, or none when the same sources were compiled before with the same compiler and flags. Raises
    ResourceError where there is no compiler, or it fails.
    """
    compiler = find_compiler()
    if compiler is None:
        raise ResourceError(
            "the cpu backend compiles its kernels, and there is no C++ compiler",
            fix="install g++ or clang++ (Debian: apt install g++), or name one in $CXX",
        )
    flags = [*_FLAGS, *(FEATURE_FLAGS[f] for f in features)]
    path = cache_dir() / f"cpu-{_key(compiler, flags)}.so"
    try:
        return path.read_bytes()
    except OSError:
        image = _compile(compiler, flags)
        keep(path, image)
        return image


def sources() -> list[Path]:
    """The C++ files, sorted."""
    return sorted(p for p in _SOURCES.iterdir() if p.suffix in (".cpp", ".h"))


def _key(compiler: Path, flags: Sequence[str]) -> str:
    """What the library depends on, hashed."""
    digest = hashlib.sha256()
    for part in (_run([str(compiler), "--version"]), platform.machine(), *flags, *_LINK_FLAGS):
        digest.update(part.encode() + b"\0")
    for source in sources():
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:32]


def _compile(compiler: Path, flags: Sequence[str]) -> bytes:
    units = [p for p in sources() if p.suffix == ".cpp"]
    with tempfile.TemporaryDirectory(prefix="trtllm-") as directory:
        objects = [str(Path(directory, p.stem + ".o")) for p in units]
        commands = [
            [str(compiler), *flags, "-c", str(p), "-o", o] for p, o in zip(units, objects, strict=True)
        ]  # fmt: skip
        with ThreadPoolExecutor(os.cpu_count()) as executor:
            list(executor.map(_run, commands))
        library = Path(directory, "kernels.so")
        _run([str(compiler), *_LINK_FLAGS, *objects, "-o", str(library)])
        return library.read_bytes()


def _run(command: list[str]) -> str:
    """What the command prints. Raises ResourceError with its last lines when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as e:
        raise ResourceError(f"cannot run the compiler {command[0]}: {e}", fix="name a C++ compiler in $CXX") from e
    if done.returncode:
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-8:])
        raise ResourceError(f"the compiler {command[0]} failed ({done.returncode}):\n{last}",
                            fix="name another C++ compiler in $CXX")  # fmt: skip
    return done.stdout
