# SPDX-License-Identifier: Apache-2.0
"""Both image processors: what they take, what they refuse, keypoints on the originals, pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

import eloftr_ops.integrations.transformers as interface
from eloftr_ops.integrations.transformers import image_processing

SIZE = {"height": 48, "width": 64}


def picture(height=40, width=60, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def output_of(matches, scores, keypoints):
    """An output of one pair: keypoint i of image 0 belongs to matches[i] of image 1, -1 for none."""
    forward = torch.tensor(matches)
    backward = torch.full_like(forward, -1)
    for index, partner in enumerate(matches):
        if partner >= 0:
            backward[partner] = index
    return interface.EfficientLoFTRKeypointMatchingOutput(
        matches=torch.stack([forward, backward])[None],
        matching_scores=torch.tensor([scores, scores])[None],
        keypoints=torch.tensor(keypoints)[None],
    )


@pytest.mark.parametrize("kind", ["pil", "numpy last", "numpy first", "torch first", "torch last", "gray"])
def test_every_kind_of_image_gives_the_same_pixels(processor_class, kind):
    image = picture()
    if kind == "gray":
        image[..., 1] = image[..., 2] = image[..., 0]
    made = {
        "pil": Image.fromarray,
        "numpy last": lambda x: x,
        "numpy first": lambda x: x.transpose(2, 0, 1),
        "torch last": torch.from_numpy,
        "torch first": lambda x: torch.from_numpy(x).permute(2, 0, 1),
        "gray": lambda x: Image.fromarray(x[..., 0]),
    }[kind](image)
    processor = processor_class(size=SIZE)
    values = processor([made, made], return_tensors="pt")["pixel_values"]
    expected = processor([image, image], return_tensors="pt")["pixel_values"]
    assert values.shape == (1, 2, 3, 48, 64)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-6)
    assert torch.equal(values[:, :, 0], values[:, :, 1])
    assert torch.equal(values[:, :, 1], values[:, :, 2])


def test_pixels_are_weighed_scaled_and_kept_where_asked(processor_class):
    image = picture(48, 64)
    values = processor_class(do_resize=False)([image, image], return_tensors="pt")["pixel_values"]
    luma = torch.from_numpy(image / 255.0 @ np.array([0.2989, 0.587, 0.114]) / 0.9999).float()
    torch.testing.assert_close(values[0, 0, 0], luma, rtol=0, atol=0.5 / 255)
    kept = processor_class(do_resize=False, do_rescale=False, do_grayscale=False)([image, image])
    assert np.array_equal(np.asarray(kept["pixel_values"][0][0]), image.transpose(2, 0, 1))
    small = processor_class()([image, image], size={"height": 32, "width": 32}, return_tensors="np")
    assert small["pixel_values"].shape == (1, 2, 3, 32, 32)


def test_floating_point_pixels_up_to_one_are_not_scaled_again(processor_class):
    image = picture(48, 64)
    processor = processor_class(do_resize=False)
    floats = processor([image / np.float32(255)] * 2, return_tensors="pt")["pixel_values"]
    bytes_ = processor([image] * 2, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(floats, bytes_, rtol=0, atol=0.51 / 255)


def test_pairs_of_mixed_sizes_keep_their_order(processor_class):
    images = [np.full((30 + 5 * i, 50, 3), 40 * i, np.uint8) for i in range(6)]
    nested = [images[i : i + 2] for i in (0, 2, 4)]
    values = processor_class(size=SIZE)(nested, return_tensors="pt")["pixel_values"]
    assert values.shape == (3, 2, 3, 48, 64)
    torch.testing.assert_close(values[..., 0, 0, 0].flatten(), torch.arange(6) * 40 / 255)
    alone = processor_class(size=SIZE)(nested[1], return_tensors="pt")["pixel_values"]
    assert torch.equal(alone[0], values[1])


def test_transparent_pixels_become_white(processor_class):
    layers = np.dstack([picture(48, 64), np.zeros((48, 64), np.uint8)])
    for image in (Image.fromarray(layers), layers):
        values = processor_class(do_resize=False)([image, image], return_tensors="pt")["pixel_values"]
        assert (values == 1).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "I;16"])
def test_pillow_images_of_other_modes_are_taken(processor_class, mode):
    image = Image.new("I;16", (64, 48), 65535) if mode == "I;16" else Image.new(mode, (64, 48), "white")
    if mode == "CMYK":
        image = Image.new("RGB", (64, 48), "white").convert("CMYK")
    values = processor_class(do_resize=False)([image, image], return_tensors="pt")["pixel_values"]
    assert values.shape == (1, 2, 3, 48, 64)
    assert (values == 1).all()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (picture(), "expected a pair .* got one ndarray"),
        ([picture()], "got a list of 1 image"),
        ([picture()] * 3, "got a list of 3 images. Put the two images of each pair"),
        ([picture()] * 4, "got a list of 4 images"),
        ([[picture()]], r"images\[0\]: expected a pair .* got 1 images"),
        ([[picture()] * 2, [picture()]], r"images\[1\]: expected a pair .* got 1 images"),
        ([[picture()] * 2, picture()], r"images\[1\]: expected a pair"),
        ([], "got an empty list"),
        ([picture()[None]] * 2, "expected an image of 2 or 3 dimensions"),
        ([np.zeros((5, 40, 60))] * 2, "expected 1, 3 or 4 channels"),
        ([None, None], "expected a Pillow image"),
        ([Image.new("F", (64, 48))] * 2, "got a Pillow image of mode F"),
        (picture()[None, None], "got one ndarray"),
    ],
)
def test_other_than_pairs_is_refused(processor_class, images, message):
    with pytest.raises(ValueError, match=message):
        processor_class(size=SIZE)(images, return_tensors="pt")


def test_two_sizes_without_a_resize_are_refused(processor_class):
    with pytest.raises(ValueError, match="expected one size with do_resize=False, got images of 60 x 40, 64 x 48"):
        processor_class(do_resize=False)([picture(), picture(48, 64)], return_tensors="pt")


def test_settings_go_to_a_file_and_come_back(processor_class, tmp_path):
    processor = processor_class(size=SIZE, do_grayscale=False)
    processor.save_pretrained(tmp_path)
    loaded = processor_class.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert not loaded.do_grayscale
    assert dict(processor_class.from_dict({}, size={"height": 42, "width": 42}).size) == {
        "height": 42, "width": 42,
    }  # fmt: skip


def test_keypoints_are_floats_in_pixels_of_the_originals(processor_class):
    outputs = output_of([1, -1, 0], [0.9, 0.0, 0.4], [[[0.5, 0.25], [0, 0], [1, 1]], [[0.1, 0.2], [0.3, 0.7], [0, 0]]])
    for sizes in ([((100, 200), (50, 80))], torch.tensor([[[100, 200], [50, 80]]])):
        (found,) = processor_class().post_process_keypoint_matching(outputs, sizes)
        expected0 = torch.tensor([[100.0, 25.0], [200.0, 100.0]])
        expected1 = torch.tensor([[24.0, 35.0], [8.0, 10.0]])
        torch.testing.assert_close(found["keypoints0"], expected0)
        torch.testing.assert_close(found["keypoints1"], expected1)
        torch.testing.assert_close(found["matching_scores"], torch.tensor([0.9, 0.4]))
    (found,) = processor_class().post_process_keypoint_matching(outputs, sizes, threshold=0.5)
    assert found["keypoints0"].tolist() == [[100.0, 25.0]]
    assert found["keypoints1"].shape == (1, 2)


@pytest.mark.parametrize(
    ("sizes", "threshold", "error", "message"),
    [
        (
            [((9, 9), (9, 9))] * 2,
            0,
            ValueError,
            "target_sizes: expected one entry per pair of images, 1, got 2",
        ),
        ([(9, 9)], 0, ValueError, r"shape \(1, 2, 2\), got \(1, 2\)"),
        (torch.ones(1, 2, 3), 0, ValueError, r"got \(1, 2, 3\)"),
        ([((9, 9), (9,))], 0, ValueError, r"expected \(\(height, width\)"),
        ([((9, 9), (9, 0))], 0, ValueError, "positive"),
        (None, 0, ValueError, "got NoneType"),
        ([((9, 9), (9, 9))], -0.1, ValueError, r"threshold: expected a number in \[0, 1\], got -0.1"),
        ([((9, 9), (9, 9))], 1.5, ValueError, r"threshold: .* got 1.5"),
        ([((9, 9), (9, 9))], float("nan"), ValueError, "got nan"),
        ([((9, 9), (9, 9))], "0.5", TypeError, "got '0.5'"),
    ],
)
def test_bad_sizes_and_thresholds_are_named(processor_class, sizes, threshold, error, message):
    outputs = output_of([0], [0.5], [[[0.5, 0.5]], [[0.5, 0.5]]])
    with pytest.raises(error, match=message):
        processor_class().post_process_keypoint_matching(outputs, sizes, threshold)


def test_pictures_show_both_images_and_the_lines(processor_class):
    images = [Image.new("L", (60, 40)), np.zeros((50, 70, 3), np.uint8)]
    found = [
        {
            "keypoints0": torch.tensor([[10.5, 20.5]]),
            "keypoints1": torch.tensor([[40.5, 20.5]]),
            "matching_scores": torch.tensor([1.0]),
        }
    ]
    (drawn,) = processor_class().visualize_keypoint_matching(images, found)
    assert drawn.size == (130, 50)
    assert drawn.getpixel((60, 20)) == (0, 255, 0)
    assert drawn.getpixel((60, 25)) == (0, 0, 0)
    with pytest.raises(ValueError, match="expected one entry per pair of images, 1, got 2"):
        processor_class().visualize_keypoint_matching(images, found * 2)


def test_without_torchvision_the_message_says_what_to_use(monkeypatch):
    monkeypatch.setattr(image_processing, "is_torchvision_available", lambda: False)
    with pytest.raises(ImportError, match="or use EfficientLoFTRImageProcessorPil"):
        interface.EfficientLoFTRImageProcessor()
