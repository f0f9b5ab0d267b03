"""A tiny model as a snapshot, checkpoint and engine, made once; and the command line, in this process."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.tiny_models import save_tiny_tokenizer
from trtllm_cli import cli
from trtllm_cli.commands import console
from trtllm_cli.tensor_file import TensorFileWriter, TensorInfo

LIMITS = ("--max-seq-len", "64", "--max-input-len", "32", "--max-batch-size", "4", "--tokens-per-block", "8")


@dataclass(frozen=True)
class Said:
    """What a command line did."""

    code: int
    out: str
    err: str


@pytest.fixture
def trtllm(capsys):
    """Runs a command line here; anything but one clear message for an error fails the test."""

    def run(*args):
        console.stdout.cache_clear()  # they keep the streams of the test that made them
        console.stderr.cache_clear()
        capsys.readouterr()
        code = cli.call([str(a) for a in args])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        assert "internal error" not in err, err
        assert err.count("error: ") == (code != 0), err
        return Said(code, out, err)

    yield run
    console.stdout.cache_clear()
    console.stderr.cache_clear()


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 259, "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 256, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip


def save_snapshot(path: Path) -> None:
    """A Llama of random weights, as transformers saves one, and without the seconds that importing that takes."""
    shapes = {"model.embed_tokens": (259, 64), "lm_head": (259, 64), "model.norm": (64,)}
    for layer in ("model.layers.0.", "model.layers.1."):
        shapes |= {layer + n: (64,) for n in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}self_attn.{n}_proj": (32 if n in "kv" else 64, 64) for n in "qkvo"}
        shapes |= {f"{layer}mlp.{n}_proj": (64, 96) if n == "down" else (96, 64) for n in ("gate", "up", "down")}
    save_tiny_tokenizer(path)
    (path / "config.json").write_text(json.dumps(CONFIG))
    tensors = {f"{name}.weight": TensorInfo("float32", shape) for name, shape in shapes.items()}
    random = np.random.default_rng(0)
    with TensorFileWriter(path / "model.safetensors", tensors, {}) as out:
        for name, info in tensors.items():
            out.write(name, random.normal(0, 0.1, info.shape).astype(np.float32).tobytes())


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A directory with `snapshot`, `checkpoint`, `engine` and `two-ranks`. Copy them, never change them."""
    root = tmp_path_factory.mktemp("tiny")
    save_snapshot(root / "snapshot")
    for args in (
        ("convert", "snapshot", "--output-dir", "checkpoint"),
        ("convert", "snapshot", "--output-dir", "halves", "--tp-size", "2"),
        ("build", "--checkpoint-dir", "checkpoint", "--output-dir", "engine", "--kernels", "native", *LIMITS),
        ("build", "--checkpoint-dir", "halves", "--output-dir", "two-ranks", "--kernels", "torch", *LIMITS),
    ):
        assert cli.call([str(root / a) if a in NAMES else a for a in args]) == 0
    return root


NAMES = ("snapshot", "checkpoint", "halves", "engine", "two-ranks")


@pytest.fixture
def copy(tiny, tmp_path):
    """Copies one of them into the test's own directory."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(tiny / name, tmp_path / name))

    return make


def flip(file: Path, position: int = -100) -> None:
    """Changes one byte and not the size."""
    data = bytearray(file.read_bytes())
    data[position] ^= 0x40
    file.write_bytes(data)


def truncate(file: Path, by: int = 100) -> None:
    """Takes bytes off the end."""
    file.write_bytes(file.read_bytes()[:-by])


def edit(file: Path, **fields: object) -> None:
    """Sets fields of a JSON file; `a__b` is b in a, and ... takes the field out."""
    data = json.loads(file.read_text())
    for name, value in fields.items():
        *outer, last = name.split("__")
        place = data
        for key in outer:
            place = place[key]
        if value is ...:
            del place[last]
        else:
            place[last] = value
    file.write_text(json.dumps(data))
