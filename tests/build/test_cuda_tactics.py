"""The tactics of linears on a GPU: what is timed, what is chosen from which times, and what a build makes of it."""

import contextlib
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.engines import build_engine, random_checkpoint
from tests.fake_timer import FakeTimer, fragments_win
from tests.interpreter_device import InterpreterDevice, fake_compile
from tests.tiny_configs import config
from trtllm_cli.build import builder, timing_cache
from trtllm_cli.build.backends import cuda, cuda_linears, cuda_tactics, cuda_timing
from trtllm_cli.build.backends.cuda_candidates import TOKENS, candidates, timed_tokens
from trtllm_cli.build.backends.cuda_linears import LinearShape, Tactic, launch_of, shipped_tactics
from trtllm_cli.build.backends.cuda_tactics import LinearTactics, fastest
from trtllm_cli.build.backends.cuda_timing import find_timer  # before the tests' fixture takes it away
from trtllm_cli.build.timing_cache import TimedOn, TimedShape, TimingCache, TokenTimes
from trtllm_cli.errors import DeviceError, ResourceError, TimingCacheError, UnsupportedError, UsageError
from trtllm_cli.kernels.cuda.compiler import compile_kernels, source_digest, triton_version
from trtllm_cli.kernels.cuda.kernel import ARCHITECTURES, SHARED_MEMORY
from trtllm_cli.models import trace_model

QKV = LinearShape("bf16", 6144, 4096)
VECTOR, VECTOR_2 = Tactic("vector", (1, 2, 2048, 4, 2)), Tactic("vector", (2, 2, 2048, 4, 2))
FRAGMENT, SKINNY = Tactic("fragment", (8, 1, 2, 4, 1, 8)), Tactic("skinny", (16, 64, 128, 2, 5, 4))


def times(shape, *rows):
    """By tokens, from rows of tokens, cuBLASLt's time, and other tactics than 100 us."""
    return {
        tokens: TokenTimes(
            tokens=tokens,
            cublas_us=cublas_us,
            tactics={str(t): 100.0 for t in candidates(shape, tokens)} | {str(t): us for t, us in known.items()},
        )
        for tokens, cublas_us, known in rows
    }


# Choosing.


def test_the_fastest_of_each_number_of_tokens_up_to_where_cublas_is_as_fast():
    measured = times(
        QKV, (1, 15, {VECTOR: 13}), (2, 15, {VECTOR_2: 14, FRAGMENT: 13.9}), (4, 15, {FRAGMENT: 14.5}),
        (8, 15, {FRAGMENT: 15.5}), (16, 15, {SKINNY: 1}),
    )  # fmt: skip
    assert fastest(QKV, measured) == [(1, VECTOR), (4, FRAGMENT)]


def test_what_is_about_as_fast_waits_for_a_winner():
    alike = [(8, 15, {FRAGMENT: 15}), (16, 15, {SKINNY: 12})]
    assert fastest(QKV, times(QKV, (1, 15, {VECTOR: 13}), *alike)) == [(1, VECTOR), (8, FRAGMENT), (16, SKINNY)]
    assert fastest(QKV, times(QKV, (1, 15, {VECTOR: 13}), alike[0])) == [(1, VECTOR)]


def test_stream_wins_though_others_are_a_little_faster_by_themselves():
    stream = Tactic("stream", (1, 8, 4, 1, 4))
    assert fastest(QKV, times(QKV, (1, 15, {VECTOR: 13, stream: 14}))) == [(1, stream)]
    assert fastest(QKV, times(QKV, (1, 15, {VECTOR: 12, stream: 14}))) == [(1, VECTOR)]


def test_what_made_whole_steps_the_shortest_wins_though_others_are_a_little_faster_by_themselves():
    (_, by_steps), *_ = shipped_tactics(QKV)
    other = Tactic("stream", (1, 8, 8, 1, 4))
    assert by_steps.kernel == "stream"
    assert fastest(QKV, times(QKV, (1, 15, {VECTOR: 12.9, other: 13, by_steps: 14}))) == [(1, by_steps)]
    assert fastest(QKV, times(QKV, (1, 15, {VECTOR: 14, other: 12, by_steps: 14}))) == [(1, other)]
    elsewhere = replace(QKV, n=6144 + 64)  # a shape that no step was measured with
    assert fastest(elsewhere, times(elsewhere, (1, 15, {other: 13, by_steps: 14}))) == [(1, other)]


def test_a_gated_activation_counts_for_cublas():
    gated = LinearShape("bf16", 28672, 4096, gated="silu")
    assert fastest(gated, times(gated, (1, 10, {VECTOR: 12.5}))) == [(1, VECTOR)]
    assert fastest(QKV, times(QKV, (1, 10, {VECTOR: 12.5}))) == []


