"""The engine's side: one job at a time, in the order they came, on the main thread."""

import contextlib
import queue
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from loading.files import one_line
from serve import page
from serve.answers import Piece, Scores, score_prompt, thoughts_apart
from serve.api import ApiError, Request, usage
from serve.texts import Text, Texts

# tokens of a follow-up that are read at once, about half a second; in between, the client may be
# found gone
PIECE = {"cpu": 64, "cuda": 512}
ROOM = 256  # new tokens to have memory for: most answers end long before max_tokens


class Disconnected(Exception):
    """The client has closed the connection."""


@dataclass
class Job:
    """A request on its way.

    `out` gets Pieces, and dicts for the page, then (finish reason, usage), or an ApiError.
    """

    request: Request | None = None
    work: Callable | None = None  # instead of an answer, see serve/page.py
    out: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    disconnected: threading.Event = field(default_factory=threading.Event)

    def check(self, *_) -> None:
        """Raise Disconnected if the client has left."""
        if self.disconnected.is_set():
            raise Disconnected


def run(server, engine, tok, args, say) -> int:
    """Answer requests until Ctrl-C or SIGTERM; finish the running answer, save the conversation."""
    texts = Texts(engine, args.cache_dir, args.cache_gib, say)
    server.ready(engine, tok, args, texts)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    say(f"slim: a page to read with: {server.url}")
    say(f"slim: {server.model} at {server.url}/v1; Ctrl-C closes")
    with stopping(server):
        while (job := server.jobs.get()) is not None:
            serve(job, server, engine, tok, texts, say)
        say("slim: closing")
        server.stopping.set()
        server.shutdown()
        texts.put_away()
        server.close()
    return 0


