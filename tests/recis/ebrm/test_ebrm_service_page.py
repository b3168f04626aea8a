"""The page in headless Chromium: score, explain, try, save, remove, export; keyboard alone; a phone's width; escaped."""

import json
import socket
import threading
import time

import chromium
import httpx
import numpy as np
import pytest
import uvicorn

from recis.ebrm import EBRM, EBRMConfig, EntitySchema, Item, Override, QEScorer, TypeConfig, explain
from recis.ebrm.serve import create_app

SCHEMA = EntitySchema(
    types=(TypeConfig(name="category", hard=True), TypeConfig(name="brand"), TypeConfig(name="colour"))
)
QUERY = "black smeg fridge"
LOGITS = {"category:fridge": 3.0, "brand:smeg": 2.5, "colour:black": 3.0, "colour:cream": -2.0, "colour:none": -1.0}
ATTACK = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
TAB, ENTER, SPACE, LEFT, END = "\ue004", "\ue007", " ", "\ue012", "\ue010"


def item(id: str, title: str, *entities: str) -> Item:
    return Item(id=id, title=title, entities=tuple(SCHEMA.entity(*name.split(":")) for name in entities))


ITEMS = [
    item("cream", "Smeg FAB10L fridge cream", "category:fridge", "brand:smeg", "colour:cream"),
    item("black", "Smeg FAB5R minibar black", "category:fridge", "brand:smeg", "colour:black"),
    item("attack", ATTACK, "category:fridge", f"brand:{ATTACK}"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    reason = chromium.missing()
    if reason:
        pytest.skip(reason)
    with chromium.browser(tmp_path_factory.mktemp("chromium")) as session:
        yield session


@pytest.fixture
def model() -> EBRM:
    table = {(QUERY, entity): logit for entity, logit in LOGITS.items()}
    model = EBRM(EBRMConfig(schema=SCHEMA), QEScorer.table(table, default=-3.0))
    model.fit_calibrator(np.log(np.array([0.1, 0.2, 0.6, 0.7, 0.9])), np.array([0, 0, 1, 0, 1]))
    return model


@pytest.fixture
def url(model):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(create_app(model, ITEMS), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            end = time.monotonic() + 20
            while not server.started:
                assert time.monotonic() < end
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join(timeout=20)
            assert not thread.is_alive()


def open_page(browser, url) -> None:
    browser.go(url)
    browser.wait("return document.querySelectorAll('#items li').length === 3")


def shown_r(browser, want: float) -> None:
    browser.wait("return document.getElementById('r').textContent === arguments[0]", f"{want:.4f}")


def slide(browser, entity: str, s: float) -> None:
    browser.run(
        "const slider = document.querySelector(`[data-entity='${arguments[0]}'] input`); slider.value = arguments[1];"
        "slider.dispatchEvent(new Event('input'))",
        entity,
        s,
    )


def test_score_try_save_and_export(browser, model, url):
    browser.resize(1200, 900)
    open_page(browser, url)
    browser.type("#query", QUERY)
    browser.click("#pick-all")
    browser.click("#ask button[type=submit]")
    browser.wait("return document.querySelectorAll('#ranking button').length === 3")
    browser.wait("return document.querySelector('#ranking [aria-pressed=true]')?.dataset.id === 'black'")
    browser.click("#ranking [data-id=cream]")
    before = explain(model, QUERY, ITEMS[0])
    shown_r(browser, before.r)
    assert browser.text("#p") == f"{before.p:.4f}"
    cream = before.type("colour").entities[0]
    assert browser.text("[data-entity='colour:cream'] td:nth-child(4)") == f"{before.r - cream.r_if_0:.4f}"
    assert browser.text("[data-entity='colour:cream'] td:nth-child(5)") == f"{cream.r_if_1 - before.r:.4f}"

    for s in (0.3, 0.8):  # every move shows at once
        slide(browser, "colour:cream", s)
        shown_r(browser, before.r + (s - cream.s) * cream.slope)
    assert browser.text("#before") == f"{before.r:.4f}"
    assert len(model.overrides) == 0
    browser.type("#owner", "merch <b>team</b>")
    browser.type("#reason", ATTACK)
    browser.click("#save button[type=submit]")
    browser.wait("return document.getElementById('status').textContent.includes('Saved as rule o1')")
    (rule,) = model.overrides.rules()
    assert rule.override == Override(
        query=QUERY, entity="colour:cream", op="set", value=0.8, owner="merch <b>team</b>", reason=ATTACK
    )
    shown_r(browser, explain(model, QUERY, ITEMS[0]).r)
    assert "rule o1" in browser.text("[data-entity='colour:cream'] th")
    assert f"merch <b>team</b>: {ATTACK}" in browser.text("#rule-table tbody")
    address = browser.run("return document.querySelector('#rules a').href")
    assert [json.loads(line) for line in httpx.get(address).text.splitlines()] == model.overrides.audit()

    browser.run("window.prompt = () => 'merch'")
    browser.click("#rule-table button")
    browser.wait("return document.getElementById('status').textContent.includes('is removed')")
    shown_r(browser, before.r)
    assert [record["action"] for record in model.overrides.audit()] == ["add", "remove"]


def test_titles_and_values_are_text(browser, url):
    open_page(browser, url)
    browser.type("#query", QUERY)
    browser.click("#pick-all")
    browser.click("#ask button[type=submit]")
    browser.wait("return document.querySelectorAll('#ranking button').length === 3")
    browser.click("#ranking [data-id=attack]")
    browser.wait("return document.getElementById('why-item').textContent.includes(arguments[0])", ATTACK)
    assert ATTACK in browser.run("return document.getElementById('items').textContent")
    assert ATTACK in browser.run("return document.getElementById('entities').textContent")
    assert browser.run("return [document.title, document.images.length, document.scripts.length]") == [
        "Relevance by entities",
        0,
        1,
    ]


def test_the_keyboard_alone_will_do(browser, model, url):
    open_page(browser, url)
    browser.run("document.getElementById('query').focus()")
    browser.press(*QUERY, TAB, TAB, TAB, SPACE)  # Score, words, Pick all shown
    browser.wait("return document.getElementById('picked').textContent === '3 picked'")
    browser.run("document.getElementById('query').focus()")
    browser.press(ENTER)
    before = explain(model, QUERY, ITEMS[1])
    shown_r(browser, before.r)
    reach(browser, "return document.activeElement.matches('#ranking [data-id=cream]')")
    browser.press(ENTER)
    shown_r(browser, explain(model, QUERY, ITEMS[0]).r)
    reach(browser, "return document.activeElement.closest('[data-entity=\"colour:cream\"]') !== null")
    browser.press(END, LEFT)
    cream = explain(model, QUERY, ITEMS[0]).type("colour").entities[0]
    shown_r(browser, 0.99 * cream.r_if_1)
    assert browser.run("return document.activeElement.type") == "range"  # the focus stays where it was
    browser.press(TAB, *"me", TAB, *"why", ENTER)
    browser.wait("return document.getElementById('status').textContent.includes('Saved as rule o1')")
    assert (model.overrides.rules()[0].override.owner, model.overrides.rules()[0].override.value) == ("me", 0.99)


def reach(browser, script: str) -> None:
    for _ in range(40):
        if browser.run(script):
            return
        browser.press(TAB)
    pytest.fail(f"40 tabs do not lead there: {script}")


def test_a_refusal_is_shown_and_the_page_goes_on(browser, url):
    open_page(browser, url)
    browser.type("#query", "x")
    browser.click("#ask button[type=submit]")
    browser.wait("return document.getElementById('status').textContent === 'Pick at least one item.'")
    browser.click("#pick-all")
    browser.run("document.getElementById('query').value = 'x'.repeat(3000)")
    browser.click("#ask button[type=submit]")
    browser.wait("return document.getElementById('status').textContent.includes('at most 2048 characters; got 3000')")
    browser.run("document.getElementById('query').value = arguments[0]", QUERY)
    browser.click("#ask button[type=submit]")
    browser.wait(
        "return !document.getElementById('why').hidden && document.getElementById('status').textContent === ''"
    )


@pytest.mark.parametrize("width", [320, 390, 820])
def test_nothing_is_wider_than_a_phone(browser, url, width):
    browser.resize(width, 800)
    open_page(browser, url)
    browser.type("#query", QUERY)
    browser.click("#pick-all")
    browser.click("#ask button[type=submit]")
    browser.wait("return !document.getElementById('why').hidden")
    slide(browser, "colour:black", 0.5)
    browser.wait("return !document.getElementById('save').hidden")
    assert browser.run("return document.documentElement.scrollWidth") <= width
    small = browser.run(
        "return [...document.querySelectorAll('button, #items label, .try input')]"
        ".filter((node) => node.getBoundingClientRect().height < 30).length"
    )
    assert small == 0  # room for a finger
