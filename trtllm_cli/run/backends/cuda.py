"""The cuda backend at run time: loads cubins and weights, and enqueues steps. Nothing here compiles anything.

A step is padded to the next of some sizes and is one launch of a CUDA graph, captured when a size is first met. A large
step with prompts is enqueued kernel by kernel, while the device is busy, and captured when its size is met again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from trtllm_cli.engine import KERNELS, tensor_view
from trtllm_cli.errors import EngineError
from trtllm_cli.run.backends.cuda_check import Comparison, checked
from trtllm_cli.run.backends.cuda_device import CudaDevice, Device
from trtllm_cli.run.backends.cuda_inputs import (
    MOST_BANNED,
    InputLayout,
    InputSlot,
    SpecialLayout,
    SpecialSlot,
    count_tokens,
    ragged,
)
from trtllm_cli.run.backends.cuda_products import Chosen, chosen, has_fp8_products
from trtllm_cli.run.backends.cuda_program import Program, key_of, without_peers
from trtllm_cli.run.backends.cuda_settle import settled
from trtllm_cli.run.backends.cuda_weights import DeviceWeights
from trtllm_cli.run.gpu_memory import ALIGNMENT, GpuMemory, GpuNeeds
from trtllm_cli.run.launched import Launched
from trtllm_cli.run.request import Logprob

if TYPE_CHECKING:
    from trtllm_cli.engine import Engine
    from trtllm_cli.mapping import Rank
    from trtllm_cli.run.backends import PendingTokens
    from trtllm_cli.run.communicator import Communicator
    from trtllm_cli.run.model_inputs import IntArray, ModelInputs
    from trtllm_cli.run.request import SamplingParams
    from trtllm_cli.run.sampling_inputs import SamplingInputs

# Sequences of a decode step's graph: a step is padded to the next. Linears take what is padded as well.
GRAPH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, *range(128, 513, 32), *range(576, 1025, 64), 1280, 1536, 1792, 2048)
_SLOW_IN_FP8 = (48,)  # of them: cuBLASLt takes longer than for the next one (an H200's step of 8B 3.58 ms, of 64 3.26)
_MIXED_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)  # of a step with prompts, where tokens are padded
_MOST_AT_ONCE = 512  # tokens of a step with prompts that is captured when it is first met: the host would be too slow
_GRAPH_STEP = 32  # tokens to which such a step is padded, larger ones to twice that
_MOST_GRAPHS = 512  # each holds some hundred nodes
_NO_TOKEN = 2**31 - 1  # where the vocabulary has fewer likely tokens than were asked for; kernels/triton/logprobs.py
_SLOTS = 3  # steps whose inputs are in host memory: two under way, and the one that is being filled


# Tokens, sequences, prompts (0: a decode step), whether some have one token, programs that share the longest's cache.
Padded = tuple[int, int, int, bool, int]


def load(engine: Engine, rank: Rank, comm: Communicator) -> CudaRunner:
    """The runner of a cuda engine, on the GPU that is this process's own.

    Raises EngineError where it was compiled for another GPU, DeviceError without one, ResourceError where there are
    fewer GPUs than ranks on this host.
    """
    launched = Launched.find() if rank.mapping.world_size > 1 else None
    device = CudaDevice(launched.gpu(torch.cuda.device_count()) if launched and torch.cuda.is_available() else 0)
    arch = engine.config.target.get("arch", "")
    if arch != device.driver.arch:
        raise EngineError(
            f"the engine was compiled for {arch}, this GPU ({device.driver.name}) needs {device.driver.arch}",
            where=str(engine.path / "config.json"),
            fix=f"build it again: trtllm build --backend cuda --arch {device.driver.arch} --checkpoint-dir CKPT "
            f"--output-dir {engine.path} --force",
        )
    return CudaRunner(engine, rank, device, comm)


class CudaRunner:
    """One rank's program on one GPU."""

    def __init__(self, engine: Engine, rank: Rank, device: Device, comm: Communicator) -> None:
        self._device, self._rank, self._comm = device, rank, comm
        self._limits = engine.config.build_config
        self._done: list[Callable[[], None]] = [lambda: None] * _SLOTS
        self._turn = 0
        self._num_steps = 0
        self._kv: torch.Tensor | None = None
        self._caches: list[tuple[int, int]] = []  # each layer's k and v: where they begin
        self._programs: dict[Any, Program] = {}
        self._chosen: Chosen = {}
        self._graphs: dict[Padded, Callable[[], None]] = {}
        self._met: set[Padded] = set()
        self.notes: list[str] = []  # for users
        self._file = engine.tensors(rank)
        try:
            self._plan = engine.plan(self._file)
            self._load()
        except BaseException:
            self._file.close()
            raise

    def _load(self) -> None:
        """Kernels and weights, and memory for all but the KV cache."""
        device, limits, plan = self._device, self._limits, self._plan
        self._needs = GpuNeeds.of(plan, self._file.data_bytes, limits)
        self._needs.check_free(*device.free_memory(), limits)
        image = tensor_view(self._file, KERNELS)
        cubins = [bytes(image[k["offset"] : k["offset"] + k["size"]]) for k in plan["kernels"]]
        # Of steps with prompts, and of decode steps, most of whose kernels read ahead of the one in front.
        self._kernels = [
            [
                device.load(kernel, cubin, all_shared=not mixed)
                for kernel, cubin in zip(plan["kernels"], cubins, strict=True)
            ]
            for mixed in (False, True)
        ]
        self._weights = DeviceWeights(device, self._file, self._comm.activity.tick)
        if self._rank.mapping.world_size > 1:
            device.join(self._rank, self._comm)
        self._rows = {"num_tokens": limits.max_num_tokens, "num_logits": limits.max_batch_size}
        sizes = [self._rows[b["rows"]] * b["bytes"] for b in plan["buffers"]]
        whole, parts = self._arena([*sizes, *plan["exchange"].values()], "the activations")
        self._buffers = parts[: len(sizes)]
        self._exchange = dict(zip(plan["exchange"], parts[len(sizes) :], strict=True))
        self._scratch = dict(
            zip(plan["scratch"], self._arena(list(plan["scratch"].values()), "scratch memory")[1], strict=True)
        )
        self.has_peers = self._find_peers(whole)  # whether kernels here write to the memory of other ranks' GPUs
        self._steps = plan["steps"] if self.has_peers else without_peers(plan["steps"])
        self._gpu = f"{device.name}, torch {torch.__version__}"  # what times depend on
        if device.is_checked and not plan["fixed_tactics"]:
            self.choose_algorithms()
        self._steps = settled(self._steps, self._file.metadata["plan"], self._gpu, self._rows, self._measure)
        if device.is_checked:
            comparison = Comparison(plan["kernels"], self._tensor, self._trial)
            with device.active():
                self._steps, self.notes = checked(
                    self._steps, self._file.metadata["plan"], self._gpu, self._rows, comparison
                )
        self._graph_sizes = [n for n in GRAPH_SIZES if n not in _SLOW_IN_FP8 or not has_fp8_products(plan["steps"])]
        self._last = device.empty((limits.max_batch_size + 1) * 4, "the tokens")
        self._last.zero_()
        self._layouts = [InputLayout(limits, mixed=mixed) for mixed in (False, True)]
        self._inputs = [device.empty(layout.size * 4, "a step's inputs").view(torch.int32) for layout in self._layouts]
        self._slots = [
            [InputSlot(device, layout, there) for _ in range(_SLOTS)]
            for layout, there in zip(self._layouts, self._inputs, strict=True)
        ]  # fmt: skip
        self._results = [device.host(limits.max_batch_size * 4).view(torch.int32) for _ in range(_SLOTS)]
        self._special_layout = SpecialLayout(limits)
        self._special = device.empty(self._special_layout.size * 4, "a step's inputs").view(torch.int32)
        self._special_slots = [SpecialSlot(device, self._special_layout, self._special) for _ in range(_SLOTS)]
        self._histories: list[list[torch.Tensor]] = [[] for _ in range(_SLOTS)]  # on their way
        shape = (limits.max_batch_size, 1 + plan["most_logprobs"])
        self._logprobs = [
            [device.host(4 * shape[0] * shape[1]).view(dtype).view(shape) for dtype in (torch.int32, torch.float32)]
            for _ in range(_SLOTS)
        ]  # token ids, and their log probabilities

    def choose_algorithms(self) -> None:
        """Finds what computes the plan's matrix products the fastest, with the weights that are there."""
        with self._device.active():
            self._chosen = chosen(
                self._steps, self._gpu, self._rows, self._device, self._tensor, self._comm.activity.tick
            )  # fmt: skip

    @property
    def bytes_per_block(self) -> int:
        """See Runner."""
        return sum(k + v for k, v in self._plan["kv"])

    def gpu_memory(self) -> GpuMemory:
        """See GpuRunner."""
        free, total = self._device.free_memory()
        return GpuMemory(self._device.name, total, free, self._needs, 0 if self._kv is None else len(self._kv))

    def allocate_kv_cache(self, num_blocks: int) -> None:
        """See Runner. A layer's k, all blocks of it, then its v, then the next layer's."""
        self._kv = self._device.empty(num_blocks * self.bytes_per_block, "the KV cache")
        at = self._kv.data_ptr()
        for k, v in self._plan["kv"]:
            self._caches.append((at, at + k * num_blocks))
            at += (k + v) * num_blocks
        sizes = [size for pair in self._plan["kv"] for size in pair]
        if sizes:
            self._put("copy parts", torch.tensor([at for pair in self._caches for at in pair]))
            self._put("copy words", torch.tensor(sizes, dtype=torch.int32) // 4)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """See Runner."""
        step = {"op": "copy", "by": "num_copies", "ways": [[None, self._plan["copy"]]]}
        most = self._limits.max_batch_size
        with self._device.active():
            for begin in range(0, len(pairs), most):
                some = pairs[begin : begin + most]
                self._put("copy pairs", torch.tensor(some, dtype=torch.int32))
                counts = {"num_copies": len(some)}
                self._program([step], counts, mixed=False, name="copy").run(counts)

    def forward(self, inputs: ModelInputs) -> npt.NDArray[np.float32] | None:
        """See Runner."""
        with self._device.active():
            turn = self._enqueue(inputs, None)
            if self._plan["output"] is None:
                self._done[turn]()
                return None
            rows, width = len(inputs.logits_indices), self._plan["output_width"]
            logits = self._tensor(self._plan["output"], "float32", (rows, width)).cpu()
        return logits.numpy()[:, : self._plan["vocab_size"]]

    def samples(self, params: SamplingParams, num_banned: int) -> bool:
        """See SamplingRunner."""
        return num_banned <= MOST_BANNED and (params.logprobs or 0) <= self._plan["most_logprobs"]

    def start(self, inputs: ModelInputs, sampling: SamplingInputs) -> PendingTokens:
        """See SamplingRunner."""
        with self._device.active():
            turn = self._enqueue(inputs, sampling)
        return _Tokens(self._done[turn], sampling, self._results[turn], self._logprobs[turn])

    def close(self) -> None:
        """See Runner."""
        self._programs.clear()
        self._graphs.clear()
        self._device.leave()
        self._file.close()

    def _enqueue(self, inputs: ModelInputs, sampling: SamplingInputs | None) -> int:
        """Enqueues a step; the slot that it has taken."""
        assert self._kv is not None, "allocate_kv_cache comes first"
        turn = self._turn
        self._turn = (turn + 1) % _SLOTS
        self._done[turn]()
        tokens, seqs, logits = inputs.num_tokens, inputs.num_seqs, len(inputs.logits_indices)
        assert tokens <= self._limits.max_num_tokens
        mixed = not (tokens == seqs == logits)
        prompts, has_alone = ragged(inputs) if mixed else (0, True)
        first_prompt = seqs - prompts
        padded = *self._padded(tokens, seqs, prompts, has_alone), self._splits(inputs)
        is_graph = not mixed or tokens <= _MOST_AT_ONCE or self._is_known(padded)
        if is_graph:
            tokens, seqs, prompts, *_ = padded
            logits = seqs
        slot = self._slots[mixed][turn]
        self._num_steps = self._num_steps % (2**31 - 1) + 1  # as on every other rank; never 0, which memory holds first
        slot.fill(inputs, tokens, seqs, logits, first_prompt, self._num_steps)
        if sampling is not None:
            slot.fill_sampling(sampling)
        slot.upload(seqs)
        counts = {
            "num_tokens": tokens, "num_seqs": seqs, "num_logits": logits, "num_prompts": prompts,
            "num_alone": seqs if has_alone else 0, "num_splits": padded[-1],
        }  # fmt: skip
        if is_graph:
            self._run_graph(padded, counts, mixed)
        else:
            self._program(self._steps, counts, mixed).run(counts)
        if sampling is not None and len(sampling.rows):
            self._sample(turn, sampling, mixed)
        self._done[turn] = self._device.record()
        return turn

    def _splits(self, inputs: ModelInputs) -> int:
        """See build/backends/cuda_program.py."""
        about = self._plan.get("splits")  # plans of before have none
        if about is None or not about["above"] < inputs.num_seqs <= about["sequences"]:
            return 1
        wanted = -(-int(inputs.seq_lens.max()) // about["tokens"])
        return int(min(1 << (wanted - 1).bit_length(), about["most"]))

    def _padded(self, tokens: int, seqs: int, prompts: int, has_alone: bool) -> tuple[int, int, int, bool]:
        """A step's tokens, sequences and prompts as a graph has them."""
        if not prompts:
            seqs = _next(self._graph_sizes, seqs, self._limits.max_batch_size)
            return seqs, seqs, 0, True
        step = _GRAPH_STEP if tokens <= _MOST_AT_ONCE else 2 * _GRAPH_STEP
        seqs, prompts = (_next(_MIXED_SIZES, n, self._limits.max_batch_size) for n in (seqs, prompts))
        return min(-(-tokens // step) * step, self._limits.max_num_tokens), seqs, prompts, has_alone

    def _is_known(self, padded: Padded) -> bool:
        """Whether a large step's size is met again: then capturing it pays."""
        if padded in self._met:
            return padded in self._graphs or len(self._graphs) < _MOST_GRAPHS
        self._met.add(padded)
        return False

    def _run_graph(self, key: Padded, counts: dict[str, int], mixed: bool) -> None:
        """A step of these counts in one launch; the first one by itself, and then it is captured for those after it."""
        if key in self._graphs:
            self._graphs[key]()
            return
        program = self._program(self._steps, counts, mixed)
        program.run(counts)  # here libraries set themselves up, which a graph cannot capture
        self._graphs[key] = self._device.capture(program.enqueue)

    def _sample(self, turn: int, sampling: SamplingInputs, mixed: bool) -> None:
        """Samples a step's tokens, and sends them and their log probabilities to the host."""
        counts = {
            "num_samples": len(sampling.rows), "num_penalized": len(sampling.penalized),
            "num_banned": len(sampling.banned), "num_logprobs": len(sampling.logprobs),
        }  # fmt: skip
        if counts["num_penalized"] or counts["num_banned"] or counts["num_logprobs"]:
            self._send_histories(turn, sampling)
            self._special_slots[turn].upload(sampling)
        filters = (sampling.top_k > 0).any() or (sampling.top_p < 1).any() or (sampling.min_p > 0).any()
        for name, is_asked in (
            ("penalties", counts["num_penalized"]), ("bans", counts["num_banned"]), ("plain", True),
            ("filtered", filters), ("logprobs", counts["num_logprobs"]),
        ):  # fmt: skip
            if is_asked:
                self._program([self._plan["sampling"][name]], counts, mixed, name).run(counts)
        results = [(self._results[turn], self._scratch["tokens"].view(torch.int32), counts["num_samples"])]
        if counts["num_logprobs"]:
            shape = (self._limits.max_batch_size, 1 + self._plan["most_logprobs"])
            made = (self._tensor("s:logprob ids", "int32", shape), self._tensor("s:logprobs", "float32", shape))
            results += [
                (there, here, counts["num_logprobs"]) for there, here in zip(self._logprobs[turn], made, strict=True)
            ]
        for there, here, count in results:
            there[:count].copy_(here[:count], non_blocking=True)

    def _send_histories(self, turn: int, sampling: SamplingInputs) -> None:
        """Begins to count these rows' tokens. What is on its way stays in host memory until the slot is taken again."""
        shape = (self._limits.max_batch_size, self._plan["output_width"])
        counts = self._tensor("s:token counts", self._plan["token_counts"], shape)
        self._histories[turn] = []
        start = 0
        for row, prompt, length in sampling.histories.tolist():
            tokens = sampling.history_tokens[start : start + length]
            start += length
            host = self._device.host(counts[row].nbytes).view(counts.dtype)
            count_tokens(tokens[:prompt], tokens[prompt:], host.numpy())
            counts[row].copy_(host, non_blocking=True)
            self._histories[turn].append(host)

    def _program(self, steps: list[Any], counts: dict[str, int], mixed: bool, name: str = "") -> Program:
        """The launches of a step that takes the ways of these counts; `name` tells apart what the steps are."""
        ways = key_of(steps, counts)
        key = (mixed, name, ways)
        if key not in self._programs:
            self._programs[key] = Program(
                self._device, self._kernels[mixed], steps, lambda ref: self._address(ref, mixed), self._tensor,
                self._rows, ways, mixed=mixed, chosen=self._chosen,
            )  # fmt: skip
        return self._programs[key]

    def _measure(self, steps: Sequence[Mapping[str, Any]], rows: int) -> float:
        """Milliseconds of steps of one way each, at so many rows of all kinds."""
        program = self._trial(steps, rows)
        with self._device.active():
            return self._device.milliseconds(program.enqueue)

    def _trial(self, steps: Sequence[Mapping[str, Any]], rows: int) -> Program:
        """Launches of steps of one way each, at so many rows of all kinds."""
        self._comm.activity.tick()
        way = (0,) * len(steps)
        program = Program(
            self._device, self._kernels[False], steps, self._address, self._tensor, self._rows, way, mixed=False,
            chosen=self._chosen,
        )  # fmt: skip
        program.resize(dict.fromkeys(("num_tokens", "num_seqs", "num_logits", "num_prompts", "num_alone"), rows))
        return program

    def _address(self, ref: str | list[Any], mixed: bool = False) -> int:
        """Where a reference of the plan is; see build/backends/cuda_program.py."""
        if isinstance(ref, list):
            return self._address(ref[0], mixed) + ref[2]
        if ref == "last":
            return self._last.data_ptr()
        kind, _, name = ref.partition(":")
        match kind:
            case "b":
                return self._buffers[int(name)].data_ptr()
            case "w":
                return self._weights.address(name)
            case "s":
                return self._scratch[name].data_ptr()
            case "e":
                return self._exchange[name].data_ptr()
            case "d":
                return self._scratch["deltas"].data_ptr() + int(name) * self._rank.mapping.tp_size * 8
            case "x":
                return self._special.data_ptr() + self._special_layout.offsets[name] * 4
            case "k" | "v":
                return self._caches[int(name)][kind == "v"]
        return self._inputs[mixed].data_ptr() + self._layouts[mixed].offsets[name] * 4

    def _tensor(self, ref: str | list[Any], dtype: str, shape: tuple[int, int]) -> torch.Tensor:
        """A tensor of this dtype and shape in a buffer or weight."""
        where, offset = (ref[0], ref[2]) if isinstance(ref, list) else (ref, 0)
        kind, _, name = where.partition(":")
        match kind:
            case "b":
                base = self._buffers[int(name)]
            case "s":
                base = self._scratch[name]
            case _:
                base = self._weights.bytes_at(name)
        kind_of = getattr(torch, dtype)
        return base[offset : offset + shape[0] * shape[1] * kind_of.itemsize].view(kind_of).view(shape)

    def _find_peers(self, memory: torch.Tensor) -> bool:
        """Tells the kernels where what each rank of the group has is; `memory` holds all of this one's.

        Whether the ranks see each other's memory.
        """
        refs = self._plan["peers"]
        if not refs:
            return False
        found = self._device.find_peers(memory, self._rank.tp_group, self._comm)
        own = [self._address(ref) - memory.data_ptr() for ref in refs]
        offsets = [json.loads(text) for text in self._comm.exchange(json.dumps(own))]
        if found is None:
            return False
        there = zip(self._rank.tp_group, found, strict=True)
        addresses = torch.tensor([[base + place for place in offsets[rank]] for rank, base in there]).T
        self._put("deltas", addresses - addresses[:, [self._rank.tp_rank]])
        return True

    def _put(self, scratch: str, values: torch.Tensor) -> None:
        """Writes numbers to scratch memory."""
        memory = self._scratch[scratch][: values.nbytes].view(values.dtype)
        memory.copy_(values.flatten())

    def _arena(self, sizes: list[int], what: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Zeroed memory of these sizes, in one piece; the piece, and its parts."""
        starts, total = [], 0
        for size in sizes:
            starts.append(total)
            total += -(-size // ALIGNMENT) * ALIGNMENT
        whole = self._device.empty(total, what)
        with self._device.active():
            whole.zero_()
            self._device.record()()
        return whole, [whole[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def _next(sizes: Sequence[int], count: int, most: int) -> int:
    """The next of some sizes."""
    return min(next((size for size in sizes if size >= count), count), most)


class _Tokens:
    """A step's tokens, on their way."""

    def __init__(
        self, wait: Callable[[], None], sampling: SamplingInputs, result: torch.Tensor, logprobs: list[torch.Tensor]
    ) -> None:
        self._wait, self._result, self._logprobs = wait, result, logprobs
        self._count, self._wanted = len(sampling.rows), sampling.logprobs

    def tokens(self) -> IntArray:
        """See PendingTokens."""
        self._wait()
        array: IntArray = self._result.numpy()[: self._count].copy()
        return array

    def logprobs(self) -> list[list[Logprob] | None]:
        """See PendingTokens."""
        out: list[list[Logprob] | None] = [None] * self._count
        if len(self._wanted):
            ids, values = (part[: len(self._wanted)].tolist() for part in self._logprobs)
            for i, (entry, number) in enumerate(self._wanted.tolist()):
                pairs = zip(ids[i][: 1 + number], values[i][: 1 + number], strict=True)
                out[entry] = [Logprob(token, value) for token, value in pairs if token != _NO_TOKEN]
        return out
