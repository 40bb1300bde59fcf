# SPDX-License-Identifier: Apache-2.0
"""Whole runs in one process: they resume, skip bad steps, keep to a budget and export what can be loaded."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eloftr_ops import EfficientLoFTR
from eloftr_ops.data import procedural_textures
from eloftr_ops.training.budget import parse_duration
from eloftr_ops.training.config import OptimizerConfig, TrainingConfig
from eloftr_ops.training.data import PairMixture, Textures
from eloftr_ops.training.loop import build_fabric, build_model, train
from eloftr_ops.training.optimization import averaged, learning_rate
from eloftr_ops.training.trainer import Trainer
from support.models import tiny_model
from support.pair_files import save_image
from support.training_runs import blank_pair, exact, gradients, losses, short


def _trainer(config: TrainingConfig) -> tuple[Trainer, PairMixture]:
    mixture = PairMixture(config.data, Textures(config.data, 0.0, 0), 0)
    return Trainer(config, build_fabric(config), build_model(config.model, 0)), mixture


def _state(trainer: Trainer) -> dict[str, torch.Tensor]:
    both = {"model": trainer.matcher.state_dict(), "average": trainer.average.state_dict()}
    return {f"{k}.{n}": value.clone() for k, values in both.items() for n, value in values.items()}


def test_interrupted_and_resumed_is_uninterrupted(tmp_path: Path) -> None:
    """Cut after a step past the last checkpoint, whose log lines are forgotten; and the loss falls."""
    whole = train(short(tmp_path / "whole"))
    cut = train(short(tmp_path / "cut"), until=5)
    assert (cut.step, cut.finished) == (5, False)
    resumed = train(short(tmp_path / "cut"))
    assert resumed.finished
    expected = losses(tmp_path / "whole")
    assert losses(tmp_path / "cut") == pytest.approx(expected, rel=1e-5)
    assert expected["6 loss"] < expected["1 loss"]
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=1e-5, atol=1e-7)


def test_a_non_finite_step_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, mixture = _trainer(short(tmp_path))
    part = [mixture[(0, 0)]]
    assert trainer.take_step(part).taken
    before = _state(trainer)
    with monkeypatch.context() as broken:
        broken.setattr("eloftr_ops.training.objective.term_weights", lambda *_: [math.inf, 0.5, 0.5, 0.0, 0.0, 0.0])
        result = trainer.take_step(part)
    assert (result.finite, result.taken, trainer.skipped, trainer.bad_in_a_row) == (False, False, 1, 1)
    after = _state(trainer)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert trainer.take_step(part).taken
    assert (trainer.skipped, trainer.bad_in_a_row) == (1, 0)


def test_the_sums_of_a_step_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reading waits for the device."""
    trainer, _ = _trainer(short(tmp_path))
    sums = torch.tensor([6.0, 4.0, 9.0, 0.0, 0.0, 0.0, 1.5], dtype=torch.float64)
    counts = torch.tensor([3, 2, 2, 1, 0, 0])
    read = []

    def counted(name: str, function: Callable[..., object]) -> Callable[..., object]:
        return lambda *given: (read.append(name), function(*given))[1]

    with monkeypatch.context() as counting:
        for name in ("item", "tolist", "__float__", "__int__", "__bool__"):
            counting.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
        result = trainer._result(sums, counts)
    assert read == ["tolist"]
    assert list(result.losses.values()) == [2.0, 2.0, 4.5, 0.0, 0.0, 0.0]
    assert (result.confidence, result.pairs, result.finite) == (0.5, 3, True)
    assert not trainer._result(sums.index_fill(0, torch.tensor(6), math.nan), counts).finite


def test_a_step_without_any_true_pair_changes_no_weights(tmp_path: Path) -> None:
    trainer, mixture = _trainer(short(tmp_path))
    trainer.take_step([mixture[(0, 0)]])  # an optimiser with momentum would go on by itself
    before = {name: value.clone() for name, value in trainer.matcher.named_parameters()}
    result = trainer.take_step([blank_pair((64, 64))])
    assert (result.finite, result.taken, result.pairs) == (True, False, 0)
    assert all(torch.equal(value, before[name]) for name, value in trainer.matcher.named_parameters())


def test_too_many_non_finite_steps_stop_the_run(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.transformer.layers[0].self_attention.merge.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"2 steps in a row.*optimizer\.learning_rate"):
        train(short(tmp_path, optimizer={"max_bad_steps": 2}), model=model)


def test_accumulated_parts_give_the_gradient_of_the_whole(tmp_path: Path) -> None:
    whole, parts = (gradients(exact(tmp_path, accumulate), "shares", 0, 1) for accumulate in (1, 3))
    for name, value in whole.items():
        tolerance = (1e-6 if name == "loss" else 1e-10) * max(1e-3, float(value.abs().max()))
        torch.testing.assert_close(parts[name], value, rtol=0, atol=tolerance, msg=name)


def test_a_budget_stops_the_run_with_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    seconds = itertools.count()  # each look at the clock takes a second
    config = short(tmp_path, run={"checkpoint_every": 100})
    stopped = train(config, budget=25.0, clock=lambda: float(next(seconds)))
    assert 1 <= stopped.step < 6
    assert next(seconds) <= 25
    assert train(config).finished
    assert len(losses(tmp_path)) == 2 * 6


