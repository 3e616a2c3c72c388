"""The command line's arguments, the text, and the first ids."""

import argparse
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path

import prune
import slim
from loading.files import check_path, one_line
from loading.find import find_checkpoint
from loading.saved import read_saved
from planning.settings import LOCAL_WINDOW, Settings, check_draft, check_sampling

ROOT = Path(__file__).resolve().parent.parent
DEMO = {
    "ckpt": str(ROOT / "demo"),
    "prompt": str(ROOT / "demo" / "document.txt"),
    "ask": "question: the lot of vekebu is",
    "schedule": "5:2048,6:1024,7:512",
}
USAGE = "%(prog)s [--ckpt CKPT] [--prompt FILE] [--ask TEXT] [options]"
EXAMPLES = """examples:
  python slim.py --ckpt llama3.1-8b-instruct --prompt book.txt --ask "Who is the narrator?"
  python slim.py --ckpt llama3.1-8b-instruct --prompt book.txt --save book.slim --chat
  python slim.py --resume book.slim --chat
  python slim.py --ckpt llama3.1-8b-instruct --prompt book.txt --ask "And then?" --map book.html
"""


# ---- the arguments ------------------------------------------------------------------------

DEFAULT = {field.name: field.default for field in fields(Settings)}
FLAG = {"action": "store_true"}
COUNT = {"type": int, "metavar": "N"}


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse prints its usage first; one line is enough
        self.exit(2, f"slim: error: {one_line(message)}; see python slim.py --help\n")


def add_reading(add) -> None:
    add(
        "--ckpt",
        help="folder, .gguf, name under checkpoints/, Hugging Face id, or alias: llama3.1-8b",
    )
    add("--prompt", metavar="FILE", help="text to read, UTF-8; - is standard input")
    add("--ask", metavar="TEXT", action="append", help="a question about the text; may be repeated")
    add("--chat", **FLAG, help="type questions at a prompt")
    add("--save", metavar="FILE", help="save the text after reading, before any question")
    add("--resume", metavar="FILE", help="continue from a saved text instead of reading one")
    add("--max-prompt-tokens", **COUNT, help="read only the first N tokens of the text")
    add("--raw", **FLAG, help="plain completion, even by an instruct model")
    add("--system", metavar="TEXT", help="system message of a chat model")
    add("--no-think", **FLAG, help="turn thinking off, if the chat template supports it")
    add(
        "--rope-yarn",
        type=float,
        default=DEFAULT["rope_yarn"],
        metavar="FACTOR",
        help="stretch the trained context by this factor with YaRN, for longer texts",
    )


def add_answering(add) -> None:
    add("--max-new-tokens", **COUNT, default=256, help="maximum length (%(default)s)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (%(default)s)")
    total = "sample from the likeliest tokens of this total probability (%(default)s)"
    add("--top-p", type=float, default=1.0, metavar="P", help=total)
    end = "end before this text, taken as it is (bash writes a newline as $'\\n'); may be repeated"
    add("--stop", metavar="TEXT", action="append", help=end)
    add("--seed", **COUNT, help="makes sampling repeatable")
    guesses = (
        "tokens to guess at most from the text, and check in one step, up to 16; 0: none "
        "(16 where a further row is cheap)"
    )
    add("--draft", **COUNT, help=guesses)


def add_showing(add) -> None:
    kept = "write an HTML page that shows which parts of the text were kept, and when"
    add("--map", metavar="FILE", help=kept)
    add("--compare", **FLAG, help="answer twice, dense and pruned, and show both side by side")
    add("--json", **FLAG, help="print one JSON object per answer instead of the text")
    add("--quiet", **FLAG, help="print the answer alone")


