"""One engine in a process of its own, told on stdin what to run; answers on stdout, one JSON object a line.

`cpu_peers.py` starts this under the interpreter that has the peer. Each peer implements `run`: process the prompts
together, choose greedily, and say how long the prefill took (to the first token of every prompt) and how long the
tokens after it took.

    {"do": "run", "prompts": [[ids]], "decode": 64} -> {"prefill_s": ..., "decode_s": ..., "tokens": [[ids]]}
    {"do": "score", "windows": [[ids]], "chunk": 0, "save": "" } -> {"nll": [...], "argmax": [[ids]]}
    {"do": "memory"} -> {"peak_rss_bytes": ...}
    {"do": "stop"}
"""

import argparse
import ctypes
import json
import os
import signal
import sys
import time

clock = time.perf_counter


class Scores:
    """Of windows of text, given one after another: the negative log likelihoods of their tokens, and the likeliest."""

    def __init__(self, save):
        self.save = save  # where all logits go, or ""
        self.nll, self.argmax, self.logits = [], [], []

    def add(self, window, logits):
        """Takes float32 logits [len(window), vocabulary]."""
        import numpy as np

        logits = np.asarray(logits, np.float32)
        top = logits.max(-1, keepdims=True)
        log_sum = np.log(np.exp(logits - top, dtype=np.float64).sum(-1)) + top[:, 0]
        chosen = logits[np.arange(len(window) - 1), window[1:]]
        self.nll.append(float((log_sum[:-1] - chosen).sum()))
        self.argmax.append(logits.argmax(-1).tolist())
        if self.save:
            self.logits.append(logits.copy())

    def result(self):
        import numpy as np

        if self.save:
            np.save(self.save, np.stack(self.logits))
        return {"nll": self.nll, "argmax": self.argmax}


class Transformers:
    """transformers in eager mode with its own cache, one forward a step: `generate` without its per-token overhead."""

    def __init__(self, path, precision, threads):
        import torch
        import transformers

        torch.set_num_threads(threads)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.torch = torch
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"

    def run(self, prompts, decode):
        with self.torch.inference_mode():
            start = clock()
            out = self.model(self.torch.tensor(prompts), use_cache=True, logits_to_keep=1)
            tokens = [out.logits[:, -1].argmax(-1)]
            first = clock()
            for _ in range(decode):
                out = self.model(tokens[-1][:, None], past_key_values=out.past_key_values, use_cache=True)
                tokens.append(out.logits[:, -1].argmax(-1))
            done = clock()
        return first - start, done - first, self.torch.stack(tokens, 1).tolist()

    def score(self, windows, scores):
        with self.torch.inference_mode():
            for window in windows:
                scores.add(window, self.model(self.torch.tensor([window])).logits[0].float().numpy())


