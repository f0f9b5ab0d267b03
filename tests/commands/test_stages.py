import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from tests.fake_hub import FakeHub, llama_files
from trtllm_cli.build import builder
from trtllm_cli.build.builder import BuildOptions
from trtllm_cli.checkpoint import Checkpoint
from trtllm_cli.commands import console, stages
from trtllm_cli.commands.stages import ensure_engine, fingerprint, key, machine
from trtllm_cli.convert import pipeline
from trtllm_cli.convert.hub import DownloadOptions, download
from trtllm_cli.convert.pipeline import ConvertOptions
from trtllm_cli.engine import Engine
from trtllm_cli.errors import ArtifactError, CheckpointError, DownloadError, EngineError, UsageError
from trtllm_cli.snapshot import cache_dir


@dataclass
class Report:
    notes: list = field(default_factory=list)

    @property
    def plan(self):
        return self


@pytest.fixture
def fake(monkeypatch, tmp_path):
    monkeypatch.setenv("TRTLLM_CACHE", str(tmp_path / "cache"))
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    console.stderr.cache_clear()
    with FakeHub().running() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.commit = hub.add("org/model", llama_files())
        yield hub
    console.stderr.cache_clear()


@pytest.fixture
def ran(fake, monkeypatch):
    """Stages that only write a config.json and are noted; an artifact is damaged when it has a file `damaged`."""
    ran = []

    def write(output_dir, config):
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "damaged").unlink(missing_ok=True)
        (output_dir / "config.json").write_text(json.dumps(config))

    def convert(source, output_dir, options, progress):
        ran.append(("convert", Path(source), options))
        progress("a", 1, 2)
        write(output_dir, {"architecture": "x"})
        return Report(["a note"])

    def build(checkpoint_dir, output_dir, options, progress, working):
        ran.append(("build", Path(checkpoint_dir), options))
        working("compiling kernels", 1, 2)
        progress(1, 2)
        write(output_dir, {"pretrained_config": {}})
        return Report()

    def opener(kind, error):
        def open_(path):
            if (path / "damaged").exists():
                raise error("damaged")
            return kind(path)

        return open_

    @dataclass
    class Opened:
        path: Path

    monkeypatch.setattr(pipeline, "convert", convert)
    monkeypatch.setattr(builder, "build", build)
    monkeypatch.setattr(Checkpoint, "open", opener(Opened, CheckpointError))
    monkeypatch.setattr(Engine, "open", opener(Opened, EngineError))
    return ran


def kinds(ran):
    return [what for what, *_ in ran]


def test_a_model_of_the_hub_goes_through_every_stage_once(fake, ran, capsys):
    engine = ensure_engine("org/model")
    assert kinds(ran) == ["convert", "build"]
    assert engine.parent == cache_dir() / "engines" / "org--model"
    snapshot, checkpoint = ran[0][1], ran[1][1]
    assert snapshot == cache_dir() / "snapshots" / "org--model" / fake.commit
    assert checkpoint.parent == cache_dir() / "checkpoints" / "org--model"
    told = capsys.readouterr().err.splitlines()
    assert f"download: org/model at commit {fake.commit}, " in told[-4]
    assert [line.split(":")[0] for line in told[-3:]] == ["convert", "note", "build"]
    assert all(line.endswith(" s") for line in told[-4:] if not line.startswith("note"))


def test_a_second_call_does_nothing_and_needs_no_network(fake, ran, capsys, monkeypatch):
    engine = ensure_engine("org/model")
    capsys.readouterr()
    fake.log.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert ensure_engine("org/model") == engine
    assert ensure_engine("org/model", download=DownloadOptions(offline=True)) == engine
    assert len(ran) == 2
    assert fake.log == []
    assert capsys.readouterr() == ("", "")


def test_quiet(fake, ran, capsys):
    ensure_engine("org/model", quiet=True)
    assert capsys.readouterr() == ("", "")


def test_other_build_options_build_from_the_same_checkpoint(fake, ran):
    first = ensure_engine("org/model")
    second = ensure_engine("org/model", build=BuildOptions(weight_dtype="int8"))
    third = ensure_engine("org/model", build=BuildOptions(max_seq_len=128))
    assert len({first, second, third}) == 3
    assert kinds(ran) == ["convert", "build", "build", "build"]
    assert ran[2][2].weight_dtype == "int8"


def test_other_convert_options_make_another_checkpoint(fake, ran):
    ensure_engine("org/model")
    ensure_engine("org/model", convert=ConvertOptions(dtype="float32"))
    assert kinds(ran) == ["convert", "build"] * 2
    assert ran[0][1] == ran[2][1]
    assert ran[1][1] != ran[3][1]


def test_a_damaged_engine_is_built_again(fake, ran):
    engine = ensure_engine("org/model")
    (engine / "damaged").touch()
    assert ensure_engine("org/model") == engine
    assert kinds(ran) == ["convert", "build", "build"]
    assert ran[2][2].force


def test_the_model_stays_at_its_commit_until_it_is_downloaded_again(fake, ran):
    first = ensure_engine("org/model")
    new = fake.repos["org/model"].commit(llama_files(**{"vocab.txt": b"new"}))
    assert ensure_engine("org/model") == first
    download("org/model")
    assert ensure_engine("org/model") != first
    assert ran[2][1].name == new


