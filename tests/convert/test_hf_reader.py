"""Snapshots in every form that weights come in, and damaged or hostile ones."""

import contextlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.convert.helpers import read_checkpoint, stacked
from tests.tiny_models import save_tiny_model
from trtllm_cli.checkpoint import Checkpoint
from trtllm_cli.convert.hf_reader import HfReader
from trtllm_cli.convert.pipeline import ConvertOptions, convert
from trtllm_cli.errors import SnapshotError, UnsupportedError


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("original")
    return path, save_tiny_model(path, "llama", tokenizer=False)


@pytest.fixture
def snapshot(original, tmp_path):
    path, _ = original
    return Path(shutil.copytree(path, tmp_path / "snapshot"))


def weights(snapshot):
    return load_file(snapshot / "model.safetensors")


def replace_weights(snapshot, tensors):
    save_file({k: v.contiguous() for k, v in tensors.items()}, snapshot / "model.safetensors")


def check_converts(snapshot, model, tmp_path):
    convert(snapshot, tmp_path / "ckpt")
    (tensors,) = read_checkpoint(Checkpoint.open(tmp_path / "ckpt"))
    expected = stacked(model.state_dict())
    assert set(tensors) == set(expected)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_sharded(tmp_path):
    model = save_tiny_model(tmp_path / "snapshot", "qwen2", shard_size="100KB")
    assert len(list((tmp_path / "snapshot").glob("*.safetensors"))) > 2
    check_converts(tmp_path / "snapshot", model, tmp_path)


@pytest.mark.parametrize("legacy", [False, True])
def test_bin(original, snapshot, tmp_path, legacy):
    torch.save(weights(snapshot), snapshot / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    (snapshot / "model.safetensors").unlink()
    check_converts(snapshot, original[1], tmp_path)


def test_bin_sharded(original, snapshot, tmp_path):
    tensors = weights(snapshot)
    names = sorted(tensors)
    files = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, held in files.items():
        torch.save({name: tensors[name] for name in held}, snapshot / file)
    weight_map = {name: file for file, held in files.items() for name in held}
    (snapshot / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (snapshot / "model.safetensors").unlink()
    check_converts(snapshot, original[1], tmp_path)


def test_symbolic_links_as_in_the_hubs_cache(original, snapshot, tmp_path):
    (tmp_path / "blobs").mkdir()
    for file in list(snapshot.iterdir()):
        file.rename(tmp_path / "blobs" / file.name)
        file.symlink_to(tmp_path / "blobs" / file.name)
    check_converts(snapshot, original[1], tmp_path)


class Boom:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_with_code_is_refused_and_not_run(snapshot, tmp_path):
    marker = tmp_path / "marker"
    (snapshot / "model.safetensors").unlink()
    for blob in (pickle.dumps(Boom(marker)), None):
        if blob is None:
            torch.save({"model.norm.weight": Boom(marker)}, snapshot / "pytorch_model.bin")
        else:
            (snapshot / "pytorch_model.bin").write_bytes(blob)
        with pytest.raises(SnapshotError, match=r"pytorch_model\.bin"):
            convert(snapshot, tmp_path / "ckpt")
    assert not marker.exists()


@pytest.mark.parametrize("blob", [b"", b"PK\x03\x04", b"PK\x03\x04" + b"\0" * 200, b"hello"])
def test_damaged_bin(snapshot, blob):
    (snapshot / "model.safetensors").unlink()
    (snapshot / "pytorch_model.bin").write_bytes(blob)
    with pytest.raises(SnapshotError, match=r"pytorch_model\.bin"):
        HfReader(snapshot)


def test_a_bin_that_is_no_table(snapshot):
    (snapshot / "model.safetensors").unlink()
    torch.save([torch.zeros(1)], snapshot / "pytorch_model.bin")
    with pytest.raises(SnapshotError, match="table"):
        HfReader(snapshot)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_truncated_safetensors(snapshot, tmp_path, keep):
    file = snapshot / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(SnapshotError, match=r"model\.safetensors"):
        convert(snapshot, tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("../model.safetensors", "plain name"),
        ("/etc/passwd", "plain name"),
        ("sub/model.safetensors", "plain name"),
        ("", "plain name"),
        (7, "plain name"),
        ("config.json", "plain name"),
        ("model-00009.safetensors", "missing"),
    ],
)
def test_hostile_index(snapshot, file, says):
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": file}}))
    with pytest.raises(SnapshotError, match=says):
        HfReader(snapshot)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}])
