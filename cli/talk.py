"""Questions about one document: from --ask, or typed at the prompt of --chat."""

import contextlib
import json
import signal
import sys
import threading
import time
from pathlib import Path

import blockmap
import slim
from cli.options import check_output
from cli.show import Progress, comparison, public, summary, timing
from loading.files import format_bytes


class Talk:
    """Questions about one document, by --ask or at the prompt of --chat, and what is reported about each."""

    def __init__(self, engine: slim.Engine, tokenizer, args, progress: Progress, say):
        self.engine, self.tokenizer, self.args, self.progress, self.say = (
            engine,
            tokenizer,
            args,
            progress,
            say,
        )
        self.interrupted = False
        self.alone = "ranks" not in engine.stats  # under torchrun, Ctrl-C ends the other ranks too
        self.open = self.open_at_first = False  # whether the turn of the text waits for a question
        self.text_read = bool(args.resume or args.prompt)  # apart from the first question
        self.recorder = blockmap.Recorder(engine)

    def begin(self, ids: list[int]) -> None:
        """Open the saved text, or read the text alone, or answer the first question about it."""
        engine, args = self.engine, self.args
        if args.resume:
            started = time.perf_counter()
            extra = engine.resume(args.resume, args.max_new_tokens)
            self.open = self.open_at_first = extra.get("open", False)
            self.recorder.record = extra.get("map", {})
            self.say(
                f"slim: {args.resume} opened in {time.perf_counter() - started:.2f} s; reading the text took "
                f"{engine.prefill_s:.2f} s"
            )
        elif ids and (args.chat or args.save):
            self.read(ids)
        elif ids:
            self.report(self.answer(ids))

    def read(self, ids: list[int]) -> None:
        """Read the text before anything is asked, and save it if that is wanted."""
        engine, path = self.engine, self.args.save
        self.warn(len(ids))
        self.progress.follow(engine)
        engine.prefill(ids, self.args.max_new_tokens)
        self.progress.done(engine)
        self.open = self.open_at_first = True
        self.say(
            f"slim: read in {engine.prefill_s:.2f} s\n{summary(engine.stats, engine.kv.device)}"
        )
        if path:
            self.save(path)

    def save(self, path: str) -> None:
        """Save the text as it was read; if that fails, the questions are answered all the same."""
        try:
            self.engine.save(
                path, {"open": True, "raw": self.args.raw, "map": self.recorder.record}
            )
        except ValueError as error:
            if not (self.args.ask or self.args.chat):
                raise
            self.progress.complain(error)
        else:
            self.say(
                f"slim: saved to {path}, {format_bytes(Path(path).stat().st_size)}; go on with --resume {path}"
            )

    def ask(self, question: str) -> None:
        """Answer one more question."""
        tok, first = self.tokenizer, not self.engine.ids
        ids = tok.rest(question) if self.open else tok.chat(question, begin=first)
        r = self.answer(ids, follow_up=not first)
        self.open = False  # only now: a question refused leaves the turn as it was
        self.report(r)

    def compare(self, ids: list[int]) -> None:
        """Answer twice, dense and pruned."""
        self.engine.prefill(
            ids[: self.engine.ckpt.chunk]
        )  # warm-up: a process's first kernels are slow
        results = {}
        for name, budgets in (("dense", {}), ("slim", self.engine.ckpt.schedule)):
            results[name] = r = self.answer(ids, budgets)
            self.say(timing(r) + "\n" + summary(r, self.engine.kv.device))
            if self.interrupted:
                return
        self.say(comparison(results["dense"], results["slim"]))
        if self.args.json:
            print(json.dumps({name: public(r) for name, r in results.items()}), flush=True)

    def report(self, r: dict) -> None:
        if self.args.json:
            print(json.dumps(public(r)), flush=True)
        self.say(
            timing(r) if r["follow_up"] else timing(r) + "\n" + summary(r, self.engine.kv.device)
        )

    def warn(self, n_new: int) -> None:
        """Warn if the tokens to come do not suit the model's trained context or this conversation's RoPE."""
        n, new, most = (
            len(self.engine.ids) + n_new,
            self.args.max_new_tokens,
            self.engine.config.max_len,
        )
        if n + new > most:
            self.say(
                f"slim: warning: {n:,} prompt + {new:,} new tokens are beyond the {most:,} this model was trained "
                "for; expect a poor answer"
            )
        rope = self.engine.config.rope_scaling
        trained = rope.get("original_max_position_embeddings", 0)
        stretched = (
            rope["rope_type"] == "yarn" and "llama_4_scaling_beta" not in rope
        )  # with it, it was trained so
        if stretched and n + new <= trained and not self.engine.ids:
            remedy = (
                "leave --rope-yarn out" if self.args.rope_yarn else "take YaRN out of config.json"
            )
            self.say(
                f"slim: warning: {n:,} prompt + {new:,} new tokens fit in the {trained:,.0f} of the context before "
                f"YaRN stretched it, which costs quality there; {remedy}"
            )
        short = (
            rope["rope_type"] == "longrope"
            and self.engine.ids
            and self.engine.kv.planned <= trained
        )
        if short and len(self.engine.ids) <= trained < n + new:
            self.say(
                f"slim: warning: {n:,} tokens + {new:,} new ones are beyond the {trained:,.0f} of LongRoPE's short "
                "factors, with which this conversation began; expect a poor answer, or start again with a larger "
                "--max-new-tokens"
            )

    def answer(self, ids: list[int], schedule=None, follow_up=False) -> dict:
        """Generate an answer and, without --json, print it as it comes; return it with its costs, also after Ctrl-C."""
        engine, args, text = self.engine, self.args, not self.args.json
        if not follow_up:
            engine.forget()
        self.warn(len(ids))
        out, pieces, times = [], [], [time.perf_counter()]
        before = engine.stats if follow_up else {"swaps": 0, "revived": 0}

        def tokens(stopped):
            for token in engine.generate(
                ids,
                args.max_new_tokens,
                args.temperature,
                args.top_p,
                args.seed,
                schedule,
                follow_up,
            ):
                times.append(time.perf_counter())
                self.progress.done(engine)
                out.append(token)
                yield token
                if stopped:
                    raise KeyboardInterrupt

        self.interrupted = False
        if not follow_up:
            self.progress.follow(engine)
        try:
            with stop_between_tokens(args.chat and self.alone) as stopped:
                for piece in self.tokenizer.stream(tokens(stopped), args.stop):
                    pieces.append(piece)
                    if text:
                        print(piece, end="", flush=True)
        except KeyboardInterrupt:
            if args.chat and not self.alone:
                raise
            self.interrupted = True
        self.progress.done(engine)
        if text and (pieces or not self.interrupted):
            print(flush=True)
        first = times[1] if out else time.perf_counter()
        rate = (len(out) - 1) / (times[-1] - first) if len(out) > 1 else 0.0
        r = engine.stats | {
            "text": "".join(pieces),
            "ids": out,
            "ttft_s": first - times[0],
            "decode_tok_s": rate,
            "n_new": len(ids),
        }
        return (
            r
            | {"interrupted": self.interrupted, "follow_up": follow_up}
            | {f"{key}_here": r[key] - before[key] for key in ("swaps", "revived")}
        )

    def draw(self, path: str) -> str:
        """Write the map of the conversation; return where."""
        blockmap.write(path, self.engine, self.recorder, self.engine.ids + self.engine.pending)
        return path

    def reset(self) -> None:
        """Forget all questions but not the text; without a text, everything."""
        if self.text_read:
            self.engine.rewind()
            self.recorder.restart()
            self.open = self.open_at_first
        else:
            self.engine.forget()  # the next question opens a conversation


