"""A rank of an engine on GPUs: the logits of some steps, as JSON from the rank that has them. Run under mpirun."""

import json
import sys
from pathlib import Path

from tests.batches import Sequences
from trtllm_cli.engine import Engine
from trtllm_cli.run import world as worlds
from trtllm_cli.run.backends import load_runner

STEPS = [{0: list(range(1, 40)), 1: [9, 8]}, {0: [11], 1: [5, 4, 3]}, {1: [3], 0: [4]}, {0: [7], 1: [2]}]


def main() -> None:
    engine = Engine.open(Path(sys.argv[1]))
    world = worlds.join_for(engine)
    rank = world.place(engine)
    with world.comm.activity.working("load"):
        runner = load_runner(engine, rank, world.comm)
        runner.allocate_kv_cache(64)
    batch = Sequences(block_size=engine.config.build_config.tokens_per_block)
    with world.comm.activity.getting_on(60):
        logits = [runner.forward(batch.step(new)) for new in STEPS]
        found = [x.tolist() for x in logits if x is not None]
    mapping = rank.mapping
    if world.rank == mapping.world_size - mapping.tp_size:
        sys.stdout.write(json.dumps({"logits": found, "has_peers": runner.has_peers}) + "\n")
        sys.stdout.flush()
    runner.close()
    world.leave()


if __name__ == "__main__":
    main()
