# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning through the geometry, beside supervision and beside gradients that stop at the arg-max.

python -m benchmarks.end_to_end --photos FOLDER [--task homography] [--change blur] [--steps 80]

Image 1 of every pair changes its look. The embedded ``small`` model is tuned for it in several ways from the same
start, on the same pairs in the same order: through matches -> model -> loss with straight-through (``end_to_end``) and
hard (``hard``) gradients, by true matches (``supervised``), and by the reward of matches that are drawn (``reward``).
Every fourth photograph is held out: the accuracy is that on pairs rendered from those. ``--validate`` renders them from
the training photographs instead, for choosing learning rates. Each variant is written to the JSON file as soon as it is
done; one that is there is not run again. A run that was stopped goes on from its last ten steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from kornia.filters import gaussian_blur2d
from safetensors.torch import save_file
from torch import Tensor

from eloftr_ops import EfficientLoFTR, __version__
from eloftr_ops.config import GradientMode
from eloftr_ops.data import (
    HomographyBatch,
    HomographyConfig,
    HomographyPairs,
    PhotometricConfig,
    PhotoTextures,
    SyntheticConfig,
)
from eloftr_ops.data.scenes import SceneBatch, SceneConfig, ScenePairs
from eloftr_ops.geometry import (
    apply_homography,
    estimate_robust,
    homography_from_matches,
    relative_pose_from_matches,
)
from eloftr_ops.losses import corner_error_loss, rotation_angle, translation_direction_angle
from eloftr_ops.training.batches import batch_of_rendered
from eloftr_ops.training.config import LossConfig
from eloftr_ops.training.end_to_end import EndToEndConfig, finite_step, homography_objective, pose_objective
from eloftr_ops.training.expected_reward import ObjectiveConfig
from eloftr_ops.training.objective import batch_losses, loss_sums, no_labels, term_weights

Points = tuple[Tensor, Tensor, Tensor]  # keypoints0, keypoints1, batch_indexes

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "invert": lambda x: 1 - x,
    "solarise": lambda x: (2 * x - 1).abs(),
    "blur": lambda x: gaussian_blur2d(x, (31, 31), (5.0, 5.0)),
    "low_contrast": lambda x: 0.45 + 0.1 * x,
    "thermal": lambda x: 0.8 - 0.6 * gaussian_blur2d((1.4 * x - 0.4).abs(), (9, 9), (1.5, 1.5)),
}
MODES: dict[str, GradientMode] = {"end_to_end": "straight_through", "hard": "hard", "soft": "soft"}
REWARDS = {
    "homography": ObjectiveConfig(kind="homography_reward"),
    "pose": ObjectiveConfig(kind="pose_reward", scale=20.0, cell_threshold=5.0, backend="poselib"),
}
THROUGH = {"homography": 0.2, "pose": 5.0}  # weight of the straight-through loss, where it stands beside the reward
ABLATIONS: dict[str, dict[str, Any]] = {
    "reward": {},
    "reward_and_through": {"through": True},
    "reward_cells": {"windows": 0},
    "reward_one_draw": {"draws": 1, "baseline": False},
    "reward_no_penalty": {"penalty": 0.0},
    "reward_one_model": {"hypotheses": 2},
}
THRESHOLDS = {"homography": (3.0, 5.0, 10.0), "pose": (5.0, 10.0, 20.0)}  # pixels; degrees
ROBUST_SCALE = 4.0  # pixels; of the estimator that is tuned through
ESTIMATORS = {"linear": "least squares", "robust": "Cauchy", "consensus": "MAGSAC++"}
HOMOGRAPHIES = HomographyConfig(
    rotation_sigma=8.0,
    rotation_max=20.0,
    scale=(0.8, 1.25),
    anisotropy=1.1,
    translation=0.12,
    perspective=0.1,
    min_overlap=0.5,
)
SCENES = SceneConfig(yaw=20.0, pitch=8.0, roll=10.0, distance_ratio=1.2, min_overlap=0.5, photometric=None)
MILD = PhotometricConfig(gamma=1.3, contrast=1.2, illumination=0.15, noise_sigma=0.01, jpeg_probability=0.0)


