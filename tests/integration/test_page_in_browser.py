"""The playground in a real browser, over real tiny models: what a person does, sees and hears there."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.support import browser
from tests.support.browser import Browser, Page
from tests.support.site import HOSTILE, Site, served

pytestmark = pytest.mark.skipif(browser.installed() is None, reason="the page in a browser: Chromium is not installed")
STATUS = "document.querySelector('#status')"
LONG = {"type": "string", "minLength": 3000}
"""What takes the model seconds to write."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with served(tmp_path_factory.mktemp("site")) as running:
        yield running


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser.started() as running:
        yield running


@pytest.fixture
def page(site: Site, chromium: Browser) -> Iterator[Page]:
    """The page, opened for the first time. It asks nobody else for anything, and breaks no rule of its policy."""
    with chromium.page(site.open) as opened:
        opened.wait("document.body.dataset.view === 'chat'")
        yield opened
        assert opened.complaints() == []
        assert [url for url in opened.requested() if site.open not in url] == []


def put(page: Page, **settings: Any) -> None:
    """Set sampling settings."""
    for name, value in settings.items():
        page.choose(f"#set-{name}", value if isinstance(value, str) else json.dumps(value))


def say(page: Page, text: str) -> None:
    page.click("#message")
    page.type(text)
    page.press("Enter")


def answered(page: Page, turns: int = 2) -> list[str]:
    """Wait until the conversation has so many turns, and return their texts."""
    page.wait(f"document.querySelectorAll('#log .turn').length === {turns} && !document.querySelector('.streaming')")
    return page.run("[...document.querySelectorAll('#log .text')].map((one) => one.textContent)")


def pick(page: Page, model: str, ready: str) -> None:
    page.choose("#model", model)
    page.wait(f"document.querySelector({json.dumps(ready)})")


def idle(site: Site) -> None:
    end = time.monotonic() + 10
    while site.running():
        assert time.monotonic() < end, "the engine goes on with a text that nobody reads"
        time.sleep(0.01)


def chat(site: Site, *texts: str, **more: Any) -> str:
    """Ask the endpoint as a client of OpenAI's does."""
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 4, texts, strict=False)]
    answer = httpx.post(f"{site.open}v1/chat/completions", json={"model": "tiny", "messages": messages, **more})
    return answer.json()["choices"][0]["message"]["content"]


def test_a_conversation_is_what_the_endpoint_answers_and_can_be_asked_again(page: Page, site: Site) -> None:
    put(page, seed="7", max_tokens="12", temperature="0.9")
    asked = {"seed": 7, "max_tokens": 12, "temperature": 0.9}
    say(page, "hello")
    first = answered(page)
    assert first == ["hello", chat(site, "hello", **asked)]
    facts = page.run("document.querySelector('#log .facts').textContent")
    assert "12 out" in facts or "ended by itself" in facts
    assert "tiny@1" in facts
    say(page, "and then?")
    assert answered(page, 4)[3] == chat(site, *first, "and then?", **asked)

    page.click(".retry")
    assert answered(page, 4)[3] == chat(site, *first, "and then?", **asked), "the same seed, the same text"
    page.click(".edit")
    page.run("document.activeElement.select()")
    page.type("or now?")
    page.press("Enter")
    page.wait("document.querySelectorAll('#log .text')[2]?.textContent === 'or now?'")
    assert answered(page, 4)[3] == chat(site, *first, "or now?", **asked)

    page.click("#curl-chat")
    command = page.run("document.querySelector('#curl-text').textContent")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    chunks = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("data: {")]
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    assert text == chat(site, *first, "or now?", **asked)


@pytest.mark.parametrize("how", ["button", "key"])
def test_a_stream_is_seen_as_it_comes_and_stopped_at_once(page: Page, site: Site, how: str) -> None:
    put(page, response_format="json_schema", schema=LONG)
    say(page, "write")
    page.wait("document.querySelector('.streaming .text')?.textContent.length > 20")
    assert site.running() == 1
    assert page.run("document.querySelector('#log').getAttribute('aria-busy')") == "true"
    assert page.run("document.querySelector('#send').hidden")
    if how == "button":
        page.click("#stop-chat")
    else:
        page.press("Escape")
    text = answered(page)[1]
    assert 20 < len(text.encode("utf-16-le")) / 2 < 3000  # as the browser counts
    idle(site)
    assert "stopped by you" in page.run("document.querySelector('.assistant .facts').textContent")
    assert page.run(f"{STATUS}.textContent") == "Stopped."
    assert page.run("document.querySelector('#log').getAttribute('aria-busy')") == "false"


