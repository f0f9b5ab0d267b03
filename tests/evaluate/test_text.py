"""Texts from every source, cut into windows; what cannot be read is said so."""

import json
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, processors

from tests.tiny_models import SPECIAL, VOCAB_SIZE, save_tiny_tokenizer
from trtllm_cli.errors import EngineError, ResourceError, UsageError
from trtllm_cli.evaluate import text_files
from trtllm_cli.evaluate.text import (
    CALIBRATION,
    HELDOUT,
    Window,
    heldout_windows,
    load_texts,
    load_tokenizer,
    windows,
)

BOS = 256


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    save_tiny_tokenizer(path)
    return load_tokenizer(path, VOCAB_SIZE)


@pytest.fixture
def with_bos(tokenizer):
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[0]} $A {SPECIAL[2]}", special_tokens=[(SPECIAL[0], BOS), (SPECIAL[2], 258)]
    )
    return copy


def test_the_shipped_sets_share_nothing():
    calibration, heldout = load_texts(CALIBRATION), load_texts(HELDOUT)
    assert len(calibration) == 22
    assert len(heldout) == 19
    assert sum(map(len, calibration)) > 600_000
    assert sum(map(len, heldout)) > 400_000
    assert "Call me Ishmael" in heldout[6]
    assert all(len(text) > 1000 and "\f" not in text for text in calibration + heldout)

    def passages(texts):
        return {text[i : i + 80] for text in texts for i in range(0, len(text) - 80, 80)}

    assert not any(p in text for p in list(passages(heldout))[::50] for text in calibration)


def test_plain_text(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one\n\ftwo é\n\f  \n", encoding="utf-8")
    assert load_texts(file) == ["one\n", "two é\n"]
    assert load_texts(str(file)) == ["one\n", "two é\n"]


def test_json_lines(tmp_path):
    file = tmp_path / "a.jsonl"
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    lines = [{"text": "one", "prompt": "x"}, "two", {"prompt": "three"}, chat, {"text": ""}, {"text": "\ud800!"}]
    file.write_text("\n\n".join(map(json.dumps, lines)))
    assert load_texts(file) == ["one", "two", "three", "hi\nho", "\ufffd!"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_parquet(tmp_path, kind):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1, 2, 3], "text": pa.array(["one", None, "two"], kind)}), file)
    assert load_texts(file) == ["one", "two"]
    pq.write_table(pa.table({"words": ["w"]}), file)
    assert load_texts(file) == ["w"]


def test_only_the_beginning_of_a_huge_source_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_CHARS", 10)
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps("x" * 7) for _ in range(5)))
    assert load_texts(file) == ["x" * 7, "x" * 3]
    long = tmp_path / "a.txt"
    long.write_text("é" * 1000, encoding="utf-8")
    assert load_texts(long) == ["é" * 10]


BAD = {
    "empty.txt": (b"", "holds no text"),
    "blank.txt": (b" \n\f\n", "holds no text"),
    "latin.txt": (b"caf\xe9 au lait", "not UTF-8 text: byte 3 is 0xe9"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
    "latin.jsonl": (b'{"text": "caf\xe9"}\n', "not UTF-8"),
    "other.jsonl": (b'{"label": 3}\n', "line 1 has no text"),
    "damaged.parquet": (b"PAR1 and then nothing sensible PAR1", "is damaged"),
    "short.parquet": (b"PAR1", "is damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path, name):
    data, message = BAD[name]
    file = tmp_path / name
    file.write_bytes(data)
    with pytest.raises(UsageError, match=message) as e:
        load_texts(file)
    assert e.value.fix
    assert str(file) in str(e.value)


def test_a_cut_parquet_file(tmp_path):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [str(i) * 50 for i in range(2000)]}), file)
    whole = file.read_bytes()
    for damaged in (whole[:-20], whole[:50] + b"\xff" * 200 + whole[250:]):
        file.write_bytes(damaged)
        with pytest.raises(UsageError, match="is damaged"):
            load_texts(file)