class Errors(NamedTuple):
    """Of the model estimated for each pair, infinite where there is none, in the unit of the task."""

    linear: Tensor  # (N,) weighted least squares
    robust: Tensor  # (N,) the same with a Cauchy kernel
    consensus: Tensor  # (N,) MAGSAC++, which sees no confidence
    matches: float  # per pair
    precision: float  # share of matches within 3 pixels of the truth; not a number for scenes


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    photos = list(PhotoTextures(options.photos, max_side=768))
    tuning = [photo for k, photo in enumerate(photos) if k % 4]
    held_out = tuning if options.validate else photos[::4]
    path: Path = options.json
    record = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    record["setup"] = _setup(options, len(tuning), len(held_out))
    results = record.setdefault("results", {})
    for variant in ("start", *options.variants):
        if variant in results:
            continue
        results[variant] = run(variant, options, tuning, held_out)
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(variant, {k: v for k, v in results[variant].items() if k != "losses"}, flush=True)
    print(table(record))


def run(variant: str, options: argparse.Namespace, tuning: list[Tensor], held_out: list[Tensor]) -> dict[str, Any]:
    """Tune a fresh copy of the start as ``variant`` says and measure it."""
    torch.manual_seed(options.seed)
    model = EfficientLoFTR.from_pretrained(options.weights)
    released = model.config
    family = "reward" if variant in ABLATIONS else variant
    started, rate = time.monotonic(), options.rates.get(variant, options.rates.get(family, 0.0))
    losses: list[float] = []
    if variant != "start":
        model.config = released.replace(threshold=options.threshold, soft_neighbourhood=options.neighbourhood)
        losses = tune(model, variant, rate, options, renderer(options.task, tuning))
        model.config = released
        if options.models is not None:
            options.models.mkdir(parents=True, exist_ok=True)
            save_file(model.state_dict(), options.models / f"{variant}.safetensors")
    seconds = time.monotonic() - started
    source = renderer(options.task, held_out)
    result: dict[str, Any] = {"rate": rate, "seconds": round(seconds), "losses": losses}
    for change in dict.fromkeys((options.change, "none")):
        errors = measure(model, options, source, change)
        result[change] = summary(errors, THRESHOLDS[options.task])
    return result


def renderer(task: str, textures: list[Tensor]) -> HomographyPairs | ScenePairs:
    """Pairs of mild geometry and look, so that the change of look is what is hard."""
    if task == "pose":
        return ScenePairs(textures, SCENES)
    return HomographyPairs(
        textures,
        SyntheticConfig(homography=HOMOGRAPHIES, zoom=(0.6, 2.0), border_probability=0.0, photometric=MILD),
    )


def tune(
    model: EfficientLoFTR,
    variant: str,
    rate: float,
    options: argparse.Namespace,
    source: HomographyPairs | ScenePairs,
) -> list[float]:
    """Adam, ten steps of warm-up, linear decay to zero; BatchNorm keeps its statistics. Returns the losses."""
    model.eval()
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=rate)
    losses: list[float] = []
    state: Path = options.json.with_suffix(f".{variant}.pt")
    if state.exists():
        model_state, optimizer_state, losses = torch.load(state, weights_only=True)
        model.load_state_dict(model_state)
        optimizer.load_state_dict(optimizer_state)
    for step in range(len(losses), options.steps):
        optimizer.param_groups[0]["lr"] = rate * min((step + 1) / 10, 1 - step / options.steps, 1.0)
        generator = torch.Generator().manual_seed((options.seed << 32) + step)
        batch = source.sample(options.batch, (options.size, options.size), generator)
        loss = objective(model, variant, batch, changed(batch.image1, options), generator)
        taken = loss.requires_grad and finite_step(optimizer, loss, parameters)
        losses.append(round(float(loss.detach()), 4))
        if step % 10 == 0 or not taken:
            print(f"{variant} {step}: {losses[-1]}{'' if taken else ' (no step)'}", flush=True)
        if len(losses) % 10 == 0:
            torch.save((model.state_dict(), optimizer.state_dict(), losses), state)
    state.unlink(missing_ok=True)
    return losses


def changed(image1: Tensor, options: argparse.Namespace) -> Tensor:
    """The look of image 1 changed in all pairs of a batch but the last ``options.plain``."""
    kept = len(image1) - options.plain
    return torch.cat([CHANGES[options.change](image1[:kept]), image1[kept:]])


