"""What people get wrong, in the library, at the command line, and against a service in a process of its own that stays up."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from recis.cli import main
from recis.ebrm import EBRM, EBRMConfig, EntitySchema, Item, Override, QEScorer, TypeConfig
from recis.ebrm.files import write_rows
from recis.ebrm.persist import CACHE_NAME
from recis.ebrm.precompute import precompute
from recis.ebrm.segment import CacheCorruptError
from recis.errors import ConfigError, DataError

SCHEMA = EntitySchema(types=(TypeConfig(name="category", hard=True), TypeConfig(name="colour")))
QUERY, LONG = "black fridge", "black " * 1_666 + "fridge"
SCRIPT = "<script>alert(1)</script>"


def item(id: str, *colours: str, title: str = "") -> Item:
    entities = (SCHEMA.entity("category", "fridge"), *(SCHEMA.entity("colour", colour) for colour in colours))
    return Item(id=id, title=title, entities=entities)


ITEMS = [item("a", "black"), item("b", "red", title=SCRIPT), item("many", *(f"c{number}" for number in range(499)))]


@pytest.fixture
def home(tmp_path):
    """A saved model, its cache of two segments of which one is cut in half, and the items."""
    table = {(QUERY, "colour:black"): 2.0, (QUERY, "colour:red"): -3.0, (QUERY, "category:fridge"): 3.0}
    model = EBRM(EBRMConfig(schema=SCHEMA), QEScorer.table(table, default=0.5))
    model.save(tmp_path / "run")
    model.open_cache(tmp_path / "run" / CACHE_NAME)
    precompute(model, ["sofa"], ITEMS)
    model.score(QUERY, ITEMS)
    model.cache.flush()
    write_rows(tmp_path / "items.jsonl", (own.to_json() for own in ITEMS))
    return tmp_path


def cut_in_half(home: Path) -> Path:
    """Cut the newest segment's logits in half: of "black fridge"; return the segment."""
    segment = max((home / "run" / CACHE_NAME / "segments").iterdir())
    content = (segment / "logit.npy").read_bytes()
    (segment / "logit.npy").write_bytes(content[: len(content) // 2])
    return segment


def one_line(capsys) -> str:
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


@contextmanager
def serving(home: Path) -> Iterator[tuple[httpx.Client, "subprocess.Popen[str]"]]:
    command = [
        sys.executable,
        "-m",
        "recis",
        "ebrm",
        "serve",
        "--model",
        f"{home}/run",
        "--items",
        f"{home}/items.jsonl",
    ]
    command += ["--port", "0", "--max-body-mib", "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split()[-1]
            with httpx.Client(base_url=address, timeout=60) as client:
                yield client, process
        finally:
            process.terminate()


def test_a_running_service_stays_up(home):
    segment = cut_in_half(home)
    with serving(home) as (client, process):

        def is_up() -> None:
            answer = client.post("/score", json={"query": QUERY, "item_ids": ["a"]})
            assert answer.status_code == 200
            assert answer.json()["r"][0] > 0.7

        def refused(status: int, text: str, **body) -> None:
            answer = client.post("/score", **body)
            assert answer.status_code == status
            assert text in answer.json()["error"]
            is_up()

        health = client.get("/health").json()
        assert (health["status"], health["damaged_segments"]) == ("ok", 1)
        kept = client.post("/score", json={"query": "sofa", "item_ids": ["a", "b"]}).json()
        assert kept["encoder_calls"] == 0  # the segment that is whole serves
        anew = client.post("/score", json={"query": QUERY, "item_ids": ["a", "b"]}).json()
        assert anew["encoder_calls"] > 0  # the cut one does not, and its pairs are scored anew
        assert anew["r"][0] > 0.7 > 0.1 > anew["r"][1]
        refused(422, "query must have at most 2048 characters; got 10002", json={"query": LONG, "item_ids": ["a"]})
        json_type = {"Content-Type": "application/json"}
        refused(400, "must be UTF-8", content=b'{"query": "\xe9"}', headers=json_type)
        refused(413, "at most 104857 bytes", content=b" " * 200_000, headers=json_type)
        refused(422, "no item 'z' in the catalogue", json={"query": QUERY, "item_ids": ["z"]})
        assert client.post("/score", json={"query": QUERY, "item_ids": ["many"]}).status_code == 200
        titles = client.get("/items", params={"words": "script"})
        assert titles.json()["items"][0]["title"] == SCRIPT
        assert titles.headers["content-type"].startswith("application/json")  # the page puts it there as text
        assert SCRIPT not in client.get("/").text
        rule = {"match": {"entity": "colour:moon"}, "op": "set", "value": 1, "owner": "me"}
        assert client.post("/overrides", json=rule).json()["flags"] == ["unknown_entity"]
        again = client.post("/overrides", json=rule | {"value": 0}).json()
        assert (again["flags"], again["replaces"]) == (["unknown_entity"], ["o1"])
        is_up()
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert process.returncode in (0, -15)
    assert f"{segment}: logit.npy is cut off" in err
    assert "Traceback" not in err


def test_conflicting_and_unknown_overrides_at_the_command_line(home, capsys):
    add = ["ebrm", "override", "--model", f"{home}/run", "add", "--op", "set", "--owner", "me", "--entity"]
    assert main([*add, "colour:red", "--query", QUERY, "--value", "1"]) == 0
    assert main([*add, "colour:RED", "--query", "Black  fridge", "--value", "0.2"]) == 0
    assert "(replaces:o1)" in capsys.readouterr().out.splitlines()[-1]
    assert main([*add, "colour:moon", "--value", "0"]) == 0
    assert "(unknown_entity)" in capsys.readouterr().out
    scored = EBRM.load(home / "run").score(QUERY, ITEMS[1:2])
    assert scored.overrides == ("o2",)
    assert main([*add, "taste:sweet", "--value", "0"]) == 2
    assert "unknown entity type 'taste'" in one_line(capsys)
    assert main([*add, "colour:red", "--value", "7"]) == 2
    assert "value must be in [0, 1]" in one_line(capsys)


def test_a_cut_cache_names_its_segment(home, capsys):
    segment = cut_in_half(home)
    with pytest.raises(CacheCorruptError, match=rf"{segment}: logit.npy is cut off"):
        EBRM.load(home / "run")
    score = ["ebrm", "score", "--model", f"{home}/run", "--items", f"{home}/items.jsonl", "--query"]
    assert main([*score, QUERY]) == 1
    assert f"{segment}: logit.npy is cut off" in one_line(capsys)
    model = EBRM.load(home / "run", on_corrupt="skip")
    assert model.score("sofa", ITEMS).encoder_calls == 0


def test_long_queries_and_500_entities_at_the_command_line(home, capsys):
    score = ["ebrm", "score", "--model", f"{home}/run", "--items", f"{home}/items.jsonl", "--json", "--query"]
    assert main([*score, LONG]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["query"] == LONG
    assert {row["item"] for row in told["items"]} == {"a", "b", "many"}
    assert len(ITEMS[2].entities) == 500


def test_texts_that_are_no_utf8(home, capsys):
    broken = b"caf\xe9".decode("utf-8", errors="surrogateescape")  # what a shell hands on
    score = ["ebrm", "score", "--model", f"{home}/run", "--items"]
    assert main([*score, f"{home}/items.jsonl", "--query", broken]) == 1
    assert "not valid Unicode" in one_line(capsys)
    with pytest.raises(DataError, match="not valid Unicode"):
        EBRM.load(home / "run").score(broken, ITEMS)
    (home / "latin.jsonl").write_bytes(b'{"id": "x", "title": "caf\xe9"}\n')
    assert main([*score, f"{home}/latin.jsonl", "--query", QUERY]) == 1
    assert "latin.jsonl, line 1: not UTF-8" in one_line(capsys).replace(": line 1", ", line 1")
    (home / "queries.txt").write_bytes(b"caf\xe9\n")
    words = ["ebrm", "precompute", "--model", f"{home}/run", "--items", f"{home}/items.jsonl", "--queries"]
    assert main([*words, f"{home}/queries.txt"]) == 1
    assert "queries.txt" in one_line(capsys)
    overrides = home / "run" / "overrides.jsonl"
    overrides.write_bytes(b'{"rule": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"overrides\.jsonl"):
        EBRM.load(home / "run")
    overrides.unlink()
    (home / "run" / CACHE_NAME / "vocabulary.txt").write_bytes(b"colour:caf\xe9\n")
    with pytest.raises(CacheCorruptError, match=r"vocabulary\.txt: not UTF-8 at byte 10"):
        EBRM.load(home / "run")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "no EBRM model at"),
        (b'{"format": 1, "ver', "model.json cannot be read"),
        (b'{"format": "\xe9"}', "model.json cannot be read"),
        (b"[]", "must be a JSON object, not a list"),
        (b'{"format": 1}', "lacks version, config"),
        (b'{"format": 2}', "has format 2; this version reads format 1"),
    ],
)
def test_a_model_that_is_not_there_or_damaged(home, capsys, content, text):
    path = home / "run" / "model" / "model.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ConfigError, match=text):
        EBRM.load(home / "run")
    for command in (["serve"], ["score", "--query", QUERY, "--items", f"{home}/items.jsonl"]):
        assert main(["ebrm", *command, "--model", f"{home}/run"]) == 2
        assert text in one_line(capsys)


def test_a_manifest_that_lacks_a_key(home):
    segment = cut_in_half(home)
    manifest = json.loads((segment / "manifest.json").read_text())
    del manifest["num_pairs"]
    (segment / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CacheCorruptError, match="it lacks num_pairs"):
        EBRM.load(home / "run")


def test_a_rule_says_which_it_replaces():
    overrides = EBRM(EBRMConfig(schema=SCHEMA), QEScorer.table({}, default=0.0)).overrides
    first = overrides.add(Override(type="colour", op="set", value=1, owner="me", expires="2020-01-01"))
    second = overrides.add(Override(type="colour", op="min", value=0.5, owner="me"))
    third = overrides.add(Override(type="colour", op="max", value=0.4, owner="you"))
    other = overrides.add(Override(type="colour", query=QUERY, op="max", value=0.4, owner="you"))
    assert (first.flags, second.flags, third.flags, other.flags) == ((), (), ("replaces:o2",), ())
