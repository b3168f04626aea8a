"""Find the parts of a model, and write the dense optimizer's state down by parameter name.

A model is any nn.Module. Whatever of it is an embedding collection is served by the tables; all its other parameters and
buffers are dense.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recis.checkpoint.load import FROZEN
from recis.embedding import EmbeddingBagCollection, EmbeddingCollection, HashTable, TableSet
from recis.errors import CheckpointError, ConfigError
from recis.jagged import JaggedTensor
from recis.trainer.config import ModelConfig, TrainConfig

Collection = EmbeddingBagCollection | EmbeddingCollection


def build_model(config: TrainConfig) -> nn.Module:
    """Return the module of a run: `config.model.build()`, or `config.model()`.

    Raises:
        ConfigError: that gives something else than a module.
    """
    made = config.model.build() if isinstance(config.model, ModelConfig) else config.model()
    if not isinstance(made, nn.Module):
        raise ConfigError(f"TrainConfig {config.name!r}: model must build an nn.Module; got {type(made).__name__}")
    return made


def find_collections(model: nn.Module) -> list[Collection]:
    """Return the embedding collections anywhere inside a model, each once."""
    return [module for module in model.modules() if isinstance(module, Collection)]


def table_sets(collections: Sequence[Collection]) -> list[TableSet]:
    """Return the table sets behind some collections, each once."""
    return list({id(collection.table_set): collection.table_set for collection in collections}.values())


def all_tables(sets: Sequence[TableSet]) -> dict[str, HashTable]:
    """Return the tables of all sets by name; ConfigError when two sets have one name."""
    tables: dict[str, HashTable] = {}
    for table_set in sets:
        for name, table in table_set.tables.items():
            if name in tables:
                raise ConfigError(
                    f"two collections have a table {name!r} each; rename one, or build both on one TableSet to share it"
                )
            tables[name] = table
    return tables


def dense_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name; an empty one where there are none, as torch's optimizers want one."""
    found = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return found or {"none": nn.Parameter(torch.empty(0))}


def named_optimizer_state(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Any]:
    """Return an optimizer's state by parameter name; `names` in the order of its parameters."""
    state = optimizer.state_dict()
    return {
        "state": {names[index]: value for index, value in state["state"].items()},
        "groups": [
            {
                **{key: value for key, value in group.items() if key != "params"},
                "params": [names[i] for i in group["params"]],
            }
            for group in state["param_groups"]
        ],
    }


def load_named_optimizer_state(
    optimizer: torch.optim.Optimizer, names: Sequence[str], saved: Mapping[str, Any]
) -> None:
    """Take up what named_optimizer_state returned.

    Raises:
        CheckpointError: it was saved for other parameters.
    """
    index = {name: position for position, name in enumerate(names)}
    try:
        state = {index[name]: dict(value) for name, value in saved["state"].items()}
        groups = [{**group, "params": [index[name] for name in group["params"]]} for group in saved["groups"]]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"the saved dense optimizer does not fit this one ({error}); load without the part 'optimizer'"
        ) from error


def nonfinite_features(collections: Sequence[Collection], batch: Any) -> list[str]:
    """Return what in a batch is not finite: features whose rows are not, dense features, labels, weights."""
    found = []
    for collection in collections:
        training = collection.training
        collection.eval()
        try:
            with torch.no_grad():
                found += [name for name, value in collection(batch.sparse).items() if not _finite(value)]
        finally:
            collection.train(training)
    first = 0
    for name, width in zip(batch.dense_keys, batch.dense_widths, strict=True):
        if not _finite(batch.dense[:, first : first + width]):
            found.append(name)
        first += width
    found += [name for name in ("labels", "weights") if not _finite(_present(batch, name))]
    return found


def _present(batch: Any, name: str) -> Tensor:
    values = getattr(batch, name)
    return values[batch.label_mask] if name == "labels" and batch.label_mask is not None else values


def _finite(value: Tensor | JaggedTensor) -> bool:
    return _finite(value.values) if isinstance(value, JaggedTensor) else bool(torch.isfinite(value).all())


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers of a model, which a checkpoint holds; tables are saved apart.

    A module with a method `frozen_state` (see recis.towers.weights) keeps weights that come from a file and do not train: for
    them a checkpoint holds their hash alone, under `frozen_sha256`, which is compared when it is loaded.

    Raises:
        ConfigError: a module has extra state (get_extra_state), which would be lost.
    """
    state = model.state_dict()
    for name, value in state.items():
        if name.split(".")[-1] == "_extra_state" or not isinstance(value, Tensor):
            raise ConfigError(
                f"the model's state {name!r} is no parameter or buffer and would be lost in a checkpoint; keep it in a "
                "buffer (register_buffer), or in a hook"
            )
    for path, module in model.named_modules():
        tell: Any = getattr(module, "frozen_state", None)
        if callable(tell):
            frozen: Any = tell()
            prefix = f"{path}." if path else ""
            left_out = {prefix + name for name in frozen.names}
            state = {name: value for name, value in state.items() if name not in left_out}
            state[prefix + FROZEN] = frozen.digest
    return state
