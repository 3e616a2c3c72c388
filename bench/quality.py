"""Does pruning keep the answer? Accuracy by task, length, budget and method on the demo checkpoint.

    python bench/quality.py main        # methods x tasks at equal budgets
    python bench/quality.py lengths     # dense accuracy by task and length
    python bench/quality.py boundary    # first boundary by layer, slim against random blocks
    python bench/quality.py settings    # block_len, unit_len, window, gamma, re-selection off
    python bench/quality.py diffusion   # the fact's own blocks removed at layer l, and nothing else
    python bench/quality.py depth       # where in the document the fact lies, by length
    python bench/quality.py questions   # later questions on one document against asking afresh

An answer counts if the whole of it, its end of line included, is generated greedily.
Every method prunes through the engine's own boundary, so it differs in nothing but the
scores; budgets are shares of the prompt. Documents and the random method are seeded: a
second run prints the same figures. A cell in which random blocks lose less than ten points
against dense cannot tell methods apart and is marked with a ~.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]
import prune
import slim
import tasks

# ---- methods: newest queries (W, H, D), keys (N, B, G, D), block numbers (N,) -> scores (N,) -------------


def random_blocks(queries, keys, blocks, unit_len):
    return torch.rand(len(blocks))


def recent_blocks(queries, keys, blocks, unit_len):
    """Sink and newest tokens, as in StreamingLLM."""
    return blocks.float()


def token_attention(queries, keys, blocks, unit_len):
    """Attention of the last token, mean over heads, of single tokens, as in LazyLLM: needs block_len 1."""
    q, k = queries[-1], keys.repeat_interleave(queries.shape[1] // keys.shape[2], 2)  # (H, D), (N, B, H, D)
    logits = torch.einsum("hd,nbhd->hnb", q.float(), k.float()) / q.shape[-1] ** 0.5
    return logits.flatten(1).softmax(-1).view_as(logits).mean(0).sum(-1)


def attention_mass(queries, keys, blocks, unit_len):
    """Attention that each of the newest queries pays to a block, summed over its tokens, mean over heads and queries."""
    k = keys.repeat_interleave(queries.shape[1] // keys.shape[2], 2)  # (N, B, H, D)
    logits = torch.einsum("whd,nbhd->whnb", queries.float(), k.float()) / queries.shape[-1] ** 0.5
    return logits.flatten(2).softmax(-1).view_as(logits).mean((0, 1)).sum(-1)


def average_pooled(queries, keys, blocks, unit_len):
    """The whole block as one unit."""
    return prune.block_scores(queries, keys, blocks, keys.shape[1])


def max_pooled(queries, keys, blocks, unit_len):
    """A block's key is its largest value in every dimension."""
    return prune.block_scores(queries, keys.amax(1, keepdim=True), blocks, 1)


METHODS = {"slim": prune.block_scores, "average pool": average_pooled, "max pool": max_pooled, "attention mass": attention_mass, "token attention": token_attention,
           "recent blocks": recent_blocks, "random blocks": random_blocks}  # fmt: skip

# ---- one question -----------------------------------------------------------------------


def ask(engine, ids: list[int], answer: list[int], fresh=True, schedule=None) -> bool:
    """Say whether greedy decoding gives exactly `answer` after ids; stops at the first wrong token."""
    logits = engine.prefill(ids, schedule=schedule) if fresh else engine.extend(ids)
    for n, token in enumerate(answer):
        if int(logits.argmax()) != token:
            engine.pending = answer[n:]  # a conversation goes on with the right answer
            return False
        if n < len(answer) - 1:
            logits = engine.extend([token])
    engine.pending = answer[-1:]
    return True


def spell(tok, sample, question) -> tuple[list[int], list[int]]:
    """Return the ids of document and question, and of the answer."""
    ids = [tok.bos_id] + tok.encode(sample.document + "\n") + tok.encode("question: " + question.text)
    return ids, tok.encode(" " + question.answer + "\n")


def load(args, **settings):
    settings = {"block_len": args.block_len, "unit_len": args.unit_len} | settings
    return slim.load(args.ckpt, args.device, args.dtype, schedule="dense", **settings)


def cell(args, kind: str, length: int, share: float | None, score=prune.block_scores, boundary=None, n=None, depth=None, **settings) -> float:
    """Return the accuracy over n questions, one a document; share None is dense."""
    if score is token_attention:
        settings |= {"block_len": 1, "unit_len": 1, "window": 1}
    engine, hits, n = load(args, **settings), 0, n or args.questions
    engine.model.score = score
    for seed in range(n):
        torch.manual_seed(seed)
        sample = tasks.make(kind, length, 10**6 + seed, engine.tokenizer, n_questions=1, depth=depth)
        ids, answer = spell(engine.tokenizer, sample, sample.questions[0])
        schedule = {} if share is None else {boundary or args.boundary: max(int(len(ids) * share), 2 * engine.ckpt.settings.block_len)}
        hits += ask(engine, ids, answer, schedule=schedule)
    return hits / n


# ---- experiments: each returns (head, rows) of a table ----------------------------------


def lengths(args):
    rows = [[kind, *(cell(args, kind, n, None) for n in args.lengths)] for kind in args.kinds]
    return ["dense, by prompt tokens", *(f"{n:,}" for n in args.lengths)], rows


def main_table(args):
    """Every method at every budget, by task, at the first of --lengths."""
    length, rows = args.lengths[0], []
    for kind in args.kinds:
        dense = cell(args, kind, length, None)
        for share in args.shares:
            row = {name: cell(args, kind, length, share, score) for name, score in METHODS.items()}
            blind = "" if dense - row["random blocks"] >= 0.1 else " ~"
            rows.append([f"{kind}, 1/{round(1 / share)}{blind}", dense, *row.values()])
            print(rows[-1], file=sys.stderr, flush=True)
    return [f"{length:,} tokens, boundary {args.boundary}", "dense", *METHODS], rows


