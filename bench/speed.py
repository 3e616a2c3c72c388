"""First token, decoding and memory beside llama.cpp, transformers and the machine's ceilings.

    python bench/speed.py --text BOOK.txt --lengths 2048,4096,8000
    python bench/speed.py --text BOOK.txt --llama-cpp "node bench/llama_cpp.mjs MODEL.gguf"
    python bench/speed.py --shape llama3.1-8b --lengths 8192,131072     # random weights, one GPU
    python bench/speed.py --memory                                      # peaks beside plans

Every run is a process of its own, so that its peak memory is its own, and contestants take turns.
One that fails is out for that length, its row says why, and the exit code is 1. The text goes on
after the prompt: its tokens are fed one by one, whatever the model would have said (llama.cpp feeds
its own). Without --text the tokens are random. Ceilings are measured first: a prefill's FLOPs over
the rate of a matrix product, and the bytes that a token must read, weights, keys and values, over
the rate of a sum. --llama-cpp is a command that gets threads and new tokens as its last arguments
and ids on stdin, and prints JSON as `run_one` returns it; llama_cpp.mjs is one for the npm package
node-llama-cpp. Peak memory of a CPU run is read from /proc, so this needs Linux.

--memory shows the peak of a process above what it takes once torch has multiplied two matrices,
beside what Slim planned: weights, keys and values, what is pruned, and temporaries.
"""

import argparse
import json
import math
import shlex
import shutil
import sys
import tempfile
import time
import zlib
from dataclasses import replace
from pathlib import Path
from statistics import mean, median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import parallel
import prune
import slim
import tokenizer
from bench.common import (
    Parser,
    check_numbers,
    last_line,
    memory_bytes,
    read_lengths,
    row,
    table,
)
from loading.config import parse_config
from loading.files import format_bytes, one_line
from loading.weights import tensor_shapes, weight_bytes
from model import Config
from planning.checkpoint import Checkpoint, dtype_name, pick_device, pick_dtype
from planning.flops import prefill_flops
from planning.memory import KERNEL_BYTES, plan, step_bytes
from planning.schedule import resolve_schedule
from planning.settings import Settings, env_number

# ---- checkpoints: a real one, or random weights of a shape ------------------------------------


def shape(dim: int, hidden: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
    }


SHAPES = {
    "llama3.1-8b": shape(4096, 14336, 32, 32, 8, 128256),
    "mini": shape(256, 896, 16, 8, 2, 4096),
    "tiny": shape(64, 172, 5, 8, 4, 512),
}


class RandomTensors(dict):
    """A checkpoint's tensors by name, drawn when asked for, the same each time."""

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype):
        super().__init__(tensor_shapes(config))
        self.device = device
        self.dtype = dtype

    def __getitem__(self, name):
        return self  # stands for the open file

    def get_tensor(self, name: str) -> torch.Tensor:
        size = self.get(name)
        if len(size) == 1:
            return torch.ones(size, device=self.device, dtype=self.dtype)
        seed = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
        drawn = torch.randn(size, generator=seed, device=self.device, dtype=self.dtype)
        return drawn.mul_(0.02)


def random_checkpoint(name: str, device: str, dtype: str, schedule: str, **options) -> Checkpoint:
    """Return a checkpoint of a shape whose weights are drawn when they are loaded."""
    config = parse_config(SHAPES[name], name)
    settings = Settings(**options)
    place = pick_device(device)
    kind = pick_dtype(dtype, config, place)
    tensors = RandomTensors(config, place, kind)
    budgets = resolve_schedule(schedule, config, settings.block_len)
    rule = prune.RULES["peak"]
    return Checkpoint(
        Path(name),
        config,
        tensors,
        set(),
        place,
        kind,
        budgets,
        rule,
        settings,
        budgets,
        rule,
        None,
    )


def make_engine(name: str, device: str, dtype: str, schedule: str, chunk: int) -> slim.Engine:
    """Return this rank's engine of a shape with random weights."""
    return parallel.start(random_checkpoint(name, device, dtype, schedule, chunk=chunk))


