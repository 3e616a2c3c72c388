"""The command line of Slim: `python slim.py` comes here."""

import contextlib
import os
import signal
import sys
import threading
import warnings
from dataclasses import fields

import serve
import slim
import tokenizer
from cli import fit
from cli.options import build_ids, check_args, parse_args, read_prompt, settings_of_saved
from cli.show import Progress, status
from cli.talk import Talk, chat
from loading.files import format_bytes, one_line
from loading.saved import check_saved
from planning.checkpoint import Checkpoint, dtype_name
from planning.memory import free_bytes, plan
from planning.schedule import format_schedule
from planning.settings import Settings, env_number


def main(argv=None) -> int:
    """Run the command line; return the exit code.

    0; 2 for bad input; 130 for Ctrl-C; 141 for a closed pipe.
    """
    try:
        n_ranks = env_number("WORLD_SIZE")
    except ValueError as error:
        Progress(quiet=True).complain(error)
        return 2
    if n_ranks > 1:  # started by torchrun
        import parallel

        return parallel.main(lambda: program(argv))
    return program(argv)


def program(argv=None) -> int:
    prepare()
    args = parse_args(argv)
    progress = Progress(args.quiet)
    try:
        with warnings.catch_warnings():  # `run` changes how they are shown
            code = run(args, progress)
        sys.stdout.flush()  # here, where an error can be told
        return code
    except BrokenPipeError:  # the reader has seen enough, as in `| head`
        drop_output()
        return 141
    except (ValueError, OSError, MemoryError) as error:
        with contextlib.suppress(OSError):  # standard error may be what cannot be written
            progress.complain(error)
        try:
            sys.stdout.flush()
        except OSError:  # a full disk: Python would try again at its end, and exit with 120
            drop_output()
        return 2
    except RuntimeError as error:
        first = str(error).partition("\n")[0]
        if "out of memory" not in str(error) and "allocate memory" not in str(error):
            raise
        progress.complain(MemoryError(f"out of memory: {first}; try a smaller --chunk"))
        return 2
    except KeyboardInterrupt:
        progress.clear()
        print("slim: interrupted", file=sys.stderr)
        return 130


def prepare() -> None:
    """Set the signals and the standard streams."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # SIGTERM passes through every `finally`, so that no half-written file stays
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))
        with contextlib.suppress(AttributeError):  # a StringIO of the caller's has no encoding
            # a terminal that lacks a character shows another
            getattr(sys, name).reconfigure(errors="replace")


def drop_output() -> None:
    """Send what is still to be written to standard output nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(args, progress: Progress) -> int:
    """Check everything, then load, then read, then answer."""
    say = status(args, progress)
    warnings.showwarning = lambda message, *_: say(f"slim: warning: {one_line(message)}")
    check_args(args)
    if args.plan:
        print(fit.describe(open_checkpoint(args), args.max_new_tokens))
        return 0
    server = None
    if args.serve is not None:
        if env_number("WORLD_SIZE") > 1:
            raise ValueError("--serve works on one GPU only; start it without torchrun")
        server = serve.open_server(args, say)  # before the weights: the port may be taken
    header = settings_of_saved(args) if args.resume is not None else None
    try:
        ckpt = open_checkpoint(args)
    except ValueError as error:
        if header is None or "ckpt" not in args.given:
            raise
        raise ValueError(f"{error}; {args.resume} was saved with {header['ckpt']}") from None
    tok = load_tokenizer(ckpt, args)
    ids = []
    n_prompt = 1
    if header:
        if not ckpt.needs_probe:  # else what the rule depends on is not known before loading
            check_saved(args.resume, header, ckpt.identity)
        n_prompt = len(header["ids"])
    elif not server:
        ids = build_ids(args, read_prompt(args), tok)
        n_prompt = max(1, len(ids))
    engine = start(ckpt, n_prompt, args.max_new_tokens, progress.loading)
    engine.tokenizer = tok
    if args.draft is not None:
        engine.draft = args.draft
    say(describe(engine.ckpt, n_prompt))
    if server:
        return serve.run(server, engine, tok, args, say)
    say(describe_memory(engine, n_prompt, args.max_new_tokens))
    return answer(Talk(engine, tok, args, progress, say), ids)


