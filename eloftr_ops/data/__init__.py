# SPDX-License-Identifier: Apache-2.0
"""Training and evaluation data: rendered homographies and scenes, photographs, the field's data sets."""

from eloftr_ops.data.folders import folder_pairs, read_textures
from eloftr_ops.data.homographies import HomographyConfig, homography_overlap, sample_homographies
from eloftr_ops.data.hpatches import HPatchesPairs
from eloftr_ops.data.labelled import ImagePair, PairOptions, collate_pairs
from eloftr_ops.data.megadepth import MegaDepthPairs
from eloftr_ops.data.pairs import JsonPairs
from eloftr_ops.data.photometric import PhotometricConfig, photometric_change
from eloftr_ops.data.scannet import ScanNetPairs
from eloftr_ops.data.scenes import SceneBatch, SceneConfig, ScenePairs
from eloftr_ops.data.synthetic import HomographyBatch, HomographyPairs, SyntheticConfig
from eloftr_ops.data.textures import PhotoTextures, procedural_textures

__all__ = [
    "HPatchesPairs",
    "HomographyBatch",
    "HomographyConfig",
    "HomographyPairs",
    "ImagePair",
    "JsonPairs",
    "MegaDepthPairs",
    "PairOptions",
    "PhotoTextures",
    "PhotometricConfig",
    "ScanNetPairs",
    "SceneBatch",
    "SceneConfig",
    "ScenePairs",
    "SyntheticConfig",
    "collate_pairs",
    "folder_pairs",
    "homography_overlap",
    "photometric_change",
    "procedural_textures",
    "read_textures",
    "sample_homographies",
]
