"""Logits of an engine's steps against the reference in float32 on the same weights: python -m benchmarks.h200.accuracy

A prompt and some decode steps of a whole model with random weights, both on the GPU. The reference computes the graph
node by node; of FP8 weights it computes the model that rounds its activations alike.

Random weights pass a rounding error on to all later layers, and through FP8's steps enlarge it: 32 layers are far more
than any bound for a trained model allows. So the error stands beside that of the same reference with its activations
rounded to bfloat16, which is what any engine that keeps them so must lose.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping

import torch

from benchmarks.h200.synthetic import FORMATS, SHAPES, config_of, decode_inputs, graph_of, prefill_inputs, runner_of
from trtllm_cli.engine import BuildConfig
from trtllm_cli.graph import Graph, Node
from trtllm_cli.kernels.reference import Reference

BLOCKS = 64  # of the cache
MOST = 2.0  # times the error that rounding alone makes


class Rounded(Reference):
    """The reference with every activation but the residual stream and the logits in bfloat16."""

    def compute(self, node: Node, values: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """One node's outputs."""
        outputs = super().compute(node, values)
        kept = {*self.graph.outputs}
        if node.op in ("embedding", "add"):
            kept.add(node.output)
        if node.op == "add_rms_norm":
            kept.add(node.outputs[1])
        return [o if name in kept else o.bfloat16().float() for name, o in zip(node.outputs, outputs, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--formats", choices=FORMATS, nargs="*", default=["bf16", "fp8"])
    parser.add_argument("--tokens", type=int, default=200, help="of a prompt")
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--output", default="")
    a = parser.parse_args()
    results = []
    for fmt in a.formats:
        tokens = max(512, a.tokens * a.sequences)
        options = {"max_batch_size": max(a.sequences, 8), "max_num_tokens": tokens, "max_seq_len": 1024}
        runner, config = runner_of(a.shape, fmt, num_blocks=BLOCKS, layers=a.layers, **options)
        graph = graph_of(config_of(a.shape, fmt, a.layers), 0, config)
        with torch.device("cuda"), torch.inference_mode():
            torch.backends.cuda.matmul.allow_tf32 = False
            weights = {name: _weight(runner, graph, name) for name in graph.weights}
            exact, rounded = (_reference(kind, graph, weights, config) for kind in (Reference, Rounded))
            prompt = prefill_inputs(config, [a.tokens] * a.sequences)
            decodes = [decode_inputs(config, a.sequences, a.tokens + i) for i in range(a.steps)]
            assert all(len(d.block_tables[0]) == len(prompt.block_tables[0]) for d in decodes), "they begin a block"
            for i, step in enumerate([prompt, *decodes]):
                got = torch.from_numpy(runner.forward(step).copy()).cuda()
                on_device = {k: torch.from_numpy(v).cuda() for k, v in vars(step).items()}
                [want], [coarse] = exact.step(on_device), rounded.step(on_device)
                error, noise = (((x - want).norm() / want.norm()).item() for x in (got, coarse))
                same = (got.argmax(1) == want.argmax(1)).float().mean().item()
                row = {"shape": a.shape, "format": fmt, "sequences": a.sequences, "step": i}
                results.append({**row, "error": error, "rounding": noise, "same_best": same})
                verdict = "ok" if error < MOST * noise else "TOO FAR"
                kind = f"{'decode' if i else 'prompt'} x{a.sequences}"
                print(
                    f"{a.shape} {fmt} {kind}: {error:.2e}, rounding alone {noise:.2e}: {verdict}, best token {same:.0%}"
                )
        del exact, rounded, weights
        runner.close()
        torch.cuda.empty_cache()
    if a.output:
        with open(a.output, "w") as f:
            json.dump(results, f, indent=1)


def _reference(kind: type[Reference], graph: Graph, weights: dict[str, torch.Tensor], config: BuildConfig) -> Reference:
    """One over weights that are in float32 already."""
    made = kind.__new__(kind)
    made.graph, made.block_size, made.comm, made.weights = graph, config.tokens_per_block, None, weights
    made.caches, made.tables, made.num_slots = {}, {}, BLOCKS * config.tokens_per_block
    return made


def _weight(runner, graph, name: str) -> torch.Tensor:
    """A weight of the graph from where the engine has it, in float32."""
    infos = runner._file.tensors
    w = graph.weights[name]
    of_scale = {n.inputs["scale"]: n.inputs["weight"] for n in graph.nodes if "scale" in n.inputs}
    found = next(
        key
        for key in (name, f"{name}.weight.fp8", f"{name}.float32", f"{name}.largest", f"{of_scale.get(name)}.scale.fp8")
        if key in infos
    )
    info = infos[found]
    tensor = runner._weights.bytes_at(found)[: info.nbytes].view(getattr(torch, info.dtype)).view(info.shape)
    if tensor.numel() == 1 and w.shape != (1,):
        tensor = tensor.expand(w.shape)
    return tensor.float() if tensor.is_floating_point() else tensor


if __name__ == "__main__":
    main()
