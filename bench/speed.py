"""Time to first token, decode speed and memory: dense, slim and transformers, beside their ceilings.

    python bench/speed.py --shape mini --lengths 4096,8192,16384        # a CPU
    python bench/speed.py --shape llama3.1-8b --lengths 8192,32768,131072   # one large GPU
    python bench/speed.py --ckpt smollm2-135m-instruct --lengths 1024,4096   # a checkpoint, not random weights
    python bench/speed.py --shape tiny --lengths 8192,16384,32768,65536 --rss   # memory of a CPU prefill
    torchrun --nproc-per-node 2 bench/speed.py --shape mini --lengths 4096   # what ranks send each other

All contestants run in one process on the same weights, those of --ckpt or random ones of a --shape
(of which transformers gets views; a checkpoint it loads for itself), same dtype, same device, one
warm-up each, then rounds in alternating order; the table shows medians and the spread. Prompts are
random tokens. The ceiling of a prefill is its FLOPs over the matmul peak measured here, that of a
decode step the bytes it must read (weights, active KV; for transformers those of dense) over the copy
peak measured here; a ratio's ceiling is the ratio of the FLOPs. Random tokens make selections jump, so
decode is measured without any swap (gamma 0) and with one at every step (gamma 1), on a GPU also with
copies that compute waits for. Where the budgets cover the prompt nothing is pruned, and the row says
what slim then costs. A second table splits the prefill by part, timed from outside with a wait for the
device around each part, so copies are not hidden there.
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
from bench.compare import Parser, check_numbers, last_line, memory_bytes, read_lengths, weights_read
from kvcache import CopyStream
from loading.config import parse_config
from loading.files import check_path, format_bytes, one_line
from loading.weights import tensor_shapes, weight_bytes
from model import Config
from planning.checkpoint import Checkpoint, dtype_name, pick_device, pick_dtype
from planning.flops import prefill_flops
from planning.memory import check_memory
from planning.schedule import format_schedule, resolve_schedule
from planning.settings import Settings, env_number

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
        self.device, self.dtype, self.generator = (
            device,
            dtype,
            torch.Generator(device).manual_seed(0),
        )

    def __getitem__(self, name):
        return self

    def get_tensor(self, name):
        shape = self.get(name)
        if len(shape) == 1:
            return torch.ones(shape, device=self.device, dtype=self.dtype)
        return torch.randn(
            shape, generator=self.generator, device=self.device, dtype=self.dtype
        ).mul_(0.02)


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
    state = {
        "model.embed_tokens.weight": w.embed,
        "model.norm.weight": w.norm,
        "lm_head.weight": w.head,
    }
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
        state |= {
            p + "input_layernorm.weight": layer.attn_norm,
            p + "post_attention_layernorm.weight": layer.ffn_norm,
        }
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(engine.kv.device)
    return model.eval()


def make_reference(args, engine: slim.Engine):
    """Return transformers' model on the engine's weights, or on those of the same checkpoint, which it then loads."""
    if args.no_transformers:
        return None
    if args.shape:
        return make_transformers(engine, SHAPES[args.shape])
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained
    loaded = load(
        engine.ckpt.folder, dtype=engine.kv.dtype, attn_implementation="sdpa", local_files_only=True
    )
    return loaded.to(engine.kv.device).eval()


# ---- floors -----------------------------------------------------------------------------


def decode_bytes(engine: slim.Engine) -> float:
    """Return the bytes one decode step must read: weights (of an untied embedding one row) and active KV."""
    return weights_read(engine.ckpt.config, engine.ckpt.dtype) + engine.stats["kv_gpu_bytes"]


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


def run_slim(
    engine: slim.Engine, ids: list[int], schedule: dict, n_new: int, gamma: float, overlap=True
) -> dict:
    """Prefill and decode n_new tokens; return seconds, counters and the peak of device memory."""
    device = engine.kv.device
    engine.model.gamma, engine.kv.copies = (
        gamma,
        CopyStream(device, overlap),
    )  # prefill waits for the old stream
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
                torch.tensor([[i % 100]], device=device),
                past_key_values=state["past"],
                logits_to_keep=1,
            ).logits.argmax().item()

    ttft, seconds = clock(device, prefill), clock(device, decode)
    return {"ttft_s": ttft, "decode_s": seconds / n_new, "total_s": ttft + seconds}


def measure(engine, reference, length: int, schedule: dict, n_new: int, rounds: int) -> dict:
    """Run every contestant `rounds` times in alternating order after one warm-up; return medians and spreads.

    One that does not fit into memory is out, its reason under "error".
    """
    ids = torch.randint(
        engine.config.vocab_size, (length,), generator=torch.Generator().manual_seed(length)
    ).tolist()
    contestants = {
        "dense": lambda: run_slim(engine, ids, {}, n_new, 0.0),
        "slim": lambda: run_slim(engine, ids, schedule, n_new, 0.0),
    }
    if prunes(length, schedule):
        contestants["slim, swaps"] = lambda: run_slim(engine, ids, schedule, n_new, 1.0)
        if engine.kv.device.type == "cuda":
            contestants["slim, swaps, no overlap"] = lambda: run_slim(
                engine, ids, schedule, n_new, 1.0, overlap=False
            )
    if reference is not None:
        contestants["transformers"] = lambda: run_transformers(
            reference, ids, n_new, engine.kv.device
        )
    runs, out = {name: [] for name in contestants}, {}
    for r in range(rounds + 1):
        for name in list(runs)[:: -1 if r % 2 else 1]:
            try:
                runs[name].append(contestants[name]())
            except (ValueError, MemoryError, torch.cuda.OutOfMemoryError) as error:
                out[name] = {"error": one_line(error)}
                del runs[name]
    for name, (_, *results) in runs.items():  # the first round warms up
        out[name] = {key: value for key, value in results[-1].items() if not key.endswith("_s")}
        for key in ("ttft_s", "decode_s", "total_s"):
            values = sorted(result[key] for result in results)
            out[name] |= {key: statistics.median(values), key + "_range": [values[0], values[-1]]}
    for name, budgets in {"dense": {}, "slim": schedule}.items():
        if name not in runs:
            continue
        splits = sorted(
            (split(engine, ids, budgets) for _ in range(rounds)),
            key=lambda parts: sum(parts.values()),
        )
        out[name]["parts_s"] = splits[len(splits) // 2]  # of one prefill, so that they add up
    return out


def prunes(length: int, schedule: dict) -> bool:
    """Say whether a schedule drops any block of so long a prompt; a share keeps a least number of them."""
    return len({*prune.stage_blocks(length, schedule, Settings.block_len)}) > 1


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


def report(
    length: int, result: dict, c: Config, schedule: dict, flop_peak: float, copy_peak: float
) -> list[str]:
    """Return the table's lines for one prompt length, the ceiling beside each figure."""
    flops = {"dense": prefill_flops(c, length, {}), "slim": prefill_flops(c, length, schedule)}
    lines = [f"| {length:,} | {name}: {r['error']} |" for name, r in result.items() if "error" in r]
    result = {name: r for name, r in result.items() if "error" not in r}
    for name, r in result.items():
        work = flops["slim" if name.startswith("slim") else "dense"]
        floor = work / flop_peak
        low, high = r["ttft_s_range"]
        label = (
            name if name != "slim" or prunes(length, schedule) else "slim, budgets cover the prompt"
        )
        cells = [
            f"{length:,}",
            label,
            f"{r['ttft_s']:.3f} ({low:.3f}-{high:.3f})",
            f"{100 * floor / r['ttft_s']:.0f}%",
        ]
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
        step_bytes = r.get("step_bytes") or result.get("dense", {}).get(
            "step_bytes"
        )  # transformers' are dense's
        cells += [
            decode_cell(r["decode_s"], step_bytes, copy_peak),
            f"{r['total_s']:.3f} ({times.get(('dense', 'total_s'), '-')})",
        ]
        kv = (
            [format_bytes(r[k]) for k in ("kv_gpu_bytes", "kv_cpu_bytes")]
            if "kv_gpu_bytes" in r
            else ["", ""]
        )
        moved = format_bytes(r["to_cpu_bytes"] + r["to_gpu_bytes"]) if "to_cpu_bytes" in r else ""
        lines.append(
            "| "
            + " | ".join(
                [*cells, *kv, moved, format_bytes(r["peak_bytes"]) if r.get("peak_bytes") else ""]
            )
            + " |"
        )
    return lines


