"""The command line's arguments, the text, and the first ids."""

import argparse
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path

import prune
import slim
from loading.files import check_path, one_line
from loading.saved import read_saved
from planning.settings import Settings, check_sampling

ROOT = Path(__file__).resolve().parent.parent
DEMO = dict(
    ckpt=str(ROOT / "demo"),
    prompt=str(ROOT / "demo" / "document.txt"),
    ask="question: the lot of vekebu is",
    schedule="5:2048,6:1024,7:512",
)


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse prints its usage first; one line is enough
        self.exit(2, f"slim: error: {one_line(message)}; see python slim.py --help\n")


EXAMPLES = """examples:
  python slim.py --ckpt llama3.1-8b-instruct --prompt book.txt --ask "Who is the narrator?" --ask "What happens?"
  python slim.py --ckpt llama3.1-8b-instruct --prompt book.txt --save book.slim --chat
  python slim.py --resume book.slim --chat
  python slim.py --ckpt llama3.1-8b-instruct --prompt book.txt --ask "Who is the narrator?" --map book.html
"""


def add_reading(g, d: dict) -> None:
    g.add_argument(
        "--ckpt",
        help="folder, name under checkpoints/, Hugging Face id, or alias such as llama3.1-8b",
    )
    g.add_argument("--prompt", metavar="FILE", help="text to read, UTF-8; - is standard input")
    g.add_argument(
        "--ask", metavar="TEXT", action="append", help="a question about the text; repeat for more"
    )
    g.add_argument("--chat", action="store_true", help="type questions at a prompt")
    g.add_argument(
        "--save", metavar="FILE", help="save the text after reading, before any question"
    )
    g.add_argument(
        "--resume", metavar="FILE", help="continue from a saved text instead of reading one"
    )
    g.add_argument(
        "--max-prompt-tokens",
        type=int,
        metavar="N",
        help="read only the first N tokens of the text",
    )
    g.add_argument("--raw", action="store_true", help="plain completion, even by an instruct model")
    g.add_argument("--system", metavar="TEXT", help="system message of a chat model")
    g.add_argument(
        "--no-think",
        action="store_true",
        help="turn thinking off, if the chat template supports it",
    )
    g.add_argument(
        "--rope-yarn",
        type=float,
        default=d["rope_yarn"],
        metavar="FACTOR",
        help="stretch the trained context by this factor with YaRN, for longer texts",
    )


def add_answering(g, d: dict) -> None:
    g.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="maximum length (%(default)s)"
    )
    g.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (%(default)s)"
    )
    g.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the likeliest tokens of this total probability (%(default)s)",
    )
    g.add_argument(
        "--stop",
        metavar="TEXT",
        action="append",
        help="end before this text, taken as it is (bash writes a newline as $'\\n'); repeat for more",
    )
    g.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")


def add_showing(g, d: dict) -> None:
    g.add_argument(
        "--map",
        metavar="FILE",
        help="write an HTML page that shows which parts of the text were kept, and when",
    )
    g.add_argument(
        "--compare",
        action="store_true",
        help="answer twice, dense and pruned, and show both side by side",
    )
    g.add_argument(
        "--json", action="store_true", help="print one JSON object per answer instead of the text"
    )
    g.add_argument("--quiet", action="store_true", help="print the answer alone")


def add_pruning(g, d: dict) -> None:
    g.add_argument(
        "--schedule",
        default="auto",
        help="layers and how much is kept from there on, as shares of the prompt or tokens: 9:1/4,19:1/8 or 10:8192; "
        "or auto, paper, dense (%(default)s)",
    )
    g.add_argument(
        "--score",
        default="peak",
        help=f"how blocks are ranked: {', '.join(prune.RULES)} (%(default)s)",
    )
    g.add_argument("--dense", action="store_true", help="no pruning: an empty schedule")
    g.add_argument(
        "--block-len",
        type=int,
        default=d["block_len"],
        metavar="N",
        help="tokens per block (%(default)s)",
    )
    g.add_argument(
        "--unit-len",
        type=int,
        default=d["unit_len"],
        metavar="N",
        help="tokens per unit of a block (%(default)s)",
    )
    g.add_argument(
        "--window",
        type=int,
        default=d["window"],
        metavar="N",
        help="newest queries that rank the blocks; 0: 32 for peak, 4 for paper (%(default)s)",
    )
    g.add_argument(
        "--gamma",
        type=float,
        default=d["gamma"],
        metavar="G",
        help="overlap of the new choice from which the active blocks stay; -1: 1 for peak, 0.9 for paper (%(default)s)",
    )


