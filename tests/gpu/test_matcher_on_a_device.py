# SPDX-License-Identifier: Apache-2.0
"""What must hold on a GPU; without one the same code runs on the CPU, but for CUDA graphs."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import eloftr_kernels
from benchmarks.gates import agreement
from benchmarks.golden import golden_model, image, reference
from benchmarks.kernels import graphed
from eloftr_ops import EfficientLoFTR
from support.models import random_images, tiny_model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="CUDA graphs and streams need a GPU")


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """Float32 convolutions and products without TF32, which keeps 10 bits."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    yield
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.set_float32_matmul_precision(products)


def pair(seed: int = 0) -> dict[str, torch.Tensor]:
    first = random_images(1, 96, 128, seed)
    return {"image0": first.to(DEVICE), "image1": first.roll(8, -1).to(DEVICE)}


def to_cpu(matches: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.cpu() for key, value in matches.items()}


def test_the_golden_matches_are_those_of_the_authors_code() -> None:
    model = golden_model().to(DEVICE)
    with torch.no_grad():
        found = to_cpu(model({f"image{side}": image(f"image{side}", 0).to(DEVICE) for side in "01"}))
    names = {"keypoints0": "keypoints0", "keypoints1": "keypoints1", "confidence": "mconf"}
    truth = {key: torch.from_numpy(reference()[f"single/{name}"]) for key, name in names.items()}
    truth["batch_indexes"] = torch.zeros(len(truth["confidence"]), dtype=torch.int64)
    assert len(truth["confidence"]) > 100
    assert agreement(found, truth) > 0.99


def test_small_matches_as_on_a_cpu() -> None:
    model = EfficientLoFTR.from_pretrained("small")
    with torch.no_grad():
        expected = model({key: value.cpu() for key, value in pair().items()})
        found = to_cpu(model.to(DEVICE)(pair()))
    assert len(expected["confidence"]) > 50
    assert agreement(found, expected) > 0.99


def gradient_of(model: EfficientLoFTR, given: dict[str, torch.Tensor]) -> torch.Tensor:
    picture = given["image0"].clone().requires_grad_()
    found = model({**given, "image0": picture}, mode="straight_through")
    weights = torch.linspace(-1, 1, len(found["confidence"]), device=picture.device)
    value = (found["keypoints0"].sum(1) + found["keypoints1"].sum(1) + found["confidence"]) @ weights
    (gradient,) = torch.autograd.grad(value, picture)
    return gradient.cpu()


def test_image_gradients_are_those_of_a_cpu() -> None:
    model = EfficientLoFTR.from_pretrained("small")
    expected = gradient_of(model, {key: value.cpu() for key, value in pair().items()})
    found = gradient_of(model.to(DEVICE), pair())
    assert expected.norm() > 0
    assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.99
    assert found.norm() == pytest.approx(float(expected.norm()), rel=0.05)


def test_threads_do_not_disturb_one_another() -> None:
    """Two threads, each on a stream of its own where there are streams."""
    model = tiny_model().to(DEVICE)
    pairs = [pair(seed) for seed in range(4)]

    def match(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            if DEVICE.type == "cpu":
                return model(given)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.default_stream())
            with torch.cuda.stream(stream):
                found = model(given)
            stream.synchronize()
            return found

    expected = [match(given) for given in pairs]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(match, pairs * 3))
    for index, matches in enumerate(found):
        assert len(matches["confidence"]) > 0
        assert agreement(matches, expected[index % 4]) == 1


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_cuda_graph_of_an_op_sees_new_input(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(1, 300, 96, generator=generator).to(DEVICE, dtype) for _ in range(3)]
    first, second, changed = features
    with eloftr_kernels.backend("triton"), torch.no_grad():
        replay = graphed(lambda: eloftr_kernels.dual_softmax_lse(first, second, 1.0))
        first.copy_(changed)
        row_lse, col_lse = replay()
        expected = eloftr_kernels.dual_softmax_lse(changed, second, 1.0)
    assert torch.equal(row_lse, expected[0])
    assert torch.equal(col_lse, expected[1])
