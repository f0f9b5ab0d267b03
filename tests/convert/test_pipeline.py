"""convert as a whole: what is on disk afterwards, and after it was killed, refused, or short of memory and disk."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file

from tests.convert.helpers import join_ranks, read_checkpoint, stacked
from tests.tiny_models import save_tiny_model
from trtllm_cli import cli
from trtllm_cli.checkpoint import Checkpoint, read_sums
from trtllm_cli.convert import pipeline
from trtllm_cli.convert.pipeline import ConvertOptions, convert
from trtllm_cli.errors import OutputExistsError, ResourceError, SnapshotError, UnsupportedError, UsageError
from trtllm_cli.kernels.quantization import dequantize as kernels_dequantize
from trtllm_cli.mapping import Mapping
from trtllm_cli.models import trace_model
from trtllm_cli.tensor_file import TensorFileWriter, TensorInfo


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    path = tmp_path_factory.mktemp("snapshot")
    return path, save_tiny_model(path, "qwen3", dtype=torch.bfloat16)


def test_what_is_on_disk(snapshot, tmp_path):
    seen = []
    report = convert(
        snapshot[0],
        tmp_path / "ckpt",
        ConvertOptions(tp_size=2),
        lambda name, done, total: seen.append((name, done, total)),
    )
    files = {str(p.relative_to(tmp_path / "ckpt")) for p in (tmp_path / "ckpt").rglob("*") if p.is_file()}
    tokenizer = {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert files == {"config.json", "rank0.safetensors", "rank1.safetensors", "SHA256SUMS"} | {
        f"tokenizer/{name}" for name in tokenizer
    }
    sums = read_sums(tmp_path / "ckpt" / "SHA256SUMS")
    for name in ("rank0.safetensors", "rank1.safetensors"):
        assert sums[name] == hashlib.sha256((tmp_path / "ckpt" / name).read_bytes()).hexdigest()
    done = [d for _, d, _ in seen]
    assert done == sorted(done)
    assert seen[-1][1] == seen[-1][2] == sum(report.rank_bytes)
    assert json.loads(json.dumps(report.to_json()))["num_tensors"] == report.num_tensors
    assert os.listdir(tmp_path) == ["ckpt"]


def test_ranks_hold_what_the_graph_declares(snapshot, tmp_path):
    for options in (ConvertOptions(tp_size=2, pp_size=2), ConvertOptions(qformat="int4_wo", tp_size=2)):
        convert(snapshot[0], tmp_path / "ckpt", ConvertOptions(**{**vars(options), "force": True}))
        checkpoint = Checkpoint.open(tmp_path / "ckpt")
        for rank in checkpoint.config.mapping.ranks:
            with checkpoint.tensors(rank) as file:
                held = file.tensors
            declared = trace_model(checkpoint.config, rank).weights
            assert held == {name: TensorInfo(w.dtype, w.shape) for name, w in declared.items()}


def test_an_existing_output_is_left_alone(snapshot, tmp_path):
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "mine.txt").write_text("precious")
    for force in (False, True):
        with pytest.raises(OutputExistsError):
            convert(snapshot[0], tmp_path / "ckpt", ConvertOptions(force=force))
    assert (tmp_path / "ckpt" / "mine.txt").read_text() == "precious"


def test_force_replaces_a_checkpoint(snapshot, tmp_path):
    convert(snapshot[0], tmp_path / "ckpt")
    with pytest.raises(OutputExistsError):
        convert(snapshot[0], tmp_path / "ckpt")
    convert(snapshot[0], tmp_path / "ckpt", ConvertOptions(dtype="float32", force=True))
    assert Checkpoint.open(tmp_path / "ckpt").config.dtype == "float32"


def test_converting_twice_gives_the_same_bytes(snapshot, tmp_path):
    for name in ("a", "b"):
        convert(snapshot[0], tmp_path / name)
    for file in ("config.json", "rank0.safetensors", "SHA256SUMS"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_full_disk_is_seen_before_anything_is_written(snapshot, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(ResourceError, match="free"):
        convert(snapshot[0], tmp_path / "deep" / "er" / "ckpt")
    assert not list(tmp_path.iterdir())


def test_sources_that_are_none(snapshot, tmp_path):
    convert(snapshot[0], tmp_path / "ckpt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    for source in ("ckpt", "empty", "file.txt", "nothing"):
        with pytest.raises(SnapshotError) as e:
            convert(tmp_path / source, tmp_path / "out")
        assert source in str(e.value)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "int8"},
        {"qformat": "fp8"},
        {"qformat": "x"},
        {"kv_cache": "fp8"},
        {"group_size": 0},
        {"embedding_sharding_dim": 2},
    ],
)
def test_wrong_options(snapshot, tmp_path, options):
    with pytest.raises(UsageError):
        convert(snapshot[0], tmp_path / "ckpt", ConvertOptions(**options))


def test_remote_code_is_not_run(snapshot, tmp_path):
    source = tmp_path / "s"
    save_tiny_model(source, "llama", tokenizer=False)
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "evil.py").write_text("raise SystemExit('run')")
    report = convert(source, tmp_path / "ckpt")
    assert any("not run" in note for note in report.notes)
    assert any("no tokenizer" in note for note in report.notes)
    assert report.tokenizer_files == []
    assert Checkpoint.open(tmp_path / "ckpt").tokenizer_dir is None


# Weight-only quantization.


def dequantize(tensors, module):
    weight = tensors[f"{module}.weight"]
    if f"{module}.per_channel_scale" in tensors:
        return kernels_dequantize(weight, "int8", tensors[f"{module}.per_channel_scale"])
    scale, zero = tensors[f"{module}.weights_scaling_factor"], tensors.get(f"{module}.zero")
    return kernels_dequantize(weight, "int8" if zero is None else "int4", scale, zero, group_size=16)


@pytest.mark.parametrize(("qformat", "algo", "most"), [("int8_wo", "W8A16", 0.01), ("int4_wo", "W4A16", 0.1)])
def test_weight_only(snapshot, tmp_path, qformat, algo, most):
    report = convert(snapshot[0], tmp_path / "ckpt", ConvertOptions(qformat=qformat, group_size=16))
    checkpoint = Checkpoint.open(tmp_path / "ckpt")
    assert checkpoint.config.quantization.quant_algo == report.quant_algo == algo
    assert checkpoint.config.quantization.exclude_modules == ["lm_head"]
    (tensors,) = read_checkpoint(checkpoint)
    for name, value in stacked(snapshot[1].state_dict()).items():
        module = name.removesuffix(".weight")
        if "layernorm" in name or name in (
            "transformer.vocab_embedding.weight",
            "transformer.ln_f.weight",
            "lm_head.weight",
        ):
            assert torch.equal(tensors[name], value)
        else:
            error = (dequantize(tensors, module) - value.float()).norm() / value.float().norm()
            assert 0 < error < most, name


@pytest.mark.parametrize("qformat", ["int8_wo", "int4_wo"])
def test_quantized_shards_are_those_of_the_whole(snapshot, tmp_path, qformat):
    def read(tp, pp):
        out = tmp_path / f"{tp}-{pp}"
        convert(snapshot[0], out, ConvertOptions(qformat=qformat, group_size=8, tp_size=tp, pp_size=pp))
        checkpoint = Checkpoint.open(out)
        return join_ranks(checkpoint.config, read_checkpoint(checkpoint))

    whole, joined = read(1, 1), read(2, 2)
    assert set(whole) == set(joined)
    for name, value in whole.items():
        assert torch.equal(joined[name][: len(value)], value), name


@pytest.mark.parametrize(("asked", "tp", "got"), [(32, 1, 32), (128, 1, 32), (24, 1, 16), (32, 4, 8), (64, 2, 16)])
def test_group_sizes_that_do_not_divide(snapshot, tmp_path, asked, tp, got):
    """Layers have 64, 96 (mlp.proj) and 128 (dense) inputs."""
    report = convert(snapshot[0], tmp_path / "ckpt", ConvertOptions(qformat="int4_wo", group_size=asked, tp_size=tp))
    assert report.group_size == got
    assert Checkpoint.open(tmp_path / "ckpt").config.quantization.group_size == got
    assert bool(report.notes) == (asked != got)


def test_no_group_size_divides(snapshot, tmp_path):
    with pytest.raises(UnsupportedError, match="group size"):
        convert(snapshot[0], tmp_path / "ckpt", ConvertOptions(qformat="int4_wo", group_size=1))


# Memory, and being killed.

HIDDEN, INNER, LAYERS, VOCAB = 1024, 4096, 3, 40960
LARGEST = VOCAB * HIDDEN * 2  # bytes


def big_snapshot(path):
    """A Llama of zeros in a sparse file: an embedding and a head of 80 MiB, and 3 layers of 32 MiB."""
    path.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": VOCAB,
        "torch_dtype": "bfloat16", "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    shapes = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for i in range(LAYERS):
        prefix = f"model.layers.{i}."
        shapes |= {f"{prefix}{n}.weight": (HIDDEN,) for n in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{prefix}self_attn.{c}_proj.weight": (HIDDEN, HIDDEN) for c in "qkvo"}
        shapes |= {f"{prefix}mlp.{n}_proj.weight": (INNER, HIDDEN) for n in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (HIDDEN, INNER)
    tensors = {name: TensorInfo("bfloat16", shape) for name, shape in shapes.items()}
    writer = TensorFileWriter(path / "model.safetensors", tensors, {})
    writer._file.close()  # the file has its length, and no block on disk
    return sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize("options", ["tp_size=2, dtype='float32'", "qformat='int8_wo', workers=2"])
def test_memory_does_not_grow_with_the_tensors(tmp_path, options):
    """Under a limit on address space that the largest tensor alone would not fit in."""
    big_snapshot(tmp_path / "snapshot")
    allowed = 48 << 20
    assert allowed < LARGEST * 2 / 3
    script = f"""
        import resource, threading, torch
        torch.set_num_threads(1)
        threading.stack_size(1 << 20)  # else 8 MiB of the limit for each worker
        from pathlib import Path
        import trtllm_cli.convert.hf_reader, trtllm_cli.models.llama, trtllm_cli.convert.quantize.row_formats
        from trtllm_cli.convert.pipeline import ConvertOptions, convert
        torch.ones(1000).sum(); torch.empty(0).numpy()
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + {allowed}
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        report = convert(Path("snapshot"), Path("ckpt"), ConvertOptions({options}))
        print(report.peak_memory_bytes - before)
    """
    env = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < allowed
    Checkpoint.open(tmp_path / "ckpt")


def test_killed_and_run_again(tmp_path):
    big_snapshot(tmp_path / "snapshot")
    command = [sys.executable, "-m", "trtllm_cli", "convert", "snapshot", "--output-dir", "ckpt"]
    victim = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    partial = tmp_path / ".ckpt.partial" / "rank0.safetensors"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and victim.poll() is None:
        if partial.exists() and partial.stat().st_blocks * 512 > 20 << 20:
            break
        time.sleep(0.002)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert victim.returncode == -signal.SIGKILL
    assert not (tmp_path / "ckpt").exists()
    assert partial.exists()
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt", "snapshot"]
    Checkpoint.open(tmp_path / "ckpt")


# The command.


def test_command(snapshot, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.call(["convert", str(snapshot[0]), "--output_dir", "ckpt", "--dtype", "float16"]) == 0
    out = capsys.readouterr().out
    assert "Qwen3ForCausalLM" in out
    assert "trtllm build --checkpoint-dir ckpt" in out
    assert cli.call(["convert", "--model_dir", str(snapshot[0]), "--output_dir", "b", "--tp_size", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tp_size"] == 2
    assert (
        cli.call(["convert", str(snapshot[0]), "-o", "c", "--use_weight_only", "--weight_only_precision", "int4"]) == 0
    )
    assert Checkpoint.open(tmp_path / "c").config.quantization.quant_algo == "W4A16"


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        ([], 2, "nothing to convert"),
        (["a", "--model-dir", "b"], 2, "both given"),
        (["org/model"], 3, "trtllm download org/model"),
        (["x", "--dtype", "int3"], 2, "--dtype"),
        (["x", "--weight-only-precision", "int4"], 2, "--use-weight-only"),
        (["x", "--use-weight-only", "--qformat", "int8_wo"], 2, "both given"),
        (["x", "--use-weight-only", "--weight-only-precision", "int2"], 2, "int8 or int4"),
    ],
)
def test_command_errors(args, code, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.call(["convert", *args]) == code
    assert says in capsys.readouterr().err


def test_the_command_module_is_cheap():
    script = "import sys, trtllm_cli.commands.convert; print({'torch', 'numpy', 'pydantic', 'rich'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "torch" not in run.stdout
    assert "numpy" not in run.stdout


def test_mapping_is_written(snapshot, tmp_path):
    convert(snapshot[0], tmp_path / "ckpt", ConvertOptions(tp_size=2, pp_size=3))
    checkpoint = Checkpoint.open(tmp_path / "ckpt")
    assert checkpoint.config.mapping == Mapping.of(2, 3)
    names = [set(load_file(checkpoint.rank_file(r))) for r in checkpoint.config.mapping.ranks]
    assert "transformer.vocab_embedding.weight" in names[0] & names[1]
    assert "lm_head.weight" in names[4] & names[5]
    assert not any(n.startswith(("lm_head", "transformer.vocab", "transformer.ln_f")) for n in names[2] | names[3])
