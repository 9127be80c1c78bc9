"""The report's figures, at the width of a page (6.5 in), as PNG bytes.

Matplotlib's objects are used directly, without pyplot, which keeps figures in a global list and looks for a window.
An arm has the colour of the pretraining it starts from (grey from scratch) and a marker, the same in every figure; no
two arms share both until there are dozens. The colours are Paul Tol's muted ones, which colour-blind readers can tell
apart.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import matplotlib
import matplotlib.image
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, StrMethodFormatter
from matplotlib.transforms import ScaledTranslation, Transform

from flows import ablations
from flows.ablations import Ablation, Elsewhere, Judged, Line
from flows.results import METRICS, SCRATCH, Arm, Pretrained, comparisons, measure, title
from mim_core.changes import words

WIDTH_IN, DPI = 6.5, 200
MUTED = ("#332288", "#CC6677", "#117733", "#88CCEE", "#882255", "#DDCC77", "#44AA99", "#AA4499", "#999933")
GREY, INK, RULE = "#6b6b6b", "#222222", "#d9d9d9"
MARKERS = "osD^vPX*"
FEW = 5
"""Arms or runs up to which a figure has room to spare."""
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    # Names and labels are the user's words, whatever signs are in them.
    "text.parse_math": False,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 6,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "text.color": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
}


@dataclass(frozen=True)
class Look:
    """How an arm is drawn in every figure."""

    colour: str
    marker: str


def colours(rows: Iterable[str]) -> dict[str, str]:
    """Give each pretrain row of `params/` its colour, published or not, so that it stays when others come."""
    return {SCRATCH: GREY} | {row: MUTED[index % len(MUTED)] for index, row in enumerate(rows)}


def looks(arms: Sequence[Arm], colour: Mapping[str, str]) -> dict[str, Look]:
    """Give each arm its look: the colour of its start, and a marker that no other arm of that colour has."""
    turns: dict[str, int] = {}
    given = {}
    for arm in arms:
        ink = colour.get(arm.init, INK)
        turn = turns[ink] = turns.get(ink, -1) + 1
        given[arm.row] = Look(ink, MARKERS[turn % len(MARKERS)])
    return given


def accuracy(arms: Sequence[Arm], look: Mapping[str, Look]) -> bytes:
    """Draw the test score per arm: a dot a seed, the mean and its 95 % interval, the best on top of its comparison."""
    groups = [sorted(group, key=lambda arm: arm.score.mean) for group in comparisons(arms)]
    if not groups:
        return empty("No downstream result is published.")
    rows = [len(group) for group in groups]
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH_IN, 0.55 + 0.34 * sum(rows) + 0.34 * len(groups)), layout="constrained")
        grid = figure.subplots(len(groups), sharex=True, squeeze=False, height_ratios=[count + 0.4 for count in rows])
        for axes, group in zip(grid[:, 0], groups, strict=True):
            for place, arm in enumerate(group):
                _arm(axes, place, arm, look[arm.row])
            axes.set_yticks(range(len(group)), [arm.row for arm in group])
            axes.set_ylim(-0.6, len(group) - 0.4)
            axes.set_title(title(group[0]))
            axes.spines["left"].set_visible(False)
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="x")
        low, high = grid[0, 0].get_xlim()
        # From zero where that costs little, so that lengths can be read as ratios; room at the right for the values.
        low = 0 if low < 0.5 * high else low
        grid[0, 0].set_xlim(low, min(high + 0.22 * (high - low), 122))
        grid[0, 0].xaxis.set_major_locator(MaxNLocator(7))
        grid[0, 0].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value <= 100 else ""))
        grid[-1, 0].set_xlabel(f"test {measure(arms)} (%): seeds, mean and 95 % interval over seeds")
        return png(figure)


def _arm(axes: Axes, place: int, arm: Arm, look: Look) -> None:
    values = [100 * value for value in arm.seeds.values()]
    mean, half = 100 * arm.score.mean, 100 * arm.score.half
    end = max(values)
    if arm.score.count > 1:
        axes.errorbar(mean, place, xerr=half, color=look.colour, elinewidth=1.2, capsize=3, capthick=1.2, zorder=2)
        end = max(end, mean + half)
        tick = [place - 0.3, place + 0.3]
        axes.plot([mean, mean], tick, color=look.colour, lw=2, solid_capstyle="butt", zorder=3)
        # Open markers on top, so that seeds with nearly the same value can be told apart.
        axes.plot(values, [place] * len(values), look.marker, ms=4, mfc="white", mec=look.colour, mew=0.9, zorder=4)
    else:
        axes.plot(values, [place], look.marker, ms=5, color=look.colour, zorder=3)
    interval = f"{mean:.1f} \N{PLUS-MINUS SIGN} {half:.1f}" if arm.score.count > 1 else f"{mean:.1f} (one seed)"
    axes.annotate(interval, (end, place), (7, 0), textcoords="offset points", va="center")


def pretraining(runs: Sequence[Pretrained], colour: Mapping[str, str]) -> bytes:
    """Draw a line of two panels per run: the loss in training and validation, and the hole-only PSNR on validation."""
    if not runs:
        return empty("No pretraining run is published.")
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH_IN, 0.15 + (2.0 if len(runs) <= FEW else 1.5) * len(runs)), layout="constrained")
        panels = figure.subplots(len(runs), 2, squeeze=False, sharex="row")
        for run, (left, right) in zip(runs, panels, strict=True):
            ink = colour.get(run.row, INK)
            left.plot(*_series(run.curve, "loss"), color=ink, lw=0.9, alpha=0.5, label="training")
            left.plot(*_series(run.curve, "validation_loss"), "o-", color=ink, ms=3, label="validation")
            left.set_title(f"{run.row}: loss")
            left.legend(loc="upper right")
            right.plot(*_series(run.curve, "hole_psnr"), "o-", color=ink, ms=3)
            right.set_title(f"{run.row}: hole-only PSNR (dB)")
            steps, values = _series(run.curve, "hole_psnr")
            if not values:
                said = right.text(0.02, 0.5, "none: the target is no picture", transform=right.transAxes, color=GREY)
                said.set_in_layout(False)
            else:
                end = (steps[-1], values[-1])
                right.annotate(f"{values[-1]:.1f}", end, (0, 6), textcoords="offset points", ha="center")
                right.margins(y=0.16)
            for axes in (left, right):
                axes.grid(axis="y")
                axes.set_xlim(left=0)
                axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
                axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
                axes.yaxis.set_major_locator(MaxNLocator(5) if axes is left or values else NullLocator())
        for axes in panels[-1]:
            axes.set_xlabel("optimisation step")
        return png(figure)


def lr_grid(arms: Sequence[Arm], look: Mapping[str, Look]) -> bytes:
    """Draw the validation score over the learning rates tried, a panel a comparison; a ring marks the chosen one."""
    groups = [group for group in comparisons(arms) if any(arm.grid for arm in group)]
    if not groups:
        return empty("No learning-rate grid is published.")
    most = max(map(len, groups))
    # Many lines need the whole width, and their legend a place beside them.
    across = min(2, len(groups)) if most <= FEW else 1
    down = math.ceil(len(groups) / across)
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH_IN, 0.1 + max(2.5, 0.5 + 0.17 * most) * down), layout="constrained")
        together = len({arm.metric for group in groups for arm in group}) == 1
        panels = figure.subplots(down, across, squeeze=False, sharey=together).ravel()
        for axes, group in zip(panels, groups, strict=False):
            for arm in group:
                _tried(axes, arm, look[arm.row])
            rates = sorted({point["lr"] for arm in group for point in arm.grid})
            axes.set_xscale("log")
            axes.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=30 if len(rates) > 5 else 0)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.margins(x=0.1, y=0.12)
            axes.set_title(title(group[0]))
            axes.set_xlabel("peak learning rate")
            axes.grid(axis="y")
            beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if most > FEW else {"loc": "best"}
            axes.legend(handlelength=1.6, **beside)
        for axes, group in zip(panels, groups, strict=False):
            if not together or axes in panels[::across]:
                axes.set_ylabel(f"validation {measure(group)} (%)")
        for axes in panels[len(groups) :]:
            axes.set_visible(False)
        return png(figure)


def _tried(axes: Axes, arm: Arm, look: Look) -> None:
    scores: dict[float, list[float]] = {}
    for point in arm.grid:
        scores.setdefault(point["lr"], []).append(100 * point["validation_score"])
    rates = sorted(scores)
    means = [sum(scores[rate]) / len(scores[rate]) for rate in rates]
    axes.plot(rates, means, f"{look.marker}-", color=look.colour, ms=4, label=arm.row)
    if arm.lr is not None and arm.lr in scores:
        axes.plot(arm.lr, means[rates.index(arm.lr)], "o", ms=10, mfc="none", mec=look.colour, mew=1.3)


def ablation(found: Ablation) -> bytes:
    """Draw an ablation: seeds as open dots, means with 95 % intervals, the baseline filled, from scratch in grey.

    An axis of numbers is a line, a grid of two is a line for each value of the second, and anything else a dot plot.
    Beside or below stand the relative cost of pretraining, where it differs, and published numbers at their own scale.
    """
    path = ablations.axis(found)
    crossed = _crossed(found)
    with matplotlib.rc_context(STYLE):
        if path or crossed:
            return png(_lines(found, path or found.axes[0], crossed))
        return png(_dots(found))


def _crossed(found: Ablation) -> str | None:
    """The second axis of a grid of two whose first is of numbers."""
    values = [line.values for line in found.tables[0].lines if not line.scratch]
    if len(found.axes) != 2 or any(set(one) != set(found.axes) for one in values):
        return None
    whole = len(values) == math.prod(len({str(one[path]) for one in values}) for path in found.axes)
    return found.axes[1] if whole and all(_number(one[found.axes[0]]) for one in values) else None


def _lines(found: Ablation, path: str, second: str | None) -> Figure:
    """A panel a judge with its costs below where they differ, and published numbers at the right."""
    shown = [one for one in found.published if not second and len(one.numbers) > 1 and _numeric(one.numbers)]
    costs, panels = _costs(found), len(found.tables)
    figure = Figure((WIDTH_IN, 2.6 + 0.8 * costs), layout="constrained")
    left: Any = figure
    if shown:
        left, right = figure.subfigures(1, 2, width_ratios=[1.55 * panels, 1])  # type: ignore[misc]
    ratios = [2.6, 0.7] if costs else [1]
    grid = left.subplots(1 + costs, panels, squeeze=False, sharex="col", height_ratios=ratios)
    for place, table in enumerate(found.tables):
        _curves(grid[0, place], table, path, second, keyed=place == panels - 1)
        if costs:
            _cost_bars(grid[1, place], table, path)
        _scale(grid[0, place], sorted({line.values[path] for line in table.lines if not line.scratch}))
        grid[-1, place].set_xlabel(path)
        grid[0, place].set_title(textwrap.fill(_titled(found, table), 90 // (panels + bool(shown))))
    grid[0, 0].set_ylabel(f"validation {_metric(found.tables)} (%)")
    if costs:
        grid[1, 0].set_ylabel("cost (x)")
    if shown:
        _elsewhere(right.subplots(), shown, path)
        right.legend(loc="outside lower center", fontsize=6, handlelength=1.4)
    return figure


def _curves(axes: Axes, table: Judged, path: str, second: str | None, keyed: bool) -> None:
    groups: dict[str, list[Line]] = {}
    for line in table.lines:
        if not line.scratch and line.score:
            groups.setdefault(words(line.values[second]) if second else "", []).append(line)
    for place, (name, lines) in enumerate(groups.items()):
        look = Look(MUTED[place % len(MUTED)], MARKERS[place % len(MARKERS)])
        # Groups stand side by side, so that intervals of the same value do not cover each other.
        beside = _beside(axes, 9 * (place - (len(groups) - 1) / 2))
        at = sorted(lines, key=lambda line: float(line.values[path]))
        axes.plot(
            [line.values[path] for line in at], [100 * line.score.mean for line in at if line.score],
            color=look.colour, marker=look.marker, ms=2.5, label=name or None, transform=beside, zorder=2,
        )  # fmt: skip
        for line in at:
            _standing(axes, line.values[path], line, look, 9 * (place - (len(groups) - 1) / 2))
    _reference(axes, table, path)
    axes.margins(x=0.08, y=0.12)
    axes.grid(axis="y")
    if second and keyed:
        axes.legend(
            title=second,
            title_fontsize=7.5,
            handlelength=1.6,
            loc="center left",
            bbox_to_anchor=(1, 0.5),
            alignment="left",
        )
    if not second:
        _named(axes, table.base, path, "baseline", below=True)
        for line in table.lines:
            if line.best:
                _named(axes, line, path, "best", below=False)


def _beside(axes: Axes, points: float) -> Transform:
    """Data coordinates, moved to the right by typographic points."""
    return axes.transData + ScaledTranslation(points / 72, 0, axes.figure.dpi_scale_trans)


def _standing(axes: Axes, x: float, line: Line, look: Look, shift: float) -> None:
    """Draw a point's interval upright, its seeds as open dots left of it, the baseline's mean with a ring."""
    assert line.score
    mean, half = 100 * line.score.mean, 100 * line.score.half
    at = _beside(axes, shift)
    if line.score.count > 1:
        axes.errorbar(
            [x],
            [mean],
            yerr=[half],
            color=look.colour,
            elinewidth=1.1,
            capsize=2.5,
            capthick=1.1,
            transform=at,
            zorder=3,
        )
        seeds = [100 * value for value in line.seeds.values()]
        axes.plot(
            [x] * len(seeds), seeds, look.marker, ms=2.8, mfc="white", mec=look.colour, mew=0.7,
            transform=_beside(axes, shift - 4.5), zorder=4,
        )  # fmt: skip
    if line.baseline:
        axes.plot([x], [mean], "o", ms=7, mfc="none", mec=look.colour, mew=1.1, transform=at, zorder=5)
    axes.update_datalim([(x, mean - half), (x, mean + half)] if line.score.count > 1 else [(x, mean)])


def _named(axes: Axes, line: Line, path: str, name: str, below: bool) -> None:
    """Write what a point is above or below all that is drawn of it."""
    low, high = _reach(line)
    axes.annotate(
        name, (float(line.values[path]), low if below else high), (0, -5 if below else 5), textcoords="offset points",
        ha="center", va="top" if below else "bottom", fontsize=7, color=GREY if below else INK,
        weight="normal" if below else "bold",
    )  # fmt: skip


def _reach(line: Line) -> tuple[float, float]:
    """The lowest and the highest of a point's seeds and interval, in per cent."""
    assert line.score
    ends = [line.score.low, line.score.high] if line.score.count > 1 else [line.score.mean]
    values = [*line.seeds.values(), *ends]
    return 100 * min(values), 100 * max(values)


