# SPDX-License-Identifier: Apache-2.0
"""The gradient contract: what every output of the matcher passes on to every input, mode by mode.

``CONTRACT`` is the one source: the tests measure each of its cells, and the table of docs/differentiability.md has to
be what ``contract_table`` makes of it.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from eloftr_ops import EfficientLoFTR
from eloftr_ops.model.coarse import select_matches
from support.gradients import check_gradients
from support.models import coarse_stage, random_images, tiny_model

MODES = ("hard", "straight_through", "soft")
INPUTS = ("image0", "image1", "backbone", "transformer", "pyramid")
FLOWS, ZERO, UNDEFINED = "flows", "zero", "undefined"
CONTRACT: dict[tuple[str, str], tuple[str, ...]] = {
    ("keypoints0", "hard"): (ZERO,) * 5,
    ("keypoints0", "straight_through"): (FLOWS,) * 5,
    ("keypoints0", "soft"): (FLOWS,) * 5,
    ("keypoints1", "hard"): (FLOWS,) * 5,
    ("keypoints1", "straight_through"): (FLOWS,) * 5,
    ("keypoints1", "soft"): (FLOWS,) * 5,
    ("confidence", "hard"): (FLOWS, FLOWS, FLOWS, FLOWS, ZERO),
    ("confidence", "straight_through"): (FLOWS, FLOWS, FLOWS, FLOWS, ZERO),
    ("confidence", "soft"): (FLOWS, FLOWS, FLOWS, FLOWS, ZERO),
    ("covariance0", "hard"): (FLOWS,) * 5,
    ("covariance0", "straight_through"): (FLOWS,) * 5,
    ("covariance0", "soft"): (FLOWS,) * 5,
    ("covariance1", "hard"): (FLOWS,) * 5,
    ("covariance1", "straight_through"): (FLOWS,) * 5,
    ("covariance1", "soft"): (FLOWS,) * 5,
    ("batch_indexes", "hard"): (UNDEFINED,) * 5,
    ("batch_indexes", "straight_through"): (UNDEFINED,) * 5,
    ("batch_indexes", "soft"): (UNDEFINED,) * 5,
}
CELLS = [
    pytest.param(output, mode, name, cell, id=f"{output}-{mode}-{name}-{cell}")
    for (output, mode), cells in CONTRACT.items()
    for name, cell in zip(INPUTS, cells, strict=True)
]
STEP = 3e-8  # of finite differences: a longer one crosses kinks of ReLUs, of which there are 1e5
DIRECTIONS = 2  # random ones, per input, along which Jacobians are compared with finite differences
PAGE = Path(__file__).parents[2] / "docs" / "differentiability.md"


def contract_table() -> str:
    """The table of docs/differentiability.md."""
    rows = [("output", "mode", *INPUTS), ("---",) * (2 + len(INPUTS))]
    rows += [(f"`{output}`", f"`{mode}`", *cells) for (output, mode), cells in CONTRACT.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


class Displaced:
    """Outputs of the matcher as a function of steps along random directions of chosen inputs, in float64.

    A Jacobian in a few directions of the whole image, or of all the weights of a stage, sees every entry of the
    gradient at the price of a few forward passes.
    """

    def __init__(self, mode: str, seed: int = 1) -> None:
        self.mode = mode
        self.model = smooth_model()
        self.data = smooth_pair()
        generator = torch.Generator().manual_seed(seed)
        self.directions: dict[str, list[list[Tensor]]] = {
            name: [
                [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in self.tensors(name)]
                for _ in range(DIRECTIONS)
            ]
            for name in INPUTS
        }

    def tensors(self, name: str) -> list[Tensor]:
        if name in self.data:
            return [self.data[name]]
        return list(getattr(self.model, name).parameters())

    def __call__(self, steps: dict[str, Tensor]) -> dict[str, Tensor]:
        data = dict(self.data)
        parameters = dict(self.model.named_parameters())
        for name, coefficients in steps.items():
            moved = [
                tensor + sum(c * d[k] for c, d in zip(coefficients, self.directions[name], strict=True))
                for k, tensor in enumerate(self.tensors(name))
            ]
            if name in data:
                data[name] = moved[0]
                continue
            keys = [key for key in parameters if key.startswith(name + ".")]
            parameters.update(zip(keys, moved, strict=True))
        return torch.func.functional_call(self.model, parameters, (data,), {"mode": self.mode, "covariance": True})

    def output(self, name: str, inputs: tuple[str, ...]) -> Callable[..., Tensor]:
        """One output as a function of one (DIRECTIONS,) tensor of steps per input."""
        return lambda *steps: self(dict(zip(inputs, steps, strict=True)))[name]


def smooth_model() -> EfficientLoFTR:
    """Weights for which `smooth_pair` is away from ties, which `test_the_pair_is_away_from_ties` checks."""
    model = tiny_model(7, border_removal=1, temperature=0.3).double()
    return model.requires_grad_(False)


def smooth_pair() -> dict[str, Tensor]:
    image0 = random_images(1, 64, 96, seed=7).double()
    return {"image0": image0, "image1": 0.8 * image0.roll((3, 5), (-2, -1)) + 0.1}


def gradients(model: EfficientLoFTR, data: dict[str, Tensor], output: str, mode: str) -> dict[str, list[Tensor | None]]:
    """Gradient of a random projection of an output, for each of INPUTS; None where autograd knows no path."""
    inputs = {name: [data[name]] for name in ("image0", "image1")}
    inputs |= {name: list(getattr(model, name).parameters()) for name in INPUTS[2:]}
    value = model(data, mode=mode, covariance=True)[output]
    if not value.requires_grad:
        return {name: [None] * len(tensors) for name, tensors in inputs.items()}
    cotangent = torch.randn(value.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    flat = [x for tensors in inputs.values() for x in tensors]
    found = iter(torch.autograd.grad((value * cotangent.to(value.dtype)).sum(), flat, allow_unused=True))
    return {name: [next(found) for _ in tensors] for name, tensors in inputs.items()}


def tracked(model: EfficientLoFTR, data: dict[str, Tensor]) -> tuple[EfficientLoFTR, dict[str, Tensor]]:
    """The same with every input a leaf that requires a gradient."""
    leaves = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in data.items()}
    return model.requires_grad_(True), leaves


def any_nonzero(found: list[Tensor | None]) -> bool:
    return any(g is not None and bool(g.any()) for g in found)


def test_the_page_shows_the_contract() -> None:
    assert contract_table() in PAGE.read_text()


def test_the_contract_covers_every_output_in_every_mode() -> None:
    with torch.no_grad():
        outputs = smooth_model()(smooth_pair(), covariance=True)
    assert set(CONTRACT) == {(output, mode) for output in outputs for mode in MODES}


def test_the_pair_is_away_from_ties() -> None:
    """Choices inside the matcher win by margins that steps of finite differences do not overturn."""
    model, data = smooth_model(), smooth_pair()
    coarse = coarse_stage(model, data).coarse
    scores = coarse.scores.features0 @ coarse.scores.features1.mT / model.config.temperature
    log_confidence = 2 * scores - coarse.scores.row_lse[:, :, None] - coarse.scores.col_lse[:, None]
    for axis in (1, 2):
        first, second = log_confidence.topk(2, axis).values.unbind(axis)
        assert (first - second).min() > 1e-4
    assert len(model(data)["confidence"]) >= 4


@pytest.mark.parametrize(("output", "mode", "name", "cell"), CELLS)
def test_cell(output: str, mode: str, name: str, cell: str) -> None:
    model, data = tracked(smooth_model(), smooth_pair())
    value = model(data, mode=mode, covariance=True)[output]
    assert len(value) >= 4
    if cell == UNDEFINED:
        assert not value.is_floating_point()
        return
    found = gradients(model, data, output, mode)[name]
    if cell == FLOWS:
        assert value.requires_grad
        assert any_nonzero(found)
        assert all(g is None or bool(torch.isfinite(g).all()) for g in found)
    else:
        assert not any_nonzero(found)
        displaced = Displaced(mode)
        step = {name: torch.full((DIRECTIONS,), STEP, dtype=torch.float64)}
        assert torch.equal(displaced(step)[output], displaced({})[output])


@pytest.mark.parametrize(
    ("output", "mode"),
    [
        *((output, mode) for output in ("keypoints0", "keypoints1", "confidence") for mode in ("hard", "soft")),
        ("covariance1", "hard"),  # the same in all modes; tests/ops checks the moments of both images
    ],
)
def test_gradients_are_derivatives(output: str, mode: str) -> None:
    """Where the contract says flows, the gradient is that of the value, along random directions, in float64."""
    flowing = tuple(n for n, cell in zip(INPUTS, CONTRACT[output, mode], strict=True) if cell == FLOWS)
    if not flowing:
        assert (output, mode) == ("keypoints0", "hard")
        return
    steps = [torch.zeros(DIRECTIONS, dtype=torch.float64) for _ in flowing]
    check_gradients(Displaced(mode).output(output, flowing), steps, eps=STEP, atol=1e-5, rtol=1e-4)


def test_the_derivative_check_notices_a_detached_stage() -> None:
    """Planted fault: without the transformer's gradient, soft positions fail the check."""
    displaced = Displaced("soft")
    inputs = ("image0",)
    function = displaced.output("keypoints0", inputs)
    forward = displaced.model.transformer.forward

    def detached(*args: Tensor | None) -> tuple[Tensor, Tensor]:
        x0, x1 = forward(*args)
        return x0.detach(), x1.detach()

    displaced.model.transformer.forward = detached  # type: ignore[method-assign]
    with pytest.raises(AssertionError):
        check_gradients(function, [torch.zeros(DIRECTIONS, dtype=torch.float64)], eps=STEP, atol=1e-5)


