"""Attention on the GPU: rotary positions, the cache's append, and the kernels for decode and prefill."""

from __future__ import annotations

from typing import Any

from trtllm_cli.build.backends.cuda_program import TYPES, CudaLowering, Dim, Launch
from trtllm_cli.errors import UnsupportedError
from trtllm_cli.functional import NUM_LOGITS, NUM_SEQS, NUM_TOKENS
from trtllm_cli.graph import Node
from trtllm_cli.kernels.reference import v_head_dim

_KV_DTYPES = {"bfloat16": "bfloat16", "int8": "int8", "fp8": "float8_e4m3fn"}
NUM_COPIES = "num_copies"
# Of a step's sequences those from the first one on that has several tokens; all, or none if none has one token alone.
NUM_PROMPTS, NUM_ALONE = "num_prompts", "num_alone"
NUM_SPLITS = "num_splits"  # programs that share the longest sequence's cache
_COPIED_AT_ONCE = 16  # bytes
_COPY_BLOCK = 4096  # words of four bytes that a program copies
# Of prompt_attention: tokens that it takes at once, for how many times as many there is room, and registers.
_WARPGROUPS = {"BLOCK_N": 128, "STAGES": 2, "REGISTERS": 232}
_FEW = 64  # tokens up to which a program appends few heads of one token, so that there are programs enough
_FEW_ROWS = 1024  # tokens of a step up to which a program of prefill attention takes 128 rows, of more it takes 256
# By how many sequences there are: programs that share one's cache, warps of a program, tokens that it takes at once.
# Few sequences want to be spread over the machine; many want small programs, so that many wait for memory at once
# (measured on an H200 with benchmarks/h200/attention.py).
_DECODE = ((1, 16, 2, 64), (2, 16, 2, 64), (4, 16, 2, 64), (8, 8, 2, 64), (16, 4, 2, 64), (32, 2, 2, 64),
           (64, 1, 2, 64), (768, 1, 1, 32), (None, 1, 1, 32))  # fmt: skip
# Up to so many sequences, rotary positions, append and attention of a decode step are one kernel: how many programs
# there are to be, warps of a program, tokens that it takes at once (16 or a multiple for each warp), and tiles of so
# many tokens that have room. More programs or tiles leave less room for weights.
_AS_ONE = {1: (64, 4, 64, 2), 2: (128, 4, 64, 2), 4: (128, 4, 64, 1), 8: (256, 4, 64, 1)}
# Where programs read the cache ahead of the kernel in front (cache_attention.py): their warps, how many bytes of it
# they take at once, and for how many times as many there is room; of a cache of bytes, and of bfloat16.
_AHEAD = {
    16: ((4, 32768, 4), (4, 32768, 4)), 32: ((4, 32768, 3), (4, 32768, 3)), 64: ((2, 16384, 2), (2, 16384, 3)),
    768: ((2, 16384, 2), (2, 16384, 3)), None: ((1, 8192, 3), (2, 16384, 3)),
}  # fmt: skip
_ROPE_AHEAD = 64  # in decode steps of up to so many, that kernel does rotary positions and append too
ROPE_POINTERS = {
    "q_norm_ptr": "*bf16", "k_norm_ptr": "*bf16", "angles_ptr": "*fp32", "positions_ptr": "*i32",
    "slot_mapping_ptr": "*i32",
}  # fmt: skip
# There a long sequence, in a step of so many, has up to so many programs for each KV head, one for each so many tokens.
_SHARED, _MOST_SPLITS, _SHARE = 64, 8, 4096
_PROGRAMS = 128  # that there are to be, else they share sooner


