"""An AccuracyReport as a table, as JSON, and as a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table

from trtllm_cli.artifact import human_bytes, os_errors
from trtllm_cli.errors import ResourceError
from trtllm_cli.evaluate.accuracy import AccuracyReport, LinearError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMULAS = {
    "perplexity": "exp(mean over tokens of -log p(token))",
    "mean_kl": "mean over tokens of KL(reference || quantized), nats",
    "top1_agreement": "share of tokens for which both models have the same first choice",
    "linears": "||y_q - y|| / ||y|| of a linear's outputs, both given the reference's input",
    "stream": "||h_q - h|| / ||h|| of the residual stream after each decoder layer, each model's own",
}
_WORST = 8  # linears that the table lists
_MARKERS = "osD^vP*X<>hd"


def to_json(report: AccuracyReport) -> dict[str, Any]:
    """JSON values; what is no finite number is null."""
    d = report.divergence
    return {
        "reference": {"name": report.names[0], "perplexity": _finite(d.reference.perplexity),
                      "bytes": report.bytes_before},
        "quantized": {"name": report.names[1], "perplexity": _finite(d.other.perplexity),
                      "bytes": report.bytes_after},
        "perplexity_increase": _finite(d.perplexity_increase),
        "max_ppl_increase": report.max_ppl_increase,
        "mean_kl": _finite(d.mean_kl),
        "top1_agreement": d.top1_agreement,
        "num_windows": report.num_windows,
        "num_tokens": d.reference.tokens,
        "linears": {e.module: _finite(e.error) for e in report.linears},
        "stream": [_finite(error) for error in report.stream],
        "failed": report.failed,
        "reasons": report.reasons,
        "advice": report.advice if report.failed else None,
        "formulas": FORMULAS,
    }  # fmt: skip


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def tables(report: AccuracyReport) -> RenderableType:
    """For people: the two models side by side, then the worst layers."""
    d, (before, after) = report.divergence, report.names
    top = Table(
        title=f"Quality over {d.reference.tokens:,} tokens in {report.num_windows} windows", title_justify="left"
    )
    for header in ("", before, after, "change"):
        top.add_column(header, justify="right" if header else "left")
    ppl = (d.reference.perplexity, d.other.perplexity)
    top.add_row("perplexity", f"{ppl[0]:.3f}", f"{ppl[1]:.3f}", f"{d.perplexity_increase:+.2%}")
    if report.bytes_before and report.bytes_after:
        ratio = report.bytes_after / report.bytes_before - 1
        top.add_row("weights", human_bytes(report.bytes_before), human_bytes(report.bytes_after), f"{ratio:+.1%}")
    top.add_row("mean KL, nats a token", "", f"{d.mean_kl:.5f}", "")
    top.add_row("same first choice", "", f"{d.top1_agreement:.2%}", "")
    worst = report.worst(_WORST)
    if not worst:
        return top
    layers = Table(title="Largest errors of a layer's output, given the reference's input", title_justify="left")
    for header, justify in (("layer", "left"), ("relative error", "right"), ("stream after it", "right")):
        layers.add_column(header, justify=justify)  # type: ignore[arg-type]
    for e in worst:
        stream = f"{report.stream[e.layer]:.2%}" if e.layer is not None and e.layer < len(report.stream) else ""
        layers.add_row(e.module, f"{e.error:.2%}", stream)
    return Group(top, "", layers)


def draw(report: AccuracyReport, path: Path) -> None:
    """Writes a PNG: each linear's error by decoder layer, and the stream's. Raises ResourceError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ResourceError(
            "drawing the report needs matplotlib", where=str(path), fix='pip install "trtllm-cli[quantize]"'
        ) from None
    figure = Figure(figsize=(10, 7), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1.4])
    _draw_linears(upper, [e for e in report.linears if e.error != 0])
    layers = range(len(report.stream))
    lower.plot(layers, [100 * error for error in report.stream], color="0.25", marker=".", linewidth=1.5)
    lower.set(ylabel="stream's error, %", xlabel="decoder layer")
    lower.set_title("How they add up: residual stream after each layer, each model's own", fontsize=10, loc="left")
    for axes in (upper, lower):
        axes.set_ylim(bottom=0)
        axes.grid(visible=True, axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title(report), fontsize=12, x=0.02, ha="left")
    with os_errors(path):
        figure.savefig(path, format="png")


def title(report: AccuracyReport) -> str:
    """Two lines: which models, and what changed."""
    d, sizes = report.divergence, (report.bytes_before, report.bytes_after)
    names = [f"{name} ({human_bytes(size)})" if size else name for name, size in zip(report.names, sizes, strict=True)]
    return (
        f"{names[0]} → {names[1]}\n"
        f"perplexity {d.reference.perplexity:.2f} → {d.other.perplexity:.2f} ({d.perplexity_increase:+.1%}), "
        f"mean KL {d.mean_kl:.4f}, same first choice {d.top1_agreement:.1%}"
    )


def _draw_linears(axes: Axes, errors: list[LinearError]) -> None:
    """One line for each kind of linear; the head is a point past the last layer."""
    axes.set_ylabel("error of a linear's output, %")
    axes.set_title("Each linear given the unquantized model's input: ||y_q − y|| / ||y||", fontsize=10, loc="left")
    kinds = dict.fromkeys(e.kind for e in errors)
    last = max((e.layer for e in errors if e.layer is not None), default=0)
    for marker, kind in zip(_MARKERS * len(kinds), kinds, strict=False):
        points = [(last + 1 if e.layer is None else e.layer, 100 * e.error) for e in errors if e.kind == kind]
        axes.plot(*zip(*points, strict=True), label=kind, marker=marker, markersize=4, linewidth=1.2)
    if kinds:
        axes.legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    else:
        axes.text(0.5, 0.5, "no layer was compared, or none changed", transform=axes.transAxes, ha="center")
