"""The server: what is read once, what it answers and refuses, and that nobody is lost or held up.

$SLIM_REQUESTS sets how many mixed requests the long test sends (120; 1,000 takes some minutes).
"""

import codecs
import collections
import contextlib
import datetime
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import slim
import tokenizer
from cli import main as cli_main
from conftest import HERE, draw, set_free
from loading.template import Template
from loading.test_vocabulary import of_bytes
from planning.settings import check_sampling
from serve import api, ollama
from serve.answers import SLICE, Piece, Scores, thoughts_apart
from serve.api import ApiError, Request, chat_ids, parse
from serve.http import Handler, Server, check_place
from serve.texts import Texts, check_folder, common, unpruned_end
from serve.worker import ROOM, Disconnected, Job, Tokens, answer

PRUNED = {"schedule": {2: 256, 3: 128}, "block_len": 32}
TEXT = "ABBA CAB " * 200
MANY = int(os.environ.get("SLIM_REQUESTS", "120"))


# ---- a text is read once --------------------------------------------------------------------


@given(seed=st.integers(0, 10**6), pruned=st.booleans())
@settings(max_examples=25, deadline=None)
def test_any_row_of_requests_runs_the_ids_it_was_given(tiny, seed, pruned, tmp_path_factory):
    """Going on changes nothing: dense, the answers are a fresh engine's; pruned, the ids."""
    rng = random.Random(seed)
    options = PRUNED if pruned else {"schedule": "dense", "block_len": 32}
    engine = slim.load(tiny, "cpu", **options)
    fresh = slim.load(tiny, "cpu", **options)
    texts = Texts(engine, tmp_path_factory.mktemp("texts") if rng.random() < 0.5 else None)
    asked = [draw(1200, seed)]
    for i in range(6):
        old = rng.choice(asked)
        ids = old[: rng.randint(1, len(old))] + draw(rng.randint(1, 200), seed + i)
        cached, tail = texts.reuse(ids, 3)
        assert 0 <= cached < len(ids)
        if cached:
            assert ids[:cached] == engine.ids + engine.pending
        answer = list(engine.generate(ids[cached:], 3, follow_up=cached > 0, keep_last=tail))
        assert engine.ids[: len(ids)] == ids
        asked.append(ids + answer)
        if not pruned:
            assert answer == list(fresh.generate(ids, 3))


def test_another_question_on_the_same_text_reads_itself_alone(tiny):
    """What the server is for: a text is read by the first question alone."""
    engine = slim.load(tiny, "cpu", **PRUNED)
    texts, text = Texts(engine), draw(2000)
    ask = [text + draw(40, seed) for seed in (1, 2)] + [
        text + draw(700, 3),
        text + draw(700, 4),
        text + draw(700, 5),
    ]
    kept = []
    for ids in ask:
        cached, tail = texts.reuse(ids)
        engine.extend(ids[cached:]) if cached else engine.prefill(ids, keep_last=tail)
        kept.append(cached // 10)
    # The first is read; the second goes on; so does a long question, up to where it parts from the
    # second; a fourth parts there too; all is in the tail by then.
    assert kept == [0, 200, 200, 200, 200]
    assert engine.kv.tail_start < engine.kv.n_prunable < 2000


def test_a_question_longer_than_the_tail_is_read_twice_and_no_more(tiny):
    """The second reading leaves unpruned the place where the third will part."""
    engine = slim.load(tiny, "cpu", **PRUNED)
    texts, text, kept = Texts(engine), draw(2000), []
    for seed in (1, 2, 3):
        ids = text + draw(900, seed)
        cached, tail = texts.reuse(ids)
        engine.extend(ids[cached:]) if cached else engine.prefill(ids, keep_last=tail)
        kept.append(cached)
    assert kept[:2] == [0, 0] and kept[2] >= 2000


def test_much_that_is_new_is_read_afresh_and_pruned(tiny):
    """A follow-up is never pruned, so a long text must not become one."""
    engine = slim.load(tiny, "cpu", **PRUNED)
    texts, talk = Texts(engine), draw(300)
    engine.prefill(talk)
    assert texts.reuse(talk + draw(100, 1))[0] >= 290
    assert texts.reuse(talk + draw(2000, 1)) == (0, 512)


def test_texts_wait_in_files_and_the_oldest_leaves(tiny, tmp_path):
    """A file's whole life: written, opened the next day, passed by when it is bad, deleted."""
    engine, said = slim.load(tiny, "cpu", **PRUNED), []
    texts = Texts(engine, tmp_path, say=said.append)
    docs = [draw(1600, seed) for seed in range(3)]

    def read(i, question):
        ids = docs[i] + draw(20, question)
        cached, tail = texts.reuse(ids)
        engine.extend(ids[cached:]) if cached else engine.prefill(ids, keep_last=tail)
        return cached

    assert [read(i, 7) for i in (0, 1, 2)] == [0, 0, 0] and len(texts.files()) == 2
    assert read(0, 8) >= 1600 and len(texts.files()) == 3
    texts.put_away()
    again = Texts(slim.load(tiny, "cpu", **PRUNED), tmp_path)  # the next day
    assert again.reuse(docs[1] + draw(20, 9))[0] >= 1600 and again.engine.ids == docs[1]
    other = Texts(
        slim.load(tiny, "cpu", schedule="dense", block_len=32), tmp_path
    )  # other settings: not for them
    assert other.reuse(docs[1] + draw(20, 9))[0] == 0
    for path in texts.files():
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert read(1, 8) == 0
    assert len(said) == 1 and "damaged" in said[0]
    for path in texts.files():
        path.write_bytes(path.read_bytes()[:-9])
    assert read(2, 8) == 0
    assert "cannot be read" in said[1]
    texts.most = int(2.5 * max(stat.st_size for stat in texts.files().values()))
    assert read(0, 3) == 0 and read(1, 3) == 1600 and len(texts.files()) <= 2


def started(tiny, folder):
    """Return texts of a pruned engine, and a function that reads ids: how many were known?"""
    engine, said = slim.load(tiny, "cpu", **PRUNED), []
    texts = Texts(engine, folder, say=said.append)

    def read(ids):
        cached, tail = texts.reuse(ids)
        engine.extend(ids[cached:]) if cached else engine.prefill(ids, keep_last=tail)
        return cached

    return texts, read


def test_a_text_at_hand_is_saved_before_another_that_lies_in_a_file_is_read_anew(tiny, tmp_path):
    """The new reading would overwrite it."""
    _, read = started(tiny, tmp_path)
    a, b = draw(2000, 1), draw(2000, 2)
    read(a + draw(900, 7)), read(b)
    assert read(a + draw(900, 8)) == 0  # parts from the file before its tail
    assert read(b + draw(9, 8)) == 2000


def test_two_long_chats_on_one_text_both_stay(tiny, tmp_path):
    """Neither covers the other, so neither file may replace the other's."""
    texts, read = started(tiny, tmp_path)
    text = draw(2000, 1)
    a, b = text + draw(1200, 2), text + draw(1200, 3)
    assert [read(ids) for ids in (text, a, b)] == [0, 2000, 2000]
    assert read(a + draw(9, 4)) == len(a) and read(b + draw(9, 5)) == len(b)
    assert (
        read(a + draw(300, 6)) == len(a) and len(texts.files()) == 2
    )  # no file of what another goes on from
    texts.put_away()
    assert len(texts.files()) == 2


def test_a_file_deleted_by_hand_is_written_again(tiny, tmp_path):
    """What the folder holds counts, not what was once written."""
    texts, read = started(tiny, tmp_path)
    read(draw(2000, 1)), texts.put_away()
    for path in texts.files():
        path.unlink()
    texts.put_away()
    assert len(texts.files()) == 1


def test_the_text_that_is_asked_for_is_not_the_one_that_leaves(tiny, tmp_path):
    """It may be the least recently used, just before it is used."""
    texts, read = started(tiny, tmp_path)
    docs = [draw(2000, seed) for seed in (1, 2, 3)]
    assert [read(doc) for doc in docs] == [0, 0, 0]
    texts.most = int(2.5 * max(stat.st_size for stat in texts.files().values()))
    assert read(docs[0] + draw(9, 8)) == 2000 and len(texts.files()) == 2


def test_a_request_that_memory_has_no_room_for_costs_no_file(tiny, tmp_path, monkeypatch):
    """Such a refusal does not mean that the file is bad."""
    texts, read = started(tiny, tmp_path)
    a, b = draw(2000, 1), draw(2000, 2)
    read(a), read(b)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="not enough memory"):
        set_free(patch, 0)
        read(a + draw(9, 8))
    assert read(a + draw(9, 8)) == 2000


def test_a_rewind_stays_within_the_tail(tiny):
    """Before the tail, rows were pruned and cannot be had back."""
    engine = slim.load(tiny, "cpu", **PRUNED)
    engine.prefill(draw(600), keep_last=100)
    assert engine.kv.tail_start == 480
    for n in (479, 601, 0, -1):
        with pytest.raises(ValueError, match="480..600"):
            engine.rewind(n)
    engine.rewind(480)
    assert engine.ids == draw(600)[:480]
    engine.extend(draw(600)[480:])


def test_dense_logits_after_a_rewind_are_those_of_a_new_prefill(tiny):
    """Nothing of the forgotten tokens may stay in view."""
    engine, other = (slim.load(tiny, "cpu", schedule="dense", block_len=32) for _ in range(2))
    engine.prefill(draw(500), keep_last=200)
    engine.extend(draw(50, 1))
    engine.rewind(333)
    assert torch.allclose(
        engine.extend(draw(60, 2)), other.prefill(draw(500)[:333] + draw(60, 2)), atol=1e-4
    )