def add_serving(g, d: dict) -> None:
    g.add_argument(
        "--serve",
        metavar="[HOST:]PORT",
        help="answer HTTP requests there; 127.0.0.1 is the default host",
    )
    g.add_argument(
        "--api-key", metavar="KEY", help="key that requests must send; or set $SLIM_API_KEY"
    )
    g.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="where texts that were read are kept while another is in use",
    )
    g.add_argument(
        "--cache-gib",
        type=float,
        default=8.0,
        metavar="N",
        help="size of all files there (%(default)s)",
    )


def add_running(g, d: dict) -> None:
    g.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    g.add_argument(
        "--dtype", default="auto", help="auto, float32, bfloat16, float16 or float64 (%(default)s)"
    )
    g.add_argument(
        "--chunk",
        type=int,
        default=d["chunk"],
        metavar="N",
        help="rows computed at a time; 0 chooses by device (%(default)s)",
    )
    g.add_argument(
        "--no-overlap", action="store_true", help="copy synchronously, on the compute stream"
    )


def parse_args(argv=None) -> argparse.Namespace:
    """Read the command line; `given` holds what was written there, without the defaults."""
    d = {f.name: f.default for f in fields(Settings)}
    p = Parser(
        prog="slim.py",
        usage="%(prog)s [--ckpt CKPT] [--prompt FILE] [--ask TEXT] [options]",
        epilog=EXAMPLES,
        allow_abbrev=False,
        description=slim.__doc__.split("\n")[0] + " Without arguments: the demo, dense and pruned.",
        formatter_class=partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=30, width=110
        ),
    )
    groups = {
        "what to read, and what to ask": add_reading,
        "the answer": add_answering,
        "what is shown": add_showing,
        "pruning": add_pruning,
        "a server of OpenAI's API": add_serving,
        "the machine": add_running,
    }
    for name, add in groups.items():
        add(p.add_argument_group(name), d)
    defaults = vars(p.parse_args([]))
    given = vars(p.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults))))
    given = {key: value for key, value in given.items() if value is not None}
    args = argparse.Namespace(**defaults | given, given=given)
    args.ask, args.stop = args.ask or [], args.stop or []
    if args.ckpt is None and args.resume is None:
        choose_demo(args)
    return args


def choose_demo(args) -> None:
    """Without --ckpt, run the demo: its checkpoint and, where not given, its document, question and comparison."""
    args.ckpt = DEMO["ckpt"]
    if args.schedule == "auto" and not args.dense:
        args.schedule = DEMO["schedule"]
    if args.prompt is None and args.serve is None:
        args.prompt = DEMO["prompt"]
        args.compare |= not (args.dense or args.chat or args.save or len(args.ask) > 1)
        args.ask = args.ask or ([] if args.chat or args.save else [DEMO["ask"]])


EXCLUDED = {
    "dense": ("schedule", "compare"),
    "compare": ("chat", "save", "resume"),
    "resume": ("prompt", "save", "max_prompt_tokens", "system"),
    "raw": ("system", "no_think"),
    "chat": ("json",),
    "serve": (
        "prompt",
        "ask",
        "chat",
        "save",
        "resume",
        "max_prompt_tokens",
        "compare",
        "map",
        "json",
    ),
}


def check_args(args) -> None:
    """Raise ValueError for arguments that do not go together."""
    check_sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)
    for first, others in EXCLUDED.items():
        if clash := [name for name in others if first in args.given and name in args.given]:
            raise ValueError(
                f"--{first} excludes --{clash[0].replace('_', '-')}; leave one of them out"
            )
    if args.compare and len(args.ask) > 1:
        raise ValueError(
            f"--compare takes one --ask, not {len(args.ask)}; ask one, or leave --compare out"
        )
    if lone := [
        name
        for name in ("api_key", "cache_dir", "cache_gib")
        if name in args.given and args.serve is None
    ]:
        raise ValueError(
            f"--{lone[0].replace('_', '-')} is for --serve; give --serve PORT, or leave it out"
        )
    if not 0 <= args.cache_gib < float("inf"):
        raise ValueError(f"--cache-gib {args.cache_gib} must be a size of at least 0")
    if any(not question.strip() for question in args.ask):
        raise ValueError("--ask is empty; put a question, or leave it out")
    if "" in args.stop:
        raise ValueError(
            "--stop is empty; give the text before which an answer ends, or leave it out"
        )
    if args.resume is not None and not (args.ask or args.chat):
        raise ValueError("--resume has nothing to do; give --ask TEXT or --chat")
    if args.chat and sys.stdin is None:
        raise ValueError("--chat reads standard input, and that is closed; give --ask TEXT instead")
    for name in ("save", "map"):
        if getattr(args, name) is not None:
            check_output(args, name, getattr(args, name))