def add_pruning(add) -> None:
    schedule = (
        "layers and how much is kept from there on, as shares of the prompt or tokens: "
        "9:1/4,19:1/8 or 10:8192, or 9:1/4:1024, a share of at least so many tokens; "
        "or auto, paper, dense (%(default)s)"
    )
    add("--schedule", default="auto", help=schedule)
    rules = f"how blocks are ranked: {', '.join(prune.RULES)} (%(default)s)"
    add("--score", default="lookup", help=rules)
    add("--dense", **FLAG, help="no pruning: an empty schedule")
    texts = {
        "block_len": "tokens per block (%(default)s)",
        "unit_len": "tokens per unit of a block (%(default)s)",
        "window": "newest queries that rank the blocks; 0: 32, or 4 for paper (%(default)s)",
    }
    for name, text in texts.items():
        add("--" + name.replace("_", "-"), **COUNT, default=DEFAULT[name], help=text)
    overlap = (
        "overlap of the new choice from which the active blocks stay; -1: as the rule wants, "
        "1 or 0.9 for paper (%(default)s)"
    )
    add("--gamma", type=float, default=DEFAULT["gamma"], metavar="G", help=overlap)
    near = (
        "below the first layer of the schedule, tokens of the prompt see this many before their "
        f"256, and the sinks; 0: all; -1: {LOCAL_WINDOW} where lookup heads made the schedule, "
        "else 0 (%(default)s)"
    )
    add("--local-window", **COUNT, default=DEFAULT["local_window"], help=near)
    first = "first tokens that they see too (%(default)s)"
    add("--sinks", **COUNT, default=DEFAULT["sinks"], help=first)


def add_serving(add) -> None:
    place = "answer HTTP requests there; 127.0.0.1 is the default host"
    add("--serve", metavar="[HOST:]PORT", help=place)
    add("--api-key", metavar="KEY", help="key that requests must send; or set $SLIM_API_KEY")
    folder = "where texts that were read are kept while another is in use"
    add("--cache-dir", metavar="DIR", help=folder)
    size = "size of all files there (%(default)s)"
    add("--cache-gib", type=float, default=8.0, metavar="N", help=size)


def add_running(add) -> None:
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    kinds = "auto, float32, bfloat16, float16 or float64 (%(default)s)"
    add("--dtype", default="auto", help=kinds)
    kinds = "how weights stay in memory: auto, full, int8 or int4 (%(default)s)"
    add("--weights", default=DEFAULT["weights"], help=kinds)
    fit = "print what prompts of several lengths need, and the longest that fits; loads nothing"
    add("--plan", **FLAG, help=fit)
    rows = "rows computed at a time; 0 chooses by device (%(default)s)"
    add("--chunk", **COUNT, default=DEFAULT["chunk"], help=rows)
    add("--no-overlap", **FLAG, help="copy synchronously, on the compute stream")


GROUPS = {
    "what to read, and what to ask": add_reading,
    "the answer": add_answering,
    "what is shown": add_showing,
    "pruning": add_pruning,
    "a server of OpenAI's API": add_serving,
    "the machine": add_running,
}


def parse_args(argv=None) -> argparse.Namespace:
    """Read the command line; `given` holds what was written there, without the defaults."""
    parser = Parser(
        prog="slim.py",
        usage=USAGE,
        epilog=EXAMPLES,
        allow_abbrev=False,
        description=slim.__doc__.split("\n")[0] + " Without arguments: the demo, dense and pruned.",
        formatter_class=partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=30, width=110
        ),
    )
    for title, add_to in GROUPS.items():
        add_to(parser.add_argument_group(title).add_argument)
    defaults = vars(parser.parse_args([]))
    unset = argparse.Namespace(**dict.fromkeys(defaults))
    written = vars(parser.parse_args(argv, unset))
    given = {key: value for key, value in written.items() if value is not None}
    args = argparse.Namespace(**defaults | given, given=given)
    args.ask = args.ask or []
    args.stop = args.stop or []
    if args.ckpt is None and args.resume is None:
        choose_demo(args)
    return args


def choose_demo(args) -> None:
    """Run the demo: its checkpoint and, where not given, its document, question and comparison."""
    args.ckpt = DEMO["ckpt"]
    if args.schedule == "auto" and not args.dense:
        args.schedule = DEMO["schedule"]
    if args.prompt is None and args.serve is None:
        args.prompt = DEMO["prompt"]
        args.compare |= not (args.dense or args.chat or args.save or len(args.ask) > 1)
        if not (args.ask or args.chat or args.save):
            args.ask = [DEMO["ask"]]


