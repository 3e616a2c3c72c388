"""The engine's side: one job at a time, in the order they came, on the main thread."""

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

# tokens of a follow-up that are read at once, about half a second, between two looks at the client
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

    @property
    def streams(self) -> bool:
        return self.request is not None and self.request.stream

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
    stop_on_signals(server)
    while (job := server.jobs.get()) is not None:
        serve(job, server, engine, tok, texts, say)
    say("slim: closing")
    server.shutdown()
    texts.put_away()
    server.close()
    return 0


def stop_on_signals(server) -> None:
    """Let Ctrl-C or SIGTERM end the queue, after the running answer; a second one breaks off."""

    def stop(*_):
        if server.stopping.is_set():
            raise KeyboardInterrupt
        server.stopping.set()
        server.jobs.put(None)

    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, stop)


def serve(job: Job, server, engine, tok, texts: Texts, say) -> None:
    """Run one job; whatever goes wrong is told to its client."""
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
    except (ValueError, MemoryError) as error:  # before a step: the request asks too much
        broken = engine.steps != steps and not engine.usable
        status = 500 if broken or isinstance(error, MemoryError) else 400
        job.out.put(ApiError(status, str(error)))
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
        except ValueError:  # no memory for a longer answer: what was written so far is sent
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
        turn = write_scored(job, engine, tok, texts, scores, started)
    else:
        turn = write_next(job, engine, tok, texts, scores, started)
    n_new = turn.tokens.n
    job.out.put((turn.tokens.finish_reason(), usage(request, n_new, turn.cached)))
    server.counts.update(answers=1, completion_tokens=n_new)
    server.counts.update(prompt_tokens=len(request.ids), cached_tokens=turn.cached)
    say(summary(turn.note()))


def write_scored(job: Job, engine, tok, texts: Texts, scores: Scores, started: float) -> page.Turn:
    """Score a prompt and write what follows it, all by the full model; forget it then.

    The conversation at hand makes way for it.
    """
    request = job.request
    texts.put_away()
    engine.forget()
    texts.talk = None
    texts.recorder.restart()
    turn = page.Turn(job, engine, texts, started, cached=0)
    engine.model.on_chunk = job.check
    try:
        n_run = score_prompt(engine, request.ids, scores, room_for(request), job.check)
        write(job, engine, tok, n_run, 0, scores, turn)
    finally:
        engine.model.on_chunk = nothing
        engine.forget()
    return turn


def write_next(
    job: Job, engine, tok, texts: Texts, scores: Scores | None, started: float
) -> page.Turn:
    """Write an answer in the conversation that the request begins with, or in a new one."""
    request = job.request
    dense = request.dense and bool(engine.ckpt.schedule)
    cached, keep_last = texts.reuse(request.ids, room_for(request), dense)
    texts.day = request.day
    texts.talk = page.go_on(texts.talk, request.turns) if cached else None
    texts.recorder.restart()
    first = engine.kv.shortest if cached else len(request.ids) - keep_last
    texts.running = Text(request.ids, first, request.day, texts.talk, dense)
    turn = page.Turn(job, engine, texts, started, cached)
    try:
        write(job, engine, tok, cached, keep_last, scores, turn)
    finally:
        engine.model.on_chunk = nothing
        texts.running = None
        texts.talk = turn.end()
    return turn


def room_for(request: Request) -> int:
    return min(request.max_tokens, ROOM)


def write(job: Job, engine, tok, cached: int, keep_last: int, scores, turn: page.Turn) -> None:
    """Put an answer into a job's queue, piece by piece.

    cached: ids of the request that the engine has. keep_last: of a new reading, see `Texts.reuse`.
    scores: gathers the log probabilities, None if none are wanted. turn: tells the page.
    """
    request = job.request
    if request.echo:
        prompt = tok.decode(request.ids)
        job.out.put(Piece(prompt, scored=scores.end_prompt(prompt) if scores else ()))

    def note(token, logits):
        if scores and not (request.chat and token in engine.ckpt.stop):
            scores.add(token, logits)

    ids = read_ahead(job, engine, cached)
    sampling = request.max_tokens, request.temperature, request.top_p, request.seed
    options = {"follow_up": cached > 0, "keep_last": keep_last, "reserve": ROOM, "on_token": note}
    if request.dense and not cached:
        options["schedule"] = {}
    source = engine.generate(ids, *sampling, **options) if request.max_tokens else ()
    if not cached:  # until the first token: a new reading may be broken off anywhere
        engine.model.on_chunk = job.check
    put_pieces(job, tok, Tokens(source, job, engine), scores, turn)


def put_pieces(job: Job, tok, tokens: Tokens, scores: Scores | None, turn: page.Turn) -> None:
    """Put the text of tokens into a job's queue, with their log probabilities."""
    pieces = tok.stream(turn.watch(tokens), job.request.stop)
    if scores:
        pieces = scores.follow(pieces)
    for thought, text in thoughts_apart(pieces, job.request.in_thought):
        job.out.put(Piece(text, thought, scores.take() if scores else ()))
        if not thought:
            turn.pieces.append(text)
    if scores and tokens.ended:  # not those of a stop text
        scores.shown = float("inf")
        job.out.put(Piece("", scored=scores.take()))


def nothing(*_) -> None:
    """Watch a step and do nothing."""


def read_ahead(job: Job, engine, cached: int) -> list[int]:
    """Read a long follow-up in pieces, checking the client in between; return the ids left."""
    ids = job.request.ids[cached:]
    piece = PIECE[engine.kv.device.type]
    while cached and len(ids) > piece:
        room = len(ids) - piece + room_for(job.request)
        read_on = engine.extend if engine.kv.held is None else engine.read_on
        read_on(ids[:piece], room=room)
        ids = ids[piece:]
        job.check()
    return ids


def summary(note: dict) -> str:
    """Return the line of the log about an answer."""
    more = max(0, note["new_tokens"] - 1)
    return (
        f"slim: {note['prompt_tokens']:,} tokens, {note['read_before']:,} of them read before; "
        f"first token {note['first_token_s']:.2f} s, "
        f"then {more:,} more at {note['tokens_per_s']:.1f} tokens/s"
    )
