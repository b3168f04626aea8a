"""The service over ASGI: every route, its limits, what a client gets wrong, and that a fault stays with its request."""

import argparse
import asyncio
import json
import time
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import torch

from recis.ebrm import EBRM, EBRMConfig, EntitySchema, Item, Override, QEScorer, TypeConfig, explain
from recis.ebrm.serve import add_serve_arguments, create_app, run_serve
from recis.ebrm.service import ServeConfig
from recis.errors import ConfigError

SCHEMA = EntitySchema(
    types=(TypeConfig(name="category", hard=True), TypeConfig(name="colour", synonyms={"schwarz": "black"}))
)
QUERY = "black fridge"
LOGITS = {"category:fridge": 3.0, "colour:black": 2.0, "colour:red": -3.0, "colour:none": -1.0, "category:none": -3.0}
SCRIPT = "<script>alert(1)</script>"


def item(id: str, *colours: str, title: str = "") -> Item:
    entities = (SCHEMA.entity("category", "fridge"), *(SCHEMA.entity("colour", colour) for colour in colours))
    return Item(id=id, title=title, entities=entities)


CATALOGUE = [item("a", "black", title="Black fridge"), item("b", "red", title=SCRIPT), item("c", title="Fridge")]


def model_of(scorer: QEScorer | None = None) -> EBRM:
    table = {(QUERY, entity): logit for entity, logit in LOGITS.items()}
    return EBRM(EBRMConfig(schema=SCHEMA), scorer or QEScorer.table(table, default=0.0))


class Client:
    """Calls an application in this process, each call in a loop of its own."""

    def __init__(self, model: EBRM, **limits) -> None:
        self.model = model
        self.app = create_app(model, CATALOGUE, ServeConfig(**limits))

    def __call__(self, method: str, path: str, **options) -> httpx.Response:
        return asyncio.run(self.all([(method, path, options)]))[0]

    async def all(self, calls) -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return list(await asyncio.gather(*(client.request(method, path, **how) for method, path, how in calls)))

    def post(self, path: str, data) -> httpx.Response:
        return self("POST", path, json=data)

    def refused(self, path: str, data, status: int = 422) -> str:
        """Return the error of a request that must be refused, after a good one has shown that the service is up."""
        answer = self.post(path, data)
        assert answer.status_code == status, answer.text
        text = answer.json()["error"]
        assert "\n" not in text
        assert self.post("/score", {"query": QUERY, "item_ids": ["a"]}).status_code == 200
        return text


@pytest.fixture
def client() -> Client:
    return Client(model_of())


def test_scores_are_those_of_the_model(client):
    answer = client.post("/score", {"query": " Black FRIDGE", "item_ids": ["b", "a"], "with_types": True}).json()
    want = model_of().score(QUERY, [CATALOGUE[1], CATALOGUE[0]])
    assert answer["item_ids"] == ["b", "a"]
    assert (answer["r"], answer["log_r"]) == (want.r.tolist(), want.log_r.tolist())
    assert answer["log_g"] == want.log_g.tolist()
    assert (answer["query"], answer["p"], answer["approximate"], answer["types"]) == (
        QUERY,
        None,
        [False, False],
        ["category", "colour"],
    )
    assert answer["encoder_calls"] == want.encoder_calls == 3
    again = client.post("/score", {"query": QUERY, "items": [entry.to_json() for entry in CATALOGUE]}).json()
    assert again["encoder_calls"] == 1  # colour:none of c
    assert again["r"][:2] == [answer["r"][1], answer["r"][0]]


def test_p_once_there_is_a_calibrator(client):
    log_r = np.log(np.array([0.1, 0.2, 0.8, 0.9]))
    client.model.fit_calibrator(log_r, np.array([0, 1, 0, 1]))
    answer = client.post("/score", {"query": QUERY, "item_ids": ["a"]}).json()
    assert answer["p"] == client.model.score(QUERY, [CATALOGUE[0]]).p.tolist()
    assert client.post("/explain", {"query": QUERY, "item_id": "a"}).json()["p"] == pytest.approx(answer["p"][0])


