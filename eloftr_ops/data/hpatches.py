# SPDX-License-Identifier: Apache-2.0
"""HPatches image sequences (Balntas et al. 2017): the first image of each with its five others, and homographies.

Convention:
    The homographies in the files are for pixel centres at (x, y); they are moved to (x + 0.5, y + 0.5).
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np

from eloftr_ops.data.labelled import ImagePair, LabelledPairs, PairOptions, View, assemble
from eloftr_ops.data.labels import homography_from_integer_centers
from eloftr_ops.io import FileError

__all__ = ["LARGE_SEQUENCES", "HPatchesPairs"]

LARGE_SEQUENCES = frozenset(
    {
        "i_contruction", "i_crownnight", "i_dc", "i_pencils", "i_whitebuilding",
        "v_artisans", "v_astronautis", "v_talent",
    }
)  # fmt: skip
"""The eight sequences that D2-Net left out for their size, and many papers after it."""


class HPatchesPairs(LabelledPairs):
    """Pairs (1, k) with their homography, k = 2 ... 6.

    Papers after SuperGlue reduce the shorter side to 480 pixels: ``PairOptions(resize=480, shorter_side=True)``.

    Args:
        root: folder of the sequences ``i_*`` (illumination) and ``v_*`` (viewpoint), each with ``1.ppm`` ... ``6.ppm``
            and ``H_1_2`` ... ``H_1_6``.
        subset: "i", "v", or None for both.
        exclude: sequences left out, for instance `LARGE_SEQUENCES`.
        options: how pairs are read.

    Raises:
        ValueError: no sequence found, or an unknown subset.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        subset: str | None = None,
        exclude: Collection[str] = (),
        options: PairOptions | None = None,
    ) -> None:
        super().__init__(options)
        if subset not in (None, "i", "v"):
            raise ValueError(f'subset: expected "i", "v" or None, got {subset!r}.')
        kinds = (subset,) if subset is not None else ("i", "v")
        folders = sorted(path for kind in kinds for path in Path(root).glob(f"{kind}_*") if path.is_dir())
        self.sequences = [path for path in folders if path.name not in exclude]
        if not self.sequences:
            raise ValueError(f"root: expected folders i_* or v_* in {root}, got none.")

    def __len__(self) -> int:
        return 5 * len(self.sequences)

    def load(self, index: int) -> ImagePair:
        """Read pair ``index``: sequence ``index // 5``, k = ``index % 5 + 2``; see `LabelledPairs.load`.

        Raises:
            FileError: it cannot be used; the message names the file.
        """
        folder, k = self.sequences[index // 5], index % 5 + 2
        path = folder / f"H_1_{k}"
        try:
            H = np.loadtxt(path, dtype=np.float64, ndmin=2)
        except (OSError, ValueError) as error:
            raise FileError(f"{path}: missing, or not a 3 x 3 matrix: {error}.") from error
        if H.shape != (3, 3):
            raise FileError(f"{path}: expected a 3 x 3 matrix, got shape {H.shape}.")
        views = (View(folder / "1.ppm"), View(folder / f"{k}.ppm"))
        return assemble(*views, self.options, H_0to1=homography_from_integer_centers(H))
