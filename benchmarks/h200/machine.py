"""The machine and the software that figures are of."""

from __future__ import annotations

import importlib.metadata
import subprocess
from typing import Any

from benchmarks import common


def machine() -> dict[str, Any]:
    """benchmarks/common.py's, with the GPU, its driver, torch and triton."""
    import torch

    found = common.machine()
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    found["driver"] = _driver()
    found["torch"], found["cuda"] = torch.__version__, torch.version.cuda or "none"
    try:
        found["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        found["triton"] = "none"
    return found


def machine_line(m: dict[str, Any]) -> str:
    """The same in a line of Markdown."""
    return (
        f"{m['gpu']}, driver {m['driver']}, torch {m['torch']} (CUDA {m['cuda']}), triton {m['triton']}, "
        f"{m['cpu']}, {m['cores']} cores, Python {m['python']}, trtllm {m['trtllm']} ({m['commit']})"
    )


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return done.stdout.split("\n")[0].strip()