class AttentionLaunches(CudaLowering):
    """Launches of kernels/triton/{rope_append,rope_attention,{cache,decode,prefill,prompt}_attention}.py."""

    share: int = 0  # the fewest tokens of a sequence's cache for which there is a program more, 0: there never is

    def add_copies(self) -> None:
        """The plan's part that copies blocks of the cache, in all layers at once."""
        parts = [size for pair in self.kv for size in pair]
        if not parts:
            return
        args = {
            "pairs_ptr": ("*i32", self.room("copy pairs", self.build_config.max_batch_size * 8)),
            "parts_ptr": ("*i64", self.room("copy parts", len(parts) * 8)),
            "part_words_ptr": ("*i32", self.room("copy words", len(parts) * 4)),
        }
        grid: list[Dim] = [[NUM_COPIES, 1], len(parts), -(-max(parts) // 4 // _COPY_BLOCK)]
        self.copy = [self.launch("rows", "copy_blocks", grid, args, BLOCK=_COPY_BLOCK)]

    def _rope_append(self, node: Node) -> None:
        a = node.attrs
        heads, kv_heads, dim = a["num_heads"], a["num_kv_heads"], a["head_dim"]
        spec = self.add_rope_table(a["rope"])[1] if "rope" in a else None
        args = self._rotated(node) | {"q_ptr": (self.type_of(node.output), self.ref(node.output)), **self._caches(node)}
        constants: dict[str, Any] = {
            "NUM_HEADS": heads, "NUM_KV_HEADS": kv_heads, "HEAD_DIM": dim,
            "BLOCK_SIZE": self.build_config.tokens_per_block, "DIM": spec.dim if spec else 0,
            "NEOX": spec is None or spec.layout == "neox", "NORM": "q_norm" in node.inputs,
            "KV_QUANT": self._is_quantized(node),
        }  # fmt: skip

        def way(tokens: int, some: int, *, mixed_only: bool = False) -> list[Launch]:
            grid: list[Dim] = [[NUM_TOKENS, tokens], -(-heads // some) + 2 * -(-kv_heads // some)]
            return [
                self.launch(
                    "rope_append", "rope_append", grid, args | appended, TOKENS=tokens, HEADS=some,
                    when="mixed" if mixed_only else when, NEW_STRIDE=stride, **constants,
                )
                for when, appended, stride in self._appended(attention)
                if when != "decode" or not mixed_only
            ]  # fmt: skip

        (attention,) = (n for n in self.graph.nodes if n.op == "paged_attention" and n.attrs["layer"] == a["layer"])
        joined = 0
        if self._joined(attention) is node:
            joined = max((most for most, *_ in _DECODE if most and self._joins(attention, most)), default=0)
        ways: list[tuple[int | None, list[Launch]]] = [(None, way(4, 4))]
        if joined < _FEW:
            ways.insert(0, (_FEW, way(1, 4)))
        if joined:
            ways.insert(0, (joined, way(1, 4, mixed_only=True)))
        self.ways(node.op, NUM_TOKENS, ways)

    def _rotated(self, node: Node) -> dict[str, tuple[str, Any]]:
        """What q and k are normed and rotated by, and what of."""
        norms = {
            f"{role}_ptr": self.vector(node.inputs[role]) if role in node.inputs else ("*bf16", None)
            for role in ("q_norm", "k_norm")
        }
        table = self.add_rope_table(node.attrs["rope"])[0] if "rope" in node.attrs else None
        return {
            "qkv_ptr": (self.type_of(node.inputs["qkv"]), self.ref(node.inputs["qkv"])), **norms,
            "table_ptr": ("*fp32", table), "positions_ptr": ("*i32", "i:positions"),
            "eps": ("fp32", float(node.attrs.get("eps", 0.0))),
        }  # fmt: skip

    def _joined(self, node: Node) -> Node | None:
        """The rotary positions and append that this attention may do itself: of whole heads, in halves."""
        maker = self.producers.get(self.whole(node.inputs["q"]))
        if node.op != "paged_attention" or maker is None or maker.op != "rope_append" or "rope" not in maker.attrs:
            return None
        dim, spec = maker.attrs["head_dim"], self.add_rope_table(maker.attrs["rope"])[1]
        whole = spec.layout == "neox" and spec.dim == dim == v_head_dim(node.attrs) and dim in (32, 64, 128, 256)
        few = node.attrs["num_heads"] <= 16 * node.attrs["num_kv_heads"]
        alone = len(self.consumers[maker.output]) == len(self.consumers[node.inputs["q"]]) == 1
        return maker if whole and few and alone else None

    def _joins(self, node: Node, most: int | None) -> bool:
        """Whether the kernel of decode steps of up to `most` sequences can do rotary positions and append too."""
        return most in _AS_ONE or (most is not None and most <= _ROPE_AHEAD and self._reads_ahead(node))

    def _attention(self, node: Node) -> None:
        a = node.attrs
        kv_heads = a["num_kv_heads"]
        args = {
            "k_ptr": (self.type_of(node.inputs["k"]), self.ref(node.inputs["k"])),
            "v_ptr": (self.type_of(node.inputs["v"]), self.ref(node.inputs["v"])), **self._caches(node),
        }  # fmt: skip

        def way(tokens: int, some: int) -> list[Launch]:
            grid: list[Dim] = [[NUM_TOKENS, tokens], 2 * -(-kv_heads // some)]
            return [
                self.launch(
                    "rope_append", "append", grid, args | appended, NUM_KV_HEADS=kv_heads, HEAD_DIM=a["head_dim"],
                    V_HEAD_DIM=v_head_dim(a), BLOCK_SIZE=self.build_config.tokens_per_block, when=when,
                    KV_QUANT=self._is_quantized(node), NEW_STRIDE=stride, TOKENS=tokens, HEADS=some,
                )
                for when, appended, stride in self._appended(node)
            ]  # fmt: skip

        self.ways("append", NUM_TOKENS, [(_FEW, way(1, 1)), (None, way(4, 4))])
        self._paged_attention(node)

    def _paged_attention(self, node: Node) -> None:
        self._count_cache(node)
        joined, of_rows = self._joined(node), "rows" in node.inputs
        ways: list[tuple[int | None, list[Launch]]] = []
        for most, *about in _DECODE:
            rope, ahead = joined if self._joins(node, most) else None, most in _AHEAD and self._reads_ahead(node)
            when = "decode" if of_rows or rope is not None else ""
            if rope is not None and most in _AS_ONE:
                assert most is not None
                launches = [self._rope_decode(node, rope, most, *_AS_ONE[most])]
            elif ahead:
                launches = [self._decode_ahead(node, most, when=when, rope=rope)]
            else:
                launches = [self._decode(node, most, *about, when=when)]
            if when and ahead and not of_rows:
                launches.append(self._decode_ahead(node, most, when="mixed"))
            elif when:
                launches.append(self._decode(node, most, *about, when="mixed", of_rows=of_rows))
            ways.append((most, launches))
        self.ways(node.op, NUM_LOGITS if of_rows else NUM_SEQS, ways)
        if not of_rows:
            self._prefill(node)

    def _decode(
        self, node: Node, most: int | None, splits: int, warps: int, block_n: int, *, when: str = "",
        of_rows: bool = False,
    ) -> Launch:  # fmt: skip
        """Of the sequences that have one token in a step; or of the tokens that the node's `rows` name."""
        a = node.attrs
        block_g, tiles = self._tiles_of_heads(node)
        under_way = 4 if self._is_quantized(node) and block_n == 64 else 3  # tiles; of bytes they are half as large
        if self._width(node) > 256 or block_g > 16:  # wide heads, many of them: their tiles take many registers
            warps = 8 if block_g * v_head_dim(a) > 64 * 256 else 4
            block_n = 64 if self._width(node) <= 320 else 32
        tile = self._tile_bytes(node, block_n)
        stages = self.stages(max(2, min(under_way, (112 << 10) // tile)), tile)
        args = self._common(node) | self._shared_out(node, most, splits) | {"row_seqs_ptr": ("*i32", None)}
        if of_rows:
            args |= {"row_seqs_ptr": ("*i32", "i:logits_seqs"), "seq_lens_ptr": ("*i32", "i:logits_lens")}
        return self.launch(
            "decode_attention", "decode_attention", [splits, [NUM_LOGITS if of_rows else NUM_ALONE, 1], tiles], args,
            num_warps=warps, num_stages=stages, when=when, BLOCK_G=block_g, BLOCK_N=block_n, NUM_SPLITS=splits,
            OF_ROWS=of_rows, PUSH=True, PULL=True, **self._options(node),
        )  # fmt: skip

    def _reads_ahead(self, node: Node) -> bool:
        """Whether there is a kernel that does: on Hopper, of common heads."""
        group, dim = node.attrs["num_heads"] // node.attrs["num_kv_heads"], node.attrs["head_dim"]
        return self.arch == "sm_90a" and group <= 16 and dim == v_head_dim(node.attrs) and dim in (32, 64, 128)

    def _decode_ahead(self, node: Node, most: int | None, *, when: str, rope: Node | None = None) -> Launch:
        """Of the sequences that have one token in a step; with `rope`, rotary positions and append too."""
        warps, nbytes, tiles = _AHEAD[most][0 if self._is_quantized(node) else 1]
        kv_heads, group = node.attrs["num_kv_heads"], node.attrs["num_heads"] // node.attrs["num_kv_heads"]
        block_n = max(nbytes // self._tile_bytes(node, 1), 16 * warps)
        splits, share = 1, 0
        if most is not None and most <= _SHARED:
            splits, share = _MOST_SPLITS, max(_SHARE // max(1, _PROGRAMS // (most * kv_heads)), 2 * block_n)
            self.share = min(self.share or share, share)
        options = self._options(node)
        del options["V_HEAD_DIM"]
        args = self._common(node) | self._shared_out(node, most, splits)
        args |= {name: (kind, None) for name, kind in ROPE_POINTERS.items()} | {"eps": ("fp32", 0.0)}
        if rope is not None:
            rotated = self._rotated(rope)
            args |= {"q_ptr": rotated.pop("qkv_ptr"), "angles_ptr": rotated.pop("table_ptr"), **rotated}
            args["slot_mapping_ptr"] = ("*i32", "i:slot_mapping")
        return self.launch(
            "cache_attention", "cache_attention", [[NUM_SPLITS, 1] if splits > 1 else 1, kv_heads, [NUM_ALONE, 1]],
            args, num_warps=warps, when=when, BLOCK_G=8 if group <= 8 else 16, BLOCK_N=block_n, STAGES=tiles,
            NUM_SPLITS=splits, SHARE=share, ROPE=rope is not None, NORM=rope is not None and "q_norm" in rope.inputs,
            PUSH=True, PULL=True, **options,
        )  # fmt: skip

    def _rope_decode(
        self, node: Node, rope: Node, most: int, programs: int, warps: int, block_n: int, tiles: int
    ) -> Launch:  # fmt: skip
        """Of decode steps of up to `most` sequences: rotary positions, append and attention."""
        kv_heads, group = node.attrs["num_kv_heads"], node.attrs["num_heads"] // node.attrs["num_kv_heads"]
        splits = max(4, min(16, 1 << max(programs // (most * kv_heads), 1).bit_length() - 1))
        if node.attrs["head_dim"] > 128:  # a warp's sums lie in registers, and what they are combined in is shared
            warps, block_n = 2, 32
        args = self._common(node) | self._shared_out(node, most, splits) | self._rotated(rope)
        args["slot_mapping_ptr"] = ("*i32", "i:slot_mapping")
        options = self._options(node)
        del args["q_ptr"], options["V_HEAD_DIM"]
        return self.launch(
            "rope_attention", "rope_decode_attention", [splits, [NUM_SEQS, 1], kv_heads], args, num_warps=warps,
            when="decode", BLOCK_G=8 if group <= 8 else 16, BLOCK_N=block_n, NUM_SPLITS=splits,
            STAGES=self.stages(tiles, self._tile_bytes(node, block_n)), NORM="q_norm" in rope.inputs, PUSH=True,
            PULL=True, **options,
        )  # fmt: skip

    def _tiles_of_heads(self, node: Node) -> tuple[int, int]:
        """How many query heads are in a tile, and tiles."""
        kv_heads, group = node.attrs["num_kv_heads"], node.attrs["num_heads"] // node.attrs["num_kv_heads"]
        block_g = 16 if group <= 16 else 32 if group <= 32 else 64
        return block_g, kv_heads * -(-group // block_g)

    def _shared_out(self, node: Node, most: int | None, splits: int) -> dict[str, tuple[str, Any]]:
        """Where the programs that share a sequence's cache show each other what they found."""
        partial = lse = None
        if splits > 1:
            rows = (most or self.build_config.max_batch_size) * node.attrs["num_heads"] * splits
            partial = self.room("attention partial", rows * v_head_dim(node.attrs) * 8)
            lse = self.room("attention lse", rows * 8)
        return {
            "partial_ptr": ("*i64", partial), "lse_ptr": ("*i64", lse), "step_ptr": ("*i32", "i:step"),
            "calls": ("i32", self._num_attentions), "call": ("i32", node.attrs["layer"]),
        }  # fmt: skip

    @property
    def splits(self) -> dict[str, int] | None:
        """How many programs share a cache; see cuda_program.py."""
        if not self.share:
            return None
        fewest = min(most for most in _AHEAD if most is not None)
        above = max((most for most, *_ in _DECODE if most is not None and most < fewest), default=0)
        return {"tokens": self.share, "most": _MOST_SPLITS, "above": above, "sequences": _SHARED}

    @property
    def _num_attentions(self) -> int:
        """Layers that call attention in a step."""
        return sum(node.op in ("attention", "paged_attention") for node in self.graph.nodes)

    def _prefill(self, node: Node) -> None:
        a = node.attrs
        group, width = a["num_heads"] // a["num_kv_heads"], self._width(node)
        pack = max(p for p in (1, 2, 4, 8) if group % p == 0)
        block_n = 64 if width <= 320 else 32 if width <= 512 else 16
        most = 3 if width <= 256 else 2
        stride = self._new_stride(node)
        stages = self.stages(most, block_n * width * 2 if stride else self._tile_bytes(node, block_n))
        args = self._common(node) | self._new_rows(node, stride) | {
            "first_prompt_ptr": ("*i32", "i:first_prompt"), "num_prompts": ("i32", f"n:{NUM_PROMPTS}"),
            "num_seqs": ("i32", f"n:{NUM_SEQS}"),
        }  # fmt: skip
        if self._by_warpgroups(node):
            options = self._options(node)
            del options["V_HEAD_DIM"]
            attend = self.launch(
                "prompt_attention", "prompt_attention",
                [a["num_heads"] // pack, [NUM_TOKENS, 128 // pack, NUM_PROMPTS]], args, num_warps=4, when="mixed",
                NEW_STRIDE=stride, PACK=pack, **_WARPGROUPS, **options,
            )  # fmt: skip
            self.ways("prefill_attention", NUM_TOKENS, [(None, [attend])])
            return

        def way(rows: int, warps: int) -> list[Launch]:
            grid: list[Dim] = [a["num_heads"] // pack, [NUM_TOKENS, rows // pack, NUM_PROMPTS]]
            return [
                self.launch(
                    "prefill_attention", "prefill_attention", grid, args, num_warps=warps, num_stages=stages,
                    when="mixed", NEW_STRIDE=stride, SKIP_DECODES=True, PACK=pack, BLOCK_Q=rows // pack,
                    BLOCK_N=block_n, **self._options(node),
                )
            ]  # fmt: skip

        ways: list[tuple[int | None, list[Launch]]] = [(None, way(128 if v_head_dim(a) <= 256 else 64, 8))]
        if width <= 256:
            ways = [(_FEW_ROWS, ways[0][1]), (None, way(256, 16))]
        self.ways("prefill_attention", NUM_TOKENS, ways)

    def _by_warpgroups(self, node: Node) -> bool:
        """Whether there is a kernel for prompts whose warpgroups divide the labour: on Hopper, of common heads."""
        dim, whole = node.attrs["head_dim"], self.build_config.tokens_per_block >= 16  # rows that one copy takes
        return self.arch == "sm_90a" and whole and dim == v_head_dim(node.attrs) and dim in (64, 128)

    def _new_stride(self, node: Node) -> int:
        """Rows of a head where the step's keys and values also lie in bfloat16, as prefill reads them; 0: nowhere."""
        if not self._is_quantized(node) or self._width(node) > 512:  # wider ones are MLA's latents, which have one head
            return 0
        return self.build_config.max_num_tokens + _WARPGROUPS["BLOCK_N"]

    def _new_rows(self, node: Node, stride: int) -> dict[str, tuple[str, Any]]:
        """Where these are."""
        per_column = node.attrs["num_kv_heads"] * stride * 2
        widths = {"keys": node.attrs["head_dim"], "values": v_head_dim(node.attrs)}
        return {
            f"{what[0]}_new_ptr": ("*bf16", self.room(f"new {what}", per_column * width) if stride else None)
            for what, width in widths.items()
        }

    def _width(self, node: Node) -> int:
        """Columns of a token's key and value in one head."""
        return int(node.attrs["head_dim"]) + v_head_dim(node.attrs)

    def _tile_bytes(self, node: Node, tokens: int) -> int:
        """Of so many tokens' keys and values."""
        return tokens * self._width(node) * (1 if self._is_quantized(node) else 2)

    def _common(self, node: Node) -> dict[str, tuple[str, Any]]:
        a = node.attrs
        sinks = self.vector(node.inputs["sinks"]) if "sinks" in node.inputs else ("*bf16", None)
        blocks = self.build_config.blocks_per_sequence
        out_scale = self.largest(node.inputs["out_scale"]) if "out_scale" in node.inputs else None
        return {
            "q_ptr": (self.type_of(node.inputs["q"]), self.ref(node.inputs["q"])), **self._caches(node),
            "block_tables_ptr": ("*i32", "i:block_tables"), "query_start_ptr": ("*i32", "i:query_start"),
            "seq_lens_ptr": ("*i32", "i:seq_lens"), "sinks_ptr": sinks, "out_scale_ptr": ("*fp32", out_scale),
            "out_ptr": (self.type_of(node.output), self.ref(node.output)), "max_blocks": ("i32", blocks),
            "scale": ("fp32", float(a["scale"])), "softcap": ("fp32", float(a.get("softcap") or 0.0)),
        }  # fmt: skip

    def _options(self, node: Node) -> dict[str, Any]:
        a = node.attrs
        return {
            "NUM_KV_HEADS": a["num_kv_heads"], "GROUP": a["num_heads"] // a["num_kv_heads"], "HEAD_DIM": a["head_dim"],
            "V_HEAD_DIM": v_head_dim(a), "BLOCK_SIZE": self.build_config.tokens_per_block,
            "WINDOW": a.get("window") or 0, "SOFTCAP": bool(a.get("softcap")), "SINKS": "sinks" in node.inputs,
            "KV_QUANT": self._is_quantized(node),
        }  # fmt: skip

    def _caches(self, node: Node) -> dict[str, tuple[str, Any]]:
        kind, layer = TYPES[_KV_DTYPES[self.build_config.kv_cache_dtype]], node.attrs["layer"]
        scale: str | None = None
        if self._is_quantized(node):
            scale = self.floats(node.inputs["kv_scale"]) if "kv_scale" in node.inputs else self.ones(2)
        return {
            "k_cache_ptr": (kind, f"k:{layer}"), "v_cache_ptr": (kind, f"v:{layer}"), "kv_scale_ptr": ("*fp32", scale)
        }  # fmt: skip

    def _appended(self, node: Node) -> list[tuple[str, dict[str, tuple[str, Any]], int]]:
        """In which steps an attention's keys and values are appended how: `when`, operands, rows of a head beside."""
        slots = {"slot_mapping_ptr": ("*i32", "i:slot_mapping"), "num_tokens": ("i32", f"n:{NUM_TOKENS}")}
        stride = 0 if "rows" in node.inputs else self._new_stride(node)
        if not stride:
            return [("", slots | self._new_rows(node, 0), 0)]
        return [(when, slots | self._new_rows(node, rows), rows) for when, rows in (("decode", 0), ("mixed", stride))]

    def _count_cache(self, node: Node) -> None:
        """Notes what a block of this layer takes; layers come in order."""
        a, size = node.attrs, self.build_config.tokens_per_block
        assert a["layer"] == len(self.kv), "attention layers are not in order"
        each = 2 if self.build_config.kv_cache_dtype == "bfloat16" else 1
        per = a["num_kv_heads"] * size * each
        sizes = per * a["head_dim"], per * v_head_dim(a)
        if any(nbytes % _COPIED_AT_ONCE for nbytes in sizes):
            raise UnsupportedError(
                f"a block of {size} tokens has {min(sizes)} bytes of keys or values in a layer, and on a GPU that must "
                f"be a multiple of {_COPIED_AT_ONCE}",
                where="--tokens-per-block",
                fix="give 64",
            )
        self.kv.append(sizes)

    def _is_quantized(self, node: Node) -> bool:
        return node.attrs.get("kv_quant") is not None
