"""Where the memory of a joint training goes: weights, gradients and optimizer state by part, tables, mapped files.

Bytes are counted from the tensors that are there when it is asked; activations are none of them, so the process's peak is
given beside. Mapped vectors and states are the file's: the system reads what is used and drops it when memory is short.
"""

import resource
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recis.towers.optimizer import part_of

MIB = 2**20


@dataclass(frozen=True, slots=True)
class PartMemory:
    """Bytes of one part of a model."""

    name: str
    frozen: int
    trained: int
    gradients: int
    optimizer: int
    mapped: int = 0

    @property
    def total(self) -> int:
        """What the process itself holds."""
        return self.frozen + self.trained + self.gradients + self.optimizer


def measure_memory(model: nn.Module, optimizer: torch.optim.Optimizer, tables: Mapping[str, Any]) -> list[PartMemory]:
    """Return the parts: each table, the ranker, each tower, the gates.

    Args:
        model: any module; parts are the marks of recis.towers.optimizer, `ranker` is what has none.
        optimizer: of its dense parameters.
        tables: by name, as Trainer.tables.
    """
    counts: dict[str, dict[str, int]] = {}

    def own_of(parameter: nn.Parameter) -> dict[str, int]:
        name = part_of(parameter) or "ranker"
        return counts.setdefault(name, dict.fromkeys(("frozen", "trained", "grad", "state"), 0))

    for parameter in model.parameters():
        own_of(parameter)["trained" if parameter.requires_grad else "frozen"] += _bytes(parameter)
    for group in optimizer.param_groups:
        for parameter in group["params"]:  # where the dense part is dealt to ranks these are not the model's own
            own = own_of(parameter)
            own["grad"] += 0 if parameter.grad is None else _bytes(parameter.grad)
            state = optimizer.state.get(parameter, {})
            own["state"] += sum(_bytes(value) for value in state.values() if isinstance(value, Tensor))
    mapped = {name: _mapped(tower) for name, tower in getattr(model, "towers", {}).items()}
    parts = [_of_table(name, table) for name, table in tables.items()]
    for name in dict.fromkeys((*counts, *mapped)):
        own = counts.get(name, dict.fromkeys(("frozen", "trained", "grad", "state"), 0))
        parts.append(PartMemory(name, own["frozen"], own["trained"], own["grad"], own["state"], mapped.get(name, 0)))
    return parts


def memory_report(model: nn.Module, optimizer: torch.optim.Optimizer, tables: Mapping[str, Any]) -> str:
    """Return measure_memory as a table in MiB, with the peak of the process."""
    lines = [f"  {'memory, MiB':<18}{'frozen':>9}{'trained':>9}{'gradients':>11}{'optimizer':>11}{'mapped':>9}"]
    for part in measure_memory(model, optimizer, tables):
        values = (part.frozen, part.trained, part.gradients, part.optimizer, part.mapped)
        shown = [f"{value / MIB:.1f}" for value in values]
        lines.append("  {:<18}{:>9}{:>9}{:>11}{:>11}{:>9}".format(part.name, *shown))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return "\n".join([*lines, f"  peak of the process, activations and libraries included: {peak / MIB:,.0f}"])


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _mapped(tower: nn.Module) -> int:
    file = getattr(tower, "file", None)
    held = getattr(file, "vectors", None)
    held = getattr(file, "states", None) if held is None else held
    return 0 if held is None else _bytes(held)


def _of_table(name: str, table: Any) -> PartMemory:
    rows, width = len(table), table.config.embedding_dim
    weights = rows * width * table.config.torch_dtype.itemsize
    return PartMemory(f"table {name}", 0, weights, 0, 4 * rows * sum(table.state_widths.values()))
