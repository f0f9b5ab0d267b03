"""Compiles kernels in a process of its own: a JSON request a line on stdin, a JSON answer a line on stdout.

A process of its own, because Triton compiles on one core, and a process that has imported it for its interpreter cannot
compile. Needs triton, and neither torch nor a GPU.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from trtllm_cli.kernels.cuda.kernel import ARCHITECTURES

SIDE_BY_SIDE = "// side by side"  # in assembly
_KINDS = {"fp32": "fp32", "i32": "i32", "i64": "i64", "u64": "i64"}


def main() -> None:
    """Serves requests until stdin ends."""
    out = sys.stdout
    sys.stdout = sys.stderr  # what the compiler prints is not an answer
    for line in sys.stdin:
        try:
            answer = _compile(json.loads(line))
        except Exception as e:
            answer = {"error": f"{type(e).__name__}: {e}"}
        out.write(json.dumps(answer) + "\n")
        out.flush()


def _compile(request: dict[str, Any]) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    _assemble_by_cuda_12()
    function = getattr(importlib.import_module(request["module"]), request["function"])
    types, constants = dict(request["args"]), dict(request["constants"])
    signature: dict[str, str] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    params = []
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        kind, _, multiple = types[name].partition(":")
        signature[name] = kind
        params.append("ptr" if kind.startswith("*") else _KINDS[kind])
        if kind.startswith("*") or multiple == "16":
            attrs[i,] = [["tt.divisibility", 16]]
    if unknown := (types.keys() | constants.keys()) - set(function.arg_names):
        raise TypeError(f"{request['function']} has no argument {', '.join(sorted(unknown))}")
    options = {
        "num_warps": request["num_warps"],
        "num_stages": request["num_stages"],
        "launch_pdl": bool(constants.get("PDL")),
    }
    source_of = GluonASTSource if function.is_gluon() else ASTSource
    source = source_of(function, signature, constants, attrs)
    major, minor = ARCHITECTURES[request["arch"]]
    compiled = triton.compile(source, target=GPUTarget("cuda", 10 * major + minor, 32), options=options)
    metadata = compiled.metadata
    if metadata.global_scratch_size:
        raise ValueError(f"{request['function']} needs scratch memory, which the launcher does not give")
    check_assembly(compiled.asm["ttgir"])
    cubin = compiled.asm["cubin"]
    registers, spills = _resources(cubin, metadata.name)
    return {
        "entry": metadata.name,
        "cubin": base64.b64encode(cubin).decode(),
        "params": params,
        "names": [name for name in function.arg_names if name not in constants],
        "num_warps": metadata.num_warps,
        "shared": metadata.shared,
        "uses_pdl": options["launch_pdl"],
        "registers": registers,
        "spills": spills,
        "ptx": compiled.asm["ptx"] if request.get("ptx") else "",
    }


def _assemble_by_cuda_12() -> None:
    """Triton brings two assemblers. From 3.7 on the one that it takes for some architectures is of CUDA 13: a driver of
    CUDA 12 loads nothing of that, and driver.LEAST_DRIVER is one. The other one knows all our architectures as well.
    """
    from triton import knobs

    if not knobs.nvidia.ptxas_blackwell.version.startswith("12."):
        os.environ["TRITON_PTXAS_BLACKWELL_PATH"] = knobs.nvidia.ptxas.path


def check_assembly(ttgir: str) -> None:
    """Raises ValueError where inline assembly that says so does not get elements that are side by side.

    It takes a thread's registers several at a time, and their order is the compiler's choice.
    """
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.(.*)$", ttgir, re.MULTILINE))
    for line in ttgir.splitlines():
        found = re.search(r'elementwise_inline_asm "(.*?)" \{.*packed_element = (\d+).*: tensor<\d+x\w+, (#\w+)>', line)
        if found is None or SIDE_BY_SIDE not in found[1]:
            continue
        count, layout = int(found[2]), layouts.get(found[3], "")
        if row := re.match(r"blocked<\{sizePerThread = \[(\d+)\]", layout):
            fits = int(row[1]) % count == 0
        else:
            wanted = "linear<{register = [" + ", ".join(f"[{1 << i}]" for i in range(count.bit_length() - 1))
            fits = layout.startswith(wanted)
        if not fits:
            raise ValueError(f"the compiler does not keep {count} elements side by side for inline assembly: {layout}")


def _resources(cubin: bytes, entry: str) -> tuple[int, int]:
    """Registers of a thread, and the bytes that it keeps on its stack for want of registers."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__path__[0]) / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(rf"Function {re.escape(entry)}:\s*REG:(\d+) STACK:(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (-1, -1)


if __name__ == "__main__":
    main()