# ---- files that come and go --------------------------------------------------------------------


def test_a_folder_may_hold_anything(tiny, tmp_path):
    """A link to nothing, a folder, garbage: one of them used to end the server or its requests."""
    (tmp_path / "text-link.slim").symlink_to("nowhere")
    (tmp_path / "text-folder.slim").mkdir()
    (tmp_path / "text-garbage.slim").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    texts, read = started(tiny, tmp_path)
    document = draw(2000, 1)
    assert [read(document), read(draw(2000, 2)), read(document + draw(9, 3))] == [0, 0, 2000]
    (tmp_path / "text-link.slim").unlink()
    (tmp_path / "text-link.slim").symlink_to("elsewhere")
    texts.put_away()
    assert (tmp_path / "text-garbage.slim").exists()


def test_a_folder_that_is_gone_costs_its_texts_alone(tiny, tmp_path):
    """Requests go on without a folder; the log says what could not be written."""
    texts, read = started(tiny, tmp_path / "cache")
    texts.folder.mkdir()
    read(draw(2000, 1)), texts.put_away()
    shutil.rmtree(texts.folder)
    assert read(draw(2000, 2)) == 0
    assert read(draw(2000, 1)) == 0


def test_a_cache_folder_may_be_a_link_whose_target_is_not_there_yet(tmp_path):
    """ "File exists" was the complaint about a link to a disk that is not mounted."""
    (tmp_path / "link").symlink_to(tmp_path / "target")
    check_folder(str(tmp_path / "link"))
    assert (tmp_path / "target").is_dir()


def test_a_cache_folder_in_which_no_file_can_be_made_is_refused():
    """Root may write anywhere by the permissions, and no text was ever kept."""
    with pytest.raises(ValueError, match="no file can be made in /proc: "):
        check_folder("/proc")


def test_a_file_that_another_server_marks_as_used_is_read_all_the_same(tiny, tmp_path, monkeypatch):
    """The mark changes its time while it is read here: no reason to delete it."""
    texts, read = started(tiny, tmp_path)
    document = draw(2000, 1)
    read(document), read(draw(2000, 2))
    (path,) = texts.files()
    touches = [1]

    def read_saved(path):
        found = read_saved_now(path)
        if touches:
            os.utime(path, ns=(0, touches.pop()))
        return found

    read_saved_now = slim.read_saved
    monkeypatch.setattr(slim, "read_saved", read_saved)
    assert read(document + draw(9, 3)) == 2000
    assert path.exists() and not touches


def test_a_file_that_cannot_be_read_now_is_not_deleted(tiny, tmp_path, monkeypatch):
    """Too many open files, a disk that fails: that the file is bad is not known."""
    texts, read = started(tiny, tmp_path)
    document = draw(2000, 1)
    read(document), read(draw(2000, 2))
    (path,) = texts.files()
    said = []
    texts.say = said.append
    with monkeypatch.context() as patch:
        patch.setattr(slim, "read_saved", lambda path: open("/no/such/file"))
        assert read(document + draw(9, 3)) == 0
    assert path.exists() and len(said) == 1 and path.name in said[0]


def test_a_file_deleted_by_another_server_is_read_again(tiny, tmp_path, monkeypatch):
    """Deleted between the choice and the reading, which is seconds long."""
    texts, read = started(tiny, tmp_path)
    document = draw(2000, 1)
    read(document), read(draw(2000, 2))
    (path,) = texts.files()
    resume = texts.engine.resume
    monkeypatch.setattr(texts.engine, "resume", lambda *args: (path.unlink(), resume(*args)))
    said = []
    texts.say = said.append
    assert read(document + draw(9, 3)) == 0
    assert len(said) == 1 and "deleted" in said[0]


def test_a_file_deleted_while_another_is_written_is_read_again(tiny, tmp_path, monkeypatch):
    """The conversation at hand is saved first, which takes seconds: it ended in a KeyError."""
    texts, read = started(tiny, tmp_path)
    document = draw(2000, 1)
    read(document), read(draw(2000, 2))
    (path,) = texts.files()
    save = texts.engine.save
    monkeypatch.setattr(texts.engine, "save", lambda *args: (path.unlink(), save(*args)))
    assert read(document + draw(9, 3)) == 0


def test_two_servers_on_one_folder_share_its_texts(tiny, tmp_path):
    """What one writes the other finds, and does not write again; both may write one name."""
    first, read_first = started(tiny, tmp_path)
    second, read_second = started(tiny, tmp_path)
    document = draw(2000, 1)
    read_first(document), read_second(document)
    first.put_away()
    written = {path: stat.st_mtime_ns for path, stat in first.files().items()}
    second.put_away()
    assert {path: stat.st_mtime_ns for path, stat in second.files().items()} == written
    read_second(draw(2000, 2))
    assert read_second(document + draw(9, 3)) == 2000
    with ThreadPoolExecutor() as both:
        for path in written:
            saves = [both.submit(texts.engine.save, path) for texts in (first, second)] * 2
            assert not any(save.exception() for save in saves)
            assert slim.load(tiny, "cpu", **PRUNED).resume(path) == {}


def test_a_file_that_was_replaced_by_another_conversation_is_not_taken_for_it(tiny, tmp_path):
    """The ids in memory would be those of the file that was there before."""
    texts, read = started(tiny, tmp_path)
    read(draw(2000, 1)), read(draw(2000, 2)), texts.put_away()
    one, other = texts.files()
    one.write_bytes(other.read_bytes())
    texts.refresh = lambda: None  # replaced after the folder was looked at
    engine = texts.engine
    engine.forget()
    texts.open(one, 1)
    for seed in (1, 2):
        ids = draw(2000, seed) + draw(9, 3)
        cached, _ = texts.reuse(ids)
        assert cached == 0 or engine.ids[:cached] == ids[:cached]


def test_a_text_larger_than_the_cache_is_not_written_at_all(tiny, tmp_path, monkeypatch):
    """Every change of text would block the engine for a file that is deleted at once."""
    texts, read = started(tiny, tmp_path)
    read(draw(1600, 1)), texts.put_away()
    (small,) = texts.files()
    texts.most = 2 * small.stat().st_size
    said = []
    texts.say = said.append
    read(draw(4000, 2))
    monkeypatch.setattr(texts.engine, "save", lambda *_: pytest.fail("it was written"))
    read(draw(1600, 3))
    assert list(texts.files()) == [small] and "--cache-gib" in said[0]


def test_files_leave_before_the_next_is_written(tiny, tmp_path, monkeypatch):
    """The disk needs room for the cache, not for the cache and a file."""
    texts, read = started(tiny, tmp_path)
    save = texts.engine.save
    read(draw(2000, 1)), texts.put_away()
    (one,) = texts.files().values()
    texts.most = int(1.5 * one.st_size)
    seen = []
    monkeypatch.setattr(
        texts.engine, "save", lambda *args: seen.append(len(texts.files())) or save(*args)
    )
    read(draw(2000, 2)), read(draw(2000, 3))
    assert seen == [0] and len(texts.files()) == 1


def test_no_file_leaves_for_a_text_that_cannot_choose_its_blocks(tiny, tmp_path, monkeypatch):
    """There may be no memory for it; then both the file and the text would be lost."""
    texts, read = started(tiny, tmp_path)
    read(draw(2000, 1)), texts.put_away()
    ((path, one),) = texts.files().items()
    texts.most = int(1.5 * one.st_size)
    said = []
    texts.say = said.append

    def finish():
        raise ValueError("no room")

    texts.engine.read(draw(2000, 2))
    monkeypatch.setattr(texts.engine, "finish", finish)
    texts.put_away()
    assert list(texts.files()) == [path] and "no room" in said[0]


def test_what_stays_unpruned_is_bounded():
    """A preamble shared by two long prompts left half of the second in the tail, in every layer."""
    assert unpruned_end(2000, 0) == 500
    assert unpruned_end(100_000, 0) == 512
    assert unpruned_end(2900, 2000) == 900  # a long question
    assert unpruned_end(3000, 2900) == 512  # a short one
    assert unpruned_end(2900, 1400) == 512  # more than half is new
    assert unpruned_end(100_000, 90_000) == 10_000
    assert unpruned_end(100_000, 51_000) == 512


# ---- dates -------------------------------------------------------------------------------------


def dated(talking, monkeypatch):
    """Return a tokenizer whose template writes the date, and today's, in a list to change it."""
    tok = tokenizer.load(talking)
    date = "{{ strftime_now('%d %B %Y') }}: {% for m in messages %}{{ m.content }}{% endfor %}"
    tok.template = Template(Path("x"), date, {})
    today = [datetime.date(2026, 11, 28)]
    clock = SimpleNamespace(today=lambda: today[0], fromisoformat=datetime.date.fromisoformat)
    monkeypatch.setattr("serve.texts.datetime", SimpleNamespace(date=clock))
    return tok, today


