"""The rows of the H200 table: other engines' figures, the goals, and floors reckoned from bytes and operations.

    python -m benchmarks.h200.floors        # the table of NOTES.md

A floor is the time that a perfect engine would take at the ceilings measured on an H200: what a step reads from memory
at the bandwidth of a copy, its products at the rate of large dense ones, one part of a layer after the other. Nothing
is allowed for launches, for activations, or for anything that the host does.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.common import say, table

BANDWIDTH = 4.3e12  # bytes/s, read and written, of a copy
BF16_RATE, FP8_RATE = 790e12, 1400e12  # dense FLOP/s
PEAK_BF16 = 989e12  # FLOP/s on paper: what published shares of peak are of
HOST_BANDWIDTH = 55e9  # bytes/s, from pinned host memory: results/gpu_links_h200.md
MEMORY = (139.8 * 2**30) * 0.94  # bytes, less what the driver and the libraries take
VOCAB = 128256


@dataclass(frozen=True)
class Model:
    """Llama's sizes: all that bytes and operations depend on."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    tied: bool = False

    @property
    def linears(self) -> int:
        """Parameters of all layers' linears."""
        width = self.heads * self.head_dim
        qkv = self.hidden * (width + 2 * self.kv_heads * self.head_dim)
        return self.layers * (qkv + width * self.hidden + 3 * self.hidden * self.inner)

    @property
    def linears_of_prompts(self) -> int:
        """Of these what a token meets whose logits nobody wants: in the last layer those of its key and value."""
        return self.linears * (self.layers - 1) // self.layers + 2 * self.hidden * self.kv_heads * self.head_dim

    @property
    def head(self) -> int:
        """Parameters of the head."""
        return self.hidden * VOCAB

    def kv_bytes(self, kv: str) -> int:
        """Of one token's keys and values, all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * (2 if kv == "bf16" else 1)


MODELS = {
    "8b": Model(4096, 32, 32, 8, 128, 14336),
    "1b": Model(2048, 16, 32, 8, 64, 8192, tied=True),
    "70b": Model(8192, 80, 64, 8, 128, 28672),
}
# Bytes of a linear's parameter, scales included, and the rate of its products where there are many tokens.
FORMATS = {
    "bf16": (2.0, BF16_RATE),
    "fp8": (1.0, FP8_RATE),
    "fp8_pc_pt": (1.0, FP8_RATE),
    "int4": (0.5 + 2 / 128, BF16_RATE),
    "int8": (1.0, BF16_RATE),
}


@dataclass(frozen=True)
class Workload:
    """Requests that all come at once; lengths in tokens."""

    requests: int
    full: int  # requests that fill the engine several times over: those of TensorRT-LLM's published figures
    prompt: int
    output: int


# As many as fill the engine: with 2048 out, all that the cache has room for. In full: docs/source/performance/
# perf-overview.md of TensorRT-LLM 1.0.
WORKLOADS = {
    "batch64": Workload(64, 64, 128, 128),
    "sat-128-128": Workload(2048, 30000, 128, 128),
    "sat-1000-1000": Workload(600, 3000, 1000, 1000),
    "sat-2048-128": Workload(512, 3000, 2048, 128),
    "sat-2048-2048": Workload(440, 1500, 2048, 2048),
}


@dataclass(frozen=True)
class Peers:
    """What others reach with the 8B shape: vLLM 0.24.0 measured on the same machine, TensorRT-LLM as published."""

    unit: str
    vllm: float | None
    tensorrt_llm: float | None
    goal: float | None
    note: str = ""

    @property
    def is_time(self) -> bool:
        """Whether less is better."""
        return not self.unit.startswith("tok")

    def ahead(self, value: float, other: float | None) -> float | None:
        """How many times better than another figure: above 1 is ahead, for times and for rates."""
        if other is None:
            return None
        return other / value if self.is_time else value / other


# Unit, vLLM's figure, TensorRT-LLM's, and the goal: to lead, by a clear margin at batch 1.
PEERS = {
    ("decode-1", "bf16"): Peers("ms/token", 4.92, None, 4.0),
    ("decode-1", "fp8"): Peers("ms/token", 3.45, None, 2.2),
    ("decode-1", "int4"): Peers("ms/token", None, None, 1.6),
    ("ttft-128", "bf16"): Peers("ms", 8.9, None, 8.9),
    ("ttft-128", "fp8"): Peers("ms", 6.7, 5.7, 4.5, "TensorRT-LLM: a 7B"),
    ("ttft-2048", "bf16"): Peers("ms", 48.0, None, 44),
    ("ttft-2048", "fp8"): Peers("ms", 30.9, 30.0, 27, "TensorRT-LLM: a 7B"),
    ("batch64", "bf16"): Peers("tok/s", 8408, None, 8408),
    ("batch64", "fp8"): Peers("tok/s", 11894, 10907, 17000, "TensorRT-LLM: GPT-J 6B on an H100"),
    ("sat-128-128", "bf16"): Peers("tok/s", 15912, None, 15912),
    ("sat-128-128", "fp8"): Peers("tok/s", 23035, 29526, 30000),
    ("sat-1000-1000", "fp8"): Peers("tok/s", 11496, 17744, 18000, "vLLM: bf16 KV cache"),
    ("sat-2048-128", "fp8"): Peers("tok/s", None, 3794, 4000),
    ("sat-2048-2048", "fp8"): Peers("tok/s", None, 12194, 12500),
    ("start", "bf16"): Peers("s", 53, None, 8, "vLLM: to ready"),
    ("start", "fp8"): Peers("s", 70, None, 8, "vLLM: to ready; TensorRT-LLM: 177 s of build before"),
}
UNITS = {"decode-1": "ms/token", "ttft-128": "ms", "ttft-2048": "ms", "start": "s"}


def peers(case: str, shape: str, fmt: str) -> Peers:
    """The figures to be beside; none where the model or the format is another."""
    family = "fp8" if fmt.startswith("fp8") else fmt
    known = PEERS.get((case, family)) if shape == "8b" else None
    return known or Peers(UNITS.get(case, "tok/s"), None, None, None)


# --- floors, in seconds


def linears(model: Model, fmt: str, tokens: float, without_logits: float = 0) -> float:
    """All layers' linears: reading the weights, or multiplying, whichever takes longer."""
    size, rate = FORMATS[fmt]
    products = model.linears * tokens + model.linears_of_prompts * without_logits
    return max(model.linears * size / BANDWIDTH, 2 * products / rate)