def test_what_does_not_run_is_not_chosen():
    others = dict.fromkeys(candidates(QKV, 1))
    assert fastest(QKV, times(QKV, (1, None, {**others, FRAGMENT: 900}), (2, None, {}))) == [
        (1, FRAGMENT),
        (2, candidates(QKV, 2)[0]),
    ]
    assert fastest(QKV, times(QKV, (1, 15, others), (2, 15, {VECTOR_2: 2}))) == [(2, VECTOR_2)]


def test_tactics_that_are_no_candidates_are_left_alone():
    strange = {Tactic("vector", (7, 7, 7777, 7, 7)): 0.001, Tactic("skinny", (1, 1, 1, 1, 1, 1)): 0.001}
    assert fastest(QKV, times(QKV, (1, 15, {VECTOR: 13, **strange}))) == [(1, VECTOR)]


def shapes():
    for form, group in (("bf16", 0), ("fp8", 0), ("int8", 0), ("int8", 64), ("int4", 128), ("int4", 64)):
        for n, k, gated in [
            (6144, 4096, ""), (4096, 14336, ""), (28672, 4096, "silu"), (3072, 4096, ""), (14336, 4096, "silu"),
            (128256, 2048, ""), (960, 576, ""), (64, 64, ""),
        ]:  # fmt: skip
            if k % (group or 1) == 0:
                yield LinearShape(form, n, k, group=group, gated=gated)


@pytest.mark.parametrize("shape", list(shapes()), ids=lambda s: f"{s.form}-{s.group}-{s.n}x{s.k}{s.gated}")
def test_candidates_are_few_and_of_the_shape(shape):
    """A rank's own shapes too: half of the outputs, half of the inputs."""
    kernels = set()
    for tokens in timed_tokens(shape):
        for tactic in candidates(shape, tokens):
            assert cuda_linears.adapted(shape, tactic) == tactic
            assert re.fullmatch(timing_cache._TACTIC, str(tactic))
            launch = launch_of(shape, tactic)
            kernels.add(launch.source)
            if tactic.kernel == "vector":
                assert tactic.tiles[0] >= tokens
                assert shape.k % tactic.tiles[2] == 0
    assert 8 <= len(kernels) <= 36


def test_int4_is_timed_for_more_tokens():
    """As cuBLASLt has to have it as bfloat16 first."""
    down = LinearShape("int4", 4096, 14336, group=128)
    assert timed_tokens(down) == [*TOKENS, 128, 256]
    assert timed_tokens(down, "sm_89") == timed_tokens(replace(down, form="int8")) == timed_tokens(QKV) == [*TOKENS]
    sizes = [tactic.tiles[0] for _, tactic in shipped_tactics(down)[-2:]]
    assert sizes == [64, 128]
    scratch = [launch_of(down, tactic).scratch for _, tactic in shipped_tactics(down)[-2:]]
    assert scratch == [4 * (cuda_linears.COUNTERS + 4096 * 4 * tokens) for tokens in (64, 256)]


def test_what_ships_is_a_candidate():
    """So the same times choose it again."""
    for form, table in cuda_linears._SHIPPED.items():
        for (outputs, k, gated), ways in table.items():
            scales = {"w_scale": "group", "x_scale": "group"} if form == "fp8 group" else {}
            shape = LinearShape(
                form.split()[0], 2 * outputs if gated else outputs, k,
                group=128 if form in ("int4", "fp8 group") else 0, gated="silu" * gated,
                x_type="*fp8e4nv" if form.startswith("fp8") else "*bf16", **scales,
            )  # fmt: skip
            firsts = {most: Tactic(kernel, tiles) for most, kernel, tiles in reversed(ways)}
            assert shipped_tactics(shape) == sorted(firsts.items())
            for most, kernel, tiles in ways:
                assert Tactic(kernel, tiles) in candidates(shape, most)


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_stream_is_for_hopper(arch):
    kernels = {way.source.function for _, way in LinearTactics(arch).few_tokens(LinearShape("bf16", 4096, 4096))}
    assert ("stream_linear" in kernels) == (arch == "sm_90a")
    assert ("vector_linear" in kernels) == (arch != "sm_90a")
    assert any(t.kernel == "stream" for t in candidates(QKV, 1, arch)) == (arch == "sm_90a")
    uneven = LinearShape("bf16", 960, 576)  # whose rows are no whole pieces
    assert {way.source.function for _, way in LinearTactics(arch).few_tokens(uneven)} >= {"vector_linear"}


