"""A sweep's page: one HTML file that needs nothing beside it, and its curves as a picture."""

import io
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jlora.runs.folder import write_whole
from jlora.runs.plan import readable

PAGE, PICTURE = "report.html", "report.png"
SMOOTHED = 50  # points of a training curve; each is a mean over the steps it stands for

TEMPLATE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Which rank? {{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2rem }
table { border-collapse: collapse; font-size: .9rem; width: 100% }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #ddd }
th { border-bottom: 2px solid #888 } tr.chosen td { background: #e7f3ea; font-weight: 600 }
figure { margin: 1rem 0 } svg { width: 100%; height: auto }
#verdict { background: #f3f6fa; border-left: 4px solid #36c; padding: .8rem 1rem }
#verdict p { margin: .2rem 0 } #verdict p:first-child { font-size: 1.15rem; font-weight: 600 }
.scroll { overflow-x: auto }
</style>
</head>
<body>
<h1>Which rank? {{ title }}</h1>
<section id="verdict">
<p>Rank {{ advice.rank }}, learning rate {{ "%g" % advice.learning_rate }}</p>
{% for reason in advice.reasons %}
<p>{{ reason }}</p>
{% endfor %}
</section>
<figure>{{ picture | safe }}</figure>
<h2>Ranks</h2>
<div class="scroll"><table id="ranks">
<tr><th>rank</th><th>learning rate</th><th>validation {{ metric }}</th><th>of seeds</th><th>parameters</th>
<th>adapter</th><th>optimizer</th><th>signs</th></tr>
{% for row in ranks %}
<tr{{ ' class="chosen"' | safe if row.chosen }}><td>{{ row.rank }}</td><td>{{ row.rate }}</td><td>{{ row.mean }}</td>
<td>{{ row.span }}</td><td>{{ row.parameters }}</td><td>{{ row.adapter }}</td><td>{{ row.optimizer }}</td>
<td>{{ row.signs }}</td></tr>
{% endfor %}
</table></div>
<h2>Members</h2>
<div class="scroll"><table id="members">
<tr><th>rank</th><th>learning rate</th><th>seed</th><th>best {{ metric }}</th><th>at step</th>
<th>last training loss</th><th>status</th></tr>
{% for row in members %}
<tr><td>{{ row.rank }}</td><td>{{ "%g" % row.learning_rate }}</td><td>{{ row.seed }}</td><td>{{ row.best }}</td>
<td>{{ row.step }}</td><td>{{ row.loss }}</td><td>{{ row.status }}</td></tr>
{% endfor %}
</table></div>
<h2>What it took</h2>
<table id="resources">
{% for name, value in resources %}
<tr><th>{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table>
{% if capped %}
<p>Kernels without room for the largest rank have the highest they can:
{% for path, most in capped.items() %}<code>{{ path }}</code> {{ most }}{{ ", " if not loop.last }}{% endfor %}.</p>
{% endif %}
<script type="application/json" id="numbers">{{ numbers | safe }}</script>
</body>
</html>
""")


def write_report(folder: Path, found: Mapping[str, Any], *, title: str) -> None:
    """Writes a sweep's page and picture.

    Args:
        folder: where to.
        found: what `SweepResult.as_dict` gives, with "peak_memory_bytes" of the process and, where kernels were too
            small for the largest rank, "capped".
        title: what was trained.
    """
    figure = draw(found)
    figure.savefig(folder / PICTURE, dpi=120)
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    text = drawn.getvalue()
    write_whole(folder / PAGE, page(found, title, text[text.index("<svg") :]))


def page(found: Mapping[str, Any], title: str, picture: str) -> str:
    """The page's text."""
    return TEMPLATE.render(
        title=title,
        advice=found["recommendation"],
        metric=found["metric"],
        picture=picture,
        ranks=[rank_row(grade, found) for grade in found["recommendation"]["grades"]],
        members=[member_row(member, found["metric"]) for member in found["members"]],
        resources=resources(found),
        capped=found["capped"],
        # Inside a script, "<" could end it.
        numbers=json.dumps(found).replace("<", "\\u003c"),
    )


def rank_row(grade: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """A rank, for the page."""
    member = next(member for member in found["members"] if member["rank"] == grade["rank"])
    signs = ["" if grade["stalled"] is None else f"training stalled at {grade['stalled']:.3f}"]
    signs += ["validation rose early"] if grade["rose"] else []
    return {
        "rank": grade["rank"],
        "rate": f"{grade['learning_rate']:g}",
        "mean": f"{grade['mean']:.4g}" + ("" if grade["error"] is None else f" ± {grade['error']:.2g}"),
        "span": f"{grade['low']:.4g} to {grade['high']:.4g}" if grade["low"] < grade["high"] else f"{grade['low']:.4g}",
        "parameters": f"{member['trainable']:,}",
        "adapter": readable(member["adapter_bytes"]),
        "optimizer": readable(member["optimizer_bytes"]),
        "signs": ", ".join(sign for sign in signs if sign),
        "chosen": grade["rank"] == found["recommendation"]["rank"],
    }


def member_row(member: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """A member, for the page."""
    best, losses = member[f"best_{metric}"], [loss for loss in member["losses"] if loss is not None]
    return dict(member) | {
        "best": "-" if best is None else f"{best:.4f}",
        "step": "-" if best is None else member["best_step"],
        "loss": f"{losses[-1]:.4f}" if losses else "-",
    }


def resources(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the sweep took, for the page."""
    took, members = found["resources"], found["members"]
    held = took["argument_bytes"]
    return [
        ("members", f"{len(members)}, in {took['groups']} group{'s' if took['groups'] > 1 else ''}"),
        ("side by side", f"{took['at_once']}"),
        ("step of all members of a group", f"{1000 * took['step_seconds']:.1f} ms"),
        ("compiling a step", f"{took['compile_seconds']:.1f} s"),
        ("base, held once", readable(took["base_bytes"])),
        ("base, adapters, optimizer states and batch", readable(held)),
        ("temporary, by the compiler's count", readable(took["temporary_bytes"])),
        ("peak memory of the process", readable(found["peak_memory_bytes"])),
    ]


def draw(found: Mapping[str, Any]) -> Figure:
    """The metric against the rank, both learning curves, and what a rank costs."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(2, 2)
    ranks = sorted({member["rank"] for member in found["members"]})
    shades = colormaps["viridis"]
    color = {rank: shades(0.9 * n / max(len(ranks) - 1, 1)) for n, rank in enumerate(ranks)}
    draw_ranks(panels[0, 0], found, color)
    draw_costs(panels[0, 1], found)
    chosen = {(grade["rank"], grade["learning_rate"]) for grade in found["recommendation"]["grades"]}
    kept = [m for m in found["members"] if (m["rank"], m["learning_rate"]) in chosen]
    metric = found["metric"]
    curves(panels[1, 0], kept, color, lambda member: smooth(member["losses"]))
    panels[1, 0].set(xlabel="step", ylabel="training loss")
    judged = lambda m: [(e["step"], e[metric]) for e in m["evaluations"] if e[metric] is not None]
    curves(panels[1, 1], kept, color, judged, marker="o")
    panels[1, 1].set(xlabel="step", ylabel=f"validation {metric}")
    panels[1, 0].legend(title="rank", fontsize=9, ncols=2, loc="upper right")
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    return figure


def draw_ranks(axes: Any, found: Mapping[str, Any], color: Mapping[int, Any]) -> None:
    """The metric against the rank: every seed, their mean with its standard error, and what is near enough."""
    advice, metric = found["recommendation"], found["metric"]
    grades = advice["grades"]
    places = [grade["rank"] for grade in grades]
    means = [grade["mean"] for grade in grades]
    axes.errorbar(places, means, [grade["error"] or 0 for grade in grades], fmt="-", color="0.4", capsize=3)
    for grade in grades:
        same = (grade["rank"], grade["learning_rate"])
        values = [m[f"best_{metric}"] for m in found["members"] if (m["rank"], m["learning_rate"]) == same]
        axes.plot([grade["rank"]] * len(values), values, "o", color=color[grade["rank"]], alpha=0.6)
    best = max(means) if found["maximize"] else min(means)
    edge = best - advice["tolerance"] if found["maximize"] else best + advice["tolerance"]
    axes.axhspan(min(best, edge), max(best, edge), color="tab:green", alpha=0.15, label="within the tolerance")
    axes.axvline(advice["rank"], color="tab:green", linestyle="--", label=f"recommended: {advice['rank']}")
    logarithmic(axes, places)
    axes.set(xlabel="rank", ylabel=f"validation {metric}")
    axes.legend(fontsize=9)


def draw_costs(axes: Any, found: Mapping[str, Any]) -> None:
    """What a rank holds: adapter and optimizer state."""
    first = {member["rank"]: member for member in reversed(found["members"])}
    ranks = sorted(first)
    for name in ("adapter", "optimizer"):
        axes.plot(ranks, [first[rank][f"{name}_bytes"] / 1e6 for rank in ranks], "o-", label=name)
    for rank in ranks:
        text = f"{first[rank]['trainable']:,}"
        at = (rank, first[rank]["optimizer_bytes"] / 1e6)
        axes.annotate(text, at, xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8)
    logarithmic(axes, ranks)
    axes.set(xlabel="rank", ylabel="MB (and parameters trained)", yscale="log")
    axes.margins(x=0.12, y=0.15)
    axes.legend(fontsize=9, loc="lower right")


def curves(
    axes: Any, members: Sequence[Mapping[str, Any]], color: Mapping[int, Any], points: Callable[..., Any], **style: Any
) -> None:
    """A curve for every member, those of a rank in one colour."""
    named = set()
    for member in members:
        found = points(member)
        if found:
            label = None if member["rank"] in named else str(member["rank"])
            named.add(member["rank"])
            steps, values = zip(*found, strict=True)
            axes.plot(steps, values, color=color[member["rank"]], label=label, alpha=0.8, markersize=3, **style)


def smooth(losses: Sequence[float | None]) -> list[tuple[float, float]]:
    """A curve of few points, each the middle of some steps and the mean of their losses."""
    size = max(len(losses) // SMOOTHED, 1)
    found = []
    for start in range(0, len(losses), size):
        part = [loss for loss in losses[start : start + size] if loss is not None]
        if part:
            found.append((start + (len(part) + 1) / 2, statistics.fmean(part)))
    return found


def logarithmic(axes: Any, ranks: Sequence[int]) -> None:
    """A rank's axis, marked at the ranks alone."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.minorticks_off()
