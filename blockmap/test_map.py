"""The map: what is recorded, what the page holds, and what a browser shows of it."""

import itertools
import json
import os
import random
import time

import pytest
import torch

import blockmap
import slim
from conftest import draw, set_lookup_heads

HOSTILE = (
    "</script><img src=x onerror=\"document.title='owned'\"><!-- --> "
    "'\"&lt;&amp; \u2028\u2029\ufeff\0 "
    "<b id=evil>😀é漢</b> {data} {script hash} "
)


def mapped(folder, text, schedule={1: 64, 2: 40, 3: 24}, n=12, follow="What then?"):
    """Play a conversation under a recorder; return what `write` takes.

    A prompt, n tokens generated, a follow-up, two tokens by hand.
    """
    engine = slim.load(folder, "cpu", "float32", schedule, block_len=8, unit_len=4)
    recorder, tok = blockmap.Recorder(engine), engine.tokenizer
    ids = tok.encode(text)
    ids += list(engine.generate(ids, n))
    ids += tok.encode(follow)
    logits = engine.extend(ids[-len(tok.encode(follow)) :])
    for _ in range(2):
        ids.append(int(logits.argmax()))
        logits = engine.extend(ids[-1:])
    return engine, recorder, ids


def map_data(html):
    return json.loads(
        html.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    )


def test_each_score_names_the_layer_that_gave_it(tiny):
    """The layer where a block's running maximum rose last, of all layers below the boundary."""
    engine = slim.load(tiny, "cpu", schedule={2: 64, 4: 32}, block_len=8, unit_len=4)
    recorder, layers = blockmap.Recorder(engine), []
    record = engine.model.on_scores
    engine.model.on_scores = lambda layer, scores: (
        layers.append(scores.amax(0)),
        record(layer, scores),
    )
    engine.prefill(draw(300))
    rises = (
        torch.stack(layers).diff(dim=0, prepend=torch.full((1, len(layers[0])), -torch.inf)) > 0
    )  # (layers, N)
    for stage, boundary in zip(recorder.record["stages"], (2, 4)):
        last = [max(i for i in range(boundary) if rises[i, block]) for block in stage["candidates"]]
        assert stage["seen"] == last and len(set(last)) > 1


