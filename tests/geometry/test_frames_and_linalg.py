# SPDX-License-Identifier: Apache-2.0
"""The pixel frames, the ragged layout, the null vector and the charts that everything else stands on."""

import pytest
import torch
from torch import Tensor

from eloftr_ops.geometry import from_integer_centers, to_integer_centers
from eloftr_ops.geometry._charts import Chart, FundamentalChart, HomographyChart, PoseChart
from eloftr_ops.geometry._eight_point import nearest_essential, nearest_rank_two
from eloftr_ops.geometry._linalg import smallest_eigenvector
from eloftr_ops.geometry._ragged import Matches, pad_matches
from eloftr_ops.geometry._residuals import Residual, SampsonResidual, TransferResidual
from support.gradients import check_gradients
from support.two_view import scene


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _with_eigenvalues(values: list[float], seed: int = 0) -> Tensor:
    basis, _ = torch.linalg.qr(_random(len(values), len(values), seed=seed))
    return (basis * torch.tensor(values, dtype=torch.float64)) @ basis.mT


def _projector(matrix: Tensor) -> Tensor:
    """The projector on the null vector: free of its sign."""
    vector = smallest_eigenvector(0.5 * (matrix + matrix.mT))[0]
    return vector[:, :, None] * vector[:, None, :]


def test_frames_differ_by_half_a_pixel_and_undo_each_other() -> None:
    keypoints = torch.tensor([[0.5, 0.5], [10.25, 3.0]])
    assert to_integer_centers(keypoints).tolist() == [[0.0, 0.0], [9.75, 2.5]]
    assert torch.equal(from_integer_centers(to_integer_centers(keypoints)), keypoints)
    check_gradients(to_integer_centers, [keypoints.double()])


def test_frames_refuse_what_are_not_keypoints() -> None:
    with pytest.raises(ValueError, match=r"shape \(\.\.\., 2\)"):
        to_integer_centers(torch.zeros(4, 3))
    with pytest.raises(TypeError, match="floating point"):
        from_integer_centers(torch.zeros(4, 2, dtype=torch.long))


@pytest.mark.parametrize(
    "values",
    [[0.0, 1.0, 2.0, 3.0], [0.1, 1.0, 1.0, 1.0], [0.0, 2.0, 2.0, 5.0]],
    ids=["distinct", "three coincide", "two coincide"],
)
def test_null_vector_needs_only_its_own_gap(values: list[float]) -> None:
    check_gradients(_projector, [_with_eigenvalues(values)[None]])


def test_null_vector_is_twice_differentiable() -> None:
    matrix = _with_eigenvalues([0.1, 1.0, 1.0, 3.0])[None]
    projection = _random(1, 4, 4, seed=3)

    def gradient(m: Tensor) -> Tensor:
        return torch.autograd.grad((_projector(m) * projection).sum(), m, create_graph=True)[0]

    check_gradients(gradient, [matrix])


def test_null_vector_that_is_not_determined_has_zero_gradient() -> None:
    ill = [
        _with_eigenvalues([0.0, 0.0, 1.0, 2.0]),
        torch.zeros(4, 4).double(),
        torch.full((4, 4), torch.nan).double(),
    ]
    matrices = torch.stack([*ill, _with_eigenvalues([0.0, 1.0, 1.0, 2.0])]).requires_grad_()
    vector, gap, determined = smallest_eigenvector(matrices)
    assert determined.tolist() == [False, False, False, True]
    assert bool(torch.isfinite(gap).all())
    (gradient,) = torch.autograd.grad((vector * _random(4, 4)).sum(), matrices)
    assert not bool(gradient[:3].any())
    assert bool(gradient[3].any())