def test_what_ships_for_others_than_hopper():
    """Of several for as many tokens the first that an architecture or a form of weights allows."""
    down = LinearShape("int4", 4096, 14336, group=128)
    assert [tactic.kernel for _, tactic in shipped_tactics(down)[-3:]] == ["wide"] * 3
    for ways in (shipped_tactics(down, "sm_89"), shipped_tactics(replace(down, form="int8"))):
        assert [(most, tactic.kernel) for most, tactic in ways[-2:]] == [(16, "fragment"), (64, "fragment")]
    gate = LinearShape("fp8", 28672, 4096, gated="silu", x_type="*fp8e4nv")
    assert (64, Tactic("skinny", (64, 64, 128, 1, 5, 4))) in shipped_tactics(gate, "sm_89")


@pytest.mark.parametrize(
    ("form", "n", "k", "tiles"),
    [
        ("fp8", 4096, 4096, (1, 8, 4, 1, 4)), ("fp8", 3584, 3584, (2, 4, 4, 1, 4)),
        ("bf16", 2048, 2048, (1, 8, 4, 1, 4)), ("bf16", 1024, 1024, (1, 8, 2, 1, 4)),
        ("bf16", 1024, 512, (2, 4, 2, 1, 4)), ("bf16", 1024, 256, None), ("bf16", 512, 1024, (1, 8, 2, 1, 4)),
        ("bf16", 504, 1024, None), ("bf16", 512, 512, None),
        ("bf16", 960, 576, None), ("fp8", 4096, 1000, None), ("bf16", 4100, 4096, None),
    ],
)  # fmt: skip
def test_stream_takes_rows_of_whole_pieces(form, n, k, tiles):
    shape = LinearShape(form, n, k, x_type="*fp8e4nv" if form == "fp8" else "*bf16")
    found = cuda_linears.adapted(shape, Tactic("stream", (1, 8, 4, 1, 4)))
    assert found == (None if tiles is None else Tactic("stream", tiles))


@pytest.mark.parametrize(
    ("tiles", "k", "gated", "found"),
    [
        ((1, 8, 1, 4, 4), 4096, "", (1, 8, 1, 4, 4)), ((1, 8, 1, 4, 4), 14336, "", (1, 8, 2, 2, 4)),
        ((1, 8, 3, 2, 4), 4096, "", (1, 8, 2, 2, 4)), ((1, 8, 3, 4, 4), 14336, "", (1, 8, 6, 2, 4)),
        ((1, 8, 1, 4, 4), 2048, "", (1, 8, 1, 2, 4)), ((1, 8, 1, 4, 4), 8192, "", (1, 8, 2, 4, 4)),
        ((1, 8, 4, 2, 4), 14336, "silu", (1, 8, 4, 2, 4)), ((1, 8, 7, 2, 4), 14336, "silu", None),
    ],
)  # fmt: skip
def test_rounds_of_several_pieces_are_whole_and_have_room(tiles, k, gated, found):
    shape = LinearShape("fp8", 8192, k, x_type="*fp8e4nv", gated=gated)
    assert cuda_linears.adapted(shape, Tactic("stream", tiles)) == (found and Tactic("stream", found))


@pytest.mark.parametrize(
    ("tiles", "k", "found"),
    [
        ((2, 8, 1, 4), 4096, (2, 8, 1, 4)), ((1, 7, 2, 8), 4096, (1, 2, 2, 8)), ((1, 7, 2, 8), 14336, (1, 7, 2, 8)),
        ((1, 7, 2, 8), 2048, (1, 2, 1, 8)), ((2, 4, 2, 4), 14336, (2, 4, 2, 4)), ((2, 4, 2, 4), 4608, (2, 8, 1, 4)),
        ((1, 7, 1, 8), 1536, (1, 3, 1, 4)), ((1, 2, 2, 8), 1024, (1, 2, 1, 4)), ((1, 2, 2, 8), 512, None),
    ],
)  # fmt: skip
def test_words_come_in_rounds_of_a_warps_groups(tiles, k, found):
    shape = LinearShape("int4", 4096, k, group=128)
    assert cuda_linears.adapted(shape, Tactic("words", tiles)) == (found and Tactic("words", found))


@pytest.mark.parametrize(
    ("tiles", "shape", "found"),
    [
        ((64, 2, 4, 1, 4, 8), {"n": 6144}, (64, 2, 4, 1, 4, 8)),
        ((64, 2, 4, 1, 4, 8), {"n": 6144 + 128}, (64, 1, 4, 1, 4, 8)),
        ((64, 2, 4, 1, 4, 8), {"n": 4096 + 64}, (64, 1, 4, 1, 4, 4)),
        ((16, 1, 4, 2, 4, 4), {"n": 2048, "k": 384}, None),  # too few programs
        ((16, 1, 4, 2, 4, 4), {"n": 8192, "k": 384}, (16, 1, 3, 1, 1, 4)),
        ((16, 1, 4, 2, 4, 4), {"n": 4096, "k": 1024}, (16, 1, 1, 2, 4, 4)),
        ((16, 1, 4, 2, 4, 4), {"n": 4096, "k": 3584}, (16, 1, 4, 2, 2, 4)),
        ((16, 1, 4, 1, 1, 4), {"n": 8192, "k": 4096 + 64}, None),
        ((16, 1, 4, 1, 1, 4), {"n": 8192 + 16}, None),
        ((16, 1, 4, 1, 1, 4), {"n": 8192, "x_type": "*fp8e4nv"}, None),
        ((64, 2, 4, 2, 1, 8), {"n": 65536, "gated": "silu"}, None),  # no room
    ],
)  # fmt: skip
def test_wide_takes_whole_tiles_that_have_room(tiles, shape, found):
    shape = LinearShape(**{"form": "int4", "k": 4096, "group": 128, **shape})
    assert cuda_linears.adapted(shape, Tactic("wide", tiles)) == (found and Tactic("wide", found))