def test_a_conversation_keeps_its_date_and_a_new_one_has_todays(talking, tmp_path, monkeypatch):
    """Templates of Llama 3.2 and SmolLM3 write the date: at midnight all texts were read again."""
    tok, today = dated(talking, monkeypatch)
    engine = slim.load(talking, "cpu", **PRUNED)

    def ask(texts, text):
        body = {"model": "m", "messages": [{"role": "user", "content": text}]}
        request = parse(True, body, tok, "m", 4096, DEFAULTS, texts)
        cached, keep_last = texts.reuse(request.ids)
        texts.day = request.day
        ids = request.ids[cached:]
        engine.extend(ids) if cached else engine.prefill(ids, keep_last=keep_last)
        return cached, request.day.date.day

    texts = Texts(engine, tmp_path)
    assert ask(texts, "ABBA CAB " * 450) == (0, 28)
    today[0] = datetime.date(2026, 11, 29)
    cached, day = ask(texts, "ABBA CAB " * 450 + "CAB?")  # past midnight
    assert cached > 1000 and day == 28
    assert ask(texts, "CAB " * 900) == (0, 29)
    engine.forget()
    today[0] = datetime.date(2026, 12, 1)
    texts = Texts(engine, tmp_path)  # started again
    cached, day = ask(texts, "ABBA CAB " * 450 + "ABBA?")
    assert cached > 1000 and day == 28
    assert ask(texts, "ABBA CAB " * 112 + "BA" * 900) == (0, 1)  # begins alike, goes on otherwise


def test_a_request_after_midnight_finds_its_text_while_the_engine_runs(
    talking, tmp_path, monkeypatch
):
    """The text that is being read, or was just put away, seemed unknown: it was read again."""
    tok, today = dated(talking, monkeypatch)
    engine = slim.load(talking, "cpu", **PRUNED)
    texts = Texts(engine, tmp_path)

    def request(text):
        body = {"model": "m", "messages": [{"role": "user", "content": text}]}
        return parse(True, body, tok, "m", 4096, DEFAULTS, texts)

    first, second = "ABBA CAB " * 450, "CAB " * 900
    seen = []

    def look(layer, queries):
        today[0] = datetime.date(2026, 11, 29)
        if layer == 0:
            assert not engine.usable
            seen.append([request(text + "CAB?").day.date.day for text in (first, second)])

    server = SimpleNamespace(counts=collections.Counter())
    job = Job(request(first))
    engine.model.on_queries = look
    answer(job, server, engine, tok, texts, print)
    assert len(seen) > 2 and all(days == [28, 29] for days in seen)
    seen.clear()
    answer(Job(request(second)), server, engine, tok, texts, print)
    assert len(texts.files()) == 1
    assert len(seen) > 2 and all(days == [28, 29] for days in seen)


# ---- requests ---------------------------------------------------------------------------------

DEFAULTS = SimpleNamespace(max_new_tokens=9, temperature=0.0, top_p=1.0, seed=None, stop=[])
USER = [{"role": "user", "content": "ABBA"}]
MALFORMED = {  # a body: the parameter that the error names, its status
    "[]": (None, 400),
    '"x"': (None, 400),
    '{"messages": []}': ("model", 400),
    '{"model": "other", "messages": []}': ("model", 404),
    '{"model": 3}': ("model", 400),
    '{"model": "m"}': ("messages", 400),
    '{"model": "m", "messages": "hi"}': ("messages", 400),
    '{"model": "m", "messages": [3]}': ("messages", 400),
    '{"model": "m", "messages": [{"role": "user"}]}': ("messages", 400),
    '{"model": "m", "messages": [{"role": "", "content": "x"}]}': ("messages", 400),
    '{"model": "m", "messages": [{"role": "tool", "content": "x"}]}': ("messages", 400),
    '{"model": "m", "messages": [{"role": "system", "content": "x"}]}': ("messages", 400),
    '{"model": "m", "messages": [{"role": "assistant", "content": "x"}]}': ("messages", 400),
    '{"model": "m", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}': (
        "messages",
        400,
    ),
    '{"model": "m", "messages": USER, "max_tokens": 0}': ("max_tokens", 400),
    '{"model": "m", "messages": USER, "max_tokens": "5"}': ("max_tokens", 400),
    '{"model": "m", "messages": USER, "max_completion_tokens": true}': (
        "max_completion_tokens",
        400,
    ),
    '{"model": "m", "messages": USER, "temperature": 3}': ("temperature", 400),
    '{"model": "m", "messages": USER, "temperature": NaN}': ("temperature", 400),
    '{"model": "m", "messages": USER, "top_p": -1}': ("top_p", 400),
    '{"model": "m", "messages": USER, "seed": 1.5}': ("seed", 400),
    '{"model": "m", "messages": USER, "stop": [1]}': ("stop", 400),
    '{"model": "m", "messages": USER, "stop": ""}': ("stop", 400),
    '{"model": "m", "messages": USER, "stream": "yes"}': ("stream", 400),
    '{"model": "m", "messages": USER, "n": 2}': ("n", 400),
    '{"model": "m", "messages": USER, "tools": [{}]}': ("tools", 400),
    '{"model": "m", "messages": USER, "tool_choice": "required"}': ("tool_choice", 400),
    '{"model": "m", "messages": USER, "logprobs": 1}': ("logprobs", 400),
    '{"model": "m", "messages": USER, "top_logprobs": 2}': ("top_logprobs", 400),
    '{"model": "m", "messages": USER, "logprobs": true, "top_logprobs": 21}': ("top_logprobs", 400),
    '{"model": "m", "messages": USER, "echo": true}': ("echo", 400),
    '{"model": "m", "messages": USER, "min_p": 0.1}': ("min_p", 400),
    '{"model": "m", "messages": USER, "logit_bias": {"1": 5}}': ("logit_bias", 400),
    '{"model": "m", "messages": USER, "best_of": 2}': ("best_of", 400),
    '{"model": "m", "messages": USER, "chat_template_kwargs": {"enable_thinking": true}}': (
        "chat_template_kwargs",
        400,
    ),
    '{"model": "m", "messages": USER, "response_format": {"type": "json_object"}}': (
        "response_format",
        400,
    ),
    '{"model": "m", "messages": USER, "top_k": 5}': ("top_k", 400),
    '{"model": "m", "messages": LONG}': ("messages", 400),
}


@pytest.fixture(scope="session")
def tok(talking):
    return tokenizer.load(talking)


@pytest.mark.parametrize("body", MALFORMED)
def test_a_malformed_body_is_refused_with_the_parameter(tok, body):
    """A client shows its user this message, and finds the fault by `param`."""
    param, status = MALFORMED[body]
    long = json.dumps([{"role": "user", "content": "word " * 6000}])
    text = body.replace("USER", json.dumps(USER)).replace("LONG", long)
    with pytest.raises(ApiError) as error:
        parse(True, json.loads(text), tok, "m", 4096, DEFAULTS)
    assert error.value.status == status and error.value.body["error"]["param"] == param
    assert set(error.value.body["error"]) == {"message", "type", "param", "code"}


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["role", "content", "type", "text", "include_usage"]),
                inner,
                max_size=3,
            )
        ),
    ),
    st.sampled_from(
        [
            "messages",
            "prompt",
            "max_tokens",
            "temperature",
            "top_p",
            "seed",
            "stop",
            "stream",
            "stream_options",
            "n",
            "logit_bias",
            "model",
            "x",
        ]
    ),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_any_value_is_taken_or_refused(tok, value, name, chat):
    """No JSON value of any parameter may reach the engine unchecked."""
    body = {"model": "m", "messages": USER} if chat else {"model": "m", "prompt": "ABBA"}
    with contextlib.suppress(ApiError):
        r = parse(chat, body | {name: value}, tok, "m", 4096, DEFAULTS)
        check_sampling(r.max_tokens, r.temperature, r.top_p, r.seed)
        assert r.ids and all(type(i) is int for i in r.ids)


def test_what_is_left_open_comes_from_the_command_line(tok):
    """Defaults, null, a whole number as a float, and the limits of a seed and of max_tokens."""
    r = parse(
        True, {"model": "m", "messages": USER, "seed": None, "n": 1.0}, tok, "m", 4096, DEFAULTS
    )
    assert (r.max_tokens, r.temperature, r.top_p, r.seed, r.stop, r.stream) == (
        9,
        0,
        1,
        None,
        [],
        False,
    )
    r = parse(
        True,
        {"model": "m", "messages": USER, "max_tokens": 5000, "seed": -1, "stop": "x"},
        tok,
        "m",
        100,
        DEFAULTS,
    )
    assert r.max_tokens == 100 - len(r.ids) and r.seed == 2**63 - 1 and r.stop == ["x"]


NEUTRAL = {
    "n": 1,
    "best_of": 1,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0,
    "presence_penalty": 0.0,
    "logit_bias": {},
    "cache_prompt": False,
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "user": "me",
    "store": True,
    "metadata": {"a": "b"},
    "parallel_tool_calls": True,
    "stream_options": ["of", "any", "kind"],
    "chat_template_kwargs": {"enable_thinking": False},
}


def test_values_that_change_nothing_are_taken(tok):
    """Clients fill in all fields of their forms; a refusal of a default shuts them out."""
    body = {"model": "m", "messages": USER}
    plain = parse(True, body, tok, "m", 4096, DEFAULTS)
    for name, value in [
        *NEUTRAL.items(),
        ("top_k", -1),
        *((name, None) for name in [*NEUTRAL, "x"]),
    ]:
        taken = parse(True, body | {name: value}, tok, "m", 4096, DEFAULTS)
        taken.id, taken.created = plain.id, plain.created
        assert taken == plain, name


def test_an_answer_without_a_limit_may_fill_the_context(tok):
    """-1 and null are what clients send for that; the other name counts if it has a value."""
    body = {"model": "m", "messages": USER}
    for limit, n in [
        ({"max_tokens": -1}, None),
        ({"max_tokens": None}, None),
        ({"max_completion_tokens": -1}, None),
        ({"max_tokens": None, "max_completion_tokens": 5}, 5),
        ({"max_tokens": 7, "max_completion_tokens": None}, 7),
        ({}, 9),
    ]:
        r = parse(True, body | limit, tok, "m", 4096, DEFAULTS)
        assert r.max_tokens == (n or 4096 - len(r.ids)), limit


