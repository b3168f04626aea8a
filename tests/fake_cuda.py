"""Run tables on a CUDA device that is not there: fake tensors with a device, a shape and no content; kernels do nothing.

    with fake_cuda(monkeypatch) as launched: ...    tensors may be made with device="cuda"; launched names the kernels

What it finds: a call that reads a value on the host (item, nonzero, a boolean index, .cpu()), and tensors of two devices
in one call or one launch. A torch without CUDA refuses some calls on such tensors in C++, so these are done in Python.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from gpu_path import replace_in_kernels
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from recis.embedding import late_reading
from recis_kernels import dispatch
from recis_kernels.hash_index import HashIndex
from recis_kernels.hash_segments import SegmentTable

_aten = torch.ops.aten
_to, _getitem, _setitem = Tensor.to, Tensor.__getitem__, Tensor.__setitem__


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Enter the fake; everything that is used inside must be made inside."""
    launched: list[str] = []

    def launch(kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
        devices = {arg.device.type for arg in args if isinstance(arg, Tensor)}
        name = getattr(kernel, "__name__", str(kernel))
        assert devices == {"cuda"}, (name, devices)
        launched.append(name)

    replace_in_kernels(monkeypatch, "launch", dispatch.launch, launch)
    for name, function in (
        ("to", _to_there),
        ("cpu", _refuse),
        ("numpy", _refuse_cuda(Tensor.numpy)),
        ("tolist", _refuse_cuda(Tensor.tolist)),
        ("isfinite", lambda self: self.abs() < float("inf")),
        ("__invert__", lambda self: _aten.bitwise_not(self)),
        ("__getitem__", _get),
        ("__setitem__", _set),
    ):
        monkeypatch.setattr(Tensor, name, function)
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda self: 256, raising=False)
    monkeypatch.setattr(FakeTensor, "pin_memory", lambda self: self, raising=False)
    monkeypatch.setattr(late_reading, "_Copy", _NeverThere)
    # the index counts on the host, from numbers that fakes do not have: its own tests look at that
    monkeypatch.setattr(HashIndex, "make_room", lambda *args, **options: None)
    monkeypatch.setattr(HashIndex, "maintain", lambda *args, **options: None)
    monkeypatch.setattr(SegmentTable, "start_reading", lambda self: None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield launched


class _NeverThere:
    """A copy to the host that does not arrive."""

    has_arrived = False

    def __init__(self, values: Tensor) -> None:
        assert values.is_cuda


def _refuse(self: Tensor) -> Tensor:
    raise AssertionError("a tensor is copied to the host: this waits")


def _refuse_cuda(function: Any) -> Any:
    def checked(self: Tensor) -> Any:
        return _refuse(self) if self.is_cuda else function(self)

    return checked


def _to_there(self: Tensor, *args: Any, **options: Any) -> Tensor:
    device = options.get("device") or next((arg for arg in args if isinstance(arg, str | torch.device)), None)
    dtype = options.get("dtype") or next((arg for arg in args if isinstance(arg, torch.dtype)), self.dtype)
    is_there = device is not None and torch.device(device).type == "cuda"
    if self.is_cuda:
        assert device is None or is_there, "a tensor is copied to the host: this waits"
        return self if dtype == self.dtype and not options.get("copy") else _aten._to_copy(self, dtype=dtype)
    return _aten._to_copy(self, device=torch.device("cuda"), dtype=dtype) if is_there else _to(self, *args, **options)


def _get(self: Tensor, index: Any) -> Tensor:
    if not self.is_cuda:
        return _getitem(self, index)
    out, dim, tensors = self, 0, []
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, int):
            out = _aten.select.int(out, dim, part)
            continue
        if part is None:
            out = out.unsqueeze(dim)
        elif isinstance(part, slice):
            out = _aten.slice.Tensor(out, dim, part.start, part.stop, part.step or 1)
        else:
            assert part.is_cuda, "an index from the host: this waits"
            assert part.dtype != torch.bool, "a boolean index: this waits"
        tensors.append(part if isinstance(part, Tensor) else None)
        dim += 1
    return _aten.index.Tensor(out, tensors) if any(part is not None for part in tensors) else out


def _set(self: Tensor, index: Any, value: Any) -> None:
    if not self.is_cuda:
        _setitem(self, index, value)
        return
    _get(self, index)
    assert not isinstance(value, Tensor) or value.is_cuda, "a value from the host: this waits"
