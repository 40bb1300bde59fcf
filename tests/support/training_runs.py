# SPDX-License-Identifier: Apache-2.0
"""Small runs that several tests share; as a script, the process that kills itself and the processes of a group."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from eloftr_ops.data import ImagePair
from eloftr_ops.training import checkpoints
from eloftr_ops.training.batches import TrainingBatch, batch_of_labelled, join_batches
from eloftr_ops.training.config import TrainingConfig
from eloftr_ops.training.config_file import config_from_dict
from eloftr_ops.training.data import PairMixture, Textures, batches
from eloftr_ops.training.loop import build_fabric, build_model, train
from eloftr_ops.training.trainer import Trainer
from support.models import TINY

SHORT: dict[str, dict[str, Any]] = {
    "model": {"changes": TINY.to_dict()},
    "data": {
        "procedural": 2,
        "sources": [{"kind": "homographies"}, {"kind": "scenes"}],
        "homographies": {"photometric": None},
        "scenes": {"photometric": None},
        "sizes": [[64, 64], [64, 96]],
        "batch_pixels": 3 * 64 * 64,
    },
    "loss": {"windows": 8},
    "optimizer": {"warmup_steps": 2},
    "validation": {"every": 0, "pairs": 2, "size": [64, 64]},
    "run": {"steps": 6, "checkpoint_every": 2, "log_every": 1, "device": "cpu", "tensorboard": False},
}


def short(folder: Path, **changes: dict[str, Any]) -> TrainingConfig:
    """A run of seconds; ``changes`` are fields by section."""
    sections = {name: {**SHORT.get(name, {}), **changes.get(name, {})} for name in {**SHORT, **changes}}
    sections["run"]["folder"] = str(folder)
    return config_from_dict(sections)


def losses(folder: Path) -> dict[str, float]:
    """Loss and gradient norm of each step, as logged."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "loss" in record]
    assert len({r["step"] for r in records}) == len(records), "a step is in the log twice"
    return {f"{r['step']} {name}": r[name] for r in records for name in ("loss", "gradient_norm")}


def blank_pair(size: tuple[int, int]) -> TrainingBatch:
    """A pair whose homography takes everything off the image: no true match."""
    H = torch.eye(3)
    H[0, 2] = 1e4
    image = torch.rand(1, *size, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(size, dtype=torch.bool)
    pair = ImagePair(image, image, mask, mask, torch.ones(2), torch.ones(2), "blank", H_0to1=H)
    return batch_of_labelled(pair, size, 0)


def exact(folder: Path, accumulate: int = 1) -> TrainingConfig:
    """Float64, BatchNorm frozen: the partition changes nothing but rounding."""
    return short(
        folder,
        model={"freeze_batch_norm": True},
        optimizer={"accumulate": accumulate},
        data={"batch_pixels": 4 * 64 * 64},
        loss={"homography_weight": 0.01, "pose_weight": 0.1},
        run={"precision": "64-true"},
    )


def whole(folder: Path) -> TrainingConfig:
    """A whole run in float64: in float32 six steps of AdamW make percents of rounding."""
    return short(
        folder,
        model={"freeze_batch_norm": True},
        validation={"every": 3},
        run={"precision": "64-true"},
    )


def gradients(config: TrainingConfig, case: str, process: int, processes: int) -> dict[str, torch.Tensor]:
    """Gradients of the first step, by parameter; ``blank`` leaves true pairs to process 0 alone."""
    fabric = build_fabric(config)
    fabric.launch()
    mixture = PairMixture(config.data, Textures(config.data, 0.0, 0), 0)
    trainer = Trainer(config, fabric, build_model(config.model, 0))
    accumulate = config.optimizer.accumulate
    if case == "blank":
        own = [mixture[(0, position)] for position in (0, 1)]
        blank = [blank_pair(mixture.size_of(0))] * 2
        by_process = [own, blank] if processes == 2 else [own + blank]
        parts = [join_batches(by_process[process])]
    else:
        shares = batches(mixture, range(2), process=process, processes=processes, accumulate=accumulate)
        parts = [next(shares) for _ in range(accumulate)]
    result = trainer.gradients(parts)
    found = {n: p.grad.clone() for n, p in trainer.matcher.named_parameters() if p.grad is not None}
    return found | {"loss": torch.tensor(result.loss)}


def _killed(folder: Path) -> None:
    """SIGKILL in the middle of the checkpoint of step 4: its piece is there, its manifest is not."""
    write, written = checkpoints.write_file, []

    def write_until_killed(path: Path, content: bytes) -> None:
        write(path, content)
        written.append(path)
        if path.name == "step-00000004.000":
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints.write_file = write_until_killed
    train(short(folder))


def _group(folder: Path) -> None:
    """One of two processes: gradients of each case, then a whole run."""
    rank = int(os.environ["RANK"])
    found = {
        "shares": gradients(exact(folder), "shares", rank, 2),
        "accumulated": gradients(exact(folder, accumulate=2), "shares", rank, 2),
        "blank": gradients(exact(folder), "blank", rank, 2),
    }
    torch.save(found, folder / f"gradients{rank}.pt")
    torch.distributed.barrier()
    train(whole(folder / "run"))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"kill": _killed, "group": _group}[sys.argv[1]](Path(sys.argv[2]))
