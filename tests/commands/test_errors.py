"""Every error as a user meets it: one message with the place and the fix, the right exit code, nothing left behind."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands.conftest import LIMITS, edit, flip, truncate
from trtllm_cli.artifact import sha256
from trtllm_cli.engine import config_digest
from trtllm_cli.snapshot import FileEntry, Manifest, write_manifest

USAGE, ARTIFACT, UNSUPPORTED, RESOURCE, REQUEST = 2, 3, 4, 6, 7
OUT = "out"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Each test in its own directory, which ends without a half-written output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRTLLM_CACHE", str(tmp_path / "cache"))
    yield
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def convert(source, *more):
    return ("convert", source, "--output-dir", OUT, *more)


def build(checkpoint, *more):
    return ("build", "--checkpoint-dir", checkpoint, "--output-dir", OUT, "--kernels", "torch", *LIMITS, *more)


def run(engine, *more):
    return ("run", "--engine-dir", engine, "--no-chat-template", "--max-tokens", "3", *(more or ("hi",)))


STAGES = {"snapshot": convert, "checkpoint": build, "engine": run}


def refused(said, code, *words):
    """The code, the words, and no output."""
    assert said.code == code, said.err
    assert said.out == ""
    for word in words:
        assert word in said.err
    assert not Path(OUT).exists()


# Damaged files


def add_manifest(snapshot):
    files = {p.name: FileEntry(size=p.stat().st_size, sha256=sha256(p)) for p in snapshot.iterdir()}
    write_manifest(snapshot, Manifest(repo_id="org/m", revision="main", commit="a" * 40, files=files))


def test_a_downloaded_snapshot_is_held_against_its_manifest(copy, trtllm):
    snapshot = copy("snapshot")
    add_manifest(snapshot)
    assert trtllm(*convert(snapshot)).code == 0
    original = {p: p.read_bytes() for p in snapshot.iterdir()}
    for name, damage, words in (
        ("model.safetensors", flip, "model.safetensors has the right size, but its bytes were altered"),
        ("model.safetensors", truncate, "bytes) instead of"),
        ("tokenizer.json", flip, "tokenizer.json has the right size, but"),
        ("config.json", lambda f: edit(f, rms_norm_eps=1e-6), "config.json has"),
        ("tokenizer_config.json", Path.unlink, "tokenizer_config.json is missing"),
    ):
        damage(snapshot / name)
        said = trtllm("convert", snapshot, "--output-dir", "again")
        assert said.code == ARTIFACT
        assert words in said.err
        assert f"fix: trtllm download org/m --revision {'a' * 40} --verify --output-dir {snapshot}" in said.err
        assert not Path("again").exists()
        (snapshot / name).write_bytes(original[snapshot / name])


def test_a_snapshots_gguf_is_held_against_its_manifest(trtllm, tmp_path):
    snapshot = tmp_path / "g"
    snapshot.mkdir()
    (snapshot / "m.gguf").write_bytes(b"GGUF" + bytes(100))
    add_manifest(snapshot)
    flip(snapshot / "m.gguf")
    for source in (snapshot, snapshot / "m.gguf"):
        refused(trtllm(*convert(source)), ARTIFACT, "m.gguf")
    truncate(snapshot / "m.gguf", 20)
    refused(trtllm(*convert(snapshot / "m.gguf")), ARTIFACT, "m.gguf has 84 B", "--verify")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "does not begin with GGUF"),
        (b"GGUF" + (3).to_bytes(4, "little") + (2**60).to_bytes(8, "little") + bytes(8), "truncated?"),
        (b"GGUF" + (9).to_bytes(4, "little") + bytes(16), "version 9"),
        (b"GGUF" + (3).to_bytes(4, "little"), "damaged"),
    ],
)
def test_gguf_files_that_are_none(trtllm, tmp_path, data, words):
    (tmp_path / "m.gguf").write_bytes(data)
    said = trtllm(*convert("m.gguf"))
    refused(said, UNSUPPORTED if "version" in words else ARTIFACT, words, "m.gguf", "fix:")


@pytest.mark.parametrize(
    ("name", "file", "damage", "words"),
    [
        ("snapshot", "model.safetensors", truncate, "truncated?"),
        ("snapshot", "model.safetensors", lambda f: f.write_bytes(b""), "too few"),
        ("snapshot", "model.safetensors", Path.unlink, "no weights"),
        ("checkpoint", "rank0.safetensors", flip, "was altered"),
        ("checkpoint", "rank0.safetensors", truncate, "truncated?"),
        ("checkpoint", "rank0.safetensors", Path.unlink, "is missing"),
        ("checkpoint", "SHA256SUMS", lambda f: f.write_text("hello\n"), "no checksum"),
        ("checkpoint", "SHA256SUMS", lambda f: f.write_text(f"{'0' * 64}  rank7.safetensors\n"), "does not list"),
        ("engine", "rank0.engine", flip, "was altered"),
        ("engine", "rank0.engine", lambda f: flip(f, 20), "header"),
        ("engine", "rank0.engine", lambda f: flip(f, f.read_bytes().index(b"gated_act")), "was altered"),
        ("engine", "rank0.engine", lambda f: flip(f, 9000), "was altered"),
        ("engine", "rank0.engine", truncate, "is damaged"),
        ("engine", "rank0.engine", Path.unlink, "missing"),
    ],
)
def test_weights_that_are_not_as_they_were_written(copy, trtllm, name, file, damage, words):
    damage(copy(name) / file)
    refused(trtllm(*STAGES[name](name)), ARTIFACT, words, name, "fix:")


def test_damaged_machine_code_is_never_loaded(copy, trtllm):
    from trtllm_cli.engine import KERNELS
    from trtllm_cli.tensor_file import TensorFile

    file = copy("engine") / "rank0.engine"
    with TensorFile(file) as tensors:
        image = bytes(tensors.view(KERNELS))
    flip(file, file.read_bytes().index(image) + len(image) // 2)
    refused(trtllm(*run("engine")), ARTIFACT, "was altered")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"build_config__max_batch_size": 400}, "was edited"),
        ({"pretrained_config__vocab_size": 1000}, "was edited"),
        ({"format_version": 2}, "format version 2"),
        ({"backend": "tpu"}, "built for the backend 'tpu'"),
        ({"backend": "cuda"}, "was edited"),
    ],
)
def test_an_edited_engine_config(copy, trtllm, fields, words):
    edit(copy("engine") / "config.json", **fields)
    refused(trtllm(*run("engine")), ARTIFACT, words, "config.json", "trtllm build --checkpoint-dir CKPT")


@pytest.mark.parametrize(
    ("target", "words"), [("arch", "compiled for sparc"), ("features", "this one has no amx_fp128")]
)
def test_an_engine_for_another_processor(copy, trtllm, target, words):
    file = copy("engine") / "config.json"
    edit(file, **{f"target__{target}": "sparc" if target == "arch" else "avx2 amx_fp128"})
    fields = json.loads(file.read_text())
    del fields["sha256"]
    edit(file, sha256=config_digest(fields))
    refused(trtllm(*run("engine")), ARTIFACT, words, "trtllm build")


def test_an_engine_of_two_ranks_without_a_launcher(tiny, trtllm):
    refused(trtllm(*run(tiny / "two-ranks")), USAGE, "split over 2 ranks (tp_size 2", "fix: mpirun -n 2", "--launch")


# config.json


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize(
    "text",
    ["hello", "", "[]", "[" * 100_000, '{"a":' * 100_000, "\0", None],
    ids=["words", "empty", "list", "nested", "deep", "nul", "directory"],
)
def test_a_config_that_is_no_json_object(copy, trtllm, name, text):
    file = copy(name) / "config.json"
    file.unlink()
    if text is None:
        file.mkdir()
    else:
        file.write_text(text)
    refused(trtllm(*STAGES[name](name)), ARTIFACT, "config.json", name, "fix:")


@pytest.mark.parametrize("name", STAGES)
def test_what_is_not_there_and_what_is_a_file(tiny, trtllm, name, tmp_path):
    refused(trtllm(*STAGES[name]("nowhere")), ARTIFACT, "no such", "nowhere", "fix:")
    (tmp_path / "file").write_text("")
    refused(trtllm(*STAGES[name]("file")), ARTIFACT, "file", "fix:")


@pytest.mark.parametrize(
    ("given", "wanted", "fix"),
    [
        ("snapshot", "checkpoint", "trtllm convert"),
        ("snapshot", "engine", "trtllm convert"),
        ("checkpoint", "snapshot", "it was made from"),
        ("checkpoint", "engine", "trtllm build --checkpoint-dir"),
        ("engine", "snapshot", "it was made from"),
        ("engine", "checkpoint", "it was built from"),
    ],
)
def test_an_artifact_of_another_stage(tiny, trtllm, given, wanted, fix):
    said = trtllm(*STAGES[wanted](tiny / given))
    refused(said, ARTIFACT, given, f"not a{'n' if wanted == 'engine' else ''} {wanted}", fix)


@pytest.mark.parametrize(
    ("name", "fields", "code", "words"),
    [
        ("snapshot", {"hidden_size": ...}, ARTIFACT, "`hidden_size` is missing"),
        ("snapshot", {"num_hidden_layers": "three"}, ARTIFACT, "`num_hidden_layers` should be an integer"),
        ("snapshot", {"num_hidden_layers": 10**9}, ARTIFACT, "num_hidden_layers"),
        ("snapshot", {"num_attention_heads": 7}, ARTIFACT, "num_attention_heads"),
        ("snapshot", {"intermediate_size": 1000}, ARTIFACT, "by the config it should be [1000, 64]"),
        ("snapshot", {"new_thing": 1}, UNSUPPORTED, "`new_thing` is 1"),
        ("snapshot", {"hidden_act": "swishy"}, UNSUPPORTED, "`hidden_act` is 'swishy'"),
        ("snapshot", {"quantization_config": {"quant_method": "bitsandbytes"}}, UNSUPPORTED, "by bitsandbytes"),
        ("checkpoint", {"hidden_size": ...}, ARTIFACT, "field `hidden_size` is missing"),
        ("checkpoint", {"num_hidden_layers": "three"}, ARTIFACT, "field `num_hidden_layers`"),
        ("checkpoint", {"num_hidden_layers": 10**9}, ARTIFACT, "field `num_hidden_layers`"),
        ("checkpoint", {"new_thing": 1}, ARTIFACT, "field `new_thing` is unknown"),
        ("checkpoint", {"vocab_size": 4}, ARTIFACT, "the config makes it float32 [4, 64]"),
        ("checkpoint", {"quantization": {"quant_algo": "INT8"}}, UNSUPPORTED, "INT8"),
        ("checkpoint", {"architecture": "GptFoo"}, UNSUPPORTED, "GptFoo is not supported"),
        ("engine", {"build_config": ...}, ARTIFACT, "field `build_config` is missing"),
        ("engine", {"target": 5}, ARTIFACT, "field `target`"),
        ("engine", {"build_config__new_thing": 1}, ARTIFACT, "field `build_config.new_thing` is unknown"),
    ],
)
def test_a_field_missing_wrong_or_unknown(copy, trtllm, name, fields, code, words):
    edit(copy(name) / "config.json", **fields)
    said = trtllm(*STAGES[name](name))
    refused(said, code, words, "config.json" if code == UNSUPPORTED else name)
    assert "Value error" not in said.err


# Tokenizers


def too_many_tokens(file):
    edit(file, model__vocab={chr(0x100 + i): i for i in range(400)})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (too_many_tokens, "its token ids go up to 402, the model has only 259"),
        (truncate, "tokenizer.json"),
        (lambda f: f.write_text("{}"), "cannot be read"),
        (lambda f: f.write_text("hello"), "tokenizer.json"),
    ],
)
def test_a_wrong_or_damaged_tokenizer(copy, trtllm, damage, words):
    damage(copy("snapshot") / "tokenizer.json")
    refused(trtllm(*convert("snapshot")), ARTIFACT, words, "fix:")
    damage(copy("engine") / "tokenizer" / "tokenizer.json")
    refused(trtllm(*run("engine")), ARTIFACT, words, "fix:")


def test_no_tokenizer(copy, trtllm):
    tokenizer = copy("engine") / "tokenizer"
    (tokenizer / "tokenizer.json").unlink()
    refused(trtllm(*run("engine")), ARTIFACT, "no tokenizer.json in")
    tokenizer.rename("elsewhere")
    refused(trtllm(*run("engine")), ARTIFACT, "takes token ids, not text", "--tokenizer-dir", "--input-token-ids")
    assert trtllm(*run("engine", "--input-token-ids", "1,2")).code == 0


@pytest.mark.parametrize(
    ("template", "code", "words"),
    [
        ("{% for", ARTIFACT, "the chat template is broken"),
        ("{{ 1/0 }}", REQUEST, "division by zero"),
        ("{{ messages[9].content }}", REQUEST, "no element 9"),
        ("{{ raise_exception('users only') }}", REQUEST, "refuses this conversation: users only"),
    ],
)
def test_a_chat_template_that_fails(copy, trtllm, template, code, words):
    edit(copy("engine") / "tokenizer" / "tokenizer_config.json", chat_template=template)
    refused(trtllm("run", "--engine-dir", "engine", "hi"), code, words, "tokenizer_config.json")


# Requests and limits


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["x" * 40], REQUEST, ["40 tokens", "max_input_len is 32"]),
        (["hi", "--max-tokens", "64"], REQUEST, ["max_seq_len is 64", "ask for at most 62"]),
        (["hi", "--max-tokens", 10**12], REQUEST, ["max_seq_len is 64"]),
        (["hi", "--max-tokens", "0"], USAGE, ["--max-tokens is 0"]),
        (["hi", "--n", 10**9], USAGE, ["--n is 1000000000", "1 to 1024"]),
        (["hi", "--temperature", "nan"], USAGE, ["--temperature"]),
        (["hi", "--seed", 10**30], USAGE, ["--seed"]),
        ([""], REQUEST, ["the prompt is empty"]),
        (["--input-token-ids", ""], USAGE, ["--input-token-ids"]),
        (["--input-token-ids", "1,x"], USAGE, ["write them like 1,2,3"]),
        (["--input-token-ids", "1,100000"], REQUEST, ["outside the model's vocabulary of 259"]),
        (["hi", "--threads", "0"], USAGE, ["it must be at least 1"]),
        (["hi", "--threads", 10**9], RESOURCE, ["cannot start"]),
        (["hi", "--max-num-blocks", "0"], USAGE, ["max_num_blocks is 0", "--max-num-blocks"]),
        (["hi", "--kv-cache-memory", "lots"], USAGE, ["2GiB or 512MB"]),
        (["hi", "--kv-cache-memory", "900TiB"], RESOURCE, ["900.0 TiB does not fit", "is free", "--kv-cache-memory"]),
        (["hi", "--kv-cache-memory", "1KiB"], RESOURCE, ["takes 8 blocks", "--max-seq-len", "--kv-cache-memory"]),
        (["hi", "--kv-cache-free-gpu-memory-fraction", "2"], USAGE, ["2 is no share", "--kv-cache-free-gpu-memory"]),
        (["hi", "--kv-cache-free-gpu-memory-fraction", "0.5"], USAGE, ["runs on the CPU", "--backend cuda"]),
        (["hi", "--max-gpu-memory", "lots"], USAGE, ["2GiB or 512MB", "--max-gpu-memory"]),
        (["hi", "--max-gpu-memory", "40GiB"], USAGE, ["runs on the CPU", "--max-gpu-memory"]),
        (["hi", "--scheduler-policy", "max_utilisation"], USAGE, ["did you mean max_utilization?"]),
        (["hi", "--output-file", "/proc/x"], RESOURCE, ["cannot write /proc/x", "--output-file"]),
    ],
)
def test_requests_that_cannot_be_served(tiny, trtllm, args, code, words):
    refused(trtllm(*run(tiny / "engine", *args)), code, *words)


def test_a_cache_that_memory_does_not_hold(tiny, trtllm, monkeypatch):
    monkeypatch.setattr("trtllm_cli.run.kv_budget.available_memory", lambda: 1 << 14)
    refused(trtllm(*run(tiny / "engine")), RESOURCE, "16.0 KiB of free memory", "8 blocks", "--kv-cache-memory")


def test_activations_that_memory_does_not_hold(tiny, trtllm):
    assert trtllm(*build(tiny / "checkpoint", "--kernels", "native", "--max-num-tokens", 1 << 20)).code == 0
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "from trtllm_cli.cli import call; sys.exit(call(sys.argv[1:]))"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, *run(OUT, "hi", "--threads", "1")], env=env, capture_output=True, text=True
    )
    assert done.returncode == RESOURCE, done.stderr
    assert "no memory for the activations" in done.stderr
    assert "--max-num-tokens" in done.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        *[
            ([f"--{flag}", value], [f"{flag.replace('-', '_')} is {value}", f"--{flag}"])
            for flag in ("max-batch-size", "max-num-tokens", "tokens-per-block")
            for value in (0, -1, 10**12)
        ],
        (["--max-seq-len", "0"], ["at least 1"]),
        (["--max-seq-len", "257"], ["256 positions", "at most 256"]),
        (["--max-seq-len", 10**12], ["256 positions"]),
        (["--max-input-len", "65"], ["more than max_seq_len 64", "--max-input-len", "fix:"]),
        (["--max-num-tokens", "3"], ["less than max_batch_size 4", "fix:"]),
        (["--group-size", "32"], ["group_size is for weights that the build makes int8 or int4"]),
        (["--weight-dtype", "int4", "--group-size", 10**12], ["more than the 64 inputs"]),
        (["--weight-dtype", "int5"], ["did you mean int8?"]),
        (["--kernels", "nativ"], ["did you mean native?"]),
        (["--kv-cache-dtype", "fp4"], ["one of float32, bfloat16"]),
        (["--backend", "cud"], ["did you mean cuda?"]),
        (["--model-file", "nowhere.py"], ["no such file"]),
    ],
)
def test_build_options_that_are_wrong(tiny, trtllm, args, words):
    refused(trtllm(*build(tiny / "checkpoint", *args)), USAGE, *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x =", "SyntaxError"),
        ("x = 1", "no function `define"),
        ("\ndef define(t, c, r):\n    raise KeyError('q')", "line 3"),
    ],
)
def test_a_model_file_that_fails(tiny, trtllm, tmp_path, text, words):
    (tmp_path / "mine.py").write_text(text)
    refused(trtllm(*build(tiny / "checkpoint", "--model-file", "mine.py")), USAGE, words, "mine.py")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--dtype", "bfloat61"], ["--dtype"]),
        (["--qformat", "int8"], ["int8_wo"]),
        (["--tp-size", "3"], ["tp_size 3 does not divide"]),
        (["--tp-size", 10**12], ["does not divide"]),
        (["--tp-size", "0"], ["--tp-size"]),
        (["--pp-size", "3"], ["more than the 2 layers"]),
    ],
)
def test_convert_options_that_are_wrong(tiny, trtllm, args, words):
    said = trtllm(*convert(tiny / "snapshot", *args))
    refused(said, USAGE, *words, "fix:")
    assert "Value error" not in said.err


# Outputs


def stages(tiny):
    return (convert(tiny / "snapshot"), build(tiny / "checkpoint"))


def to(args, output, *more):
    args = [*args, *more]
    args[args.index("--output-dir") + 1] = output
    return args


def test_an_output_that_cannot_be_written(tiny, trtllm, tmp_path):
    (tmp_path / "file").write_text("")
    for stage in stages(tiny):
        refused(trtllm(*to(stage, "file/out")), RESOURCE, "file/out")
        refused(trtllm(*to(stage, "/proc/out")), RESOURCE, "/proc")
        refused(trtllm(*to(stage, "x" * 300)), RESOURCE, "too long")
        refused(trtllm(*to(stage, "file")), ARTIFACT, "exists already", "--force")
        refused(trtllm(*to(stage, "file", "--force")), ARTIFACT, "not something that trtllm wrote")


def test_only_what_a_stage_wrote_is_replaced(tiny, trtllm, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text('{"architecture": "of my house"}')
    (theirs / "thesis.txt").write_text("years of work")
    for stage in stages(tiny):
        assert trtllm(*stage).code == 0
        before = sorted(Path(OUT).iterdir())
        assert trtllm(*stage).code == ARTIFACT
        assert trtllm(*stage, "--force").code == 0
        assert sorted(Path(OUT).iterdir()) == before
        Path(OUT).rename(f"{OUT}-{stage[0]}")
        refused(trtllm(*to(stage, "theirs", "--force")), ARTIFACT, "it holds thesis.txt")
    (tmp_path / "link").symlink_to(theirs)
    refused(trtllm(*to(stages(tiny)[0], "link", "--force")), ARTIFACT, "not something that trtllm wrote")
    (tmp_path / "config.json").write_text("{}")
    assert (theirs / "thesis.txt").exists()


def test_a_link_is_written_through(tiny, trtllm, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk/ckpt")
    stage = to(convert(tiny / "snapshot"), "link", "--force")
    assert trtllm(*stage).code == 0
    assert trtllm(*stage).code == 0
    assert (tmp_path / "link").is_symlink()
    assert os.listdir("disk") == ["ckpt"]


@pytest.mark.parametrize("name", ["snapshot", "checkpoint"])
def test_input_and_output_stay_apart(copy, trtllm, name, tmp_path):
    source = copy(name)
    before = sorted(source.iterdir())
    stage = STAGES[name](source)
    (tmp_path / "config.json").write_text('{"architecture": "x"}')
    for more in ((), ("--force",)):
        refused(trtllm(*to(stage, source, *more)), USAGE, "is the input itself")
        refused(trtllm(*to(stage, source / "sub", *more)), USAGE, "is inside the input")
        refused(trtllm(*to(stage, tmp_path, *more)), USAGE, "holds the input")
    assert sorted(source.iterdir()) == before


def test_a_disk_that_is_too_small(tiny, trtllm, monkeypatch):
    import shutil

    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    for stage in stages(tiny):
        refused(trtllm(*stage), RESOURCE, "1000 B free", "--output-dir")


def test_a_disk_that_fills_up(tiny, trtllm, monkeypatch):
    real = os.pwrite
    calls = []

    def full(fd, data, offset):
        calls.append(offset)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    for stage in stages(tiny):
        calls.clear()
        refused(trtllm(*stage), RESOURCE, "the disk is full", "free some room")
        assert len(calls) > 3


def test_files_may_not_be_so_large(tiny):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = command(*stages(tiny)[0], preexec_fn=limit)
    _, err = done.communicate(timeout=60)
    assert done.returncode == RESOURCE, err
    assert "File too large" in err
    assert not Path(OUT).exists()


# Interrupted


def command(*args, **more):
    line = [sys.executable, "-m", "trtllm_cli", *map(str, args)]
    more = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **more}
    return subprocess.Popen(line, **more)


SLOW = """
import sys, time
from trtllm_cli.tensor_file import TensorFileWriter
write_at = TensorFileWriter.write_at
def slowly(self, *args):
    write_at(self, *args)
    time.sleep(0.2)
