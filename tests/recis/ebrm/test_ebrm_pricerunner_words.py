"""Normal form, tokens, codes and quantities of PriceRunner texts; labels and titles read with small dictionaries."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recis.ebrm.pricerunner_labels import (
    Dictionaries,
    label_facts,
    learn_brands,
    learn_dictionaries,
    model_code,
    model_forms,
)
from recis.ebrm.pricerunner_queries import parse_query
from recis.ebrm.pricerunner_split import variant_key
from recis.ebrm.pricerunner_text import (
    Phrases,
    clocks_ghz,
    code_inches,
    codes_match,
    inches,
    is_code,
    lenses,
    normalise,
    squash,
    storage_gb,
    tokens,
    without_country,
)
from recis.ebrm.pricerunner_titles import title_facts

KNOWN = Dictionaries(
    brands=frozenset(
        {"smeg", "russell hobbs", "fisher & paykel", "intel", "hp", "panasonic", "orange", "liebherr", "canon"}
    ),
    series=frozenset({"viera", "core", "xeon", "eos", "galaxy"}),
    prefixes=frozenset({"tx", "cufr"}),
    suffixes=frozenset({"pro", "plus", "ii"}),
    lenses=frozenset({"18-55mm"}),
    secondary=frozenset({("Fridges", "colour"), ("TVs", "size"), ("CPUs", "speed")}),
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ('55" Kühlschrank, WEISS/Schwarz.', "55 inch kuhlschrank weiss/schwarz"),
        ("a.b 3.60GHz v1.", "a b 3.60ghz v1"),
        ("Fisher & Paykel\xa0S9+ (64GB)", "fisher & paykel s9+ 64gb"),
        ("12'' tv", "12 inch tv"),
        ("", ""),
        ("éß漢", "e"),
    ],
)
def test_normalise(text, normal):
    assert normalise(text) == normal
    assert normalise(normal) == normal


@given(st.text(alphabet=st.one_of(st.sampled_from("aB1.2/ -+&\"'é\u0130"), st.characters()), max_size=30))
def test_normalise_twice_is_once(text):
    once = normalise(text)
    assert normalise(once) == once
    assert set(once) <= set("abcdefghijklmnopqrstuvwxyz0123456789.+/&- ")
    assert all(token.strip() for token in tokens(once))


def test_tokens_split_slashes_only_between_parts_that_stand_alone():
    assert tokens("c17ur02n0b/c17ur02n0b 8kg/5kg black/silver") == ["c17ur02n0b"] * 2 + [
        "8kg",
        "5kg",
        "black",
        "silver",
    ]
    assert tokens("amw850/ixl ww80/eu f/4 60/40 - /") == ["amw850", "ixl", "ww80/eu", "f/4", "60/40"]


def test_squash_and_codes():
    assert squash("TX-55FX600B".lower()) == "tx55fx600b"
    assert squash("s9+") == squash("s9 plus") == "s9plus"
    assert codes_match("kgn34vb35", "kgn34vb35g")  # a country suffix
    assert not codes_match("dfn28320w", "dfn28320x")
    assert not codes_match("fab30l", "fab30lfa")  # too short for the suffix rule
    assert without_country("ue55nu8070txxu") == "ue55nu8070"
    assert without_country("ue55nu8070") == "ue55nu8070"


@pytest.mark.parametrize(
    "token", ["1080p", "4k", "177x54", "3d", "1000w", "294l", "8kg", "lga1151", "3.6ghz", "65inch", "wei"]
)
def test_units_resolutions_and_standards_are_no_codes(token):
    assert not is_code(token)


@pytest.mark.parametrize("token", ["7820x", "1200d", "880k", "7551p", "a6000", "kgn34vb35g"])
def test_codes_that_end_like_a_unit_are_codes(token):
    assert is_code(token)


def test_quantities():
    assert storage_gb("4gb ram 64gb 128 gb") == "128gb"
    assert storage_gb("1tb 64gb") == "1024gb"
    assert storage_gb("ram 6gb") is None
    assert clocks_ghz("3.60ghz 1600mhz 3.6 ghz") == ["3.6ghz"]
    assert inches("tv 54.6 inch") == ["55inch"]
    assert [code_inches(code) for code in ("ue75nu8000", "32led", "c9", "ab99x", "x14")] == [
        "75inch",
        "32inch",
        None,
        None,
        None,
    ]
    assert lenses("18 55 mm and 24-70mm and 55 18mm") == ["18-55mm", "24-70mm"]
    assert lenses("18 55/3.5", frozenset({"18-55mm"})) == ["18-55mm"]
    assert lenses("18 55/3.5") == []


def test_phrases_take_the_longest_and_do_not_overlap():
    phrases = Phrases({"steel": ("steel", "stainless steel"), "white": ("white",), "knight": ("white knight",)})
    assert phrases.find(["stainless", "steel", "white", "knight", "white"]) == [
        (0, 2, "steel"),
        (2, 4, "knight"),
        (4, 5, "white"),
    ]
    assert phrases.find([]) == []


def test_brands_of_two_words_need_both_shares():
    labels = [
        "russell hobbs a1",
        "russell hobbs b2",
        "apple iphone 4",
        "apple iphone 5",
        "fisher & paykel x1",
        "hpe e5",
    ]
    titles = ["russell hobbs a1", "my russell hobbs", "iphone 4", "apple iphone 5", "fisher paykel x1"]
    assert learn_brands(labels, titles) == {"russell hobbs", "apple", "fisher & paykel", "hp"}


def test_one_label_makes_no_brand_of_two_words():
    assert learn_brands(["vivo nex 5"], ["vivo nex 5"]) == {"vivo"}
    assert learn_brands(["x4 dual sim"], ["moto x4"]) == set()
    assert learn_brands(["inov8 c1", "inov8 c2"], []) == {"inov8"}


@pytest.mark.parametrize(
    ("category", "label", "brands", "model", "series", "secondary"),
    [
        ("Fridges", "smeg fab5rbl black", ("smeg",), "fab5rbl", None, {"colour": "black"}),
        ("Fridges", "smeg uk35 red integrated", ("smeg",), "uk35", None, {"colour": "red", "form": "integrated"}),
        ("Fridges", "smeg uk35 stainless steel", ("smeg",), "uk35", None, {"colour": "stainless steel"}),
        ("CPUs", "hp intel xeon e5 2.30ghz socket f 800mhz bus tray", ("hp", "intel"), "xeon e5", "xeon", {"speed": "2.3ghz"}),
        ("TVs", "panasonic viera tx-55fx600b", ("panasonic",), "viera tx-55fx600b", "viera", {"size": "55inch"}),
        ("Mobile Phones", "hewlett packard galaxy s9+ 64gb dual sim", ("hp",), "galaxy s9+", "galaxy", {"capacity": "64gb"}),
        ("Digital Cameras", "canon eos 5d mark iv + 24-70mm is", ("canon",), "eos 5d mark iv", "eos", {"lens": "24-70mm"}),
        ("Dishwashers", "nobrand dw1", ("nobrand",), "dw1", None, {}),
        ("Microwaves", "fisher & paykel om36 white white", ("fisher & paykel",), "om36", None, {"colour": "white"}),
    ],
)  # fmt: skip
def test_label_structure(category, label, brands, model, series, secondary):
    facts = label_facts(label, category, KNOWN)
    assert (facts.brands, facts.model, facts.series, dict(facts.secondary)) == (brands, model, series, secondary)


def test_an_empty_label_states_nothing():
    facts = label_facts("", "Fridges", KNOWN)
    assert (facts.brands, facts.model, facts.series, dict(facts.secondary)) == ((), "", None, {})


@pytest.mark.parametrize(
    ("model", "code"),
    [("viera tx-55fx600b", "tx55fx600b"), ("ik 1620 premium", "ik1620"), ("xeon e5-4610 v3", "e54610v3"),
     ("core i3-4160", "i34160"), ("core 2 duo mobile p8800", "p8800"), ("wax", None), ("", None)],
)  # fmt: skip
def test_model_code(model, code):
    assert model_code(model) == code


def test_model_forms_leave_out_what_titles_leave_out():
    assert "wx220" in model_forms("cyber-shot dsc-wx220")
    assert "65nu7400" in model_forms("ue65nu7400")
    assert "galaxyj3" in model_forms("galaxy j3 sm-j330f")


def test_dictionaries_count_labels_and_survive_json():
    labels = [("TVs", f"panasonic viera tx-{n}fx600b") for n in (32, 43, 55)] + [
        ("Digital Cameras", "canon eos 5d ii + 18-55mm")
    ]
    known = learn_dictionaries(labels, ["viera tx 32fx600b", "panasonic tx 43fx600b"])
    assert (known.series, known.lenses) == ({"viera"}, {"18-55mm"})
    assert "tx" in known.prefixes
    assert Dictionaries.from_json(KNOWN.to_json()) == KNOWN
    with pytest.raises(ValueError, match="unknown keys"):
        Dictionaries.from_json({**KNOWN.to_json(), "more": []})


def test_title_facts_by_hand():
    facts = title_facts("panasonic viera tx 32a400e led tv orange", "TVs", KNOWN)
    assert (facts.brands, facts.series) == (("panasonic",), ("viera",))  # orange is a brand only as the first word
    assert "tx32a400e" in facts.models
    assert facts.secondary == {"colour": ("orange",), "size": ("32inch",)}
    assert facts.says("brand", ("panasonic",)) == "stated"
    assert facts.says("size", ("55inch",)) == "differs"
    assert facts.says("capacity", ("64gb",)) == "silent"
    assert facts.says("model", ("viera tx-32a400e",)) == "stated"
    assert facts.says("model", ("viera tx-55fx600b",)) == "differs"
    assert title_facts("", "TVs", KNOWN).says("model", ("viera",)) == "silent"


def test_damaged_german_words_are_known():
    facts = title_facts("liebherr cufr 3311 freistehend 294l a rot wei gr n", "Fridges", KNOWN)
    assert facts.secondary == {"colour": ("red", "white", "green"), "form": ("freestanding",)}
    assert facts.models == ("cufr3311",)
    assert ("capacity", "294l") in facts.extras


def test_variant_key_leaves_out_what_makes_a_variant():
    assert variant_key("samsung galaxy s9 64gb dual sim") == "samsung galaxy s9"
    assert variant_key("smeg fab5 stainless steel integrated") == "smeg fab5"
    assert variant_key("intel xeon e5-2670 2.3ghz upgrade tray") == "intel xeon e5-2670"
    assert variant_key("bosch wan28201gb") == "bosch wan28201gb"  # no quantity inside a code


@pytest.mark.parametrize(
    ("text", "constraints"),
    [
        ("black smeg fridge", {"category": ("fridge",), "brand": ("smeg",), "colour": ("black",)}),
        ("viera 55 inch tv", {"category": ("tv",), "size": ("55inch",), "series": ("viera",)}),
        ("liebherr cufr 3311 red", {"brand": ("liebherr",), "colour": ("red",), "model": ("cufr 3311",)}),
        ("intel xeon silver 4112 processor", {"category": ("processor",), "brand": ("intel",), "model": ("xeon silver 4112",)}),
        ("", {}),
    ],
)  # fmt: skip
def test_parse_query(text, constraints):
    assert parse_query(text, KNOWN) == constraints
