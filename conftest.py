"""What tests of all folders share: tiny checkpoints of every family, real models, conversations."""

import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import planning.checkpoint
import planning.memory
import prune
import slim

torch.set_num_threads(1)  # tests run in several processes

HERE = Path(__file__).parent
# what tests keep about models is theirs alone
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="slim-cache-")
DATA = Path(os.environ.get("SLIM_TEST_DATA", HERE / "no-data"))

needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"$SLIM_TEST_DATA does not name a folder with goldens ({DATA})"
)

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device on this machine"
)

DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]

ATOL = {  # largest difference of a logit of order 1 from transformers in float32
    torch.float32: 1e-4,  # another order of summation
    torch.float16: 3e-2,  # 11 bits of weight over some 10 roundings in a row
    torch.bfloat16: 2e-1,  # 8 bits
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}

YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 128,
}

FAMILIES = {
    "llama2-mha": dict(num_key_value_heads=4),
    "llama3-gqa": dict(num_key_value_heads=2, rope_theta=500000.0),
    "llama3.1-rope": dict(
        num_key_value_heads=2, rope_parameters={**LLAMA3_ROPE, "rope_theta": 500000.0}
    ),
    "llama3.2-tied": dict(num_key_value_heads=1, tie_word_embeddings=True),
    "head-dim": dict(num_key_value_heads=2, head_dim=16),
    "linear-rope": dict(
        num_key_value_heads=2,
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    ),
    "qwen2-bias": dict(num_key_value_heads=2, kind="Qwen2"),
    "qwen3": dict(num_key_value_heads=2, kind="Qwen3", head_dim=16),
    "qwen3-bias": dict(num_key_value_heads=2, kind="Qwen3", head_dim=16, attention_bias=True),
    "mistral": dict(num_key_value_heads=2, kind="Mistral", head_dim=16, sliding_window=None),
    "ministral3": dict(
        num_key_value_heads=2,
        kind="Ministral3",
        head_dim=16,
        rope_parameters={
            **YARN_ROPE,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.3,
        },
    ),
    "smollm3": dict(
        num_key_value_heads=2, kind="SmolLM3", no_rope_layer_interval=2, tie_word_embeddings=False
    ),
    "smollm3-list": dict(num_key_value_heads=2, kind="SmolLM3", no_rope_layers=[0, 1, 1, 0, 1]),
    "phi3": dict(num_key_value_heads=2, kind="Phi3", original_max_position_embeddings=4096),
    "phi3-longrope": dict(
        num_key_value_heads=2,
        kind="Phi3",
        hidden_size=64,
        initializer_range=0.15,
        tie_word_embeddings=True,
        original_max_position_embeddings=64,
        partial_rotary_factor=0.75,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 2.0],
            "long_factor": [1.0, 1.5, 3.0, 9.0, 20.0, 40.0],
        },
    ),
    "yarn": dict(num_key_value_heads=2, rope_parameters=YARN_ROPE),
    "yarn-all-keys": dict(
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters={
            **YARN_ROPE,
            "beta_fast": 9.0,
            "beta_slow": 0.5,
            "mscale": 0.707,
            "mscale_all_dim": 1.5,
            "truncate": False,
        },
    ),
    "yarn-attention-factor": dict(
        num_key_value_heads=2, rope_parameters={**YARN_ROPE, "attention_factor": 1.7}
    ),
}


SLIM = dict(device="cpu", schedule={1: 64, 3: 32}, block_len=8, unit_len=4)
MASS = prune.Rule("mass", lambda weights: weights.mean(1).sum(-1), every_layer=False)


def make_checkpoint(folder, family="llama3-gqa", layers=5, vocab=64, dtype=torch.float32, seed=0):
    """Save a random checkpoint; return the transformers model.

    Weights are large, so that attention is not flat.
    """
    options = dict(FAMILIES[family])
    kind = options.pop("kind", "Llama")
    torch.manual_seed(seed)
    shape = dict(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=4096,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.3,
    )
    config = getattr(transformers, kind + "Config")(**shape | options)
    model = getattr(transformers, kind + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "bias" in name or "norm" in name:
                p.add_(0.3 * torch.randn_like(p))
    model.to(dtype).save_pretrained(folder)
    return model.float()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """{family: (folder, transformers model)}"""
    made = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        made[family] = folder, make_checkpoint(folder, family)
    return made


@pytest.fixture(scope="session")
def tiny(checkpoints):
    return checkpoints["llama3-gqa"][0]


def set_free(monkeypatch, n):
    """Let a device have n bytes free."""
    monkeypatch.setattr(planning.memory, "free_bytes", lambda device: n)


def set_lookup_heads(monkeypatch, *heads):
    """Let the probe have found these heads, each a pair (layer, head), in whatever is loaded."""

    def strengths(key, n_layers, n_heads):
        found = torch.zeros(n_layers, n_heads)
        for head in heads:
            found[head] = 1.0
        return found

    monkeypatch.setattr(planning.checkpoint, "read_cache", strengths)


def draw(n, seed=0, vocab=64):
    rng = random.Random(seed)
    return [rng.randrange(vocab) for _ in range(n)]


def conversation(engine, prompt, n=30, follow=11):
    """Play prefill, greedy decode and a follow-up; return each step's logits, and the tokens."""
    logits, tokens = [engine.prefill(prompt)], []
    for _ in range(n):
        tokens.append(int(logits[-1].argmax()))
        logits.append(engine.extend(tokens[-1:]))
    logits.append(engine.extend(draw(follow, seed=5)))
    return torch.stack(logits), tokens


def edit_json(path, **changes):
    value = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in {**value, **changes}.items() if v != "remove"}))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")


@pytest.fixture(scope="session")
def talking(tmp_path_factory):
    """A checkpoint with a tokenizer."""
    from loading.test_vocabulary import trained

    folder = tmp_path_factory.mktemp("talking")
    make_checkpoint(folder, vocab=trained("gpt2").get_vocab_size())
    trained("gpt2").save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def smollm2_folder():
    """A real model where it is at hand, folder or GGUF file; with SLIM_REAL=1 it is fetched."""
    from bench import checkpoints

    fetch = os.environ.get("SLIM_REAL") == "1"
    try:
        return checkpoints.find_or_fetch(checkpoints.SMOLLM2, fetch)
    except OSError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium by its driver, or a skip that says what is missing."""
    webdriver = pytest.importorskip(
        "selenium.webdriver", reason="selenium is not installed: no page is opened in a browser"
    )
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip(f"no Chromium to open pages in (chromium: {chromium}, chromedriver: {driver})")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as chrome:
        chrome.set_page_load_timeout(60)
        yield chrome


def load_three_stages(folder, device="cpu", score="peak", **settings):
    """Load a pruning engine with small blocks."""
    schedule = {1: 64, 2: 40, 3: 24}
    options = dict(block_len=8, unit_len=4) | settings
    return slim.load(folder, device, "float32", schedule, score, **options)


def go_on(engine, ids, steps=12):
    """Return the logits of a follow-up and of greedy steps after it."""
    seen = [engine.extend(ids)]
    while len(seen) < steps:
        seen.append(engine.extend([int(seen[-1].argmax())]))
    return torch.stack(seen)


def newest_of_weights(weights):  # (W, H, N, B)
    return torch.arange(weights.shape[2]).float().expand(weights.shape[0], -1)
