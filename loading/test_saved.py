"""A saved conversation goes on bit for bit, or it is refused and nothing is lost."""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import kvcache
import loading.weights
import prune
import slim
from conftest import (
    DEVICES,
    HERE,
    MASS,
    SLIM,
    draw,
    go_on,
    make_checkpoint,
    newest_of_weights,
    set_free,
)
from loading import files, saved
from loading.files import replace_file


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("schedule", [{1: 64, 3: 32}, {}])
@pytest.mark.parametrize("gamma", [0.9, 1.0])
@pytest.mark.parametrize("score", ["peak", "paper", MASS])
def test_a_saved_conversation_goes_on_bit_for_bit(tiny, tmp_path, device, schedule, gamma, score):
    """After a prompt, an answer and its unrun last token: the file has all that is needed."""
    settings = SLIM | dict(device=device, schedule=schedule, gamma=gamma, score=score)
    engine, other = slim.load(tiny, **settings), slim.load(tiny, **settings)
    for n in (3, 150):  # the second file takes the place of the first
        list(engine.generate(draw(n), 9))
        engine.save(tmp_path / "talk.slim", {"any": ["JSON"]})
    other.prefill(draw(30, seed=1))
    assert other.resume(tmp_path / "talk.slim") == {"any": ["JSON"]}
    assert (
        other.pending == engine.pending != [] and other.ids == engine.ids and len(other.ids) == 158
    )
    assert torch.equal(go_on(engine, draw(20, seed=2)), go_on(other, draw(20, seed=2)))
    for counter in (
        "kept",
        "tokens",
        "swaps",
        "revived",
        "kv_cpu_bytes",
        "aux_cpu_bytes",
        "to_cpu_bytes",
        "to_gpu_bytes",
    ):
        assert engine.stats[counter] == other.stats[counter], counter
    assert not schedule or engine.stats["revived"] > 0


def test_a_saved_text_names_its_checkpoint_as_it_was_given(tiny, tmp_path):
    """In the local cache a GGUF file's own name is behind a link; a split one is refused else."""
    (tmp_path / "named").symlink_to(tiny)
    engine = slim.load(tmp_path / "named", "cpu")
    engine.prefill(draw(30))
    engine.save(tmp_path / "talk.slim")
    header, _ = saved.read_saved(tmp_path / "talk.slim")
    assert header["ckpt"] == str(tmp_path / "named")


