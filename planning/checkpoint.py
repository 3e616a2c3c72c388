"""What is decided before anything is allocated: device, dtype, schedule, rule."""

import math
import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

import prune
from loading.config import read_config
from loading.find import find_checkpoint
from loading.vocabulary import stop_tokens
from loading.weights import (
    MappedFile,
    check_tensors,
    exact_groups,
    fingerprint,
    open_shards,
    settle_head,
    stored,
    weight_bytes,
)
from model import DTYPES, LAST_ROWS, Config, Local
from planning.probe import can_rank, lookup_heads, names, read_cache
from planning.schedule import format_schedule, resolve_schedule
from planning.settings import LOCAL_WINDOW, Settings


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint and how it is to be run: all of it checked, none of it loaded."""

    folder: Path
    config: Config
    tensors: dict[str, MappedFile]
    stop: set[int]  # ids that end an answer
    device: torch.device
    dtype: torch.dtype
    schedule: dict[int, prune.Budget]
    rule: prune.Rule
    settings: Settings
    asked_schedule: object  # as it was asked for, such as "auto"
    asked_rule: prune.Rule
    # of all heads (L, H), once the probe has measured them
    strengths: Tensor | None = field(compare=False)
    # {tensor: columns of a group} whose 4-bit numbers can stay; scales are rounded to bfloat16
    exact: dict[str, int] = field(default_factory=dict, kw_only=True)

    @staticmethod
    def open(
        ckpt, device="auto", dtype="auto", schedule="auto", score="lookup", **settings
    ) -> "Checkpoint":
        """Find a checkpoint and check it, its tensors and the settings; see `slim.load`."""
        options = Settings(**settings)
        rule = pick_rule(score)
        device = pick_device(device)
        folder = find_checkpoint(ckpt)
        config = read_config(folder / "config.json", options.rope_yarn)
        dtype = pick_dtype(dtype, config, device)
        check_packing(options.weights, dtype)
        budgets = resolve_schedule(schedule, config, options.block_len)
        tensors = open_shards(folder)
        config = settle_head(config, tensors)
        check_tensors(folder, config, tensors)
        opened = Checkpoint(
            folder=folder,
            config=config,
            tensors=tensors,
            stop=stop_tokens(folder, config.vocab_size),
            device=device,
            dtype=dtype,
            schedule=budgets,
            rule=rule,
            settings=options,
            asked_schedule=schedule,
            asked_rule=rule,
            strengths=None,
            exact=exact_groups(config, tensors),
        )
        opened = opened.with_schedule(schedule)
        if not opened.needs_probe:
            return opened
        return opened.with_strengths(read_cache(opened.probe_key, config.n_layers, config.n_heads))

    @property
    def needs_probe(self) -> bool:
        """Whether the run depends on the lookup heads, and they are not known yet."""
        by_heads = self.asked_rule.sees == "lookup" and self.asked_rule.heads is None
        return by_heads and self.strengths is None and bool(self.schedule)

    @property
    def probe_key(self) -> str:
        """Name the weights and what else changes the strengths of heads a little."""
        yarn = f"-yarn{self.settings.rope_yarn:g}" if self.settings.rope_yarn else ""
        kind = "" if self.kept_as == "full" else f"-{self.kept_as}"
        return f"{self.weights_hash}-{dtype_name(self.dtype)}{kind}{yarn}"

    def with_strengths(self, strengths: Tensor | None) -> "Checkpoint":
        """Return the run once the strengths of its heads (L, H) are known; None: they are not."""
        return replace(self, strengths=strengths).with_schedule(self.asked_schedule)

    def with_schedule(self, schedule) -> "Checkpoint":
        """Return the run by another schedule, with the rule that ranks its blocks.

        Where too few lookup heads lie below the first boundary, `peak` of all heads ranks them.
        """
        budgets = resolve_schedule(schedule, self.config, self.settings.block_len, self.strengths)
        rule = self.asked_rule
        if rule.heads is not None:
            self.check_heads(rule, budgets)
        elif rule.sees == "lookup" and self.strengths is not None and budgets:
            rule = replace(rule, heads=self.heads_below(max(budgets)))
            if not can_rank(self.strengths, min(budgets)):
                rule = self.without_heads(min(budgets))
        return replace(self, schedule=budgets, rule=rule, asked_schedule=schedule)

    def without_heads(self, boundary: int) -> prune.Rule:
        """Return what ranks blocks in place of the rule named lookup; no other is replaced."""
        name = self.asked_rule.name
        if name != "lookup":
            raise ValueError(
                f"rule {name!r:.60} sees lookup heads, and too few of this model's lie below "
                f"boundary {boundary}; give it heads, or set a later boundary"
            )
        return prune.RULES["peak"]

    def heads_below(self, boundary: int) -> tuple[tuple[int, ...], ...]:
        """Return each layer's lookup heads; none above the last boundary, as none ranks there."""
        heads = lookup_heads(self.strengths)
        return heads[:boundary] + ((),) * (len(heads) - boundary)

    def check_heads(self, rule: prune.Rule, budgets: dict) -> None:
        """Raise ValueError unless a rule's own heads are this model's, and some can rank."""
        n_layers = self.config.n_layers
        last = max((head for found in rule.heads for head in found), default=0)
        if len(rule.heads) != n_layers or last >= self.config.n_heads:
            raise ValueError(
                f"rule {rule.name!r:.60}: heads has {len(rule.heads)} layers and numbers up to "
                f"{last}; the model has {n_layers} layers of {self.config.n_heads} heads"
            )
        for boundary in budgets:
            start = 0 if rule.every_layer else boundary - 1
            if not any(rule.heads[start:boundary]):
                raise ValueError(
                    f"rule {rule.name!r:.60}: no head of layers {start}..{boundary - 1} ranks the "
                    f"blocks for boundary {boundary}; add one, or set a later boundary"
                )

    @property
    def heads(self) -> list[str]:
        """The lookup heads that rank the blocks, as "layer.head"; none if all heads do."""
        if self.rule.heads is None:
            return []
        if self.strengths is None:  # a rule with heads of its own
            return names(self.rule.heads)
        return names(self.heads_below(max(self.schedule)))

    @property
    def identity(self) -> dict:
        """What a saved conversation depends on: settings, schedule, dtype, rule and weights."""
        return {
            "block_len": self.settings.block_len,
            "unit_len": self.settings.unit_len,
            "chunk": self.chunk,
            "window": self.window,
            "gamma": self.gamma,
            "local_window": self.local.window,
            "sinks": self.local.sinks,
            "schedule": format_schedule(self.schedule),
            "dtype": dtype_name(self.dtype),
            "kept_as": self.kept_as,
            "score": self.rule.name,
            "sees": self.rule.sees,
            "heads": " ".join(self.heads),
            "every_layer": self.rule.every_layer,
            "recent": str(self.rule.recent),
            "revive_margin": self.rule.revive_margin,
            "revive_at_most": self.rule.revive_at_most,
            "rope_yarn": self.settings.rope_yarn,
            "weights": self.weights_hash,
        }

    @cached_property
    def weights_hash(self) -> str:
        return fingerprint(self.config, self.tensors)

    @property
    def kept_as(self) -> str:
        """How matrices stay: full, int8, int4, or file: in 4 bits where the file has 4."""
        if self.settings.weights != "auto":
            return self.settings.weights
        return "file" if self.exact and self.dtype == torch.bfloat16 else "full"

    def with_weights(self, kind: str) -> "Checkpoint":
        """Return the run with its matrices kept otherwise, in bfloat16 if they are packed."""
        dtype = self.dtype if kind == "full" else torch.bfloat16
        return replace(self, dtype=dtype, settings=replace(self.settings, weights=kind))

    @property
    def weight_bytes(self) -> int:
        return weight_bytes(self.config, self.device, self.dtype, self.kept_as, self.exact)

    @property
    def packing(self) -> str:
        """Say in words how matrices stay in memory; nothing if all are plain."""
        matrices = list(stored(self.config, self.kept_as, self.exact))
        groups = sorted({group for _, bits, group in matrices if bits == 4})
        if groups:
            words = f"int4, groups of {' and '.join(map(str, groups))}"
            total = sum(math.prod(shape) for shape, _, _ in matrices)
            plain = sum(math.prod(shape) for shape, bits, _ in matrices if bits == 0)
            return f"{words}, {1 - plain / total:.0%} of the numbers" if plain else words
        return "int8" if any(bits == 8 for _, bits, _ in matrices) else ""

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

    @property
    def local(self) -> Local:
        """The prompt's local attention; by default where lookup heads made the schedule."""
        window = self.settings.local_window
        if window == -1:
            is_default = self.asked_schedule == "auto" and self.rule.sees == "lookup"
            window = LOCAL_WINDOW if is_default else 0
        last = max(LAST_ROWS, self.window)
        return Local(window, self.settings.sinks, last, self.rule.heads or ())


