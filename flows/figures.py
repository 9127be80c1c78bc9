"""The report's figures, at the width of a page (6.5 in), as PNG bytes.

Matplotlib's objects are used directly, without pyplot, which keeps figures in a global list and looks for a window.
An arm has the colour of the pretraining it starts from (grey from scratch) and a marker, the same in every figure; no
two arms share both until there are dozens. The colours are Paul Tol's muted ones, which colour-blind readers can tell
apart.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, StrMethodFormatter

from flows.results import SCRATCH, Arm, Pretrained, comparisons, measure, title

WIDTH_IN, DPI = 6.5, 200
MUTED = ("#332288", "#CC6677", "#117733", "#88CCEE", "#882255", "#DDCC77", "#44AA99", "#AA4499", "#999933")
GREY, INK, RULE = "#6b6b6b", "#222222", "#d9d9d9"
MARKERS = "osD^vPX*"
FEW = 5
"""Arms or runs up to which a figure has room to spare."""
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
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
        return _empty("No downstream result is published.")
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
        return _png(figure)


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
        return _empty("No pretraining run is published.")
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
        return _png(figure)


def lr_grid(arms: Sequence[Arm], look: Mapping[str, Look]) -> bytes:
    """Draw the validation score over the learning rates tried, a panel a comparison; a ring marks the chosen one."""
    groups = [group for group in comparisons(arms) if any(arm.grid for arm in group)]
    if not groups:
        return _empty("No learning-rate grid is published.")
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
        return _png(figure)


def _tried(axes: Axes, arm: Arm, look: Look) -> None:
    scores: dict[float, list[float]] = {}
    for point in arm.grid:
        scores.setdefault(point["lr"], []).append(100 * point["validation_score"])
    rates = sorted(scores)
    means = [sum(scores[rate]) / len(scores[rate]) for rate in rates]
    axes.plot(rates, means, f"{look.marker}-", color=look.colour, ms=4, label=arm.row)
    if arm.lr is not None and arm.lr in scores:
        axes.plot(arm.lr, means[rates.index(arm.lr)], "o", ms=10, mfc="none", mec=look.colour, mew=1.3)


def _series(curve: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    """The steps and values of the lines that have a value and are finite."""
    points = [(line["step"], line[key]) for line in curve if key in line and math.isfinite(line[key])]
    return [step for step, _ in points], [value for _, value in points]


def _empty(said: str) -> bytes:
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH_IN, 0.6))
        figure.text(0.5, 0.5, said, ha="center", va="center", color=GREY)
        return _png(figure)


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    # No name of a version inside: equal results make equal bytes.
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
