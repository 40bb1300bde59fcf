# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of the matcher, with a backend that records and repeats on the CPU: the plain matcher's matches."""

import copy
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from eloftr_ops import EfficientLoFTR
from eloftr_ops.inference.capture import HostWaitsError, NoWaiting
from eloftr_ops.inference.cuda_graphs import CudaGraphs
from support.models import random_images, tiny_model
from support.replay import RecordingBackend, as_on_a_gpu

SIZE = (64, 96)
CPU = torch.device("cpu")


class Pair:
    """A matcher that replays, and one that does not, of the same weights."""

    def __init__(self, limit: int = 8, **changes: Any) -> None:
        model = tiny_model(**{"border_removal": 0, "num_layers": 1, **changes})
        self.backend = RecordingBackend()
        self.fast = model.optimize_for_inference()
        self.fast.cuda_graphs = CudaGraphs(limit, backend=self.backend)
        self.plain = model.optimize_for_inference(cuda_graphs=False)

    def assert_same(self, data: dict[str, Any], *, least: int = 1, **options: Any) -> dict[str, Tensor]:
        """Every field, bit for bit, in the same order."""
        expected, got = self.plain(data, **options), self.fast(data, **options)
        assert len(expected["confidence"]) >= least
        assert list(got) == list(expected)
        for name, value in expected.items():
            assert got[name].dtype == value.dtype
            assert torch.equal(got[name], value), name
        return got


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_gpu(monkeypatch)


def images(seed: int = 0, batch: int = 1, size: tuple[int, int] = SIZE) -> dict[str, Tensor]:
    first = random_images(batch, *size, seed)
    return {"image0": first, "image1": 0.95 * first}


def masked(seed: int, dtype: torch.dtype = torch.bool) -> dict[str, Tensor]:
    data = images(seed, 2)
    mask0, mask1 = torch.ones(2, *SIZE), torch.ones(2, *SIZE)
    mask0[0, :, 32 + 8 * seed :] = 0
    mask1[1, 40:] = 0
    return {**data, "mask0": mask0.to(dtype), "mask1": mask1.to(dtype)}


def of_two_sizes(seed: int) -> dict[str, Tensor]:
    data = images(seed, 2)
    return {"image0": data["image0"][..., :60, :90], "image1": data["image1"]}


CASES = {
    "one pair": images,
    "a batch": lambda seed: images(seed, 3),
    "two sizes, one of them completed": of_two_sizes,
    "masks": masked,
    "masks of numbers": lambda seed: masked(seed, torch.float32),
    "one mask": lambda seed: {k: v for k, v in masked(seed).items() if k != "mask0"},
}


@pytest.mark.parametrize("case", CASES)
def test_replays_give_the_plain_matches(case: str) -> None:
    pair = Pair()
    found = [pair.assert_same(CASES[case](seed), least=10) for seed in range(3)]
    assert (pair.backend.captures, pair.backend.replays) == (1, 3)
    assert not torch.equal(found[0]["keypoints0"], found[1]["keypoints0"])
    for seed, earlier in enumerate(found):  # a later replay leaves earlier results alone
        expected = pair.plain(CASES[case](seed))
        assert all(torch.equal(earlier[name], value) for name, value in expected.items())


def test_features_take_the_place_of_images() -> None:
    pair = Pair()
    for seed in range(2):
        data = images(seed, 2)
        kept = pair.fast.extract_features(data["image0"])
        pair.assert_same({"features0": kept, "image1": data["image1"]})
        small = pair.fast.extract_features(data["image1"][..., :50])  # completed: with a mask
        pair.assert_same({"features0": kept, "features1": small})
    assert pair.backend.captures == 2


def test_one_image_against_many_is_expanded() -> None:
    pair = Pair()
    one = pair.fast.extract_features(images()["image0"])
    expanded = {name: x.expand(3, -1, -1, -1) for name, x in one.items()}
    pair.assert_same({"features0": expanded, "image1": images(1, 3)["image1"]})


@pytest.mark.parametrize("mode", ["straight_through", "soft"])
def test_every_mode_has_its_own_capture(mode: Any) -> None:
    pair = Pair()
    for _ in range(2):
        pair.assert_same(images())
        pair.assert_same(images(), mode=mode)
    assert pair.backend.captures == 1 + (mode == "soft" or pair.plain.config.gradient_mode != mode)


def test_no_match_gives_empty_fields() -> None:
    pair = Pair(threshold=1.0)
    found = pair.assert_same(images(), least=0)
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "keypoints0": (0, 2), "keypoints1": (0, 2), "confidence": (0,), "batch_indexes": (0,)
    }  # fmt: skip


def test_inference_mode_and_autocast() -> None:
    pair = Pair()
    with torch.inference_mode():
        pair.assert_same(images())  # recorded here
    pair.assert_same(images(1))  # replayed there
    with torch.autocast("cpu", torch.bfloat16):
        pair.assert_same(images(2))
        pair.assert_same(images(3))
    pair.assert_same(images(4))
    assert (pair.backend.captures, pair.backend.replays) == (2, 5)