def _reference(axes: Axes, table: Judged, path: str | None = None) -> None:
    """Draw the encoder from scratch as a dashed line with its interval as a band: level and named over an axis, at the
    end where no point's interval comes near; upright beside rows that have it by name."""
    line = next((line for line in table.lines if line.scratch and line.score), None)
    if not line or not line.score:
        return
    score = line.score
    rule, band = (axes.axhline, axes.axhspan) if path else (axes.axvline, axes.axvspan)
    rule(100 * score.mean, color=GREY, lw=0.9, ls=(0, (4, 2)), zorder=1)
    if score.count > 1:
        band(100 * score.low, 100 * score.high, color=GREY, alpha=0.13, lw=0, zorder=0)
    if path:
        left = _room(table, path, 100 * score.mean, first=True) > _room(table, path, 100 * score.mean, first=False)
        axes.annotate(
            line.label, (0 if left else 1, 100 * score.mean), (2 if left else -2, 2),
            xycoords=("axes fraction", "data"), textcoords="offset points",
            ha="left" if left else "right", va="bottom", fontsize=7, color=GREY,
        )  # fmt: skip


def _room(table: Judged, path: str, level: float, first: bool) -> float:
    """How far, in per cent, all points of the axis's first or last value are from a level."""
    points = [line for line in table.lines if line.score and not line.scratch]
    end = (min if first else max)(line.values[path] for line in points)
    reaches = [_reach(line) for line in points if line.values[path] == end]
    return min(max(low - level, level - high, 0.0) for low, high in reaches)


