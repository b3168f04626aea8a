"""What a Trainer sets and refuses before it trains: the tables' mode, and state that no checkpoint holds."""

import re

import pytest
import torch
from torch import nn

from recis.errors import ConfigError
from recis.trainer import Trainer
from recis.trainer.randomness import deterministic_note


@pytest.mark.parametrize("deterministic", [True, False])
def test_tables_follow_the_config(toy, deterministic):
    trainer = Trainer(toy.config(deterministic=deterministic), quiet=True)
    stores = [store for table_set in trainer.table_sets for store in table_set.stores]
    assert stores
    assert all(store.deterministic is deterministic for store in stores)


def test_new_ids_take_rows_in_ascending_order_only_when_asked(toy):
    ids = torch.tensor([7, -3, 50, 1])
    rows = {}
    for deterministic in (True, False):
        table = Trainer(toy.config(deterministic=deterministic), quiet=True).tables["user"]
        table.store.lookup(table.store.one_range(ids, table.number), train=True, source=None)
        rows[deterministic] = table.find(ids)
    assert rows[True].argsort().tolist() == ids.argsort().tolist()
    assert sorted(rows[False].tolist()) == sorted(rows[True].tolist())


def test_the_first_line_tells_the_cost(toy, capsys):
    Trainer(toy.config(max_steps=1)).train()
    assert re.match(
        r"deterministic: new ids take rows in ascending order, \d+ ns each on this machine", capsys.readouterr().err
    )
    assert "deterministic" in deterministic_note()
    Trainer(toy.config(max_steps=1, deterministic=False)).train()
    assert "deterministic" not in capsys.readouterr().err


def test_extra_state_is_refused(toy):
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = toy.Config().build()
            self.calls = 0

        def forward(self, batch):
            return self.inner(batch)

        def get_extra_state(self):
            return {"calls": self.calls}

        def set_extra_state(self, state) -> None:
            self.calls = state["calls"]

    with pytest.raises(ConfigError, match=r"state '_extra_state' is no parameter or buffer .* \(register_buffer\)"):
        Trainer(toy.config(model=Counting), quiet=True)