def test_what_was_typed_and_said_is_there_after_a_reload_and_gone_when_cleared(page: Page) -> None:
    put(page, max_tokens="3", system="Be short.", stop="a\\nb\nc")
    say(page, "hello")
    texts = answered(page)
    page.click("#message")
    page.type("half a thou")
    page.reload()
    page.wait("document.body.dataset.view === 'chat'")
    assert answered(page) == texts
    assert page.run("document.querySelector('#message').value") == "half a thou"
    assert page.run("document.querySelector('#set-system').value") == "Be short."
    page.click("#curl-chat")
    sent = page.run("document.querySelector('#curl-text').textContent")
    assert '"max_tokens":3' in sent
    assert '"stop":["a\\nb","c"]' in sent
    assert '{"role":"system","content":"Be short."}' in sent
    page.click("#curl-close")
    page.click("#clear-chat")
    page.click("#settings-reset")
    page.reload()
    page.wait("document.body.dataset.view === 'chat'")
    assert page.run("document.querySelectorAll('#log .turn').length") == 0
    assert page.run("document.querySelector('#set-max_tokens').value") == ""


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("temperature", "warm", "Temperature: “warm” is not a number."),
        ("max_tokens", "1.5", "“1.5” is not a whole number"),
        ("seed", "9007199254740993", "is not a whole number below 2⁵³"),
        ("stop", "a\\d", "Stop: write \\\\ for a backslash"),
    ],
)
def test_a_setting_that_cannot_be_sent_is_shown_and_nothing_is_sent(
    page: Page, setting: str, value: str, said: str
) -> None:
    put(page, **{setting: value})
    say(page, "hello")
    assert said in page.wait("document.querySelector('#settings-mistake').textContent")
    assert page.run("document.activeElement.id") == f"set-{setting}"
    assert page.run("document.querySelector('#message').value") == "hello"
    assert not any("chat/completions" in url for url in page.requested())


def test_what_the_endpoint_refuses_is_told_in_full(page: Page) -> None:
    put(page, top_p="3")
    say(page, "hello")
    told = page.wait("document.querySelector('#log .error')?.textContent")
    assert "top_p" in told
    assert "HTTP 400 · invalid_value · at top_p" in told
    put(page, top_p="", max_tokens="2")
    page.click(".error button")
    assert len(answered(page)) == 2


def focused(page: Page) -> tuple[str, bool]:
    """Return the id or text of what has the focus, and whether one sees that it does."""
    script = """(() => { const e = document.activeElement, l = e.labels?.[0];
      const seen = (one) => getComputedStyle(one).outlineStyle !== 'none' && getComputedStyle(one).opacity !== '0';
      return [e.id || e.textContent.trim(), seen(e) || (l ? seen(l) : false)] })()"""
    name, seen = page.run(script)
    return name, seen


def tab_to(page: Page, name: str) -> None:
    """Press Tab until the focus is at an element; everything on the way shows its focus."""
    for _ in range(40):
        page.press("Tab")
        at, seen = focused(page)
        assert seen, f"{at} does not show that it has the focus"
        if at == name:
            return
    raise AssertionError(f"{name} is not reached by Tab")


def test_all_of_it_works_by_keyboard(page: Page, site: Site) -> None:
    page.press("Tab")
    assert focused(page) == ("Skip to the playground", True)
    tab_to(page, "model")
    tab_to(page, "theme")
    page.press(" ")
    assert page.run("document.documentElement.dataset.theme") == "dark"
    tab_to(page, "message")
    page.type("one")
    page.press("Enter", "Shift")
    page.type("two")
    tab_to(page, "set-max_tokens")
    page.type("4")
    page.press("Enter")
    page.press("Tab", "Shift")
    page.run("document.querySelector('#message').focus()")
    page.press("Enter")
    assert answered(page)[0] == "one\ntwo"
    assert focused(page)[0] == "message"
    page.run("document.querySelector('#model').focus()")
    tab_to(page, "mode-chat")
    page.press("ArrowRight")
    page.wait("document.body.dataset.view === 'completion'")
    tab_to(page, "prompt")
    page.type("def add")
    page.press("Enter", "Control")
    page.wait(f"{STATUS}.textContent.startsWith('Done: ')")
    text = page.run("document.querySelector('#continuation').textContent")
    tab_to(page, "take-over")
    page.press("Enter")
    assert page.run("document.querySelector('#prompt').value") == "def add" + text


