"""The clients' side of the server: every connection has a thread and carries one request.

A thread reads and checks the request, puts a job in the queue, and writes the answer as it comes
out of the job's own queue. So a slow client holds up nobody.
"""

import contextlib
import hmac
import ipaddress
import json
import os
import queue
import socket
import socketserver
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote

from loading.files import one_line
from serve import api, ollama, page
from serve.api import ApiError, parse
from serve.texts import check_folder
from serve.worker import Job

MOST_BYTES = 32 * 2**20  # of a request's body
MOST_CLIENTS = 256  # requests at a time, those that wait included
TIMEOUT = 30.0  # seconds for a request to arrive, and for a client to take a piece of its answer
IDLE = 10.0  # seconds without news after which a stream sends a comment
CHECK = 0.2  # seconds after which a client is checked again
COUNTERS = "answers errors disconnected prompt_tokens cached_tokens completion_tokens".split()
COUNT = "/v1/slim/count"
READ = "/v1/slim/read"
MAP = "/v1/slim/map"
TEXTS = "/v1/slim/texts"
ANSWERS = (api.CHAT, api.COMPLETIONS, ollama.CHAT, ollama.GENERATE)
FACTS = ("/v1/models", "/v1/stats", "/health", ollama.TAGS, ollama.VERSION)  # see Server.facts
PATHS = ("/", *ANSWERS, COUNT, READ, MAP, TEXTS, ollama.SHOW, *FACTS)


# ---- the place ----------------------------------------------------------------------------


def open_server(args, say=print) -> "Server":
    """Return a server that is bound and does not answer yet.

    Raises ValueError for a place, key or folder that cannot be used.
    """
    if args.api_key == "":
        raise ValueError("--api-key is empty; give a key, or leave the flag out")
    key = args.api_key or os.environ.get("SLIM_API_KEY") or None
    if key and (not key.isascii() or not key.isprintable() or key != key.strip()):
        problem = "the key must be printable ASCII without spaces around it"
        raise ValueError(f"{problem}, to fit in a header")
    host, port = check_place(args.serve, key)
    if args.cache_dir is not None:
        check_folder(args.cache_dir)
    try:
        return Server(host, port, key, say)
    except OSError as error:
        problem = f"--serve {args.serve} cannot be opened: {error.strerror or error}"
        raise ValueError(f"{problem}; take another") from None


def check_place(place: str, key: str | None) -> tuple[str, int]:
    """Return host and port of [HOST:]PORT.

    Raises ValueError if they are none, or open to other machines without a key.
    """
    host, colon, port = place.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") if colon else "127.0.0.1"
    if not host or not (port.isascii() and port.isdigit() and int(port) < 2**16):
        problem = f"--serve {place!r} is not [HOST:]PORT with a port within 0..65535"
        raise ValueError(f"{problem}; give one such as 8080")
    if not key and not is_loopback(host):
        problem = f"--serve {place} is open to other machines"
        raise ValueError(f"{problem}; set a key with --api-key or $SLIM_API_KEY")
    return host, int(port)


def is_loopback(host: str) -> bool:
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# ---- connections --------------------------------------------------------------------------


class Server(socketserver.ThreadingTCPServer):
    """Bound when made; answers after `ready` and `serve_forever`."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, key: str | None, say=print):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self.server_address[1]}"
        self.key = key
        self.say = say
        self.jobs = queue.SimpleQueue()
        self.stopping = threading.Event()
        self.arriving: dict[socket.socket, float] = {}  # whose request is not here yet: until when
        self.clients: set[socket.socket] = set()  # that may be served: their caller was checked
        self.counts = Counter(dict.fromkeys(COUNTERS, 0))
        self.engine_stats = {}

    def ready(self, engine, tok, args, texts=None) -> None:
        self.model = os.path.basename(os.path.abspath(args.ckpt))  # even of --ckpt .
        self.max_len = engine.config.max_len
        self.tok = tok
        self.args = args
        self.texts = texts
        self.created = int(time.time())

    def facts(self) -> dict[str, dict]:
        """Return the answers of the paths that only tell something."""
        card = {
            "id": self.model,
            "object": "model",
            "created": self.created,
            "owned_by": "slim",
            "context_length": self.max_len,
        }
        state = {"waiting": self.jobs.qsize(), "conversation": self.engine_stats}
        return {
            "/health": {"status": "ok"},
            "/v1/models": {"object": "list", "data": [card]},
            f"/v1/models/{self.model}": card,
            "/v1/stats": {**self.counts, **state},
            ollama.TAGS: ollama.tags(self.model, self.created),
            ollama.VERSION: ollama.OLLAMA_VERSION,
        }

    def close(self) -> None:
        """Close, once the answers that are written have been sent, or after a few seconds."""
        while not self.jobs.empty():
            self.jobs.get().out.put(ApiError(503, "the server is closing"))
        until = time.monotonic() + 5
        while time.monotonic() < until and self.clients - set(self.arriving):
            time.sleep(0.02)
        self.server_close()

    def process_request(self, request, client_address):
        """Start a thread for a connection."""
        self.arriving[request] = time.monotonic() + TIMEOUT
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        """Close a connection, however it ended: also if no thread could be started for it."""
        self.arriving.pop(request, None)
        self.clients.discard(request)
        super().shutdown_request(request)

    def service_actions(self):
        """End connections whose request does not come; if too many are unchecked, the oldest.

        Called for every connection, and every half second.
        """
        now = time.monotonic()
        late = [request for request, until in list(self.arriving.items()) if now > until]
        unchecked = [request for request in list(self.arriving) if request not in self.clients]
        for request in [*late, *unchecked[: -2 * MOST_CLIENTS]]:
            with contextlib.suppress(OSError):  # it is closed already
                request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address):
        """Log what ended a connection, unless it was the client."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            self.log(error)

    def log(self, error: BaseException) -> None:
        self.counts["errors"] += 1
        self.say(f"slim: error: {type(error).__name__}: {one_line(error)}")


