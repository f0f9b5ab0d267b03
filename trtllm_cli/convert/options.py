"""What `convert` is asked for, and what it says that it did."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from trtllm_cli.convert.quantize.formats import CALIBRATED, KvCache, QFormat, qformat_named
from trtllm_cli.errors import UsageError
from trtllm_cli.model_config import DType


@dataclass(frozen=True)
class RandomWeights:
    """That the source is a config.json alone, and its weights are made up; see random_weights.py."""

    seed: int = 0
    num_layers: int | None = None  # None: as many as the config says


@dataclass(frozen=True)
class ConvertOptions:
    """What the flags of `trtllm convert` say."""

    dtype: DType | Literal["auto"] = "auto"
    tp_size: int = 1
    pp_size: int = 1
    moe_tp_size: int | None = None  # None: tp_size, over moe_ep_size
    moe_ep_size: int | None = None  # None: what is left of tp_size, 1 without moe_tp_size
    use_parallel_embedding: bool = False
    embedding_sharding_dim: Literal[0, 1] = 0
    qformat: QFormat | None = None
    group_size: int | None = None  # None: the format's own
    exclude: tuple[str, ...] = ()  # patterns of layers that stay as they are
    quantize_lm_head: bool = False
    kv_cache: KvCache | None = None
    dequantize: bool = False  # a source that is quantized already is made plain first
    keep_quantized: bool = False  # a GGUF file's Q4_0, Q4_1 and Q8_0 weights stay as they are
    random: RandomWeights | None = None
    force: bool = False
    workers: int | None = None  # weights that are worked on side by side; None: 1, of random ones as many as cores
    resume: bool = True  # what an interrupted run of the same command left is used

    @property
    def calibrates(self) -> bool:
        """Whether it takes calibration: `quantize`, not `convert`. Raises UsageError for a format that there is not."""
        calibrated = self.qformat is not None and qformat_named(self.qformat) in CALIBRATED
        return self.random is None and (self.kv_cache is not None or calibrated)

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
            ("--tp-size", self.tp_size), ("--pp-size", self.pp_size), ("--moe-tp-size", self.moe_tp_size),
            ("--moe-ep-size", self.moe_ep_size), ("--group-size", self.group_size), ("--workers", self.workers),
        ):  # fmt: skip
            if number is not None and number < 1:
                raise UsageError(f"{flag} is {number}", where=flag, fix="give 1 or more")
        if self.random is not None and self.random.seed < 0:
            raise UsageError(f"--seed is {self.random.seed}", where="--seed", fix="give 0 or more")


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
    moe_tp_size: int  # ranks that share an expert; of no meaning without experts
    moe_ep_size: int  # ranks among which the experts are divided
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
