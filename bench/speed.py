"""Prompt and answer, end to end, beside llama.cpp and transformers, on a CPU.

    python bench/speed.py --text BOOK.txt --out speed.jsonl
    python bench/speed.py --text BOOK.txt --out speed.jsonl --gguf model-bf16.gguf,model-q8_0.gguf
    python bench/speed.py --out speed.jsonl --table

Every run is a process of its own, so that its peak memory is its own: it reads a prompt and answers
with --new tokens, always the likeliest, and does not stop at the end of a sequence. There are two
kinds of answers. `free`: the prompt is prose, and the answer goes on with it. `quoting`: a passage
of the prose, which its end repeats, begins once more, and the answer goes on with the passage. Each
round takes another part of the text. Small models repeat themselves in long answers, which helps
drafts, so the table says how much of a free answer was there before, and how much of a passage is
quoted.

Contestants take turns. Each run is a line of --out; a call goes on where the file ends, and the
table has medians of all rounds of this machine, commit and set of options. What fails is named, the
others go on, and the exit code is 1. A step's floor is the time to read its bytes, weights and
active keys and values, at the rate of a sum, measured before each run.

llama.cpp runs through the npm package node-llama-cpp, looked for where this command runs (`npm
install node-llama-cpp`); bench/llama_cpp.py writes its files. Peak memory is read from /proc, so
this needs Linux.
"""

import argparse
import json
import math
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import slim
import tokenizer
from bench.common import (
    Parser,
    check_numbers,
    commit,
    floor_bytes,
    hardware,
    last_line,
    memory_bytes,
    read_lengths,
    table,
)
from bench.shapes import SHAPES, RandomTensors
from loading.files import format_bytes, one_line
from planning.checkpoint import Checkpoint, dtype_name
from planning.schedule import resolve_schedule
from planning.settings import MOST_DRAFTED, env_number

KINDS = ("free", "quoting")
BEGUN = 32  # tokens of a passage that a prompt ends with
BETWEEN = "\n\n* * *\n\n"
SHORTEST = 256  # tokens of a prompt
LLAMA_CPP = f"node {Path(__file__).resolve().parent / 'llama_cpp.mjs'}"


# ---- prompts ----------------------------------------------------------------------------------


def read_text(args, tok, n: int) -> list[list[int]]:
    """Return n ids of running text for each round, each from another part of the book."""
    if not args.text:
        raise ValueError("--text is missing: a long book, such as War and Peace")
    try:
        text = Path(args.text).read_text(encoding="utf-8")[args.skip :]
    except (OSError, ValueError) as error:
        raise ValueError(f"--text {args.text!r:.200} cannot be read as UTF-8: {error}") from None
    stretch = len(text) // args.rounds
    texts = []
    for number in range(args.rounds):
        part = text[number * stretch : (number + 1) * stretch]
        ids = tok.encode(part[: 20 * n])  # characters: enough of any prose
        if len(ids) < n:
            raise ValueError(
                f"a part of --text {args.text} has {len(ids):,} tokens after --skip {args.skip:,}; "
                f"--lengths take {n:,} for each of {args.rounds} rounds; give a longer text or a "
                "smaller --skip"
            )
        texts.append(ids[:n])
    return texts