def edit_saved(path, change, sign=False):
    """Change header and tensors of a saved conversation; sign: as if it had been saved so."""
    with safe_open(path, "pt") as file:
        crc, header = file.metadata()["crc"], json.loads(file.metadata()["slim"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    change(header, tensors)
    text = json.dumps(header)
    save_file(
        tensors,
        path,
        {"slim": text, "crc": saved.checksum(text, sorted(tensors.items())) if sign else crc},
    )


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


SPOILED_SAVES = {  # what happened to the file: (how, what the line must name)
    "cut short": (lambda p: p.write_bytes(p.read_bytes()[:-1]), "truncated"),
    "empty": (lambda p: p.write_bytes(b""), "truncated"),
    "absent": (lambda p: p.unlink(), "no such file"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "it is a folder"),
    "a pipe": (lambda p: (p.unlink(), os.mkfifo(p)), "no such file"),
    "weights": (lambda p: save_file({"x": torch.ones(1)}, p), "not a conversation"),
    "another format": (lambda p: edit_saved(p, lambda h, t: h.update(format="slim 0")), "slim 0"),
    "a header of nothing": (
        lambda p: save_file({"x": torch.ones(1)}, p, {"slim": "[]"}),
        "not a conversation",
    ),
    "no ids": (lambda p: edit_saved(p, lambda h, t: h.update(ids=None)), "parts are missing"),
    "no kv": (lambda p: edit_saved(p, lambda h, t: h.pop("kv"), sign=True), "parts are missing"),
    "no extra": (lambda p: edit_saved(p, lambda h, t: h.update(extra=5)), "parts are missing"),
    "other weights": (
        lambda p: edit_saved(p, lambda h, t: h["identity"].update(weights="0"), sign=True),
        "other weights",
    ),
    "local window": (
        lambda p: edit_saved(p, lambda h, t: h["identity"].update(local_window=7), sign=True),
        "local_window 7",
    ),
    "gamma": (
        lambda p: edit_saved(p, lambda h, t: h["identity"].update(gamma=0.1), sign=True),
        "gamma 0.1",
    ),
    "heads": (
        lambda p: edit_saved(p, lambda h, t: h["identity"].update(heads="0.1"), sign=True),
        "heads '0.1'",
    ),
    "sinks": (
        lambda p: edit_saved(p, lambda h, t: h["identity"].update(sinks=7), sign=True),
        "sinks 7",
    ),
    "what may come back": (
        lambda p: edit_saved(p, lambda h, t: h["identity"].update(revive_at_most=9), sign=True),
        "revive_at_most 9",
    ),
    "a bit of a tensor": (lambda p: flip(p, -100), "damaged"),
    "no prompt length": (
        lambda p: edit_saved(p, lambda h, t: h["kv"].pop("n_prompt"), sign=True),
        "parts are missing",
    ),
    "no stages": (
        lambda p: edit_saved(p, lambda h, t: h["kv"].pop("stages"), sign=True),
        "parts are missing",
    ),
    "no seconds": (
        lambda p: edit_saved(p, lambda h, t: h.pop("prefill_s"), sign=True),
        "parts are missing",
    ),
    "no layer": (lambda p: edit_saved(p, lambda h, t: t.pop("layer.2"), sign=True), "incomplete"),
    "tensor missing": (lambda p: edit_saved(p, lambda h, t: t.pop("layer.2")), "damaged"),
    "tensor short": (
        lambda p: edit_saved(p, lambda h, t: t.update({"layer.2": t["layer.2"][1:]})),
        "damaged",
    ),
    "tensor of another type": (
        lambda p: edit_saved(p, lambda h, t: t.update({"layer.2": t["layer.2"].view(torch.int32)})),
        "damaged",
    ),
    "tensors exchanged": (
        lambda p: edit_saved(p, lambda h, t: t.update({"layer.2": t["layer.1"].clone()})),
        "damaged",
    ),
    "a slot": (
        lambda p: edit_saved(p, lambda h, t: h["kv"]["stages"][1]["slots"].__setitem__(1, 10**6)),
        "damaged",
    ),
    "length": (lambda p: edit_saved(p, lambda h, t: h["kv"].update(length=-5)), "damaged"),
    "an id": (
        lambda p: edit_saved(p, lambda h, t: h["ids"].__setitem__(0, 63 - h["ids"][0])),
        "damaged",
    ),
    "seconds": (lambda p: edit_saved(p, lambda h, t: h.update(prefill_s="x")), "parts are missing"),
    "no checksum": (lambda p: edit_saved(p, lambda h, t: h.update(x=1)), "damaged"),
    "ids of another vocabulary": (
        lambda p: edit_saved(p, lambda h, t: h["ids"].__setitem__(0, 10**9), sign=True),
        "vocabulary",
    ),
}


@pytest.mark.parametrize("what", SPOILED_SAVES)
def test_a_spoiled_save_is_refused_and_the_engine_goes_on(tiny, tmp_path, what):
    spoil, names = SPOILED_SAVES[what]
    path, engine = tmp_path / "talk.slim", slim.load(tiny, **SLIM)
    list(engine.generate(draw(150), 4))
    engine.save(path)
    spoil(path)
    with pytest.raises(ValueError, match=names):
        engine.resume(path)
    assert len(engine.ids) == 153 and go_on(engine, [1, 2], 2).isfinite().all()


def of_header(action, *keys):
    """Return a change of the part of the header to which keys lead."""

    def change(header, tensors):
        part = header
        for key in keys:
            part = part[key]
        action(part)

    return change


def of_tensor(name, action):
    def change(header, tensors):
        tensors[name] = action(tensors[name]).clone()

    return change


def put(key, value):
    return lambda part: part.__setitem__(key, value)


def spoils(header, tensors):
    """Yield a change for each thing in a saved conversation that may be absent or wrong."""
    for wrong in (None, -1, 1.5, "x", [], 10**30):
        for key in header["kv"]:
            if wrong != 10**30 or key not in ("planned", *kvcache.COUNTERS):  # of any size
                yield of_header(put(key, wrong), "kv")
        for key in ("ids", "pending"):
            yield of_header(lambda ids, wrong=wrong: ids.append(wrong), key)
        for i, stage in enumerate(header["kv"]["stages"]):
            yield of_header(put(i, wrong), "kv", "stages")
            yield from stage_spoils(i, stage, wrong)
    for key in header["kv"]:
        yield of_header(lambda kv, key=key: kv.pop(key), "kv")
    yield of_header(lambda ids: ids.clear(), "ids")
    yield lambda header, tensors: tensors.update(more=torch.ones(1))
    for name in tensors:
        yield lambda header, tensors, name=name: tensors.pop(name)
        yield of_tensor(name, lambda tensor: tensor[:0])
        yield of_tensor(name, lambda tensor: tensor[..., :-1])
        yield of_tensor(name, lambda tensor: tensor.flatten())
        yield of_tensor(name, lambda tensor: tensor.half())


def stage_spoils(i, stage, wrong):
    where = "kv", "stages", i
    yield of_header(put("newest", wrong), *where)
    for places in ("slots", "home", "aux"):
        yield of_header(lambda stage, key=places: stage.pop(key), *where)
        if wrong != stage[places]:
            yield of_header(put(places, wrong), *where)
        yield of_header(lambda blocks: blocks.append(wrong), *where, places)
        if len(stage[places]) > 1:
            yield of_header(put(0, wrong), *where, places)
            yield of_header(put(0, stage[places][-1]), *where, places)


@pytest.mark.parametrize("score", ["peak", "paper"])
def test_a_file_that_is_wrong_inside_is_refused_before_anything_is_given_up(tiny, tmp_path, score):
    """A right checksum does not make it right: tracebacks came after the conversation was gone."""
    path = tmp_path / "talk.slim"
    engine = slim.load(tiny, **SLIM | dict(score=score, gamma=1.0))
    engine.prefill(draw(150))
    for i in range(20):
        engine.extend([i])
    list(engine.generate([1, 2], 4, follow_up=True))
    engine.save(path)
    whole = path.read_bytes()
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["slim"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    for kind in ("layer", "home", "aux", "newest"):
        assert any(kind in name for name in tensors)
    engine.prefill(draw(30, seed=1))
    ids, kv, layout = engine.ids, engine.kv.slabs, engine.kv.state()[0]
    n_spoils = 0
    for change in spoils(header, tensors):
        path.write_bytes(whole)
        edit_saved(path, change, sign=True)
        with pytest.raises(ValueError) as error:
            engine.resume(path)
        assert "\n" not in str(error.value)
        assert engine.usable and engine.ids is ids and engine.kv.slabs is kv
        n_spoils += 1
    assert n_spoils > 200 and engine.kv.state()[0] == layout
    path.write_bytes(whole)
    engine.resume(path)
    assert go_on(engine, [1, 2], 2).isfinite().all()


def test_a_header_nested_too_deep_is_refused_in_one_line(tmp_path):
    """Python's JSON reader gives up with a RecursionError."""
    save_file({"x": torch.ones(1)}, tmp_path / "talk.slim", {"slim": "[" * 100_000})
    with pytest.raises(ValueError, match="not a conversation"):
        saved.read_saved(tmp_path / "talk.slim")


def test_resuming_a_file_that_is_refused_never_runs_the_probe(tiny, tmp_path, monkeypatch):
    """The probe drops the conversation; loading has run it already."""
    engine = slim.load(tiny, **SLIM | dict(score="lookup"))
    engine.prefill(draw(150))
    engine.save(tmp_path / "talk.slim")
    edit_saved(tmp_path / "talk.slim", lambda h, t: t.pop("layer.0"), sign=True)
    monkeypatch.setattr(engine, "find_heads", None)
    with pytest.raises(ValueError, match="layer.0"):
        engine.resume(tmp_path / "talk.slim")
    assert engine.usable and len(engine.ids) == 150


@pytest.mark.parametrize("extra", [[1, 2], [], "x", 0, {"a": object()}, {(1, 2): 3}])
def test_an_extra_that_is_no_json_object_is_refused_before_writing(tiny, tmp_path, extra):
    """A list was written, and the file could never be resumed."""
    engine = slim.load(tiny, **SLIM)
    engine.prefill(draw(20))
    with pytest.raises(ValueError, match="extra is .* dict of JSON"):
        engine.save(tmp_path / "talk.slim", extra)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        dict(gamma=0.5),
        dict(schedule={1: 64}),
        dict(window=2),
        dict(dtype="bfloat16"),
        dict(score="paper"),
        dict(score=prune.Rule("mine", newest_of_weights)),
        dict(every_layer=False),
    ],
)
def test_a_save_of_other_settings_is_refused(tiny, tmp_path, change):
    engine = slim.load(tiny, **SLIM)
    engine.prefill(draw(150))
    engine.save(tmp_path / "talk.slim")
    key = next(iter(change))
    if key == "every_layer":
        change = dict(score=dataclasses.replace(prune.RULES["peak"], **change))
    with pytest.raises(ValueError, match=key):
        slim.load(tiny, **SLIM | change).resume(tmp_path / "talk.slim")


def test_a_save_of_another_checkpoint_is_refused(checkpoints, tiny, tmp_path):
    make_checkpoint(tmp_path / "other", seed=1)
    engine = slim.load(tiny, **SLIM)
    engine.prefill(draw(150))
    engine.save(tmp_path / "talk.slim")
    with pytest.raises(ValueError, match="other weights"):
        slim.load(tmp_path / "other", **SLIM).resume(tmp_path / "talk.slim")


def test_nothing_is_saved_before_there_is_something_or_where_it_cannot_be(tiny, tmp_path):
    engine = slim.load(tiny, **SLIM)
    with pytest.raises(ValueError, match="prefill"):
        engine.save(tmp_path / "talk.slim")
    engine.prefill(draw(20))
    with pytest.raises(ValueError, match="nowhere"):
        engine.save(tmp_path / "nowhere" / "talk.slim")
    assert list(tmp_path.iterdir()) == []


def test_a_conversation_is_saved_though_the_weights_file_is_gone(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(
        loading.weights, "MAPPED_BYTES", 0
    )  # a file is opened anew for each tensor, as a large one is
    shutil.copytree(tiny, tmp_path / "model")
    engine = slim.load(tmp_path / "model", **SLIM)
    engine.prefill(draw(150), schedule="dense")
    shutil.rmtree(tmp_path / "model")
    engine.save(tmp_path / "talk.slim")
    other = slim.load(tiny, **SLIM | dict(schedule="dense"))
    other.resume(tmp_path / "talk.slim")
    assert torch.equal(other.extend([1]), engine.extend([1]))


@pytest.mark.parametrize("when", ["writing", "naming"])
def test_a_save_broken_off_leaves_the_old_file(tiny, tmp_path, monkeypatch, when):
    engine, path = slim.load(tiny, **SLIM), tmp_path / "talk.slim"
    engine.prefill(draw(20))
    engine.save(path)
    old = path.read_bytes()
    engine.prefill(draw(150))

    def break_off(file, *args):
        if when == "writing":
            file.write(b"half")
        raise KeyboardInterrupt

    where = (saved, "write_tensors") if when == "writing" else (os, "replace")
    monkeypatch.setattr(*where, break_off)
    with pytest.raises(KeyboardInterrupt):
        engine.save(path)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def test_a_save_is_on_the_disk_before_its_name_and_every_tensor_is_aligned(tmp_path, monkeypatch):
    path, calls = tmp_path / "talk.slim", []
    for name in ("fsync", "replace"):
        monkeypatch.setattr(
            os, name, lambda *a, call=getattr(os, name), name=name: (calls.append(name), call(*a))
        )
    tensors = {
        "a": torch.ones(3, dtype=torch.bfloat16),
        "b": torch.ones(3),
        "c": torch.ones(3, dtype=torch.float64),
    }
    saved.write_saved(path, {}, tensors)
    assert calls == ["fsync", "replace"]
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    assert all(
        header[name]["data_offsets"][0] % tensor.dtype.itemsize == 0
        for name, tensor in tensors.items()
    )
    with safe_open(path, "pt") as file:
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())


def test_a_save_killed_at_any_moment_leaves_a_whole_file(tiny, tmp_path):
    """SIGKILL at random moments of saving again and again: the file opens afterwards."""
    path = tmp_path / "talk.slim"
    code = f"""if True:
        import slim
        engine = slim.load({str(tiny)!r}, **{SLIM!r})
        engine.prefill({draw(150)!r})
        engine.save({str(path)!r})
        print("saved", flush=True)
        while True:
            engine.save({str(path)!r})"""
    engine = slim.load(tiny, **SLIM)
    for seed in range(4):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=HERE)
        process.stdout.readline()
        time.sleep(random.Random(seed).random() * 0.02)
        process.kill()
        process.wait()
        engine.resume(path)
        assert len(engine.ids) == 150
    (tmp_path / ".try-0123.part").touch()  # of one that was killed as it tried the folder
    engine.save(path)
    assert list(tmp_path.iterdir()) == [path]  # what killed processes left is gone


