# SPDX-License-Identifier: Apache-2.0
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from eloftr_kernels import AttentionWeights, backend
from eloftr_kernels import aggregated_attention as named_attention
from eloftr_kernels.aggregated_attention import cpu, naive, op
from support.attention_oracle import message_oracle
from support.ops import assert_as_accurate, checked_gradcheck, poisoned_buffers, spy, value_and_gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("x", "source", "aggregate", "norm weight", "norm bias", "q", "k", "v", "merge")


def flat(function):
    """The operator with its tensors in one row, as tests of gradients want them."""

    def call(x, source, *rest):
        options = dict(zip(("num_heads", "rotary", "mask", "source_mask"), rest[7:], strict=False))
        return function(x, source, AttentionWeights(*rest[:7]), **options)

    return call


aggregated_attention = flat(named_attention)


class Case(NamedTuple):
    tensors: list[Tensor]  # x, source and the weights, float64
    heads: int
    rotary: Tensor | None = None
    mask: Tensor | None = None
    source_mask: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Case":
        rotary = None if self.rotary is None else self.rotary.to(dtype)
        return self._replace(tensors=[t.to(dtype) for t in self.tensors], rotary=rotary)

    def run(self, function=aggregated_attention) -> tuple[Tensor, list[Tensor]]:
        def of(*tensors: Tensor) -> Tensor:
            return function(*tensors, self.heads, *self[2:])

        return value_and_gradients(of, self.tensors)