def decode_cell(seconds: float, step_bytes: int | None, copy_peak: float) -> str:
    """Return a step's rate, its ceiling, the share that is reached, and the bytes behind the ceiling, where known."""
    if not step_bytes:
        return f"{1 / seconds:.1f}"
    ceiling = copy_peak / step_bytes
    return f"{1 / seconds:.1f} of {ceiling:.1f} ({100 / seconds / ceiling:.0f}%), {format_bytes(step_bytes)}"


HEAD = [
    "prompt",
    "who",
    "first token, s",
    "of matmul peak",
    "times own dense, of ceiling",
    "times transformers",
    "decode tokens/s of ceiling, bytes a step must read",
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
            + " | ".join(
                [
                    f"{length:,}",
                    name,
                    *cells,
                    f"{1e3 * whole:.1f}",
                    f"{1e3 * result[name]['ttft_s']:.1f}",
                ]
            )
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
            moved = (
                r["to_cpu_bytes"]
                + r["to_gpu_bytes"]
                - quiet["to_cpu_bytes"]
                - quiet["to_gpu_bytes"]
            ) / n_new
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
            (
                line.split(":")[1].strip()
                for line in Path("/proc/cpuinfo").open()
                if line.startswith("model name")
            ),
            name,
        )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }


def rss_table(args, lengths: list[int]) -> None:
    """Prefill each length in a process of its own and print the peak of its memory, and what a token adds to that
    of a short prompt.
    """
    names = ("ckpt", "shape", "dtype", "schedule", "chunk")
    options = [f"--{name}={value}" for name in names if (value := getattr(args, name)) is not None]
    print(table(["prompt", "peak memory", "above a prompt of 64", "bytes a token"], []), flush=True)
    short = None
    for length in [64, *lengths]:
        command = [sys.executable, __file__, f"--prefill={length}", "--device=cpu", *options]
        try:
            peak = int(last_line(command))
        except ValueError as error:
            raise ValueError(f"--rss: a prefill of {length:,} tokens failed: {error}") from None
        if short is None:
            short = peak
            continue
        above = peak - short
        cells = [f"{length:,}", format_bytes(peak), format_bytes(above), f"{above / length:.0f}"]
        print("| " + " | ".join(cells) + " |", flush=True)


