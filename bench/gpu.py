"""All that needs a GPU, in one call of at most 8 minutes: the tests and the speed of an 8B model.

    python bench/gpu.py --out results-gpu
    python bench/gpu.py --out dry-run --device cpu --tiny     # the same code on a tiny shape

It needs no network and no checkpoint: random weights in bfloat16 are drawn on the device; beside
requirements.txt, pip install pytest pytest-xdist hypothesis transformers selenium gguf. The parts,
the most valuable first:

    tests          the tests that need CUDA
    ceilings       the rates of a matrix product and of a copy, which the floors below go by
    first token    dense and pruned, beside its operations; peak memory beside the plan
    decode         beside the bytes that a token must read; without swaps, with few, with all
    swaps          steps that exchange some blocks: are the copies done when compute needs them?
    transformers   first token, decoding and logits, where it is installed

Each result goes to OUT/results.jsonl at once. A part that fails leaves its error there, one for
which too little of --seconds is left is skipped, and the others go on. Random weights choose other
blocks at each token, far more than prose does, so decoding with all revivals is the worst case;
lookup heads do not exist in them, so `peak` ranks the blocks.
"""

import gc
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(ROOT := Path(__file__).resolve().parent.parent))
import prune
import slim
from bench.common import Parser, check_numbers, commit, floor_bytes, hardware, memory_bytes, table
from bench.shapes import random_checkpoint
from bench.speed import Transformers
from kvcache import CopyStream
from loading.files import format_bytes, one_line
from planning.flops import prefill_flops
from planning.memory import plan

N_NEW = 64  # tokens that a conversation has room for after its prompt
N_STEPS = 20  # decoded tokens that are timed
TESTS = ["test_slim.py", "loading/test_saved.py", "-k", "cuda or late_stream"]
TEST_SECONDS = 150


@dataclass(frozen=True)
class Size:
    """What is measured: on a GPU, or as a dry run."""

    shape: str
    lengths: tuple[int, ...]  # prompts in tokens
    square: int  # rows of the matrices that are multiplied
    copied: int  # bytes
    exchanged: tuple[int, ...]  # blocks of a step with swaps


LARGE = Size("llama3.1-8b", (8192, 32768, 131072), 8192, 2**32, (1, 8))
TINY = Size("tiny", (1100, 2100), 256, 2**20, (1, 2))


# ---- results, and the time that is left -------------------------------------------------------


class Report:
    """Results in a file, a line each; parts run one by one until the time is up."""

    def __init__(self, folder: Path, seconds: float):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.file = (folder / "results.jsonl").open("a", encoding="utf-8")
        self.records: list[dict] = []
        self.started = time.perf_counter()
        self.deadline = self.started + seconds

    def left(self) -> float:
        return self.deadline - time.perf_counter()

    def add(self, part: str, **found) -> None:
        """Keep a result: print it, and write it so that it outlives this process."""
        at = round(time.perf_counter() - self.started, 1)
        record = {"part": part, "at_s": at, **found}
        self.records.append(record)
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        print(f"{at:5.1f} s: {sentence(record)}", flush=True)

    def attempt(self, part: str, needs: float, work, *arguments):
        """Do a part and return its result; None if it fails, or has fewer seconds than it needs."""
        if self.left() < needs:
            reason = f"it needs {needs:.0f} s, and {max(0, self.left()):.0f} s are left"
            self.add(part, skipped=reason)
            return None
        try:
            return work(self, *arguments)
        except Exception as error:  # whatever it is, the other parts go on
            self.add(part, error=one_line(error), traceback=traceback.format_exc())
            return None

    def failed(self) -> bool:
        return any("error" in record for record in self.records)

    def summary(self) -> str:
        """Return a table of all results."""
        sentences = [sentence(record) for record in self.records if "seconds" not in record]
        rows = [cells(record) for record in self.records if "seconds" in record]
        head = ["", "tokens", "", "ms", "floor, ms", "of the floor", ""]
        return "\n".join([*sentences, "", table(head, rows)])


def cells(record: dict) -> list[str]:
    """Return a table's row of a result that has seconds."""
    seconds = record["seconds"]
    floor = record.get("floor")
    return [
        record["part"],
        f"{record['tokens']:,}",
        record["who"],
        f"{1000 * seconds:,.2f}",
        f"{1000 * floor:,.2f}" if floor else "",
        f"{100 * floor / seconds:.0f}%" if floor else "",
        record["note"],
    ]