@pytest.mark.parametrize("output", ["keypoints0", "keypoints1"])
def test_soft_positions_move_the_coarse_features_of_both_images(output: str) -> None:
    model, data = smooth_model(), smooth_pair()
    *features, coarse = coarse_stage(model, data)
    leaves = [x.clone().requires_grad_() for x in (coarse.scores.features0, coarse.scores.features1)]
    scores = coarse.scores._replace(features0=leaves[0], features1=leaves[1])
    moved = coarse._replace(scores=scores)
    matches = model.refine(*features, moved, select_matches(moved, model.config), "soft")
    found = torch.autograd.grad(getattr(matches, output)[:, 0].sum(), leaves)
    assert all(bool(g.any()) for g in found)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000))
def test_straight_through_has_the_values_of_hard_and_the_gradient_of_soft(seed: int) -> None:
    model = tiny_model(seed).double()
    image0 = random_images(2, 64, 96, seed).double()
    data = {"image0": image0, "image1": image0.roll((4, 3), (-2, -1))}
    with torch.no_grad():
        hard, through, soft = (model(data, mode=mode) for mode in MODES)
    assert all(torch.equal(hard[key], through[key]) for key in hard)
    # two cells of border keep soft positions on the image, so that no mode drops a match that another keeps
    assert len(soft["confidence"]) == len(hard["confidence"])
    model, data = tracked(model, data)
    for output in ("keypoints0", "keypoints1", "confidence"):
        a, b = (gradients(model, data, output, mode) for mode in ("straight_through", "soft"))
        for name in INPUTS:
            for x, y in zip(a[name], b[name], strict=True):
                assert (x is None) == (y is None)
                if x is not None and y is not None:
                    torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


