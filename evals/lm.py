"""The engine as a model of lm-evaluation-harness: it continues texts and scores them.

A request is ids to read and ids or stops to go on with. `later` reads the text first and the question as a
follow-up, so that the text is pruned before the question is known. Every answer goes to a file as soon as it is
there, under a key of all it depends on, and is not computed again by a second run.
"""

import contextlib
import hashlib
import json
from pathlib import Path

import torch
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

import slim
import tokenizer
from loading.plan import Checkpoint, prefill_flops
from serve.api import chat_ids
from serve.texts import common

MESSAGES = "messages "  # opens a prompt that is a conversation, as JSON
MARKS = "\nQuestion:", "\n\nQuestion", "\nWhat ", "\n\n", "\n"  # where a question may begin; the first that is found


class SlimLM(LM):
    """A checkpoint with a schedule and a rule. `used` gathers what each request of the present task took."""

    def __init__(self, ckpt: Checkpoint, later: bool = False, out: Path | None = None, max_len: int = 0):
        super().__init__()
        self.ckpt, self.later, self.out = ckpt, later, out
        self.max_len = max_len or ckpt.config.max_len
        self.tok, self.engine, self.used = tokenizer.load(ckpt.folder), None, []
        self.known, self.torn = {}, False
        if out and out.exists():
            old = out.read_text()
            self.torn = bool(old) and not old.endswith("\n")
            for line in old.splitlines():
                with contextlib.suppress(ValueError):  # the last line of a run that was killed
                    record = json.loads(line)
                    self.known[record["key"]] = record["value"]

    # ---- what the harness asks for

    def generate_until(self, requests, disable_tqdm=False) -> list[str]:
        return [self.remember(self.read(r.args[0], r.args[1].get("max_gen_toks", 256)), r.args[1]) for r in requests]

    def loglikelihood(self, requests, disable_tqdm=False) -> list[tuple[float, bool]]:
        return [tuple(self.remember(*self.pair(*r.args))) for r in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm=False) -> list[float]:
        """Of the whole text, from its first token on; all of it stands in the tail, so nothing is pruned."""
        sums = []
        for r in requests:
            windows = get_rolling_token_windows(self.tok.encode(r.args[0]), self.start_id, self.max_len - 1, 1)
            pairs = [make_disjoint_window(window) for window in windows]
            sums.append(sum(self.remember((ids, 0), answer)[0] for ids, answer in pairs))
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

    def read(self, prompt: str, room: int) -> tuple[list[int], int]:
        """Return a prompt's ids, and how many of them stand before its question, or 0 if that is not known.

        What is too long is cut in the middle of its longest text, as LongBench does.
        """
        chat = prompt.startswith(MESSAGES)
        messages = json.loads(prompt.removeprefix(MESSAGES)) if chat else [{"role": "user", "content": prompt}]
        longest = max(messages, key=lambda message: len(message["content"]))

        def ids_with(text):
            longest["content"] = text
            return chat_ids(self.tok, messages) if chat else self.plain(text)

        text = longest["content"]
        ids = ids_with(text)
        if (excess := len(ids) + room - self.max_len) > 0:
            inner = self.tok.encode(text)
            half = (len(inner) - excess - 8) // 2  # the seam may take a few tokens more
            if half < 1:
                raise ValueError(
                    f"a prompt of {len(ids):,} tokens and {room:,} to answer cannot be cut to {self.max_len:,} tokens "
                    "in its longest message; leave more room with --max-len, or the task out"
                )
            text = self.tok.decode(inner[:half]) + self.tok.decode(inner[-half:])
            ids = ids_with(text)
        at = next((at for mark in MARKS if (at := text.rfind(mark)) > len(text) // 2), -1)
        return ids, common(ids, ids_with(text[:at])) if at >= 0 else 0

    def plain(self, text: str) -> list[int]:
        return ([] if self.tok.bos_id is None else [self.tok.bos_id]) + self.tok.encode(text)

    def pair(self, context: str, answer: str) -> tuple[tuple[list[int], int], list[int]]:
        """Return what to read and the ids to score; a space at the end of the context belongs to the answer."""
        if context.startswith(MESSAGES):
            wanted = self.tok.encode(answer)
            return self.read(context, len(wanted)), wanted
        if not context:
            return ([self.start_id], 0), self.tok.encode(answer)
        n = len(context) - len(context.rstrip())
        ids = self.read(context.rstrip(), len(self.tok.encode(context[len(context) - n :] + answer)))
        whole = self.plain(context + answer)
        if len(ids[0]) >= len(whole) or self.plain(context[: len(context) - n]) != ids[0]:  # cut, or nothing to score
            return ids, self.tok.encode(context[len(context) - n :] + answer)
        return ids, whole[len(ids[0]) :]

    # ---- to the engine

    def remember(self, prompt: tuple[list[int], int], what):
        """Return the answer to a request: from the file, or from the engine and then in the file."""
        ids, text_end = prompt
        split = text_end if self.later else 0
        self.used.append((len(ids), split or len(ids), bool(split)))
        key = [self.ckpt.identity, split, ids, what]
        key = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
        if key not in self.known:
            self.engine = self.engine or slim.start(self.ckpt)
            value = self.score(ids, split, what) if isinstance(what, list) else self.write(ids, split, what)
            self.known[key] = value
            if self.out:
                with self.out.open("a") as file:
                    file.write("\n" * self.torn + json.dumps({"key": key, "tokens": len(ids), "value": value}) + "\n")
                self.torn = False
        return self.known[key]

    def write(self, ids: list[int], split: int, options: dict) -> str:
        """Generate up to a stop of `until` or to max_gen_toks."""
        if split:
            self.engine.prefill(ids[:split])
        sampled = options.get("do_sample", False)
        tokens = self.engine.generate(
            ids[split:], options.get("max_gen_toks", 256), float(options.get("temperature", 0.0)) if sampled else 0.0,
            options.get("top_p", 1.0), seed=0, follow_up=split > 0,
        )  # fmt: skip
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else until
        return "".join(self.tok.stream(tokens, filter(None, until)))

    def score(self, ids: list[int], split: int, answer: list[int]) -> tuple[float, bool]:
        """Return the log-likelihood of the answer's ids, and whether each is the likeliest.

        A pruned engine takes them one by one, and chooses at each, as when it writes them itself.
        """
        engine = self.engine
        logits = [engine.prefill(ids[: split or len(ids)], room=len(answer))]
        if split:
            logits = [engine.extend(ids[split:])]
        if len(engine.kv.stages) == 1 and len(answer) > 1:
            logits += engine.extend(answer[:-1], all_logits=True)
        elif len(answer) > 1:
            logits += [engine.extend([i]) for i in answer[:-1]]
        found = torch.stack([*logits]).cpu().double().log_softmax(-1)
        picked = found[torch.arange(len(answer)), torch.tensor(answer)]
        return float(picked.sum()), bool((found.argmax(-1) == torch.tensor(answer)).all())

    def flops(self) -> float:
        """Return the share of a dense prefill's operations that the requests so far took; what follows is left out."""
        c, block_len = self.ckpt.config, self.ckpt.settings.block_len
        spent = sum(prefill_flops(c, n, self.ckpt.schedule, block_len) for _, n, _ in self.used)
        return spent / sum(prefill_flops(c, n, {}, block_len) for _, n, _ in self.used)
