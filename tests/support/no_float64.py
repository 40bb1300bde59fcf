# SPDX-License-Identifier: Apache-2.0
"""A stand-in for a device without float64, such as Apple's `mps`: there, any float64 tensor is an error."""

import contextlib
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

STAND_IN = torch.device("meta")  # a device type that torch knows and that no code under test uses


class OnDevice(Tensor):
    """A tensor on the stand-in device; its values lie in `data_on_cpu`."""

    data_on_cpu: Tensor

    @staticmethod
    def __new__(cls, data: Tensor) -> "OnDevice":
        if data.dtype is torch.float64:
            raise TypeError("Cannot convert a tensor to the stand-in device: it doesn't support float64.")
        wrapper = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, data.shape, strides=data.stride(), dtype=data.dtype, device=STAND_IN
        )
        wrapper.data_on_cpu = data
        return wrapper  # type: ignore[no-any-return]

    def tolist(self) -> Any:
        """Return the values, which torch refuses to subclasses."""
        return self.data_on_cpu.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class NoFloat64Device(TorchDispatchMode):
    """Within it, tensors made on or moved to `STAND_IN` hold values and refuse float64."""

    def __enter__(self) -> "NoFloat64Device":
        self._others = contextlib.ExitStack()
        self._others.enter_context(_FromNumbers())
        for name in ("autocast", "is_autocast_enabled", "get_autocast_dtype"):
            self._others.enter_context(mock.patch.object(torch, name, _of_cpu(getattr(torch, name))))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._others.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _FromNumbers(TorchFunctionMode):
    """`torch.tensor` and `new_tensor` on the stand-in device: torch would make them without values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.new_tensor and isinstance(args[0], OnDevice):
            kwargs = {"dtype": args[0].dtype, "device": STAND_IN, **kwargs}
            func, args = torch.tensor, args[1:]
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu") == STAND_IN:
            return on_device(torch.tensor(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


def _of_cpu(function: Any) -> Any:
    """Torch knows no autocast of the stand-in, whose arithmetic the CPU does."""
    return lambda kind, *rest, **options: function("cpu" if kind == STAND_IN.type else kind, *rest, **options)


def on_device(data: Tensor) -> Tensor:
    """Return a copy of a CPU tensor on the stand-in device, a leaf."""
    return OnDevice(data.detach().clone())


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    flat, _ = tree_flatten((args, kwargs))
    inputs = [x for x in flat if isinstance(x, Tensor)]
    here = [x for x in inputs if isinstance(x, OnDevice)]
    asked = kwargs.get("device")
    asked = None if asked is None else torch.device(asked)
    if here and asked is None and func is not torch.ops.aten.copy_.default:
        strangers = [x for x in inputs if not isinstance(x, OnDevice) and x.ndim > 0]
        if strangers and func not in (torch.ops.aten.index.Tensor,):
            raise RuntimeError(f"{func}: expected all tensors on the same device")
    target = asked if asked is not None else (STAND_IN if here else None)
    plain_args, plain_kwargs = tree_map(_plain, (args, kwargs))
    if asked is not None:
        plain_kwargs["device"] = torch.device("cpu")
    result = func(*plain_args, **plain_kwargs)
    if target != STAND_IN:
        return result
    return tree_map(lambda x: OnDevice(x) if isinstance(x, Tensor) else x, result)


def _plain(value: Any) -> Any:
    return value.data_on_cpu if isinstance(value, OnDevice) else value