# Timing.


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda, "compile_kernels", fake_compile)
    monkeypatch.setattr(cuda_timing, "compile_kernels", fake_compile)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


def chosen(tactics, *shapes):
    tactics.prepare(shapes)
    return [tactics.chosen[TimedShape.of(shape)] for shape in shapes]


def test_each_candidate_is_timed_once_and_kept_for_the_next_build():
    timer, told = FakeTimer(), []
    first = LinearTactics("sm_90a", timer=timer)
    gated, int4 = LinearShape("bf16", 256, 128, gated="silu"), LinearShape("int4", 128, 128, group=64)
    biased = LinearShape("bf16", 256, 128, gated="silu", has_bias=True, out_type="*fp8e4nv")
    first.prepare([gated, int4, biased], lambda *what: told.append(what))
    wanted = sum(len(candidates(s, tokens)) + 1 for s in (gated, int4) for tokens in TOKENS)
    assert len(timer.calls) == wanted
    assert timer.closed == 1
    assert told[-1] == ("timing kernels", wanted, wanted)
    assert {s.source for s in first.chosen.values()} == {"timed here"}
    assert re.fullmatch(r"linears: 2 shapes timed on NVIDIA H200 in [\d.]+ s, kept for later builds", first.notes[0])
    assert [most for most, _ in first.few_tokens(biased)] == [most for most, _ in first.few_tokens(gated)] == [8]
    assert first.few_tokens(biased)[0][1].source != first.few_tokens(gated)[0][1].source

    again = FakeTimer()
    second = LinearTactics("sm_90a", timer=again)
    assert [c.source for c in chosen(second, gated, int4)] == ["timing cache"] * 2
    assert not again.calls
    assert not second.notes
    assert second.few_tokens(gated) == first.few_tokens(gated)
    assert second.cache == first.cache


def test_scales_of_groups_are_timed_without_a_library():
    shape = LinearShape("fp8", 256, 256, group=128, w_scale="group", x_scale="group", x_type="*fp8e4nv")
    timer = FakeTimer()
    tactics = LinearTactics("sm_90a", timer=timer)
    tactics.prepare([shape])
    assert {what for _, what, _ in timer.calls} == {"skinny_linear"}
    assert tactics.few_tokens(shape)[-1][0] == TOKENS[-1]
    assert {entry.cublas_us for entry in tactics.cache.linears[0].times} == {None}


def test_what_made_whole_steps_the_shortest_has_no_others():
    shape = LinearShape("bf16", 4096, 4096)
    tactics = LinearTactics("sm_90a")
    tactics.prepare([shape])
    others = {most: tactics.others(shape, most) for most, _ in tactics.few_tokens(shape)}
    assert all(others[most] is None for most in (1, 2, 4, 8))  # streamed ones
    assert others[16]  # was timed by itself


def test_what_no_times_decide_has_others():
    shape = LinearShape("bf16", 256, 128)
    tactics = LinearTactics("sm_90a")
    assert chosen(tactics, shape)[0].source == "shipped table"
    for most, few in tactics.few_tokens(shape):
        others = tactics.others(shape, most)
        assert len(others) <= 1
        assert few not in others
        assert {launch_of(shape, tactic) for tactic in candidates(shape, most)} >= set(others)
    assert any(tactics.others(shape, most) for most, _ in tactics.few_tokens(shape))
    assert tactics.to_json()["settled_at_first_load"]
    assert tactics.notes == ["linears: 1 of 1 shapes were never timed on sm_90a: the first load on a GPU chooses"]

    fixed = LinearTactics("sm_90a", fixed=True)
    timed = LinearTactics("sm_90a", timer=FakeTimer())
    for decided in (fixed, timed):
        decided.prepare([shape])
        assert all(decided.others(shape, most) is None for most, _ in decided.few_tokens(shape))
        assert not decided.to_json()["settled_at_first_load"]
    assert fixed.notes[0].endswith("never timed on sm_90a: what was measured on an H200 decides")


