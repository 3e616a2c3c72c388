"""The page at `/` and what it is told, without and with a browser."""

import random
import time
import urllib.request

import pytest

import blockmap
import slim
from conftest import draw
from serve import page
from serve.test_serve import PRUNED, Running
from serve.texts import Texts
from serve.worker import Disconnected, Job

HOSTILE = (
    "</script><img src=x onerror=\"document.title='owned'\"><b id=evil>bold</b> &lt;&amp; "
    "\x1b]0;owned\x07\x1b[31mred \u202eabc\u202c \u2066def\u2069 \u200f \u2028 {draw.js} "
)


def text_of(n_words, seed=0):
    """Return a text whose blocks differ."""
    rng = random.Random(seed)
    return " ".join(rng.choice(["ABBA", "CAB", "BACA", "ABC", "CCC"]) for _ in range(n_words))


# ---- without a browser ------------------------------------------------------------------------


def events_of(job):
    events = []
    while not job.out.empty():
        events.append(job.out.get())
    return events


def reading(engine, texts, body, work=page.read):
    """Run the reading of a text; return the map that the page gets."""
    tok = engine.tokenizer
    request = page.parse_read(body, tok, "m", engine.config.max_len, texts)
    job = Job(request)
    work(job, None, engine, tok, texts, lambda line: None)
    *_, described, end = events_of(job)
    assert end == ("stop", {})
    return described


def test_a_text_is_counted_and_its_beginning_fits(talking):
    """The page tells before sending; what it then sends must be taken."""
    engine = slim.load(talking, "cpu", **PRUNED)
    tok = engine.tokenizer
    texts = Texts(engine)
    most = page.most_tokens(engine.config.max_len)
    short = page.count({"text": "ABBA CAB 😀"}, tok, engine.config.max_len)
    n_short = len(tok.encode("ABBA CAB 😀"))
    assert short == {"tokens": n_short, "exact": True, "most": most, "fits": 11}
    for n_words, exact in ((2000, True), (60_000, False)):
        text = text_of(n_words)
        size = page.count({"text": text}, tok, engine.config.max_len)
        assert size["tokens"] > most > 0
        assert size["exact"] == exact
        n = len(tok.encode(text))
        assert abs(size["tokens"] - n) <= 0.05 * n
        assert len(tok.encode(text[: size["fits"]])) <= most
        with pytest.raises(page.ApiError, match="context"):
            page.parse_read({"text": text}, tok, "m", engine.config.max_len, texts)
        page.parse_read({"text": text[: size["fits"]]}, tok, "m", engine.config.max_len, texts)


@pytest.mark.parametrize("body", [[], {}, {"text": " "}, {"text": 1}, {"id": "no"}, {"id": 1}])
def test_a_wrong_reading_is_refused(talking, body):
    """Another program than the page may send anything."""
    engine = slim.load(talking, "cpu", **PRUNED)
    with pytest.raises(page.ApiError):
        page.parse_read(body, engine.tokenizer, "m", 4096, Texts(engine))


def test_a_text_waits_in_a_file_with_its_map(talking, tmp_path):
    """Opened another day, it is neither read again nor drawn from another conversation."""
    engine = slim.load(talking, "cpu", **PRUNED)
    texts = Texts(engine, tmp_path)
    first = reading(engine, texts, {"text": text_of(700), "name": "one"})
    assert "".join(map(plain, first["blocks"])).count("ABBA") > 50
    assert first["held"] and first["stages"] == []
    second = reading(engine, texts, {"text": text_of(700, seed=1), "name": "two"})
    texts.put_away()
    listed = {text["name"]: (text["kept"], text["open"]) for text in texts.talks()}
    assert listed == {"one": (True, False), "two": (True, True)}

    again = slim.load(talking, "cpu", **PRUNED)
    again.read = again.prefill = None  # nothing is read
    texts = Texts(again, tmp_path)
    names = "talk", "blocks", "turns", "tokens", "prompt_tokens"
    for described in (first, second, first):
        opened = reading(again, texts, {"id": described["talk"]["id"]})
        assert [opened[name] for name in names] == [described[name] for name in names]
        assert len(opened["stages"]) == 2 and not opened["held"]  # chosen by its own end


