# SPDX-License-Identifier: Apache-2.0
"""Laws of the whole matcher: batches, sizes, masks, features, dtypes, copies."""

import copy
import io
import pickle

import kornia
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eloftr_ops import EfficientLoFTR
from support.models import SHALLOW, coarse_stage, random_images, tiny_model

OUTPUTS = {"keypoints0", "keypoints1", "confidence", "batch_indexes"}


@pytest.fixture(scope="module")
def model() -> EfficientLoFTR:
    return tiny_model()


def _pair(batch: int = 1, size0: tuple[int, int] = (96, 128), size1: tuple[int, int] = (96, 128)) -> dict:
    image1 = random_images(batch, *size0)
    if size1 != size0:
        image1 = torch.nn.functional.interpolate(image1, size1, mode="bilinear")
    return {"image0": random_images(batch, *size0), "image1": image1}


def _run(model: EfficientLoFTR, data: dict, **options: str) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return model(data, **options)


def _run_at_once(model: EfficientLoFTR, data: dict) -> dict[str, torch.Tensor]:
    """The whole batch through every layer, as with gradients; without them a CPU goes pair by pair."""
    return {key: value.detach() for key, value in model(data).items()}


def _assert_same_matches(a: dict, b: dict, atol: float = 1e-3) -> None:
    """The same cells, and keypoints and confidences to float32 tolerance; a few windows may hold a tie."""
    assert len(a["keypoints0"]) == len(b["keypoints0"]) > 5
    cells = [torch.floor((x["keypoints0"] + 4) / 8) for x in (a, b)]
    assert torch.equal(*cells)
    torch.testing.assert_close(a["confidence"], b["confidence"], rtol=1e-3, atol=1e-7)
    for key in ("keypoints0", "keypoints1"):
        assert ((a[key] - b[key]).abs().amax(1) <= atol).float().mean() >= 0.95


def test_outputs_are_those_of_kornia_loftr(model: EfficientLoFTR) -> None:
    out = _run(model, _pair(2))
    assert set(out) == OUTPUTS
    count = len(out["confidence"])
    assert count > 10
    assert out["keypoints0"].shape == out["keypoints1"].shape == (count, 2)
    assert out["batch_indexes"].dtype == torch.int64
    assert torch.equal(out["batch_indexes"], out["batch_indexes"].sort().values)
    assert isinstance(model, kornia.feature.LoFTR)


def test_an_image_matches_itself_in_place() -> None:
    """Self-similar maps: every interior cell finds itself, and the two windows agree to the pixel."""
    model = tiny_model()
    image = random_images(1, 96, 128)
    out = _run(model, {"image0": image, "image1": image})
    at_home = (out["keypoints0"] - out["keypoints1"]).abs().amax(1) <= 1.5
    assert at_home.float().mean() > 0.5


def _assert_batch_of(model: EfficientLoFTR, data: dict, together: dict) -> None:
    """The matches of a batch are those of its pairs."""
    for index in range(len(data["image0"])):
        alone = _run(model, {k: v[index : index + 1] for k, v in data.items()})
        own = together["batch_indexes"] == index
        _assert_same_matches({k: v[own] for k, v in together.items()}, alone)


@pytest.mark.parametrize("run", [_run_at_once, _run])
def test_a_batch_equals_its_pairs_one_by_one(model: EfficientLoFTR, run) -> None:
    data = _pair(3)
    _assert_batch_of(model, data, run(model, data))


def test_a_batch_without_gradient_is_matched_pair_by_pair_on_a_cpu(model: EfficientLoFTR) -> None:
    """What it takes is what one pair takes: no map of the whole batch is made."""
    data, batches = _pair(3), []
    hook = model.backbone.register_forward_hook(lambda _, images, __: batches.append(len(images[0])))
    _run(model, data)
    _run_at_once(model, data)
    hook.remove()
    assert batches == [1] * 6 + [6]


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    height0=st.integers(32, 150),
    width0=st.integers(32, 150),
    height1=st.integers(32, 150),
    width1=st.integers(32, 150),
)
def test_any_size_gives_keypoints_on_both_images(height0: int, width0: int, height1: int, width1: int) -> None:
    model = tiny_model(border_removal=0)
    data = _pair(1, (height0, width0), (height1, width1))
    out = _run(model, data)
    for side, (height, width) in enumerate(((height0, width0), (height1, width1))):
        x, y = out[f"keypoints{side}"].unbind(-1)
        assert ((x >= 0) & (x < width) & (y >= 0) & (y < height)).all()
    assert torch.isfinite(out["confidence"]).all()


