"""The exceptions that users see.

    TrtllmError                 exit 1   anything below
    ├── UsageError              exit 2   a flag or an argument is wrong
    ├── ArtifactError           exit 3   a snapshot, checkpoint or engine is missing, damaged or of another kind
    │   ├── SnapshotError
    │   ├── CheckpointError
    │   ├── EngineError
    │   ├── TimingCacheError
    │   └── OutputExistsError            the output is there already and --force was not given
    ├── UnsupportedError        exit 4   valid input that cannot be honoured exactly, so it is refused
    ├── DownloadError           exit 5   the hub said no, or cannot be reached
    ├── ResourceError           exit 6   disk, memory, permissions, a tool that the machine lacks
    ├── RequestError            exit 7   a generation request that this engine cannot serve
    ├── AccuracyError           exit 8   a model is worse than the bound that was set for it
    ├── RankError               exit 9   one of several ranks was killed, hangs, or cannot be reached
    └── DeviceError             exit 10  there is no GPU, its driver is too old, or it failed while it computed

Each carries what is wrong (`message`), where (`where`: a file, a field or a flag) and what to do (`fix`). The command
line prints the three and exits with the class's code; `--debug` adds the traceback. `assert` is for our own bugs.
"""

from __future__ import annotations

from typing import ClassVar

INTERNAL = 70  # the exit code of our own bugs: EX_SOFTWARE of sysexits.h


class TrtllmError(Exception):
    """Base of every error that is the user's to mend: what, where, and the fix."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.message]
        if self.where:
            lines.append(f"  in:  {self.where}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


def describe_error(e: BaseException) -> tuple[str, int]:
    """What to say of an error that ends a process, and its exit code."""
    if isinstance(e, TrtllmError):
        return str(e), e.exit_code
    return f"{type(e).__name__}: {e}\n  this is a bug in trtllm; --debug shows where it happened", INTERNAL


class UsageError(TrtllmError):
    """A flag or an argument is wrong."""

    exit_code = 2


class ArtifactError(TrtllmError):
    """An artifact on disk is missing, damaged, or of another kind than the stage reads."""

    exit_code = 3
    remake: ClassVar[str] = "fetch or make it again"  # the fix for a damaged one


class SnapshotError(ArtifactError):
    """A Hugging Face directory or GGUF file cannot be read as one."""

    remake = "fetch it again: trtllm download REPO_ID --verify"


class CheckpointError(ArtifactError):
    """A checkpoint directory cannot be read as one."""

    remake = "make it again: trtllm convert SNAPSHOT --output-dir CKPT"


class EngineError(ArtifactError):
    """An engine directory cannot be read, or was built for something else."""

    remake = "copy the engine again, or rebuild it: trtllm build --checkpoint-dir CKPT --output-dir ENGINE"


class TimingCacheError(ArtifactError):
    """A timing cache cannot be read as one."""

    remake = "give a file that trtllm build --output-timing-cache wrote, or leave the flag out"


class OutputExistsError(ArtifactError):
    """The output is there already and --force was not given."""


class UnsupportedError(TrtllmError):
    """Valid input that we cannot honour exactly; running on would change the numbers."""

    exit_code = 4


class DownloadError(TrtllmError):
    """The hub refused, or cannot be reached, or sent something else than it promised."""

    exit_code = 5


class ResourceError(TrtllmError):
    """The machine lacks something: disk, memory, a permission, a tool."""

    exit_code = 6


class RequestError(TrtllmError):
    """A generation request that this engine cannot serve."""

    exit_code = 7


class AccuracyError(TrtllmError):
    """A quantized model is worse than the bound that was set for it; the message says where."""

    exit_code = 8


class RankError(TrtllmError):
    """One of several ranks was killed, hangs, or cannot be reached."""

    exit_code = 9


class DeviceError(TrtllmError):
    """There is no GPU, its driver is too old, or it failed while it computed."""

    exit_code = 10