def _cost_bars(axes: Axes, table: Judged, path: str) -> None:
    """Grey bars of the relative cost; over a second axis, of its mean."""
    costs: dict[float, list[float]] = {}
    for line in table.lines:
        if line.cost is not None:
            costs.setdefault(float(line.values[path]), []).append(line.cost)
    at = sorted(costs)
    heights = [sum(costs[x]) / len(costs[x]) for x in at]
    gap = min((b - a for a, b in pairwise(at)), default=1.0)
    if _geometric(at):
        axes.bar(at, heights, [0.35 * x for x in at], color=GREY, alpha=0.45)
    else:
        axes.bar(at, heights, 0.55 * gap, color=GREY, alpha=0.45)
    for x, height in zip(at, heights, strict=True):
        axes.annotate(
            f"{height:.2f}" if height < 10 else f"{height:.0f}", (x, height), (0, 2), textcoords="offset points",
            ha="center", fontsize=6.5, color=GREY,
        )  # fmt: skip
    axes.set_ylim(0, 1.35 * max(heights))
    axes.set_yticks([0, 1])


def _elsewhere(axes: Axes, shown: Sequence[Elsewhere], path: str) -> None:
    """Draw published numbers over the same axis, with their scale below."""
    for place, one in enumerate(shown):
        at = sorted(map(float, one.numbers))
        ink, marker = MUTED[(place + 1) % len(MUTED)], MARKERS[(place + 1) % len(MARKERS)]
        told = textwrap.fill(f"{_brief(one)}: {one.scale}", 38)
        axes.plot(at, [one.numbers[words(x)] for x in at], f"{marker}-", color=ink, ms=3.5, label=told)
    axes.set_title("published, at a scale of their own", fontsize=7.5, color=GREY)
    _scale(axes, sorted({float(label) for one in shown for label in one.numbers}))
    axes.margins(x=0.08, y=0.12)
    axes.set_xlabel(path)
    axes.grid(axis="y")
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _dots(found: Ablation) -> Figure:
    """A row a point, the first on top, as the table has them; costs in a narrow panel; published numbers below."""
    shown = [one for one in found.published if len(one.numbers) > 1]
    costs = _costs(found)
    rows = [len(table.lines) for table in found.tables] + [len(one.numbers) for one in shown]
    heights = [count + 0.9 for count in rows]
    figure = Figure((WIDTH_IN, 0.55 + 0.27 * sum(heights) + 0.42 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), 1 + costs, squeeze=False, height_ratios=heights, width_ratios=[5, 1][: 1 + costs])
    for place, table in enumerate(found.tables):
        _dotted(grid[place, 0], table)
        grid[place, 0].set_title(_titled(found, table))
        if costs:
            _cost_rows(grid[place, 1], table, first=place == 0)
    grid[len(found.tables) - 1, 0].set_xlabel(
        f"validation {_metric(found.tables)} (%): seeds, mean and 95 % interval over seeds"
    )
    for place, one in enumerate(shown, len(found.tables)):
        _stated(grid[place, 0], one)
        if costs:
            grid[place, 1].set_visible(False)
    return figure


