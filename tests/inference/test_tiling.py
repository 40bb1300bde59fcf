# SPDX-License-Identifier: Apache-2.0
"""Maps computed in bands of rows, or in tiles around matched cells, and as a whole: the same numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eloftr_ops.inference.cpu import tiling as pieces
from eloftr_ops.inference.cpu.tiling import Piece
from support.models import random_images, tiny_model

MODEL = tiny_model().double()


def _backbone(size: tuple[int, int], batch: int) -> tuple[torch.Tensor, ...]:
    maps: tuple[torch.Tensor, ...] = MODEL.backbone(random_images(batch, *size).double())
    return maps


@settings(max_examples=10, deadline=None, derandomize=True)
@given(rows=st.integers(1, 9), columns=st.integers(1, 3), batch=st.integers(1, 2))
def test_bands_give_the_maps_that_one_pass_gives(rows: int, columns: int, batch: int) -> None:
    def dense() -> tuple[torch.Tensor, ...]:
        half, quarter, coarse = _backbone((32 * rows, 32 * columns), batch)
        return half, quarter, coarse, MODEL.pyramid(coarse, quarter, half)

    whole = dense()
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "BAND_BYTES", 1)  # the narrowest: four halos high
        banded = dense()
    for got, want in zip(banded, whole, strict=True):
        assert got.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    seed=st.integers(0, 99),
    density=st.sampled_from([0.01, 0.1, 1.0]),
)
def test_tiles_give_the_windows_that_one_pass_gives(
    rows: int, columns: int, seed: int, density: float
) -> None:
    half, quarter, coarse = _backbone((32 * rows, 32 * columns), 2)
    whole = MODEL.pyramid(coarse, quarter, half)
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.rand(2, 4 * rows, 4 * columns, generator=generator) < density
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "_CALL", 0)  # tiles are never too small to pay
        tiled = MODEL.pyramid(coarse, quarter, half, wanted)
    assert tiled.is_contiguous(memory_format=torch.channels_last)
    # A window of 8x8 pixels and its ring come from the cell's 4x4 positions and one more on every side.
    reached = torch.nn.functional.interpolate(wanted[:, None].double(), scale_factor=4)
    reached = torch.nn.functional.max_pool2d(reached, 3, stride=1, padding=1).bool().expand_as(whole)
    torch.testing.assert_close(tiled[reached], whole[reached], rtol=1e-10, atol=1e-10)


def test_a_cut_spoils_as_many_positions_as_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one less around a band its border would show: the halo is needed, so the bands above were cut."""
    image = random_images(1, 256, 64).double()
    whole = MODEL.backbone(image)[0]
    monkeypatch.setattr(pieces, "BAND_BYTES", 1)
    monkeypatch.setattr(MODEL.backbone, "half_halo", MODEL.backbone.half_halo - 1)
    with torch.no_grad():
        assert not torch.allclose(MODEL.backbone(image)[0], whole, rtol=1e-6)


def test_far_from_what_is_wanted_nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_CALL", 0)
    wanted = torch.zeros(32, 64, dtype=torch.bool)
    wanted[1, 2] = wanted[1, 40] = wanted[31, 63] = True
    like = torch.zeros(1, 1, 128, 256)
    with torch.no_grad():
        assert pieces.plan(like, (128, 256), 8, 4, wanted) == [
            Piece(0, 16, 0, 16),
            Piece(0, 16, 160, 176),
            Piece(112, 128, 240, 256),
        ]
        nothing = pieces.plan(like, (128, 256), 8, 4, torch.zeros_like(wanted))
        everything = pieces.plan(like, (128, 256), 8, 4, torch.ones_like(wanted))
    assert nothing == [Piece(0, 16, 0, 16)]  # for a result of the right shape
    assert everything == [Piece(0, 128, 0, 256)]


@pytest.mark.parametrize("mode", ["gradient", "compiling", "one band"])
def test_one_pass_where_pieces_do_not_pay(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "BAND_BYTES", 1 << 30 if mode == "one band" else 1)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: mode == "compiling")
    with torch.set_grad_enabled(mode == "gradient"):
        assert pieces.plan(torch.zeros(1, 1, 40, 8), (40, 8), 1, 2) == [Piece(0, 40, 0, 8)]
