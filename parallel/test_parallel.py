"""Tests of tensor parallelism: two to four gloo ranks on a CPU, each held against one rank.

Ranks are forked from this process, which saves them the imports; two tests start torchrun itself.
"""

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import TCPStore

import cli
import kvcache
import model
import parallel
import planning.checkpoint
import planning.memory
import prune
import slim
from bench import shapes, speed
from conftest import draw, make_checkpoint
from loading.config import parse_config
from loading.quantised import Held, Matrix

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
LIMIT = 60  # seconds until ranks count as hanging


# ---- ranks ------------------------------------------------------------------------------


def become(rank: int, n: int, ports, folder: Path, work, args) -> None:
    """Turn a forked process into a rank; leave what it returns, and what it prints, in files."""
    where = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=n, LOCAL_WORLD_SIZE=n)
    where |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=ports.get())
    where |= dict(TORCHELASTIC_USE_AGENT_STORE=True, TORCHELASTIC_RESTART_COUNT=0)
    os.environ.update({key: str(value) for key, value in where.items()})
    for name in ("out", "err"):
        file = open(folder / f"{name}.{rank}", "w", buffering=1)
        os.dup2(file.fileno(), 1 if name == "out" else 2)
        setattr(sys, f"std{name}", file)
    code = 1
    try:
        result = work(*args)
        (folder / f"result.{rank}").write_bytes(pickle.dumps(result))
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


class Group:
    """n forked ranks that run work(*args).

    The store, torchrun's part, has a thread: it starts after the last fork and ends with the ranks.
    A rank that is forked while that thread holds a lock may wait for it forever.
    """

    def __init__(self, folder: Path, n: int, work, *args):
        self.folder = Path(tempfile.mkdtemp(prefix="ranks-", dir=folder))
        fork = multiprocessing.get_context("fork")
        ports = fork.SimpleQueue()
        self.ranks = [
            fork.Process(target=become, args=(r, n, ports, self.folder, work, args), daemon=True)
            for r in range(n)
        ]
        for rank in self.ranks:
            rank.start()
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for _ in self.ranks:
            ports.put(self.store.port)

    def codes(self) -> list[int]:
        """Wait for all; return their exit codes, of a signal its negative."""
        end = time.monotonic() + LIMIT
        for rank in self.ranks:
            rank.join(max(0, end - time.monotonic()))
        hanging = [rank for rank in self.ranks if rank.is_alive()]
        for rank in hanging:
            rank.kill()
        self.store = None
        assert not hanging, f"{len(hanging)} ranks hang: {self.text('err')}"
        return [rank.exitcode for rank in self.ranks]

    def text(self, name: str, rank: int | None = None) -> str:
        which = range(len(self.ranks)) if rank is None else [rank]
        files = [self.folder / f"{name}.{r}" for r in which]
        return "".join(file.read_text() for file in files if file.exists())

    def wait_for(self, text: str) -> None:
        end = time.monotonic() + LIMIT
        while text not in self.text("err") + self.text("out"):
            assert time.monotonic() < end and self.ranks[0].is_alive(), (text, self.text("err"))
            time.sleep(0.02)

    def results(self) -> list:
        assert self.codes() == [0] * len(self.ranks), self.text("err")
        return [
            pickle.loads((self.folder / f"result.{r}").read_bytes()) for r in range(len(self.ranks))
        ]


def command(*argv, patches=(), stdin=None):
    """Return work for a rank: the command line, after its patches (rank, owner, name, value)."""

    def work():
        for rank, owner, name, value in patches:
            if rank == int(os.environ["RANK"]):
                setattr(owner, name, value)
        sys.stdin = open(stdin or os.devnull)
        return cli.main([str(a) for a in argv])

    return work


# ---- one conversation, on any number of ranks ---------------------------------------------


def mass(weights):
    return weights.mean(1).sum(-1)


def strongest(queries, keys, blocks, unit_len):
    units = prune.unit_keys(keys, unit_len).repeat_interleave(
        queries.shape[1] // keys.shape[2], 2
    )  # (N, U, H, D)
    return torch.einsum("whd,nuhd->nuhw", queries, units).amax((1, 2, 3))


RULES = {
    "peak": "peak",
    "lookup": replace(
        prune.RULES["lookup"],
        heads=((0, 3), (), (1,), (2, 3), ()),
        revive_margin=0.0,
        revive_at_most=None,
    ),
    "paper": "paper",
    "all": prune.Rule("mass", mass, every_layer=False, window=8),
    "keys": prune.Rule("keys", strongest, sees="keys", join="max"),
    "few heads": replace(prune.RULES["peak"], heads=((0, 3), (), (1,), (2, 3), ())),
}
FAMILIES = "llama3-gqa", "qwen2-bias", "qwen3-bias", "phi3", "llama3.2-tied", "llama2-mha"


def load(*args, **options):
    """Load one process's engine in the test itself, and a rank's part in a rank."""
    return (parallel if "RANK" in os.environ else slim).load(*args, **options)