def test_5000_items_pass_and_5001_do_not(client):
    items = [item(f"i{number}", "black" if number % 2 else "red").to_json() for number in range(5001)]
    answer = client.post("/score", {"query": QUERY, "items": items[:5000]})
    assert answer.status_code == 200
    assert len(answer.json()["r"]) == 5000
    assert "at most 5000 items a request; got 5001" in client.refused("/score", {"query": QUERY, "items": items})


def test_an_item_with_500_entities(client):
    colours = [{"type": "colour", "value": f"shade {number}"} for number in range(500)]
    big = {"id": "big", "title": "", "entities": [{"type": "category", "value": "fridge"}, *colours]}
    answer = client.post("/score", {"query": QUERY, "items": [big]}).json()
    explained = client.post("/explain", {"query": QUERY, "item": big}).json()
    assert explained["r"] == pytest.approx(answer["r"][0], abs=1e-6)
    assert len(explained["types"][1]["entities"]) == 500


def test_explanations_are_those_of_the_library_and_trials_change_nothing(client):
    ask = {"query": QUERY, "item_id": "b"}
    answer, want = client.post("/explain", ask).json(), explain(model_of(), QUERY, CATALOGUE[1])
    red = answer["types"][1]["entities"][0]
    truth = want.types[1].entities[0]
    assert (answer["r"], red["s"], red["slope"]) == (want.r, truth.s, truth.slope)
    assert (red["gives"], red["costs"]) == (want.r - truth.r_if_0, truth.r_if_1 - want.r)
    assert (answer["title"], answer["verdicts"]) == (SCRIPT, {"category": "match", "attributes": {"colour": "miss"}})
    tried = client.post(
        "/explain", ask | {"trial": {"match": {"entity": "colour:red"}, "op": "set", "value": 0.5}}
    ).json()
    assert tried["r"] == pytest.approx(want.r + (0.5 - truth.s) * truth.slope, abs=1e-9)
    assert client.post("/explain", ask).json() == answer
    assert len(client.model.overrides) == 0


def test_overrides_from_adding_to_the_audit(client):
    rule = {"match": {"query": "Black  Fridge", "entity": "colour:Red"}, "op": "set", "value": 0.9, "owner": "merch"}
    before = client.post("/score", {"query": QUERY, "item_ids": ["b"]}).json()
    added = client.post("/overrides", rule | {"reason": "sale", "expires": "2999-01-31"}).json()
    assert (added["id"], added["flags"], added["replaces"]) == ("o1", [], [])
    assert added["match"] == {"query": QUERY, "entity": "colour:red"}
    after = client.post("/score", {"query": QUERY, "item_ids": ["b", "a"]}).json()
    assert after["overrides"] == ["o1"]
    assert after["r"][0] > before["r"][0] + 0.5
    conflicting = client.post("/overrides", rule | {"value": 0.1}).json()
    assert conflicting["replaces"] == ["o1"]
    assert client.post("/score", {"query": QUERY, "item_ids": ["b"]}).json()["overrides"] == ["o2"]
    ghost = client.post("/overrides", rule | {"match": {"entity": "colour:moon"}}).json()
    assert ghost["flags"] == ["unknown_entity"]
    client.post("/overrides", rule | {"expires": "2020-01-31"})
    listed = client("GET", "/overrides").json()
    assert ([entry["id"] for entry in listed["overrides"]], listed["expired"]) == (["o1", "o2", "o3", "o4"], ["o4"])
    assert client.post("/overrides/remove", {"version": 2, "owner": "merch"}).json() == {"removed": "o2"}
    assert client.post("/score", {"query": QUERY, "item_ids": ["b"]}).json()["r"] == after["r"][:1]
    export = client("GET", "/overrides/audit")
    assert export.headers["content-disposition"] == 'attachment; filename="overrides.jsonl"'
    assert [json.loads(line) for line in export.text.splitlines()] == client.model.overrides.audit()
    assert client("GET", "/overrides/audit", params={"since": "2999-01-01"}).text == ""
    assert "ISO date" in client("GET", "/overrides/audit", params={"since": "now"}).json()["error"]


