"""The flags that go with --model: how the engine is made, where it is not there yet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trtllm_cli.errors import UsageError

if TYPE_CHECKING:
    from trtllm_cli.artifact import Kind
    from trtllm_cli.convert.options import RandomWeights

PANEL = "With --model"


def _option(text: str, *names: str) -> Any:
    return typer.Option(*names, rich_help_panel=PANEL, help=text, show_default=False)


Revision = Annotated[str | None, _option("A branch, a tag or a full commit. Default: main.")]
Offline = Annotated[bool, _option("Use only what is on this machine, as HF_HUB_OFFLINE=1 does.", "--offline")]
Token = Annotated[
    str | None, _option("Access token for gated and private models. Default: HF_TOKEN, or `hf auth login`'s.")
]
Dtype = Annotated[str | None, _option("float32, float16 or bfloat16. Default: the model's own.")]
WeightDtype = Annotated[
    str | None, _option("float32, bfloat16, int8 or int4 (weight-only). Default: as the model has them.")
]
MaxSeqLen = Annotated[
    int | None, _option("Most tokens of a request, prompt and output. Default: what the model allows, up to 4096.")
]
MaxBatchSize = Annotated[int | None, _option("Most sequences in a step. Default: 8.")]

# The flags of each stage, and the kinds of source that go through it; "hub" is a model's id.
_STAGES = (
    (("revision", "offline", "token"), ("hub",), "download"),
    (("dtype", "qformat", "random"), ("hub", "snapshot", "gguf"), "convert"),
    (("weight_dtype", "max_seq_len", "max_batch_size"), ("hub", "snapshot", "gguf", "checkpoint"), "build"),
)


@dataclass(frozen=True)
class ModelFlags:
    """As they were given; None or False where they were not."""

    revision: str | None = None
    offline: bool = False
    token: str | None = None
    dtype: str | None = None
    weight_dtype: str | None = None
    max_seq_len: int | None = None
    max_batch_size: int | None = None
    qformat: str | None = None  # of random weights
    random: RandomWeights | None = None  # the model is a config.json alone

    def check(self, engine_dir: Path | None, model: str | None) -> None:
        """Raises UsageError unless there is just one of engine and model, and each flag means something for it."""
        if engine_dir is None and model is None:
            raise UsageError(
                "no engine: give an engine or a model",
                where="--engine-dir",
                fix="--engine-dir ENGINE, as trtllm build writes it, or --model MODEL to have one built",
            )
        if engine_dir is not None and model is not None:
            raise UsageError(
                "--engine-dir and --model are both given: give an engine or a model, not both",
                where="--model",
                fix="leave one of them out",
            )
        kind = "engine" if model is None else "snapshot" if self.random is not None else _kind(model)
        for names, kinds, stage in _STAGES:
            given = [name for name in names if getattr(self, name) not in (None, False)]
            if given and kind not in kinds:
                flag = "--" + given[0].replace("_", "-")
                raise UsageError(
                    f"{flag} is chosen when {_DONE[stage]}, and {engine_dir or model} is "
                    f"a{'n' if kind == 'engine' else ''} {kind} already",
                    where=flag,
                    fix=f"leave it out, or run trtllm {stage} again" + ("" if model else ", or give --model"),
                )

    def engine(self, model: str, *, quiet: bool = False) -> Path:
        """The engine of a model, made if it was not before."""
        from trtllm_cli.build.builder import BuildOptions
        from trtllm_cli.commands.choices import choice
        from trtllm_cli.commands.stages import ensure_engine
        from trtllm_cli.convert.hub import DownloadOptions
        from trtllm_cli.convert.pipeline import ConvertOptions
        from trtllm_cli.engine import WeightDType
        from trtllm_cli.model_config import DType

        choice(self.dtype, DType, "--dtype")
        choice(self.weight_dtype, WeightDType, "--weight-dtype")
        given = {name: value for name, value in vars(self).items() if value is not None}

        def options(stage: int) -> dict[str, Any]:
            return {name: given[name] for name in _STAGES[stage][0] if name in given}

        return ensure_engine(
            model,
            download=DownloadOptions(**options(0)),
            convert=ConvertOptions(**options(1)),
            build=BuildOptions(**options(2)),
            quiet=quiet,
        )


_DONE = {"download": "a model is downloaded", "convert": "a model is converted", "build": "an engine is built"}


def _kind(model: str) -> Kind | str:
    """What there is at the path, or "hub" where there is nothing."""
    from trtllm_cli.artifact import detect

    path = Path(model).expanduser()
    return detect(path) if path.exists() else "hub"
