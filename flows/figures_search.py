"""The figure of a search: its trials in their order, what its settings account for, and the rows that compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from flows import searches
from flows.figures import GREY, INK, MUTED, STYLE, WIDTH_IN, png
from flows.searches import Search

FOUND, DEFAULT, LOST = MUTED[2], MUTED[0], MUTED[1]
BARS = 8
"""Settings that are drawn at most; the table has all."""


def search(found: Search) -> bytes:
    """Draw a search as PNG: trials and what ended early over their number, importances, and the final comparison."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH_IN, 4.6), layout="constrained")
        parts = figure.add_gridspec(2, 1, height_ratios=[2.9, 1.7])
        upper, lower = figure.add_subfigure(parts[0]), figure.add_subfigure(parts[1])
        grid = upper.add_gridspec(2, 2, width_ratios=[1.75, 1], height_ratios=[3.2, 1])
        trials, ended = upper.add_subplot(grid[0, 0]), upper.add_subplot(grid[1, 0])
        ended.sharex(trials)
        _trials(trials, found)
        _ended(ended, found)
        _importances(upper.add_subplot(grid[:, 1]), found)
        for axes, split in zip(lower.subplots(1, 2), searches.SCORES.values(), strict=True):
            _final(axes, found, split)
        return png(figure)


def _trials(axes: Axes, found: Search) -> None:
    own = [(one["place"], 100 * one["score"], one) for one in found.tried if one["score"] is not None]
    told = sorted(100 * one["score"] for one in found.told)
    best, default = found.results["best"]["number"], found.results["default"].get("number")
    if told:
        # Left of the first trial, in a column of their own: they have no order.
        axes.axvspan(_left(found), -0.8, color="#f3f3f3", lw=0)
        axes.plot(
            [(_left(found) - 0.8) / 2] * len(told),
            told,
            "o",
            ms=3.2,
            mfc="white",
            mec=GREY,
            mew=0.8,
            label="known from ablations",
        )
    places = [place for place, _, _ in own]
    axes.plot(places, [score for _, score, _ in own], "o", ms=4, color=FOUND, label="completed")
    steps, values, highest = [], [], max(told, default=float("-inf"))
    for place in range(len(found.tried)):
        highest = max([highest, *(score for at, score, _ in own if at == place)])
        if highest > float("-inf"):
            steps.append(place)
            values.append(highest)
    axes.step(steps, values, where="post", color=FOUND, lw=1.1, alpha=0.6, label="best so far")
    for place, score, one in own:
        if one["number"] == default:
            axes.plot(place, score, "D", ms=5, color=DEFAULT, label="default row", zorder=4)
            axes.axhline(score, color=DEFAULT, lw=0.7, ls=(0, (4, 3)), zorder=1)
        if one["number"] == best:
            axes.plot(place, score, "o", ms=10, mfc="none", mec=FOUND, mew=1.2, label="best", zorder=4)
    axes.set_ylabel(f"validation {found.metric} (%)")
    axes.set_xlim(_left(found), len(found.tried) - 0.3)
    axes.margins(y=0.12)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="y")
    axes.tick_params(axis="x", labelbottom=False, length=0)
    # Above the axes: a point may lie anywhere in them.
    above: Any = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0)}
    axes.legend(ncols=3, handlelength=1.4, labelspacing=0.3, columnspacing=1.2, borderpad=0.2, markerscale=0.8, **above)


def _left(found: Search) -> float:
    """Where the axis of trials begins: told results have a column left of it."""
    return -0.8 - (0.08 * len(found.tried) if found.told else 0.0)


