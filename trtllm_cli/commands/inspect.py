"""`trtllm inspect`: what an artifact is, and what to do with it next."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from trtllm_cli.engine import BuildConfig
    from trtllm_cli.graph import Graph
    from trtllm_cli.mapping import Rank
    from trtllm_cli.model_config import ModelConfig
    from trtllm_cli.tensor_file import TensorInfo


@dataclass
class Inspection:
    """What there is to say of an artifact."""

    kind: str
    path: str
    config: dict[str, Any]
    files: dict[str, int]  # name -> bytes
    tensors: dict[str, TensorInfo]
    next_command: str
    more: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)  # kind -> ranks that work together
    kernels: list[dict[str, Any]] = field(default_factory=list)  # of a cuda engine

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "kind": self.kind,
            "path": self.path,
            "config": self.config,
            "files": self.files,
            "bytes": sum(self.files.values()),
            "tensors": len(self.tensors),
            "parameters_by_dtype": _by_dtype(self.tensors),
            **self.more,
            **({"rank_groups": self.groups} if self.groups else {}),
            **({"kernels": self.kernels} if self.kernels else {}),
            "next_command": self.next_command,
        }


def inspect(
    path: Annotated[Path, typer.Argument(help="A snapshot directory, a .gguf file, a checkpoint or an engine.")],
    graph: Annotated[bool, typer.Option("--graph", help="Print the graph as text.")] = False,
    fused: Annotated[
        bool, typer.Option("--fused", help="With --graph or --draw: as the passes rewrite it. An engine's always is.")
    ] = False,
    draw: Annotated[Path | None, typer.Option(help="Draw the graph to this SVG file.", show_default=False)] = None,
    rank: Annotated[int, typer.Option(help="Which rank's graph and tensors.")] = 0,
    tensors: Annotated[bool, typer.Option("--tensors", help="List the tensors.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read every file and check its SHA-256.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Say what a snapshot, checkpoint or engine is: sizes, config, graph, and the next command to run.

    Examples:

        trtllm inspect ckpt

        trtllm inspect engine --graph

        trtllm inspect ckpt --draw graph.svg
    """
    from trtllm_cli.artifact import detect
    from trtllm_cli.commands.console import stderr, stdout

    kind = detect(path)
    if kind == "engine":
        found, traced = _engine(path, rank, verify, want_graph=graph or draw is not None)
    elif kind == "checkpoint":
        found, traced = _checkpoint(path, rank, verify, want_graph=graph or draw is not None)
    else:
        found, traced = _snapshot(path, kind, verify, want_graph=graph or draw is not None)
    if traced is not None and fused and kind != "engine":
        from trtllm_cli.build.passes import run_passes

        traced = run_passes(traced)
    if draw is not None and traced is not None:
        _write_drawing(draw, traced)
    if json_:
        data = found.to_json()
        if graph and traced is not None:
            data["graph"] = traced.to_json()
        if tensors:
            data["tensors"] = {name: [info.dtype, list(info.shape)] for name, info in found.tensors.items()}
        print(json.dumps(data, indent=2, ensure_ascii=False))
        return
    if graph and traced is not None:
        print(traced)
        return
    _print(found, list_tensors=tensors)
    if draw is not None:
        stderr().print(f"drawn: {draw}", markup=False)
    stdout().print(f"next: {found.next_command}", markup=False)


def _engine(path: Path, rank: int, verify: bool, *, want_graph: bool) -> tuple[Inspection, Graph | None]:
    from trtllm_cli.commands.launch import run_command
    from trtllm_cli.engine import Engine
    from trtllm_cli.graph import Graph

    engine = Engine.open(path)
    place = _rank(engine.config.pretrained_config, rank)
    if verify:
        for each in engine.config.pretrained_config.mapping.ranks:
            engine.verify(each)
    with engine.tensors(place) as file:
        plan = engine.plan(file)
        traced = Graph.from_json(json.loads(file.metadata["graph"])) if want_graph else None
        tensors = dict(file.tensors)
        data_bytes = file.data_bytes
    config = engine.config
    more: dict[str, Any] = {
        "backend": config.backend,
        "target": config.target,
        "built_by": config.version,
        "steps": dict(Counter(s["op"] if isinstance(s, dict) else s for s in plan["steps"])),
        "limits": config.build_config.model_dump(exclude_none=True),
        **({"choices": config.notes} if config.notes else {}),
        "verified": verify,
    }
    kernels = []
    if config.backend == "cuda":
        more["gpu_memory"] = _gpu_memory(plan, data_bytes, config.build_config)
        kernels = _gpu_kernels(plan)
    next_command = run_command(path, config.pretrained_config.mapping.world_size)
    shown = config.pretrained_config.model_dump(mode="json", exclude_defaults=True)
    groups = _groups(config.pretrained_config)
    return Inspection("engine", str(path), shown, _files(path), tensors, next_command, more, groups, kernels), traced


