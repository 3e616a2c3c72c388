"""Trains the demo model: a small LLaMA that answers questions about long documents.

    python train.py --out export                     # trains, or resumes, on CPU or CUDA
    python train.py --out export --eval              # accuracy by kind and length

Data: documents of tasks.py, made on the fly. First random sequences that repeat, until
the model copies; then documents of growing length, each new length entered once the
first token of the answers to plain questions is right often enough (PASS below).

In most steps the first layers see only the last 64 tokens. So they are left to gather
what stands near, and facts are looked up by the later layers, as in large models.

--out holds the export (config.json, model.safetensors, tokenizer.model); the private
training state is --state, written with every export.
"""

import argparse
import json
import math
import os
import random
import signal
import time
from dataclasses import asdict, dataclass

import tasks
import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    vocab_size: int = 128
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    rope_theta: float = 100000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 32768


# --- the model; modules carry the names of the usual LLaMA checkpoints ---------------


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x, rope, window, cache):
        B, T, _ = x.shape
        d = self.c.head_dim
        q = rotate(self.q_proj(x).view(B, T, -1, d).transpose(1, 2), rope)
        k = rotate(self.k_proj(x).view(B, T, -1, d).transpose(1, 2), rope)
        v = self.v_proj(x).view(B, T, -1, d).transpose(1, 2)
        if cache is not None:  # [keys, values] of this layer; filled on first use
            past = cache[0].shape[2] if cache else 0
            if past:
                k, v = torch.cat((cache[0], k), 2), torch.cat((cache[1], v), 2)
            cache[:] = k, v
        groups = self.c.num_attention_heads // self.c.num_key_value_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        if window and window < T:
            y = windowed_attention(q, k, v, window)
        elif cache is not None and past:
            mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


def rotate(x, rope):
    cos, sin = rope
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)


def windowed_attention(q, k, v, W):
    """Each token sees itself and the W-1 before it: blocks of W queries against 2W keys."""
    B, H, T, d = q.shape
    n = -(-T // W)
    q, k, v = (F.pad(t, (0, 0, 0, n * W - T)).view(B, H, n, W, d) for t in (q, k, v))
    k, v = (torch.cat((F.pad(t, (0, 0, 0, 0, 1, 0))[:, :, :-1], t), 3) for t in (k, v))
    i = torch.arange(W, device=q.device)[:, None] + W
    j = torch.arange(2 * W, device=q.device)[None]
    mask = ((j <= i) & (j > i - W)).expand(n, W, 2 * W).clone()
    mask[0, :, :W] = False  # nothing lies before the first block
    q, k, v = (t.transpose(1, 2).reshape(B * n, H, -1, d) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat(B, 1, 1)[:, None])
    return y.view(B, n, H, W, d).transpose(1, 2).reshape(B, H, n * W, d)[:, :, :T]


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(c.hidden_size)), c.rms_norm_eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(c), RMSNorm(c)

    def forward(self, x, rope, window=None, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, window, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.model.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.model.norm = RMSNorm(c)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                small = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.num_hidden_layers) if small else 0.02)
        # The output layer is the embedding (tie_word_embeddings): its rows get a unit scale.
        nn.init.normal_(self.model.embed_tokens.weight, std=0.05)

    def forward(self, ids, positions=None, n_local=0, window=64, caches=None):
        """Logits [B, T, vocab]. positions: [T]. The first n_local layers see a window only.
        caches: a list per layer, to go on from an earlier call."""
        T, d = ids.shape[1], self.c.head_dim
        pos = torch.arange(T, device=ids.device) if positions is None else positions
        freq = self.c.rope_theta ** (-torch.arange(0, d, 2, device=ids.device).float() / d)
        angle = torch.cat((pos[:, None].float() * freq,) * 2, -1)
        x = self.model.embed_tokens(ids)
        rope = angle.cos(), angle.sin()
        for i, layer in enumerate(self.model.layers):
            x = layer(
                x, rope, window if i < n_local else None, caches[i] if caches is not None else None
            )
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)


# --- data ------------------------------------------------------------------------------

LENGTHS = [96, 160, 256, 512, 1024, 2048, 4096, 8192]
PASS = [
    0.6,
    0.7,
    0.8,
    0.9,
    0.87,
    0.9,
    0.9,
    1.1,
]  # first-token accuracy at which the next length begins
# The rate of each length, as a part of the first: with long documents attention has to be
# sharp, and a high rate blurs it (one wrong digit out of four).
RATE = [1.0, 1.0, 1.0, 0.75, 0.6, 0.35, 0.35, 0.35]


