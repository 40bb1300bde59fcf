# SPDX-License-Identifier: Apache-2.0
"""The guided matcher: what it finds, what it costs, what it says, and its gradients."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kornia.feature import LoFTR
from torch import Tensor

from eloftr_ops import EfficientLoFTR
from eloftr_ops.errors import ArgumentError
from eloftr_ops.guided import GuidedMatcher
from eloftr_ops.guided.looks import Look, Setting
from eloftr_ops.guided.runner import Runner
from eloftr_ops.guided.views import stages
from eloftr_ops.guided.warps import Source, scaling, tilted
from eloftr_ops.images import read_image
from support.models import TINY, StandIn, random_images, tiny_model


@pytest.fixture(scope="module")
def photograph() -> Tensor:
    """(1, 1, 240, 320)."""
    with resources.as_file(resources.files("eloftr_ops") / "assets" / "demo_0.jpg") as path:
        return read_image(path, resize=320).image


@pytest.fixture(scope="module")
def small() -> EfficientLoFTR:
    return EfficientLoFTR.from_pretrained("small").optimize_for_inference()


class Watched:
    """A matcher that writes down what it is asked; it has no ``extract_features``."""

    def __init__(self, matcher: EfficientLoFTR) -> None:
        self.matcher = matcher
        self.seen: list[Mapping[str, Any]] = []

    def __call__(self, data: Mapping[str, Any], **options: Any) -> dict[str, Tensor]:
        self.seen.append(data)
        return self.matcher(data, **options)  # type: ignore[no-any-return]


class Nothing(StandIn):
    """Finds nothing, so that all views are looked at; counts what it is asked."""

    def __init__(self) -> None:
        super().__init__(TINY)
        self.asked: list[int] = []
        self.extracted = 0

    def forward(self, data: Mapping[str, Any], **_: Any) -> dict[str, Tensor]:  # type: ignore[override]
        self.asked.append(len(data["image0"] if "image0" in data else data["features0"]["coarse"]))
        none = torch.zeros(0, 2)
        return {
            "keypoints0": none,
            "keypoints1": none,
            "confidence": none[:, 0],
            "batch_indexes": none[:, 0].long(),
        }

    def extract_features(self, image: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        self.extracted += 1
        return {"coarse": image}


class Centroid:
    """A differentiable matcher of one match: the centre of mass of either image."""

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Tensor]:
        points = [self.centre(data[f"image{side}"]) for side in "01"]
        count = len(points[0])
        return {
            "keypoints0": points[0],
            "keypoints1": points[1],
            "confidence": points[0].new_full((count,), 0.5),
            "batch_indexes": torch.arange(count),
        }

    @staticmethod
    def centre(image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        ys, xs = (torch.arange(side, dtype=image.dtype) + 0.5 for side in (height, width))
        mass = image.sum((1, 2, 3))
        return torch.stack([(image[:, 0].sum(1) * xs).sum(1), (image[:, 0].sum(2) * ys).sum(1)], 1) / mass[:, None]


def turned(image: Tensor) -> tuple[Tensor, Tensor]:
    """The image turned by 90 degrees, and the map (3, 3) to it."""
    height = image.shape[-2]
    H = torch.tensor([[0.0, -1.0, height], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    return image.transpose(-1, -2).flip(-1).contiguous(), H


def reduced(image: Tensor, times: int) -> tuple[Tensor, Tensor]:
    return F.avg_pool2d(image, times), torch.diag(torch.tensor([1 / times, 1 / times, 1.0]))


def right(keypoints0: Tensor, keypoints1: Tensor, H: Tensor, pixels: float) -> int:
    mapped = keypoints0 @ H[:2, :2].T + H[:2, 2]
    return int(((mapped - keypoints1).norm(dim=1) < pixels).sum())


def test_one_look_is_the_matcher_itself(small: EfficientLoFTR, photograph: Tensor) -> None:
    pair = {"image0": photograph, "image1": photograph.flip(-1).contiguous()}
    plain, guided = small(pair), GuidedMatcher(small, "fast")(pair)
    assert plain.keys() == guided.keys()
    for name, value in plain.items():
        assert torch.equal(guided[name], value), name
        assert guided[name].dtype == value.dtype


@pytest.mark.parametrize("change", ["turned", "reduced"])
def test_the_search_finds_what_one_look_does_not(small: EfficientLoFTR, photograph: Tensor, change: str) -> None:
    other, H = turned(photograph) if change == "turned" else reduced(photograph, 3)
    tolerance = 2.0 if change == "turned" else 1.0
    plain = small({"image0": photograph, "image1": other})
    found = GuidedMatcher(small, "thorough").match(photograph, other)
    assert right(plain["keypoints0"], plain["keypoints1"], H, tolerance) < 50
    assert right(found.keypoints0, found.keypoints1, H, tolerance) > 300
    [report] = found.reports
    assert report.looks > 2
    assert "straightened" in report.views
    assert report.evidence > 20
    assert not report.expired


def test_images_that_look_alike_need_one_look(small: EfficientLoFTR, photograph: Tensor) -> None:
    found = GuidedMatcher(small, "thorough").match(photograph[..., :-16], photograph[..., 16:])
    assert found.reports[0].looks == 1


def test_larger_images_are_matched_at_the_size(photograph: Tensor) -> None:
    """Keypoints are in pixels of the images as given."""
    watched = Watched(tiny_model())
    large = F.interpolate(photograph, scale_factor=2.0, mode="bilinear")
    found = GuidedMatcher(watched, "fast", size=160)({"image0": large, "image1": large})
    assert watched.seen[0]["image0"].shape == (1, 1, 120, 160)
    assert found["keypoints0"].max() > 320


def test_a_batch_gives_what_its_pairs_give(small: EfficientLoFTR, photograph: Tensor) -> None:
    square = photograph[..., :192, 64:256].contiguous()
    narrow = F.interpolate(square[..., 24:168], (192, 192), mode="bilinear")
    image0, image1 = square.expand(2, -1, -1, -1), torch.cat([turned(square)[0], narrow])
    guided = GuidedMatcher(small, "normal", looks_at_once=2)
    batch = guided.match(image0, image1)
    assert [len(report.views) > 1 for report in batch.reports] == [False, True]
    for pair in (0, 1):
        alone = guided.match(image0[pair : pair + 1], image1[pair : pair + 1])
        mine = batch.batch_indexes == pair
        assert torch.equal(batch.keypoints1[mine], alone.keypoints1)
        assert alone.reports[0] == batch.reports[pair]


def test_looks_go_through_the_matcher_together() -> None:
    """What two plans ask for at one time is one batch, as far as ``looks_at_once`` allows."""
    for at_once, sizes in ((1, {1}), (4, {2, 4})):
        nothing = Nothing()
        images = random_images(2, 64, 64)
        GuidedMatcher(nothing, "thorough", looks_at_once=at_once)({"image0": images, "image1": images})
        assert sizes <= set(nothing.asked)
        assert max(nothing.asked) <= at_once


def test_features_of_a_view_that_comes_again_are_kept() -> None:
    nothing = Nothing()
    images = random_images(2, 64, 64)
    found = GuidedMatcher(nothing, "thorough").match(images[:1], images[1:])
    assert found.reports[0].looks > 40
    assert nothing.extracted == 2  # both images as they are


def test_kornias_loftr_takes_a_slanted_look() -> None:
    """With a mask, at two sizes, through kornia's own code; its weights are random, so that any match will do."""
    torch.manual_seed(0)
    loftr = LoFTR(pretrained=None).eval()
    loftr.coarse_matching.thr = 0.0
    images = [random_images(1, 64, 64, seed=seed) for seed in (0, 1)]
    sources = tuple(Source.of(image, None, (64, 64)) for image in images)
    look = Look(tilted((64, 64), 1.0, 30.0), scaling((64, 64), (64, 64)), "turned")
    with torch.no_grad():
        [found] = Runner(loftr, [(sources[0], sources[1])], 1, {}).run([(0, look)])
    assert len(found.confidence) > 0
    for points in (found.points0, found.points1):
        assert ((points >= 0) & (points <= 64)).all()


