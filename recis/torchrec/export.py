"""A collection of dynamic tables as TorchRec's collection of fixed ones, and back.

    exported = to_torchrec(collection);  exported(kjt) == collection(batch)     exported.embeddings is TorchRec's own module
    optimizer = exported.optimizer()                                            goes on with the rows' optimizer state
    collection = from_torchrec(exported, optimizer=..., seed=..., trained_by=optimizer)

A table becomes V + 1 rows: its ids ascending, then one row that every other id reads (zeros, or the table's default row).
Optimizer state goes along for the rules under which a row without gradient stays as it is, also in torch's dense form: SGD,
Adagrad and row-wise Adagrad. All others are refused by name.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection as TorchRecBags
from torchrec.modules.embedding_modules import EmbeddingCollection as TorchRecSingle
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad as TorchRecRowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor as TorchRecKeyed

from recis.embedding import EmbeddingBagCollection, EmbeddingCollection, HashTable, TableConfig, Tile
from recis.embedding.config import Feature, Pooling
from recis.embedding.initializers import Initializer, Uniform
from recis.errors import ConfigError
from recis.optim.config import Adagrad, RowOptimizer, RowWiseAdagrad, Sgd
from recis.torchrec.vocabulary import FixedVocabulary, require_all_rows

_POOLING = {"sum": PoolingType.SUM, None: PoolingType.SUM, "mean": PoolingType.MEAN}
_POOLING_BACK: dict[PoolingType, Pooling] = {PoolingType.SUM: "sum", PoolingType.MEAN: "mean"}


class Exported(nn.Module):
    """TorchRec's collection with the ids it serves.

    Attributes:
        vocabulary: ids to rows.
        embeddings: TorchRec's EmbeddingBagCollection or EmbeddingCollection, of row numbers.
        configs: of our tables, by name.
        states: table -> name -> optimizer state of the rows, [V + 1, width]; of the last row as of a new one.
    """

    def __init__(
        self,
        vocabulary: FixedVocabulary,
        embeddings: TorchRecBags | TorchRecSingle,
        configs: Mapping[str, TableConfig],
        states: Mapping[str, Mapping[str, Tensor]],
    ) -> None:
        super().__init__()
        self.vocabulary, self.embeddings = vocabulary, embeddings
        self.configs, self.states = dict(configs), states

    def forward(self, features: TorchRecKeyed) -> Any:
        """Return KeyedTensor [B, sum D], or {feature: JaggedTensor}, of a batch of ids.

        Raises:
            ValueError: ids are not int64, or the batch has weights that this export would leave out.
        """
        return self.embeddings(self.vocabulary(features))

    def optimizer(self) -> CombinedOptimizer:
        """Return an optimizer of all tables that goes on where ours stood; learning rates are the configs'.

        Raises:
            ConfigError: a table's optimizer has no equal over dense parameters; the text names both.
        """
        optimizers: list[KeyedOptimizer | tuple[str, KeyedOptimizer]] = []
        for name, weights in weights_of(self.embeddings).items():
            build = _dense_optimizer(self.configs[name])
            made = KeyedOptimizerWrapper({name: weights}, build)
            if "h" in self.states[name]:
                made.state[weights]["sum"].copy_(self.states[name]["h"])
            optimizers.append(made)
        return CombinedOptimizer(optimizers)


def to_torchrec(collection: EmbeddingBagCollection | EmbeddingCollection, *, is_weighted: bool = False) -> Exported:
    """Return a collection as TorchRec's, with its ids of now as a fixed vocabulary.

    bfloat16 rows become float32: TorchRec would make float16 of them.

    Args:
        collection: all of whose rows lie in this process.
        is_weighted: whether batches carry weights (for sums; torch has no weighted mean).

    Raises:
        ConfigError: a table that TorchRec has no form for; the text names table, setting and way out.
    """
    pools = isinstance(collection, EmbeddingBagCollection)
    table_set = collection.table_set
    tables: dict[str, HashTable] = {}
    features: dict[str, list[Feature]] = {}
    for name, feature in collection.features.items():
        table = table_set.features[name][1]
        tables[table.name] = table
        features.setdefault(table.name, []).append(feature)
    configs: list[Any] = []
    exported = {name: _rows_of(table) for name, table in tables.items()}
    for name, table in tables.items():
        shape: dict[str, Any] = {
            "name": name,
            "num_embeddings": exported[name]["weight"].shape[0],
            "embedding_dim": table.config.embedding_dim,
            "feature_names": [feature.name for feature in features[name]],
        }
        if pools:
            shape["pooling"] = _POOLING[_one_pooling(name, features[name], is_weighted)]
        configs.append(EmbeddingBagConfig(**shape) if pools else EmbeddingConfig(**shape))
    if not pools and len({config.embedding_dim for config in configs}) > 1:
        widths = {config.name: config.embedding_dim for config in configs}
        raise ConfigError(
            f"TorchRec's EmbeddingCollection has one width for all tables; these have {widths}: export a collection per "
            "width, with features="
        )
    for name in tables:
        if "." in name or hasattr(nn.ModuleDict(), name):
            raise ConfigError(
                f"table {name!r}: TorchRec makes a module's name of a table's, which can hold no dot and be no attribute of "
                "nn.ModuleDict; give the table another name (recis.checkpoint.load renames with tables=)"
            )
    embeddings = TorchRecBags(configs, is_weighted=is_weighted) if pools else TorchRecSingle(configs)
    with torch.no_grad():
        for name, weights in weights_of(embeddings).items():
            weights.copy_(exported[name]["weight"])
    vocabulary = FixedVocabulary(
        {name: fields["ids"] for name, fields in exported.items()},
        {feature.name: name for name, group in features.items() for feature in group},
        takes_weights=is_weighted or not pools,
    )
    states = {
        name: {key.removeprefix("state."): value for key, value in fields.items() if key.startswith("state.")}
        for name, fields in exported.items()
    }
    ours = {name: table.config for name, table in tables.items()}
    return Exported(vocabulary, embeddings, ours, states)


def _rows_of(table: HashTable) -> dict[str, Tensor]:
    """Return ids [V], and weights and states [V + 1, ...] with the row that other ids read as the last."""
    require_all_rows(table)
    fields = table.export()
    first = dict(zip(table.state_widths, table.config.optimizer.initial_state(), strict=True))
    last = table.default_row if table.config.unadmitted == "default_row" else torch.zeros(table.config.embedding_dim)
    out = {"ids": fields["ids"], "weight": torch.cat([fields["weight"].float(), last[None]])}
    for name, value in first.items():
        state = fields[f"state.{name}"]
        out[f"state.{name}"] = torch.cat([state, state.new_full((1, state.shape[1]), value)])
    return out


def _one_pooling(name: str, features: list[Feature], is_weighted: bool) -> Any:
    poolings = {feature.pooling or "sum" for feature in features}
    for feature in features:
        if isinstance(feature.pooling, Tile):
            raise ConfigError(
                f"feature {feature.name!r} has pooling {feature.pooling}, which TorchRec has not: leave it out with features=, "
                "or export an EmbeddingCollection and cut its vectors"
            )
    if len(poolings) > 1:
        raise ConfigError(
            f"table {name!r} is pooled by sum and by mean, and a table of TorchRec has one pooling: export two collections, "
            "with features="
        )
    (pooling,) = poolings
    if pooling == "mean" and is_weighted:
        raise ConfigError(f"table {name!r}: torch has no weighted mean; export with is_weighted=False")
    return pooling


def weights_of(embeddings: TorchRecBags | TorchRecSingle) -> dict[str, nn.Parameter]:
    """Return the weights of an unsharded collection of TorchRec by table."""
    modules: Any = embeddings.embedding_bags if isinstance(embeddings, TorchRecBags) else embeddings.embeddings
    return {name: module.weight for name, module in modules.items()}


def _dense_optimizer(config: TableConfig) -> Callable[[Any], torch.optim.Optimizer]:
    """Return what builds torch's equal of a row optimizer over a dense parameter."""
    ours = config.optimizer
    if isinstance(ours, Sgd) and not ours.momentum and not ours.weight_decay:
        return lambda parameters: torch.optim.SGD(parameters, lr=ours.lr)
    if isinstance(ours, Adagrad) and not ours.weight_decay:
        kind: Any = TorchRecRowWiseAdagrad if isinstance(ours, RowWiseAdagrad) else torch.optim.Adagrad
        return lambda parameters: kind(parameters, lr=ours.lr, eps=ours.eps)
    raise ConfigError(
        f"table {config.name!r} is trained by {ours}; over a dense parameter it would also change rows that a step does not "
        "touch, so its state is not carried: build an optimizer of your own over exported.embeddings, or train on with a "
        "StaticEmbeddingBagCollection"
    )


