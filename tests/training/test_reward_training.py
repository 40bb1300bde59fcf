# SPDX-License-Identifier: Apache-2.0
"""Training by rewards: matches drawn, models estimated, what led to good ones made more probable."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from eloftr_ops.losses import Candidates
from eloftr_ops.training.config_file import config_from_dict
from eloftr_ops.training.drawn_models import Geometry
from eloftr_ops.training.expected_reward import ObjectiveConfig, reward_objective
from support.models import random_images, tiny_model
from support.pair_files import save_image
from support.training_runs import gradients, losses, short

CONFIG = ObjectiveConfig(kind="support", matches=40, windows=8, pixels=4, hypotheses=8)


def _support(found: Candidates) -> Tensor:
    return found.support * found.valid


def test_a_black_box_reward_makes_right_matches_more_probable() -> None:
    """Two equal images: the right cell is the cell itself. The reward is a function that knows no gradient."""
    model = tiny_model()
    image = random_images(2, 64, 64)
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=3e-4)

    def right() -> float:
        with torch.no_grad():
            drawn = model.sample_matches(image, image, draws=4, matches=40, generator=torch.Generator().manual_seed(5))
        return float((drawn.cells0 == drawn.cells1).float().mean())

    before = right()
    for step in range(6):
        result = reward_objective(
            model,
            image,
            image,
            _support,
            Geometry("homography"),
            CONFIG,
            generator=torch.Generator().manual_seed(step),
        )
        optimizer.zero_grad()
        result.loss.backward()
        assert all(bool(torch.isfinite(p.grad).all()) for p in parameters if p.grad is not None)
        optimizer.step()
    assert bool((result.reward > 0).all())
    assert right() > before


def test_no_success_gives_no_gradient_and_masks_are_taken() -> None:
    model = tiny_model()
    image = random_images(1, 64, 64)
    mask = torch.ones(1, 64, 64, dtype=torch.bool)
    mask[:, 32:] = False

    def failure(found: Candidates) -> Tensor:
        return torch.zeros(len(found.valid))

    result = reward_objective(model, image, image, failure, Geometry("homography"), CONFIG, mask0=mask)
    result.loss.backward()
    assert float(result.loss.detach()) == 0
    assert not any(bool(p.grad.any()) for p in model.parameters() if p.grad is not None)
    with pytest.raises(ValueError, match=r"reward: expected a tensor \(N,\) = \(16,\), got \(3,\)"):
        reward_objective(model, image, image, lambda *_: torch.zeros(3), Geometry("homography"), CONFIG)

    def undefined(found: Candidates) -> Tensor:
        return torch.full(found.valid.shape, torch.nan)

    with pytest.raises(ValueError, match="reward: expected finite numbers"):
        reward_objective(model, image, image, undefined, Geometry("homography"), CONFIG)


@pytest.mark.parametrize("kind", ["homography_reward", "pose_reward", "support"])
def test_a_run_by_rewards(tmp_path: Path, kind: str) -> None:
    config = short(
        tmp_path,
        objective={
            "kind": kind,
            "matches": 30,
            "windows": 4,
            "pixels": 4,
            "hypotheses": 8,
            "backend": "torch" if kind == "support" else "opencv",
        },
        loss={"homography_weight": 0.1},
        run={"steps": 2},
        model={"freeze_batch_norm": True},
    )
    found = gradients(config, "shares", 0, 1)
    assert all(bool(torch.isfinite(x).all()) for x in found.values())
    from eloftr_ops.training.loop import train

    assert train(config).finished
    assert len(losses(tmp_path)) == 4
    assert '"reward"' in (tmp_path / "log.jsonl").read_text()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"kind": "reward"}, r"objective\.kind: expected one of supervised, homography_reward"),
        ({"draws": 0}, r"objective\.draws: expected 1 to 1000, got 0"),
        ({"hypotheses": 1}, r"objective\.hypotheses: expected 2 to 4096, got 1"),
        ({"scale": 0}, r"objective\.scale: expected a positive number"),
        ({"penalty": -1}, r"objective\.penalty: expected at least 0"),
        ({"chance": 1}, r"objective\.chance: expected a share"),
        ({"kind": "pose_reward"}, r"objective\.kind: expected pairs with poses"),
    ],
)
def test_bad_sections(section: dict[str, object], message: str) -> None:
    plain = {"run": {"folder": "a"}, "data": {"procedural": 1}}
    with pytest.raises(ValueError, match=message):
        config_from_dict({**plain, "objective": section})
    scenes = {"run": {"folder": "a"}, "data": {"procedural": 1, "sources": [{"kind": "scenes"}]}}
    with pytest.raises(ValueError, match=r"objective\.kind: expected pairs with homographies"):
        config_from_dict({**scenes, "objective": {"kind": "homography_reward"}})


def test_pairs_of_photographs_without_labels(tmp_path: Path) -> None:
    """Nothing but the names of two images: support is the reward, and no other objective takes them."""
    for side in "01":
        save_image(tmp_path / f"{side}.png", random_images(1, 64, 64)[0, 0])
    (tmp_path / "pairs.json").write_text('{"pixel_centers": 0.5, "pairs": [{"image0": "0.png", "image1": "1.png"}]}')
    source = {"kind": "json", "index": str(tmp_path / "pairs.json"), "labels": False}
    sections: dict[str, dict[str, object]] = {
        "data": {"sources": [source], "batch_pixels": 64 * 64},
        "objective": {"kind": "support", "matches": 30, "windows": 0},
    }
    found = gradients(short(tmp_path / "run", **sections), "shares", 0, 1)
    assert any(bool(x.any()) for name, x in found.items() if name != "loss")
    with pytest.raises(ValueError, match=r"data\.sources: expected labels for this objective"):
        short(tmp_path / "run", **{**sections, "objective": {"kind": "supervised"}})