def test_masks_are_kept(small: EfficientLoFTR, photograph: Tensor) -> None:
    other, _ = turned(photograph)
    mask0 = torch.ones(1, *photograph.shape[-2:])
    mask0[:, :, :160] = 0
    found = GuidedMatcher(small, "thorough").match(photograph, other, mask0)
    assert len(found.keypoints0) > 100
    assert found.keypoints0[:, 0].min() >= 160
    hidden = photograph.clone()
    hidden[..., :160] = torch.nan  # what lies under a mask does not matter
    again = GuidedMatcher(small, "thorough").match(hidden, other, mask0)
    assert torch.equal(again.keypoints0, found.keypoints0)
    assert torch.equal(again.keypoints1, found.keypoints1)


def test_a_time_budget_ends_the_search() -> None:
    images = random_images(2, 64, 64)
    [report] = GuidedMatcher(Nothing(), "thorough", seconds=0.0).match(images[:1], images[1:]).reports
    assert report.looks == 1
    assert report.expired


def test_gradients_go_through_the_warps(photograph: Tensor) -> None:
    """Same values as without gradient, and a gradient in both images and in the weights."""
    matcher = EfficientLoFTR.from_pretrained("small")
    image0 = photograph[..., :160, :160].contiguous()
    image1 = F.interpolate(image0, scale_factor=(0.8, 1.0), mode="bilinear").clamp(0, 1)
    guided = GuidedMatcher(matcher, "normal")
    with torch.no_grad():
        plain = guided.match(image0, image1, mode="straight_through")
    image0.requires_grad_()
    image1.requires_grad_()
    found = guided.match(image0, image1, mode="straight_through")
    assert found.reports == plain.reports
    assert len(found.reports[0].views) > 1
    # With gradient the matcher adds in another order: a few matches at a threshold may differ.
    assert abs(len(found.keypoints0) - len(plain.keypoints0)) <= 0.01 * len(plain.keypoints0)
    (found.keypoints0 - found.keypoints1).square().sum().backward()
    for tensor in (image0, image1, next(matcher.parameters())):
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()
        assert tensor.grad.abs().max() > 0


