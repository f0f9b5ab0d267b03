"""Checkpoint -> engine: trace, passes, lower, pack each weight and write it."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_cli.artifact import human_bytes, writing
from trtllm_cli.build.lowered import Lowered, Working
from trtllm_cli.build.passes import CUDA_PASSES, PASSES, run_passes
from trtllm_cli.build.passes.quantize_kv_cache import quantize_kv_cache
from trtllm_cli.build.write_ranks import Progress, write_ranks
from trtllm_cli.checkpoint import Checkpoint
from trtllm_cli.engine import (
    FORMAT_VERSION,
    TOKENIZER,
    Backend,
    BuildConfig,
    EngineConfig,
    KvCacheDType,
    WeightDType,
    write_config,
)
from trtllm_cli.errors import ResourceError, TrtllmError, UnsupportedError, UsageError
from trtllm_cli.graph import Graph
from trtllm_cli.kernels.cuda.driver import gpu_arch
from trtllm_cli.kernels.cuda.kernel import ARCHITECTURES
from trtllm_cli.kernels.linear_format import DEFAULT_GROUP_SIZE, INT8_GROUP_SIZE
from trtllm_cli.kernels.rope_spec import RopeSpec
from trtllm_cli.machine import available_cores
from trtllm_cli.models import Define, load_model_file, model_file_error, trace_model
from trtllm_cli.models.tensors import check_tensors
from trtllm_cli.tensor_file import total_bytes
from trtllm_cli.version import __version__

if TYPE_CHECKING:
    from trtllm_cli.build.backends.cuda_tactics import LinearTactics
    from trtllm_cli.build.timing_cache import TimingCache
    from trtllm_cli.mapping import Rank
    from trtllm_cli.model_config import ModelConfig


DEFAULT_MAX_SEQ_LEN = 4096  # tokens, where the model itself allows more
# On a CPU, a prefill chunk keeps the caches busy and the others' latency low; a GPU wants many rows at once.
DEFAULT_MAX_NUM_TOKENS = {"cpu": 512, "cuda": 8192}
DEFAULT_MAX_BATCH_SIZE = {"cpu": 8, "cuda": 256}
DEFAULT_TOKENS_PER_BLOCK = {"cpu": 32, "cuda": 64}
DEFAULT_ARCH = "sm_90a"


@dataclass(frozen=True)
class BuildOptions:
    """What `trtllm build` may be told. None: chosen from the checkpoint."""

    backend: Backend | None = None  # None: cuda where there is an NVIDIA GPU
    arch: str | None = None  # cuda backend: what to compile for
    max_batch_size: int | None = None
    max_seq_len: int | None = None
    max_num_tokens: int | None = None
    max_input_len: int | None = None
    tokens_per_block: int | None = None
    weight_dtype: WeightDType | None = None
    group_size: int | None = None
    kv_cache_dtype: KvCacheDType | None = None
    kernels: str = "auto"  # cpu backend: "native", "torch", or the faster by timing
    model_file: Path | None = None
    input_timing_cache: Path | None = None  # cuda backend: see timing_cache.py
    output_timing_cache: Path | None = None
    fixed_tactics: bool = False  # cuda backend: nothing is left to the first load on a GPU
    workers: int | None = None  # ranks that are packed side by side, a thread each; the files are the same for any
    force: bool = False


@dataclass(frozen=True)
class BuildPlan:
    """Everything that is decided before any weight is read; what --dry-run prints."""

    checkpoint: Checkpoint
    backend: Backend
    build_config: BuildConfig
    graphs: list[Graph]
    lowered: list[Lowered]
    notes: list[str] = field(default_factory=list)  # choices a user should know of
    timing_cache: TimingCache | None = None  # cuda backend: all that is known


@dataclass(frozen=True)
class BuildReport:
    """What a build wrote."""

    output_dir: Path
    plan: BuildPlan
    engine_bytes: int
    seconds: float


def plan_build(checkpoint_dir: Path, options: BuildOptions, working: Working | None = None) -> BuildPlan:
    """Traces, rewrites and lowers every rank. Reads no weights and writes nothing but what the user's cache keeps."""
    options = with_defaults(options)
    assert options.backend is not None
    checkpoint = Checkpoint.open(checkpoint_dir)
    config = checkpoint.config
    notes: list[str] = []
    build_config = resolve(config, options, notes)
    define = load_model_file(options.model_file) if options.model_file else None
    tactics = _tactics(options) if options.backend == "cuda" else None
    graphs, lowered = [], []
    for rank in config.mapping.ranks:
        traced = _trace(config, rank, define, options)
        with checkpoint.tensors(rank) as file:
            check_tensors(traced, file)
        kv_quant = build_config.kv_cache_dtype if build_config.kv_cache_dtype in ("int8", "fp8") else None
        graph = run_passes(quantize_kv_cache(traced, kv_quant), PASSES if options.backend == "cpu" else CUDA_PASSES)
        graphs.append(graph)
        lowered.append(_lower(graph, config, build_config, options, rank.rank, tactics, working))
    notes += tactics.notes if tactics else []
    for stored, count in lowered[0].notes.get("in_bfloat16", {}).items():
        notes.append(f"linears: {count} become bfloat16, as there is no GPU kernel for {stored}")
    timing_cache = tactics.cache if tactics else None
    return BuildPlan(checkpoint, options.backend, build_config, graphs, lowered, notes, timing_cache)


