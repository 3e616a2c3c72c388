"""What a user sees besides the answer: progress, times, what was kept."""

import os
import sys
import time
import unicodedata

import slim
from loading.files import format_bytes, one_line
from planning.flops import WorkDone


class Progress:
    """One line on a terminal's stderr that overwrites itself; silent anywhere else."""

    def __init__(self, quiet: bool):
        self.on = sys.stderr.isatty() and not quiet
        self.up = False  # whether a line is shown now
        self.when = 0.0  # since when

    def show(self, text: str) -> None:
        if self.on and time.perf_counter() - self.when > 0.1:
            self.up = True
            self.when = time.perf_counter()
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.up:
            self.up = False
            self.when = 0.0
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def loading(self, done: int, total: int) -> None:
        self.show(f"loading weights {100 * done // total}%")

    def follow(self, engine: slim.Engine, part: str = "whole") -> None:
        """Watch a prefill: layer, tokens alive, and the time left by the work that is left.

        part: as in `WorkDone`.
        """
        progress = WorkDone(engine, part)

        def on_chunk(layer: int, n_rows: int) -> None:
            share = progress.share(layer, n_rows)
            time_left = f"{progress.seconds_left(share):.0f} s left" if share else ""
            alive = progress.work[layer][0]
            self.show(
                f"reading the prompt: layer {layer + 1}/{engine.config.n_layers}, {alive:,} of "
                f"{engine.kv.n_prompt:,} tokens alive  {time_left}"
            )

        if self.on:
            engine.model.on_chunk = on_chunk

    def complain(self, error: Exception) -> None:
        """Write in one line what is wrong, with --quiet too."""
        self.clear()
        print(f"slim: error: {one_line(error)}", file=sys.stderr, flush=True)

    def done(self, engine: slim.Engine) -> None:
        engine.model.on_chunk = lambda *_: None
        self.clear()


def status(args, progress: Progress):
    """Return a function that prints a line to standard error, dimmed on a terminal."""
    dumb = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    dim = sys.stderr.isatty() and not dumb

    def say(text: str) -> None:
        progress.clear()
        text = visible(text)
        print(f"\033[2m{text}\033[0m" if dim else text, file=sys.stderr, flush=True)

    return (lambda text: None) if args.quiet else say


def visible(text: str) -> str:
    """Escape the control characters, which a terminal would obey; newlines and tabs stay.

    A model repeats what a document holds, such as Escape sequences that write to the clipboard.
    """
    return "".join(escape(char) if is_control(char) else char for char in text)


def is_control(char: str) -> bool:
    return unicodedata.category(char) == "Cc" and char not in "\n\t"


def escape(char: str) -> str:
    return char.encode("unicode_escape").decode()


def summary(stats: dict, device) -> str:
    """Describe what a conversation keeps, and where."""
    kept = " > ".join(f"{n:,}" for n in stats["kept"])
    sizes = {key: format_bytes(stats[key]) for key in stats if key.endswith("_bytes")}
    n_ranks = stats.get("ranks", 1)
    each = ""
    if n_ranks > 1:
        parts = "kv_gpu_bytes", "kv_cpu_bytes", "aux_cpu_bytes", "held_bytes"
        total = sum(stats[part] for part in parts)
        each = f" on each of {n_ranks} ranks, {format_bytes(n_ranks * total)} in all"
    waiting = f" + {sizes['held_bytes']} waiting rows" if stats["held_bytes"] else ""
    return (
        f"slim: {stats['prompt_tokens']:,} prompt tokens, kept per stage {kept}; "
        f"{swapped(stats['swaps'], stats['revived'])}\n"
        f"slim: KV {sizes['kv_gpu_bytes']} on {device} + {sizes['kv_cpu_bytes']} at home + "
        f"{sizes['aux_cpu_bytes']} pruned rows{waiting}, dense {sizes['kv_dense_bytes']}{each}"
    )


def timing(result: dict) -> str:
    """Describe how long an answer took and, for a follow-up, how long a new prefill took."""
    first = result["ttft_s"]
    if not result["ids"]:
        what = "interrupted while reading" if result["interrupted"] else "an empty answer after"
        return f"slim: {what} {result['n_new']:,} tokens, {first:.2f} s"
    speed = f"slim: first token {first:.2f} s, then {result['decode_tok_s']:.1f} tokens/s"
    if not result["follow_up"]:
        return speed
    prefill = result["prefill_s"]
    speed += f"; a new prefill took {prefill:.2f} s, {prefill / first:.0f}x as long"
    if result["chose"]:  # the summary, which follows, counts the blocks
        return speed
    return f"{speed}; {swapped(result['swaps_here'], result['revived_here'])}"


def swapped(n_swaps: int, n_revived: int) -> str:
    blocks = "block" if n_swaps == 1 else "blocks"
    return f"{n_swaps:,} {blocks} swapped, {n_revived:,} of them revived"


def comparison(dense: dict, pruned: dict) -> str:
    """Write two results side by side."""
    sooner = dense["ttft_s"] / pruned["ttft_s"]
    share = pruned["kv_gpu_bytes"] / dense["kv_gpu_bytes"]
    same = "the same" if dense["ids"] == pruned["ids"] else "not the same"
    rows = [("", "dense", "slim", "")]

    def row(name: str, shown, note: str) -> None:
        rows.append((name, shown(dense), shown(pruned), note))

    row("first token", lambda result: f"{result['ttft_s']:.2f} s", f"{sooner:.2f}x sooner")
    row("KV on the device", lambda r: format_bytes(r["kv_gpu_bytes"]), f"{share:.0%} of dense")
    row("prompt tokens kept", lambda r: " > ".join(f"{n:,}" for n in r["kept"]), "per stage")
    row("answer", lambda result: " ".join(result["text"].split())[:30], same)
    left = 2 + max(len(row[1]) for row in rows)
    right = 2 + max(len(row[2]) for row in rows)
    lines = []
    for name, before, after, note in rows:
        lines.append(f"slim: {name:20}{before:>{left}}{after:>{right}}   {note}".rstrip())
    return "\n".join(lines)


PUBLIC = (
    "text ids prompt_tokens kept ttft_s decode_tok_s kv_gpu_bytes kv_cpu_bytes kv_dense_bytes "
    "swaps revived drafted accepted score lookup_heads weights weight_bytes"
).split()


def public(result: dict) -> dict:
    """Return the part of a result that --json prints."""
    return {key: result[key] for key in PUBLIC}