def test_messages_spell_the_conversation_of_the_chat_format(tok):
    """Roles, marks typed by a user, a begun answer, parts: token by token."""
    chat = of_bytes({"<|im_start|>": 256, "<|im_end|>": 257})
    chat.template = Template(
        Path("x"),
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{{ '<|im_start|>assistant\n' }}",
        {},
    )

    def spelled(*messages):
        ids = chat_ids(chat, [{"role": role, "content": text} for role, text in messages])
        return "".join({256: "<", 257: ">"}.get(i) or chr(i) for i in ids)

    assert spelled(("user", "A?")) == "<user\nA?>\n<assistant\n"
    turns = ("developer", "S"), ("user", "A <|im_end|>"), ("assistant", "a"), ("user", "B?")
    said = "<system\nS>\n<user\nA <|im_end|>>\n<assistant\na>\n<user\nB?>\n<assistant\n"
    assert spelled(*turns) == said and spelled(*turns, ("assistant", "The")) == said + "The"
    parts = [{"type": "text", "text": "AB"}, {"type": "text", "text": "BA"}]
    assert chat_ids(tok, [{"role": "user", "content": parts}]) == chat_ids(tok, USER)


CALLS = Template(
    Path("x"),
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}",
    {},
)


def called(arguments, **more):
    """A history with a tool's call and its result."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    said = {"role": "assistant", "content": None, "tool_calls": [call]} | more
    return [*USER, said, {"role": "tool", "tool_call_id": "1", "content": "rain"}]


def test_tool_calls_of_a_history_are_written_or_refused():
    """An assistant's message with nothing but calls was refused; to drop them would be worse."""
    chat = of_bytes({"<|im_start|>": 256, "<|im_end|>": 257})
    chat.template = CALLS

    def spelled(messages):
        ids = chat_ids(chat, messages)
        return "".join({256: "<", 257: ">"}.get(i) or chr(i) for i in ids)

    written = '<user\nABBA>\n<assistant\nf{"x": "<|im_end|>"}>\n<tool\nrain>\n<assistant\n'
    assert spelled(called('{"x": "<|im_end|>"}')) == written  # a mark that is typed stays text
    assert spelled(called({"x": "<|im_end|>"})) == written
    assert "f{}" in spelled(called(""))
    for source in (
        CALLS.source.replace("{{ c.function.name }}", ""),
        CALLS.source.replace("{{ c.function.arguments | tojson }}", ""),
        CALLS.source.replace("m.tool_calls or []", "[]"),
    ):
        chat.template = Template(Path("x"), source, {})
        with pytest.raises(ApiError, match="assistant message with its tool calls"):
            chat_ids(chat, called("{}"))
    no_content = CALLS.source.replace("m.content", "'' if m.tool_calls else m.content")
    chat.template = Template(Path("x"), no_content, {})
    assert "f{}" in spelled(called("{}"))
    with pytest.raises(ApiError, match="assistant message with its tool calls"):
        chat_ids(chat, called("{}", content="I look."))
    chat.template = None
    with pytest.raises(ApiError, match="no chat template"):
        chat_ids(chat, called("{}"))


@pytest.mark.parametrize(
    "message",
    [
        called("[1]")[1],
        called("{")[1],
        called("{}")[1] | {"tool_calls": [3]},
        called("{}")[1] | {"tool_calls": 3},
        called("{}")[1] | {"role": "user"},
        {"role": "assistant", "content": "x", "function_call": {"name": "f"}},
        {"role": "user", "content": "x", "audio": "x"},
        {"role": "user", "content": "x", "name": 3},
    ],
)
def test_what_a_message_cannot_have_is_refused(tok, message):
    """It would be dropped, and the answer be to something else."""
    with pytest.raises(ApiError, match=r"messages\[0\]"):
        chat_ids(tok, [message, *USER])
    assert chat_ids(tok, [{"role": "user", "content": "ABBA", "refusal": None, "audio": []}])


THINKING = Template(
    Path("x"),
    "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% elif opened %}<think>\n{% endif %}",
    {},
)


def test_variables_of_the_template_are_taken_if_it_knows_them(talking):
    """`enable_thinking` must not be ignored; tools must not come in by this door."""
    tok = tokenizer.load(talking)
    tok.template = THINKING
    body = {"model": "m", "messages": USER}

    def ask(begun="", **variables):
        more = [{"role": "assistant", "content": begun}] if begun else []
        body = {"model": "m", "messages": USER + more, "chat_template_kwargs": variables}
        r = parse(True, body, tok, "m", 4096, DEFAULTS)
        return tok.decode(r.ids), r.in_thought

    assert ask() == ("ABBA\n", False)
    assert ask(enable_thinking=False) == ("ABBA\n<think>\n\n</think>\n\n", False)
    assert ask(opened=True) == ("ABBA\n<think>\n", True)
    assert ask("So", opened=True) == ("ABBA\n<think>\nSo", True)
    assert ask("So</think>", opened=True) == ("ABBA\n<think>\nSo</think>", False)
    assert ask("<think>So") == ("ABBA\n<think>So", True)
    for wrong in ({"tools": [1]}, {"messages": "x"}, {"date": "x"}, {"unknown": 1}, {"opened": []}):
        with pytest.raises(ApiError, match=f"takes no '{next(iter(wrong))}'"):
            ask(**wrong)
    tok.template = None
    assert parse(True, body, tok, "m", 4096, DEFAULTS).in_thought is None


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_thoughts_are_told_apart_however_the_text_comes(data):
    """A mark, or the line ends beside it, may come in pieces."""
    inside = data.draw(st.sampled_from([True, False, None]))
    text = "".join(
        data.draw(st.lists(st.sampled_from(["<think>", "</think>", "\n", "a", " ", "<"])))
    )
    pieces = []
    rest = text
    while rest:
        n = data.draw(st.integers(1, len(rest)))
        pieces.append(rest[:n])
        rest = rest[n:]
    parts = list(thoughts_apart(pieces, inside))
    found = {
        thought: "".join(part for kind, part in parts if kind == thought) for thought in (0, 1)
    }
    begun = text.lstrip()
    if inside is None or (not inside and not begun.startswith("<think>")):
        assert found == {1: "", 0: text}
        return
    thought, closed, answer = (text if inside else begun.removeprefix("<think>")).partition(
        "</think>"
    )
    thought = thought.strip("\n") if closed else thought.lstrip("\n")
    assert found == {1: thought, 0: answer.lstrip("\n")}


def test_thoughts_have_a_field_of_their_own():
    """In `content` they would be taken for the answer, and go into the next prompt."""
    pieces = [Piece("Hm", thought=True), Piece("Yes")]
    request = plain_request([1], chat=True)
    used = api.usage(request, 2, 0)
    message = api.whole(request, pieces, "stop", used)["choices"][0]["message"]
    assert message["content"] == "Yes" and message["reasoning_content"] == "Hm"
    events = [api.events(request, piece, i == 0) for i, piece in enumerate(pieces)]
    deltas = [event["choices"][0]["delta"] for event in itertools.chain(*events)]
    role = {"role": "assistant", "content": ""}
    assert deltas == [role, {"reasoning_content": "Hm"}, {"content": "Yes"}]
    request.path = ollama.CHAT
    said = {"role": "assistant", "content": "Yes", "thinking": "Hm"}
    assert ollama.whole(request, pieces, "stop", used)["message"] == said
    request.path = ollama.GENERATE
    line = ollama.whole(request, pieces, "stop", used)
    assert line["response"] == "Yes" and line["thinking"] == "Hm"


# ---- Ollama's API -------------------------------------------------------------------------------


def test_ollamas_requests_are_openais():
    """Each name of Ollama's has its meaning, and one that has none here is refused."""
    told = {"num_predict": -2, "num_ctx": 50, "seed": 1, "stop": ["x"], "num_gpu": 1, "top_k": 0}
    body = {"model": "m:latest", "prompt": "A", "system": "S", "think": False, "options": told}
    more = {"keep_alive": "5m", "images": [], "format": "", "context": None}
    chat, read, context = ollama.read(ollama.GENERATE, body | more, 4096)
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "A"}]
    assert chat and context == 50
    thinking = {"chat_template_kwargs": {"enable_thinking": False}}
    asked = {"model": "m", "stream": True, "max_tokens": -1, "seed": 1, "stop": ["x"], "top_k": 0}
    assert read == asked | thinking | {"messages": messages}
    body = {"model": "m", "prompt": "A", "raw": True, "stream": False}
    asked = {"model": "m", "prompt": "A", "stream": False}
    assert ollama.read(ollama.GENERATE, body, 9) == (False, asked, 9)
    assert ollama.read(ollama.CHAT, {"stream": None}, 9)[1]["stream"]  # as if it were left out


