"""OpenAI's API as data: JSON becomes a Request, an answer JSON, whatever is wrong an ApiError."""

import hashlib
import json
import time
import uuid
from dataclasses import dataclass, field

from serve.answers import CLOSE, OPEN, Likely, Piece, Scored, parts
from serve.texts import Day, Texts

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MOST_STOPS = 16
MOST_LIKELY = 20  # tokens whose log probabilities are told at a place


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
    stream: bool
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    include_usage: bool = False
    logprobs: int | None = None  # likeliest tokens to tell at every place; None: none is told
    echo: bool = False  # the answer begins with the prompt
    in_thought: bool | None = None  # where the answer begins; None: the model has no thoughts
    include_map: bool = False  # events of the map, see serve/page.py
    dense: bool = False
    turns: list[dict] = field(default_factory=list)  # of a chat
    talk: dict | None = None  # of a text that is to be read for the page
    day: Day | None = None
    path: str = ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))


# ---- from JSON ----------------------------------------------------------------------------

USED = "model max_tokens temperature top_p seed stop stream stream_options dense logprobs".split()
USED_IN_CHAT = "messages max_completion_tokens top_logprobs chat_template_kwargs".split()
USED_IN_COMPLETIONS = ["prompt", "echo"]
# Parameters that Slim does not have, with a value that changes nothing. Other values are refused:
# to ignore them would give another answer than was asked for.
HARMLESS = [
    (1, "n best_of repetition_penalty repeat_penalty"),
    (0, "top_k min_p frequency_penalty presence_penalty top_logprobs"),
    (-1, "top_k"),
    (False, "echo"),
    ("", "suffix format"),
    ("none", "tool_choice function_call"),
    ("auto", "tool_choice function_call"),
    ([], "tools functions"),
    ({}, "logit_bias"),
    (["text"], "modalities"),
    ({"type": "text"}, "response_format"),
]
IGNORED = (
    "user metadata store service_tier safety_identifier cache_prompt "
    "prompt_cache_key prompt_cache_retention parallel_tool_calls"
).split()
OF_A_MESSAGE = "role content name tool_call_id reasoning_content tool_calls".split()
RESERVED = "messages date tools documents add_generation_prompt".split()
KINDS = {
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "an object",
    bool: "true or false",
    str: "a string",
}


def read(path: str, body, max_len: int) -> tuple[bool, dict, int]:
    """Return whether a request asks for a chat, its body, and the context; see ollama.py."""
    return path == CHAT, body, max_len


def parse(
    chat: bool, body, tok, model: str, max_len: int, defaults, texts: Texts | None = None
) -> Request:
    """Check a body and return the Request; raise ApiError that names the parameter.

    model: the name that is served. max_len: the model's context in tokens. defaults: for what the
    body leaves open. texts: conversations that it may go on with, whose dates are held.
    """
    check_model(get(body, "model", str, None), model)
    check_names(body, chat)
    dense = get(body, "dense", bool, False)
    prompt = read_chat(body, tok, texts, dense) if chat else {"ids": prompt_ids(tok, body)}
    room = max_len - len(prompt["ids"])
    check_room(room, max_len, "messages" if chat else "prompt")
    logprobs = read_logprobs(body, chat)
    echo = get(body, "echo", bool, False)
    least = 0 if echo and logprobs is not None else 1  # a prompt may be scored alone
    temperature = get(body, "temperature", float, defaults.temperature, 0, 2)
    seed = get(body, "seed", int, defaults.seed)
    stop = body.get("stop")
    stream = get(body, "stream", bool, False)
    options = body.get("stream_options")
    options = options if isinstance(options, dict) else {}
    return Request(
        chat=chat,
        model=model,
        max_tokens=read_max_tokens(body, chat, defaults.max_new_tokens, least, room),
        temperature=temperature if temperature >= 1e-6 else 0.0,
        top_p=max(1e-6, get(body, "top_p", float, defaults.top_p, 0, 1)),
        seed=None if seed is None else seed % 2**63,
        stop=read_stop(defaults.stop if stop is None else stop),
        stream=stream,
        include_usage=options.get("include_usage") is True,
        include_map=stream and options.get("include_map") is True,
        logprobs=logprobs,
        echo=echo,
        dense=dense,
        **prompt,
    )