def talk(
    folder, rule="peak", n=300, saved=None, dtype="float64", steps=6, cut=False, **options
) -> dict:
    """Read, decode, ask, rewind, save and resume; return logits, choices and counters."""
    parallel.VOCABULARY_BYTES = 0 if cut else 2**25
    engine = load(
        folder,
        "cpu",
        dtype=dtype,
        schedule={2: 96, 3: 64},
        score=RULES[rule],
        block_len=16,
        unit_len=4,
        chunk=100,
        **options,
    )
    choices, logits = [], []
    engine.model.on_select = lambda i, candidates, scores, active: choices.append(
        (i, sorted(active))
    )
    logits.append(engine.prefill(draw(n), room=8))
    for token in draw(steps, seed=1):
        logits.append(engine.extend([token]))
    logits.append(engine.extend(draw(20, seed=2), all_logits=True))
    if saved:
        engine.save(saved, {"x": 1})
        logits.append(engine.extend(draw(5, seed=3)))
        assert engine.resume(saved) == {"x": 1}
        logits.append(engine.extend(draw(5, seed=3)))
    engine.rewind()
    logits.append(engine.extend(draw(3, seed=4)))
    stats = {key: value for key, value in engine.stats.items() if not key.endswith("_s")}
    w = engine.model.weights
    tensors = [
        w.embed,
        w.norm,
        w.head,
        *(t for layer in w.layers for t in vars(layer).values() if t is not None),
    ]
    strengths = engine.measure_heads(draw(256, seed=5))
    size = sum(t.nbytes for t in {id(t): t for t in tensors}.values())  # a tied head once
    return {
        "logits": [x.double().numpy() for x in logits],
        "choices": choices,
        "stats": stats,
        "strengths": strengths.numpy(),
        "weights": size,
    }


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    made = {}
    for family in FAMILIES:
        made[family] = tmp_path_factory.mktemp(family)
        make_checkpoint(made[family], family)
    return made | {"demo": ROOT / "demo"}


