# SPDX-License-Identifier: Apache-2.0
"""Names of images, lists of pairs, and the order in which pairs are matched."""

import itertools
from pathlib import Path

import pytest
import torch

from eloftr_ops.errors import ArgumentError, FileError
from eloftr_ops.reconstruction.pairs import (
    check_keys,
    exhaustive_pairs,
    list_images,
    pair_key,
    read_pair_file,
    reading_order,
    sequential_pairs,
)
from eloftr_ops.reconstruction.retrieval import nearest_pairs, vlad_descriptors


def test_images_are_listed_in_natural_order_and_hidden_ones_are_not(tmp_path: Path) -> None:
    for name in ("10.jpg", "2.JPG", "sub/1.png", ".hidden.png", ".cache/3.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list_images(tmp_path) == ["2.JPG", "10.jpg", "sub/1.png"]


def test_a_folder_without_images_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no image in this folder"):
        list_images(tmp_path)
    with pytest.raises(FileError, match="there is none"):
        list_images(tmp_path / "nowhere")


def test_pairs_of_a_folder() -> None:
    assert exhaustive_pairs(["a", "b", "c"]) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert sequential_pairs(["a", "b", "c", "d"], 2) == [
        ("a", "b"),
        ("a", "c"),
        ("b", "c"),
        ("b", "d"),
        ("c", "d"),
    ]
    with pytest.raises(FileError, match="at least two images to match, got 1"):
        exhaustive_pairs(["a"])
    with pytest.raises(ArgumentError, match="window"):
        sequential_pairs(["a", "b"], 0)


def test_a_file_of_pairs_lists_what_it_cannot_use(tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt"
    path.write_text("# mine\na.png b.png\n\nb.png a.png\na.png\twith blank.png\nc.png\nd.png d.png\n")
    found = read_pair_file(path)
    assert found.pairs == [("a.png", "b.png"), ("a.png", "with blank.png")]
    assert [pair for pair, _ in found.refused] == [("c.png", ""), ("d.png", "d.png")]
    assert "line 6" in found.refused[0].reason
    path.write_text("\n")
    with pytest.raises(FileError, match="no pair in this file"):
        read_pair_file(path)


def test_names_that_become_one_in_hlocs_files_are_refused() -> None:
    assert pair_key(("a/b.jpg", "c.jpg")) == "a-b.jpg/c.jpg"
    check_keys(["a/b.jpg", "a/c.jpg", "a/b.jpg"])
    with pytest.raises(FileError, match=r"a/b\.jpg and a-b\.jpg: the same name"):
        check_keys(["a/b.jpg", "a-b.jpg"])


@pytest.mark.parametrize(("images", "parts"), [(2, 1), (6, 1), (100, 1), (100, 3)])
def test_the_order_keeps_every_pair_and_few_images_at_a_time(images: int, parts: int) -> None:
    pairs = exhaustive_pairs([f"{k:02}" for k in range(20)])
    tiles = reading_order(pairs, images, parts)
    assert sorted(itertools.chain(*tiles)) == pairs
    assert all(len(set(itertools.chain(*tile))) <= images for tile in tiles)
    assert len(tiles) >= parts
    if images == 6:  # one after the other, 190 pairs would read 190 images; a fresh read of each tile takes 3 to 6
        assert _reads(tiles, images) < 0.5 * _reads([pairs], images)


def _reads(tiles: list[list[tuple[str, str]]], images: int) -> int:
    """Images that a cache of so many images reads."""
    kept: list[str] = []
    reads = 0
    for name in itertools.chain(*itertools.chain(*tiles)):
        if name in kept:
            kept.remove(name)
        else:
            reads += 1
        kept = [*kept, name][-images:]
    return reads


def test_descriptors_put_images_of_one_kind_together() -> None:
    """Two kinds of images, each with local features about its own six words."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randn(12, 16, generator=generator)
    maps = []
    for image in range(8):
        chosen = torch.randint(6, (50,), generator=generator) + 6 * (image % 2)
        maps.append(words[chosen] + 0.1 * torch.randn(50, 16, generator=generator))
    names = [str(image) for image in range(8)]
    pairs = nearest_pairs(names, vlad_descriptors(maps, clusters=8), 3)
    assert len(pairs) == 12  # all pairs of each kind
    assert all(int(first) % 2 == int(second) % 2 for first, second in pairs)


def test_a_blank_image_has_a_descriptor_of_zero() -> None:
    descriptors = vlad_descriptors([torch.zeros(0, 4), torch.eye(4), -torch.eye(4)[:3]], clusters=2)
    assert descriptors[0].abs().sum() == 0
    torch.testing.assert_close(descriptors[1].norm(), torch.tensor(1.0))
