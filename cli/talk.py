"""Questions about one document: from --ask, or typed at the prompt of --chat."""

import contextlib
import errno
import json
import signal
import sys
import threading
import time
from pathlib import Path

import blockmap
import slim
from cli.options import check_output, check_unicode
from cli.show import Progress, comparison, public, summary, timing, visible
from loading.files import format_bytes


class Talk:
    """Questions about one document, by --ask or --chat, and what is reported about each."""

    def __init__(self, engine: slim.Engine, tokenizer, args, progress: Progress, say):
        self.engine = engine
        self.tokenizer = tokenizer
        self.args = args
        self.progress = progress
        self.say = say
        self.interrupted = False
        self.alone = "ranks" not in engine.stats  # under torchrun, Ctrl-C ends the other ranks too
        self.open = False  # whether the turn of the text waits for a question
        self.open_at_first = False
        self.text_read = bool(args.resume or args.prompt)  # apart from the first question
        self.recorder = None
        if args.map or args.chat or args.save:  # a record grows with every step
            self.recorder = blockmap.Recorder(engine)

    def begin(self, ids: list[int]) -> None:
        """Open the saved text, or read the text alone, or answer the first question about it."""
        if self.args.resume:
            self.resume(self.args.resume)
        elif ids and (self.args.chat or self.args.save):
            self.read(ids)
        elif ids:
            self.report(self.answer(ids))

    def resume(self, path: str) -> None:
        started = time.perf_counter()
        extra = self.engine.resume(path, self.args.max_new_tokens)
        seconds = time.perf_counter() - started
        self.open = self.open_at_first = extra.get("open", False)
        if self.recorder:
            self.recorder.record = extra.get("map", {})
        self.say(
            f"slim: {path} opened in {seconds:.2f} s; reading the text took "
            f"{self.engine.prefill_s:.2f} s"
        )

    def read(self, ids: list[int]) -> None:
        """Read the text before anything is asked, and save it if that is wanted.

        Else its first question chooses the blocks, as if both had been one prompt.
        """
        engine = self.engine
        hold = not self.args.save
        self.warn(len(ids))
        self.progress.follow(engine, "below" if hold else "whole")
        begin = engine.read if hold else engine.prefill
        begin(ids, self.args.max_new_tokens)
        self.progress.done(engine)
        self.open = self.open_at_first = True
        waits = engine.kv.held is not None
        kept = "slim: the first question chooses the blocks to keep" if waits else self.summary()
        self.say(f"slim: read in {engine.prefill_s:.2f} s\n{kept}")
        if self.args.save:
            self.save(self.args.save)

    def save(self, path: str) -> None:
        """Save the text as it was read; if that fails, the questions are answered all the same."""
        extra = {"open": True, "raw": self.args.raw, "map": self.recorder.record}
        try:
            self.engine.save(path, extra)
        except ValueError as error:
            if not (self.args.ask or self.args.chat):
                raise
            self.progress.complain(error)
        else:
            size = format_bytes(Path(path).stat().st_size)
            self.say(f"slim: saved to {path}, {size}; go on with --resume {path}")

    def ask(self, question: str) -> None:
        """Answer one more question."""
        first = not self.engine.ids
        if self.open:
            ids = self.tokenizer.rest(question)
        else:
            ids = self.tokenizer.chat(question, begin=first)
        result = self.answer(ids, follow_up=not first)
        self.open = False  # only now: a question refused leaves the turn as it was
        self.report(result)

    def compare(self, ids: list[int]) -> None:
        """Answer twice, dense and pruned."""
        ckpt = self.engine.ckpt
        self.engine.prefill(ids[: ckpt.chunk])  # warm-up: a process's first kernels are slow
        results = {}
        for name, schedule in (("dense", {}), ("slim", ckpt.schedule)):
            result = self.answer(ids, schedule)
            results[name] = result
            self.say(f"{timing(result)}\n{self.summary(result)}")
            if self.interrupted:
                return
        self.say(comparison(results["dense"], results["slim"]))
        if self.args.json:
            shown = {name: public(result) for name, result in results.items()}
            print(json.dumps(shown), flush=True)

    # ---- one answer -------------------------------------------------------------------

    def answer(self, ids: list[int], schedule=None, follow_up=False) -> dict:
        """Generate an answer and, without --json, print it as it comes.

        Returns it with its costs, also after Ctrl-C.
        """
        if not follow_up:
            self.engine.forget()
        self.warn(len(ids))
        before = self.engine.stats if follow_up else {"swaps": 0, "revived": 0}
        chooses = not follow_up or self.engine.kv.held is not None
        answer = Answer(self)
        self.interrupted = False
        if chooses:
            self.progress.follow(self.engine, "above" if follow_up else "whole")
        try:
            with stop_between_tokens(self.args.chat and self.alone) as stopped:
                answer.write(ids, schedule, follow_up, stopped)
        except KeyboardInterrupt:
            if self.args.chat and not self.alone:
                raise
            self.interrupted = True
        self.progress.done(self.engine)
        if not self.args.json and (answer.pieces or not self.interrupted):
            print(flush=True)
        stats = self.engine.stats
        return {
            **stats,
            **answer.result(),
            "n_new": len(ids),
            "interrupted": self.interrupted,
            "follow_up": follow_up,
            "chose": chooses,
            "swaps_here": stats["swaps"] - before["swaps"],
            "revived_here": stats["revived"] - before["revived"],
        }

    def report(self, result: dict) -> None:
        if self.args.json:
            print(json.dumps(public(result)), flush=True)
        was_read = result["ids"] or not result["interrupted"]
        kept = "\n" + self.summary(result) if was_read and result["chose"] else ""
        self.say(timing(result) + kept)

    def summary(self, stats: dict | None = None) -> str:
        return summary(stats or self.engine.stats, self.engine.kv.device)

    # ---- warnings ---------------------------------------------------------------------

    def warn(self, n_new: int) -> None:
        """Warn if the tokens to come do not suit the trained context or the conversation's RoPE."""
        engine = self.engine
        rope = engine.config.rope_scaling
        kind = rope["rope_type"]
        trained = rope.get("original_max_position_embeddings", 0)
        started = bool(engine.ids)
        n = len(engine.ids) + n_new
        end = n + self.args.max_new_tokens
        coming = f"{n:,} prompt + {self.args.max_new_tokens:,} new tokens"
        if end > engine.config.max_len:
            self.say(
                f"slim: warning: {coming} are beyond the {engine.config.max_len:,} this model was "
                "trained for; expect a poor answer, or read the beginning alone with "
                "--max-prompt-tokens"
            )
        # with llama_4_scaling_beta, a model was trained so
        stretched = kind == "yarn" and "llama_4_scaling_beta" not in rope
        if stretched and not started and end <= trained:
            given = self.args.rope_yarn
            remedy = "leave --rope-yarn out" if given else "take YaRN out of config.json"
            self.say(
                f"slim: warning: {coming} fit in the {trained:,.0f} of the context before YaRN "
                f"stretched it, which costs quality there; {remedy}"
            )
        short = kind == "longrope" and started and engine.kv.planned <= trained
        if short and len(engine.ids) <= trained < end:
            self.say(
                f"slim: warning: {coming} are beyond the {trained:,.0f} of LongRoPE's short "
                "factors, with which this conversation began; expect a poor answer, or start again "
                "with a larger --max-new-tokens"
            )

    # ---- commands ---------------------------------------------------------------------

    def draw(self, path: str) -> str:
        """Write the map of the conversation; return where."""
        if self.engine.usable and self.engine.kv.held is not None:
            self.progress.follow(self.engine, "above")
            self.engine.finish()
            self.progress.done(self.engine)
            self.say(f"slim: the text's own end chose the blocks\n{self.summary()}")
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