def _gpu_memory(plan: dict[str, Any], data_bytes: int, limits: BuildConfig) -> dict[str, int]:
    """Bytes that a cuda engine takes on its GPU."""
    from trtllm_cli.run.gpu_memory import GpuNeeds

    needs = GpuNeeds.of(plan, data_bytes, limits)
    block = sum(k + v for k, v in plan["kv"])
    return {
        "weights": needs.weights,
        "activations": needs.activations,
        "scratch": needs.scratch,
        "kv_cache_per_token": block // limits.tokens_per_block,
        "kv_cache_of_max_seq_len": block * limits.blocks_per_sequence,
    }


def _gpu_kernels(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """The kernels of a cuda plan: what each is, how it is tiled, what it takes of a multiprocessor."""
    from trtllm_cli.kernels.cuda.kernel import launches_of

    used = Counter(launch["kernel"] for launch in launches_of(plan) if "kernel" in launch)
    return [
        {
            "kernel": f"{kernel['source']['module']}.{kernel['source']['function']}",
            "launches": used[i],  # in the plan; a step takes one way of each node
            "constants": dict(kernel["source"]["constants"]),
            "num_warps": kernel["num_warps"],
            "num_stages": kernel["source"]["num_stages"],
            "registers": kernel["registers"],
            "spills": kernel["spills"],
            "shared": kernel["shared"],
            "cubin": kernel["size"],
        }
        for i, kernel in enumerate(plan["kernels"])
    ]


def _checkpoint(path: Path, rank: int, verify: bool, *, want_graph: bool) -> tuple[Inspection, Graph | None]:
    from trtllm_cli.checkpoint import Checkpoint
    from trtllm_cli.models import trace_model

    checkpoint = Checkpoint.open(path)
    place = _rank(checkpoint.config, rank)
    if verify:
        checkpoint.verify()
    with checkpoint.tensors(place) as file:
        tensors = dict(file.tensors)
    traced = trace_model(checkpoint.config, place) if want_graph else None
    shown = checkpoint.config.model_dump(mode="json", exclude_defaults=True)
    next_command = f"trtllm build --checkpoint-dir {path} --output-dir engine"
    more = {"verified": verify and bool(checkpoint.sha256)}
    groups = _groups(checkpoint.config)
    return Inspection("checkpoint", str(path), shown, _files(path), tensors, next_command, more, groups), traced


def _snapshot(path: Path, kind: str, verify: bool, *, want_graph: bool) -> tuple[Inspection, Graph | None]:
    from trtllm_cli.convert.pipeline import ConvertOptions, read_config
    from trtllm_cli.convert.reader import open_reader
    from trtllm_cli.models import trace_model

    more = _manifest(path, verify) if kind == "snapshot" else {}
    reader = open_reader(path)
    try:
        traced = None
        if want_graph:
            config = read_config(reader, ConvertOptions()).config
            traced = trace_model(config, config.mapping.ranks[0])
        files = {path.name: path.stat().st_size} if path.is_file() else _files(path)
        next_command = f"trtllm convert {path} --output-dir ckpt"
        return Inspection(kind, str(path), dict(reader.config), files, dict(reader.tensors), next_command, more), traced
    finally:
        reader.close()


def _manifest(path: Path, verify: bool) -> dict[str, Any]:
    """Where the snapshot came from, as download wrote it down."""
    from trtllm_cli import snapshot

    manifest = snapshot.read_manifest(path)
    if manifest is None:
        return {"verified": False}
    if verify:
        snapshot.Snapshot.open(path).verify()
    return {"repo_id": manifest.repo_id, "revision": manifest.revision, "commit": manifest.commit, "verified": verify}


def _rank(config: ModelConfig, rank: int) -> Rank:
    from trtllm_cli.errors import UsageError

    ranks = config.mapping.ranks
    if not 0 <= rank < len(ranks):
        raise UsageError(f"there is no rank {rank}: the ranks are 0 to {len(ranks) - 1}", where="--rank")
    return ranks[rank]


def _groups(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], ...]]:
    """The groups of several ranks; those of experts where there are any."""
    if config.mapping.world_size == 1:
        return {}
    return {kind: groups for kind, groups in config.mapping.groups.items() if config.moe or not kind.startswith("moe")}