def check_model(name: str | None, model: str) -> None:
    if name is None:
        raise ApiError(400, f"model is missing; this server has {model!r}", "model")
    if name != model:
        message = f"the model {name!r:.60} does not exist; this server has {model!r}"
        raise ApiError(404, message, "model", "model_not_found")


def check_names(body: dict, chat: bool) -> None:
    """Refuse parameters that are unknown, or that ask for what Slim does not do."""
    used = USED + IGNORED + (USED_IN_CHAT if chat else USED_IN_COMPLETIONS)
    for key, value in body.items():
        if key in used or value is None:
            continue
        harmless = [ok for ok, names in HARMLESS if key in names.split()]
        if not harmless:
            message = f"unknown parameter {key!r:.60}; leave it out"
            raise ApiError(400, message, key[:60], "unknown_parameter")
        if not any(value == ok and type(value) in (type(ok), float) for ok in harmless):
            message = f"{key} {value!r:.60} is not supported; leave it out"
            raise ApiError(400, message, key, "unsupported_value")


def check_room(room: int, max_len: int, param: str) -> None:
    """Refuse a prompt that leaves no room for an answer."""
    if room < 1:
        message = f"the prompt has {max_len - room:,} tokens"
        message += f"; this model's context is {max_len:,}, the answer included"
        raise ApiError(400, message, param, "context_length_exceeded")


def read_max_tokens(body: dict, chat: bool, default: int, least: int, room: int) -> int:
    """Return how many tokens an answer may have: null and -1 stand for all that have room."""
    names = ["max_completion_tokens", "max_tokens"] if chat else ["max_tokens"]
    given = [name for name in names if name in body]
    if not given:
        return min(default, room)
    for name in given:
        if body[name] is not None and body[name] != -1:
            return min(get(body, name, int, None, least), room)
    return room


def read_logprobs(body: dict, chat: bool) -> int | None:
    """Return how many likeliest tokens to tell at every place; None for no log probabilities."""
    if not chat:
        wanted = body.get("logprobs") is not False
        return get(body, "logprobs", int, None, 0, MOST_LIKELY) if wanted else None
    n_top = get(body, "top_logprobs", int, 0, 0, MOST_LIKELY)
    if get(body, "logprobs", bool, False):
        return n_top
    if n_top:
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
    return None


def read_stop(stop) -> list[str]:
    stops = [stop] if isinstance(stop, str) else stop
    good = isinstance(stops, list) and len(stops) <= MOST_STOPS
    if not good or not all(isinstance(text, str) and text for text in stops):
        message = f"stop must be a string, or a list of up to {MOST_STOPS}, none of them empty"
        raise ApiError(400, message, "stop")
    return stops


def get(body, key: str, kind: type, default, least=None, most=float("inf")):
    """Return a value of the body, of the right kind and within its limits, or the default.

    A whole number is a float, too.
    """
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    value = body.get(key)
    if value is None:
        return default
    if type(value) is not kind and (kind, type(value)) != (float, int):
        raise ApiError(400, f"{key} is {value!r:.60}; it must be {KINDS[kind]}", key)
    if least is not None and not least <= value <= most:
        limits = f"{least} or more" if most == float("inf") else f"within {least}..{most}"
        raise ApiError(400, f"{key} is {value!r:.60}; it must be {limits}", key)
    return kind(value)


def prompt_ids(tok, body: dict) -> list[int]:
    """Return the ids of a completion's prompt: a text, a list of ids, or a list of one of these."""
    prompt = body.get("prompt")
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


# ---- chats --------------------------------------------------------------------------------


def chat_ids(tok, messages) -> list[int]:
    """Return the ids of a conversation, ready for the answer; see `turn_ids`."""
    return turn_ids(tok, read_turns(messages))


def read_chat(body: dict, tok, texts: Texts | None, dense: bool) -> dict:
    """Return what a Request says of a chat: its turns, their ids, the date written in them."""
    turns = read_turns(get(body, "messages", list, []))
    variables = read_variables(get(body, "chat_template_kwargs", dict, {}), tok)

    def ids_of(date=None) -> list[int]:
        return turn_ids(tok, turns, date, variables)

    if texts and "strftime_now" in template_of(tok):
        day, ids = texts.day_of(opening(turns), ids_of, dense)
    else:
        day, ids = None, ids_of()
    return {"turns": turns, "ids": ids, "day": day, "in_thought": in_thought(tok, turns, ids)}