def test_essential_projection_is_differentiable_where_singular_values_coincide() -> None:
    views = scene(1, 8, seed=1)
    t, R = views.T_0to1[0, :3, 3], views.T_0to1[0, :3, :3]
    E = torch.linalg.cross(t.expand(3, 3), R.mT).mT[None].clone()
    assert float(torch.linalg.svdvals(E)[0, :2].diff().abs()) < 1e-12
    projected, left, determined = nearest_essential(E)
    assert bool(determined)
    assert torch.allclose(projected, E, atol=1e-12)
    assert float((left @ E[0]).abs().max()) < 1e-12
    check_gradients(lambda m: nearest_essential(m)[0], [E + 0.01 * _random(1, 3, 3)])
    check_gradients(lambda m: nearest_essential(m)[0], [E])


def test_projections_agree_with_a_singular_value_decomposition() -> None:
    matrix = _random(6, 3, 3, seed=4)
    U, S, Vh = torch.linalg.svd(matrix)
    rank_two = U @ torch.diag_embed(S * torch.tensor([1.0, 1.0, 0.0])) @ Vh
    assert torch.allclose(nearest_rank_two(matrix)[0], rank_two, atol=1e-10)
    essential = U[:, :, :2] @ Vh[:, :2]
    assert torch.allclose(nearest_essential(matrix)[0], essential, atol=1e-10)


def _charts() -> dict[str, Chart]:
    views = scene(2, 8, seed=2)
    rank_two = nearest_rank_two(_random(2, 3, 3, seed=5))[0]
    return {
        "homography": HomographyChart.centred(_random(2, 3, 3, seed=6)),
        "fundamental": FundamentalChart.centred(rank_two),
        "pose": PoseChart.centred(views.T_0to1[:, :3, :3], views.T_0to1[:, :3, 3]),
    }


@pytest.mark.parametrize("name", _charts())
def test_chart_tangent_is_the_derivative_and_moving_lands_where_it_points(name: str) -> None:
    chart = _charts()[name]
    zero = torch.zeros(2, chart.tangent.shape[2], dtype=torch.float64)
    numeric = torch.autograd.functional.jacobian(lambda d: chart.at(d).flatten(1).sum(0), zero)
    assert torch.allclose(numeric.permute(1, 0, 2), chart.tangent, atol=1e-12)
    assert int(torch.linalg.matrix_rank(chart.tangent).min()) == chart.tangent.shape[2]
    delta = 0.1 * _random(*zero.shape, seed=7)
    there, centre = chart.at(delta), chart.moved(delta).at(zero)
    cosine = (there * centre).sum((1, 2)) / (torch.linalg.matrix_norm(there) * torch.linalg.matrix_norm(centre))
    assert torch.allclose(cosine.abs(), torch.ones(2, dtype=torch.float64), atol=1e-12)
    if name != "homography":
        assert float(torch.linalg.det(there).abs().max()) < 1e-12


@pytest.mark.parametrize("residual", [TransferResidual(), SampsonResidual()], ids=["transfer", "sampson"])
def test_residual_jacobian_is_the_derivative(residual: Residual) -> None:
    matrix, x0, x1 = _random(1, 3, 3, seed=8), _random(1, 5, 2, seed=9), _random(1, 5, 2, seed=10)
    numeric = torch.autograd.functional.jacobian(lambda m: residual.value(m, x0, x1), matrix)
    assert torch.allclose(numeric[:, :, :, 0].flatten(3), residual.jacobian(matrix, x0, x1), atol=1e-10)


def test_padding_keeps_order_within_pairs_and_gathers_back() -> None:
    keypoints = torch.arange(12.0).view(6, 2)
    index = torch.tensor([2, 0, 2, 0, 2, 0])
    padded = pad_matches(Matches(keypoints, keypoints + 100.0, index, 4, None))
    assert padded.points0.shape == (4, 3, 2)
    assert padded.points0[0, :, 0].tolist() == [2.0, 6.0, 10.0]
    assert padded.points1[2, :, 0].tolist() == [100.0, 104.0, 108.0]
    assert padded.weights.sum(1).tolist() == [3.0, 0.0, 3.0, 0.0]
    assert padded.gather(padded.points0[..., 1]).tolist() == keypoints[:, 1].tolist()