def big_map(n=2000, steps=256, budgets=(128, 64, 32)):
    """Return what `describe` would of a made-up conversation.

    128,000 tokens, a quarter of each active set new at every step.
    """
    rng, below, stages = random.Random(0), list(range(n - 1)), []
    for budget in budgets:
        kept = [0, *sorted(rng.sample(below[1:], budget - 1))]
        stages.append(
            {
                "candidates": [*below],
                "seen": [7 for _ in below],
                "scores": [float(f"{rng.random():.4g}") for _ in below],
                "active": kept,
            }
        )
        below = kept
    active, moves = [set(stage["active"]) for stage in stages], []
    for _ in range(steps):
        moves.append([])
        for i, budget in enumerate(budgets):
            came = rng.sample([*set(range(1, n - 1)) - active[i]], budget // 4)
            left = rng.sample([*active[i] - {0}], budget // 4)
            active[i] = active[i] - {*left} | {*came}
            moves[-1].append([i + 1, sorted(came), sorted(left), sorted(came[::2])])
    n_prompt = 64 * n - 20
    kept = [n_prompt, *(64 * budget + 44 for budget in budgets)]
    counters = dict(
        prompt_tokens=n_prompt,
        tokens=n_prompt + steps,
        kept=kept,
        swaps=steps * sum(budgets) // 4,
        revived=steps * sum(budgets) // 8,
        to_cpu_bytes=0,
        to_gpu_bytes=0,
    )
    sizes = dict(
        kv_gpu_bytes=6 * 2**30,
        kv_cpu_bytes=2**30,
        aux_cpu_bytes=2**30,
        kv_dense_bytes=16 * 2**30,
        flops=10**15,
        flops_dense=4 * 10**15,
    )
    return dict(
        model="made-up",
        block_len=64,
        device="cuda",
        layers=[[0, 10], [10, 20], [20, 30], [30, 32]],
        stages=stages,
        steps=[{"at": n_prompt + k, "pending": 1, "moves": m} for k, m in enumerate(moves)],
        blocks=[f"block {b} " + "lorem ipsum " * 22 for b in range(n)],
        turns=[
            {"at": n_prompt + k, "kind": "written", "step": k + 1, "text": f" {k}"}
            for k in range(steps)
        ],
        **counters,
        **sizes,
    )


@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_a_record_replays_to_the_active_sets_of_every_step(tiny, gamma):
    """The page shows what was recorded: deltas, which must add up to the engine's sets."""
    engine = slim.load(
        tiny, "cpu", "float32", {1: 64, 2: 40, 3: 24}, block_len=8, unit_len=4, gamma=gamma
    )
    recorder = blockmap.Recorder(engine)
    for prompt in (90, 150):  # the second conversation starts a record of its own
        ids, start = draw(prompt + 30 + 11, seed=prompt), prompt
        logits, seen = [engine.prefill(ids[:prompt])], []
        for step in [1] * 20 + [11] + [1] * 10:
            seen.append([set(stage.slots) for stage in engine.kv.stages[1:]])
            logits.append(engine.extend(ids[start : start + step]))
            start += step
        record = json.loads(json.dumps(recorder.record))
        assert [len(stage["scores"]) for stage in record["stages"]] == [(prompt - 1) // 8, 7, 4]
        active, swaps, revived = [set(stage["active"]) for stage in record["stages"]], 0, 0
        for step, want in zip(record["steps"], seen, strict=True):
            assert active == want
            for i, came, left, back in step["moves"]:
                assert (
                    not active[i - 1] & set(came)
                    and set(left) <= active[i - 1]
                    and set(back) <= set(came)
                )
                active[i - 1] = active[i - 1] - set(left) | set(came)
                swaps, revived = swaps + len(came), revived + len(back)
        assert active == [set(stage.slots) for stage in engine.kv.stages[1:]]
        assert (swaps, revived) == (engine.stats["swaps"], engine.stats["revived"]) and revived > 0
        assert [step["at"] for step in record["steps"]] == [
            *range(prompt, prompt + 21),
            *range(prompt + 31, prompt + 41),
        ]


def test_a_map_holds_the_text_whatever_it_says(talking, tmp_path):
    """Markup in a prompt stays data; a character that a boundary cuts is in the second block."""
    engine, recorder, ids = mapped(talking, HOSTILE * 12)
    blockmap.write(tmp_path / "map.html", engine, recorder, ids)
    html = (tmp_path / "map.html").read_text("utf-8")
    data = map_data(html)
    assert html.count("<img") == html.count("\u2028") == html.count("evil>") == 0
    pieces = [*data["blocks"], *(turn["text"] for turn in data["turns"])]
    texts = (
        "".join(piece[::2]) if isinstance(piece, list) else piece for piece in pieces
    )  # without special tokens
    assert "".join(texts) == "".join(engine.tokenizer.stream(ids))
    assert "".join(data["blocks"]).startswith(HOSTILE) and len(data["blocks"]) == -(
        -engine.kv.n_prompt // 8
    )
    assert [kind for kind, _ in itertools.groupby(turn["kind"] for turn in data["turns"])] == [
        "written",
        "asked",
        "written",
    ]
    assert len([*tmp_path.iterdir()]) == 1  # nothing temporary is left
    again = blockmap.Recorder(
        engine, record=json.loads(json.dumps(recorder.record))
    )  # saved and put back
    blockmap.write(tmp_path / "map.html", engine, again, ids)
    assert (tmp_path / "map.html").read_text("utf-8") == html


def test_accepted_drafts_are_shown_as_written(tiny):
    """They come with a step of another token, and would else look like a question."""
    engine = slim.load(tiny, "cpu", "float32", {1: 64, 3: 32}, block_len=8, unit_len=4)
    recorder = blockmap.Recorder(engine)
    engine.prefill(draw(100))
    engine.pending = [1]
    engine.extend(draft=[2, 3, 4])
    for token in (2, 3):
        engine.pending = [token]
        engine.accept()
    engine.extend([5, 6])
    turns = blockmap.spoken(engine.kv, recorder.record, recorder.record["steps"])
    assert [(turn["at"], turn["kind"]) for turn in turns] == [(100, "written"), (103, "asked")]


def test_a_text_has_a_map_once_its_first_question_has_chosen(talking, tmp_path):
    """Before, nothing is kept or pruned; after, the question is shown as one."""
    engine, recorder, ids = mapped(talking, "ABBA CAB " * 30)
    engine.read(ids[:200])
    with pytest.raises(ValueError, match="no map yet: the text's first question chooses"):
        blockmap.write(tmp_path / "map.html", engine, recorder, ids[:200])
    engine.extend([5, 6])
    engine.extend([7])
    data = blockmap.describe(engine, recorder.record, [*ids[:200], 5, 6, 7])
    turns = [(turn["at"], turn["kind"]) for turn in data["turns"]]
    assert data["stages"] and turns == [(200, "asked"), (202, "written")]


def test_a_dense_map_says_that_all_was_kept(talking, tmp_path):
    """Nothing is chosen, so no record is asked for."""
    engine, recorder, ids = mapped(talking, "ABBA CAB " * 30, schedule={})
    blockmap.write(tmp_path / "map.html", engine, recorder, ids)
    data = map_data((tmp_path / "map.html").read_text("utf-8"))
    assert (
        data["stages"] == data["steps"] == []
        and data["flops"] == data["flops_dense"]
        and len(data["turns"]) == 1
    )


def test_a_map_of_a_broken_off_step_ends_before_it(talking, tmp_path):
    """Ctrl-C leaves a step that chose its blocks and did not finish: it is not shown."""
    engine, recorder, ids = mapped(talking, "ABBA CAB " * 30)
    whole = len(recorder.record["steps"])

    def interrupt(layer, n_rows):
        if layer == 3:
            raise KeyboardInterrupt

    engine.model.on_chunk = interrupt
    with pytest.raises(KeyboardInterrupt):
        engine.extend([1])
    assert len(recorder.record["steps"]) == whole + 1
    blockmap.write(tmp_path / "map.html", engine, recorder, ids)
    assert len(map_data((tmp_path / "map.html").read_text("utf-8"))["steps"]) == whole


def test_what_cannot_be_drawn_is_refused_in_one_line(talking, tmp_path, monkeypatch):
    """A wrong record would show a page of another conversation."""
    engine, recorder, ids = mapped(talking, "ABBA CAB " * 30)
    good = recorder.record
    for path in (
        tmp_path,
        tmp_path / "none" / "map.html",
        tmp_path / ("long" * 99),
        "",
        "nul\0",
        7,
        "/dev/null",
    ):
        with pytest.raises(ValueError, match="cannot be written: [^\n]+$"):
            blockmap.write(path, engine, recorder, ids)
    with (
        monkeypatch.context() as m,
        pytest.raises(ValueError, match="map.html cannot be written .*no space left"),
    ):
        m.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "no space left")))
        blockmap.write(tmp_path / "map.html", engine, recorder, ids)
    with pytest.raises(ValueError, match="all ids"):
        blockmap.write(tmp_path / "map.html", engine, recorder, ids[:-1])
    for record in (
        None,
        {},
        {**good, "n_prompt": 1},
        {**good, "stages": [1]},
        {**good, "steps": good["steps"][:2]},
        {**good, "steps": [{}]},
        ["no"],
    ):
        with pytest.raises(ValueError, match="not of this conversation"):
            blockmap.write(tmp_path / "map.html", engine, blockmap.Recorder(engine, record), ids)
    with pytest.raises(ValueError, match="no prompt"):
        fresh = slim.load(talking, "cpu")
        blockmap.write(tmp_path / "map.html", fresh, blockmap.Recorder(fresh), ids)
    assert not [*tmp_path.iterdir()]