def pick_device(name: str) -> torch.device:
    """Return the torch device for auto, cpu, cuda or cuda:N; raise ValueError for any other."""
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda:0" if n_gpus else "cpu")
    if str(name) == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::([0-9]+))?", str(name))
    if not match:
        raise ValueError(f"--device {name!r} is unknown; use auto, cpu, cuda or cuda:N")
    number = int(match[1] or 0)
    if number >= n_gpus:
        raise ValueError(
            f"--device {name!r}: this machine has {n_gpus} CUDA devices that torch can use; "
            "try --device cpu"
        )
    return torch.device("cuda", number)


def pick_dtype(name: str, config: Config, device: torch.device) -> torch.dtype:
    """Return the dtype of a run; auto is the checkpoint's, or float32 on a CPU slow in that one."""
    if not isinstance(name, str) or name not in ("auto", *DTYPES):
        raise ValueError(f"--dtype {name!r} is unknown; use auto, {', '.join(DTYPES)}")
    dtype = config.dtype if name == "auto" else DTYPES[name]
    if dtype == torch.float64 and device.type == "cuda":
        raise ValueError(
            "--dtype float64 is for exactness tests on a CPU; "
            "use float32, bfloat16 or float16 on CUDA"
        )
    if name == "auto" and device.type == "cpu" and is_slow(dtype):
        return torch.float32
    return dtype


