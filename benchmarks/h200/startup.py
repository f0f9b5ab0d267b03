"""From the start of a process to its first token: python -m benchmarks.h200.startup --format bf16

Makes an engine of Llama-3.1-8B's shape (`trtllm convert --random-weights`, `trtllm build --backend cuda`; under
/dev/shm, so that files are in memory) unless --engine-dir names one, and times

- `trtllm run --engine-dir E --input-token-ids 1,2,3 --max-tokens 1`, from outside: to its first byte, and to its end;
- the same by the Python API in a process that notes when each part begins and ends.

Parts overlap where threads do: the file's digest is checked while all else goes on, and the answer waits for it.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import HERE, TRTLLM, run, say
from benchmarks.h200 import floors

STARTED = "TRTLLM_BENCH_STARTED"  # perf_counter of the process that starts another: one clock for all on Linux
QFORMATS = {"bf16": None, "fp8": "fp8", "fp8_pc_pt": "fp8_pc_pt", "int4": "int4_wo", "int8": "int8_wo"}


def timed(command: list[Any]) -> float:
    """Seconds of a command, from outside."""
    started = time.perf_counter()
    run(command)
    return time.perf_counter() - started


def make_engine(work: Path, fmt: str, kv: str, model: str, layers: int | None, limits: list[str]) -> dict[str, Any]:
    """Converts and builds; seconds of each, and where the engine is."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    convert = [*TRTLLM, "convert", "--random-weights", model, "--output-dir", work / "ckpt"]
    if layers:
        convert += ["--num-layers", layers]
    if QFORMATS[fmt]:
        convert += ["--qformat", QFORMATS[fmt]]
    if kv != "bf16":
        convert += ["--kv-cache-dtype", kv]
    seconds = {"convert_s": timed(convert)}
    build = [
        *TRTLLM,
        "build",
        "--backend",
        "cuda",
        "--checkpoint-dir",
        work / "ckpt",
        "--output-dir",
        work / "engine",
        *limits,
    ]
    seconds["build_s"] = timed(build)
    shutil.rmtree(work / "ckpt")
    size = sum(f.stat().st_size for f in (work / "engine").rglob("*") if f.is_file())
    return {**seconds, "engine_bytes": size, "engine": str(work / "engine")}


def run_once(engine: Path) -> tuple[float, float]:
    """`trtllm run`: seconds to the first byte of its output, and to its end."""
    command = [*TRTLLM, "run", "--engine-dir", engine, "--input-token-ids", "1,2,3", "--max-tokens", "1"]
    started = time.perf_counter()
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 1)
        to_first = time.perf_counter() - started
        _, error = process.communicate()
    if not first or process.returncode:
        raise RuntimeError(f"trtllm run exited with {process.returncode}: {error.decode()[-2000:]}")
    return to_first, time.perf_counter() - started


def parts_of(engine: Path) -> dict[str, list[float]]:
    """When each part of a process of the Python API begins and ends, in seconds from its start."""
    environment = {**os.environ, STARTED: repr(time.perf_counter())}
    command = [sys.executable, "-m", "benchmarks.h200.startup", "--inside", str(engine)]
    return json.loads(run(command, env=environment, cwd=HERE.parent).splitlines()[-1])


def inside(engine: str) -> None:
    """The process of `parts_of`."""
    origin = float(os.environ[STARTED])
    parts: dict[str, list[float]] = {"python": [0.0, time.perf_counter() - origin]}

    def note(name: str, began: float) -> None:
        ended = time.perf_counter()
        first = parts.get(name, [began - origin])[0]
        parts[name] = [first, ended - origin]

    def watch(owner: Any, name: str, part: str) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                note(part, began)

        setattr(owner, name, watched)

    began = time.perf_counter()
    import torch  # noqa: F401

    note("import torch", began)
    began = time.perf_counter()
    from trtllm_cli.engine import Engine
    from trtllm_cli.run.backends import cuda, cuda_device
    from trtllm_cli.run.llm import LLM
    from trtllm_cli.run.request import SamplingParams

    note("import trtllm_cli", began)
    watch(Engine, "verify", "digest of the file (aside)")
    watch(cuda_device.CudaDevice, "__init__", "CUDA context")
    watch(cuda_device.CudaDevice, "load", "kernels")
    watch(cuda.DeviceWeights, "__init__", "weights")
    watch(cuda.CudaRunner, "allocate_kv_cache", "KV cache")
    watch(cuda_device.CudaDevice, "capture", "capture of a graph")
    watch(cuda.CudaRunner, "start", "steps enqueued")
    began = time.perf_counter()
    llm = LLM(engine)
    note("LLM(...)", began)
    began = time.perf_counter()
    stream = llm.stream([1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True))
    next(stream)
    note("first token", began)
    next(stream)
    note("second token", began)
    stream.close()
    began = time.perf_counter()
    llm.close()
    note("close", began)
    print(json.dumps(parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=QFORMATS, default="bf16")
    parser.add_argument("--kv", choices=("bf16", "fp8", "int8"), default="bf16")
    parser.add_argument("--model", default="llama-3.1-8b", help="a shape that `trtllm convert --random-weights` knows")
    parser.add_argument("--layers", type=int, help="only so many: to try the script")
    parser.add_argument("--engine-dir", type=Path, help="an engine that is there already")
    parser.add_argument("--work-dir", type=Path, default=Path("/dev/shm/trtllm-startup"))
    parser.add_argument("--keep", action="store_true", help="leave the engine there, for serving.py --engine-dir")
    parser.add_argument("--build-args", nargs=argparse.REMAINDER, default=[], help="last: for trtllm build")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", default="")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.inside:
        inside(a.inside)
        return
    from benchmarks.h200.serving import line_of, row_of, write

    made: dict[str, Any] = {}
    if a.engine_dir is None:
        made = make_engine(a.work_dir, a.format, a.kv, a.model, a.layers, a.build_args)
        say(f"convert {made['convert_s']:.1f} s, build {made['build_s']:.1f} s, {made['engine_bytes'] / 1e9:.2f} GB")
    engine = a.engine_dir or Path(made["engine"])
    times = [run_once(engine) for _ in range(a.rounds)]
    parts = [parts_of(engine) for _ in range(a.rounds)]
    shown = sorted(parts, key=lambda p: p["first token"][1])[len(parts) // 2]
    figures = {
        **made, "to_first_s": [first for first, _ in times], "to_end_s": [end for _, end in times],
        "parts": shown, "api_first_token_s": [p["first token"][1] for p in parts],
        "api_ready_s": [p["LLM(...)"][1] for p in parts],
    }  # fmt: skip
    shape = "8b" if a.model == "llama-3.1-8b" and not a.layers else a.model
    floor = floors.floor("start", shape, a.format) if shape in floors.MODELS else None
    value = statistics.median(figures["to_first_s"])
    row = row_of("start", shape, a.format, a.kv, value, floor, figures)
    say(line_of(row))
    for name in ("to_first_s", "to_end_s", "api_ready_s", "api_first_token_s"):
        say(f"   {name:18} {' '.join(f'{s:.2f}' for s in figures[name])}")
    say("   parts of a process of the Python API, seconds from its start:")
    for name, (start, end) in sorted(shown.items(), key=lambda part: part[1]):
        say(f"   {start:7.2f} .. {end:6.2f}  {end - start:6.2f}  {name}")
    if made and not a.keep:
        shutil.rmtree(a.work_dir)
    write("startup", [row], a.output)


if __name__ == "__main__":
    main()