def sentence(record: dict) -> str:
    """Return a result in one line."""
    for problem in ("skipped", "error"):
        if problem in record:
            return f"{record['part']}: {problem}: {record[problem]:.200}"
    if "seconds" in record:
        return " | ".join(cells(record))
    return f"{record['part']}: {record['note']}"


# ---- the device -------------------------------------------------------------------------------


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def moment(device: torch.device):
    """Return a point in the current stream's work: an event, or on a CPU the time."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def between(begin, end) -> float:
    """Return the seconds between two moments that are over."""
    if isinstance(begin, float):
        return end - begin
    return begin.elapsed_time(end) / 1000


def restart_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Return the peak of what was allocated on a GPU; on a CPU that of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return memory_bytes()


def free_memory(device: torch.device) -> None:
    """Return what is no longer used to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---- tests, ceilings --------------------------------------------------------------------------


def run_tests(report: Report) -> None:
    """Run the tests that need CUDA, in a process of their own; what they print is kept."""
    command = [sys.executable, "-m", "pytest", *TESTS, "-v", "-rfEs", "--tb=short"]
    command += ["-p", "no:cacheprovider", "-o", "faulthandler_timeout=60"]
    output = report.folder / "tests.txt"
    limit = min(TEST_SECONDS, report.left())
    with output.open("w") as file:
        try:
            done = subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=limit
            )
        except subprocess.TimeoutExpired:
            report.add("tests", error=f"not over after {limit:.0f} s; see {output}")
            return
    lines = output.read_text(errors="replace").strip().splitlines() or ["nothing was printed"]
    note = lines[-1].strip("= ")
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if done.returncode:
        report.add("tests", error=f"exit code {done.returncode}: {note}", failed=failed)
    else:
        report.add("tests", note=note)


def measure_ceilings(report: Report, device: torch.device, size: Size) -> tuple[float, float]:
    """Return FLOP/s of a bfloat16 product and bytes/s of a copy, read and written."""
    left = torch.randn(size.square, size.square, device=device, dtype=torch.bfloat16)
    right = torch.randn_like(left)
    product = torch.empty_like(left)
    source = torch.ones(size.copied, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    product_s = best_seconds(device, lambda: torch.mm(left, right, out=product))
    copy_s = best_seconds(device, lambda: target.copy_(source))
    flops = 2 * size.square**3 / product_s
    rate = 2 * size.copied / copy_s
    note = f"a product's rate is {flops / 1e12:,.1f} TFLOP/s, a copy's {rate / 1e9:,.0f} GB/s"
    report.add("ceilings", note=note, flops=flops, bytes_per_s=rate)
    return flops, rate


def best_seconds(device: torch.device, work, rounds: int = 5, calls: int = 4) -> float:
    """Return the seconds of a call: the best of some rounds, after one that warms up."""
    times = []
    for _ in range(rounds + 1):
        wait_for(device)
        started = time.perf_counter()
        for _ in range(calls):
            work()
        wait_for(device)
        times.append((time.perf_counter() - started) / calls)
    return min(times[1:])


# ---- first token and decoding -------------------------------------------------------------------


def load_engine(report: Report, device: torch.device, size: Size) -> slim.Engine:
    started = time.perf_counter()
    ckpt = random_checkpoint(size.shape, str(device), "bfloat16", "dense")
    engine = slim.start(ckpt)
    engine.prefill(draw_ids(engine.config, 64))
    note = f"{size.shape}, {format_bytes(plan(ckpt, 1).weights)}"
    report.add("weights", note=f"{note} in {time.perf_counter() - started:.1f} s")
    return engine


def draw_ids(config, n: int) -> list[int]:
    seed = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (n,), generator=seed).tolist()


