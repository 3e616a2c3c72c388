"""The page at `/`, and what it is told: texts that were read, their map, and each answer's part.

The page reads a text by `/v1/slim/read`, which is one user's message without an answer; its blocks
are chosen by the first question (`Engine.read`). Questions are ordinary chat requests whose first
message is the text and the question; they go on with it as any request does. What the page shows of
a conversation is its `talk`, a dict of JSON:
{"id", "name", "text", "tokens", "dense", "turns": [{"question", "answer", "note", "looked"}]}.
"""

import hashlib
import time
from pathlib import Path

import blockmap
from planning.flops import WorkDone
from serve.api import ApiError, Request, check_room, get, read_chat

CLOSING = 32  # tokens at most by which a template closes a user's message; read again by a question
ROOM_TO_ASK = 512  # tokens of the context that a text leaves for questions and answers, at least
ROOM_TO_READ = 1024  # tokens of questions and answers that a reading lays out memory for
DENSEST = 16  # characters of a token, more than any text has on average
STRONGEST = 6  # blocks that an answer is said to have looked at
HERE = Path(__file__).parent
PAUSE = 0.2  # seconds between two reports of progress


# ---- what is asked ------------------------------------------------------------------------


def settings(server) -> dict:
    """Return what the page starts from: texts, the command line's settings, and what fits."""
    return {
        "model": server.model,
        "texts": server.texts.talks(),
        "most": most_tokens(server.max_len),
        "prunes": bool(server.texts.engine.ckpt.schedule),
        "temperature": server.args.temperature,
        "max_tokens": server.args.max_new_tokens,
    }


