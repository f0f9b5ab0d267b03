"""The timing cache's file: its format, merging, and files that are none."""

import json
import os
import random
from pathlib import Path

import pytest

from trtllm_cli.build import timing_cache
from trtllm_cli.build.backends.cuda_linears import LinearShape
from trtllm_cli.build.timing_cache import LinearTimes, TimedShape, TimingCache, TokenTimes, merged, read, update
from trtllm_cli.errors import ResourceError, TimingCacheError

GOLDEN = Path(__file__).parents[1] / "golden" / "timing_cache.json"


def shape(form="bf16", n=6144, k=4096, **fields):
    return TimedShape.of(LinearShape(form, n, k, **fields))


def entry(shape, *times, gpu="NVIDIA H200", arch="sm_90a", kernels="0123456789abcdef" * 4, triton="3.6.0"):
    return LinearTimes(gpu=gpu, arch=arch, kernels=kernels, triton=triton, shape=shape, times=list(times))


def times(tokens, cublas_us, **tactics):
    return TokenTimes(
        tokens=tokens, cublas_us=cublas_us, tactics={name.replace("_", " "): us for name, us in tactics.items()}
    )


def small():
    """What the golden file holds."""
    gate_up = shape("int4", 28672, group=128, has_zero=True, gated="silu")
    return TimingCache(
        linears=[
            entry(
                shape(),
                times(1, 15.502, vector_1_2_2048_4_2=13.012, fragment_8_1_2_4_1_8=None),
                times(64, None, skinny_64_64_128_2_4_4=21.0),
            ),
            entry(shape("fp8", 4096, w_scale="row", x_scale="one"), times(2, 9.5)),
            entry(gate_up, times(1, 80.0, fragment_8_1_2_2_1_4=28.125)),
            entry(shape(), times(1, 19.0, vector_1_2_2048_4_2=17.5), gpu="NVIDIA H100 80GB HBM3"),
        ]
    )


def test_the_file_is_as_it_always_was(tmp_path):
    update(tmp_path / "made" / "cache.json", small(), "--output-timing-cache")
    assert (tmp_path / "made" / "cache.json").read_bytes() == GOLDEN.read_bytes()
    assert read(GOLDEN) == merged([small()])


def test_merging_keeps_all_in_one_order():
    cache, random_ = small(), random.Random(0)
    wanted = merged([cache])
    assert len(wanted.linears) == len(cache.linears)
    for _ in range(10):
        parts = [TimingCache(linears=[e]) for e in cache.linears]
        random_.shuffle(parts)
        assert merged([*parts, cache]) == wanted


def test_a_later_time_takes_the_place_of_an_earlier_one():
    old = TimingCache(linears=[entry(shape(), times(1, 10.0, vector_1_2_2048_4_2=5.0), times(2, 11.0))])
    new = TimingCache(linears=[entry(shape(), times(1, 9.0, fragment_8_1_2_4_1_8=6.0))])
    (both,) = merged([old, new]).linears
    assert both.times == [
        times(1, 9.0, fragment_8_1_2_4_1_8=6.0, vector_1_2_2048_4_2=5.0),
        times(2, 11.0),
    ]


def test_a_file_that_is_there_is_added_to(tmp_path):
    file = tmp_path / "cache.json"
    update(file, TimingCache(linears=small().linears[:1]), "--output-timing-cache")
    update(file, TimingCache(linears=small().linears[1:]), "--output-timing-cache")
    assert file.read_bytes() == GOLDEN.read_bytes()
    assert os.listdir(tmp_path) == ["cache.json"]


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "cache.json"
    update(file, small(), "--output-timing-cache")

    def full(self, data):
        self.touch()
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ResourceError, match="the disk is full"):
        update(file, small(), "--output-timing-cache")
    assert file.read_bytes() == GOLDEN.read_bytes()
    assert os.listdir(tmp_path) == ["cache.json"]


