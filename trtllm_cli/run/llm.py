"""The Python API: open an engine, give it prompts, get text.

    with LLM("engine") as llm:
        for output in llm.generate(["Why is the sky blue?"], SamplingParams(max_tokens=64)):
            print(output.outputs[0].text)

A prompt is text, a list of token ids, or a conversation: a list of messages, which the model's chat template turns into
text. `LLM` and `AsyncLLM` may be called from any thread; requests from all of them share the batch.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import queue
import time
import weakref
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from trtllm_cli.engine import Engine
from trtllm_cli.errors import EngineError, TrtllmError, UsageError, describe_error
from trtllm_cli.run.load import LoadOptions, gpu_memory, gpu_notes, load_executor, serve_rank, verify_aside
from trtllm_cli.run.outputs import LiveRequest, accumulate, named_error
from trtllm_cli.run.request import CompletionOutput, RequestOutput, RequestTimes, SamplingParams
from trtllm_cli.run.step_loop import StepLoop
from trtllm_cli.run.tokenizer import Message, Tokenizer
from trtllm_cli.run.world import join_for

if TYPE_CHECKING:
    from trtllm_cli.engine import BuildConfig
    from trtllm_cli.run.backends import Runner
    from trtllm_cli.run.executor import Executor, ExecutorStats
    from trtllm_cli.run.gpu_memory import GpuMemory
    from trtllm_cli.run.outputs import Sink
    from trtllm_cli.run.scheduler import Policy
    from trtllm_cli.run.world import World

Prompt: TypeAlias = str | Sequence[int] | Sequence[Message]
Params: TypeAlias = SamplingParams | Sequence[SamplingParams] | None


class _Model:
    """What LLM and AsyncLLM share: an open engine and its step loop."""

    def __init__(
        self,
        engine_dir: str | Path,
        *,
        tokenizer_dir: str | Path | None = None,
        num_threads: int | None = None,
        kv_cache_memory: int | str | None = None,
        max_num_blocks: int | None = None,
        enable_prefix_cache: bool = True,
        enable_chunked_prefill: bool = True,
        scheduler_policy: Policy = "max_utilization",
        kv_cache_free_gpu_memory_fraction: float | None = None,
        max_gpu_memory: int | str | None = None,
    ) -> None:
        """Opens the engine and loads it.

        `tokenizer_dir` takes the place of the engine's own. `kv_cache_memory` is bytes, or text such as "2GiB"; by
        default the cache holds max_batch_size requests of max_seq_len, in at most half of the free memory.
        `max_num_blocks` caps it. On a GPU the cache takes `kv_cache_free_gpu_memory_fraction` (0.9) of what is free
        once all else is there, and `max_gpu_memory` caps all that the engine takes. The rank file's SHA-256 is checked
        meanwhile: the first result waits for it. What is alive once it is loaded is left out of Python's garbage
        collection (gc.freeze) until the engine is closed: a full one would hold up all requests.

        Under mpirun every rank's program comes here. Rank 0 goes on with it and leads; the others serve rank 0 until it
        closes the engine, and then exit. `num_threads` and `kv_cache_memory` are each rank's.
        """
        options = LoadOptions(
            num_threads, kv_cache_memory, max_num_blocks, enable_prefix_cache, enable_chunked_prefill, scheduler_policy,
            kv_cache_free_gpu_memory_fraction, max_gpu_memory,
        )  # fmt: skip
        options.check()
        self.engine = Engine.open(Path(engine_dir))
        options.check_for(self.engine)
        config = self.engine.config
        self.gpu_memory: GpuMemory | None = None  # where a GPU's memory went when the engine was loaded
        self.notes: list[str] = []  # what users are to know of the engine on this GPU
        world = join_for(self.engine)
        if world.rank != 0:
            serve_rank(self.engine, world, options)
        eos: Future[frozenset[int]] = Future()

        def load() -> tuple[Runner, Executor]:
            runner, executor = load_executor(self.engine, world, self.build_config, options, eos.result)
            self.num_blocks = executor.stats.blocks_total
            self.kv_cache_bytes = self.num_blocks * runner.bytes_per_block
            self.gpu_memory, self.notes = gpu_memory(runner), gpu_notes(runner)
            return runner, executor

        self._loop = StepLoop(load, verify_aside(self.engine, world))
        self._finalizer = weakref.finalize(self, _close, self._loop, world)  # at the latest when Python ends
        try:
            # Meanwhile, here:
            directory = Path(tokenizer_dir) if tokenizer_dir is not None else self.engine.tokenizer_dir
            self.tokenizer: Tokenizer | None = None
            if directory is not None:
                self.tokenizer = Tokenizer.load(directory, vocab_size=config.pretrained_config.vocab_size)
            eos.set_result(self.tokenizer.eos_token_ids if self.tokenizer else frozenset())
            self._loop.wait_loaded()
        except BaseException as e:
            if not eos.done():
                eos.set_exception(e)
            self.close()
            raise
        self._ids = itertools.count()

    @property
    def build_config(self) -> BuildConfig:
        """The limits that the engine was built with."""
        return self.engine.config.build_config

    @property
    def stats(self) -> ExecutorStats:
        """The executor's counts: steps, prefix cache hits, blocks in use."""
        return self._loop.stats()

    def tokenize(self, prompt: Prompt) -> list[int]:
        """The token ids that a prompt stands for. Raises what `generate` would for a prompt that cannot be read."""
        return self._read(prompt)[1]

    def close(self) -> None:
        """Ends what is under way and frees the memory. May be called twice."""
        self._finalizer()

    def _read(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """A prompt's text, where it has one, and its token ids."""
        if isinstance(prompt, str):
            return prompt, self._tokenizer_for("text").encode(prompt)
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
            raise UsageError(f"a prompt is text, token ids or messages, not a {type(prompt).__name__}", where="prompt")
        if all(isinstance(item, int) and not isinstance(item, bool) for item in prompt):
            return None, list(prompt)  # type: ignore[arg-type]
        if all(isinstance(item, Mapping) for item in prompt):
            tokenizer = self._tokenizer_for("messages")
            text = tokenizer.render_chat(prompt)  # type: ignore[arg-type]
            return text, tokenizer.encode(text, add_special_tokens=False)
        raise UsageError("a prompt's list must hold token ids only, or messages only", where="prompt")

    def _tokenizer_for(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise EngineError(
                f"the engine carries no tokenizer, so it takes token ids, not {what}",
                where=str(self.engine.path),
                fix="give a directory that holds a tokenizer.json with --tokenizer-dir, or token ids with "
                "--input-token-ids",
            )
        return self.tokenizer

    def _request(
        self, read: tuple[str | None, list[int]], params: SamplingParams, sink: Sink, name: str = ""
    ) -> LiveRequest:
        if params.stop:
            self._tokenizer_for("stop strings")
        times = RequestTimes(arrival=time.perf_counter())
        return LiveRequest(next(self._ids), *read, params, self.tokenizer, sink, name, times)


class LLM(_Model):
    """An engine, open to generate. Thread-safe; a context manager, or `close` it."""

    def generate(self, prompts: Prompt | Sequence[Prompt], params: Params = None) -> list[RequestOutput]:
        """The whole answers, in the order of the prompts.

        `params` is for all prompts, or a list with one each. Raises RequestError, before anything is generated, if
        the engine cannot serve one of them.
        """
        stream = self.stream(prompts, params)
        outputs = [request.empty_output() for request in stream.requests]
        with stream:
            for delta in stream:
                accumulate(outputs[stream.index(delta)], delta)
        return outputs

    def stream(
        self, prompts: Prompt | Sequence[Prompt], params: Params = None, *, names: Sequence[str] | None = None
    ) -> Stream:
        """Starts generating; iterate over the result for deltas as they come.

        `names` is what errors call the prompts; by default "prompt 0" and so on, where there are several.
        """
        many = _as_list(prompts)
        each = _params_for(params, len(many))
        names = names or [f"prompt {i}" if len(many) > 1 else "" for i in range(len(many))]
        news: queue.SimpleQueue[RequestOutput | Exception] = queue.SimpleQueue()
        requests = []
        for prompt, name, one in zip(many, names, each, strict=True):
            try:
                requests.append(self._request(self._read(prompt), one, news.put, name))
            except TrtllmError as e:
                raise named_error(e, name) from None
        self._loop.submit(requests)
        return Stream(self._loop, requests, news)

    def chat(
        self, messages: Sequence[Message] | Sequence[Sequence[Message]], params: Params = None
    ) -> list[RequestOutput]:
        """`generate` for one conversation or several."""
        if not messages or isinstance(messages, str) or isinstance(messages[0], str):
            raise UsageError("chat takes messages: [{'role': 'user', 'content': ...}, ...]", where="messages")
        return self.generate(messages, params)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Stream(Iterator[RequestOutput]):
    """Deltas of one call's requests, as they come: each holds only what is new, `finished` with a request's last.

    Closing it before its end, or dropping it, cancels what is still under way.
    """

    def __init__(
        self, loop: StepLoop, requests: list[LiveRequest], news: queue.SimpleQueue[RequestOutput | Exception]
    ) -> None:
        self.requests = requests
        self._loop = loop
        self._news = news
        self._index = {request.id: i for i, request in enumerate(requests)}
        self._open = set(self._index)

    def index(self, delta: RequestOutput) -> int:
        """Which of the call's prompts the delta is of."""
        return self._index[delta.request_id]

    def __next__(self) -> RequestOutput:
        if not self._open:
            raise StopIteration
        item = self._news.get()
        if isinstance(item, Exception):
            self.close()
            raise item
        if item.finished:
            self._open.discard(item.request_id)
        return item

    def close(self) -> None:
        """Cancels the requests that have not ended; no more deltas come."""
        still, self._open = self._open, set()
        if still:
            self._loop.cancel(sorted(still))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class AsyncLLM(_Model):
    """LLM for asyncio: each call is one request, which is cancelled with its task. An async context manager."""

    async def generate(self, prompt: Prompt, params: SamplingParams | None = None) -> RequestOutput:
        """The whole answer."""
        params = params or SamplingParams()
        total: RequestOutput | None = None
        async for delta in self.stream(prompt, params):
            if total is None:
                outputs = [CompletionOutput(i) for i in range(params.n)]
                total = dataclasses.replace(delta, outputs=outputs)
            accumulate(total, delta)
        assert total is not None
        return total

    async def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> AsyncIterator[RequestOutput]:
        """Deltas as they come, as `Stream` has them. Leaving the loop early cancels the request."""
        import asyncio  # not above: LLM does without, and it is slow to import

        loop = asyncio.get_running_loop()
        news: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()
        read = await asyncio.to_thread(self._read, prompt)  # a long prompt takes a while to tokenize

        def sink(item: RequestOutput | Exception) -> None:
            loop.call_soon_threadsafe(news.put_nowait, item)

        request = self._request(read, params or SamplingParams(), sink)
        self._loop.submit([request])
        finished = False
        try:
            while not finished:
                item = await news.get()
                if isinstance(item, Exception):
                    finished = True
                    raise item
                finished = item.finished
                yield item
        finally:
            if not finished:
                self._loop.cancel([request.id])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        import asyncio

        await asyncio.to_thread(self.close)


def _close(loop: StepLoop, world: World) -> None:
    loop.close()
    gc.unfreeze()
    if world.ends_with_engine:
        if world.is_over:
            world.leave()
        else:
            world.fail(*describe_error(loop.error or RuntimeError("the engine did not close in time")))


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Any]:
    """Several prompts, or one in a list: what holds token ids or messages directly is one."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise UsageError(f"prompts must be text or a list, not a {type(prompts).__name__}", where="prompts")
    one = len(prompts) > 0 and isinstance(prompts[0], int | Mapping)
    return [prompts] if one else list(prompts)


def _params_for(params: Params, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise UsageError(f"{len(params)} sampling params for {count} prompts", where="params")
    return list(params)
