"""`trtllm`, with a fault on one rank: started under mpirun by the tests of failures.

    python faulty.py KIND STAGE RANK ARGS...

KIND is raise, kill (SIGKILL), stop (SIGSTOP) or hang; STAGE is start, load, prefill, decode or idle. `idle` takes a
command line with --interactive, and strikes while rank 0 waits for something to do.
"""

import os
import signal
import sys
import time


def strike(kind):
    print(f"struck at {time.time()}", file=sys.stderr, flush=True)
    if kind == "raise":
        raise RuntimeError("a fault that was planted")
    if kind in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
    time.sleep(1000)


def plant(kind, stage):
    """Makes this rank fail when it comes to `stage`."""
    from trtllm_cli.run import load, world
    from trtllm_cli.run.backends.cpu import CpuRunner

    if stage == "start":
        world.join = lambda *args: strike(kind)
    elif stage == "load":
        load.load_runner = lambda *args, **kwargs: strike(kind)
    else:
        forward = CpuRunner.forward

        def faulty(self, inputs):
            if (stage == "prefill") == (inputs.num_tokens > inputs.num_seqs):
                strike(kind)
            return forward(self, inputs)

        CpuRunner.forward = faulty


def plant_idle(kind, rank, victim):
    """While rank 0 waits for a prompt."""
    from trtllm_cli.commands import run_interactive
    from trtllm_cli.run.mpi import MpiCommunicator

    def converse(llm, options):
        time.sleep(0.5)
        if victim == 0:
            strike(kind)
        time.sleep(1000)

    def await_step(self, status):
        time.sleep(0.5)
        strike(kind)

    run_interactive.converse = converse
    if rank == victim != 0:
        MpiCommunicator._await_step = await_step


def main():
    kind, stage, victim, *args = sys.argv[1:]
    rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "-1")))
    if stage == "idle":
        plant_idle(kind, rank, int(victim))
    elif rank == int(victim):
        plant(kind, stage)
    from trtllm_cli.cli import call

    sys.exit(call(args))


if __name__ == "__main__":
    main()