def open_checkpoint(args) -> Checkpoint:
    settings = {f.name: getattr(args, f.name) for f in fields(Settings) if hasattr(args, f.name)}
    settings["overlap"] = not args.no_overlap
    schedule = "dense" if args.dense else args.schedule
    ckpt = Checkpoint.open(args.ckpt, args.device, args.dtype, schedule, args.score, **settings)
    if args.compare and not ckpt.schedule:
        raise ValueError(
            "--compare has nothing to compare: the schedule is dense; give one with --schedule"
        )
    return ckpt


def load_tokenizer(ckpt: Checkpoint, args) -> tokenizer.Tokenizer:
    tok = tokenizer.load(ckpt.folder, ckpt.config.vocab_size)
    set_template(tok, args)
    return tok


def set_template(tok, args) -> None:
    """Set how the chat template is used; raise ValueError if it does not support that."""
    if args.raw:
        tok.template = None
    if args.system is not None and tok.template is None:
        raise ValueError(
            f"--system: {args.ckpt} has no chat template with a place for it; leave --system out"
        )
    if args.no_think and "enable_thinking" not in getattr(tok.template, "source", ""):
        raise ValueError(
            f"--no-think: the chat template of {args.ckpt} knows no enable_thinking; "
            "leave --no-think out"
        )
    tok.system = args.system
    tok.variables = {"enable_thinking": False} if args.no_think else {}
    if args.chat or len(args.ask) > 1:
        # fails before anything is read, if the template cannot continue
        tok.chat("a second question", begin=False)


def start(ckpt: Checkpoint, n_prompt: int, n_new: int, progress) -> slim.Engine:
    if env_number("WORLD_SIZE") > 1:  # started by torchrun
        import parallel

        return parallel.start(ckpt, n_prompt, n_new, progress)
    return slim.start(ckpt, n_prompt, n_new, progress)


def describe(ckpt: Checkpoint, n_prompt: int) -> str:
    pruning = "dense"
    if ckpt.schedule:
        pruning = f"{format_schedule(ckpt.schedule)} by {ckpt.rule.name}"
        if ckpt.heads:
            pruning += f" ({len(ckpt.heads)} head{'s' * (len(ckpt.heads) > 1)})"
        elif ckpt.asked_rule.sees == "lookup":
            pruning += " (no heads that look things up were found below the first boundary)"
        if ckpt.local.window:
            pruning += f", local window {ckpt.local.window:,}"
    return (
        f"slim: {ckpt.folder.name}, {ckpt.config.n_layers} layers, schedule {pruning}, "
        f"{n_prompt:,} prompt tokens"
    )


def describe_memory(engine: slim.Engine, n_prompt: int, n_new: int) -> str:
    n_ranks = engine.stats.get("ranks", 1)
    each = f"on each of {n_ranks} ranks " if n_ranks > 1 else ""
    device = engine.kv.device
    need = plan(engine.ckpt, n_prompt, n_new)
    free = format_bytes(free_bytes(device))
    return f"slim: {device}, {dtype_name(engine.ckpt.dtype)}: {each}{need}, {free} more free"


def answer(talk: Talk, ids: list[int]) -> int:
    """Answer all questions and draw the map; return the exit code."""
    args = talk.args
    if args.compare:
        talk.compare(ids)
    else:
        talk.begin(ids)
    for number, question in enumerate(args.ask):
        if talk.interrupted:
            talk.say(f"slim: interrupted; not asked: {len(args.ask) - number}")
            break
        talk.ask(question)
    if args.chat:
        chat(talk)
    if args.map and talk.engine.usable:
        talk.say(f"slim: map {talk.draw(args.map)}")
    elif args.map:
        talk.say("slim: no map: nothing was read that it could show")
    return 130 if talk.interrupted and not args.chat else 0