def test_keypoints_have_the_right_gradient_to_the_images() -> None:
    """Through sampling, matcher and warp, in float64, on images that are reduced for the look."""
    image = 0.2 + 0.6 * random_images(2, 48, 64).double()

    def keypoints(image0: Tensor, image1: Tensor) -> tuple[Tensor, Tensor]:
        found = GuidedMatcher(Centroid(), "fast", size=40)({"image0": image0, "image1": image1})
        return found["keypoints0"], found["keypoints1"]

    inputs = [image[side : side + 1].clone().requires_grad_() for side in (0, 1)]
    assert keypoints(*inputs)[0].requires_grad
    assert torch.autograd.gradcheck(keypoints, inputs, fast_mode=True)


def test_views_say_what_they_are() -> None:
    setting = Setting(((64, 48), (64, 48)), 64, 1.0, 1)
    looks = [look for group in stages(setting) for look in group]
    views = [look.view for look in looks]
    assert len(set(views)) == len(views)
    assert "image 1 turned by 90 degrees" in views
    assert "image 0 reduced 3 times" in views
    assert "image 0 slanted 2 times across 45 degrees and image 1 slanted 2 times across 0 degrees" in views


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"matcher": "small"}, "matcher: expected a matcher, got str"),
        ({"size": 8}, "size: expected an integer of at least 32"),
        ({"seconds": -1.0}, "seconds: expected a number of seconds"),
        ({"looks_at_once": 0}, "looks_at_once: expected an integer of at least 1"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        GuidedMatcher(**{"matcher": tiny_model(), **arguments})


def test_an_unknown_effort_is_refused() -> None:
    with pytest.raises(ValueError, match="effort: expected one of fast, normal, thorough, got 'high'"):
        GuidedMatcher(tiny_model(), "high")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image0": None}, r"image0: expected a floating point tensor \(B, 1, H, W\), got NoneType"),
        ({"image1": torch.zeros(1, 3, 64, 64)}, r"image1: expected .* got \(1, 3, 64, 64\)"),
        ({"image1": torch.zeros(1, 1, 16, 64)}, "image1: expected at least 32 pixels on each side"),
        ({"image1": torch.zeros(2, 1, 64, 64)}, "image1: expected as many images as in image0, got 1 and 2"),
        ({"mask1": torch.ones(1, 8, 8)}, r"mask1: expected a tensor \(1, 64, 64\), the size of its image"),
        ({"image0": torch.full((1, 1, 64, 64), 7.0)}, "image0"),
    ],
)
def test_inputs_are_checked(changes: dict[str, Any], message: str) -> None:
    images = {"image0": random_images(1, 64, 64), "image1": random_images(1, 64, 64)}
    with pytest.raises(ValueError, match=message):
        GuidedMatcher(tiny_model())({**images, **changes})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_images_of_half_precision_are_seen_in_float32(
    small: EfficientLoFTR, photograph: Tensor, dtype: torch.dtype
) -> None:
    """Eight bits do not tell 320 places apart."""
    image0 = photograph[..., :160, :160].to(dtype)
    image1 = F.interpolate(image0.float(), (112, 160), mode="bilinear").to(dtype)
    half = GuidedMatcher(small, "normal").match(image0, image1)
    single = GuidedMatcher(small, "normal").match(image0.float(), image1.float())
    assert single.reports[0].looks > 1
    assert torch.equal(half.keypoints1, single.keypoints1)


def test_no_match_and_no_pair_give_empty_results() -> None:
    images = random_images(2, 64, 64)
    none = GuidedMatcher(Nothing(), "normal")({"image0": images[:1], "image1": images[1:]})
    assert none["keypoints0"].shape == (0, 2)
    assert none["confidence"].shape == none["batch_indexes"].shape == (0,)
    empty = GuidedMatcher(tiny_model(), "normal")({"image0": images[:0], "image1": images[:0]})
    assert empty["keypoints1"].shape == (0, 2)
