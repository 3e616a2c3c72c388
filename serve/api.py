"""OpenAI's API as data: JSON becomes a Request, an answer JSON, whatever is wrong an ApiError."""

import hashlib
import json
import time
import uuid
from dataclasses import dataclass, field

from serve.texts import Day, Texts

MOST_STOPS = 16


class ApiError(Exception):
    """What a client is told: an HTTP status, and OpenAI's error object."""

    def __init__(self, status: int, message: str, param: str | None = None, code=None):
        kind = "invalid_request_error" if status < 500 else "server_error"
        message = " ".join(message.split())
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(kw_only=True)
class Request:
    """One answer to be written, checked."""

    chat: bool
    model: str
    ids: list[int]  # the whole prompt
    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: list[str]
    stream: bool
    include_usage: bool
    day: Day | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))


# ---- from JSON ----------------------------------------------------------------------------

USED = "model max_tokens temperature top_p seed stop stream stream_options".split()
# Parameters that Slim does not have, with the values that change nothing. Other values are
# refused, so that nobody waits for what never comes.
HARMLESS = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
}
IGNORED = (
    "user metadata store service_tier safety_identifier "
    "prompt_cache_key prompt_cache_retention parallel_tool_calls"
).split()
KINDS = {
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "an object",
    bool: "true or false",
    str: "a string",
}


def parse(
    chat: bool, body, tok, model: str, max_len: int, defaults, texts: Texts | None = None
) -> Request:
    """Check a body and return the Request; raise ApiError that names the parameter.

    model: the name that is served. max_len: the model's context in tokens. defaults: for what the
    body leaves open. texts: conversations that it may go on with, whose dates are held.
    """
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    body = {key: value for key, value in body.items() if value is not None}
    check_names(body, chat)
    check_model(get(body, "model", str, None), model)
    day = None
    if not chat:
        ids = prompt_ids(tok, body.get("prompt", ""))
    else:
        turns = read_turns(get(body, "messages", list, []))
        if texts and "strftime_now" in getattr(tok.template, "source", ""):
            day, ids = texts.day_of(opening(turns), lambda date: turn_ids(tok, turns, date))
        else:
            ids = turn_ids(tok, turns)
    check_length(len(ids), max_len, "messages" if chat else "prompt")
    max_tokens = get(body, "max_tokens", int, defaults.max_new_tokens, 1)
    if chat:
        max_tokens = get(body, "max_completion_tokens", int, max_tokens, 1)
    temperature = float(get(body, "temperature", (int, float), defaults.temperature, 0, 2))
    top_p = float(get(body, "top_p", (int, float), defaults.top_p, 0, 1))
    seed = get(body, "seed", int, defaults.seed)
    options = get(body, "stream_options", dict, {})
    return Request(
        chat=chat,
        model=model,
        ids=ids,
        max_tokens=min(max_tokens, max_len - len(ids)),
        temperature=temperature if temperature >= 1e-6 else 0.0,
        top_p=max(1e-6, top_p),
        seed=None if seed is None else seed % 2**63,
        stop=read_stop(body.get("stop", defaults.stop)),
        stream=get(body, "stream", bool, False),
        include_usage=get(options, "include_usage", bool, False),
        day=day,
    )


def check_names(body: dict, chat: bool) -> None:
    """Refuse parameters that are unknown, or that ask for what Slim does not do."""
    prompt = ("messages", "max_completion_tokens") if chat else ("prompt",)
    for key, value in body.items():
        if key in HARMLESS and not changes_nothing(value, HARMLESS[key]):
            message = f"{key} {value!r:.60} is not supported; leave it out"
            raise ApiError(400, message, key, "unsupported_value")
        if key not in (*USED, *prompt, *HARMLESS, *IGNORED):
            message = f"unknown parameter {key!r:.60}; leave it out"
            raise ApiError(400, message, key[:60], "unknown_parameter")


def changes_nothing(value, harmless: tuple) -> bool:
    """Tell whether a value is a harmless one; 1.0 may stand for 1, but True may not."""
    return any(value == ok and type(value) in (type(ok), float) for ok in harmless)


def check_model(name: str | None, model: str) -> None:
    if name is None:
        raise ApiError(400, f"model is missing; this server has {model!r}", "model")
    if name != model:
        message = f"the model {name!r:.60} does not exist; this server has {model!r}"
        raise ApiError(404, message, "model", "model_not_found")


def check_length(n_prompt: int, max_len: int, param: str) -> None:
    if n_prompt >= max_len:
        message = (
            f"the prompt has {n_prompt:,} tokens; this model's context is {max_len:,}, "
            "the answer included"
        )
        raise ApiError(400, message, param, "context_length_exceeded")


def read_stop(stop) -> list[str]:
    stops = [stop] if isinstance(stop, str) else stop
    good = isinstance(stops, list) and len(stops) <= MOST_STOPS
    if not good or not all(isinstance(text, str) and text for text in stops):
        message = f"stop must be a string, or a list of up to {MOST_STOPS}, none of them empty"
        raise ApiError(400, message, "stop")
    return stops


