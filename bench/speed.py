"""Time to first token, decode speed and memory: dense, slim and transformers, beside their ceilings.

    python bench/speed.py --shape mini --lengths 4096,8192,16384        # a CPU
    python bench/speed.py --shape llama3.1-8b --lengths 8192,32768,131072   # one large GPU
    python bench/speed.py --shape tiny --lengths 8192,16384,32768,65536 --rss   # memory of a CPU prefill
    torchrun --nproc-per-node 2 bench/speed.py --shape mini --lengths 4096   # what ranks send each other

All contestants run in one process on the same random weights (transformers gets views of
ours), same dtype, same device, one warm-up each, then rounds in alternating order; the
table shows medians and the spread. The ceiling of a prefill is its FLOPs over the matmul
peak measured here, that of a decode step its bytes (weights, active KV) over the copy peak
measured here; a ratio's ceiling is the ratio of the FLOPs. Random weights make selections
jump, so decode is measured without any swap (gamma 0) and with one at every step (gamma 1),
on a GPU also with copies that compute waits for. Where the budgets cover the prompt nothing
is pruned, and the row says what slim then costs. A second table splits the prefill by part,
timed from outside with a wait for the device around each part, so copies are not hidden there.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model
import prune
import slim
from kvcache import CopyStream
from loading.config import parse_config
from loading.plan import Checkpoint, env_number, format_bytes, pick_device, prefill_flops
from loading.saved import check_path
from loading.schedule import format_schedule, resolve_schedule
from loading.settings import Settings
from loading.weights import tensor_shapes, weight_bytes
from model import Config

LLAMA = dict(
    architectures=["LlamaForCausalLM"],
    hidden_act="silu",
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    max_position_embeddings=131072,
)
LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES = {
    "llama3.1-8b": dict(
        LLAMA,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        rope_scaling=LLAMA31_ROPE,
    ),
    "llama3.2-1b": dict(
        LLAMA,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        rope_scaling={**LLAMA31_ROPE, "factor": 32.0},
        tie_word_embeddings=True,
    ),
    "mini": dict(
        LLAMA,
        hidden_size=256,
        intermediate_size=896,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=4096,
    ),
    "tiny": dict(
        LLAMA,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=512,
    ),
}


class RandomTensors(dict):
    """A checkpoint's tensors by name, drawn when asked for, straight on the device."""

    def __init__(self, config: Config, device, dtype):
        super().__init__(tensor_shapes(config))
        self.device, self.dtype, self.generator = device, dtype, torch.Generator(device).manual_seed(0)

    def __getitem__(self, name):
        return self

    def get_tensor(self, name):
        shape = self.get(name)
        if len(shape) == 1:
            return torch.ones(shape, device=self.device, dtype=self.dtype)
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=self.dtype).mul_(0.02)


