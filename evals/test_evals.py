"""The adapter to lm-evaluation-harness: scores, stops, cuts, second runs, offline tasks."""

import json
import random
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip(
    "lm_eval", reason='lm-evaluation-harness is not installed: pip install "lm-eval[ruler]"'
)
import transformers
from lm_eval.api.instance import Instance

import slim
from evals import harness
from evals import lm as adapter
from evals.lm import MESSAGES, SlimLM
from planning.checkpoint import Checkpoint
from serve.api import chat_ids
from serve.test_serve import Running

SENTENCES = [
    f"The {a} is {b}. "
    for a in ("grass", "sky", "sun", "token", "block")
    for b in ("green", "blue", "here")
]


def request(*args):
    return SimpleNamespace(args=args, doc={})


def text(n, seed):
    return "".join(random.Random(seed).choices(SENTENCES, k=n))


def lm_of(folder, schedule="dense", **options):
    return SlimLM(Checkpoint.open(folder, "cpu", "float32", schedule, block_len=32), **options)


def test_dense_scores_are_those_of_transformers(talking):
    """50 requests: with and without a context, a space at the seam, short and long answers."""
    lm, rng = lm_of(talking), random.Random(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(talking)
    requests = [("", "The grass"), ("The sky is ", "blue"), ("The sky is", " blue."), ("A  ", " B")]
    requests += [
        (text(rng.randint(1, 40), i), " " + text(rng.randint(1, 6), i + 100)) for i in range(46)
    ]
    for (context, answer), (score, greedy) in zip(
        requests, lm.loglikelihood([request(*r) for r in requests])
    ):
        (ids, *_), wanted = lm.pair(context, answer)
        if context:
            assert ids + wanted == lm.plain(context + answer)
        with torch.no_grad():
            logits = (
                model(torch.tensor([ids + wanted])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
            )
        right = logits[range(len(wanted)), wanted]
        assert abs(score - float(right.sum())) < 1e-4 * len(wanted)
        assert greedy == bool((logits.argmax(-1) == torch.tensor(wanted)).all())
    whole = text(30, 1)
    ids = lm.tok.encode(whole)
    assert lm.loglikelihood_rolling([request(whole)])[0] == pytest.approx(
        lm.score([lm.start_id], 0, ids)[0], abs=1e-3
    )


def test_the_harness_own_client_gets_the_same_scores_from_a_server(talking):
    """`local-completions` asks for prompt and answer in one, and adds up the end of what comes."""
    pytest.importorskip("tenacity", reason='not installed: pip install "lm-eval[api]"')
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    requests = [("The sky is", " blue."), ("A  ", " B"), (text(20, 1), " The sun is blue.")]
    requests += [(text(200, 2), text(100, 3)), ("Grüße 🦊", " aus 🦊")]
    server = Running(talking)
    client = LocalCompletionsAPI(
        base_url=server.url + "/v1/completions",
        model=server.model,
        tokenizer=str(talking),
        tokenizer_backend="huggingface",
        max_length=4096,
    )
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(requests)]
    found = client.loglikelihood(asked)
    assert server.close() == 0
    lm = lm_of(talking)
    lm.tok.bos_id = None  # the client writes none unless it is told to
    right = lm.loglikelihood([request(*pair) for pair in requests])
    for pair, (score, greedy), (ours, ours_greedy) in zip(requests, found, right):
        assert score == pytest.approx(ours, abs=1e-3) and greedy == ours_greedy, pair


def test_scores_are_added_up_in_slices(talking, monkeypatch):
    """The logits of a long answer, all at once, would be the largest tensor of a run by far."""
    lm, answer = lm_of(talking), text(40, 2)
    score, _ = lm.loglikelihood([request("The sky", answer)])[0]
    monkeypatch.setattr("evals.lm.SLICE", 7)
    lm, sizes = lm_of(talking), []
    log_softmax = torch.Tensor.log_softmax
    monkeypatch.setattr(
        torch.Tensor, "log_softmax", lambda x, dim: sizes.append(len(x)) or log_softmax(x, dim)
    )
    again, _ = lm.loglikelihood([request("The sky", answer)])[0]
    assert max(sizes) == 7 and again == pytest.approx(score, abs=1e-3)


def test_pruned_scores_are_those_of_the_engine_a_token_at_a_time(talking):
    """A pruned engine chooses blocks at each token; a score in one go would hide that."""
    lm, context, answer = lm_of(talking, {2: 256, 3: 128}), text(150, 3), " The sun is blue."
    score, _ = lm.loglikelihood([request(context, answer)])[0]
    (ids, *_), wanted = lm.pair(context, answer)
    engine = slim.load(talking, "cpu", "float32", {2: 256, 3: 128}, block_len=32)
    logits = [engine.prefill(ids, room=len(wanted)), *(engine.extend([i]) for i in wanted[:-1])]
    assert score == pytest.approx(
        sum(float(x.double().log_softmax(-1)[i]) for x, i in zip(logits, wanted)), abs=1e-6
    )
    assert (
        lm.engine.stats["kept"][-1] < len(ids) / 4
        and score != lm_of(talking).loglikelihood([request(context, answer)])[0][0]
    )


def test_answers_are_written_once_and_end_at_a_stop(talking, tmp_path, monkeypatch):
    """Runs take days and are killed: what is in the file is not computed again."""
    lm = lm_of(talking, {2: 256}, out=tmp_path / "out.jsonl")
    options = {"max_gen_toks": 12, "until": [], "do_sample": False, "temperature": 0.0}
    first = lm.generate_until([request(text(60, i), options) for i in range(3)])
    stop = first[0][3:5]
    cut = lm.generate_until([request(text(60, 0), options | {"until": [stop]})])[0]
    assert cut == first[0][: first[0].find(stop)]
    with open(lm.out, "a") as file:
        file.write('{"key": "kil')  # a run that was killed
    again = lm_of(talking, {2: 256}, out=tmp_path / "out.jsonl")
    added = again.generate_until([request(text(60, 7), options)])
    again = lm_of(talking, {2: 256}, out=tmp_path / "out.jsonl")
    monkeypatch.setattr(slim, "start", lambda *_: pytest.fail("an answer was computed again"))
    assert again.generate_until([request(text(60, 7), options)]) == added
    assert again.generate_until([request(text(60, i), options) for i in range(3)]) == first
    with pytest.raises(pytest.fail.Exception):
        again.generate_until([request(text(60, 9), options)])
    with pytest.raises(pytest.fail.Exception):
        lm_of(talking, {2: 128}, out=tmp_path / "out.jsonl").generate_until(
            [request(text(60, 0), options)]
        )


@pytest.mark.parametrize(
    "name", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"]
)
def test_a_tasks_limit_holds_under_every_name_of_the_harness(talking, name):
    """Tasks of the harness write it in four ways; an unknown one would let an answer run to 256."""
    lm = lm_of(talking)
    limited = lm.generate_until([request(text(60, 1), {name: 7, "until": []})])[0]
    ids = lm.plain(text(60, 1))
    assert limited == "".join(lm.tok.stream(lm.engine.generate(ids, 7)))


def test_a_tasks_other_options_are_done_or_refused():
    """The harness samples where only a temperature is given; what Slim lacks is refused by name."""
    options = adapter.normal_options(
        {"temperature": 0.7, "until": "\n", "num_beams": 1, "top_k": None}
    )
    assert options == {"max_gen_toks": 256, "until": ["\n"], "temperature": 0.7, "top_p": 1.0}
    greedy = adapter.normal_options(
        {"do_sample": False, "temperature": 0.7, "until": None, "top_k": 5}
    )
    assert greedy["temperature"] == 0 and greedy["until"] == []
    for name, value in {"num_beams": 4, "max_length": 99, "repetition_penalty": 1.2}.items():
        with pytest.raises(ValueError, match=f"{name} {value}"):
            adapter.normal_options({name: value})
    with pytest.raises(ValueError, match="top_k 5"):
        adapter.normal_options({"do_sample": True, "temperature": 1.0, "top_k": 5})


def test_what_is_too_long_is_cut_in_the_middle(talking):
    """As LongBench does: the instruction stands at either end."""
    lm = lm_of(talking, max_len=400)
    ids, *_ = lm.read("BEGIN " + text(200, 1) + " END", 30)
    assert 350 < len(ids) <= 370
    assert lm.tok.decode(ids).startswith("BEGIN") and lm.tok.decode(ids).endswith("END")
    chat = [
        {"role": "user", "content": "BEGIN " + text(200, 1) + " END"},
        {"role": "assistant", "content": "It is"},
    ]
    ids, *_ = lm.read(MESSAGES + json.dumps(chat), 30)
    assert 350 < len(ids) <= 370 and lm.tok.decode(ids).rstrip().endswith("It is")


def test_what_cannot_be_cut_to_the_context_is_refused(talking):
    """The engine would refuse it later, in the middle of a run."""
    lm = lm_of(talking, max_len=400)
    chat = [{"role": "user", "content": text(40, i)} for i in range(9)]
    for prompt, room in ((text(200, 1), 400), (MESSAGES + json.dumps(chat), 30)):
        with pytest.raises(ValueError, match="400 tokens"):
            lm.read(prompt, room)
    ids, answer = lm.pair(text(200, 1), " The sun is blue.")
    assert len(ids[0]) + len(answer) <= 400


def test_where_a_question_begins_is_known_from_its_task(talking):
    """The question comes later, not the last paragraph; where there is none, nothing does."""
    doc = {"context": text(20, 1), "question": "An abstract.\n\nOf two paragraphs."}
    tasks, lm = harness.long_tasks().task_index, lm_of(talking, {2: 256}, later=True)
    for name, begin, in_view in [
        ("passage_retrieval_en", "\n\nThe following is an abstract.", "no"),
        ("triviaqa", "\nAn abstract.", "no"),
        ("qasper", "\n\n Answer the question", "no"),
        ("repobench-p", "An abstract.", "no"),
        ("lcc", "", "yes"),
        ("gov_report", "", "yes"),
        ("passage_count", "", "yes"),
    ]:
        name = "longbench_" + name
        prompt = harness.apply_template(tasks[name].cfg["doc_to_text"], doc)
        ids, split, seen, cut = lm.read(prompt, 5, harness.after_context(name, doc))
        assert seen == in_view and not cut and bool(split) == (in_view == "no")
        later = prompt[prompt.index(doc["context"]) + len(doc["context"]) :]
        if split:
            assert (
                later.startswith(begin) and abs(len(lm.tok.encode(later)) - len(ids[split:])) <= 2
            )
    assert harness.last_line({"input": "A\nB\nWhat is C?"}) == "\nWhat is C?"
    assert lm.read(text(20, 1) + "\n\nWhere?", 5).in_view == "unknown"


def test_messages_go_through_the_models_template_and_a_question_can_come_later(talking):
    """The text is pruned before the question is known, with the same ids in the same order."""
    lm = lm_of(talking, {2: 256, 3: 128}, later=True)
    chat = [
        {"role": "user", "content": text(80, 1) + "\nQuestion: where?"},
        {"role": "assistant", "content": "In"},
    ]
    ids, split, *_ = lm.read(
        lm.apply_chat_template(chat, add_generation_prompt=False), 5, "\nQuestion: where?"
    )
    assert ids == chat_ids(lm.tok, chat)
    before, after = lm.tok.decode(ids[:split]), "".join(lm.tok.stream(ids[split:]))
    assert before.rstrip().endswith(".") and "Question" not in before
    assert "Question: where?" in after and after.endswith("In")
    lm.question = lambda doc: "\nQuestion: where?"
    said = lm.generate_until([request(MESSAGES + json.dumps(chat), {"max_gen_toks": 5})])[0]
    engine = slim.load(talking, "cpu", "float32", {2: 256, 3: 128}, block_len=32)
    engine.prefill(ids[:split])
    assert said == "".join(lm.tok.stream(engine.generate(ids[split:], 5, follow_up=True)))
    assert lm.used == [(len(ids), split, "no", False)] and 0 < lm.flops() < 1


def test_a_table_of_ruler_is_made_without_a_network_and_completed_by_a_second_run(
    talking, tmp_path, capsys, monkeypatch
):
    """RULER's code is patched to make few samples offline; a new release may break that."""
    pytest.importorskip(
        "wonderwords", reason='RULER is not installed: pip install "lm-eval[ruler]"'
    )
    (tmp_path / "book.txt").write_text(text(3000, 1))
    args = [
        "--ckpt",
        str(talking),
        "--tasks",
        "niah_multikey_1",
        "--lengths",
        "512",
        "1024",
        "--limit",
        "1",
        "--columns",
        "dense",
        "3:1/4",
        "--question-later",
        "--out",
        str(tmp_path / "out.jsonl"),
        "--essays",
        str(tmp_path / "book.txt"),
    ]
    assert harness.main(args) == 0
    table = capsys.readouterr().out
    assert "| task | metric | samples | dense | 3:1/4 | 3:1/4, question later |" in table
    for row in ("niah_multikey_1 | 512 | 1", "niah_multikey_1 | 1024 | 1"):
        assert row in table
    assert "| nothing is pruned | yes | no |" in table and "| 100.0% |" in table
    assert "cut in the middle, to the context | | | 0 of 2 | 0 of 2 | 0 of 2 |" in table
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2 * 3
    monkeypatch.setattr(slim, "start", lambda *_: pytest.fail("an answer was computed again"))
    assert harness.main(args) == 0 and capsys.readouterr().out == table


def test_longbench_reads_its_file(talking, tmp_path, capsys):
    """LongBench's files are read as they are, and its own metric scores the answers."""
    for package in ("jieba", "fuzzywuzzy", "rouge"):
        pytest.importorskip(
            package, reason='LongBench is not installed: pip install "lm-eval[longbench]"'
        )
    doc = {
        "input": "Where?",
        "context": text(50, 1),
        "answers": ["here"],
        "length": 9,
        "dataset": "qasper",
        "language": "en",
        "all_classes": None,
        "_id": "1",
    }
    for name in ("qasper", "gov_report"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(doc) + "\n")
    args = [
        "--ckpt",
        str(talking),
        "--tasks",
        "longbench",
        "--columns",
        "3:1/4",
        "--longbench",
        str(tmp_path),
    ]
    assert harness.main([*args, "--max-len", "1000", "--question-later"]) == 0
    table = capsys.readouterr().out
    assert (
        "| longbench_qasper | qa_f1_score | 1 |" in table
        and "| longbench_gov_report | score | 1 |" in table
    )
    assert "when the text is pruned | | | yes | " in table and "no 1" in table and "yes 1" in table
    assert "| 1 of 2 | 1 of 2 |" in table  # of 1,000 tokens a summary may have 512


def test_tasks_are_expanded_and_columns_must_be_alike():
    """A row of the table compares columns, so each must have the same rows."""
    assert harness.expand("ruler_vt,ruler,arc_easy", None) == [
        "ruler_vt",
        *(name for name in harness.WITHOUT_ESSAYS if name != "ruler_vt"),
        "arc_easy",
    ]
    with pytest.raises(ValueError, match="shorter"):
        harness.table(
            {"a": [{"task": "t", "metric": "m", "n": 1, "mean": 1, "error": 0}], "b": []}, {}
        )


def test_a_task_without_a_score_a_sample_is_refused(talking):
    """Standard errors need a score of each sample."""
    datasets = pytest.importorskip("datasets", reason="it comes with lm-eval")
    data = {
        split: datasets.Dataset.from_list([{"page": text(20, 1)}])
        for split in ("train", "validation", "test")
    }
    with pytest.raises(ValueError, match="wikitext has no score of single samples"):
        harness.evaluate(
            lm_of(talking), {"task": "wikitext", "custom_dataset": lambda **_: data}, False, 1
        )


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["--tasks", "niah_single_2"], "--essays"),
        (["--tasks", "longbench_qasper"], "--longbench"),
        (["--tasks", "no_such_task"], "no_such_task"),
        (["--tasks", "ruler_vt", "--columns", "9:x"], "9:x"),
        (["--tasks", "longbench_no_such", "--longbench", "."], "longbench_no_such"),
        (["--tasks", "ruler_vt", "--max-len", "-5"], "--max-len -5"),
        (["--tasks", "ruler_vt", "--max-len", "99999999"], "--max-len 99999999"),
        (["--tasks", "ruler_vt", "--max-len", "2048", "--lengths", "2049"], "2049"),
        (["--tasks", "ruler_vt", "--lengths", "512"], "ruler_vt needs at least 1024"),
        (["--tasks", "ruler_vt", "--out", "no/such/folder.jsonl"], "--out no/such"),
        (["--tasks", "ruler_vt", "--out", "other.jsonl"], "other.jsonl holds"),
        (["--tasks", "longbench"], "--longbench"),
        (["--tasks", "longbench", "--longbench", "."], "--longbench . has no file"),
        (["--tasks", "longbench_qasper", "--longbench", "broken"], "qasper.jsonl is not"),
        (["--tasks", "ruler_vt", "--limit", "0"], "--limit"),
        (["--tasks", "ruler_vt", "--ckpt", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(talking, tmp_path, capsys, monkeypatch, args, names):
    """What is wrong is said before the first answer is computed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no_such.jsonl").write_text("{}")
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "qasper.jsonl").write_text("[]\n")
    assert harness.main(["--ckpt", str(talking), *args]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evals: error")]
    assert len(err) == 1 and names in err[0]