def read_turns(messages) -> list[dict]:
    """Return the messages as a template takes them; raise ApiError if there is none to answer."""
    turns = [read_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    if not any(turn["role"] == "user" for turn in turns):
        raise ApiError(400, "messages must be a list with a user's message in it", "messages")
    last = turns[-1]
    if last["role"] == "assistant" and set(last) != {"role", "content"}:
        problem = "a last message of the assistant is continued; it can have content only"
        raise ApiError(400, problem, "messages")
    return turns


def read_message(message, name: str) -> dict:
    """Return a message for a template: its content, which may be a list of text parts, as a text.

    Raises ApiError for anything in it that no template writes.
    """
    if not isinstance(message, dict) or not message.get("role"):
        raise ApiError(400, f"{name} must be an object with a role and content", "messages")
    turn = {key: value for key, value in message.items() if value}
    content = message.get("content")
    if content is None and "tool_calls" in turn:
        content = ""
    if isinstance(content, list) and all(map(is_text, content)):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        problem = f"{name} must have text for content; nothing else can be read"
        raise ApiError(400, problem, "messages")
    turn["content"] = content
    for key, value in turn.items():
        if key not in OF_A_MESSAGE or not isinstance(value, list if key == "tool_calls" else str):
            raise ApiError(400, f"{name} has {key!r:.60}, which cannot be read", "messages")
    if "tool_calls" in turn:
        turn["tool_calls"] = read_calls(turn, f"{name}.tool_calls")
    if turn["role"] == "developer":
        turn["role"] = "system"
    return turn


def is_text(part) -> bool:
    is_part = isinstance(part, dict) and part.get("type") == "text"
    return is_part and isinstance(part.get("text"), str)


def read_calls(turn: dict, name: str) -> list[dict]:
    """Return an assistant's tool calls as templates take them: their arguments are objects."""
    calls = []
    try:
        for call in turn["tool_calls"]:
            function = call["function"]
            arguments = function.get("arguments") or {}
            if isinstance(arguments, str):
                arguments = json.loads(arguments)
            given = {"name": function["name"], "arguments": dict(arguments.items())}
            calls.append({"id": str(call.get("id", "")), "type": "function", "function": given})
            if turn["role"] != "assistant" or not isinstance(function["name"], str):
                raise ValueError
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError):
        problem = f"{name} must be an assistant's calls of functions, with arguments in JSON"
        raise ApiError(400, problem, "messages") from None
    return calls


def read_variables(given: dict, tok) -> dict:
    """Return variables for the template; refuse those that it does not know, unless they are off.

    Also those that are not switches, numbers or texts: such as tools, which would never be called.
    """
    known = {}
    for name, value in given.items():
        written = name in template_of(tok)
        if value is None or (value is False and not written):
            continue
        good = written and name.isidentifier() and name not in RESERVED
        if not good or not isinstance(value, bool | int | float | str):
            problem = f"chat_template_kwargs: the chat template takes no {name!r:.60} {value!r:.60}"
            raise ApiError(400, f"{problem}; leave it out", "chat_template_kwargs")
        known[name] = value
    return known


def turn_ids(tok, turns: list[dict], date=None, variables=None) -> list[int]:
    """Return the ids of turns, ready for the answer; a last turn of the assistant begins it.

    By the model's own chat template, with this date and variables; without one, the texts follow
    each other, a line each.
    """
    begun = begun_answer(turns)
    if turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    try:
        if tok.template is not None:
            ids = tok.chat_messages(turns, date=date, **(variables or {}))
        elif any("tool_calls" in turn for turn in turns):
            raise ValueError("this model has no chat template to write tool calls with")
        else:
            ids = tok.chat("\n".join(turn["content"] for turn in turns))
        return ids + tok.encode(begun, after=ids)
    except ValueError as error:  # of the template, or a token that the model lacks
        raise ApiError(400, str(error), "messages") from None


def begun_answer(turns: list[dict]) -> str:
    return turns[-1]["content"] if turns[-1]["role"] == "assistant" else ""


def template_of(tok) -> str:
    return getattr(tok.template, "source", "")