def make_transformers(engine: slim.Engine, shape: dict):
    """Return transformers' model of the same shape, its parameters views of the engine's weights."""
    import transformers
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    c, w = engine.config, engine.model.weights
    config = transformers.LlamaConfig(
        **{k: v for k, v in shape.items() if k != "architectures"}, attn_implementation="sdpa"
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    state = {"model.embed_tokens.weight": w.embed, "model.norm.weight": w.norm, "lm_head.weight": w.head}
    for i, layer in enumerate(w.layers):
        p = f"model.layers.{i}."
        parts = dict(zip("qkv", layer.wqkv.split([q, kv, kv]))) | {"o": layer.wo}
        state |= {f"{p}self_attn.{n}_proj.weight": t for n, t in parts.items()}
        gate, up = layer.w_gate_up.chunk(2)
        state |= {
            p + "mlp.gate_proj.weight": gate,
            p + "mlp.up_proj.weight": up,
            p + "mlp.down_proj.weight": layer.w_down,
        }
        state |= {p + "input_layernorm.weight": layer.attn_norm, p + "post_attention_layernorm.weight": layer.ffn_norm}
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(engine.kv.device)
    return model.eval()


# ---- floors -----------------------------------------------------------------------------


def decode_bytes(engine: slim.Engine) -> float:
    """Return the bytes one decode step must read: weights (of an untied embedding one row) and active KV."""
    w = engine.model.weights
    unread = 0 if w.head is w.embed else w.embed.nbytes
    return weight_bytes(engine.ckpt.config, engine.ckpt.dtype) - unread + engine.stats["kv_gpu_bytes"]


def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(device, work) -> float:
    sync(device)
    start = time.perf_counter()
    work()
    sync(device)
    return time.perf_counter() - start


def peaks(device, dtype) -> tuple[float, float]:
    """Measure this device's matmul FLOP/s and copy bytes/s (read and written), the best of ten."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    big = torch.empty(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(big)
    flops = max(2 * n**3 / clock(device, lambda: a @ b) for _ in range(10))
    return flops, max(2 * big.numel() / clock(device, lambda: target.copy_(big)) for _ in range(10))


# ---- contestants ------------------------------------------------------------------------


def run_slim(engine: slim.Engine, ids: list[int], schedule: dict, n_new: int, gamma: float, overlap=True) -> dict:
    """Prefill and decode n_new tokens; return seconds, counters and the peak of device memory."""
    device = engine.kv.device
    engine.model.gamma, engine.kv.copies = gamma, CopyStream(device, overlap)  # prefill waits for the old stream
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    ttft = clock(device, lambda: engine.prefill(ids, room=n_new, schedule=schedule).argmax().item())
    decode = clock(device, lambda: [engine.extend([i % 100]).argmax().item() for i in range(n_new)])
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    figures = {
        "ttft_s": ttft,
        "decode_s": decode / n_new,
        "total_s": ttft + decode,
        "peak_bytes": peak,
        "step_bytes": decode_bytes(engine),
    }
    return engine.stats | figures


@torch.inference_mode()
def run_transformers(model, ids: list[int], n_new: int, device) -> dict:
    state = {}

    def prefill():
        out = model(torch.tensor([ids], device=device), logits_to_keep=1, use_cache=True)
        state["past"] = out.past_key_values
        out.logits.argmax().item()

    def decode():
        for i in range(n_new):
            model(
                torch.tensor([[i % 100]], device=device), past_key_values=state["past"], logits_to_keep=1
            ).logits.argmax().item()

    ttft, seconds = clock(device, prefill), clock(device, decode)
    return {"ttft_s": ttft, "decode_s": seconds / n_new, "total_s": ttft + seconds}


def measure(engine, reference, length: int, schedule: dict, n_new: int, rounds: int) -> dict:
    """Run every contestant `rounds` times in alternating order after one warm-up; return medians and spreads.

    One that does not fit into memory is out, its reason under "error".
    """
    ids = torch.randint(engine.config.vocab_size, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    contestants = {
        "dense": lambda: run_slim(engine, ids, {}, n_new, 0.0),
        "slim": lambda: run_slim(engine, ids, schedule, n_new, 0.0),
    }
    if prunes(length, schedule):
        contestants["slim, swaps"] = lambda: run_slim(engine, ids, schedule, n_new, 1.0)
        if engine.kv.device.type == "cuda":
            contestants["slim, swaps, no overlap"] = lambda: run_slim(engine, ids, schedule, n_new, 1.0, overlap=False)
    if reference is not None:
        contestants["transformers"] = lambda: run_transformers(reference, ids, n_new, engine.kv.device)
    runs, out = {name: [] for name in contestants}, {}
    for r in range(rounds + 1):
        for name in list(runs)[:: -1 if r % 2 else 1]:
            try:
                runs[name].append(contestants[name]())
            except (ValueError, torch.cuda.OutOfMemoryError) as error:
                out[name] = {"error": str(error)}
                del runs[name]
    for name, (_, *results) in runs.items():  # the first round warms up
        out[name] = {key: value for key, value in results[-1].items() if not key.endswith("_s")}
        for key in ("ttft_s", "decode_s", "total_s"):
            values = sorted(result[key] for result in results)
            out[name] |= {key: statistics.median(values), key + "_range": [values[0], values[-1]]}
    for name, budgets in {"dense": {}, "slim": schedule}.items():
        if name not in runs:
            continue
        splits = sorted((split(engine, ids, budgets) for _ in range(rounds)), key=lambda parts: sum(parts.values()))
        out[name]["parts_s"] = splits[len(splits) // 2]  # of one prefill, so that they add up
    return out


def prunes(length: int, schedule: dict) -> bool:
    return any(budget < length for budget in schedule.values())


def split(engine: slim.Engine, ids: list[int], schedule: dict) -> dict:
    """Return the seconds of one prefill by part; each part waits for the device, and what it calls is not its own."""
    m, kv, seconds, inner = engine.model, engine.kv, Counter(dict.fromkeys(PARTS, 0.0)), []

    def timed(part: str, work):
        def wrapper(*args, **options):
            result = []
            inner.append(0.0)
            took = clock(kv.device, lambda: result.append(work(*args, **options)))
            seconds[part] += took - inner.pop()
            if inner:
                inner[-1] += took
            return result[0]

        return wrapper

    places = [
        ("projections", m, "attention"),
        ("attention", model, "causal_attention"),
        ("FFN", m, "ffn"),
        ("boundaries and KV", m, "boundary"),
        ("boundaries and KV", m, "locate"),
        ("boundaries and KV", kv, "reset"),
        ("boundaries and KV", kv, "append"),
    ]
    with ExitStack() as stack:
        for part, owner, name in places:
            stack.enter_context(mock.patch.object(owner, name, timed(part, getattr(owner, name))))
        timed("head and rest", engine.prefill)(ids, schedule=schedule)
    return dict(seconds)


PARTS = [
    "projections",
    "attention",
    "FFN",
    "boundaries and KV",
    "head and rest",
]  # projections: QKV and output, with their norm and RoPE


# ---- report -----------------------------------------------------------------------------


def report(length: int, result: dict, c: Config, schedule: dict, flop_peak: float, copy_peak: float) -> list[str]:
    """Return the table's lines for one prompt length, the ceiling beside each figure."""
    flops = {"dense": prefill_flops(c, length, {}), "slim": prefill_flops(c, length, schedule)}
    lines = [f"| {length:,} | {name}: {r['error']} |" for name, r in result.items() if "error" in r]
    result = {name: r for name, r in result.items() if "error" not in r}
    for name, r in result.items():
        work = flops["slim" if name.startswith("slim") else "dense"]
        floor = work / flop_peak
        low, high = r["ttft_s_range"]
        label = name if name != "slim" or prunes(length, schedule) else "slim, budgets cover the prompt"
        cells = [f"{length:,}", label, f"{r['ttft_s']:.3f} ({low:.3f}-{high:.3f})", f"{100 * floor / r['ttft_s']:.0f}%"]
        times = {
            (who, key): f"{result[who][key] / r[key]:.2f}"
            for who in ("dense", "transformers")
            if who in result
            for key in ("ttft_s", "total_s")
        }
        cells += [
            f"{times.get(('dense', 'ttft_s'), '-')} of {flops['dense'] / work:.2f}",
            times.get(("transformers", "ttft_s"), ""),
        ]
        byte_share = f", {100 * r['step_bytes'] / copy_peak / r['decode_s']:.0f}%" if "step_bytes" in r else ""
        cells += [
            f"{1 / r['decode_s']:.1f}{byte_share}",
            f"{r['total_s']:.3f} ({times.get(('dense', 'total_s'), '-')})",
        ]
        kv = [format_bytes(r[k]) for k in ("kv_gpu_bytes", "kv_cpu_bytes")] if "kv_gpu_bytes" in r else ["", ""]
        moved = format_bytes(r["to_cpu_bytes"] + r["to_gpu_bytes"]) if "to_cpu_bytes" in r else ""
        lines.append(
            "| " + " | ".join([*cells, *kv, moved, format_bytes(r["peak_bytes"]) if r.get("peak_bytes") else ""]) + " |"
        )
    return lines


HEAD = [
    "prompt",
    "who",
    "first token, s",
    "of matmul peak",
    "times own dense, of ceiling",
    "times transformers",
    "decode tokens/s, of byte peak",
    "first token + decode, s (times own dense)",
    "KV device",
    "KV home",
    "moved",
    "peak memory",
]


def report_parts(length: int, result: dict) -> list[str]:
    """Return the lines of the table of parts for one prompt length: milliseconds and shares."""
    lines = []
    for name, parts in ((name, r["parts_s"]) for name, r in result.items() if "parts_s" in r):
        whole = sum(parts.values())
        cells = [f"{1e3 * s:.1f} ({100 * s / whole:.0f}%)" for s in parts.values()]
        lines.append(
            "| "
            + " | ".join([f"{length:,}", name, *cells, f"{1e3 * whole:.1f}", f"{1e3 * result[name]['ttft_s']:.1f}"])
            + " |"
        )
    return lines


def swap_cost(length: int, result: dict, n_new: int) -> str:
    """Say what swapping adds to a decode step: its copies as far as they are not hidden, and the computing of
    revived rows.
    """
    quiet, said = result["slim"], []
    for name, r in result.items():
        if name.startswith("slim, swaps") and "error" not in r:
            moved = (r["to_cpu_bytes"] + r["to_gpu_bytes"] - quiet["to_cpu_bytes"] - quiet["to_gpu_bytes"]) / n_new
            said.append(
                f"{name}: {1e3 * (r['decode_s'] - quiet['decode_s']):+.2f} ms a step for {format_bytes(moved)} "
                f"moved and {r['revived'] / n_new:.1f} blocks revived"
            )
    return f"{length:,}: " + "; ".join(said)


def table(head: list[str], lines: list[str]) -> str:
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *lines])