def test_a_second_rank_of_the_same_shapes_is_not_timed():
    timer = FakeTimer()
    tactics = LinearTactics("sm_90a", timer=timer)
    tactics.prepare([QKV])
    count = len(timer.calls)
    tactics.prepare([QKV])
    assert len(timer.calls) == count
    tactics.prepare([LinearShape("bf16", 3072, 4096)])
    assert len(timer.calls) > count
    assert len(tactics.cache.linears) == 2


def test_only_what_is_missing_is_timed():
    kernels = source_digest(*cuda_linears.KERNEL_MODULES)
    on = TimedOn(gpu="NVIDIA H200", arch="sm_90a", kernels=kernels, triton=triton_version())
    known = times(QKV, *((tokens, 20.0, {}) for tokens in TOKENS[:-1]))
    del known[1].tactics[str(VECTOR)]
    given = TimingCache(linears=[cuda_tactics._entry(on, TimedShape.of(QKV), known)])
    timer = FakeTimer()
    tactics = LinearTactics("sm_90a", given, timer)
    tactics.prepare([QKV])
    assert [(what, tokens) for _, what, tokens in timer.calls] == [
        ("vector_linear", 1),
        ("cuBLASLt", 64),
        *[("wide_linear", 64)] * 2,
        *[("skinny_linear", 64)] * 2,
    ]
    (entry,) = tactics.cache.linears
    assert [t.tokens for t in entry.times] == list(TOKENS)
    assert entry.times[0].cublas_us == 20
    assert entry.times[0].tactics[str(VECTOR)] == 30


def test_times_of_others_are_kept_and_decide_nothing():
    mine = LinearTactics("sm_90a", timer=FakeTimer())
    assert chosen(mine, QKV)[0].tactics == [(8, FRAGMENT)]
    others = []
    for change in (
        {"gpu": "NVIDIA H100 80GB HBM3"}, {"arch": "sm_100a"}, {"kernels": "0" * 64}, {"triton": "3.5.1"},
        {"shape": TimedShape.of(LinearShape("bf16", 4096, 4096))},
    ):  # fmt: skip
        others += [entry.model_copy(update=change) for entry in mine.cache.linears]
    given = TimingCache(linears=others)
    timer = FakeTimer(lambda kernel, tokens: 10.0 if kernel == "cuBLASLt" else 30.0)
    here = LinearTactics("sm_90a", given, timer)
    timing_cache._user_path().unlink()
    assert chosen(here, QKV)[0].tactics == []
    assert timer.calls
    assert len(here.cache.linears) == len(others) + 1
    assert all(entry in here.cache.linears for entry in others)
    del others[0]  # without a GPU, that of the other one of the architecture
    (choice,) = chosen(LinearTactics("sm_90a", TimingCache(linears=others)), QKV)
    assert choice.source == "shipped table"
    assert choice.tactics == shipped_tactics(QKV)


def test_without_a_gpu_the_given_times_decide_and_the_users_do_not():
    timed = LinearTactics("sm_90a", timer=FakeTimer())
    timed.prepare([QKV])
    given = timing_cache.merged([timed.cache])
    tactics = LinearTactics("sm_90a", given)
    assert chosen(tactics, QKV)[0].tactics == [(8, FRAGMENT)]
    assert tactics.gpu == "NVIDIA H200"
    assert tactics.cache == given
    assert chosen(LinearTactics("sm_90a"), QKV)[0] == cuda_tactics.Choice("shipped table", shipped_tactics(QKV))
    assert chosen(LinearTactics("sm_89", given), QKV)[0].source == "shipped table"


def test_of_two_gpus_the_one_with_most_of_the_shapes_decides():
    dense = LinearShape("bf16", 4096, 4096)
    timed = LinearTactics("sm_90a", timer=FakeTimer(gpu="B"))
    timed.prepare([QKV, dense])
    other = LinearTactics("sm_90a", timer=FakeTimer(gpu="A"))
    other.prepare([QKV])
    tactics = LinearTactics("sm_90a", timing_cache.merged([timed.cache, other.cache]))
    tactics.prepare([QKV, dense])
    assert tactics.gpu == "B"
    assert tactics.notes == [
        "linears: the timing cache has times of several GPUs for sm_90a; those of B decide, not those of A"
    ]


def test_a_shape_without_all_its_times_takes_what_ships():
    timed = LinearTactics("sm_90a", timer=FakeTimer())
    timed.prepare([QKV])
    (entry,) = timed.cache.linears
    given = TimingCache(linears=[entry.model_copy(update={"times": entry.times[:3]})])
    tactics = LinearTactics("sm_90a", given)
    assert chosen(tactics, QKV)[0].source == "shipped table"
    (note,) = tactics.notes
    assert note.startswith("linears: the timing cache has no times for 1 of 1 shapes, on sm_90a with these kernels")


