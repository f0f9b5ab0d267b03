"""Lowering of rotary positions, the KV cache and attention."""

from __future__ import annotations

from typing import Any

from trtllm_cli.build.backends.cpu_native_steps import NativeSteps
from trtllm_cli.graph import Node


class AttentionSteps(NativeSteps):
    """What writes to the paged KV cache, and reads it."""

    def _rope(self, node: Node) -> None:
        table, spec = self.add_rope_table(node.attrs["rope"])
        heads = node.attrs["num_heads"]
        self._step(
            "rope",
            x=self._buffer(node.inputs["x"]),
            out=self._buffer(node.output),
            table=table,
            num_heads=heads,
            head_dim=self._width(node.output) // heads,
            rotary_dim=spec.dim,
            layout=spec.layout,
        )

    def _rope_append(self, node: Node) -> None:
        norms = {role: self.add_vector(node.inputs[role]) for role in ("q_norm", "k_norm") if role in node.inputs}
        rotation: dict[str, Any] = {}
        if "rope" in node.attrs:
            table, spec = self.add_rope_table(node.attrs["rope"])
            rotation = {"table": table, "rotary_dim": spec.dim, "layout": spec.layout}
        self._step(
            "rope_append",
            qkv=self._buffer(node.inputs["qkv"]),
            q_out=self._buffer(node.output),
            num_heads=node.attrs["num_heads"],
            eps=node.attrs.get("eps"),
            **norms,
            **rotation,
            **self._cache(node),
        )

    def _attention(self, node: Node) -> None:
        k, v = self._buffer(node.inputs["k"]), self._buffer(node.inputs["v"])
        self._step("kv_append", k=k, v=v, v_head_dim=node.attrs.get("v_head_dim"), **self._cache(node))
        self._paged_attention(node)

    def _paged_attention(self, node: Node) -> None:
        a = node.attrs
        self._step(
            "paged_attention",
            q=self._buffer(node.inputs["q"]),
            out=self._buffer(node.output),
            num_heads=a["num_heads"],
            v_head_dim=a.get("v_head_dim"),
            scale=a["scale"],
            window=a.get("window"),
            softcap=a.get("softcap"),
            sinks=self.add_vector(node.inputs["sinks"]) if "sinks" in node.inputs else None,
            rows=self._rows(node.output),
            **self._cache(node),
        )

    def _cache(self, node: Node) -> dict[str, Any]:
        """The layer's KV cache."""
        return {
            "cache": f"kv:{node.attrs['layer']}",
            "num_kv_heads": node.attrs["num_kv_heads"],
            "head_dim": node.attrs["head_dim"],
            "block_size": self.build_config.tokens_per_block,
            "cache_dtype": self.build_config.kv_cache_dtype,
            "kv_scale": self.add_vector(node.inputs["kv_scale"]) if "kv_scale" in node.inputs else None,
        }
