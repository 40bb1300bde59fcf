# SPDX-License-Identifier: Apache-2.0
"""Tiny models behind transformers' classes, and both image processors."""

from types import SimpleNamespace

import pytest
import torch
from transformers import image_processing_backends as backends
from transformers.image_utils import PILImageResampling
from transformers.utils import is_torchvision_available

import eloftr_ops.integrations.transformers as interface
from eloftr_ops.integrations.transformers import image_processing
from support.models import random_images, tiny_model


def tiny_interface(model_class=interface.EfficientLoFTRForKeypointMatching, **changes):
    """A tiny model with random weights, in evaluation mode."""
    source = tiny_model(**{"temperature": 10.0, "border_removal": 1, **changes})  # random weights then match
    model = model_class(interface.EfficientLoFTRConfig.from_eloftr_ops(source.config)).eval()
    model.matcher.load_state_dict(source.state_dict())
    return model


def pairs(batch=1, height=64, width=96, seed=0):
    """(B, 2, 3, H, W): a texture and itself, four pixels further; gray in three channels."""
    texture = random_images(batch, height + 8, width + 8, seed)
    both = torch.stack([texture[..., 4:-4, 4:-4], texture[..., 8:, 8:]], 1)
    return both.expand(-1, -1, 3, -1, -1).contiguous()


def operator_input(pixel_values):
    """The same pairs as the operator takes them."""
    return {"image0": pixel_values[:, 0, :1], "image1": pixel_values[:, 1, :1]}


@pytest.fixture
def model():
    return tiny_interface()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny_interface().save_pretrained(folder)
    interface.EfficientLoFTRImageProcessorPil().save_pretrained(folder)
    return folder


@pytest.fixture(params=["pil", "torchvision"])
def processor_class(request, monkeypatch):
    """Both processors; where torchvision is not installed, PyTorch's own interpolation stands in for its resize."""
    if request.param == "pil":
        return interface.EfficientLoFTRImageProcessorPil
    if not is_torchvision_available():
        names = {PILImageResampling.BILINEAR: "bilinear", PILImageResampling.BICUBIC: "bicubic"}
        modes = SimpleNamespace(BILINEAR="bilinear", LANCZOS="lanczos", BICUBIC="bicubic")
        stand_in = SimpleNamespace(resize=_resize, InterpolationMode=modes)
        monkeypatch.setattr(backends, "tvF", stand_in, raising=False)
        monkeypatch.setattr(backends, "pil_torch_interpolation_mapping", names)
        monkeypatch.setattr(image_processing, "is_torchvision_available", lambda: True)
    return interface.EfficientLoFTRImageProcessor


def _resize(image, size, interpolation, antialias):
    values = image.float()[None]
    resized = torch.nn.functional.interpolate(values, size, mode=interpolation, antialias=antialias)[0]
    return resized if image.is_floating_point() else resized.round().clamp(0, 255).to(image.dtype)
