# SPDX-License-Identifier: Apache-2.0
"""Which implementation an op runs: the user's choice, reasons against Triton in words, argument checks."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

Backend = Literal["auto", "reference", "triton"]

HALF_DTYPES = (torch.float16, torch.bfloat16)
KERNEL_DTYPES = (torch.float32, *HALF_DTYPES)
MAX_ELEMENTS = 2**31  # offsets inside the kernels are 32-bit
MIN_HEAD_SIZE = 16  # the smallest inner dimension of a matrix instruction
OLDEST_CAPABILITY = (8, 0)  # of NVIDIA GPUs that Triton makes matrix instructions for
LEAST_SHARED_MEMORY = 64 * 1024  # bytes, for the smallest tiles

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_choice: ContextVar[Backend] = ContextVar("eloftr_kernels_backend", default="auto")
# What a traced graph sees: torch.compile can guard a global, but no context variable.
_latest: Backend = "auto"
_open_blocks: dict[object, Backend] = {}  # of all threads, in the order of their beginning
_blocks_lock = threading.Lock()


@contextlib.contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Choose the implementation of every op of this package inside a ``with`` block.

    ``auto`` runs Triton on a GPU wherever an op's ``why_not`` knows no reason against it, PyTorch elsewhere.
    ``reference`` always runs PyTorch. ``triton`` runs Triton, on CPU tensors in its interpreter
    (``TRITON_INTERPRET=1``), and an op that cannot raises RuntimeError with the reason.

    The choice belongs to the current thread (context). A function under ``torch.compile`` follows the block that began
    last in the process and has not ended, and is compiled again when that changes. A backward pass runs what its
    forward pass ran.

    Raises:
        ValueError: any other name.
    """
    if name not in get_args(Backend):
        raise ValueError(f"backend: expected one of {', '.join(get_args(Backend))}, got {name!r}.")
    token, block = _choice.set(name), object()
    _note_block(block, name)
    try:
        yield
    finally:
        _choice.reset(token)
        _note_block(block, None)


def _note_block(block: object, name: Backend | None) -> None:
    """A block begins, or ends without a name. Blocks of two threads may overlap, so the first may end first."""
    global _latest
    with _blocks_lock:
        if name is None:
            del _open_blocks[block]
        else:
            _open_blocks[block] = name
        _latest = next(reversed(_open_blocks.values()), "auto")


def chosen_backend() -> Backend:
    """The choice in force here: ``auto`` unless a ``backend`` block encloses the call."""
    return _latest if torch.compiler.is_compiling() else _choice.get()


R = TypeVar("R")
_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_VALUES = frozenset((int, float, bool, str, type(None), torch.dtype))
_MOST_SIGNATURES = 4096


def once_per_signature(function: Callable[..., R]) -> Callable[..., R]:
    """Keep what a check of arguments returned, by what it may depend on.

    That is shape, strides, dtype, device and the need of a gradient of tensors, the values of all other arguments, and
    the choices in force: backend, autocast, gradients, the interpreter. Errors are not kept. The first argument is a
    tuple of the tensors; a call with another argument that is no plain number, string or dtype is always checked.
    """
    results: dict[Any, R] = {}

    @functools.wraps(function)
    def call(tensors: tuple[Tensor | None, ...], *values: Any) -> R:
        if torch.compiler.is_compiling():
            return function(tensors, *values)
        key: list[Any] = [*values, *_choices(tensors)]
        for x in tensors:
            if x is None:
                key.append(None)
            elif type(x) in _PLAIN:
                key += (x.shape, x.stride(), x.dtype, x.device, x.requires_grad)
            else:
                return function(tensors, *values)
        if any(type(value) not in _VALUES for value in values):
            return function(tensors, *values)
        signature = tuple(key)
        found = results.get(signature)
        if found is None:
            found = function(tensors, *values)
            if len(results) >= _MOST_SIGNATURES:
                results.clear()
            results[signature] = found
        return found

    return call