def test_a_key_is_asked_for_where_the_endpoint_wants_one_and_kept_in_the_tab(site: Site, chromium: Browser) -> None:
    key = site.key("alice", requests_per_minute=2)
    with chromium.page(site.keyed) as page:
        page.wait("document.querySelector('#key-dialog').open")
        assert "Kept in this tab only" in page.run("document.querySelector('#key-dialog').innerText")
        page.type("tandem-wrong")
        page.press("Enter")
        page.wait("document.querySelector('#key-why').textContent === 'The endpoint does not take this key.'")
        page.type(key)
        page.press("Enter")
        page.wait("document.body.dataset.view === 'chat'")
        assert page.run("[sessionStorage['tandem.key'], localStorage['tandem.key'] ?? null]") == [key, None]
        page.reload()
        page.wait("document.body.dataset.view === 'chat'")
        put(page, max_tokens="2")
        for turn in (2, 4):
            say(page, "hello")
            answered(page, turn)
        say(page, "hello")
        told = page.wait("document.querySelector('#log .error')?.textContent")
        assert "HTTP 429 · rate_limit_exceeded · try again in 30 s" in told.replace("29 s", "30 s")
        page.click("#curl-chat")
        assert key not in page.run("document.body.innerText")
        page.click("#curl-close")
        page.click("#key")
        page.click("#key-forget")
        page.wait("document.querySelector('#key-dialog').open && document.querySelector('#key-why').textContent")
        assert page.run("[sessionStorage.length, localStorage['tandem.key'] ?? null]") == [0, None]
        assert page.complaints() == []


def test_what_came_before_a_stream_broke_is_kept_beside_the_error(site: Site, chromium: Browser) -> None:
    with chromium.page(site.keyed) as page:
        page.wait("document.querySelector('#key-dialog').open")
        page.type(site.key("bob", tokens_per_day=100))
        page.press("Enter")
        page.wait("document.body.dataset.view === 'chat'")
        put(page, response_format="json_schema", schema=LONG)
        say(page, "write")
        told = page.wait("document.querySelector('#log .error')?.textContent")
        assert "budget of tokens (100 a day) is spent" in told
        assert "insufficient_quota" in told
        assert len(answered(page)[1]) > 20
    idle(site)


def test_events_are_read_however_the_bytes_are_cut(page: Page) -> None:
    read = """async (texts) => {
      const { events } = await import(new URL('page/stream.js', document.baseURI));
      const whole = new TextEncoder().encode(texts);
      const body = new ReadableStream({ start(out) {
        for (const byte of whole) out.enqueue(new Uint8Array([byte]));
        out.close();
      } });
      const found = [];
      try { for await (const data of events(body)) found.push(data) } catch (error) { found.push(error.message) }
      return found
    }"""
    whole = json.dumps("data: é😀\r\n\r\n: a remark\n\ndata:x\n\ndata: [DONE]\n\ndata: more\n\n")
    assert page.run(f"({read})({whole})") == ["é😀", "x"]
    assert page.run(f"({read})('data: a\\n\\ndata: b')") == ["a", "the connection ended before the answer did"]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(1).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "it's a shape.png")
    return tmp_path / "it's a shape.png"