class LlamaCpp:
    """llama.cpp through llama-cpp-python's bindings of its C API."""

    def __init__(self, path, _precision, threads):
        import llama_cpp
        import numpy as np

        self.c, self.np = llama_cpp, np
        llama_cpp.llama_log_set(_SILENT := llama_cpp.llama_log_callback(lambda *_: None), ctypes.c_void_p())
        self.silent = _SILENT
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 8 * 256, 1024, 512, 8
        params.n_threads = params.n_threads_batch = threads
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(1024, 0, 8)
        self.version = f"llama-cpp-python {llama_cpp.__version__}"
        self.detail = " ".join(
            part.split(" = ")[0].strip().split(" : ")[-1]
            for part in llama_cpp.llama_print_system_info().decode().split("|")
            if " = 1" in part
        )

    def _forward(self, rows):
        """rows: (token, position, sequence, whether its logits are wanted). Returns the greedy next tokens."""
        wanted = []
        self.batch.n_tokens = len(rows)
        for i, (token, position, sequence, logits) in enumerate(rows):
            self.batch.token[i], self.batch.pos[i] = token, position
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, sequence
            self.batch.logits[i] = logits
            if logits:
                wanted.append(i)
        if self.c.llama_decode(self.context, self.batch):
            raise RuntimeError("llama_decode failed")
        pointers = [self.c.llama_get_logits_ith(self.context, i) for i in wanted]
        return [int(self.np.ctypeslib.as_array(p, shape=(self.vocab_size,)).argmax()) for p in pointers]

    def run(self, prompts, decode):
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)
        start = clock()
        rows = [(t, i, s, i == len(p) - 1) for s, p in enumerate(prompts) for i, t in enumerate(p)]
        tokens = [self._forward(rows)]
        first = clock()
        for step in range(decode):
            tokens.append(self._forward([(t, len(prompts[s]) + step, s, 1) for s, t in enumerate(tokens[-1])]))
        done = clock()
        return first - start, done - first, [list(row) for row in zip(*tokens, strict=True)]

    def score(self, windows, scores):
        for window in windows:
            self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)
            self._forward([(t, i, 0, 1) for i, t in enumerate(window)])
            rows = self.np.ctypeslib.as_array(
                self.c.llama_get_logits(self.context), shape=(len(window), self.vocab_size)
            )
            scores.add(window, rows)


class OpenVino:
    """OpenVINO GenAI, which reads GGUF files by itself; times are from its own record of each token."""

    def __init__(self, path, _precision, threads):
        import openvino_genai as genai

        self.genai = genai
        scheduler = genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = 1024
        scheduler.max_num_seqs = 8
        scheduler.cache_size = 1
        self.pipe = genai.LLMPipeline(path, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=threads)
        self.version = f"openvino-genai {genai.__version__.split('-')[0]}"

    def run(self, prompts, decode):
        import numpy as np
        import openvino

        ids = np.array(prompts, dtype=np.int64)
        inputs = self.genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        config = self.genai.GenerationConfig()
        config.max_new_tokens = decode + 1
        config.ignore_eos = True
        config.do_sample = False
        start = clock()
        result = self.pipe.generate(inputs, config)
        total = clock() - start
        first = result.perf_metrics.raw_metrics.m_times_to_first_token[0] / 1e6  # its µs, from the start of generate
        return first, total - first, [list(map(int, row)) for row in result.tokens]


class OnnxRuntime:
    """onnxruntime-genai, on a model that its own builder made."""

    def __init__(self, path, _precision, threads):
        import onnxruntime_genai as og

        self.og = og
        config = og.Config(path)
        overlay = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
        config.overlay(json.dumps(overlay))
        self.model = og.Model(config)
        self.version = f"onnxruntime-genai {og.__version__}"

    def run(self, prompts, decode):
        import numpy as np

        params = self.og.GeneratorParams(self.model)
        length = len(prompts[0]) + decode + 1
        params.set_search_options(
            max_length=length,
            min_length=length,
            batch_size=len(prompts),
            do_sample=False,
            past_present_share_buffer=True,
        )
        generator = self.og.Generator(self.model, params)
        start = clock()
        generator.append_tokens(np.array(prompts, dtype=np.int32))
        generator.generate_next_token()
        first = clock()
        for _ in range(decode):
            generator.generate_next_token()
        done = clock()
        tokens = [generator.get_sequence(i)[len(prompts[0]) :].tolist() for i in range(len(prompts))]
        del generator
        return first - start, done - first, tokens

    def score(self, windows, scores):
        import numpy as np

        for window in windows:
            params = self.og.GeneratorParams(self.model)
            params.set_search_options(max_length=len(window) + 1, batch_size=1)
            generator = self.og.Generator(self.model, params)
            generator.append_tokens(np.array([window], dtype=np.int32))
            scores.add(window, generator.get_output("logits")[0])
            del generator


