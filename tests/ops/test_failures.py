# SPDX-License-Identifier: Apache-2.0
"""GPUs, interpreters and Tritons that cannot run a kernel: the reason in words, and no silent fallback."""

from typing import NamedTuple

import pytest
import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from eloftr_kernels import backend, dispatch, dual_softmax_lse, registration
from eloftr_kernels import kernel_interpreter as interpreter
from eloftr_kernels.dual_softmax import launch
from eloftr_kernels.dual_softmax.launch import backward_tiles, forward_tiles


class Gpu(NamedTuple):
    """As ``torch.cuda.get_device_properties`` describes one."""

    name: str
    major: int
    minor: int
    shared_memory_per_block: int = 48 * 1024
    shared_memory_per_block_optin: int = 99 * 1024


@pytest.mark.parametrize(
    ("gpu", "reason"),
    [
        (
            Gpu("Tesla V100", 7, 0, 48 * 1024, 96 * 1024),
            "compute capability 7.0, for which Triton makes no matrix instructions",
        ),
        (Gpu("GTX 1080", 6, 1, 48 * 1024, 48 * 1024), "compute capability 6.1"),
        (Gpu("Tesla T4", 7, 5, 48 * 1024, 64 * 1024), "compute capability 7.5"),
        (Gpu("A100", 8, 0, 48 * 1024, 163 * 1024), None),
        (Gpu("A10", 8, 6), None),
        (Gpu("L4", 8, 9), None),
        (Gpu("H100", 9, 0, 48 * 1024, 227 * 1024), None),
        (Gpu("RTX 5090", 12, 0), None),
        (Gpu("a GPU to come", 13, 0, 32 * 1024, 32 * 1024), "may take 32768 bytes of shared memory"),
    ],
    ids=lambda value: value.name if isinstance(value, Gpu) else "",
)
def test_what_a_gpu_can_run(gpu: Gpu, reason: str | None) -> None:
    said = dispatch.why_not_gpu(gpu)
    assert said is None if reason is None else reason in str(said)


def test_an_amd_gpu_has_no_capability_to_compare() -> None:
    assert dispatch.why_not_gpu(Gpu("MI300", 9, 4, 64 * 1024, 64 * 1024), amd=True) is None
    assert dispatch.why_not_gpu(Gpu("MI50", 0, 0, 64 * 1024, 64 * 1024), amd=True) is None


@pytest.mark.parametrize("channels", [96, 256, 512])
@pytest.mark.parametrize("tiles_for", [forward_tiles, backward_tiles])
def test_tiles_shrink_with_the_shared_memory(tiles_for, channels: int) -> None:
    sizes = [99 * 1024, 163 * 1024]  # A10, A100
    areas = []
    for shared in sizes:
        rows, columns, at_a_time, _, stages = tiles_for(torch.float16, channels, shared)
        # The tile of rows, and those of columns on their way; blocks of channels come in both.
        held = (rows + stages * columns) * at_a_time if at_a_time >= channels else stages * (rows + columns) * at_a_time
        assert 2 * held <= shared
        areas.append(rows * columns * at_a_time)
    assert areas == sorted(areas)


@pytest.mark.parametrize("where", ["library", "interpreter"])
def test_bfloat16_is_refused_where_the_interpreter_computes_it_wrongly(where, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(interpreter, "computes_bfloat16", lambda: False)
    x = torch.ones(1, 4, 16, dtype=torch.bfloat16 if where == "library" else torch.float32)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=where == "interpreter"),
        backend("triton"),
        pytest.raises(RuntimeError, match="Triton's interpreter computes bfloat16 wrongly"),
    ):
        dual_softmax_lse(x, x, 1.0)


def test_the_interpreter_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here")
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    assert interpreter.measure_bfloat16()  # as tests/ops/conftest.py has taught it
    monkeypatch.setattr(
        InterpreterBuilder,
        "create_dot",
        lambda self, a, b, d, *rest: TensorHandle(d.data + 1, d.dtype.scalar),
    )
    assert not interpreter.measure_bfloat16()


def test_without_numpy_the_interpreter_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = dispatch.importlib.util.find_spec
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None if name == "numpy" else found(name))
    with backend("triton"):
        assert "numpy, which is not installed" in str(dispatch.why_not_triton({"x": torch.ones(1)}))


def _raised_in_triton() -> None:
    exec("raise RuntimeError('Failed to find C compiler')", {"__name__": "triton.runtime.build"})


FAILURES = {
    "shared memory": lambda: (_ for _ in ()).throw(OutOfResources(98304, 65536, "shared memory")),
    "compiler": lambda: (_ for _ in ()).throw(CompilationError("", None, "unsupported")),
    "no compiler of C": _raised_in_triton,
    "broken Triton": lambda: (_ for _ in ()).throw(ImportError("no libtriton", name="triton._C.libtriton")),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("recording", [False, True])
def test_a_triton_that_fails_is_an_error_in_words(
    failure: str, recording: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(launch, "dual_softmax_lse_forward", lambda *_: FAILURES[failure]())
    x = torch.ones(1, 4, 16, requires_grad=recording)
    with (
        backend("triton"),
        pytest.raises(RuntimeError, match=r"Triton could not compile or launch .*'reference'") as raised,
    ):
        dual_softmax_lse(x, x, 1.0)
    assert raised.value.__cause__ is not None


def test_other_errors_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(launch, "dual_softmax_lse_forward", out_of_memory)
    x = torch.ones(1, 4, 16)
    with backend("triton"), pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        dual_softmax_lse(x, x, 1.0)
    assert not registration.raised_by_triton(ValueError("ours"))