def plain(text):
    return text if isinstance(text, str) else "".join(text)


def test_a_dense_text_is_not_taken_for_a_pruned_one(talking, tmp_path):
    """Each would answer otherwise than was asked for; and a file cannot be resumed as dense."""
    engine = slim.load(talking, "cpu", **PRUNED)
    texts = Texts(engine, tmp_path)
    text = text_of(700)
    dense = reading(engine, texts, {"text": text, "name": "t", "dense": True})
    assert dense["stages"] == [] and texts.dense()
    ids = engine.ids
    assert texts.find(ids)[1] == 0 < texts.find(ids, dense=True)[1]
    pruned = reading(engine, texts, {"text": text, "name": "t"})
    assert pruned["held"] and not dense["held"] and not texts.dense()
    assert not texts.files()
    assert texts.find(ids, dense=True)[1] == 0 < texts.find(ids)[1]


def test_a_reading_that_is_stopped_leaves_nothing(talking):
    """Stop during a reading must end it within a chunk, and the next reading must be whole."""
    engine = slim.load(talking, "cpu", **PRUNED)
    texts = Texts(engine)
    request = page.parse_read({"text": text_of(700)}, engine.tokenizer, "m", 4096, texts)
    job = Job(request)
    chunks = []
    follow = page.report_progress(job, engine)

    def stop_later(*chunk):
        chunks.append(chunk)
        if len(chunks) == 3:
            job.disconnected.set()
        follow(*chunk)

    engine.model.on_chunk = stop_later
    with pytest.raises(Disconnected):
        engine.read(request.ids, keep_last=page.CLOSING)
    assert len(chunks) == 3 and not engine.usable
    assert reading(engine, texts, {"text": text_of(700)})["prompt_tokens"] == len(request.ids)


def test_progress_ends_near_the_last_token(talking, monkeypatch):
    """Shares of the work: wrong formulas would end at half of it, or jump to the end."""
    monkeypatch.setattr(page, "PAUSE", 0)
    engine = slim.load(talking, "cpu", **PRUNED | dict(schedule={2: 1024}), chunk=64)
    texts = Texts(engine)
    request = page.parse_read({"text": text_of(700)}, engine.tokenizer, "m", 4096, texts)
    job = Job(request)
    page.read(job, None, engine, engine.tokenizer, texts, lambda line: None)
    told = [event["tokens"] for event in events_of(job) if "of" in event]
    assert told == sorted(told) and len(told) > 20
    assert 0.95 * len(request.ids) < told[-1] <= len(request.ids)


def test_a_conversation_on_a_text_is_told_from_others():
    """After a reload the page shows what the engine holds, never another client's as its own."""
    talk = {"id": "1", "text": "T", "turns": [{"question": "q", "answer": "a", "note": {}}]}

    def after(*said):
        roles = ["user", "assistant"] * 4
        turns = [{"role": role, "content": text} for role, text in zip(roles, said)]
        return page.go_on(talk, turns)

    assert after("T\n\nq") == talk | {"turns": [], "asked": "q"}
    assert after("T\n\nq", "a", "r")["turns"] == talk["turns"]
    assert after("T\n\nq", "b", "r")["turns"] == [{"question": "q", "answer": "b"}]
    assert after("T\n\nq", "a") is after("q") is after() is after("Tq") is None
    assert page.go_on(talk, [{"role": "user", "content": "T\n\nq"}] * 3) is None  # no answers