def _dotted(axes: Axes, table: Judged) -> None:
    lines = list(reversed(table.lines))
    for place, line in enumerate(lines):
        ink = GREY if line.scratch else MUTED[0]
        told, weight = "failed", "bold" if line.best else "normal"
        if line.score:
            mean, half, seeds = 100 * line.score.mean, 100 * line.score.half, [100 * one for one in line.seeds.values()]
            told = f"{mean:.1f} (one seed)"
            if line.score.count > 1:
                told = f"{mean:.1f} \N{PLUS-MINUS SIGN} {half:.1f}"
                axes.errorbar(
                    [mean], [place], xerr=[half], color=ink, elinewidth=1.2, capsize=3, capthick=1.2, zorder=2
                )
                axes.plot([mean] * 2, [place - 0.3, place + 0.3], color=ink, lw=2, solid_capstyle="butt", zorder=3)
            axes.plot(seeds, [place] * len(seeds), "o", ms=4, mfc="white", mec=ink, mew=0.9, zorder=4)
        # In a column of their own, where no dot and no line runs through them.
        axes.annotate(
            told, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=7.5, weight=weight,
            color=INK if line.score else GREY, annotation_clip=False,
        )  # fmt: skip
    _reference(axes, table)
    if table.base.score:
        axes.axvline(100 * table.base.score.mean, color=MUTED[0], lw=0.8, alpha=0.5, zorder=0)
    _rows(axes, [line.name for line in lines])
    for tick, line in zip(axes.get_yticklabels(), lines, strict=True):
        tick.set_fontweight("bold" if line.best else "normal")
    axes.margins(x=0.04)
    axes.xaxis.set_major_locator(MaxNLocator(7))