def test_a_map_of_2000_blocks_is_small(tmp_path):
    """A page is sent by mail; 128,000 tokens must fit."""
    assert len(blockmap.page(big_map()).encode()) < 5e6


def test_a_map_in_a_browser_shows_the_text_and_nothing_else_and_replays(talking, tmp_path, browser):
    """Only a browser can tell that markup in a prompt stays text."""
    engine, recorder, ids = mapped(talking, HOSTILE * 12)
    blockmap.write(tmp_path / "map.html", engine, recorder, ids)
    browser.get((tmp_path / "map.html").as_uri())
    run = browser.execute_script
    assert browser.get_log("browser") == [] and browser.title != "owned"
    assert run("return document.querySelectorAll('img, #evil').length") == 0
    data = map_data((tmp_path / "map.html").read_text("utf-8"))
    assert (
        run("return [...document.querySelectorAll('#blocks .text')].map(e => e.textContent)")
        == data["blocks"]
    )

    def depths():  # of every block, by its class: the last stage that holds it
        return run(
            "return [...document.querySelectorAll('#blocks .block')]"
            ".map(e => +e.className.match(/\\bd(\\d)/)[1])"
        )

    active = [set(stage["active"]) for stage in data["stages"]]
    slider, tail = browser.find_element("id", "step"), len(data["blocks"]) - 1
    for k, step in enumerate([None, *data["steps"]]):
        for i, came, left, _ in step["moves"] if step else []:
            active[i - 1] = active[i - 1] - set(left) | set(came)
        want = [
            3
            if b == tail
            else max([i for i, blocks in enumerate(active, 1) if b in blocks], default=0)
            for b in range(tail + 1)
        ]
        assert depths() == want, k
        marked = run(
            "return [...document.querySelectorAll('#blocks .in, #blocks .out, #blocks .revived')]"
            ".map(e => +e.dataset.block)"
        )
        assert set(marked) == {
            b for _, came, left, _ in (step["moves"] if step else []) for b in (*came, *left)
        }
        slider.send_keys("\ue014")  # arrow right
    for _ in range(len(data["steps"])):
        slider.send_keys("\ue012")  # and all the way back
    assert depths()[:tail] == [
        sum(b in stage["active"] for stage in data["stages"]) for b in range(tail)
    ]
    assert browser.get_log("browser") == []