class Answer:
    """An answer as it comes: its tokens and text, and when they came."""

    def __init__(self, talk: Talk):
        self.talk = talk
        self.ids: list[int] = []
        self.pieces: list[str] = []
        self.started = time.perf_counter()
        self.times: list[float] = []  # of each token

    def write(self, ids: list[int], schedule, follow_up: bool, stopped: list) -> None:
        """Generate, and print each piece of text unless --json is given."""
        talk = self.talk
        show = visible if sys.stdout.isatty() else str
        for piece in talk.tokenizer.stream(
            self.tokens(ids, schedule, follow_up, stopped), talk.args.stop
        ):
            self.pieces.append(piece)
            if not talk.args.json:
                print(show(piece), end="", flush=True)

    def tokens(self, ids: list[int], schedule, follow_up: bool, stopped: list):
        args = self.talk.args
        sampling = args.max_new_tokens, args.temperature, args.top_p, args.seed
        engine = self.talk.engine
        for token in engine.generate(ids, *sampling, schedule=schedule, follow_up=follow_up):
            self.times.append(time.perf_counter())
            self.talk.progress.done(engine)
            self.ids.append(token)
            yield token
            if stopped:
                raise KeyboardInterrupt

    def result(self) -> dict:
        first = self.times[0] if self.times else time.perf_counter()
        rate = 0.0
        if len(self.ids) > 1:
            rate = (len(self.ids) - 1) / (self.times[-1] - first)
        return {
            "text": "".join(self.pieces),
            "ids": self.ids,
            "ttft_s": first - self.started,
            "decode_tok_s": rate,
        }