def make_prompt(kind: str, ids: list[int], n: int, n_new: int, between: list[int]):
    """Return a prompt of n tokens, and what an answer that quotes must say.

    A small model loses its place in a passage that it has read once, so the passage is there three
    times, in the prose and after it.
    """
    if kind == "free":
        return ids[:n], []
    begin = n // 3
    passage = ids[begin : begin + min(BEGUN + n_new, n // 6)]
    end = 2 * (between + passage) + between + passage[:BEGUN]
    return ids[: n - len(end)] + end, passage[BEGUN:]


# ---- one run, in a process of its own ---------------------------------------------------------


class Slim:
    def __init__(self, ckpt: Checkpoint, n_prompt: int, n_new: int, draft: int):
        self.engine = slim.start(replace(ckpt, stop=set()), n_prompt, n_new)
        self.draft = draft

    def answer(self, ids: list[int], n_new: int) -> Iterator[int]:
        return self.engine.generate(ids, n_new, draft=self.draft)

    @property
    def steps(self) -> int:
        return self.engine.steps

    def facts(self) -> dict:
        """Return what a step must read at least, and how many blocks came back."""
        kv = self.engine.kv
        n_new = kv.length - kv.n_prompt
        floor = floor_bytes(self.engine.running, kv.n_prompt, n_new)
        return {"floor_bytes": floor, "revived": kv.revived}


def place(path: Path) -> dict:
    """Return how transformers calls a folder, or a GGUF file, for which it needs accelerate."""
    if path.is_file():
        return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    return {"pretrained_model_name_or_path": path}


class Transformers:
    """The model of the library transformers, with a checkpoint's weights."""

    def __init__(self, ckpt: Checkpoint):
        import transformers

        if isinstance(ckpt.tensors, RandomTensors):
            config = transformers.LlamaConfig(**SHAPES[ckpt.folder.name])
            with torch.device("meta"):
                model = transformers.LlamaForCausalLM(config)
            weights = {name: ckpt.tensors.get_tensor(name) for name in ckpt.tensors}
            model.load_state_dict(weights, assign=True)
            model.model.rotary_emb = type(model.model.rotary_emb)(config)
        else:
            load = transformers.AutoModelForCausalLM.from_pretrained
            where = place(ckpt.folder)
            model = load(**where, dtype=ckpt.dtype, local_files_only=True)
        self.ckpt = ckpt
        self.model = model.to(ckpt.device).eval()
        self.past = None
        self.steps = 0

    def answer(self, ids: list[int], n_new: int) -> Iterator[int]:
        logits = self.read(ids)
        for n_left in reversed(range(n_new)):
            token = int(logits.argmax())
            yield token
            if n_left:
                logits = self.feed([token])

    def read(self, ids: list[int]) -> torch.Tensor:
        """Start anew with ids; return the logits (V,) after the last."""
        self.past = None
        return self.feed(ids)

    @torch.inference_mode()
    def feed(self, ids: list[int]) -> torch.Tensor:
        """Run ids after what is cached; return the logits (V,) after the last."""
        self.steps += 1
        batch = torch.tensor([ids], device=self.ckpt.device)
        out = self.model(batch, past_key_values=self.past, logits_to_keep=1, use_cache=True)
        self.past = out.past_key_values
        out.logits.argmax().item()  # waits for the device
        return out.logits[0, -1].float()

    def facts(self) -> dict:
        return {"floor_bytes": floor_bytes(self.ckpt, self.past.get_seq_length(), 0)}


def time_answer(contestant, ids: list[int], n_new: int) -> dict:
    """Return an answer, the seconds to its first token, and [seconds, tokens] of each later step.

    A step yields several tokens if the engine had drafted them.
    """
    answer = []
    steps: list[list] = []
    last_step = None
    began = time.perf_counter()
    for token in contestant.answer(ids, n_new):
        now = time.perf_counter()
        answer.append(token)
        if contestant.steps == last_step:
            steps[-1][1] += 1
        else:
            steps.append([now - began, 1])
        last_step = contestant.steps
        began = now
    return {"answer": answer, "first_s": steps[0][0], "steps": steps[1:]}


def run_here(args, name: str, ids: list[int]) -> dict:
    """Run a contestant in this process; return its times, answer, peak memory and facts."""
    schedule = "dense" if name == "transformers" else name
    ckpt = Checkpoint.open(args.ckpt, "cpu", args.dtype, schedule, weights=args.weights)
    if name == "transformers":
        contestant = Transformers(ckpt)
    else:
        contestant = Slim(ckpt, len(ids), args.new, args.draft)
    for _ in contestant.answer(ids[:64], 4):
        pass  # what is made once is not the prompt's
    found = time_answer(contestant, ids, args.new)
    return found | {"peak_bytes": memory_bytes()} | contestant.facts()


def run_one(args, name: str, ids: list[int]) -> dict:
    """Run a contestant in a process of its own; return at least times, answer and peak memory.

    Raises ValueError if it fails or prints something else.
    """
    if name in args.files:
        command = [*shlex.split(args.llama_cpp), args.files[name]]
        command += [str(args.threads), str(args.new)]
    else:
        command = [sys.executable, __file__, f"--one={name}"]
        command += [f"--{option}={getattr(args, option)}" for option in OPTIONS]
    printed = last_line(command, json.dumps(ids))
    try:
        found = json.loads(printed)
        figures = [found["first_s"], found["peak_bytes"], *(step[0] for step in found["steps"])]
        n_tokens = 1 + sum(step[1] for step in found["steps"])
        if n_tokens == len(found["answer"]) == args.new and all(map(is_time, figures)):
            return found
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    wanted = "JSON with first_s, steps, answer and peak_bytes"
    raise ValueError(f"it printed {printed!r:.80}, but its last line must be {wanted}")


def is_time(figure) -> bool:
    return 0 < figure < math.inf


OPTIONS = ("ckpt", "dtype", "weights", "draft", "threads", "new")


# ---- all runs -----------------------------------------------------------------------------------


def compare(args) -> int:
    """Make the runs that --out lacks and print the table; return 1 if a contestant failed."""
    limits = {
        "draft": (0, MOST_DRAFTED),
        "rounds": (1, 100),
        "new": (2, 2**20),
        "skip": (0, 2**40),
        "threads": (1, 1024),
    }
    check_numbers(args, limits)
    torch.set_num_threads(args.threads)
    names = read_contestants(args)
    ckpt = Checkpoint.open(args.ckpt, "cpu", args.dtype, "dense")
    args.dtype = dtype_name(ckpt.dtype)  # the same for all
    check_schedules(names, args, ckpt)
    most = ckpt.config.max_len - args.new
    why = f"the model's context of {ckpt.config.max_len:,} less --new {args.new}"
    lengths = read_lengths(args.lengths, SHORTEST, most, why)
    kinds = read_kinds(args.kinds)
    tok = tokenizer.load(ckpt.folder)
    texts = read_text(args, tok, max(lengths))
    between = tok.encode(BETWEEN)
    out = Path(args.out)
    records = read_records(out)
    setup = setup_of(args, ckpt)
    done = {key_of(record) for record in records if record["setup"] == setup}
    failed: set[tuple] = set()
    for number, text in enumerate(texts):
        for n in lengths:
            for kind in kinds:
                prompt, passage = make_prompt(kind, text, n, args.new, between)
                for name in names:
                    key = (number, n, kind, name)
                    if key in done or key[1:] in failed:
                        continue
                    record = attempt(args, key, prompt, passage)
                    if record is None:
                        failed.add(key[1:])
                    else:
                        records.append(record | {"setup": setup})
                        append(out, records[-1])
    print("\n".join(tables(records, setup)))
    return int(bool(failed))


def attempt(args, key: tuple, prompt: list[int], passage: list[int]) -> dict | None:
    """Return the record of one run, or say why there is none."""
    number, n, kind, name = key
    title = f"round {number + 1}, {n:,} tokens, {kind}, {name}"
    rate = sum_rate()
    try:
        found = run_one(args, name, prompt)
    except (ValueError, OSError) as error:
        print(f"{title} failed: {one_line(error)}", file=sys.stderr, flush=True)
        return None
    total = found["first_s"] + sum(step[0] for step in found["steps"])
    print(f"{title}: {found['first_s']:.2f} s, all {total:.2f} s", file=sys.stderr, flush=True)
    record = dict(zip(("round", "tokens", "kind", "name"), key))
    record |= found
    record["steps"] = [[round(seconds, 6), n_tokens] for seconds, n_tokens in found["steps"]]
    record["bytes_per_s"] = rate
    record["repeated"] = repeated(found["answer"])
    if passage:
        record["quoted"] = quoted(found["answer"], passage)
    return record


def quoted(answer: list[int], passage: list[int], n: int = 4) -> float:
    """Return the share of a passage that an answer has in its order, in runs of n tokens or more.

    A word left out or put in costs no more than itself.
    """
    runs = SequenceMatcher(None, answer, passage, autojunk=False).get_matching_blocks()
    return sum(run.size for run in runs if run.size >= n) / len(passage)


def repeated(answer: list[int], n: int = 4) -> float:
    """Return the share of the answer's runs of n tokens that were there before."""
    runs = [tuple(answer[i : i + n]) for i in range(len(answer) - n + 1)]
    return 1 - len(set(runs)) / max(1, len(runs))


def sum_rate() -> float:
    """Measure the bytes/s of a sum, the best of ten."""
    numbers = torch.ones(2**26)
    best = math.inf
    for _ in range(10):
        began = time.perf_counter()
        numbers.sum().item()
        best = min(best, time.perf_counter() - began)
    return numbers.nbytes / best


# ---- what there is ------------------------------------------------------------------------------


def setup_of(args, ckpt: Checkpoint) -> dict:
    """Return what all runs of a table have in common."""
    return {
        "machine": hardware(ckpt.device),
        "threads": args.threads,
        "torch": torch.__version__,
        "commit": commit(),
        "ckpt": Path(args.ckpt).name,
        "dtype": args.dtype,
        "weights": args.weights,
        "draft": args.draft,
        "new": args.new,
        "rounds": args.rounds,
        "skip": args.skip,
    }


def key_of(record: dict) -> tuple:
    return record["round"], record["tokens"], record["kind"], record["name"]


def read_records(path: Path) -> list[dict]:
    """Return the file's records; a line that is cut off or lacks a figure is not there."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record.get("kind") != "quoting" or "quoted" in record:
                records.append(record)
    return records


def append(path: Path, record: dict) -> None:
    with path.open("a", encoding="utf-8") as file:
        if file.tell() and not path.read_bytes().endswith(b"\n"):
            file.write("\n")  # the last line was cut: nothing may be written into it
        file.write(json.dumps(record) + "\n")


HEAD = [
    "tokens",
    "answer",
    "",
    "rounds",
    "first token, s",
    "with the answer, s",
    "tokens/s, mean",
    "by the median",
    "of the floor",
    "tokens a step",
    "peak memory",
    "of the answer",
]


def tables(records: list[dict], setup: dict | None = None) -> list[str]:
    """Return the table of one setup, or one of each, in Markdown."""
    setups = [setup]
    if setup is None:
        setups = []
        for record in records:
            if record["setup"] not in setups:
                setups.append(record["setup"])
    lines = []
    for one in setups:
        of_setup = [record for record in records if record["setup"] == one]
        groups: dict[tuple, list[dict]] = {}
        for record in of_setup:
            groups.setdefault(key_of(record)[1:], []).append(record)
        order = sorted(groups, key=lambda key: key[:2])  # contestants stay as they came
        lines += ["", ", ".join(f"{name} {value}" for name, value in one.items()), ""]
        lines.append(table(HEAD, [cells(key, groups[key]) for key in order]))
    return lines


def cells(key: tuple, runs: list[dict]) -> list[str]:
    """Return a table's row: medians of some runs."""
    n, kind, name = key
    totals = [run["first_s"] + sum(step[0] for step in run["steps"]) for run in runs]
    rates = [mean_rate(run["steps"]) for run in runs]
    usual = [median_seconds(run["steps"]) for run in runs]
    shares = []
    for run, seconds in zip(runs, usual):
        if "floor_bytes" in run:
            shares.append(run["floor_bytes"] / run["bytes_per_s"] / seconds)
    tokens_a_step = median(tokens_of(run["steps"]) / len(run["steps"]) for run in runs)
    if kind == "quoting":
        of_answer = f"{100 * median(run['quoted'] for run in runs):.0f}% quoted"
    else:
        of_answer = f"{100 * median(run['repeated'] for run in runs):.0f}% repeated"
    return [
        f"{n:,}",
        kind,
        name,
        str(len(runs)),
        f"{median(run['first_s'] for run in runs):.2f}",
        f"{median(totals):.2f}",
        f"{median(rates):.1f}",
        f"{1 / median(usual):.1f}",
        f"{100 * median(shares):.0f}%" if shares else "",
        f"{tokens_a_step:.2f}",
        format_bytes(median(run["peak_bytes"] for run in runs)),
        of_answer,
    ]


def tokens_of(steps: list) -> int:
    return sum(n_tokens for _, n_tokens in steps)


def mean_rate(steps: list) -> float:
    """Return tokens/s of all steps together, those that revive blocks included."""
    return tokens_of(steps) / sum(seconds for seconds, _ in steps)


def median_seconds(steps: list) -> float:
    """Return the seconds of the middle token, where a step's tokens share its time."""
    of_tokens = []
    for seconds, n_tokens in steps:
        of_tokens += n_tokens * [seconds / n_tokens]
    return median(of_tokens)


# ---- options ------------------------------------------------------------------------------------


def read_contestants(args) -> list[str]:
    """Return the contestants' names; those of llama.cpp's files first."""
    args.files = {}
    for path in args.gguf.split(",") if args.gguf else ():
        if not Path(path).is_file():
            raise ValueError(f"--gguf: there is no file {path!r:.200}")
        args.files[f"llama.cpp, {Path(path).stem.rpartition('-')[2]}"] = path
    if args.files:
        check_command(args.llama_cpp)
    names = [name.strip() for name in args.contestants.split(",")]
    if "" in names or len({*names}) < len(names):
        raise ValueError(f"--contestants {args.contestants!r:.200} has an empty name, or one twice")
    return [*args.files, *names]


def check_schedules(names: list[str], args, dense: Checkpoint) -> None:
    """Raise ValueError for a contestant that is no program and no schedule."""
    for name in names:
        if name == "transformers" or name in args.files:
            continue
        try:
            resolve_schedule(name, dense.config, dense.settings.block_len)
        except ValueError as error:
            what = "--contestants are transformers, or schedules of Slim's"
            raise ValueError(f"{what}: {error}") from None


def check_command(text: str) -> None:
    """Raise ValueError unless --llama-cpp names a program that is there."""
    problem = "there is no such program"
    command = []
    try:
        command = shlex.split(text)
    except ValueError as error:
        problem = str(error)
    if not command or not shutil.which(command[0]):
        raise ValueError(f"--llama-cpp {text!r:.200}: {problem}; give one such as {LLAMA_CPP!r}")


def read_kinds(text: str) -> list[str]:
    kinds = text.split(",")
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"--kinds {kind!r:.40} is unknown; there are {', '.join(KINDS)}")
    return kinds


def parser() -> Parser:
    p = Parser("speed.py")
    p.add_argument("--ckpt", default="smollm2-135m-instruct")
    p.add_argument("--text", help="a long text, UTF-8")
    p.add_argument("--skip", type=int, default=100_000, help="characters of the text to leave out")
    p.add_argument("--out", help="runs, a line each; a call goes on where it ends")
    p.add_argument("--table", action="store_true", help="run nothing, print what --out has")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--weights", default="auto", help="of Slim: full, int8 or int4")
    p.add_argument("--draft", type=int, default=16, help="tokens that Slim drafts at most")
    p.add_argument("--lengths", default="2048,4096,7900", help="prompts in tokens, with commas")
    p.add_argument("--new", type=int, default=200, help="tokens of an answer")
    p.add_argument("--kinds", default=",".join(KINDS), help="of answers, with commas")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    what = "with commas: transformers, and Slim's schedules: a name or 9:1/4"
    p.add_argument("--contestants", default="transformers,dense,auto", help=what)
    p.add_argument("--gguf", help="files for llama.cpp, with commas; without them it is left out")
    how = "runs it: gets a file, threads and new tokens as arguments and ids on stdin"
    p.add_argument("--llama-cpp", metavar="CMD", default=LLAMA_CPP, help=how)
    p.add_argument("--one", help=argparse.SUPPRESS)
    return p


def run(args) -> int:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        if env_number(name) > 1:
            raise ValueError("this bench starts processes of its own; run it without torchrun")
    if args.one:
        torch.set_num_threads(args.threads)
        print(json.dumps(run_here(args, args.one, json.load(sys.stdin))))
        return 0
    if not args.out:
        raise ValueError("--out is missing: a file for the runs")
    if args.table:
        if not Path(args.out).is_file():
            raise ValueError(f"--out {args.out} does not exist, so there is nothing for a table")
        print("\n".join(tables(read_records(Path(args.out)))))
        return 0
    return compare(args)


def main(argv: list[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError, MemoryError, ModuleNotFoundError) as error:
        p.error(error)


if __name__ == "__main__":
    sys.exit(main())
