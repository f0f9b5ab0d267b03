"""Lowering of rotary positions, the KV cache and attention."""

from __future__ import annotations

from typing import Any

from trtllm_cli.build.backends.cpu_native_steps import NativeSteps
from trtllm_cli.graph import Node


class AttentionSteps(NativeSteps):
    """What writes to the paged KV cache, and reads it."""

    def _rope_append(self, node: Node) -> None:
        table, spec = self.add_rope_table(node.attrs["rope"])
        norms = {role: self.add_vector(node.inputs[role]) for role in ("q_norm", "k_norm") if role in node.inputs}
        self._step(
            "rope_append",
            qkv=self._buffer(node.inputs["qkv"]),
            q_out=self._buffer(node.output),
            cache=f"kv:{node.attrs['layer']}",
            table=table,
            rotary_dim=spec.dim,
            layout=spec.layout,
            eps=node.attrs.get("eps"),
            **norms,
            **self._heads(node),
        )

    def _paged_attention(self, node: Node) -> None:
        self._step(
            "paged_attention",
            q=self._buffer(node.inputs["q"]),
            out=self._buffer(node.output),
            cache=f"kv:{node.attrs['layer']}",
            scale=node.attrs["scale"],
            window=node.attrs.get("window"),
            **self._heads(node),
        )

    def _heads(self, node: Node) -> dict[str, Any]:
        names = ("num_heads", "num_kv_heads", "head_dim")
        return {
            **{name: node.attrs[name] for name in names},
            "block_size": self.build_config.tokens_per_block,
            "cache_dtype": self.build_config.kv_cache_dtype,
        }
