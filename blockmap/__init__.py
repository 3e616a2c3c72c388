"""One self-contained HTML page that shows what the engine kept of a text, and when it chose anew.

    recorder = blockmap.Recorder(engine)              # before prefill
    ids = prompt + list(engine.generate(prompt, 64))
    blockmap.write("map.html", engine, recorder, ids)

The recorder listens to `Model.on_select`. Of the prompt step it keeps every score and the
active set of each stage, of a later step only what changed, so a record stays small and is
plain JSON. The page is `page.html`, with `draw.css` and `draw.js`, and the record and the text put
in as data: nothing in a prompt can become markup, and its Content-Security-Policy runs this page's
one script alone. The server's page draws with the same two files.
"""

import base64
import codecs
import hashlib
import json
import re
from itertools import pairwise
from pathlib import Path

import torch

from loading.files import replace_file
from model import TILE
from planning.flops import prefill_flops

HERE = Path(__file__).parent
INFINITE = 1e300  # stands for infinity, which JSON lacks; the page calls such a score "always"


class Recorder:
    """Record every choice of blocks of one conversation; a new prompt starts afresh.

    Takes three of the model's hooks. record: {"n_prompt", "block_len", "stages", "steps"}. A stage:
    {"candidates", "scores", "seen", "active"} of the prompt's step, "seen" being the layer that
    gave the score; of a text that waited for its question, of the question's. A step: {"at": tokens
    before it, "pending": how many of its own tokens the model wrote, drafted ones too, "moves":
    [[stage, in, out, revived]]}.
    """

    def __init__(self, engine, record: dict | None = None):
        self.engine = engine
        self.record = record or {}
        self.best = None  # (N,): each block's best score in the prompt's step
        self.seen = None  # (N,): the layer that gave it
        self.riding: set[int] = set()  # blocks whose rows come up from the stage below
        self.looked = None  # (N,): each block's best score since `restart`, or in all
        engine.model.on_scores = self.on_scores
        engine.model.on_select = self.on_select
        engine.model.on_accept = self.on_accept

    def on_scores(self, layer: int, scores) -> None:
        if self.engine.kv.length > 0:
            return
        best = scores.amax(0)  # (N,)
        if layer == 0 or not self.engine.model.rule.every_layer:
            self.best = best
            self.seen = best.new_zeros(len(best)).long() + layer
        self.seen = self.seen.where(best <= self.best, layer)
        self.best = best

    def on_select(self, i: int, candidates: list[int], scores, active: set[int]) -> None:
        kv = self.engine.kv
        if kv.length == 0:
            if i == 1:
                self.record = {"n_prompt": kv.n_prompt, "block_len": kv.block_len}
                self.record |= {"stages": [], "steps": []}
                self.looked = None
            self.record["stages"].append(self.first_choice(i, candidates, scores, active))
        elif self.record:
            if i == 1:
                step = {"at": kv.length, "pending": len(self.engine.pending), "moves": []}
                self.record["steps"].append(step)
                self.riding = set()
            self.add_moves(i, active)
        self.keep_best(i, candidates, scores)

    def keep_best(self, i: int, candidates: list[int], scores) -> None:
        n_blocks = self.engine.kv.tail_start // self.engine.kv.block_len
        if self.looked is None or len(self.looked) != n_blocks:
            self.looked = torch.full((n_blocks,), -torch.inf)
        self.looked[candidates] = self.looked[candidates].maximum(scores.float().cpu())

    def strongest(self, n: int) -> list[list]:
        """Return [block, score] of the best n since `restart`, but those that always stay."""
        if self.looked is None:
            return []
        scores = self.looked[1:]  # the first block always stays
        scores = scores.masked_fill(scores.isinf(), -torch.inf)
        best, order = scores.sort(descending=True, stable=True)
        return [
            [block + 1, float(f"{score:.4g}")]
            for block, score in zip(order[:n].tolist(), best[:n].tolist())
            if score > -INFINITE
        ]

    def on_accept(self) -> None:
        if self.record.get("steps"):
            self.record["steps"][-1]["pending"] += 1

    def first_choice(self, i: int, candidates: list[int], scores, active: set[int]) -> dict:
        """Return what stage i chose in the prompt's step, and why."""
        if self.engine.model.rule.sees != "keys":
            seen = self.seen[candidates].tolist()
        else:  # a rule that sees keys looks at the boundary's layer alone
            boundary = self.engine.kv.stages[i].layers[0] - 1
            seen = [boundary] * len(candidates)
        finite = scores.double().clamp(-INFINITE, INFINITE).tolist()
        return {
            "candidates": list(candidates),
            "scores": [float(f"{score:.6g}") for score in finite],
            "seen": seen,
            "active": sorted(active),
        }

    def add_moves(self, i: int, active: set[int]) -> None:
        """Add what a later step changes in stage i."""
        stage = self.engine.kv.stages[i]
        before = set(stage.slots)
        without_keys = active - stage.has_keys()
        came = active - before
        left = before - active
        if came or left:
            revived = without_keys - self.riding
            moves = self.record["steps"][-1]["moves"]
            moves.append([i, sorted(came), sorted(left), sorted(revived)])
        self.riding = without_keys

    def restart(self) -> None:
        """Begin a record of what follows, as after `Engine.rewind`.

        What is active now counts as active at first.
        """
        for stage, now in zip(self.record.get("stages", []), self.engine.kv.stages[1:]):
            stage["active"] = sorted(now.slots)
        if self.record:
            self.record |= {"n_prompt": self.engine.kv.n_prompt, "steps": []}
        self.looked = None