def _stated(axes: Axes, one: Elsewhere) -> None:
    labels = list(one.numbers)[::-1]
    values = [one.numbers[label] for label in labels]
    axes.plot(values, range(len(labels)), "D", ms=4, color=GREY)
    for place, value in enumerate(values):
        axes.annotate(f"{value:g}", (value, place), (6, 0), textcoords="offset points", va="center", fontsize=7.5)
    _rows(axes, labels)
    axes.set_title(textwrap.fill(f"Published: {one.source}; {one.scale}", 80), fontsize=7.5, color=GREY)
    spread = max(values) - min(values) or 1.0
    axes.set_xlim(min(values) - 0.15 * spread, max(values) + 0.25 * spread)
    axes.xaxis.set_major_locator(MaxNLocator(6))


def _rows(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), [textwrap.fill(label, 34) for label in labels])
    axes.set_ylim(-0.6, len(labels) - 0.4)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")


def _cost_rows(axes: Axes, table: Judged, first: bool) -> None:
    lines = list(reversed(table.lines))
    for place, line in enumerate(lines):
        if line.cost is not None:
            axes.barh(place, line.cost, 0.55, color=GREY, alpha=0.45)
            axes.annotate(
                f"{line.cost:.2f}x", (line.cost, place), (3, 0), textcoords="offset points", va="center", fontsize=7,
                color=GREY,
            )  # fmt: skip
    axes.set_ylim(-0.6, len(lines) - 0.4)
    axes.set_xlim(0, 1.6 * max(line.cost or 0 for line in lines))
    axes.set_yticks([])
    axes.set_xticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    if first:
        axes.set_title("cost", color=GREY)


