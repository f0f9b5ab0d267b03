"""The one thread that owns the runner and the executor, and what others may ask of it.

A runner and an executor are not thread-safe, and a signal in the middle of a step would leave them inconsistent. So one
thread loads them, steps them and closes them; the others put requests into its inbox, and get deltas through sinks.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_cli.errors import TrtllmError
from trtllm_cli.run.outputs import named_error
from trtllm_cli.run.request import TokenEvent

if TYPE_CHECKING:
    from trtllm_cli.run.backends import Runner
    from trtllm_cli.run.executor import Executor, ExecutorStats
    from trtllm_cli.run.outputs import LiveRequest

CLOSE_SECONDS = 10.0
_CLOSED = "the engine was closed while it generated"


@dataclass(frozen=True)
class _Add:
    requests: Sequence[LiveRequest]  # all or none


@dataclass(frozen=True)
class _Cancel:
    request_ids: Sequence[int]


class StepLoop:
    """Runs the steps in a thread of its own. Its methods may be called from any thread."""

    def __init__(self, load: Callable[[], tuple[Runner, Executor]], verified: Future[None]) -> None:
        """`load` runs in the thread; no delta goes out before `verified` is done, and none if it failed."""
        self._load: Callable[[], tuple[Runner, Executor]] | None = load
        self._verified = verified
        self._inbox: queue.SimpleQueue[_Add | _Cancel | None] = queue.SimpleQueue()
        self._loaded: Future[tuple[Runner, Executor]] = Future()
        self._live: dict[int, LiveRequest] = {}
        self._error: BaseException | None = None
        self._closing = False
        self._lock = threading.Lock()  # over _closing, _error and putting into the inbox
        self._thread = threading.Thread(target=self._run, name="trtllm-steps", daemon=True)
        self._thread.start()

    @property
    def error(self) -> BaseException | None:
        """What ended it early: in loading or in a step."""
        return self._error

    def wait_loaded(self) -> None:
        """Returns when requests will be served. Raises what `load` raised."""
        self._loaded.result()

    def submit(self, requests: Sequence[LiveRequest]) -> None:
        """Queues requests, all or none. One that the engine cannot serve ends them all, with its error in each sink."""
        with self._lock:
            if self._closing:
                raise RuntimeError("the engine is closed")
            if self._error is not None:
                raise self._error
            self._inbox.put(_Add(requests))

    def cancel(self, request_ids: Sequence[int]) -> None:
        """Ends the requests that have not ended yet; their sinks get a last delta with finish_reason "cancelled"."""
        self._inbox.put(_Cancel(request_ids))

    def stats(self) -> ExecutorStats:
        """A copy of the executor's counts, of about now."""
        return dataclasses.replace(self._loaded.result()[1].stats)

    def close(self) -> None:
        """Ends the requests under way and frees the runner. May be called twice."""
        self._verified.cancel()  # what is left of the file is not read
        with self._lock:
            self._closing = True
            self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_SECONDS)

    # --- in the thread

    def _run(self) -> None:
        assert self._load is not None
        try:
            runner, executor = self._load()
        except BaseException as e:
            with self._lock:
                self._error = e
            self._loaded.set_exception(e)
            return
        finally:
            self._load = None  # what it refers to may go before we do
        self._loaded.set_result((runner, executor))
        try:
            while self._take_messages(executor):
                if executor.has_work:
                    events = executor.step()
                    if events:
                        self._verified.result()
                    self._deliver(executor, events)
            self._fail(RuntimeError(_CLOSED))
        except CancelledError:  # by `close`, while a step's tokens waited for the file's check
            self._refuse_inbox()
            self._fail(RuntimeError(_CLOSED))
        except BaseException as e:
            with self._lock:
                self._error = e
            self._refuse_inbox()
            self._fail(e)
        finally:
            executor.close()
            runner.close()

    def _take_messages(self, executor: Executor) -> bool:
        """Serves the inbox; waits for it where there is nothing else to do. False when it says to end."""
        while True:
            try:
                message = self._inbox.get(block=not executor.has_work)
            except queue.Empty:
                return True
            match message:
                case None:
                    return False
                case _Add(requests):
                    self._add(executor, requests)
                case _Cancel(request_ids):
                    for request_id in request_ids:
                        executor.cancel(request_id)

    def _add(self, executor: Executor, requests: Sequence[LiveRequest]) -> None:
        for i, request in enumerate(requests):
            try:
                executor.add_request(request.id, request.prompt_token_ids, request.params)
            except TrtllmError as e:
                for added in requests[:i]:
                    executor.cancel(added.id)  # its "cancelled" events meet no live request
                    self._live.pop(added.id)
                for other in requests:
                    _put(other, named_error(e, request.name))
                return
            self._live[request.id] = request

    def _deliver(self, executor: Executor, events: Sequence[TokenEvent]) -> None:
        now = time.perf_counter()
        for event in events:
            live = self._live.get(event.request_id)
            if live is None or live.sequences[event.index].ended:
                continue
            if live.times.first_token is None and event.token_id is not None:
                live.cached_tokens = executor.cached_tokens(live.id)
            delta = live.take(event, now)
            output = delta.outputs[0]
            if output.finish_reason and not event.finish_reason:  # a stop string, which the executor knows nothing of
                executor.finish(live.id, event.index, output.finish_reason, output.stop_reason)
            delivered = _put(live, delta)
            if delta.finished or not delivered:
                self._live.pop(live.id)
            if not delivered:
                executor.cancel(live.id)

    def _fail(self, error: BaseException) -> None:
        """Tells every request under way."""
        error = error if isinstance(error, Exception) else RuntimeError(repr(error))
        live, self._live = list(self._live.values()), {}
        for request in live:
            _put(request, error)

    def _refuse_inbox(self) -> None:
        """Counts what was put in before the error among what it fails."""
        while True:
            try:
                message = self._inbox.get_nowait()
            except queue.Empty:
                return
            if isinstance(message, _Add):
                self._live.update({request.id: request for request in message.requests})


def _put(request: LiveRequest, item: object) -> bool:
    """Whether the sink took it; one whose event loop is gone does not."""
    try:
        request.sink(item)  # type: ignore[arg-type]
    except Exception:
        return False
    return True
