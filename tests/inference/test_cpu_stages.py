# SPDX-License-Identifier: Apache-2.0
"""Stages as a CPU runs them without gradient, and as the model states them: the same numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eloftr_ops.inference.cpu import bands
from eloftr_ops.model.matcher import EfficientLoFTR
from eloftr_ops.model.stages import definition_of, implements
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
        patch.setattr(bands, "BAND_BYTES", 1)  # the narrowest: four halos high
        banded = dense()
    for got, want in zip(banded, whole, strict=True):
        assert got.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_a_cut_spoils_as_many_rows_as_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one halo row less the cuts would show: so the bands above were cut, and the halo is needed."""
    image = random_images(1, 256, 64).double()
    whole = MODEL.backbone.to_half(image)
    backbone = MODEL.backbone
    halo = len(backbone.stages[0]) + len(backbone.stages[1])
    monkeypatch.setattr(bands, "BAND_BYTES", 1)

    def banded(halo: int) -> torch.Tensor:
        function = definition_of(type(backbone).to_half)
        return bands.run_in_bands(lambda x: function(backbone, x), [image], (128, 32), 8, halo)

    with torch.no_grad():
        assert torch.allclose(banded(halo), whole, rtol=1e-10)
        assert not torch.allclose(banded(halo - 1), whole, rtol=1e-6)


@pytest.mark.parametrize("height", [2, 8, 10, 64, 480])
def test_bands_are_even_and_at_least_four_halos_high(height: int) -> None:
    rows = bands.band_rows(height, 1 << 40, halo=4)
    assert rows % 2 == 0
    assert rows >= min(height, 16)
    assert bands.band_rows(height, 1, halo=4) >= height


@pytest.mark.parametrize("mode", ["gradient", "compiling"])
def test_the_definition_runs_with_gradient_and_while_compiling(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an engine must not interfere a batch is one batch: the images go through the backbone together."""
    model, sizes = tiny_model(), []
    model.backbone.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    data = {"image0": random_images(2, 64, 64), "image1": random_images(2, 64, 64)}
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: mode == "compiling")
    with torch.set_grad_enabled(mode == "gradient"):
        model(data)
    assert sizes == [4]
    monkeypatch.undo()
    with torch.no_grad():
        model(data)
    assert sizes == [4, 1, 1, 1, 1]


def test_an_implementation_belongs_to_a_stage() -> None:
    with pytest.raises(ValueError, match="marked: expected a function that @stage marked"):
        implements(EfficientLoFTR.refine, when=lambda *_: True)