def test_a_revision(fake, ran):
    fake.repos["org/model"].commit(llama_files(**{"vocab.txt": b"x"}), "v1")
    first = ensure_engine("org/model", download=DownloadOptions(revision="v1"))
    assert ensure_engine("org/model") != first
    pinned = ensure_engine("org/model", download=DownloadOptions(revision=fake.commit))
    assert pinned == ensure_engine("org/model")


def test_a_gguf_of_the_hub(fake, ran):
    fake.add("org/model-GGUF", {"m-Q4_K_M.gguf": b"GGUF" * 1000, "m-Q8_0.gguf": b"GGUF" * 1500})
    ensure_engine("org/model-GGUF", download=DownloadOptions(include=("*Q8_0.gguf",)))
    assert ran[0][1].name == "m-Q8_0.gguf"
    ensure_engine("org/model-GGUF", download=DownloadOptions(include=("*Q4_K_M.gguf",)))
    assert kinds(ran) == ["convert", "build"] * 2


def test_a_local_snapshot_is_converted_again_only_when_it_changes(fake, ran, tmp_path):
    source = tmp_path / "mine"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "llama"}')
    first = ensure_engine(str(source))
    assert first.parent.name == "mine"
    assert ran[0][1] == source
    assert ensure_engine(str(source)) == first
    assert len(ran) == 2
    os.utime(source / "config.json", (1, 1))
    assert ensure_engine(str(source)) != first
    assert kinds(ran) == ["convert", "build"] * 2
    assert fake.log == []


def test_a_local_gguf(fake, ran, tmp_path):
    (tmp_path / "m.Q4_1.gguf").write_bytes(b"GGUF")
    assert ensure_engine(str(tmp_path / "m.Q4_1.gguf")).parent.name == "m.Q4_1"


def test_a_checkpoint_is_only_built(fake, ran, tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "LlamaForCausalLM"}')
    ensure_engine(str(tmp_path))
    assert kinds(ran) == ["build"]
    assert ran[0][1] == tmp_path


def test_an_engine_is_itself(fake, ran, tmp_path):
    (tmp_path / "config.json").write_text('{"pretrained_config": {}}')
    assert ensure_engine(str(tmp_path)) == tmp_path
    assert ran == []


@pytest.mark.parametrize("name", ["./none", "/none", "a/b/c", "none.gguf", "~/none-at-all"])
def test_a_path_that_is_not_there(fake, ran, name):
    with pytest.raises(ArtifactError, match="no such file"):
        ensure_engine(name)


def test_a_name_that_is_nothing(fake, ran):
    with pytest.raises(UsageError, match="no repository id"):
        ensure_engine("org/na me")
    with pytest.raises(DownloadError, match="no model org/none"):
        ensure_engine("org/none")
    with pytest.raises(DownloadError, match="not on this machine"):
        ensure_engine("org/model", download=DownloadOptions(offline=True))


def test_keys_depend_on_everything_but_the_order(tmp_path):
    assert key({"a": 1, "b": [2]}) == key({"b": [2], "a": 1})
    assert key({"a": 1}) != key({"a": 2})
    (tmp_path / "x").write_text("1")
    before = fingerprint(tmp_path)
    (tmp_path / "x").write_text("22")
    assert fingerprint(tmp_path) != before
    assert machine() == machine()


def test_a_model_file_counts_with_its_content(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("1")
    before = stages._values(BuildOptions(model_file=file))
    file.write_text("22")
    assert stages._values(BuildOptions(model_file=file)) != before


def tiny_llama():
    """A Llama of one layer, as the hub would have it."""
    hidden, inner, vocab = 64, 128, 96
    shapes = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
        "model.layers.0.input_layernorm.weight": (hidden,),
        "model.layers.0.post_attention_layernorm.weight": (hidden,),
        "model.layers.0.self_attn.q_proj.weight": (hidden, hidden),
        "model.layers.0.self_attn.k_proj.weight": (32, hidden),
        "model.layers.0.self_attn.v_proj.weight": (32, hidden),
        "model.layers.0.self_attn.o_proj.weight": (hidden, hidden),
        "model.layers.0.mlp.gate_proj.weight": (inner, hidden),
        "model.layers.0.mlp.up_proj.weight": (inner, hidden),
        "model.layers.0.mlp.down_proj.weight": (hidden, inner),
    }
    rng = np.random.default_rng(0)
    tensors = {n: (rng.standard_normal(s) * 0.05).astype(np.float32) for n, s in shapes.items()}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": vocab, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "float32",
    }  # fmt: skip
    return {"config.json": json.dumps(config).encode(), "model.safetensors": safetensors.numpy.save(tensors)}


def test_the_real_stages(fake):
    fake.add("org/tiny", tiny_llama())
    options = BuildOptions(kernels="torch", max_seq_len=64)
    engine = Engine.open(ensure_engine("org/tiny", build=options))
    assert engine.config.pretrained_config.num_hidden_layers == 1
    assert engine.config.build_config.max_seq_len == 64
    fake.log.clear()
    assert ensure_engine("org/tiny", build=options) == engine.path
    assert fake.log == []
