# SPDX-License-Identifier: Apache-2.0
"""The usual evaluation sets by name, each with its protocol."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from eloftr_ops.data.hpatches import LARGE_SEQUENCES, HPatchesPairs
from eloftr_ops.data.labelled import LabelledPairs, PairOptions
from eloftr_ops.data.megadepth import MegaDepthPairs
from eloftr_ops.data.pairs import JsonPairs
from eloftr_ops.data.scannet import ScanNetPairs

__all__ = ["DATASETS", "EvaluationSet", "open_pairs"]


@dataclass(frozen=True)
class EvaluationSet:
    """The usual protocol of a data set.

    Attributes:
        resize: pixels that longer images are reduced to.
        shorter_side: ``resize`` is of the shorter side instead of the longer one.
        epipolar_threshold: of the matching precision of poses.
        original_pixels: thresholds and errors are in pixels of the files, not of the images as matched.
    """

    resize: int = 640
    shorter_side: bool = False
    epipolar_threshold: float = 1e-4
    original_pixels: bool = True


DATASETS = {
    "megadepth": EvaluationSet(),
    "scannet": EvaluationSet(epipolar_threshold=5e-4, original_pixels=False),
    "hpatches": EvaluationSet(resize=480, shorter_side=True, original_pixels=False),
    "json": EvaluationSet(),
}
"""By name; "json" are pairs of one's own, see `eloftr_ops.data.JsonPairs`."""


def open_pairs(
    dataset: str,
    root: str | Path | None = None,
    index: str | Path | None = None,
    *,
    resize: int | None = None,
    all_sequences: bool = False,
) -> LabelledPairs:
    """Open an evaluation set, without its depth maps (unless a JSON file names them), which only training needs.

    Args:
        dataset: a name in `DATASETS`.
        root: folder of the images. For "json" it may be left out: paths then start from the index's folder.
        index: "megadepth": scene_info file or folder of them; "scannet": ``test.npz``, with ``intrinsics.npz`` beside
            it, by default in ``root``; "json": the file of pairs; "hpatches": none.
        resize: pixels that larger images are reduced to; None for the data set's own, 0 for never.
        all_sequences: of HPatches, take the eight large sequences, too, that most papers leave out.

    Raises:
        FileError: an index that is missing or broken.
        ValueError: an unknown name, a missing root or index, or nothing found there.
    """
    if dataset not in DATASETS:
        raise ValueError(f"dataset: expected one of {', '.join(DATASETS)}, got {dataset!r}.")
    if root is None and dataset != "json":
        raise ValueError(f"root: expected the folder of {dataset}'s images, got none.")
    if index is None and dataset in ("megadepth", "json"):
        what = "scene_info file or a folder of them" if dataset == "megadepth" else "JSON file of pairs"
        raise ValueError(f"index: expected the {what}, got none.")
    if index is not None and dataset == "hpatches":
        raise ValueError(f"index: expected none for hpatches, got {index}. Its folders name all pairs.")
    protocol = DATASETS[dataset]
    size = protocol.resize if resize is None else resize or None
    options = PairOptions(resize=size, shorter_side=protocol.shorter_side, min_overlap=None)
    if dataset == "scannet":
        return ScanNetPairs(str(root), index, options=options)
    if dataset == "hpatches":
        exclude = frozenset() if all_sequences else LARGE_SEQUENCES
        return HPatchesPairs(str(root), exclude=exclude, options=options)
    if dataset == "megadepth":
        return MegaDepthPairs(str(root), str(index), depth=False, options=options)
    return JsonPairs(str(index), root, options=options)
