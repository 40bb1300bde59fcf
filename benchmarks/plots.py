# SPDX-License-Identifier: Apache-2.0
"""The two kinds of plot that the benchmark page has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

_COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c", "#ccb974")
_MARKERS = "os^Dv<>P*"


def draw_speeds(cases: Mapping[str, Mapping[str, float]], title: str, path: Path) -> None:
    """One line per case, one kind of dot per contender, on a logarithmic axis; left of 1 loses."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    names = list(dict.fromkeys(name for values in cases.values() for name in values))
    figure = Figure(figsize=(9, 2.0 + 0.24 * len(cases)), layout="constrained")
    axes = figure.subplots()
    for index, name in enumerate(names):
        points = [(values[name], line) for line, values in enumerate(cases.values()) if name in values]
        x, y = zip(*points, strict=True)
        marker = _MARKERS[index % len(_MARKERS)]
        axes.scatter(x, y, label=name, color=_COLOURS[index % len(_COLOURS)], marker=marker, s=28, zorder=3)
    axes.set_yticks(range(len(cases)), list(cases), fontsize=7)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.axvline(1, color="black", linewidth=0.8)
    axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, fontsize=7)
    figure.savefig(path, dpi=110)


def draw_lines(
    series: Mapping[str, Sequence[tuple[float, float]]], title: str, x_label: str, y_label: str, path: Path
) -> None:
    """Lines with markers on two logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, (name, points) in enumerate(series.items()):
        x, y = zip(*points, strict=True)
        axes.plot(x, y, marker="o", label=name, color=_COLOURS[index % len(_COLOURS)])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(which="both", alpha=0.3)
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)