@contextlib.contextmanager
def stop_between_tokens(on: bool):
    """Let Ctrl-C only set a mark, because breaking off a step loses the conversation; a second one breaks off."""
    on, marks = (
        on and threading.current_thread() is threading.main_thread(),
        [],
    )  # only there can signals be handled

    def mark(*_):
        if marks:
            raise KeyboardInterrupt
        marks.append(True)
        print(
            "slim: stopping after this step; Ctrl-C again drops the whole conversation",
            file=sys.stderr,
            flush=True,
        )

    usual = signal.signal(signal.SIGINT, mark) if on else None
    try:
        yield marks
    finally:
        if on:
            signal.signal(signal.SIGINT, usual)


def chat(talk: Talk) -> None:
    """Read questions and commands, a line each, until /quit or the end of the input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() its history and editing
    ends = "stops an answer" if talk.alone else "ends all ranks"
    talk.say(f"slim: ask away; /stats, /map [FILE], /reset, /quit; Ctrl-C {ends}")
    prompt = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    while talk.engine.usable or not talk.engine.ids:
        try:
            line = input(prompt).strip()
        except EOFError:
            return print(file=sys.stderr) if prompt else None
        except KeyboardInterrupt:
            print(file=sys.stderr)  # an empty line, and another try
            if talk.alone:
                continue
            raise
        if line == "/quit":
            return
        try:
            command(talk, line) if line.startswith("/") else line and talk.ask(line)
        except BrokenPipeError:
            raise
        except (ValueError, OSError, MemoryError) as error:
            if isinstance(error, MemoryError) and not talk.alone:
                raise  # the other ranks may have gone on
            talk.progress.complain(error)
    raise ValueError(
        "the conversation was interrupted in the middle of a step and cannot continue; start again, from a saved "
        "text if there is one"
    )


def command(talk: Talk, line: str) -> None:
    engine, (name, _, rest) = talk.engine, line.partition(" ")
    if name == "/stats" and engine.usable:
        used = f"slim: {len(engine.ids):,} of {engine.config.max_len:,} tokens of context in use"
        print(summary(engine.stats, engine.kv.device) + "\n" + used, file=sys.stderr)
    elif name == "/map":
        path = str(Path(rest.strip() or talk.args.map or "map.html").expanduser())
        check_output(talk.args, "map", path)
        print(f"slim: map {talk.draw(path)}", file=sys.stderr)
    elif name == "/reset":
        talk.reset()
        print(
            "slim: the questions are forgotten" + (", the text is not" if talk.text_read else ""),
            file=sys.stderr,
        )
    else:
        raise ValueError(
            f"{name} is not available; there are /map [FILE], /reset, /quit and, once something was read, /stats"
        )
