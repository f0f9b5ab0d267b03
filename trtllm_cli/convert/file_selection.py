"""Which files of a repository a snapshot takes.

Without patterns: what convert reads, once. Repositories often carry the same weights several times (original/, *.pth,
onnx/, *.gguf, pytorch_model.bin beside safetensors); those are left out unless a pattern asks for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from trtllm_cli.errors import DownloadError

# Of the repository's top folder: configuration, tokenizers, what people should read before they use the model.
PLAIN = (
    "*.json", "*.jinja", "*.model", "*.tiktoken", "vocab.txt", "merges.txt", "vocab.bpe",
    "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "README.md",
)  # fmt: skip
IN_FOLDERS = ("additional_chat_templates/*.jinja",)
NO_WEIGHTS = ("training_args.bin", "optimizer*.bin", "scheduler*.bin", "rng_state*.bin")
MAX_LISTED = 8  # names in a message


def select(names: Iterable[str], include: Sequence[str], exclude: Sequence[str], where: str) -> list[str]:
    """The names to fetch, sorted. `*` of a pattern crosses `/`; a pattern that ends in `/` is a folder.

    Raises DownloadError where a pattern matches nothing, or there are no weights that could be converted.
    """
    names = sorted(names)
    chosen = _included(names, include, where) if include else _usual(names, where)
    kept = [n for n in chosen if not any(matches(n, p) for p in exclude)]
    if not kept:
        raise DownloadError(
            f"nothing is left to fetch from {where}: --exclude {' '.join(exclude)} takes out every file",
            where="--exclude",
            fix="exclude less",
        )
    return kept


def matches(name: str, pattern: str) -> bool:
    """Whether the glob matches the file's path in the repository."""
    return fnmatchcase(name, pattern + "*" if pattern.endswith("/") else pattern)


def _included(names: list[str], include: Sequence[str], where: str) -> list[str]:
    for pattern in include:
        if not any(matches(n, pattern) for n in names):
            raise DownloadError(
                f"no file of {where} matches {pattern!r}", where="--include", fix=f"it has: {listed(names)}"
            )
    return [n for n in names if any(matches(n, p) for p in include)]


def _usual(names: list[str], where: str) -> list[str]:
    top = [n for n in names if "/" not in n]
    plain = [n for n in top if any(fnmatchcase(n, p) for p in PLAIN)]
    plain += [n for n in names if any(fnmatchcase(n, p) for p in IN_FOLDERS)]
    weights = _weights(top)
    if not weights:
        fix = _no_weights_fix(names)
        raise DownloadError(f"{where} has no safetensors or .bin weights", where="--include", fix=fix)
    unused = ".bin.index.json" if weights[0].endswith(".safetensors") else ".safetensors.index.json"
    return sorted({*weights, *(n for n in plain if not n.endswith(unused))})


def _weights(top: list[str]) -> list[str]:
    """Safetensors, or .bin where there are none; not Mistral's own copy of them (`consolidated`)."""
    safetensors = [n for n in top if n.endswith(".safetensors")]
    without_copy = [n for n in safetensors if not n.startswith("consolidated")]
    bins = [n for n in top if n.endswith(".bin") and not any(fnmatchcase(n, p) for p in NO_WEIGHTS)]
    return without_copy or safetensors or bins


def _no_weights_fix(names: list[str]) -> str:
    if ggufs := [n for n in names if n.endswith(".gguf")]:
        example = next((n for n in ggufs if "Q4_K_M" in n), ggufs[0])
        return f'choose a GGUF file, such as --include "{example}"; it has: {listed(ggufs)}'
    return f"name what to fetch with --include; it has: {listed(names)}"


def listed(names: Sequence[str]) -> str:
    """The names for a message: the first few, and how many more."""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return (", ".join(names[:MAX_LISTED]) or "no files") + more
