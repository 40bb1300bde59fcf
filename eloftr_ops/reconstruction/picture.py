# SPDX-License-Identifier: Apache-2.0
"""Colours of a sparse model, and a picture of it: points and cameras from above and from the front."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eloftr_ops.errors import FileError
from eloftr_ops.images import read_image
from eloftr_ops.io import atomic_write

__all__ = ["color_points", "draw_model"]

Array = npt.NDArray[np.float64]
_MOST_POINTS = 30_000
_SHOWN = (1.0, 99.0)  # percentiles of the points that the picture shows whole


def color_points(model: Any, images: Path) -> None:
    """Give each point the mean colour of where it is seen; images are turned upright, as for matching.

    Images that cannot be read do not count.
    """
    sums: dict[int, Array] = {}
    for image in model.images.values():
        if not image.has_pose:
            continue
        try:
            loaded = read_image(images / image.name, color=True)
        except FileError:
            continue
        picture = loaded.color
        if picture is None:
            picture = np.repeat((loaded.image[0, 0].numpy()[..., None] * 255).astype(np.uint8), 3, 2)
        for point in image.get_observation_points2D():
            x, y = (int(value) for value in point.xy)
            height, width = picture.shape[:2]
            value = np.append(picture[min(max(y, 0), height - 1), min(max(x, 0), width - 1)], 1.0)
            sums[point.point3D_id] = sums.get(point.point3D_id, 0) + value
    for number, total in sums.items():
        model.points3D[number].color = np.rint(total[:3] / total[3]).astype(np.uint8)


def draw_model(model: Any, path: Path) -> None:
    """Draw the points in their colours and the cameras in red, from above and from the front of the cameras.

    Raises:
        FileError: the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = np.array([point.xyz for point in model.points3D.values()]).reshape(-1, 3)
    colors = np.array([point.color for point in model.points3D.values()]).reshape(-1, 3) / 255
    posed = [image for image in model.images.values() if image.has_pose]
    centres = np.array([image.projection_center() for image in posed])
    axes = _upright([image.cam_from_world().rotation.matrix() for image in posed])
    points, centres = points @ axes.T, centres @ axes.T
    step = max(1, len(points) // _MOST_POINTS)
    figure = Figure(figsize=(12, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for place, (title, across, up) in enumerate((("from above", 0, 2), ("from the front", 0, 1))):
        plot = figure.add_subplot(1, 2, place + 1)
        sign = 1 if up == 2 else -1  # y points down
        plot.scatter(points[::step, across], sign * points[::step, up], s=1.5, c=colors[::step], linewidths=0)
        plot.scatter(centres[:, across], sign * centres[:, up], s=30, c="#ff3b30", marker="^")
        plot.set_title(title)
        plot.set_aspect("equal")
        plot.set_axis_off()
        _frame(plot, points[:, across], sign * points[:, up], centres[:, across], sign * centres[:, up])
    figure.suptitle(f"{len(posed)} cameras, {len(points):,} points")
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def _upright(rotations: list[Array]) -> Array:
    """(3, 3) the mean axes of the cameras, right, down and forward, made orthogonal."""
    U, _, Vt = np.linalg.svd(np.mean(rotations, 0))
    axes: Array = U @ np.diag([1, 1, np.linalg.det(U @ Vt)]) @ Vt
    return axes


def _frame(plot: Any, x: Array, y: Array, centre_x: Array, centre_y: Array) -> None:
    """Show all cameras and nearly all points: a few may be far away."""
    for values, centres, limit in ((x, centre_x, plot.set_xlim), (y, centre_y, plot.set_ylim)):
        low, high = np.percentile(values, _SHOWN) if len(values) else (0.0, 0.0)
        low, high = min(low, centres.min()), max(high, centres.max())
        margin = 0.05 * (high - low) + 1e-9
        limit(low - margin, high + margin)