def test_completion_inside_is_padding_with_a_mask(model: EfficientLoFTR) -> None:
    """A 100 x 110 image is what the user would pass as a 128 x 128 one with a mask: the same keypoints."""
    image1 = random_images(1, 128, 128)
    image0 = image1[..., :100, :110]
    mask = torch.zeros((1, 128, 128), dtype=torch.bool)
    mask[:, :100, :110] = True
    padded = torch.nn.functional.pad(image0, (0, 18, 0, 28))
    a = _run(model, {"image0": image0, "image1": image1})
    b = _run(model, {"image0": padded, "image1": image1, "mask0": mask})
    _assert_same_matches(a, b)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000))
def test_masks_of_any_shape(seed: int) -> None:
    """No keypoint on a masked pixel, what lies under a mask does not matter, and a batch equals its pairs."""
    model = tiny_model(border_removal=0)
    data = _pair(2)
    generator = torch.Generator().manual_seed(seed)
    for side in "01":
        blobs = torch.rand((2, 1, 6, 8), generator=generator)
        data[f"mask{side}"] = torch.nn.functional.interpolate(blobs, (96, 128), mode="bilinear")[:, 0] > 0.35
    out = _run(model, data)
    for side in "01":
        x, y = out[f"keypoints{side}"].floor().long().unbind(-1)
        assert data[f"mask{side}"][out["batch_indexes"], y, x].all()
    noise = torch.rand(data["image0"].shape, generator=generator)
    other = {**data, "image0": torch.where(data["mask0"][:, None], data["image0"], noise)}
    again = _run(model, other)
    assert all(torch.equal(out[k], again[k]) for k in OUTPUTS)
    _assert_batch_of(model, data, _run_at_once(model, data))


def test_all_true_masks_change_nothing(model: EfficientLoFTR) -> None:
    data = _pair(1)
    ones = torch.ones((1, 96, 128), dtype=torch.bool)
    _assert_same_matches(_run(model, data), _run(model, {**data, "mask0": ones, "mask1": ones.float()}))


def test_all_masked_gives_no_match_and_finite_gradient(model: EfficientLoFTR) -> None:
    data = _pair(2)
    data["image0"].requires_grad_()
    mask = torch.ones((2, 96, 128), dtype=torch.bool)
    mask[0] = False
    out = model({**data, "mask0": mask}, mode="straight_through")
    assert set(out["batch_indexes"].tolist()) == {1}
    (out["confidence"].sum() + out["keypoints0"].sum() + out["keypoints1"].sum()).backward()
    assert torch.isfinite(data["image0"].grad).all()
    assert (data["image0"].grad[0] == 0).all()
    assert (data["image0"].grad[1] != 0).any()


def test_empty_batch(model: EfficientLoFTR) -> None:
    out = _run(model, {"image0": torch.zeros(0, 1, 64, 64), "image1": torch.zeros(0, 1, 64, 96)})
    assert {k: tuple(v.shape) for k, v in out.items()} == {
        "keypoints0": (0, 2),
        "keypoints1": (0, 2),
        "confidence": (0,),
        "batch_indexes": (0,),
    }


@pytest.mark.parametrize("mode", ["hard", "straight_through", "soft"])
def test_no_match_gives_empty_outputs_with_gradient(mode: str) -> None:
    model = tiny_model(threshold=1.0)
    data = _pair(1)
    data["image0"].requires_grad_()
    out = model(data, mode=mode)
    assert len(out["confidence"]) == 0
    assert out["keypoints0"].shape == (0, 2)
    (out["confidence"].sum() + out["keypoints0"].sum() + out["keypoints1"].sum()).backward()
    assert torch.isfinite(data["image0"].grad).all()


def test_features_can_be_kept_and_matched_against_many(model: EfficientLoFTR) -> None:
    first = random_images(1, 96, 128)
    others = [0.9 * first, first**1.1]
    with torch.no_grad():
        kept = model.extract_features(first)
        for other in (*others, first):
            _assert_same_matches(
                _run(model, {"image0": first, "image1": other}),
                _run(model, {"features0": kept, "image1": other}),
            )
        both = {k: v.expand(2, *v.shape[1:]) for k, v in kept.items()}
        out = _run(model, {"features0": both, "image1": torch.cat(others)})
    assert set(out["batch_indexes"].tolist()) == {0, 1}


