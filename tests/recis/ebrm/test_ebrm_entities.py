"""Entities: canonical ids, merged duplicates, none entities; what is refused, and that importing is light."""

import subprocess
import sys
from typing import Any

import pytest

from recis.ebrm import Entity, EntitySchema, Item, TypeConfig
from recis.ebrm.canonical import canonical_number, canonical_text, find_quantities
from recis.ebrm.entities import item_from_json, type_of, value_of
from recis.errors import ConfigError, DataError

SCHEMA = EntitySchema(
    types=(
        TypeConfig(name="brand", hard=True),
        TypeConfig(name="colour", synonyms={"Schwarz": "black", "grey ": "gray"}),
        TypeConfig(name="capacity", kind="number", scorer="comparator", units=("gb",)),
        TypeConfig(name="model", kind="code"),
    )
)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("  Running \t Shoes\n", "running shoes"),
        ("ＮＩＫＥ", "nike"),
        ("Straße", "strasse"),
        ("", ""),
    ],
)
def test_canonical_text(text, canonical):
    assert canonical_text(text) == canonical


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("1 tb", "1024gb"),
        ("1024GB", "1024gb"),
        ("0.5 TB", "512gb"),
        ("512 mb", "0.5gb"),
        ("3,60 GHz", "3.6ghz"),
        ("2400 mhz", "2.4ghz"),
        ("1,000 gb", "1000gb"),
        ('55"', "55inch"),
        ("600 mm", "60cm"),
        ("294 litres", "294l"),
        ("007", "7"),
        ("xl", "xl"),
        ("16-50mm", "16-50mm"),
    ],
)
def test_canonical_number(text, canonical):
    assert canonical_number(text) == canonical


def test_text_that_is_no_unicode_is_refused():
    with pytest.raises(DataError, match="no UTF-8 form"):
        canonical_text(b"caf\xe9".decode("utf-8", errors="surrogateescape"))


def test_quantities_in_a_text():
    found = find_quantities("samsung 55 inch tv 1tb 3.6ghz 4k 1080p 2x32gb i5-650")
    assert [quantity.text() for quantity in found] == ["55inch", "1024gb", "3.6ghz"]


def test_synonyms_share_an_id():
    assert SCHEMA.entity("colour", "SCHWARZ").id == SCHEMA.entity("colour", "black").id == "colour:black"
    assert SCHEMA.entity("colour", "Grey").id == "colour:gray"
    assert SCHEMA.entity("capacity", "1 tb").id == "capacity:1024gb"
    assert (type_of("lens:f:2"), value_of("lens:f:2")) == ("lens", "f:2")


def test_slots_merge_and_fill():
    given = [
        SCHEMA.entity("colour", "red", conf=0.5),
        SCHEMA.entity("colour", "schwarz"),
        SCHEMA.entity("colour", "Red", conf=0.75, source="tagger"),
        SCHEMA.entity("brand", "none"),
    ]
    brand, colour, capacity, model = SCHEMA.slots(given)
    assert [(entity.id, entity.conf) for entity in colour] == [("colour:red", 0.75), ("colour:black", 1.0)]
    assert [slot[0].id for slot in (brand, capacity, model)] == ["brand:none", "capacity:none", "model:none"]
    assert all(slot[0].is_none and len(slot) == 1 for slot in (brand, capacity, model))


def test_an_item_without_entities_is_all_none():
    assert [slot[0].id for slot in SCHEMA.slots(())] == [f"{name}:none" for name in SCHEMA.names]


def test_unknown_types():
    odd = Entity(type="taste", value="sweet", id="taste:sweet")
    with pytest.raises(ValueError, match=r"unknown entity type 'taste'; declared are brand, colour, capacity, model"):
        SCHEMA.slots([odd])
    assert SCHEMA.slots([odd], on_unknown="drop") == SCHEMA.slots(())
    assert SCHEMA.count_unknown([odd, SCHEMA.entity("brand", "lg")]) == 1


@pytest.mark.parametrize("conf", [0.0, -0.1, 1.01, float("nan")])
def test_conf_out_of_range(conf):
    with pytest.raises(ValueError, match=r"'brand:lg': conf must be in \(0, 1\]"):
        SCHEMA.entity("brand", "LG", conf=conf)


def test_what_configs_refuse():
    bad: dict[str, Any]
    for bad, message in (
        ({"name": "Brand"}, "lower case"),
        ({"name": "a:b"}, "without blanks and ':'"),
        ({"name": "a", "kind": "date"}, "kind is one of"),
        ({"name": "a", "scorer": "comparator"}, "only codes and numbers"),
        ({"name": "a", "units": ("gb",)}, "units are of number types"),
        ({"name": "a", "kind": "number", "units": ("tb",)}, r"among \['cm'"),
        ({"name": "a", "synonyms": {"x": "y", "y": "z"}}, "'y' leads on"),
    ):
        with pytest.raises(ConfigError, match=message):
            TypeConfig(**bad)
    with pytest.raises(ConfigError, match="each once"):
        EntitySchema(types=(TypeConfig(name="a"), TypeConfig(name="a")))
    with pytest.raises(ConfigError, match="must not be empty"):
        SCHEMA.entity("brand", " ")
    with pytest.raises(ConfigError, match="source must be one of"):
        Entity(type="a", value="b", id="a:b", source="web")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="an id is"):
        Entity(type="a", value="b", id="b:b")


def test_json_round_trips():
    assert EntitySchema.from_json(SCHEMA.to_json()) == SCHEMA
    item = Item(id="i1", title="LG 1TB", entities=(SCHEMA.entity("brand", "LG", conf=0.5, source="tagger"),))
    assert item_from_json(item.to_json(), SCHEMA) == item
    with pytest.raises(DataError, match=r"unknown keys \['price'\]"):
        item_from_json({"id": "i1", "price": 3}, SCHEMA)
    with pytest.raises(DataError, match=r"must be 'brand:lg'.*|leave id out"):
        item_from_json({"id": "i", "entities": [{"type": "brand", "value": "LG", "id": "brand:LG"}]}, SCHEMA)
    odd = {"id": "i", "entities": [{"type": "taste", "value": "sweet"}]}
    assert item_from_json(odd, SCHEMA, on_unknown="drop").entities == ()


def test_import_loads_neither_transformers_nor_torch():
    code = "import sys, recis.ebrm; recis.ebrm.Entity; print({'torch', 'transformers', 'numba'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_spellings_are_the_synonyms_by_value():
    schema = EntitySchema(
        types=(
            TypeConfig(name="colour", synonyms={"schwarz": "black", "jet black": "black", "rot": "red"}),
            TypeConfig(name="brand"),
        )
    )
    assert schema.spellings() == {"colour:black": ("jet black", "schwarz"), "colour:red": ("rot",)}