def test_the_least_recently_used_capture_goes_first() -> None:
    pair = Pair(limit=2)
    small, middle, large = (images(0, 1, size) for size in ((32, 64), (32, 96), (64, 64)))
    for data in (small, middle, small):
        pair.assert_same(data, least=0)
    assert (pair.backend.captures, len(pair.fast.cuda_graphs)) == (2, 2)
    pair.assert_same(large, least=0)  # met for the first time while all places are taken
    assert (pair.backend.captures, pair.backend.replays) == (2, 3)
    pair.assert_same(large, least=0)
    assert (pair.backend.captures, pair.backend.replays, len(pair.fast.cuda_graphs)) == (3, 4, 2)
    pair.assert_same(small, least=0)
    assert pair.backend.captures == 3  # middle went
    for _ in range(2):
        pair.assert_same(middle, least=0)
    assert pair.backend.captures == 4


def test_captures_can_wait_for_a_second_call() -> None:
    pair = Pair()
    pair.fast.cuda_graphs.at_once = False
    for captures in (0, 1, 1):
        pair.assert_same(images())
        assert pair.backend.captures == captures


def test_values_out_of_range_raise_as_without_graphs() -> None:
    pair = Pair()
    pair.assert_same(images())
    bright, unknown = images(1), images(1)
    bright["image1"] = 255 * bright["image1"]
    unknown["image0"] = unknown["image0"].clone()
    unknown["image0"][0, 0, 5, 5] = torch.nan
    for data, words in ((bright, "image1: expected values in"), (unknown, "image0: expected finite values")):
        for matcher in (pair.plain, pair.fast):
            with pytest.raises(ValueError, match=words):
                matcher(data)
    pair.assert_same(images(1))
    assert pair.fast.cuda_graphs.off is None
    assert pair.backend.captures == 1


def test_what_lies_under_a_mask_does_not_matter() -> None:
    pair = Pair()
    for seed in range(2):
        data = masked(seed)
        data["image0"][0, :, :, 90:] = torch.nan
        pair.assert_same(data)
    data["mask0"] = torch.ones_like(data["mask0"])
    with pytest.raises(ValueError, match="image0: expected finite values"):
        pair.fast(data)


def test_values_of_masks_and_features_are_checked_too() -> None:
    pair = Pair()
    data = masked(0, torch.float32)
    kept = pair.fast.extract_features(data["image0"])
    pair.assert_same(data)
    pair.assert_same({"features0": kept, "image1": data["image1"]})
    data["mask1"][0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="mask1: expected finite values"):
        pair.fast(data)
    kept["quarter"][0, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"features0\['quarter'\]: expected finite values"):
        pair.fast({"features0": kept, "image1": data["image1"]})


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ({"image0": torch.rand(1, 3, 64, 64), "image1": torch.rand(1, 1, 64, 64)}, ValueError, "one gray channel"),
        ({"image0": torch.rand(2, 1, 64, 64), "image1": torch.rand(1, 1, 64, 64)}, ValueError, "same batch size"),
        ({"image0": torch.rand(1, 1, 64, 64)}, ValueError, 'exactly one of "image1"'),
        ({"image0": torch.rand(1, 1, 64, 64), "image1": "a path"}, TypeError, "image1: expected a torch.Tensor"),
        ([1, 2], TypeError, "data: expected a dict"),
    ],
)  # fmt: skip
def test_mistakes_are_those_of_forward(data: Any, error: type[Exception], words: str) -> None:
    pair = Pair()
    with pytest.raises(error, match=words):
        pair.fast(data)
    with pytest.raises(ValueError, match="mode: expected one of"):
        pair.fast(images(), mode="no such mode")
    assert pair.fast.cuda_graphs.off is None
    pair.assert_same(images())


def test_a_capture_that_fails_is_reported_once_and_costs_no_match() -> None:
    pair = Pair()

    def fail() -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    pair.fast.cuda_graphs = CudaGraphs(backend=RecordingBackend(fail))
    with pytest.warns(RuntimeWarning, match="CUDA graphs are off, a capture failed: RuntimeError: operation not"):
        pair.assert_same(images())
    reason = "a capture failed: RuntimeError: operation not permitted when stream is capturing"
    assert pair.fast.cuda_graphs.why_not(CPU) == reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair.assert_same(images(1))
    pair.fast.cuda_graphs = CudaGraphs(backend=pair.backend)
    pair.assert_same(images(2))
    assert pair.backend.captures == 1


