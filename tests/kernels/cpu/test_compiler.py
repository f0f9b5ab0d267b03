import os

import pytest

from trtllm_cli.errors import ResourceError
from trtllm_cli.kernels.cpu import compiler


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "trtllm"


@pytest.fixture
def fake_compiler(monkeypatch, tmp_path):
    """A compiler that writes its arguments as the output; it counts its runs in a file."""
    script = tmp_path / "fake-c++"
    script.write_text(
        "#!/bin/sh\n[ \"$1\" = --version ] && { echo fake 1.0; exit; }\necho run >> \"$0.log\"\n"
        "args=\"$*\"\nwhile [ $# -gt 1 ]; do [ \"$1\" = -o ] && echo \"$args\" > \"$2\"; shift; done\n"
    )  # fmt: skip
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return script


def test_the_compiler_is_cxx_first(fake_compiler):
    assert compiler.find_compiler() == fake_compiler


def test_no_compiler(monkeypatch, cache):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    assert compiler.find_compiler() is None
    with pytest.raises(ResourceError, match="no C\\+\\+ compiler") as e:
        compiler.compile_library(())
    assert "install g++" in e.value.fix


def test_a_failing_compiler_tells_why(monkeypatch, cache, tmp_path):
    script = tmp_path / "broken"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && exit\necho "simd.h:1: no such thing" >&2\nexit 3\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(ResourceError, match=r"failed \(3\):\nsimd.h:1: no such thing"):
        compiler.compile_library(())


def test_a_library_is_compiled_once(fake_compiler, cache):
    runs = fake_compiler.with_name("fake-c++.log")
    first = compiler.compile_library(("avx2", "fma"))
    count = len(runs.read_text().splitlines())
    assert compiler.compile_library(("avx2", "fma")) == first
    assert len(runs.read_text().splitlines()) == count
    compiler.compile_library(("avx2",))
    assert len(runs.read_text().splitlines()) == 2 * count
    assert len(os.listdir(cache)) == 2


def test_a_cache_that_cannot_be_written_is_no_error(fake_compiler, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compiler.compile_library(())


def test_features():
    assert compiler.missing_features(compiler.host_features()) == ()
    assert compiler.missing_features(("avx2", "no-such-thing"))[-1] == "no-such-thing"