def check_packing(kind: str, dtype: torch.dtype) -> None:
    """Raise ValueError for packed weights in a dtype whose packed products are slow."""
    if kind in ("int8", "int4") and dtype != torch.bfloat16:
        raise ValueError(
            f"--weights {kind} needs bfloat16: in {dtype_name(dtype)} its products take 3 to 18 "
            "times as long as plain ones; add --dtype bfloat16, or use --weights full"
        )


def is_slow(dtype: torch.dtype) -> bool:
    """Return whether a CPU multiplies this dtype much more slowly than float32."""
    if dtype == torch.bfloat16:
        return not multiplies_bfloat16()
    return dtype == torch.float16


def multiplies_bfloat16() -> bool:
    """Return whether this CPU has bfloat16 instructions; without, a prefill takes 6x as long."""
    known = getattr(torch.cpu, "get_capabilities", dict)()  # the oldest torch we run on lacks it
    return not known or any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def pick_rule(score) -> prune.Rule:
    """Return the named rule, a Rule unchanged, or a nameless Rule around a function of weights."""
    if isinstance(score, prune.Rule):
        built_in = prune.RULES.get(score.name, score)
        if score.score is not built_in.score:
            raise ValueError(
                f"a rule of your own cannot have the name of a built-in one, {score.name!r}; "
                "rename it"
            )
        return score
    if isinstance(score, str) and score in prune.RULES:
        return prune.RULES[score]
    if callable(score) and not isinstance(score, type):
        return prune.Rule("", score)
    known = ", ".join(prune.RULES)
    raise ValueError(
        f"--score {score!r:.60} is unknown; use {known}; "
        "from Python also a function or a prune.Rule"
    )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
