"""What compiles kernels for GPUs, where it is not there or another one is."""

import re

import pytest

from trtllm_cli.errors import ResourceError
from trtllm_cli.kernels.cuda import compiler
from trtllm_cli.kernels.cuda.kernel import ARCHITECTURES, KernelSource

SOURCE = KernelSource.of("rows", "unary", {"x_ptr": "*fp32"}, WIDTH=7)  # which no cache has


@pytest.mark.parametrize(
    ("version", "says", "fix"),
    [
        (None, "which is not installed", "trtllm-cli[cuda]"),
        ("3.10.0", "with triton 3.6 to 3.9; 3.10.0 is installed", "torch==2.11.*"),
        ("3.60.1", "3.60.1 is installed", "an environment of its own"),
        ("3.5.1", "3.5.1 is installed", "needs no triton"),
    ],
)
def test_another_compiler_is_refused_at_once(tmp_path, monkeypatch, version, says, fix):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiler, "triton_version", lambda: version)
    monkeypatch.setattr(compiler, "_Workers", lambda *_: pytest.fail("it compiles"))
    with pytest.raises(ResourceError, match=says) as caught:
        compiler.compile_kernels([SOURCE], "sm_90a")
    assert fix in caught.value.fix


@pytest.mark.parametrize("version", ["3.6.0", "3.7.0", "3.7.1", "3.8.0", "3.9.0"])
def test_what_the_kernels_compile_with_is_taken(tmp_path, monkeypatch, version):
    class Compiles(Exception):
        pass

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiler, "triton_version", lambda: version)
    monkeypatch.setattr(compiler, "_Workers", lambda *_: (_ for _ in ()).throw(Compiles))
    with pytest.raises(Compiles):
        compiler.compile_kernels([SOURCE], "sm_90a")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_driver_of_cuda_12_loads_what_is_compiled(arch):
    pytest.importorskip("triton")  # which assembler it takes for an architecture differs from version to version
    types = {"x_ptr": "*fp32", "out_ptr": "*fp32", "number": "fp32"}
    source = KernelSource.of("rows", "unary", types, WIDTH=64, X_STRIDE=64, BLOCK=64, OP="scale", PDL=False)
    cubin = compiler.compile_kernels([source], arch)[source].cubin
    releases = re.findall(rb"Cuda compilation tools, release (\d+)", cubin)  # none where CUDA 12 has the ABI of old
    assert cubin[:4] == b"\x7fELF"
    assert set(releases) <= {b"12"}
