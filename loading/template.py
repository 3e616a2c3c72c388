"""The model's own chat template, rendered as `transformers` does.

A template is a program that came with the weights. jinja2's sandbox keeps it from files and from
Python's internals, but not from looping forever or filling the memory. So it runs in a process of
its own (this file as a script) under limits of time and memory, and every failure there becomes one
line here.
"""

import datetime
import functools
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

MOST = 2**20  # bytes of a template; the longest published ones have some 20,000
SECONDS = 10
REMEMBERED = 2**20  # bytes of a job whose answer is kept for the next one
MEMORY = 2**28  # bytes, besides what Python has mapped before and 64 times the job
MARK = "\ufdd2"  # encloses the number of a message at its end, to see whether a template writes it
PROCESSES = threading.BoundedSemaphore(2)  # at once, of all threads of a server
NEEDED = "LD_LIBRARY_PATH", "PYTHONHOME", "SYSTEMROOT"  # by Python itself, where they are set


@dataclass(frozen=True)
class Template:
    path: Path  # for messages
    source: str
    tokens: dict[str, str]  # bos_token, eos_token and so on

    def render(self, messages: list[dict], date: datetime.date | None = None, **variables) -> str:
        """Return the text of a conversation, ready for the next answer.

        date: what the template takes for today. Raises ValueError if the template fails.
        """
        return self.render_checked(messages, date, variables)[0]

    def render_checked(
        self, messages: list[dict], date: datetime.date | None, variables: dict
    ) -> tuple[str, list[int]]:
        """Return the text, and which messages are not in it to their end."""
        if len(self.source.encode("utf-8", "replace")) > MOST:
            raise self.error(f"it is larger than {MOST:,} bytes")
        job = {
            "source": self.source,
            "messages": messages,
            "variables": {**self.tokens, **variables},
            "date": (date or datetime.date.today()).isoformat(),
        }
        data = json.dumps({"seconds": SECONDS, "job": job}).encode()
        try:
            answer = run(data) if len(data) < REMEMBERED else run.__wrapped__(data)
        except (subprocess.TimeoutExpired, ValueError):
            raise self.error(f"it took more than {SECONDS} s or more memory than it may") from None
        if "error" in answer:
            raise self.error(" ".join(answer["error"].split())[:300])
        return answer["text"], answer["dropped"]

    def error(self, what: str) -> ValueError:
        return ValueError(
            f"{self.path}: the chat template cannot be used: {what}; give the prompt as it is with "
            "--raw"
        )


@functools.lru_cache(maxsize=8)
def run(data: bytes) -> dict:
    """Run a job in a process of its own; return its answer.

    The process sees none of this one's variables, such as keys. Raises ValueError if it is killed.
    """
    env = {name: os.environ[name] for name in NEEDED if name in os.environ}
    env |= {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PYTHONSAFEPATH": "1",
        "PYTHONUTF8": "1",
        "LC_ALL": "C",  # maps no archive of locales
    }
    command = [sys.executable, __file__]
    with PROCESSES:
        done = subprocess.run(
            command, input=data, capture_output=True, env=env, timeout=6 * SECONDS, check=False
        )
    return json.loads(done.stdout)


def read_template(folder: Path, settings: dict, tokens: dict[str, str]) -> Template | None:
    """Return the chat template of a checkpoint, None if it has none.

    settings: its tokenizer_config.json; tokens: what the template may ask for, such as bos_token.
    chat_template.jinja comes before the config's; of named templates the default counts.
    """
    path = folder / "chat_template.jinja"
    source = settings.get("chat_template")
    wrong = ""
    if path.is_file():
        try:
            source = path.read_text("utf-8")
        except UnicodeDecodeError as error:
            wrong = f"it is not UTF-8 at byte {error.start}"
    else:
        path = folder / "tokenizer_config.json"
    if isinstance(source, list):
        named = {}
        for entry in source:
            if isinstance(entry, dict):
                named[str(entry.get("name"))] = entry.get("template")
        source = named.get("default")
        wrong = "" if source else f"of {len(named)} templates, none is the default"
    if not wrong and not source:
        return None
    if not wrong and not isinstance(source, str):
        wrong = f"it is of type {type(source).__name__}, not text"
    if wrong:  # raised when the template is used; --raw does not use it
        source = f"{{{{ raise_exception('{wrong}') }}}}"
    return Template(path, source, tokens)


# ---- in the process of its own ------------------------------------------------------------


def answer_job(source: str, messages: list[dict], variables: dict, date: str) -> dict:
    """Return a conversation's text, and which messages the template does not write to their end."""
    compiled = environment(datetime.date.fromisoformat(date)).from_string(source)
    text = render(compiled, messages, variables)
    marks = []
    try:
        marked = [mark_message(message, i, marks) for i, message in enumerate(messages)]
        seen = render(compiled, marked, variables)
    except Exception:  # of any kind, for a content that is not the message's own
        return {"text": text, "dropped": []}
    return {"text": text, "dropped": [i for i, mark in marks if mark not in seen]}


def mark_message(message: dict, number: int, marks: list[tuple[int, str]]) -> dict:
    """Return a message with marks in its text, and in name and arguments of its tool calls.

    marks: these are added to it, with the message's number.
    """

    def mark() -> str:
        marks.append((number, f"{MARK}{len(marks)}{MARK}"))
        return marks[-1][1]

    calls = []
    for call in message.get("tool_calls") or ():
        function = call["function"]
        name = function["name"] + mark()
        arguments = {**function["arguments"], mark(): mark()}
        calls.append({**call, "function": {"name": name, "arguments": arguments}})
    marked = {**message, "tool_calls": calls} if calls else dict(message)
    if message.get("content") or not calls:
        marked["content"] = f"{message.get('content')}{mark()}"
    return marked


def environment(date: datetime.date):
    """Return what transformers gives a template, with a date that stays."""
    from jinja2 import TemplateError, ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """{% generation %} marks answers for training; here it is just its contents."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        """Like jinja2's, which escapes HTML."""
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, Generation]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    now = datetime.datetime.combine(date, datetime.time())
    env.globals["strftime_now"] = now.strftime
    return env


def render(compiled, messages: list[dict], variables: dict) -> str:
    """Render a template; raise what goes wrong."""
    given = {
        "messages": messages,
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
        **variables,
    }
    most = MOST + 4 * sum(len(str(message)) for message in messages)
    text = []
    for piece in compiled.generate(given):
        text.append(piece)
        most -= len(piece)
        if most < 0:
            raise ValueError("it writes too much text")
    return "".join(text)


def set_limits(seconds: int, n_bytes: int) -> None:
    """Limit this process's time and memory, where the system can."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        memory = MEMORY + 64 * n_bytes + mapped_bytes()
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    except (ImportError, ValueError, OSError):
        pass  # not on this system; the caller's clock remains


def mapped_bytes() -> int:
    """Return how much address space this process has; an archive of locales may be a lot of it."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def main() -> None:
    """Run the job on standard input, under limits, and print its answer or its error as JSON."""
    data = sys.stdin.buffer.read()
    given = json.loads(data)
    set_limits(given["seconds"], len(data))
    try:
        answer = answer_job(**given["job"])
    except Exception as error:  # of any kind: it is somebody else's program
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