# ---- checks -------------------------------------------------------------------------------

EXCLUDED = {  # an option: those that do not go with it
    "dense": "schedule compare",
    "compare": "chat save resume",
    "resume": "prompt save max_prompt_tokens system",
    "plan": "prompt ask chat save resume serve max_prompt_tokens compare map json",
    "raw": "system no_think",
    "chat": "json",
    "serve": "prompt ask chat save resume max_prompt_tokens compare map json",
}


def check_args(args) -> None:
    """Raise ValueError for arguments that do not go together."""
    check_sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)
    check_draft(args.draft)
    check_excluded(args.given)
    check_texts(args)
    if args.compare and len(args.ask) > 1:
        n = len(args.ask)
        raise ValueError(f"--compare takes one --ask, not {n}; ask one, or leave --compare out")
    if not 0 <= args.cache_gib < float("inf"):
        raise ValueError(f"--cache-gib {args.cache_gib} must be a size of at least 0")
    if args.resume is not None and not (args.ask or args.chat):
        raise ValueError("--resume has nothing to do; give --ask TEXT or --chat")
    if args.chat and sys.stdin is None:
        raise ValueError("--chat reads standard input, and that is closed; give --ask TEXT instead")
    check_outputs(args)


def check_excluded(given: dict) -> None:
    for first, others in EXCLUDED.items():
        for other in others.split():
            if first in given and other in given:
                flag = other.replace("_", "-")
                raise ValueError(f"--{first} excludes --{flag}; leave one of them out")
    for name in ("api_key", "cache_dir", "cache_gib"):
        if name in given and "serve" not in given:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is for --serve; give --serve PORT, or leave it out")


def check_texts(args) -> None:
    """Raise ValueError for a text that is empty or cannot be decoded."""
    for question in args.ask:
        check_unicode("--ask", question)
        if not question.strip():
            raise ValueError("--ask is empty; put a question, or leave it out")
    for stop in args.stop:
        check_unicode("--stop", stop)
        if not stop:
            raise ValueError(
                "--stop is empty; give the text before which an answer ends, or leave it out"
            )
    check_unicode("--system", args.system or "")


def check_unicode(name: str, text: str) -> None:
    """Raise ValueError if a text came from bytes that are none: Python keeps them as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF
        raise ValueError(
            f"{name} cannot be decoded: byte {byte:#04x} at character {error.start + 1}; "
            "write it in UTF-8"
        ) from None


def check_outputs(args) -> None:
    for name in ("save", "map"):
        if getattr(args, name) is not None:
            check_output(args, name, getattr(args, name))


def check_output(args, name: str, path: str) -> None:
    """Raise ValueError, before an hour of reading, for a file that cannot be written.

    Nor may it be another file of this run.
    """
    try:
        target = check_path(path)
    except ValueError as error:
        raise ValueError(f"--{name} {error}; give a file in a folder that exists") from None
    for other in ("prompt", "resume", "save", "map"):
        taken = getattr(args, other)
        if other != name and taken and Path(taken).resolve() == target:
            raise ValueError(
                f"--{name} {path} would overwrite the file of --{other}; give another one"
            )
    if args.ckpt is not None and target.exists() and is_of_checkpoint(target, args.ckpt):
        raise ValueError(
            f"--{name} {path} would overwrite a file of --ckpt {args.ckpt}; give another one"
        )


def is_of_checkpoint(target: Path, ckpt: str) -> bool:
    """Return whether a path is a file of a checkpoint, a link's target included."""
    try:
        found = find_checkpoint(ckpt)
        files = found.iterdir() if found.is_dir() else found.parent.glob("*.gguf")
        is_one = target in {file.resolve() for file in files}
    except (OSError, ValueError):
        return False  # it is refused when it is opened
    return is_one and target.suffix not in (".slim", ".html")  # written there by an earlier run


# ---- the text -----------------------------------------------------------------------------


