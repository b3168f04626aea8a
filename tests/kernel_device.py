"""Run the kernel tests on a GPU as they are: they build CPU tensors, and launches take those there and back.

    pytest tests/kernels --kernel-device cuda        compiled kernels on the GPU; the default where there is one
    pytest tests/kernels --kernel-device cpu         Triton's interpreter; the default elsewhere

A launch whose tensors lie on the CPU copies the storage of each to the device, runs the compiled kernel on the copies and
copies all of them back: tensors that share memory share it there too. Memory that kernels reach by addresses (row blocks,
hash slots) is pinned, so its addresses hold on the device; addresses of other live tensors, found in an int64 argument,
are replaced by those of their copies. What ops do around their launches on CUDA tensors is what
`recis.bench.gpu_cases` checks.
"""

import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

OPTION = "--kernel-device"
_MAPPED, _HIGHEST = 1 << 46, 1 << 47  # where Linux maps heap and libraries of a process: 0x5555..., 0x7fff...


def _lowest_address() -> int:
    """Return where memory of this process may begin: the heap of a Python that is no PIE (Debian's) lies far below the rest."""
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
        heaps = [int(line.partition("-")[0], 16) for line in maps if line.endswith("[heap]")]
    except OSError:  # not Linux
        heaps = []
    return min([*heaps, _MAPPED])


def add_option(parser: pytest.Parser) -> None:
    """Add --kernel-device."""
    parser.addoption(
        OPTION, choices=("cpu", "cuda"), help="where Triton kernels run in tests (default: cuda where there is a GPU)"
    )


def device_of(config: pytest.Config) -> torch.device:
    """Return where this run's kernels run."""
    chosen = config.getoption(OPTION, default=None)
    return torch.device(chosen or ("cuda" if torch.cuda.is_available() else "cpu"))


def on_host(value: Any) -> Any:
    """Return tensors, and tensors in tuples, lists, dicts and dataclass-like slots, on the CPU: for comparisons."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: on_host(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(on_host, value))
    return value


def mirror_launches(device: torch.device) -> None:
    """Let launches on CPU tensors run on `device`; before or after the ops were imported."""
    from recis_kernels import dispatch, host_memory

    pinned: list[tuple[int, int]] = []  # torch keeps pinned memory for later use, so a range stays pinned
    _replace("launch", dispatch.launch, mirrored(dispatch.launch, device, pinned))
    _replace("zeroed_bytes", host_memory.zeroed_bytes, _pinned_zeroed_bytes(host_memory.zeroed_bytes, pinned))


def _replace(name: str, old: Any, new: Any) -> None:
    """Bind `name` anew in every module of the kernels that has it: each op binds what it imports."""
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] == "recis_kernels" and vars(module).get(name) is old:
            setattr(module, name, new)


def mirrored(
    launch: Callable[..., None], device: torch.device, pinned: Sequence[tuple[int, int]] = ()
) -> Callable[..., None]:
    """Return a launch that runs on `device` what `launch` would be given on the CPU; pinned as in Copies."""

    def launch_there(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if any(tensor.device.type != "cpu" for tensor in tensors) or not tensors or 0 in grid:
            launch(kernel, grid, *args, **options)
            return
        with torch.no_grad():
            copies = Copies(device, pinned)
            placed = [copies.of(arg) if isinstance(arg, Tensor) else arg for arg in args]
            if device.type == "cuda":  # pinned tensors stay where they are, so the devices of the arguments differ
                with torch.cuda.device(device):
                    kernel[grid](*placed, enable_fp_fusion=False, **options)
            else:
                launch(kernel, grid, *placed, **options)
            copies.bring_back()

    return launch_there


class Copies:
    """Copies of CPU storages on a device, each storage once.

    Args:
        pinned: address ranges that the device reads as they are.
    """

    def __init__(self, device: torch.device, pinned: Sequence[tuple[int, int]] = ()) -> None:
        self.device = device
        self.pinned = pinned
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}
        self._words: dict[tuple[int, int], Tensor] = {}

    def of(self, tensor: Tensor) -> Tensor:
        """Return what stands for a CPU tensor on the device; a pinned one stands for itself."""
        if self._reaches(tensor):
            return tensor
        there = self._storage(tensor)
        view = torch.empty(0, dtype=tensor.dtype, device=self.device)
        view.set_(there.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
        if tensor.dtype == torch.int64:
            self._translate(tensor, view)
        return view

    def bring_back(self) -> None:
        """Write what the kernel left in the copies back to the CPU; addresses in copies become those of the originals."""
        for here, there in self._copies.values():
            here.copy_(there)
        for words in self._words.values():
            for here, there in self._copies.values():
                start = there.data_ptr()
                inside = (words >= start) & (words < start + there.numel())
                words[inside] += here.data_ptr() - start

    def _reaches(self, tensor: Tensor) -> bool:
        """Return whether the device reads this CPU memory at its own address."""
        return self.device.type == "cuda" and tensor.is_pinned()

    def _storage(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
        if start not in self._copies:
            here = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._copies[start] = (here, torch.empty_like(here, device=self.device).copy_(here))
        return self._copies[start][1]

    def _translate(self, tensor: Tensor, view: Tensor) -> None:
        """Replace addresses of live CPU tensors in `view`, the copy of `tensor`, by those of their copies."""
        if (tensor.data_ptr(), tensor.numel()) in self._words:
            return
        self._words[tensor.data_ptr(), tensor.numel()] = tensor
        suspects = tensor[(tensor >= _lowest_address()) & (tensor < _HIGHEST)].unique().tolist()
        suspects = [address for address in suspects if not any(low <= address < high for low, high in self.pinned)]
        for address, owner in _owners(suspects).items():
            if not self._reaches(owner):
                shift = self._storage(owner).data_ptr() - owner.untyped_storage().data_ptr()
                view[(tensor == address).to(self.device)] = address + shift


def _owners(addresses: Sequence[int]) -> dict[int, Tensor]:
    """Return a live CPU tensor whose storage holds the address, for each address of which there is one."""
    found: dict[int, Tensor] = {}
    if not addresses:
        return found
    kinds = (Tensor, torch.nn.Parameter)
    for item in [item for item in gc.get_objects() if type(item) in kinds]:  # a million objects: no work in the loop
        if item.device.type == "cpu" and item.layout == torch.strided:
            storage = item.untyped_storage()
            start, stop = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
            found.update({address: item.detach() for address in addresses if start <= address < stop})
    return found


def _pinned_zeroed_bytes(zeroed_bytes: Callable[..., Tensor], ranges: list[tuple[int, int]]) -> Callable[..., Tensor]:
    """Return a zeroed_bytes that pins what it gives and notes where it lies."""
    from recis_kernels.host_memory import ALIGNMENT

    def pinned(num_bytes: int, device: torch.device | str = "cpu") -> Tensor:
        if torch.device(device).type != "cpu":
            return zeroed_bytes(num_bytes, device)
        buffer = torch.zeros(num_bytes + ALIGNMENT, dtype=torch.uint8, pin_memory=True)
        ranges.append((buffer.data_ptr(), buffer.data_ptr() + buffer.numel()))
        return buffer[-buffer.data_ptr() % ALIGNMENT :][:num_bytes]

    return pinned