def test_an_image_that_is_dropped_is_classified(page: Page, site: Site, picture: Path) -> None:
    pick(page, "shapes", "#predict")
    page.click("#predict")
    assert "image: choose a file." in page.wait("document.querySelector('#task-answer .error')?.textContent")
    page.drop(".drop", picture)
    page.wait("document.querySelector('.drop.filled img').naturalWidth === 8")
    page.click("#curl-task")
    command = page.run("document.querySelector('#curl-text').textContent")
    page.click("#curl-close")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, cwd=picture.parent)
    outputs = {each["name"]: each for each in json.loads(done.stdout)["outputs"]}
    page.click("#predict")
    assert "shapes@1" in page.wait("document.querySelector('#task-facts')?.textContent")
    rows = page.run(
        "[...document.querySelectorAll('.chart tr')].map((row) => [...row.cells].map((c) => c.textContent))"
    )
    ranked = sorted(
        zip(outputs["scores"]["data"], outputs["scores"]["parameters"]["labels"], strict=True), reverse=True
    )
    assert [(label, float(score)) for label, score, _ in rows] == [(name, pytest.approx(s, 1e-3)) for s, name in ranked]
    widths = page.run("[...document.querySelectorAll('.bar:not(header)')].map((one) => one.offsetWidth)")
    assert widths[0] / widths[1] == pytest.approx(ranked[0][0] / ranked[1][0], rel=0.05)


def test_a_text_is_classified(page: Page) -> None:
    pick(page, "opinions", "#in-text")
    page.click("#in-text")
    page.type("a good film")
    page.press("Enter", "Control")
    page.wait("document.querySelector('#task-facts')")
    labels = page.run("[...document.querySelectorAll('.chart th')].map((one) => one.textContent)")
    assert sorted(labels) == ["bad", "good"]


def test_a_row_of_a_table_is_sent_to_the_last_digit(page: Page) -> None:
    pick(page, "flats", "#in-area")
    for name, value in {"area": "12.5", "id": "9007199254740993", "new": "true"}.items():
        page.choose(f"#in-{name}", value)
    for column in range(3):
        page.choose(f"#in-rooms-{column}", str(column + 1))
    page.choose("#in-rooms-1", "2.5")
    page.click("#predict")
    assert "rooms[1]: “2.5” is not a whole number" in page.wait("document.querySelector('.error')?.textContent")
    page.choose("#in-rooms-1", "2")
    page.click("#predict")
    page.wait("document.querySelector('#task-facts')")
    assert cells(page)[:3] == [["price", "25"], ["id", "9007199254740993"], ["rooms", "6"]]


def test_lists_are_typed_as_long_as_they_are_and_what_is_optional_may_be_empty(page: Page) -> None:
    pick(page, "basket", "#in-bought")
    assert "may be left empty" in page.run("document.querySelector('label[for=in-weights]').textContent")
    page.click("#predict")
    assert "bought: is empty." in page.wait("document.querySelector('#task-answer .error')?.textContent")
    page.choose("#in-bought", "tea, green\nmilk\n")
    page.click("#predict")
    page.wait("document.querySelector('#task-facts')")
    assert cells(page) == [["bought", "tea, green\nmilk"], ["weights", ""]]
    page.choose("#in-weights", "1.5, 2 x")
    page.click("#predict")
    assert "weights[2]: “x” is not a number" in page.wait("document.querySelector('#task-answer .error')?.textContent")
    page.choose("#in-weights", "1.5, 2\n3")
    page.click("#predict")
    page.wait("document.querySelector('#task-facts')")
    assert cells(page)[1] == ["weights", "1.5 2 3"]


def test_an_answer_that_is_a_picture_is_drawn(page: Page) -> None:
    pick(page, "painter", "#in-seed")
    page.choose("#in-seed", "3")
    page.click("#predict")
    assert page.wait("document.querySelector('.bytes img')?.naturalWidth") == 4


def cells(page: Page) -> list[list[str]]:
    """Return the names and the values of an answer."""
    rows: list[list[str]] = page.run(
        "[...document.querySelectorAll('.results > table > tbody > tr')].map((row) =>"
        " [...row.cells].map((cell) => cell.textContent))"
    )
    return rows


def test_what_fits_no_form_is_written_as_json(page: Page) -> None:
    pick(page, "series", "#raw")
    page.choose("#raw", '{"inputs":[{"name":"series","datatype":"FP32","shape":[1,2,2],"data":[1,2,3,4.5]}]}')
    page.click("#predict")
    page.wait("document.querySelector('#task-facts')")
    assert "10.5" in page.run("document.querySelector('.results').innerText")
    page.choose("#raw", "{")
    page.click("#predict")
    assert "not valid JSON" in page.wait("document.querySelector('#task-answer .error')?.textContent")