def build(
    checkpoint_dir: Path,
    output_dir: Path,
    options: BuildOptions,
    progress: Progress | None = None,
    working: Working | None = None,
) -> BuildReport:
    """Compiles a checkpoint into an engine directory. Raises a TrtllmError and leaves nothing where it cannot."""
    from trtllm_cli.build.timing_cache import update

    started = time.perf_counter()
    _check_outside(options.output_timing_cache, output_dir)
    with writing(output_dir, force=options.force, source=checkpoint_dir) as partial:
        plan = plan_build(checkpoint_dir, options, working)
        if options.output_timing_cache is not None and plan.timing_cache is not None:
            update(options.output_timing_cache, plan.timing_cache, "--output-timing-cache")
        config = plan.checkpoint.config
        total = sum(total_bytes(lowered.tensors.values()) for lowered in plan.lowered)
        _check_space(partial, total)
        plan.checkpoint.verify()
        ranks = list(zip(config.mapping.ranks, plan.graphs, plan.lowered, strict=True))
        files = write_ranks(plan.checkpoint, ranks, partial, options.workers or available_cores(), progress)
        if plan.checkpoint.tokenizer_dir is not None:
            shutil.copytree(plan.checkpoint.tokenizer_dir, partial / TOKENIZER)
        first = plan.lowered[0]
        engine_config = EngineConfig(
            format_version=FORMAT_VERSION,
            version=__version__,
            backend=plan.backend,
            target=first.target,
            pretrained_config=config,
            build_config=plan.build_config,
            rank_files=files,
            notes=first.notes,
        )
        write_config(partial, engine_config)
        engine_bytes = sum(f.size for f in files)
    return BuildReport(output_dir, plan, engine_bytes, time.perf_counter() - started)


