"""Trains the demo model: a small LLaMA that answers questions about long documents.

    python train.py --out export                     # trains, or resumes, on CPU or CUDA
    python train.py --out export --eval              # accuracy by kind and length

Training needs torch 2.9 or newer, for Muon; --eval does not.

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
import sys
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
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.q_proj = nn.Linear(
            config.hidden_size, config.num_attention_heads * config.head_dim, bias=False
        )
        self.k_proj = nn.Linear(
            config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False
        )
        self.v_proj = nn.Linear(
            config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False
        )
        self.o_proj = nn.Linear(
            config.num_attention_heads * config.head_dim, config.hidden_size, bias=False
        )

    def forward(self, x, rope, window, cache):
        B, T, _ = x.shape
        D = self.config.head_dim
        q = rotate(self.q_proj(x).view(B, T, -1, D).transpose(1, 2), rope)  # (B, H, T, D)
        k = rotate(self.k_proj(x).view(B, T, -1, D).transpose(1, 2), rope)
        v = self.v_proj(x).view(B, T, -1, D).transpose(1, 2)
        past = 0
        if cache is not None:  # [keys, values] of this layer; filled on first use
            if cache:
                past = cache[0].shape[2]
                k = torch.cat((cache[0], k), 2)
                v = torch.cat((cache[1], v), 2)
            cache[:] = [k, v]
        groups = self.config.num_attention_heads // self.config.num_key_value_heads
        k = k.repeat_interleave(groups, 1)
        v = v.repeat_interleave(groups, 1)
        if window and window < T:
            out = windowed_attention(q, k, v, window)
        elif past:
            mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


def rotate(x, rope):
    cos, sin = rope
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


def windowed_attention(q, k, v, W):
    """Each token sees itself and the W-1 before it: N blocks of W queries against 2W keys."""
    B, H, T, D = q.shape
    N = -(-T // W)

    def in_blocks(x):  # (B, H, T, D) -> (B, H, N, W, D)
        return F.pad(x, (0, 0, 0, N * W - T)).view(B, H, N, W, D)

    def with_previous(x):  # -> (B, H, N, 2W, D)
        previous = F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1]
        return torch.cat((previous, x), 3)

    def as_batch(x):  # -> (B*N, H, W or 2W, D)
        return x.transpose(1, 2).reshape(B * N, H, -1, D)

    query = torch.arange(W, device=q.device)[:, None] + W
    key = torch.arange(2 * W, device=q.device)[None]
    mask = ((key <= query) & (key > query - W)).expand(N, W, 2 * W).clone()
    mask[0, :, :W] = False  # nothing lies before the first block
    q = as_batch(in_blocks(q))
    k = as_batch(with_previous(in_blocks(k)))
    v = as_batch(with_previous(in_blocks(v)))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat(B, 1, 1)[:, None])
    return out.view(B, N, H, W, D).transpose(1, 2).reshape(B, H, N * W, D)[:, :, :T]


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config)
        self.post_attention_layernorm = RMSNorm(config)

    def forward(self, x, rope, window=None, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, window, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config)
        for name, matrix in self.named_parameters():
            if matrix.dim() == 2:
                small = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(2 * config.num_hidden_layers) if small else 0.02
                nn.init.normal_(matrix, std=std)
        # The output layer is the embedding (tie_word_embeddings): its rows get a unit scale.
        nn.init.normal_(self.model.embed_tokens.weight, std=0.05)

    def forward(self, ids, positions=None, n_local=0, window=64, caches=None):
        """Logits [B, T, vocab]. positions: [T]. The first n_local layers see a window only.
        caches: a list per layer, to go on from an earlier call."""
        T = ids.shape[1]
        D = self.config.head_dim
        if positions is None:
            positions = torch.arange(T, device=ids.device)
        frequencies = self.config.rope_theta ** (
            -torch.arange(0, D, 2, device=ids.device).float() / D
        )
        angle = torch.cat([positions[:, None].float() * frequencies] * 2, -1)  # (T, D)
        rope = (angle.cos(), angle.sin())
        x = self.model.embed_tokens(ids)
        for i, layer in enumerate(self.model.layers):
            cache = None if caches is None else caches[i]
            x = layer(x, rope, window if i < n_local else None, cache)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)


# --- data ------------------------------------------------------------------------------

LENGTHS = [96, 160, 256, 512, 1024, 2048, 4096, 8192]
# first-token accuracy at which the next length begins
PASS = [0.6, 0.7, 0.8, 0.9, 0.87, 0.9, 0.9, 1.1]
# The rate of each length, as a part of the first: with long documents attention has to be
# sharp, and a high rate blurs it (one wrong digit out of four).
RATE = [1.0, 1.0, 1.0, 0.75, 0.6, 0.35, 0.35, 0.35]


def questions_for(length):
    return max(8, min(40, length // 24))


def copy_batch(rng, config, n_tokens):
    """Random sequences, each given twice: the second time every token can be copied."""
    rows = []
    weights = []
    half = rng.choice([24, 48, 96])
    for _ in range(max(1, n_tokens // (2 * half))):
        row = [rng.randrange(3, config.vocab_size) for _ in range(half)] * 2
        rows.append(row)
        weights.append([0.0] * half + [1.0] * half)
    return rows, weights, None


def document_batch(rng, tokenizer, length, n_tokens, mix):
    """Documents with several questions each, filled up to one length. Also returns where
    the answers lie: (row, start, end, kind, asked for the first time)."""
    rows = []
    weights = []
    answers = []
    while not rows or (len(rows) + 1) * max(map(len, rows)) <= n_tokens:
        sample = draw_sample(rng, tokenizer, length, mix)
        ids, where = tasks.build_ids(sample, tokenizer)
        seen = set()
        for (start, end), question in zip(where, sample.questions):
            fresh = question.text not in seen  # a repeated question can be copied
            seen.add(question.text)
            answers.append((len(rows), start, end, question.kind, fresh))
        rows.append(ids)
        weights.append(token_weights(tokenizer, ids, where, sample.questions))
    longest = max(map(len, rows))
    weights = [row + [0.0] * (longest - len(row)) for row in weights]
    rows = [row + [2] * (longest - len(row)) for row in rows]
    return rows, weights, answers


def draw_sample(rng, tokenizer, length, mix):
    """A document and its questions. Short documents train the bare look-up first; the other
    kinds need it."""
    kind = "lookalike"
    if rng.random() < (0.25 if length < 256 else 0.7):
        kind = "mixed"
    elif rng.random() < 0.2:
        kind = "single"
    most = max(4, min(64, length // 24))
    n_facts = 4 if kind == "single" else rng.randint(max(4, most // 3), most)
    seed = rng.getrandbits(40)
    n_questions = questions_for(length)
    return tasks.make(kind, length, seed, tokenizer, n_questions, n_facts=n_facts, weights=mix)


def token_weights(tokenizer, ids, where, questions):
    """How much each token counts. Where a name or number begins, something has to be found:
    that counts most."""
    space = tokenizer.piece_to_id("\u2581")
    weights = [0.05] * len(ids)
    for (start, end), question in zip(where, questions):
        for i in range(start + 1, end):  # the first space is no news
            weights[i] = 1.0 if len(question.fact_spans) == 1 else 2.0
            if ids[i - 1] == space:
                weights[i] = 3.0
    return weights


# --- training --------------------------------------------------------------------------


def export(model, args):
    """Writes the checkpoint in the usual LLaMA layout; each file appears whole or not at all."""
    from safetensors.torch import save_file

    os.makedirs(args.out, exist_ok=True)
    tensors = {}
    for name, weight in model.state_dict().items():
        tensors[name] = weight.detach().to("cpu", torch.bfloat16).contiguous()
    path = os.path.join(args.out, "model.safetensors")
    save_file(tensors, path + ".tmp", metadata={"format": "pt"})
    os.chmod(path + ".tmp", 0o644)
    os.replace(path + ".tmp", path)
    config = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        **asdict(model.config),
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
        with open(path + ".tmp", "w") as file:
            file.write(json.dumps(value, indent=2) + "\n")
        os.replace(path + ".tmp", path)


def train(args):
    device = args.device
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.out)
    config = Config(
        vocab_size=tokenizer.get_piece_size(),
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        intermediate_size=3 * args.hidden,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
    )
    model = Llama(config).to(device)
    opts = make_optimizers(model, args)
    rng = random.Random(args.seed)
    state = start(model, opts, rng, args)
    size = sum(weight.numel() for weight in model.parameters())
    print(f"{size / 1e6:.2f}M parameters on {device}", flush=True)
    last_log = time.time()
    last_save = last_log
    losses = []
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))  # asked to end: save first
    while state["seconds"] < args.minutes * 60 and state["step"] < args.steps and not stop:
        begun = time.time()
        stage, (rows, weights, answers) = next_batch(rng, config, tokenizer, state["stage"], args)
        ids = torch.tensor(rows, device=device)
        weight = torch.tensor(weights, device=device)[:, 1:].flatten()
        n_local = args.local_layers if rng.random() < args.local else 0
        set_rates(opts, state, args)
        right, loss = step(model, opts, ids, weight, n_local)
        if answers is None:
            count_copies(state, right.flatten()[weight > 0.5].float().mean().item())
        else:
            count_answers(state, stage, answers, right, args)
        losses.append(loss)
        state["step"] += 1
        state["seconds"] += time.time() - begun
        if time.time() - last_log > 20 or state["step"] < 4:
            print_progress(state, losses, time.time() - begun)
            last_log = time.time()
            losses = []
        if time.time() - last_save > args.save_minutes * 60:
            save(model, opts, rng, state, args)
            last_save = time.time()
    save(model, opts, rng, state, args)


def make_optimizers(model, args):
    """Muon for the matrices, AdamW for the embedding and the norms."""
    if not hasattr(torch.optim, "Muon"):
        print("train.py: error: training needs torch 2.9 or newer, for Muon", file=sys.stderr)
        raise SystemExit(2)
    matrices = []
    others = []
    for name, weight in model.named_parameters():
        is_matrix = weight.dim() == 2 and "embed" not in name
        (matrices if is_matrix else others).append(weight)
    return [
        torch.optim.Muon(matrices, lr=args.muon_lr, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def start(model, opts, rng, args):
    """What a run counts: afresh, or as --state left it, which also fills model, opts and rng.
    stage -1: copying; passed: running accuracy."""
    state = dict(step=0, stage=-1, passed=0.0, seconds=0.0, acc={})
    if os.path.exists(args.state):
        saved = torch.load(args.state, map_location=args.device, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, values in zip(opts, saved["opts"]):
            optimizer.load_state_dict(values)
        rng.setstate(saved["rng"])
        state = saved["state"]
        print("resumed at", state["step"], state["stage"], flush=True)
    elif args.init:  # weights only: the rates warm up afresh
        model.load_state_dict(load_export(args.init, args.device).state_dict())
        state["stage"] = LENGTHS.index(args.max_length)
    return state


def next_batch(rng, config, tokenizer, stage, args):
    """The stage of a length, and a batch: of copies, of the current length or of a shorter one."""
    if stage < 0:
        return stage, copy_batch(rng, config, args.tokens)
    if rng.random() > args.newest:  # short documents teach more per second
        known = range(min(2, stage), stage + 1)
        stage = rng.choices(known, [LENGTHS[i] ** -0.5 for i in known])[0]
    mix = dict(
        lookalike=args.w_plain, two_hop=args.w_two, three_hop=args.w_three, latest=args.w_latest
    )
    return stage, document_batch(rng, tokenizer, LENGTHS[stage], args.tokens, mix)


def set_rates(opts, state, args):
    """A short warm-up, lower with longer documents, and down to a twentieth towards the end."""
    left = min(1 - state["seconds"] / (args.minutes * 60), 1 - state["step"] / args.steps)
    warm_up = (state["step"] + 1) / 30
    decay = 0.05 + 0.95 * left / args.decay
    scale = RATE[max(0, state["stage"])] * min(1.0, warm_up, decay)
    for optimizer, rate in zip(opts, (args.muon_lr, args.adam_lr)):
        optimizer.param_groups[0]["lr"] = rate * scale


def step(model, opts, ids, weight, n_local):
    """One step of both optimizers: where the likeliest token is right (B, T-1), and the loss."""
    model.train()
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        logits = model(ids[:, :-1], n_local=n_local)
    target = ids[:, 1:].flatten()
    logits = logits.flatten(0, 1).float()
    loss_each = F.cross_entropy(logits, target, reduction="none")
    loss = (loss_each * weight).sum() / weight.sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(opts[1].param_groups[0]["params"], 1.0)
    for optimizer in opts:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return (logits.argmax(-1) == target).view(len(ids), -1), loss.item()


def count_copies(state, hit):
    """Go on from copying to documents once it works."""
    state["passed"] = 0.8 * state["passed"] + 0.2 * hit
    if state["passed"] > 0.85:
        state["stage"] = 0
        state["passed"] = 0.0
        print(f"step {state['step']}: copying works", flush=True)


def count_answers(state, stage, answers, right, args):
    """Accuracy by kind, and the next length when this one is mastered."""
    first = []  # of plain answers: whether the first token is right
    for row, start, end, kind, fresh in answers:
        if not fresh:
            continue
        exact = bool(right[row, start - 1 : end - 1].all())
        if kind in ("lookalike", "single"):
            first.append(bool(right[row, start]))  # the token after the space
        key = f"{LENGTHS[stage]}/{kind}"
        state["acc"][key] = 0.97 * state["acc"].get(key, exact) + 0.03 * exact
    if stage != state["stage"] or not first:
        return
    state["passed"] = 0.9 * state["passed"] + 0.1 * sum(first) / len(first)
    if state["passed"] > PASS[stage] and stage < LENGTHS.index(args.max_length):
        state["stage"] += 1
        state["passed"] = 0.5
        minutes = state["seconds"] / 60
        length = LENGTHS[state["stage"]]
        print(f"step {state['step']}: on to {length} tokens after {minutes:.1f} min", flush=True)


def print_progress(state, losses, seconds):
    stage = max(0, state["stage"])
    now = LENGTHS[stage] if state["stage"] >= 0 else "copy"
    print(f"{state['seconds'] / 60:6.1f} min step {state['step']} stage {now}", end=" ")
    print(f"loss {sum(losses) / len(losses):.3f} first {state['passed']:.3f}", end=" ")
    for kind in ("single", "lookalike", "two_hop", "three_hop", "latest"):
        found = [state["acc"].get(f"{length}/{kind}", 0) for length in LENGTHS[2 : stage + 1]]
        print(f"{kind}=" + "/".join(f"{100 * share:.0f}" for share in found), end=" ")
    print(f"{seconds:.2f}s", flush=True)


def save(model, opts, rng, state, args):
    export(model, args)
    everything = {
        "model": model.state_dict(),
        "opts": [optimizer.state_dict() for optimizer in opts],
        "rng": rng.getstate(),
        "state": state,
    }
    torch.save(everything, args.state + ".tmp")
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

    with open(os.path.join(folder, "config.json")) as file:
        config = json.load(file)
    model = Llama(Config(**{name: config[name] for name in Config.__dataclass_fields__}))
    weights = load_file(os.path.join(folder, "model.safetensors"))
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
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
        for asked in sample.questions:
            question = tokenizer.encode("question: " + asked.text)
            answer = tokenizer.encode(" " + asked.answer + "\n")
            ids = torch.tensor([question + answer], device=device)
            positions = torch.arange(ids.shape[1], device=device) + document.shape[1]
            caches = [list(cache) for cache in read]
            best = model(ids[:, :-1], positions[:-1], caches=caches).argmax(-1)
            hits += best[0, len(question) - 1 :].tolist() == answer
    return hits


def evaluate(args):
    tokenizer = load_tokenizer(args.out)
    model = load_export(args.out, args.device)
    print("| kind | " + " | ".join(f"{n:,}" for n in args.eval_lengths) + " |")
    print("|---" * (1 + len(args.eval_lengths)) + "|", flush=True)
    for kind in args.eval_kinds:
        cells = [f"{accuracy(args, model, tokenizer, kind, n):.1f}" for n in args.eval_lengths]
        print(f"| {kind} | " + " | ".join(cells) + " |", flush=True)


def accuracy(args, model, tokenizer, kind, length):
    """Right answers in per cent, of at least --questions."""
    hits = 0
    asked = 0
    seed = 10**6  # training draws others
    while asked < args.questions:
        per = args.per_document
        sample = tasks.make(kind, length, seed, tokenizer, per, n_facts=args.facts)
        hits += score(model, sample, tokenizer, args.device)
        asked += per
        seed += 1
    return 100 * hits / asked


def parse_args():
    p = argparse.ArgumentParser()
    add = p.add_argument
    add("--out", default="export")
    add("--state", default="state.pt")
    add("--init", help="go on from the weights of this export, at the longest length")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=1)
    add("--seed", type=int, default=0)
    # the model
    add("--hidden", type=int, default=128)
    add("--layers", type=int, default=8)
    add("--heads", type=int, default=4)
    add("--kv_heads", type=int, default=2)
    # the run
    add("--minutes", type=float, default=82)
    add("--steps", type=int, default=10**9)
    add("--tokens", type=int, default=5400)
    add("--max_length", type=int, default=8192)
    add("--muon_lr", type=float, default=0.02)
    add("--adam_lr", type=float, default=0.004)
    add("--decay", type=float, default=0.4)
    add("--save_minutes", type=float, default=5)
    # what the model learns
    add("--local", type=float, default=0.8, help="part of the steps with local first layers")
    add("--local_layers", type=int, default=3)
    add("--newest", type=float, default=0.1, help="part of the steps with the longest documents")
    add("--w_plain", type=float, default=1.0)
    add("--w_two", type=float, default=0.5)
    add("--w_three", type=float, default=0.2)
    add("--w_latest", type=float, default=0.5)
    # evaluation
    add("--eval", action="store_true")
    add("--eval_lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    add("--eval_kinds", nargs="+", default=tasks.KINDS)
    add("--questions", type=int, default=100)
    add("--per_document", type=int, default=10, help="questions about each document")
    add("--facts", type=int, help="facts in a document (default: by kind and length)")
    return p.parse_args()


if __name__ == "__main__":
    args = parse_args()
    torch.set_num_threads(args.threads)
    evaluate(args) if args.eval else train(args)
