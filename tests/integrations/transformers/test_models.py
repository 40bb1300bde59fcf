# SPDX-License-Identifier: Apache-2.0
"""The two models: shapes, the operator's numbers, gradients, what is recorded, how they are run."""

import copy
import inspect

import pytest
import torch
from conftest import operator_input, pairs, tiny_interface

import eloftr_ops.integrations.transformers as interface
from eloftr_kernels import AttentionWeights, aggregated_attention
from eloftr_ops.integrations.transformers.features import layer_weights
from support.golden import golden_model, image, reference
from support.models import SHALLOW


def on_pixels(output, pixel_values):
    """Keypoints of the first pair in pixels, (2, M, 2), and scores."""
    size = torch.tensor([pixel_values.shape[-1], pixel_values.shape[-2]])
    count = int((output.matches[0, 0] >= 0).sum())
    return output.keypoints[0, :, :count] * size, output.matching_scores[0, 0, :count]


def assert_same_matches(output, pixel_values, matches):
    keypoints, scores = on_pixels(output, pixel_values)
    assert len(scores) == len(matches["confidence"]) > 0
    for side in (0, 1):
        torch.testing.assert_close(keypoints[side], matches[f"keypoints{side}"], rtol=0, atol=1e-4)
    torch.testing.assert_close(scores, matches["confidence"], rtol=0, atol=0)


@pytest.mark.parametrize("size", [(64, 96), (120, 150)])
@torch.no_grad()
def test_the_matches_are_the_operators(model, size):
    pixel_values = pairs(1, *size)
    assert_same_matches(model(pixel_values), pixel_values, model.matcher(operator_input(pixel_values)))


