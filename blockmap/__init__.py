"""One self-contained HTML page that shows what the engine kept of a text, and when it chose anew.

    recorder = blockmap.Recorder(engine)              # before prefill
    ids = prompt + list(engine.generate(prompt, 64))
    blockmap.write("map.html", engine, recorder, ids)

The recorder listens to `Model.on_select`. Of the prompt step it keeps every score and the
active set of each stage, of a later step only what changed, so a record stays small and is
plain JSON. The page is `page.html` with the record and the text put in as data: nothing in a
prompt can become markup, and its Content-Security-Policy runs this page's one script alone.
"""

import base64
import codecs
import hashlib
import json
import re
from itertools import pairwise
from pathlib import Path

from loading.files import replace_file
from planning.flops import prefill_flops

HERE = Path(__file__).parent


class Recorder:
    """Record every choice of blocks of one conversation; a new prompt starts afresh. Takes two of the model's hooks.

    record: {"n_prompt", "block_len", "stages", "steps"}. A stage: {"candidates", "scores", "seen", "active"}
    of the prompt's step, "seen" being the layer that gave the score. A step: {"at": tokens before it,
    "pending": how many of its own tokens the model wrote, "moves": [[stage, in, out, revived]]}.
    """

    def __init__(self, engine, record: dict | None = None):
        self.engine, self.record = engine, record or {}
        self.best = self.seen = (
            None  # of each block in the prompt's step (N,): its best score, the layer that gave it
        )
        self.riding: set[int] = set()  # blocks whose rows come up from the stage below
        engine.model.on_select, engine.model.on_scores = self.on_select, self.on_scores

    def on_scores(self, layer: int, scores) -> None:
        if self.engine.kv.length == 0:
            best = scores.amax(0)  # (N,)
            if layer == 0 or not self.engine.model.rule.every_layer:
                self.best, self.seen = best, best.new_zeros(len(best)).long() + layer
            self.seen = self.seen.where(best <= self.best, layer)
            self.best = best

    def on_select(self, i: int, candidates: list[int], scores, active: set[int]) -> None:
        kv = self.engine.kv
        stage = kv.stages[i]
        if kv.length == 0:
            if i == 1:
                self.record = {
                    "n_prompt": kv.n_prompt,
                    "block_len": kv.block_len,
                    "stages": [],
                    "steps": [],
                }
            scores = [
                float(f"{score:.6g}") for score in scores.double().clamp(-1e300, 1e300).tolist()
            ]  # JSON has no infinity
            seen = [stage.layers[0] - 1] * len(
                candidates
            )  # a rule that sees keys looks at the boundary's layer alone
            if self.engine.model.rule.sees == "weights":
                seen = self.seen[candidates].tolist()
            self.record["stages"].append(
                {
                    "candidates": list(candidates),
                    "scores": scores,
                    "seen": seen,
                    "active": sorted(active),
                }
            )
        elif self.record:
            if i == 1:
                self.record["steps"].append(
                    {"at": kv.length, "pending": len(self.engine.pending), "moves": []}
                )
                self.riding = set()
            old, new = set(stage.slots), active - stage.has_keys()
            if active != old:
                moved = active - old, old - active, new - self.riding
                self.record["steps"][-1]["moves"].append([i, *map(sorted, moved)])
            self.riding = new

    def restart(self) -> None:
        """After `Engine.rewind`: what is active now counts as active at first."""
        for stage, kept in zip(self.record.get("stages", []), self.engine.kv.stages[1:]):
            stage["active"] = sorted(kept.slots)
        self.record |= {"steps": []}


def write(path, engine, recorder: Recorder, ids) -> None:
    """Write the page of a conversation to path, whole or not at all; ids: all of its token ids in order.

    Raises ValueError for a path, ids or a record that cannot be used, and where writing fails.
    """
    html = page(describe(engine, recorder.record, ids)).encode("utf-8", "replace")
    with replace_file(path) as file:
        file.write(html)


def page(data: dict) -> str:
    """Return the HTML of what `describe` gathered."""
    html = (HERE / "page.html").read_text("utf-8")
    for tag in (
        "script",
        "style",
    ):  # the policy names both by their hash, so that nothing else runs
        digest = hashlib.sha256(
            re.search(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)[1].encode()
        ).digest()
        html = html.replace(f"{{{tag} hash}}", "sha256-" + base64.b64encode(digest).decode())
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = re.sub("[<>&\u2028\u2029]", lambda m: f"\\u{ord(m[0]):04x}", text)
    before, after = html.split("{data}")
    return before + text + after