@pytest.mark.parametrize("error", [ResourceError("the GPU has no room"), DeviceError("the GPU failed")])
def test_a_gpu_that_cannot_time_ends_no_build(error):
    def fails(kernel, tokens):
        if tokens == 4:
            raise error
        return fragments_win(kernel, tokens)

    timer = FakeTimer(fails)
    tactics = LinearTactics("sm_90a", timer=timer)
    assert chosen(tactics, QKV)[0].source == "shipped table"
    assert tactics.notes[0] == f"linears: not all of them are timed: {error.message}"
    assert timer.closed == 1
    (entry,) = timing_cache.read_user_cache().linears
    assert [t.tokens for t in entry.times] == [1, 2]


def test_an_older_architecture_has_no_dependent_launches():
    work = cuda_timing.missing(TimedShape.of(QKV), {}, "sm_90a", [1])
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_timing, "compile_kernels", lambda s, arch, told: asked.extend(s) or fake_compile(s, arch))
        compiled = cuda_timing.compile_work(work, "sm_89")
    assert not any(source.uses_pdl for source in asked)
    assert all(source.uses_pdl for source in compiled)


# Builds.


@pytest.fixture
def tiny(tmp_path):
    return random_checkpoint(tmp_path / "ckpt", config("llama", dtype="bfloat16"))


@pytest.fixture
def timer(monkeypatch):
    fake = FakeTimer()
    monkeypatch.setattr(cuda_timing, "find_timer", lambda arch: fake if arch == "sm_90a" else None)
    return fake


def build(tiny, name, **options):
    return build_engine(tiny, tiny.parent / name, **{"backend": "cuda", "kernels": "auto", "arch": "sm_90a", **options})


def plan_of(engine):
    with contextlib.closing(engine.tensors(engine.config.pretrained_config.mapping.ranks[0])) as file:
        return engine.plan(file)


def linear_kernels(engine):
    return {k["source"]["function"] for k in plan_of(engine)["kernels"] if k["source"]["module"] == "linear"}


def test_a_build_takes_what_was_the_fastest(tiny, timer, tmp_path):
    shipped = build(tiny, "shipped", arch="sm_100a")
    assert "fragment_linear" not in linear_kernels(shipped)
    out = tmp_path / "cache.json"
    timed = build(tiny, "timed", output_timing_cache=out)
    assert linear_kernels(timed) == {"fragment_linear"}
    notes = timed.config.notes["linear_tactics"]
    assert notes["gpu"] == "NVIDIA H200"
    assert notes["from"] == {"timed here": len(notes["shapes"])}
    assert all(shape["up_to"]["8"].startswith("fragment 8 ") for shape in notes["shapes"].values())
    assert shipped.config.notes["linear_tactics"]["from"] == {"shipped table": len(notes["shapes"])}
    assert "gpu" not in shipped.config.notes["linear_tactics"]
    assert len(timing_cache.read(out).linears) == len(notes["shapes"])


def test_engines_are_the_same_by_the_same_timing_cache(tiny, timer, tmp_path, monkeypatch):
    """By the next build here, which times nothing, and where there is no GPU."""
    cache = tmp_path / "cache.json"
    timed = build(tiny, "timed", output_timing_cache=cache)
    count, first = len(timer.calls), cache.read_bytes()
    again = build(tiny, "again", output_timing_cache=tmp_path / "again.json")
    assert len(timer.calls) == count
    assert (tmp_path / "again.json").read_bytes() == first
    monkeypatch.setattr(cuda_timing, "find_timer", lambda arch: None)
    elsewhere = build(tiny, "elsewhere", input_timing_cache=cache, output_timing_cache=cache)
    assert cache.read_bytes() == first
    assert elsewhere.config.notes["linear_tactics"]["from"].keys() == {"timing cache"}
    assert timed.config.rank_files == again.config.rank_files == elsewhere.config.rank_files
    assert build(tiny, "table").config.rank_files != timed.config.rank_files


def test_an_output_keeps_what_is_of_others(tiny, timer, tmp_path):
    foreign = LinearTactics("sm_100a", timer=FakeTimer(gpu="NVIDIA B200"))
    foreign.prepare([QKV])
    given, out = tmp_path / "in.json", tmp_path / "out.json"
    timing_cache.update(given, foreign.cache, "")
    build(tiny, "engine", input_timing_cache=given, output_timing_cache=out)
    written = timing_cache.read(out)
    assert {entry.gpu for entry in written.linears} == {"NVIDIA B200", "NVIDIA H200"}
    assert all(entry in written.linears for entry in foreign.cache.linears)