TensorFileWriter.write_at = slowly
from trtllm_cli.cli import call
sys.exit(call(sys.argv[1:]))
"""


def slowed(*args):
    """The command, with time between its tensors; when it returns, its partial output has some."""
    line = [sys.executable, "-c", SLOW, *map(str, args)]
    victim = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    partial = Path(f".{OUT}.partial")
    while not any(p.stat().st_blocks > 8 for p in partial.glob("rank0.*")):
        assert victim.poll() is None, victim.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return victim


def content(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in Path(path).rglob("*") if p.is_file()}


@pytest.mark.parametrize("stage", ["convert", "build"])
def test_killed_and_run_again(tiny, trtllm, stage):
    args = dict(zip(("convert", "build"), stages(tiny), strict=True))[stage]
    assert trtllm(*to(args, "undisturbed")).code == 0
    victim = slowed(*args)
    second = trtllm(*args)  # while the first is at it
    assert second.code == RESOURCE
    assert "another process is writing" in second.err
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert not Path(OUT).exists()
    assert Path(f".{OUT}.partial").is_dir()
    assert trtllm(*args).code == 0
    assert content(OUT) == content("undisturbed")


@pytest.mark.parametrize("stage", ["convert", "build"])
def test_control_c(tiny, stage):
    victim = slowed(*dict(zip(("convert", "build"), stages(tiny), strict=True))[stage])
    victim.send_signal(signal.SIGINT)
    out, err = victim.communicate(timeout=60)
    assert victim.returncode == 130
    assert (out, err) == ("", "")
    assert os.listdir() == []


def test_control_c_while_generating(tiny):
    Path("prompts.jsonl").write_text('{"prompt": "hi"}\n' * 20_000)
    victim = command(*run(tiny / "engine", "--input-file", "prompts.jsonl"))
    assert victim.stdout.read(1)  # it has begun
    victim.send_signal(signal.SIGINT)
    _, err = victim.communicate(timeout=60)
    assert victim.returncode == 130
    assert "Traceback" not in err
