"""JSONL files: what is written is read again, and what breaks a rule is refused with file, line and key."""

import json

import pytest

from recis.ebrm.entities import EntitySchema, Item, TypeConfig
from recis.ebrm.files import (
    LabelRow,
    RuleRow,
    qe_to_json,
    read_header,
    read_items,
    read_labels,
    read_qe,
    read_rules,
    write_rows,
)
from recis.ebrm.labels_from_logs import QERow

SCHEMA = EntitySchema(types=(TypeConfig(name="brand"), TypeConfig(name="size", kind="number")))
LABEL = {"query": "nike", "item": "i1", "y": 1}
QE = {"query": "nike", "entity": "brand:puma", "y": 0, "w": 0.8, "src": "mention"}
RULE = {"match": {"query_regex": "^gift", "type": "brand"}, "op": "set", "value": 1.0, "owner": "merch"}
ITEM = {"id": "i1", "title": "x", "entities": [{"type": "brand", "value": "Nike", "conf": 0.5}]}


def write(tmp_path, *lines):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    return path


def test_round_trips(tmp_path):
    item = Item(
        id="i1", title="grün", entities=(SCHEMA.entity("brand", "Nike", conf=0.5), SCHEMA.entity("size", "1 tb"))
    )
    labels = [LabelRow(query="q", item="i1", y=1, grade=4), LabelRow(query="q", item="i2", y=0, visible=False)]
    qe = [QERow(query="q", entity="brand:nike", y=0.25, w=0.5, src="clicks")]
    rules = [RuleRow(match={"type": "brand"}, op="max", value=0.5, owner="me", reason="r", expires="2027-01-31")]
    path = tmp_path / "a.jsonl"
    about = {"name": "test", "version": 1, "seed": 3}
    assert write_rows(path, [item.to_json()], generator=about) == 1
    assert list(read_items(path, SCHEMA)) == [item]
    assert read_header(path) == about
    write_rows(path, (row.to_json() for row in labels))
    assert list(read_labels(path)) == labels
    assert read_header(path) is None
    write_rows(path, map(qe_to_json, qe), generator=about)
    assert list(read_qe(path)) == qe
    write_rows(path, (row.to_json() for row in rules))
    assert list(read_rules(path)) == rules
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]  # no partial file is left


def test_defaults_and_empty_lines(tmp_path):
    path = write(tmp_path, LABEL, b"", {key: value for key, value in QE.items() if key != "w"})
    assert next(read_labels(path)) == LabelRow(query="nike", item="i1", y=1)
    path = write(tmp_path, {key: value for key, value in QE.items() if key != "w"})
    assert next(read_qe(path)).w == 1.0
    assert list(read_labels(write(tmp_path))) == []
    assert read_header(write(tmp_path)) is None


@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        (read_labels, {**LABEL, "gradee": 4}, "gradee"),
        (read_labels, {"query": "q", "item": "i"}, "missing keys"),
        (read_labels, {**LABEL, "y": 2}, "y must be 0 or 1"),
        (read_labels, {**LABEL, "y": 0.5}, "y must be 0 or 1"),
        (read_labels, {**LABEL, "grade": 5}, "grade must be 1 to 4"),
        (read_labels, {**LABEL, "visible": 1}, "visible"),
        (read_labels, {**LABEL, "query": ""}, "query must be"),
        (read_qe, {**QE, "src": "guess"}, "src must be one of"),
        (read_qe, {**QE, "y": 2}, "y must lie"),
        (read_qe, {**QE, "y": "1"}, "y must be a number"),
        (read_qe, {**QE, "w": 0}, "w must be above 0"),
        (read_qe, {**QE, "entity": "nike"}, "entity must be"),
        (read_rules, {**RULE, "op": "add"}, "op must be one of"),
        (read_rules, {**RULE, "value": 1.5}, "value must lie"),
        (read_rules, {**RULE, "owner": ""}, "owner must be"),
        (read_rules, {**RULE, "match": {}}, "match must be"),
        (read_rules, {**RULE, "match": {"kind": "brand"}}, "kind"),
    ],
)  # fmt: skip
def test_broken_rows_name_file_and_line(tmp_path, read, row, message):
    good = {read_labels: LABEL, read_qe: QE, read_rules: RULE}[read]
    path = write(tmp_path, good, row)
    with pytest.raises(ValueError, match=message) as raised:
        list(read(path))
    assert f"{path}, line 2" in str(raised.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [(b'{"query": "\xff"}', "not UTF-8"), (b"{", "not JSON"), (b"[1]", "a JSON object"), (b'"x"', "a JSON object")],
)
def test_lines_that_are_no_objects(tmp_path, line, message):
    with pytest.raises(ValueError, match=message) as raised:
        list(read_labels(write(tmp_path, LABEL, line)))
    assert "line 2" in str(raised.value)


def test_items_are_checked_by_the_schema(tmp_path):
    assert next(read_items(write(tmp_path, ITEM), SCHEMA)).entities[0].id == "brand:nike"
    for row, message in [
        ({**ITEM, "colour": "red"}, "colour"),
        ({**ITEM, "entities": [{"type": "smell", "value": "x"}]}, "unknown entity type 'smell'"),
        ({**ITEM, "entities": [{"type": "brand", "value": "x", "conf": 0}]}, "conf"),
        ({**ITEM, "entities": [{"type": "brand", "value": "x", "id": "brand:y"}]}, "entity id must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            list(read_items(write(tmp_path, row), SCHEMA))
    unknown = {**ITEM, "entities": [{"type": "smell", "value": "x"}]}
    assert next(read_items(write(tmp_path, unknown), SCHEMA, on_unknown="drop")).entities == ()
    with pytest.raises(ValueError, match="occurs twice"):
        list(read_items(write(tmp_path, ITEM, ITEM), SCHEMA))


def test_the_generator_line_counts_only_as_the_first(tmp_path):
    path = write(tmp_path, LABEL, {"generator": {}})
    with pytest.raises(ValueError, match="unknown keys"):
        list(read_labels(path))


def test_a_nan_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_rows(tmp_path / "a.jsonl", [{"y": float("nan")}])
    assert not (tmp_path / "a.jsonl").exists()
