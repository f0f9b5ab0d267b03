"""What convert takes of a large model: memory for 70 billion parameters, and time beside copying the same bytes.

    python benchmarks/convert_scale.py

Memory: a Llama of 70B's shape whose files are holes (nothing but a header on the disk; they read as zeros) is converted
for 8 ranks. Of the output, too, zeros are left as holes, since the disk need not hold 140 GB; all else is as ever. The
figure is the process's peak of resident memory, and how much of it was there once torch was imported.

Time: random weights, converted with the same dtype, beside `cp` of the same files, each with its bytes brought to the
disk at the end. The two take turns; the median of each is compared. Files are in the page cache where it holds them.
`cp` alone, which leaves its bytes in memory, is there too. CPU seconds are user and system time of all threads.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import sys
import time
from pathlib import Path

import common

LLAMA_70B = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
SPEED = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 32000,
}  # fmt: skip
TINY = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 256,
}  # fmt: skip
LAYERS_A_FILE = 8
SPEED_RUNS = [
    ("bfloat16, 1 worker", []),
    ("bfloat16, 2 workers", ["--workers", 2]),
    ("bfloat16, tp_size 8, 1 worker", ["--tp-size", 8]),
    ("int8_wo, 1 worker", ["--qformat", "int8_wo"]),
    ("int8_wo, 2 workers", ["--qformat", "int8_wo", "--workers", 2]),
]


def shapes(config, layers):
    """Tensors of these layers; of layer -1, what is outside of the layers."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    out = {}
    for i in layers:
        if i < 0:
            table = (config["vocab_size"], hidden)
            out |= {"model.embed_tokens.weight": table, "model.norm.weight": (hidden,), "lm_head.weight": table}
            continue
        layer = {
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,), "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
        }  # fmt: skip
        out |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return out


def write_snapshot(path, config, block=None):
    """A sharded snapshot; without `block`, bytes that tensors are filled with in turn, its files are holes."""
    from trtllm_cli.tensor_file import TensorFileWriter, TensorInfo

    path.mkdir(parents=True)
    fixed = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "rms_norm_eps": 1e-5}
    (path / "config.json").write_text(json.dumps({**fixed, **config}))
    layers, weight_map = list(range(-1, config["num_hidden_layers"])), {}
    for first in range(0, len(layers), LAYERS_A_FILE):
        name = f"model-{first // LAYERS_A_FILE:05}.safetensors"
        tensors = {
            n: TensorInfo("bfloat16", s) for n, s in shapes(config, layers[first : first + LAYERS_A_FILE]).items()
        }
        weight_map |= dict.fromkeys(tensors, name)
        with TensorFileWriter(path / name, tensors, {}) as out:
            for tensor, info in tensors.items():
                if block is None:
                    out.leave_zeros(tensor, 0, info.nbytes)
                    continue
                for offset in range(0, info.nbytes, len(block)):
                    out.write_at(tensor, offset, block[: info.nbytes - offset])
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def convert_holes(snapshot, out, workers, tp_size):
    """In a process of its own: converts, leaving zeros as holes; prints what it took as JSON."""
    import torch

    from trtllm_cli.convert import pipeline, write_ranks
    from trtllm_cli.tensor_file import TensorFileWriter

    class HoleWriter(TensorFileWriter):
        def write_at(self, name, offset, data):
            if not torch.frombuffer(data, dtype=torch.uint8).any():
                self.leave_zeros(name, offset, len(data))
            else:
                super().write_at(name, offset, data)

    write_ranks.TensorFileWriter = HoleWriter
    pipeline.shutil.disk_usage = lambda _: shutil._ntuple_diskusage(1 << 60, 0, 1 << 60)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    options = pipeline.ConvertOptions(tp_size=tp_size, workers=workers, resume=False)
    report = pipeline.convert(Path(snapshot), Path(out), options)
    made = {"seconds": report.seconds, "peak_bytes": report.peak_memory_bytes, "before_bytes": before}
    print(json.dumps({**made, "bytes": sum(report.rank_bytes), "parameters": report.num_parameters}))


def measure_memory(work, layers):
    config = {**LLAMA_70B, "num_hidden_layers": layers}
    snapshot, out, rows = work / "holes", work / "holes-out", []
    write_snapshot(snapshot, config)
    largest = max(2 * rows * columns for rows, columns in (s for s in shapes(config, [-1, 0]).values() if len(s) == 2))
    for workers in (1, 2):
        command = [sys.executable, __file__, "--convert-holes", snapshot, out, workers, 8]
        row = {"workers": workers, "largest_tensor_bytes": largest, **json.loads(common.run(command))}
        common.say(f"{workers} workers: peak {row['peak_bytes'] / 2**20:.0f} MiB, {row['seconds']:.0f} s")
        rows.append(row)
        shutil.rmtree(out)
    shutil.rmtree(snapshot)
    return rows