def most_tokens(max_len: int) -> int:
    return max_len - min(ROOM_TO_ASK, max_len // 4)


def count(body: dict, tok, max_len: int) -> dict:
    """Return how many tokens a text has, how many fit, and how many characters these are.

    Of a text far too long, only the beginning is counted, and `exact` is false.
    """
    text = get_text(body)
    most = most_tokens(max_len)
    head = text[: DENSEST * most]
    ids = tok.encode(head)
    tokens = round(len(ids) * len(text) / len(head))
    fits = text if tokens <= most else tok.decode(ids[:most])
    fits = len(fits.encode("utf-16-le", "surrogatepass")) // 2  # as JavaScript counts
    return {"tokens": tokens, "exact": head == text, "most": most, "fits": fits}


def get_text(body: dict) -> str:
    text = get(body, "text", str, "").rstrip()
    if not text:
        raise ApiError(400, "text is missing or empty", "text")
    return text


def parse_read(body: dict, tok, model: str, max_len: int, texts) -> Request:
    """Check a body {"text", "name", "dense"}, or {"id"} of a text in the list.

    Returns the Request of the text alone.
    """
    talk = wanted_talk(body, texts)
    messages = [{"role": "user", "content": talk["text"]}]
    prompt = read_chat({"messages": messages}, tok, texts, talk["dense"])
    talk["tokens"] = len(prompt["ids"])
    most = most_tokens(max_len) + 2 * CLOSING
    check_room(most - talk["tokens"], most, "text")
    return Request(
        chat=True,
        model=model,
        max_tokens=0,
        stream=True,
        dense=talk["dense"],
        talk=talk,
        **prompt,
    )


def wanted_talk(body: dict, texts) -> dict:
    """Return a talk without turns, of the text that a body names or holds."""
    id = get(body, "id", str, None)
    if id is None:
        text = get_text(body)
        name = get(body, "name", str, "")[:200]
        dense = get(body, "dense", bool, False)
    else:
        known = texts.talk_of(id)
        if known is None:
            raise ApiError(404, f"there is no text {id!r:.60}; read it again", "id")
        text = known["text"]
        name = known["name"]
        dense = known["dense"]
    id = hashlib.sha256(f"{dense} {text}".encode("utf-8", "replace")).hexdigest()[:16]
    return {"id": id, "name": name, "text": text, "dense": dense, "turns": []}


# ---- on the engine's thread -----------------------------------------------------------------


def read(job, server, engine, tok, texts, say) -> None:
    """Read a text, unless it was read before, and put progress, then its map, into the queue."""
    request = job.request
    job.check()
    dense = request.dense and bool(engine.ckpt.schedule)
    known = texts.hold(request.ids, CLOSING, dense) and map_of(engine, texts)
    if not known:
        texts.put_away()
        texts.talk = None
        read_anew(job, engine, dense)
        say(f"slim: {len(request.ids):,} tokens of a text read in {engine.prefill_s:.2f} s")
    texts.day = request.day
    if texts.talk is None or texts.talk["id"] != request.talk["id"]:
        texts.talk = request.talk
    draw(job, server, engine, tok, texts, say)


def read_anew(job, engine, dense: bool) -> None:
    request = job.request
    room = min(ROOM_TO_READ, engine.config.max_len - len(request.ids))
    engine.model.on_chunk = report_progress(job, engine)
    try:
        engine.read(
            request.ids,
            room,
            schedule={} if dense else None,
            keep_last=CLOSING,
            reserve=0,
        )
    finally:
        engine.model.on_chunk = lambda *_: None


def report_progress(job, engine):
    """Return a function that follows a reading and reports tokens, as shares of the work.

    It raises Disconnected if the client has left.
    """
    progress = WorkDone(engine, "below")
    reported = time.perf_counter()
    n = len(job.request.ids)

    def on_chunk(layer: int, n_rows: int) -> None:
        nonlocal reported
        job.check()
        share = progress.share(layer, n_rows)
        now = time.perf_counter()
        if share and now - reported > PAUSE:
            reported = now
            left = round(progress.seconds_left(share), 1)
            job.out.put({"tokens": int(n * share), "of": n, "seconds_left": left})

    return on_chunk


def draw(job, server, engine, tok, texts, say) -> None:
    """Put the map of the conversation at hand into the queue, and what the page shows of it."""
    job.check()
    described = map_of(engine, texts)
    if described is None:
        raise ApiError(404, "there is no map: no text is at hand, or it was read without one")
    job.out.put(described | {"talk": texts.talk})
    job.out.put(("stop", {}))


def map_of(engine, texts) -> dict | None:
    """Return the map of the conversation at hand, None if none can be drawn."""
    try:
        return blockmap.describe(engine, texts.recorder.record, texts.at_hand().ids)
    except ValueError:  # nothing is at hand, or an older file that has no record
        return None


# ---- one answer -----------------------------------------------------------------------------


def go_on(talk: dict | None, messages: list[dict]) -> dict | None:
    """Return the talk before a new answer; None if the request is not about its text."""
    n = len(messages)
    by_turns = [message["role"] for message in messages] == (["user", "assistant"] * n)[:n]
    if talk is None or not by_turns or n % 2 == 0:
        return None
    said = [message["content"] for message in messages]
    beginning = talk["text"] + "\n\n"
    if None in said or not said[0].startswith(beginning):
        return None
    said[0] = said[0].removeprefix(beginning)
    turns = []
    for i, (question, answer) in enumerate(zip(said[0:-1:2], said[1::2])):
        turn = {"question": question, "answer": answer}
        known = talk["turns"][i] if i < len(talk["turns"]) else {}
        turns.append(known if known | turn == known else turn)
    return talk | {"turns": turns, "asked": said[-1]}


class Turn:
    """A question and its answer, as the page is told of them."""

    def __init__(self, job, engine, texts, started: float, cached: int):
        self.job = job
        self.engine = engine
        self.texts = texts
        self.started = started
        self.cached = cached
        self.talk = texts.talk
        self.pieces: list[str] = []
        self.tokens = None  # of the answer, see serve/worker.py
        self.n_steps = 0  # of the record that were told

    def watch(self, tokens):
        """Yield tokens; before each, tell the page which blocks it moved."""
        self.tokens = tokens
        for token in tokens:
            if self.job.request.include_map:
                self.tell_moves()
            yield token

    def tell_moves(self) -> None:
        steps = self.texts.recorder.record.get("steps", [])
        moves = [move for step in steps[self.n_steps :] for move in step["moves"]]
        self.n_steps = len(steps)
        if moves:
            self.job.out.put({"object": "slim.moves", "moves": moves})

    def end(self) -> dict | None:
        """Tell the page what the answer took; return the talk with it."""
        kv = self.engine.kv
        turn = {
            "answer": "".join(self.pieces),
            "note": self.note(),
            "looked": self.texts.recorder.strongest(STRONGEST),
        }
        if self.job.request.include_map:
            active = [sorted(stage.slots) for stage in kv.stages[1:]]
            self.job.out.put({"object": "slim.turn", "active": active} | turn)
        if self.talk is None or not self.pieces:
            return self.talk
        question = {"question": self.talk["asked"]}
        return self.talk | {"turns": [*self.talk["turns"], question | turn]}

    def note(self) -> dict:
        """Return the line under an answer, as numbers."""
        now = time.perf_counter()
        tokens = self.tokens
        first_at = tokens.first_at if tokens and tokens.n else now
        n_new = tokens.n if tokens else 0
        stopped = self.job.disconnected.is_set()
        kv = self.engine.kv
        return {
            "first_token_s": round(first_at - self.started, 3),
            "tokens_per_s": round(max(0, n_new - 1) / max(1e-9, now - first_at), 2),
            "finish": "stopped" if stopped or not tokens else tokens.finish_reason(),
            "new_tokens": n_new,
            "prompt_tokens": len(self.job.request.ids),
            "read_before": self.cached,
            "blocks": kv.tail_start // kv.block_len + 1,
            "blocks_kept": kv.stages[-1].n_slots + 1,
        }


# ---- the page itself ------------------------------------------------------------------------


def html() -> tuple[bytes, dict]:
    """Return the page and the headers that it is sent with."""
    text, hashes = blockmap.assemble(HERE / "page.html")
    policy = (
        f"default-src 'none'; script-src '{hashes['script']}'; style-src '{hashes['style']}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return text.encode(), headers