HEADS = [(layer, head) for layer in range(3) for head in range(4)]


def test_a_block_that_its_rule_always_keeps_is_said_to_be(talking, tmp_path, browser, monkeypatch):
    """The newest block's score is infinite: the page showed 1e+300, given by some layer."""
    set_lookup_heads(monkeypatch, *HEADS[1:])
    engine, recorder, ids = mapped(talking, "ABBA CAB " * 30)
    blockmap.write(tmp_path / "map.html", engine, recorder, ids)
    data = map_data((tmp_path / "map.html").read_text("utf-8"))
    newest = len(data["blocks"]) - 2  # the last one is the tail
    scores = dict(zip(data["stages"][0]["candidates"], data["stages"][0]["scores"]))
    assert scores.pop(newest) == blockmap.INFINITE
    assert all(abs(score) < 20 for score in scores.values())
    browser.get((tmp_path / "map.html").as_uri())

    def detail(block):
        browser.execute_script(f"look({block})")
        return browser.find_element("id", "detail").text

    assert "Always kept by the rule, whatever it scores." in detail(newest)
    assert "layer 1 always – – kept" in detail(newest)
    assert "Always kept: the first block" in detail(0)
    assert f"layer 1 {scores[0]:.4g} 0 " in detail(0)
    assert "Always kept" not in detail(5) and "e+" not in detail(5)
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("n_heads", [0, 1, 8, 80])
def test_the_heads_that_rank_have_a_line_that_wraps(tmp_path, browser, n_heads):
    """In a table's cell, 80 of them made the page wider than any window."""
    heads = [f"{i // 4}.{i % 4}" for i in range(n_heads)]
    (tmp_path / "map.html").write_text(blockmap.page(big_map() | {"lookup_heads": heads}), "utf-8")
    browser.get((tmp_path / "map.html").as_uri())
    line = browser.find_element("id", "heads")
    assert line.is_displayed() == (n_heads > 0)
    if heads:
        number = "One lookup head ranks" if n_heads == 1 else f"{n_heads} lookup heads rank"
        assert line.text == f"{number} the blocks (layer.head): {' '.join(heads)}"
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    facts = "return document.getElementById('facts').offsetHeight"
    assert browser.execute_script(facts) < 300  # both tables side by side, as without heads