def leftovers(folder):
    return sorted(path.name for path in folder.glob(".*"))


def test_a_temporary_file_cannot_be_foreseen_and_no_link_is_followed(tmp_path):
    """In a shared folder, a link under a known name would overwrite what it points to."""
    path = tmp_path / "talk.slim"
    names = set()
    for _ in range(2):
        with replace_file(path) as file:
            names.add(file.name)
    assert len(names) == 2
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in names:
        os.symlink(victim, name)
    with replace_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and victim.read_text() == "mine"


def test_a_conversation_is_its_owners_and_a_map_is_as_the_umask_says(tmp_path):
    """A saved file holds the whole text; whoever made it readable once keeps it so."""
    path = tmp_path / "file"
    umask = os.umask(0o022)
    try:
        for private, mode in ((True, 0o600), (False, 0o644)):
            path.unlink(missing_ok=True)
            for _ in range(2):
                with replace_file(path, private) as file:
                    assert os.fstat(file.fileno()).st_mode & 0o777 == mode
                assert path.stat().st_mode & 0o777 == mode
        path.chmod(0o640)
        saved.write_saved(path, {}, {"a": torch.ones(1)})
        assert path.stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(umask)


def test_two_writers_of_one_name_each_write_a_whole_file(tmp_path):
    """They shared one temporary file: the first published what the other still wrote."""
    path = tmp_path / "talk.slim"
    with replace_file(path) as slow:
        slow.write(b"slow, ")
        with replace_file(path) as fast:
            fast.write(b"fast")
        assert path.read_bytes() == b"fast"
        assert len(leftovers(tmp_path)) == 1
        slow.write(b"but whole")
    assert path.read_bytes() == b"slow, but whole" and leftovers(tmp_path) == []


