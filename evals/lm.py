"""The engine as a model of lm-evaluation-harness: it continues texts and scores them.

A request is ids to read, and either ids to score or options for an answer. `later` reads the text
first and the question as a follow-up, so that the text is pruned before the question is known; the
task says where the question begins (`question`). Every answer is written to a file at once, under a
key of all it depends on; a second run does not compute it again.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

import slim
import tokenizer
from planning.checkpoint import Checkpoint
from planning.flops import prefill_flops
from serve.api import chat_ids
from serve.texts import common

MESSAGES = "messages "  # opens a prompt that is a conversation, as JSON
RECORD = '{"key": "'  # opens every line of the file of answers
SLICE = 256  # tokens scored at a time: the logits of all would be the largest tensor by far


class Prompt(NamedTuple):
    ids: list[int]
    split: int = 0  # ids before the question; 0 if it does not follow the text, or may not
    in_view: str = "unknown"  # yes or no: the question is known when the text is pruned
    cut: bool = False  # to the context, in the middle


class Used(NamedTuple):
    """What one request took."""

    tokens: int  # of the prompt
    prefilled: int  # of them, by the prefill
    in_view: str
    cut: bool


class SlimLM(LM):
    """A checkpoint with a schedule and a rule.

    Set for each task: `question(doc)` returns the end of a prompt that may come later, "" if the
    prompt asks before the text, None if that is not known; `used` gathers what requests took.
    """

    def __init__(
        self, ckpt: Checkpoint, later: bool = False, out: Path | None = None, max_len: int = 0
    ):
        super().__init__()
        self.ckpt = ckpt
        self.later = later
        self.out = out
        self.max_len = max_len or ckpt.config.max_len
        self.tok = tokenizer.load(ckpt.folder, ckpt.config.vocab_size)
        self.engine = None  # started when an answer is not known yet
        self.question = lambda doc: None
        self.used: list[Used] = []
        old = out.read_text() if out and out.exists() else ""
        self.known = read_answers(old, out)
        self.torn = bool(old) and not old.endswith("\n")  # by a run that was killed

    # ---- what the harness asks for

    def generate_until(self, requests, disable_tqdm=False) -> list[str]:
        answers = []
        for r in requests:
            text, given = r.args
            options = normal_options(given)
            prompt = self.read(text, options["max_gen_toks"], self.question(r.doc))
            answers.append(self.remember(prompt, options))
        return answers

    def loglikelihood(self, requests, disable_tqdm=False) -> list[tuple[float, bool]]:
        found = []
        for r in requests:
            prompt, wanted = self.pair(*r.args, self.question(r.doc))
            found.append(tuple(self.remember(prompt, wanted)))
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm=False) -> list[float]:
        """Score whole texts from their first token on; nothing of them is pruned."""
        sums = []
        for r in requests:
            ids = self.tok.encode(r.args[0])
            total = 0.0
            for window in get_rolling_token_windows(ids, self.start_id, self.max_len - 1, 1):
                before, answer = make_disjoint_window(window)
                total += self.remember(Prompt(before), answer)[0]
            sums.append(total)
        return sums

    def apply_chat_template(self, chat_history, add_generation_prompt=True) -> str:
        """Hand the messages over as they are; `read` applies the model's own template."""
        return MESSAGES + json.dumps([dict(message) for message in chat_history])

    def chat_template(self, chat_template=False) -> str:
        return getattr(self.tok.template, "source", "")

    @property
    def tokenizer_name(self) -> str:
        return str(self.ckpt.folder)

    # ---- texts to ids

    @property
    def start_id(self) -> int:
        return self.tok.bos_id if self.tok.bos_id is not None else min(self.ckpt.stop, default=0)

    def read(self, prompt: str, room: int, question: str | None = None) -> Prompt:
        """Return the ids of a prompt, and where in them its question begins, if that is known.

        A prompt that is too long is cut in the middle of its longest text, as LongBench does.
        """
        chat = prompt.startswith(MESSAGES)
        messages = [{"role": "user", "content": prompt}]
        if chat:
            messages = json.loads(prompt.removeprefix(MESSAGES))
        longest = max(messages, key=lambda message: len(message["content"]))

        def ids_with(text: str) -> list[int]:
            longest["content"] = text
            return chat_ids(self.tok, messages) if chat else self.plain(text)

        text = longest["content"]
        ids = ids_with(text)
        excess = len(ids) + room - self.max_len
        cut = excess > 0
        if cut:
            inner = self.tok.encode(text)
            half = (len(inner) - excess - 8) // 2  # the seam may take a few tokens more
            if half < 1:
                raise ValueError(
                    f"a prompt of {len(ids):,} tokens and {room:,} to answer cannot be cut to "
                    f"{self.max_len:,} tokens in its longest message; leave more room with "
                    "--max-len, or the task out"
                )
            text = self.tok.decode(inner[:half]) + self.tok.decode(inner[-half:])
            ids = ids_with(text)
        if question is None:
            return Prompt(ids, cut=cut)
        start = text.rfind(question) if question else -1
        split = common(ids, ids_with(text[:start])) if start >= 0 else 0
        return Prompt(ids, split, "no" if split else "yes", cut)

    def plain(self, text: str) -> list[int]:
        return ([] if self.tok.bos_id is None else [self.tok.bos_id]) + self.tok.encode(text)

    def pair(
        self, context: str, answer: str, question: str | None = None
    ) -> tuple[Prompt, list[int]]:
        """Return what to read and the ids to score; last spaces of a context go to the answer."""
        if context.startswith(MESSAGES):
            prompt = self.read(context, len(self.tok.encode(answer)), question)
            return prompt, self.tok.encode(answer, after=prompt.ids)
        if not context:
            return Prompt([self.start_id]), self.tok.encode(answer)
        spaced = context[len(context.rstrip()) :] + answer
        prompt = self.read(context.rstrip(), len(self.tok.encode(spaced)), question)
        whole = self.plain(context + answer)
        if prompt.cut or len(prompt.ids) >= len(whole):  # no part of the whole, or all of it
            return prompt, self.tok.encode(spaced, after=prompt.ids)
        return prompt, whole[len(prompt.ids) :]

    # ---- to the engine

    def remember(self, prompt: Prompt, wanted: list[int] | dict):
        """Return the answer to a request: from the file, or from the engine and then in the file.

        wanted: ids to score, or options of an answer to write.
        """
        ids = prompt.ids
        split = prompt.split if self.later else 0
        in_view = prompt.in_view if self.later else "yes"
        self.used.append(Used(len(ids), split or len(ids), in_view, prompt.cut))
        depends = json.dumps([self.ckpt.identity, split, ids, wanted], sort_keys=True, default=str)
        key = hashlib.sha256(depends.encode()).hexdigest()
        if key not in self.known:
            self.engine = self.engine or slim.start(self.ckpt)
            answer = self.score if isinstance(wanted, list) else self.write
            self.known[key] = answer(ids, split, wanted)
            self.keep({"key": key, "tokens": len(ids), "value": self.known[key]})
        return self.known[key]

    def keep(self, record: dict) -> None:
        if self.out:
            with self.out.open("a") as file:
                file.write("\n" * self.torn + json.dumps(record) + "\n")
            self.torn = False

    def write(self, ids: list[int], split: int, options: dict) -> str:
        """Generate up to a stop of `until` or to max_gen_toks."""
        if split:
            self.engine.prefill(ids[:split])
        tokens = self.engine.generate(
            ids[split:],
            options["max_gen_toks"],
            options["temperature"],
            options["top_p"],
            seed=0,
            follow_up=split > 0,
        )
        return "".join(self.tok.stream(tokens, options["until"]))

    def score(self, ids: list[int], split: int, answer: list[int]) -> tuple[float, bool]:
        """Return the log-likelihood of the answer's ids, and whether each is the likeliest."""
        total = 0.0
        greedy = True
        begin = 0
        for logits in self.answer_logits(ids, split, answer):
            wanted = torch.tensor(answer[begin : begin + len(logits)])
            found = logits.cpu().double().log_softmax(-1)
            total += float(found.gather(1, wanted[:, None]).sum())
            greedy &= bool((found.argmax(-1) == wanted).all())
            begin += len(logits)
        return total, greedy

    def answer_logits(self, ids: list[int], split: int, answer: list[int]) -> Iterator[Tensor]:
        """Yield logits (n, V) for the answer's ids, in order.

        A pruned engine takes them one by one, and chooses at each, as when it writes them itself.
        """
        first = self.engine.prefill(ids[: split or len(ids)], room=len(answer))
        if split:
            first = self.engine.extend(ids[split:])
        yield first[None]
        at_once = SLICE if len(self.engine.kv.stages) == 1 else 1
        fed = answer[:-1]
        for begin in range(0, len(fed), at_once):
            yield self.engine.extend(fed[begin : begin + at_once], all_logits=True)

    def flops(self) -> float:
        """Return the share of a dense prefill's FLOPs that the requests' prefills took."""
        config = self.ckpt.config
        block_len = self.ckpt.settings.block_len
        spent = 0.0
        dense = 0.0
        for used in self.used:
            spent += prefill_flops(
                config, used.prefilled, self.ckpt.schedule, block_len, self.ckpt.local
            )
            dense += prefill_flops(config, used.prefilled, {}, block_len)
        return spent / dense


