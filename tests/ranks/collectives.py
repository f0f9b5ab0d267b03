"""What ranks tell each other, held against numpy: one rank's program, started by test_communicators.py.

    python collectives.py mpi | torch

Prints a line of JSON when all is right: the rank, and a hash of each result.
"""

import hashlib
import json
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from trtllm_cli.run.communicator import Activity
from trtllm_cli.run.mpi import SMALL

# Rows and columns: one number, a token's activations, those just below, at and above the size from which ranks sum a
# share each, more than one message's worth, and one that no number of ranks divides.
SHAPES = [(1, 1), (3, 64), (1, SMALL // 4 - 1), (1, SMALL // 4), (1, SMALL // 4 + 1), (257, 1024), (7, 5003)]
# Those of 3 are for MPI alone: torch's ranks must have been in as many groups before as the others of a new one, which
# those of a mapping have.
GROUPS = {2: [(0,), (1,)], 3: [(0, 1), (1, 2), (0, 2)], 4: [(0, 1), (2, 3), (0, 2), (1, 3), (0, 1, 3), (0, 1)]}


def of_rank(rank, shape):
    """A rank's numbers: large and small ones, so that another order of their sum shows in the bits."""
    random = np.random.default_rng([rank, *shape])
    return (random.normal(size=shape) * 10.0 ** random.integers(-4, 5, shape)).astype(np.float32)


def in_order(parts):
    total = parts[0].copy()
    for part in parts[1:]:
        total = total + part
    return total


def check_sums(comm, group):
    results = []
    for shape in SHAPES:
        want = in_order([of_rank(rank, shape) for rank in group])
        for _ in range(3):
            x = of_rank(comm.rank, shape)
            comm.all_reduce(x, group)
            np.testing.assert_array_equal(x, want)
        results.append(x)
    return results


def check_sums_of_parts(comm, group):
    """A token's sum has the same bits alone and among many."""
    whole = of_rank(comm.rank, (64, 1024))
    rows = [whole[i : i + 1].copy() for i in (0, 31, 63)]
    comm.all_reduce(whole, group)
    for i, row in zip((0, 31, 63), rows, strict=True):
        comm.all_reduce(row, group)
        np.testing.assert_array_equal(row[0], whole[i])
    return [whole]


def check_gathered(comm, group):
    results = []
    for shape in [*SHAPES, (0, 64)]:
        want = np.concatenate([of_rank(rank, shape) for rank in group], axis=-1)
        got = comm.all_gather(of_rank(comm.rank, shape), group)
        np.testing.assert_array_equal(got, want)
        results.append(got)
    return results


def check_broadcast(comm):
    """Rank 0 sends one after another without a wait; the last is empty."""
    sizes = (5, 1, 100_000, 0, 63, 0)
    messages = [np.random.default_rng(size).integers(-(2**31), 2**31, size).astype(np.int32) for size in sizes]
    for message in messages:
        got = comm.broadcast(message if comm.rank == 0 else None)
        np.testing.assert_array_equal(got, message)
    return messages


def check_sent(comm):
    """Everybody sends to the next before anybody receives; what was sent is written over at once."""
    shapes = [(2, 8), (0, 8), (1024, 1024), (1, 1)]
    after, before = (comm.rank + 1) % comm.world_size, (comm.rank - 1) % comm.world_size
    for shape in shapes:
        x = of_rank(comm.rank, shape)
        comm.send(x, to=after)
        x.fill(np.nan)
    comm.push()
    for shape in shapes:
        out = np.full(shape, np.nan, np.float32)
        comm.recv(out, source=before)
        np.testing.assert_array_equal(out, of_rank(before, shape))


def check_exchanged(comm):
    texts = [("grüße " * rank * 10_000) for rank in range(comm.world_size)]
    assert comm.exchange(texts[comm.rank]) == texts


def check_flushed(comm):
    """After `flush` a large message arrives though its sender does nothing more for it."""
    message = np.arange(1 << 20, dtype=np.int32)
    got = comm.exchange(tempfile.mkdtemp() if comm.rank == 0 else "")[0]
    here = Path(got)
    if comm.rank == 0:
        comm.broadcast(message)
        comm.flush()
        deadline = time.monotonic() + 20
        while len(list(here.iterdir())) < comm.world_size - 1:
            assert time.monotonic() < deadline, "the message has not arrived"
            time.sleep(0.01)
        shutil.rmtree(here)
        return
    np.testing.assert_array_equal(comm.broadcast(None), message)
    (here / str(comm.rank)).touch()


def check_idle(comm):
    """Who waits for rank 0's next message says so, and sleeps."""
    comm.exchange("now")
    if comm.rank == 0:
        time.sleep(0.8)
        comm.broadcast(np.ones(1, np.int32))
        return
    activity, seen, cpu = comm.activity, [], time.process_time()
    before = activity.done()
    threading.Timer(0.4, lambda: seen.append((activity.idle, activity.waits))).start()
    comm.broadcast(None)
    cpu = time.process_time() - cpu
    assert seen == [(True, True)]
    assert activity.done() > before
    assert cpu < 0.4, f"{cpu} s of 0.8"


def main():
    if sys.argv[1] == "torch":
        from trtllm_cli.run.torch_distributed import TorchCommunicator as Communicator
    else:
        from trtllm_cli.run.mpi import MpiCommunicator as Communicator
    comm = Communicator(Activity())
    everybody = tuple(range(comm.world_size))
    results = {
        "sums": check_sums(comm, everybody),
        "sums of parts": check_sums_of_parts(comm, everybody),
        "gathered": check_gathered(comm, everybody),
        "broadcast": check_broadcast(comm),
    }
    check_sent(comm)
    check_exchanged(comm)
    for group in GROUPS[comm.world_size]:
        if comm.rank in group:
            check_sums(comm, group)
            check_gathered(comm, group)
    check_flushed(comm)
    check_idle(comm)
    comm.finish()
    bits = {name: hashlib.sha256(b"".join(x.tobytes() for x in xs)).hexdigest() for name, xs in results.items()}
    print(json.dumps({"rank": comm.rank, "bits": bits}), flush=True)


if __name__ == "__main__":
    main()