def measure_engine(report: Report, engine: slim.Engine, n: int, schedule: str, rates) -> None:
    """Measure the first token of n, decoding after it, and the memory of both."""
    flops_rate, byte_rate = rates
    device = engine.kv.device
    ids = draw_ids(engine.config, n + N_NEW)
    engine.prefill(ids[:1])  # drops the conversation before, which is not part of the peak
    free_memory(device)
    restart_peak(device)
    times = time_prompts(lambda: engine.prefill(ids[:n], N_NEW, schedule).argmax().item())
    ckpt = engine.running
    floor = prefill_flops(engine.config, n, ckpt.schedule, local=ckpt.local) / flops_rate
    planned = plan(ckpt, n, N_NEW).total
    peak = peak_bytes(device)
    report.add(
        "first token",
        tokens=n,
        who=schedule,
        seconds=min(times),
        floor=floor,
        times=times,
        peak=peak,
        planned=planned,
        note=f"peak {format_bytes(peak)}, planned {format_bytes(planned)}",
    )
    floor = floor_bytes(ckpt, n, N_NEW) / byte_rate
    if not ckpt.schedule:
        measure_decode(report, engine, ids, schedule, floor)
        return
    model = engine.model
    gamma = model.gamma
    rule = model.rule
    model.gamma = 0.0
    measure_decode(report, engine, ids, f"{schedule}, never swaps", floor)
    model.gamma = gamma
    model.rule = replace(rule, revive_at_most=1)  # as the rule `lookup` has it
    measure_decode(report, engine, ids, f"{schedule}, at most one revival", floor)
    model.rule = rule
    measure_decode(report, engine, ids, f"{schedule}, all revivals", floor)


def measure_decode(report: Report, engine: slim.Engine, ids: list[int], who: str, floor) -> None:
    """Measure tokens that follow the conversation."""
    kv = engine.kv
    at = kv.length
    revived = kv.revived
    swaps = kv.swaps
    steps = time_steps(ids[at : at + N_STEPS], lambda token: engine.extend([token]))
    revived = (kv.revived - revived) / N_STEPS
    swaps = (kv.swaps - swaps) / N_STEPS
    report.add(
        "decode",
        tokens=kv.n_prompt,
        who=who,
        seconds=median(steps),
        floor=floor,
        times=steps,
        revived=revived,
        swaps=swaps,
        note=f"{revived:.1f} revivals, {swaps:.1f} swaps a token" if len(kv.stages) > 1 else "",
    )


def time_prompts(read, most: int = 3, enough: float = 10.0) -> list[float]:
    """Return the seconds of up to three runs of a prompt; of fewer if they take long."""
    times = []
    while len(times) < most and sum(times) < enough:
        started = time.perf_counter()
        read()
        times.append(round(time.perf_counter() - started, 6))
    return times


def time_steps(ids: list[int], feed) -> list[float]:
    """Return the seconds of each token; `feed` waits for the device."""
    times = []
    for token in ids:
        started = time.perf_counter()
        feed(token)
        times.append(round(time.perf_counter() - started, 6))
    return times


# ---- swaps: does compute wait for the copies? ---------------------------------------------------


class Turns:
    """A rule's function: the newest blocks stay, and `size` others by turns."""

    def __init__(self, size: int):
        self.size = size
        self.turn = 0

    def __call__(self, weights: torch.Tensor) -> torch.Tensor:
        """Return scores (W, N) of weights (W, H, N, B)."""
        n_blocks = weights.shape[2]
        scores = torch.arange(n_blocks, device=weights.device, dtype=torch.float32)
        first = n_blocks // 2 - self.turn * self.size
        scores[first : first + self.size] += n_blocks
        return scores.expand(len(weights), -1)


class Watch:
    """Notes when a step needs each layer's blocks, and when the layer's copies begin and end."""

    def __init__(self, kv):
        self.kv = kv
        self.copy_layer = kv.copy_layer
        self.wait = kv.wait
        kv.copy_layer = self.watched_copy
        kv.wait = self.watched_wait
        self.restart()

    def stop(self) -> None:
        """Let the KV go on unwatched, with its class's methods."""
        del self.kv.copy_layer
        del self.kv.wait

    def restart(self) -> None:
        self.begin = moment(self.kv.device)
        self.needed: dict[int, object] = {}
        self.copied: dict[int, tuple] = {}

    def watched_wait(self, layer: int) -> None:
        self.needed[layer] = moment(self.kv.device)
        self.wait(layer)

    def watched_copy(self, move, i: int, *arguments) -> None:
        begin = moment(self.kv.device)  # on the copy stream, if there is one
        self.copy_layer(move, i, *arguments)
        self.copied[move.stage.layers[i]] = begin, moment(self.kv.device)

    def copy_seconds(self) -> float:
        return sum(between(begin, end) for begin, end in self.copied.values())

    def late_seconds(self) -> float:
        """Return how long compute stood still because a layer's copies were not done."""
        late = 0.0
        for layer, (_, end) in self.copied.items():
            late += max(0.0, between(self.begin, end) - between(self.begin, self.needed[layer]))
        return late


