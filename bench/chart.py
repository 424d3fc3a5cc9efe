"""The figures as a chart."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from report import Row
from targets import BOTO3, CUBE, MANY_STEPS, MEMORY_STEPS, PUBLISHED, Figures

COLOURS = {CUBE: "#1b7f5c", PUBLISHED: "#c9792b", BOTO3: "#8a93a6"}
BAR = 0.27  # of the distance between two steps


def draw(rows: list[Row], best: Figures, path: Path) -> None:
    """Draw the seconds of each step, on a scale where each line is ten times more.

    :param path: of the SVG
    """
    timed = [row for row in rows if row.step not in {*MEMORY_STEPS, *MANY_STEPS}]
    # The same figures give the same file, and its text stays text.
    with matplotlib.rc_context({"svg.hashsalt": "benchmark", "svg.fonttype": "none"}):
        figure = Figure(figsize=(9, 1.2 + 0.62 * len(timed)), layout="constrained")
        axes = figure.subplots()
        for position, (name, colour) in enumerate(COLOURS.items()):
            present = [
                (y, row.taken[name]) for y, row in enumerate(timed) if name in row.taken
            ]
            places = [y + (position - 1) * BAR for y, _ in present]
            widths = [seconds for _, seconds in present]
            bars = axes.barh(places, widths, BAR, color=colour, label=name)
            axes.bar_label(bars, [f"{s:.2g} s" for s in widths], padding=3, fontsize=8)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_yticks(range(len(timed)), [row.label for row in timed])
        axes.invert_yaxis()
        axes.margins(x=0.12, y=0.01)
        axes.set_xlabel("seconds, logarithmic; shorter is better")
        axes.grid(axis="x", color="#dddddd")
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        figure.legend(loc="outside upper center", ncols=len(COLOURS), frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
