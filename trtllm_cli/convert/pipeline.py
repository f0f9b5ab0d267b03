"""`convert`: a snapshot or GGUF file in, a checkpoint out, one tensor at a time.

Memory: the source is read by offset (a `.bin` file is mapped), a tensor is cast in small pieces, and each rank's part
is written as soon as it is cut. So at most about three times the largest tensor is held, whatever the model's size.
"""

from __future__ import annotations

import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import ValidationError

from trtllm_cli.artifact import check_output, describe, human_bytes, sha256, validate, writing
from trtllm_cli.checkpoint import PRODUCER, SUMS, TOKENIZER, write_config, write_sums
from trtllm_cli.convert.cast import load_source
from trtllm_cli.convert.families import family_of
from trtllm_cli.convert.families.family import Family
from trtllm_cli.convert.families.fields import Fields
from trtllm_cli.convert.plan import KV_SCALES, Job, Stage, make_plan, source_of, whole_weights
from trtllm_cli.convert.quantize.formats import CALIBRATED, KvCache, QFormat, qformat_named, quant_config
from trtllm_cli.convert.quantize.rows import Quantized, row_quantizer
from trtllm_cli.convert.reader import Reader, RenamedReader, open_reader
from trtllm_cli.convert.shard import split
from trtllm_cli.convert.tokenizer_files import check_tokenizer
from trtllm_cli.convert.verify import verify_aside
from trtllm_cli.errors import ResourceError, SnapshotError, UnsupportedError, UsageError
from trtllm_cli.mapping import Mapping
from trtllm_cli.model_config import DType, ModelConfig
from trtllm_cli.quant_config import QuantConfig
from trtllm_cli.tensor_file import TensorFileWriter, total_bytes
from trtllm_cli.version import __version__

if TYPE_CHECKING:
    import torch

SPARE_BYTES = 64 << 20  # room for the tokenizer and the file system's own needs

# Called with the tensor just written, bytes written so far, and bytes in all.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ConvertOptions:
    """What the flags of `trtllm convert` say."""

    dtype: DType | Literal["auto"] = "auto"
    tp_size: int = 1
    pp_size: int = 1
    use_parallel_embedding: bool = False
    embedding_sharding_dim: Literal[0, 1] = 0
    qformat: QFormat | None = None
    group_size: int | None = None  # None: the format's own
    exclude: tuple[str, ...] = ()  # patterns of layers that stay as they are
    quantize_lm_head: bool = False
    kv_cache: KvCache | None = None
    force: bool = False

    def check(self) -> None:
        """Raises UsageError for a value that no flag has."""
        for flag, value, allowed in (
            ("--dtype", self.dtype, ("auto", *get_args(DType))),
            ("--kv-cache-dtype", self.kv_cache, (None, *get_args(KvCache))),
            ("--embedding-sharding-dim", self.embedding_sharding_dim, (0, 1)),
        ):
            if value not in allowed:
                choices = ", ".join(str(a) for a in allowed if a is not None)
                raise UsageError(f"{flag} is {value!r}", where=flag, fix=f"choose one of {choices}")
        if self.qformat is not None:
            qformat_named(self.qformat)
        for flag, number in (
            ("--tp-size", self.tp_size), ("--pp-size", self.pp_size), ("--group-size", self.group_size)
        ):  # fmt: skip
            if number is not None and number < 1:
                raise UsageError(f"{flag} is {number}", where=flag, fix="give 1 or more")


@dataclass(frozen=True)
class ConvertReport:
    """What was written."""

    output_dir: str
    architecture: str
    dtype: str
    quant_algo: str | None
    group_size: int | None
    tp_size: int
    pp_size: int
    num_parameters: int  # of the source's tensors that the checkpoint holds, each counted once
    num_tensors: int  # in all rank files
    rank_bytes: list[int]
    tokenizer_files: list[str]
    seconds: float
    peak_memory_bytes: int  # of the whole process so far, resident
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


Check = Callable[[Path, ModelConfig], None]