def check_output(args, name: str, path: str) -> None:
    """Raise ValueError, before an hour of reading, if a file cannot be written or is another one of this run."""
    try:
        target = check_path(path)
    except ValueError as error:
        raise ValueError(f"--{name} {error}; give a file in a folder that exists") from None
    for other in ("prompt", "resume", "save", "map"):
        if other != name and (taken := getattr(args, other)) and Path(taken).resolve() == target:
            raise ValueError(
                f"--{name} {path} would overwrite the file of --{other}; give another one"
            )


def read_prompt(args) -> str:
    """Return the text of --prompt, "" without one; raise ValueError if it cannot be read, or nothing is asked."""
    name = args.prompt
    if name is None and not args.ask and not args.chat:
        raise ValueError(
            "there is no prompt; give --prompt FILE, --prompt - for standard input, or --ask TEXT"
        )
    if name is None and args.save:
        raise ValueError("--save keeps a text that was read; give one with --prompt FILE")
    if name is None:
        return ""
    if name == "-" and args.chat:
        raise ValueError("--prompt - and --chat both want standard input; put the text in a file")
    if name == "-" and sys.stdin is None:
        raise ValueError("--prompt - is standard input, and that is closed; give a text file")
    if name != "-" and (not name or Path(name).is_dir()):
        raise ValueError(f"--prompt {name!r} is a directory; give a text file")
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise ValueError(
            f"--prompt {name} cannot be read ({error}); give a text file, or - for standard input"
        ) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--prompt {name} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}; convert it first"
        ) from None
    if not text.strip():
        raise ValueError(f"--prompt {name} is empty; there is nothing to read")
    return text


def build_ids(args, text: str, tokenizer) -> list[int]:
    """Return the ids to begin with: the text and the first question, or the text alone if it is read first."""
    if args.max_prompt_tokens is not None:
        if args.max_prompt_tokens < 1:
            raise ValueError(f"--max-prompt-tokens {args.max_prompt_tokens} must be at least 1")
        whole, text = text, first_tokens(text, args.max_prompt_tokens, tokenizer)
        if whole and not text:
            raise ValueError(
                f"--max-prompt-tokens {args.max_prompt_tokens} leaves nothing of the text, whose first character takes "
                "more; raise it"
            )
    if text and (args.chat or args.save):
        return tokenizer.chat(text, end=False)
    parts = [part for part in (text, args.ask.pop(0) if args.ask else "") if part]
    return tokenizer.chat(("\n\n" if tokenizer.template else "\n").join(parts)) if parts else []


def first_tokens(text: str, n: int, tokenizer) -> str:
    """Return a beginning of a text that has at most n tokens and ends with a complete character."""
    ids = tokenizer.encode(text)
    if len(ids) > n:
        text = tokenizer.decode(ids[:n]).rstrip("\ufffd")  # the rest of a character that was cut
        while len(tokenizer.encode(text)) > n:  # a beginning may be split otherwise
            text = text[:-1]
    return text


def settings_of_saved(args) -> dict:
    """Take from a saved conversation what the command line leaves open; return the file's header."""
    header, _ = read_saved(args.resume)
    saved = header["identity"] | {
        "ckpt": header.get("ckpt"),
        "raw": header["extra"].get("raw", False),
    }
    for name in (
        "ckpt",
        "dtype",
        "schedule",
        "score",
        "block_len",
        "unit_len",
        "window",
        "gamma",
        "chunk",
        "rope_yarn",
        "raw",
    ):
        if name not in args.given and not (name == "schedule" and args.dense):
            setattr(args, name, saved.get(name))
    if "ckpt" not in args.given and not Path(str(args.ckpt)).is_dir():
        raise ValueError(
            f"{args.resume} was read with the checkpoint {args.ckpt}, which is gone; give its folder with --ckpt"
        )
    if args.raw != saved["raw"]:
        raise ValueError(
            f"{args.resume} was read {'with' if saved['raw'] else 'without'} --raw; use the same"
        )
    if args.map and "map" not in header["extra"]:
        raise ValueError(
            f"{args.resume} holds no record for --map; read the text again with --save"
        )
    return header