@pytest.mark.parametrize(
    "sinks, block, seen",
    [
        (64, 100, "tokens 0–63 and those from 5,888 on"),  # of the tile from 6,400 on
        (0, 103, "those from 5,888 on"),
        (64, 10, "all tokens before it"),  # the window reaches the sinks
        (64, 1996, "all tokens before it"),  # one of the last rows
    ],
)
def test_a_block_says_what_it_saw_below_the_first_boundary(tmp_path, browser, sinks, block, seen):
    """With a local window; without one every token saw all, and nothing is said."""
    local = {"local_rows": 127_232, "local": {"window": 512, "sinks": sinks, "tile": 256}}
    (tmp_path / "map.html").write_text(blockmap.page(big_map() | local), "utf-8")
    browser.get((tmp_path / "map.html").as_uri())
    browser.execute_script(f"look({block})")
    assert f"In layers 0–9 its first token saw {seen}." in browser.find_element("id", "detail").text
    lead = browser.find_element("id", "lead").text
    assert "In layers 0–9 the 127,232 first tokens saw what is near: 512 tokens before" in lead
    assert "; the last 748 saw everything." in lead
    (tmp_path / "map.html").write_text(
        blockmap.page(big_map() | local | {"lookup_heads": ["3.1"]}), "utf-8"
    )
    browser.get((tmp_path / "map.html").as_uri())
    browser.execute_script(f"look({block})")
    far = ", lookup heads all." if "on" in seen.split() else "."
    assert f"saw {seen}{far}" in browser.find_element("id", "detail").text
    lead = browser.find_element("id", "lead").text
    assert "; the lookup heads and the last 748 saw everything." in lead
    (tmp_path / "map.html").write_text(blockmap.page(big_map() | {"local_rows": 0}), "utf-8")
    browser.get((tmp_path / "map.html").as_uri())
    assert " saw " not in browser.find_element("tag name", "body").text


def test_a_big_map_is_found_through_by_mouse_and_keyboard(tmp_path, browser):
    """2,000 blocks: every way to one must end with it in sight."""
    from selenium.webdriver import ActionChains

    (tmp_path / "map.html").write_text(blockmap.page(data := big_map()), "utf-8")
    browser.get((tmp_path / "map.html").as_uri())
    run, detail = browser.execute_script, browser.find_element("id", "detail")
    in_sight = (
        "const block = document.querySelector(`[data-block='${arguments[0]}']`);"
        "const box = block.getBoundingClientRect();"
        "return box.top > 0 && box.bottom <= innerHeight"
    )

    def arrives(b):
        deadline = time.perf_counter() + 10
        while not (detail.text.startswith(f"Block {b:,}\n") and run(in_sight, b)):
            assert time.perf_counter() < deadline, (b, detail.text)
            time.sleep(0.02)

    strip = browser.find_element("id", "strip")
    ActionChains(browser).move_to_element_with_offset(
        strip, strip.size["width"] // 4, 0
    ).click().perform()
    at = int(strip.get_attribute("aria-valuenow"))
    assert abs(at - 1500) < 20
    arrives(at)
    strip.send_keys("\ue013")  # arrow up
    arrives(at - 1)
    ActionChains(browser).move_to_element(
        browser.find_element("css selector", f"[data-block='{at}'] .text")
    ).perform()
    arrives(at)
    browser.find_element("css selector", f"[data-block='{at}']").click()
    for key, b in (("\ue015", at + 1), ("\ue010", 1999), ("\ue011", 0)):  # down, end, home
        browser.switch_to.active_element.send_keys(key)
        arrives(b)
        assert run("return document.activeElement.dataset.block") == str(b)
    rank = (
        sorted(data["stages"][0]["scores"], reverse=True).index(data["stages"][0]["scores"][0]) + 1
    )
    assert f"{data['stages'][0]['scores'][0]:g} 7 {rank:,} of 1,999 kept" in detail.text
    browser.find_element("id", "play").click()
    deadline = time.perf_counter() + 10
    while run("return +document.getElementById('step').value") < 2:
        assert time.perf_counter() < deadline
        time.sleep(0.02)
    assert browser.get_log("browser") == []
