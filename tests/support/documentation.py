# SPDX-License-Identifier: Apache-2.0
"""What the Python blocks of each page take for granted: files in the current folder, tensors, and downloads.

Each function lays files into the folder and gives the names that the page's blocks use without defining them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kornia.feature.loftr.loftr as kornia_loftr
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from eloftr_ops import EfficientLoFTR
from eloftr_ops.io import demo_pair
from eloftr_ops.reconstruction.journal import PairMatches
from eloftr_ops.reconstruction.match_file import write_match_file
from eloftr_ops.weights import hub
from support.models import TINY
from support.pair_files import objects, rendered, save_image

ASSETS = Path(__file__).parents[2] / "eloftr_ops" / "assets"


def _bundled_pair(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    for number, name in enumerate(("left.jpg", "right.jpg")):
        shutil.copy(ASSETS / f"demo_{number}.jpg", folder / name)
    return {}


def _guided(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The bundled pair at half size, as tensors, and as files of which one is turned."""
    for number, name in enumerate(("left.jpg", "turned.jpg")):
        with Image.open(ASSETS / f"demo_{number}.jpg") as image:
            half = image.resize((320, 240))
            (half.transpose(Image.Transpose.ROTATE_90) if number else half).save(folder / name, quality=95)
    image0, image1 = (torch.nn.functional.avg_pool2d(image, 2) for image in demo_pair()[:2])
    return {"image0": image0, "image1": image1}


def _readme(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    _bundled_pair(folder, monkeypatch)
    _weight_files(folder, monkeypatch)
    image0, image1, _ = demo_pair()
    small = (image[..., :160, :160] for image in (image0, image1))
    left, right = (image.expand(1, 3, -1, -1) for image in (image0, image1))
    image, other = small
    return {"left": left, "right": right, "image": image, "others": [other]}


def _weight_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Weights of a tiny model in all places that pages name; the Hub's download gives local files."""
    tiny = EfficientLoFTR(TINY)
    tiny.save_pretrained(folder / "hub")
    for place in ("folder", "runs/mine"):
        shutil.copytree(folder / "hub", folder / place)
    monkeypatch.setattr(hub.Repository, "fetch", lambda self, file: folder / "hub" / file)
    full = EfficientLoFTR().state_dict()
    for checkpoint in (Path("eloftr_outdoor.ckpt"), Path("path/to/eloftr_outdoor.ckpt")):
        (folder / checkpoint).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"state_dict": full}, folder / checkpoint)
    return {}


def _labelled_pairs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """pairs.json with one pair of known pose, and kornia's LoFTR with random weights instead of a download."""
    truth = rendered()
    for side in (0, 1):
        save_image(folder / f"{side}.png", truth.images[side])
    pair = {
        "image0": "0.png",
        "image1": "1.png",
        "T_0to1": truth.T_0to1.tolist(),
        "K0": truth.K[0].tolist(),
        "K1": truth.K[1].tolist(),
    }
    (folder / "pairs.json").write_text(json.dumps({"pixel_centers": 0.5, "pairs": [pair]}))
    weights = kornia_loftr.LoFTR(None).state_dict()
    monkeypatch.setattr(kornia_loftr, "load_state_dict_from_url", lambda *_, **__: {"state_dict": weights})
    return {}