def test_stale_times_are_taken_again(tiny, timer, tmp_path, monkeypatch):
    cache = tmp_path / "cache.json"
    build(tiny, "timed", output_timing_cache=cache)
    data = json.loads(cache.read_text())
    for entry in data["linears"]:
        entry["kernels"] = "0" * 64
    cache.write_text(json.dumps(data))
    timing_cache._user_path().unlink()
    count = len(timer.calls)
    build(tiny, "again", input_timing_cache=cache, output_timing_cache=cache)
    assert len(timer.calls) == 2 * count
    assert len(timing_cache.read(cache).linears) == 2 * len(data["linears"])


def test_what_a_build_refuses(tiny, timer, tmp_path):
    missing, bad = tmp_path / "missing.json", tmp_path / "bad.json"
    bad.write_text("hello")
    for options in ({"input_timing_cache": missing}, {"input_timing_cache": missing, "output_timing_cache": missing}):
        with pytest.raises(TimingCacheError, match="missing.json is missing"):
            build(tiny, "engine", **options)
    for flag in ("input_timing_cache", "output_timing_cache"):
        with pytest.raises(TimingCacheError, match="bad.json is not valid JSON"):
            build(tiny, "engine", **{flag: bad})
        with pytest.raises(UsageError, match=f"--{flag.replace('_', '-')} is for GPUs"):
            build(tiny, "engine", backend="cpu", arch=None, **{flag: bad})
    with pytest.raises(UsageError, match="would be in the engine"):
        build(tiny, "engine", output_timing_cache=tmp_path / "engine" / "cache.json")
    assert not timer.calls
    assert not (tmp_path / "engine").exists()
    assert bad.read_text() == "hello"


def test_shapes_are_those_that_the_plan_computes(tiny):
    """Nothing is lowered that was not prepared, whatever the format."""
    from trtllm_cli.build.passes import CUDA_PASSES, run_passes

    for weight_dtype in ("bfloat16", "int8", "int4"):
        asked = []
        checkpoint = builder.Checkpoint.open(tiny)
        options = builder.BuildOptions(backend="cuda", weight_dtype=weight_dtype, max_seq_len=64)
        limits = builder.resolve(checkpoint.config, options, [])
        graph = run_passes(trace_model(checkpoint.config, checkpoint.config.mapping.ranks[0]), CUDA_PASSES)
        tactics = LinearTactics("sm_90a")
        ways = tactics.ways
        tactics.ways = lambda shape, asked=asked, ways=ways: asked.append(shape) or ways(shape)
        cuda.lower(graph, checkpoint.config, limits, "sm_90a", tactics=tactics)
        assert {TimedShape.of(shape) for shape in asked} == tactics.chosen.keys()
        assert asked


@pytest.mark.parametrize(
    ("form", "kernel"),
    [("bf16", "vector"), ("bf16", "skinny"), ("bf16", "fragment"), ("int8", "fragment"), ("int4", "fragment")],
)
def test_what_is_timed_is_the_product(monkeypatch, form, kernel):
    """The timer's launches in the interpreter: our kernel and torch's product give the same, of each of the weights."""
    device = InterpreterDevice()
    monkeypatch.setattr(cuda_timing, "_DEVICE", "cpu")
    monkeypatch.setattr(cuda_timing, "_copies", lambda nbytes: 2)
    monkeypatch.setattr(cuda_timing.torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(cuda_timing.GpuTimer, "_stream", SimpleNamespace(cuda_stream=7, wait_stream=lambda other: None))
    outputs = []

    def run(stream, enqueue):
        outputs.append([])
        enqueue()
        return 3e-3

    monkeypatch.setattr(cuda_timing, "graph_milliseconds", run)
    shape = LinearShape(form, 64, 128, group=64 if form in ("int8", "int4") else 0, has_zero=form == "int4")
    tactic = next(t for tokens in TOKENS for t in candidates(shape, tokens) if t.kernel == kernel)
    launch, tokens = launch_of(shape, tactic), 1 if kernel == "vector" else 3
    sources = [launch.source, *([cuda_linears.dequantized(shape).source] if form != "bf16" else [])]
    compiled = fake_compile(sources, "sm_90a")
    by_kernel = {compiled[source].entry: source for source in sources}

    class Loaded:
        def __init__(self, kernel):
            self.kernel = {"names": kernel.names, "source": by_kernel[kernel.entry].to_json()}

        def prepare(self, grid, values):
            o = timer._operands
            tensors = (o.x, o.y, o.ones, o.plain, o.scratch, *(part for w in o.weights.values() for part in w))
            device._regions = [tensor.flatten().view(torch.uint8) for tensor in tensors]
            made = device.prepare(self.kernel, grid, values)

            def enqueue():
                made.enqueue()
                outputs[-1].append(o.y[: tokens * shape.n].float())

            return SimpleNamespace(enqueue=enqueue, set_stream=lambda stream: None)

    timer = cuda_timing.GpuTimer(SimpleNamespace(name="", load=Loaded))
    assert timer.kernel(shape, launch, compiled[launch.source], tokens) == pytest.approx(1.5)
    ours = list(outputs[0])
    assert not torch.equal(*ours)
    for i, y in enumerate(ours):
        operands = timer._operands
        if form != "bf16":
            timer._launches(operands, cuda_linears.dequantized(shape), compiled[sources[1]], tokens)[i]()
        operands.product(operands.weights["w"][i] if form == "bf16" else operands.plain.flatten(), tokens)
        wanted = operands.y[: tokens * shape.n].float()
        assert (y - wanted).norm() / wanted.norm() < 1e-2
    assert timer.library(shape, compiled[sources[-1]] if form != "bf16" else None, tokens) == pytest.approx(1.5)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["bf16", "fp8", "int4"])
