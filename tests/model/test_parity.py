# SPDX-License-Identifier: Apache-2.0
"""Agreement with the authors' implementation on seeded weights, stage by stage and case by case."""

import numpy as np
import pytest
import torch

from eloftr_kernels.window_match import window_match, windows
from eloftr_ops import EfficientLoFTR, EfficientLoFTRConfig
from eloftr_ops.model.coarse import pair_confidence
from eloftr_ops.types import CoarseOutput
from support.golden import golden_model, image, reference
from support.models import coarse_stage

FEATURE_ERROR = 1e-4  # relative, float32
CONFIDENCE_ERROR = 1e-3
KEYPOINT_ERROR = 1e-3  # pixels


@pytest.fixture(scope="module")
def model() -> EfficientLoFTR:
    return golden_model()


@pytest.fixture(scope="module", params=["plain", "optimized for inference"])
def matcher(request: pytest.FixtureRequest, model: EfficientLoFTR) -> EfficientLoFTR:
    """Every way that the public interface offers."""
    return model if request.param == "plain" else model.optimize_for_inference()


@pytest.fixture(scope="module")
def single(model: EfficientLoFTR) -> dict[str, torch.Tensor]:
    """Every stage of the ``single`` case."""
    with torch.no_grad():
        *features, coarse = coarse_stage(model, {"image0": image("image0", 0), "image1": image("image1", 0)})
        fine0, fine1 = model.fine_features(*features, coarse)
        cells = [torch.from_numpy(reference()[f"single/{k}_ids"]).long() for k in "bij"]
        config = model.config
        fine = window_match(
            fine0,
            fine1,
            *cells,
            config.subpixel_channels,
            config.subpixel_temperature,
            config.centred_subpixel,
        )
        first = [c[:16] for c in cells]
        stacked = [torch.cat(pair) for pair in zip(features[0][:3], features[1][:3], strict=True)]
        return {
            "backbone_half": stacked[0][:, ::16, ::4, ::4],
            "backbone_quarter": stacked[1][:, ::16, ::2, ::2],
            "backbone_coarse": stacked[2][:, ::8],
            "coarse0": coarse.coarse0[:, ::8],
            "coarse1": coarse.coarse1[:, ::8],
            "conf_rowmax": coarse.nearest.score01.exp(),
            "conf_colmax": _column_maxima(coarse, config),
            "window0": windows(fine0, first[0], first[1], ring=0),
            "window1": windows(fine1, first[0], first[2], ring=1),
            "stage1_keypoints0": _cell_positions(cells[1], 32) + fine.pixel0,
            "stage1_keypoints1": _cell_positions(cells[2], 32) + fine.pixel1,
        }


@pytest.mark.parametrize(
    "stage",
    ["backbone_half", "backbone_quarter", "backbone_coarse", "coarse0", "coarse1", "window0", "window1"],
)
def test_features_agree(single: dict[str, torch.Tensor], stage: str) -> None:
    expected = torch.from_numpy(reference()[f"single/{stage}"])
    assert single[stage].shape == expected.shape
    error = (single[stage] - expected).norm() / expected.norm()
    assert error <= FEATURE_ERROR


@pytest.mark.parametrize("maximum", ["conf_rowmax", "conf_colmax"])
def test_confidence_of_every_cell_agrees(single: dict[str, torch.Tensor], maximum: str) -> None:
    expected = torch.from_numpy(reference()[f"single/{maximum}"])
    torch.testing.assert_close(single[maximum], expected, rtol=CONFIDENCE_ERROR, atol=1e-7)


@pytest.mark.parametrize("side", [0, 1])
def test_pixel_stage_agrees(single: dict[str, torch.Tensor], side: int) -> None:
    expected = torch.from_numpy(reference()[f"single/stage1_keypoints{side}"])
    off = (single[f"stage1_keypoints{side}"] - expected).abs().amax(1) > KEYPOINT_ERROR
    assert off.float().mean() <= 0.01


def test_single(matcher: EfficientLoFTR) -> None:
    _check("single", _match(matcher, image("image0", 0), image("image1", 0)))


def test_batch(matcher: EfficientLoFTR) -> None:
    pairs = [torch.cat([image(name, i) for i in (0, 1)]) for name in ("image0", "image1")]
    _check("batch", _match(matcher, *pairs))


def test_two_sizes(matcher: EfficientLoFTR) -> None:
    _check("two_sizes", _match(matcher, image("image0", 0), image("image_small")))


def test_padded(matcher: EfficientLoFTR) -> None:
    image0, image1, mask0, mask1 = _padded_pair()
    _check("padded", _match(matcher, image0, image1, mask0=mask0, mask1=mask1))


