"""Overrides: the file against a list under any order of operations, precedence, expiry, audit, and what is refused."""

import json
import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from recis.ebrm import EntitySchema, Override, Overrides, TypeConfig
from recis.errors import ConfigError, DataError

SCHEMA = EntitySchema(
    types=(TypeConfig(name="brand"), TypeConfig(name="colour", synonyms={"schwarz": "black"})),
)
TODAY = datetime(2026, 11, 29, 12, tzinfo=UTC)


def make(path=None, **options) -> Overrides:
    return Overrides(SCHEMA, path, now=lambda: TODAY, **options)


def test_entities_and_queries_are_canonical():
    overrides = make()
    rule = overrides.add(Override(query=" Gift  Box", entity="colour:Schwarz", op="set", value=1, owner="merch"))
    assert (rule.override.query, rule.override.entity, rule.id) == ("gift box", "colour:black", "o1")
    assert overrides.match("gift box").entities == {"colour:black": rule}
    assert overrides.match("gift boxes") == ({}, {}, ())


def test_precedence():
    """Exact query beats regex beats any; then the later version; of entity and type the entity."""
    overrides, of = make(), {}
    for name, match in (
        ("any", {}),
        ("exact", {"query": "gift"}),
        ("regex", {"query_regex": "^gift"}),
        ("regex2", {"query_regex": "gift"}),
    ):
        for target in ({"type": "brand"}, {"entity": "brand:lg"}):
            of[name, *target] = overrides.add(Override(**match, **target, op="set", value=0.5, owner="o"))
    assert overrides.match("gift").types["brand"] == of["exact", "type"]
    assert overrides.match("gifts").types["brand"] == of["regex2", "type"]
    assert overrides.match("shoes").entities["brand:lg"] == of["any", "entity"]
    assert of["exact", "type"].beats([of["regex2", "entity"]])
    assert not of["regex2", "type"].beats([of["any", "entity"], of["regex", "entity"]])
    overrides.remove(of["exact", "type"].version, owner="o")
    assert overrides.match("gift").types["brand"] == of["regex2", "type"]


@pytest.mark.parametrize(("op", "want"), [("set", [0.4, 0.4]), ("min", [0.4, 0.9]), ("max", [0.1, 0.4])])
def test_ops(op, want):
    rule = make().add(Override(type="brand", op=op, value=0.4, owner="o"))
    assert rule.apply(np.array([0.1, 0.9])).tolist() == want


def test_expired_rules_are_skipped_and_listed():
    overrides = make()
    overrides.add(Override(type="brand", op="set", value=1, owner="o", expires="2026-11-28"))
    last_day = overrides.add(Override(type="colour", op="set", value=1, owner="o", expires="2026-11-29"))
    matched = overrides.match("anything")
    assert matched.types == {"colour": last_day}
    assert matched.expired == ("o1",)
    assert [rule.id for rule in overrides.expired()] == ["o1"]


def test_a_rule_for_an_entity_that_does_not_exist_is_accepted_and_flagged(tmp_path):
    known = {"brand:lg"}
    overrides = make(tmp_path / "o.jsonl", is_known=known.__contains__)
    assert overrides.add(Override(entity="brand:lg", op="set", value=1, owner="o")).flags == ()
    assert overrides.add(Override(entity="brand:moon", op="set", value=1, owner="o")).flags == ("unknown_entity",)
    assert [rule.flags for rule in make(tmp_path / "o.jsonl").rules()] == [(), ("unknown_entity",)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value": 1.5}, r"value must be in \[0, 1\]; got 1.5"),
        ({"value": -0.1}, r"value must be in"),
        ({"value": float("nan")}, r"value must be in"),
        ({"value": "1"}, r"value must be in"),
        ({"value": True}, r"value must be in"),
        ({"op": "add"}, "op must be one of set, min, max; got 'add'"),
        ({"query_regex": "(gift"}, r"'\(gift' is no regular expression"),
        ({"owner": " "}, "owner must say"),
        ({"type": None}, "give one of entity and type"),
        ({"entity": "brand:lg"}, "give one of entity and type"),
        ({"query": "a", "query_regex": "b"}, "not both"),
        ({"query": " "}, "query must not be empty"),
        ({"expires": "soon"}, "ISO date"),
        ({"type": "taste"}, "unknown entity type 'taste'; declared are brand, colour"),
        ({"type": None, "entity": "taste:sweet"}, "unknown entity type 'taste'"),
        ({"type": None, "entity": "brand:"}, "must not be empty"),
    ],
)
def test_bad_rules_are_refused_when_added(options, message):
    overrides = make()
    with pytest.raises(ValueError, match=message):
        overrides.add(Override(**{"type": "brand", "op": "set", "value": 1.0, "owner": "o", **options}))
    assert len(overrides) == 0
    with pytest.raises(ConfigError, match="no override of version 3"):
        overrides.remove(3, owner="o")