def _files(path: Path) -> dict[str, int]:
    return {str(f.relative_to(path)): f.stat().st_size for f in sorted(path.rglob("*")) if f.is_file()}


def _by_dtype(tensors: dict[str, TensorInfo]) -> dict[str, int]:
    """dtype -> elements."""
    import math

    counts: Counter[str] = Counter()
    for info in tensors.values():
        counts[info.dtype] += math.prod(info.shape)
    return dict(counts)


def _write_drawing(path: Path, graph: Graph) -> None:
    from trtllm_cli.artifact import os_errors
    from trtllm_cli.graph_drawing import draw

    with os_errors(path, "--draw"):
        path.write_text(draw(graph), encoding="utf-8")


def _print(found: Inspection, *, list_tensors: bool) -> None:
    from rich.table import Table

    from trtllm_cli.artifact import human_bytes
    from trtllm_cli.commands.console import stdout

    out = stdout()
    total = human_bytes(sum(found.files.values()))
    out.print(f"{found.kind}: {found.path} ({len(found.files)} files, {total})", markup=False)
    table = Table(show_header=False)
    for key, value in {**found.config, **found.more}.items():
        if key == "gpu_memory":
            value = ", ".join(f"{name.replace('_', ' ')} {human_bytes(n)}" for name, n in value.items())
        text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
        table.add_row(key, text if len(text) <= 300 else text[:300] + " ...")
    for dtype, count in _by_dtype(found.tensors).items():
        table.add_row(f"{dtype} elements", f"{count:,}")
    out.print(table)
    files = Table("file", "size")
    for name, size in found.files.items():
        files.add_row(name, human_bytes(size))
    out.print(files)
    if found.groups:
        ranks = Table("group", "size", "ranks")
        for kind, groups in found.groups.items():
            ranks.add_row(kind, str(len(groups[0])), "  ".join(",".join(map(str, group)) for group in groups))
        out.print(ranks)
    if found.kernels:
        out.print(_kernel_table(found.kernels))
    if list_tensors:
        listing = Table("tensor", "dtype", "shape")
        for name, info in found.tensors.items():
            listing.add_row(name, info.dtype, str(list(info.shape)))
        out.print(listing)


_TILES = re.compile(r"B[MNK]|BLOCK(_[GMNQ])?|TILE|TOKENS|(NUM_)?SPLITS?")  # constants that say how a kernel is tiled


def _kernel_table(kernels: list[dict[str, Any]]) -> Table:
    """A line for each function, with all that its specializations have; --json has each of them by itself."""
    from rich.table import Table

    from trtllm_cli.artifact import human_bytes

    by_function: dict[str, list[dict[str, Any]]] = {}
    for k in kernels:
        by_function.setdefault(k["kernel"].rpartition(".")[2], []).append(k)
    table = Table()
    table.add_column("kernel", no_wrap=True)
    table.add_column("tiles", overflow="fold")
    for heading in ("kinds", "warps", "registers", "shared"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, group in sorted(by_function.items()):
        tiles: dict[str, list[int]] = {}
        for k in group:
            for constant, value in k["constants"].items():
                if _TILES.fullmatch(constant):
                    tiles.setdefault(constant, []).append(value)
        shown = "; ".join(f"{constant} {_distinct(values)}" for constant, values in tiles.items())
        warps, registers = (_distinct(k[what] for k in group) for what in ("num_warps", "registers"))
        if spilt := max(k["spills"] for k in group):
            registers += f" ({spilt} B spilt)"
        shared = human_bytes(max(k["shared"] for k in group))
        table.add_row(name, shown, str(len(group)), warps, registers, shared)
    return table


def _distinct(values: Iterable[int]) -> str:
    """Numbers in order, the middle of many left out."""
    found = sorted(set(values))
    return ", ".join(map(str, found)) if len(found) <= 3 else f"{found[0]} to {found[-1]}"