def make(size=(9, 10), source_size=None, channels=32, heads=2, batch=2, rotary=False, masked=False, seed=0) -> Case:
    source_size = source_size or size
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(DEVICE)

    tensors = [normal(batch, channels, *size), normal(batch, channels, *source_size)]
    tensors += [normal(channels, 1, 4, 4) / 4, 1 + 0.1 * normal(channels), 0.1 * normal(channels)]
    tensors += [normal(channels, channels) / channels**0.5 for _ in range(4)]
    table = None
    if rotary:
        angle = 6 * torch.rand(-(-size[0] // 4) * -(-size[1] // 4), channels // 2, generator=g, dtype=torch.float64)
        table = torch.stack([angle.cos(), angle.sin()]).to(DEVICE)
    if not masked:
        return Case(tensors, heads, table)
    mask, source_mask = (torch.rand(batch, *s, generator=g) > 0.4 for s in (size, source_size))
    mask[:, :4, :8] = False  # two invalid tokens
    source_mask[:, :4] = False  # a row of them
    source_mask[-1] = False  # a sample without keys
    return Case(tensors, heads, table, mask.to(DEVICE), source_mask.to(DEVICE))


CASES = {
    "self, rotary, partial blocks": make(rotary=True),
    "cross, masks, other size": make(source_size=(12, 7), masked=True),
    "several blocks": make(size=(22, 24), source_size=(36, 31), batch=1),
    "padded channels": make(channels=48, heads=3, rotary=True, masked=True),
    "one cell": make(size=(1, 1), source_size=(1, 5), batch=1),
}
ACCURACY = [
    *((name, torch.float32) for name in CASES),
    ("self, rotary, partial blocks", torch.float16),
    ("cross, masks, other size", torch.bfloat16),
]


def check_kernel(case: Case, dtype: torch.dtype) -> None:
    given = case.to(dtype)
    exact = given.to(torch.float64).run(flat(cpu.aggregated_attention))
    same = given.run(flat(cpu.aggregated_attention))
    with poisoned_buffers(), backend("triton"):
        message, grads = given.run()
    assert_as_accurate("message", message, same[0], exact[0])
    assert message.is_contiguous(memory_format=torch.channels_last)
    for name, *three in zip(NAMES, grads, same[1], exact[1], strict=True):
        assert_as_accurate(f"gradient to {name}", *three)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("module", [naive, cpu], ids=["naive", "cpu"])
def test_pytorch_is_the_papers_formula(module, rotary: bool, masked: bool) -> None:
    case = make((5, 6), channels=8, rotary=rotary, masked=masked)
    x, source, conv, norm_weight, norm_bias, *projections = (t.cpu() for t in case.tensors)
    got = flat(module.aggregated_attention)(*case.tensors, *case[1:]).cpu()
    everywhere = torch.ones(2, 5, 6, dtype=torch.bool)
    masks = [everywhere if m is None else m.cpu() for m in case[3:]]
    table = case.rotary if case.rotary is None else case.rotary.cpu()
    for b in range(2):
        wanted = message_oracle(
            x[b], source[b], conv, norm_weight, norm_bias, projections, 2, table, masks[0][b], masks[1][b]
        )
        torch.testing.assert_close(got[b], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("module", [naive, cpu], ids=["naive", "cpu"])
def test_gradients_in_pytorch(module, masked: bool) -> None:
    case = make((6, 9), (9, 7), channels=4, masked=masked)
    function = flat(module.aggregated_attention)
    checked_gradcheck(lambda *tensors: function(*tensors, *case[1:]), case.tensors)


@pytest.mark.parametrize(("name", "dtype"), ACCURACY, ids=[f"{name}, {dtype}" for name, dtype in ACCURACY])
def test_kernels_are_as_accurate_as_pytorch(name: str, dtype: torch.dtype) -> None:
    check_kernel(CASES[name], dtype)


@pytest.mark.parametrize("layout", ["channels last", "sliced"])
def test_kernels_follow_strides(layout: str) -> None:
    case = make(masked=True)
    maps = case.tensors[:2]
    if layout == "channels last":
        maps = [t.to(memory_format=torch.channels_last) for t in maps]
    else:
        maps = [torch.cat([t, t + 1], 1)[:, ::2].flip(3).repeat(1, 1, 2, 1)[:, :, ::2] for t in maps]
    check_kernel(case._replace(tensors=[*maps, *case.tensors[2:]]), torch.float32)


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_empty_batch(name: str) -> None:
    case = make(batch=0).to(torch.float32)
    with backend(name):
        message, grads = case.run()
    assert message.shape == (0, 32, 3, 3)
    assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, case.tensors, strict=True))


def test_equal_maxima_send_their_gradient_to_the_first_cell() -> None:
    case = make((8, 8)).to(torch.float32)
    case.tensors[1] = case.tensors[1].round()
    wanted = case.run(flat(cpu.aggregated_attention))[1][1]
    with backend("triton"):
        got = case.run()[1][1]
    assert torch.equal(got != 0, wanted != 0)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_nan_is_not_hidden() -> None:
    case = make(batch=1).to(torch.float32)
    case.tensors[1][0, 3, 0, 1] = float("nan")
    with backend("triton"):
        assert aggregated_attention(*case.tensors, 2).isnan().all()


def test_autocast() -> None:
    case = make(rotary=True).to(torch.float32)
    exact = case.to(torch.float64).run(flat(cpu.aggregated_attention))
    with torch.autocast(DEVICE, torch.bfloat16):
        same = case.run(flat(cpu.aggregated_attention))
        with backend("triton"):
            message, grads = case.run()
    assert message.dtype == torch.bfloat16
    assert_as_accurate("message", message, same[0], exact[0])
    for name, *three in zip(NAMES, grads, same[1], exact[1], strict=True):
        assert_as_accurate(f"gradient to {name}", *three)


@pytest.mark.parametrize("sliced", [False, True])
def test_opcheck(sliced: bool) -> None:
    case = make((5, 4), channels=16, heads=1, batch=1, rotary=True, masked=sliced).to(torch.float32)
    tensors = list(case.tensors)
    if sliced:
        tensors[0] = torch.cat([tensors[0]] * 2, 2)[:, :, :5].to(memory_format=torch.channels_last)
        tensors[1] = torch.cat([tensors[1]] * 2, 3)[:, :, :, ::2]
    tensors = [t.requires_grad_() for t in tensors]
    inputs = (*tensors[:2], tensors[2:], *case[1:])
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(op._forward.registered, inputs, **({"test_utils": checks} if sliced else {}))
    with torch.no_grad():
        message, *saved = op._forward(*inputs)
    detached = [t.detach() for t in tensors]
    inputs = (message, saved, *detached[:2], detached[2:], *case[1:])
    torch.library.opcheck(op._backward.registered, inputs, test_utils=checks)


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_one_graph(name: str) -> None:
    case = make((5, 4), channels=16, heads=1, batch=1, rotary=True, masked=True).to(torch.float32)
    with backend(name):
        compiled = torch.compile(aggregated_attention, backend="aot_eager", fullgraph=True)
        for got, wanted in zip(case.run(compiled)[1], case.run()[1], strict=True):
            torch.testing.assert_close(got, wanted)


def test_each_backend_runs_what_it_says() -> None:
    from eloftr_kernels.aggregated_attention import launch

    case = make((4, 4), batch=1).to(torch.float32)
    for name, kernels in (("triton", 1), ("reference", 0), ("auto", int(DEVICE == "cuda"))):
        with spy(launch, "forward", "backward") as calls, backend(name):
            case.run()
        assert calls == {"forward": kernels, "backward": kernels}


def test_backward_runs_what_forward_ran() -> None:
    from eloftr_kernels.aggregated_attention import launch

    case = make((4, 4), batch=1).to(torch.float32)
    with backend("triton"):
        output = aggregated_attention(*(t.requires_grad_() for t in case.tensors), 2)
    with spy(launch, "backward") as calls, backend("reference"):
        output.sum().backward()
    assert calls["backward"] == 1


def test_double_backward_is_refused() -> None:
    case = make((4, 4), batch=1).to(torch.float32)
    x = case.tensors[0].requires_grad_()
    with backend("triton"):
        output = aggregated_attention(x, *case.tensors[1:], 2)
    (grad,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_why_not() -> None:
    x = torch.zeros(1, 48, 4, 4, device=DEVICE)
    table = torch.zeros(2, 1, 24, device=DEVICE, requires_grad=True)
    with backend("triton"):
        assert op.why_not(x, x, 3) is None
        assert "head size 24" in op.why_not(x, x, 2)
        assert "rotary requires a gradient" in op.why_not(x, x, 3, table)
        wide = torch.zeros(1, 1024, 4, 4, device=DEVICE)
        assert "1024 channels" in op.why_not(wide, wide, 16)
        with pytest.raises(RuntimeError, match="head size 24 is not a power of two"):
            aggregated_attention(*make((4, 4), channels=48, heads=2).to(torch.float32).tensors, 2)


BAD = {
    "x: expected": {0: torch.zeros(2, 32, 9)},
    "source: expected": {1: torch.zeros(2, 16, 9, 10)},
    "at least one row": {0: torch.zeros(2, 32, 0, 10)},
    "weights.aggregate: expected": {2: torch.zeros(32, 32, 4, 4)},
    "weights.norm_bias: expected": {4: torch.zeros(31)},
    "weights.merge: expected": {8: torch.zeros(32, 64)},
    "num_heads: expected a divisor": {9: 3},
    "rotary: expected": {10: torch.zeros(2, 8, 16)},
    "mask: expected": {11: torch.ones(2, 9, 9, dtype=torch.bool)},
    "source_mask: expected torch.bool": {12: torch.ones(2, 9, 10)},
    "weights.k: expected torch.float32": {6: torch.zeros(32, 32, dtype=torch.float64)},
    "weights.q: expected the device": {5: torch.zeros(32, 32, device="meta")},
}


@pytest.mark.parametrize("message", list(BAD))
def test_bad_input(message: str) -> None:
    arguments = [*make().to(torch.float32).tensors, 2, None, None, None]
    for index, value in BAD[message].items():
        moved = isinstance(value, Tensor) and value.device.type == "cpu"
        arguments[index] = value.to(DEVICE) if moved else value
    with pytest.raises((ValueError, TypeError), match=message):
        aggregated_attention(*arguments)


def test_rotary_needs_equal_token_counts() -> None:
    case = make((8, 8), (4, 8)).to(torch.float32)
    with pytest.raises(ValueError, match="equally many tokens, got 4 and 2"):
        aggregated_attention(*case.tensors, 2, torch.zeros(2, 4, 16, device=DEVICE))


def test_weights_come_by_name() -> None:
    case = make().to(torch.float32)
    with pytest.raises(TypeError, match="weights: expected AttentionWeights"):
        named_attention(*case.tensors[:2], tuple(case.tensors[2:]), num_heads=2)