def test_what_killed_processes_left_goes_and_other_files_stay(tmp_path):
    """The next save deletes files of its name that no living process has locked."""
    path = tmp_path / "talk.slim"
    with replace_file(path) as file:
        name = Path(file.name).name.split("-")[0]
    for old in (f"{name}.part", f"{name}-0123.part"):
        (tmp_path / old).write_text("left")
    (tmp_path / ".deadbeef-0123.part").write_text("of another name")
    os.mkfifo(tmp_path / f"{name}-pipe.part")
    with replace_file(path):
        pass
    assert leftovers(tmp_path) == [".deadbeef-0123.part"]


def test_a_new_temporary_file_that_was_swept_is_made_again(tmp_path, monkeypatch):
    """Between its creation and its lock another process may take it for a leftover."""
    lock, swept = files.fcntl.flock, []

    def sweep_first(file, how):
        if not swept:
            swept.append(file.name)
            os.unlink(file.name)
        lock(file, how)

    monkeypatch.setattr(files.fcntl, "flock", sweep_first)
    with replace_file(tmp_path / "talk.slim") as file:
        file.write(b"there")
        assert file.name != swept[0]
    assert (tmp_path / "talk.slim").read_bytes() == b"there"


def test_resuming_checks_memory_first_and_ends_a_generator(tiny, tmp_path, monkeypatch):
    engine = slim.load(tiny, **SLIM)
    engine.prefill(draw(150))
    engine.save(tmp_path / "talk.slim")
    for wrong in (-1, 1.5, "x"):
        with pytest.raises(ValueError, match="room"):
            engine.resume(tmp_path / "talk.slim", wrong)
    with monkeypatch.context() as m, pytest.raises(ValueError, match="not enough memory"):
        set_free(m, 0)
        engine.resume(tmp_path / "talk.slim", 10**6)
    answer = engine.generate([1], 5, follow_up=True)
    next(answer)
    engine.resume(tmp_path / "talk.slim")
    with pytest.raises(ValueError, match="used while it generated"):
        list(answer)