# ---- back


def from_torchrec(
    module: Exported | TorchRecBags | TorchRecSingle,
    *,
    optimizer: RowOptimizer | Mapping[str, RowOptimizer],
    seed: int,
    trained_by: torch.optim.Optimizer | None = None,
    initializer: Initializer = Uniform(-0.01, 0.01),  # noqa: B008  frozen
) -> Any:
    """Return TorchRec's unsharded collection as ours: an EmbeddingBagCollection or an EmbeddingCollection.

    Of an Exported, rows get its ids back; if the last row, which other ids read, is no longer zero, it becomes the table's
    default row. Of TorchRec's own module, row k gets id k.

    Args:
        optimizer: of all tables, or by table.
        seed: of new rows' draws, as is `initializer`.
        trained_by: a torch or TorchRec optimizer over the module's parameters whose state the rows take along.

    Raises:
        ConfigError: the module is sharded or quantised, a feature is in two tables, a table has no optimizer given, or
            the state of `trained_by` is not one that rows of `optimizer` can carry.
    """
    vocabulary = module.vocabulary if isinstance(module, Exported) else None
    embeddings = module.embeddings if isinstance(module, Exported) else module
    if not isinstance(embeddings, TorchRecBags | TorchRecSingle):
        raise ConfigError(
            f"from_torchrec takes TorchRec's unsharded EmbeddingBagCollection or EmbeddingCollection; got "
            f"{type(embeddings).__name__}: load its state_dict into an unsharded one first"
        )
    pools = isinstance(embeddings, TorchRecBags)
    theirs: list[Any] = list(embeddings.embedding_bag_configs() if pools else embeddings.embedding_configs())
    weights = {name: weight.detach().float().cpu() for name, weight in weights_of(embeddings).items()}
    configs = []
    for table in theirs:
        chosen = optimizer.get(table.name) if isinstance(optimizer, Mapping) else optimizer
        if chosen is None:
            raise ConfigError(f"table {table.name!r}: no optimizer is given for it")
        pooling: Pooling = _POOLING_BACK[table.pooling] if pools else "none"
        default = vocabulary is not None and bool(weights[table.name][-1].any())
        configs.append(
            TableConfig(
                name=table.name,
                features=tuple(Feature(name, pooling) for name in table.feature_names),
                embedding_dim=table.embedding_dim,
                optimizer=chosen,
                initializer=initializer,
                unadmitted="default_row" if default else "zeros",
            )
        )
    ours = (EmbeddingBagCollection if pools else EmbeddingCollection)(configs, seed=seed)
    for name, parameter in weights_of(embeddings).items():
        table = ours.table_set[name]
        states = _taken_states(table, parameter, trained_by)
        rows = weights[name]
        ids = torch.arange(rows.shape[0]) if vocabulary is None else vocabulary.ids(name).cpu()
        table.import_rows(
            {"ids": ids, "weight": rows[: ids.numel()], **{key: value[: ids.numel()] for key, value in states.items()}}
        )
        if table.config.unadmitted == "default_row":
            table.load_admission_state({"default.weight": rows[-1:]})
    return ours


def _taken_states(
    table: HashTable, parameter: nn.Parameter, trained_by: torch.optim.Optimizer | None
) -> dict[str, Tensor]:
    """Return the rows' optimizer state under our names."""
    if trained_by is None:
        return {}
    given = {
        name: value
        for name, value in trained_by.state.get(parameter, {}).items()
        if name != "step" and value is not None
    }
    wanted = {"h": "sum"} if isinstance(table.config.optimizer, Adagrad) else {}
    if set(given) != set(wanted.values()) or not (wanted or isinstance(table.config.optimizer, Sgd)):
        raise ConfigError(
            f"table {table.name!r}: trained_by holds {sorted(given) or 'no state'} for it, which {table.config.optimizer} "
            "cannot take up; leave trained_by out to start with fresh state"
        )
    return {f"state.{ours}": given[name].detach().float().cpu() for ours, name in wanted.items()}
