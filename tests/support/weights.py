# SPDX-License-Identifier: Apache-2.0
"""Small models with weights that leave no entry at its initial value."""

import json
from pathlib import Path

import safetensors.torch
import torch

from eloftr_ops import EfficientLoFTR, EfficientLoFTRConfig


def tiny_config(**changes: object) -> EfficientLoFTRConfig:
    fields = {
        "stage_channels": (8, 8, 16, 32),
        "stage_blocks": (1, 2, 1, 1),
        "num_layers": 1,
        "num_heads": 2,
        "subpixel_channels": 4,
    }
    return EfficientLoFTRConfig(**{**fields, **changes})  # type: ignore[arg-type]


def tiny_model(config: EfficientLoFTRConfig | None = None) -> EfficientLoFTR:
    """Random weights and BatchNorm statistics, in evaluation mode."""
    model = EfficientLoFTR(config or tiny_config())
    randomise(model)
    return model.eval()


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Fan-in scaled weights, affine terms near (1, 0), statistics near (0, 1), counters at 7."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            tensor.fill_(7)
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor.copy_(noise)  # large: attention picks tokens, so that positions and heads matter
        elif tensor.dim() > 1:
            tensor.copy_(noise * (2 / tensor[0].numel()) ** 0.5)
        elif name.endswith("running_var"):
            tensor.copy_(1 + 0.1 * noise.abs())
        else:
            tensor.copy_(0.1 * noise + name.endswith("weight"))


def same_weights(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    """Equal names, dtypes and values."""
    mine, other = first.state_dict(), second.state_dict()
    return mine.keys() == other.keys() and all(
        mine[name].dtype == other[name].dtype and torch.equal(mine[name], other[name]) for name in mine
    )


def image_pair(height: int = 96, width: int = 128) -> torch.Tensor:
    """(2, 1, H, W): smooth random texture, and itself moved by (8, 16) pixels."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(1, 1, (height + 16) // 4, (width + 16) // 4, generator=generator)
    large = torch.nn.functional.interpolate(coarse, size=(height + 16, width + 16), mode="bicubic").clamp(0, 1)
    return torch.cat([large[..., :height, :width], large[..., 16:, 8 : width + 8]])


def shard(folder: Path, suffix: str = "safetensors") -> None:
    """Split the ``model.safetensors`` of a folder in two, as transformers names them; no metadata."""
    state = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    places = {}
    for number in (1, 2):
        name = f"{stem}-{number:05d}-of-00002.{suffix}"
        part = {key: state[key] for key in sorted(state)[number - 1 :: 2]}
        if suffix == "safetensors":
            safetensors.torch.save_file(part, folder / name)
        else:
            torch.save(part, folder / name)
        places |= dict.fromkeys(part, name)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
