"""What is decided before anything is allocated: device, dtype, schedule, rule."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

import prune
from loading.config import read_config
from loading.find import find_checkpoint
from loading.vocabulary import stop_tokens
from loading.weights import check_tensors, fingerprint, open_shards, settle_head
from model import DTYPES, Config
from planning.schedule import format_schedule, resolve_schedule
from planning.settings import Settings


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint and how it is to be run: all of it checked, none of it loaded."""

    folder: Path
    config: Config
    tensors: dict  # name -> open file
    stop: set[int]  # ids that end an answer
    device: torch.device
    dtype: torch.dtype
    schedule: dict[int, prune.Budget]
    rule: prune.Rule
    settings: Settings

    @staticmethod
    def open(
        ckpt, device="auto", dtype="auto", schedule="auto", score="peak", **settings
    ) -> "Checkpoint":
        """Find a checkpoint and check it, its tensors and the settings; see `slim.load`."""
        options, rule, device = Settings(**settings), pick_rule(score), pick_device(device)
        folder = find_checkpoint(ckpt)
        config = read_config(folder / "config.json", options.rope_yarn)
        dtype, schedule = (
            pick_dtype(dtype, config, device),
            resolve_schedule(schedule, config, options.block_len),
        )
        tensors = open_shards(folder)
        config = settle_head(config, tensors)
        check_tensors(folder, config, tensors)
        stop = stop_tokens(folder, config.vocab_size)
        return Checkpoint(folder, config, tensors, stop, device, dtype, schedule, rule, options)

    @property
    def identity(self) -> dict:
        """What a saved conversation depends on: settings, schedule, dtype, rule and weights."""
        return {
            "block_len": self.settings.block_len,
            "unit_len": self.settings.unit_len,
            "chunk": self.chunk,
            "window": self.window,
            "gamma": self.gamma,
            "schedule": format_schedule(self.schedule),
            "dtype": dtype_name(self.dtype),
            "score": self.rule.name,
            "sees": self.rule.sees,
            "every_layer": self.rule.every_layer,
            "rope_yarn": self.settings.rope_yarn,
            "weights": self.weights_hash,
        }

    @cached_property
    def weights_hash(self) -> str:
        return fingerprint(self.config, self.tensors)

    @property
    def aux_dim(self) -> int:
        return self.config.dim

    @property
    def chunk(self) -> int:
        return self.settings.chunk or (2048 if self.device.type == "cuda" else 1024)

    @property
    def window(self) -> int:
        return self.settings.window or self.rule.window

    @property
    def gamma(self) -> float:
        return self.rule.gamma if self.settings.gamma == -1 else self.settings.gamma


def pick_device(name: str) -> torch.device:
    """Return the torch device for auto, cpu, cuda or cuda:N; raise ValueError if it is unknown or absent."""
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda:0" if cuda else "cpu")
    kind, _, number = str(name).partition(":")
    digits = (number or "0").isascii() and (number or "0").isdigit()
    if kind not in ("cpu", "cuda") or (kind == "cpu" and number) or not digits:
        raise ValueError(f"--device {name!r} is unknown; use auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(number or 0) >= cuda:
        raise ValueError(
            f"--device {name!r}: this machine has {cuda} CUDA devices that torch can use; try --device cpu"
        )
    return torch.device("cpu" if kind == "cpu" else f"cuda:{number or 0}")


def pick_dtype(name: str, config: Config, device: torch.device) -> torch.dtype:
    """Return the dtype of a run; auto is the checkpoint's own, but float32 on a CPU that is slow in half precision."""
    if not isinstance(name, str) or name != "auto" and name not in DTYPES:
        raise ValueError(f"--dtype {name!r} is unknown; use auto, {', '.join(DTYPES)}")
    dtype = config.dtype if name == "auto" else DTYPES[name]
    if dtype == torch.float64 and device.type == "cuda":
        raise ValueError(
            "--dtype float64 is for exactness tests on a CPU; use float32, bfloat16 or float16 on CUDA"
        )
    slow = dtype == torch.float16 or dtype == torch.bfloat16 and not multiplies_bfloat16()
    return torch.float32 if name == "auto" and device.type == "cpu" and slow else dtype


def multiplies_bfloat16() -> bool:
    """Say whether this CPU has instructions for bfloat16; without them a prefill takes about six times as long."""
    known = getattr(torch.cpu, "get_capabilities", dict)()  # newer than the oldest torch we run on
    return not known or any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def pick_rule(score) -> prune.Rule:
    """Return the named rule, a Rule unchanged, or a nameless Rule around a function of weights."""
    if isinstance(score, prune.Rule):
        if score.name in prune.RULES and score.score is not prune.RULES[score.name].score:
            raise ValueError(
                f"a rule of your own cannot have the name of a built-in one, {score.name!r}; rename it"
            )
        return score
    if isinstance(score, str) and score in prune.RULES:
        return prune.RULES[score]
    if callable(score) and not isinstance(score, type):
        return prune.Rule("", score)
    known = ", ".join(prune.RULES)
    raise ValueError(
        f"--score {score!r:.60} is unknown; use {known}; from Python also a function or a prune.Rule"
    )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