def _titled(found: Ablation, table: Judged) -> str:
    """Name a panel: the ablation, or of several judges the one that it shows."""
    return f"{table.judge if len(found.tables) > 1 else found.name}: {table.title}"


def _costs(found: Ablation) -> bool:
    """Whether the costs of points differ by more than machines' noise."""
    costs = [line.cost for line in found.tables[0].lines if line.cost]
    return bool(costs) and max(costs) > 1.1 * min(costs)


def _metric(tables: Sequence[Judged]) -> str:
    names = {METRICS.get(table.metric, table.metric) for table in tables}
    return names.pop() if len(names) == 1 else "score"


def _brief(one: Elsewhere) -> str:
    return one.source.partition(" (")[0]


def _numeric(labels: Iterable[str]) -> bool:
    return all(label.replace(".", "", 1).isdigit() for label in labels)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _geometric(values: Sequence[float]) -> bool:
    """Whether sorted values grow by factors rather than by steps."""
    if len(values) < 3 or values[0] <= 0 or values[-1] < 4 * values[0]:
        return False
    return all(b >= 1.3 * a for a, b in pairwise(values)) and values[-1] - values[-2] > 2 * (values[1] - values[0])


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """Ticks at the values that were measured, on a logarithmic axis where they grow by factors."""
    if _geometric(values):
        axes.set_xscale("log")
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.xaxis.set_minor_locator(NullLocator())


def _series(curve: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    """The steps and values of the lines that have a value and are finite."""
    points = [(line["step"], line[key]) for line in curve if key in line and math.isfinite(line[key])]
    return [step for step, _ in points], [value for _, value in points]


def empty(said: str) -> bytes:
    """A picture that says why there is none."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH_IN, 0.6))
        figure.text(0.5, 0.5, said, ha="center", va="center", color=GREY)
        return png(figure)


def png(figure: Figure) -> bytes:
    """Draw a figure as PNG; equal figures are equal bytes."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    # No name of a version inside: equal results make equal bytes.
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
