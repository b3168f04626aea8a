"""Checkpoints of any number of ranks load into any other number: owners, counts and bytes (conformance B20)."""

import pytest
import torch
from saved_ranks import save_ranks

from recis.checkpoint import load, rank_slices, read_manifest, verify
from recis.checkpoint.parts import in_slices
from recis.embedding import AfterSightings, CountMin
from recis.errors import CheckpointError


def load_ranks(kit, path, world_size, *configs):
    ranks = [kit.table_set(*configs) for _ in range(world_size)]
    for rank, tables in enumerate(ranks):
        load(path, into=kit.target(tables), rank=rank, world_size=world_size)
    return ranks


def joined(ranks, name="item"):
    rows = [tables[name].export() for tables in ranks]
    together = {key: torch.cat([item[key] for item in rows]) for key in rows[0]}
    order = together["ids"].argsort()
    return {key: values[order] for key, values in together.items()}


def test_through_one_two_three_and_one_rank(kit, tmp_path):
    first = kit.table_set()
    kit.fill(first["item"], [1, 2, 3, 4, 5, 6])
    want = first["item"].export()
    two = load_ranks(kit, save_ranks(tmp_path, 1, [first]), 2)
    assert [tables["item"].ids().tolist() for tables in two] == [[4, 5, 6], [1, 2, 3]]
    three = load_ranks(kit, save_ranks(tmp_path, 2, two), 3)
    assert [tables["item"].ids().tolist() for tables in three] == [[4, 6], [2, 5], [1, 3]]
    (one,) = load_ranks(kit, save_ranks(tmp_path, 3, three), 1)
    got = one["item"].export()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert verify(tmp_path) == []


def test_files_carry_ranks_and_slices(kit, tmp_path):
    tables = kit.table_set()
    kit.fill(tables["item"], range(50))
    three = load_ranks(kit, save_ranks(tmp_path, 1, [tables]), 3)
    path = save_ranks(tmp_path, 2, three)
    manifest = read_manifest(path)
    assert manifest.world_size == 3
    assert manifest.tables["item"].rows == 50
    for rank in range(3):
        entry = manifest.files[f"table-item-{rank:05d}-of-00003-000.safetensors"]
        assert entry.slices == rank_slices(rank, 3)


def test_more_ranks_than_rows(kit, tmp_path):
    tables = kit.table_set()
    kit.fill(tables["item"], [7])
    ranks = load_ranks(kit, save_ranks(tmp_path, 1, [tables]), 5)
    assert sum(item["item"].size for item in ranks) == 1
    (one,) = load_ranks(kit, save_ranks(tmp_path, 2, ranks), 1)
    kit.same_rows(one["item"], tables["item"])


def test_a_foreign_id_is_refused(kit, tmp_path):
    left, right = kit.table_set(), kit.table_set()
    kit.fill(left["item"], [1])  # slice 52012: rank 1's
    with pytest.raises(CheckpointError, match=r"id 1 has slice 52012, rank 0 of 2 owns \[0, 32768\)"):
        save_ranks(tmp_path, 1, [left, right])


def train(tables, step, ids):
    tables["item"].lookup(torch.tensor(ids), train=True, step=step)
    tables.end_step(step)


def test_sightings_follow_their_owner(kit, tmp_path):
    config = kit.item_config(admission=AfterSightings(9))
    tables = kit.table_set(config)
    train(tables, 1, [1, 2, 2, 3, 4, 5, 6])
    ranks = load_ranks(kit, save_ranks(tmp_path, 1, [tables]), 2, config)
    for rank, item in enumerate(ranks):
        ids = item["item"].admission_state()["sightings.ids"]
        own = in_slices(ids, rank_slices(rank, 2))
        assert own is not None
        assert own.numel() == ids.numel() == 3
    assert sum(item["item"].counters().rejected for item in ranks) == tables["item"].counters().rejected == 6
    (one,) = load_ranks(kit, save_ranks(tmp_path, 2, ranks), 1, config)
    have, want = one["item"].admission_state(), tables["item"].admission_state()
    assert torch.equal(have["sightings.ids"], want["sightings.ids"])
    assert torch.equal(have["sightings.counts"], want["sightings.counts"])


def test_sketches_are_summed(kit, tmp_path):
    config = kit.item_config(admission=AfterSightings(9, CountMin(eps=0.1, delta=0.1)))
    left, right = kit.table_set(config), kit.table_set(config)
    train(left, 1, [4, 4, 5])
    train(right, 1, [1, 2])
    (one,) = load_ranks(kit, save_ranks(tmp_path, 1, [left, right]), 1, config)
    states = [item["item"].admission_state() for item in (left, right, one)]
    assert torch.equal(states[2]["sketch"], states[0]["sketch"] + states[1]["sketch"])
    assert int(states[2]["sketch_total"]) == 5