# ---- one request --------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """One connection, one request."""

    protocol_version = "HTTP/1.1"
    timeout = TIMEOUT
    streaming = False  # the headers of a stream were sent

    def version_string(self):
        return "Slim"

    def do_GET(self):
        self.guarded(self.get)

    def do_POST(self):
        self.guarded(self.post)

    def do_OPTIONS(self):
        """Tell a browser by the headers whether a page of another site may send its request."""
        self.guarded(lambda path: self.send_head(204, "text/plain", {}))

    def guarded(self, method) -> None:
        """Run a method; what it raises is sent as an error object, if the client is still there."""
        self.close_connection = True
        try:
            self.check_caller()
            method(unquote(self.path.partition("?")[0]).rstrip("/") or "/")
        except OSError:  # the client has left; see Server.handle_error
            raise
        except ApiError as error:
            self.server.counts["errors"] += 1
            self.refuse(error)
        except Exception as error:  # a bug: the client and the log are told
            self.server.log(error)
            self.refuse(ApiError(500, f"the server failed: {type(error).__name__}"))
        self.linger()

    def refuse(self, error: ApiError) -> None:
        body = self.dialect.error_body(error)
        if self.streaming:
            self.send_event(body)
        else:
            self.send_json(error.status, body)

    @property
    def dialect(self):
        """The module that reads and writes the JSON of a path."""
        return ollama if self.path.startswith("/api/") else api

    def check_caller(self) -> None:
        """Refuse callers without the key; without a key, other sites; then too many clients."""
        if self.server.key:
            self.check_key()
        else:
            self.check_origin()
        self.server.clients.add(self.connection)  # first: others may come at the same time
        if len(self.server.clients) > MOST_CLIENTS:
            self.server.clients.discard(self.connection)
            problem = f"{MOST_CLIENTS} clients are being served, the most there may be"
            raise ApiError(503, f"{problem}; try again later")

    def check_key(self) -> None:
        given = self.headers.get("Authorization", "")
        path = self.path.partition("?")[0]
        free = path in ("/", "/health") or self.command == "OPTIONS"
        good = hmac.compare_digest(given.encode(), f"Bearer {self.server.key}".encode())
        if not free and not good:
            message = "the key is missing or wrong; send Authorization: Bearer KEY"
            raise ApiError(401, message, None, "invalid_api_key")

    def check_origin(self) -> None:
        """Serve programs of this machine, and in its browser only the server's own pages."""
        host = self.headers.get("Host", "localhost").lower()
        origin = self.headers.get("Origin")
        name = host[: host.rfind("]") + 1] or host.partition(":")[0]
        foreign = origin and origin.lower() != f"http://{host}"
        if foreign or not is_loopback(name.strip("[]")):
            source = f" from {origin!r:.60}" if origin else ""
            remedy = "start the server with --api-key or $SLIM_API_KEY, or ask it at 127.0.0.1"
            raise ApiError(403, f"requests to {host!r:.60}{source} need a key: {remedy}")

    def get(self, path: str) -> None:
        server = self.server
        server.arriving.pop(self.connection, None)
        facts = server.facts()
        if path == "/":
            data, headers = page.html()
            self.send_data(200, "text/html; charset=utf-8", data, headers)
        elif path == MAP:
            self.run_job(Job(work=page.draw))
        elif path == TEXTS:
            self.send_json(200, page.settings(server))
        elif path in facts:
            self.send_json(200, facts[path])
        else:
            raise self.no_such(path)

    def no_such(self, path: str) -> ApiError:
        if path in PATHS:
            return ApiError(405, f"{path:.60} does not take {self.command}")
        return ApiError(404, f"there is no {path!r:.60}; there are {', '.join(PATHS)}")

    def post(self, path: str) -> None:
        server = self.server
        if path not in (*ANSWERS, COUNT, READ, ollama.SHOW):
            raise self.no_such(path)
        try:
            body = json.loads(self.body())
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is not JSON: {error!s:.100}") from None
        server.arriving.pop(self.connection, None)
        model = server.tok, server.model
        if path == COUNT:
            self.send_json(200, page.count(body, server.tok, server.max_len))
        elif path == ollama.SHOW:
            self.send_json(200, ollama.show(body, server.model, server.texts.engine.config))
        elif path == READ:
            request = page.parse_read(body, *model, server.max_len, server.texts)
            self.run_job(Job(request, page.read))
        else:
            chat, body, max_len = self.dialect.read(path, body, server.max_len)
            request = parse(chat, body, *model, max_len, server.args, server.texts)
            request.path = path
            self.run_job(Job(request))

    def run_job(self, job: Job) -> None:
        """Queue a job, and send what comes of it."""
        if self.server.stopping.is_set():
            raise ApiError(503, "the server is closing")
        self.server.jobs.put(job)
        try:
            self.stream(job) if job.streams else self.collect(job)
        finally:
            job.disconnected.set()  # harmless once the answer is complete

    def body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit() and len(length) < 20):
            raise ApiError(411, "the request needs a Content-Length; a body in chunks is not read")
        n = int(length)
        if n > MOST_BYTES:
            raise ApiError(413, f"the body has {n:,} bytes; at most {MOST_BYTES:,} are read")
        data = self.rfile.read(n)
        if len(data) < n:
            raise ApiError(400, f"the body ended after {len(data):,} of {n:,} bytes")
        return data

    # ---- answers

    def events(self, job: Job):
        """Yield what the engine puts out for a job, up to (finish reason, usage).

        Raises its ApiError, or OSError if the client has left. A stream without news for IDLE
        seconds gets a comment.
        """
        checked = news = time.monotonic()
        event = None
        while not isinstance(event, tuple):
            event = None
            with contextlib.suppress(queue.Empty):
                event = job.out.get(timeout=CHECK)
            now = time.monotonic()
            if now - checked >= CHECK:  # while tokens come, too: a whole answer is written last
                self.check_there()
                checked = now
            if isinstance(event, ApiError):
                raise event
            if event is not None:
                news = now
                yield event
            elif now - news > IDLE and job.streams:
                news = now
                self.send_line(self.dialect.IDLE)

    def check_there(self) -> None:
        """Raise ConnectionError if the client has closed the connection."""
        self.connection.settimeout(0)
        with contextlib.suppress(BlockingIOError):  # nothing to read, but still there
            if not self.connection.recv(1, socket.MSG_PEEK):
                raise ConnectionAbortedError
        self.connection.settimeout(TIMEOUT)

    def collect(self, job: Job) -> None:
        """Send a whole answer, or the map."""
        *items, end = self.events(job)
        value = items[0] if job.work else self.dialect.whole(job.request, items, *end)
        self.send_json(200, value)

    def stream(self, job: Job) -> None:
        """Send events; the status line waits for the first, so that an error can have its own."""
        first = True
        for item in self.events(job):
            if isinstance(item, dict):  # for the page
                self.send_event(item)
            elif not job.work:
                for event in self.dialect.events(job.request, item, first):
                    self.send_event(event)
                first = False
        self.wfile.write(self.dialect.END)

    def send_event(self, event: dict) -> None:
        self.send_line(self.dialect.EVENT % json.dumps(event).encode())

    def send_line(self, line: bytes) -> None:
        """Send a line of a stream; before the first one the headers."""
        if not self.streaming:
            self.streaming = True
            self.send_head(200, self.dialect.KIND, {"Cache-Control": "no-cache"})
        self.wfile.write(line)

    def send_json(self, status: int, value: dict) -> None:
        self.send_data(status, "application/json", json.dumps(value).encode() + b"\n", {})

    def send_data(self, status: int, kind: str, data: bytes, more: dict) -> None:
        self.send_head(status, kind, {"Content-Length": str(len(data))} | more)
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_head(self, status: int, kind: str, more: dict) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Connection": "close"} | more
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.server.key:  # pages of any site may read the answer: they had the key
            headers["Access-Control-Allow-Origin"] = "*"
            headers["Access-Control-Allow-Headers"] = "Authorization, *"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def linger(self) -> None:
        """Read away the rest of a refused body: closing on it would cut off the answer."""
        self.connection.shutdown(socket.SHUT_WR)
        self.server.arriving.setdefault(self.connection, time.monotonic() + TIMEOUT)
        while self.connection.recv(2**16):
            pass

    def send_error(self, code, message=None, explain=None):
        """Refuse what the standard library does not read, such as a bad request line."""
        self.server.counts["errors"] += 1
        self.close_connection = True
        self.request_version = self.protocol_version  # a status line for nonsense too
        status = 405 if code == 501 else int(code)
        self.send_json(status, ApiError(status, message or self.responses[status][0]).body)

    def log_message(self, *args):
        """Print nothing: the engine's side logs the answers."""
