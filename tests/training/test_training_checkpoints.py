# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: pieces, damage, code in them, and which are kept."""

import json
import pickle
from pathlib import Path

import pytest
import torch

from eloftr_ops.training.checkpoints import CheckpointError, load_checkpoint, save_checkpoint


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_pieces_join_to_what_was_saved(tmp_path: Path) -> None:
    weights = torch.rand(700_000)  # 2.8 MB
    save_checkpoint(tmp_path, 7, {"weights": weights, "count": 3}, piece_mib=1)
    sizes = [path.stat().st_size for path in tmp_path.glob("*.0*")]
    assert len(sizes) == 3
    assert max(sizes) == 2**20
    step, state = load_checkpoint(tmp_path)
    assert (step, state["count"]) == (7, 3)
    assert torch.equal(state["weights"], weights)


def test_the_last_two_are_kept_and_nothing_else(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "none") is None
    (tmp_path / "step-00000002.000").write_bytes(b"piece that a kill left without a manifest")
    for step in (1, 3, 5):
        save_checkpoint(tmp_path, step, {"step": step})
    expected = [f"step-0000000{step}.{end}" for step in (3, 5) for end in ("000", "json")]
    assert _names(tmp_path) == expected


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def _mistake_manifest(path: Path) -> None:
    path.with_suffix(".json").write_text('{"pieces": [3]}')


def _cut_manifest(path: Path) -> None:
    path.with_suffix(".json").write_text('{"pieces"')


@pytest.mark.parametrize("damage", [_truncate, _flip, _mistake_manifest, _cut_manifest, Path.unlink])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"step": step})
    damage(tmp_path / "step-00000002.000")
    with pytest.warns(UserWarning, match="step-00000002"):
        step, state = load_checkpoint(tmp_path)
    assert step == state["step"] == 1
    damage(tmp_path / "step-00000001.000")
    with (
        pytest.warns(UserWarning, match="step-0000000[12]"),
        pytest.raises(CheckpointError, match="Delete the folder"),
    ):
        load_checkpoint(tmp_path)


class _Hostile:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("executed"),)


def test_code_in_a_checkpoint_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    monkeypatch.chdir(tmp_path)
    content = pickle.dumps(_Hostile())
    (tmp_path / "step-00000001.000").write_bytes(content)
    manifest = [{"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}]
    (tmp_path / "step-00000001.json").write_text(json.dumps({"step": 1, "pieces": manifest}))
    with pytest.warns(UserWarning, match="passed over"), pytest.raises(CheckpointError):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "executed").exists()