def _choices(tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """What decides beside the arguments which implementation runs."""
    first = tensors[0]
    kind = "cpu" if first is None else first.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    interpreted = kind == "cpu" and interpreting()
    return (_choice.get(), autocast, torch.is_grad_enabled(), interpreted, _forward_mode())


def use_triton(op: str, reason: str | None) -> bool:
    """Whether ``op`` runs its Triton kernels, given what its ``why_not`` said.

    Raises:
        RuntimeError: ``triton`` was chosen and there is a reason against it.
    """
    choice = chosen_backend()
    if choice == "triton" and reason is not None:
        raise RuntimeError(f"{op}: backend 'triton' cannot be honoured: {reason}; choose 'auto' or 'reference'.")
    return choice != "reference" and reason is None


def why_not_triton(tensors: Mapping[str, Tensor | None], head_size: int | None = None) -> str | None:
    """The reasons that all ops share, as half a sentence; None where there is none.

    Args:
        tensors: the op's tensor arguments by name, on one device (``check_devices``).
        head_size: channels per attention head, where the op has heads.
    """
    if not _TRITON_INSTALLED:
        return "triton is not installed"
    if _forward_mode():
        return "a forward-mode derivative is being taken, which the kernels do not compute"
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    device = next(iter(given.values())).device
    kind = device.type
    if kind == "cpu" and chosen_backend() != "triton":
        return "the tensors are on the CPU, where PyTorch is faster than Triton's interpreter"
    if kind == "cpu" and not interpreting():
        return "the tensors are on the CPU and Triton's interpreter is off (TRITON_INTERPRET=1 turns it on)"
    if kind not in ("cpu", "cuda"):
        return f"no kernel is written for the device type {kind}"
    against = _why_not_device(device) if kind == "cuda" else _why_not_interpreter(given)
    if against is not None:
        return against
    for name, tensor in given.items():
        if tensor.is_floating_point() and tensor.dtype not in KERNEL_DTYPES:
            return f"{name} is {tensor.dtype}; the kernels compute in float32, float16 or bfloat16"
        if tensor.numel() >= MAX_ELEMENTS or _reach(tensor) >= MAX_ELEMENTS:
            return f"{name} spans 2^31 elements or more, beyond the kernels' 32-bit offsets"
    if head_size is not None and (head_size < MIN_HEAD_SIZE or head_size & (head_size - 1)):
        return f"the head size {head_size} is not a power of two of at least {MIN_HEAD_SIZE}"
    return None


def why_not_gpu(gpu: Any, *, amd: bool = False) -> str | None:
    """Why no kernel runs on a GPU, as half a sentence; None where they do.

    Args:
        gpu: its properties, as ``torch.cuda.get_device_properties`` gives them.
        amd: it is one of AMD, whose architectures have no capability to compare.
    """
    capability = gpu.major, gpu.minor
    if not amd and capability < OLDEST_CAPABILITY:
        oldest = ".".join(map(str, OLDEST_CAPABILITY))
        return (
            f"{gpu.name} has compute capability {gpu.major}.{gpu.minor}, for which Triton makes no matrix "
            f"instructions ({oldest} is the first); PyTorch is faster there"
        )
    if usable_shared_memory(gpu) < LEAST_SHARED_MEMORY:
        return (
            f"a program on {gpu.name} may take {usable_shared_memory(gpu)} bytes of shared memory, "
            f"and the kernels need {LEAST_SHARED_MEMORY}"
        )
    return None


@functools.cache
def _why_not_device(device: torch.device) -> str | None:
    return why_not_gpu(torch.cuda.get_device_properties(device), amd=torch.version.hip is not None)


def _why_not_interpreter(tensors: Mapping[str, Tensor]) -> str | None:
    """Why Triton's interpreter cannot run the kernels on these tensors."""
    if importlib.util.find_spec("numpy") is None:
        return "Triton's interpreter computes with numpy, which is not installed"
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if torch.is_autocast_enabled("cpu"):
        dtypes.add(torch.get_autocast_dtype("cpu"))
    if torch.bfloat16 in dtypes:
        from eloftr_kernels.kernel_interpreter import computes_bfloat16

        if not computes_bfloat16():
            return (
                "Triton's interpreter computes bfloat16 wrongly (it multiplies its bits as whole numbers); "
                "float32 and float16 are right there, and bfloat16 is on a GPU"
            )
    return None


def _forward_mode() -> bool:
    """Whether the call is inside a level of forward-mode differentiation (``torch.func.jvp``, dual numbers)."""
    return not torch.compiler.is_compiling() and int(forward_ad._current_level) >= 0


def is_cpu_inference(x: Tensor) -> bool:
    """Whether work on ``x`` is better done piece by piece: on a CPU, with no graph to record and none to trace.

    What a piece needs stays in the caches, and in memory that the allocator keeps: it gives large tensors back to the
    system, and page faults on fresh ones cost more than most layers.
    """
    return x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def compute_dtype(x: Tensor, weight: Tensor | None = None) -> torch.dtype:
    """The dtype in which linear maps of ``x`` run: autocast's where that is on, else its own.

    A float32 ``x`` may meet a ``weight`` of half precision: then it is the weight's.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype in KERNEL_DTYPES:
        return torch.get_autocast_dtype(kind)
    if weight is not None and x.dtype == torch.float32 and weight.dtype in HALF_DTYPES:
        return weight.dtype
    return x.dtype


def reference_context(x: Tensor, dtype: torch.dtype) -> AbstractContextManager[object]:
    """In which PyTorch's operations run linear maps of ``x`` in ``dtype``: autocast where that is not its own."""
    kind = x.device.type
    if x.dtype == dtype or torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, dtype)


