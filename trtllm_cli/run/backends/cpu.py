"""The cpu backend at run time: maps the engine's weights, resolves the plan's addresses, and runs steps in C++.

Nothing here imports torch, unless the engine was built with `--kernels torch`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from trtllm_cli.artifact import human_bytes
from trtllm_cli.engine import KERNELS, tensor_view
from trtllm_cli.errors import EngineError, ResourceError
from trtllm_cli.kernels.cpu import compiler, library
from trtllm_cli.kernels.cpu.attention_steps import copy_block, kv_bytes_per_block
from trtllm_cli.kernels.cpu.steps import STEPS
from trtllm_cli.tensor_file import TensorFile

if TYPE_CHECKING:
    from trtllm_cli.engine import Engine
    from trtllm_cli.mapping import Rank
    from trtllm_cli.run.backends import Runner
    from trtllm_cli.run.communicator import Communicator
    from trtllm_cli.run.model_inputs import ModelInputs

COLLECTIVES = ("all_reduce", "all_gather", "send", "recv")
ALIGNMENT = 64  # bytes
MOST_STEPS = 16  # computed at a time where there are other ranks, to which messages are under way


def load(engine: Engine, rank: Rank, comm: Communicator, num_threads: int) -> Runner:
    """The runner of a cpu engine. Raises EngineError when it was compiled for another processor."""
    target = engine.config.target
    if target.get("kernels") == "torch":
        from trtllm_cli.run.backends.cpu_torch import TorchRunner

        return TorchRunner(engine, rank, comm, num_threads=num_threads)
    arch, features = target.get("arch", ""), target.get("features", "").split()
    rebuild = f"build it here: trtllm build --checkpoint-dir CKPT --output-dir {engine.path} --force"
    if arch != compiler.host_arch():
        raise EngineError(
            f"the engine was compiled for {arch}, this machine is {compiler.host_arch()}",
            where=str(engine.path / "config.json"),
            fix=rebuild,
        )
    if missing := compiler.missing_features(features):
        raise EngineError(
            f"the engine was compiled for a processor with {' '.join(features)}; this one has no {' '.join(missing)}",
            where=str(engine.path / "config.json"),
            fix=rebuild,
        )
    return CpuRunner(engine, rank, comm, num_threads=num_threads)


class CpuRunner:
    """One rank's native program. `close` it, or its threads live on."""

    def __init__(self, engine: Engine, rank: Rank, comm: Communicator, *, num_threads: int) -> None:
        self._comm = comm
        self._limits = engine.config.build_config
        self._file = engine.tensors(rank)
        try:
            self._plan = engine.plan(self._file)
            self._weights = _Weights(self._file)
            self._buffers = self._allocate_buffers()
            lib = library.Library.load(tensor_view(self._file, KERNELS))
            self._pool = lib.pool(num_threads)
            comm.activity.kernels = self._pool.progress
        except BaseException:
            self._file.close()
            raise
        self._kv: npt.NDArray[np.uint8] | None = None
        self._kv_layer_bytes = self._block_bytes_a_layer()
        self._num_blocks = 0
        self._program: list[_Segment] = []
        out = self._plan["output"]
        self._output = None if out is None else self._buffers[int(out[2:])]

    @property
    def num_threads(self) -> int:
        """Threads that compute."""
        return self._pool.num_threads

    @property
    def bytes_per_block(self) -> int:
        """See Runner."""
        return sum(self._kv_layer_bytes)

    def allocate_kv_cache(self, num_blocks: int) -> None:
        """See Runner. Pages are touched only when they are written."""
        try:
            self._kv = _zeros(num_blocks * self.bytes_per_block)
        except MemoryError:
            raise ResourceError(
                f"no memory for the KV cache: {human_bytes(num_blocks * self.bytes_per_block)} "
                f"({num_blocks} blocks of {human_bytes(self.bytes_per_block)})",
                where="--kv-cache-memory",
                fix="give --kv-cache-memory less, or rebuild the engine with a lower --max-batch-size or --max-seq-len",
            ) from None
        self._num_blocks = num_blocks
        self._program = self._resolve()

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """See Runner."""
        for layer, size in enumerate(self._kv_layer_bytes):
            for source, destination in pairs:
                copy_block(self._cache(layer), size, source, destination)

    def forward(self, inputs: ModelInputs) -> npt.NDArray[np.float32] | None:
        """See Runner."""
        assert self._program, "allocate_kv_cache comes first"
        assert inputs.num_tokens <= self._limits.max_num_tokens
        assert len(inputs.logits_indices) <= self._limits.max_batch_size
        batch = library.TlBatch.of(inputs)
        rows = {"num_tokens": inputs.num_tokens, "num_logits": len(inputs.logits_indices)}
        for segment in self._program:
            self._comm.push()
            if segment.steps is not None:
                self._pool.run(segment.steps, batch)
            else:
                self._communicate(segment.collective, rows)
        if self._output is None:
            return None
        width = self._plan["output_width"]
        logits = self._output[: rows["num_logits"] * width].reshape(-1, width)
        return logits[:, : self._plan["vocab_size"]]

    def close(self) -> None:
        """See Runner."""
        self._comm.activity.kernels = None
        self._pool.close()
        self._file.close()

    def _allocate_buffers(self) -> list[npt.NDArray[np.float32]]:
        sizes = {"num_tokens": self._limits.max_num_tokens, "num_logits": self._limits.max_batch_size}
        nbytes = [sizes[b["rows"]] * b["width"] * 4 for b in self._plan["buffers"]]
        try:
            return [_zeros(n).view(np.float32) for n in nbytes]
        except MemoryError:
            limits = self._limits
            raise ResourceError(
                f"no memory for the activations: {human_bytes(sum(nbytes))} for max_num_tokens {limits.max_num_tokens} "
                f"and max_batch_size {limits.max_batch_size}",
                fix="rebuild the engine with a lower --max-num-tokens and --max-batch-size",
            ) from None

    def _block_bytes_a_layer(self) -> list[int]:
        sizes = {}
        for step in self._plan["steps"]:
            if step["op"] == "paged_attention":
                a = step["args"]
                sizes[int(a["cache"][3:])] = kv_bytes_per_block(
                    a["num_kv_heads"], a["head_dim"], a["block_size"], a["cache_dtype"], a.get("v_head_dim")
                )
        return [sizes[layer] for layer in range(len(sizes))]

    def _cache(self, layer: int) -> int:
        """Address of a layer's KV cache."""
        assert self._kv is not None
        return self._kv.ctypes.data + sum(self._kv_layer_bytes[:layer]) * self._num_blocks

    def _resolve(self) -> list[_Segment]:
        """The plan's steps with addresses for names, cut where ranks talk."""
        program: list[_Segment] = []
        run: list[library.TlStep] = []
        most = MOST_STEPS if self._comm.world_size > 1 else len(self._plan["steps"])
        for step in self._plan["steps"]:
            is_collective = step["op"] in COLLECTIVES
            if run and (is_collective or len(run) == most):
                program.append(_Segment(library.plan(run), {}))
                run = []
            if is_collective:
                program.append(_Segment(None, step))
            else:
                run.append(STEPS[step["op"]](**{k: self._address(v) for k, v in step["args"].items()}))
        if run:
            program.append(_Segment(library.plan(run), {}))
        return program

    def _address(self, value: Any) -> Any:
        """The address behind "b:N", "w:NAME" or "kv:N"; any other value is itself."""
        if not isinstance(value, str) or ":" not in value:
            return value
        kind, _, name = value.partition(":")
        if kind == "b":
            return self._buffers[int(name)].ctypes.data
        return self._cache(int(name)) if kind == "kv" else self._weights.address(name)

    def _communicate(self, step: dict[str, Any], rows: dict[str, int]) -> None:
        a = step["args"]
        count, width = rows[a["rows"]], a["width"]
        x = self._buffers[int(a["x"][2:])][: count * width].reshape(count, width)
        match step["op"]:
            case "all_reduce":
                self._comm.all_reduce(x, a["group"])
            case "all_gather":
                out = self._buffers[int(a["out"][2:])]
                gathered = self._comm.all_gather(x, a["group"])
                out[: gathered.size] = gathered.reshape(-1)
            case "send":
                self._comm.send(x, a["to"])
            case "recv":
                self._comm.recv(x, a["source"])


class _Segment:
    """Steps for one call into C++, or one collective between two such calls."""

    def __init__(self, steps: ctypes.Array[library.TlStep] | None, collective: dict[str, Any]) -> None:
        self.steps, self.collective = steps, collective


class _Weights:
    """The engine's tensors, by address in the mapped file: the page cache is the only copy."""

    def __init__(self, file: TensorFile) -> None:
        self._file = file
        self._arrays: dict[str, npt.NDArray[np.uint8]] = {}

    def address(self, name: str) -> int:
        """Where a tensor's bytes begin."""
        if name not in self._arrays:
            self._arrays[name] = np.frombuffer(tensor_view(self._file, name), dtype=np.uint8)
        return self._arrays[name].ctypes.data


def _zeros(nbytes: int) -> npt.NDArray[np.uint8]:
    """Zeroed bytes that begin at a cache line."""
    raw = np.zeros(nbytes + ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes]