def test_a_size_that_needs_too_much_memory_leaves_the_others() -> None:
    pair = Pair()
    full = [True]

    def fail() -> None:
        if full[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    backend = RecordingBackend(fail)
    pair.fast.cuda_graphs = CudaGraphs(backend=backend)
    for _ in range(2):
        pair.assert_same(images(0, 3))
    full[0] = False
    pair.assert_same(images(0, 3))
    pair.assert_same(images(0, 1))
    assert backend.captures == 1
    assert pair.fast.cuda_graphs.off is None


@pytest.mark.parametrize(
    ("operation", "words"),
    [
        (lambda x: float(x.sum()), "_local_scalar_dense"),
        (lambda x: x[x > 0], "index"),
        (lambda x: (x > 0).nonzero(), "nonzero"),
        (lambda x: x.to("meta"), "_to_copy"),
    ],
)
def test_what_makes_the_host_wait_is_named_before_a_capture(operation: Any, words: str) -> None:
    x = torch.ones(3)
    with NoWaiting():
        harmless = x.to(torch.device("cpu"), torch.float64)[torch.tensor([1, 2])]
        with pytest.raises(HostWaitsError, match=f"{words}.* makes the host wait for the device"):
            operation(x)
    assert harmless.tolist() == [1, 1]


def halve_in_place(matcher: EfficientLoFTR) -> None:
    for name, parameter in matcher.named_parameters():
        if "pyramid" in name:
            parameter.mul_(0.5)


def load(matcher: EfficientLoFTR) -> None:
    matcher.load_state_dict(tiny_model(1, border_removal=0, num_layers=1).optimize_for_inference().state_dict())


def load_by_assignment(matcher: EfficientLoFTR) -> None:
    other = tiny_model(1, border_removal=0, num_layers=1).optimize_for_inference()
    matcher.pyramid.load_state_dict(other.pyramid.state_dict(), assign=True)


def exchange_data(matcher: EfficientLoFTR) -> None:
    for parameter in matcher.transformer.parameters():
        parameter.data = 0.5 * parameter.data


def exchange_a_module(matcher: EfficientLoFTR) -> None:
    matcher.pyramid = tiny_model(1, num_layers=1).optimize_for_inference().pyramid


def change_the_configuration(matcher: EfficientLoFTR) -> None:
    matcher.config = matcher.config.replace(border_removal=2)


def widen(matcher: EfficientLoFTR) -> None:
    matcher.double()


CHANGES = {
    halve_in_place: 1, load: 1, load_by_assignment: 2, exchange_data: 2, exchange_a_module: 2,
    change_the_configuration: 2, widen: 2,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_captures_follow_what_changes(change: Any) -> None:
    pair = Pair()
    before = pair.assert_same(images())
    for matcher in (pair.fast, pair.plain):
        change(matcher)
    after = pair.assert_same(images())
    assert any(x.shape != before[name].shape or not torch.equal(x, before[name]) for name, x in after.items())
    assert pair.backend.captures == CHANGES[change]
    assert len(pair.fast.cuda_graphs) == 1


def test_threads_get_their_own_results() -> None:
    pair = Pair()
    given = [images(seed, 1 + seed % 2) for seed in range(6)]
    expected = [pair.plain(data) for data in given]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(pair.fast, given * 4))
    for index, matches in enumerate(found):
        for name, value in expected[index % 6].items():
            assert torch.equal(matches[name], value)
    assert (pair.backend.captures, pair.backend.replays) == (2, 24)


def test_hooks_are_called_every_time() -> None:
    pair, seen = Pair(), []
    pair.assert_same(images())
    handle = pair.fast.backbone.register_forward_hook(lambda *_: seen.append(1))
    for _ in range(2):
        pair.assert_same(images())
    assert len(seen) == 2
    handle.remove()
    pair.assert_same(images())
    assert (pair.backend.captures, len(seen)) == (2, 2)


def test_the_record_of_somebody_else_is_left_alone() -> None:
    pair = Pair()
    pair.backend.busy = True
    pair.assert_same(images())
    assert pair.backend.captures == 0


def test_copies_record_for_themselves() -> None:
    pair = Pair(limit=3)
    pair.assert_same(images())
    pair.fast.cuda_graphs.at_once = False
    for copied in (copy.deepcopy(pair.fast), pickle.loads(pickle.dumps(pair.fast))):
        assert isinstance(copied.cuda_graphs, CudaGraphs)
        assert copied.cuda_graphs is not pair.fast.cuda_graphs
        assert len(copied.cuda_graphs) == 0
        assert (copied.cuda_graphs.limit, copied.cuda_graphs.at_once) == (3, False)
        expected, got = pair.plain(images()), copied(images())
        assert all(torch.equal(got[name], value) for name, value in expected.items())
    pair.assert_same(images(1))
    assert pair.backend.captures == 1


def test_a_call_that_is_traced_is_not_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    pair.assert_same(images())
    assert pair.backend.captures == 0


def test_reasons_are_in_words() -> None:
    model = tiny_model()
    fast = model.optimize_for_inference()
    assert fast.cuda_graphs.why_not(CPU) == "the weights are on the device cpu, which has none"
    off = model.optimize_for_inference(cuda_graphs=False).cuda_graphs
    assert off.why_not(torch.device("cuda")) == "switched off by cuda_graphs=False"
    with pytest.raises(ValueError, match="limit: expected at least 1, got 0"):
        CudaGraphs(0)
