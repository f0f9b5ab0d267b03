"""Steps of a plan that are of one kind, and what the first load on a GPU finds out about each kind."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trtllm_cli.kernels.compile_cache import cache_dir, keep

Step = Mapping[str, Any]
Kinds = Mapping[str, Sequence[int]]  # by kind, where its steps are


def alike(steps: Sequence[Step], meant: Callable[[Step], bool]) -> Kinds:
    """The kinds of those that are `meant`: steps are of one if their launches differ by their operands alone, and by
    whether their rows are all tokens or those whose logits are wanted.
    """
    kinds: dict[str, list[int]] = defaultdict(list)
    for place, step in enumerate(steps):
        if meant(step):
            kinds[_kind_of(step)].append(place)
    return kinds


def found_once(
    folder: str, depends: Sequence[str], kinds: Kinds, find: Callable[[Sequence[int]], list[Any]],
    fits: Callable[[Sequence[int], list[Any]], bool],
) -> dict[str, list[Any]]:  # fmt: skip
    """What `find` finds of each kind, by its places; what an earlier load has found, where all of that `fits`.

    It is kept in a folder of the user's cache, for what it depends on.
    """
    key = hashlib.sha256("\n".join(depends).encode()).hexdigest()[:32]
    file = cache_dir() / folder / f"{key}.json"
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        found = None
    is_known = isinstance(found, dict) and found.keys() == kinds.keys()
    if is_known and all(isinstance(of, list) and fits(kinds[kind], of) for kind, of in found.items()):
        return found
    found = {kind: find(places) for kind, places in kinds.items()}
    keep(file, json.dumps(found).encode())
    return found


def _kind_of(step: Step) -> str:
    def kinds(launches: Sequence[Mapping[str, Any]]) -> list[Any]:
        return [
            [launch["kernel"], launch["grid"]] if "kernel" in launch else [launch["call"], launch["n"], launch["k"]]
            for launch in launches
        ]

    ways = [[most, kinds(launches)] for most, launches in step["ways"]]
    others = [[kinds(launches) for launches in of_way] for of_way in step.get("others", [])]
    kind = json.dumps([step["by"], ways, others]).replace('"num_logits"', '"num_tokens"')
    return hashlib.sha256(kind.encode()).hexdigest()[:16]