def head(model: Model, logits: float) -> float:
    """The head, in bfloat16."""
    return max(model.head * 2 / BANDWIDTH, 2 * model.head * logits / BF16_RATE)


def causal_flops(model: Model, length: int) -> float:
    """Of the layers' attention of a whole prompt, but for the last one's; the hidden half left out."""
    return 4 * (model.layers - 1) * model.heads * model.head_dim * length * (length + 1) / 2


def prefill(model: Model, fmt: str, prompts: float, length: int) -> float:
    """Whole prompts, and the first token of each."""
    attention = prompts * causal_flops(model, length) / BF16_RATE
    return linears(model, fmt, prompts, prompts * (length - 1)) + attention + head(model, prompts)


def decode(model: Model, fmt: str, kv: str, batch: float, context: float) -> float:
    """One token each of `batch` sequences with `context` tokens in the cache."""
    return linears(model, fmt, batch) + head(model, batch) + batch * context * model.kv_bytes(kv) / BANDWIDTH


def most_at_once(model: Model, fmt: str, kv: str, length: int) -> int:
    """Sequences of `length` tokens whose cache fits beside the weights."""
    embedding = 0 if model.tied else model.head * 2
    weights = model.linears * FORMATS[fmt][0] + model.head * 2 + embedding
    return int((MEMORY - weights) / (length * model.kv_bytes(kv)))


def throughput(model: Model, fmt: str, kv: str, work: Workload, most: int, requests: int | None = None) -> float:
    """Output tokens/s: as few waves of as many requests each as fit, prompts first, then a token each a step."""
    left = requests or work.full
    fit = max(1, min(most, most_at_once(model, fmt, kv, work.prompt + work.output)))
    seconds, tokens = 0.0, left * work.output
    for waves in range(-(-left // fit), 0, -1):
        batch = -(-left // waves)
        steps = work.output - 1  # the prefill gives the first
        context = work.prompt + work.output / 2
        seconds += prefill(model, fmt, batch, work.prompt) + steps * decode(model, fmt, kv, batch, context)
        left -= batch
    return tokens / seconds


def start(model: Model, fmt: str) -> float:
    """Copying the weights to the GPU, and nothing else."""
    embedding = 0 if model.tied else model.head * 2
    return (model.linears * FORMATS[fmt][0] + model.head * 2 + embedding) / HOST_BANDWIDTH


def floor(case: str, shape: str, fmt: str, kv: str = "bf16", most: int = 1024, requests: int | None = None) -> float:
    """A row's floor, in the row's unit."""
    model = MODELS[shape]
    if case == "decode-1":
        return decode(model, fmt, kv, 1, 0) * 1e3
    if case == "start":
        return start(model, fmt)
    if case.startswith("ttft-"):
        return prefill(model, fmt, 1, int(case.removeprefix("ttft-"))) * 1e3
    return throughput(model, fmt, kv, WORKLOADS[case], most, requests)


# --- tables


def figure(value: float | None) -> str:
    """A number as tables have it: three digits and more."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value < 100 else f"{value:.0f}"


# Case, format, cache.
ROWS = [
    ("decode-1", "bf16", "bf16"), ("decode-1", "fp8", "bf16"), ("decode-1", "int4", "bf16"),
    ("ttft-128", "bf16", "bf16"), ("ttft-128", "fp8", "bf16"),
    ("ttft-2048", "bf16", "bf16"), ("ttft-2048", "fp8", "bf16"),
    ("batch64", "bf16", "bf16"), ("batch64", "fp8", "fp8"),
    ("sat-128-128", "bf16", "bf16"), ("sat-128-128", "fp8", "fp8"),
    ("sat-1000-1000", "fp8", "fp8"), ("sat-2048-128", "fp8", "fp8"), ("sat-2048-2048", "fp8", "fp8"),
    ("start", "bf16", "bf16"), ("start", "fp8", "bf16"),
]  # fmt: skip


def markdown() -> str:
    """Every row's floor beside the peers."""
    rows = []
    for case, fmt, kv in ROWS:
        known = peers(case, "8b", fmt)
        short = figure(floor(case, "8b", fmt, kv, requests=WORKLOADS[case].requests)) if case in WORKLOADS else ""
        figures = map(figure, (known.goal, known.vllm, known.tensorrt_llm))
        rows.append([case, fmt, kv, known.unit, *figures, figure(floor(case, "8b", fmt, kv)), short])
    headings = ["row", "weights", "KV", "unit", "goal", "vLLM", "TensorRT-LLM", "floor", "floor of the short run"]
    return table(headings, rows)


if __name__ == "__main__":
    say(markdown())