def _ended(axes: Axes, found: Search) -> None:
    """How far the pretraining of trials came that were not completed."""
    evaluations = found.results["pruner"].get("evaluations", 0) or 1
    for state, marker, colour in (("pruned", "x", LOST), ("stopped", "s", GREY), ("failed", "|", INK)):
        some = [one for one in found.tried if one["state"] == state]
        if some:
            shares = [0.0 if state == "failed" else _share(one, evaluations) for one in some]
            axes.plot([one["place"] for one in some], shares, marker, ms=5, mew=1.1, color=colour, label=state)
    axes.set_ylim(-0.18, 1.18)
    axes.set_yticks([0, 0.5, 1], ["0", "50", "100"])
    axes.set_ylabel("% pretrained")
    axes.set_xlabel(f"trial, in the order of their start; {found.shared}")
    last = len(found.tried) - 1
    axes.set_xticks([tick for tick in MaxNLocator(8, integer=True).tick_values(0, max(1, last)) if 0 <= tick <= last])
    axes.grid(axis="y")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(
            loc="center left", bbox_to_anchor=(0.0, 1.17), ncols=3, handlelength=1, columnspacing=1, borderpad=0
        )


def _share(trial: Any, evaluations: int) -> float:
    return max(map(int, trial["reports"]), default=0) / evaluations


def _importances(axes: Axes, found: Search) -> None:
    shares = sorted(found.results["importances"].items(), key=lambda item: item[1])[-BARS:]
    done = sum(one["score"] is not None for one in found.results["trials"])
    axes.set_title(f"importance, {done} completed")
    if not shares:
        axes.text(0.5, 0.5, "too few completed trials", transform=axes.transAxes, ha="center", color=GREY)
        axes.set_axis_off()
        return
    axes.barh(range(len(shares)), [share for _, share in shares], height=0.55, color=MUTED[3])
    axes.set_yticks(range(len(shares)), [path for path, _ in shares])
    for place, (_, share) in enumerate(shares):
        axes.annotate(f"{share:.0%}", (share, place), (3, 0), textcoords="offset points", va="center")
    axes.set_xlim(0, 1.2 * max(max(share for _, share in shares), 0.1))
    axes.set_ylim(-0.6, len(shares) - 0.4)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")


def _final(axes: Axes, found: Search, split: str) -> None:
    """The final comparison on one split: a line joins a seed's two scores."""
    arms: Sequence[str] = ("default", "best")
    seeds = [{seed: 100 * score for seed, score in getattr(found.finals[arm], split).items()} for arm in arms]
    for place, (arm, scores, colour) in enumerate(zip(arms, seeds, (DEFAULT, FOUND), strict=True)):
        over = found.interval(arm, split)
        mean, end = 100 * over.mean, max(scores.values())
        if over.count > 1:
            half = 100 * over.half
            axes.errorbar(mean, place, xerr=half, color=colour, elinewidth=1.2, capsize=3, capthick=1.2, zorder=2)
            axes.plot([mean, mean], [place - 0.22, place + 0.22], color=colour, lw=2, solid_capstyle="butt", zorder=3)
            end = max(end, mean + half)
        axes.plot(list(scores.values()), [place] * len(scores), "o", ms=4, mfc="white", mec=colour, mew=0.9, zorder=4)
        said = f"{mean:.1f} \N{PLUS-MINUS SIGN} {100 * over.half:.1f}" if over.count > 1 else f"{mean:.1f} (one seed)"
        axes.annotate(said, (end, place), (6, 0), textcoords="offset points", va="center")
    for seed in seeds[0].keys() & seeds[1].keys():
        axes.plot([seeds[0][seed], seeds[1][seed]], [0, 1], color=GREY, lw=0.5, alpha=0.6, zorder=1)
    axes.set_yticks([0, 1], ["default row", "best row"])
    axes.set_ylim(-0.55, 1.55)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.32 * (high - low))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    gain, said = found.gain(split), "the default row is the best"
    if found.found:
        bounds = f"[{100 * gain.low:.1f}, {100 * gain.high:.1f}]" if gain.count > 1 else "(one seed)"
        said = f"{100 * gain.mean:+.1f} points {bounds}"
    axes.set_title(f"{split}: {said}")
    axes.set_xlabel(f"{split} {found.metric} (%), fresh seeds")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