def open_checkpoint(args, schedule: str) -> Checkpoint:
    """Return what --ckpt or --shape stands for, checked but not loaded."""
    options = {"gamma": args.gamma, "overlap": not args.no_overlap}
    if args.shape:
        return random_checkpoint(args.shape, args.device, args.dtype, schedule, **options)
    return Checkpoint.open(args.ckpt, args.device, args.dtype, schedule, **options)


# ---- one run, in a process of its own -----------------------------------------------------


class Slim:
    def __init__(self, ckpt: Checkpoint, n_prompt: int, n_new: int):
        self.engine = slim.start(ckpt, n_prompt, n_new)
        self.n_new = n_new

    def read(self, ids: list[int]) -> None:
        self.engine.prefill(ids, room=self.n_new).argmax().item()

    def feed(self, token: int) -> None:
        self.engine.extend([token]).argmax().item()


class Transformers:
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
            model = load(ckpt.folder, dtype=ckpt.dtype, local_files_only=True)
        self.model = model.to(ckpt.device).eval()
        self.device = ckpt.device
        self.past = None

    def read(self, ids: list[int]) -> None:
        self.past = None
        self.run(ids)

    def feed(self, token: int) -> None:
        self.run([token])

    @torch.inference_mode()
    def run(self, ids: list[int]) -> torch.Tensor:
        """Run ids after what is cached; return the logits after the last."""
        batch = torch.tensor([ids], device=self.device)
        out = self.model(batch, past_key_values=self.past, logits_to_keep=1, use_cache=True)
        self.past = out.past_key_values
        out.logits.argmax().item()
        return out.logits[0, -1]


def run_here(args, name: str, ids: list[int]) -> dict:
    """Run a contestant in this process; return its times, peak memory and revivals."""
    n_prompt = len(ids) - args.new
    ckpt = open_checkpoint(args, "dense" if name == "transformers" else name)
    contestant = Transformers(ckpt) if name == "transformers" else Slim(ckpt, n_prompt, args.new)
    contestant.read(ids[:64])  # what is made once is not the prompt's
    times = [time.perf_counter()]
    contestant.read(ids[:n_prompt])
    times.append(time.perf_counter())
    for token in ids[n_prompt:]:
        contestant.feed(token)
        times.append(time.perf_counter())
    first, *steps = [end - start for start, end in zip(times, times[1:])]
    on_gpu = ckpt.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else memory_bytes()
    revived = contestant.engine.stats["revived"] / args.new if name != "transformers" else 0
    return {"first_s": first, "steps_s": steps, "peak_bytes": peak, "revived": revived}


def run_one(args, name: str, ids: list[int], n_prompt: int) -> dict:
    """Run a contestant in a process of its own; return at least first_s, steps_s and peak_bytes.

    Raises ValueError if it fails or prints something else.
    """
    if name == "llama.cpp":
        command = [*shlex.split(args.llama_cpp), str(args.threads), str(args.new)]
        ids = ids[:n_prompt]
    else:
        names = ("device", "dtype", "gamma", "threads", "new")
        command = [sys.executable, __file__, f"--one={name}"]
        command += [f"--{option}={getattr(args, option)}" for option in names]
        command += [f"--shape={args.shape}"] if args.shape else [f"--ckpt={args.ckpt}"]
        command += ["--no-overlap"] if args.no_overlap else []
    printed = last_line(command, json.dumps(ids))
    try:
        found = json.loads(printed)
        figures = [found["first_s"], found["peak_bytes"], mean(found["steps_s"])]
        if all(0 < figure < math.inf for figure in figures):
            return found
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    wanted = "JSON with first_s, steps_s and peak_bytes"
    raise ValueError(f"it printed {printed!r:.80}, but its last line must be {wanted}")