def test_a_mode_of_the_config_is_the_default_of_the_call() -> None:
    data = smooth_pair()
    by_call = tiny_model(7, border_removal=1).double()(data, mode="soft")
    by_config = tiny_model(7, border_removal=1, gradient_mode="soft").double()(data)
    assert all(torch.equal(by_call[key], by_config[key]) for key in by_call)


def test_a_neighbourhood_of_one_cell_leaves_the_coarse_expectation_out() -> None:
    """Soft positions then stay within the match's own window."""
    model = tiny_model(7, border_removal=1, soft_neighbourhood=1).double()
    with torch.no_grad():
        hard, soft = model(smooth_pair(), mode="hard"), model(smooth_pair(), mode="soft")
        wide = smooth_model()(smooth_pair(), mode="soft")
    assert (hard["keypoints0"] - soft["keypoints0"]).abs().max() <= 7
    assert not torch.equal(soft["keypoints0"], wide["keypoints0"])


def test_soft_positions_tend_to_hard_ones_as_temperatures_fall() -> None:
    model = tiny_model(7, border_removal=1, soft_temperature=1e-4, soft_neighbourhood=1).double()
    with torch.no_grad():
        hard, soft = model(smooth_pair(), mode="hard"), model(smooth_pair(), mode="soft")
    for key in ("keypoints0", "keypoints1"):
        torch.testing.assert_close(hard[key], soft[key], rtol=0, atol=1e-3)


def slope(steps: Tensor) -> Tensor:
    """Gradient of soft positions and confidence together, along directions of the transformer's weights."""
    out = Displaced("soft")({"transformer": steps})
    value = torch.cat([out["keypoints0"].flatten(), out["confidence"]])
    weights = torch.linspace(1, 2, value.numel(), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((weights * value).sum(), steps, create_graph=True)
    return gradient


def test_second_derivatives_need_the_plain_attention() -> None:
    steps = torch.zeros(DIRECTIONS, dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        check_gradients(slope, [steps], eps=STEP, atol=1e-3, rtol=1e-2)
    with pytest.raises(RuntimeError, match=r"derivative for .*attention.* is not implemented"):
        slope(steps.requires_grad_()).sum().backward()
