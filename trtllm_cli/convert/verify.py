"""Holds a downloaded snapshot against its manifest, while convert reads it.

Small files and every size are checked first, since they decide what is read. The weights are hashed in a thread
beside the conversion, which is done by the time that they are: the checkpoint gets its name when both are.
"""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from threading import Thread

from trtllm_cli.errors import SnapshotError
from trtllm_cli.snapshot import MANIFEST, Manifest, Snapshot, read_manifest

_SMALL = (".json", ".model", ".jinja", ".txt")
_DEPTH = 3  # directories between a snapshot and its .gguf files, at most


def verify_aside(source: Path, *, only_config: bool = False) -> Future[None]:
    """Done when every file that convert reads of `source` is as it was downloaded; at once where no manifest says.

    With `only_config` that is config.json alone. Raises SnapshotError for a file that is missing or altered; for the
    weights' bytes the future does.
    """
    done: Future[None] = Future()
    root = source if source.is_dir() else next((p for p in source.parents[:_DEPTH] if (p / MANIFEST).is_file()), None)
    manifest = read_manifest(root) if root else None
    if root is None or manifest is None:
        done.set_result(None)
        return done
    if only_config:
        _verify(root, manifest, [name for name in manifest.files if name == "config.json"])
        done.set_result(None)
        return done
    weights = _weights(manifest, None if source.is_dir() else source.relative_to(root).as_posix())
    small = [name for name in manifest.files if name.endswith(_SMALL) and source.is_dir()]
    _verify(root, manifest, [*small, *weights], hashes=False)
    _verify(root, manifest, small)

    def verify() -> None:
        try:
            _verify(root, manifest, weights)
            done.set_result(None)
        except BaseException as e:
            done.set_exception(e)

    Thread(target=verify, name="trtllm-verify", daemon=True).start()
    return done


def _weights(manifest: Manifest, gguf: str | None) -> list[str]:
    """The weight files that convert reads: the .gguf, else what HfReader would open."""
    if gguf is not None:
        return [gguf] if gguf in manifest.files else []
    top = [name for name in manifest.files if "/" not in name]
    for kind in (".safetensors", ".bin", ".gguf"):
        if found := [name for name in top if name.endswith(kind)]:
            return found
    return []


def _verify(root: Path, manifest: Manifest, names: list[str], *, hashes: bool = True) -> None:
    only = manifest.model_copy(update={"files": {name: manifest.files[name] for name in names}})
    try:
        Snapshot(root, only).verify(hashes=hashes)
    except SnapshotError as e:
        fix = f"{e.fix} (or remove {MANIFEST} there if the change is yours)"
        raise SnapshotError(e.message, where=e.where, fix=fix) from None