# ---- ceilings -------------------------------------------------------------------------------


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Measure FLOP/s of a matrix product and bytes/s of a sum, each the best of ten."""
    large = device.type == "cuda"
    n = 8192 if large else 2048
    square = torch.randn(n, n, device=device, dtype=dtype)
    long = torch.ones(2**28 if large else 2**26, device=device)
    product_s = min(seconds(lambda: (square @ square)[0, 0].item()) for _ in range(10))
    sum_s = min(seconds(lambda: long.sum().item()) for _ in range(10))
    return 2 * n**3 / product_s, long.nbytes / sum_s


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def floor_bytes(ckpt: Checkpoint, n_prompt: int, n_new: int) -> int:
    """Return the bytes that a token after the prompt must read: weights, active keys and values.

    Of an embedding that is not also the head, a token reads one row.
    """
    config = ckpt.config
    unread = 0 if config.tied else (config.vocab_size - 1) * config.dim * ckpt.dtype.itemsize
    return weight_bytes(config, ckpt.dtype) - unread + plan(ckpt, n_prompt, n_new).kv


# ---- the comparison -----------------------------------------------------------------------------

PROGRAMS = ("llama.cpp", "transformers")  # any other contestant is a schedule of Slim's
EXAMPLE = "node bench/llama_cpp.mjs MODEL.gguf"
HEAD = [
    "",
    "first token, s",
    "of the product's rate",
    "tokens/s, mean",
    "by the median",
    "of the sum's rate",
    "peak memory",
]


def compare(args) -> int:
    """Print a table for each length; return 1 if a contestant failed."""
    check_numbers(args, {"rounds": (1, 1000), "new": (2, 2**20), "skip": (0, 2**40)})
    if args.llama_cpp is not None:
        check_command(args.llama_cpp)
    contestants = read_contestants(args)
    ckpt = next(iter(contestants.values()))
    args.dtype = dtype_name(ckpt.dtype)  # the same for all
    most = ckpt.config.max_len - args.new
    why = f"the model's context of {ckpt.config.max_len:,} less --new {args.new}"
    lengths = read_lengths(args.lengths, 1, most, why)
    ids = read_ids(args, ckpt, max(lengths) + args.new)
    flops, rate = ceilings(ckpt.device, ckpt.dtype)
    print(
        f"{args.dtype}, {args.threads} threads, torch {torch.__version__}: a product's rate",
        end=" ",
    )
    print(f"is {flops / 1e9:,.0f} GFLOP/s, a sum's {rate / 1e9:.1f} GB/s")
    failed = False
    for n in lengths:
        runs, errors = run_rounds(args, list(contestants), ids[: n + args.new], n)
        print(f"\n{n:,} tokens, {args.rounds} rounds\n\n{table(HEAD, [])}")
        for name, ckpt in contestants.items():
            first_s = prefill_flops(ckpt.config, n, ckpt.schedule) / flops
            step_s = floor_bytes(ckpt, n, args.new) / rate
            cells = result_cells(name, runs[name], errors.get(name, ""), first_s, step_s)
            print(row(cells), flush=True)
        failed = failed or bool(errors)
    return int(failed)


def run_rounds(args, names: list[str], ids: list[int], n_prompt: int) -> tuple[dict, dict]:
    """Return {name: runs} and {name: error}; who fails keeps the runs it has, the others go on."""
    runs: dict[str, list[dict]] = {name: [] for name in names}
    errors: dict[str, str] = {}
    for _ in range(args.rounds):
        for name in names:
            if name not in errors:
                try:
                    runs[name].append(run_one(args, name, ids, n_prompt))
                except (ValueError, OSError) as error:
                    errors[name] = one_line(error)
    return runs, errors


def result_cells(name: str, runs: list[dict], error: str, first_floor: float, step_floor: float):
    """Return a table's row; the floors are seconds."""
    if error:
        finished = f" after {len(runs)} rounds" if runs else ""
        name += f" failed{finished}: {error.replace('|', '/')}"
    if not runs:
        return [name, *[""] * (len(HEAD) - 1)]
    first = median(run["first_s"] for run in runs)
    steps = [seconds for run in runs for seconds in run["steps_s"]]
    if runs[0].get("revived"):
        name += f" ({mean(run['revived'] for run in runs):.2f} revivals a token)"
    return [
        name,
        f"{first:.2f}",
        f"{100 * first_floor / first:.0f}%",
        f"{1 / mean(steps):.1f}",
        f"{1 / median(steps):.1f}",
        f"{100 * step_floor / median(steps):.0f}%",
        format_bytes(median(run["peak_bytes"] for run in runs)),
    ]


