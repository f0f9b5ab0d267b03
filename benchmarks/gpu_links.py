"""What a machine's GPUs and the links between them do: the figures that benchmarks/scaling.py reckons with.

    python benchmarks/gpu_links.py                                       # 2 GPUs or more; --gpus 1 for one alone
    python benchmarks/gpu_links.py --dry-run --output-dir /tmp/links     # tiny sizes on the CPU, gloo for NCCL

On one GPU: copies within its memory and from and to the host; what starting a kernel costs; matrix products in
bfloat16 and FP8 (`torch._scaled_mm`, one scale a tensor) for 1 to 8192 rows, on the shapes of Llama-3.1 8B, 70B, and
70B's share of one rank in 8; attention as torch has it (the faster of FlashAttention and cuDNN), of one new token over
long caches and of a whole prompt. On several: NCCL's all-reduce, all-gather and send/receive for 1 KiB to 256 MiB, one
process a GPU, called from Python and inside a CUDA graph.

Every figure is a median. Times are those of CUDA events around many calls; products and small kernels run in a CUDA
graph, so that the time is the GPU's and not Python's. Data is random: zeros would be faster than any model. Weights
rotate among so many buffers that the L2 cache does not hold them from one use to the next. Of collectives it is the
slowest rank's median that counts.

NVLink multicast stays off, in NCCL and in torch: where a host's GPUs are shared out among virtual machines, using it
can disturb the others.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

# Before torch and NCCL read them; the ranks' processes inherit them.
os.environ.update(NCCL_NVLS_ENABLE="0", TORCH_SYMM_MEM_DISABLE_MULTICAST="1", NVSHMEM_DISABLE_NVLS="1")
os.environ["TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING"] = "false"  # it is as it should be: one at a time

import common
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

Call = Callable[[], object]
Times = dict[str, float]  # bytes or rows, as JSON has keys: microseconds

# Rows (outputs) and columns (inputs) of the linears of a layer.
SHAPES = {
    "8B qkv": (6144, 4096), "8B dense": (4096, 4096), "8B gate and up": (28672, 4096), "8B down": (4096, 14336),
    "70B qkv": (10240, 8192), "70B dense": (8192, 8192), "70B gate and up": (57344, 8192), "70B down": (8192, 28672),
    "70B/8 qkv": (1280, 8192), "70B/8 dense": (8192, 1024), "70B/8 gate and up": (7168, 8192),
    "70B/8 down": (8192, 3584),
}  # fmt: skip
# Sequences, new tokens and keys of each; 32 heads on 8 KV heads of 128.
ATTENTION = ((1, 1, 1536), (16, 1, 1536), (128, 1, 1536), (1, 2048, 2048), (4, 2048, 2048))
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
ROWS = tuple(2**i for i in range(14))
MESSAGES = tuple(2**i for i in range(10, 29))  # bytes
HOST_BYTES = (1 << 10, 1 << 16, 1 << 20, 1 << 24, 1 << 28)
COPY_BYTES = (1 << 28, 1 << 30, 1 << 32)
COLLECTIVES = ("all_reduce", "all_gather", "send_recv")
ROTATE_BYTES = 512 << 20  # several times any L2
HANG_SECONDS = 60  # a collective that takes longer ends the ranks
LINKS_SECONDS = 240  # and so do all of them together


class Device:
    """Times calls on one GPU; or, to try the script, on the CPU."""

    def __init__(self, index: int, *, dry_run: bool) -> None:
        self.is_gpu = not dry_run
        self.torch = torch.device("cuda", index) if self.is_gpu else torch.device("cpu")
        if self.is_gpu:
            torch.cuda.set_device(index)
        else:
            torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other

    def sync(self) -> None:
        """Waits for all that was asked of the GPU."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def median_us(self, call: Call, *, of: int = 1, repeats: int = 20, warm_up: int = 3) -> float:
        """Microseconds of each of the `of` operations that `call` is made of."""
        if not self.is_gpu:
            return statistics.median(_seconds(call) for _ in range(3)) * 1e6 / of
        for _ in range(warm_up):
            call()
        self.sync()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(repeats)] for _ in range(2)]
        for start, end in zip(*events, strict=True):
            start.record()
            call()
            end.record()
        self.sync()
        return statistics.median(s.elapsed_time(e) for s, e in zip(*events, strict=True)) * 1e3 / of

    def graphed(self, call: Call) -> Call:
        """`call` as the launch of a CUDA graph; on the CPU as it is."""
        if not self.is_gpu:
            return call
        stream = torch.cuda.Stream()  # handles and workspaces are made outside of the capture
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's watchdog thread asks for events meanwhile, which would end a global capture
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            call()
        return graph.replay

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Normally distributed numbers."""
        return torch.randn(shape, device=self.torch, dtype=torch.bfloat16).to(dtype)


def _seconds(call: Call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def copies(device: Device, sizes: tuple[int, ...]) -> Times:
    """A tensor of so many bytes to another place in the GPU's memory."""
    times = {}
    for size in sizes:
        source = device.random(size // 2)
        target = torch.empty_like(source)
        times[str(size)] = device.median_us(partial(target.copy_, source))
    return times


def host_copies(device: Device, sizes: tuple[int, ...]) -> dict[str, Times]:
    """The same from and to pinned memory of the host."""
    times: dict[str, Times] = {"to the GPU": {}, "to the host": {}}
    for size in sizes:
        there = device.random(size // 2)
        here = torch.empty(size // 2, dtype=torch.bfloat16, pin_memory=device.is_gpu)
        times["to the GPU"][str(size)] = device.median_us(partial(there.copy_, here, non_blocking=True))
        times["to the host"][str(size)] = device.median_us(partial(here.copy_, there, non_blocking=True))
    return times


def launches(device: Device) -> Times:
    """Microseconds of a tiny kernel called from Python, of one in a graph, and of a graph of one until it is done."""
    x, many = torch.zeros(64, device=device.torch), 256

    def kernels() -> None:
        for _ in range(many):
            x.add_(1)

    once = device.graphed(lambda: x.add_(1))

    def launched_and_awaited() -> None:
        once()
        device.sync()

    launched_and_awaited()
    return {
        "kernel_from_python": device.median_us(kernels, of=many),
        "kernel_in_graph": device.median_us(device.graphed(kernels), of=many),
        "graph_launched_and_awaited": statistics.median(_seconds(launched_and_awaited) for _ in range(200)) * 1e6,
    }


def products(device: Device, shapes: dict[str, tuple[int, int]], rows: tuple[int, ...]) -> dict[str, Any]:
    """For each dtype and shape, the time of x [rows, columns] times a weight [outputs, columns], transposed."""
    largest = max(out * columns for out, columns in shapes.values())
    count = max(2 * largest, ROTATE_BYTES if device.is_gpu else 0)  # one byte each in FP8
    pool = device.random(count)
    found: dict[str, Any] = {}
    for dtype, values in (("bfloat16", pool), ("fp8", pool.to(torch.float8_e4m3fn))):
        found[dtype] = {}
        for name, (out, columns) in shapes.items():
            weights = values[: len(values) // (out * columns) * out * columns].view(-1, out, columns)
            weights = weights[: max(2, -(-ROTATE_BYTES // (out * columns * values.element_size())))]
            times: Times = {}
            for n in rows:
                try:
                    times[str(n)] = _product_us(device, weights, n)
                except RuntimeError as e:  # a shape that the library does not take: the others are measured
                    common.say(f"{dtype} {name}, {n} rows: {e}")
            found[dtype][name] = {"outputs": out, "inputs": columns, "us": times}
    return found


def _product_us(device: Device, weights: Tensor, rows: int) -> float:
    """Microseconds of one product with one of `weights` [n, outputs, columns], all used in turn."""
    count, out, columns = weights.shape
    x = device.random(rows, columns, dtype=weights.dtype)
    y = torch.empty(rows, out, dtype=torch.bfloat16, device=device.torch)
    one = torch.ones((), device=device.torch)

    def all_weights() -> None:
        for w in weights:
            if weights.dtype == torch.bfloat16:
                torch.mm(x, w.t(), out=y)
            else:
                torch._scaled_mm(x, w.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    repeats = 20 if rows <= 1024 else 8
    return device.median_us(device.graphed(all_weights), of=count, repeats=repeats, warm_up=2)


def attention(device: Device, cases: tuple[tuple[int, int, int], ...]) -> list[dict[str, Any]]:
    """For each case the time by each of torch's kernels that takes it, in bfloat16."""
    found = []
    for batch, queries, keys in cases:
        case: dict[str, Any] = {"batch": batch, "queries": queries, "keys": keys, "us": {}}
        q = device.random(batch, HEADS, queries, HEAD_DIM)
        size = batch * keys * KV_HEADS * HEAD_DIM * 2 * 2
        caches = [
            (device.random(batch, KV_HEADS, keys, HEAD_DIM), device.random(batch, KV_HEADS, keys, HEAD_DIM))
            for _ in range(max(2, min(64, ROTATE_BYTES // size)))
        ]

        def all_caches(q: Tensor = q, caches: list[tuple[Tensor, Tensor]] = caches) -> None:
            for k, v in caches:
                scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)

        for name, backend in BACKENDS.items():
            try:
                with sdpa_kernel(backend):
                    case["us"][name] = device.median_us(device.graphed(all_caches), of=len(caches))
            except RuntimeError as e:
                common.say(f"attention {batch} x {queries} over {keys}, {name}: {e}")
        found.append(case)
    return found


def collectives(rank: int, device: Device, sizes: tuple[int, ...], report: Callable[[dict[str, Any]], None]) -> None:
    """Times each collective among the first 2, 4, 8 ranks; `report`s what there is after each, on rank 0."""
    found: dict[str, Any] = {name: {} for name in COLLECTIVES}
    world = dist.get_world_size()
    counts = [n for n in (2, 4, 8, 16) if n <= world]
    groups = {n: dist.new_group(list(range(n))) for n in counts}  # every rank takes part in making each
    for how in ("eager", "graph") if device.is_gpu else ("eager",):
        for name in COLLECTIVES:
            for n in counts if name != "send_recv" else [2]:
                if rank < n:
                    times = {str(size): _collective_us(name, n, groups[n], device, size, how) for size in sizes}
                    found[name].setdefault(str(n), {})[how] = times
                dist.barrier()
            if rank == 0:
                report(found)


def _collective_us(name: str, ranks: int, group: Any, device: Device, size: int, how: str) -> float:
    """Microseconds of one collective of `size` bytes: of an all-gather, all ranks' parts together."""
    x, rank = device.random(size // 2), dist.get_rank()  # sums of sums become infinite, which changes no time
    part = x.chunk(ranks)[rank].clone()

    def call() -> None:
        match name:
            case "all_reduce":
                dist.all_reduce(x, group=group)
            case "all_gather":
                dist.all_gather_into_tensor(x, part, group=group)
            case "send_recv":  # there and back
                for sender in (0, 1):
                    (dist.send if rank == sender else dist.recv)(x, 1 - rank, group=group)

    calls = 20 if size <= 4 << 20 else 4

    def many() -> None:
        for _ in range(calls):
            call()

    call()
    device.sync()
    run = device.graphed(many) if how == "graph" else many
    dist.barrier(group=group)
    each = calls * (2 if name == "send_recv" else 1)
    times = torch.tensor(device.median_us(run, of=each, repeats=10), device=device.torch)
    dist.all_reduce(times, op=dist.ReduceOp.MAX, group=group)
    return float(times)


def _rank(rank: int, world: int, folder: str, dry_run: bool) -> None:
    """One process of `world`; rank 0 writes what it found to `folder`."""
    device = Device(rank, dry_run=dry_run)
    dist.init_process_group(
        "gloo" if dry_run else "nccl",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=HANG_SECONDS),
        device_id=None if dry_run else device.torch,
    )

    def report(found: dict[str, Any]) -> None:
        Path(folder, "collectives.json").write_text(json.dumps(found))

    collectives(rank, device, (1 << 10, 1 << 16) if dry_run else MESSAGES, report)
    device.sync()
    dist.destroy_process_group()


def measure_links(world: int, *, dry_run: bool) -> dict[str, Any]:
    """The collectives' times, from `world` processes. What was found before an error is kept, with the error."""
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = {}
        try:
            ranks = torch.multiprocessing.spawn(_rank, args=(world, folder, dry_run), nprocs=world, join=False)
            _await(ranks)
        except Exception as e:  # torch raises its own kinds for a rank that fails and for one that is killed
            traceback.print_exc()
            found["error"] = str(e).strip().splitlines()[-1]
        path = Path(folder, "collectives.json")
        return {**(json.loads(path.read_text()) if path.is_file() else {}), **found}


def _await(ranks: Any) -> None:
    """Waits for the processes; nothing but this ends a collective that hangs inside a graph."""
    deadline = time.monotonic() + LINKS_SECONDS
    while not ranks.join(timeout=5):
        if time.monotonic() > deadline:
            for process in ranks.processes:
                process.kill()
            raise TimeoutError(f"the ranks were not done after {LINKS_SECONDS} s")


def machine(gpus: int, *, dry_run: bool) -> dict[str, Any]:
    """Where and when."""
    kind = "CPU (a dry run)" if dry_run else torch.cuda.get_device_name(0)
    here: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": kind,
        "gpus": gpus,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if not dry_run:
        here |= {
            "memory_bytes": torch.cuda.get_device_properties(0).total_memory,
            "driver": next(iter(_nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")), None),
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "peer_access": gpus > 1 and torch.cuda.can_device_access_peer(0, 1),
            "links": _topology() if gpus > 1 else None,
        }
    return here


def _topology() -> str | None:
    """How the first two GPUs are joined, as nvidia-smi has it: NV18 is 18 NVLinks."""
    return next((line.split()[2] for line in _nvidia_smi("topo", "-m") if line.startswith("GPU0")), None)


def _nvidia_smi(*args: str) -> list[str]:
    """The lines that it prints; none where it fails."""
    try:
        return common.run(["nvidia-smi", *args]).splitlines()
    except (OSError, RuntimeError):
        return []


def markdown(data: dict[str, Any]) -> str:
    """The result as tables."""
    m = data["machine"]
    versions = ", ".join(f"{name} {m[name]}" for name in ("torch", "cuda", "nccl", "driver", "python") if m.get(name))
    text = f"# GPUs and the links between them\n\n{m['gpus']} x {m['gpu']}, {versions}, {m['date']}."
    if m.get("links"):
        text += f" GPU 0 and 1 are joined by {m['links']}."
    text += "\n\nCopies: GB/s within a GPU's memory count bytes read and bytes written.\n\n"
    rows = [["GPU memory", _size(size), us, 2 * int(size) / us / 1e3] for size, us in data["copy"].items()]
    for direction, times in data["host"].items():
        rows += [[direction, _size(size), us, int(size) / us / 1e3] for size, us in times.items()]
    cells = [[what, size, f"{us:.1f}", f"{rate:.1f}"] for what, size, us, rate in rows]
    text += common.table(["copy", "size", "us", "GB/s"], cells)
    text += "\nLaunching, microseconds.\n\n"
    text += common.table(["", "us"], [[name.replace("_", " "), f"{us:.2f}"] for name, us in data["launch"].items()])
    for dtype, shapes in data["products"].items():
        text += f"\nMatrix products in {dtype}: TFLOP/s by rows; at 1 row, GB/s of weights instead.\n\n"
        counts = sorted({int(n) for shape in shapes.values() for n in shape["us"]})
        rows = [[f"{name}, {s['outputs']} x {s['inputs']}", *_rates(s, dtype, counts)] for name, s in shapes.items()]
        text += common.table(["", *map(str, counts)], rows)
    text += "\nAttention in bfloat16, 32 heads on 8 KV heads of 128. A token's keys and values count as read once.\n\n"
    rows = [
        [f"{c['batch']} x {c['queries']} tokens, {c['keys']} keys", *(_attention_cell(c, b) for b in BACKENDS)]
        for c in data["attention"]
    ]
    text += common.table(["", *BACKENDS], rows)
    links = data["links"] or {}
    if "error" in links:
        text += f"\nNot all of the links was measured: {links['error']}\n"
    for name in COLLECTIVES:
        for ranks, ways in links.get(name, {}).items():
            text += f"\n{name} among {ranks} GPUs: microseconds, and GB/s of the bus (as nccl-tests counts).\n\n"
            text += _collective_table(name, int(ranks), ways)
    return text


def _rates(shape: dict[str, Any], dtype: str, counts: list[int]) -> list[str]:
    weights, cells = shape["outputs"] * shape["inputs"], []
    for n in counts:
        us = shape["us"].get(str(n))
        rate = (weights * (2 if dtype == "bfloat16" else 1) / 1e3) if n == 1 else 2 * n * weights / 1e6
        cells.append("–" if us is None else f"{rate / us:.0f}")
    return cells


def _attention_cell(case: dict[str, Any], backend: str) -> str:
    """Its time, with the rate that the case is bound by: keys and values read, or arithmetic (half of it masked)."""
    us = case["us"].get(backend)
    if us is None:
        return "–"
    if case["queries"] == 1:
        return f"{us:.1f} us, {case['batch'] * case['keys'] * KV_HEADS * HEAD_DIM * 2 * 2 / us / 1e3:.0f} GB/s"
    return (
        f"{us:.1f} us, {case['batch'] * case['queries'] * case['keys'] * HEADS * HEAD_DIM * 2 / us / 1e6:.0f} TFLOP/s"
    )


def _collective_table(name: str, ranks: int, ways: dict[str, Times]) -> str:
    factor = {"all_reduce": 2 * (ranks - 1) / ranks, "all_gather": (ranks - 1) / ranks, "send_recv": 1}[name]
    headings = ["size", *(f"{how}, {unit}" for how in ways for unit in ("us", "GB/s"))]
    rows = [
        [_size(size)]
        + [cell for t in ways.values() for cell in (f"{t[size]:.1f}", f"{factor * int(size) / t[size] / 1e3:.1f}")]
        for size in next(iter(ways.values()))
    ]
    return common.table(headings, rows)


def _size(size: str) -> str:
    n = int(size)
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n} {unit}"
        n //= 1024
    return f"{n} GiB"


def main() -> None:
    """Measures, writes benchmarks/results/NAME.json and .md, prints the tables last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, to try the script")
    parser.add_argument("--gpus", type=int, help="that take part (default: all; 2 in a dry run); 1 leaves out links")
    parser.add_argument("--output-dir", type=Path, help="default: benchmarks/results; of a dry run benchmarks/work")
    parser.add_argument("--name", help="of the result files (default: gpu_links_ and the GPU's name)")
    args = parser.parse_args()
    there = torch.cuda.device_count()
    world = 2 if args.gpus is None and args.dry_run else args.gpus if args.gpus is not None else max(2, there)
    if world < 1:
        parser.error(f"--gpus {world}: at least 1")
    if world > there and not args.dry_run:
        has = f"this machine has {there or 'none'}"
        also = "--gpus 1 measures one alone, without links" if there else "--dry-run tries the script on the CPU"
        parser.error(
            f"{world} GPUs are needed and {has}; {also}" if world > 1 else f"a GPU is needed and {has}; {also}"
        )
    data: dict[str, Any] = {"machine": machine(world, dry_run=args.dry_run), "links": None}
    name = args.name or "gpu_links_" + data["machine"]["gpu"].lower().removeprefix("nvidia ").split()[0]
    out = args.output_dir or (common.WORK if args.dry_run else common.RESULTS)
    common.say(f"{world} x {data['machine']['gpu']}")
    device = Device(0, dry_run=args.dry_run)
    small = args.dry_run
    data["copy"] = copies(device, (1 << 16,) if small else COPY_BYTES)
    data["host"] = host_copies(device, (1 << 10,) if small else HOST_BYTES)
    data["launch"] = launches(device)
    common.say("copies and launches are measured")
    shapes = {"tiny": (64, 32), "tiny, wide": (128, 32)} if small else SHAPES
    data["products"] = products(device, shapes, (1, 32) if small else ROWS)
    data["attention"] = attention(device, ((1, 1, 64), (1, 64, 64)) if small else ATTENTION)
    common.say("products and attention are measured")
    if world > 1:
        if device.is_gpu:
            torch.cuda.empty_cache()
        data["links"] = measure_links(world, dry_run=args.dry_run)
    common.write_results(name, data, markdown(data), out)


if __name__ == "__main__":
    main()
