"""`quantize`: calibrate a source on text, convert it with what was found, and see what that changed before it counts.

The model is held whole while it is calibrated and compared; convert itself streams. The accuracy report is written into
the checkpoint while that has no name yet, so that one that is too far off is never left behind.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trtllm_cli.artifact import check_output
from trtllm_cli.convert.pipeline import ConvertOptions, ConvertReport, convert, read_config
from trtllm_cli.convert.quantize.calibrate import CalibrationOptions, calibrate
from trtllm_cli.convert.quantize.formats import linears, qformat_named, quant_config
from trtllm_cli.convert.quantize.load import load_program
from trtllm_cli.convert.quantize.rows import Calibration, Quantized
from trtllm_cli.convert.reader import Reader, open_reader
from trtllm_cli.errors import ResourceError, UsageError
from trtllm_cli.evaluate.text import CALIBRATION, HELDOUT
from trtllm_cli.model_config import ModelConfig
from trtllm_cli.quant_config import QuantConfig
from trtllm_cli.tensor_file import ITEMSIZE

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

    from trtllm_cli.evaluate.accuracy import AccuracyReport
    from trtllm_cli.evaluate.program import Program

# Told what is being done, how much of it is done, and of how much.
Progress = Callable[[str, int, int], None]
REPORT, PICTURE = "report.json", "report.png"
_UNCALIBRATED = ("int8_wo", "full_prec")  # calibration would change nothing
_EVAL_WINDOWS, _EVAL_LENGTH = 8, 512  # tokens of held-out text that the report is made of


@dataclass(frozen=True)
class QuantizeOptions:
    """What the flags of `trtllm quantize` say."""

    convert: ConvertOptions = field(default_factory=ConvertOptions)
    calib_dataset: str = CALIBRATION  # a file, a data set of the hub, or the text that the package ships
    calib_size: int = 32  # windows
    calib_max_seq_length: int = 256  # tokens of a window
    calib_batch_size: int = 4
    seed: int = 0
    calibrator: Literal["trtllm", "modelopt"] = "trtllm"
    device: str = "auto"  # where calibration and the report compute: auto, cpu, cuda
    auto_quantize_bits: float | None = None
    autoq_formats: tuple[str, ...] = ()  # what auto_quantize_bits chooses from
    tokenizer_dir: Path | None = None
    report: bool = True
    max_ppl_increase: float | None = None  # None: evaluate.accuracy's own

    def check(self) -> None:
        """Raises UsageError for what does not go together."""
        self.convert.check()
        for flag, number in (
            ("--calib-size", self.calib_size),
            ("--calib-max-seq-length", self.calib_max_seq_length - 1),
            ("--calib-batch-size", self.calib_batch_size),
        ):
            if number < 1:
                raise UsageError(f"{flag} is too small", where=flag, fix="give a larger number, such as 32")
        if self.calibrator not in ("trtllm", "modelopt"):
            raise UsageError(
                f"--calibrator is {self.calibrator!r}", where="--calibrator", fix="choose trtllm or modelopt"
            )
        auto, qformat = self.auto_quantize_bits is not None, self.convert.qformat
        if auto == (qformat is not None):
            raise UsageError(
                "--qformat and --auto-quantize-bits are both given" if auto else "no format is given",
                where="--qformat",
                fix="--qformat fp8, or --auto-quantize-bits 6 --autoq-format int4_awq,fp8",
            )
        if self.autoq_formats and not auto:
            raise UsageError("--autoq-format needs --auto-quantize-bits", where="--autoq-format")
        if auto and self.calibrator == "modelopt":
            raise UsageError("--auto-quantize-bits calibrates by itself", where="--calibrator", fix="leave it out")


@dataclass(frozen=True)
class QuantizeReport:
    """What was written, and how it was found."""

    convert: ConvertReport
    calibration_tokens: int
    calibration_seconds: float
    seconds: float
    accuracy: dict[str, Any] | None  # as report.json
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def quantize(
    source: Path, output_dir: Path, options: QuantizeOptions, progress: Progress | None = None
) -> tuple[QuantizeReport, AccuracyReport | None]:
    """Writes the quantized checkpoint of `source`, a snapshot directory or .gguf file, to `output_dir`.

    Raises what convert raises, AccuracyError if perplexity rises by more than `max_ppl_increase` (then nothing is
    left), UsageError for options and text, ResourceError for memory or a library that is missing.
    """
    started = time.monotonic()
    options.check()
    check_output(output_dir, force=options.convert.force, source=source)
    reader = open_reader(source)
    try:
        run = _Run(reader, options, progress)
        quantized, notes = run.quantized()
        calibrated = time.monotonic() - started
        plain = replace(options.convert, qformat=None, kv_cache=None)
        report = convert(source, output_dir, plain, progress, quantization=quantized, check=run.check)
    finally:
        reader.close()
    accuracy = None if run.accuracy is None else _report_json(run.accuracy)
    seconds = time.monotonic() - started
    made = QuantizeReport(
        report, run.tokens_seen, round(calibrated, 3), round(seconds, 3), accuracy, [*notes, *report.notes]
    )
    return made, run.accuracy


def _report_json(accuracy: AccuracyReport) -> dict[str, Any]:
    from trtllm_cli.evaluate.report import to_json

    return to_json(accuracy)


class _Run:
    """One call of quantize: the program is made once, for calibration and as the report's reference."""

    def __init__(self, reader: Reader, options: QuantizeOptions, progress: Progress | None) -> None:
        self.reader, self.options, self.progress = reader, options, progress
        plain = replace(options.convert, qformat=None, kv_cache=None)
        # a source that is quantized already is refused here
        self.target = read_config(reader, plain, Quantized(QuantConfig())).config
        alone = replace(plain, tp_size=1, pp_size=1, moe_tp_size=None, moe_ep_size=None, use_parallel_embedding=False)
        self.whole = read_config(reader, alone, Quantized(QuantConfig()))
        self.tokens_seen = 0
        self.accuracy: AccuracyReport | None = None
        self._program: Program | None = None
        self._tokenizer: Tokenizer | None = None

    def quantized(self) -> tuple[Quantized, list[str]]:
        """The decision and the calibration; notes."""
        o = self.options
        if o.auto_quantize_bits is not None:
            return self._auto(o.auto_quantize_bits)
        assert o.convert.qformat is not None
        qformat = qformat_named(o.convert.qformat)
        config, notes = quant_config(
            qformat, o.convert.group_size, self.target, o.convert.exclude, o.convert.quantize_lm_head,
            o.convert.kv_cache,
        )  # fmt: skip
        if o.report:
            self.heldout()  # a text that is not to be had is said before the work
        if qformat in _UNCALIBRATED and o.convert.kv_cache is None:
            return Quantized(config, Calibration()), notes
        found = calibrate(
            self.program, self.windows(), config, CalibrationOptions(o.calib_batch_size, o.calibrator), self.progress
        )
        return Quantized(config, found), notes

    def _auto(self, bits: float) -> tuple[Quantized, list[str]]:
        from trtllm_cli.convert.quantize.auto import DEFAULT_FORMATS, auto_quantize
        from trtllm_cli.convert.quantize.formats import trace_checked

        o = self.options.convert
        formats = [qformat_named(name) for name in self.options.autoq_formats or DEFAULT_FORMATS]
        base, notes = quant_config("fp8", None, self.target, o.exclude, o.quantize_lm_head, o.kv_cache)
        made = auto_quantize(
            self.program,
            self.windows(),
            linears(self.target),
            formats,
            bits,
            group_size=o.group_size,
            exclude=base.exclude_modules or (),
            kv_cache=base.kv_cache_quant_algo,
            options=CalibrationOptions(self.options.calib_batch_size),
            progress=self.progress,
        )
        trace_checked(self.target.model_copy(update={"quantization": made.quantized.config}))
        counts = ", ".join(f"{count} layers {algo}" for algo, count in sorted(made.counts.items()))
        return made.quantized, [*notes, f"{made.bits:.2f} bits a weight on average: {counts}"]

    @property
    def program(self) -> Program:
        """The unquantized model, whole."""
        if self._program is None:
            self._program = load_program(self.reader, self.whole, self.options.device, self.progress)
        return self._program

    @property
    def tokenizer(self) -> Tokenizer:
        """The source's own, or that of --tokenizer-dir."""
        from trtllm_cli.evaluate.text import load_tokenizer

        if self._tokenizer is None:
            with tempfile.TemporaryDirectory() as name:
                directory = self.options.tokenizer_dir
                if directory is None and self.reader.write_tokenizer(Path(name)):
                    directory = Path(name)
                self._tokenizer = load_tokenizer(directory, self.target.vocab_size)
        return self._tokenizer

    def windows(self) -> Tensor:
        """int64 [calib_size, calib_max_seq_length] of calibration text."""
        import torch

        from trtllm_cli.evaluate.text import load_texts, windows

        o = self.options
        texts = load_texts(o.calib_dataset)
        made = torch.tensor(windows(texts, self.tokenizer, o.calib_size, o.calib_max_seq_length, o.seed))
        self.tokens_seen = made.numel()
        return made

    def heldout(self) -> Any:
        """The windows of the report."""
        from trtllm_cli.evaluate.text import heldout_windows, load_texts

        length = min(_EVAL_LENGTH, self.target.max_position_embeddings)
        return heldout_windows(load_texts(HELDOUT), self.tokenizer, _EVAL_WINDOWS, length)

    def check(self, directory: Path, config: ModelConfig) -> None:
        """Compares what was written with the source; raises AccuracyError."""
        if not self.options.report:
            return
        from trtllm_cli.checkpoint import Checkpoint
        from trtllm_cli.evaluate.accuracy import MAX_PPL_INCREASE, compare
        from trtllm_cli.evaluate.report import draw
        from trtllm_cli.evaluate.whole_model import program_of

        allowed = self.options.max_ppl_increase
        written = sum((directory / f"rank{rank.rank}.safetensors").stat().st_size for rank in config.mapping.ranks)
        quantized = program_of(Checkpoint.open(directory), self.program.dtype, self.program.device)
        self.accuracy = compare(
            self.program,
            quantized,
            self.heldout(),
            None if self.progress is None else lambda done, total: self._tell("compare", done, total),
            bytes_before=sum(map(math.prod, self.reader.weights.values())) * ITEMSIZE[config.dtype],
            bytes_after=written,
            max_ppl_increase=MAX_PPL_INCREASE if allowed is None else allowed,
            names=(self.reader.path.name, config.quantization.quant_algo or "checkpoint"),
        )
        (directory / REPORT).write_text(json.dumps(_report_json(self.accuracy), indent=2) + "\n", encoding="utf-8")
        self.accuracy.raise_if_failed()
        try:
            draw(self.accuracy, directory / PICTURE)
        except ResourceError as e:  # a picture is no reason to throw the work away
            self._tell(e.message, 1, 1)

    def _tell(self, what: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(what, done, total)