def test_the_users_own_cache_may_be_lost(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert timing_cache.read_user_cache() == TimingCache()
    timing_cache.update_user_cache(small())
    assert timing_cache.read_user_cache() == merged([small()])
    (file,) = (tmp_path / "trtllm").iterdir()
    file.write_text("hello")
    assert timing_cache.read_user_cache() == TimingCache()
    timing_cache.update_user_cache(small())
    assert timing_cache.read_user_cache() == merged([small()])
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # which is no directory
    timing_cache.update_user_cache(small())


# Files that are none, or mean harm: (where in the golden file, what is put there, what is said of it).
TIME = ("linears", 0, "times", 0)
CHANGES = [
    (("format_version",), 2, "format version 2; this trtllm reads 1"),
    (("format_version",), ..., "no format version"),
    (("format_version",), [[]] * 1000, "format version"),
    (("linears",), {}, "linears"),
    (("linears", 0), [], "linears.0"),
    (("more",), 1, "`more` is unknown"),
    ((*TIME, "more"), 1, "more` is unknown"),
    (("linears", 0, "gpu"), ..., "gpu` is missing"),
    (("linears", 0, "gpu"), 7, "linears.0.gpu"),
    (("linears", 0, "gpu"), "\ud800", "linears.0.gpu"),
    (("linears", 0, "gpu"), "x" * 100_000, "linears.0.gpu"),
    (("linears", 0, "kernels"), "../../etc", "linears.0.kernels"),
    (("linears", 0, "shape", "form"), "fp2", "linears.0.shape.form"),
    (("linears", 0, "shape", "n"), 0, "linears.0.shape.n"),
    (("linears", 0, "shape", "n"), 10**30, "linears.0.shape.n"),
    (("linears", 0, "shape", "n"), "4096", "linears.0.shape.n"),
    (("linears", 0, "shape", "has_zero"), 0, "linears.0.shape.has_zero"),
    ((*TIME, "tokens"), True, "tokens"),
    ((*TIME, "tokens"), -1, "tokens"),
    ((*TIME, "cublas_us"), ..., "cublas_us` is missing"),
    ((*TIME, "cublas_us"), float("nan"), "cublas_us"),
    ((*TIME, "cublas_us"), float("inf"), "cublas_us"),
    ((*TIME, "cublas_us"), -1.0, "cublas_us"),
    ((*TIME, "cublas_us"), 0, "cublas_us"),
    ((*TIME, "cublas_us"), 1e300, "cublas_us"),
    ((*TIME, "cublas_us"), "1.5", "cublas_us"),
    ((*TIME, "tactics"), [], "tactics"),
    ((*TIME, "tactics"), {"vector 1 2 2048 4 2": float("nan")}, "tactics"),
    ((*TIME, "tactics"), {"vector 1 2 2048 4 2": -3}, "tactics"),
    ((*TIME, "tactics"), {"vector": 1.0}, "tactics"),
    ((*TIME, "tactics"), {"vector 1 2 3": 1.0}, "tactics"),
    ((*TIME, "tactics"), {"stream 1 8 4 4": 1.0}, "tactics"),
    ((*TIME, "tactics"), {"words 2 4": 1.0}, "tactics"),
    ((*TIME, "tactics"), {"vector 0 2 2048 4 2": 1.0}, "tactics"),
    ((*TIME, "tactics"), {"vector 1 2 2048 4 999999999": 1.0}, "tactics"),
    ((*TIME, "tactics"), {"cutlass 1 2 2048 4 2": 1.0}, "tactics"),
    ((*TIME, "tactics"), {"vector 1 2 2048 4 2\n": 1.0}, "tactics"),
]


@pytest.mark.parametrize(("place", "value", "words"), CHANGES)
def test_a_wrong_field_is_named(tmp_path, place, value, words):
    data = json.loads(GOLDEN.read_text())
    *outer, last = place
    inner = data
    for key in outer:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    (tmp_path / "cache.json").write_text(json.dumps(data))
    with pytest.raises(TimingCacheError) as caught:
        read(tmp_path / "cache.json")
    assert words in caught.value.message
    assert len(caught.value.message) < 1000
    assert caught.value.where == str(tmp_path / "cache.json")
    assert "--output-timing-cache" in caught.value.fix
    str(caught.value).encode()  # prints


@pytest.mark.parametrize(
    "text", ["hello", "", "[]", "null", "[" * 100_000, '{"a":' * 100_000, "\0", '{"format_version": 1' + "0" * 10_000]
)
def test_what_is_no_json_object(tmp_path, text):
    (tmp_path / "cache.json").write_text(text)
    with pytest.raises(TimingCacheError, match="cache.json"):
        read(tmp_path / "cache.json")


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, words in ((tmp_path / "none", "is missing"), (tmp_path, "not a file"), (tmp_path / "pipe", "not a file")):
        with pytest.raises(TimingCacheError, match=words):
            read(path)
    with open(tmp_path / "huge", "wb") as f:
        f.truncate(1 << 40)
    with pytest.raises(TimingCacheError, match="1.0 TiB, so it is no timing cache"):
        read(tmp_path / "huge")
