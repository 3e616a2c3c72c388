"""Ollama's API, the only one that many programs speak, translated to OpenAI's and back."""

import datetime

from serve.answers import Piece, parts
from serve.api import ApiError, Request, check_model, get

KIND = "application/x-ndjson"
EVENT = b"%s\n"
IDLE = b""
END = b""
TAGS = "/api/tags"
CHAT = "/api/chat"
GENERATE = "/api/generate"
SHOW = "/api/show"
VERSION = "/api/version"
OLLAMA_VERSION = {"version": "0.9.0"}  # the first that knows `thinking`, the newest part here
# About the machine, and what is forgotten where a context overflows, which it never does here.
IGNORED = (
    "keep_alive num_keep num_batch num_gpu main_gpu num_thread low_vram f16_kv numa use_mmap "
    "use_mlock"
).split()
TRANSLATED = "options num_ctx num_predict think raw".split()
OF_A_MESSAGE = {"thinking": "reasoning_content", "tool_name": "name"}  # OpenAI's names


def read(path: str, body, max_len: int) -> tuple[bool, dict, int]:
    """Return whether a request asks for a chat, its body in OpenAI's terms, and the context.

    What has no other name there keeps its own; `parse` refuses what would change the answer.
    """
    options = get(body, "options", dict, {})
    given = body | options
    ours = {"stream": True}
    for key, value in given.items():
        if (value or value == 0) and key not in IGNORED + TRANSLATED:
            ours[key] = value
    if ours.get("logprobs"):
        raise ApiError(400, "logprobs are given by /v1/chat/completions only", "logprobs")
    context = get(given, "num_ctx", int, max_len, 1)
    n_new = get(given, "num_predict", int, None, -2)
    if n_new is not None:
        ours["max_tokens"] = max(-1, n_new)
    thinks = get(given, "think", bool, None)
    if thinks is not None:
        ours["chat_template_kwargs"] = {"enable_thinking": thinks}
    if "model" in ours:
        ours["model"] = model_name(ours)
    raw = get(given, "raw", bool, False)
    if raw and path == CHAT:
        raise ApiError(400, "raw: true is for /api/generate; leave it out", "raw")
    chat = not raw
    if path == CHAT:
        ours["messages"] = [renamed(message) for message in get(ours, "messages", list, [])]
    elif chat:
        said = {"system": ours.pop("system", None), "user": ours.pop("prompt", "")}
        messages = [{"role": role, "content": text} for role, text in said.items()]
        ours["messages"] = [message for message in messages if message["content"] is not None]
    return chat, ours, min(context, max_len)


def renamed(message):
    """Return a message with OpenAI's names for its parts."""
    if not isinstance(message, dict):
        return message
    return {OF_A_MESSAGE.get(key, key): value for key, value in message.items()}


def tags(model: str, created: int) -> dict:
    """Return the list of the one model."""
    card = {"name": model, "model": model, "modified_at": as_text(created), "details": {}}
    return {"models": [card]}


def show(body: dict, model: str, config) -> dict:
    """Return what programs ask about a model before they use it."""
    check_model(model_name(body), model)
    family = config.model_type
    info = {"general.architecture": family, f"{family}.context_length": config.max_len}
    details = {"family": family, "families": [family], "format": "", "parameter_size": ""}
    return {"details": details, "model_info": info, "capabilities": ["completion"]}


def model_name(body: dict) -> str | None:
    name = get(body, "model", str, None)
    return name and name.removesuffix(":latest")


def as_text(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).isoformat()


def events(request: Request, item, first: bool) -> list[dict]:
    """Return the lines of a stream for a Piece, or for (finish reason, usage)."""
    return [whole(request, [item]) if isinstance(item, Piece) else whole(request, [], *item)]


def whole(request: Request, pieces: list[Piece], finish=None, used=None) -> dict:
    """Return a line of an answer; with the finish reason it is the last one, or the only one."""
    thought, text = parts(pieces)
    thinking = {"thinking": thought} if thought else {}
    if request.path == CHAT:
        said = {"message": {"role": "assistant", "content": text} | thinking}
    else:
        said = {"response": text} | thinking
    head = {"model": request.model, "created_at": as_text(request.created)}
    end = {"done": finish is not None}
    if finish:
        end["done_reason"] = finish
        end["prompt_eval_count"] = used["prompt_tokens"]
        end["eval_count"] = used["completion_tokens"]
    return head | said | end


def error_body(error: ApiError) -> dict:
    return {"error": error.body["error"]["message"]}