def test_html_from_a_model_is_text(page: Page) -> None:
    put(page, response_format="json_schema", schema={"const": HOSTILE})
    say(page, HOSTILE)
    assert answered(page) == [HOSTILE, json.dumps(HOSTILE)]
    page.reload()
    page.wait("document.body.dataset.view === 'chat'")
    assert answered(page) == [HOSTILE, json.dumps(HOSTILE)]
    pick(page, "flats", "#in-area")
    for name in ("area", "id", "rooms-0", "rooms-1", "rooms-2"):
        page.choose(f"#in-{name}", "1")
    page.click("#predict")
    page.wait("document.querySelector('#task-facts')")
    assert page.run("document.querySelector('.chart th').textContent") == HOSTILE
    assert page.run("document.title") == "Tandem playground"
    assert page.run("document.querySelectorAll('main img, main script').length") == 0


def test_html_would_not_become_elements_even_where_a_script_tried(site: Site, chromium: Browser) -> None:
    with chromium.page(site.open) as page:
        tried = "(() => { try { document.body.innerHTML = '<b>x</b>' } catch (error) { return error.name } })()"
        assert page.run(tried) == "TypeError"
        assert any("TrustedHTML" in said for said in page.complaints())


def test_a_model_that_cannot_chat_says_so_and_offers_completion(page: Page) -> None:
    page.choose("#model", "plain")
    say(page, "once upon")
    told = page.wait("document.querySelector('#log .error')?.textContent")
    assert "This model has no chat template" in told
    assert "no_chat_template" in told
    page.click(".error button")
    assert page.wait("document.querySelector('#prompt').value") == "once upon"
    put(page, max_tokens="5")
    page.click("#complete")
    assert "plain@1" in page.wait("document.querySelector('#completion-figures').textContent")


def contrast(page: Page, front: str, back: str) -> float:
    """Return the contrast of two of the page's colours, as WCAG 2 defines it."""
    script = f"""['{front}', '{back}'].map((name) => {{ const e = document.createElement('i');
      e.style.color = `var(--${{name}})`; document.body.append(e);
      const found = getComputedStyle(e).color.match(/[0-9.]+/g).map(Number); e.remove(); return found }})"""
    shades = []
    for colour in page.run(script):
        light = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        shades.append(0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2])
    return (max(shades) + 0.05) / (min(shades) + 0.05)


TEXTS = [("ink", "paper"), ("quiet", "paper"), ("quiet", "panel"), ("accent", "paper"), ("on-accent", "accent")]
TEXTS += [("ink", "you"), ("wrong", "wrong-paper"), ("wrong", "paper"), ("warn", "paper"), ("quiet", "field")]


def test_light_and_dark_follow_the_system_until_chosen_and_can_be_read(page: Page) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    seen = {}
    for scheme in ("light", "dark"):
        page.prefer(prefers_color_scheme=scheme)
        seen[scheme] = page.run(paper)
        poor = {pair: ratio for pair in TEXTS if (ratio := contrast(page, *pair)) < 4.5}
        assert poor == {}, scheme
        assert contrast(page, "strong-line", "field") >= 3, "the edge of a field"
    assert seen["light"] != seen["dark"]
    page.click("#theme")
    assert page.run(paper) == seen["light"]
    page.reload()
    assert page.run(paper) == seen["light"]
    assert page.run("document.querySelector('#theme').ariaLabel") == "Use the dark theme"


def test_narrow_screens_and_no_motion(page: Page) -> None:
    page.size(320, 640)
    page.prefer(prefers_reduced_motion="reduce")
    for model, view in (("tiny", "#message"), ("flats", "#in-area"), ("shapes", ".drop")):
        pick(page, model, view)
        assert page.run("document.documentElement.scrollWidth") <= 320, model
    assert not page.run("document.querySelector('#settings').open")
    pick(page, "tiny", "#message")
    put(page, response_format="json_schema", schema=LONG)
    say(page, "write")
    page.wait("document.querySelector('.streaming .text')?.textContent")
    shown = "getComputedStyle(document.querySelector('.streaming .text'), '::after').animationName"
    assert page.run(shown) == "none"
    page.press("Escape")
    answered(page)
