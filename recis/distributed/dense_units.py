"""Which parts of a model's dense part are gathered together when it is dealt to ranks (`parallel.shard_dense`).

unit     a submodule with many parameters that the model calls as a whole: gathered before it runs, let go after
root     everything else: gathered before the model runs, let go after backward
kept     what cannot be cut by its first dimension: scalars, empty and integer parameters stay whole on every rank
"""

from collections import Counter
from collections.abc import Iterable

from torch import nn

from recis.errors import ConfigError


def find_units(model: nn.Module, unit_parameters: int) -> dict[str, nn.Module]:
    """Return the units of a model by name: its children, through lists and dicts of modules, but not theirs.

    A child that shares a parameter with something outside of it is none: its weights are needed when it does not run.

    Args:
        model: whose dense part is dealt.
        unit_parameters: numbers of the smallest unit.
    """
    paths = Counter(id(value) for _, value in model.named_parameters(remove_duplicate=False))
    found: dict[str, nn.Module] = {}

    def look_into(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            if type(child).forward is nn.Module.forward:  # a container: the model calls what is in it
                look_into(child, f"{prefix}{name}.")
                continue
            own = Counter(id(value) for _, value in child.named_parameters(remove_duplicate=False))
            is_private = all(paths[key] == count for key, count in own.items())
            if is_private and num_values(child.parameters()) >= unit_parameters:
                found[prefix + name] = child

    look_into(model, "")
    return found


def kept_whole(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that stay whole on every rank, by name."""
    return {
        name: value
        for name, value in model.named_parameters()
        if value.ndim == 0 or value.numel() == 0 or not value.is_floating_point()
    }


def check_types(model: nn.Module, units: dict[str, nn.Module]) -> None:
    """Refuse units whose trained parameters have more than one type: their gradients travel as one message.

    Raises:
        ConfigError: there is one; the text names two of its parameters.
    """
    unit_of = {id(value): name for name, module in units.items() for value in module.parameters()}
    kept = {id(value) for value in kept_whole(model).values()}
    first: dict[str, tuple[str, nn.Parameter]] = {}
    for name, value in model.named_parameters():
        if not value.requires_grad or id(value) in kept:
            continue
        unit = unit_of.get(id(value), "")
        other_name, other = first.setdefault(unit, (name, value))
        if other.dtype != value.dtype:
            where = f"unit {unit!r}" if unit else "the model outside its units"
            raise ConfigError(
                f"parallel.shard_dense: {where} trains {other_name!r} in {other.dtype} and {name!r} in {value.dtype}; "
                "gradients of a unit travel in one type: build it in one, or lower parallel.unit_parameters so that they "
                "are in units of their own, or set parallel.shard_dense=false"
            )


def whole_at_once(model: nn.Module, unit_parameters: int) -> int:
    """Return how many numbers a rank holds gathered at most: those outside units, and two units while one makes way."""
    units = find_units(model, unit_parameters)
    sizes = sorted(num_values(module.parameters()) for module in units.values())
    return num_values(model.parameters()) - sum(sizes) + sum(sizes[-2:])


def num_values(parameters: Iterable[nn.Parameter]) -> int:
    """Return how many numbers some parameters hold."""
    return sum(value.numel() for value in parameters)
