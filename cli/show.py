"""What a user sees besides the answer: progress, times, what was kept."""

import os
import sys
import time

import slim
from loading.files import format_bytes, one_line
from planning.flops import layer_flops


class Progress:
    """One line on a terminal's stderr that overwrites itself; silent anywhere else."""

    def __init__(self, quiet: bool):
        self.on = sys.stderr.isatty() and not quiet
        self.up, self.when = False, 0.0  # whether a line is shown now, and since when

    def show(self, text: str) -> None:
        if self.on and time.perf_counter() - self.when > 0.1:
            self.up, self.when = True, time.perf_counter()
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.up:
            self.up, self.when = False, 0.0
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def loading(self, done: int, total: int) -> None:
        self.show(f"loading weights {100 * done // total}%")

    def follow(self, engine: slim.Engine) -> None:
        """Watch a prefill: layer, tokens alive, and the time left by the work that is left."""
        c, kv = engine.config, engine.kv
        started, done = time.perf_counter(), 0

        def on_chunk(layer: int, rows: int, keys: int) -> None:
            nonlocal done
            alive = [
                stage.n_slots * kv.block_len + kv.n_prompt - kv.tail_start
                for stage in kv.stages
                for _ in stage.layers
            ]
            total = sum(layer_flops(c, n, n / 2) for n in alive)
            spent = time.perf_counter() - started
            left = f"{spent * (total - done) / done:.0f} s left" if done else ""
            self.show(
                f"reading the prompt: layer {layer + 1}/{c.n_layers}, {alive[layer]:,} of {kv.n_prompt:,} tokens "
                f"alive  {left}"
            )
            done += layer_flops(c, rows, keys - rows / 2)

        if self.on:
            engine.model.on_chunk = on_chunk

    def complain(self, error: Exception) -> None:
        """Say in one line what is wrong, with --quiet too."""
        self.clear()
        print(f"slim: error: {one_line(error)}", file=sys.stderr, flush=True)

    def done(self, engine: slim.Engine) -> None:
        engine.model.on_chunk = lambda *_: None
        self.clear()


def summary(stats: dict, device) -> str:
    """Say what a conversation keeps, and where."""
    kept = " > ".join(f"{n:,}" for n in stats["kept"])
    n, keys = stats.get("ranks", 1), ("kv_gpu_bytes", "kv_cpu_bytes", "aux_cpu_bytes")
    each = (
        f" on each of {n} ranks, {format_bytes(n * sum(stats[key] for key in keys))} in all"
        if n > 1
        else ""
    )
    return (
        f"slim: {stats['prompt_tokens']:,} prompt tokens, kept per stage {kept}; {stats['swaps']:,} blocks "
        f"swapped, {stats['revived']:,} of them revived\n"
        f"slim: KV {format_bytes(stats['kv_gpu_bytes'])} on {device} + {format_bytes(stats['kv_cpu_bytes'])} at "
        f"home + {format_bytes(stats['aux_cpu_bytes'])} pruned rows, "
        f"dense {format_bytes(stats['kv_dense_bytes'])}{each}"
    )


def timing(r: dict) -> str:
    """Say how long an answer took and, for a follow-up, how long reading everything again would take."""
    if not r["ids"]:
        what = "interrupted while reading" if r["interrupted"] else "an empty answer after"
        return f"slim: {what} {r['n_new']:,} tokens, {r['ttft_s']:.2f} s"
    speed = f"slim: first token {r['ttft_s']:.2f} s, then {r['decode_tok_s']:.1f} tokens/s"
    if not r["follow_up"]:
        return speed
    return (
        speed
        + f"; a new prefill took {r['prefill_s']:.2f} s, {r['prefill_s'] / r['ttft_s']:.0f}x as long; "
        f"{r['swaps_here']} blocks swapped, {r['revived_here']} of them revived"
    )


def comparison(dense: dict, pruned: dict) -> str:
    """Write two results side by side."""
    rows = [
        (
            "first token",
            f"{dense['ttft_s']:.2f} s",
            f"{pruned['ttft_s']:.2f} s",
            f"{dense['ttft_s'] / pruned['ttft_s']:.2f}x sooner",
        ),
        (
            "KV on the device",
            format_bytes(dense["kv_gpu_bytes"]),
            format_bytes(pruned["kv_gpu_bytes"]),
            f"{pruned['kv_gpu_bytes'] / dense['kv_gpu_bytes']:.0%} of dense",
        ),
        (
            "prompt tokens kept",
            f"{dense['prompt_tokens']:,}",
            " > ".join(f"{n:,}" for n in pruned["kept"]),
            "per stage",
        ),
        (
            "answer",
            *(" ".join(r["text"].split())[:30] for r in (dense, pruned)),
            "the same" if dense["ids"] == pruned["ids"] else "not the same",
        ),
    ]
    rows = [("", "dense", "slim", ""), *rows]
    left, right = (max(len(row[i]) for row in rows) + 2 for i in (1, 2))
    return "\n".join(f"slim: {a:20}{b:>{left}}{c:>{right}}   {d}".rstrip() for a, b, c, d in rows)


def public(r: dict) -> dict:
    """Return the part of a result that --json prints."""
    keys = (
        "text",
        "ids",
        "prompt_tokens",
        "kept",
        "ttft_s",
        "decode_tok_s",
        "kv_gpu_bytes",
        "kv_cpu_bytes",
        "kv_dense_bytes",
        "swaps",
        "revived",
    )
    return {k: r[k] for k in keys}


def status(args, progress: Progress):
    """Return a function that prints a line to standard error, dimmed on a terminal so that the answer stands out."""
    plain = (
        not sys.stderr.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    )

    def say(text: str) -> None:
        progress.clear()
        print(text if plain else f"\033[2m{text}\033[0m", file=sys.stderr, flush=True)

    return (lambda text: None) if args.quiet else say
