# SPDX-License-Identifier: Apache-2.0
"""Training and evaluation data."""

from eloftr_ops.data.homographies import HomographyConfig, homography_overlap, sample_homographies
from eloftr_ops.data.photometric import PhotometricConfig, photometric_change
from eloftr_ops.data.synthetic import (
    HomographyBatch,
    HomographyPairs,
    SyntheticConfig,
)
from eloftr_ops.data.textures import PhotoTextures, procedural_textures

__all__ = [
    "HomographyBatch",
    "HomographyConfig",
    "HomographyPairs",
    "PhotoTextures",
    "PhotometricConfig",
    "SyntheticConfig",
    "homography_overlap",
    "photometric_change",
    "procedural_textures",
    "sample_homographies",
]