def describe(engine, record: dict, ids) -> dict:
    """Gather what the page shows of a conversation, as plain JSON; raise ValueError if the parts do not belong
    together.
    """
    kv, c, stats = engine.kv, engine.config, engine.stats
    if kv.length == 0:
        raise ValueError("there is no map to draw: no prompt was read to its end")
    ids = engine.check_ids(ids)
    if len(ids) < kv.length:
        raise ValueError(
            f"a map needs all ids of the conversation: {kv.length:,} were read, {len(ids):,} are given"
        )
    if len(kv.stages) == 1:
        record = {"stages": [], "steps": []}  # dense: nobody was asked to choose
    elif not matches(record, kv, engine.usable):
        raise ValueError("the record is not of this conversation; make the Recorder before prefill")
    steps = [
        step for step in record["steps"] if step["at"] < kv.length
    ]  # the last may have been broken off
    turns = [*spoken(kv, steps)] + [(kv.length, "written", None)] * (len(ids) > kv.length)
    starts = range(0, kv.tail_start + 1, kv.block_len)
    texts = list(pieces(engine.tokenizer, ids, [*starts, *(at for at, _, _ in turns), len(ids)]))
    flops, flops_dense = (
        prefill_flops(c, kv.n_prompt, schedule, kv.block_len) for schedule in (kv.schedule, {})
    )
    return {
        "model": engine.ckpt.folder.name,
        "block_len": kv.block_len,
        "device": kv.device.type,
        "layers": [[stage.layers.start, stage.layers.stop] for stage in kv.stages],
        "stages": record["stages"],
        "steps": steps,
        "blocks": texts[: len(starts)],
        "turns": [
            {"at": at, "kind": kind, "step": k, "text": text}
            for (at, kind, k), text in zip(turns, texts[len(starts) :])
        ],
        "flops": flops,
        "flops_dense": flops_dense,
        **{key: value for key, value in stats.items() if not key.endswith("_s")},
    }


def matches(record: dict, kv, whole: bool) -> bool:
    """Tell whether replaying a record ends where the engine is (unless its last step was broken off)."""
    try:
        active = [set(stage["active"]) for stage in record["stages"]]
        for step in record["steps"]:
            for i, came, left, _ in step["moves"]:
                active[i - 1] = active[i - 1] - set(left) | set(came)
        at = [step["at"] for step in record["steps"]]
        same = (record["n_prompt"], record["block_len"], len(active)) == (
            kv.n_prompt,
            kv.block_len,
            len(kv.stages) - 1,
        )
    except (LookupError, TypeError, ValueError):
        return False
    return (
        same
        and at == sorted(set(at))
        and (not whole or active == [set(stage.slots) for stage in kv.stages[1:]])
    )


def spoken(kv, steps: list[dict]):
    """Yield (position, kind, step number) of what follows the prompt: "written", "asked", or "after" where nobody
    recorded.
    """
    if not steps and kv.length > kv.n_prompt:
        yield kv.n_prompt, "after", None
    for k, (step, end) in enumerate(zip(steps, [*(s["at"] for s in steps[1:]), kv.length]), 1):
        written = step["pending"] or int(
            end - step["at"] == 1
        )  # one token at a time is decoding, whoever does it
        if written:
            yield step["at"], "written", k
        if step["at"] + written < end:
            yield step["at"] + written, "asked", k


def pieces(tokenizer, ids: list[int], cuts: list[int]):
    """Yield the text between cuts, a character where its last byte is; [text, special token, text, ...] if there
    are any.
    """
    names = {token: name for name, token in tokenizer.special.items()}
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    for a, b in pairwise(cuts):
        parts = [""]
        for token in ids[a:b]:
            if token in names:
                parts += [names[token], ""]
            else:
                parts[-1] += utf8.decode(tokenizer.bytes(token))
        if b == cuts[-1]:
            parts[-1] += utf8.decode(b"", final=True)
        yield parts if len(parts) > 1 else parts[0]