def with_defaults(options: BuildOptions) -> BuildOptions:
    """The options with everything that follows from the machine and the backend."""
    gpu = gpu_arch() if options.backend != "cpu" else None
    backend: Backend = options.backend or ("cuda" if gpu else "cpu")
    if backend == "cpu" and options.arch:
        raise UsageError("--arch is for GPUs, and this engine is for the CPU", where="--arch", fix="add --backend cuda")
    for name in ("input_timing_cache", "output_timing_cache", "fixed_tactics"):
        if backend == "cpu" and getattr(options, name):
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"{flag} is for GPUs, and this engine is for the CPU", where=flag, fix="add --backend cuda"
            )
    arch = (options.arch or gpu or DEFAULT_ARCH) if backend == "cuda" else None
    if arch is not None and arch not in ARCHITECTURES:
        near = {name.rstrip("a"): name for name in ARCHITECTURES}
        arch = near.get(arch, arch)
        if arch not in ARCHITECTURES:
            raise UsageError(
                f"{arch!r} is no GPU architecture that engines can be built for", where="--arch",
                fix=f"give one of {', '.join(ARCHITECTURES)}",
            )  # fmt: skip
    batch = DEFAULT_MAX_BATCH_SIZE[backend] if options.max_batch_size is None else options.max_batch_size
    block = DEFAULT_TOKENS_PER_BLOCK[backend] if options.tokens_per_block is None else options.tokens_per_block
    return replace(options, backend=backend, arch=arch, max_batch_size=batch, tokens_per_block=block)


def resolve(config: ModelConfig, options: BuildOptions, notes: list[str]) -> BuildConfig:
    """The engine's limits and dtypes: what was asked, else what fits the model. Raises UsageError for nonsense."""
    options = with_defaults(options)
    assert options.backend is not None
    assert options.max_batch_size is not None
    _check_limits(config, options)
    longest = _longest(config)
    max_seq_len = options.max_seq_len or min(longest, DEFAULT_MAX_SEQ_LEN)
    if max_seq_len > longest:
        raise UsageError(
            f"max_seq_len {max_seq_len} is more than the {longest} positions that the model was made for",
            where="--max-seq-len",
            fix=f"pass at most {longest}",
        )
    if options.max_seq_len is None and longest > max_seq_len:
        notes.append(f"max_seq_len {max_seq_len}: the model allows {longest}; pass --max-seq-len for more")
    max_input_len = options.max_input_len or max_seq_len
    if max_input_len > max_seq_len:
        raise UsageError(
            f"max_input_len {max_input_len} is more than max_seq_len {max_seq_len}, which counts prompt and output",
            where="--max-input-len",
            fix=f"pass at most {max_seq_len}, or a larger --max-seq-len",
        )
    prompt_limit = RopeSpec.of(config).max_prompt_len
    if prompt_limit is not None and max_input_len > prompt_limit:
        if options.max_input_len:
            raise UnsupportedError(
                f"prompts of more than {prompt_limit} tokens are not supported for this model's rope scaling "
                f"({config.rotary_scaling.rope_type if config.rotary_scaling else ''}): "
                "its angles then depend on the prompt's length",
                where="--max-input-len",
                fix=f"pass at most {prompt_limit}",
            )
        max_input_len = prompt_limit
        notes.append(f"max_input_len {max_input_len}: longer prompts would need other rotary angles")
    weight_dtype = _weight_dtype(config, options, notes)
    if config.logits_dtype != "float32":
        notes.append(f"logits are float32: the checkpoint's logits_dtype, {config.logits_dtype}, would only round them")
    values = {
        "max_batch_size": options.max_batch_size,
        "max_seq_len": max_seq_len,
        "max_num_tokens": options.max_num_tokens
        or max(DEFAULT_MAX_NUM_TOKENS[options.backend], options.max_batch_size),
        "max_input_len": max_input_len,
        "tokens_per_block": options.tokens_per_block,
        "weight_dtype": weight_dtype,
        "group_size": _group_size(weight_dtype, options),
        "kv_cache_dtype": _kv_cache_dtype(config, options, weight_dtype, notes),
    }
    try:
        return BuildConfig.model_validate(values)
    except ValueError as e:
        from trtllm_cli.artifact import describe

        raise UsageError(describe(e)) from None  # type: ignore[arg-type]


