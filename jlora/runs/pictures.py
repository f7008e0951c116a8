"""The pictures in a run's folder: its learning curve, and the singular values of its adapter."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jlora.runs.engine import Evaluation, Step
from jlora.runs.inspection import Description, Target


def draw_learning_curve(path: Path, events: Sequence[Step | Evaluation], measure: str) -> None:
    """Draws both losses, and the validation metric if it is another, over the steps; a PNG.

    Without an evaluation it draws the training loss alone.
    """
    steps = [event for event in events if isinstance(event, Step)]
    found = [event for event in events if isinstance(event, Evaluation)]
    measure = measure if found else "loss"
    figure = Figure(figsize=(9 if measure != "loss" else 5, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, 1 if measure == "loss" else 2, squeeze=False)[0]
    ends = [event.step for event in found]
    panels[0].plot([step.step for step in steps], [step.loss for step in steps], label="training")
    if found:
        panels[0].plot(ends, [event.loss for event in found], "o-", label="validation")
    panels[0].set(xlabel="step", ylabel="cross entropy, nats")
    panels[0].legend()
    for best in [event for event in found if event.best][-1:]:
        panels[-1].annotate(
            f"best: {best.value(measure):.3f}",
            (best.step, best.value(measure)),
            xytext=(0, -14),
            textcoords="offset points",
            ha="right",
        )
    if measure != "loss":
        panels[1].plot(ends, [event.value(measure) for event in found], "o-", color="C1")
        panels[1].set(xlabel="step", ylabel=f"validation {measure}", ylim=(0, 1.02))
    for axes in panels:
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def draw_spectrum(description: Description, path: Path) -> None:
    """Draws singular values: a panel for each kind of kernel, in it a line for each layer, each against its largest."""
    kinds: dict[str, list[Target]] = {}
    for target in description.targets:
        # A layer's number in a path, and a place in a stack, tell layers of one kind apart.
        kinds.setdefault(re.sub(r"\d+", "*", target.name), []).append(target)
    columns = min(3, len(kinds))
    rows = -(-len(kinds) // max(columns, 1))
    figure = Figure(figsize=(1 + 4 * columns, 0.8 + 2.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (kind, targets) in enumerate(kinds.items()):
        axes = figure.add_subplot(rows, columns, place + 1)
        for n, target in enumerate(targets):
            values = target.used.singular_values if target.used else ()
            shares = [value / values[0] for value in values if value > 0]
            color = colormaps["viridis"](0.9 * n / max(len(targets) - 1, 1))
            axes.plot(range(1, len(shares) + 1), shares, ".-", color=color, linewidth=1, markersize=3)
        effective = sorted(target.used.effective_rank for target in targets if target.used)
        span = f"{effective[0]:.1f}" + (f" to {effective[-1]:.1f}" if len(effective) > 1 else "")
        rank = max(target.rank for target in targets)
        axes.set_title(f"{kind}\neffective rank {span} of {rank}", fontsize=8)
        axes.set_xlim(0, rank + 1)
        axes.set_yscale("log")
        axes.set_ylim(top=1.3)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=7)
    figure.supxlabel(
        "singular value, largest first; a line for each layer, the first dark, the last bright", fontsize=9
    )
    figure.supylabel("size against the largest", fontsize=9)
    figure.savefig(path, dpi=120)