def questions_for(length):
    return max(8, min(40, length // 24))


def copy_batch(rng, c, n_tokens):
    """Random sequences, each given twice: the second time every token can be copied."""
    rows, weights = [], []
    half = rng.choice([24, 48, 96])
    for _ in range(max(1, n_tokens // (2 * half))):
        row = [rng.randrange(3, c.vocab_size) for _ in range(half)] * 2
        rows.append(row)
        weights.append([0.0] * half + [1.0] * half)
    return rows, weights, None


def document_batch(rng, tokenizer, length, n_tokens, mix):
    """Documents with several questions each, filled up to one length. Also returns where
    the answers lie: (row, start, end, kind, asked for the first time)."""
    nq, space = questions_for(length), tokenizer.piece_to_id("\u2581")
    rows, weights, answers = [], [], []
    while not rows or (len(rows) + 1) * max(map(len, rows)) <= n_tokens:
        # Short documents train the bare look-up first; the other kinds need it.
        mixed = 0.25 if length < 256 else 0.7
        kind = "mixed" if rng.random() < mixed else "single" if rng.random() < 0.2 else "lookalike"
        biggest = max(4, min(64, length // 24))
        n_facts = 4 if kind == "single" else rng.randint(max(4, biggest // 3), biggest)
        s = tasks.make(
            kind, length, rng.getrandbits(40), tokenizer, nq, n_facts=n_facts, weights=mix
        )
        ids, where = tasks.build_ids(s, tokenizer)
        w, seen = [0.05] * len(ids), set()
        for (a, b), q in zip(where, s.questions):
            # Where a name or number begins, something has to be found: that counts most.
            w[a:b] = [
                3.0 if ids[i - 1] == space else 1.0 if len(q.fact_spans) == 1 else 2.0
                for i in range(a, b)
            ]
            w[a] = 0.05  # the first space is no news
            fresh = q.text not in seen  # a repeated question can be copied
            seen.add(q.text)
            answers.append((len(rows), a, b, q.kind, fresh))
        rows.append(ids)
        weights.append(w)
    T = max(map(len, rows))
    weights = [w + [0.0] * (T - len(w)) for w in weights]
    rows = [r + [2] * (T - len(r)) for r in rows]
    return rows, weights, answers


# --- training --------------------------------------------------------------------------


def export(model, args):
    """Writes the checkpoint in the usual LLaMA layout; each file appears whole or not at all."""
    from safetensors.torch import save_file

    os.makedirs(args.out, exist_ok=True)
    tensors = {
        k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in model.state_dict().items()
    }
    path = os.path.join(args.out, "model.safetensors")
    save_file(tensors, path + ".tmp", metadata={"format": "pt"})
    os.chmod(path + ".tmp", 0o644)
    os.replace(path + ".tmp", path)
    config = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        **asdict(model.c),
        hidden_act="silu",
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=1,
        eos_token_id=[2, 3],
        torch_dtype="bfloat16",
    )
    # An answer ends with its line, so the end of line (id 3) ends a generation too.
    generation = dict(bos_token_id=1, eos_token_id=[2, 3], do_sample=False)
    for name, value in (("config.json", config), ("generation_config.json", generation)):
        path = os.path.join(args.out, name)
        with open(path + ".tmp", "w") as f:
            f.write(json.dumps(value, indent=2) + "\n")
        os.replace(path + ".tmp", path)


def train(args):
    device = args.device
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.out)
    c = Config(
        vocab_size=tokenizer.get_piece_size(),
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        intermediate_size=3 * args.hidden,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
    )
    model = Llama(c).to(device)
    opts, rng = make_optimizers(model, args), random.Random(args.seed)
    s = start(model, opts, rng, args)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters on {device}",
        flush=True,
    )
    last_log = last_save = time.time()
    losses, stop = [], []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))  # asked to end: save first
    while s["seconds"] < args.minutes * 60 and s["step"] < args.steps and not stop:
        begun = time.time()
        stage, (rows, weights, answers) = next_batch(rng, c, tokenizer, s["stage"], args)
        ids = torch.tensor(rows, device=device)
        weight = torch.tensor(weights, device=device)[:, 1:].flatten()
        n_local = args.local_layers if rng.random() < args.local else 0
        set_rates(opts, s, args)
        right, loss = step(model, opts, ids, weight, n_local)
        if answers is None:
            count_copies(s, right.flatten()[weight > 0.5].float().mean().item())
        else:
            count_answers(s, stage, answers, right, args)
        losses.append(loss)
        s["step"] += 1
        s["seconds"] += time.time() - begun
        if time.time() - last_log > 20 or s["step"] < 4:
            print_progress(s, losses, time.time() - begun)
            last_log, losses = time.time(), []
        if time.time() - last_save > args.save_minutes * 60:
            save(model, opts, rng, s, args)
            last_save = time.time()
    save(model, opts, rng, s, args)


def make_optimizers(model, args):
    """Muon for the matrices, AdamW for the embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=args.muon_lr, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def start(model, opts, rng, args):
    """What a run counts: afresh, or as --state left it, which also fills model, opts and rng.
    stage -1: copying; passed: running accuracy."""
    s = dict(step=0, stage=-1, passed=0.0, seconds=0.0, acc={})
    if os.path.exists(args.state):
        saved = torch.load(args.state, map_location=args.device, weights_only=True)
        model.load_state_dict(saved["model"])
        for o, d in zip(opts, saved["opts"]):
            o.load_state_dict(d)
        rng.setstate(saved["rng"])
        s = saved["state"]
        print("resumed at", s["step"], s["stage"], flush=True)
    elif args.init:  # weights only: the rates warm up afresh
        model.load_state_dict(load_export(args.init, args.device).state_dict())
        s["stage"] = LENGTHS.index(args.max_length)
    return s


def next_batch(rng, c, tokenizer, stage, args):
    """Copying, the current length, or (a part of the time) a shorter one: the stage of its length, and the batch."""
    if stage < 0:
        return stage, copy_batch(rng, c, args.tokens)
    if rng.random() > args.newest:  # short documents teach more per second
        known = range(min(2, stage), stage + 1)
        stage = rng.choices(known, [LENGTHS[i] ** -0.5 for i in known])[0]
    mix = dict(
        lookalike=args.w_plain, two_hop=args.w_two, three_hop=args.w_three, latest=args.w_latest
    )
    return stage, document_batch(rng, tokenizer, LENGTHS[stage], args.tokens, mix)


def set_rates(opts, s, args):
    """A short warm-up, lower with longer documents, and down to a twentieth over the last part of the time."""
    left = min(1 - s["seconds"] / (args.minutes * 60), 1 - s["step"] / args.steps)
    scale = RATE[max(0, s["stage"])] * min(
        1.0, (s["step"] + 1) / 30, 0.05 + 0.95 * left / args.decay
    )
    for o, lr in zip(opts, (args.muon_lr, args.adam_lr)):
        o.param_groups[0]["lr"] = lr * scale


def step(model, opts, ids, weight, n_local):
    """One step of both optimizers: where the likeliest token was the right one [B, T-1], and the loss."""
    model.train()
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        logits = model(ids[:, :-1], n_local=n_local)
    target = ids[:, 1:].flatten()
    logits = logits.flatten(0, 1).float()
    loss_each = F.cross_entropy(logits, target, reduction="none")
    loss = (loss_each * weight).sum() / weight.sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(opts[1].param_groups[0]["params"], 1.0)
    for o in opts:
        o.step()
        o.zero_grad(set_to_none=True)
    return (logits.argmax(-1) == target).view(len(ids), -1), loss.item()


def count_copies(s, hit):
    """Go on from copying to documents once it works."""
    s["passed"] = 0.8 * s["passed"] + 0.2 * hit
    if s["passed"] > 0.85:
        s["stage"], s["passed"] = 0, 0.0
        print(f"step {s['step']}: copying works", flush=True)


def count_answers(s, stage, answers, right, args):
    """Accuracy by kind, and the next length when this one is mastered."""
    first = []
    for row, a, b, kind, fresh in answers:
        if not fresh:
            continue
        exact = bool(right[row, a - 1 : b - 1].all())
        if kind in ("lookalike", "single"):
            first.append(bool(right[row, a]))  # the token after the space
        key = f"{LENGTHS[stage]}/{kind}"
        s["acc"][key] = 0.97 * s["acc"].get(key, exact) + 0.03 * exact
    if stage == s["stage"] and first:
        s["passed"] = 0.9 * s["passed"] + 0.1 * sum(first) / len(first)
        if s["passed"] > PASS[s["stage"]] and s["stage"] < LENGTHS.index(args.max_length):
            s["stage"], s["passed"] = s["stage"] + 1, 0.5
            minutes = s["seconds"] / 60
            print(
                f"step {s['step']}: on to {LENGTHS[s['stage']]} tokens after {minutes:.1f} min",
                flush=True,
            )


def print_progress(s, losses, seconds):
    now = LENGTHS[max(0, s["stage"])]
    lengths = LENGTHS[2 : max(0, s["stage"]) + 1]
    accs = " ".join(
        k + "=" + "/".join(f"{100 * s['acc'].get(f'{n}/{k}', 0):.0f}" for n in lengths)
        for k in ("single", "lookalike", "two_hop", "three_hop", "latest")
    )
    print(
        f"{s['seconds'] / 60:6.1f} min step {s['step']} stage {now if s['stage'] >= 0 else 'copy'} "
        f"loss {sum(losses) / len(losses):.3f} first {s['passed']:.3f} {accs} {seconds:.2f}s",
        flush=True,
    )


def save(model, opts, rng, s, args):
    export(model, args)
    torch.save(
        dict(
            model=model.state_dict(),
            opts=[o.state_dict() for o in opts],
            rng=rng.getstate(),
            state=s,
        ),
        args.state + ".tmp",
    )
    os.replace(args.state + ".tmp", args.state)


def load_tokenizer(folder):
    import sentencepiece as spm

    path = os.path.join(folder, "tokenizer.model")
    if not os.path.exists(path):
        import train_tokenizer

        os.makedirs(folder, exist_ok=True)
        train_tokenizer.train(path)
    return spm.SentencePieceProcessor(model_file=path)


# --- evaluation ------------------------------------------------------------------------


def load_export(folder, device="cpu"):
    from safetensors.torch import load_file

    with open(os.path.join(folder, "config.json")) as f:
        config = json.load(f)
    model = Llama(Config(**{k: config[k] for k in Config.__dataclass_fields__}))
    model.load_state_dict(
        {k: v.float() for k, v in load_file(os.path.join(folder, "model.safetensors")).items()}
    )
    return model.to(device).eval()


@torch.no_grad()
def score(model, sample, tokenizer, device="cpu"):
    """How many questions get exactly the right greedy answer, end of line included. The
    document is read once; each question is then asked by itself. One pass over question
    and answer suffices: the greedy answer is the right one just when each of its tokens is
    the likeliest after those before it."""
    with torch.autocast(device, dtype=torch.bfloat16):
        document = torch.tensor([[1] + tokenizer.encode(sample.document + "\n")], device=device)
        read = [[] for _ in model.model.layers]
        model(document, caches=read)
        hits = 0
        for q in sample.questions:
            question = tokenizer.encode("question: " + q.text)
            answer = tokenizer.encode(" " + q.answer + "\n")
            ids = torch.tensor([question + answer], device=device)
            positions = torch.arange(ids.shape[1], device=device) + document.shape[1]
            best = model(ids[:, :-1], positions[:-1], caches=[list(c) for c in read]).argmax(-1)
            hits += best[0, len(question) - 1 :].tolist() == answer
    return hits


def evaluate(args):
    tokenizer, model = load_tokenizer(args.out), load_export(args.out, args.device)
    print("| kind | " + " | ".join(f"{n:,}" for n in args.eval_lengths) + " |")
    print("|---" * (1 + len(args.eval_lengths)) + "|", flush=True)
    for kind in args.eval_kinds:
        cells = []
        for length in args.eval_lengths:
            per, hits, asked, seed = args.per_document, 0, 0, 10**6
            while asked < args.questions:
                s = tasks.make(kind, length, seed, tokenizer, per, n_facts=args.facts)
                hits, asked, seed = (
                    hits + score(model, s, tokenizer, args.device),
                    asked + per,
                    seed + 1,
                )
            cells.append(f"{100 * hits / asked:.1f}")
        print(f"| {kind} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("--out", default="export")
    p.add_argument("--state", default="state.pt")
    p.add_argument("--init", help="go on from the weights of this export, at the longest length")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--seed", type=int, default=0)
    # the model
    p.add_argument("--hidden", type=int, default=128)
    p.add_argument("--layers", type=int, default=8)
    p.add_argument("--heads", type=int, default=4)
    p.add_argument("--kv_heads", type=int, default=2)
    # the run
    p.add_argument("--minutes", type=float, default=82)
    p.add_argument("--steps", type=int, default=10**9)
    p.add_argument("--tokens", type=int, default=5400)
    p.add_argument("--max_length", type=int, default=8192)
    p.add_argument("--muon_lr", type=float, default=0.02)
    p.add_argument("--adam_lr", type=float, default=0.004)
    p.add_argument("--decay", type=float, default=0.4)
    p.add_argument("--save_minutes", type=float, default=5)
    # what the model learns
    p.add_argument(
        "--local",
        type=float,
        default=0.8,
        help="part of the steps in which the first layers are local",
    )
    p.add_argument("--local_layers", type=int, default=3)
    p.add_argument(
        "--newest",
        type=float,
        default=0.1,
        help="part of the steps with the longest documents so far",
    )
    p.add_argument("--w_plain", type=float, default=1.0)
    p.add_argument("--w_two", type=float, default=0.5)
    p.add_argument("--w_three", type=float, default=0.2)
    p.add_argument("--w_latest", type=float, default=0.5)
    p.add_argument("--eval", action="store_true")
    p.add_argument("--eval_lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    p.add_argument("--eval_kinds", nargs="+", default=tasks.KINDS)
    p.add_argument("--questions", type=int, default=100)
    p.add_argument("--per_document", type=int, default=10, help="questions about each document")
    p.add_argument("--facts", type=int, help="facts in a document (default: by kind and length)")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    evaluate(args) if args.eval else train(args)
