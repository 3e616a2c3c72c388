"""An HTTP server for the engine that speaks OpenAI's API: `python slim.py --ckpt CKPT --serve [HOST:]PORT`.

Every connection has a thread, which reads and checks the request, waits, and writes the answer. The main
thread runs the engine, one job at a time, in the order they came. The two talk through queues, so a client
that is slow holds up nobody: its answer waits in its own queue. A connection carries one request.
"""

import contextlib
import hmac
import ipaddress
import json
import os
import queue
import signal
import socket
import socketserver
import threading
import time
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote

from serve.api import ApiError, Request, chunk, parse, usage, whole
from serve.texts import Texts, check_folder

MOST_BYTES = 32 * 2**20  # of a request's body
MOST_CLIENTS = 256  # connections at a time
TIMEOUT = (
    30.0  # seconds for a request to arrive whole, and for a client to take a piece of its answer
)
IDLE = 10.0  # seconds without news after which a stream sends a comment
PIECE = 512  # tokens of a follow-up that are read at once; between two pieces the client may be found gone


class Disconnected(Exception):
    """The client has closed the connection."""


@dataclass
class Job:
    """A request on its way. `out` gets texts, then (finish reason, usage), or an ApiError."""

    request: Request
    out: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    disconnected: threading.Event = field(default_factory=threading.Event)


# ---- the engine's side ------------------------------------------------------------------


