# SPDX-License-Identifier: Apache-2.0
import threading

import pytest
import torch

from eloftr_kernels import backend, dispatch


def test_the_choice_ends_with_its_block() -> None:
    assert dispatch.chosen_backend() == "auto"
    with backend("triton"):
        with backend("reference"):
            assert dispatch.chosen_backend() == "reference"
        assert dispatch.chosen_backend() == "triton"
    assert dispatch.chosen_backend() == "auto"


def test_the_choice_ends_with_an_error_too() -> None:
    with pytest.raises(KeyError), backend("reference"):
        raise KeyError
    assert dispatch.chosen_backend() == "auto"


def test_the_choice_stays_in_its_thread() -> None:
    seen = []
    with backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.chosen_backend()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_a_compiled_function_follows_the_choice() -> None:
    compiled = torch.compile(lambda x: x if dispatch.use_triton("op", None) else -x, backend="eager", fullgraph=True)
    x = torch.ones(1)
    assert compiled(x) == 1
    with backend("reference"):
        assert compiled(x) == -1
    assert compiled(x) == 1


def test_blocks_of_two_threads_that_overlap_leave_nothing_behind() -> None:
    """The first to begin ends first. A compiled function then follows the one that is open, and at last none."""
    compiled = torch.compile(lambda x: x if dispatch.use_triton("op", None) else -x, backend="eager", fullgraph=True)
    x, inside, leave = torch.ones(1), threading.Event(), threading.Event()

    def other() -> None:
        with backend("auto"):
            inside.set()
            leave.wait(10)

    with backend("reference"):
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(10)
        assert compiled(x) == 1  # the other thread's block began last
    assert compiled(x) == 1
    leave.set()
    thread.join()
    assert compiled(x) == 1
    assert dispatch._latest == "auto"


def test_unknown_backend() -> None:
    with (
        pytest.raises(ValueError, match="expected one of auto, reference, triton, got 'cuda'"),
        backend("cuda"),
    ):  # type: ignore[arg-type]
        pass


def test_a_choice_that_cannot_be_honoured_raises() -> None:
    assert not dispatch.use_triton("op", "a reason")
    with (
        backend("triton"),
        pytest.raises(RuntimeError, match="op: backend 'triton' cannot be honoured: a reason;"),
    ):
        dispatch.use_triton("op", "a reason")


def test_every_reason_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, meta = torch.zeros(2), torch.zeros(2, device="meta")
    assert "Triton's interpreter" in (dispatch.why_not_triton({"x": cpu}) or "")
    with backend("triton"):
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        assert "TRITON_INTERPRET=1" in (dispatch.why_not_triton({"x": cpu}) or "")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert dispatch.why_not_triton({"x": cpu, "mask": None}, head_size=16) is None
        assert "device type meta" in (dispatch.why_not_triton({"x": meta}) or "")
        assert "y is torch.float64" in (dispatch.why_not_triton({"x": cpu, "y": cpu.double()}) or "")
        assert "2^31" in (dispatch.why_not_triton({"x": cpu[:1].expand(2**31)}) or "")
        far = torch.empty_strided((2,), (2**31,), device="meta")
        assert dispatch._reach(far) == 2**31
        for size in (24, 8):
            assert f"head size {size}" in (dispatch.why_not_triton({"x": cpu}, head_size=size) or "")
        monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", False)
        assert dispatch.why_not_triton({"x": cpu}) == "triton is not installed"


def test_float32_products_follow_the_process_wide_precision() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert dispatch.dot_precision(torch.float32) == "tf32"
        assert dispatch.dot_precision(torch.float16) == "ieee"
        torch.set_float32_matmul_precision("highest")
        assert dispatch.dot_precision(torch.float32) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)