def read_contestants(args) -> dict[str, Checkpoint]:
    """Return {name: the checkpoint with its schedule, dense for other programs}."""
    names = [name.strip() for name in args.contestants.split(",")]
    if args.llama_cpp is None:
        names = [name for name in names if name != "llama.cpp"]
    if not names:
        raise ValueError("--contestants has llama.cpp alone, which needs --llama-cpp CMD")
    if "" in names or len({*names}) < len(names):
        raise ValueError(f"--contestants {args.contestants!r:.200} has an empty name, or one twice")
    dense = open_checkpoint(args, "dense")  # a wrong --ckpt is named first
    contestants = dict.fromkeys(names, dense)
    for name in names:
        if name not in PROGRAMS:
            try:
                schedule = resolve_schedule(name, dense.config, dense.settings.block_len)
            except ValueError as error:
                known = ", ".join(PROGRAMS)
                raise ValueError(f"--contestants are {known}, or schedules: {error}") from None
            contestants[name] = replace(dense, schedule=schedule)
    return contestants


def check_command(text: str) -> None:
    """Raise ValueError unless --llama-cpp names a program that is there."""
    problem = "there is no such program"
    command = []
    try:
        command = shlex.split(text)
    except ValueError as error:
        problem = str(error)
    if not command or not shutil.which(command[0]):
        raise ValueError(f"--llama-cpp {text!r:.200}: {problem}; give one such as {EXAMPLE!r}")


def read_ids(args, ckpt: Checkpoint, n: int) -> list[int]:
    """Return n ids of the text after --skip, or random ones."""
    if args.text is None or args.shape:
        seed = torch.Generator().manual_seed(0)
        return torch.randint(ckpt.config.vocab_size, (n,), generator=seed).tolist()
    try:
        text = Path(args.text).read_text(encoding="utf-8")[args.skip :]
    except (OSError, ValueError) as error:
        raise ValueError(f"--text {args.text!r:.200} cannot be read as UTF-8: {error}") from None
    ids = tokenizer.load(ckpt.folder).encode(text[: 20 * n])  # characters: enough of any prose
    if len(ids) < n:
        raise ValueError(
            f"--text {args.text} has {len(ids):,} tokens after --skip {args.skip:,} characters; "
            f"--lengths and --new take {n:,}; give a longer text or a smaller --skip"
        )
    return ids[:n]


# ---- memory: the peak of a process beside what was planned ------------------------------------

WORK = ("prompt", "follow-ups", "save", "resume")
RANKINGS = (
    ("dense", "lookup"),
    ("auto", "lookup"),
    ("auto", "peak"),
    ("auto", "paper"),
)  # schedule and score


def memory_table(args) -> None:
    """Measure every kind of work in a process of its own."""
    context = Checkpoint.open(args.ckpt, "cpu", args.dtype).config.max_len
    most = (context - args.new) * 4 // 7  # three follow-ups of a quarter each
    why = f"as follow-ups must fit into the model's context of {context:,} too"
    lengths = read_lengths(args.lengths, 4, most, why)
    print(table(["tokens", "schedule, score", "work", "peak", "planned", ""], []), flush=True)
    command = [sys.executable, __file__, "--memory"]
    command += [f"--{name}={getattr(args, name)}" for name in ("ckpt", "dtype", "new")]
    for n in lengths:
        for ranking in RANKINGS:
            with tempfile.TemporaryDirectory() as folder:
                for work in WORK:
                    one = json.dumps([work, *ranking, n, f"{folder}/text.slim"])
                    peak, planned = json.loads(last_line([*command, f"--one={one}"]))
                    cells = [f"{n:,}", ", ".join(ranking), work]
                    cells += [format_bytes(peak), format_bytes(planned), f"{peak / planned:.2f}"]
                    print(row(cells), flush=True)


