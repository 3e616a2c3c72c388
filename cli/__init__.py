"""The command line of Slim: `python slim.py` comes here."""

import contextlib
import os
import signal
import sys
from dataclasses import fields

import torch

import prune
import slim
import tokenizer as tokenizers
from cli.options import adopt, build_ids, check_args, parse_args, read_prompt
from cli.show import Progress, status
from cli.talk import Talk, chat


def main(argv=None) -> int:
    """Run the command line; return the exit code: 0, 2 for bad input, 130 for Ctrl-C, 141 for a closed pipe."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through every `finally`, so that nothing half-written stays
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="replace")  # a terminal that lacks a character shows another
    args = parse_args(argv)
    progress = Progress(args.quiet)
    try:
        return run(args, progress)
    except BrokenPipeError:  # the reader has seen enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, torch.cuda.OutOfMemoryError) as error:
        with contextlib.suppress(OSError):  # standard error may be what cannot be written
            progress.complain(error)
        return 2
    except KeyboardInterrupt:
        progress.clear()
        print("slim: interrupted", file=sys.stderr)
        return 130


def run(args, progress: Progress) -> int:
    """Check everything, then load, then read, then answer."""
    say = status(args, progress)
    check_args(args)
    header = adopt(args) if args.resume is not None else None
    settings = {f.name: getattr(args, f.name) for f in fields(slim.Settings) if hasattr(args, f.name)}
    ckpt = slim.Checkpoint.open(args.ckpt, args.device, args.dtype, "dense" if args.dense else args.schedule, args.score, overlap=not args.no_overlap, **settings)
    if args.compare and not ckpt.schedule:
        raise ValueError("--compare has nothing to compare: the schedule is dense; give one with --schedule LAYER:TOKENS")
    c, tokenizer = ckpt.config, tokenizers.load(ckpt.folder)
    if tokenizer.vocab_size > c.vocab_size:
        raise ValueError(f"{ckpt.folder}: the tokenizer has {tokenizer.vocab_size:,} ids, the model {c.vocab_size:,}; they do not belong together")
    if args.raw:
        tokenizer.chat_format = None
    if header:
        slim.check_saved(args.resume, header, ckpt.identity)
    ids = [] if header else build_ids(args, read_prompt(args), tokenizer)
    n_prompt = max(1, len(header["ids"]) if header else len(ids))
    engine = ckpt.engine(reserve=(n_prompt, args.max_new_tokens), progress=progress.loading)
    say(f"slim: {ckpt.folder.name}, {c.n_layers} layers, schedule {prune.format_schedule(ckpt.schedule)}, {n_prompt:,} prompt tokens")
    say(f"slim: {ckpt.device}, {str(ckpt.dtype).removeprefix('torch.')}: {slim.plan(ckpt, n_prompt, args.max_new_tokens)}, {slim.size(slim.free_bytes(ckpt.device))} more free")
    talk = Talk(engine, tokenizer, args, progress, say)
    if args.compare:
        talk.compare(ids)
    else:
        talk.begin(ids)
    for question in args.ask:
        if not talk.interrupted:
            talk.ask(question)
    if args.chat:
        chat(talk)
    if args.map and engine.kv.length:
        say(f"slim: map {talk.draw(args.map)}")
    return 130 if talk.interrupted and not args.chat else 0
