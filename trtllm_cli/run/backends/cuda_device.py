"""What the cuda runner needs of a device: memory, launches, graphs, copies. torch has the memory and the streams."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch

from trtllm_cli.errors import DeviceError, ResourceError
from trtllm_cli.kernels.cuda.driver import Driver, Launch
from trtllm_cli.kernels.cuda.graph_time import captured, graph_milliseconds
from trtllm_cli.kernels.cuda.kernel import CompiledKernel
from trtllm_cli.run.backends.cuda_blas import Blas, Product
from trtllm_cli.run.backends.nccl import Nccl

if TYPE_CHECKING:
    from trtllm_cli.mapping import Rank
    from trtllm_cli.run.communicator import Communicator


class PreparedLaunch(Protocol):
    """A kernel with its arguments."""

    def resize(self, grid: Sequence[int], values: Sequence[tuple[int, int]]) -> None:
        """Another grid, and other values of some of the arguments: (place, value)."""
        ...

    def enqueue(self) -> None:
        """Runs it after what was enqueued before."""
        ...


class Device(Protocol):
    """One GPU, or in tests what stands for it."""

    torch_device: torch.device
    name: str
    is_checked: bool  # whether what kernels compute is compared, and algorithms are timed, before they are used

    @property
    def blas(self) -> str:
        """The library that `algorithms` are of, and its version; "": there is none."""
        ...

    def empty(self, nbytes: int, what: str) -> torch.Tensor:
        """uint8 [nbytes] on the device. Raises ResourceError, naming `what` it is for, where there is no room."""
        ...

    def host(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] on the host, which the device copies from and to while the host goes on."""
        ...

    def load(self, kernel: dict[str, Any], cubin: bytes, *, all_shared: bool) -> Any:
        """A kernel of the plan's table; see Driver.load."""
        ...

    def prepare(self, kernel: Any, grid: Sequence[int], values: Sequence[int | float]) -> PreparedLaunch:
        """A launch with these arguments: addresses and numbers."""
        ...

    def algorithms(self, product: Product) -> list[str]:
        """By which the product may be computed, what is likely the fastest first; none: there is no choice."""
        ...

    def product(self, product: Product, algorithm: str) -> Callable[[], object]:
        """What enqueues the product, by one of its `algorithms` or, "", as torch does."""
        ...

    def join(self, rank: Rank, comm: Communicator) -> None:
        """Meets the other ranks' devices; every rank calls it, before what follows. Raises DeviceError if it fails."""
        ...

    def find_peers(self, memory: torch.Tensor, group: Sequence[int], comm: Communicator) -> list[int] | None:
        """Where each of the group has the like of `memory`, in addresses that kernels here can write to.

        Every rank calls it. None, on all of the group, where one cannot see another's memory.
        """
        ...

    def all_reduce(self, x: torch.Tensor, y: torch.Tensor, group: Sequence[int]) -> None:
        """`y`: the sum of `x` over the group."""
        ...

    def all_gather(self, x: torch.Tensor, y: torch.Tensor, group: Sequence[int]) -> None:
        """`y` [rows, ranks * width]: the group's `x` [rows, width] side by side."""
        ...

    def send(self, x: torch.Tensor, to: int) -> None:
        """Sends `x` to a rank."""
        ...

    def recv(self, y: torch.Tensor, source: int) -> None:
        """Fills `y` with what a rank sends."""
        ...

    def leave(self) -> None:
        """Ends what `join` and `find_peers` began, once nothing is under way."""
        ...

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """What enqueues again, in one call, all that `enqueue` does."""
        ...

    def milliseconds(self, enqueue: Callable[[], None]) -> float:
        """How long what `enqueue` enqueues takes on the device."""
        ...

    def active(self) -> Any:
        """A context in which torch enqueues where the launches go."""
        ...

    def record(self) -> Callable[[], None]:
        """Marks what is enqueued so far; calling what comes back waits for it."""
        ...

    def free_memory(self) -> tuple[int, int]:
        """Bytes free, and in all."""
        ...


