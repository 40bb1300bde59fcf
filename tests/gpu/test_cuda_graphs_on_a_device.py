# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of the matcher on a GPU; ``tests/inference/test_cuda_graphs.py`` has what can be tested without one."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from eloftr_ops import EfficientLoFTR
from support.models import random_images, tiny_model

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
pytestmark = needs_gpu
GPU = torch.device("cuda")
SIZE = (96, 128)


def matchers(dtype: torch.dtype | None = None, plain: EfficientLoFTR | None = None) -> tuple[Any, Any]:
    """With graphs, and without."""
    model = (plain or tiny_model(border_removal=0)).to(GPU)
    with_graphs = model.optimize_for_inference(dtype=dtype)
    return with_graphs, model.optimize_for_inference(dtype=dtype, cuda_graphs=False)


def images(seed: int = 0, batch: int = 1, size: tuple[int, int] = SIZE) -> dict[str, Tensor]:
    first = random_images(batch, *size, seed).to(GPU)
    return {"image0": first, "image1": 0.95 * first}


def masked(seed: int) -> dict[str, Tensor]:
    data = images(seed, 3)
    mask = torch.ones(3, *SIZE, dtype=torch.bool, device=GPU)
    mask[1, :, 64:] = False
    return {**data, "mask0": mask}


def of_two_sizes(seed: int) -> dict[str, Tensor]:
    data = images(seed, 2)
    return {"image0": data["image0"][..., :90, :100], "image1": data["image1"]}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], *, least: int = 10) -> None:
    """The same kernels: sums over one match may be split differently where the number of matches differs."""
    assert len(expected["confidence"]) >= least
    assert torch.equal(got["batch_indexes"], expected["batch_indexes"])
    for name in ("keypoints0", "keypoints1"):
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-3)
    torch.testing.assert_close(got["confidence"], expected["confidence"], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [images, masked, of_two_sizes])
def test_replayed_matches_are_those_of_launches(case: Any, dtype: torch.dtype) -> None:
    graphed, launched = matchers(dtype)
    for seed in range(3):
        assert_same(graphed(case(seed)), launched(case(seed)))
    assert graphed.cuda_graphs.off is None
    assert len(graphed.cuda_graphs) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_embedded_model_at_full_size(dtype: torch.dtype) -> None:
    graphed, launched = matchers(dtype, EfficientLoFTR.from_pretrained("small"))
    with torch.inference_mode():
        for batch in (1, 4):
            for seed in range(2):
                data = images(seed, batch, (480, 640))
                assert_same(graphed(data), launched(data), least=1000)
    assert len(graphed.cuda_graphs) == 2


def test_features_take_the_place_of_images() -> None:
    graphed, launched = matchers(torch.float16)
    kept = graphed.extract_features(images()["image0"])
    for seed in range(3):
        data = {"features0": kept, "image1": images(seed)["image1"]}
        assert_same(graphed(data), launched(data), least=0)
    assert graphed.cuda_graphs.off is None
    assert len(graphed.cuda_graphs) == 1


def test_autocast_has_its_own_capture() -> None:
    graphed, launched = matchers()
    for seed in range(2):
        assert_same(graphed(images(seed)), launched(images(seed)))
        with torch.autocast("cuda", torch.float16):
            assert_same(graphed(images(seed)), launched(images(seed)))
    assert len(graphed.cuda_graphs) == 2


def test_threads_with_streams_of_their_own() -> None:
    graphed, launched = matchers()
    given = [images(seed, 1 + seed % 2) for seed in range(6)]
    expected = [launched(data) for data in given]
    torch.cuda.synchronize()
    failures: list[BaseException] = []

    def work(first: int) -> None:
        try:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for step in range(30):
                    index = (first + step) % 6
                    torch.rand(1000, 1000, device=GPU).sum()  # work beside the capture
                    assert_same(graphed(given[index]), expected[index])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    assert graphed.cuda_graphs.off is None


def test_two_matchers_capture_at_the_same_time() -> None:
    pairs = [matchers() for _ in range(3)]
    found: dict[int, dict[str, Tensor]] = {}

    def work(index: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            found[index] = pairs[index][0](images(index))
            torch.cuda.current_stream().synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, (graphed, launched) in enumerate(pairs):
        assert graphed.cuda_graphs.off is None
        assert_same(found[index], launched(images(index)))


def test_later_calls_leave_results_alone() -> None:
    graphed, launched = matchers()
    first = graphed(images(0))
    kept = {name: value.clone() for name, value in first.items()}
    for seed in range(1, 4):
        graphed(images(seed))
        graphed(images(seed, 2))
    assert all(torch.equal(first[name], value) for name, value in kept.items())
    assert_same(first, launched(images(0)))


@torch.no_grad()
def test_captures_follow_weights() -> None:
    graphed, launched = matchers()
    graphed(images())
    for change in (lambda p: p.mul_(0.9), lambda p: setattr(p, "data", 0.9 * p.data)):
        for matcher in (graphed, launched):
            for parameter in matcher.pyramid.parameters():
                change(parameter)
        assert_same(graphed(images()), launched(images()))
    graphed.cpu()
    on_cpu = graphed({name: x.cpu() for name, x in images().items()})
    assert len(on_cpu["confidence"]) > 0
    graphed.to(GPU)
    assert_same(graphed(images()), launched(images()))
    assert graphed.cuda_graphs.off is None


def test_memory_is_bounded() -> None:
    graphed, _ = matchers(torch.float16, EfficientLoFTR.from_pretrained("small"))
    graphed.cuda_graphs.limit = 2
    sizes = [(480, 640), (448, 640), (480, 576), (416, 640)]

    def rounds(count: int) -> int:
        for _ in range(count):
            for size in sizes:
                for _ in range(2):
                    graphed(images(0, 1, size))
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    before = rounds(1)
    assert len(graphed.cuda_graphs) == 2
    assert rounds(3) < 1.3 * before
    graphed.cuda_graphs.clear()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() < before


def test_a_part_that_waits_for_the_device_is_named_and_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    graphed, launched = matchers()
    pyramid = graphed.fine_features
    waiting = [True]

    def fine_features(*arguments: Any) -> Any:
        if waiting[0]:
            float(arguments[2].coarse0.sum())
        return pyramid(*arguments)

    monkeypatch.setattr(graphed, "fine_features", fine_features)
    with pytest.warns(RuntimeWarning, match="CUDA graphs are off, a capture failed: HostWaitsError"):
        assert_same(graphed(images()), launched(images()))
    assert_same(graphed(images(1)), launched(images(1)))
    waiting[0], graphed.cuda_graphs.off = False, None
    assert_same(graphed(images(2)), launched(images(2)))
    assert len(graphed.cuda_graphs) == 1


def test_a_failure_during_the_capture_is_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    graphed, launched = matchers()
    pyramid = graphed.fine_features

    def fine_features(*arguments: Any) -> Any:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("not while capturing")
        return pyramid(*arguments)

    monkeypatch.setattr(graphed, "fine_features", fine_features)
    stream = torch.cuda.current_stream()
    with pytest.warns(RuntimeWarning, match="not while capturing"):
        assert_same(graphed(images()), launched(images()))
    assert torch.cuda.current_stream() == stream
    other, _ = matchers()
    assert_same(other(images(1)), launched(images(1)))
    assert other.cuda_graphs.off is None
