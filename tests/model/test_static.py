# SPDX-License-Identifier: Apache-2.0
"""Matching with fixed shapes is matching: the same rows, the same gradients, nothing that depends on values."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from eloftr_ops import EfficientLoFTR
from eloftr_ops.model.coarse import select_fixed
from eloftr_ops.types import StaticMatches
from support.golden import golden_model, image
from support.models import SHALLOW, coarse_stage, random_images, tiny_model

MODES = ["hard", "straight_through", "soft"]
CELLS = 8 * 12  # of 64 x 96 pixels
SIZES = {"two sizes": {"size1": (64, 128)}, "not multiples of 32": {"size0": (60, 90)}}


def _pair(
    batch: int = 2, size0: tuple[int, int] = (64, 96), size1: tuple[int, int] | None = None
) -> dict[str, torch.Tensor]:
    """The same scene, image 1 a little darker."""
    image0 = random_images(batch, *size0)
    return {"image0": image0, "image1": 0.9 * F.interpolate(image0, size1 or size0, mode="bilinear")}


def _rows(static: StaticMatches) -> dict[str, torch.Tensor]:
    """Valid rows as ``forward`` gives them: by pair, then by the cell of image 0."""
    batch, row = static.valid.nonzero(as_tuple=True)
    keypoints0 = static.keypoints0[batch, row].detach()
    cell = torch.floor((keypoints0.double() + 4) / 8)  # windows are centred on the corners of their cells
    order = (batch * 1e8 + cell[:, 1] * 1e4 + cell[:, 0]).argsort(stable=True)
    batch, row = batch[order], row[order]
    return {
        "keypoints0": static.keypoints0[batch, row],
        "keypoints1": static.keypoints1[batch, row],
        "confidence": static.confidence[batch, row],
        "batch_indexes": batch,
    }


@pytest.mark.parametrize("mode", ["hard", "straight_through"])
@pytest.mark.parametrize("case", ["same size", "two sizes", "masked", "not multiples of 32"])
def test_with_room_for_all_the_rows_are_the_matches_of_forward_bit_for_bit(mode: str, case: str) -> None:
    model = tiny_model(border_removal=0)
    data = _pair(2, **SIZES.get(case, {}))
    if case == "masked":
        data["mask0"] = torch.ones(2, 64, 96, dtype=torch.bool)
        data["mask0"][:, :, 80:] = False
        data["mask1"] = torch.ones(2, 64, 96)
        data["mask1"][1, 56:] = 0
    expected = model(data, mode=mode)  # with gradient: the whole batch at once, the same path
    got = _rows(model.match_static(**data, max_matches=CELLS, mode=mode))
    assert len(expected["confidence"]) > 10
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def test_golden_matches_come_out_with_fixed_shapes() -> None:
    model = golden_model()
    pair = image("image0", 0), image("image1", 0)
    with torch.no_grad():
        expected = model({"image0": pair[0], "image1": pair[1]})
        got = _rows(model.match_static(*pair, max_matches=600))
    assert len(expected["confidence"]) > 100
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@settings(max_examples=15, deadline=None, derandomize=True)
@given(count=st.integers(1, CELLS))
def test_too_little_room_keeps_the_most_confident(count: int) -> None:
    model = tiny_model(temperature=50.0)
    with torch.no_grad():
        everything = model.match_static(**_pair(), max_matches=CELLS)
        some = model.match_static(**_pair(), max_matches=count)
    assert some.valid.shape == (2, count)
    for whole, part in zip(everything, some, strict=True):
        assert torch.equal(whole[:, :count], part)
    confidence = some.confidence
    assert (confidence[:, 1:] <= confidence[:, :-1] * (1 + 1e-5)).all()


def test_of_equal_scores_the_first_cell_comes_first() -> None:
    model = tiny_model(border_removal=0)
    data = {"image0": random_images(1, 64, 96), "image1": random_images(1, 64, 96)}
    coarse = coarse_stage(model, data).coarse
    cells = torch.arange(CELLS)[None]
    tied = coarse.nearest._replace(nearest01=cells, nearest10=cells, score01=torch.zeros(1, CELLS))
    selected, valid = select_fixed(coarse._replace(nearest=tied), model.config, 7)
    assert selected.cells0.tolist() == list(range(7))
    assert valid.all()


def test_rows_without_a_match_are_zero() -> None:
    model = tiny_model(threshold=1.0)
    out = model.match_static(**_pair(), max_matches=5)
    assert not out.valid.any()
    assert not any(bool(x.any()) for x in out)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_forward(mode: str) -> None:
    """Double precision: sums over matches in another order must not differ by more than rounding."""
    model = tiny_model().double()
    data = {name: x.double() for name, x in _pair().items()}

    def gradients(keypoints0: torch.Tensor, keypoints1: torch.Tensor, confidence: torch.Tensor) -> list:
        loss = keypoints0.sin().sum() + keypoints1.cos().sum() + confidence.sum()
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        return [torch.zeros(()) if g is None else g for g in found]

    plain = model(data, mode=mode)
    rows = _rows(model.match_static(**data, max_matches=CELLS, mode=mode))
    names = ("keypoints0", "keypoints1", "confidence")
    expected, got = (gradients(*(out[name] for name in names)) for out in (plain, rows))
    assert any(bool(g.any()) for g in expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_it_compiles_as_one_graph() -> None:
    """The second graph has a batch of any size: the compiler makes one where a size has changed."""
    model = tiny_model(**SHALLOW)
    torch._dynamo.reset()
    compiled = torch.compile(model.match_static, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for batch in (2, 3):
            got, expected = (match(**_pair(batch), max_matches=50) for match in (compiled, model.match_static))
            assert torch.equal(got.valid, expected.valid)
            torch.testing.assert_close(got.confidence, expected.confidence, rtol=1e-3, atol=1e-6)
            near = (got.keypoints1 - expected.keypoints1).abs().amax(-1) <= 1e-2
            assert near.float().mean() >= 0.95  # ties within a window may fall either way


@pytest.mark.parametrize(
    ("count", "error", "words"),
    [
        (0, ValueError, "max_matches: expected 1 to 96, the coarse cells of image0, got 0"),
        (97, ValueError, "max_matches: expected 1 to 96"),
        (2.0, TypeError, "max_matches: expected an int, got 2.0"),
        (True, TypeError, "max_matches: expected an int, got True"),
    ],
)
def test_numbers_of_matches_that_cannot_be(count: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        tiny_model().match_static(**_pair(), max_matches=count)


def test_shapes_are_checked() -> None:
    data = _pair()
    with pytest.raises(ValueError, match="image0: expected height and width of at least 32"):
        tiny_model().match_static(data["image0"][..., :16], data["image1"], max_matches=4)


def test_an_optimized_copy_has_it_too() -> None:
    model: EfficientLoFTR = tiny_model()
    fast = model.optimize_for_inference()
    with torch.no_grad():
        expected = model.match_static(**_pair(), max_matches=40)
        got = fast.match_static(**_pair(), max_matches=40)
    assert int((got.valid & expected.valid).sum()) >= 0.9 * int(expected.valid.sum()) > 5
