"""Tables with known content, saved and loaded by the tests of this folder."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from recis.checkpoint import Boundary, Target
from recis.embedding import AfterSightings, TableConfig, TableSet, Uniform
from recis.optim.config import Adam

EXTREMES = [-(2**63), -2, -1, 0, 5, 70000, 2**63 - 1]


def item_config(**changes) -> TableConfig:
    settings = {"embedding_dim": 3, "optimizer": Adam(lr=0.1), "initializer": Uniform(-0.05, 0.05)}
    return TableConfig(name="item", features=("item",), **{**settings, **changes})


def table_set(*configs: TableConfig, seed: int = 7) -> TableSet:
    return TableSet(configs or (item_config(),), seed=seed)


def fill(table, ids, seed: int = 0) -> None:
    """Give ids rows, states and metadata that differ in every byte."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor(ids)
    fields = {"ids": ids, "weight": torch.rand(len(ids), table.config.embedding_dim, generator=generator)}
    for name, width in table.state_widths.items():
        fields[f"state.{name}"] = torch.rand(len(ids), width, generator=generator)
    fields["weight"] = fields["weight"].to(table.config.torch_dtype)
    fields["last_seen"] = torch.randint(1, 5, (len(ids),), generator=generator, dtype=torch.int32)
    fields["count"] = torch.randint(1, 9, (len(ids),), generator=generator, dtype=torch.int32)
    table.import_rows(fields)


def same_rows(have, want) -> None:
    have, want = have.export(), want.export()
    assert have.keys() == want.keys()
    for name in want:
        assert have[name].dtype == want[name].dtype, name
        assert torch.equal(have[name], want[name]), name


@pytest.fixture
def kit() -> SimpleNamespace:
    """The functions above, and what tests of this folder build from them."""
    functions: dict[str, Callable] = {
        "item_config": item_config,
        "table_set": table_set,
        "fill": fill,
        "same_rows": same_rows,
        "target": lambda tables, dense=None: Target(tables=tables.tables, dense=dense or {}),
        "boundary": lambda tables, step=1, **more: Boundary(step=step, table_sets=[tables], **more),
        "counting": lambda **more: item_config(admission=AfterSightings(2), **more),
    }
    return SimpleNamespace(extremes=EXTREMES, **functions)