def read_answers(text: str, path: Path | None) -> dict[str, object]:
    """Return {key: answer} of a file's text; raise ValueError if it holds something else."""
    known = {}
    for line in filter(None, text.split("\n")):
        if not (line.startswith(RECORD) or RECORD.startswith(line)):
            raise ValueError(
                f"--out {path} holds {line!r:.60}, which is no answer; give another file"
            )
        with contextlib.suppress(ValueError):  # the last line of a run that was killed
            record = json.loads(line)
            known[record["key"]] = record["value"]
    return known


def normal_options(given: dict) -> dict:
    """Return a task's options for an answer, under the names that the harness normalises them to.

    Raises ValueError for others that would change the answer.
    """
    options = dict(normalize_gen_kwargs(given))
    sampled = options.pop("do_sample")
    temperature = float(options.pop("temperature", 0.0))
    known = {
        "max_gen_toks": options.pop("max_gen_toks"),
        "until": [stop for stop in options.pop("until") if stop],
        "temperature": temperature if sampled else 0.0,
        "top_p": float(options.pop("top_p", 1.0)),
    }
    harmless = {"num_beams": 1, "repetition_penalty": 1.0}
    for name, value in options.items():
        of_sampling = name in ("top_k", "min_p", "typical_p")
        if value is not None and harmless.get(name) != value and (sampled or not of_sampling):
            raise ValueError(
                f"a task asks for {name} {value!r:.40}, which Slim cannot do; leave the task out"
            )
    return known
