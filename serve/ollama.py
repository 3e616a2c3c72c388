"""Ollama's API, which many programs speak alone, in terms of OpenAI's: requests and answers."""

import datetime

from serve.api import ApiError, Piece, Request, get

KIND = "application/x-ndjson"
EVENT = b"%s\n"
IDLE = b""
END = b""
TAGS = "/api/tags"
CHAT = "/api/chat"
GENERATE = "/api/generate"
# About the machine, and what is forgotten where a context overflows, which it never does here.
IGNORED = (
    "keep_alive num_keep num_batch num_gpu main_gpu num_thread low_vram f16_kv numa use_mmap "
    "use_mlock"
).split()
OF_A_MESSAGE = {"thinking": "reasoning_content", "tool_name": "name"}  # OpenAI's names


def read(path: str, body, max_len: int) -> tuple[bool, dict, int]:
    """Return whether a request asks for a chat, its body in OpenAI's terms, and the context.

    What has no other name there keeps its own; `parse` refuses what would change the answer.
    """
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    body = {"stream": True} | body
    body |= get(body, "options", dict, {})
    body = {key: value for key, value in body.items() if given(value) and key not in IGNORED}
    body.pop("options", None)
    context = get(body, "num_ctx", int, max_len, 1)
    body.pop("num_ctx", None)
    if "model" in body:
        body["model"] = get(body, "model", str, "").removesuffix(":latest")
    if "num_predict" in body:
        body["max_tokens"] = max(-1, get(body, "num_predict", int, -1, -2))
        del body["num_predict"]
    if "think" in body:
        body["chat_template_kwargs"] = {"enable_thinking": get(body, "think", bool, False)}
        del body["think"]
    if body.get("logprobs"):
        raise ApiError(400, "logprobs are told at /v1/chat/completions alone", "logprobs")
    chat = path == CHAT or not body.pop("raw", False)
    if path == CHAT:
        body["messages"] = [renamed(message) for message in get(body, "messages", list, [])]
    elif chat:
        system = body.pop("system", None)
        messages = [{"role": "user", "content": body.pop("prompt", "")}]
        body["messages"] = [{"role": "system", "content": system}] * bool(system) + messages
    return chat, body, min(context, max_len)


def given(value) -> bool:
    return value is False or value == 0 or bool(value)


def renamed(message):
    if not isinstance(message, dict):
        return message
    return {OF_A_MESSAGE.get(key, key): value for key, value in message.items()}


def tags(model: str, created: int) -> dict:
    """Return the list of the one model."""
    card = {"name": model, "model": model, "modified_at": as_text(created), "details": {}}
    return {"models": [card]}


def as_text(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).isoformat()


def events(request: Request, item, first: bool) -> list[dict]:
    """Return the lines of a stream for a Piece, or for (finish reason, usage)."""
    return [whole(request, [item]) if isinstance(item, Piece) else whole(request, [], *item)]


def whole(request: Request, pieces: list[Piece], finish=None, used=None) -> dict:
    """Return a line of an answer; with the finish reason it is the last one, or the only one."""
    text = "".join(piece.text for piece in pieces if not piece.thought)
    thought = "".join(piece.text for piece in pieces if piece.thought)
    thinking = {"thinking": thought} if thought else {}
    if request.path == CHAT:
        said = {"message": {"role": "assistant", "content": text} | thinking}
    else:
        said = {"response": text} | thinking
    head = {"model": request.model, "created_at": as_text(request.created)}
    value = head | said | {"done": finish is not None}
    if finish:
        value["done_reason"] = finish
        value["prompt_eval_count"] = used["prompt_tokens"]
        value["eval_count"] = used["completion_tokens"]
    return value


def error_body(error: ApiError) -> dict:
    return {"error": error.body["error"]["message"]}