@pytest.mark.parametrize(
    ("path", "data", "text"),
    [
        ("/score", {"item_ids": ["a"]}, "missing keys ['query']"),
        ("/score", {"query": QUERY, "item_ids": ["a"], "top": 3}, "unknown keys ['top']"),
        ("/score", {"query": QUERY}, "give one of items and item_ids; got []"),
        ("/score", {"query": QUERY, "items": [], "item_ids": []}, "give one of"),
        ("/score", {"query": 7, "item_ids": []}, "query must be a text; got 7"),
        ("/score", {"query": " \t", "item_ids": ["a"]}, "query must not be empty"),
        ("/score", {"query": "q" * 10_000, "item_ids": ["a"]}, "query must have at most 2048 characters; got 10000"),
        ("/score", {"query": QUERY, "item_ids": ["z"]}, "no item 'z' in the catalogue"),
        ("/score", {"query": QUERY, "item_ids": [["a"]]}, "no item ['a']"),
        ("/score", {"query": QUERY, "item_ids": "a"}, "item_ids must be a list; got 'str'"),
        ("/score", {"query": QUERY, "items": [3]}, "items[0] must be an object; got 3"),
        ("/score", {"query": QUERY, "items": [{"id": 3}]}, "items[0]: id must be a text; got 3"),
        ("/score", {"query": QUERY, "items": [{"id": "x", "entities": "e"}]}, "entities must be a list of objects"),
        (
            "/score",
            {"query": QUERY, "items": [{"id": "x", "entities": [{"type": "colour"}]}]},
            "missing keys ['value']",
        ),
        (
            "/score",
            {"query": QUERY, "items": [{"id": "x", "entities": [{"type": "taste", "value": "sweet"}]}]},
            "unknown entity type 'taste'; declared are category, colour",
        ),
        (
            "/score",
            {"query": QUERY, "items": [{"id": "x", "entities": [{"type": "colour", "value": "red", "conf": "high"}]}]},
            "items[0]: ",
        ),
        (
            "/score",
            {"query": QUERY, "items": [{"id": "x"}, {"id": "x", "entities": [{"type": "colour", "value": "red"}]}]},
            "item 'x' comes twice with different entities",
        ),
        (
            "/score",
            {"query": QUERY, "item_ids": [], "on_unknown": "keep"},
            "on_unknown must be raise or drop; got 'keep'",
        ),
        ("/score", {"query": QUERY, "item_ids": [], "with_types": 1}, "with_types must be true or false"),
        ("/score", {"query": "q \ud800", "items": [{"id": "x"}]}, "not valid Unicode"),
        ("/explain", {"query": QUERY}, "give one of item and item_id"),
        ("/explain", {"query": QUERY, "item_id": "a", "trial": 3}, "trial must be an object; got 3"),
        (
            "/explain",
            {"query": QUERY, "item_id": "a", "trial": {"match": {"type": "taste"}, "op": "set", "value": 1}},
            "unknown entity type 'taste'",
        ),
        ("/overrides", {"match": {"type": "colour"}, "op": "set", "value": 2, "owner": "o"}, "value must be in [0, 1]"),
        ("/overrides", {"match": {"type": "colour"}, "op": "set", "value": 1, "owner": " "}, "owner"),
        (
            "/overrides",
            {"match": {"type": "taste"}, "op": "set", "value": 1, "owner": "o"},
            "unknown entity type 'taste'",
        ),
        ("/overrides", {"match": "x", "op": "set", "value": 1, "owner": "o"}, "match must be an object; got 'x'"),
        (
            "/overrides",
            {"match": {"type": "colour", "query_regex": "("}, "op": "set", "value": 1, "owner": "o"},
            "no regular expression",
        ),
        (
            "/overrides",
            {"match": {"type": "colour", "query_regex": "x" * 201}, "op": "set", "value": 1, "owner": "o"},
            "query_regex must have at most 200 characters",
        ),
        ("/overrides/remove", {"version": True, "owner": "o"}, "version must be that of an override"),
        ("/overrides/remove", {"version": 9, "owner": "o"}, "version must be that of an override"),
    ],
)
def test_what_a_client_gets_wrong_is_one_line(client, path, data, text):
    body = json.dumps(data).encode()  # httpx itself refuses half a surrogate pair
    answer = client("POST", path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422, answer.text
    assert text in answer.json()["error"]
    assert answer.text.count("\n") == 0
    assert client.model.overrides.version == 0
    assert client.post("/score", {"query": QUERY, "item_ids": ["a"]}).status_code == 200


@pytest.mark.parametrize(
    ("body", "kind", "status", "text"),
    [
        (b'{"query": "\xff"}', "application/json", 400, "must be UTF-8: invalid start byte at byte 11"),
        (b"{", "application/json", 400, "must be JSON"),
        (b"[1]", "application/json; charset=utf-8", 400, "must be a JSON object; got a list"),
        (b'{"query": NaN}', "application/json", 400, "NaN is no JSON number"),
        (b"[" * 100_000, "application/json", 400, "must be JSON"),
        (b'{"query": ' + b"9" * 5000 + b"}", "application/json", 400, "must be JSON"),
        (b'{"query": "q"}', "text/plain", 415, "Content-Type must be application/json; got 'text/plain'"),
        (b"x" * 300_000, "application/json", 413, "the body must have at most 200000 bytes"),
    ],
)
def test_bodies_that_cannot_be_read(body, kind, status, text):
    client = Client(model_of(), max_body_bytes=200_000)
    answer = client("POST", "/score", content=body, headers={"Content-Type": kind})
    assert answer.status_code == status
    assert text in answer.json()["error"]
    assert client.post("/score", {"query": QUERY, "item_ids": ["a"]}).status_code == 200


def test_a_body_that_does_not_arrive():
    client = Client(model_of(), body_timeout_s=0.05)

    async def drip():
        yield b"{"
        await asyncio.sleep(5)

    answer = client("POST", "/score", content=drip(), headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()) == (408, {"error": "the body did not arrive within 0.05 s"})


def test_unknown_types_are_dropped_and_counted_where_asked(client):
    sweet = {"id": "s", "entities": [{"type": "taste", "value": "sweet"}, {"type": "colour", "value": "black"}]}
    answer = client.post("/score", {"query": QUERY, "items": [sweet], "on_unknown": "drop"}).json()
    assert answer["dropped_entities"] == 1
    assert "recis_ebrm_dropped_entities_total 1\n" in client("GET", "/metrics").text


def test_paths_and_methods_that_there_are_not(client):
    answer = client("GET", "/nowhere")
    assert (answer.status_code, answer.json()["error"][:10]) == (404, "Not Found;")
    assert client("GET", "/score").status_code == 405
    assert client("GET", "/docs").status_code == client("GET", "/openapi.json").status_code == 404


def test_a_fault_of_the_model_is_its_requests_alone(caplog):
    class Broken(QEScorer):
        def forward(self, pairs):
            return torch.tensor([float("nan") if query == "bad" else 1.0 for query, _ in pairs])

    client = Client(model_of(Broken()))
    answer = client.post("/score", {"query": "bad", "item_ids": ["a"]})
    assert answer.status_code == 500
    assert "the logit of query 'bad', entity" in answer.json()["error"]
    assert "/score failed" in caplog.text
    assert client.post("/score", {"query": QUERY, "item_ids": ["a"]}).status_code == 200


def test_what_is_late_is_flagged_and_counted():
    class Late(QEScorer):
        def forward(self, pairs):
            time.sleep(0.02)
            return torch.ones(len(pairs))

    client = Client(model_of(Late()), encode_timeout_ms=1)
    colours = [{"type": "colour", "value": f"shade {number}"} for number in range(40)]  # more than a timed batch
    answer = client.post("/score", {"query": QUERY, "items": [{"id": "x", "entities": colours}]}).json()
    assert (answer["approximate"], answer["encoder_calls"]) == ([True], 32)
    metrics = client("GET", "/metrics").text
    assert "recis_ebrm_late_pairs_total 9\n" in metrics  # 40 colours and category:none
    assert "recis_ebrm_approximate_items_total 1\n" in metrics
    assert client.model.config.encode_timeout_ms == 1


def test_more_requests_than_may_wait_are_refused_and_health_is_not():
    client = Client(model_of(), max_waiting=2)
    body = {"query": QUERY, "item_ids": ["a"]}
    calls = [("POST", "/score", {"json": body})] * 20 + [("GET", "/health", {})]
    *answers, health = asyncio.run(client.all(calls))
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 503}
    refused = answers[codes.index(503)]
    assert (refused.headers["retry-after"], "requests are waiting" in refused.json()["error"]) == ("1", True)
    assert health.json()["status"] == "ok"