# ---- ranks ------------------------------------------------------------------------------


def expected_traffic(engine: slim.Engine, n_rows: int) -> tuple[int, int]:
    """Return the calls and bytes in which ranks meet in a step of n_rows, by arithmetic: the prompt, or one token
    that revives nothing.
    """
    c, kv, m, item = engine.config, engine.kv, engine.model, engine.kv.dtype.itemsize
    first = n_rows > 1
    layers = [stage for stage in kv.stages for _ in stage.layers]
    rows = [s.n_slots * kv.block_len + kv.n_prompt - kv.tail_start if first else 1 for s in layers]
    sums = (
        rows + rows[1:] + rows[-1:]
    )  # after attention; after the FFN, where a boundary's rows have left
    calls = sum(-(-n // m.chunk) for n in sums)
    size = sum(sums) * c.dim * item
    if m.vocab_is_cut:  # embedding and head
        calls, size = calls + 2, size + n_rows * c.dim * item + c.vocab_size * item
    looks = sum(
        len(stage.layers) if first else 1 for stage in kv.stages[:-1]
    )  # what blocks are worth
    size += looks * min(m.window, n_rows) * kv.stages[0].n_slots * max(item, 4)
    return calls + looks + 1, size + c.vocab_size * max(item, 4)  # and rank 0's logits


def rank_table(engine: slim.Engine, lengths: list[int]) -> None:
    """Print, for each length, the calls and bytes that a rank puts into a prefill and a decode step, beside the
    arithmetic.
    """
    ranks = engine.ranks
    head = ["ranks", "prompt", "weights + KV a rank"]
    for step in ("prefill", "decode step"):
        head += [f"{step}: calls, by arithmetic", "bytes, by arithmetic", "s"]
    lines = []
    for length in lengths:
        cells, engine.model.gamma = (
            [f"{ranks.n}", f"{length:,}"],
            0.0,
        )  # no swap, so nothing is revived
        ids = [i * 7919 % engine.config.vocab_size for i in range(length)]
        for n, work in (
            (length, lambda: engine.prefill(ids, room=2)),
            (1, lambda: engine.extend([1])),
        ):
            if n == 1:
                work()  # the first is slow
            ranks.calls = ranks.bytes = 0
            seconds = clock(engine.kv.device, work)
            calls, size = expected_traffic(engine, n)
            cells += [f"{ranks.calls:,}, {calls:,}", f"{ranks.bytes:,}, {size:,}", f"{seconds:.4f}"]
        weights = weight_bytes(engine.ckpt.config, engine.ckpt.dtype)
        cells.insert(2, format_bytes(weights + engine.stats["kv_gpu_bytes"]))
        lines.append("| " + " | ".join(cells) + " |")
    if ranks.rank == 0:
        print(table(head, lines), flush=True)


# ---- command line -----------------------------------------------------------------------


def random_checkpoint(shape: str, device: str, dtype: str, schedule: str, chunk: int) -> Checkpoint:
    """Return a checkpoint of a shape whose weights are drawn when they are loaded."""
    config, options, place = (
        parse_config(SHAPES[shape], shape),
        Settings(chunk=chunk),
        pick_device(device),
    )
    kind, budgets = (
        pick_dtype(dtype, config, place),
        resolve_schedule(schedule, config, options.block_len),
    )
    tensors = RandomTensors(config, place, kind)
    return Checkpoint(
        Path(shape), config, tensors, set(), place, kind, budgets, prune.RULES["peak"], options
    )


def make_engine(shape: str, device: str, dtype: str, schedule: str, chunk: int) -> slim.Engine:
    """Return an engine of a shape with random weights."""
    return slim.start(random_checkpoint(shape, device, dtype, schedule, chunk))


def open_checkpoint(args) -> Checkpoint:
    """Return what --ckpt or --shape stands for, checked but not loaded; raise ValueError for wrong options."""
    device = "cpu" if args.rss and args.device == "auto" else args.device
    if args.shape:
        return random_checkpoint(args.shape, device, args.dtype, args.schedule, args.chunk)
    return Checkpoint.open(args.ckpt, device, args.dtype, args.schedule, chunk=args.chunk)


def parser() -> Parser:
    p = Parser(
        prog="speed.py",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    weights = p.add_mutually_exclusive_group()
    weights.add_argument(
        "--shape", choices=SHAPES, help="random weights of this shape; mini without --ckpt"
    )
    weights.add_argument("--ckpt", help="a checkpoint: a folder, a name or a Hugging Face id")
    p.add_argument("--lengths", default="4096,8192,16384", help="prompts in tokens, with commas")
    p.add_argument("--schedule", default="auto")
    p.add_argument("--new", type=int, default=32, help="tokens decoded")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--chunk", type=int, default=0)
    p.add_argument(
        "--memory-gib", type=float, help="let this process use only so much device memory (CUDA)"
    )
    p.add_argument("--no-transformers", action="store_true")
    p.add_argument("--out", help="write the figures of the main table as JSON")
    p.add_argument("--rss", action="store_true", help="peak memory of CPU prefills instead")
    p.add_argument("--prefill", type=int, help=argparse.SUPPRESS)  # a process of --rss
    return p


def main(argv: list[str] | None = None) -> None:
    p = parser()
    args = p.parse_args(argv)
    if args.ckpt is None:
        args.shape = args.shape or "mini"
    try:
        run(args)
    except (ValueError, OSError, MemoryError) as error:
        p.error(error)
    except ModuleNotFoundError as error:
        p.error(f"{error}; install it, or leave it out with --no-transformers")


def run(args) -> None:
    """Check the options and print the table that they ask for; raise ValueError or OSError for wrong ones."""
    check_numbers(args, {"rounds": (1, 1000), "new": (1, 2**20)})
    ranks = env_number("WORLD_SIZE") > 1  # started by torchrun
    if args.rss and (ranks or args.device not in ("auto", "cpu")):
        raise ValueError(
            f"--rss measures one process on a CPU; run it without torchrun and --device {args.device}"
        )
    if args.out and (args.rss or ranks):
        raise ValueError("--out is for the main table; leave it out with --rss and under torchrun")
    if args.out:
        check_path(args.out)  # better now than after the first length
    ckpt = open_checkpoint(args)
    if args.prefill:
        slim.start(ckpt).prefill([7] * args.prefill)
        return print(memory_bytes())
    lengths = read_lengths(args.lengths, 2, ckpt.config.max_len, "the model's context")
    if args.rss:
        check_memory(ckpt, max(lengths), 0)
        rss_table(args, lengths)
    elif ranks:
        import parallel

        rank_table(parallel.start(ckpt), lengths)
    else:
        main_table(args, ckpt, lengths)


def limit_memory(gib: float, device) -> None:
    if device.type != "cuda" or not gib > 0:
        raise ValueError(
            f"--memory-gib {gib} limits the memory of a CUDA device; it must be above 0, and such in use"
        )
    share = gib * 2**30 / torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(share, device)


def main_table(args, ckpt: Checkpoint, lengths: list[int]) -> None:
    """Measure every length and print what was found."""
    if args.memory_gib is not None:
        limit_memory(args.memory_gib, ckpt.device)
    engine = slim.start(ckpt)
    reference = make_reference(args, engine)
    flop_peak, copy_peak = peaks(ckpt.device, ckpt.dtype)
    facts = {
        **hardware(ckpt.device),
        "shape": args.shape,
        "ckpt": args.ckpt,
        "dtype": dtype_name(ckpt.dtype),
        "chunk": ckpt.chunk,
        "schedule": format_schedule(ckpt.schedule),
        "new": args.new,
        "rounds": args.rounds,
        "memory_gib": args.memory_gib,
        "matmul_peak": flop_peak,
        "copy_peak": copy_peak,
        "flops": {n: prefill_flops(ckpt.config, n, ckpt.schedule) for n in lengths},
    }
    print_facts(facts)
    print(table(HEAD, []), flush=True)
    results = {}
    for length in lengths:
        results[length] = measure(engine, reference, length, ckpt.schedule, args.new, args.rounds)
        print(
            "\n".join(
                report(length, results[length], ckpt.config, ckpt.schedule, flop_peak, copy_peak)
            ),
            flush=True,
        )
        if args.out:  # after every length, so a stopped run keeps what it has
            Path(args.out).write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")
    lines = [line for length, result in results.items() for line in report_parts(length, result)]
    print(
        "\n"
        + table(
            ["prompt", "who", *(f"{part}, ms" for part in PARTS), "sum", "without the waits"], lines
        )
        + "\n"
    )
    swapped = [
        n
        for n, result in results.items()
        if "slim, swaps" in result and "error" not in result["slim"]
    ]
    print("\n".join(swap_cost(n, results[n], args.new) for n in swapped))


def print_facts(facts: dict) -> None:
    print(
        f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, commit {facts['commit']}; "
        f"{facts['ckpt'] or facts['shape']} {facts['dtype']}, schedule {facts['schedule']}, chunk {facts['chunk']}"
    )
    print(
        f"matmul peak {facts['matmul_peak'] / 1e12:.2f} TFLOP/s, copy peak {facts['copy_peak'] / 1e9:.1f} GB/s; "
        f"medians of {facts['rounds']} rounds, {facts['new']} tokens decoded\n"
    )


if __name__ == "__main__":
    main()