def measure_speed(work, gigabytes, rounds):
    import torch

    per_layer = 2 * sum(a * b for a, b in (s for s in shapes(SPEED, [0]).values() if len(s) == 2))
    config = {**SPEED, "num_hidden_layers": max(1, round(gigabytes * 1e9 / per_layer))}
    snapshot, out = work / "random", work / "random-out"
    block = (torch.randn(32 << 20) * 0.02).bfloat16().view(torch.uint8).numpy().data
    write_snapshot(snapshot, config, block)
    tiny = work / "tiny"
    write_snapshot(tiny, TINY, block)
    size = sum(f.stat().st_size for f in snapshot.iterdir())
    copies = {"cp and sync": f"cp -r '{snapshot}' '{out}' && sync '{out}'/*", "cp": f"cp -r '{snapshot}' '{out}'"}
    runs = [*((name, snapshot, None) for name in copies), *((name, snapshot, flags) for name, flags in SPEED_RUNS)]
    runs.append(("a model of 1 MB: starting Python and torch", tiny, []))
    seconds, cpu = {name: [] for name, _, _ in runs}, {name: [] for name, _, _ in runs}
    for turn in range(rounds):
        for name, source, flags in runs:
            if flags is None:
                command = ["sh", "-c", copies[name]]
            else:
                command = [*common.TRTLLM, "convert", source, "--output-dir", out, *flags]
            start, start_cpu = time.perf_counter(), children_cpu()
            common.run(command)
            seconds[name].append(time.perf_counter() - start)
            cpu[name].append(children_cpu() - start_cpu)
            common.say(f"turn {turn + 1}: {seconds[name][-1]:7.2f} s, {cpu[name][-1]:6.2f} s of CPU  {name}")
            shutil.rmtree(out)
    shutil.rmtree(snapshot)
    shutil.rmtree(tiny)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return size, [
        {
            "name": n, "median_s": s, "cpu_s": statistics.median(cpu[n]), "ratio": s / median["cp and sync"],
            "ratio_cp": s / median["cp"], "seconds": seconds[n],
        }
        for n, s in median.items()
    ]  # fmt: skip


def children_cpu():
    """User and system seconds of all processes that have been run."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def markdown(data):
    text = f"# Converting large models\n\n{common.machine_line(data['machine'])}. "
    text += f"Load average before: {data['load']:.2f}.\n"
    if data["memory"]:
        first = data["memory"][0]
        text += (
            f"\nMemory: Llama, {first['parameters'] / 1e9:.1f} billion parameters, {first['bytes'] / 1e9:.0f} GB in"
            f" bfloat16, to 8 ranks. Its largest tensor takes {first['largest_tensor_bytes'] / 2**20:.0f} MiB.\n\n"
        )
        rows = [
            [
                r["workers"], f"{r['peak_bytes'] / 2**20:.0f}", f"{r['before_bytes'] / 2**20:.0f}",
                f"{(r['peak_bytes'] - r['before_bytes']) / 2**20:.0f}", f"{r['seconds']:.0f}",
            ]
            for r in data["memory"]
        ]  # fmt: skip
        headings = ["workers", "peak MiB", "of it Python and torch", "of it convert", "seconds (holes)"]
        text += common.table(headings, rows)
    if data["speed"]:
        text += f"\nTime: {data['speed_bytes'] / 1e9:.1f} GB of random bfloat16 weights, medians.\n\n"
        rows = [
            [
                r["name"],
                f"{r['median_s']:.2f}",
                f"{min(r['seconds']):.2f}",
                f"{max(r['seconds']):.2f}",
                f"{r['cpu_s']:.2f}",
                f"{r['ratio']:.2f}",
                f"{r['ratio_cp']:.2f}",
            ]
            for r in data["speed"]
        ]
        text += common.table(["", "median s", "least", "most", "CPU s", "times cp and sync", "times cp"], rows)
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=80, help="of the model of holes; 0 leaves memory out")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of random weights; 0 leaves time out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--work-dir", type=Path, default=common.WORK, help="for the models; takes three times --gigabytes"
    )
    parser.add_argument("--name", default="convert_scale", help="of the result files")
    parser.add_argument("--convert-holes", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.convert_holes:
        snapshot, out, workers, tp_size = args.convert_holes
        convert_holes(snapshot, out, int(workers), int(tp_size))
        return
    load, work = os.getloadavg()[0], args.work_dir / "convert_scale"
    shutil.rmtree(work, ignore_errors=True)
    data = {"machine": common.machine(), "load": load, "memory": [], "speed": [], "speed_bytes": 0}
    if args.layers:
        data["memory"] = measure_memory(work, args.layers)
    if args.gigabytes:
        data["speed_bytes"], data["speed"] = measure_speed(work, args.gigabytes, args.rounds)
    common.write_results(args.name, data, markdown(data))


if __name__ == "__main__":
    main()