def read_prompt(args) -> str:
    """Return the text of --prompt, "" without one.

    Raises ValueError if it cannot be read, or nothing is asked.
    """
    name = args.prompt
    if name is None:
        if not args.ask and not args.chat:
            raise ValueError(
                "there is no prompt; give --prompt FILE, --prompt - for standard input, "
                "or --ask TEXT"
            )
        if args.save:
            raise ValueError("--save keeps a text that was read; give one with --prompt FILE")
        return ""
    data = read_bytes(name, args.chat)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise ValueError(
            f"--prompt {name} is not UTF-8: byte {byte:#04x} at offset {error.start}; "
            "convert it first"
        ) from None
    if not text.strip():
        raise ValueError(f"--prompt {name} is empty; there is nothing to read")
    return text


def read_bytes(name: str, chat: bool) -> bytes:
    if name == "-":
        if chat:
            raise ValueError(
                "--prompt - and --chat both want standard input; put the text in a file"
            )
        if sys.stdin is None:
            raise ValueError("--prompt - is standard input, and that is closed; give a text file")
    elif not name or Path(name).is_dir():
        what = "is a directory" if name else "is empty"
        raise ValueError(f"--prompt {name!r} {what}; give a text file, or - for standard input")
    try:
        return sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise ValueError(
            f"--prompt {name} cannot be read ({error}); give a text file, or - for standard input"
        ) from None


def build_ids(args, text: str, tokenizer) -> list[int]:
    """Return the first ids: the text and the first question, or the text alone."""
    if args.max_prompt_tokens is not None:
        text = cut_text(text, args.max_prompt_tokens, tokenizer)
    if text and (args.chat or args.save):
        return tokenizer.chat(text, end=False)
    parts = [text] if text else []
    if args.ask:
        parts.append(args.ask.pop(0))
    if not parts:
        return []
    return tokenizer.chat(("\n\n" if tokenizer.template else "\n").join(parts))


def cut_text(text: str, n: int, tokenizer) -> str:
    if n < 1:
        raise ValueError(f"--max-prompt-tokens {n} must be at least 1")
    first = first_tokens(text, n, tokenizer)
    if text and not first:
        raise ValueError(
            f"--max-prompt-tokens {n} leaves nothing of the text, whose first character takes "
            "more; raise it"
        )
    return first


def first_tokens(text: str, n: int, tokenizer) -> str:
    """Return a beginning of a text that has at most n tokens and ends with a complete character."""
    ids = tokenizer.encode(text)
    if len(ids) > n:
        text = tokenizer.decode(ids[:n]).rstrip("\ufffd")  # the rest of a character that was cut
        while len(tokenizer.encode(text)) > n:  # a beginning may be split otherwise
            text = text[:-1]
    return text


# ---- a saved text -------------------------------------------------------------------------

SAVED = (
    "ckpt dtype weights schedule score block_len unit_len window gamma local_window sinks chunk "
    "rope_yarn raw"
).split()


def settings_of_saved(args) -> dict:
    """Take from a saved conversation what the command line leaves open; return its header."""
    path = args.resume
    header, _ = read_saved(path)
    raw = header["extra"].get("raw", False)
    kept_as = header["identity"].get("kept_as", "auto").replace("file", "auto")
    saved = header["identity"] | {"ckpt": header.get("ckpt"), "raw": raw, "weights": kept_as}
    for name in SAVED:
        if name not in args.given and not (name == "schedule" and args.dense):
            setattr(args, name, saved.get(name))
    if "ckpt" not in args.given and not Path(str(args.ckpt)).exists():
        raise ValueError(
            f"{path} was read with the checkpoint {args.ckpt}, which is gone; give it with --ckpt"
        )
    if args.raw != raw:
        raise ValueError(f"{path} was read {'with' if raw else 'without'} --raw; use the same")
    check_outputs(args)  # again: only now it is known whose files must stay
    if args.map and "map" not in header["extra"]:
        raise ValueError(f"{path} holds no record for --map; read the text again with --save")
    return header