def test_empty_index(snapshot, index):
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SnapshotError, match="weight_map"):
        HfReader(snapshot)


def test_index_and_files_disagree(snapshot):
    weight_map = dict.fromkeys(weights(snapshot), "model.safetensors")
    index = snapshot / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map | {"more": "model.safetensors"}}))
    with pytest.raises(SnapshotError, match="`more` is not in"):
        HfReader(snapshot)
    del weight_map["lm_head.weight"]
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(SnapshotError, match=r"holds `lm_head\.weight`"):
        HfReader(snapshot)


def test_no_weights(snapshot):
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(SnapshotError, match="no weights"):
        HfReader(snapshot)


def edit(snapshot, change):
    tensors = weights(snapshot)
    change(tensors)
    replace_weights(snapshot, tensors)


def without(name):
    return lambda tensors: tensors.pop(name)


def having(name, value):
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (without("model.norm.weight"), SnapshotError, r"`model\.norm\.weight` is missing"),
        (without("model.layers.1.mlp.up_proj.weight"), SnapshotError, r"`model\.layers\.1\.mlp\.up_proj\.weight`"),
        (having("model.extra.weight", torch.zeros(1)), SnapshotError, r"no place for `model\.extra\.weight`"),
        (having("model.norm.weight", torch.zeros(65)), SnapshotError, r"is \[65\], .* \[64\]"),
        (having("model.norm.weight", torch.zeros(64, dtype=torch.int8)), UnsupportedError, "int8"),
        (
            having("model.norm.weight", torch.full((64,), torch.nan)),
            SnapshotError,
            r"`model\.norm\.weight` holds a NaN",
        ),
        (having("model.norm.weight", torch.full((64,), torch.inf)), SnapshotError, "a NaN or an infinity"),
    ],
)
def test_wrong_tensors_are_named(snapshot, tmp_path, change, error, says):
    edit(snapshot, change)
    with pytest.raises(error, match=says):
        convert(snapshot, tmp_path / "ckpt")
    assert [p.name for p in tmp_path.iterdir()] == ["snapshot"]


def test_harmless_leftovers(original, snapshot, tmp_path):
    edit(snapshot, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    check_converts(snapshot, original[1], tmp_path)


def test_a_cast_that_overflows_is_named(snapshot, tmp_path):
    edit(snapshot, lambda t: t["model.layers.2.mlp.down_proj.weight"][0, 0].fill_(70000.0))
    with pytest.raises(UnsupportedError, match=r"`model\.layers\.2\.mlp\.down_proj\.weight` has 70000, .* float16"):
        convert(snapshot, tmp_path / "a", ConvertOptions(dtype="float16"))
    convert(snapshot, tmp_path / "b", ConvertOptions(dtype="bfloat16"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtypes(original, tmp_path, dtype):
    path, model = original
    report = convert(path, tmp_path / "ckpt", ConvertOptions(dtype=dtype))
    (tensors,) = read_checkpoint(Checkpoint.open(tmp_path / "ckpt"))
    expected = stacked(model.state_dict())
    assert report.dtype == dtype
    for name, value in expected.items():
        assert torch.equal(tensors[name], value.to(getattr(torch, dtype)))


def default_dtype(path):
    with contextlib.closing(HfReader(path)) as reader:
        return reader.default_dtype()


def test_auto_dtype(tmp_path):
    save_tiny_model(tmp_path / "a", "llama", dtype=torch.bfloat16, tokenizer=False)
    assert default_dtype(tmp_path / "a") == "bfloat16"
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        config.pop(key, None)
    for changes, expected in [({}, "bfloat16"), ({"torch_dtype": "torch.float16"}, "float16")]:
        (tmp_path / "a" / "config.json").write_text(json.dumps(config | changes))
        assert default_dtype(tmp_path / "a") == expected
    (tmp_path / "a" / "config.json").write_text(json.dumps(config | {"dtype": "float8"}))
    with pytest.raises(UnsupportedError, match="float8"):
        default_dtype(tmp_path / "a")


def test_a_stored_head_that_is_tied(tmp_path):
    save_tiny_model(tmp_path / "a", "llama", tie_word_embeddings=True, tokenizer=False)
    edit(tmp_path / "a", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    convert(tmp_path / "a", tmp_path / "ckpt")
    edit(tmp_path / "a", lambda t: t["lm_head.weight"][0, 0].add_(1))
    with pytest.raises(UnsupportedError, match="tie_word_embeddings"):
        convert(tmp_path / "a", tmp_path / "ckpt2")
