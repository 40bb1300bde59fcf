# SPDX-License-Identifier: Apache-2.0
"""The golden numbers and the model that carries their weights; they live in ``benchmarks``, which times the model."""

from benchmarks.golden import golden_model, image, reference, seeded_state_dict

__all__ = ["golden_model", "image", "reference", "seeded_state_dict"]