def test_ollamas_api_answers_as_openais(server):
    """Many programs speak it alone: lines of JSON, streamed by default, errors as a text."""
    text = server.chat("CAB", max_tokens=5)["choices"][0]["message"]["content"]
    body = {"model": server.model + ":latest", "options": {"num_predict": 5}}
    chat = body | {"messages": [{"role": "user", "content": "CAB"}]}
    generate = body | {"prompt": "CAB"}
    for path, body, field in (
        ("/api/chat", chat, lambda line: line["message"]["content"]),
        ("/api/generate", generate, lambda line: line["response"]),
    ):
        status, whole = server.ask(path, body | {"stream": False})
        assert status == 200 and field(whole) == text and whole["done"]
        with server.raw(server.post(body, path)) as connection:
            data = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
        head, _, lines = data.partition("\r\n\r\n")
        lines = [json.loads(line) for line in lines.splitlines()]
        assert "application/x-ndjson" in head and "".join(map(field, lines)) == text
        assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
        assert lines[-1]["done_reason"] == "length" and lines[-1]["eval_count"] == 5
        for wrong in ({"options": {"top_k": 40}}, {"format": "json"}, {"options": {"num_ctx": 2}}):
            status, answer = server.ask(path, body | wrong)
            assert status == 400 and isinstance(answer["error"], str)
    assert server.ask("/api/tags")[1]["models"][0]["model"] == server.model
    assert server.ask("/api/version")[1]["version"]
    shown = server.ask("/api/show", {"model": server.model})[1]
    assert shown["model_info"]["llama.context_length"] > 0
    assert server.ask("/api/show", {"model": "another"})[0] == 404
    assert server.ask("/api/show", {"model": 1})[0] == 400
    assert server.ask("/api/chat")[0] == 405 and server.ask("/api/pull", {})[0] == 404


# ---- log probabilities ------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_offsets_are_those_of_the_characters_that_tokens_begin_in(data):
    """Byte-level tokens are parts of characters, and a model may break characters off."""
    whole = "aß🦊".encode()
    piece = st.sampled_from([whole[i:j] for i in range(len(whole)) for j in range(i, len(whole))])
    tokens = data.draw(st.lists(piece, max_size=8))
    tok = SimpleNamespace(bytes=lambda i: tokens[i], special={})
    scores = Scores(tok, 0)
    for i in range(len(tokens)):
        scores.add(i)
    scores.shown = float("inf")
    for i, scored in enumerate(scores.take()):
        before = b"".join(tokens[:i])
        text = before.decode("utf-8", "replace")
        # the character in which a first byte of this token comes to stand
        longer = (before + tokens[i][:1]).decode("utf-8", "replace")
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        complete = len(utf8.decode(before))
        assert scored.offset == (len(longer) - 1 if tokens[i] else complete), (text, longer)
        assert scored.token.data == tokens[i]


def answered(engine, tok, texts, **request):
    """Return what comes out of a job: its pieces, and finish reason and usage."""
    job = Job(plain_request(**request))
    answer(job, SimpleNamespace(counts=collections.Counter()), engine, tok, texts, print)
    items = []
    while not job.out.empty():
        items.append(job.out.get())
    return items[:-1], items[-1]


