# SPDX-License-Identifier: Apache-2.0
"""The short way of a plain call is the registered operator's: same values, same gradients; and who takes which."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eloftr_kernels import backend, dispatch, dual_softmax_lse
from eloftr_kernels.dual_softmax import op
from support.ops import spy


class Watching(TorchDispatchMode):
    """Sees every operator that goes through the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def with_gradients(x: Tensor, y: Tensor) -> list[Tensor]:
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    row, col = dual_softmax_lse(x, y, 0.5)
    return [row, col, *torch.autograd.grad(row.sum() + (col**2).sum(), (x, y))]


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch):
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    with backend("triton"):
        yield


def features() -> tuple[Tensor, Tensor]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = torch.Generator().manual_seed(0)
    return torch.randn(1, 5, 16, generator=g).to(device), torch.randn(1, 6, 16, generator=g).to(device)


def test_a_plain_call_and_the_registered_operator_agree() -> None:
    with spy(op._lse_op, "registered") as plain_calls:
        plain = with_gradients(*features())
    with Watching() as watched:
        registered = with_gradients(*features())
    assert plain_calls == {"registered": 0}
    assert [name for name in watched.seen if "eloftr" in name] == [
        "eloftr.dual_softmax_lse.default",
        "eloftr.dual_softmax_lse_backward.default",
    ]
    for a, b in zip(plain, registered, strict=True):
        assert a.equal(b.detach())


def test_without_gradient_nothing_is_recorded() -> None:
    x, y = (f.requires_grad_() for f in features())
    with torch.no_grad():
        row, col = dual_softmax_lse(x, y, 0.5)
    assert not row.requires_grad
    assert not col.requires_grad


def test_a_subclass_and_a_profiler_take_the_registered_operator() -> None:
    class Subclass(Tensor):
        pass

    x, y = features()
    with spy(op._lse_op, "registered") as calls:
        dual_softmax_lse(x.as_subclass(Subclass), y.as_subclass(Subclass), 0.5)
        with torch.autograd.profiler.profile() as profile:
            dual_softmax_lse(x, y, 0.5)
    assert calls == {"registered": 2}
    assert any("dual_softmax_lse" in event.name for event in profile.function_events)


def test_a_signature_is_checked_once_and_errors_always() -> None:
    asked: list[tuple] = []

    @dispatch.once_per_signature
    def check(tensors, number):
        asked.append((tensors[0].shape, number))
        if number < 0:
            raise ValueError("negative")
        return (number,)

    x = torch.ones(2, 3)
    for _ in range(2):
        assert check((x, None), 1.0) == (1.0,)
    assert len(asked) == 1
    others = [(x[:1], None), (x.T, None), (x.half(), None), (x, x), (x.clone().requires_grad_(), None)]
    for tensors in others:
        check(tensors, 1.0)
    check((x, None), 2.0)
    assert len(asked) == 2 + len(others)
    with backend("reference"):
        check((x, None), 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        check((x, None), 1.0)
    with torch.no_grad():
        check((x, None), 1.0)
    assert len(asked) == 5 + len(others)
    for _ in range(2):  # neither an error nor a number in a tensor is kept
        with pytest.raises(ValueError, match="negative"):
            check((x, None), -1.0)
        check((x, None), torch.tensor(1.0))
    assert len(asked) == 9 + len(others)