class Ours:
    """A trtllm engine, through its executor."""

    def __init__(self, path, _precision, threads):
        from pathlib import Path

        from trtllm_cli.bench.offline import RuntimeOptions, Session
        from trtllm_cli.version import __version__

        self.session = Session.open(Path(path), RuntimeOptions(num_threads=threads), verify=False)
        self.version = f"trtllm {__version__}"
        self.detail = ", ".join(self.session.engine.config.target.values())
        self.next_id = 0

    def run(self, prompts, decode):
        from trtllm_cli.run.request import SamplingParams

        executor = self.session.executor
        params = SamplingParams(max_tokens=decode + 1, ignore_eos=True)
        tokens = {}
        first = 0.0
        start = clock()
        for prompt in prompts:
            executor.add_request(self.next_id, prompt, params)
            tokens[self.next_id] = []
            self.next_id += 1
        while executor.has_work:
            for event in executor.step():
                if event.token_id is not None:
                    tokens[event.request_id].append(event.token_id)
            if not first and all(tokens.values()):
                first = clock()
        done = clock()
        return first - start, done - first, list(tokens.values())

    def score(self, windows, scores, chunk=0):
        """All windows side by side, `chunk` tokens of each in a step; 0: one window after another, whole."""
        import numpy as np

        size = self.session.executor.config.tokens_per_block
        groups = [windows] if chunk else [[w] for w in windows]
        for group in groups:
            length, blocks = len(group[0]), -(-len(group[0]) // size)
            logits = [[] for _ in group]
            for start in range(0, length, chunk or length):
                stop = min(start + (chunk or length), length)
                out = self.session.runner.forward(self._inputs(group, start, stop, blocks, size))
                for row, part in zip(logits, np.split(out.copy(), len(group)), strict=True):
                    row.append(part)
            for window, rows in zip(group, logits, strict=True):
                scores.add(window, np.concatenate(rows))

    def _inputs(self, group, start, stop, blocks, size):
        """Tokens start to stop of each window; window w has blocks w * blocks and on."""
        import numpy as np

        from trtllm_cli.run.model_inputs import ModelInputs

        place = np.arange(start, stop)
        count = len(group) * len(place)
        arrays = (
            [token for window in group for token in window[start:stop]],
            np.tile(place, len(group)),
            np.concatenate([w * blocks * size + place for w in range(len(group))]),
            np.arange(len(group) * blocks).reshape(len(group), blocks),
            np.arange(0, count + 1, len(place)),
            np.full(len(group), stop),
            np.arange(count),
        )
        return ModelInputs(*(np.ascontiguousarray(a, dtype=np.int32) for a in arrays))


KINDS = {
    "transformers": Transformers,
    "llama.cpp": LlamaCpp,
    "openvino": OpenVino,
    "onnxruntime": OnnxRuntime,
    "trtllm": Ours,
}


def peak_rss_bytes():
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return 0


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("path")
    parser.add_argument("precision")
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()

    if sys.platform == "linux":  # die with the parent, even while stopped
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)

    # Answers go to the real stdout; what libraries print goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**fields):
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    try:
        start = clock()
        peer = KINDS[args.kind](args.path, args.precision, args.threads)
        answer(ready=True, version=peer.version, detail=getattr(peer, "detail", ""), load_s=clock() - start)
        for line in sys.stdin:
            command = json.loads(line)
            if command["do"] == "stop":
                break
            if command["do"] == "memory":
                answer(peak_rss_bytes=peak_rss_bytes())
                continue
            if command["do"] == "score":
                scores = Scores(command.get("save", ""))
                options = {"chunk": command["chunk"]} if command.get("chunk") else {}
                peer.score(command["windows"], scores, **options)
                answer(**scores.result())
                continue
            prefill, decode, tokens = peer.run(command["prompts"], command["decode"])
            answer(prefill_s=prefill, decode_s=decode, tokens=tokens)
    except Exception as e:  # whatever a peer throws, the round goes on without it
        answer(error=f"{type(e).__name__}: {e}")
        raise SystemExit(1) from e
    os._exit(0)  # some peers crash while they are torn down


if __name__ == "__main__":
    main()