def test_the_file_tells_who_changed_what(tmp_path):
    times = [datetime(2026, 11, day, tzinfo=UTC) for day in (1, 2, 3)]
    clock = iter([*times, TODAY, TODAY])
    overrides = Overrides(SCHEMA, tmp_path / "o.jsonl", now=lambda: next(clock))
    overrides.add(Override(query_regex="^gift", type="colour", op="set", value=1.0, owner="merch", reason="any colour"))
    overrides.add(Override(entity="brand:lg", op="max", value=0.25, owner="legal", expires="2027-01-31"))
    overrides.remove(1, owner="boss", reason="no more")
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert lines == overrides.audit()
    assert lines[0]["rule"] == {
        "match": {"query_regex": "^gift", "type": "colour"},
        "op": "set",
        "value": 1.0,
        "owner": "merch",
        "reason": "any colour",
    }
    assert [line["previous"] for line in lines] == ["0" * 64, lines[0]["sha256"], lines[1]["sha256"]]
    assert [line["version"] for line in overrides.audit(since="2026-11-02")] == [2, 3]
    assert overrides.audit(since=times[2])[0]["owner"] == "boss"
    with pytest.raises(ConfigError, match="who removes"):
        overrides.remove(2, owner="")


@pytest.mark.parametrize("damage", ["edited", "line gone", "no json", "swapped"])
def test_an_edited_file_is_refused(tmp_path, damage):
    path = tmp_path / "o.jsonl"
    overrides = make(path)
    for value in (0.25, 0.5, 0.75):
        overrides.add(Override(type="brand", op="set", value=value, owner="o"))
    lines = path.read_text().splitlines()
    edited = {
        "edited": [lines[0].replace("0.25", "0.35"), *lines[1:]],
        "line gone": [lines[0], lines[2]],
        "no json": [lines[0], lines[1][:40], lines[2]],
        "swapped": [lines[1], lines[0], lines[2]],
    }[damage]
    path.write_text("\n".join(edited) + "\n")
    with pytest.raises(DataError, match=r"o.jsonl, row \d"):
        make(path)


class OverridesMachine(RuleBasedStateMachine):
    """The file against a list of versions in force; a kill may tear the line that is being written."""

    @initialize()
    def start(self):
        self.folder = Path(tempfile.mkdtemp())
        self.overrides = make(self.folder / "o.jsonl")
        self.in_force: dict[int, tuple[str, float]] = {}
        self.lines = 0

    @rule(kind=st.sampled_from(["brand", "colour"]), value=st.floats(0, 1))
    def add(self, kind, value):
        self.lines += 1
        added = self.overrides.add(Override(type=kind, op="set", value=value, owner="o"))
        assert added.version == self.lines
        self.in_force[added.version] = (kind, value)

    @rule(place=st.integers(0, 5))
    def remove(self, place):
        if self.in_force:
            version = sorted(self.in_force)[place % len(self.in_force)]
            self.overrides.remove(version, owner="o")
            del self.in_force[version]
            self.lines += 1

    @rule(torn=st.sampled_from(["", '{"version": 9', "{"]))
    def kill(self, torn):
        path = self.folder / "o.jsonl"
        with path.open("a") as stream:
            stream.write(torn)
        self.overrides = make(path)

    @invariant()
    def agrees(self):
        rules = {rule.version: (rule.override.type, rule.override.value) for rule in self.overrides.rules()}
        assert rules == self.in_force
        assert self.overrides.version == self.lines
        latest = {kind: version for version, (kind, _) in sorted(self.in_force.items())}
        assert {kind: rule.version for kind, rule in self.overrides.match("q").types.items()} == latest

    def teardown(self):
        shutil.rmtree(self.folder)


TestOverridesMachine = OverridesMachine.TestCase
TestOverridesMachine.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