def convert(
    source: Path,
    output_dir: Path,
    options: ConvertOptions | None = None,
    progress: Progress | None = None,
    *,
    quantization: Quantized | None = None,
    check: Check | None = None,
) -> ConvertReport:
    """Writes the checkpoint of `source`, a snapshot directory or .gguf file, to `output_dir`.

    `quantization` is how, where that took calibration; `check` is called with the finished directory before it gets
    its name, which it never does if that raises.

    Raises SnapshotError for a damaged source, UnsupportedError for what cannot be honoured exactly, UsageError for
    options that do not fit the model, ResourceError for lack of disk, OutputExistsError.
    """
    started = time.monotonic()
    options = options or ConvertOptions()
    options.check()
    check_output(output_dir, force=options.force, source=source)
    verified = verify_aside(source)
    try:
        reader = open_reader(source)
    except (SnapshotError, UnsupportedError):
        verified.result()  # if the file was altered, this says so, and is the better explanation
        raise
    try:
        decided = read_config(reader, options, quantization)
        config, notes = decided.config, decided.notes
        if decided.family.renames:
            reader = RenamedReader(reader, decided.family.renames)
        stages = make_plan(reader, decided.family, config, tied=decided.tied)
        sizes = [total_bytes(stage.tensors(rank).values()) for stage in stages for rank in stage.ranks]
        _check_space(output_dir, sum(sizes))
        with writing(output_dir, force=options.force, source=source) as directory, _one_thread():
            _write_ranks(directory, reader, config, stages, quantization or Quantized(config.quantization), progress)
            files = _write_tokenizer(directory, reader, config)
            verified.result()
            write_config(directory, config)
            if check is not None:
                check(directory, config)
    finally:
        reader.close()
    if not files:
        notes.append("the snapshot has no tokenizer: the checkpoint works with token ids only")
    return ConvertReport(
        output_dir=str(output_dir),
        architecture=config.architecture,
        dtype=config.dtype,
        quant_algo=config.quantization.quant_algo,
        group_size=_group_size(config),
        tp_size=config.mapping.tp_size,
        pp_size=config.mapping.pp_size,
        num_parameters=_num_parameters(stages),
        num_tensors=sum(len(stage.tensors(rank)) for stage in stages for rank in stage.ranks),
        rank_bytes=sizes,
        tokenizer_files=files,
        seconds=round(time.monotonic() - started, 3),
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        notes=notes,
    )


def _group_size(config: ModelConfig) -> int | None:
    """Inputs that share a scale, where the format leaves a choice."""
    q = config.quantization
    return q.group_size if q.per_group or (q.quant_algo or "").startswith(("W4A16", "W4A8")) else None


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch on one thread. The work is moving bytes; two threads only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Decided:
    """What a source and the options say, before any tensor is looked at."""

    config: ModelConfig  # the checkpoint's
    family: Family
    tied: bool  # the source's head is its embedding
    notes: list[str]  # what the user should know


def read_config(reader: Reader, options: ConvertOptions, quantization: Quantized | None = None) -> Decided:
    """The config of the checkpoint that the source would make. Raises SnapshotError, UnsupportedError, UsageError."""
    notes = []
    family = family_of(reader.config, reader.config_path)
    fields = family.config_fields(Fields(reader.config, reader.config_path))
    if "auto_map" in reader.config:
        notes.append(f"config.json names code of its own; it was not run, and the model read as {family.architecture}")
    fields["dtype"] = reader.default_dtype() if options.dtype == "auto" else options.dtype
    fields["producer"] = {"name": PRODUCER, "version": __version__}
    base = validate(ModelConfig, fields, reader.config_path, SnapshotError)
    tied, mapping = base.share_embedding_table, Mapping.of(options.tp_size, options.pp_size)
    fields |= {
        "mapping": mapping,
        "share_embedding_table": tied and mapping.world_size == 1 and not options.quantize_lm_head,
        "use_parallel_embedding": options.use_parallel_embedding,
        "embedding_sharding_dim": options.embedding_sharding_dim,
    }
    config = _with_mapping(fields)
    if quantization is not None:
        decided = quantization.config
    else:
        decided, said = _decide(options, config)
        notes += said
    config = config.model_copy(update={"quantization": decided})
    return Decided(config, family, tied, notes)


def _decide(options: ConvertOptions, config: ModelConfig) -> tuple[QuantConfig, list[str]]:
    qformat = None if options.qformat is None else qformat_named(options.qformat)
    if qformat in CALIBRATED or options.kv_cache is not None:
        what = f"--qformat {qformat}" if qformat in CALIBRATED else f"--kv-cache-dtype {options.kv_cache}"
        raise UsageError(f"{what} takes calibration", where=what.split()[0], fix="trtllm quantize does that")
    return quant_config(qformat, options.group_size, config, options.exclude, options.quantize_lm_head)


def _with_mapping(fields: dict[str, Any]) -> ModelConfig:
    """The config, once it is known to be right on one rank; what is wrong with it now is the options' doing."""
    try:
        return ModelConfig.model_validate(fields)
    except ValidationError as e:
        raise UsageError(
            f"the model does not divide so: {describe(e)}", where="--tp-size, --pp-size", fix="choose other sizes"
        ) from None


def _check_space(output_dir: Path, size: int) -> None:
    parent = output_dir.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < size + SPARE_BYTES:
        raise ResourceError(
            f"the checkpoint takes {human_bytes(size)}, and {parent} has {human_bytes(free)} free",
            where="--output-dir",
            fix="free some room, or choose another --output-dir",
        )