def _trace(config: ModelConfig, rank: Rank, define: Define | None, options: BuildOptions) -> Graph:
    """The graph of a rank; what the user's own model file raises is theirs to mend."""
    if define is None:
        return trace_model(config, rank)
    try:
        return trace_model(config, rank, define)
    except TrtllmError:
        raise
    except Exception as e:
        raise model_file_error(e, options.model_file) from e


LIMITS = {"max_batch_size": 1 << 16, "max_num_tokens": 1 << 20, "tokens_per_block": 1 << 16}  # what kernels count to


def _check_limits(config: ModelConfig, options: BuildOptions) -> None:
    """Raises UsageError for a number that is none, or that no machine could run."""
    limits = ("max_batch_size", "max_seq_len", "max_num_tokens", "max_input_len", "tokens_per_block", "group_size")
    for name in (*limits, "workers"):
        value, flag = getattr(options, name), "--" + name.replace("_", "-")
        least = 0 if name == "group_size" else 1
        if value is not None and value < least:
            raise UsageError(f"{name} is {value}, it must be at least {least}", where=flag, fix=f"give {least} or more")
        if value is not None and value > (most := LIMITS.get(name, value)):
            raise UsageError(f"{name} is {value}, it can be at most {most}", where=flag, fix=f"give at most {most}")
    narrow = min(config.hidden_size, config.intermediate_size)
    if options.group_size is not None and options.group_size > narrow:
        raise UsageError(
            f"group_size {options.group_size} is more than the {narrow} inputs of the model's narrowest layers",
            where="--group-size",
            fix=f"give at most {narrow}; 32, 64 and 128 are usual",
        )
    tokens, batch = options.max_num_tokens, options.max_batch_size
    if tokens is not None and batch is not None and tokens < batch:
        raise UsageError(
            f"max_num_tokens {tokens} is less than max_batch_size {batch}: "
            "a step could not hold one token of each request",
            where="--max-num-tokens",
            fix=f"give at least {batch}, or a smaller --max-batch-size",
        )


def _longest(config: ModelConfig) -> int:
    """Positions that the model was made for."""
    scaling = config.rotary_scaling
    if scaling is None or scaling.factor is None or scaling.rope_type not in ("linear", "dynamic", "yarn"):
        return config.max_position_embeddings
    original = scaling.original_max_position_embeddings or config.max_position_embeddings
    return max(config.max_position_embeddings, int(original * scaling.factor))


def _group_size(weight_dtype: WeightDType, options: BuildOptions) -> int | None:
    """Inputs that share a scale in the weights that the build quantizes; None: an output's all do."""
    match weight_dtype, options.group_size:
        case "int4", 0:
            raise UsageError("int4 weights need groups", where="--group-size", fix="give 32, 64 or 128")
        case (("int4" | "int8"), None):
            if weight_dtype == "int8":
                return INT8_GROUP_SIZE
            return 2 * INT8_GROUP_SIZE if options.backend == "cuda" else DEFAULT_GROUP_SIZE
        case (("int4" | "int8"), size):
            return size or None
        case _, None:
            return None
    raise UsageError(
        f"group_size is for weights that the build makes int8 or int4, these are {weight_dtype}", where="--group-size"
    )


def _weight_dtype(config: ModelConfig, options: BuildOptions, notes: list[str]) -> WeightDType:
    """The dtype of the layers that the checkpoint has not quantized; those that it has stay as they are."""
    if config.quantization.is_quantized and options.weight_dtype in ("int8", "int4"):
        raise UsageError(
            f"the checkpoint's weights are quantized already ({config.quantization.quant_algo})",
            where="--weight-dtype",
            fix="leave the flag out, or convert again without --qformat",
        )
    if options.backend == "cuda":
        if options.weight_dtype == "float32":
            raise UsageError(
                "GPU engines compute in bfloat16, or in what the weights are quantized to", where="--weight-dtype",
                fix="give bfloat16, int8 or int4, or leave the flag out",
            )  # fmt: skip
        if options.weight_dtype is None and config.dtype != "bfloat16":
            notes.append(f"{config.dtype} weights become bfloat16, which is what GPU engines compute in")
        return options.weight_dtype or "bfloat16"
    if options.weight_dtype is not None:
        return options.weight_dtype
    if config.dtype == "float16":
        notes.append("float16 weights become bfloat16: CPUs compute float16 slowly (--weight-dtype float32 keeps all)")
        return "bfloat16"
    return config.dtype