@pytest.mark.parametrize("schedule", ["dense", {2: 256, 3: 128}])
def test_log_probabilities_are_those_of_the_engines_logits(talking, schedule):
    """Of every token, prompt's and answer's; before temperature, which would flatten them."""
    engine = slim.load(talking, "cpu", "float32", schedule, block_len=32)
    full = slim.load(talking, "cpu", "float32", "dense", block_len=32)
    tok, texts = engine.tokenizer, Texts(engine)
    ids = tok.encode(TEXT)
    pieces, (finish, used) = answered(
        engine, tok, texts, ids=ids, logprobs=2, echo=True, temperature=1.5, seed=3
    )
    scored = [scored for piece in pieces for scored in piece.scored]
    run = ids + engine_ids(tok, scored[len(ids) :])
    logits = full.prefill(run[:1])[None]
    logits = torch.cat([logits, full.extend(run[1:-1], all_logits=True)]).double()
    right = logits.log_softmax(-1)
    assert scored[0].token.logprob is None and len(scored) == len(ids) + 3 and finish == "length"
    for token, place, row in zip(run[1:], scored[1:], right):
        best = row.topk(2)
        assert place.token.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [top.logprob for top in place.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    text = "".join(piece.text for piece in pieces)
    for place in scored:
        assert text[place.offset :].startswith(place.token.name) or "bytes:" in place.token.name
    assert not engine.usable and used["prompt_tokens_details"]["cached_tokens"] == 0


def engine_ids(tok, scored):
    ids = {tok.bytes(i): i for i in range(tok.vocab_size)}
    return [ids[place.token.data] for place in scored]


def test_the_prompts_logits_are_never_held_at_once(talking, monkeypatch):
    """Of 100,000 tokens and words they would take 40 GB."""
    engine = slim.load(talking, "cpu", "float32", "dense", block_len=32)
    texts, sizes = Texts(engine), []
    extend = engine.extend

    def watched(ids=(), all_logits=False, **more):
        sizes.append(len(ids))
        return extend(ids, all_logits, **more)

    monkeypatch.setattr(engine, "extend", watched)
    tok = engine.tokenizer
    ids = tok.encode("ABBA CAB " * 300)
    pieces, (finish, used) = answered(
        engine, tok, texts, ids=ids, max_tokens=0, logprobs=0, echo=True
    )
    assert len(ids) > 2 * SLICE and max(sizes) <= SLICE and sum(sizes) == len(ids) - 2
    assert finish == "length" and used["completion_tokens"] == 0
    assert sum(len(piece.scored) for piece in pieces) == len(ids)


def test_a_scored_prompt_may_be_left_and_costs_no_text_in_a_file(tiny, tmp_path, monkeypatch):
    """It takes the engine; the conversation there must wait in a file, as for any other prompt."""
    texts, read = started(tiny, tmp_path)
    document = draw(2000, 1)
    read(document)
    tok = of_bytes({})
    job = Job(plain_request(draw(600, 2), logprobs=1, echo=True))
    extend = texts.engine.extend
    monkeypatch.setattr(
        texts.engine, "extend", lambda *ids, **more: job.disconnected.set() or extend(*ids, **more)
    )
    with pytest.raises(Disconnected):
        answer(job, None, texts.engine, tok, texts, print)
    monkeypatch.undo()
    assert not texts.engine.usable and texts.engine.model.on_chunk(0) is None
    assert read(document + draw(9, 3)) == 2000


def test_tokens_of_a_stop_text_have_no_place_in_an_answer(talking):
    """The log probabilities are of the text that is given out, and add up with it."""
    engine = slim.load(talking, "cpu", "float32", "dense", block_len=32)
    tok, texts = engine.tokenizer, Texts(engine)
    ids = tok.encode("ABBA CAB")
    whole, _ = answered(engine, tok, texts, ids=ids, max_tokens=12, logprobs=0)
    text = "".join(piece.text for piece in whole)
    offsets = sorted({scored.offset for piece in whole for scored in piece.scored})
    stop = text[offsets[1] : offsets[2]]  # a token, or some
    engine.forget()
    pieces, (finish, _) = answered(
        engine, tok, texts, ids=ids, max_tokens=12, logprobs=0, stop=[stop]
    )
    kept = "".join(piece.text for piece in pieces)
    scored = [scored for piece in pieces for scored in piece.scored]
    assert kept == text[: text.find(stop)] and finish == "stop"
    assert scored == [s for p in whole for s in p.scored if s.offset < len(kept)]


@pytest.mark.parametrize(
    ("place", "key", "good"),
    [
        ("8080", None, ("127.0.0.1", 8080)),
        ("localhost:1", None, ("localhost", 1)),
        ("[::1]:80", None, ("::1", 80)),
        ("0.0.0.0:80", "k", ("0.0.0.0", 80)),
        ("0.0.0.0:80", None, "api-key"),
        ("example.org:80", "", "api-key"),
        ("http", None, "PORT"),
        ("65536", None, "PORT"),
        (":80", None, "PORT"),
        ("", None, "PORT"),
        ("²", None, "PORT"),
    ],
)
def test_only_this_machine_is_served_without_a_key(place, key, good):
    """A wrong place must end in one line, an open one in a demand for a key."""
    if isinstance(good, tuple):
        assert check_place(place, key) == good
    else:
        with pytest.raises(ValueError, match=good):
            check_place(place, key)


# ---- through HTTP -------------------------------------------------------------------------------


class Running:
    """A server of its own in another process."""

    def __init__(self, ckpt, *args, env=None):
        command = [
            sys.executable,
            str(HERE / "slim.py"),
            "--ckpt",
            str(ckpt),
            "--serve",
            "0",
            "--block-len",
            "32",
        ]
        self.process = subprocess.Popen(
            [*command, "--schedule", "2:256,3:128", *args],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | (env or {}),
        )
        self.lines = []
        while "/v1;" not in (line := self.process.stderr.readline()):
            assert line, self.lines
            self.lines.append(line)
        self.url = line.split(" at ")[1].split("/v1")[0]
        self.port, self.model = int(self.url.rpartition(":")[2]), Path(ckpt).name
        self.reader = threading.Thread(
            target=lambda: self.lines.extend(self.process.stderr), daemon=True
        )
        self.reader.start()

    def ask(self, path, body=None, **headers):
        """Return the status and the JSON, or the events, that come back."""
        data = (
            None if body is None else json.dumps(body).encode() if isinstance(body, dict) else body
        )
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"} | headers
        )
        try:
            answer = urllib.request.urlopen(request, timeout=60)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            text = answer.read().decode()
        if answer.headers["Content-Type"] == "text/event-stream":
            events = [
                line.removeprefix("data: ")
                for line in text.split("\n")
                if line.startswith("data: ")
            ]
            assert events[-1] == "[DONE]" or "error" in events[-1]
            return answer.status, [json.loads(event) for event in events if event != "[DONE]"]
        return answer.status, json.loads(text)

    def chat(self, text, **more):
        status, answer = self.ask(
            "/v1/chat/completions",
            {"model": self.model, "messages": [{"role": "user", "content": text}]} | more,
        )
        assert status == 200, answer
        return answer

    def raw(self, data: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(data)
        return connection

    def post(self, body: dict, path="/v1/chat/completions") -> bytes:
        data = json.dumps({"model": self.model} | body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}"
        return f"{head}\r\n\r\n".encode() + data

    def rss(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) * 1024

    def close(self, how=signal.SIGINT) -> int:
        self.process.send_signal(how)
        return self.process.wait(120)


@pytest.fixture(scope="module")
def server(talking, tmp_path_factory):
    running = Running(
        talking, "--cache-dir", str(tmp_path_factory.mktemp("cache")), "--max-new-tokens", "12"
    )
    yield running
    if running.process.poll() is None:
        assert running.close() == 0


def test_streamed_or_not_the_answer_is_the_engines(server, talking):
    """The one test of the whole way: HTTP, template, engine, file, stream."""
    engine = slim.load(talking, "cpu", **PRUNED)
    tok, ids = engine.tokenizer, chat_ids(engine.tokenizer, [{"role": "user", "content": TEXT}])
    expected = "".join(tok.stream(engine.generate(ids, 12, keep_last=min(512, len(ids) // 4))))
    whole = server.chat(TEXT)
    assert (
        whole["choices"][0]["message"]["content"] == expected
        and whole["object"] == "chat.completion"
    )
    assert (
        whole["usage"]["prompt_tokens"] == len(ids)
        and whole["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    )
    used = whole["usage"]["completion_tokens"]
    assert whole["choices"][0]["finish_reason"] == ("length" if used == 12 else "stop")
    server.chat("something else " * 200)
    events = server.chat(TEXT, stream=True, stream_options={"include_usage": True})
    assert [e["choices"][0]["delta"].get("role") for e in events[:1]] == ["assistant"]
    assert events[-2]["choices"][0]["finish_reason"] and events[-1]["choices"] == []
    assert (
        events[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] == len(ids) - 1
    )  # it waited in a file
    assert all(event["usage"] is None if "usage" in event else True for event in events[:-1])
    again = "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1])
    assert again == server.chat(TEXT)["choices"][0]["message"]["content"]


def test_completions_take_texts_and_ids(server, talking):
    """Evaluation programs send ids, and compare them with texts."""
    tok = tokenizer.load(talking)
    ids = ([] if tok.bos_id is None else [tok.bos_id]) + tok.encode("ABBA CAB")
    texts = []
    for prompt in ("ABBA CAB", ["ABBA CAB"], ids, [ids]):
        status, answer = server.ask(
            "/v1/completions", {"model": server.model, "prompt": prompt, "max_tokens": 5}
        )
        assert (
            status == 200
            and answer["object"] == "text_completion"
            and answer["usage"]["prompt_tokens"] == len(ids)
        )
        texts.append(answer["choices"][0]["text"])
    assert len(set(texts)) == 1
    body = {"model": server.model, "prompt": ids, "max_tokens": 5, "stream": True}
    status, events = server.ask("/v1/completions", body)
    assert status == 200 and "".join(event["choices"][0]["text"] for event in events) == texts[0]
    sampled = [
        server.chat("ABBA", temperature=1.5, seed=seed, max_tokens=9)["choices"][0]["message"][
            "content"
        ]
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_log_probabilities_come_streamed_and_whole(server):
    """As OpenAI shapes them: an entry a token in a chat, four lists in a completion."""
    asked = {"max_tokens": 5, "logprobs": True, "top_logprobs": 2}
    whole = server.chat("CAB", **asked)["choices"][0]
    text = whole["message"]["content"]
    content = whole["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode("utf-8", "replace") == text
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert all(entry["logprob"] == entry["top_logprobs"][0]["logprob"] for entry in content)
    choices = [event["choices"][0] for event in server.chat("CAB", stream=True, **asked)]
    streamed = [choice["logprobs"]["content"] for choice in choices if choice["logprobs"]]
    tokens = [entry["token"] for entries in streamed for entry in entries]
    assert tokens == [entry["token"] for entry in content]
    body = {"model": server.model, "prompt": "ABBA CAB", "max_tokens": 2}
    body |= {"echo": True, "logprobs": 1}
    _, answer = server.ask("/v1/completions", body)
    choice = answer["choices"][0]
    lists = choice["logprobs"]
    assert choice["text"].startswith("ABBA CAB")
    assert {len(value) for value in lists.values()} == {answer["usage"]["total_tokens"]}
    assert lists["token_logprobs"][0] is None and lists["top_logprobs"][0] is None
    for token, logprob, top in zip(*(lists[name][1:] for name in list(lists)[:3])):
        assert top[token] == logprob and max(top.values()) >= logprob and len(top) <= 2
    assert (
        server.ask("/v1/completions", body | {"logprobs": None})[1]["choices"][0]["logprobs"]
        is None
    )
    assert server.ask("/v1/completions", body | {"max_tokens": 0, "logprobs": None})[0] == 400


def test_stops_and_limits_end_an_answer(server):
    """Clients go by finish_reason: cut off, or complete."""
    text = server.chat("CAB", max_tokens=12)["choices"][0]["message"]["content"]
    stop = text[4:6]
    answer = server.chat("CAB", max_tokens=12, stop=[stop, "never said"])["choices"][0]
    assert answer == {
        "index": 0,
        "message": {"role": "assistant", "content": text[: text.find(stop)], "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
    }
    answer = server.chat("CAB", max_tokens=1)
    assert (
        answer["usage"]["completion_tokens"] == 1
        and answer["choices"][0]["finish_reason"] == "length"
    )


def test_the_small_paths_and_errors_in_their_shape(server):
    """Whatever is sent, the answer is JSON of OpenAI's shape with the right status."""
    assert server.ask("/health") == (200, {"status": "ok"})
    status, models = server.ask("/v1/models")
    assert status == 200 and [model["id"] for model in models["data"]] == [server.model]
    assert server.ask(f"/v1/models/{server.model}")[1] == models["data"][0]
    assert (
        server.ask(f"/v1/models/%{ord(server.model[0]):x}{server.model[1:]}")[1]
        == models["data"][0]
    )
    for headers in (
        {"Host": "LOCALHOST:80"},
        {"Host": f"LocalHost:{server.port}", "Origin": server.url},
    ):
        headers |= {"Origin": f"HTTP://localhost:{server.port}"} if "Origin" in headers else {}
        assert server.ask("/health", **headers)[0] == 200
    assert "there is no '/no';" in server.ask("/no")[1]["error"]["message"]
    message = server.ask("/health", Host="evil.example")[1]["error"]["message"]
    assert message.startswith("requests to 'evil.example' need a key: ") and "--api-key" in message
    message = server.ask("/health", Origin="http://evil.example")[1]["error"]["message"]
    assert " from 'http://evil.example' need a key: " in message
    assert urllib.request.urlopen(server.url + "/health").headers["Server"] == "Slim"
    server.chat(TEXT)
    stats = server.ask("/v1/stats")[1]
    assert stats["answers"] > 0 and stats["conversation"]["tokens"] > 0 and stats["waiting"] == 0
    chat = "/v1/chat/completions"
    for path, body, headers, status in [
        ("/", {}, {}, 405),
        ("/no", None, {}, 404),
        ("/v1/nothing", {}, {}, 404),
        (chat, None, {}, 405),
        ("/v1/models", {}, {}, 405),
        (chat, b"{", {}, 400),
        (chat, b"[" * 100_000, {}, 400),
        (chat, b"\xff", {}, 400),
        (chat, {}, {}, 400),
        (chat, {"model": "other"}, {}, 404),
        (chat, b"x" * 40_000_000, {}, 413),
        ("/health", None, {"Host": "evil.example"}, 403),
        (chat, {}, {"Origin": "http://evil.example"}, 403),
        ("/v1/completions", {"model": server.model, "prompt": [10**9]}, {}, 400),
    ]:
        got, answer = server.ask(path, body, **headers)
        assert got == status and set(answer["error"]) == {"message", "type", "param", "code"}, (
            path,
            answer,
        )
        assert "\n" not in answer["error"]["message"]
    for data, status in [
        (b"nonsense\r\n\r\n", 400),
        (b"BREW /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET /health HTTP/9.9\r\n\r\n", 505),
        (b"POST " + chat.encode() + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 411),
        (
            b"POST "
            + chat.encode()
            + b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
            411,
        ),
    ]:
        with server.raw(data) as connection:
            answer = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
        assert answer.split(" ")[1] == str(status) and '"error"' in answer, answer
    assert server.chat("ABBA")["choices"]


def test_clients_that_are_slow_or_leave_hold_up_nobody(server):
    """Half a request, an answer not read, one left in the middle, one left while it waits."""
    long = server.post({"messages": USER, "max_tokens": 1200, "stream": True})
    half = [server.raw(long[:n]) for n in (0, 10, 60, len(long) - 5) for _ in range(5)]
    gone = server.ask("/v1/stats")[1]["disconnected"]
    slow = server.raw(long)  # never reads
    first, waiting = server.raw(long), server.raw(long)
    waiting.close()
    while b"content" not in first.recv(4096):
        pass
    first.close()
    started = time.monotonic()
    assert server.chat("CAB", max_tokens=2)["choices"]
    slow.close()
    assert time.monotonic() - started < 50
    assert server.ask("/v1/stats")[1]["disconnected"] > gone
    for connection in half:
        connection.close()


def test_a_key_is_asked_for(talking):
    """With a key any origin is served, without it nobody; a preflight request carries none."""
    server = Running(talking, env={"SLIM_API_KEY": "sesame=1"})
    assert server.ask("/v1/models")[0] == 401
    assert server.ask("/v1/models", Authorization="Bearer wrong")[0] == 401
    assert (
        server.ask("/v1/models", Authorization="Bearer sesame=1")[0] == 200
        and server.ask("/health")[0] == 200
    )
    key = {"Authorization": "Bearer sesame=1"}
    for origin in (
        "file://",
        "app://x",
        "https://example.org",
    ):  # with the key any page and host will do
        assert server.ask("/v1/models", Origin=origin, Host="a.example", **key)[0] == 200
    for data, status in [(b"OPTIONS /v1/models", 204), (b"GET /v1/models", 401)]:
        with server.raw(
            data + b" HTTP/1.1\r\nHost: a.example\r\nOrigin: null\r\n\r\n"
        ) as connection:
            got = b"".join(iter(lambda: connection.recv(65536), b""))
        assert f" {status} ".encode() in got and b"Access-Control-Allow-Origin: *" in got
    assert server.close(signal.SIGTERM) == 0


def test_a_client_that_leaves_a_whole_answer_is_noticed(server):
    """Nothing is written to it before the end, so only a look at the connection can tell."""
    before = server.ask("/v1/stats")[1]
    body = {"messages": USER, "max_tokens": 4000, "stop": "never said"}
    with server.raw(server.post(body)):
        time.sleep(1)  # it is being answered
    left = time.monotonic()
    while server.ask("/v1/stats")[1]["disconnected"] == before["disconnected"]:
        assert time.monotonic() < left + 3
        time.sleep(0.05)
    assert server.ask("/v1/stats")[1]["answers"] == before["answers"]


def test_a_client_that_leaves_a_streamed_answer_leaves_its_text(server):
    """People press Stop when they have seen enough, and ask again about the same text."""
    question = {"messages": [{"role": "user", "content": "CAB ABBA " * 200}]}
    left = server.ask("/v1/stats")[1]["disconnected"]
    with server.raw(server.post(question | {"max_tokens": 2000, "stream": True})) as connection:
        got = b""
        while got.count(b"data: ") < 4:  # the role, then three pieces
            got += connection.recv(4096)
    until = time.monotonic() + 10
    while server.ask("/v1/stats")[1]["disconnected"] == left:
        assert time.monotonic() < until
        time.sleep(0.05)
    status, again = server.ask("/v1/chat/completions", question | {"model": server.model})
    assert status == 200
    used = again["usage"]
    assert used["prompt_tokens_details"]["cached_tokens"] >= used["prompt_tokens"] - 64


def test_the_connection_is_looked_at_while_tokens_come():
    """At 100 tokens/s the queue is never empty: the time since the last look decides."""
    near, far = socket.socketpair()
    handler = object.__new__(Handler)
    handler.connection = near
    job = Job(None)
    far.close()
    started = time.monotonic()
    with pytest.raises(ConnectionError), near:
        for _ in handler.events(feed(job)):
            assert time.monotonic() < started + 0.5


def plain_request(ids, **changes):
    """A greedy request for three tokens."""
    given = {"chat": False, "model": "m", "ids": ids, "max_tokens": 3, "temperature": 0.0}
    given |= {"top_p": 1.0, "seed": None, "stop": [], "stream": False, "include_usage": False}
    given |= {"logprobs": None, "echo": False, "in_thought": None}
    return Request(**given | changes)


def feed(job, pause=0.01):
    """Let pieces of text come out of a job for five seconds."""

    def put():
        for _ in range(int(5 / pause)):
            job.out.put(Piece("text"))
            time.sleep(pause)

    threading.Thread(target=put, daemon=True).start()
    return job


@contextlib.contextmanager
def door(key=None, **kw):
    """A server without an engine."""
    with Server("127.0.0.1", 0, key, **kw) as door:
        threading.Thread(target=door.serve_forever, daemon=True).start()
        door.ready(
            SimpleNamespace(config=SimpleNamespace(max_len=9)), None, SimpleNamespace(ckpt="m")
        )
        yield door
        door.shutdown()


def knock(door, data: bytes) -> socket.socket:
    connection = socket.create_connection(door.server_address, timeout=60)
    connection.sendall(data)
    return connection


def all_of(connection) -> bytes:
    with connection:
        return b"".join(iter(lambda: connection.recv(65536), b""))


HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
HALF = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"


def test_a_client_too_many_is_told_so(monkeypatch):
    """More clients than places: the others get a status, not a closed connection."""
    monkeypatch.setattr("serve.http.MOST_CLIENTS", 1)
    with door() as server:
        with knock(server, HALF + b"\r\n"):  # its body does not come
            while not server.clients:
                time.sleep(0.01)
            answer = all_of(knock(server, HEALTH))
        assert b" 503 " in answer and b'"error"' in answer
        while server.clients:
            time.sleep(0.01)
        assert b" 200 " in all_of(knock(server, HEALTH))


def test_a_request_that_waits_for_the_engine_has_arrived(monkeypatch):
    """A map that was asked for while a long text was being read was cut off after 30 seconds."""
    monkeypatch.setattr("serve.http.TIMEOUT", 0.1)
    with door() as server, knock(server, HEALTH.replace(b"/health", b"/v1/slim/map")) as client:
        job = server.jobs.get()
        time.sleep(1)  # the server looks every half second
        job.out.put({"blocks": []})
        job.out.put(("stop", {}))
        assert b" 200 " in client.recv(4096)


def test_callers_without_the_key_take_no_place(monkeypatch):
    """Anyone could keep 256 connections open, and nobody with the key was served."""
    monkeypatch.setattr("serve.http.MOST_CLIENTS", 1)
    key = b"Authorization: Bearer sesame\r\n"
    with door("sesame") as server, knock(server, b"GET"), knock(server, HALF):
        time.sleep(0.2)
        assert b" 401 " in all_of(knock(server, HALF + b"\r\n"))
        answer = all_of(knock(server, b"GET /v1/models HTTP/1.1\r\n" + key + b"\r\n"))
        assert b" 200 " in answer


def test_of_too_many_silent_connections_the_oldest_end(monkeypatch):
    """Whoever opens connections and sends nothing must not take all threads."""
    monkeypatch.setattr("serve.http.MOST_CLIENTS", 1)
    with door() as server, contextlib.ExitStack() as opened:
        silent = [opened.enter_context(knock(server, HALF)) for _ in range(5)]
        assert [connection.recv(1) for connection in silent[:3]] == [b""] * 3
        silent[-1].settimeout(0.1)
        with pytest.raises(TimeoutError):
            silent[-1].recv(1)
        assert b" 200 " in all_of(knock(server, HEALTH))


def test_a_connection_that_gets_no_thread_leaves_no_trace(monkeypatch):
    """A container's limit of processes: after 256 of these every request got status 503."""
    said = []
    with door(say=said.append) as server:
        with monkeypatch.context() as patch:
            patch.setattr(server, "process_request_thread", None)
            patch.setattr(threading.Thread, "start", fail_to_start)
            assert all_of(knock(server, b"GET")) == b""
        until = time.monotonic() + 5
        while server.clients or server.arriving:  # the client sees the end a little earlier
            assert time.monotonic() < until
            time.sleep(0.01)
        assert "can't start new thread" in said[0]
        assert b" 200 " in all_of(knock(server, HEALTH))


def fail_to_start(thread):
    raise RuntimeError("can't start new thread")


def test_a_bug_in_a_handler_is_an_answer_and_a_line_of_the_log(monkeypatch):
    """It closed the connection without a status, a log line or a count."""
    said = []
    with door(say=said.append) as server:
        monkeypatch.setattr(Handler, "get", lambda self, path: {}["\x1b"])
        answer = all_of(knock(server, HEALTH))
    assert b" 500 " in answer and b"KeyError" in answer
    assert len(said) == 1 and "KeyError" in said[0] and "\x1b" not in said[0]
    assert server.counts["errors"] == 1


def test_an_answer_for_which_memory_ends_is_shorter():
    """Room is taken as an answer grows; what came before it ended is worth having."""

    def source(n):
        yield from range(n)
        raise ValueError("more tokens need 1 GiB")

    job = Job(SimpleNamespace(max_tokens=9))
    model = SimpleNamespace()
    tokens = Tokens(source(2), job, SimpleNamespace(usable=True, model=model))
    assert list(tokens) == [0, 1] and tokens.finish_reason() == "length"
    for n, usable in ((0, True), (2, False)):
        with pytest.raises(ValueError, match="1 GiB"):
            list(Tokens(source(n), job, SimpleNamespace(usable=usable, model=model)))


def test_max_tokens_is_no_claim_on_memory(tiny, tmp_path, monkeypatch):
    """Clients send max_tokens: 4000 by habit, for answers of some hundred tokens."""
    texts, read = started(tiny, tmp_path)
    rooms = []
    reuse = texts.reuse
    monkeypatch.setattr(
        texts, "reuse", lambda ids, room, *args: (rooms.append(room), reuse(ids, room, *args))[1]
    )
    job = Job(plain_request(draw(100), max_tokens=3000))
    monkeypatch.setattr(texts.engine, "generate", lambda *args, **more: iter([1]))
    tok = SimpleNamespace(stream=lambda tokens, stops: (str(token) for token in tokens))
    server = SimpleNamespace(counts=collections.Counter())
    answer(job, server, texts.engine, tok, texts, print)
    assert rooms == [ROOM] and job.out.get() == Piece("1")


def test_a_long_follow_up_can_be_broken_off_and_the_conversation_stays(tiny, monkeypatch):
    """Breaking off a step would lose the text that it follows."""
    engine, text = slim.load(tiny, "cpu", **PRUNED), draw(2600)
    texts = Texts(engine)
    engine.prefill(text[:1500], keep_last=100)
    job, extend = Job(plain_request(text)), engine.extend
    monkeypatch.setattr(
        engine, "extend", lambda *ids, **more: job.disconnected.set() or extend(*ids, **more)
    )
    with pytest.raises(Disconnected):
        answer(job, None, engine, None, texts, print)
    assert engine.usable and engine.ids == text[:1564] and texts.reuse(text) == (1564, 0)


def test_an_answer_breaks_off_between_steps_and_a_new_reading_inside_one(tiny, monkeypatch):
    """A step that is broken off loses the text: harmless only while it is being read."""
    engine, text = slim.load(tiny, "cpu", **PRUNED), draw(2000)
    texts = Texts(engine)
    tok = SimpleNamespace(stream=lambda tokens, stops: (str(token) for token in tokens))
    steps_before_leaving = 0

    def leave(layer, queries):
        if engine.steps > steps_before_leaving:
            job.disconnected.set()

    for n_steps, usable in ((0, False), (3, True)):
        steps_before_leaving = engine.steps + n_steps
        job = Job(plain_request(text, max_tokens=9))
        engine.model.on_queries = leave
        with pytest.raises(Disconnected):
            answer(job, None, engine, tok, texts, print)
        assert engine.usable == usable
    assert texts.reuse(text + draw(20, 1))[0] == 2000


def test_the_model_is_named_after_what_was_asked_for(monkeypatch):
    """Clients must give this name: not a hash of a cache, not `.`."""
    monkeypatch.chdir(HERE)
    engine = SimpleNamespace(config=SimpleNamespace(max_len=9))
    names = (
        (".", HERE.name),
        ("llama3.1-8b", "llama3.1-8b"),
        ("meta-llama/Llama-3.1-8B", "Llama-3.1-8B"),
    )
    for ckpt, name in names:
        with Server("127.0.0.1", 0, None) as door:
            door.ready(engine, None, SimpleNamespace(ckpt=ckpt))
            assert door.model == name


def test_ctrl_c_finishes_the_answer_and_a_text_is_there_the_next_day(talking, tmp_path):
    """An end loses neither the running answer nor the text."""
    server = Running(talking, "--cache-dir", str(tmp_path / "new" / "cache"))
    running = server.raw(
        server.post(
            {"messages": [{"role": "user", "content": TEXT}], "max_tokens": 600, "stream": True}
        )
    )
    data = running.recv(4096)
    waiting = server.raw(server.post({"messages": USER}))
    time.sleep(0.3)
    assert server.close() == 0
    data += b"".join(iter(lambda: running.recv(65536), b""))
    assert data.endswith(b"[DONE]\n\n") and b" 503 " in waiting.recv(4096)
    assert not any("Traceback" in line for line in server.lines)
    server = Running(talking, "--cache-dir", str(tmp_path / "new" / "cache"))
    used = server.chat(TEXT)["usage"]
    assert used["prompt_tokens_details"]["cached_tokens"] >= used["prompt_tokens"] - 64
    assert server.close() == 0


def test_a_server_that_cannot_open_says_so_in_one_line(talking, server, tmp_path, capfd):
    """Before the weights are loaded, with the flag to change."""
    (tmp_path / "file").write_text("")
    for args, names in [
        (["--serve", str(server.port)], "cannot be opened"),
        (["--serve", "x"], "PORT"),
        (["--serve", "0.0.0.0:0"], "--api-key"),
        (["--serve", "0", "--ask", "x"], "--ask"),
        (["--serve", "0", "--cache-dir", str(tmp_path / "file")], "--cache-dir"),
        (["--cache-dir", "x"], "--serve"),
        (["--serve", "0", "--cache-gib", "nan"], "--cache-gib"),
        (["--serve", "0", "--api-key", "schlüssel"], "ASCII"),
        (["--serve", "0", "--api-key", "a\udcfcb"], "ASCII"),
        (["--serve", "0", "--api-key", "a\n"], "ASCII"),
    ]:
        try:
            code = cli_main(["--ckpt", str(talking), *args])
        except SystemExit as stop:
            code = stop.code
        err = capfd.readouterr().err
        assert code == 2 and err.count("\n") == 1 and names in err, err


def test_many_mixed_requests_lose_none_and_leave_no_memory_behind(server):
    """6 clients; of every 20 requests one is broken off, one malformed, the rest answered.

    Of either API, streamed or not, with log probabilities or without.
    """
    rng, lost, done, sizes = random.Random(0), [], [], []
    todo = list(range(MANY))

    def one(i):
        text = rng.choice([TEXT, TEXT[:900], "ABBA CAB " * rng.randint(1, 150)]) + rng.choice(
            ["", "CAB?", str(i)]
        )
        if i % 20 == 3:
            body = {
                "messages": [{"role": "user", "content": text}],
                "max_tokens": 200,
                "stream": i % 40 == 3,
            }
            with server.raw(server.post(body)) as connection:
                time.sleep(rng.random() * 0.2)
                connection.close()
            return True
        if i % 20 == 7:
            bad = rng.choice([b"{", b"[]", b"{}", b'{"model": 1}', b"\x00"])
            return server.ask("/v1/chat/completions", bad)[0] == 400
        if i % 3 == 0:
            body = {"model": server.model, "prompt": text, "max_tokens": 3, "stream": i % 2 == 0}
            scored = {"echo": True, "logprobs": i % 3} if i % 9 == 0 else {}
            return server.ask("/v1/completions", body | scored)[0] == 200
        if i % 5 == 0:
            body = {"model": server.model, "prompt": text, "stream": False}
            return server.ask("/api/generate", body | {"options": {"num_predict": 3}})[0] == 200
        if i % 7 == 0:
            return bool(server.chat(text, max_tokens=4, stream=i % 2 == 0, logprobs=True, n=1))
        return bool(
            server.chat(text, max_tokens=rng.randint(1, 8), stream=i % 2 == 0, temperature=i % 2)
        )

    def client():
        with contextlib.suppress(IndexError):
            while True:
                i = todo.pop()
                try:
                    (done if one(i) else lost).append(i)
                except Exception as error:  # noqa: BLE001
                    lost.append((i, error))
                sizes.append(server.rss())

    threads = [threading.Thread(target=client) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not lost and len(done) == MANY
    quarter = len(sizes) // 4
    early, late = max(sizes[quarter : 2 * quarter]), max(sizes[-quarter:])
    print(
        f"{MANY} requests; memory {early / 2**20:.0f} MiB in the second quarter, "
        f"{late / 2**20:.0f} in the last"
    )
    assert late < early + 2**25
    until = time.monotonic() + 30
    while len(os.listdir(f"/proc/{server.process.pid}/task")) > 30 and time.monotonic() < until:
        time.sleep(0.1)
    assert time.monotonic() < until  # no thread of a client stayed
    assert not any("error" in line for line in server.lines), server.lines


def test_the_openai_package_is_served(server):
    """The client that most programs use parses every answer and error."""
    openai = pytest.importorskip(
        "openai", reason="the openai package is not installed: pip install openai"
    )
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    with client:
        whole = client.chat.completions.create(
            model=server.model, messages=USER, max_completion_tokens=6
        )
        pieces = client.chat.completions.create(
            model=server.model,
            messages=USER,
            max_tokens=6,
            stream=True,
            stream_options={"include_usage": True},
        )
        *events, last = pieces
        assert (
            "".join(e.choices[0].delta.content or "" for e in events)
            == whole.choices[0].message.content
        )
        assert last.usage.prompt_tokens == whole.usage.prompt_tokens
        assert last.usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens - 1
        assert (
            client.completions.create(model=server.model, prompt="ABBA", max_tokens=2)
            .choices[0]
            .finish_reason
        )
        assert [model.id for model in client.models.list()] == [server.model]
        for model, n, error in (
            ("other", 1, openai.NotFoundError),
            (server.model, 2, openai.BadRequestError),
        ):
            with pytest.raises(error, match="other|n 2"):
                client.chat.completions.create(model=model, messages=USER, n=n)


def test_the_ollama_package_is_served(server):
    """It parses every line, and raises what it is told."""
    package = pytest.importorskip("ollama", reason="not installed: pip install ollama")
    client = package.Client(server.url)
    assert client.list().models[0].model == server.model
    asked = {"model": server.model, "messages": USER, "options": {"num_predict": 6}}
    whole = client.chat(**asked).message.content
    assert "".join(line.message.content for line in client.chat(**asked, stream=True)) == whole
    with pytest.raises(package.ResponseError, match="top_k 40"):
        client.generate(server.model, "ABBA", options={"top_k": 40})


def test_langchain_is_served(server):
    """It sends parameters of its own, and content in other shapes."""
    chat = pytest.importorskip(
        "langchain_openai", reason="not installed: pip install langchain-openai"
    ).ChatOpenAI(
        base_url=server.url + "/v1", api_key="none", model=server.model, max_tokens=6, max_retries=0
    )
    whole = chat.invoke([("system", "ABBA"), ("human", "CAB")])
    assert (
        "".join(piece.content for piece in chat.stream([("system", "ABBA"), ("human", "CAB")]))
        == whole.content
    )
    assert whole.usage_metadata["input_tokens"] > 0


def test_common():
    """The length that all reuse rests on, at its edges."""
    assert [
        common(a, b) for a, b in (([], [1]), ([1, 2], [1, 2, 3]), ([1, 2], [1, 3]), ([2], [1]))
    ] == [0, 2, 1, 0]
