"""The command line itself: help, verbs, flags, exit codes."""

import json
import subprocess
import sys

import pytest

from trtllm_cli import cli
from trtllm_cli.errors import DeviceError, TrtllmError

VERBS = [[verb] for verb in cli.VERBS if verb not in ("bench", "eval")] + [["eval", "ppl"], ["eval", "compare"]]
VERBS += [["bench", "throughput"], ["bench", "latency"], ["bench", "prepare-dataset", "token-norm-dist"]]
HEAVY = ("torch", "transformers", "gguf", "huggingface_hub", "tokenizers", "numpy", "mpi4py", "triton")


def trtllm(capsys, *args):
    from trtllm_cli.commands import console

    console.stderr.cache_clear()
    console.stdout.cache_clear()
    code = cli.call([str(a) for a in args])
    out, err = capsys.readouterr()
    return code, out, err


def test_help_imports_not_even_typer():
    code = (
        "import sys; from trtllm_cli.cli import call; assert call(['--help']) == 0\n"
        "print({'typer', 'click', 'rich', 'pydantic', *sys.argv[1:]} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *HEAVY], capture_output=True, text=True)
    assert done.stderr == "set()\n"
    assert all(f"\n  {verb}" in done.stdout for verb in cli.VERBS)


def test_each_verbs_help_has_examples_and_imports_nothing_heavy():
    code = (
        "import sys; from trtllm_cli.cli import VERBS, call\n"
        "for verb in sys.argv[1].split(','):\n"
        "    assert call([*verb.split(), '--help']) == 0, verb\n"
        "print({*sys.argv[2:]} & set(sys.modules), file=sys.stderr)"
    )
    names = ",".join(" ".join(verb) for verb in VERBS)
    done = subprocess.run([sys.executable, "-c", code, names, *HEAVY], capture_output=True, text=True)
    assert done.stderr == "set()\n"
    for verb in VERBS:
        usage = done.stdout.split(f"Usage: trtllm {' '.join(verb)} ")[1].split("Usage:")[0]
        assert "Examples:" in usage
        assert f"trtllm {' '.join(verb)} " in usage
    assert "--help" in done.stdout


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_flags_may_have_underscores(verb, capsys):
    """A wrong value is refused under the flag's own name, so the flag was understood."""
    import typer

    command = cli._command(verb[0])
    for name in verb[1:]:
        command = command.commands[name]
    dashed = [o for p in command.params for o in p.opts if "-" in o.lstrip("-")]
    for flag in dashed:
        assert cli.normalize([flag.replace("-", "_").replace("__", "--", 1), "a_b"]) == ([flag, "a_b"], cli.Settings())
    assert typer


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["biuld"], ["no such verb: biuld", "did you mean `trtllm build`?"]),
        (["xyzzy"], ["the verbs are download, convert, quantize, build"]),
        (["build"], ["missing option '--checkpoint-dir'", "trtllm build --help"]),
        (["build", "--chekpoint_dir", "x"], ["no such option: --chekpoint-dir", "did you mean --checkpoint-dir"]),
        (["build", "--checkpoint-dir"], ["requires an argument"]),
        (["build", "--checkpoint-dir", "x", "--max-batch-size", "many"], ["'--max-batch-size'", "integer"]),
        (["convert", "a", "b"], ["unexpected extra argument"]),
        (["convert"], ["nothing to convert", "trtllm convert SOURCE"]),
        (["run", "hi"], ["give an engine or a model"]),
        (["run", "hi", "--engine-dir", "e", "--model", "m"], ["both given"]),
        (["run", "hi", "--engine-dir", "e", "--revision", "v1"], ["--revision", "when a model is downloaded"]),
        (["run", "hi", "--engine-dir", "e", "--offline"], ["--offline"]),
        (["run", "hi", "--engine-dir", "e", "--max_seq_len", "9"], ["--max-seq-len", "trtllm build again"]),
        (["run", "hi", "--model", "org/m", "--dtype", "int3"], ["--dtype is 'int3'"]),
        (["bench", "latency", "--engine-dir", "e", "--weight-dtype", "int8"], ["when an engine is built"]),
        (["bench", "throughput", "--engine-dir", "e", "--max-batch-size", "0"], ["--max-batch-size"]),
        (["inspect"], ["missing argument"]),
    ],
)
def test_wrong_usage_is_one_message_and_exit_code_2(capsys, args, words):
    code, out, err = trtllm(capsys, *args)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("error:") == 1
    for word in words:
        assert word in err


def test_model_flags_belong_to_a_stage_that_is_still_to_come(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "LlamaForCausalLM"}')
    code, _, err = trtllm(capsys, "run", "hi", "--model", tmp_path, "--dtype", "float32")
    assert code == 2
    assert "is a checkpoint already" in err


def test_no_arguments_is_help_and_wrong(capsys):
    code, out, _ = trtllm(capsys)
    assert code == 2
    assert out == cli.HELP
    assert trtllm(capsys, "--version")[:2] == (0, f"trtllm {cli.__version__}\n")


@pytest.mark.parametrize("flag", [["--debug"], []])
def test_a_traceback_only_with_debug(capsys, flag, monkeypatch):
    monkeypatch.delenv("TRTLLM_DEBUG", raising=False)
    code, _, err = trtllm(capsys, "inspect", "/nowhere", *flag)
    assert code == 3
    assert ("Traceback" in err) == bool(flag)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, ""),
        (MemoryError("1 TiB"), 6, "out of memory: 1 TiB"),
        (KeyError("x"), 70, "a bug in trtllm; --debug"),
        (DeviceError("no GPU"), 10, "error: no GPU"),
        (TrtllmError("what", where="here", fix="so"), 1, "error: what\n  in:  here\n  fix: so\n"),
    ],
)
def test_exit_codes(capsys, monkeypatch, error, code, words):
    def fail(path):
        raise error

    monkeypatch.setattr("trtllm_cli.artifact.detect", fail)
    got, _, err = trtllm(capsys, "inspect", "x")
    assert got == code
    assert words in err
    assert "Traceback" not in err


@pytest.mark.parametrize("verb", ["bench", "eval"])
def test_a_verb_of_several_alone_prints_its_help(verb, capsys):
    code, out, err = trtllm(capsys, verb)
    assert code == 2
    assert f"Usage: trtllm {verb} " in out + err
    assert "error" not in err


def test_what_is_for_mpirun_is_left_as_it_is():
    args = ["run", "--engine_dir", "e", "--mpirun_args", "--mca plm_rsh_agent a_b"]
    expected = ["run", "--engine-dir", "e", "--mpirun-args", "--mca plm_rsh_agent a_b"]
    assert cli.normalize(args)[0] == expected
    assert cli.normalize([*args[:3], "--mpirun_args"])[0] == [*expected[:3], "--mpirun-args"]


def test_a_rank_of_a_gpus_engine_has_torch_before_it_is_watched(tmp_path):
    """Importing torch lets no other thread run for seconds, and the ranks take who is silent for dead."""
    engines = {}
    for backend in ("cpu", "cuda"):
        engines[backend] = tmp_path / backend
        engines[backend].mkdir()
        (engines[backend] / "config.json").write_text(json.dumps({"backend": backend}))
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[]")
    assert cli._is_for_gpu(["run", "--engine-dir", str(engines["cuda"]), "hello"])
    assert cli._is_for_gpu(["bench", "throughput", f"--engine-dir={engines['cuda']}"])
    for args in ([], ["--engine-dir"], ["--engine-dir", str(engines["cpu"])], ["--engine-dir", str(tmp_path / "list")]):
        assert not cli._is_for_gpu(["run", *args])
