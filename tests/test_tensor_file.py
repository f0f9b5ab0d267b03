"""safetensors files: what we write the official package reads, and the other way; damage is said, never followed."""

import json
import os
import struct

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from trtllm_cli.errors import ArtifactError, CheckpointError, EngineError
from trtllm_cli.tensor_file import TensorFile, TensorFileWriter, TensorInfo, is_padding


def write_raw(path, header, data=b""):
    blob = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(blob)) + blob + data)


def test_the_official_reader_reads_what_we_write(tmp_path):
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([1, 2, 3], dtype=np.int8)
    infos = {"a": TensorInfo("float32", (2, 3)), "b": TensorInfo("int8", (3,)), "empty": TensorInfo("float16", (0, 4))}
    with TensorFileWriter(tmp_path / "f.safetensors", infos, {"k": "v"}) as out:
        out.write("b", b.tobytes())  # any order
        out.write("a", a.tobytes())
        out.write("empty", b"")
    loaded = safetensors.numpy.load_file(tmp_path / "f.safetensors")
    assert loaded.keys() == {"a", "b", "empty"}
    np.testing.assert_array_equal(loaded["a"], a)
    np.testing.assert_array_equal(loaded["b"], b)


def test_we_read_what_the_official_writer_writes(tmp_path):
    tensors = {"x": torch.randn(3, 5).bfloat16(), "y": torch.arange(7), "s": torch.tensor(2.5)}
    safetensors.torch.save_file(tensors, tmp_path / "f.safetensors", {"note": "hi"})
    with TensorFile(tmp_path / "f.safetensors") as f:
        assert f.metadata == {"note": "hi"}
        assert f.tensors == {
            "x": TensorInfo("bfloat16", (3, 5)), "y": TensorInfo("int64", (7,)), "s": TensorInfo("float32", ()),
        }  # fmt: skip
        assert bytes(f.read("x")) == bytes(f.view("x"))
        assert torch.equal(torch.frombuffer(f.read("x"), dtype=torch.bfloat16).view(3, 5), tensors["x"])


def test_aligned_tensors_start_at_cache_lines_and_padding_is_declared(tmp_path):
    infos = {f"t{i}": TensorInfo("uint8", (i + 1,)) for i in range(5)}
    with TensorFileWriter(tmp_path / "f", infos, {}, alignment=64) as out:
        for name, info in infos.items():
            out.write(name, bytes(info.shape[0]))
    with TensorFile(tmp_path / "f") as f:
        base = np.frombuffer(f.view("t0"), np.uint8).ctypes.data
        for name in infos:
            assert np.frombuffer(f.view(name), np.uint8).ctypes.data % 64 == 0, name
        assert base % 64 == 0
        assert {n for n in f.tensors if not is_padding(n)} == infos.keys()
    assert safetensors.numpy.load_file(tmp_path / "f").keys() > infos.keys()  # no holes: the official reader agrees


def test_golden_bytes(tmp_path):
    with TensorFileWriter(tmp_path / "f", {"w": TensorInfo("int8", (2,))}, {}) as out:
        out.write("w", b"\x01\x02")
    header = b'{"w":{"dtype":"I8","shape":[2],"data_offsets":[0,2]}}'
    header += b" " * (-(8 + len(header)) % 8)
    assert (tmp_path / "f").read_bytes() == struct.pack("<Q", len(header)) + header + b"\x01\x02"


def test_a_tensor_never_written_is_our_bug(tmp_path):
    out = TensorFileWriter(tmp_path / "f", {"w": TensorInfo("int8", (2,))}, {})
    with pytest.raises(AssertionError, match="never written"):
        out.close()


W = {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"w": W}, b"123", r"tensor `w` ends at byte 4 of 3 \(truncated\?\)"),
        ({"w": W | {"dtype": "F8_XYZ"}}, b"1234", "entry of tensor `w` is malformed"),
        ({"w": W | {"shape": [5]}}, b"1234", r"tensor `w` is \[5\] int8, but takes 4 bytes"),
        ({"w": W | {"shape": [-4]}}, b"1234", "negative or non-integer"),
        ({"w": W | {"shape": [True, 4]}}, b"1234", "negative or non-integer"),
        ({"w": W | {"shape": [2**40, 2**40]}}, b"1234", "but takes 4 bytes"),
        ({"w": W | {"data_offsets": [4, 0]}}, b"1234", "but takes -4 bytes"),
        ({"w": W | {"data_offsets": [0]}}, b"1234", "malformed"),
        ({"w": W, "v": W}, b"1234", "tensors `w` and `v` overlap"),
        ({"w": 3}, b"1234", "malformed"),
        ({"__metadata__": {"a": 1}}, b"", "metadata is not a map of strings"),
        (b"[1]", b"", "not a JSON object"),
        (b"{nonsense", b"", "not valid JSON"),
        (b'{"w": ' + b"[" * 100_000, b"", "not valid JSON"),
        (b"\xff\xfe\x00\x00", b"", "not valid JSON"),
    ],
)
def test_hostile_headers(tmp_path, header, data, message):
    path = tmp_path / "model.safetensors"
    write_raw(path, header, data)
    with pytest.raises(CheckpointError, match=message) as e:
        TensorFile(path, CheckpointError)
    assert str(path) in str(e.value)


@pytest.mark.parametrize("content", [b"", b"1234", struct.pack("<Q", 2**62), struct.pack("<Q", 100) + b"{}"])
def test_too_short_files(tmp_path, content):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(ArtifactError, match="is damaged"):
        TensorFile(tmp_path / "f")


def test_a_file_that_is_cut_short_while_it_is_open(tmp_path):
    infos = {"a": TensorInfo("uint8", (3,)), "b": TensorInfo("uint8", (5,))}
    with TensorFileWriter(tmp_path / "f", infos, {}) as out:
        out.write("a", b"abc")
        out.write("b", b"defgh")
    with TensorFile(tmp_path / "f", EngineError) as f:
        data = bytearray(f.data_bytes - 1)
        f.read_data(1, memoryview(data))
        assert data == b"bcdefgh"
        os.truncate(tmp_path / "f", (tmp_path / "f").stat().st_size - 2)
        with pytest.raises(EngineError, match="f is damaged: it is cut short"):
            f.read_data(1, memoryview(data))
        with pytest.raises(EngineError, match="f is damaged: tensor `b` is cut short"):
            f.read("b")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ArtifactError, match="nothing.safetensors is missing"):
        TensorFile(tmp_path / "nothing.safetensors")


def test_what_is_finished_of_a_file_grows_within_a_tensor(tmp_path):
    infos = {"a": TensorInfo("uint8", (4,)), "b": TensorInfo("uint8", (6,))}
    with TensorFileWriter(tmp_path / "f", infos, {}) as out:
        start = out.size - 10
        assert out.finished_bytes() == start
        out.write_at("a", 2, b"34")  # not from its beginning on
        assert out.finished_bytes() == start
        out.write_at("a", 0, b"1")
        assert out.finished_bytes() == start + 1
        out.write_at("b", 0, b"56")
        assert out.finished_bytes() == start + 1
        out.write_at("a", 1, b"2")
        assert out.finished_bytes() == start + 6
        out.begin_flush(0, start + 6)
        out.leave_zeros("b", 2, 4)
        assert out.finished_bytes() == out.size
    assert (tmp_path / "f").read_bytes()[start:] == b"123456" + bytes(4)
