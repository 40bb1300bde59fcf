# SPDX-License-Identifier: Apache-2.0
"""How often two images are looked at: a choice that matching, its verdict and the command line share."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["EFFORTS", "Effort"]

Effort = Literal["fast", "normal", "thorough"]
"""``fast``: one look. ``normal``: looks through a warp. ``thorough``: a search, too. See `eloftr_ops.guided`."""

EFFORTS: tuple[Effort, ...] = get_args(Effort)
