# SPDX-License-Identifier: Apache-2.0
"""Image files of every kind become the same gray tensor; match files are whole or absent."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kornia.color import rgb_to_grayscale
from PIL import Image

import eloftr_ops.images
import eloftr_ops.io as eio
from eloftr_ops import __version__
from eloftr_ops.io import FileError, LoadedImage, atomic_write, check_output, read_image, write_matches

HEIGHT, WIDTH = 40, 56
# Gray values that are integers in eight bits come back to within float32 rounding.
EXACT = 1e-6


def random_pixels(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def saved(tmp_path: Path, image: Image.Image, name: str = "image.png", **options: object) -> Path:
    path = tmp_path / name
    image.save(path, **options)
    return path


def gray(path: Path, **options: int) -> np.ndarray:
    loaded = read_image(path, **options)
    assert loaded.image.dtype == torch.float32
    assert loaded.image.shape[:2] == (1, 1)
    assert loaded.image.min() >= 0
    assert loaded.image.max() <= 1
    return loaded.image[0, 0].numpy()


def luma(rgb: np.ndarray) -> np.ndarray:
    return rgb_to_grayscale(torch.from_numpy(rgb).permute(2, 0, 1).double() / 255)[0].numpy()


# --- kinds of images ---


def test_gray_is_divided_by_255(tmp_path: Path) -> None:
    pixels = random_pixels(HEIGHT, WIDTH)
    np.testing.assert_allclose(gray(saved(tmp_path, Image.fromarray(pixels))), pixels / 255, atol=EXACT)


def test_rgb_becomes_the_luma_of_kornia_without_rounding(tmp_path: Path) -> None:
    pixels = random_pixels(HEIGHT, WIDTH, 3)
    np.testing.assert_allclose(gray(saved(tmp_path, Image.fromarray(pixels))), luma(pixels), atol=EXACT)


def test_rgba_is_composited_over_black_and_masked_where_nothing_is_seen(tmp_path: Path) -> None:
    pixels = random_pixels(HEIGHT, WIDTH, 4)
    pixels[:10, :, 3] = 0
    pixels[10:, :, 3] = np.maximum(pixels[10:, :, 3], 1)
    path = saved(tmp_path, Image.fromarray(pixels))
    np.testing.assert_allclose(gray(path), luma(pixels[..., :3]) * (pixels[..., 3] / 255), atol=EXACT)
    mask = read_image(path).mask
    assert mask is not None
    np.testing.assert_array_equal(mask[0].numpy(), np.arange(HEIGHT)[:, None].repeat(WIDTH, 1) >= 10)


def test_opaque_alpha_gives_no_mask(tmp_path: Path) -> None:
    pixels = random_pixels(HEIGHT, WIDTH, 4)
    pixels[..., 3] = 255
    assert read_image(saved(tmp_path, Image.fromarray(pixels))).mask is None


def test_gray_with_alpha(tmp_path: Path) -> None:
    pixels = random_pixels(HEIGHT, WIDTH, 2)
    path = saved(tmp_path, Image.merge("LA", _bands(pixels)))
    np.testing.assert_allclose(gray(path), (pixels[..., 0] / 255) * (pixels[..., 1] / 255), atol=EXACT)


def _bands(pixels: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(np.ascontiguousarray(pixels[..., band])) for band in range(pixels.shape[2])]


def test_palette_is_looked_up(tmp_path: Path) -> None:
    indices = random_pixels(HEIGHT, WIDTH) % 4
    colors = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 8, 7]], dtype=np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(colors.tobytes())
    assert image.mode == "P"
    np.testing.assert_allclose(gray(saved(tmp_path, image)), luma(colors[indices]), atol=EXACT)


def test_transparent_palette_entry_is_masked(tmp_path: Path) -> None:
    indices = random_pixels(HEIGHT, WIDTH) % 4
    image = Image.fromarray(indices)
    image.putpalette(random_pixels(4, 3).tobytes())
    mask = read_image(saved(tmp_path, image, transparency=2)).mask
    assert mask is not None
    np.testing.assert_array_equal(mask[0].numpy(), indices != 2)


def test_cmyk_is_converted_to_rgb(tmp_path: Path) -> None:
    pixels = random_pixels(HEIGHT, WIDTH, 4)
    path = saved(tmp_path, Image.merge("CMYK", _bands(pixels)), "image.tif")
    ink = pixels.astype(np.float64) / 255
    expected = (1 - ink[..., :3]) * (1 - ink[..., 3:]) @ np.array([0.299, 0.587, 0.114])
    # Pillow rounds the three colours to eight bits.
    np.testing.assert_allclose(gray(path), expected, atol=1 / 255)


def test_bilevel(tmp_path: Path) -> None:
    pixels = random_pixels(HEIGHT, WIDTH) > 127
    np.testing.assert_array_equal(gray(saved(tmp_path, Image.fromarray(pixels))), pixels)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_16_bit_gray_is_scaled_by_the_bits_that_it_uses(tmp_path: Path, bits: int) -> None:
    pixels = random_pixels(HEIGHT, WIDTH, dtype=np.uint16) >> (16 - bits)
    pixels[0, 0] = 2**bits - 1
    path = saved(tmp_path, Image.fromarray(pixels))
    np.testing.assert_allclose(gray(path), pixels / (2**bits - 1), atol=EXACT)
    notes = read_image(path).notes
    assert len(notes) == (bits < 16)
    if notes:
        assert f"use {bits} bits: {2**bits - 1} is taken for white" in notes[0]


def test_the_transparent_value_of_16_bit_gray_is_masked(tmp_path: Path) -> None:
    pixels = np.maximum(random_pixels(HEIGHT, WIDTH, dtype=np.uint16), 1)
    pixels[:, :20] = 0
    path = saved(tmp_path, Image.fromarray(pixels), transparency=0)
    mask = read_image(path).mask
    assert mask is not None
    np.testing.assert_array_equal(mask[0].numpy(), np.arange(WIDTH)[None].repeat(HEIGHT, 0) >= 20)
    np.testing.assert_allclose(gray(path), pixels / 65535, atol=EXACT)


def test_colours_are_kept_on_demand(tmp_path: Path) -> None:
    pixels = random_pixels(HEIGHT, WIDTH, 3)
    path = saved(tmp_path, Image.fromarray(pixels))
    assert read_image(path).color is None
    np.testing.assert_array_equal(read_image(path, color=True).color, pixels)
    gray_path = saved(tmp_path, Image.fromarray(pixels[..., 0]), "gray.png")
    assert read_image(gray_path, color=True).color is None


def test_pipes_are_refused_at_once_and_names_too_long_are_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(FileError, match=r"pipe\.png: expected an image file, got a pipe or a device"):
        read_image(tmp_path / "pipe.png")
    with pytest.raises(FileError, match="cannot be read: File name too long"):
        read_image(tmp_path / ("n" * 300))
    with pytest.raises(FileError, match="cannot be written: File name too long"):
        check_output(tmp_path / ("n" * 300 + ".npz"), eio.MATCH_SUFFIXES)
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(FileError, match="expected a file to write, got a pipe or a device"):
        check_output(tmp_path / "pipe.npz", eio.MATCH_SUFFIXES)


def test_a_folder_that_may_not_be_searched_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:  # the superuser may search anywhere
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(FileError, match="cannot be read: Permission denied"):
        read_image(tmp_path / "closed" / "image.png")


@pytest.mark.parametrize("name", ["image.png", "image.tif"])
def test_16_bit_gray_is_divided_by_65535(tmp_path: Path, name: str) -> None:
    pixels = random_pixels(HEIGHT, WIDTH, dtype=np.uint16)
    np.testing.assert_allclose(gray(saved(tmp_path, Image.fromarray(pixels), name)), pixels / 65535, atol=EXACT)


def test_32_bit_integers_with_a_16_bit_range_are_16_bit(tmp_path: Path) -> None:
    pixels = random_pixels(HEIGHT, WIDTH, dtype=np.uint16).astype(np.int32)
    path = saved(tmp_path, Image.fromarray(pixels), "image.tif")
    np.testing.assert_allclose(gray(path), pixels / 65535, atol=EXACT)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_unknown_white_is_stretched(tmp_path: Path, dtype: type) -> None:
    pixels = np.random.default_rng(0).integers(-(2**24), 2**24, (HEIGHT, WIDTH)).astype(dtype)
    path = saved(tmp_path, Image.fromarray(pixels), "image.tif")
    expected = (pixels.astype(np.float64) - pixels.min()) / (float(pixels.max()) - float(pixels.min()))
    np.testing.assert_allclose(gray(path), expected, atol=EXACT)


def test_floating_point_in_0_to_1_is_taken_as_it_is_and_what_is_not_finite_is_masked(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).random((HEIGHT, WIDTH), dtype=np.float32)
    pixels[3, 5], pixels[4, 6], pixels[5, 7] = np.nan, np.inf, -np.inf
    path = saved(tmp_path, Image.fromarray(pixels), "image.tif")
    finite = np.isfinite(pixels)
    np.testing.assert_array_equal(gray(path), np.where(finite, pixels, 0))
    mask = read_image(path).mask
    assert mask is not None
    np.testing.assert_array_equal(mask[0].numpy(), finite)


def test_constant_float_image_beyond_1_is_black(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(np.full((HEIGHT, WIDTH), 7, dtype=np.float32)), "image.tif")
    np.testing.assert_array_equal(gray(path), 0)


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("L", (WIDTH, HEIGHT), value) for value in (51, 204)]
    path = saved(tmp_path, frames[0], "image.gif", save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(gray(path), 0.2, atol=EXACT)


# --- orientation ---

# What a camera stores so that a viewer, applying the EXIF tag, shows the upright image.
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright, 2).T,
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("name", ["image.png", "image.tif"])
def test_exif_orientation_is_applied(tmp_path: Path, name: str, orientation: int) -> None:
    upright = random_pixels(HEIGHT, WIDTH)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    loaded = read_image(saved(tmp_path, stored, name, exif=exif))
    np.testing.assert_allclose(loaded.image[0, 0].numpy(), upright / 255, atol=EXACT)
    assert loaded.original_size_wh == (WIDTH, HEIGHT)
    assert loaded.scale_xy == (1.0, 1.0)


def test_unknown_orientation_is_ignored(tmp_path: Path) -> None:
    pixels = random_pixels(HEIGHT, WIDTH)
    exif = Image.Exif()
    exif[0x0112] = 77
    np.testing.assert_allclose(gray(saved(tmp_path, Image.fromarray(pixels), exif=exif)), pixels / 255, atol=EXACT)


# --- resizing and the frame ---


def blob(size_wh: tuple[int, int], centre: tuple[float, float], sigma: float) -> np.ndarray:
    """A Gaussian spot whose centre is given in the frame of pixel centres at (x + 0.5, y + 0.5)."""
    x = np.arange(size_wh[0]) + 0.5 - centre[0]
    y = np.arange(size_wh[1])[:, None] + 0.5 - centre[1]
    return np.round(255 * np.exp(-(x**2 + y**2) / (2 * sigma**2))).astype(np.uint8)


def centroid(loaded: LoadedImage) -> torch.Tensor:
    spot = loaded.image[0, 0].double()
    spot = spot * (spot > 0.05)
    x, y = torch.arange(spot.shape[1]) + 0.5, torch.arange(spot.shape[0]) + 0.5
    return torch.stack([(spot.sum(0) * x).sum(), (spot.sum(1) * y).sum()])[None] / spot.sum()


@pytest.mark.parametrize(
    ("name", "orientation"), [("image.png", 1), ("image.jpg", 1), ("image.jpg", 6), ("image.png", 8)]
)
def test_a_spot_is_found_where_it_is_in_the_original(tmp_path: Path, name: str, orientation: int) -> None:
    # Sizes that nothing divides: a JPEG is first decoded at a quarter, its last column and row partly covered.
    size_wh, centre = (1003, 701), (611.3, 287.8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](blob(size_wh, centre, 60.0))))
    loaded = read_image(saved(tmp_path, stored, name, exif=exif, quality=95), resize=100)
    assert loaded.size_wh == (100, 70)
    assert loaded.original_size_wh == size_wh
    # A frame wrong by half a pixel of either image would be off by at least (10 - 1) / 2 original pixels, the partly
    # covered column by 0.3; the tolerance is a hundredth of a reduced pixel.
    torch.testing.assert_close(
        loaded.to_original(centroid(loaded)), torch.tensor([centre], dtype=torch.float64), atol=0.1, rtol=0
    )


def test_jpegs_are_decoded_reduced_and_look_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smooth = Image.fromarray(random_pixels(30, 40, 3)).resize((800, 600), Image.Resampling.BICUBIC)
    path = saved(tmp_path, smooth, "image.jpg", quality=95)
    reduced = gray(path, resize=80)
    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.draft", lambda *_: None)
    np.testing.assert_allclose(reduced, gray(path, resize=80), atol=0.02)


def test_reduction_does_not_alias(tmp_path: Path) -> None:
    stripes = np.zeros((200, 300), dtype=np.uint8)
    stripes[:, ::2] = 255
    reduced = gray(saved(tmp_path, Image.fromarray(stripes)), resize=75)
    # At the left and right border the filter sees one more stripe of one kind.
    np.testing.assert_allclose(reduced[:, 2:-2], 0.5, atol=0.01)
    np.testing.assert_allclose(reduced, 0.5, atol=0.05)


def test_mask_is_resized_with_the_image(tmp_path: Path) -> None:
    pixels = np.full((200, 200, 4), 255, dtype=np.uint8)
    pixels[:100, :, 3] = 0
    mask = read_image(saved(tmp_path, Image.fromarray(pixels)), resize=50).mask
    assert mask is not None
    np.testing.assert_array_equal(mask[0, :, 0].numpy(), np.arange(50) >= 25)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 250))
def test_size_and_scale_laws(width: int, height: int, resize: int) -> None:
    fitted = eloftr_ops.images._fitted((width, height), resize)
    loaded = LoadedImage(torch.zeros(1, 1, fitted[1], fitted[0]), None, (width, height))
    assert max(fitted) == min(resize, max(width, height))  # never enlarged
    for small, large in zip(fitted, (width, height), strict=True):
        assert small == 1 or abs(small - large * max(fitted) / max(width, height)) <= 0.5 + 1e-9
    corner = torch.tensor([[0.0, 0.0], [float(fitted[0]), float(fitted[1])]])
    torch.testing.assert_close(loaded.to_original(corner), torch.tensor([[0.0, 0.0], [float(width), float(height)]]))


def test_to_original_keeps_dtype_gradient_and_emptiness() -> None:
    loaded = LoadedImage(torch.zeros(1, 1, 50, 100), None, (300, 100))
    points = torch.ones(2, 2, requires_grad=True)
    mapped = loaded.to_original(points)
    mapped.sum().backward()
    torch.testing.assert_close(points.grad, torch.tensor([[3.0, 2.0], [3.0, 2.0]]), atol=0, rtol=0)
    assert mapped.dtype == torch.float32
    assert loaded.to_original(torch.zeros(0, 2)).shape == (0, 2)


@pytest.mark.parametrize(("resize", "error"), [(0, ValueError), (-5, ValueError), (2.5, TypeError), (True, TypeError)])
def test_resize_is_checked(tmp_path: Path, resize: object, error: type[Exception]) -> None:
    path = saved(tmp_path, Image.new("L", (WIDTH, HEIGHT)))
    with pytest.raises(error, match="resize: expected"):
        read_image(path, resize=resize)  # type: ignore[arg-type]


# --- files that are no images ---


def damaged(tmp_path: Path, kind: str) -> Path:
    name = "image.jpg" if "jpeg" in kind else "image.png"
    path = saved(tmp_path, Image.fromarray(random_pixels(HEIGHT, WIDTH, 3)), name)
    data = path.read_bytes()
    if kind.startswith("truncated"):
        path.write_bytes(data[: len(data) // 2])
    elif kind == "corrupt png":
        path.write_bytes(data[:60] + bytes(255 - byte for byte in data[60:200]) + data[200:])
    elif kind == "header only":
        path.write_bytes(data[:8])
    elif kind == "text":
        path.write_text("not an image at all, although it is called one\n")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "missing":
        path.unlink()
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no such file"),
        ("empty", "the file is empty"),
        ("text", "not an image of a known format"),
        ("header only", "not an image|broken"),
        ("truncated png", "broken or unsupported"),
        ("truncated jpeg", "broken or unsupported"),
        ("corrupt png", "broken or unsupported"),
    ],
)
def test_bad_files_are_named_with_their_fault(tmp_path: Path, kind: str, message: str) -> None:
    path = damaged(tmp_path, kind)
    with pytest.raises(FileError, match=message) as caught:
        read_image(path)
    assert str(path) in str(caught.value)


def test_a_folder_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="got a folder"):
        read_image(tmp_path)


def test_decompression_bombs_are_refused_and_half_of_one_is_read_silently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    path = saved(tmp_path, Image.new("L", (WIDTH, HEIGHT)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT - 1)  # Pillow warns above, raises at twice this
    assert gray(path).shape == (HEIGHT, WIDTH)
    assert not recwarn.list
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT // 2 - 1)
    with pytest.raises(FileError, match="too large"):
        read_image(path)


@pytest.mark.parametrize(
    ("raised", "message"), [(PermissionError(13, "denied"), "no permission"), (MemoryError(), "memory")]
)
def test_what_the_system_refuses_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, message: str
) -> None:
    path = saved(tmp_path, Image.new("L", (WIDTH, HEIGHT)))

    def refuse(_: object) -> None:
        raise raised

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(FileError, match=message):
        read_image(path)


def test_all_values_not_finite(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(np.full((HEIGHT, WIDTH), np.nan, dtype=np.float32)), "image.tif")
    with pytest.raises(FileError, match="no finite value"):
        read_image(path)


# --- match files ---


def some_matches(count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "keypoints0": torch.rand(count, 2, generator=generator) * 1000,
        "keypoints1": torch.rand(count, 2, generator=generator) * 1000,
        "confidence": torch.rand(count, generator=generator),
    }


@pytest.mark.parametrize("count", [0, 1, 17])
@pytest.mark.parametrize("suffix", [".npz", ".json", ".NPZ"])
def test_npz_and_json_give_everything_back(tmp_path: Path, suffix: str, count: int) -> None:
    matches, path = some_matches(count), tmp_path / f"matches{suffix}"
    inliers, H = torch.arange(count) % 2 == 0, torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 1.0]]) / 3
    write_matches(path, **matches, size0_wh=(640, 480), size1_wh=(320, 240), inliers=inliers, matrices={"H_0to1": H})
    read = dict(np.load(path)) if suffix.lower() == ".npz" else json.loads(path.read_text())
    for name, values in matches.items():
        array = np.asarray(read[name], dtype=np.float32).reshape(values.shape)
        np.testing.assert_array_equal(array, values.numpy())
    np.testing.assert_array_equal(np.asarray(read["inliers"], dtype=bool), inliers.numpy())
    np.testing.assert_array_equal(np.asarray(read["H_0to1"]), H.double().numpy())
    assert [list(read["size0_wh"]), list(read["size1_wh"])] == [[640, 480], [320, 240]]
    assert str(read["version"]) == __version__
    assert "(x + 0.5, y + 0.5)" in str(read["frame"])


@pytest.mark.parametrize("count", [0, 9])
def test_csv_has_a_row_per_match(tmp_path: Path, count: int) -> None:
    matches, path = some_matches(count), tmp_path / "matches.csv"
    write_matches(path, **matches, size0_wh=(9, 9), size1_wh=(9, 9), inliers=torch.ones(count, dtype=torch.bool))
    header, *rows = csv.reader(path.read_text().splitlines())
    assert header == ["x0", "y0", "x1", "y1", "confidence", "inlier"]
    expected = torch.cat([matches["keypoints0"], matches["keypoints1"], matches["confidence"][:, None]], 1)
    np.testing.assert_array_equal(
        np.array([row[:5] for row in rows], dtype=np.float32).reshape(count, 5), expected.numpy()
    )
    assert [row[5] for row in rows] == ["1"] * count


def test_arrays_and_tensors_with_gradient_are_written(tmp_path: Path) -> None:
    matches = some_matches(3)
    points = matches["keypoints0"].requires_grad_()
    path = tmp_path / "matches.npz"
    write_matches(path, points, matches["keypoints1"].numpy(), matches["confidence"], size0_wh=(9, 9), size1_wh=(9, 9))
    np.testing.assert_array_equal(np.load(path)["keypoints0"], points.detach().numpy())


def test_shapes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    matches = some_matches(3)
    matches["keypoints1"] = matches["keypoints1"][:2]
    with pytest.raises(ValueError, match=r"keypoints1: expected shape \(3, 2\), got \(2, 2\)"):
        write_matches(tmp_path / "matches.npz", **matches, size0_wh=(9, 9), size1_wh=(9, 9))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "matches.npz"
    path.write_bytes(b"old")

    def write_half() -> None:
        with atomic_write(path) as file:
            file.write(b"half of the ")
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        write_half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_a_file_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(eio._WRITERS, ".npz", full)
    with pytest.raises(FileError, match="No space left on device"):
        write_matches(tmp_path / "m.npz", **some_matches(1), size0_wh=(9, 9), size1_wh=(9, 9))
    assert list(tmp_path.iterdir()) == []


def test_atomic_write_into_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot be written"), atomic_write(tmp_path / "none" / "file"):
        pass


@pytest.mark.parametrize(
    ("name", "message"),
    [("m.txt", "ends in .npz, .json, .csv, got .txt"), ("m", "got none"), ("none/m.npz", "does not exist")],
)
def test_outputs_are_checked_in_advance(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(FileError, match=message):
        check_output(tmp_path / name, eio.MATCH_SUFFIXES)


def test_a_folder_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "m.npz").mkdir()
    with pytest.raises(FileError, match="got a folder"):
        check_output(tmp_path / "m.npz", eio.MATCH_SUFFIXES)


def test_a_read_only_folder_is_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eio.os, "access", lambda *_: False)  # the superuser may write anywhere
    with pytest.raises(FileError, match="no permission"):
        check_output(tmp_path / "m.npz", eio.MATCH_SUFFIXES)