def write(path, engine, recorder: Recorder, ids) -> None:
    """Write the page of a conversation to path, whole or not at all; ids: its token ids in order.

    Raises ValueError for a path, ids or a record that cannot be used, and where writing fails.
    """
    if engine.kv.held is not None:
        raise ValueError("there is no map yet: the text's first question chooses its blocks")
    html = page(describe(engine, recorder.record, ids)).encode("utf-8", "replace")
    with replace_file(path) as file:
        file.write(html)


def page(data: dict) -> str:
    """Return the HTML of what `describe` gathered."""
    html, hashes = assemble(HERE / "page.html")
    for tag, digest in hashes.items():
        html = html.replace(f"{{{tag} hash}}", digest)
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = re.sub("[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text)
    before, after = html.split("{data}")
    return before + text + after


def assemble(path: Path) -> tuple[str, dict[str, str]]:
    """Return a page with the style and script that draw a map, and hashes of what it may run.

    A Content-Security-Policy that names them lets nothing else run.
    """
    html = path.read_text("utf-8")
    for name in ("draw.css", "draw.js"):
        html = html.replace(f"{{{name}}}", (HERE / name).read_text("utf-8").rstrip())
    hashes = {}
    for tag in ("script", "style"):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest())
        hashes[tag] = "sha256-" + digest.decode()
    return html, hashes


def describe(engine, record: dict, ids) -> dict:
    """Gather what the page shows of a conversation, as plain JSON.

    held: a text waits for its question, so that no stage has blocks yet. Raises ValueError if the
    parts do not belong together.
    """
    kv = engine.kv
    length = kv.n_tokens
    if length == 0:
        raise ValueError("there is no map to draw: no prompt was read to its end")
    ids = engine.check_ids(ids)
    if len(ids) < length:
        raise ValueError(
            f"a map needs all ids of the conversation: {length:,} were read, {len(ids):,} are given"
        )
    held = kv.held is not None
    if held or len(kv.stages) == 1:
        record = {"stages": [], "steps": []}  # nothing was chosen
    elif not matches(record, kv, engine.usable):
        raise ValueError("the record is not of this conversation; make the Recorder before prefill")
    steps = [step for step in record["steps"] if step["at"] < length]  # the last may be broken
    turns = list(spoken(kv, record, steps))
    if len(ids) > length:
        turns.append({"at": length, "kind": "written", "step": None})
    starts = list(range(0, kv.tail_start + 1, kv.block_len))
    cuts = [*starts, *(turn["at"] for turn in turns), len(ids)]
    texts = list(pieces(engine.tokenizer, ids, cuts))
    for turn, text in zip(turns, texts[len(starts) :]):
        turn["text"] = text
    local = engine.running.local
    stats = {name: value for name, value in engine.stats.items() if not name.endswith("_s")}
    return {
        "model": engine.ckpt.folder.name,
        "block_len": kv.block_len,
        "device": kv.device.type,
        "held": held,
        "layers": [[stage.layers.start, stage.layers.stop] for stage in kv.chosen_stages()],
        "stages": record["stages"],
        "steps": steps,
        "blocks": texts[: len(starts)],
        "turns": turns,
        "local": {"window": local.window, "sinks": local.sinks, "tile": TILE},
        "flops": prefill_flops(engine.config, kv.n_prompt, kv.schedule, kv.block_len, local),
        "flops_dense": prefill_flops(engine.config, kv.n_prompt, {}, kv.block_len),
        **stats,
    }


def matches(record: dict, kv, whole: bool) -> bool:
    """Tell whether replaying a record ends where the engine is.

    Not `whole`: the last step was broken off, and the active blocks are those of its middle.
    """
    try:
        active = [set(stage["active"]) for stage in record["stages"]]
        for step in record["steps"]:
            for i, came, left, _ in step["moves"]:
                active[i - 1] -= set(left)
                active[i - 1] |= set(came)
        at = [step["at"] for step in record["steps"]]
        shape = record["n_prompt"], record["block_len"], len(active)
    except (LookupError, TypeError, ValueError):
        return False
    stages = kv.stages[1:]
    if shape != (kv.n_prompt, kv.block_len, len(stages)) or at != sorted(set(at)):
        return False
    return not whole or active == [set(stage.slots) for stage in stages]


def spoken(kv, record: dict, steps: list[dict]):
    """Yield {"at", "kind", "step"} of what follows the prompt.

    kind: "written" by the model, "asked", or "after" where nothing was recorded. What comes before
    the first step asked about a text that waited for it.
    """
    starts = [*(step["at"] for step in steps), kv.n_tokens]
    if starts[0] > kv.n_prompt:
        kind = "asked" if record["stages"] else "after"
        yield {"at": kv.n_prompt, "kind": kind, "step": None}
    ends = starts[1:]
    for number, (step, end) in enumerate(zip(steps, ends), start=1):
        start = step["at"]
        written = step["pending"]
        if end - start == 1:  # one token at a time is decoding, whoever does it
            written = 1
        if written:
            yield {"at": start, "kind": "written", "step": number}
        if start + written < end:
            yield {"at": start + written, "kind": "asked", "step": number}


def pieces(tokenizer, ids: list[int], cuts: list[int]):
    """Yield the text between cuts, a character where its last byte is.

    With special tokens among it: [text, special token, text, ...].
    """
    names = {token: name for name, token in tokenizer.special.items()}
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    for start, end in pairwise(cuts):
        parts = [""]
        for token in ids[start:end]:
            if token in names:
                parts += [names[token], ""]
            else:
                parts[-1] += utf8.decode(tokenizer.bytes(token))
        if end == cuts[-1]:
            parts[-1] += utf8.decode(b"", final=True)
        yield parts if len(parts) > 1 else parts[0]
