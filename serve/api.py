"""OpenAI's API as data: JSON becomes a Request, an answer JSON, whatever is wrong an ApiError."""

import hashlib
import json
import time
import uuid
from dataclasses import dataclass, field

from serve.answers import CLOSE, OPEN, Likely, Piece, Scored
from serve.texts import Day, Texts

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
    temperature: float
    top_p: float
    seed: int | None
    stop: list[str]
    stream: bool
    include_usage: bool
    logprobs: int | None  # likeliest tokens to tell at every place; None: no log probabilities
    echo: bool  # the answer begins with the prompt
    in_thought: bool | None  # whether the answer begins in a thought; None: the model has none
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
# Parameters that Slim does not have, with the values that change nothing. Other values are
# refused, so that nobody waits for what never comes.
HARMLESS = {
    "n": (1,),
    "best_of": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "repeat_penalty": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "format": ("",),
}
IGNORED = (
    "user metadata store service_tier safety_identifier cache_prompt "
    "prompt_cache_key prompt_cache_retention parallel_tool_calls"
).split()
LIMITS = "max_tokens", "max_completion_tokens"  # in a chat the second counts
OF_A_MESSAGE = "role content name tool_call_id reasoning_content".split()
RESERVED = "messages date tools documents add_generation_prompt".split()
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
    check_names(body, chat)
    check_model(get(body, "model", str, None), model)
    dense = get(body, "dense", bool, False)
    day = None
    in_thought = None
    turns = []
    if not chat:
        ids = prompt_ids(tok, body.get("prompt") or "")
    else:
        turns = read_turns(get(body, "messages", list, []))
        variables = read_variables(get(body, "chat_template_kwargs", dict, {}), tok)
        day, ids = dated_ids(tok, turns, texts, variables, dense)
        in_thought = begins_in_thought(tok, turns, ids)
    check_length(len(ids), max_len, "messages" if chat else "prompt")
    logprobs = read_logprobs(body, chat)
    echo = get(body, "echo", bool, False)
    least = 0 if echo and logprobs is not None else 1  # a prompt may be scored alone
    temperature = float(get(body, "temperature", (int, float), defaults.temperature, 0, 2))
    top_p = float(get(body, "top_p", (int, float), defaults.top_p, 0, 1))
    seed = get(body, "seed", int, defaults.seed)
    options = body.get("stream_options")
    options = options if isinstance(options, dict) else {}
    stream = get(body, "stream", bool, False)
    stop = body.get("stop")
    return Request(
        chat=chat,
        model=model,
        ids=ids,
        max_tokens=read_max_tokens(body, chat, defaults.max_new_tokens, max_len - len(ids), least),
        temperature=temperature if temperature >= 1e-6 else 0.0,
        top_p=max(1e-6, top_p),
        seed=None if seed is None else seed % 2**63,
        stop=read_stop(defaults.stop if stop is None else stop),
        stream=stream,
        include_usage=options.get("include_usage") is True,
        logprobs=logprobs,
        echo=echo,
        in_thought=in_thought,
        include_map=stream and options.get("include_map") is True,
        dense=dense,
        turns=turns,
        day=day,
    )


def check_names(body: dict, chat: bool) -> None:
    """Refuse parameters that are unknown, or that ask for what Slim does not do."""
    used = USED + (USED_IN_CHAT if chat else USED_IN_COMPLETIONS)
    for key, value in body.items():
        if key in used or key in IGNORED or value is None:
            continue
        if key not in HARMLESS:
            message = f"unknown parameter {key!r:.60}; leave it out"
            raise ApiError(400, message, key[:60], "unknown_parameter")
        if not changes_nothing(value, HARMLESS[key]):
            message = f"{key} {value!r:.60} is not supported; leave it out"
            raise ApiError(400, message, key, "unsupported_value")


def read_max_tokens(body: dict, chat: bool, default: int, room: int, least: int) -> int:
    """Return how many tokens an answer may have: null and -1 stand for all that have room."""
    names = [name for name in LIMITS[: 2 if chat else 1] if name in body]
    if not names:
        return min(default, room)
    name = next((name for name in reversed(names) if body[name] is not None), names[0])
    if body[name] is None or (type(body[name]) is int and body[name] == -1):
        return room
    return min(get(body, name, int, default, least), room)