def hardware(device) -> dict:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    if device.type == "cpu" and Path("/proc/cpuinfo").is_file():
        name = next(
            (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").open() if line.startswith("model name")), name
        )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def rss_table(args) -> None:
    """Prefill each length in a process of its own and print the peak of its memory, and what a token adds to that
    of a short prompt.
    """
    lengths, peak = [int(n) for n in args.lengths.split(",")], {}
    for length in [64, *lengths]:
        code = (
            f"import sys, resource; sys.path.insert(0, {str(Path(__file__).parent)!r}); import speed\n"
            f"speed.make_engine({args.shape!r}, 'cpu', {args.dtype!r}, {args.schedule!r}, "
            f"{args.chunk}).prefill([7] * {length})\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        peak[length] = (
            int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) * 1024
        )
    print("| prompt | peak memory | above a prompt of 64 | bytes a token |\n|---|---|---|---|")
    for length in lengths:
        above = peak[length] - peak[64]
        print(f"| {length:,} | {format_bytes(peak[length])} | {format_bytes(above)} | {above / length:.0f} |")


# ---- ranks ------------------------------------------------------------------------------


def expected_traffic(engine: slim.Engine, n_rows: int) -> tuple[int, int]:
    """Return the calls and bytes in which ranks meet in a step of n_rows, by arithmetic: the prompt, or one token
    that revives nothing.
    """
    c, kv, m, item = engine.config, engine.kv, engine.model, engine.kv.dtype.itemsize
    first = n_rows > 1
    layers = [stage for stage in kv.stages for _ in stage.layers]
    rows = [s.n_slots * kv.block_len + kv.n_prompt - kv.tail_start if first else 1 for s in layers]
    sums = rows + rows[1:] + rows[-1:]  # after attention; after the FFN, where a boundary's rows have left
    calls = sum(-(-n // m.chunk) for n in sums)
    size = sum(sums) * c.dim * item
    if m.vocab_is_cut:  # embedding and head
        calls, size = calls + 2, size + n_rows * c.dim * item + c.vocab_size * item
    looks = sum(len(stage.layers) if first else 1 for stage in kv.stages[:-1])  # what blocks are worth
    size += looks * min(m.window, n_rows) * kv.stages[0].n_slots * max(item, 4)
    return calls + looks + 1, size + c.vocab_size * max(item, 4)  # and rank 0's logits


def rank_table(args) -> None:
    """Print, for each length, the calls and bytes that a rank puts into a prefill and a decode step, beside the
    arithmetic.
    """
    engine = make_engine(args.shape, args.device, args.dtype, args.schedule, args.chunk)
    ranks = engine.ranks
    head = ["ranks", "prompt", "weights + KV a rank"]
    for step in ("prefill", "decode step"):
        head += [f"{step}: calls, by arithmetic", "bytes, by arithmetic", "s"]
    lines = []
    for length in map(int, args.lengths.split(",")):
        cells, engine.model.gamma = [f"{ranks.n}", f"{length:,}"], 0.0  # no swap, so nothing is revived
        ids = [i * 7919 % engine.config.vocab_size for i in range(length)]
        for n, work in ((length, lambda: engine.prefill(ids, room=2)), (1, lambda: engine.extend([1]))):
            if n == 1:
                work()  # the first is slow
            ranks.calls = ranks.bytes = 0
            seconds = clock(engine.kv.device, work)
            calls, size = expected_traffic(engine, n)
            cells += [f"{ranks.calls:,}, {calls:,}", f"{ranks.bytes:,}, {size:,}", f"{seconds:.4f}"]
        cells.insert(2, format_bytes(weight_bytes(engine.ckpt.config, engine.ckpt.dtype) + engine.kv.gpu_bytes()))
        lines.append("| " + " | ".join(cells) + " |")
    if ranks.rank == 0:
        print(table(head, lines), flush=True)


def make_engine(shape: str, device: str, dtype: str, schedule: str, chunk: int, score: str = "peak") -> slim.Engine:
    """Return an engine of a shape with random weights."""
    device, dtype, rule = pick_device(device), model.DTYPES[dtype], prune.RULES[score]
    config, options = parse_config(SHAPES[shape], shape), Settings(chunk=chunk)
    budgets = resolve_schedule(schedule, config, options.block_len)
    tensors = RandomTensors(config, device, dtype)
    return slim.start(Checkpoint(Path(shape), config, tensors, set(), device, dtype, budgets, rule, options))


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--shape", default="mini", choices=SHAPES)
    p.add_argument("--lengths", default="4096,8192,16384")
    p.add_argument("--schedule", default="auto")
    p.add_argument("--new", type=int, default=32, help="tokens decoded")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--chunk", type=int, default=0)
    p.add_argument("--memory-gib", type=float, help="let this process use only so much device memory (CUDA)")
    p.add_argument("--no-transformers", action="store_true")
    p.add_argument("--out", help="write the figures as JSON")
    p.add_argument("--rss", action="store_true", help="peak memory of CPU prefills instead")
    args = p.parse_args()
    try:
        run(p, args)
    except (ValueError, OSError) as error:
        p.error(" ".join(str(error).split()))
    except ModuleNotFoundError as error:
        p.error(f"{error}; install it, or leave it out with --no-transformers")


def run(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Measure every length and print what was found."""
    if args.out:
        check_path(args.out)  # better now than after the first length
    if args.rounds < 1 or args.new < 1 or any(int(n) < 2 for n in args.lengths.split(",")):
        p.error(
            f"--rounds {args.rounds} and --new {args.new} must be at least 1, --lengths {args.lengths} at least 2 each"
        )
    if args.rss:
        return rss_table(args)
    if env_number("WORLD_SIZE") > 1:  # started by torchrun
        return rank_table(args)
    device = pick_device(args.device)
    if args.memory_gib and device.type != "cuda":
        p.error("--memory-gib limits the memory of a CUDA device; there is none in use")
    if args.memory_gib:
        torch.cuda.set_per_process_memory_fraction(
            args.memory_gib * 2**30 / torch.cuda.get_device_properties(device).total_memory, device
        )
    engine = make_engine(args.shape, args.device, args.dtype, args.schedule, args.chunk)
    config, schedule, dtype, chunk = engine.config, engine.ckpt.schedule, engine.kv.dtype, engine.ckpt.chunk
    reference = None if args.no_transformers else make_transformers(engine, SHAPES[args.shape])
    flop_peak, copy_peak = peaks(device, dtype)
    facts = {
        **hardware(device),
        "shape": args.shape,
        "dtype": args.dtype,
        "chunk": chunk,
        "schedule": format_schedule(schedule),
        "new": args.new,
        "rounds": args.rounds,
        "memory_gib": args.memory_gib,
        "matmul_peak": flop_peak,
        "copy_peak": copy_peak,
    }
    print(
        f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, commit {facts['commit']}; "
        f"{args.shape} {args.dtype}, schedule {facts['schedule']}, chunk {chunk}"
    )
    print(
        f"matmul peak {flop_peak / 1e12:.2f} TFLOP/s, copy peak {copy_peak / 1e9:.1f} GB/s; medians of "
        f"{args.rounds} rounds, {args.new} tokens decoded\n"
    )
    print(table(HEAD, []), flush=True)
    results = {}
    for length in map(int, args.lengths.split(",")):
        results[length] = measure(engine, reference, length, schedule, args.new, args.rounds)
        print("\n".join(report(length, results[length], config, schedule, flop_peak, copy_peak)), flush=True)
        if args.out:  # after every length, so a stopped run keeps what it has
            Path(args.out).write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")
    lines = [line for length, result in results.items() for line in report_parts(length, result)]
    print("\n" + table(["prompt", "who", *(f"{part}, ms" for part in PARTS), "sum", "without the waits"], lines) + "\n")
    print(
        "\n".join(
            swap_cost(length, result, args.new)
            for length, result in results.items()
            if "slim, swaps" in result and "error" not in result["slim"]
        )
    )


if __name__ == "__main__":
    main()