def memory_of(args, work: str, schedule: str, score: str, n: int, file: str) -> tuple[int, int]:
    """Do one kind of work in this process; return its peak and what was planned, in bytes."""
    torch.ones(512, 512) @ torch.ones(512, 512)
    before = memory_bytes("VmRSS")
    ckpt = Checkpoint.open(args.ckpt, "cpu", args.dtype, schedule, score)
    vocab = ckpt.config.vocab_size - 5
    ids = [5 + (i * 7919 + i * i * 31) % vocab for i in range(n + args.new)]
    engine = slim.start(ckpt, n, args.new)
    need = plan(ckpt, n, args.new)
    if work == "resume":
        engine.resume(file, room=args.new)
        homes = engine.stats["kv_cpu_bytes"] // engine.kv.home_memory.entry_bytes
        need = plan(ckpt, n + args.new, args.new, args.new, homes)
    else:
        engine.prefill(ids[:n], room=args.new)
    for token in ids[n:]:
        engine.extend([token])
    planned = need.total + need.host
    if work == "follow-ups":
        for _ in range(3):
            planned = need.weights + KERNEL_BYTES + follow_up_bytes(engine, n // 4)
            engine.extend(ids[: n // 4])
    if work == "save":
        engine.save(file)
    return memory_bytes() - before, planned


def follow_up_bytes(engine: slim.Engine, n: int) -> int:
    """Return the bytes of a conversation and of what n more tokens are checked for."""
    kv = engine.kv
    end = kv.length + n
    held = sum(engine.stats[key] for key in ("kv_gpu_bytes", "kv_cpu_bytes", "aux_cpu_bytes"))
    slots = [stage.n_slots for stage in kv.stages]
    step = step_bytes(engine.ckpt, slots, n, end - kv.tail_start)
    return held + kv.growth_bytes(end) + kv.exchange_bytes() + step


# ---- command line -----------------------------------------------------------------------------


def parser() -> Parser:
    p = Parser("speed.py")
    weights = p.add_mutually_exclusive_group()
    weights.add_argument("--ckpt", default="smollm2-135m-instruct")
    weights.add_argument("--shape", choices=SHAPES, help="random weights of this shape")
    p.add_argument("--text", help="a long text, UTF-8; without it tokens are random")
    p.add_argument("--skip", type=int, default=100_000, help="characters of the text to leave out")
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto")
    p.add_argument("--lengths", default="4096", help="prompts in tokens, with commas")
    p.add_argument("--new", type=int, default=40, help="tokens that follow one by one")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    what = "with commas: llama.cpp, transformers, and Slim's schedules: a name or 9:1/4"
    p.add_argument("--contestants", default="llama.cpp,transformers,dense,auto", help=what)
    p.add_argument("--llama-cpp", metavar="CMD", help="runs llama.cpp; without it, it is left out")
    p.add_argument("--gamma", type=float, default=-1, help="0 never swaps; -1 as the rule wants")
    p.add_argument("--no-overlap", action="store_true", help="let compute wait for copies")
    p.add_argument("--memory", action="store_true", help="peaks of memory instead, on a CPU")
    p.add_argument("--one", help=argparse.SUPPRESS)
    return p


def run(args) -> int:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        if env_number(name) > 1:
            raise ValueError("this bench starts processes of its own; run it without torchrun")
    check_numbers(args, {"threads": (1, 1024), "new": (1, 2**20)})
    torch.set_num_threads(args.threads)
    if args.memory and args.one:
        print(json.dumps(memory_of(args, *json.loads(args.one))))
    elif args.one:
        print(json.dumps(run_here(args, args.one, json.load(sys.stdin))))
    elif args.memory:
        memory_table(args)
    else:
        return compare(args)
    return 0


def main(argv: list[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError, MemoryError, ModuleNotFoundError) as error:
        p.error(error)


if __name__ == "__main__":
    sys.exit(main())