def test_features_of_a_masked_or_completed_image_keep_their_mask(model: EfficientLoFTR) -> None:
    image1 = random_images(1, 96, 128)
    image0 = image1[..., :90, :100]
    with torch.no_grad():
        kept = {"features0": model.extract_features(image0), "features1": model.extract_features(image1)}
    assert set(kept["features0"]) == {"half", "quarter", "coarse", "mask"}
    assert set(kept["features1"]) == {"half", "quarter", "coarse"}
    _assert_same_matches(_run(model, kept), _run(model, {"image0": image0, "image1": image1}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    model = tiny_model()
    data = _pair(1)
    exact = _run(model, data)
    out = _run(copy.deepcopy(model).to(dtype), {k: v.to(dtype) for k, v in data.items()})
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert out["keypoints0"].dtype == out["keypoints1"].dtype == out["confidence"].dtype == expected
    if dtype == torch.float64:
        _assert_same_matches(exact, {k: v.float() if v.is_floating_point() else v for k, v in out.items()})
    else:
        assert len(out["confidence"]) > 0.7 * len(exact["confidence"])
        assert torch.isfinite(out["keypoints1"]).all()


def test_autocast_on_cpu(model: EfficientLoFTR) -> None:
    data = _pair(1)
    exact = _run(model, data)
    with torch.autocast("cpu", torch.bfloat16):
        out = _run(model, data)
    assert out["confidence"].dtype == torch.float32
    cells = [{tuple(c) for c in torch.floor((x["keypoints0"] + 4) / 8).tolist()} for x in (exact, out)]
    assert len(cells[0] & cells[1]) > 0.8 * len(cells[0])


def test_inference_mode_and_features_made_in_it(model: EfficientLoFTR) -> None:
    data = _pair(1)
    with torch.inference_mode():
        out = model(data)
    _assert_same_matches(_run(model, data), out)


def test_copies_pickles_and_state_dicts_match_alike(model: EfficientLoFTR) -> None:
    data = _pair(1)
    expected = _run(model, data)
    fresh = EfficientLoFTR(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        fresh,
        torch.load(buffer, weights_only=False),
    ):
        out = _run(other, data)
        assert all(torch.equal(expected[k], out[k]) for k in OUTPUTS)


@pytest.mark.parametrize("size", [(64, 96), (70, 90)])
def test_everything_before_selection_compiles_as_one_graph(size: tuple[int, int]) -> None:
    model = tiny_model(**SHALLOW)
    data = _pair(1, size)

    def dense(image0: torch.Tensor, image1: torch.Tensor) -> tuple[torch.Tensor, ...]:
        coarse = coarse_stage(model, {"image0": image0, "image1": image1}).coarse
        return coarse.coarse0, coarse.scores.row_lse, coarse.nearest.score01

    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(dense, fullgraph=True, backend="aot_eager")(**data)
        for a, b in zip(compiled, dense(**data), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_forward_leaves_mode_grad_and_inputs_alone() -> None:
    model = tiny_model()
    data = _pair(1)
    before = {k: v.clone() for k, v in data.items()}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    _run(model, data)
    assert not model.training
    assert all(torch.equal(v, before[k]) for k, v in data.items())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_straight_through_has_the_values_of_hard(model: EfficientLoFTR) -> None:
    data = _pair(2)
    hard, through = _run(model, data), _run(model, data, mode="straight_through")
    assert all(torch.equal(hard[k], through[k]) for k in OUTPUTS)


def test_a_changed_configuration_reaches_every_part() -> None:
    model, data = tiny_model(), _pair(1)
    before = _run(model, data)
    model.config = model.config.replace(position_scale=(2.0, 0.5), threshold=0.5)
    fresh = EfficientLoFTR(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    after, expected = _run(model, data), _run(fresh, data)
    assert all(torch.equal(after[k], expected[k]) for k in OUTPUTS)
    assert len(after["confidence"]) != len(before["confidence"])


def test_the_architecture_of_a_built_model_stays() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="another num_layers, num_heads"):
        model.config = model.config.replace(num_layers=1, num_heads=1)
    with pytest.raises(TypeError, match="config: expected an EfficientLoFTRConfig, got dict"):
        model.config = {}


@settings(max_examples=20, deadline=None, derandomize=True)
@given(rank=st.integers(0, 20), above=st.booleans())
def test_every_confidence_is_above_the_threshold(rank: int, above: bool) -> None:
    """Also where the threshold is, to the last bit, the confidence of a match or the number before it."""
    model, data = tiny_model(temperature=50.0), _pair(1)
    found = _run(model, data)["confidence"].sort().values
    limit = found[rank % len(found)]
    threshold = float(limit if above else torch.nextafter(limit, torch.zeros(())))
    model.config = model.config.replace(threshold=threshold)
    got = _run(model, data)["confidence"]
    assert (got > threshold).all()
    assert len(got) == int((found > threshold).sum())
