# SPDX-License-Identifier: Apache-2.0
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from eloftr_kernels import MlpWeights, backend
from eloftr_kernels import upsample_mlp as named_mlp
from eloftr_kernels.upsample_mlp import cpu, naive, op
from support.attention_oracle import update_oracle
from support.ops import assert_as_accurate, checked_gradcheck, poisoned_buffers, spy, value_and_gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("x", "message", "expand", "contract", "norm weight", "norm bias")


def flat(function):
    """The operator with its tensors in one row, as tests of gradients want them."""

    def call(x, message, *rest):
        mask = rest[4] if len(rest) > 4 else None
        return function(x, message, MlpWeights(*rest[:4]), mask=mask)

    return call


upsample_mlp = flat(named_mlp)


class Case(NamedTuple):
    tensors: list[Tensor]  # x, message and the weights, float64
    mask: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Case":
        return self._replace(tensors=[t.to(dtype) for t in self.tensors])

    def run(self, function=upsample_mlp) -> tuple[Tensor, list[Tensor]]:
        def of(*tensors: Tensor) -> Tensor:
            return function(*tensors, self.mask)

        return value_and_gradients(of, self.tensors)


def make(size=(9, 10), channels=32, batch=2, masked=False, seed=0) -> Case:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(DEVICE)

    tensors = [normal(batch, channels, *size), normal(batch, channels, *(-(-s // 4) for s in size))]
    tensors += [normal(out, 2 * channels) / (2 * channels) ** 0.5 for out in (2 * channels, channels)]
    tensors += [1 + 0.1 * normal(channels), 0.1 * normal(channels)]
    if not masked:
        return Case(tensors)
    mask = torch.rand(batch, *size, generator=g) > 0.4
    mask[:, :4, :8] = False  # two invalid tokens
    mask[-1] = False
    return Case(tensors, mask.to(DEVICE))


CASES = {
    "partial blocks": make(),
    "masks": make(masked=True),
    "several blocks": make(size=(9, 22), batch=1, channels=16),
    "padded channels": make(channels=24, masked=True),
    "one cell": make(size=(1, 1), batch=1),
}
ACCURACY = [
    *((name, torch.float32) for name in CASES),
    ("partial blocks", torch.float16),
    ("masks", torch.bfloat16),
]


def check_kernel(case: Case, dtype: torch.dtype) -> None:
    given = case.to(dtype)
    exact = given.to(torch.float64).run(flat(cpu.upsample_mlp))
    same = given.run(flat(cpu.upsample_mlp))
    with poisoned_buffers(), backend("triton"):
        y, grads = given.run()
    assert_as_accurate("result", y, same[0], exact[0])
    assert y.is_contiguous(memory_format=torch.channels_last)
    for name, *three in zip(NAMES, grads, same[1], exact[1], strict=True):
        assert_as_accurate(f"gradient to {name}", *three)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("module", [naive, cpu], ids=["naive", "cpu"])
def test_pytorch_is_the_papers_formula(module, masked: bool) -> None:
    case = make((6, 9), channels=4, masked=masked)
    got = flat(module.upsample_mlp)(*case.tensors, case.mask).cpu()
    x, message, *weights = (t.cpu() for t in case.tensors)
    mask = torch.ones(2, 6, 9, dtype=torch.bool) if case.mask is None else case.mask.cpu()
    for b in range(2):
        wanted = update_oracle(x[b], message[b], *weights, mask[b])
        torch.testing.assert_close(got[b], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("module", [naive, cpu], ids=["naive", "cpu"])
def test_gradients_in_pytorch(module, masked: bool) -> None:
    case = make((6, 9), channels=4, masked=masked)
    function = flat(module.upsample_mlp)
    checked_gradcheck(lambda *tensors: function(*tensors, case.mask), case.tensors)


@pytest.mark.parametrize(("name", "dtype"), ACCURACY, ids=[f"{name}, {dtype}" for name, dtype in ACCURACY])
def test_kernels_are_as_accurate_as_pytorch(name: str, dtype: torch.dtype) -> None:
    check_kernel(CASES[name], dtype)


def test_the_large_tile_of_gpus_with_much_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eloftr_kernels.dispatch.shared_memory", lambda device: 1 << 18)
    check_kernel(make(size=(9, 10), batch=1, channels=16, masked=True), torch.float16)  # tiles of 64 and 128 cells


@pytest.mark.parametrize("layout", ["channels last", "sliced"])
def test_kernels_follow_strides(layout: str) -> None:
    case = make(channels=16, masked=True)
    maps = case.tensors[:2]
    if layout == "channels last":
        maps = [t.to(memory_format=torch.channels_last) for t in maps]
    else:
        maps = [torch.cat([t, t + 1], 1)[:, ::2].repeat(1, 1, 2, 1)[:, :, ::2] for t in maps]
    check_kernel(case._replace(tensors=[*maps, *case.tensors[2:]]), torch.float32)


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_empty_batch(name: str) -> None:
    case = make(batch=0).to(torch.float32)
    with backend(name):
        y, grads = case.run()
    assert y.shape == (0, 32, 9, 10)
    assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, case.tensors, strict=True))


def test_upsampling_is_transposed_exactly() -> None:
    """<up(m), g> = <m, up^T(g)> for the whole map, whose borders repeat the outer tokens."""
    from eloftr_kernels.upsample_mlp import kernel_backward

    channels, height, width = 16, 10, 7
    g = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 2 * channels, 3, 2, generator=g).to(DEVICE)
    grad = torch.randn(1, height * width, 2 * channels, generator=g).to(DEVICE)
    up = torch.nn.functional.interpolate(coarse, scale_factor=4.0, mode="bilinear")
    up = up[..., :height, :width].flatten(2).mT
    back = torch.full((1, 6, 2 * channels), float("nan"), device=DEVICE)
    kernel_backward._upsample_bwd[1, 1, 1](
        grad, grad, grad, back, height, width, C=channels, HAS_MASK=False, BLOCK_T=16, BLOCK_U=32
    )
    torch.testing.assert_close((up * grad).sum(), (coarse.flatten(2).mT * back).sum())


@pytest.mark.parametrize("case", [make((27, 10)), make((27, 10), masked=True), make((8, 5), batch=1)])
def test_rows_taken_piece_by_piece_give_the_whole(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.enable_grad(), spy(cpu.F, "layer_norm") as calls:
        whole = flat(cpu.upsample_mlp)(*case.tensors, case.mask)
    assert calls["layer_norm"] == 1  # a graph could be recorded: all rows at once
    monkeypatch.setattr(cpu, "PIECE_ELEMENTS", 1)  # four rows of cells at a time
    with torch.no_grad(), spy(cpu.F, "layer_norm") as calls:
        pieces = flat(cpu.upsample_mlp)(*case.tensors, case.mask)
    rows = case.tensors[0].shape[2]
    assert calls["layer_norm"] == (-(-rows // 4) if DEVICE == "cpu" else 1)
    torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=1e-12)


def test_nan_is_not_hidden() -> None:
    case = make((5, 5), batch=1, channels=16).to(torch.float32)
    case.tensors[1][0, 3, 0, 0] = float("nan")
    with backend("triton"):
        nan = upsample_mlp(*case.tensors).isnan()
    assert nan[0, :, :4, :4].all()


@pytest.mark.parametrize("message_dtype", [torch.float32, torch.bfloat16])
def test_autocast(message_dtype: torch.dtype) -> None:
    case = make(channels=16).to(torch.float32)
    exact = case.to(torch.float64).run(flat(cpu.upsample_mlp))
    case.tensors[1] = case.tensors[1].to(message_dtype)
    with torch.autocast(DEVICE, torch.bfloat16):
        same = case.run(flat(cpu.upsample_mlp))
        with backend("triton"):
            y, grads = case.run()
    assert y.dtype == torch.float32
    assert_as_accurate("result", y, same[0], exact[0])
    for name, *three in zip(NAMES, grads, same[1], exact[1], strict=True):
        assert_as_accurate(f"gradient to {name}", *three)


@pytest.mark.parametrize("sliced", [False, True])
def test_opcheck(sliced: bool) -> None:
    case = make((5, 4), channels=16, batch=1, masked=sliced).to(torch.float32)
    tensors = list(case.tensors)
    if sliced:
        tensors[0] = torch.cat([tensors[0]] * 2, 2)[:, :, :5].to(memory_format=torch.channels_last)
        tensors[1] = torch.cat([tensors[1]] * 2, 3)[:, :, :, ::2]
    tensors = [t.requires_grad_() for t in tensors]
    inputs = (*tensors[:2], tensors[2:], case.mask)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(op._forward.registered, inputs, **({"test_utils": checks} if sliced else {}))
    with torch.no_grad():
        y = op._forward(*inputs)
    detached = [t.detach() for t in tensors]
    inputs = (*detached[:2], detached[2:], case.mask)
    torch.library.opcheck(op._backward.registered, (y, *inputs), test_utils=checks)


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_one_graph(name: str) -> None:
    case = make((5, 4), channels=16, batch=1, masked=True).to(torch.float32)
    with backend(name):
        compiled = torch.compile(upsample_mlp, backend="aot_eager", fullgraph=True)
        for got, wanted in zip(case.run(compiled)[1], case.run()[1], strict=True):
            torch.testing.assert_close(got, wanted)


def test_each_backend_runs_what_it_says() -> None:
    from eloftr_kernels.upsample_mlp import launch

    case = make((4, 4), batch=1, channels=16).to(torch.float32)
    for name, kernels in (("triton", 1), ("reference", 0), ("auto", int(DEVICE == "cuda"))):
        with spy(launch, "forward", "backward") as calls, backend(name):
            case.run()
        assert calls == {"forward": kernels, "backward": kernels}


def test_why_not() -> None:
    with backend("triton"):
        assert op.why_not(torch.zeros(1, 96, 4, 4, device=DEVICE)) is None
        assert "512 channels" in op.why_not(torch.zeros(1, 512, 4, 4, device=DEVICE))
        # Expanded, so that 2^30 elements take no memory: it is the hidden layer that is too large.
        assert "2^31" in op.why_not(torch.zeros(1, 1, 1, 1, device=DEVICE).expand(1, 256, 2048, 2048))
        with pytest.raises(RuntimeError, match="512 channels are more than the 256"):
            upsample_mlp(*make((4, 4), channels=512, batch=1).to(torch.float32).tensors)


BAD = {
    "x: expected": {0: torch.zeros(2, 32, 9)},
    "at least one row": {0: torch.zeros(2, 32, 9, 0)},
    "message: expected": {1: torch.zeros(2, 32, 2, 3)},
    "weights.expand: expected": {2: torch.zeros(32, 64)},
    "weights.contract: expected": {3: torch.zeros(64, 64)},
    "weights.norm: expected": {4: torch.zeros(64)},
    "weights.norm_bias: expected": {5: torch.zeros(32, 1)},
    "mask: expected .B, H, W.": {6: torch.ones(2, 9, 9, dtype=torch.bool)},
    "mask: expected torch.bool": {6: torch.ones(2, 9, 10)},
    "message: expected torch.float32": {1: torch.zeros(2, 32, 3, 3, dtype=torch.float16)},
    "weights.norm_bias: expected the device": {5: torch.zeros(32, device="meta")},
}


@pytest.mark.parametrize("message", list(BAD))
def test_bad_input(message: str) -> None:
    arguments = [*make().to(torch.float32).tensors, None]
    for index, value in BAD[message].items():
        arguments[index] = value if value.device.type == "meta" else value.to(DEVICE)
    with pytest.raises((ValueError, TypeError), match=message):
        upsample_mlp(*arguments)


def test_weights_come_by_name() -> None:
    case = make().to(torch.float32)
    with pytest.raises(TypeError, match="weights: expected MlpWeights"):
        named_mlp(*case.tensors[:2], tuple(case.tensors[2:]))
