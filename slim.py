"""Read a long text with a language model, and answer questions about it.

    python slim.py --ckpt llama3.1-8b --prompt file.txt

`load` checks everything it can before it allocates memory: it loads the whole checkpoint, or
refuses it with one line that says why. An `Engine` holds one conversation: `prefill` starts it,
`extend` continues it with a decoded token or a follow-up, and `generate` calls both in a loop.
"""

if __name__ == "__main__":  # the command line imports this file as the module `slim`
    import runpy

    runpy.run_module("cli", run_name="__main__", alter_sys=True)

import operator
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

import tokenizer
from kvcache import KVCache, stage_layout
from loading.files import format_bytes
from loading.saved import check_contents, check_saved, read_saved, write_saved
from loading.weights import load_weights, weight_bytes
from model import Model
from planning.checkpoint import Checkpoint
from planning.memory import KERNEL_BYTES, check_memory, fits, step_bytes
from planning.schedule import format_schedule, resolve_schedule
from planning.settings import check_count, check_sampling


def load(
    ckpt,
    device="auto",
    dtype="auto",
    schedule="auto",
    score="peak",
    n_prompt=1,
    n_new=0,
    progress=None,
    **settings,
) -> "Engine":
    """Load a checkpoint and return an Engine.

    schedule: "auto", "paper", "dense", {} or {boundary: tokens, or a share of the prompt}; score: a name in
    prune.RULES, a prune.Rule, or a function of attention weights; n_prompt, n_new: tokens to check memory and pin it
    for, so that the first token does not wait; progress(done, total) follows the weights, in bytes; settings: fields
    of planning.settings.Settings. Raises ValueError or FileNotFoundError, in one line, before anything is allocated.
    """
    return start(
        Checkpoint.open(ckpt, device, dtype, schedule, score, **settings), n_prompt, n_new, progress
    )


def start(ckpt: Checkpoint, n_prompt=1, n_new=0, progress=None) -> "Engine":
    """Load the weights of a checkpoint that was opened, and return the Engine; see `load`."""
    check_count(n_prompt, "n_prompt", least=1)
    check_count(n_new, "n_new")
    if not callable(progress or print):
        raise ValueError(f"progress is {progress!r}; it must be a function like print")
    check_memory(ckpt, n_prompt, n_new)
    return build(ckpt, n_prompt, n_new, progress, KVCache, Model, Engine)


def build(
    ckpt: Checkpoint, n_prompt: int, n_new: int, progress, KVCache, Model, Engine
) -> "Engine":
    """Lay out the KV, load the weights, join them; `parallel` passes classes of its own."""
    c, s = ckpt.config, ckpt.settings
    kv = KVCache(
        c.n_layers, c.n_kv_heads, c.head_dim, c.dim, s.block_len, ckpt.dtype, ckpt.device, s.overlap
    )
    kv.reset(n_prompt, ckpt.schedule, n_new)
    weights = load_weights(ckpt.tensors, c, ckpt.device, ckpt.dtype, progress)
    return Engine(
        ckpt, Model(c, weights, kv, ckpt.rule, s.unit_len, ckpt.window, ckpt.gamma, ckpt.chunk)
    )


