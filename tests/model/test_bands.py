# SPDX-License-Identifier: Apache-2.0
"""Bands of rows, and the maps as a whole: the same numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eloftr_ops import bands
from support.models import random_images, tiny_model


def _dense(size: tuple[int, int], batch: int) -> tuple[torch.Tensor, ...]:
    """Maps of the backbone, and the fine map made of them."""
    model = tiny_model().double()
    half, quarter, coarse = model.backbone(random_images(batch, *size).double())
    return half, quarter, coarse, model.pyramid(coarse, quarter, half)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(rows=st.integers(1, 9), columns=st.integers(1, 3), batch=st.integers(1, 2))
def test_bands_give_the_maps_that_one_pass_gives(rows: int, columns: int, batch: int) -> None:
    size = (32 * rows, 32 * columns)
    whole = _dense(size, batch)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(bands, "BAND_BYTES", 1)  # the narrowest: four halos high
        banded = _dense(size, batch)
    for got, want in zip(banded, whole, strict=True):
        assert got.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_a_cut_spoils_as_many_rows_as_stated() -> None:
    """With a row less around a band its border would show: the halo is needed, so the bands above were cut."""
    model = tiny_model().double()
    image = random_images(1, 256, 64).double()
    whole = model.backbone(image)[0]
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(bands, "BAND_BYTES", 1)
        patch.setattr(model.backbone, "half_halo", model.backbone.half_halo - 1)
        assert not torch.allclose(model.backbone(image)[0], whole, rtol=1e-6)


@pytest.mark.parametrize("mode", ["gradient", "compiling", "one band"])
def test_one_pass_where_bands_do_not_pay(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    heights = []

    def function(x: torch.Tensor) -> torch.Tensor:
        heights.append(x.shape[2])
        return x

    monkeypatch.setattr(bands, "BAND_BYTES", 1 << 30 if mode == "one band" else 1)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: mode == "compiling")
    with torch.set_grad_enabled(mode == "gradient"):
        bands.by_bands(function, torch.zeros(1, 1, 40, 8), height=40, channels=1, halo=2)
    assert heights == [40]
