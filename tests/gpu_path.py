"""Let tables on the CPU take the path that they take on a GPU: padded lookups, mirrored counts, Triton's interpreter.

take_gpu_path(monkeypatch)    until the test ends
with HostReads() as reads     ... ; reads.found names the calls that would make a GPU's host wait
"""

import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from recis.embedding import rows, table_set
from recis.embedding.rows import RowStore
from recis_kernels import dispatch
from recis_kernels.hash_index import HashIndex
from recis_kernels.hash_segments import SegmentTable

_ORDER = ("triton", "torch", "reference")  # of "auto" on a GPU


def take_gpu_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every table set of this test do on the CPU what it does on a GPU."""
    old_choose, old_launch = dispatch.choose, dispatch.launch

    def choose(impl: Any, tensor: torch.Tensor, **versions: Any) -> Any:
        if impl == "auto":
            impl = next(name for name in _ORDER if versions.get(name) is not None)
        return old_choose(impl, tensor, **versions)

    def launch(*args: Any, **options: Any) -> None:
        with _disable_current_modes():  # what the interpreter does is a kernel's own
            old_launch(*args, **options)

    replace_in_kernels(monkeypatch, "choose", old_choose, choose)
    replace_in_kernels(monkeypatch, "launch", old_launch, launch)
    monkeypatch.setattr(rows, "HashIndex", _MirroredIndex)
    monkeypatch.setattr(table_set, "RowStore", partial(RowStore, padded=True))


def replace_in_kernels(monkeypatch: pytest.MonkeyPatch, name: str, old: Any, new: Any) -> None:
    """Bind `name` anew in every module of the kernels that has it: each op binds what it imports."""
    for key, module in list(sys.modules.items()):
        if key.split(".")[0] == "recis_kernels" and vars(module).get(name) is old:
            monkeypatch.setattr(module, name, new)


class _MirroredIndex(HashIndex):
    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__(device)
        self._segments = SegmentTable(self.device, mirrored=True)


class HostReads(TorchDispatchMode):
    """Records calls of operators that read a value on the host, or whose result has a shape that depends on values."""

    WAITING = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "equal",
        "is_nonzero",
        "bincount",
        "repeat_interleave.Tensor",
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = str(func), kwargs or {}
        waits = any(word in name for word in self.WAITING) and kwargs.get("output_size") is None
        if name.startswith(("aten.index.", "aten.index_put")):
            waits |= any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if waits:
            self.found.append(name)
        return func(*args, **kwargs)