def all_cases(folders, n_ranks: int, tmp_path) -> dict:
    """Return {name: arguments of talk} of what is compared on n ranks."""
    cases = {family: dict(folder=folder) for family, folder in folders.items()}
    if n_ranks == 4:
        cases = {family: cases[family] for family in ("qwen2-bias", "demo", "llama2-mha")}
    cases |= {
        f"rule {rule}": dict(folder=folders["llama3-gqa"], rule=rule)
        for rule in list(RULES)[1 : 7 - n_ranks]
    }
    cases |= {
        f"cut {f}": dict(folder=folders[f], cut=True)
        for f in ("llama3-gqa", "llama3.2-tied")[: 4 // n_ranks]
    }
    cases["local"] = dict(folder=folders["llama3-gqa"], rule="few heads", n=1300, local_window=100)
    cases["saved"] = dict(
        folder=folders["qwen2-bias"], rule="paper", saved=str(tmp_path / f"saved.{n_ranks}")
    )
    return cases


@pytest.mark.parametrize("n", [2, 4])
def test_ranks_compute_what_one_does(folders, tmp_path, n):
    """Logits, choices, swaps, revivals; each family and rule, both ways to hold the vocabulary."""
    cases = all_cases(folders, n, tmp_path)
    found = Group(
        tmp_path, n, lambda: {name: talk(**case) for name, case in cases.items()}
    ).results()
    for name, case in cases.items():
        one = talk(**case)
        for got in (ranks[name] for ranks in found):
            assert got["choices"] == one["choices"], name
            worst = max(abs(a - b).max() for a, b in zip(got["logits"], one["logits"], strict=True))
            assert worst < 1e-10, (name, worst)
            assert abs(got["strengths"] - one["strengths"]).max() < 1e-6, name
            assert all(
                got["stats"][key] == one["stats"][key]
                for key in ("swaps", "revived", "kept", "tokens", "local_rows")
            ), name
        assert one["stats"]["swaps"] > 0 and one["stats"]["revived"] > 0, name
        assert one["stats"]["local_rows"] == (768 if name == "local" else 0)
    for key in (
        "kv_gpu_bytes",
        "kv_cpu_bytes",
        "aux_cpu_bytes",
    ):  # each rank has its share and no more
        assert (
            n * found[0]["llama2-mha"]["stats"][key]
            == talk(folders["llama2-mha"])["stats"][key]
            > 0
        ), key
    for a, b in zip(found[0]["saved"]["logits"][-3], found[0]["saved"]["logits"][-2]):
        assert a == b  # resumed on as many ranks: bit for bit


def test_a_saved_conversation_opens_on_any_number_of_ranks(folders, tmp_path):
    """Heads are repeated on 4 ranks, and a file holds each once; with rules of both kinds."""

    def save():
        for rule in ("peak", "paper"):
            talk(
                folders["qwen2-bias"],
                rule,
                saved=str(tmp_path / f"{rule}.{os.environ.get('WORLD_SIZE', 1)}"),
            )

    def resume():
        logits = {}
        for rule in ("peak", "paper"):
            for n in (1, 4):
                engine = load(
                    folders["qwen2-bias"],
                    "cpu",
                    dtype="float64",
                    schedule={2: 96, 3: 64},
                    score=rule,
                    block_len=16,
                    unit_len=4,
                    chunk=100,
                )
                engine.resume(str(tmp_path / f"{rule}.{n}"))
                logits[rule, n] = torch.stack([engine.extend([token]) for token in draw(3, seed=9)])
        return logits

    save()
    Group(tmp_path, 4, save).results()
    want = resume()
    assert all((want[rule, n] - want[rule, 1]).abs().max() < 1e-10 for rule, n in want)
    for n in (2, 4):
        for found in Group(tmp_path, n, resume).results():
            assert all((found[key] - want[key]).abs().max() < 1e-10 for key in want)


def load_two_boundaries(folder, rule):
    settings = dict(schedule={2: 96, 3: 64}, score=rule, block_len=16, unit_len=4)
    return load(folder, "cpu", dtype="float64", **settings)


def test_ranks_draft_and_accept_as_one_does(folders, tmp_path):
    """Blocks, counters and tokens; an accepted token counts on every rank."""

    def work():
        engine = load_two_boundaries(folders["llama3-gqa"], RULES["lookup"])
        tokens = list(engine.generate(draw(50) * 6, 60, draft=16))
        after = engine.extend([1, 2, 3]).tolist()
        names = "swaps", "revived", "tokens", "drafted", "accepted"
        return tokens, after, [engine.stats[name] for name in names]

    tokens, after, counts = work()
    assert 0 < counts[-1] < counts[-2]
    for ranks_tokens, ranks_after, ranks_counts in Group(tmp_path, 2, work).results():
        assert (ranks_tokens, ranks_counts) == (tokens, counts)
        assert max(abs(a - b) for a, b in zip(ranks_after, after)) < 1e-10


@pytest.mark.parametrize("rule", ["peak", "lookup", "paper"])
def test_ranks_hold_a_text_as_one_does(folders, tmp_path, rule):
    """Read, read on, go back, ask; and saved before a question has come."""

    def work():
        engine = load_two_boundaries(folders["llama3-gqa"], RULES[rule])
        choices = []
        engine.model.on_select = lambda i, candidates, scores, active: choices.append(
            (i, sorted(active))
        )
        engine.read(draw(300), keep_last=20)
        engine.read_on(draw(9, seed=1))
        engine.rewind(295)
        assert choices == []
        logits = [engine.extend(draw(9, seed=2)), engine.extend([3])]
        engine.read(draw(300, seed=3))
        file = str(tmp_path / f"talk.{os.environ.get('WORLD_SIZE', 1)}")
        engine.save(file)
        engine.resume(file)
        logits.append(engine.extend([4]))
        return choices, torch.stack(logits).numpy()

    choices, logits = work()
    assert len(choices) == 8
    for ranks_choices, ranks_logits in Group(tmp_path, 2, work).results():
        assert ranks_choices == choices
        assert abs(ranks_logits - logits).max() < 1e-10


def test_a_leaders_reading_reaches_the_other_ranks(folders, tmp_path):
    """On the command line rank 0 alone knows what is done."""

    def talk(start):
        options = dict(schedule={2: 96}, score="peak", block_len=16, unit_len=4)
        ckpt = slim.Checkpoint.open(folders["llama3-gqa"], "cpu", "float64", **options)
        engine = start(ckpt)
        engine.read(draw(300), keep_last=20)
        engine.finish()
        found.append(engine.extend([3]).numpy())
        return 0

    def work():
        ranks = parallel.connect()
        if ranks.rank:
            assert ranks.follow(parallel.start_worker) == 0
        else:
            assert ranks.lead(lambda: talk(parallel.start)) == 0
        return found

    found = []
    (logits,), nothing = Group(tmp_path, 2, work).results()
    talk(slim.start)
    assert nothing == [] and abs(found[0] - logits).max() < 1e-10


@pytest.mark.parametrize("n, steps", [(2, 200), (4, 40)])
def test_in_bfloat16_all_ranks_agree_on_every_choice_and_token(folders, tmp_path, n, steps):
    """Sampled, with a seed and logits of each rank's own: rank 0's count."""

    def work():
        engine = load(
            folders["llama2-mha"],
            "cpu",
            dtype="bfloat16",
            schedule={2: 96, 3: 64},
            block_len=16,
            unit_len=4,
        )
        choices = []
        engine.model.on_select = lambda i, candidates, scores, active: choices.append(
            (i, scores, sorted(active))
        )
        torch.manual_seed(int(os.environ["RANK"]))
        head, engine.model.head = engine.model.head, lambda x: torch.randn_like(head(x))
        engine.ranks.calls = 0
        engine.generate(draw(300), steps)
        assert engine.ranks.calls == 0  # greedy: no seed is sent
        tokens = list(engine.generate(draw(300), steps, temperature=1.0))
        return tokens, choices, engine.model.kv.slabs[0].shape

    first, *others = Group(tmp_path, n, work).results()
    assert len(first[0]) == steps and len(first[1]) == 2 * steps
    for other in others:
        assert other[0] == first[0]
        assert all(
            a[0] == b[0] and torch.equal(a[1], b[1]) and a[2] == b[2]
            for a, b in zip(other[1], first[1])
        )


def test_ranks_pack_their_parts(folders, tmp_path):
    """Each quantises its own part of a row, so scales differ a little from those of one process."""

    def work():
        found = []
        for kind in ("full", "int8", "int4"):
            engine = load(folders["demo"], "cpu", "bfloat16", "dense", weights=kind)
            found.append(engine.prefill(draw(300)).numpy())
            found.append(engine.extend([5]).numpy())
        return found

    alone = work()
    for result in Group(tmp_path, 2, work).results():
        for i, (one, many) in enumerate(zip(alone, result)):
            error = abs(one - many).max()
            assert error <= 0.1 * abs(one).max(), (i, error)


def test_a_rank_does_not_cut_a_group(folders):
    """Its scale belongs to columns of two ranks: such a matrix is widened instead."""
    ckpt = slim.Checkpoint.open(folders["llama2-mha"], "cpu", "bfloat16")
    down = "model.layers.0.mlp.down_proj.weight"
    up = "model.layers.0.mlp.up_proj.weight"
    exact = {down: 32, up: 32}
    part = parallel.split(replace(ckpt, exact=exact), SimpleNamespace(rank=0, n=2))  # 64 columns
    assert part.exact == exact and part.kept_as == "file"
    part = parallel.split(replace(ckpt, exact=exact), SimpleNamespace(rank=1, n=4))
    assert part.exact == {up: 32}


def test_a_rank_reads_its_part_of_every_tensor(folders, tmp_path):
    """Parts of all ranks make the whole, none twice, be they plain or widened as they are read."""

    class File:
        def __init__(self, shapes):
            self.shapes = shapes

        def get_tensor(self, name):
            return torch.arange(torch.Size(self.shapes[name]).numel()).view(self.shapes[name])

    class Rank:
        def __init__(self, rank, n):
            self.rank, self.n = rank, n

    raw = json.loads((folders["qwen3-bias"] / "config.json").read_text())
    raw |= dict(
        hidden_size=64,
        intermediate_size=128,
        head_dim=16,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    config = parse_config(raw, "x")
    q, o = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight"
    shapes = {q: (128, 64), o: (64, 128)}
    ckpt = slim.Checkpoint(
        Path("x"),
        config,
        dict.fromkeys(shapes, File(shapes)),
        set(),
        torch.device("cpu"),
        torch.float32,
        {},
        prune.RULES["peak"],
        planning.settings.Settings(),
        {},
        prune.RULES["peak"],
        None,
    )
    for n in (2, 4):
        parts = [parallel.split(ckpt, Rank(r, n)) for r in range(n)]
        for name in shapes:
            pieces = [part.tensors[name].get_tensor(name) for part in parts]
            dim = int("o_proj" in name)
            assert torch.equal(torch.cat(pieces, dim), File(shapes).get_tensor(name)), name
            assert all(piece.shape[dim] == shapes[name][dim] // n for piece in pieces)
    odd = replace(ckpt, config=replace(config, hidden_dim=129))  # parts of unequal size
    gate, down = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.down_proj.weight"
    shapes |= {gate: (129, 64), down: (64, 129)}
    odd.tensors.update(dict.fromkeys(shapes, File(shapes)))
    parts = [parallel.split(odd, Rank(r, 2)) for r in range(2)]
    for name in (gate, down):
        pieces = [part.tensors[name].get_tensor(name) for part in parts]
        assert torch.equal(torch.cat(pieces, int("down" in name)), File(shapes).get_tensor(name))
        whole = File(shapes).get_tensor(name)
        widened = Held(partial(Matrix, "x", shapes[name], lambda a, b, w=whole: w[a:b].float()))
        odd.tensors[name] = widened
    parts = [parallel.split(odd, Rank(r, 2)) for r in range(2)]
    for name in (gate, down):
        pieces = [torch.cat([*part.tensors[name].get_tensor(name).chunks()]) for part in parts]
        whole = File(shapes).get_tensor(name).float()
        assert torch.equal(torch.cat(pieces, int("down" in name)), whole)
    for field in ("hidden_dim", "vocab_size", "dim"):
        with pytest.raises(ValueError, match="4 ranks cannot share 3 columns"):
            parallel.split(replace(ckpt, config=replace(config, **{field: 3})), Rank(0, 4))
    with pytest.raises(
        ValueError, match="3 ranks cannot share 8 heads and 4 KV heads; .* can be 1, 2, 4, 8"
    ):
        parallel.split(ckpt, Rank(0, 3))


def test_a_scorer_that_fails_fails_alike_on_all_ranks(folders, tmp_path):
    """A rank that went on with a bad score would wait for the others forever."""

    def work():
        returned = "the scoring function returned"
        wrongs = {
            (lambda w: 7): returned,
            (lambda w: w): returned,
            (lambda w: w.amax((1, 3)) * torch.nan): "18 of 18 blocks are NaN",
        }
        for wrong, words in wrongs.items():
            for join in ("all", "max"):
                engine = load(
                    folders["llama3-gqa"],
                    "cpu",
                    schedule={2: 96},
                    block_len=16,
                    unit_len=4,
                    score=prune.Rule("wrong", wrong, join=join),
                )
                with pytest.raises(ValueError, match=words):
                    engine.prefill(draw(300))
        return True

    assert Group(tmp_path, 2, work).results() == [True, True]


def test_a_script_may_have_met_the_ranks_on_a_backend_of_its_own(folders, tmp_path):
    """As with NCCL alone, which has no tensors on the CPU: here gloo, for GPUs only."""

    def work():
        torch.distributed.init_process_group("cuda:gloo")
        engine = load(
            folders["llama3-gqa"],
            "cpu",
            schedule={2: 96},
            block_len=16,
            unit_len=4,
            score=RULES["all"],
        )
        engine.prefill(draw(300))
        engine.save(tmp_path / "a.slim")
        return engine.extend(draw(3)).tolist()

    first, second = Group(tmp_path, 2, work).results()
    assert first == second


def test_a_script_that_ends_leaves_the_others_first(folders, tmp_path, monkeypatch):
    """Threads of torch that outlive Python abort a finished script now and then."""

    def work():
        at_exit = []
        with monkeypatch.context() as patch:
            patch.setattr("atexit.register", at_exit.append)
            load(folders["llama3-gqa"], "cpu").prefill(draw(30))
        for end in at_exit:
            end()
        return torch.distributed.is_initialized()

    assert Group(tmp_path, 2, work).results() == [False, False]


def test_under_torchrun_slim_load_gives_each_process_an_engine_of_its_own(folders, tmp_path):
    """A data-parallel script's ranks read prompts of their own, of any length, and never wait."""
    settings = dict(dtype="float64", schedule={2: 96}, block_len=16, unit_len=4)

    def work(rank=None):
        rank = int(os.environ["RANK"]) if rank is None else rank
        engine = slim.load(folders["llama3-gqa"], "cpu", **settings)
        engine.prefill(draw(200 + 50 * rank, seed=rank))
        logits = engine.extend(draw(1 + rank, seed=3)).tolist()
        return logits, "ranks" in engine.stats, torch.distributed.is_initialized()

    assert Group(tmp_path, 2, work).results() == [work(0), work(1)]
    assert work(0)[1:] == (False, False)


def test_a_rule_with_heads_of_its_own_joins_by_maximum():
    """A rank without any of a layer's heads would let the others wait for ever."""
    rule = prune.Rule("own", lambda weights: weights.amax((1, 3)), heads=((0,), (), ()))
    with pytest.raises(ValueError, match="rule 'own' has heads of its own and join 'all'"):
        parallel.check_join(rule)
    parallel.check_join(replace(rule, join="max"))
    for known in prune.RULES.values():
        parallel.check_join(known)


def test_ranks_of_a_script_that_differ_get_one_line(folders, tmp_path):
    """Not a hang, and not logits of two texts mixed; what they agree on then goes on as before."""

    def work():
        rank = int(os.environ["RANK"])
        engine = load(folders["llama3-gqa"], "cpu", dtype="float64", block_len=16, unit_len=4)
        refused = [
            lambda: engine.prefill(draw(100, seed=rank)),
            lambda: engine.prefill(draw(100 + rank)),
            lambda: engine.prefill([1, 2, 99] if rank else [1, 2]),
            lambda: engine.prefill([1, 2], room=rank),
            lambda: engine.prefill([1, 2], schedule="auto" if rank else "dense"),
            lambda: list(engine.generate(draw(100, seed=rank), 5)),
            lambda: list(engine.generate(draw(100), 5 + rank)),
            lambda: list(engine.generate(draw(100), 5, temperature=1.0, seed=rank or None)),
            lambda: (engine.prefill if rank else engine.extend)([1]),
            lambda: (engine.forget if rank else engine.rewind)(),
            lambda: load(folders["llama3-gqa"], "cpu", schedule={1 + rank: 128}),
            lambda: load(folders["llama3-gqa"] if rank else tmp_path / "nowhere", "cpu"),
        ]
        found = []
        for call in refused:
            with pytest.raises(ValueError) as error:
                call()
            found.append(str(error.value))
        logits = engine.prefill(iter(draw(100)))
        with pytest.raises(ValueError, match="rank 1 calls extend with other arguments"):
            engine.extend([rank])
        return found, [logits.tolist(), engine.extend(torch.tensor([1, 2])).tolist()]

    (texts, logits), others = Group(tmp_path, 2, work).results()
    assert others == (texts, logits)
    alone = slim.load(folders["llama3-gqa"], "cpu", dtype="float64", block_len=16, unit_len=4)
    for got, want in zip(logits, [alone.prefill(draw(100)), alone.extend([1, 2])]):
        torch.testing.assert_close(torch.tensor(got), want.float(), atol=1e-6, rtol=0)
    for text in texts[:5]:
        assert text.startswith("rank 1 calls prefill with other arguments than rank 0; give")
    for text in texts[5:8]:
        assert text.startswith("rank 1 calls generate with other arguments than rank 0")
    assert texts[8].startswith("rank 1 calls prefill, not extend as rank 0; give")
    assert texts[9].startswith("rank 1 calls forget, not rewind as rank 0")
    assert texts[10].startswith("rank 1 calls start with other arguments than rank 0")
    assert "nowhere" in texts[11] and "\n" not in "".join(texts)


def test_a_rank_that_alone_needs_memory_asks_with_the_others(folders, tmp_path, monkeypatch):
    """With uneven parts pieces of memory run out at different steps; a rank alone would wait."""
    settings = dict(dtype="float64", schedule={2: 96}, block_len=16, unit_len=4)

    def work():
        engine = load(folders["llama3-gqa"], "cpu", **settings)
        engine.prefill(draw(300), room=9)
        missing = kvcache.HostMemory.missing
        if os.environ.get("RANK") == "1":
            at_least_one = lambda memory, n: max(1, missing(memory, n))  # noqa: E731
            monkeypatch.setattr(kvcache.HostMemory, "missing", at_least_one)
        return torch.stack([engine.extend([token]) for token in range(9)])

    first, second = Group(tmp_path, 2, work).results()
    assert torch.equal(first, second)
    torch.testing.assert_close(first, work(), atol=1e-10, rtol=0)


def test_a_rank_takes_the_gpu_of_its_own_number(monkeypatch):
    """--device cuda:1 would put all ranks on one GPU; without a GPU for each none can start."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    own = torch.device("cuda", 1)
    assert parallel.own_device(torch.device("cpu"), 5) == torch.device("cpu")
    assert parallel.own_device(torch.device("cuda", 0), 5) == own
    assert parallel.own_device(own, 5) == own
    with pytest.raises(ValueError, match="'cuda:3': under torchrun each rank takes the GPU of its"):
        parallel.own_device(torch.device("cuda", 3), 5)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="there are 2 GPUs here; start one rank for each"):
        parallel.own_device(torch.device("cuda", 0), 5)


# ---- the command line ---------------------------------------------------------------------


def test_torchrun_gives_the_text_of_one_process(tmp_path):
    """The demo, dense and pruned, as rank 0 alone prints it."""
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "slim.py",
    ]
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=2 * LIMIT, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    one = Group(tmp_path, 1, command())
    assert one.codes() == [0]
    assert done.stdout == one.text("out") == " 2489\n 2489\n"
    assert done.stderr.count("on each of 2 ranks") == 3 and done.stderr.count("in all") == 2


def test_chat_map_json_save_and_resume_work(tmp_path):
    """Every way to use the command line gives what one process gives."""
    options = (
        "--ckpt",
        ROOT / "demo",
        "--schedule",
        "5:1/4,6:1/8",
        "--max-new-tokens",
        "8",
        "--dtype",
        "float64",
    )
    lines = "first question\n/stats\n/map {0}/map.html\n/reset\n/nonsense\nfirst question\n/quit\n"
    lines += "never read\n"

    def ask(folder, run):
        folder.mkdir()
        read = options + ("--prompt", DOCUMENT, "--max-prompt-tokens", "1500")
        out = [run(*read, "--ask", "first question", "--json", "--map", folder / "a.html")]
        out.append(run(*read, "--ask", "one", "--compare"))
        out.append(run(*read, "--save", folder / "a.slim"))
        out.append(run("--resume", folder / "a.slim", "--ask", "first question"))
        out.append(run(*read, "--chat", stdin=lines.format(folder)))
        data = [
            page.split('type="application/json">')[-1]
            for page in ((folder / name).read_text() for name in ("a.html", "map.html"))
        ]
        return out, [page.replace(str(folder), "") for page in data]

    def on(n, *argv, stdin=""):
        (tmp_path / "stdin").write_text(stdin)
        group = Group(tmp_path, n, command(*argv, stdin=tmp_path / "stdin"))
        assert group.codes() == [0] * n, group.text("err")
        assert n == 1 or not group.text("out", 1) + group.text("err", 1)
        return group.text("out", 0)

    one, two = (ask(tmp_path / str(n), partial(on, n)) for n in (1, 2))
    a, b = (json.loads(out[0][0]) for out in (one, two))
    assert (
        a["ids"] == b["ids"]
        and a["kept"] == b["kept"]
        and a["kv_gpu_bytes"] == 2 * b["kv_gpu_bytes"]
    )
    assert one[0][1:] == two[0][1:]
    assert [len(page) > 1000 for page in one[1] + two[1]] == [True] * 4


def test_without_torchrun_nothing_of_it_is_imported():
    """torch.distributed would add to the start of every run."""
    code = "import sys, slim, cli; slim.load('demo').prefill([5] * 9); "
    code += "sys.exit('parallel' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    "name, value", [("WORLD_SIZE", "x"), ("WORLD_SIZE", "0"), ("LOCAL_WORLD_SIZE", "1.5")]
)
def test_a_number_of_ranks_that_is_none_is_refused_in_one_line(monkeypatch, capsys, name, value):
    """Leftover variables of a shell or a scheduler must not end in a traceback."""
    monkeypatch.setenv(name, value)
    want = f"error: the environment variable {name} is {value!r}; it must be a whole number of at "
    want += "least 1"
    assert cli.main(["--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"slim: {want}") and said.count("\n") == 1
    if name == "LOCAL_WORLD_SIZE":  # the processes of a machine share its memory
        with pytest.raises(ValueError, match=want[7:].replace(".", "[.]")):
            slim.load(ROOT / "demo", "cpu")
    else:
        assert slim.load(ROOT / "demo", "cpu").prefill([1]).isfinite().all()
        with pytest.raises(ValueError, match="start them with torchrun"):
            parallel.load(ROOT / "demo", "cpu")
    monkeypatch.setattr(sys, "argv", ["speed.py", "--out", "runs.jsonl", "--text", "book.txt"])
    with pytest.raises(SystemExit, match="2"):
        speed.main()
    assert want in capsys.readouterr().err


def test_an_empty_variable_counts_as_unset(monkeypatch):
    """Shells pass on unset variables as empty ones."""
    monkeypatch.setenv("WORLD_SIZE", "")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "")
    assert slim.load(ROOT / "demo", "cpu").prefill([1]).isfinite().all()


def test_half_of_torchruns_variables_are_refused_in_one_line():
    """WORLD_SIZE alone is what schedulers leave behind."""
    env = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    done = subprocess.run(
        [sys.executable, "slim.py"], env=env | {"WORLD_SIZE": "2"}, cwd=ROOT, capture_output=True
    )
    assert done.returncode == 2 and done.stderr.startswith(
        b"slim: error: the ranks do not reach each other: "
    )
    assert done.stderr.count(b"\n") == 1


def test_variables_left_over_from_elsewhere_are_refused_soon_and_in_one_line(tmp_path):
    """Waiting for ranks that nobody started would look like a hang."""

    def work():
        os.environ |= dict(WORLD_SIZE="2", TORCHELASTIC_USE_AGENT_STORE="False", MASTER_PORT="0")
        parallel.ranks.MEET = timedelta(seconds=1)
        return cli.main([])

    text = "start them with torchrun, or unset WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT to run"
    one_line(Group(tmp_path, 1, work), [2], text)


# ---- how all end --------------------------------------------------------------------------


def one_line(group: Group, codes: list[int], text: str) -> None:
    assert group.codes() == codes, group.text("err")
    said = [line for line in group.text("err").splitlines() if line.strip()]
    assert len(said) == 1 and said[0].startswith("slim: error: ") and text in said[0], said


DOCUMENT = ROOT / "demo/document.txt"
QUIET = (
    "--quiet",
    "--ckpt",
    ROOT / "demo",
    "--schedule",
    "5:1/4",
    "--max-prompt-tokens",
    "2000",
    "--prompt",
    DOCUMENT,
)
ASK = *QUIET, "--ask", "x"


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, KeyError])
def test_a_step_that_raises_on_one_rank_ends_all(tmp_path, error):
    """The others would wait for it in a collective; and one line says which rank it was."""

    def fail(self, layer, x):
        raise error("no room for 7 MiB")

    group = Group(tmp_path, 4, command(*ASK, patches=[(2, model.Model, "ffn", fail)]))
    one_line(group, [2] * 4, f"rank 2: {error.__name__}: ")


def test_an_error_of_rank_0_ends_all(tmp_path):
    """The rank that prints is the one that fails; the workers still end, and print nothing."""

    def fail(self, layer, x):
        raise MemoryError("no room for 7 MiB")

    one_line(
        Group(tmp_path, 2, command(*ASK, patches=[(0, model.Model, "ffn", fail)])),
        [2, 2],
        "no room for 7 MiB",
    )


def slow(self, layer, x):
    """An FFN that says where the rank is, and gives the test time."""
    print("in a step", file=sys.stderr)
    time.sleep(1)


@pytest.mark.parametrize("n, rank", [(4, 0), (2, 1)])
def test_a_killed_rank_ends_all(tmp_path, n, rank):
    """In a step: the others notice in the next collective; `slow` prints on the rank that dies."""
    group = Group(tmp_path, n, command(*ASK, patches=[(rank, model.Model, "ffn", slow)]))
    group.wait_for("in a step")
    group.ranks[rank].kill()
    codes = [2] * n
    codes[rank] = -signal.SIGKILL
    assert group.codes() == codes, group.text("err")
    said = [line for line in group.text("err").splitlines() if line.startswith("slim: ")]
    assert said == [f"slim: error: rank {rank} was lost; all ranks end"], group.text("err")


def test_a_rank_killed_while_rank_0_waits_for_a_question_ends_all(tmp_path):
    """No collective runs then, so only the watching thread can notice."""
    os.mkfifo(tmp_path / "typed")
    group = Group(tmp_path, 2, command(*QUIET[1:], "--chat", stdin=tmp_path / "typed"))
    with open(tmp_path / "typed", "w"):
        group.wait_for("type a question")
        assert "Ctrl-C ends all ranks" in group.text("err", 0)
        group.ranks[1].kill()
        assert group.codes() == [2, -signal.SIGKILL]
    assert group.text("err").count("slim: error: rank 1 was lost; all ranks end\n") == 1


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_rank_0_in_a_step_ends_all(tmp_path, sent, code):
    """Workers would stay behind in a collective, each with a GPU's memory."""
    group = Group(tmp_path, 2, command(*ASK, patches=[(0, model.Model, "ffn", slow)]))
    group.wait_for("in a step")
    os.kill(group.ranks[0].pid, sent)
    assert group.codes() == [code, 2]
    assert group.text("err").count("slim: ") == (code == 143)


@pytest.mark.parametrize("when", ["type a question", "in a step"])
def test_ctrl_c_in_a_chat_ends_all_as_interrupted(tmp_path, when):
    """At the prompt and in an answer: torchrun passes the signal on to every rank."""
    os.mkfifo(tmp_path / "typed")
    ffn = model.Model.ffn

    def later(self, layer, x):
        (slow if self.kv.length else ffn)(self, layer, x)

    patches = [(0, model.Model, "ffn", later)]
    asked = command(*QUIET[1:], "--chat", stdin=tmp_path / "typed", patches=patches)
    group = Group(tmp_path, 2, asked)
    with open(tmp_path / "typed", "w") as typed:
        group.wait_for("type a question")
        if when == "in a step":
            print("x", file=typed, flush=True)
            group.wait_for(when)
        for rank in group.ranks:
            os.kill(rank.pid, signal.SIGINT)
        assert group.codes() == [130, -signal.SIGINT], group.text("err")
    said = group.text("err").partition("type a question")[2].splitlines()[1:]
    assert [line for line in said if line.startswith("slim: ")] == ["slim: interrupted"], said


def test_ranks_refuse_together(tmp_path):
    """Unequal memory, no checkpoint on one rank, too many ranks for the heads, bad input."""

    def missing(ckpt):
        raise FileNotFoundError(f"no checkpoint {ckpt.rpartition('/')[2]!r} here")

    memory = [(1, planning.memory, "free_bytes", lambda device: 2**20)]
    group = Group(tmp_path, 2, command(*ASK, patches=memory))
    one_line(group, [2, 2], "rank 1: not enough memory on cpu")
    group = Group(
        tmp_path, 2, command(*ASK, patches=[(1, planning.checkpoint, "find_checkpoint", missing)])
    )
    one_line(group, [2, 2], "rank 1: no checkpoint 'demo' here")
    one_line(
        Group(tmp_path, 5, command(*ASK)), [2] * 5, "5 ranks cannot share 4 heads and 2 KV heads"
    )
    one_line(
        Group(tmp_path, 2, command("--ckpt", "nowhere", "--ask", "x")),
        [2, 2],
        "no checkpoint 'nowhere'",
    )
    one_line(Group(tmp_path, 2, command("--serve", "0")), [2, 2], "--serve works on one GPU only")
    one_line(
        Group(tmp_path, 2, command("--device", "cuda:9")), [2, 2], "'cuda:9': this machine has"
    )
    group = Group(tmp_path, 2, command("--nonsense"))
    one_line(group, [2, 2], "unrecognized arguments: --nonsense")


def test_a_question_that_one_rank_cannot_take_is_refused_and_the_next_answered(tmp_path):
    """A refusal costs one line, not the conversation."""
    (tmp_path / "typed").write_text("a question that is too long\nx\n")
    calls = iter([False])

    def fits(*args):
        return next(calls, True)

    group = Group(
        tmp_path,
        2,
        command(
            *QUIET,
            "--chat",
            "--max-new-tokens",
            "4",
            stdin=tmp_path / "typed",
            patches=[(1, slim, "fits", fits)],
        ),
    )
    assert group.codes() == [0, 0], group.text("err")
    assert group.text("err").count("slim: error: ") == 1 and "more than is free" in group.text(
        "err", 0
    )
    assert len(group.text("out", 0)) > 1


def test_a_question_that_one_rank_needs_more_memory_for_is_refused_by_all(
    folders, tmp_path, monkeypatch
):
    """As where the FFN's columns are not cut evenly."""

    def work():
        engine = load(folders["llama3-gqa"], "cpu", block_len=16, unit_len=4)
        engine.prefill(draw(300))
        with monkeypatch.context() as patch:
            if engine.ranks.rank == 1:
                patch.setattr(slim, "step_bytes", lambda *args, **options: 2**60)
            with pytest.raises(ValueError, match="more than is free"):
                engine.extend(draw(20, seed=2))
        return engine.extend(draw(20, seed=2)).tolist()

    first, second = Group(tmp_path, 2, work).results()
    assert first == second


def test_a_prompt_that_one_rank_has_no_memory_for_is_refused_by_all(folders, tmp_path, monkeypatch):
    """Before anything is given up, so that the next prompt is read as usual."""

    def work():
        engine = load(folders["llama3-gqa"], "cpu", block_len=16, unit_len=4)
        with monkeypatch.context() as patch:
            if engine.ranks.rank == 1:
                patch.setattr(planning.memory, "free_bytes", lambda device: 0)
            with pytest.raises(ValueError, match="rank 1: not enough memory on cpu"):
                engine.prefill(draw(300))
        return engine.prefill(draw(300)).tolist()

    first, second = Group(tmp_path, 2, work).results()
    assert first == second


def test_a_file_that_cannot_be_written_or_read_leaves_all_ranks_as_they_were(folders, tmp_path):
    """Disks differ; an engine half resumed would answer from two texts."""

    def work():
        engine = load(folders["llama3-gqa"], "cpu", block_len=16, unit_len=4)
        engine.prefill(draw(100))
        for path in (tmp_path / "no" / "a.slim", tmp_path):
            with pytest.raises(ValueError, match="cannot be written"):
                engine.save(path)
        with pytest.raises(ValueError, match="dict of JSON"):
            engine.save(tmp_path / "yes.slim", [1])
        mine = tmp_path / ("no.slim" if os.environ["RANK"] == "1" else "yes.slim")
        engine.save(tmp_path / "yes.slim")
        with pytest.raises(
            ValueError, match="no.slim is not a conversation saved by Slim: no such file"
        ):
            engine.resume(mine)
        return engine.extend([1, 2]).tolist()

    first, second = Group(tmp_path, 2, work).results()
    assert first == second


def test_a_rank_may_load_save_and_resume_for_longer_than_a_step(folders, tmp_path, monkeypatch):
    """Disks are slow; the limit of a step must not count for them."""

    def work():
        parallel.ranks.STEP = timedelta(seconds=2)
        rank = parallel.connect().rank

        def late(owner, name, slow_rank):
            function = getattr(owner, name)
            monkeypatch.setattr(
                owner, name, lambda *args: (time.sleep(3 * (rank == slow_rank)), function(*args))[1]
            )

        late(slim, "load_weights", 0)
        late(slim, "write_saved", 0)
        late(kvcache.KVCache, "load_state", 1)
        engine = load(folders["llama3-gqa"], "cpu", block_len=16, unit_len=4)
        engine.prefill(draw(30))
        engine.save(tmp_path / "a.slim")
        engine.resume(tmp_path / "a.slim")
        return engine.extend([1, 2]).tolist()

    first, second = Group(tmp_path, 2, work).results()
    assert first == second


def test_torchrun_ends_when_a_rank_is_killed(tmp_path):
    """The real thing: no process is left, and the line is said once."""
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    with subprocess.Popen(
        [*torchrun, "slim.py", *map(str, QUIET[1:]), "--chat"],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as run:
        said = []
        for line in run.stderr:
            said.append(line)
            if "type a question" in line:
                break
        children = [
            int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        ]
        assert len(children) == 2
        os.kill(children[1], signal.SIGKILL)
        said += run.stderr.readlines()
        assert run.wait(LIMIT) == 1
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    assert sum("slim: error: rank 1 was lost; all ranks end" in line for line in said) == 1, said


def expected_traffic(engine: slim.Engine, n_rows: int) -> tuple[int, int]:
    """Return the calls and bytes in which ranks meet in a step of n_rows, by arithmetic.

    The step is the prompt's, or one token's that revives nothing.
    """
    config = engine.config
    kv = engine.kv
    item = kv.dtype.itemsize
    first = n_rows > 1
    n_tail = kv.n_prompt - kv.tail_start
    rows = []  # of x, by layer
    for stage in kv.stages:
        rows += [stage.n_slots * kv.block_len + n_tail if first else 1] * len(stage.layers)
    sums = rows + rows[1:] + rows[-1:]  # after attention; after the FFN, when pruned rows have left
    calls = sum(-(-n // engine.model.chunk) for n in sums)
    size = sum(sums) * config.dim * item
    if engine.model.vocab_is_cut:  # embedding and head
        calls += 2
        size += n_rows * config.dim * item + config.vocab_size * item
    rankings = sum(len(stage.layers) if first else 1 for stage in kv.stages[:-1])
    window = min(engine.model.window, n_rows)
    size += rankings * window * (kv.stages[0].n_slots + 1) * max(item, 4)
    logits = config.vocab_size * max(item, 4)  # rank 0's
    return calls + rankings + 1, size + logits


@pytest.mark.parametrize("cut", [False, True])
def test_ranks_send_what_the_arithmetic_says(tmp_path, cut):
    """Calls and bytes of a pruned prefill and a decode step; embedding and head whole, and cut."""

    def work():
        parallel.VOCABULARY_BYTES = 0 if cut else 2**25
        engine = shapes.make_engine("tiny", "cpu", "bfloat16", "2:1/4,3:1/8", 300)
        engine.model.gamma, sent = 0.0, []
        for n, step in (
            (1500, lambda: engine.prefill([7] * 1500, room=2)),
            (1, lambda: engine.extend([1])),
        ):
            engine.ranks.calls = engine.ranks.bytes = 0
            step()
            sent.append(((engine.ranks.calls, engine.ranks.bytes), expected_traffic(engine, n)))
        return sent

    for sent in Group(tmp_path, 2, work).results():
        assert all(found == expected for found, expected in sent), sent
