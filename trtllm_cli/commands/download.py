"""`trtllm download`: a model of the Hugging Face hub becomes a snapshot on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from trtllm_cli.convert.hub import Download


def download(
    repo_id: Annotated[
        str, typer.Argument(help="The model on the hub: ORGANIZATION/NAME.", show_default=False, metavar="REPO_ID")
    ],
    revision: Annotated[
        str | None, typer.Option(help="A branch, a tag or a full commit. Default: main.", show_default=False)
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            help="Only files that match this glob; may be given several times. Default: configuration, tokenizer and "
            "safetensors (.bin where there are none).",
            show_default=False,
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Not the files that match this glob; may be given several times.", show_default=False),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            "--output-dir",
            "-o",
            help="Where the snapshot goes. Default: a folder of the cache, one for each commit.",
            show_default=False,
        ),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(help="Access token for gated and private models. Default: HF_TOKEN, or `hf auth login`'s."),
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Use only what is on this machine, as HF_HUB_OFFLINE=1 does.")
    ] = False,
    workers: Annotated[int, typer.Option(help="Files to fetch at a time.")] = 4,
    force: Annotated[
        bool, typer.Option("--force", help="Fetch everything again, and replace the snapshot that is there.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Hash the files that are there already; without it their sizes are compared."),
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only the path, and errors.")] = False,
) -> None:
    """Fetch a model from the Hugging Face hub.

    An interrupted download goes on where it stopped when the same command runs again, and every file's hash is checked
    against the hub's. A finished snapshot is not fetched again. The path is printed last: it is what convert reads.

    HF_ENDPOINT chooses another hub, TRTLLM_CACHE another cache.

    Examples:

        trtllm download HuggingFaceTB/SmolLM2-135M-Instruct

        trtllm download org/name --revision v1.0 --output-dir snapshot

        trtllm download org/name-GGUF --include "*Q4_K_M.gguf"
    """
    from trtllm_cli.commands.console import stderr, stdout
    from trtllm_cli.commands.download_progress import reporting
    from trtllm_cli.convert import hub

    options = hub.DownloadOptions(
        revision=revision,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        output_dir=output_dir,
        token=token,
        offline=offline,
        workers=workers,
        force=force,
        verify=verify,
    )
    with reporting(quiet=quiet or json_) as progress:
        result = hub.download(repo_id, options, progress)
    if json_:
        stdout().print_json(data=as_json(result))
        return
    if not quiet:
        stderr().print(summary(result), markup=False)
    stdout().print(str(result.path), markup=False)


def summary(result: Download) -> str:
    """One line: what it is, how much, and whether it was fetched now."""
    from trtllm_cli.artifact import human_bytes

    m = result.manifest
    how = f"{len(result.fetched)} fetched" if result.fetched else "nothing to fetch"
    revision = f"{m.revision}, " if m.revision != m.commit else ""
    return f"{m.repo_id} ({revision}commit {m.commit}): {len(m.files)} files, {human_bytes(m.size)}, {how}"


def as_json(result: Download) -> dict[str, object]:
    """The result for programs."""
    m = result.manifest
    return {
        "path": str(result.path),
        "snapshot_dir": str(result.snapshot.path),
        "repo_id": m.repo_id,
        "revision": m.revision,
        "commit": m.commit,
        "size": m.size,
        "files": {name: entry.model_dump() for name, entry in m.files.items()},
        "fetched": list(result.fetched),
    }