def _kv_cache_dtype(
    config: ModelConfig, options: BuildOptions, weight_dtype: WeightDType, notes: list[str]
) -> KvCacheDType:
    """As the checkpoint has scales for, else as asked, else as wide as the weights allow."""
    algo, asked = config.quantization.kv_cache_quant_algo, options.kv_cache_dtype
    where, requantize = "config.json: quantization.kv_cache_quant_algo", "quantize again with --kv-cache-dtype fp8"
    match algo:
        case "FP8" | "INT8":
            found: KvCacheDType = "fp8" if algo == "FP8" else "int8"
            if asked not in (None, found):
                raise UsageError(
                    f"the checkpoint's KV cache is {found} ({where} is {algo}), not {asked}",
                    where="--kv-cache-dtype",
                    fix="leave the flag out, or quantize the model again with the KV cache that you want",
                )
            return found
        case "NVFP4":
            raise UnsupportedError(f"a KV cache in {algo} is not supported", where=where, fix=requantize)
    if asked == "int8":
        raise UsageError(
            "an int8 KV cache needs scales that the checkpoint does not have",
            where="--kv-cache-dtype",
            fix="quantize with --kv-cache-dtype int8, which finds them; or pass fp8, which can do without",
        )
    if asked == "fp8":
        notes.append("KV cache in fp8 with scale 1: the checkpoint has none (quantize with --kv-cache-dtype fp8)")
    return asked or ("float32" if weight_dtype == "float32" else "bfloat16")


def _lower(
    graph: Graph,
    config: ModelConfig,
    build_config: BuildConfig,
    options: BuildOptions,
    rank: int,
    tactics: LinearTactics | None,
    working: Working | None,
) -> Lowered:
    match options.backend:
        case "cpu":
            from trtllm_cli.build.backends.cpu import lower

            return lower(graph, config, build_config, kernels=options.kernels)
        case "cuda":
            from trtllm_cli.build.backends.cuda import lower as lower_cuda

            return lower_cuda(graph, config, build_config, options.arch or DEFAULT_ARCH, rank, tactics, working)
        case None:
            raise AssertionError("see with_defaults")


def _tactics(options: BuildOptions) -> LinearTactics:
    """What chooses the linears' tactics. Raises TimingCacheError for a file that is there and no timing cache."""
    from trtllm_cli.build import timing_cache
    from trtllm_cli.build.backends import cuda_timing
    from trtllm_cli.build.backends.cuda_tactics import LinearTactics

    given, out = options.input_timing_cache, options.output_timing_cache
    if out is not None and os.path.exists(out):
        timing_cache.read(out)  # now, and not when the times are there that it should get
    assert options.arch is not None
    cache = timing_cache.read(given) if given is not None else None
    return LinearTactics(options.arch, cache, cuda_timing.find_timer(options.arch), options.fixed_tactics)


def _check_outside(timing_cache: Path | None, output_dir: Path) -> None:
    """Raises UsageError for a timing cache that would be in the engine, which is replaced whole."""
    if timing_cache is not None and Path(os.path.realpath(timing_cache)).is_relative_to(os.path.realpath(output_dir)):
        raise UsageError(
            f"the timing cache {timing_cache} would be in the engine {output_dir}", where="--output-timing-cache",
            fix="give a path outside of it",
        )  # fmt: skip


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ResourceError(
            f"the engine needs {human_bytes(needed)}, {directory.parent} has {human_bytes(free)} free",
            fix="free some room, or choose another --output-dir",
        )
