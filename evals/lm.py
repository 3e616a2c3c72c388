"""The engine as a model of lm-evaluation-harness: it continues texts and scores them.

A request is ids to read and ids or stops to go on with. `later` reads the text first and the question as a
follow-up, so that the text is pruned before the question is known; where that is, the task says (`question`).
Every answer goes to a file as soon as it is there, under a key of all it depends on, and is not computed again
by a second run.
"""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import torch
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

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
    split: int = (
        0  # ids before the question; 0 if it does not stand after the text, or nobody knows where
    )
    in_view: str = "unknown"  # whether the question is known when ids[:split or all] are pruned: yes, no or unknown
    cut: bool = False  # to the context, in the middle


class Used(NamedTuple):
    """What one request took: tokens of its prompt, those of the prefill, and see Prompt."""

    tokens: int
    prefilled: int
    in_view: str
    cut: bool


class SlimLM(LM):
    """A checkpoint with a schedule and a rule.

    For each task: `question(doc)` is the end of a prompt that may come later, "" if the prompt asks before the
    text, None if that is not known; `used` gathers what the requests took.
    """

    def __init__(
        self, ckpt: Checkpoint, later: bool = False, out: Path | None = None, max_len: int = 0
    ):
        super().__init__()
        self.ckpt, self.later, self.out = ckpt, later, out
        self.max_len = max_len or ckpt.config.max_len
        self.tok, self.engine = tokenizer.load(ckpt.folder, ckpt.config.vocab_size), None
        self.question, self.used = lambda doc: None, []
        self.known, self.torn = {}, False
        if out and out.exists():
            old = out.read_text()
            self.torn = bool(old) and not old.endswith("\n")
            for line in filter(None, old.split("\n")):
                if not (line.startswith(RECORD) or RECORD.startswith(line)):
                    raise ValueError(
                        f"--out {out} holds {line!r:.60}, which is no answer; give another file"
                    )
                with contextlib.suppress(ValueError):  # the last line of a run that was killed
                    record = json.loads(line)
                    self.known[record["key"]] = record["value"]

    # ---- what the harness asks for

    def generate_until(self, requests, disable_tqdm=False) -> list[str]:
        out = []
        for r in requests:
            text, options = r.args
            prompt = self.read(text, options.get("max_gen_toks", 256), self.question(r.doc))
            out.append(self.remember(prompt, options))
        return out

    def loglikelihood(self, requests, disable_tqdm=False) -> list[tuple[float, bool]]:
        return [tuple(self.remember(*self.pair(*r.args, self.question(r.doc)))) for r in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm=False) -> list[float]:
        """Of the whole text, from its first token on; all of it stands in the tail, so nothing is pruned."""
        sums = []
        for r in requests:
            windows = get_rolling_token_windows(
                self.tok.encode(r.args[0]), self.start_id, self.max_len - 1, 1
            )
            pairs = [make_disjoint_window(window) for window in windows]
            sums.append(sum(self.remember(Prompt(ids), answer)[0] for ids, answer in pairs))
        return sums

    def apply_chat_template(self, chat_history, add_generation_prompt=True) -> str:
        """Hand the messages over as they are: they become ids by the model's own template, in `read`."""
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

        What is too long is cut in the middle of its longest text, as LongBench does.
        """
        chat = prompt.startswith(MESSAGES)
        messages = (
            json.loads(prompt.removeprefix(MESSAGES))
            if chat
            else [{"role": "user", "content": prompt}]
        )
        longest = max(messages, key=lambda message: len(message["content"]))

        def ids_with(text):
            longest["content"] = text
            return chat_ids(self.tok, messages) if chat else self.plain(text)

        text = longest["content"]
        ids = ids_with(text)
        if cut := (excess := len(ids) + room - self.max_len) > 0:
            inner = self.tok.encode(text)
            half = (len(inner) - excess - 8) // 2  # the seam may take a few tokens more
            if half < 1:
                raise ValueError(
                    f"a prompt of {len(ids):,} tokens and {room:,} to answer cannot be cut to {self.max_len:,} tokens "
                    "in its longest message; leave more room with --max-len, or the task out"
                )
            text = self.tok.decode(inner[:half]) + self.tok.decode(inner[-half:])
            ids = ids_with(text)
        if not question:
            return Prompt(ids, 0, "unknown" if question is None else "yes", cut)
        split = common(ids, ids_with(text[:at])) if (at := text.rfind(question)) >= 0 else 0
        return Prompt(ids, split, "no" if split else "yes", cut)

    def plain(self, text: str) -> list[int]:
        return ([] if self.tok.bos_id is None else [self.tok.bos_id]) + self.tok.encode(text)

    def pair(
        self, context: str, answer: str, question: str | None = None
    ) -> tuple[Prompt, list[int]]:
        """Return what to read and the ids to score; a space at the end of the context belongs to the answer."""
        if context.startswith(MESSAGES):
            prompt = self.read(context, len(self.tok.encode(answer)), question)
            return prompt, self.tok.encode(answer, after=prompt.ids)
        if not context:
            return Prompt([self.start_id]), self.tok.encode(answer)
        n = len(context) - len(context.rstrip())
        spaced = context[len(context) - n :] + answer
        prompt = self.read(context.rstrip(), len(self.tok.encode(spaced)), question)
        whole = self.plain(context + answer)
        if prompt.cut or len(prompt.ids) >= len(whole):  # no part of the whole, or all of it
            return prompt, self.tok.encode(spaced, after=prompt.ids)
        return prompt, whole[len(prompt.ids) :]

    # ---- to the engine

    def remember(self, prompt: Prompt, what):
        """Return the answer to a request: from the file, or from the engine and then in the file."""
        ids, split = prompt.ids, prompt.split if self.later else 0
        self.used.append(
            Used(len(ids), split or len(ids), prompt.in_view if self.later else "yes", prompt.cut)
        )
        key = [self.ckpt.identity, split, ids, what]
        key = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
        if key not in self.known:
            self.engine = self.engine or slim.start(self.ckpt)
            value = (
                self.score(ids, split, what)
                if isinstance(what, list)
                else self.write(ids, split, what)
            )
            self.known[key] = value
            if self.out:
                with self.out.open("a") as file:
                    file.write(
                        "\n" * self.torn
                        + json.dumps({"key": key, "tokens": len(ids), "value": value})
                        + "\n"
                    )
                self.torn = False
        return self.known[key]

    def write(self, ids: list[int], split: int, options: dict) -> str:
        """Generate up to a stop of `until` or to max_gen_toks."""
        if split:
            self.engine.prefill(ids[:split])
        sampled = options.get("do_sample", False)
        tokens = self.engine.generate(
            ids[split:],
            options.get("max_gen_toks", 256),
            float(options.get("temperature", 0.0)) if sampled else 0.0,
            options.get("top_p", 1.0),
            seed=0,
            follow_up=split > 0,
        )
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else until
        return "".join(self.tok.stream(tokens, filter(None, until)))

    def score(self, ids: list[int], split: int, answer: list[int]) -> tuple[float, bool]:
        """Return the log-likelihood of the answer's ids, and whether each is the likeliest.

        A pruned engine takes them one by one, and chooses at each, as when it writes them itself.
        """
        engine = self.engine
        first = engine.prefill(ids[: split or len(ids)], room=len(answer))
        if split:
            first = engine.extend(ids[split:])

        def slices():
            yield first[None]
            at_once, run = SLICE if len(engine.kv.stages) == 1 else 1, answer[:-1]
            for a in range(0, len(run), at_once):
                yield engine.extend(run[a : a + at_once], all_logits=True)

        total, greedy, n = 0.0, True, 0
        for logits in slices():
            wanted = torch.tensor(answer[n : n + len(logits)])
            found = logits.cpu().double().log_softmax(-1)
            total += float(found.gather(1, wanted[:, None]).sum())
            greedy &= bool((found.argmax(-1) == wanted).all())
            n += len(logits)
        return total, greedy

    def flops(self) -> float:
        """Return the share of a dense prefill's operations that the requests so far took; what follows is left out."""
        c, block_len = self.ckpt.config, self.ckpt.settings.block_len
        spent = sum(prefill_flops(c, n, self.ckpt.schedule, block_len) for _, n, *_ in self.used)
        return spent / sum(prefill_flops(c, n, {}, block_len) for _, n, *_ in self.used)