def objective(
    model: EfficientLoFTR,
    variant: str,
    batch: HomographyBatch | SceneBatch,
    image1: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """The loss that a variant goes down, with another image 1."""
    if variant == "supervised":
        if isinstance(batch, SceneBatch):
            raise ValueError("variant: supervised tuning is that of the homography task.")
        config = LossConfig(windows=128, fine_weight=0.25)
        seeds = torch.randint(2**62, (len(image1),), generator=generator).tolist()
        losses = batch_losses(model, batch_of_rendered(batch._replace(image1=image1), seeds), config)
        return losses.coarse + config.fine_weight * (losses.pixel + config.subpixel_weight * losses.subpixel)
    if variant.startswith("reward"):
        return reward_loss(model, variant, batch, image1, generator)
    through = EndToEndConfig(mode=MODES[variant], robust="cauchy", robust_scale=ROBUST_SCALE)
    if isinstance(batch, SceneBatch):
        return pose_objective(model, batch.image0, image1, batch.K0, batch.K1, batch.T_0to1, through).loss
    return homography_objective(model, batch.image0, image1, batch.H_0to1, through).loss


def reward_loss(
    model: EfficientLoFTR,
    variant: str,
    batch: HomographyBatch | SceneBatch,
    image1: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """By drawn matches; with ``through`` by the straight-through loss, too, of pairs by their reward."""
    task = "pose" if isinstance(batch, SceneBatch) else "homography"
    changes = dict(ABLATIONS[variant])
    through = THROUGH[task] if changes.pop("through", False) else 0.0
    config = dataclasses.replace(REWARDS[task], **changes)
    estimator = EndToEndConfig(robust="cauchy", robust_scale=ROBUST_SCALE)
    losses = LossConfig(end_to_end=estimator, **{f"{task}_weight": through})
    seeds = torch.randint(2**62, (len(image1),), generator=generator).tolist()
    pairs = batch_of_rendered(batch._replace(image1=image1), seeds)
    sums, reward = loss_sums(model, pairs, no_labels(pairs), losses, config)
    print(f"{float(reward) / len(image1):.2f}", end=" ", flush=True)
    return (sums * sums.new_tensor(term_weights(losses, config))).sum() / len(image1)


@torch.no_grad()
def measure(
    model: EfficientLoFTR, options: argparse.Namespace, source: HomographyPairs | ScenePairs, change: str
) -> Errors:
    """Errors of the models estimated from hard matches on freshly rendered pairs, the same in every call."""
    generator = torch.Generator().manual_seed(options.seed + 12345)
    found: list[list[Tensor]] = []
    precise, matches = 0, 0
    for _ in range(options.pairs // 8):
        batch = source.sample(8, (options.size, options.size), generator)
        out = model({"image0": batch.image0, "image1": CHANGES[change](batch.image1)}, mode="hard")
        points = (out["keypoints0"], out["keypoints1"], out["batch_indexes"])
        matches += len(points[0])
        if isinstance(batch, SceneBatch):
            errors = _pose_errors(batch, points, out["confidence"])
        else:
            errors = _homography_errors(batch, points, out["confidence"])
            true = apply_homography(batch.H_0to1[points[2]], points[0][:, None])[:, 0]
            precise += int((torch.linalg.vector_norm(true - points[1], dim=-1) < 3).sum())
        found.append(errors)
    count = 8 * (options.pairs // 8)
    precision = precise / max(1, matches) if options.task == "homography" else float("nan")
    linear, robust, consensus = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Errors(linear, robust, consensus, matches / count, precision)


def summary(errors: Errors, thresholds: tuple[float, ...]) -> dict[str, Any]:
    """Plain data: area under the recall curve per threshold, in percent, and what explains it."""
    return {
        **{
            name: [round(100 * area_under_recall(getattr(errors, name), t), 1) for t in thresholds]
            for name in ESTIMATORS
        },
        "matches": round(errors.matches, 1),
        "precision": None if errors.precision != errors.precision else round(errors.precision, 3),
    }


def area_under_recall(errors: Tensor, threshold: float) -> float:
    """Mean over error levels in [0, threshold] of the share of pairs below them, exactly."""
    return float((1 - errors / threshold).clamp(min=0).mean())


def table(record: dict[str, Any]) -> str:
    """Markdown, one row per variant."""
    setup = record["setup"]
    at = "/".join(f"{t:g}" for t in THRESHOLDS[setup["task"]])
    head = ["variant", "rate", *(f"AUC@{at}, {name}" for name in ESTIMATORS.values())]
    head += ["matches", "precision", "unchanged look, Cauchy"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, result in record["results"].items():
        changed, plain = result[setup["change"]], result["none"]
        cells = [name, f"{result['rate']:g}" if result["rate"] else ""]
        cells += [" / ".join(f"{x:.1f}" for x in changed[key]) for key in ESTIMATORS]
        precision = changed["precision"]
        cells += [f"{changed['matches']:.0f}", "" if precision is None else f"{precision:.2f}"]
        cells += [" / ".join(f"{x:.1f}" for x in plain["robust"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _homography_errors(batch: HomographyBatch, points: Points, confidence: Tensor) -> list[Tensor]:
    count, size = len(batch.image0), (batch.image0.shape[-2], batch.image0.shape[-1])
    consensus = estimate_robust(*points, batch_size=count, model="homography")
    found = [(consensus.model_0to1, consensus.valid)]
    for kernel in ("cauchy", None):
        estimate = homography_from_matches(*points, batch_size=count, weights=confidence, robust=kernel)
        found.insert(0, (estimate.H_0to1, estimate.valid))
    return [
        torch.where(valid, corner_error_loss(H, batch.H_0to1, size, reduction="none"), torch.inf) for H, valid in found
    ]


def _pose_errors(batch: SceneBatch, points: Points, confidence: Tensor) -> list[Tensor]:
    consensus = estimate_robust(*points, batch_size=len(batch.K0), model="pose", K0=batch.K0, K1=batch.K1)
    found = [(consensus.model_0to1, consensus.valid)]
    for kernel in ("cauchy", None):
        estimate = relative_pose_from_matches(
            *points[:2], batch.K0, batch.K1, points[2], weights=confidence, robust=kernel
        )
        found.insert(0, (estimate.T_0to1, estimate.valid))
    errors = []
    for T, valid in found:
        turn = rotation_angle(T[:, :3, :3], batch.T_0to1[:, :3, :3])
        slide = translation_direction_angle(T[:, :3, 3], batch.T_0to1[:, :3, 3])
        errors.append(torch.where(valid, torch.rad2deg(torch.maximum(turn, slide)), torch.inf))
    return errors


def _setup(options: argparse.Namespace, tuning: int, held_out: int) -> dict[str, Any]:
    local = ("photos", "json", "models", "weights", "variants", "rates")
    objective_options = dataclasses.asdict(EndToEndConfig(robust="cauchy", robust_scale=ROBUST_SCALE))
    del objective_options["mode"]
    return {
        **{key: value for key, value in vars(options).items() if key not in local},
        "weights": _fingerprint(EfficientLoFTR.from_pretrained(options.weights)),
        "photos": {"tuning": tuning, "held_out": held_out},
        "objective": objective_options,
        "versions": {"torch": torch.__version__, "eloftr_ops": __version__},
    }


def _fingerprint(model: EfficientLoFTR) -> str:
    """Of the parameters and buffers, so that a number can be told from one of other weights."""
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()[:16]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--task", choices=list(THRESHOLDS), default="homography")
    parser.add_argument("--change", choices=list(CHANGES), default="blur", help="of the look of image 1")
    parser.add_argument("--variants", nargs="*", default=None, help="reward, end_to_end, hard, soft, supervised")
    parser.add_argument("--rates", nargs="*", default=[], metavar="VARIANT=RATE", help="learning rates")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--plain", type=int, default=0, help="pairs of a batch whose look does not change")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--pairs", type=int, default=192, help="held-out pairs measured")
    parser.add_argument("--threshold", type=float, default=0.05, help="of the matches that are tuned through")
    parser.add_argument(
        "--neighbourhood", type=int, default=1, help="cells of the coarse expectation that is tuned through"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", default="small", help="start, as EfficientLoFTR.from_pretrained takes it")
    parser.add_argument("--validate", action="store_true", help="measure on training photographs")
    parser.add_argument("--models", type=Path, default=None, help="folder for the tuned weights")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    options.rates = {**RATES[options.task], **{k: float(v) for k, v in (x.split("=") for x in options.rates)}}
    options.variants = list(RATES[options.task]) if options.variants is None else options.variants
    name = f"end_to_end_{options.task}_{options.change}_{options.seed}.json"
    options.json = options.json or Path("benchmarks/results") / name
    return options


RATES = {  # chosen on training photographs, see docs/tutorials/end_to_end.md
    "homography": {"reward": 3e-4, "end_to_end": 1e-4, "hard": 1e-4, "supervised": 3e-4},
    "pose": {"reward": 3e-4, "end_to_end": 1e-4, "hard": 1e-4},
}


if __name__ == "__main__":
    main()