def run(server: "Server", engine, tok, args, say) -> int:
    """Answer requests until Ctrl-C or SIGTERM; the running answer is finished, and the conversation saved."""
    texts = Texts(engine, args.cache_dir, args.cache_gib, say)
    server.ready(engine, tok, args)
    threading.Thread(target=server.serve_forever, daemon=True).start()
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
    """Let the first Ctrl-C or SIGTERM end the queue, after the running answer; a second one breaks off."""

    def stop(*_):
        if server.stopping.is_set():
            raise KeyboardInterrupt
        server.stopping.set()
        server.jobs.put(None)

    usual = [(name, signal.signal(name, stop)) for name in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield
    finally:
        for name, handler in usual:
            signal.signal(name, handler)


def serve(job: Job, server, engine, tok, texts: Texts, say) -> None:
    """Run one job to its end, whatever that is."""
    steps, counts = engine.steps, server.counts
    try:
        if server.stopping.is_set():
            raise ApiError(503, "the server is closing")
        answer(job, server, engine, tok, texts, say)
    except Disconnected:
        counts["disconnected"] += 1
    except ApiError as error:
        job.out.put(error)
    except (
        ValueError,
        MemoryError,
    ) as error:  # a ValueError before a step: the request asks too much
        broken = isinstance(error, MemoryError) or engine.steps != steps and not engine.usable
        job.out.put(ApiError(500 if broken else 400, str(error)))
    except Exception as error:  # noqa: BLE001  a bug, or torch out of memory: the others are still served
        say(f"slim: error: {type(error).__name__}: {' '.join(str(error).split())}")
        job.out.put(ApiError(500, f"the engine failed: {type(error).__name__}"))
    if not engine.usable:
        engine.forget()
    server.engine_stats = engine.stats if engine.usable else {}


class Tokens:
    """The tokens of an answer as they come, each after a check; `ended` stays False if a stop text ends the answer."""

    def __init__(self, source, check):
        self.source, self.check, self.n, self.first, self.ended = source, check, 0, 0.0, False

    def __iter__(self):
        for token in self.source:
            self.check()
            self.n, self.first = self.n + 1, self.first or time.perf_counter()
            yield token
        self.ended = True


def answer(job: Job, server, engine, tok, texts: Texts, say) -> None:
    """Write the answer to a job, piece by piece, into its queue; raise Disconnected if the client leaves."""
    r, started = job.request, time.perf_counter()

    def check(*_):
        if job.disconnected.is_set():
            raise Disconnected

    check()
    cached, tail = texts.reuse(r.ids, r.max_tokens)
    begin = cached
    while cached and len(r.ids) - begin > PIECE:
        engine.extend(r.ids[begin : begin + PIECE], room=len(r.ids) - begin - PIECE + r.max_tokens)
        begin += PIECE
        check()
    sampling = r.max_tokens, r.temperature, r.top_p, r.seed
    tokens = Tokens(
        engine.generate(r.ids[begin:], *sampling, follow_up=cached > 0, keep_last=tail), check
    )
    if not cached:
        engine.model.on_chunk = check  # a new reading may be broken off anywhere: nothing is lost
    try:
        for piece in tok.stream(tokens, r.stop):
            job.out.put(piece)
    finally:
        engine.model.on_chunk = lambda *_: None
    n, now = tokens.n, time.perf_counter()
    job.out.put(("length" if tokens.ended and n == r.max_tokens else "stop", usage(r, n, cached)))
    server.counts["answers"] += 1
    for name, value in (
        ("prompt_tokens", len(r.ids)),
        ("cached_tokens", cached),
        ("completion_tokens", n),
    ):
        server.counts[name] += value
    first, more = tokens.first or now, max(0, n - 1)
    say(
        f"slim: {len(r.ids):,} tokens, {cached:,} of them read before; first token {first - started:.2f} s, "
        f"then {more:,} more at {more / max(1e-9, now - first):.1f} tokens/s"
    )


# ---- the clients' side --------------------------------------------------------------------


def open_server(args) -> "Server":
    """Return a server that is bound and does not answer yet; raise ValueError for a place, key or folder of no use."""
    key = args.api_key or os.environ.get("SLIM_API_KEY") or None
    if key and (not key.isascii() or not key.isprintable() or key != key.strip()):
        raise ValueError(
            "the key must be printable ASCII without spaces around it, as a header carries no other"
        )
    host, port = check_place(args.serve, key)
    if args.cache_dir is not None:
        check_folder(args.cache_dir)
    try:
        return Server(host, port, key)
    except OSError as error:
        raise ValueError(
            f"--serve {args.serve} cannot be opened: {error.strerror or error}; take another"
        ) from None


def check_place(place: str, key: str | None) -> tuple[str, int]:
    """Return host and port of [HOST:]PORT; raise ValueError if they are none, or open to others without a key."""
    host, colon, port = place.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") if colon else "127.0.0.1"
    if not (port.isascii() and port.isdigit() and int(port) < 2**16) or not host:
        raise ValueError(
            f"--serve {place!r} is not [HOST:]PORT with a port within 0..65535; give one such as 8080"
        )
    if not key and not is_loopback(host):
        raise ValueError(
            f"--serve {place} is open to other machines; set a key with --api-key or $SLIM_API_KEY"
        )
    return host, int(port)


def is_loopback(host: str) -> bool:
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Server(socketserver.ThreadingTCPServer):
    """Bound when made; answers after `ready` and `serve_forever`."""

    allow_reuse_address, daemon_threads, request_queue_size = True, True, 128

    def __init__(self, host: str, port: int, key: str | None):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}"
        self.key, self.jobs, self.stopping = key, queue.SimpleQueue(), threading.Event()
        self.clients: set[socket.socket] = set()
        self.arriving: dict[
            socket.socket, float
        ] = {}  # connections whose request is not here yet: until when
        names = (
            "answers",
            "errors",
            "disconnected",
            "prompt_tokens",
            "cached_tokens",
            "completion_tokens",
        )
        self.counts, self.engine_stats = dict.fromkeys(names, 0), {}

    def ready(self, engine, tok, args) -> None:
        self.model = os.path.basename(
            os.path.abspath(args.ckpt)
        )  # of --ckpt .; no hash where it lies in a cache
        self.max_len, self.tok, self.args = engine.config.max_len, tok, args
        self.created = int(time.time())

    def close(self) -> None:
        """Close, once the answers that are written have been sent, or after a few seconds."""
        while not self.jobs.empty():
            if job := self.jobs.get():
                job.out.put(ApiError(503, "the server is closing"))
        until = time.monotonic() + 5
        while time.monotonic() < until and self.clients - set(self.arriving):
            time.sleep(0.02)
        self.server_close()

    def process_request(self, request, client_address):
        if len(self.arriving) >= 2 * MOST_CLIENTS:
            return self.shutdown_request(request)
        if len(self.clients) < MOST_CLIENTS:
            self.clients.add(request)  # the others are told that there are too many
        self.arriving[request] = time.monotonic() + TIMEOUT
        super().process_request(request, client_address)

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.arriving.pop(request, None)
            self.clients.discard(request)

    def service_actions(self):
        """Every half second: close connections whose request does not come."""
        for request, until in list(self.arriving.items()):
            if time.monotonic() > until:
                with contextlib.suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address):
        """A connection that broke: nobody is there to be told."""