def test_what_an_answer_looked_at_is_a_running_maximum(talking):
    """The strongest blocks first, over all steps since the question, but those that always stay."""
    engine = slim.load(talking, "cpu", **PRUNED)
    recorder = blockmap.Recorder(engine)
    seen = {}
    record = recorder.on_select

    def on_select(i, candidates, scores, active):
        record(i, candidates, scores, active)
        for block, score in zip(candidates, scores.tolist()):
            seen[block] = max(seen.get(block, score), score)

    engine.prefill(draw(1500))
    recorder.restart()
    engine.model.on_select = on_select
    list(engine.generate(draw(9), 8, follow_up=True, draft=0))
    seen = {block: score for block, score in seen.items() if block and abs(score) != float("inf")}
    best = sorted(seen, key=lambda block: -seen[block])[:5]
    assert [block for block, _ in recorder.strongest(5)] == best
    assert recorder.record["n_prompt"] == 1500 and len(recorder.record["steps"]) == 8


# ---- in a browser -------------------------------------------------------------------------------


class Tab:
    """The page in a browser, as a user has it."""

    def __init__(self, browser, url):
        self.browser = browser
        browser.get_log("browser")
        browser.get(url)

    def __getitem__(self, id):
        return self.browser.find_element("id", id)

    def all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def run(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def until(self, condition, what="", seconds=20):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (what, self.run("return document.body.innerText"))
            time.sleep(0.02)

    def new_text(self):
        """Show the form for a new text; a page that is opened first shows the server's open one."""
        self.until(lambda: self.run("return !running"), "loaded")
        self.all("#texts button")[0].click()

    def read(self, path):
        self.new_text()
        self["file"].send_keys(str(path))
        self.until(lambda: self["read"].is_enabled(), "counted")
        self["read"].click()
        self.until(lambda: self["question"].is_displayed(), "read")

    def ask(self, question):
        n = len(self.all("article"))
        self["question"].send_keys(question + "\n")
        self.until(lambda: len(self.all("article")) > n, "asked")
        self.answered()

    def answered(self):
        self.until(lambda: self["send"].is_displayed(), "answered")
        self.until(lambda: self.run("return !running"), "ready")

    def answers(self):
        return self.run("return [...document.querySelectorAll('.answer')].map(e => e.textContent)")

    def in_sight(self, block):
        return self.run(
            "const box = blocks[arguments[0]].getBoundingClientRect(), [top, bottom] = sight();"
            "return box.bottom > top && box.top < bottom",
            block,
        )


@pytest.fixture(scope="module")
def server(talking, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("cache"))
    running = Running(talking, "--cache-dir", folder, "--max-new-tokens", "24")
    yield running
    running.close()


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "document.txt"
    path.write_text(text_of(600))
    return path


def test_a_text_is_read_asked_about_and_gone_on_with(server, browser, document):
    """The whole way: choose, count, read, ask, see what was looked at, reload, ask again, open."""
    tab = Tab(browser, server.url)
    tab.read(document)
    read = server.ask("/v1/slim/map")[1]
    assert tab.run(
        "return [...document.querySelectorAll('#blocks .text')].map(e => e.textContent)"
    ) == [plain(text) for text in read["blocks"]]
    assert str(read["prompt_tokens"])[-3:] in tab["about"].text
    shades = "return [...document.querySelectorAll('#blocks .block')].map(e => e.className[7])"
    assert "when a question comes" in tab["about"].text and set(tab.run(shades)[1:]) == {"0"}
    tab.ask("ABBA?")
    assert "The darker" in tab["about"].text and set(tab.run(shades)[1:]) == {"0", "1", "2"}
    assert tab.run("return data.blocks.join('')").count("ABBA?") == 0  # not a part of the text
    tab.ask("CAB?")
    now = server.ask("/v1/slim/map")[1]
    turns = now["talk"]["turns"]
    assert [turn["question"] for turn in turns] == ["ABBA?", "CAB?"]
    assert tab.answers() == [turn["answer"] for turn in turns]
    for turn, note in zip(turns, tab.all("article > p:nth-of-type(1)")):
        assert turn["note"]["read_before"] > 0.9 * turn["note"]["prompt_tokens"]
        assert f"{turn['note']['blocks_kept']} of {turn['note']['blocks']} blocks kept" in note.text
    looked = tab.all("article:last-child .looked button")
    assert [int(button.text.split()[0]) for button in looked] == [b for b, _ in turns[1]["looked"]]
    looked[0].click()
    tab.until(lambda: tab.in_sight(turns[1]["looked"][0][0]), "scrolled")

    active = [set(stage["active"]) for stage in now["stages"]]
    for step in now["steps"]:
        for i, came, left, _ in step["moves"]:
            active[i - 1] = active[i - 1] - set(left) | set(came)
    assert any(step["moves"] for step in now["steps"])  # else nothing would light up
    shown = "return active.slice(1).map(set => [...set.keys()].filter(b => set[b] && b !== last))"
    for _ in range(2):  # as the moves came, and after a reload
        assert tab.run(shown) == [sorted(blocks) for blocks in active]
        assert tab.run("return marks.size") == len(tab.all("#blocks .in, #blocks .revived")) > 0
        browser.refresh()
        tab.until(lambda: tab["question"].is_displayed(), "reloaded")
        tab.answered()
        assert tab.answers() == [turn["answer"] for turn in turns]
    tab["again"].click()
    tab.until(lambda: tab.run("return !running"), "again")
    tab.answered()
    assert [turn["question"] for turn in server.ask("/v1/slim/map")[1]["talk"]["turns"]] == [
        "ABBA?",
        "CAB?",
    ]
    server.chat(text_of(600, seed=9))  # another client: our text goes to disk
    browser.refresh()
    tab.until(lambda: "on disk" in tab["texts"].text, "listed")
    reads = server.ask("/v1/stats")[1]["prompt_tokens"]
    tab.all("#texts button")[-1].click()  # the newest
    tab.until(lambda: len(tab.answers()) == 2, "opened")
    assert server.ask("/v1/stats")[1]["prompt_tokens"] == reads
    assert browser.get_log("browser") == []


def test_another_clients_text_does_not_take_the_place_of_ones_own(server, browser, tmp_path):
    """After the first answer the page asks for its map; the engine may hold another by then."""
    (tmp_path / "mine.txt").write_text(text_of(600, seed=11))
    tab = Tab(browser, server.url)
    tab.read(tmp_path / "mine.txt")
    mine = tab.run("return current.id")
    tab.run(
        "const usual = fetch;"
        "window.fetch = async (path, ...rest) => {"
        "  const answer = await usual(path, ...rest);"
        "  if (!path.endsWith('/map')) return answer;"
        "  const map = await answer.json();"
        "  return new Response(JSON.stringify({...map, talk: {...map.talk, id: 'another'}}));"
        "}"
    )
    tab.ask("ABBA?")
    assert tab.run("return current.id") == mine
    assert len(tab.answers()) == 1 and tab["question"].is_displayed()
    assert browser.get_log("browser") == []


def test_a_long_first_question_chooses_by_its_end(server):
    """It is read in pieces; only the last one chooses, so that nothing has to be revived."""
    text = text_of(600, seed=7)
    *_, read = server.ask("/v1/slim/read", {"text": text, "name": "t"})[1]
    assert read["held"] and read["stages"] == []
    server.chat(f"{text}\n\n{text_of(150, seed=8)}?", max_tokens=1)
    asked = server.ask("/v1/slim/map")[1]
    assert asked["tokens"] > read["tokens"] + 3 * 64 and asked["prompt_tokens"] <= read["tokens"]
    assert len(asked["stages"]) == 2 and asked["steps"] == [] and asked["revived"] == 0


def test_an_answer_streams_and_is_stopped(server, browser, document):
    """Stop keeps what there is, as the server has it; the next question goes on from there."""
    tab = Tab(browser, server.url)
    tab.new_text()
    document.write_text(text_of(1500, seed=3))
    tab["file"].send_keys(str(document))
    tab.until(lambda: "but only 3,584 fit." in tab["size"].text, "told")
    assert tab["read"].text == "Read the first 3,584 tokens"
    tab["read"].click()
    tab.until(lambda: tab["question"].is_displayed(), "read")
    tab.run("document.querySelector('details').open = true")
    tab["max-tokens"].clear()
    tab["max-tokens"].send_keys("2500")
    tab["question"].send_keys("ABBA?\n")
    lengths = []
    while len(set(lengths)) < 3:
        lengths.append(
            tab.run("return (document.querySelector('.answer') ?? '').textContent?.length ?? 0")
        )
    assert lengths == sorted(lengths)
    assert tab["stop"].is_displayed() and not tab["send"].is_displayed()
    tab["question"].send_keys("\ue00c")  # Escape
    tab.answered()
    (turn,) = server.ask("/v1/slim/map")[1]["talk"]["turns"]
    assert turn["note"]["finish"] == "stopped" and tab.answers() == [turn["answer"]]
    assert "stopped" in tab.all("article > p")[0].text
    tab["max-tokens"].clear()
    tab["max-tokens"].send_keys("5")
    tab.ask("CAB?")
    talk = server.ask("/v1/slim/map")[1]["talk"]
    assert talk["turns"][1]["note"]["read_before"] >= talk["tokens"] - page.CLOSING
    waits = server.raw(
        server.post(
            {"messages": [{"role": "user", "content": "A"}], "max_tokens": 3000, "stream": True}
        )
    )
    waits.recv(100)
    tab.new_text()
    document.write_text(text_of(500, seed=4))
    tab["file"].send_keys(str(document))
    tab.until(lambda: tab["read"].is_enabled(), "counted")
    tab["read"].click()
    tab.until(lambda: tab["stop-reading"].is_displayed(), "waits")
    tab["stop-reading"].click()
    tab.until(lambda: tab["start"].is_displayed(), "stopped")
    waits.close()


def test_a_hostile_document_is_text_and_nothing_else(server, browser, document):
    """Markup, scripts, terminal codes and marks of direction, in the text and the question."""
    document.write_text(HOSTILE * 30)
    tab = Tab(browser, server.url)
    name = document.with_name("<img src=x onerror=alert(1)>\u202e.txt")
    document.rename(name)
    tab.read(name)
    tab["question"].send_keys("<b id=evil>?</b>\n")
    tab.until(lambda: len(tab.all("article")) == 1, "asked")
    tab.answered()
    shown = tab.run(
        "return [...document.querySelectorAll('#blocks .text')].map(e => e.textContent)"
    )
    assert HOSTILE.strip() in "".join(shown)
    assert tab.all(".question")[0].text == "<b id=evil>?</b>"
    assert tab.run("return document.querySelectorAll('img, #evil').length") == 0
    assert "owned" not in browser.title
    codes = tab.run(
        "return [...new Set([...document.querySelectorAll('.control')].map(e => e.dataset.code))]"
    )
    assert {"U+001B", "U+0007", "U+202E", "U+2066", "U+200F"} <= set(codes)
    assert browser.get_log("browser") == []
    with urllib.request.urlopen(server.url) as answer:
        policy = answer.headers["Content-Security-Policy"]
        html = answer.read()
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert b"http" not in html.replace(b"http://www.w3.org", b"") and b"innerHTML" not in html
    assert len(html) < 60_000


def test_the_key_is_asked_for_and_kept_in_memory_alone(talking, browser, document):
    """A key in a browser's storage would be there for whoever sits down next."""
    server = Running(talking, "--max-new-tokens", "4", env={"SLIM_API_KEY": "sesame"})
    tab = Tab(browser, server.url)
    for key, problem in (("wrong", "This key is wrong."), ("sesame", "")):
        tab.until(lambda: tab["key"].is_displayed(), "asked")
        tab["key-input"].send_keys(key + "\n")
        tab.until(lambda problem=problem: tab["problem"].text == problem, problem)
    tab.read(document)
    tab.ask("ABBA?")
    kept = "return [document.cookie, localStorage.length, sessionStorage.length, location.href]"
    assert tab.run(kept) == ["", 0, 0, server.url + "/"]
    browser.refresh()
    tab.until(lambda: tab["key"].is_displayed(), "asked again")
    assert not tab["turns"].is_displayed() and tab.answers() == []
    server.close()


def test_a_lost_server_is_waited_for(talking, browser, document):
    """Text and conversation stay on the page; a new server reads the text again, with progress."""
    server = Running(talking, "--max-new-tokens", "4")
    tab = Tab(browser, server.url)
    tab.read(document)
    tab.ask("ABBA?")
    server.close()
    tab["question"].send_keys("CAB?\n")
    tab.until(lambda: "does not answer" in tab["problem"].text, "lost")
    assert tab["question"].get_attribute("value") == "CAB?"
    again = Running(talking, "--max-new-tokens", "4", "--serve", str(server.port))
    tab.until(lambda: tab["problem"].text == "", "back")
    tab.until(lambda: "to be read again" in tab["texts"].text, "listed")
    tab["question"].send_keys("\n")
    tab.until(lambda: len(tab.all("article")) == 2, "asked")
    tab.answered()
    talk = again.ask("/v1/slim/map")[1]["talk"]
    assert [turn["question"] for turn in talk["turns"]] == ["ABBA?", "CAB?"]

    document.write_text(text_of(500, seed=6))
    tab.read(document)  # it takes the other's place: there is no folder
    tab.until(lambda: "to be read again" in tab["texts"].text, "listed")
    tab.all("#texts button")[-1].click()
    tab.until(lambda: len(tab.all("article")) == 2, "read again")
    again.close()


CONTRAST = """
const brush = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const rgba = color => {
  brush.clearRect(0, 0, 1, 1); brush.fillStyle = color; brush.fillRect(0, 0, 1, 1);
  return brush.getImageData(0, 0, 1, 1).data;
};
const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
  .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = e => {
  for (; e; e = e.parentElement) {
    const color = rgba(getComputedStyle(e).backgroundColor);
    if (color[3] === 255) return color;
  }
};
const hasText = e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
return [...document.querySelectorAll('body *')]
  .filter(e => e.checkVisibility() && !e.matches('.unseen') && hasText(e))
  .map(e => {
    const [a, b] = [light(rgba(getComputedStyle(e).color)), light(behind(e))].sort((a, b) => b - a);
    return [(a + 0.05) / (b + 0.05), e.outerHTML.slice(0, 80)];
  }).filter(([contrast]) => contrast < 4.5);
"""

CONTROLS = """
return [...document.querySelectorAll('button, input, select, textarea, summary, [tabindex="0"]')]
  .filter(e => e.checkVisibility() && !e.disabled && e.tabIndex >= 0)
  .map(e => e.id || e.textContent)
"""


def test_it_is_usable_on_a_phone_by_keyboard_and_in_the_dark(server, browser, document):
    """360 pixels, Tab alone, no contrast below 4.5: in every state and both schemes."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 360, "height": 700, "deviceScaleFactor": 1, "mobile": False},
    )
    fits = "return document.documentElement.scrollWidth <= 360 && innerWidth === 360"
    try:
        tab = Tab(browser, server.url)
        tab.new_text()
        tab.run("document.querySelector('details').open = true")
        check(tab, fits)
        document.write_text(text_of(500, seed=5))
        tab.read(document)
        tab.ask("ABBA?")
        check(tab, fits)
        tab["to-text"].click()
        assert tab["pane"].is_displayed() and not tab["question"].is_displayed()
        check(tab, fits)
        tab["to-talk"].click()
        tab.all(".looked button")[0].click()
        assert tab["pane"].is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def check(tab, fits):
    """Look at one state of the page."""
    from selenium.webdriver import ActionChains

    assert tab.run(fits)
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        tab.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        assert tab.run(CONTRAST) == []
    wanted = set(tab.run(CONTROLS))
    tab.run("document.activeElement.blur()")
    reached = set()
    for _ in range(len(wanted) + 5):
        ActionChains(tab.browser).send_keys("\ue004").perform()
        reached.add(
            tab.run("return document.activeElement.id || document.activeElement.textContent")
        )
    assert wanted <= reached
