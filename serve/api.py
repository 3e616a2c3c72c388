"""OpenAI's API as data: a request's JSON becomes a Request, an answer becomes JSON, all that is wrong an ApiError."""

import time
import uuid
from dataclasses import dataclass, field

MOST_STOPS = 16


class ApiError(Exception):
    """What a client is told: an HTTP status, and OpenAI's error object."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ):
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.status = status
        self.body = {
            "error": {
                "message": " ".join(message.split()),
                "type": kind,
                "param": param,
                "code": code,
            }
        }


@dataclass
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
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))


# ---- from JSON ----------------------------------------------------------------------------

WANTED = "model", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options"
# What asks for no other answer; a value elsewhere than here is refused, so that nobody waits for what never comes.
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
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
    "prompt_cache_retention",
)


def parse(chat: bool, body, tok, model: str, max_len: int, defaults) -> Request:
    """Check a body and return the Request; raise ApiError that names the parameter.

    model: the name that is served; max_len: the model's context in tokens; defaults: max_new_tokens,
    temperature, top_p and seed for what the body leaves open.
    """
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    body = {key: value for key, value in body.items() if value is not None}
    extra = ("messages", "max_completion_tokens") if chat else ("prompt",)
    for key, value in body.items():
        if key in HARMLESS and not any(
            value == ok and type(value) in (type(ok), float) for ok in HARMLESS[key]
        ):
            raise ApiError(
                400, f"{key} {value!r:.60} is not supported; leave it out", key, "unsupported_value"
            )
        if key not in (*WANTED, *extra, *HARMLESS, *IGNORED):
            raise ApiError(
                400, f"unknown parameter {key!r:.60}; leave it out", key[:60], "unknown_parameter"
            )
    name = get(body, "model", str, None)
    if name is None:
        raise ApiError(400, f"model is missing; this server has {model!r}", "model")
    if name != model:
        raise ApiError(
            404,
            f"the model {name!r:.60} does not exist; this server has {model!r}",
            "model",
            "model_not_found",
        )
    ids = (
        chat_ids(tok, get(body, "messages", list, []))
        if chat
        else prompt_ids(tok, body.get("prompt", ""))
    )
    if len(ids) >= max_len:
        raise ApiError(
            400,
            f"the prompt has {len(ids):,} tokens; this model's context is {max_len:,}, the answer included",
            "messages" if chat else "prompt",
            "context_length_exceeded",
        )
    asked = get(body, "max_tokens", int, defaults.max_new_tokens, 1)
    if chat:
        asked = get(body, "max_completion_tokens", int, asked, 1)
    stop = body.get("stop", defaults.stop)
    stop = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stop, list)
        or len(stop) > MOST_STOPS
        or not all(isinstance(s, str) and s for s in stop)
    ):
        raise ApiError(
            400,
            f"stop must be a string, or a list of up to {MOST_STOPS}, none of them empty",
            "stop",
        )
    temperature = float(get(body, "temperature", (int, float), defaults.temperature, 0, 2))
    seed = get(body, "seed", int, defaults.seed)
    return Request(
        chat,
        model,
        ids,
        min(asked, max_len - len(ids)),
        temperature if temperature >= 1e-6 else 0.0,
        max(1e-6, float(get(body, "top_p", (int, float), defaults.top_p, 0, 1))),
        None if seed is None else seed % 2**63,
        stop,
        get(body, "stream", bool, False),
        get(get(body, "stream_options", dict, {}), "include_usage", bool, False),
    )


def get(body: dict, key: str, kind, default, least=float("-inf"), most=float("inf")):
    """Return a value of the body, of the right kind and within its limits, or the default."""
    if body.get(key) is None:
        return default
    value, kinds = body[key], kind if isinstance(kind, tuple) else (kind,)
    if type(value) not in kinds:
        names = {
            int: "a whole number",
            float: "a number",
            list: "a list",
            dict: "an object",
            bool: "true or false",
        }
        raise ApiError(
            400, f"{key} is {value!r:.60}; it must be {names.get(kinds[-1], 'a string')}", key
        )
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
    if (
        isinstance(prompt, list)
        and prompt
        and all(type(i) is int and 0 <= i < tok.vocab_size for i in prompt)
    ):
        return prompt
    raise ApiError(
        400,
        f"prompt must be one text, or one list of ids below {tok.vocab_size}, and not empty",
        "prompt",
    )


def chat_ids(tok, messages) -> list[int]:
    """Return the ids of a conversation, ready for the answer; an assistant's message at the end is the answer's start.

    By the model's own chat template; without one, the texts follow each other, a line each.
    """
    said = [read_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    begun = said.pop()[1] if said and said[-1][0] == "assistant" else ""
    if not any(role == "user" for role, _ in said):
        raise ApiError(400, "messages must be a list with a user's message in it", "messages")
    try:
        if tok.template is None:
            ids = tok.chat("\n".join(text for _, text in said))
        else:
            ids = tok.chat_messages([{"role": role, "content": text} for role, text in said])
        return ids + tok.encode(begun, after=ids)
    except ValueError as error:  # of the template, or a token that the model lacks
        raise ApiError(400, str(error), "messages") from None


def read_message(message, name: str) -> tuple[str, str]:
    """Return role and text of a message, whose content may be a list of text parts."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ApiError(400, f"{name} must be an object with a role and content", "messages")
    parts = message.get("content")
    if isinstance(parts, str):
        parts = [{"type": "text", "text": parts}]
    good = isinstance(parts, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in parts
    )
    if not good or message.get("tool_calls"):
        raise ApiError(
            400, f"{name} must have text for content; nothing else can be read", "messages"
        )
    role = {"developer": "system"}.get(message["role"], message["role"])
    return role, "".join(part["text"] for part in parts)


# ---- to JSON ------------------------------------------------------------------------------


def usage(r: Request, n_new: int, n_cached: int) -> dict:
    return {
        "prompt_tokens": len(r.ids),
        "completion_tokens": n_new,
        "total_tokens": len(r.ids) + n_new,
        "prompt_tokens_details": {"cached_tokens": n_cached},
    }


def whole(r: Request, text: str, finish: str, used: dict) -> dict:
    """Return the answer to a request that is not streamed."""
    said = (
        {"message": {"role": "assistant", "content": text, "refusal": None}}
        if r.chat
        else {"text": text}
    )
    kind = "chat.completion" if r.chat else "text_completion"
    return head(r, kind) | {"choices": [choice(said, finish)], "usage": used}


def chunk(
    r: Request, text: str | None = None, finish: str | None = None, used: dict | None = None
) -> dict:
    """Return one event of a stream: a piece of text, the end, or what was used; of a chat, no text: its first event."""
    said = {"text": text or ""}
    if r.chat:
        said = {
            "delta": {}
            if finish
            else {"role": "assistant", "content": ""}
            if text is None
            else {"content": text}
        }
    event = head(r, "chat.completion.chunk" if r.chat else "text_completion")
    event["choices"] = [] if used else [choice(said, finish)]
    return event | ({"usage": used} if r.include_usage else {})


def head(r: Request, kind: str) -> dict:
    return {
        "id": ("chatcmpl-" if r.chat else "cmpl-") + r.id,
        "object": kind,
        "created": r.created,
        "model": r.model,
    }


def choice(said: dict, finish: str | None) -> dict:
    return {"index": 0} | said | {"logprobs": None, "finish_reason": finish}