def test_health_items_and_metrics(client):
    health = client("GET", "/health").json()
    assert (health["model_version"], health["num_items"], health["is_calibrated"]) == (client.model.version, 3, False)
    assert client("GET", "/items", params={"words": "FRIDGE bl"}).json() == {
        "num_found": 1,
        "items": [{"id": "a", "title": "Black fridge"}],
    }
    assert client("GET", "/items", params={"limit": "1"}).json()["num_found"] == 3
    assert "limit must be a whole number" in client("GET", "/items", params={"limit": "-1"}).json()["error"]
    client.post("/score", {"query": QUERY, "item_ids": ["a", "b"]})
    client.post("/score", {"query": ""})
    answer = client("GET", "/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples = dict(metric_samples(answer.text))
    assert samples['recis_ebrm_requests_total{route="/score",status="200"}'] == 1
    assert samples['recis_ebrm_requests_total{route="/score",status="422"}'] == 1
    assert samples['recis_ebrm_request_seconds_bucket{route="/score",le="+Inf"}'] == 2
    assert samples['recis_ebrm_request_seconds_count{route="/score"}'] == 2
    assert samples["recis_ebrm_scored_items_total"] == 2
    assert samples["recis_ebrm_encoder_pairs_total"] == 3
    assert samples[f'recis_ebrm_model_info{{version="{client.model.version}"}}'] == 1


def metric_samples(text: str) -> Iterator[tuple[str, float]]:
    for line in text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            yield name, float(value)


def test_histogram_buckets_count_what_is_at_most_their_limit():
    from recis.ebrm.service_metrics import ServiceMetrics

    metrics = ServiceMetrics()
    for seconds in (0.0005, 0.005, 0.006, 99.0):
        metrics.observe("/score", 200, seconds)
    samples = dict(metric_samples(metrics.text({}, {}, model_version="v")))
    buckets = [samples[f'recis_ebrm_request_seconds_bucket{{route="/score",le="{le}"}}'] for le in (0.001, 0.005, 0.01)]
    assert (buckets, samples['recis_ebrm_request_seconds_sum{route="/score"}']) == ([1, 2, 3], pytest.approx(99.0115))
    assert samples['recis_ebrm_request_seconds_bucket{route="/score",le="2.5"}'] == 3


def test_the_page_loads_nothing_from_elsewhere(client):
    for path in ("/", "/page.css", "/page.js"):
        answer = client("GET", path)
        assert answer.status_code == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "http://" not in answer.text
        assert "https://" not in answer.text
    assert "innerHTML" not in client("GET", "/page.js").text


def test_settings_and_catalogues_that_break_a_rule():
    with pytest.raises(ConfigError, match="max_items must be above 0; got 0"):
        ServeConfig(max_items=0)
    with pytest.raises(ConfigError, match="1 item ids twice"):
        create_app(model_of(), [CATALOGUE[0], CATALOGUE[0]])
    with pytest.raises(ConfigError, match="encode_timeout_ms must be above 0"):
        create_app(model_of(), config=ServeConfig(encode_timeout_ms=-1))


def test_a_conflict_is_between_rules_of_one_match_only(client):
    client.model.overrides.add(Override(entity="colour:red", op="set", value=1, owner="o"))
    rule = {"match": {"query": QUERY, "entity": "colour:red"}, "op": "set", "value": 0.9, "owner": "merch"}
    assert client.post("/overrides", rule).json()["replaces"] == []


def test_the_command_refuses_what_is_no_model(tmp_path):
    command = argparse.ArgumentParser()
    add_serve_arguments(command)
    args = command.parse_args(["--model", str(tmp_path / "nothing")])
    config = ServeConfig()
    limits = (args.encode_timeout_ms, args.max_items, args.max_query_chars, args.max_body_mib * 2**20)
    assert limits == (config.encode_timeout_ms, config.max_items, config.max_query_chars, config.max_body_bytes)
    with pytest.raises(ConfigError, match="no EBRM model at"):
        run_serve(args)