def get(body: dict, key: str, kind, default, least=float("-inf"), most=float("inf")):
    """Return a value of the body, of the right kind and within its limits, or the default."""
    value = body.get(key)
    if value is None:
        return default
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if type(value) not in kinds:
        raise ApiError(400, f"{key} is {value!r:.60}; it must be {KINDS[kinds[-1]]}", key)
    if least > float("-inf") and not least <= value <= most:
        raise ApiError(400, f"{key} is {value!r:.60}; it must be within {least}..{most}", key)
    return value


def prompt_ids(tok, prompt) -> list[int]:
    """Return the ids of a completion's prompt: a text, a list of ids, or a list of one of these."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str) and prompt:
        bos = [] if tok.bos_id is None else [tok.bos_id]
        try:
            return bos + tok.encode(prompt, after=bos)
        except ValueError as error:  # a token that the model lacks
            raise ApiError(400, str(error), "prompt") from None
    if isinstance(prompt, list) and prompt:
        if all(type(token) is int and 0 <= token < tok.vocab_size for token in prompt):
            return prompt
    message = f"prompt must be one text, or one list of ids below {tok.vocab_size}, and not empty"
    raise ApiError(400, message, "prompt")


def chat_ids(tok, messages) -> list[int]:
    """Return the ids of a conversation, ready for the answer; see `turn_ids`."""
    return turn_ids(tok, read_turns(messages))


def read_turns(messages) -> list[dict]:
    """Return role and content of every message; raise ApiError if there is nothing to answer."""
    turns = [read_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    if not any(turn["role"] == "user" for turn in turns):
        raise ApiError(400, "messages must be a list with a user's message in it", "messages")
    return turns


def turn_ids(tok, turns: list[dict], date=None) -> list[int]:
    """Return the ids of turns, ready for the answer; a last turn of the assistant begins it.

    By the model's own chat template, with this date; without one, the texts follow each other, a
    line each.
    """
    begun = ""
    if turns[-1]["role"] == "assistant":
        begun = turns[-1]["content"]
        turns = turns[:-1]
    try:
        if tok.template is None:
            ids = tok.chat("\n".join(turn["content"] for turn in turns))
        else:
            ids = tok.chat_messages(turns, date=date)
        return ids + tok.encode(begun, after=ids)
    except ValueError as error:  # of the template, or a token that the model lacks
        raise ApiError(400, str(error), "messages") from None


def opening(turns: list[dict]) -> str:
    """Return a hash of how a conversation begins, up to its user's first thousand characters."""
    users = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
    first = [(turn["role"], turn["content"][:1000]) for turn in turns[: users[0] + 1]]
    return hashlib.sha256(json.dumps(first).encode()).hexdigest()[:16]


def read_message(message, name: str) -> dict[str, str]:
    """Return role and text of a message, whose content may be a list of text parts."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ApiError(400, f"{name} must be an object with a role and content", "messages")
    parts = message.get("content")
    if isinstance(parts, str):
        parts = [{"type": "text", "text": parts}]
    if not isinstance(parts, list) or not all(map(is_text, parts)) or message.get("tool_calls"):
        problem = f"{name} must have text for content; nothing else can be read"
        raise ApiError(400, problem, "messages")
    role = "system" if message["role"] == "developer" else message["role"]
    return {"role": role, "content": "".join(part["text"] for part in parts)}


def is_text(part) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


# ---- to JSON ------------------------------------------------------------------------------


def usage(request: Request, n_new: int, n_cached: int) -> dict:
    n_prompt = len(request.ids)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_new,
        "total_tokens": n_prompt + n_new,
        "prompt_tokens_details": {"cached_tokens": n_cached},
    }


def whole(request: Request, text: str, finish: str, used: dict) -> dict:
    """Return the answer to a request that is not streamed."""
    if request.chat:
        head = answer_head(request, "chat.completion")
        content = {"message": {"role": "assistant", "content": text, "refusal": None}}
    else:
        head = answer_head(request, "text_completion")
        content = {"text": text}
    return head | {"choices": [choice(content, finish)], "usage": used}


def chunk(request: Request, text: str | None = None, finish=None, used=None) -> dict:
    """Return one event of a stream: a piece of text, the finish reason, or what was used.

    Without any of them: the first event of a chat, which names the role.
    """
    if not request.chat:
        content = {"text": text or ""}
    elif finish:
        content = {"delta": {}}
    elif text is None:
        content = {"delta": {"role": "assistant", "content": ""}}
    else:
        content = {"delta": {"content": text}}
    event = answer_head(request, "chat.completion.chunk" if request.chat else "text_completion")
    event["choices"] = [] if used else [choice(content, finish)]
    if request.include_usage:
        event["usage"] = used
    return event


def answer_head(request: Request, kind: str) -> dict:
    return {
        "id": ("chatcmpl-" if request.chat else "cmpl-") + request.id,
        "object": kind,
        "created": request.created,
        "model": request.model,
    }


def choice(content: dict, finish: str | None) -> dict:
    return {"index": 0, **content, "logprobs": None, "finish_reason": finish}
