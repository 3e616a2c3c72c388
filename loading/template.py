"""The model's own chat template, rendered as `transformers` does.

A template is a program that came with the weights. jinja2's sandbox keeps it from files and from Python's
internals, but not from looping forever or filling the memory. So it runs in a process of its own (this file
as a script) under limits of time and memory, and every failure there becomes one line here.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

MOST = 2**20  # bytes of a template; the longest published ones have some 20,000
SECONDS = 10


@dataclass(frozen=True)
class Template:
    path: Path  # for messages
    source: str
    tokens: dict[str, str]  # bos_token, eos_token and so on

    def render(self, messages: list[dict], **variables) -> str:
        """Return the text of a conversation, ready for the next answer. Raises ValueError if the template fails."""
        if len(self.source.encode("utf-8", "replace")) > MOST:
            raise self.error(f"it is larger than {MOST:,} bytes")
        job = {
            "source": self.source,
            "messages": messages,
            "variables": {**self.tokens, **variables},
        }
        job = {"seconds": SECONDS, "job": job}
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "PYTHONSAFEPATH": "1",
        }
        command, data = [sys.executable, __file__], json.dumps(job).encode()
        try:
            done = subprocess.run(
                command, input=data, capture_output=True, env=env, timeout=6 * SECONDS, check=False
            )
            answer = json.loads(done.stdout)
        except (subprocess.TimeoutExpired, ValueError):
            raise self.error(f"it took more than {SECONDS} s or more memory than it may") from None
        if "error" in answer:
            raise self.error(" ".join(answer["error"].split())[:300])
        return answer["text"]

    def error(self, what: str) -> ValueError:
        return ValueError(
            f"{self.path}: the chat template cannot be used: {what}; give the prompt as it is with --raw"
        )


def read_template(folder: Path, settings: dict) -> Template | None:
    """Return the chat template of a checkpoint, None if it has none; settings: its tokenizer_config.json.

    chat_template.jinja comes before the config's, and of named templates the one called default counts.
    """
    path, source = folder / "chat_template.jinja", settings.get("chat_template")
    wrong = ""
    if path.is_file():
        try:
            source = path.read_text("utf-8")
        except UnicodeDecodeError as error:
            wrong = f"it is not UTF-8 at byte {error.start}"
    else:
        path = folder / "tokenizer_config.json"
    if isinstance(source, list):
        named = {
            str(one.get("name")): one.get("template") for one in source if isinstance(one, dict)
        }
        source = named.get("default")
        wrong = "" if source else f"of {len(named)} templates, none is the default"
    if not wrong and not source:
        return None
    if not wrong and not isinstance(source, str):
        wrong = f"it is of type {type(source).__name__}, not text"
    if wrong:  # raised when the template is used; --raw does not use it
        source = f"{{{{ raise_exception('{wrong}') }}}}"
    tokens = {
        key: value.get("content") if isinstance(value, dict) else value
        for key, value in settings.items()
        if key.endswith("_token")
    }
    return Template(
        path, source, {key: value for key, value in tokens.items() if isinstance(value, str)}
    )


def render(source: str, messages: list[dict], variables: dict) -> str:
    """Render a template with what transformers gives it; raise what goes wrong."""
    from datetime import datetime

    from jinja2 import TemplateError, ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(
        ext.Extension
    ):  # {% generation %} marks answers for training; here it is just its contents
        tags = frozenset({"generation"})

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(
        value, ensure_ascii=False, indent=None, separators=None, sort_keys=False
    ):  # jinja2's escapes HTML
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
    env.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    given = {
        "messages": messages,
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
        **variables,
    }
    text, most = [], MOST + 4 * sum(len(str(message.get("content"))) for message in messages)
    for piece in env.from_string(source).generate(given):
        text.append(piece)
        most -= len(piece)
        if most < 0:
            raise TemplateError("it writes too much text")
    return "".join(text)


def main() -> None:
    """Render the job on standard input, under limits, and print its text or its error as JSON."""
    data = sys.stdin.buffer.read()
    given = json.loads(data)
    try:
        import resource

        memory = 2**28 + 32 * len(data)
        resource.setrlimit(resource.RLIMIT_CPU, (given["seconds"], given["seconds"]))
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    except (ImportError, ValueError, OSError):
        pass  # not on this system; the caller's clock remains
    try:
        answer = {"text": render(**given["job"])}
    except Exception as error:  # of any kind: it is somebody else's program
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
