"""Which tactics compute each linear for few tokens: the fastest by its own times, else of what ships with us."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from trtllm_cli.build.backends.cuda_candidates import candidates
from trtllm_cli.build.backends.cuda_linears import (
    AHEAD,
    KERNEL_MODULES,
    LinearLaunch,
    LinearShape,
    Tactic,
    chosen_by_steps,
    fitted,
    launch_of,
    shipped_tactics,
)
from trtllm_cli.build.backends.cuda_timing import Timer, compile_work, missing, time_work
from trtllm_cli.build.lowered import Working
from trtllm_cli.build.timing_cache import (
    LinearTimes,
    TimedOn,
    TimedShape,
    TimingCache,
    TokenTimes,
    merged,
    read_user_cache,
    update_user_cache,
)
from trtllm_cli.errors import DeviceError, ResourceError
from trtllm_cli.kernels.cuda.compiler import source_digest, triton_version

Source = Literal["timed here", "timing cache", "shipped table"]

_ACTIVATION = 3.0  # microseconds of a gated activation by itself, for few tokens
_AS_FAST = 1.03  # times that differ by less are alike
# What takes so much less time by itself is as fast in a step, where room for what follows counts: other kernels than
# streamed ones, and others than what was chosen by whole steps.
_BY_ITSELF = 1.1
_OTHERS = 1  # tactics that are compiled beside the shipped one; each takes a build some seconds


def fastest(shape: LinearShape, times: Mapping[int, TokenTimes]) -> list[tuple[int, Tactic]]:
    """(most tokens, tactic), ascending: the fastest for each number of tokens, up to where cuBLASLt is as fast."""
    ways: list[tuple[int, Tactic]] = []
    pending: list[tuple[int, Tactic]] = []
    for tokens, measured in sorted(times.items()):
        known = [(measured.tactics.get(str(tactic)), tactic) for tactic in candidates(shape, tokens)]
        runs = [(us, tactic) for us, tactic in known if us is not None]
        if not runs:
            continue
        us, tactic = min(runs, key=lambda run: run[0] * (1 if run[1].kernel in AHEAD else _BY_ITSELF))
        by_steps = chosen_by_steps(shape, tokens)
        us, tactic = next((run for run in runs if run[1] == by_steps and run[0] <= _BY_ITSELF * us), (us, tactic))
        library = math.inf if measured.cublas_us is None else measured.cublas_us + _ACTIVATION * bool(shape.gated)
        pending.append((tokens, tactic))
        if us <= library / _AS_FAST:
            ways, pending = ways + pending, []
        elif us > _AS_FAST * library:
            break  # nor does what wins for more tokens make up for it
    return [way for i, way in enumerate(ways) if i + 1 == len(ways) or ways[i + 1][1] != way[1]]


@dataclass(frozen=True)
class Choice:
    """Of one linear: (most tokens, tactic), ascending, and what they are from."""

    source: Source
    tactics: list[tuple[int, Tactic]]


@dataclass
class LinearTactics:
    """Chooses for all linears of a build, of every rank.

    `given` is the timing cache that the user named; it goes before what was timed here earlier. With a `timer`, which
    is of the architecture `arch`, what neither has is timed. Without one the times of another machine decide, if
    `given` has any of such a GPU; what none decides is settled when a GPU first loads the engine, or is `fixed`.
    """

    arch: str = "sm_90a"
    given: TimingCache | None = None
    timer: Timer | None = None
    fixed: bool = False
    gpu: str | None = None  # whose times decide
    notes: list[str] = field(default_factory=list)  # for users
    chosen: dict[TimedShape, Choice] = field(default_factory=dict)
    _used: TimingCache = field(default_factory=TimingCache)

    def prepare(self, shapes: Sequence[LinearShape], working: Working | None = None) -> None:
        """Chooses for these linears, times those that it must. Raises ResourceError where kernels do not compile."""
        new = [s for s in dict.fromkeys(map(TimedShape.of, shapes)) if s not in self.chosen]
        self.gpu = self.gpu or (self.timer.gpu if self.timer else self._gpu_of_given(new))
        kernels, triton = source_digest(*KERNEL_MODULES), triton_version() or ""
        known: dict[TimedShape, dict[int, TokenTimes]] = {shape: {} for shape in new}
        timed: set[TimedShape] = set()
        if self.gpu is not None and triton:
            on = TimedOn(gpu=self.gpu, arch=self.arch, kernels=kernels, triton=triton)
            cache = merged([read_user_cache(), self._given]) if self.timer else self._given
            known = {shape: cache.find(on, shape) for shape in new}
            if self.timer is not None:
                timed = self._time(self.timer, known, on, working)
            entries = [_entry(on, shape, times) for shape, times in known.items() if times]
            self._used = merged([self._used, TimingCache(linears=entries)])
        for shape, times in known.items():
            if times and not missing(shape, times, self.arch):
                source: Source = "timed here" if shape in timed else "timing cache"
                self.chosen[shape] = Choice(source, fastest(shape.linear, times))
            else:
                self.chosen[shape] = Choice("shipped table", shipped_tactics(shape.linear, self.arch))
        self._note_shipped(new)

    def ways(self, shape: LinearShape) -> list[tuple[int, Tactic]]:
        """(most tokens, tactic), ascending; beyond the last one cuBLASLt is as fast."""
        choice = self.chosen.get(TimedShape.of(shape))
        tactics = choice.tactics if choice else shipped_tactics(shape, self.arch)
        return [(most, fitted(shape, tactic, self.arch)) for most, tactic in tactics]

    def few_tokens(self, shape: LinearShape) -> list[tuple[int, LinearLaunch]]:
        """The launches of `ways`."""
        return [(most, launch_of(shape, tactic)) for most, tactic in self.ways(shape)]

    def others(self, shape: LinearShape, most: int) -> list[LinearLaunch] | None:
        """What is timed at the first load beside `few_tokens`' launch for up to `most`, and beside cuBLASLt.

        None where that is decided: by times, or by whole steps of this very shape.
        """
        choice = self.chosen.get(TimedShape.of(shape))
        if choice is None or choice.source != "shipped table" or self.fixed:
            return None
        taken = fitted(shape, dict(choice.tactics)[most], self.arch)
        if taken == chosen_by_steps(shape, most):
            return None
        others = [fitted(shape, tactic, self.arch) for tactic in candidates(shape, most, self.arch)]
        return [launch_of(shape, tactic) for tactic in others if tactic != taken][:_OTHERS]

    @property
    def cache(self) -> TimingCache:
        """All that is known: the given cache, and the times that this build took or found."""
        return merged([self._given, self._used])

    @property
    def _given(self) -> TimingCache:
        return self.given or TimingCache()

    def to_json(self) -> dict[str, Any]:
        """What an engine's config keeps: how many shapes' tactics are from where, and those of each."""
        return {
            **({"gpu": self.gpu} if self.gpu else {}),
            "settled_at_first_load": not self.fixed and any(c.source == "shipped table" for c in self.chosen.values()),
            "from": dict(sorted(Counter(choice.source for choice in self.chosen.values()).items())),
            "shapes": {
                str(shape): {"from": choice.source, "up_to": {str(most): str(way) for most, way in choice.tactics}}
                for shape, choice in self.chosen.items()
            },
        }

    def _gpu_of_given(self, shapes: Sequence[TimedShape]) -> str | None:
        """The GPU of the architecture whose times the given cache has, of most of the shapes."""
        kernels, triton = source_digest(*KERNEL_MODULES), triton_version()
        of_arch = [e for e in self._given.linears if (e.arch, e.kernels, e.triton) == (self.arch, kernels, triton)]
        counts = Counter(entry.gpu for entry in of_arch if entry.shape in shapes)
        gpus = sorted(counts, key=lambda gpu: (-counts[gpu], gpu))
        if len(gpus) > 1:
            self.notes.append(
                f"linears: the timing cache has times of several GPUs for {self.arch}; those of {gpus[0]} decide, "
                f"not those of {', '.join(gpus[1:])}"
            )
        return gpus[0] if gpus else None

    def _time(
        self, timer: Timer, known: dict[TimedShape, dict[int, TokenTimes]], on: TimedOn, working: Working | None
    ) -> set[TimedShape]:
        """Puts what is missing in `known`, and in the user's cache; of which shapes there was any."""
        work = [each for shape, times in known.items() for each in missing(shape, times, self.arch)]
        if not work:
            return set()
        started, timed = time.perf_counter(), set[TimedShape]()
        compiled = compile_work(work, self.arch, working and partial(working, "compiling kernels"))
        try:
            for each, times in time_work(timer, work, compiled, working and partial(working, "timing kernels")):
                known[each.shape][each.tokens] = times
                timed.add(each.shape)
        except (ResourceError, DeviceError) as e:
            self.notes.append(f"linears: not all of them are timed: {e.message}")
        finally:
            timer.close()
            update_user_cache(TimingCache(linears=[_entry(on, shape, known[shape]) for shape in timed]))
        seconds = time.perf_counter() - started
        self.notes.append(f"linears: {len(timed)} shapes timed on {on.gpu} in {seconds:.1f} s, kept for later builds")
        return timed

    def _note_shipped(self, shapes: Sequence[TimedShape]) -> None:
        shipped = sum(self.chosen[shape].source == "shipped table" for shape in shapes)
        decides = "what was measured on an H200 decides" if self.fixed else "the first load on a GPU chooses"
        if self.given is not None and shipped:
            self.notes.append(
                f"linears: the timing cache has no times for {shipped} of {len(shapes)} shapes, on {self.arch} with "
                f"these kernels and triton {triton_version()}: {decides}"
            )
        elif shipped:
            self.notes.append(f"linears: {shipped} of {len(shapes)} shapes were never timed on {self.arch}: {decides}")


def _entry(on: TimedOn, shape: TimedShape, times: Mapping[int, TokenTimes]) -> LinearTimes:
    return LinearTimes(**on.model_dump(), shape=shape, times=[times[tokens] for tokens in sorted(times)])