def boundary(args):
    """The first boundary by layer: where does random selection start to hurt, and slim not?"""
    layers, length, share = load(args).config.n_layers, args.lengths[0], args.shares[0]
    rows = []
    for kind in args.kinds:
        for name in ("slim", "random blocks"):
            rows.append([f"{kind}, {name}", *(cell(args, kind, length, share, METHODS[name], b) for b in range(1, layers))])
    return [f"{length:,} tokens, 1/{round(1 / share)}, boundary at", *map(str, range(1, layers))], rows


def settings(args):
    """One setting changed at a time; gamma 0 never selects again after the prompt."""
    length, share, rows = args.lengths[0], args.shares[-1], []
    changes = [{}, {"block_len": 32}, {"block_len": 64}, {"unit_len": 4}, {"unit_len": args.block_len}, {"window": 1}, {"window": 16}, {"gamma": 0.0}, {"gamma": 0.5}, {"gamma": 1.0}]
    for change in changes:
        name = ", ".join(f"{k} {v}" for k, v in change.items()) or "as it is"
        rows.append([name, *(cell(args, kind, length, share, **change) for kind in args.kinds)])
    return [f"{length:,} tokens, 1/{round(1 / share)}", *args.kinds], rows


def diffusion(args):
    """At boundary l exactly the blocks of the facts leave: who can still answer has moved what they say."""
    engine, length, rows = load(args), args.lengths[0], []
    layers, tok, b = range(1, engine.config.n_layers), engine.tokenizer, args.block_len
    for kind in args.kinds:
        hits = [0] * len(layers)
        for seed in range(args.questions):
            sample = tasks.make(kind, length, 10**6 + seed, tok, n_questions=1)
            ids, answer = spell(tok, sample, sample.questions[0])
            places = [1 + len(tok.encode(sample.document[:at])) for span in sample.questions[0].fact_spans for at in span]
            gone = {p // b for start, end in zip(places[::2], places[1::2]) for p in range(start, end)} - {0, (len(ids) - 1) // b}
            engine.model.score = lambda q, k, blocks, u: torch.tensor([-1.0 if x in gone else 1.0 for x in blocks.tolist()])
            for i, layer in enumerate(layers):
                n_blocks = -(-len(ids) // b)
                hits[i] += ask(engine, ids, answer, schedule={layer: (n_blocks - len(gone)) * b} if gone else {})
        rows.append([kind, *(h / args.questions for h in hits)])
    return [f"{length:,} tokens, facts removed at layer", *map(str, layers)], rows


def depth(args):
    spots = (0.02, 0.25, 0.5, 0.75, 0.98)
    rows = [[f"{n:,}", *(cell(args, "lookalike", n, args.shares[0], n=args.questions // 4, depth=d) for d in spots)] for n in args.lengths]
    return ["lookalike, tokens; fact at", *map(str, spots)], rows


def questions(args):
    """Eight questions on a document: as follow-ups of one conversation, and each with a prefill of its own."""
    engine, rows = load(args), []
    for length in args.lengths:
        later = afresh = count = revived = 0
        seconds = {"first": 0.0, "later": 0.0}
        for seed in range(max(1, args.questions // 7)):
            sample = tasks.make("lookalike", length, 2 * 10**6 + seed, engine.tokenizer, n_questions=8)
            for i, question in enumerate(sample.questions):
                ids, answer = spell(engine.tokenizer, sample, question)
                schedule = {args.boundary: max(int(len(ids) * args.shares[0]), 2 * args.block_len)}
                afresh += i > 0 and ask(engine, ids, answer, schedule=schedule)
            for i, question in enumerate(sample.questions):
                ids, answer = spell(engine.tokenizer, sample, question)
                start = time.perf_counter()
                right = ask(engine, ids if i == 0 else engine.tokenizer.encode("question: " + question.text), answer, i == 0, schedule)
                seconds["later" if i else "first"] += time.perf_counter() - start
                later += i > 0 and right
                count += i > 0
            revived += engine.stats["revived"]
        rows.append([f"{length:,}", afresh / count, later / count])
        print(f"{length}: {revived} blocks revived; time of a first question over a later one {7 * seconds['first'] / seconds['later']:.1f}", file=sys.stderr)
    return ["tokens", "asked afresh", "as a follow-up"], rows


EXPERIMENTS = {"main": main_table, "lengths": lengths, "boundary": boundary, "settings": settings, "diffusion": diffusion, "depth": depth, "questions": questions}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("experiment", choices=EXPERIMENTS)
    p.add_argument("--ckpt", default=str(ROOT / "demo"))
    p.add_argument("--questions", type=int, default=200, help="a cell")
    p.add_argument("--lengths", default="2048", help="prompt tokens")
    p.add_argument("--kinds", default="single,lookalike,latest,two_hop")
    p.add_argument("--shares", default="4,8,16", help="budgets, as one over the share of the prompt")
    p.add_argument("--boundary", type=int, default=2)
    p.add_argument("--block-len", type=int, default=16)
    p.add_argument("--unit-len", type=int, default=8)
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--out", help="write the figures as JSON")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    args.lengths, args.kinds = [int(n) for n in args.lengths.split(",")], args.kinds.split(",")
    args.shares = [1 / float(n) for n in args.shares.split(",")]
    head, rows = EXPERIMENTS[args.experiment](args)
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for name, *figures in rows:
        print(f"| {name} | " + " | ".join(f"{100 * f:.1f}" for f in figures) + " |")
    if args.out:
        Path(args.out).write_text(json.dumps({**vars(args), "ckpt": Path(args.ckpt).name, "head": head, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