def measure_swaps(report: Report, engine: slim.Engine, n: int, n_blocks: int) -> None:
    """Exchange n_blocks at each token: not at all, beside compute, and with compute waiting."""
    turns = Turns(n_blocks)
    rule = prune.Rule("turns", turns, every_layer=False, window=1)
    ckpt = engine.ckpt
    engine.ckpt = replace(ckpt, rule=rule, asked_rule=rule)
    try:
        boundary = max(1, engine.config.n_layers // 3)
        ids = draw_ids(engine.config, n + N_NEW)
        turns.turn = 0
        engine.prefill(ids[:n], N_NEW, {boundary: Fraction(1, 4)})
        for token in ids[n : n + 4]:  # then all that are exchanged are at home
            turns.turn = 1 - turns.turn
            engine.extend([token])
        for how in ("no swaps", "overlap", "no overlap"):
            add_swaps(report, engine, turns, how)
    finally:
        engine.ckpt = ckpt


def add_swaps(report: Report, engine: slim.Engine, turns: Turns, how: str) -> None:
    """Measure some steps, all of them with swaps, or none."""
    kv = engine.kv
    n = kv.n_prompt
    swaps = kv.swaps
    n_bytes = kv.to_gpu_bytes
    times, copies, late = watch_steps(engine, turns, how)
    swaps = (kv.swaps - swaps) / len(times)
    n_bytes = (kv.to_gpu_bytes - n_bytes) / len(times)
    note = ""
    if how != "no swaps":
        note = f"{format_bytes(n_bytes)} back in {1000 * median(copies):.2f} ms"
    if how == "overlap":
        note += f", compute waits {1000 * median(late):.2f} ms"
    report.add(
        "swaps",
        tokens=n,
        who=f"{turns.size} exchanged, {how}",
        seconds=median(times),
        times=times,
        copies=copies,
        late=late,
        swaps=swaps,
        bytes=n_bytes,
        note=note,
    )


def watch_steps(engine: slim.Engine, turns: Turns, how: str) -> tuple[list, list, list]:
    """Return seconds of some steps, of their copies, and of compute that waits for copies."""
    kv = engine.kv
    usual = kv.copies
    wait_for(kv.device)
    kv.copies = CopyStream(kv.device, how != "no overlap")
    watch = Watch(kv)
    times = []
    copies = []
    late = []
    try:
        for token in draw_ids(engine.config, N_STEPS // 2):
            if how != "no swaps":
                turns.turn = 1 - turns.turn
            watch.restart()
            started = time.perf_counter()
            engine.extend([token])
            times.append(round(time.perf_counter() - started, 6))
            wait_for(kv.device)
            copies.append(watch.copy_seconds())
            late.append(watch.late_seconds())
    finally:
        watch.stop()
        wait_for(kv.device)
        kv.copies = usual
    return times, copies, late


# ---- transformers -------------------------------------------------------------------------------


def load_transformers(report: Report, ckpt) -> Transformers:
    started = time.perf_counter()
    model = Transformers(ckpt)
    model.read(draw_ids(ckpt.config, 64))
    report.add("transformers", note=f"loaded in {time.perf_counter() - started:.1f} s")
    return model


def measure_transformers(report: Report, model: Transformers, ckpt, n: int, rates) -> None:
    flops_rate, byte_rate = rates
    ids = draw_ids(ckpt.config, n + N_NEW)
    model.past = None
    free_memory(ckpt.device)
    restart_peak(ckpt.device)
    times = time_prompts(lambda: model.read(ids[:n]))
    peak = peak_bytes(ckpt.device)
    report.add(
        "first token",
        tokens=n,
        who="transformers",
        seconds=min(times),
        floor=prefill_flops(ckpt.config, n, {}) / flops_rate,
        times=times,
        peak=peak,
        note=f"peak {format_bytes(peak)}",
    )
    steps = time_steps(ids[n : n + N_STEPS], lambda token: model.feed([token]))
    report.add(
        "decode",
        tokens=n,
        who="transformers",
        seconds=median(steps),
        floor=floor_bytes(ckpt, n, N_NEW) / byte_rate,
        times=steps,
        note="",
    )


def compare_logits(report: Report, model: Transformers, wanted: torch.Tensor, n: int) -> None:
    """Say how far the dense engine's logits (V,) are from those of transformers."""
    found = model.read(draw_ids(model.model.config, n))
    apart = (found - wanted.to(found.device)).abs().max().item()
    spread = found.std().item()
    note = f"logits of {n:,} tokens are at most {apart:.3f} apart, their deviation is {spread:.2f}"
    report.add("transformers", note=note, apart=apart, spread=spread)


# ---- all parts ----------------------------------------------------------------------------------


def run(report: Report, device: torch.device, size: Size) -> None:
    attempt = report.attempt
    attempt("tests", 30, run_tests)
    rates = attempt("ceilings", 10, measure_ceilings, device, size)
    engine = attempt("weights", 30, load_engine, device, size)
    if engine is None or rates is None:
        return
    ckpt = engine.ckpt
    shortest, *_ = size.lengths

    def seconds_for(n: int) -> float:
        """Guess what all runs of a length take: a first token may take thrice its floor."""
        return 5 + 6 * prefill_flops(ckpt.config, n, {}) / rates[0]

    for n in size.lengths:
        for schedule in ("dense", "auto"):
            attempt(
                f"{schedule}, {n:,}", seconds_for(n), measure_engine, engine, n, schedule, rates
            )
    middle = size.lengths[1]
    for n_blocks in size.exchanged:
        attempt("swaps", seconds_for(middle), measure_swaps, engine, middle, n_blocks)

    if not importlib.util.find_spec("transformers"):
        report.add("transformers", skipped="it is not installed")
        return
    wanted = attempt("logits", 5, dense_logits, engine, shortest)
    del engine
    free_memory(device)
    model = attempt("transformers", 30, load_transformers, ckpt)
    if model is None:
        return
    if wanted is not None:
        attempt("transformers", 5, compare_logits, model, wanted, shortest)
    for n in size.lengths:
        attempt(f"transformers, {n:,}", seconds_for(n), measure_transformers, model, ckpt, n, rates)


def dense_logits(report: Report, engine: slim.Engine, n: int) -> torch.Tensor:
    return engine.prefill(draw_ids(engine.config, n), schedule="dense").cpu()


def pick_place(name: str) -> torch.device:
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA device; --device cpu --tiny is the dry run")
    return torch.device("cuda", 0)


def main(argv: list[str] | None = None) -> int:
    p = Parser("gpu.py")
    p.add_argument("--out", required=True, help="a folder for results")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    p.add_argument("--tiny", action="store_true", help="a tiny shape, to try this program")
    p.add_argument("--seconds", type=int, default=480, help="after which it ends in any case")
    args = p.parse_args(argv)
    try:
        check_numbers(args, {"seconds": (1, 86400)})
        device = pick_place(args.device)
        report = Report(Path(args.out), args.seconds)
    except (ValueError, OSError) as error:
        p.error(error)

    def finish(code: int) -> int:
        print(f"\n{report.summary()}", flush=True)
        (report.folder / "table.md").write_text(report.summary() + "\n")
        return code

    def give_up() -> None:
        report.add("all", error=f"the {args.seconds} s are up")
        os._exit(finish(1))

    # CUDA work that hangs cannot be interrupted, and who lends the device may end it without a word
    timer = threading.Timer(args.seconds, give_up)
    timer.daemon = True
    timer.start()
    where = f"{hardware(device)}, torch {torch.__version__}, commit {commit()}"
    report.add("machine", note=where)
    report.attempt("all", 0, run, device, TINY if args.tiny else LARGE)
    timer.cancel()
    return finish(int(report.failed()))


if __name__ == "__main__":
    sys.exit(main())