def test_a_gpu_times_a_small_shape(monkeypatch, form):
    from trtllm_cli.kernels.cuda.compiler import compile_kernels
    from trtllm_cli.kernels.cuda.driver import gpu_arch

    arch = gpu_arch()
    timer = find_timer(arch) if arch else None
    if timer is None:
        pytest.skip("no NVIDIA GPU")
    monkeypatch.setattr(cuda_timing, "compile_kernels", compile_kernels)
    scale = "one" if form == "fp8" else "none"
    shape = LinearShape(form, 512, 1024, group=128 if form == "int4" else 0, w_scale=scale, x_scale=scale)
    tactics = LinearTactics(arch, timer=timer)
    tactics.prepare([shape])
    (entry,) = tactics.cache.linears
    assert (entry.gpu, entry.arch) == (timer.gpu, arch)
    assert [t.tokens for t in entry.times] == timed_tokens(shape, arch)
    for measured in entry.times:
        assert 0.5 < measured.cublas_us < 1000
        assert all(0.5 < us < 1000 for us in measured.tactics.values() if us is not None)
    assert any(us is not None for us in entry.times[0].tactics.values())
    assert tactics.chosen[TimedShape.of(shape)].source == "timed here"


def test_no_timer_without_a_gpu(monkeypatch):
    monkeypatch.setattr(cuda_timing, "gpu_arch", lambda: None)
    assert find_timer("sm_90a") is None
    monkeypatch.setattr(cuda_timing, "gpu_arch", lambda: "sm_89")
    assert find_timer("sm_90a") is None
    monkeypatch.setattr(cuda_timing, "gpu_arch", lambda: "sm_90a")
    monkeypatch.setattr(cuda_timing.Driver, "open", lambda: SimpleNamespace(name="NVIDIA H200"))
    monkeypatch.setattr(cuda_timing.torch.cuda, "is_available", lambda: True)
    assert find_timer("sm_90a").gpu == "NVIDIA H200"
    monkeypatch.setattr(cuda_timing.torch.cuda, "is_available", lambda: False)
    assert find_timer("sm_90a") is None


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("form", ["bf16", "fp8"])
def test_what_ships_fits_every_architecture(arch, form):
    """A kernel that asks for more shared memory than there is would be refused where the engine is loaded."""
    for n, k, gated in ((6144, 4096, ""), (4096, 4096, ""), (28672, 4096, "silu"), (4096, 14336, "")):
        shape = LinearShape(form, n, k, gated=gated, x_type="*fp8e4nv" if form == "fp8" else "*bf16")
        launches = LinearTactics(arch).few_tokens(shape)
        assert launches
        for _, launch in launches:
            constants = dict(launch.source.constants)
            if launch.source.function == "skinny_linear":
                rows = constants["BM"] + constants["BN"] * (2 if gated else 1)
                size = rows * constants["BK"] * (1 if form == "fp8" else 2) * launch.source.num_stages
                assert size <= SHARED_MEMORY[arch] - 2048


def test_a_linear_that_did_not_fit_compiles_for_less_memory():
    shape = LinearShape("bf16", 28672, 4096, gated="silu")
    source = LinearTactics("sm_89").few_tokens(shape)[-1][1].source.on("sm_89")
    assert source.function == "skinny_linear"
    assert compile_kernels([source], "sm_89")[source].shared <= SHARED_MEMORY["sm_89"]


def test_a_kernel_that_does_not_fit_is_refused_when_built(tiny, monkeypatch):
    def too_large(sources, arch, progress=None):
        return {s: replace(k, shared=100 << 10) for s, k in fake_compile(sources, arch, progress).items()}

    monkeypatch.setattr(cuda, "compile_kernels", too_large)
    options = builder.BuildOptions(backend="cuda", max_seq_len=64)
    builder.plan_build(tiny, replace(options, arch="sm_80"))
    with pytest.raises(UnsupportedError, match="takes 102400 bytes of shared memory for this model, sm_89 has 101376"):
        builder.plan_build(tiny, replace(options, arch="sm_89"))
