"""Fill the sharded tables of a DistributedModelParallel from an exported collection: weights and optimizer state.

DistributedModelParallel leaves behind the weights of an EmbeddingBagCollection that lies on the CPU: its shards start from
`init_fn`, without a word. This brings them in, and with them what the fused optimizer keeps per row.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from recis.errors import ConfigError, nearest
from recis.torchrec.export import Exported, weights_of


def fill_shards(model: Any, exported: Exported, *, states: bool = True) -> None:
    """Copy an export into the tables of the same names that a DistributedModelParallel has sharded, in place.

    Args:
        model: the DistributedModelParallel; every rank calls this, with an equal export.
        exported: not the one inside of the model, whose tables are sharded by now: a second one of the same collection.
        states: whether the fused optimizer takes over the rows' state too.

    Raises:
        ConfigError: the model lacks a table or has it in another shape, or its optimizer keeps another state; the text names
            table and way out.
    """
    try:
        given = {name: weight.detach() for name, weight in weights_of(exported.embeddings).items()}
    except AttributeError as error:
        raise ConfigError(
            "fill_shards: the tables of this export are sharded themselves; export the collection once more"
        ) from error
    found = {_table_of(name): value for name, value in model.state_dict().items() if _table_of(name) is not None}
    kept = _kept_states(model)
    faults = [_fault(name, weights, found) for name, weights in given.items()]
    if states and not any(faults):
        faults = [_state_fault(name, exported.states[name], kept.get(name), found[name]) for name in given]
    _raise_together(model, [fault for fault in faults if fault])
    with torch.no_grad():
        for name, weights in given.items():
            _fill(found[name], weights)
            if states and name in kept:  # a rank without shards of a table has none of its state
                state = exported.states[name]["h"]
                _fill(kept[name], state if len(kept[name].size()) == 2 else state.squeeze(1))


def _table_of(name: str) -> str | None:
    """Return the table in `...embedding_bags.<table>.weight` or `...embeddings.<table>.weight`."""
    parts = name.split(".")
    is_table = len(parts) >= 3 and parts[-1] == "weight" and parts[-3] in ("embedding_bags", "embeddings")
    return parts[-2] if is_table else None


def _kept_states(model: Any) -> dict[str, Any]:
    """Return the one state per row that a fused optimizer keeps, by table; on a rank without shards of it there is none."""
    out: dict[str, Any] = {}
    for name, states in model.fused_optimizer.state_dict()["state"].items():
        table = _table_of(name)
        for state, value in states.items():
            if table is not None and state == f"{table}.momentum1":
                out[table] = value
    return out


def _raise_together(model: Any, faults: list[str]) -> None:
    """Raise on all ranks what one of them has found: a rank without shards of a table does not know its state."""
    group = model._env.process_group
    every: list[list[str]] = [faults]
    if group is not None and dist.get_world_size(group) > 1:
        every = [[] for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(every, faults, group=group)
    found = list(dict.fromkeys(fault for faults in every for fault in faults))
    if found:
        raise ConfigError("; ".join(found))


def _fault(name: str, weights: Tensor, found: Mapping[Any, Any]) -> str:
    """Return why weights cannot be filled in; "" where they can."""
    if name not in found:
        return f"fill_shards: the model has no table {name!r}; {nearest(name, [str(key) for key in found])}"
    theirs, ours = tuple(found[name].size()), tuple(weights.size())
    if theirs != ours:
        return (
            f"table {name!r}: the model has weights {theirs}, the export {ours}; export what the model was built from"
        )
    return ""


def _state_fault(name: str, ours: Mapping[str, Tensor], theirs: Any, weights: Any) -> str:
    """Return why the optimizer state cannot be filled in, as far as this rank can tell; "" where it can."""
    out = "; give the model the same optimizer, or fill with states=False"
    is_sharded = hasattr(weights, "local_shards")
    if set(ours) - {"h"}:
        return f"table {name!r}: its rows carry {sorted(ours)}, which no fused optimizer here can take over{out}"
    if not is_sharded and ours:
        return f"table {name!r} is data-parallel in the model, whose fused optimizer has no state for it{out}"
    if not is_sharded or not weights.local_shards():
        return ""
    if (theirs is None) != (not ours):
        has = "none" if theirs is None else "one value or vector per row"
        return f"table {name!r}: its rows carry {sorted(ours) or 'no state'}, the model's optimizer keeps {has}{out}"
    if not ours:
        return ""
    is_row_wise, dim = len(theirs.size()) == 1, weights.size()[1]
    if is_row_wise and weights.local_shards()[0].tensor.shape[1] < dim:
        return (
            f"table {name!r} is cut by columns in the model, where every shard keeps an accumulator per row for its own "
            "columns alone; constrain it to table_wise, or fill with states=False"
        )
    if is_row_wise != (ours["h"].shape[1] < dim):
        return (
            f"table {name!r}: its rows carry h of width {ours['h'].shape[1]}, the model's optimizer state is of shape "
            f"{tuple(theirs.size())}{out}"
        )
    return ""


def _fill(target: Any, values: Tensor) -> None:
    """Copy values into a tensor, or their part into the shards of this rank."""
    if not hasattr(target, "local_shards"):
        target.copy_(values)
        return
    for shard in target.local_shards():
        cut = tuple(
            slice(start, start + size)
            for start, size in zip(shard.metadata.shard_offsets, shard.metadata.shard_sizes, strict=True)
        )
        shard.tensor.copy_(values[cut])
