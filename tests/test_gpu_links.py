"""benchmarks/gpu_links.py: that it runs, on the CPU, and that its tables are those of its results."""

import json
import os
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # scripts, not a package

import gpu_links  # noqa: E402


def test_a_dry_run(tmp_path, monkeypatch):
    # One process: collectives need a network interface, which not every machine that runs tests has.
    monkeypatch.setattr(sys, "argv", ["gpu_links.py", "--dry-run", "--gpus", "1", "--output-dir", str(tmp_path)])
    threads = gpu_links.torch.get_num_threads()
    try:
        gpu_links.main()
    finally:
        gpu_links.torch.set_num_threads(threads)
    found = json.loads((tmp_path / "gpu_links_cpu.json").read_text())
    assert found["machine"]["gpu"] == "CPU (a dry run)"
    assert set(found) == {"machine", "links", "copy", "host", "launch", "products", "attention"}
    assert set(found["products"]) == {"bfloat16", "fp8"}
    assert all(us > 0 for shape in found["products"]["bfloat16"].values() for us in shape["us"].values())


def test_the_tables_are_those_of_the_results():
    for path in (BENCHMARKS / "results").glob("gpu_links_*.json"):
        assert path.with_suffix(".md").read_text() == gpu_links.markdown(json.loads(path.read_text()))


@pytest.mark.parametrize(
    ("there", "args", "message"),
    [
        (0, [], "2 GPUs are needed and this machine has none; --dry-run"),
        (1, [], "2 GPUs are needed and this machine has 1; --gpus 1 measures one alone"),
        (2, ["--gpus", "4"], "4 GPUs are needed and this machine has 2"),
        (0, ["--gpus", "1"], "a GPU is needed and this machine has none; --dry-run"),
        (2, ["--gpus", "0"], "--gpus 0: at least 1"),
    ],
)
def test_it_says_which_gpus_it_lacks(there, args, message, monkeypatch, capsys):
    monkeypatch.setattr(gpu_links.torch.cuda, "device_count", lambda: there)
    monkeypatch.setattr(sys, "argv", ["gpu_links.py", *args])
    with pytest.raises(SystemExit) as stopped:
        gpu_links.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_multicast_is_off():
    assert os.environ["NCCL_NVLS_ENABLE"] == "0"
    assert os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == "1"