@contextlib.contextmanager
def stopping(server):
    """Let Ctrl-C or SIGTERM end the queue, after the running answer; a second one breaks off."""

    def stop(*_):
        if server.stopping.is_set():
            raise KeyboardInterrupt
        server.stopping.set()
        server.jobs.put(None)

    usual = {name: signal.signal(name, stop) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for name, handler in usual.items():
            signal.signal(name, handler)


def serve(job: Job, server, engine, tok, texts: Texts, say) -> None:
    """Run one job to its end, whatever that is."""
    steps = engine.steps
    try:
        if server.stopping.is_set():
            raise ApiError(503, "the server is closing")
        work = job.work or answer
        work(job, server, engine, tok, texts, say)
    except Disconnected:
        server.counts["disconnected"] += 1
    except ApiError as error:
        job.out.put(error)
    except ValueError as error:  # before a step: the request asks too much
        broken = engine.steps != steps and not engine.usable
        job.out.put(ApiError(500 if broken else 400, str(error)))
    except MemoryError as error:
        job.out.put(ApiError(500, str(error)))
    except Exception as error:  # a bug, or torch out of memory: further requests are served
        kind = type(error).__name__
        say(f"slim: error: {kind}: {one_line(error)}")
        job.out.put(ApiError(500, f"the engine failed: {kind}"))
    if not engine.usable:
        engine.forget()
    server.engine_stats = engine.stats if engine.usable else {}


class Tokens:
    """The tokens of an answer as they come, counted, each after a check of the client.

    From the first one on, the client is checked between steps alone: a step that is broken off
    loses the text, and that was just read.
    """

    def __init__(self, source, job: Job, engine):
        self.source = source
        self.job = job
        self.engine = engine
        self.n = 0
        self.first_at = 0.0  # time of the first one
        self.ended = False  # stays so if a stop text ends the answer
        self.cut = False  # memory ended the answer

    def __iter__(self):
        try:
            for token in self.source:
                self.engine.model.on_chunk = nothing
                self.job.check()
                self.n += 1
                self.first_at = self.first_at or time.perf_counter()
                yield token
        except ValueError:  # no memory for a longer answer: what there is, is an answer too
            self.cut = self.n > 0 and self.engine.usable
            if not self.cut:
                raise
        self.ended = True

    def finish_reason(self) -> str:
        full = self.cut or self.n == self.job.request.max_tokens
        return "length" if self.ended and full else "stop"


def answer(job: Job, server, engine, tok, texts: Texts, say) -> None:
    """Write the answer to a job, piece by piece, into its queue.

    Raises Disconnected if the client leaves.
    """
    request = job.request
    started = time.perf_counter()
    job.check()
    scores = None if request.logprobs is None else Scores(tok, request.logprobs)
    if scores and request.echo:
        tokens = write_scored(job, engine, tok, texts, scores)
        cached = 0
    else:
        dense = request.dense and bool(engine.ckpt.schedule)
        cached, keep_last = texts.reuse(request.ids, min(request.max_tokens, ROOM), dense)
        texts.day = request.day
        texts.talk = page.go_on(texts.talk, request.turns) if cached else None
        texts.recorder.restart()
        first = engine.kv.tail_start if cached else len(request.ids) - keep_last
        texts.running = Text(request.ids, first, request.day, texts.talk, dense)
        turn = page.Turn(job, engine, texts, started, cached)
        try:
            tokens = write(job, engine, tok, cached, keep_last, scores, turn)
        finally:
            texts.running = None
            texts.talk = turn.end()
    used = usage(request, tokens.n, cached)
    job.out.put((tokens.finish_reason(), used))
    count(server.counts, used)
    say(summary(used, started, tokens.first_at))


def write_scored(job: Job, engine, tok, texts: Texts, scores: Scores) -> Tokens:
    """Score a prompt and write what follows it, all by the full model; forget it then.

    The conversation at hand makes way for it.
    """
    texts.put_away()
    engine.forget()
    texts.talk = None
    engine.model.on_chunk = job.check
    try:
        room = min(job.request.max_tokens, ROOM)
        n_run = score_prompt(engine, job.request.ids, scores, room, job.check)
        return write(job, engine, tok, n_run, 0, scores)
    finally:
        engine.model.on_chunk = nothing
        engine.forget()


def write(job: Job, engine, tok, cached: int, keep_last: int, scores=None, turn=None) -> Tokens:
    """Put an answer into a job's queue, piece by piece; return its tokens, which have run out.

    cached: ids of the request that the engine has. keep_last: of a new reading, see `Texts.reuse`.
    scores: gathers the log probabilities, if they are wanted. turn: tells the page.
    """
    request = job.request
    if request.echo:
        prompt = tok.decode(request.ids)
        job.out.put(Piece(prompt, scored=scores.end_prompt(prompt) if scores else ()))

    def note(token, logits):
        if scores and not (request.chat and token in engine.ckpt.stop):
            scores.add(token, logits)

    ids = read_ahead(job, engine, cached, min(request.max_tokens, ROOM))
    sampling = request.max_tokens, request.temperature, request.top_p, request.seed
    options = {"follow_up": cached > 0, "keep_last": keep_last, "reserve": ROOM, "on_token": note}
    if request.dense and not cached:
        options["schedule"] = {}
    source = engine.generate(ids, *sampling, **options) if request.max_tokens else ()
    tokens = Tokens(source, job, engine)
    if not cached:  # until the first token: a new reading may be broken off anywhere
        engine.model.on_chunk = job.check
    try:
        put_pieces(job, tok, tokens, scores, turn)
    finally:
        engine.model.on_chunk = nothing
    return tokens


def put_pieces(job: Job, tok, tokens: Tokens, scores: Scores | None, turn) -> None:
    """Put the text of tokens into a job's queue, with their log probabilities."""
    pieces = tok.stream(turn.watch(tokens) if turn else tokens, job.request.stop)
    if scores:
        pieces = scores.follow(pieces)
    for thought, text in thoughts_apart(pieces, job.request.in_thought):
        job.out.put(Piece(text, thought, scores.take() if scores else ()))
        if turn and not thought:
            turn.pieces.append(text)
    if scores and tokens.ended:  # not those of a stop text
        scores.shown = float("inf")
        job.out.put(Piece("", scored=scores.take()))


def nothing(*_) -> None:
    """Watch a step and do nothing."""


def read_ahead(job: Job, engine, cached: int, room: int) -> list[int]:
    """Read a long follow-up in pieces, checking the client in between; return the ids left."""
    ids = job.request.ids[cached:]
    piece = PIECE[engine.kv.device.type]
    while cached and len(ids) > piece:
        engine.extend(ids[:piece], room=len(ids) - piece + room)
        ids = ids[piece:]
        job.check()
    return ids


def count(counts: dict[str, int], used: dict) -> None:
    counts["answers"] += 1
    counts["prompt_tokens"] += used["prompt_tokens"]
    counts["cached_tokens"] += used["prompt_tokens_details"]["cached_tokens"]
    counts["completion_tokens"] += used["completion_tokens"]


def summary(used: dict, started: float, first_at: float) -> str:
    """Return the line of the log about an answer."""
    now = time.perf_counter()
    first_at = first_at or now
    more = max(0, used["completion_tokens"] - 1)
    rate = more / max(1e-9, now - first_at)
    return (
        f"slim: {used['prompt_tokens']:,} tokens, "
        f"{used['prompt_tokens_details']['cached_tokens']:,} of them read before; "
        f"first token {first_at - started:.2f} s, then {more:,} more at {rate:.1f} tokens/s"
    )