def _write_ranks(
    directory: Path,
    reader: Reader,
    config: ModelConfig,
    stages: list[Stage],
    quantization: Quantized,
    progress: Progress | None,
) -> None:
    total = sum(total_bytes(stage.tensors(rank).values()) for stage in stages for rank in stage.ranks)
    done = 0
    sums: dict[str, str] = {}
    for stage in stages:
        files = {rank: directory / f"rank{rank.rank}.safetensors" for rank in stage.ranks}
        with ExitStack() as stack:
            writers = {
                rank: stack.enter_context(TensorFileWriter(path, stage.tensors(rank), {}))
                for rank, path in files.items()
            }
            for job in stage.jobs:
                for written in _run(job, reader, config, writers, quantization):
                    done += written
                if progress is not None:
                    progress(job.name, done, total)
        sums |= {path.name: sha256(path) for path in files.values()}
    write_sums(directory / SUMS, sums)


def _run(
    job: Job, reader: Reader, config: ModelConfig, writers: dict[Any, TensorFileWriter], quantization: Quantized
) -> list[int]:
    """Reads one whole weight, and gives each rank its part; bytes written."""
    module = job.name.removesuffix(".weight")
    names = {name.rpartition(".")[2] for weights in job.parts.values() for name in weights}
    wholes: dict[str, torch.Tensor] = {}
    if KV_SCALES in names:
        wholes[f"{module}.{KV_SCALES}"] = _kv_scales(module, quantization)
    if names - {"weight", "bias", KV_SCALES}:
        # straight from the source's numbers: no rounding in between
        dtypes = {reader.tensors[name].dtype for name in job.source.names}
        dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
        whole = load_source(reader, job.source, job.shape, config, dtype)
        wholes |= {f"{module}.{part}": t for part, t in _quantized(whole, module, quantization).items()}
        del whole
    else:
        wholes[job.name] = load_source(reader, job.source, job.shape, config, _dtype_of(job))
    written = []
    for rank, weights in job.parts.items():
        # the rank's names differ from the whole's in the layer's number only
        for (name, weight), whole_name in zip(weights.items(), _in_order(weights, wholes), strict=True):
            data = tensor_bytes(split(wholes[whole_name], weight, config, rank))
            writers[rank].write(name, data)
            written.append(len(data))
    return written


def _quantized(whole: torch.Tensor, module: str, quantization: Quantized) -> dict[str, torch.Tensor]:
    """The stored parts of a whole weight."""
    layer = quantization.config.layer_quant(module)
    assert layer is not None
    quantizer = row_quantizer(layer, tuple(whole.shape), quantization.calibration.layers.get(module))
    made = quantizer(whole.flatten(0, -2))
    return quantizer.fixed | {name: part.unflatten(0, whole.shape[:-1]) for name, part in made.items()}


def _kv_scales(module: str, quantization: Quantized) -> torch.Tensor:
    """float32 [2] of the attention that the linear `module` belongs to: k's step and v's."""
    import torch

    return torch.tensor(quantization.calibration.kv_scales[module.rpartition(".")[0]], dtype=torch.float32)


def whole_tensor(reader: Reader, decided: Decided, name: str) -> torch.Tensor:
    """A weight of the whole model, not quantized, by our name, in the dtype of the checkpoint."""
    weight = whole_weights(decided.config)[name]
    source = source_of(decided.family, name, decided.config, tied=decided.tied)
    return load_source(reader, source, weight.shape, decided.config, weight.dtype)


def _dtype_of(job: Job) -> str:
    """The dtype that the model's graph gives a plain weight."""
    return next(weight.dtype for weights in job.parts.values() for weight in weights.values())


def _in_order(weights: dict[str, Any], wholes: dict[str, Any]) -> list[str]:
    by_suffix = {name.rpartition(".")[2]: name for name in wholes}
    return [by_suffix[name.rpartition(".")[2]] for name in weights]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied."""
    import torch

    return tensor.detach().flatten().view(torch.uint8).numpy().data


def _num_parameters(stages: list[Stage]) -> int:
    import math

    wholes = {job.source.names: math.prod(job.shape) for stage in stages for job in stage.jobs}
    return sum(wholes.values())


def _write_tokenizer(directory: Path, reader: Reader, config: ModelConfig) -> list[str]:
    tokenizer = directory / TOKENIZER
    tokenizer.mkdir()
    files = reader.write_tokenizer(tokenizer)
    if files:
        check_tokenizer(tokenizer, config.vocab_size, reader.path)
    else:
        tokenizer.rmdir()
    return files
