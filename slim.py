"""Read a long text with a language model, and answer questions about it.

    python slim.py --ckpt llama3.1-8b --prompt file.txt

`load` checks everything it can before it allocates memory: it loads the whole checkpoint, or
refuses it with one line that says why. An `Engine` holds one conversation: `prefill` starts it,
`extend` continues it with a decoded token or a follow-up, and `generate` calls both in a loop.
`read` starts it with a text whose first question comes later.
"""

if __name__ == "__main__":  # start the command line, which imports this file as the module `slim`
    import os
    import runpy
    import signal

    def stop(*_):  # Ctrl-C while torch is imported
        os.write(2, b"slim: interrupted\n")
        os._exit(130)

    signal.signal(signal.SIGINT, stop)
    runpy.run_module("cli", run_name="__main__", alter_sys=True)

import operator
import time
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

import tokenizer
from kvcache import KVCache
from loading.files import format_bytes
from loading.saved import check_contents, check_extra, check_saved, read_saved, write_saved
from loading.weights import load_weights
from model import Model
from planning import probe
from planning.checkpoint import Checkpoint
from planning.draft import Drafter, row_cost, usual_draft
from planning.memory import KERNEL_BYTES, STEP_ROWS, check_memory, fits, step_bytes
from planning.probe import PROBE_LEN
from planning.settings import check_count, check_draft, check_sampling


def load(
    ckpt,
    device="auto",
    dtype="auto",
    schedule="auto",
    score="lookup",
    *,
    n_prompt=1,
    n_new=0,
    progress=None,
    **settings,
) -> "Engine":
    """Load a checkpoint and return an Engine.

    schedule: "auto" (by the model's lookup heads), "paper", "dense", {} or {boundary: tokens, or a
    share of the prompt}. score: a name in prune.RULES, a prune.Rule, or a function of attention
    weights. n_prompt, n_new: tokens to check memory and pin it for, so that the first token does
    not wait. progress(done, total) follows the weights, in bytes. settings: fields of
    planning.settings.Settings. Raises ValueError or FileNotFoundError, in one line, before anything
    is allocated.
    """
    opened = Checkpoint.open(ckpt, device, dtype, schedule, score, **settings)
    return start(opened, n_prompt, n_new, progress)


def start(ckpt: Checkpoint, n_prompt=1, n_new=0, progress=None) -> "Engine":
    """Load the weights of a checkpoint that was opened, and return the Engine; see `load`."""
    check_count(n_prompt, "n_prompt", least=1)
    check_count(n_new, "n_new")
    if not callable(progress or print):
        raise ValueError(f"progress is {progress!r}; it must be a function like print")
    check_start(ckpt, n_prompt, n_new)
    engine = build(ckpt, n_prompt, n_new, progress, KVCache, Model, Engine)
    engine.prepare(n_prompt, n_new)
    return engine


def check_start(ckpt: Checkpoint, n_prompt: int, n_new: int) -> None:
    """Raise ValueError unless a first prompt fits, and the probe if it has to come before it.

    The heads may then ask for another schedule than is checked here: `Engine.prepare` checks that.
    """
    if ckpt.needs_probe:
        n_prompt = max(n_prompt, 2 * PROBE_LEN)
    check_memory(ckpt, n_prompt, n_new)


def build(ckpt: Checkpoint, n_prompt, n_new, progress, kv_kind, model_kind, engine_kind):
    """Lay out the KV, load the weights, join them; `parallel` passes classes of its own."""
    c = ckpt.config
    settings = ckpt.settings
    kv = kv_kind(
        c.n_layers,
        c.n_kv_heads,
        c.head_dim,
        c.dim,
        settings.block_len,
        ckpt.dtype,
        ckpt.device,
        settings.overlap,
    )
    if ckpt.needs_probe:
        kv.reset(2 * PROBE_LEN, {})
    else:
        kv.reset(n_prompt, ckpt.schedule, n_new)
    weights = load_weights(
        ckpt.tensors, c, ckpt.device, ckpt.dtype, ckpt.kept_as, ckpt.exact, progress
    )
    model = model_kind(
        c,
        weights,
        kv,
        ckpt.rule,
        settings.unit_len,
        ckpt.window,
        ckpt.gamma,
        ckpt.chunk,
        ckpt.local,
    )
    return engine_kind(ckpt, model)