def test_a_parquet_file_without_text(tmp_path):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": ["x"], "b": ["y"]}), file)
    with pytest.raises(UsageError, match="no column of text that stands out.*a, b"):
        load_texts(file)


def test_a_missing_file():
    with pytest.raises(UsageError, match="no such file"):
        load_texts("nowhere/at/all.txt")


def test_missing_libraries(tmp_path, monkeypatch):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one"]}), file)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ResourceError, match="needs pyarrow"):
        load_texts(file)
    with pytest.raises(ResourceError, match="`datasets` library is needed"):
        load_texts("wikitext")


def test_a_data_set_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        if name == "gone":
            raise RuntimeError("no such repository")
        return [{"text": "one"}, {"text": " "}, {"article": "two"}, {"label": 1}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert load_texts("Salesforce/wikitext:wikitext-2-raw-v1:test") == ["one", "two"]
    assert load_texts("cnn_dailymail") == ["one", "two"]
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test", True), ("cnn_dailymail", None, "train", True)]
    with pytest.raises(UsageError, match="cannot be read: no such repository"):
        load_texts("gone")


def test_heldout_windows_lie_end_to_end(tokenizer):
    texts = [bytes(range(65, 90)).decode() * 2, "abcdef" * 10]
    stream = list((texts[0] + "\n\n" + texts[1]).encode())
    byte_ids = tokenizer.encode(texts[0] + "\n\n" + texts[1]).ids
    assert len(byte_ids) == len(stream) == 112
    found = heldout_windows(texts, tokenizer, 100, 10)
    assert found == [Window(tuple(byte_ids[i : i + 10])) for i in range(0, 110, 10)]
    spread = heldout_windows(texts, tokenizer, 3, 10)
    assert spread == [found[0], found[3], found[7]]


def test_windows_with_a_beginning_of_sequence(tokenizer, with_bos):
    text = "the quick brown fox jumps over the lazy dog"
    plain = tokenizer.encode(text).ids
    found = heldout_windows([text], with_bos, 100, 11)
    assert found == [Window((BOS, *plain[i : i + 10]), 1) for i in range(0, 40, 10)]
    assert all(w[0] == BOS for w in windows([text], with_bos, 3, 11))


def test_overlapping_windows_count_a_token_once(tokenizer):
    text = "x" * 20 + "y" * 21
    found = heldout_windows([text], tokenizer, 100, 16, stride=5)
    assert [w.scored_from for w in found] == [1, 11, 11, 11, 11, 11]
    assert sum(w.num_scored for w in found) == 15 + 5 * 5


def test_calibration_windows_are_drawn_without_overlap(tokenizer):
    text = "".join(chr(48 + i % 71) for i in range(1000))
    drawn = windows([text], tokenizer, 20, 25, seed=1)
    assert drawn == windows([text], tokenizer, 20, 25, seed=1)
    assert drawn != windows([text], tokenizer, 20, 25, seed=2)
    ids = tokenizer.encode(text).ids
    cut = [ids[i : i + 25] for i in range(0, 1000, 25)]
    assert all(w in cut for w in drawn)
    assert len({tuple(w) for w in windows([text], tokenizer, 3, 25, seed=0)}) == 3


def test_texts_that_are_too_short(tokenizer):
    with pytest.raises(UsageError, match=r"has 5 tokens, too few for one window of 8 tokens \(3 more"):
        heldout_windows(["hello"], tokenizer, 1, 8)
    with pytest.raises(UsageError, match="too few for 4 windows"):
        windows(["hello"], tokenizer, 4, 2)
    with pytest.raises(UsageError, match="predicts nothing"):
        heldout_windows(["hello"], tokenizer, 1, 1)


def test_tokenizers_that_are_missing_or_wrong(tmp_path):
    with pytest.raises(UsageError, match="no tokenizer"):
        load_tokenizer(None, 100)
    with pytest.raises(EngineError, match="no tokenizer.json"):
        load_tokenizer(tmp_path, 100)
    save_tiny_tokenizer(tmp_path)
    with pytest.raises(UsageError, match="go up to 258, the model has only 100"):
        load_tokenizer(tmp_path, 100)