def _megadepth(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """An index of one pair with two images; `data` itself is read by tests/data/test_megadepth.py."""
    index = folder / "megadepth" / "index" / "scene_info_0.1_0.7"
    index.mkdir(parents=True)
    K = np.diag([100.0, 100.0, 1.0])
    np.savez(
        index / "0015.npz",
        image_paths=objects("0.png", "1.png"),
        depth_paths=objects("0.h5", "1.h5"),
        intrinsics=objects(K, K),
        poses=objects(np.eye(4), np.eye(4)),
        pair_infos=objects((np.array([0, 1]), 0.6, np.zeros((2, 4)))),
    )
    return {}


def _interface(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """transformers' classes: a tiny model in the place of the one on the Hub, two images, and a small batch."""
    import eloftr_ops.integrations.transformers as interface  # seconds, for these pages alone

    _bundled_pair(folder, monkeypatch)
    _weight_files(folder, monkeypatch)
    own = interface.EfficientLoFTRForKeypointMatching(interface.EfficientLoFTRConfig.from_eloftr_ops(TINY))
    place = folder / "zju-community" / "efficientloftr"
    own.save_pretrained(place)
    interface.EfficientLoFTRImageProcessorPil().save_pretrained(place)
    gray0, gray1, H = demo_pair()
    gray0, gray1 = (image[..., :128, :160] for image in (gray0, gray1))
    return {
        "torch": torch,
        "images": [Image.open(folder / name).convert("RGB") for name in ("left.jpg", "right.jpg")],
        "sizes": [[(480, 640), (480, 640)]],
        "gray0": gray0,
        "gray1": gray1,
        "pixel_values": torch.stack([gray0, gray1], 1).expand(-1, -1, 3, -1, -1),
        "H_0to1": H[None].float(),
    }


def _match_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """matches.h5 with the two matches of one pair."""
    points = np.array([[10.5, 20.5], [30.25, 40.75]], np.float32)
    confidence = np.array([0.5, 0.75], np.float32)
    pair = PairMatches(("left.jpg", "right.jpg"), points, points + 1, confidence, (640, 480), (640, 480))
    write_match_file(folder / "matches.h5", [pair], {})
    return {}


def _training(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    _weight_files(folder, monkeypatch)
    (folder / "mine.yaml").write_text(
        "model: {weights: runs/mine}\n"
        "data: {procedural: 2, sources: [{kind: homographies}], sizes: [[64, 64]], batch_pixels: 4096}\n"
        "loss: {windows: 8}\n"
        "validation: {every: 0}\n"
        "run: {folder: run, steps: 1, device: cpu, tensorboard: false}\n"
    )
    return {}


def _pair(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A model, a small pair with the true homography of its upper left corner, and one rendered batch of it."""
    image0, image1, H = demo_pair()
    image0, image1 = (image[..., :192, :256].contiguous().requires_grad_() for image in (image0, image1))
    batch = SimpleNamespace(image0=image0.detach(), image1=image1.detach(), H_0to1=H[None].float())
    return {
        "torch": torch,
        "model": EfficientLoFTR.from_pretrained("small"),
        "image0": image0,
        "image1": image1,
        "H_gt_0to1": H[None].float(),
        "batches": [batch],
    }


def _maps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of the four ops: 32 channels, 8x8 cells."""
    C, cells = 32, 64
    mask = torch.ones(1, 8, 8, dtype=torch.bool)

    def square() -> Tensor:
        return torch.randn(C, C) / C**0.5

    return {
        "x": torch.randn(1, C, 8, 8),
        "source": torch.randn(1, C, 8, 8),
        "message": torch.randn(1, C, 2, 2),
        "aggregate_weight": torch.randn(C, 1, 4, 4) / 4,
        "q_weight": square(),
        "k_weight": square(),
        "v_weight": square(),
        "merge_weight": square(),
        "expand_weight": torch.randn(2 * C, 2 * C) / C**0.5,
        "contract_weight": torch.randn(C, 2 * C) / C**0.5,
        "norm_weight": torch.ones(C),
        "norm_bias": torch.zeros(C),
        "num_heads": 2,
        "rotary": None,
        "mask": mask,
        "source_mask": mask,
        "features0": torch.randn(1, cells, C),
        "features1": torch.randn(1, cells, C),
        "temperature": 0.1,
        "threshold": 0.2,
        "mask0": mask.flatten(1),
        "mask1": mask.flatten(1),
        "map0": torch.randn(1, C, 32, 32),
        "map1": torch.randn(1, C, 32, 32),
        "batch": torch.zeros(3, dtype=torch.long),
        "cells0": torch.tensor([0, 9, 63]),
        "cells1": torch.tensor([1, 9, 62]),
        "subpixel_channels": 8,
        "subpixel_temperature": 10.0,
        "centred_subpixel": True,
        "soft_temperature": 1.0,
    }


SET_UP: dict[str, Callable[[Path, pytest.MonkeyPatch], dict[str, Any]]] = {
    "README.md": _readme,
    "docs/data.md": _megadepth,
    "docs/differentiability.md": _pair,
    "docs/evaluation.md": _labelled_pairs,
    "docs/guided.md": _guided,
    "docs/index.md": _bundled_pair,
    "docs/kernels/aggregated_attention.md": _maps,
    "docs/kernels/dual_softmax.md": _maps,
    "docs/kernels/upsample_mlp.md": _maps,
    "docs/kernels/window_match.md": _maps,
    "docs/match.md": _bundled_pair,
    "docs/migration.md": _interface,
    "docs/reconstruction.md": _match_file,
    "docs/training.md": _training,
    "docs/transformers.md": _interface,
    "docs/tutorials/end_to_end.md": _pair,
    "docs/weights.md": _weight_files,
}