class Engine:
    """One conversation with a model. Make it with `load`."""

    def __init__(self, ckpt: Checkpoint, model: Model):
        self.ckpt = ckpt
        self.model = model
        self.config = ckpt.config
        self.kv = model.kv
        self.steps = 0  # of all conversations: shows a generator that another caller ran one
        self.draft = usual_draft(ckpt)  # tokens that `generate` guesses at most in a step
        Engine.forget(self)  # a subclass's would tell other ranks, and is not connected yet

    def forget(self) -> None:
        """Drop the conversation; the next prompt starts a new one."""
        self.running = self.ckpt  # how this conversation is run: its schedule may be its own
        self.ids: list[int] = []  # tokens run so far
        self.pending: list[int] = []  # generated, but not yet run through the model
        self.draft_left: list[int] = []  # run as guesses by the last step, and not accepted yet
        self.usable = False  # not before a prefill, while a step runs, or after a broken one
        self.prefill_s = 0.0
        self.drafted = 0  # tokens that were guessed
        self.accepted = 0  # of which the model wrote so many

    @cached_property
    def tokenizer(self):
        """The checkpoint's tokenizer, loaded when first asked for: the engine needs ids only."""
        return tokenizer.load(self.ckpt.folder, self.config.vocab_size)

    def prefill(
        self, ids, room: int = 0, schedule=None, keep_last: int = 0, reserve: int | None = None
    ) -> Tensor:
        """Start afresh with a prompt; return the logits (V,) after it, in at least float32.

        room: new tokens that may follow. schedule: one for this conversation instead of the
        engine's. keep_last: ids at the end that are never pruned, so that `rewind` can go back
        among them. reserve: of `room`, the tokens to check memory for now, by default all. Raises
        ValueError for ids outside the vocabulary, or too little memory.
        """
        return self.start_afresh(ids, room, schedule, keep_last, reserve)[0]

    def read(
        self, ids, room: int = 0, schedule=None, keep_last: int = 0, reserve: int | None = None
    ) -> None:
        """Start afresh with a text that is asked about later; arguments and errors of `prefill`.

        Only the layers below the first boundary run. The first `extend` or `generate` chooses the
        blocks as if text and question had been one prompt, and runs the layers above. One
        difference: local attention is that of the text alone.
        """
        self.start_afresh(ids, room, schedule, keep_last, reserve, hold=True)

    def start_afresh(
        self, ids, room, schedule, keep_last: int, reserve: int | None, hold: bool = False
    ) -> Tensor:
        ids = self.check_ids(ids)
        check_count(keep_last, "keep_last")
        keep_last = min(keep_last, len(ids) - 1)
        room_now = at_most(room, reserve)
        ckpt = self.ckpt if schedule is None else self.ckpt.with_schedule(schedule)
        if ckpt.needs_probe:
            self.check_room(ckpt, len(ids), room_now, keep_last)  # before the probe drops anything
            self.find_heads()
            ckpt = self.ckpt.with_schedule(ckpt.asked_schedule if schedule is None else schedule)
        self.check_room(ckpt, len(ids), room_now, keep_last)
        self.forget()
        self.rank_by(ckpt)
        started = time.perf_counter()
        self.kv.reset(len(ids), ckpt.schedule, room, keep_last)
        logits = self.run(ids, hold=hold)
        self.prefill_s = time.perf_counter() - started
        return logits

    def prepare(self, n_prompt: int, n_new: int) -> None:
        """Find the lookup heads if need be, and lay out the KV as they ask for."""
        if self.ckpt.needs_probe:
            self.find_heads()
            self.check_room(self.ckpt, n_prompt, n_new, 0)
            self.kv.reset(n_prompt, self.ckpt.schedule, n_new)

    def find_heads(self) -> None:
        """Find the heads that look things up (planning/probe.py); drops the conversation."""
        self.forget()
        strengths = self.known_strengths()
        if strengths is None:
            strengths = self.measure_heads(probe.random_ids(self.config.vocab_size, self.is_text()))
            probe.write_cache(self.ckpt.probe_key, strengths)
        self.ckpt = self.ckpt.with_strengths(strengths)
        self.rank_by(self.ckpt)

    def known_strengths(self) -> Tensor | None:
        return probe.read_cache(self.ckpt.probe_key, self.config.n_layers, self.config.n_heads)

    def measure_heads(self, ids: list[int]) -> Tensor:
        return probe.measure(self.model, ids)

    def is_text(self):
        """Return a function that tells ids of text from special and unused ones.

        Without a tokenizer, every id is text: the engine itself needs none.
        """
        try:
            return self.tokenizer.bytes
        except (OSError, ValueError):
            return lambda token: True

    def rank_by(self, ckpt: Checkpoint) -> None:
        """Let a run's rule rank the blocks, if it is another one than now; and its local window."""
        self.running = ckpt
        self.model.local = ckpt.local
        if ckpt.rule != self.model.rule:
            self.model.rule = ckpt.rule
            self.model.window = ckpt.window
            self.model.gamma = ckpt.gamma

    def read_on(self, ids, room: int = 0) -> None:
        """Append ids to a text that waits for its question (`read`), and let it wait on.

        room: tokens after these to check memory for. Raises ValueError if no text waits, for wrong
        ids, or too little memory.
        """
        check_count(room, "room")
        ids = self.check_ids(ids)
        if not self.usable or self.kv.held is None:
            raise ValueError("no text waits for its question; call read first")
        self.check_growth(len(ids), room, 0, hold=True)
        self.kv.make_room(self.kv.n_tokens + len(ids), room)
        self.run(ids, hold=True)

    def extend(self, ids=(), all_logits: bool = False, room: int = 0, draft=()) -> Tensor:
        """Append ids, one (a decode step) or many (a follow-up); return the logits (V,) after them.

        draft: ids that may come next; they are run too, and `accept` appends them. The logits are
        then (1 + drafted, V): after ids, and after each drafted token. all_logits: after every
        token that is run, (T, V). room: tokens after these to check memory for.
        Tokens that `generate` has yielded but not run are run first. Raises ValueError before any
        prefill, after an interrupted step, for wrong ids, or too little memory.
        """
        check_count(room, "room")
        ids = self.check_ids([*self.pending, *ids] if self.pending else ids)
        draft = self.check_ids(draft) if len(draft) else []
        if not self.usable:
            raise ValueError("there is no complete conversation to extend; call prefill first")
        n_rows = len(ids) + len(draft)
        n_logits = n_rows if all_logits else 1 + len(draft)
        self.check_growth(n_rows, room, n_logits)
        self.kv.make_room(self.kv.n_tokens + n_rows, room)
        logits = self.run(ids, n_logits, draft)
        self.pending = []
        return logits if all_logits or draft else logits[0]

    def accept(self) -> None:
        """Append the next token of the last step's draft, which was run already.

        Raises ValueError if none is left, or another token is pending.
        """
        if not self.usable:
            raise ValueError("there is no complete conversation to extend; call prefill first")
        if not self.draft_left or self.pending not in ([], self.draft_left[:1]):
            raise ValueError(
                f"the draft goes on with {self.draft_left[:1]} and {self.pending} is pending; "
                "accept needs a drafted token that is no other than the pending one"
            )
        self.usable = False
        self.model.accept()
        self.ids.append(self.draft_left.pop(0))
        self.pending = []
        self.accepted += 1
        self.usable = True

    def finish(self) -> None:
        """Let a text that waits for its question (`read`) choose blocks by its own end.

        Does nothing if none waits. Raises ValueError before any prefill, or if memory is short.
        """
        if not self.usable:
            raise ValueError("there is no complete conversation to finish; call read first")
        if self.kv.held is not None:
            self.check_growth(0, 0, 1)
            self.run([])

    def run(self, ids: list[int], n_logits: int = 1, draft=(), hold: bool = False) -> Tensor:
        self.usable = False
        self.steps += 1
        self.draft_left = list(draft)
        chooses_first = self.kv.held is not None and not hold
        n_again = self.ranking_rows(len(ids)) if chooses_first else 0
        again = self.ids[len(self.ids) - n_again :]
        new = torch.tensor([*again, *ids, *draft])
        started = time.perf_counter()
        logits = self.model.step(new, n_logits, len(draft), n_again, hold)
        logits = logits.clone()  # a normal tensor, which callers may write to
        # this waits for the device too, so the seconds in stats are of finished work
        if not logits.isfinite().all():
            raise ValueError(
                "the logits are not finite: the weights are bad, or "
                f"{self.kv.dtype} is too narrow; widen --dtype"
            )
        self.usable = True
        self.ids += ids
        self.drafted += len(draft)
        if chooses_first:
            self.prefill_s += time.perf_counter() - started  # the rest of reading the text
        return logits

    def ranking_rows(self, n_new: int) -> int:
        """Return how many held tokens run again: those that rank blocks beside n_new new ones.

        Not those that were read locally, as they would see more now; but a step needs one row.
        """
        wanted = max(0, self.model.window - n_new)
        read_in_full = max(0, self.kv.n_tokens - self.kv.local_rows)
        return max(min(wanted, read_in_full), 1 if n_new == 0 else 0)

    def rewind(self, n: int | None = None) -> None:
        """Keep the first n tokens, by default the prompt, and forget the rest.

        Nothing is read again. Active blocks stay active until the next tokens choose. A dense
        engine then continues bit for bit as after a new prefill. Raises ValueError for n outside
        the tail.
        """
        if not self.usable:
            raise ValueError("there is no complete conversation to rewind; call prefill first")
        if n is None:
            n = self.kv.n_prompt
        least = self.kv.shortest
        most = self.kv.n_tokens
        is_number = hasattr(n, "__index__") and not isinstance(n, bool)
        if not is_number or not least <= n <= most:
            raise ValueError(f"cannot rewind to {n!r} tokens; it can be to {least}..{most} of them")
        n = operator.index(n)
        self.kv.rewind(n)
        self.ids = self.ids[:n]
        self.pending = []
        self.draft_left = []
        self.steps += 1

    # ---- a conversation in a file -----------------------------------------------------

    def save(self, path, extra: dict | None = None) -> None:
        """Write the conversation to a safetensors file, completely or not at all.

        extra: a dict of JSON that is kept with it. A text that waits for its question is finished
        first (`finish`). Raises ValueError if there is no conversation, its rule has no name, extra
        is not JSON, or the file cannot be written.
        """
        if not self.usable:
            raise ValueError("there is no complete conversation to save; call prefill first")
        if not self.model.rule.name:
            raise ValueError(
                "the scoring function has no name; give it one: score=prune.Rule('name', function)"
            )
        check_extra(extra)
        self.finish()
        layout, tensors = self.kv.state()
        header = {
            "ckpt": str(self.ckpt.folder.absolute()),
            "identity": self.running.identity,
            "kv": layout,
            "ids": self.ids,
            "pending": self.pending,
            "prefill_s": self.prefill_s,
            "extra": {} if extra is None else extra,
        }
        write_saved(path, header, tensors)

    def resume(self, path, room: int = 0) -> dict:
        """Continue a saved conversation, bit for bit as if it had never stopped; return its extra.

        Raises ValueError if the file is damaged, was saved with other weights or settings, or
        does not fit into memory; the engine then keeps what it had before.
        """
        header, file = read_saved(path)
        ckpt = self.ckpt  # its lookup heads are known: `load` ran the probe
        check_saved(path, header, ckpt.identity)
        ids = header["ids"]
        self.check_ids(ids + header["pending"])
        check_contents(path, header, file, self.config, ckpt)
        layout = header["kv"]
        n_last = len(ids) - layout["n_prunable"]
        homes = [name for name in file.keys() if ".home." in name]
        n_homes = sum(file.get_slice(name).get_shape()[0] for name in homes)
        self.check_room(ckpt, len(ids), room, n_last, n_homes)
        self.forget()
        self.rank_by(ckpt)
        self.kv.load_state(layout, file.get_tensor, ckpt.schedule, room)
        self.ids = ids
        self.pending = header["pending"]
        self.prefill_s = header["prefill_s"]
        self.usable = True
        self.steps += 1
        return header["extra"]

    # ---- checks -----------------------------------------------------------------------

    def check_room(
        self, ckpt: Checkpoint, n: int, room: int, keep_last: int, homes: int | None = None
    ) -> None:
        """Raise ValueError unless n tokens fit in place of those here; see `check_memory`."""
        check_count(room, "room")
        now = self.kv.stats()
        loaded = ckpt.weight_bytes + KERNEL_BYTES + now["kv_gpu_bytes"] + now["held_bytes"]
        pruned = now["kv_cpu_bytes"] + now["aux_cpu_bytes"]
        check_memory(ckpt, n, room, keep_last=keep_last, homes=homes, loaded=loaded, pruned=pruned)

    def check_growth(self, n_rows: int, room: int, n_logits: int, hold: bool = False) -> None:
        """Raise ValueError unless n_rows more tokens, and room after them, fit beside what is here.

        A decode step was planned, mostly grows nothing and is then not checked: asking what is free
        takes 1 ms. hold: the step ends at the first boundary; without it, the first step of a held
        text has the rows of all its tokens above.
        """
        kv = self.kv
        waits = kv.held is not None
        end = kv.n_tokens + n_rows
        planned = n_rows <= STEP_ROWS and n_logits <= STEP_ROWS and not waits
        if planned and kv.growth_bytes(end) == 0 and not kv.exchange_allocates():
            return
        slots = [stage.n_slots for stage in kv.stages]
        n_tail = end - kv.tail_start
        need = kv.growth_bytes(end + room)
        if hold:
            need += step_bytes(self.running, slots[:1], n_rows, n_tail)
            need += n_tail * self.config.dim * kv.dtype.itemsize  # held rows and new ones, joined
        elif waits:
            n_lower = self.ranking_rows(n_rows) + n_rows
            above = dict(first=True, n_lower=n_lower, n_logits=n_logits)
            need += step_bytes(self.running, slots, n_tail, n_tail, **above)
        else:
            need += step_bytes(self.running, slots, n_rows, n_tail, n_logits=n_logits)
        pruned = kv.exchange_bytes()
        if not fits(kv.device, need, pruned):
            what = f"{n_rows:,} more tokens need"
            advice = "ask for less, or start again with more room"
            if waits and not hold:
                more = f", with {n_rows:,} more tokens," if n_rows else ""
                what = f"the layers above the boundary{more} need"
                advice = "read a shorter text"
            raise ValueError(
                f"{what} {format_bytes(need)} on {kv.device} and "
                f"{format_bytes(pruned)} for pruned blocks, more than is free; {advice}"
            )

    def check_ids(self, ids) -> list[int]:
        try:
            ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
            if any(isinstance(i, bool) for i in ids):
                raise TypeError
            ids = [operator.index(i) for i in ids]
        except TypeError:
            raise ValueError(
                f"token ids must be a flat list of whole numbers, not {ids!r:.60}"
            ) from None
        if not ids:
            raise ValueError("there are no token ids to run; give at least one")
        vocab_size = self.config.vocab_size
        outside = [i for i in ids if not 0 <= i < vocab_size]
        if outside:
            raise ValueError(
                f"token id {outside[0]} is outside 0..{vocab_size - 1}, the model's vocabulary; "
                "tokenizer and checkpoint do not belong together"
            )
        return ids

    # ---- answers ----------------------------------------------------------------------

    def generate(
        self,
        ids,
        max_new_tokens: int,
        temperature=0.0,
        top_p=1.0,
        seed=None,
        schedule=None,
        follow_up=False,
        keep_last=0,
        reserve=None,
        on_token=None,
        draft=None,
    ) -> Iterator[int]:
        """Return an iterator of new ids after a prompt, or after a follow-up to the conversation.

        temperature: 0 is greedy. top_p: keep the likeliest tokens of that total probability.
        schedule, keep_last, reserve: as in `prefill`. on_token(token, logits (V,)) sees every
        choice, also of a stop token. draft: tokens to guess at most and run in one step
        (planning/draft.py), by default what pays on this device, 0 for none. They change no answer
        but by rounding, and in a pruned run because blocks are chosen once a step. Ends at
        max_new_tokens or before a stop token, which is not yielded. Raises ValueError at once for
        wrong arguments, and later if the engine was used for something else in between.
        """
        check_sampling(max_new_tokens, temperature, top_p, seed)
        check_draft(draft)
        check_count(keep_last, "keep_last")
        ids = self.check_ids(ids)
        if follow_up and (schedule is not None or keep_last):
            raise ValueError(
                "schedule and keep_last are set when a conversation starts; "
                "a follow-up cannot change them"
            )
        if schedule is not None:
            self.ckpt.with_schedule(schedule)  # raises for a wrong one now, not at the first token
        rng = torch.Generator()
        if seed is None:
            rng.seed()
        else:
            rng.manual_seed(seed)

        def begin() -> Tensor:
            if follow_up:
                return self.extend(ids, room=at_most(max_new_tokens, reserve))
            return self.prefill(ids, max_new_tokens, schedule, keep_last, reserve)

        def choose(logits: Tensor) -> int:
            return sample(logits, temperature, top_p, rng)

        most = self.draft if draft is None else draft
        return self.answer(begin, choose, max_new_tokens, most, reserve, on_token)

    def answer(
        self, begin, choose, max_new_tokens: int, most_drafted: int, reserve, on_token
    ) -> Iterator[int]:
        """Yield the tokens that choose(logits (V,)) picks, the first from begin()'s logits.

        A token is run when the next one is asked for, with a draft of what may follow. The drafted
        tokens that are then picked were run already, and are only accepted.
        """
        after = begin()[None]  # logits after the last token and after each drafted one
        drafter = Drafter(self.ids, row_cost(self.ckpt))
        for n_left in reversed(range(max_new_tokens)):
            token = choose(after[0])
            if on_token is not None:
                on_token(token, after[0])
            if token in self.ckpt.stop:
                return
            self.pending = [token]
            steps = self.steps
            yield token
            if self.steps != steps or self.pending != [token]:
                raise ValueError(
                    "the engine was used while it generated, but holds one conversation; "
                    "load a second engine"
                )
            if not n_left:
                return
            accepted = self.draft_left[:1] == [token]
            drafter.add(token, accepted)
            if accepted:
                self.accept()
                after = after[1:]
            else:
                draft = drafter.draft(min(most_drafted, n_left - 1))
                room = at_most(n_left - 1 - len(draft), reserve)
                after = self.extend(all_logits=True, room=room, draft=draft)

    @property
    def stats(self) -> dict:
        """Counters of the conversation: of `KVCache.stats`, what ranks the blocks, the seconds."""
        last_boundary = self.kv.stages[-1].layers.start  # 0 if nothing is pruned
        heads = [name for name in self.running.heads if int(name.split(".")[0]) < last_boundary]
        ranking = {"score": self.running.rule.name, "lookup_heads": heads}
        drafts = {"drafted": self.drafted, "accepted": self.accepted}
        weights = {"weights": self.ckpt.packing or "full", "weight_bytes": self.ckpt.weight_bytes}
        return self.kv.stats() | ranking | drafts | weights | {"prefill_s": self.prefill_s}


def at_most(n: int, limit: int | None) -> int:
    return n if limit is None else min(n, limit)


def sample(logits: Tensor, temperature: float, top_p: float, rng: torch.Generator) -> int:
    """Draw a token id from logits (V,); on the CPU, so that a seed means the same everywhere."""
    if temperature == 0:
        return int(logits.argmax())
    probs = torch.softmax(logits.cpu().double() / temperature, dim=-1)
    probs, order = probs.sort(descending=True)
    likelier = probs.cumsum(0) - probs  # the total before each token
    probs[likelier >= top_p] = 0  # the likeliest token always stays
    return int(order[torch.multinomial(probs, 1, generator=rng)])