@torch.no_grad()
def test_golden_numbers_through_this_door():
    source = golden_model()
    config = interface.EfficientLoFTRConfig.from_eloftr_ops(source.config)
    model = interface.EfficientLoFTRForKeypointMatching(config).eval()
    model.matcher.load_state_dict(source.state_dict())
    both = torch.stack([image("image0", 0), image("image1", 0)], 1).expand(-1, -1, 3, -1, -1)
    keypoints, scores = on_pixels(model(both), both)
    by_cell = {tuple(((p + 4) // 8).int().tolist()): n for n, p in enumerate(keypoints[0])}
    expected = torch.from_numpy(reference()["single/keypoints0"])
    theirs = {tuple(((p + 4) // 8).int().tolist()): n for n, p in enumerate(expected)}
    common = sorted(set(by_cell) & set(theirs))
    assert len(common) >= 0.995 * max(len(by_cell), len(theirs)) > 50
    a, b = [by_cell[c] for c in common], [theirs[c] for c in common]
    for side in (0, 1):  # tolerances of tests/model/test_parity.py
        off = (keypoints[side][a] - torch.from_numpy(reference()[f"single/keypoints{side}"])[b]).abs().amax(1)
        assert (off > 1e-3).float().mean() <= 0.01
    error = (scores[a] / torch.from_numpy(reference()["single/mconf"])[b] - 1).abs()
    assert (error > 1e-3).float().mean() <= 0.01


@torch.no_grad()
def test_shapes_and_padding_of_a_batch(model):
    pixel_values = torch.cat([pairs(1), torch.zeros(1, 2, 3, 64, 96), pairs(1, seed=3)])
    output = model(pixel_values)
    longest = output.matches.shape[-1]
    assert output.keypoints.shape == (3, 2, longest, 2)
    assert output.matches.shape == output.matching_scores.shape == (3, 2, longest)
    counts = (output.matches[:, 0] >= 0).sum(1)
    assert counts.max() == longest
    for matches, scores, keypoints, count in zip(
        output.matches, output.matching_scores, output.keypoints, counts, strict=True
    ):
        assert torch.equal(matches[:, :count], torch.arange(count).expand(2, -1))
        assert (matches[:, count:] == -1).all()
        assert (scores[:, count:] == 0).all()
        assert (keypoints[:, count:] == 0).all()
        assert ((keypoints >= 0) & (keypoints <= 1)).all()


@torch.no_grad()
def test_a_batch_gives_what_its_pairs_give(model):
    pixel_values = torch.cat([pairs(1, seed=seed) for seed in range(3)])
    together = model(pixel_values)
    for index in range(3):
        alone = model(pixel_values[index : index + 1])
        count = alone.matches.shape[-1]
        torch.testing.assert_close(together.keypoints[index, :, :count], alone.keypoints[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(
            together.matching_scores[index, :, :count], alone.matching_scores[0], rtol=1e-5, atol=0
        )
        assert (together.matches[index, :, count:] == -1).all()


@torch.no_grad()
def test_nothing_to_match_gives_no_keypoint():
    output = tiny_interface(threshold=1.0)(pairs(2))
    assert output.keypoints.shape == (2, 2, 0, 2)
    assert output.matches.shape == output.matching_scores.shape == (2, 2, 0)


@pytest.mark.parametrize("mode", ["hard", "straight_through", "soft"])
def test_the_gradient_is_the_operators(mode):
    model = tiny_interface(gradient_mode=mode)
    inputs = [pairs(1).requires_grad_() for _ in "01"]
    output = model(inputs[0])
    size = torch.tensor([96.0, 64.0])
    ((output.keypoints * size).sum() + output.matching_scores[:, 0].sum()).backward()
    matches = model.matcher(operator_input(inputs[1]))
    (matches["keypoints0"].sum() + matches["keypoints1"].sum() + matches["confidence"].sum()).backward()
    assert inputs[1].grad.abs().max() > 0
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_coloured_pixels_become_gray(model):
    gray = pairs(1)[:, :, :1]
    shift = torch.tensor([0.1, -0.1 * 0.2989 / 0.587, 0.0])[:, None, None]  # no change of luminance
    coloured = (0.2 + 0.6 * gray) + 0.5 * shift
    expected = model(0.2 + 0.6 * gray)
    torch.testing.assert_close(model(coloured).keypoints, expected.keypoints, rtol=0, atol=1e-4)
    assert torch.equal(model(gray.expand(-1, -1, 3, -1, -1)).keypoints, model(gray).keypoints)


def test_the_first_argument_of_forward_is_pixel_values():
    for model_class in (interface.EfficientLoFTRModel, interface.EfficientLoFTRForKeypointMatching):
        names = list(inspect.signature(model_class.forward).parameters)[1:6]
        assert names == ["pixel_values", "labels", "output_attentions", "output_hidden_states", "return_dict"]


@pytest.mark.parametrize("model_class", [interface.EfficientLoFTRModel, interface.EfficientLoFTRForKeypointMatching])
@torch.no_grad()
def test_hidden_states_are_the_maps_after_each_block(model_class):
    model, pixel_values = tiny_interface(model_class), pairs(2)
    assert model(pixel_values).hidden_states is None
    output = model(pixel_values, output_hidden_states=True)
    assert len(output.hidden_states) == sum(model.config.stage_num_blocks)
    assert output.hidden_states[0].shape == (4, 8, 32, 48)
    features = model.matcher.extract_features(pixel_values.flatten(0, 1)[:, :1])
    torch.testing.assert_close(output.hidden_states[-1], features["coarse"], rtol=1e-4, atol=1e-5)
    model.config.output_hidden_states = True
    assert len(model(pixel_values).hidden_states) == sum(model.config.stage_num_blocks)


@pytest.mark.parametrize("model_class", [interface.EfficientLoFTRModel, interface.EfficientLoFTRForKeypointMatching])
@torch.no_grad()
def test_attentions_are_weights_that_sum_to_one(model_class):
    model, pixel_values = tiny_interface(model_class), pairs(2)
    attentions = model(pixel_values, output_attentions=True).attentions
    heads, tokens = 2, (64 // 32) * (96 // 32)
    assert [tuple(a.shape) for a in attentions] == 2 * [
        (4, heads, tokens, tokens),
        (2, heads, tokens, tokens),
        (2, heads, tokens, tokens),
    ]
    for weights in attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    model.config._attn_implementation = "eager"  # transformers asks for it
    model.config.output_attentions = True
    assert len(model(pixel_values).attentions) == 6


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_attention_weights_give_the_message_of_their_layer(masked):
    layer = tiny_interface().matcher.transformer.layers[0].cross_attention
    generator = torch.Generator().manual_seed(0)
    x, source = (torch.randn(1, 32, 8, 12, generator=generator) for _ in "01")
    mask = torch.ones(1, 8, 12, dtype=torch.bool)
    mask[..., 7:] = False
    mask = mask if masked else None
    seen = x, source
    if masked:
        source = source * mask[:, None] - 1e9 * ~mask[:, None]
    value = layer.v_proj(layer.token_norm(torch.nn.functional.max_pool2d(source, 4).flatten(2).mT))
    weights = layer_weights(layer, *seen, None, mask, mask)
    value = value.nan_to_num().unflatten(-1, (2, -1)).transpose(1, 2)
    message = layer.merge((weights @ value).transpose(1, 2).flatten(2)).mT.unflatten(2, (2, 3))
    named = AttentionWeights(
        aggregate=layer.aggregate.weight,
        norm=layer.token_norm.weight,
        norm_bias=layer.token_norm.bias,
        q=layer.q_proj.weight,
        k=layer.k_proj.weight,
        v=layer.v_proj.weight,
        merge=layer.merge.weight,
    )
    expected = aggregated_attention(*seen, named, num_heads=layer.num_heads, mask=mask, source_mask=mask)
    if masked:
        message = message[..., :2]
        expected = expected[..., :2]
    torch.testing.assert_close(message, expected, rtol=1e-4, atol=1e-5)


def test_recorded_maps_and_weights_carry_gradient(model):
    pixel_values = pairs(1).requires_grad_()
    output = model(pixel_values, output_hidden_states=True, output_attentions=True)
    for recorded in (output.hidden_states[0], output.attentions[-1]):
        (gradient,) = torch.autograd.grad(recorded.square().sum(), pixel_values, retain_graph=True)
        assert gradient.abs().max() > 0


@torch.no_grad()
def test_feature_maps_are_the_operators(model):
    pixel_values = pairs(2)
    coarse, half, quarter = model.efficientloftr(pixel_values).feature_maps
    assert coarse.shape == (2, 2, 32, 8, 12)
    side0, side1 = model.matcher.extract_pair(model.matcher.check_input(operator_input(pixel_values)))
    expected = model.matcher.transform(side0, side1)
    for side in (0, 1):
        torch.testing.assert_close(coarse[:, side], expected[side], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(half[0::2], side0.half, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quarter[1::2], side1.quarter, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_return_dict_false_gives_the_tuple(model):
    output = model(pairs(1))
    matches, scores, keypoints = model(pairs(1), return_dict=False)
    assert torch.equal(matches, output.matches)
    assert torch.equal(scores, output.matching_scores)
    assert torch.equal(keypoints, output.keypoints)


@torch.no_grad()
def test_a_changed_configuration_holds_from_the_next_call_on(model):
    before = model(pairs(1, 128, 160))
    middle = float(before.matching_scores.median())
    model.config.coarse_matching_threshold = middle
    after = model(pairs(1, 128, 160))
    assert 0 < after.matches.shape[-1] < before.matches.shape[-1]
    assert (after.matching_scores > middle).all()
    model.config.coarse_matching_threshold = 2.0
    with pytest.raises(ValueError, match="threshold: expected a probability"):
        model(pairs(1, 128, 160))


@torch.no_grad()
def test_half_precision_moves_weights_and_still_matches(model):
    expected = model(pairs(1))
    for dtype in (torch.float16, torch.bfloat16):
        halved = copy.deepcopy(model).to(dtype)
        assert halved.dtype == halved.matcher.dtype == dtype
        output = halved(pairs(1).to(dtype))
        assert output.keypoints.dtype == torch.float32
        assert output.matches.shape[-1] > 0.5 * expected.matches.shape[-1]
    assert model.half().dtype == torch.float16


@torch.no_grad()
def test_a_copy_has_weights_of_its_own(model):
    copied = copy.deepcopy(model)
    next(copied.parameters()).zero_()
    assert not torch.equal(next(copied.matcher.parameters()), next(model.matcher.parameters()))
    assert next(copied.parameters()) is next(copied.matcher.parameters())


@torch.no_grad()
def test_torch_compile_gives_the_same_matches():
    model = tiny_interface(**SHALLOW, temperature=1.0, border_removal=0)
    pixel_values = pairs(1)
    keypoints, scores = on_pixels(torch.compile(model, backend="eager")(pixel_values), pixel_values)
    expected_keypoints, expected_scores = on_pixels(model(pixel_values), pixel_values)
    assert len(scores) > 0
    torch.testing.assert_close(keypoints, expected_keypoints, rtol=0, atol=1e-4)
    torch.testing.assert_close(scores, expected_scores, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("pixel_values", "message"),
    [
        (torch.rand(2, 3, 64, 96), r"pixel_values: expected shape \(B, 2, 3, H, W\)"),
        (torch.rand(1, 3, 3, 64, 96), "Pairs of images are stacked"),
        (torch.rand(1, 2, 4, 64, 96), r"got \(1, 2, 4, 64, 96\)"),
        (torch.rand(1, 2, 3, 16, 96), "expected height and width of at least 32"),
        (255 * torch.rand(1, 2, 1, 64, 96), r"expected values in \[0, 1\]"),
        (torch.full((1, 2, 1, 64, 96), torch.nan), "NaN"),
        ([[1, 2]], "pixel_values: expected a tensor"),
    ],
)
def test_bad_pixels_are_named(model, pixel_values, message):
    for net in (model, model.efficientloftr):
        with pytest.raises((ValueError, TypeError), match=message):
            net(pixel_values)


def test_the_features_alone_take_no_labels(model):
    with pytest.raises(ValueError, match="labels: expected None, since features have no loss"):
        model.efficientloftr(pairs(1), labels=torch.eye(3)[None])