class Handler(BaseHTTPRequestHandler):
    """One connection, one request."""

    protocol_version, timeout = "HTTP/1.1", TIMEOUT

    def version_string(self):
        return "Slim"

    def do_GET(self):
        self.guarded(self.get)

    def do_POST(self):
        self.guarded(self.post)

    def do_OPTIONS(self):
        """A browser asks whether a page of another site may send its request; the key decides, not the site."""
        self.guarded(
            lambda path: (
                self.send_head(204, "text/plain", {}) if self.server.key else self.post(path)
            )
        )

    def guarded(self, method) -> None:
        """Run a method; what it raises is sent as an error object, if there is still somebody."""
        self.close_connection, self.streaming = True, False
        try:
            try:
                self.check_caller()
                method(unquote(self.path.partition("?")[0]).rstrip("/") or "/")
            except ApiError as error:
                self.server.counts["errors"] += 1
                self.send_event(error.body) if self.streaming else self.send_json(
                    error.status, error.body
                )
            self.linger()
        except OSError:  # the client has left
            pass

    def check_caller(self) -> None:
        """Refuse callers without the key and, where there is none, pages of other sites in this machine's browser."""
        if self.connection not in self.server.clients:
            raise ApiError(
                503,
                f"{MOST_CLIENTS} clients are being served, the most there may be; try again later",
            )
        key, given = self.server.key, self.headers.get("Authorization", "")
        free = self.path == "/health" or self.command == "OPTIONS"
        if key and not free and not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
            raise ApiError(
                401,
                "the key is missing or wrong; send Authorization: Bearer KEY",
                None,
                "invalid_api_key",
            )
        host, origin = self.headers.get("Host", "localhost").lower(), self.headers.get("Origin")
        name = host[: host.rfind("]") + 1] or host.partition(":")[0]
        if not key and (
            not is_loopback(name.strip("[]")) or origin and origin.lower() != f"http://{host}"
        ):
            raise ApiError(
                403,
                f"requests to {host!r:.60} from {origin or 'there'!r:.60} need a key: start the server with "
                "--api-key or $SLIM_API_KEY; without one, only programs of this machine are served, at 127.0.0.1",
            )

    def get(self, path: str) -> None:
        s = self.server
        card = {
            "id": s.model,
            "object": "model",
            "created": s.created,
            "owned_by": "slim",
            "context_length": s.max_len,
        }
        if path == "/health":
            self.send_json(200, {"status": "ok"})
        elif path == "/v1/models":
            self.send_json(200, {"object": "list", "data": [card]})
        elif path == f"/v1/models/{s.model}":
            self.send_json(200, card)
        elif path == "/v1/stats":
            self.send_json(
                200, s.counts | {"waiting": s.jobs.qsize(), "conversation": s.engine_stats}
            )
        else:
            raise self.no_such(path)

    def no_such(self, path: str) -> ApiError:
        paths = "/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/stats", "/health"
        if path in paths:
            return ApiError(405, f"{path:.60} does not take {self.command}")
        return ApiError(404, f"there is no {path!r:.60}; there are {', '.join(paths)}")

    def post(self, path: str) -> None:
        s = self.server
        if path not in ("/v1/chat/completions", "/v1/completions"):
            raise self.no_such(path)
        try:
            body = json.loads(self.body())
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is not JSON: {error!s:.100}") from None
        self.server.arriving.pop(self.connection, None)
        r = parse(path.endswith("chat/completions"), body, s.tok, s.model, s.max_len, s.args)
        if s.stopping.is_set():
            raise ApiError(503, "the server is closing")
        job = Job(r)
        s.jobs.put(job)
        try:
            self.stream(job) if r.stream else self.collect(job)
        finally:
            job.disconnected.set()  # harmless once the answer is complete

    def body(self) -> bytes:
        n = self.headers.get("Content-Length", "")
        if not (n.isascii() and n.isdigit() and len(n) < 20):
            raise ApiError(411, "the request needs a Content-Length; a body in chunks is not read")
        if int(n) > MOST_BYTES:
            raise ApiError(413, f"the body has {int(n):,} bytes; at most {MOST_BYTES:,} are read")
        data = self.rfile.read(int(n))
        if len(data) < int(n):
            raise ApiError(400, f"the body ended after {len(data):,} of {int(n):,} bytes")
        return data

    # ---- answers

    def events(self, job: Job, idle=lambda: None):
        """Yield what the engine puts out for a job, up to (finish reason, usage); raise its ApiError, OSError if the
        client leaves. Calls `idle` after every IDLE seconds without news.
        """
        said = time.monotonic()
        while True:
            try:
                event = job.out.get(timeout=0.2)
            except queue.Empty:
                self.check_there()
                if time.monotonic() - said > IDLE:
                    said = time.monotonic()
                    idle()
                continue
            said = time.monotonic()
            if isinstance(event, ApiError):
                raise event
            yield event
            if isinstance(event, tuple):
                return

    def check_there(self) -> None:
        """Raise ConnectionError if the client has closed the connection."""
        self.connection.settimeout(0)
        try:
            if self.connection.recv(1, socket.MSG_PEEK) == b"":
                raise ConnectionAbortedError
        except BlockingIOError:
            pass
        finally:
            self.connection.settimeout(TIMEOUT)

    def collect(self, job: Job) -> None:
        *pieces, (finish, used) = self.events(job)
        self.send_json(200, whole(job.request, "".join(pieces), finish, used))

    def stream(self, job: Job) -> None:
        """Server-sent events; the status line waits for the first one, so that an error can still have its own."""
        r = job.request
        for event in self.events(job, idle=lambda: self.send_event(None)):
            if isinstance(event, tuple):
                finish, used = event
                self.open_stream(r)
                self.send_event(chunk(r, finish=finish))
                if r.include_usage:
                    self.send_event(chunk(r, used=used))
            else:
                self.open_stream(r)
                self.send_event(chunk(r, event))
        self.wfile.write(b"data: [DONE]\n\n")

    def open_stream(self, r: Request) -> None:
        """Send the first event of a chat, which says who speaks."""
        if r.chat and self.streaming != "open":
            self.send_event(chunk(r))
            self.streaming = "open"

    def send_event(self, event: dict | None) -> None:
        """Send one event, or a comment, which clients skip; before the first one the headers."""
        if not self.streaming:
            self.streaming = "headers"
            self.send_head(200, "text/event-stream", {"Cache-Control": "no-cache"})
        self.wfile.write(
            b": still reading\n\n"
            if event is None
            else b"data: " + json.dumps(event).encode() + b"\n\n"
        )

    def send_json(self, status: int, value: dict) -> None:
        data = json.dumps(value).encode() + b"\n"
        self.send_head(status, "application/json", {"Content-Length": str(len(data))})
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_head(self, status: int, kind: str, more: dict) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Connection": "close"} | more
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.server.key:  # pages of any site may read the answer: they had the key
            headers |= {
                "Access-Control-Allow-Origin": "*",
                "Access-Control-Allow-Headers": "Authorization, *",
            }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def linger(self) -> None:
        """Read away what is left of a refused body: closing on it would cut off the answer before it is read."""
        self.connection.shutdown(socket.SHUT_WR)
        self.server.arriving.setdefault(self.connection, time.monotonic() + TIMEOUT)
        while self.connection.recv(2**16):
            pass

    def send_error(self, code, message=None, explain=None):
        """What the standard library refuses by itself: a bad request line, too long a header, an unknown method."""
        self.server.counts["errors"] += 1
        self.close_connection, self.request_version = (
            True,
            self.protocol_version,
        )  # a status line for nonsense too
        code = 405 if code == 501 else int(code)
        with contextlib.suppress(OSError):
            self.send_json(code, ApiError(code, message or HTTPStatus(code).phrase).body)

    def log_message(self, *args):
        """The engine's side says what is worth it."""