def test_durations() -> None:
    assert [parse_duration(text) for text in ("90", "90s", "25m", "1h30m")] == [90, 90, 1500, 5400]
    for text in ("", "soon", "5 m", "0s", "-3m"):
        with pytest.raises(ValueError, match="budget"):
            parse_duration(text)


def test_the_folder_of_a_run_loads_as_the_best_and_the_last_weights(tmp_path: Path) -> None:
    config = short(tmp_path, validation={"every": 3}, run={"tensorboard": True})
    result = train(config)
    last = EfficientLoFTR.from_pretrained(tmp_path / "last")
    assert all(torch.equal(result.model.state_dict()[n], v) for n, v in last.state_dict().items())
    assert EfficientLoFTR.from_pretrained(tmp_path).config == last.config == result.model.config
    assert result.best_score >= 0
    assert any((tmp_path / "tensorboard").iterdir())
    assert train(config).step == 6  # nothing left to do


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    train(short(tmp_path, run={"steps": 2}))
    changes = {"changes": {**tiny_model().config.to_dict(), "stage_channels": [8, 12, 16, 64]}}
    with pytest.raises(ValueError, match=r"expected the state of this configuration's model"):
        train(short(tmp_path, model=changes))


def test_similarity_scores_and_synchronised_statistics_need_other_settings(tmp_path: Path) -> None:
    changes = tiny_model().config.replace(score="similarity", threshold=1.0).to_dict()
    with pytest.raises(ValueError, match="expected score dual_softmax"):
        train(short(tmp_path, model={"changes": changes}))
    with pytest.raises(ValueError, match="freeze_batch_norm"):
        train(short(tmp_path, model={"sync_batch_norm": True}))


def test_reduced_precision_trains(tmp_path: Path) -> None:
    config = short(tmp_path, run={"precision": "bf16-mixed"}, model={"channels_last": True})
    trainer, mixture = _trainer(config)
    before = _state(trainer)
    for step in range(4):
        result = trainer.take_step([mixture[(step, 0)]])
        assert result.finite
    after = _state(trainer)
    assert any(not torch.equal(after[n], v) for n, v in before.items() if n.startswith("model.pyramid"))


def test_before_the_fine_stage_the_pyramid_is_left_alone(tmp_path: Path) -> None:
    trainer, mixture = _trainer(short(tmp_path, loss={"fine_from": 1}))
    before = _state(trainer)
    trainer.take_step([mixture[(0, 0)]])
    after = _state(trainer)
    assert all(torch.equal(after[n], v) for n, v in before.items() if n.startswith("model.pyramid"))


def test_a_frozen_batch_norm_keeps_its_statistics(tmp_path: Path) -> None:
    for frozen in (True, False):
        trainer, mixture = _trainer(short(tmp_path, model={"freeze_batch_norm": frozen}))
        before = _state(trainer)
        trainer.take_step([mixture[(0, 0)]])
        kept = [torch.equal(_state(trainer)[n], v) for n, v in before.items() if "running" in n]
        assert all(kept) == frozen


def test_the_learning_rate_warms_up_and_follows_a_cosine() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, final_rate=0.01)
    rates = [learning_rate(step, 101, config) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.505)
    assert rates[100] == pytest.approx(0.01)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_groups_have_their_own_rates(tmp_path: Path) -> None:
    trainer, mixture = _trainer(short(tmp_path, optimizer={"pyramid_rate": 0.0, "weight_decay": 0.1}))
    before = dict(_state(trainer))
    trainer.take_step([mixture[(0, 0)]])
    changed = {n for n, p in trainer.matcher.named_parameters() if not torch.equal(p, before[f"model.{n}"])}
    assert changed
    assert not any(name.startswith("pyramid") for name in changed)


def test_the_average_of_a_short_run_moves() -> None:
    model = tiny_model()
    average = averaged(model, decay=0.999)
    for _ in range(30):
        with torch.no_grad():
            model.backbone.stages[0][0].conv3x3.conv.weight.fill_(3.0)
        average.update_parameters(model)
    weight = average.module.backbone.stages[0][0].conv3x3.conv.weight
    assert float((weight.detach() - 3).abs().max()) < 0.1  # at 0.999 throughout, 97 % of the start would be left


def test_fine_tuning_needs_a_folder_of_images_only(tmp_path: Path) -> None:
    from typer import Typer
    from typer.testing import CliRunner

    from eloftr_ops.cli.train import train as command

    tiny_model().save_pretrained(tmp_path / "start")
    for number, texture in enumerate(procedural_textures(torch.Generator().manual_seed(0), 2, 256)):
        save_image(tmp_path / "images" / f"{number}.jpg", texture / 255)
    app = Typer()
    app.command()(command)
    arguments = ["--fine-tune", str(tmp_path / "start"), "--data", str(tmp_path / "images"), "--steps", "1"]
    done = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "tuned"), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "step 1 of 1: finished" in done.output
    tuned = EfficientLoFTR.from_pretrained(tmp_path / "tuned")
    assert tuned.config == tiny_model().config
    refused = CliRunner().invoke(app, ["--fine-tune", "small"])
    assert refused.exit_code == 2
    assert "--data" in refused.output
