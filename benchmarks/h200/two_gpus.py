"""Two GPUs: mpirun -n 2 python -m benchmarks.h200.two_gpus reduce steps serve

    reduce  an all-reduce by size: ours over the other's memory, with and without the norm after it, beside NCCL's
    steps   decode steps and prefills of the 8B shape on both GPUs beside one, in one run
    serve   the 70B shape in FP8, 128 tokens in and 128 out, saturated

Weights are made on the devices (synthetic.py).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import say
from benchmarks.h200 import floors, serving
from benchmarks.h200.steps import decode_milliseconds, prefill_milliseconds
from benchmarks.h200.synthetic import config_of, runner_of
from trtllm_cli.build.backends.cuda_collectives import ROW_BLOCK
from trtllm_cli.kernels.cuda.compiler import compile_kernels
from trtllm_cli.kernels.cuda.graph_time import graph_milliseconds
from trtllm_cli.kernels.cuda.kernel import KernelSource
from trtllm_cli.run.communicator import Activity
from trtllm_cli.run.mpi import MpiCommunicator
from trtllm_cli.run.step_inputs import InputBuilder
from trtllm_cli.run.worker import follow

CALLS = 64  # of a graph, as in a step of 32 layers
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
MOST_IN_WORDS = 4 << 20  # bytes
PUBLISHED_70B = 6823.0  # tok/s: TensorRT-LLM, Llama-3.1-70B FP8, two H200, 128/128


def reduce_times(comm: Any, width: int = 4096) -> list[dict[str, Any]]:
    """Microseconds of an all-reduce of [rows, width] bf16, by rows. Checks what ours gives against NCCL's."""
    from trtllm_cli.run.backends.cuda_device import CudaDevice

    device = CudaDevice(comm.rank)
    mapping = config_of("8b", "bf16", tp=2).mapping
    device.join(mapping.ranks[comm.rank], comm)
    group, most = (0, 1), ROWS[-1]
    memory = torch.zeros(2 * (most * width * 2 + 4 * most), dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    there = device.find_peers(memory, group, comm)
    assert there is not None, "the GPUs do not see each other's memory"
    deltas = torch.tensor([at - memory.data_ptr() for at in there], device="cuda")
    pointers = {
        "x_ptr": "*bf16", "staging_ptr": "*i64", "deltas_ptr": "*i64", "step_ptr": "*i32", "calls": "i32",
        "call": "i32", "out_ptr": "*bf16",
    }  # fmt: skip
    more = {
        "residual_ptr": "*fp32", "weight_ptr": "*bf16", "new_residual_ptr": "*fp32", "out_scale_ptr": "*fp32",
        "row_scale_ptr": "*fp32", "eps": "fp32",
    }  # fmt: skip
    common = {"WIDTH": width, "RANKS": 2, "RANK": comm.rank, "PUSH": True, "PULL": True, "PDL": True}
    in_rows, words = pointers | {"staging_ptr": "*i32"}, {"STAGING": MOST_IN_WORDS // 4, "FLAGS": 0}
    rows_sizes, norm = {"STAGING": most * width // 2, "FLAGS": most}, {"num_warps": 16, "BLOCK": 4096, "QUANT": "none"}
    sources = {
        name: KernelSource.of("collectives", name.partition(",")[0], args, **how, **common)
        for name, args, how in (
            ("all_reduce", pointers, {"BLOCK": 1024, **words}),
            ("all_reduce_add_rms_norm", pointers | more, {**norm, **words}),
            ("all_reduce, rows", in_rows, {"BLOCK": ROW_BLOCK, **rows_sizes}),
            ("all_reduce_add_rms_norm, rows", in_rows | more, {**norm, **rows_sizes}),
        )
    }
    compiled = compile_kernels(list(sources.values()), "sm_90a")
    torch.manual_seed(comm.rank)
    x = torch.randn(most, width, device="cuda").bfloat16()
    y, sums = torch.empty_like(x), torch.empty_like(x)
    residual, weight = torch.zeros(most, width, device="cuda"), torch.ones(width, device="cuda").bfloat16()
    step = torch.ones(1, dtype=torch.int32, device="cuda")
    values = {
        "x_ptr": x.data_ptr(), "staging_ptr": memory.data_ptr(), "deltas_ptr": deltas.data_ptr(),
        "step_ptr": step.data_ptr(), "calls": CALLS, "out_ptr": y.data_ptr(), "residual_ptr": residual.data_ptr(),
        "weight_ptr": weight.data_ptr(), "new_residual_ptr": residual.data_ptr(), "out_scale_ptr": 0,
        "row_scale_ptr": 0, "eps": 1e-5,
    }  # fmt: skip
    rows_of_table = []
    for rows in ROWS:
        row: dict[str, Any] = {"rows": rows, "bytes": rows * width * 2}
        device.all_reduce(x[:rows], sums[:rows], group)
        for name, source in sources.items():
            if row["bytes"] > MOST_IN_WORDS and "rows" not in name:
                continue
            memory.zero_()  # flags of what was here before
            torch.cuda.synchronize()
            comm.exchange("ready")
            kernel = compiled[source]
            loaded = device.driver.load(kernel)
            grid = (rows, width // 1024 if name == "all_reduce" else 1, 1)
            launches = []
            for call in range(CALLS):
                args = [call if n == "call" else values[n] for n in kernel.names]
                launches.append(loaded.prepare(grid, args))
                launches[-1].set_stream(device.stream.cuda_stream)

            def ours(launches: Any = launches) -> None:
                step.add_(1)
                for launch in launches:
                    launch.enqueue()

            y.zero_()
            torch.cuda.synchronize()
            row[name] = graph_milliseconds(device.stream, ours) / CALLS * 1e3
            if "norm" not in name:
                torch.cuda.synchronize()
                row["differs"] = max(
                    row.get("differs", 0.0), float((y[:rows].float() - sums[:rows].float()).abs().max())
                )

        def nccl(rows: int = rows) -> None:
            for _ in range(CALLS):
                device.all_reduce(x[:rows], sums[:rows], group)

        comm.exchange("ready")
        row["nccl"] = graph_milliseconds(device.stream, nccl) / CALLS * 1e3
        rows_of_table.append(row)
    device.leave()
    return rows_of_table


def step_times(comm: Any, fmt: str, *, shape: str = "8b", context: int = 512) -> list[dict[str, Any]]:
    """Milliseconds of steps on one GPU and on both; rank 0 has them."""
    cases: list[tuple[str, int]] = [("decode", 1), ("decode", 8), ("decode", 64), ("prefill", 128), ("prefill", 2048)]
    times: dict[int, list[float]] = {}
    for ranks in (1, 2):
        if comm.rank < ranks:
            runner, config = runner_of(
                shape, fmt, num_blocks=1024, comm=comm if ranks > 1 else None, max_batch_size=64, max_num_tokens=2048,
                max_seq_len=4096,
            )  # fmt: skip
            times[ranks] = []
            for kind, size in cases:
                if kind == "decode":
                    ms, _, bad = decode_milliseconds(runner, config, size, context, 128)
                    assert not bad
                else:
                    ms = prefill_milliseconds(runner, config, size)[0]
                times[ranks].append(ms)
            runner.close()
            del runner
            torch.cuda.empty_cache()
        comm.exchange("next")
    if comm.rank:
        return []
    return [
        {"shape": shape, "format": fmt, "kind": kind, "size": size, "one_ms": one, "two_ms": two, "times": one / two}
        for (kind, size), one, two in zip(cases, times[1], times[2], strict=True)
    ]


def serve_70b(comm: Any, requests: int, layers: int | None) -> dict[str, Any] | None:
    """Output tokens per second of the 70B shape, saturated; rank 0's."""
    from trtllm_cli.run.backends.cuda import GRAPH_SIZES

    work = floors.Workload(requests, requests, 128, 128)
    blocks = 1024 * 4 + 8
    started = time.perf_counter()
    runner, limits = runner_of(
        "70b", "fp8", num_blocks=blocks, layers=layers, comm=comm, max_batch_size=1024, max_num_tokens=8192,
        max_seq_len=256, kv_cache_dtype="fp8",
    )  # fmt: skip
    say(f"rank {comm.rank}: 70b fp8 ready in {time.perf_counter() - started:.1f} s")
    if comm.rank:
        follow(runner, comm, InputBuilder.of(limits), logits_rank=0)
        runner.close()
        return None
    target = serving.OnExecutor(runner, limits, vocab_size=floors.VOCAB, num_blocks=blocks, comm=comm)
    probe = serving.Probe(mark=serving.cuda_marks(runner))
    probe.attach(runner, target.executor)
    figures = serving.run_workload(target, probe, work, GRAPH_SIZES)
    target.close()
    say(serving.details_of(figures))
    return {"shape": "70b", "layers": layers, **figures, "of_tensorrt_llm": figures["output_tok_s"] / PUBLISHED_70B}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["reduce", "steps", "serve"])
    parser.add_argument("--formats", nargs="*", default=["bf16", "fp8"])
    parser.add_argument("--requests", type=int, default=2048)
    parser.add_argument("--layers", type=int, help="of the 70B shape: to try the script")
    parser.add_argument("--output", default="", help="JSON")
    a = parser.parse_args()
    comm = MpiCommunicator(Activity())
    assert comm.world_size == 2, "start it with mpirun -n 2"
    torch.cuda.set_device(comm.rank)
    rows: list[dict[str, Any]] = []
    try:
        if "reduce" in a.parts:
            rows += [{"part": "reduce", **row} for row in reduce_times(comm)]
        if "steps" in a.parts:
            for fmt in a.formats:
                rows += [{"part": "steps", **row} for row in step_times(comm, fmt)]
        if "serve" in a.parts:
            served = serve_70b(comm, a.requests, a.layers)
            rows += [{"part": "serve", **served}] if served else []
    finally:
        if comm.rank == 0:
            if a.output:
                Path(a.output).parent.mkdir(parents=True, exist_ok=True)
                serving.write("two_gpus", rows, a.output)
            say("\n".join(line_of(row) for row in rows))
    comm.finish()


def line_of(row: dict[str, Any]) -> str:
    """A row of the table."""
    if row["part"] == "reduce":
        ours = "".join(f"{name} {row[name]:6.2f} us  " for name in row if name.startswith("all_reduce"))
        return f"{row['bytes'] / 1024:6.0f} KiB  {ours}NCCL {row['nccl']:6.2f} us  differs {row.get('differs', 0):.3g}"
    if row["part"] == "steps":
        return (
            f"{row['shape']} {row['format']} {row['kind']} {row['size']}: {row['one_ms']:.3f} ms on one, "
            f"{row['two_ms']:.3f} on two, x{row['times']:.2f}"
        )
    return (
        f"{row['shape']} fp8, kv fp8, 128/128, {row['requests']} requests: {row['output_tok_s']:.0f} tok/s, "
        f"TensorRT-LLM {PUBLISHED_70B:.0f} (x{row['of_tensorrt_llm']:.2f})"
    )


if __name__ == "__main__":
    main()