def opening(turns: list[dict]) -> str:
    """Return a hash of how a conversation begins, up to its user's first thousand characters."""
    roles = [turn["role"] for turn in turns]
    first = turns[: roles.index("user") + 1]
    first = [(turn["role"], turn["content"][:1000]) for turn in first]
    return hashlib.sha256(json.dumps(first).encode()).hexdigest()[:16]


def in_thought(tok, turns: list[dict], ids: list[int]) -> bool | None:
    """Tell whether an answer goes on with a thought; None if the template knows no thoughts."""
    if CLOSE not in template_of(tok):
        return None
    begun = begun_answer(turns)
    end = tok.decode(ids[-len(begun) - 8 :]).removesuffix(begun)
    opened = end.rstrip().endswith(OPEN) or begun.lstrip().startswith(OPEN)
    return opened and CLOSE not in begun


# ---- to JSON ------------------------------------------------------------------------------

KIND = "text/event-stream"
EVENT = b"data: %s\n\n"
IDLE = b": still reading\n\n"  # clients skip it
END = b"data: [DONE]\n\n"


def error_body(error: ApiError) -> dict:
    return error.body


def usage(request: Request, n_new: int, n_cached: int) -> dict:
    n_prompt = len(request.ids)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_new,
        "total_tokens": n_prompt + n_new,
        "prompt_tokens_details": {"cached_tokens": n_cached},
    }


def whole(request: Request, pieces: list[Piece], finish: str, used: dict) -> dict:
    """Return the answer to a request that is not streamed."""
    thought, text = parts(pieces)
    if request.chat:
        message = {"role": "assistant", "content": text, "refusal": None}
        if thought:
            message["reasoning_content"] = thought
        content = {"message": message}
    else:
        content = {"text": text}
    scored = [scored for piece in pieces for scored in piece.scored]
    return envelope(request, content, scored, finish) | {"usage": used}


def events(request: Request, item, first: bool) -> list[dict]:
    """Return the events of a stream for a Piece, or for (finish reason, usage).

    The first event of a chat names the role.
    """
    found = []
    if request.chat and first:
        found.append(event(request, {"role": "assistant", "content": ""}))
    if isinstance(item, Piece):
        name = "reasoning_content" if item.thought else "content"
        return [*found, event(request, {name: item.text}, item.scored)]
    finish, used = item
    found.append(event(request, {}, finish=finish))
    if request.include_usage:
        found.append(event(request, {}) | {"choices": [], "usage": used})
    return found


def event(request: Request, delta: dict, scored=(), finish: str | None = None) -> dict:
    content = {"delta": delta} if request.chat else {"text": delta.get("content", "")}
    later = {"usage": None} if request.include_usage else {}
    return envelope(request, content, scored, finish) | later


def envelope(request: Request, content: dict, scored, finish: str | None) -> dict:
    """Return an answer, or a part of one, with what every one has."""
    kind = "text_completion"
    if request.chat:
        kind = "chat.completion.chunk" if request.stream else "chat.completion"
    logprobs = None
    if scored:
        logprobs = chat_logprobs(scored) if request.chat else text_logprobs(scored)
    choice = {"index": 0, **content, "logprobs": logprobs, "finish_reason": finish}
    return {
        "id": ("chatcmpl-" if request.chat else "cmpl-") + request.id,
        "object": kind,
        "created": request.created,
        "model": request.model,
        "choices": [choice],
    }


def chat_logprobs(scored: list[Scored]) -> dict:
    entries = []
    for place in scored:
        top = [entry(likely) for likely in place.top]
        entries.append(entry(place.token) | {"top_logprobs": top})
    return {"content": entries, "refusal": None}


def entry(likely: Likely) -> dict:
    return {"token": likely.name, "logprob": likely.logprob, "bytes": list(likely.data)}


def text_logprobs(scored: list[Scored]) -> dict:
    """Return the log probabilities of a completion; the token that stands there is among the top.

    The first token of a prompt has none.
    """
    tops = []
    for place in scored:
        top = {}
        for likely in [*place.top, place.token]:
            top.setdefault(likely.name, likely.logprob)
        tops.append(None if place.token.logprob is None else top)
    return {
        "tokens": [place.token.name for place in scored],
        "token_logprobs": [place.token.logprob for place in scored],
        "top_logprobs": tops,
        "text_offset": [place.offset for place in scored],
    }
