"""The flags of `run` and `bench` for engines of several ranks: who starts them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from trtllm_cli.errors import UsageError

_RANKS = "Several ranks"

Launch = Annotated[
    bool,
    typer.Option("--launch", rich_help_panel=_RANKS, help="Start the engine's ranks with mpirun. One rank needs none."),
]
Hostfile = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=_RANKS,
        help="With --launch: a file of the hosts to start ranks on, one a line, such as `node1 slots=8`.",
        show_default=False,
    ),
]
MpirunArgs = Annotated[
    str, typer.Option(rich_help_panel=_RANKS, help='With --launch: more arguments of mpirun, such as "--bind-to numa".')
]


@dataclass(frozen=True)
class LaunchFlags:
    """What the flags say."""

    launch: bool = False
    hostfile: Path | None = None
    mpirun_args: str = ""

    def start_or_follow(self, engine_dir: Path | None, options: dict[str, Any], *, reads_stdin: bool = False) -> bool:
        """Does what there is to do beside leading: starts the ranks, in this process's place, or is one that follows.

        True when that is done and the command is over. `options` are run.load.LoadOptions' fields; `reads_stdin` says
        that rank 0 will want the whole of standard input. Raises UsageError for flags that do not go together.
        """
        from trtllm_cli.run.world import current

        world = current()
        for flag, value in (("--hostfile", self.hostfile), ("--mpirun-args", self.mpirun_args)):
            if value and not self.launch:
                raise UsageError(f"{flag} is for --launch", where=flag, fix="add --launch, or give it to mpirun itself")
        if not self.launch and world.size == 1:
            return False
        if engine_dir is None:
            raise UsageError(
                "--model makes an engine of one rank",
                where="--model",
                fix="convert with --tp-size or --pp-size, build that, and give the engine with --engine-dir",
            )
        if self.launch and world.launched is not None:
            raise UsageError(f"{world.launched.launcher} has started the ranks already", where="--launch")
        from trtllm_cli.engine import Engine
        from trtllm_cli.run.load import LoadOptions, follow_rank

        engine = Engine.open(engine_dir)
        load_options = LoadOptions(**options)
        load_options.check()
        load_options.check_for(engine)
        if world.rank != 0:
            follow_rank(engine, world, load_options)
            return True
        num_ranks = engine.config.pretrained_config.mapping.world_size
        if self.launch and num_ranks > 1:
            from trtllm_cli.commands.launch import launch_ranks

            launch_ranks(num_ranks, self.hostfile, self.mpirun_args, reads_stdin=reads_stdin)
        return False