def read_logprobs(body: dict, chat: bool) -> int | None:
    """Return how many likeliest tokens to tell at every place; None for no log probabilities."""
    if not chat:
        wanted = None if body.get("logprobs") is False else "logprobs"
        return wanted and get(body, wanted, int, None, 0, MOST_LIKELY)
    n_top = get(body, "top_logprobs", int, None, 0, MOST_LIKELY)
    if get(body, "logprobs", bool, False):
        return n_top or 0
    if n_top:
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
    return None


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
    """Return the messages as a template takes them; raise ApiError if there is none to answer."""
    turns = [read_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    if not any(turn["role"] == "user" for turn in turns):
        raise ApiError(400, "messages must be a list with a user's message in it", "messages")
    last = turns[-1]
    if last["role"] == "assistant" and set(last) != {"role", "content"}:
        problem = "a last message of the assistant is gone on with; it can have content alone"
        raise ApiError(400, problem, "messages")
    return turns


def dated_ids(tok, turns: list[dict], texts: Texts | None, variables: dict, dense: bool):
    """Return the day of a conversation, None if its template writes no date, and its ids."""
    if not texts or "strftime_now" not in template_of(tok):
        return None, turn_ids(tok, turns, None, variables)
    return texts.day_of(opening(turns), lambda date: turn_ids(tok, turns, date, variables), dense)


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


def begins_in_thought(tok, turns: list[dict], ids: list[int]) -> bool | None:
    """Tell whether an answer goes on with a thought; None if the template knows no thoughts."""
    if CLOSE not in template_of(tok):
        return None
    begun = begun_answer(turns)
    end = tok.decode(ids[-len(begun) - 8 :]).removesuffix(begun)
    opened = end.rstrip().endswith(OPEN) or begun.lstrip().startswith(OPEN)
    return opened and CLOSE not in begun


def template_of(tok) -> str:
    return getattr(tok.template, "source", "")


def read_variables(given: dict, tok) -> dict:
    """Return variables for the template; refuse those that it does not know, unless they are off.

    Also those that are not switches, numbers or texts: such as tools, which would never be called.
    """
    known = {}
    for name, value in given.items():
        if value is None or (value is False and name not in template_of(tok)):
            continue
        good = name.isidentifier() and name in template_of(tok) and name not in RESERVED
        if not good or not isinstance(value, bool | int | float | str):
            problem = f"chat_template_kwargs: the chat template takes no {name!r:.60} {value!r:.60}"
            raise ApiError(400, f"{problem}; leave it out", "chat_template_kwargs")
        known[name] = value
    return known


def opening(turns: list[dict]) -> str:
    """Return a hash of how a conversation begins, up to its user's first thousand characters."""
    users = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
    first = [(turn["role"], turn["content"][:1000]) for turn in turns[: users[0] + 1]]
    return hashlib.sha256(json.dumps(first).encode()).hexdigest()[:16]


def read_message(message, name: str) -> dict:
    """Return a message for a template: its content, which may be a list of text parts, as a text.

    Raises ApiError for anything in it that no template writes.
    """
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ApiError(400, f"{name} must be an object with a role and content", "messages")
    turn = {key: value for key, value in message.items() if value or key == "content"}
    if "tool_calls" in turn:
        turn["tool_calls"] = read_calls(turn, f"{name}.tool_calls")
    parts = turn.get("content")
    if parts is None and "tool_calls" in turn:
        parts = ""
    if isinstance(parts, str):
        parts = [{"type": "text", "text": parts}]
    if not isinstance(parts, list) or not all(map(is_text, parts)):
        problem = f"{name} must have text for content; nothing else can be read"
        raise ApiError(400, problem, "messages")
    turn["content"] = "".join(part["text"] for part in parts)
    for key, value in turn.items():
        if key != "tool_calls" and not (key in OF_A_MESSAGE and isinstance(value, str)):
            raise ApiError(400, f"{name} has {key!r:.60}, which cannot be read", "messages")
    if turn["role"] == "developer":
        turn["role"] = "system"
    return turn


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
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        problem = f"{name} must be an assistant's calls of functions, each with id and function"
        raise ApiError(
            400, f"{problem}: a name, and arguments that are an object in JSON", "messages"
        ) from None
    return calls


def is_text(part) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


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
    text = "".join(piece.text for piece in pieces if not piece.thought)
    thought = "".join(piece.text for piece in pieces if piece.thought)
    scored = [scored for piece in pieces for scored in piece.scored]
    if request.chat:
        head = answer_head(request, "chat.completion")
        message = {"role": "assistant", "content": text, "refusal": None}
        if thought:
            message["reasoning_content"] = thought
        content = {"message": message}
    else:
        head = answer_head(request, "text_completion")
        content = {"text": text}
    return head | {"choices": [choice(request, content, finish, scored)], "usage": used}


def events(request: Request, item, first: bool) -> list[dict]:
    """Return the events of a stream for a Piece, or for (finish reason, usage).

    The first event of a chat names the role.
    """
    found = []
    if request.chat and first:
        found.append(chunk(request, {"delta": {"role": "assistant", "content": ""}}))
    if isinstance(item, Piece):
        content = {"text": item.text}
        if request.chat:
            content = {"delta": {"reasoning_content" if item.thought else "content": item.text}}
        return [*found, chunk(request, content, item.scored)]
    finish, used = item
    found.append(chunk(request, {"delta": {}} if request.chat else {"text": ""}, finish=finish))
    if request.include_usage:
        found.append(chunk(request, {}) | {"choices": [], "usage": used})
    return found


def chunk(request: Request, content: dict, scored=(), finish: str | None = None) -> dict:
    """Return one event of a stream."""
    event = answer_head(request, "chat.completion.chunk" if request.chat else "text_completion")
    event["choices"] = [choice(request, content, finish, scored)]
    if request.include_usage:
        event["usage"] = None
    return event


def answer_head(request: Request, kind: str) -> dict:
    return {
        "id": ("chatcmpl-" if request.chat else "cmpl-") + request.id,
        "object": kind,
        "created": request.created,
        "model": request.model,
    }


def choice(request: Request, content: dict, finish: str | None, scored: list[Scored]) -> dict:
    logprobs = None
    if scored:
        logprobs = chat_logprobs(scored) if request.chat else text_logprobs(scored)
    return {"index": 0, **content, "logprobs": logprobs, "finish_reason": finish}


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