def test_padded_batch_equals_its_pairs_alone(matcher: EfficientLoFTR) -> None:
    """Pair 0 as ``padded``, where the authors' batch differs from its pairs; pair 1 as their batch has it."""
    image0, image1, mask0, mask1 = _padded_pair()
    out = _match(
        matcher,
        torch.cat([image0, image("image0", 1)]),
        torch.cat([image1, image("image1", 1)]),
        mask0=torch.cat([mask0, torch.ones_like(mask0)]),
        mask1=torch.cat([mask1, torch.ones_like(mask1)]),
    )
    for index, case in ((0, "padded"), (1, "padded_batch")):
        _check(case, {k: v[out["batch_indexes"] == index] for k, v in out.items()}, batch_index=index)


@pytest.mark.parametrize("fast", [False, True])
def test_optimized(fast: bool) -> None:
    threshold = float(reference()["optimized/threshold"])
    model = golden_model(score="similarity", threshold=threshold)
    model = model.optimize_for_inference() if fast else model
    out = _match(model, image("image0", 0), image("image1", 0))
    # One score of the pair lies on the threshold, to seven digits: on which side is a matter of rounding.
    clear = out["confidence"] > threshold * (1 + 1e-5)
    _check("optimized", {key: value[clear] for key, value in out.items()})


@pytest.mark.parametrize("fast", [False, True])
def test_position_scaled(fast: bool) -> None:
    model = golden_model(position_scale=(832 / 1152, 832 / 1152))
    model = model.optimize_for_inference() if fast else model
    _check("position_scaled", _match(model, image("image0", 0), image("image1", 0)))


def test_reparameterised_branches_agree_with_the_training_form(model: EfficientLoFTR) -> None:
    fused = model.fused()
    assert not any("conv1x1" in name for name in fused.state_dict())
    image0 = image("image0", 0)
    with torch.no_grad():
        for a, b in zip(model.backbone(image0), fused.backbone(image0), strict=True):
            assert (a - b).norm() / a.norm() <= 1e-4
    _check("single", _match(fused, image0, image("image1", 0)))


def _column_maxima(coarse: CoarseOutput, config: EfficientLoFTRConfig) -> torch.Tensor:
    cells1 = torch.arange(coarse.nearest.nearest10.shape[1])
    return pair_confidence(coarse.scores, torch.zeros_like(cells1), coarse.nearest.nearest10[0], cells1, config)[None]


def _match(model: EfficientLoFTR, image0: torch.Tensor, image1: torch.Tensor, **masks: torch.Tensor) -> dict:
    with torch.no_grad():
        return model({"image0": image0, "image1": image1, **masks})


def _padded_pair() -> tuple[torch.Tensor, ...]:
    image0, image1 = image("image0", 0), image("image1", 0)
    mask0, mask1 = (torch.ones((1, 192, 256), dtype=torch.bool) for _ in "01")
    mask0[:, 160:] = False
    mask1[:, :, 224:] = False
    return image0 * mask0[:, None], image1 * mask1[:, None], mask0, mask1


def _cell_positions(cells: torch.Tensor, width: int) -> torch.Tensor:
    return 8.0 * torch.stack([cells % width, cells // width], -1)


def _check(case: str, out: dict[str, torch.Tensor], batch_index: int | None = None) -> None:
    """The agreement that the reference defines: matches, then confidence and keypoints of common ones."""
    chosen = (
        slice(None)
        if batch_index is None
        else reference()[f"{case}/b_ids"] == (batch_index if case == "padded_batch" else 0)
    )
    expected = {k: reference()[f"{case}/{k}"][chosen] for k in ("b_ids", "mconf", "keypoints0", "keypoints1")}
    ours = {k: v.numpy() for k, v in out.items()}
    batch = np.zeros_like(expected["b_ids"]) if batch_index is not None else expected["b_ids"]
    our_batch = np.zeros_like(ours["batch_indexes"]) if batch_index is not None else ours["batch_indexes"]
    theirs, mine = _by_cell(batch, expected["keypoints0"]), _by_cell(our_batch, ours["keypoints0"])
    common = sorted(set(theirs) & set(mine))
    assert len(common) >= 0.995 * max(len(theirs), len(mine)) > 50
    a, b = [theirs[key] for key in common], [mine[key] for key in common]
    error = np.abs(ours["confidence"][b] / expected["mconf"][a] - 1)
    # A confidence is 2 s - r - c of scores of up to 5,800, which float32 holds to 5e-4: the rounding of these three
    # alone is up to 1e-3 on either side, so that a single match may be further off (the authors' are 3e-4 off float64).
    assert (error > CONFIDENCE_ERROR).mean() <= 0.01
    assert error.max() <= 5 * CONFIDENCE_ERROR
    for side in ("keypoints0", "keypoints1"):
        off = np.abs(ours[side][b] - expected[side][a]).max(1) > KEYPOINT_ERROR
        assert off.mean() <= 0.01


def _by_cell(batch: np.ndarray, keypoints0: np.ndarray) -> dict[tuple[int, ...], int]:
    """Matches by their coarse cell c of image 0, of which there is one each: keypoint 8 c + (-3.5 .. 3.5)."""
    cells = np.floor((keypoints0 + 4) / 8).astype(int)
    return {(int(b), *c): n for n, (b, c) in enumerate(zip(batch, cells, strict=True))}