def rounds_below(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether products of ``x`` in ``dtype`` keep fewer bits of it than it has: then its common part goes first."""
    if x.dtype != torch.float32 or dtype in HALF_DTYPES:
        return x.dtype == torch.float32
    # A traced graph cannot hold what the process chose for its products.
    return not torch.compiler.is_compiling() and dot_precision(dtype) == "tf32"


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: float32 products follow ``torch.set_float32_matmul_precision``."""
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it that of ``x``."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may take on ``device``; 0 where there is none to speak of."""
    if device.type != "cuda":
        return 0
    return usable_shared_memory(torch.cuda.get_device_properties(device))


def usable_shared_memory(gpu: Any) -> int:
    """Bytes of shared memory that one program may take when it asks for all of them."""
    return int(getattr(gpu, "shared_memory_per_block_optin", gpu.shared_memory_per_block))


def check_shape(name: str, x: Tensor, expected: Sequence[int | None], symbols: str) -> None:
    """Raise ValueError unless ``x`` has the ``expected`` sizes (None: any), ``symbols`` in words."""
    sizes = zip(expected, x.shape, strict=False)
    if x.ndim != len(expected) or any(e is not None and e != s for e, s in sizes):
        wanted = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{name}: expected {symbols} = ({wanted}), got {tuple(x.shape)}.")


def check_dtype(name: str, x: Tensor, expected: torch.dtype, remedy: str) -> None:
    """Raise TypeError unless ``x`` has the ``expected`` dtype."""
    if x.dtype != expected:
        raise TypeError(f"{name}: expected {expected}, got {x.dtype}; {remedy}.")


def check_positive(name: str, value: float) -> None:
    """Raise unless ``value`` is a positive number. A tensor that requires a gradient would lose it: TypeError."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(
            f"{name}: expected a number, got a tensor that requires a gradient, which the op does not compute. "
            f"Divide the features by it before the call, or pass {name}.item()."
        )
    if not value > 0:
        raise ValueError(f"{name}: expected a positive number, got {value!r}.")


def check_devices(tensors: Mapping[str, Tensor | None]) -> None:
    """Raise ValueError unless all tensors lie on the device of the first."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first = next(iter(given))
    device = given[first].device
    for name, tensor in given.items():
        if tensor.device != device:
            raise ValueError(f"{name}: expected the device of {first}, {device}, got {tensor.device}; move it there.")


def check_indices(indices: Mapping[str, tuple[Tensor, int]]) -> None:
    """Raise IndexError for an index outside 0 .. size - 1, given (index, size) by name, as far as the host can tell.

    On the CPU every value is read, unless the call is being traced. Elsewhere reading would wait for the device:
    only an index into nothing is refused, and the op itself has to be safe.
    """
    for name, (index, size) in indices.items():
        if not index.numel():
            continue
        if size == 0:
            raise IndexError(f"{name}: expected no index, since there is nothing to index, got {len(index)}.")
        if index.device.type != "cpu" or torch.compiler.is_compiling():
            continue
        low, high = (int(bound) for bound in index.aminmax())
        if low < 0 or high >= size:
            raise IndexError(f"{name}: expected 0 to {size - 1}, got {low} to {high}; leave out what lies outside.")


def _reach(x: Tensor) -> int:
    """Elements from the first to the last of a strided tensor."""
    return sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1)