class CudaDevice:
    """A GPU, by torch and the driver. Raises DeviceError where there is none."""

    is_checked = True

    def __init__(self, index: int = 0) -> None:
        if not torch.cuda.is_available():
            raise DeviceError(
                "torch finds no NVIDIA GPU here" + ("" if torch.version.cuda else ": this torch is built without CUDA"),
                fix="run where nvidia-smi lists a GPU, with a torch built for CUDA; "
                "or build an engine with --backend cpu",
            )
        self.torch_device = torch.device("cuda", index)
        torch.cuda.set_device(self.torch_device)
        torch.cuda.init()
        self.driver = Driver.open(index)
        self.name = self.driver.name
        self.stream = torch.cuda.Stream(self.torch_device)
        self._blas = Blas(self.stream.cuda_stream, self.torch_device)
        self._nccl: Nccl | None = None
        self._mapped: list[int] = []  # other ranks' memory

    def empty(self, nbytes: int, what: str) -> torch.Tensor:
        """See Device."""
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)
        except torch.cuda.OutOfMemoryError:
            free, total = self.free_memory()
            from trtllm_cli.artifact import human_bytes

            raise ResourceError(
                f"no room on the GPU for {what}: {human_bytes(nbytes)} needed, {human_bytes(free)} of "
                f"{human_bytes(total)} free",
                fix="end what else runs on the GPU (see nvidia-smi), or lower --max-batch-size, --max-num-tokens or "
                "--max-seq-len of the engine",
            ) from None

    def host(self, nbytes: int) -> torch.Tensor:
        """See Device."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def load(self, kernel: dict[str, Any], cubin: bytes, *, all_shared: bool) -> Any:
        """See Device."""
        return self.driver.load(CompiledKernel.from_json(kernel, cubin), all_shared=all_shared)

    def prepare(self, kernel: Any, grid: Sequence[int], values: Sequence[int | float]) -> _StreamLaunch:
        """See Device."""
        return _StreamLaunch(kernel.prepare(grid, values), self.stream.cuda_stream)

    @property
    def blas(self) -> str:
        """See Device."""
        return self._blas.name

    def algorithms(self, product: Product) -> list[str]:
        """See Device."""
        return self._blas.algorithms(product)

    def product(self, product: Product, algorithm: str) -> Callable[[], object]:
        """See Device."""
        return self._blas.bound(product, algorithm)

    def join(self, rank: Rank, comm: Communicator) -> None:
        """See Device."""
        self._nccl = Nccl(rank, comm)

    @property
    def _ranks(self) -> Nccl:
        assert self._nccl is not None, "join comes first"
        return self._nccl

    def find_peers(self, memory: torch.Tensor, group: Sequence[int], comm: Communicator) -> list[int] | None:
        """See Device. By CUDA's handles of memory, which other processes of this host can open."""
        own = memory.data_ptr()
        try:
            handle, offset = self.driver.share(own)
            offer = f"{socket.gethostname()} {handle.hex()} {offset}"
        except DeviceError:
            offer = ""
        offers = comm.exchange(offer)
        found: list[int] = []
        try:
            for rank in group:
                if rank == comm.rank:
                    found.append(own)
                    continue
                host, their_handle, their_offset = offers[rank].split()
                if host != socket.gethostname():
                    break
                self._mapped.append(self.driver.open_shared(bytes.fromhex(their_handle)))
                found.append(self._mapped[-1] + int(their_offset))
        except (DeviceError, ValueError):  # there is no way from one GPU to the other, or nothing was offered
            pass
        seen = comm.exchange(str(len(found) == len(group)))
        return found if all(seen[rank] == "True" for rank in group) else None

    def all_reduce(self, x: torch.Tensor, y: torch.Tensor, group: Sequence[int]) -> None:
        """See Device."""
        self._ranks.all_reduce(x, y, group, self.stream.cuda_stream)

    def all_gather(self, x: torch.Tensor, y: torch.Tensor, group: Sequence[int]) -> None:
        """See Device."""
        parts = torch.empty(len(group), *x.shape, dtype=x.dtype, device=x.device)
        self._ranks.all_gather(x, parts, group, self.stream.cuda_stream)
        y.unflatten(1, (len(group), -1)).copy_(parts.transpose(0, 1))

    def send(self, x: torch.Tensor, to: int) -> None:
        """See Device."""
        self._ranks.send(x, to, self.stream.cuda_stream)

    def recv(self, y: torch.Tensor, source: int) -> None:
        """See Device."""
        self._ranks.recv(y, source, self.stream.cuda_stream)

    def leave(self) -> None:
        """See Device."""
        if self._nccl is not None:
            self.stream.synchronize()
            self._nccl.close()
            self._nccl = None
        for base in self._mapped:
            self.driver.close_shared(base)
        self._mapped.clear()

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """See Device."""
        return captured(self.stream, enqueue)

    def milliseconds(self, enqueue: Callable[[], None]) -> float:
        """See Device."""
        return graph_milliseconds(self.stream, enqueue)

    @contextmanager
    def active(self) -> Iterator[None]:
        """See Device."""
        with device_errors(), torch.cuda.stream(self.stream):
            yield

    def record(self) -> Callable[[], None]:
        """See Device."""
        event = torch.cuda.Event()
        event.record(self.stream)

        def wait() -> None:
            with device_errors():
                event.synchronize()

        return wait

    def free_memory(self) -> tuple[int, int]:
        """See Device."""
        return torch.cuda.mem_get_info(self.torch_device)


@contextmanager
def device_errors() -> Iterator[None]:
    """Makes what torch raises when the GPU fails a DeviceError, when its memory is full a ResourceError."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as e:
        raise ResourceError(
            "the GPU's memory is full",
            fix="give the KV cache less (--kv-cache-free-gpu-memory-fraction), or end what else runs on the GPU",
        ) from e
    except RuntimeError as e:
        if "CUDA" not in str(e):
            raise
        raise DeviceError(
            f"the GPU failed while it computed: {str(e).splitlines()[0]}",
            fix="see nvidia-smi and dmesg (Xid errors); start again, and if it repeats, report it with --debug",
        ) from e


class _StreamLaunch:
    """A launch that always goes to one stream."""

    def __init__(self, launch: Launch, stream: int) -> None:
        self._launch = launch
        launch.set_stream(stream)
        self.resize, self.enqueue = launch.resize, launch.enqueue