@contextlib.contextmanager
def stop_between_tokens(on: bool):
    """Let Ctrl-C only set a mark: breaking off a step loses the conversation. A second one does."""
    marks = []
    if not on or threading.current_thread() is not threading.main_thread():
        yield marks  # only the main thread can handle signals
        return

    def mark(*_):
        if marks:
            raise KeyboardInterrupt
        marks.append(True)
        print(
            "slim: stopping after this step; Ctrl-C again drops the whole conversation",
            file=sys.stderr,
            flush=True,
        )

    usual = signal.signal(signal.SIGINT, mark)
    try:
        yield marks
    finally:
        signal.signal(signal.SIGINT, usual)


# ---- the chat -----------------------------------------------------------------------------


def chat(talk: Talk) -> None:
    """Read questions and commands, a line each, until /quit or the end of the input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() its history and editing
    with contextlib.suppress(AttributeError):  # a StringIO of the caller's
        sys.stdin.reconfigure(errors="surrogateescape")  # a bad byte is told, and costs its line
    ends = "stops an answer" if talk.alone else "ends all ranks"
    talk.say(f"slim: type a question, or /stats, /map [FILE], /reset, /quit; Ctrl-C {ends}")
    prompt = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    while talk.engine.usable or not talk.engine.ids:
        try:
            line = input(prompt).strip()
        except EOFError:
            if prompt:
                print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)  # an empty line, and another try
            if talk.alone:
                continue
            raise
        if line == "/quit":
            return
        obey(talk, line)
    raise ValueError(
        "the conversation was interrupted in the middle of a step and cannot continue; "
        "start again, from a saved text if there is one"
    )


def obey(talk: Talk, line: str) -> None:
    """Answer a line of the chat; what is wrong with it costs this line, not the conversation."""
    try:
        check_unicode("the line", line)
        if line.startswith("/"):
            command(talk, line)
        elif line:
            talk.ask(line)
    except BrokenPipeError:
        raise
    except (ValueError, OSError, MemoryError) as error:
        if isinstance(error, MemoryError) and not talk.alone:
            raise  # the other ranks may have gone on
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EIO, errno.EBADF):
            raise  # answers have nowhere to go
        talk.progress.complain(error)


def command(talk: Talk, line: str) -> None:
    engine = talk.engine
    name, _, rest = line.partition(" ")
    if name == "/stats" and engine.usable:
        used = f"{len(engine.ids):,} of {engine.config.max_len:,} tokens of context in use"
        print(f"{talk.summary()}\nslim: {used}", file=sys.stderr)
    elif name == "/map":
        path = expand(rest.strip() or talk.args.map or "map.html")
        check_output(talk.args, "map", path)
        print(f"slim: map {talk.draw(path)}", file=sys.stderr)
    elif name == "/reset":
        talk.reset()
        text = ", the text is not" if talk.text_read else ""
        print(f"slim: the questions are forgotten{text}", file=sys.stderr)
    else:
        raise ValueError(
            f"{name} is not available; there are /map [FILE], /reset, /quit and, "
            "once something was read, /stats"
        )


def expand(path: str) -> str:
    """Return a path with ~ replaced by a home folder; raise ValueError if there is no such user."""
    try:
        return str(Path(path).expanduser())
    except RuntimeError as error:
        raise ValueError(f"{path} cannot be written: {error}") from None