class Engine:
    """One conversation with a model. Make it with `load`."""

    def __init__(self, ckpt: Checkpoint, model: Model):
        self.ckpt, self.model, self.config, self.kv = ckpt, model, ckpt.config, model.kv
        self.ids: list[int] = []  # tokens run so far in this conversation
        self.pending: list[int] = []  # generated, but not yet run through the model
        self.usable = (
            False  # False before a prefill, while a step runs, and after one that was interrupted
        )
        self.steps = 0  # of all conversations; shows a generator that another caller ran one
        self.prefill_s = 0.0

    @cached_property
    def tokenizer(self):
        """The checkpoint's tokenizer, loaded when first asked for: the engine itself needs ids only."""
        return tokenizer.load(self.ckpt.folder, self.config.vocab_size)

    def prefill(self, ids, room: int = 0, schedule=None, tail: int = 0) -> Tensor:
        """Start afresh with a prompt and return the logits (V,) after it, in float32 (float64 for float64).

        room: new tokens to make room for; schedule: one for this conversation instead of the
        engine's; tail: ids at the end that are never pruned, so that `rewind` can go back among them.
        Raises ValueError for ids outside the vocabulary, or too little memory.
        """
        ids, ckpt = self.check_ids(ids), self.ckpt
        check_count(tail, "tail")
        tail = min(tail, len(ids) - 1)
        if schedule is not None:
            ckpt = replace(
                ckpt, schedule=resolve_schedule(schedule, self.config, ckpt.settings.block_len)
            )
        self.check_room(ckpt, len(ids), room, tail)
        self.forget()
        started = time.perf_counter()
        self.kv.reset(len(ids) - tail, ckpt.schedule, tail + room)
        logits = self.run(ids)[0]
        self.prefill_s = time.perf_counter() - started
        return logits

    def extend(self, ids=(), all_logits: bool = False, room: int = 0) -> Tensor:
        """Append ids, one (a decode step) or many (a follow-up), and return the logits (V,) after them.

        all_logits: those after each token that is run, (T, V). room: tokens after these to make room
        for. Tokens that `generate` has yielded but not run are run first. Raises ValueError before any
        prefill, after an interrupted step, for wrong ids, or too little memory.
        """
        check_count(room, "room")
        ids = self.check_ids([*self.pending, *ids] if self.pending else ids)
        if not self.usable:
            raise ValueError("there is no complete conversation to extend; call prefill first")
        end = self.kv.length + len(ids)
        need, entries = self.kv.growth_bytes(end + room), self.kv.exchange_entries()
        if (
            need or len(ids) > 1 or any(memory.missing(n) for memory, n in entries)
        ):  # asking what is free takes 1 ms
            slots, n_tail = [stage.n_slots for stage in self.kv.stages], end - self.kv.tail_start
            need += step_bytes(
                self.ckpt, slots, len(ids), n_tail, n_logits=len(ids) if all_logits else 1
            )
            if self.lacks(need, swap := self.kv.swap_bytes()):
                raise ValueError(
                    f"{len(ids):,} more tokens need {format_bytes(need)} on {self.kv.device} and {format_bytes(swap)} "
                    "for pruned blocks, more than is free; ask less, or start again with more room"
                )
        self.kv.make_room(end + room)
        logits = self.run(ids, len(ids) if all_logits else 1)
        self.pending = []
        return logits if all_logits else logits[0]

    def lacks(self, n_bytes: int, host: int) -> bool:
        return not fits(self.kv.device, n_bytes, host)

    def run(self, ids: list[int], n_logits: int = 1) -> Tensor:
        self.usable = False
        self.steps += 1
        logits = self.model.step(
            torch.tensor(ids), n_logits
        ).clone()  # a normal tensor, which callers may write to
        if (
            not logits.sum().isfinite()
        ):  # waits for the device too, so the seconds in stats are of finished work
            raise ValueError(
                f"the logits are not finite: bad weights, or {self.kv.dtype} too narrow; widen --dtype"
            )
        self.usable = True
        self.ids += ids
        return logits

    def forget(self) -> None:
        """Drop the conversation; the next prompt starts a new one."""
        self.ids, self.pending, self.usable, self.prefill_s = [], [], False, 0.0

    def rewind(self, n: int | None = None) -> None:
        """Keep the first n tokens, by default the prompt, and forget the rest; nothing is read again.

        Active blocks stay active until the next tokens choose. A dense engine then continues bit for
        bit as after a new prefill. Raises ValueError for n outside the tail.
        """
        if not self.usable:
            raise ValueError("there is no complete conversation to rewind; call prefill first")
        n, least = self.kv.n_prompt if n is None else n, max(1, self.kv.tail_start)
        if type(n) is not int or not least <= n <= self.kv.length:
            raise ValueError(
                f"cannot rewind to {n!r} tokens; those from {least} to {self.kv.length} can be forgotten"
            )
        self.kv.rewind(n)
        self.ids, self.pending = self.ids[:n], []
        self.steps += 1

    # ---- a conversation in a file -----------------------------------------------------

    def save(self, path, extra: dict | None = None) -> None:
        """Write the conversation to a safetensors file, completely or not at all; `extra` is JSON kept with it.

        Raises ValueError if there is none, its rule has no name, or the file cannot be written.
        """
        if not self.usable:
            raise ValueError("there is no complete conversation to save; call prefill first")
        if not self.model.rule.name:
            raise ValueError(
                "the scoring function has no name; give it one: score=prune.Rule('name', function)"
            )
        layout, tensors = self.kv.state()
        identity = self.ckpt.identity | {"schedule": format_schedule(self.kv.schedule)}
        header = {
            "ckpt": str(self.ckpt.folder.resolve()),
            "identity": identity,
            "kv": layout,
            "ids": self.ids,
            "pending": self.pending,
            "prefill_s": self.prefill_s,
            "extra": extra or {},
        }
        write_saved(path, header, tensors)

    def resume(self, path, room: int = 0) -> dict:
        """Continue a saved conversation, bit for bit as if it had never stopped; return its `extra`.

        Raises ValueError if the file is damaged, was saved with other weights or settings, or
        does not fit into memory; the engine then keeps what it had before.
        """
        header, file = read_saved(path)
        check_saved(path, header, self.ckpt.identity)
        layout, ids = header["kv"], self.check_ids(header["ids"])
        n_layers, block_len = self.config.n_layers, self.ckpt.settings.block_len
        stages = stage_layout(n_layers, layout["n_prompt"], self.ckpt.schedule, block_len)
        check_contents(path, header, file, n_layers, len(stages))
        homes = sum(file.get_slice(name).get_shape()[0] for name in file.keys() if ".home." in name)
        self.check_room(self.ckpt, len(ids), room, len(ids) - layout["n_prompt"], homes)
        self.forget()
        self.kv.load_state(layout, file.get_tensor, self.ckpt.schedule, room)
        self.ids, self.pending, self.prefill_s = ids, header["pending"], header["prefill_s"]
        self.usable, self.steps = True, self.steps + 1
        return header["extra"]

    def check_room(
        self, ckpt: Checkpoint, n: int, room: int, tail: int, homes: int | None = None
    ) -> None:
        """Raise ValueError unless n tokens fit in place of those here; see `check_memory`."""
        check_count(room, "room")
        kv = self.kv.stats()
        loaded = weight_bytes(ckpt.config, ckpt.dtype) + KERNEL_BYTES + kv["kv_gpu_bytes"]
        check_memory(ckpt, n, room, tail, homes, loaded, kv["kv_cpu_bytes"] + kv["aux_cpu_bytes"])

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
        if bad := [i for i in ids if not 0 <= i < self.config.vocab_size]:
            raise ValueError(
                f"token id {bad[0]} is outside 0..{self.config.vocab_size - 1}, the model's vocabulary; "
                "tokenizer and checkpoint do not belong together"
            )
        return ids

    def generate(
        self,
        ids,
        max_new_tokens: int,
        temperature=0.0,
        top_p=1.0,
        seed=None,
        schedule=None,
        follow_up=False,
        tail=0,
    ) -> Iterator[int]:
        """Return an iterator of new ids after a prompt, or after a follow-up to the conversation so far.

        temperature 0 is greedy; top_p keeps the likeliest tokens of that total probability; schedule and tail as in
        `prefill`. Ends at max_new_tokens or before a stop token, which is not yielded. Raises ValueError at once for
        wrong arguments, and later if the engine was used for something else in between.
        """
        check_sampling(max_new_tokens, temperature, top_p, seed)
        check_count(tail, "tail")
        ids = self.check_ids(ids)
        if follow_up and (schedule is not None or tail):
            raise ValueError(
                "schedule and tail are set when a conversation starts; a follow-up cannot change them"
            )
        if schedule is not None:
            schedule = resolve_schedule(schedule, self.config, self.ckpt.settings.block_len)
        rng = torch.Generator()
        rng.seed() if seed is None else rng.manual_seed(seed)

        def stream():
            if follow_up:
                logits = self.extend(ids, room=max_new_tokens)
            else:
                logits = self.prefill(ids, max_new_tokens, schedule, tail)
            for left in reversed(range(max_new_tokens)):
                token = sample(logits, temperature, top_p, rng)
                if token in self.ckpt.stop:
                    return
                self.pending, steps = [token], self.steps
                yield token
                if self.steps != steps:
                    raise ValueError(
                        "the engine was used while it generated, but holds one conversation; load a second engine"
                    )
                if left:
                    logits = self.extend()

        return stream()

    @property
    def stats(self) -> dict:
        """Counters of the conversation so far: those of `KVCache.stats`, and the seconds of the prefill."""
        return self.kv.stats() | {"prefill_s": self.prefill_s}


def sample(logits: Tensor, temperature: float, top_p: float, rng: torch.Generator) -> int:
    """Draw a token id from logits (V,); on the CPU, so that a seed means the same on every device."""
    if temperature == 0:
        return int(logits.argmax())
    probs = torch.softmax(logits.cpu().double() / temperature, dim=-1)
    probs, order = probs.sort(descending=True)
    probs[probs.cumsum(0) - probs >= top_p] = 0  # the likeliest token always stays
    return int(order[torch.multinomial(probs, 1, generator=rng)])
