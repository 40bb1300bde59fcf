# SPDX-License-Identifier: Apache-2.0
"""Which images look alike, told by descriptors that are pooled from the matcher's own coarse features.

The local features of all images are put into clusters, and each image is described by the sums of what its features
differ from their cluster's centre (VLAD). No other network and no download is needed.

Source: Jegou, Douze, Schmid, Perez: "Aggregating local descriptors into a compact image representation", CVPR 2010;
Arandjelovic, Zisserman: "All about VLAD", CVPR 2013 (normalisation per cluster).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eloftr_ops.errors import FileError
from eloftr_ops.model.matcher import EfficientLoFTR
from eloftr_ops.reconstruction.engine import MatchSettings
from eloftr_ops.reconstruction.features import FeatureStore
from eloftr_ops.reconstruction.pairs import Pair, PairList, RefusedPair, unique_pairs

__all__ = ["Descriptors", "describe_images", "nearest_pairs", "retrieval_pairs", "vlad_descriptors"]

_CLUSTERS = 32
_SAMPLES = 256  # features per image that the clusters are found with
_ROUNDS = 10


class Descriptors(NamedTuple):
    """What images look like."""

    names: list[str]  # N, of the images that can be read
    values: Tensor  # (N, D) of length 1; zero for a blank image
    refused: list[RefusedPair]  # the others, each once with an empty second name


def retrieval_pairs(
    matcher: EfficientLoFTR, folder: Path, names: Sequence[str], neighbours: int, settings: MatchSettings
) -> PairList:
    """Each image with the images that look most alike.

    Args:
        matcher: for inference; on its device.
        folder: of the images.
        names: of the images.
        neighbours: pairs per image; an image is in more pairs when others choose it.
        settings: size of the images and threads that read them.

    Returns:
        The pairs; an image that cannot be read is refused once, with an empty second name.

    Raises:
        FileError: fewer than two images can be read.
    """
    found = describe_images(matcher, folder, names, settings)
    if len(found.names) < 2:
        raise FileError(f"{folder}: expected at least two images that can be read, got {len(found.names)}.")
    return PairList(nearest_pairs(found.names, found.values, neighbours), found.refused)


def describe_images(
    matcher: EfficientLoFTR, folder: Path, names: Sequence[str], settings: MatchSettings
) -> Descriptors:
    """Descriptors of images, from the coarse features of the backbone."""
    store = FeatureStore(matcher, folder, resize=settings.resize, budget=1, loaders=settings.loaders)
    store.expect(names)
    maps, readable, refused = [], [], []
    try:
        for name in names:
            try:
                image = store.get(name)
            except FileError as error:
                refused.append(RefusedPair((name, ""), str(error)))
                continue
            readable.append(name)
            maps.append(_local_features(image.features))
    finally:
        store.close()
    return Descriptors(readable, vlad_descriptors(maps), refused)


def nearest_pairs(names: Sequence[str], descriptors: Tensor, neighbours: int) -> list[Pair]:
    """Each image with its nearest ones by the product of descriptors (N, D); equals in the order of the names."""
    similarity = descriptors @ descriptors.T
    similarity.fill_diagonal_(-torch.inf)
    count = min(neighbours, len(names) - 1)
    nearest = similarity.argsort(dim=1, descending=True, stable=True)[:, :count]
    chosen = {tuple(sorted((i, j))) for i, row in enumerate(nearest.tolist()) for j in row}
    return unique_pairs((names[i], names[j]) for i, j in sorted(chosen))


def vlad_descriptors(maps: Sequence[Tensor], clusters: int = _CLUSTERS) -> Tensor:
    """Descriptors (N, clusters * C) of length 1 from local features (L, C) of N images; zero without features.

    The clusters are found with k-means on a fixed sample, so that the same images give the same descriptors.
    """
    filled = [features for features in maps if len(features)]
    if not filled:
        return torch.zeros(len(maps), 1)
    sample = torch.cat([features[:: max(1, len(features) // _SAMPLES)] for features in filled])
    centre = sample.mean(0)
    centres = _k_means(F.normalize(sample - centre, dim=1), min(clusters, len(sample)))
    rows = []
    for features in maps:
        sums = torch.zeros_like(centres)
        if len(features):
            features = F.normalize(features - centre, dim=1)
            nearest = (features @ centres.T - 0.5 * centres.square().sum(1)).argmax(1)
            sums.index_add_(0, nearest, features - centres[nearest])
        rows.append(F.normalize(F.normalize(sums, dim=1).flatten(), dim=0))
    return torch.stack(rows)


def _local_features(features: dict[str, Tensor]) -> Tensor:
    """(L, C) float32 on the CPU: the coarse cells that show the image."""
    if not features:
        return torch.zeros(0, 1)
    coarse = features["coarse"][0].flatten(1).T.float()
    if "mask" in features:
        coarse = coarse[features["mask"][0, ::8, ::8].flatten()]
    return coarse.cpu().clone()


def _k_means(points: Tensor, count: int) -> Tensor:
    """Centres (count, C); begins with points spread evenly over the list, and is the same every time."""
    centres = points[torch.linspace(0, len(points) - 1, count).long()].clone()
    for _ in range(_ROUNDS):
        nearest = (points @ centres.T - 0.5 * centres.square().sum(1)).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        sizes = torch.bincount(nearest, minlength=count)[:, None]
        centres = torch.where(sizes > 0, sums / sizes.clamp_min(1), centres)
    return centres
