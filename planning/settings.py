"""Settings of a run, an answer or a call: defaults and limits; wrong values raise ValueError."""

import os
from dataclasses import dataclass

LOCAL_WINDOW = 1024  # tokens; with 256, SmolLM2 gave a tenth of the reworded answers less
MOST_DRAFTED = 16  # tokens of a draft: more rows would cost more than one everywhere
WEIGHTS = ("auto", "full", "int8", "int4")


@dataclass(frozen=True)
class Settings:
    """Everything that can be set about a run, with its default; checked when built."""

    block_len: int = 64  # tokens per block
    unit_len: int = 8  # tokens per unit of a block, for rules that see keys
    window: int = 0  # newest queries that count; 0: as many as the rule wants
    gamma: float = -1.0  # overlap from which the active blocks stay; -1: what the rule wants
    # tokens that rows of the prompt see before their tile, below the first boundary, by all heads
    # but lookup heads; 0: everything; -1: LOCAL_WINDOW where those made the schedule, else 0
    local_window: int = -1
    sinks: int = 64  # first tokens, which they see too
    chunk: int = 0  # rows computed at a time; 0: 1024 on a CPU, 2048 on a GPU
    overlap: bool = True  # copies on a stream of their own
    weights: str = "auto"  # full, int8 or int4: how matrices stay in memory; auto: as the file asks
    rope_yarn: float = 0.0  # YaRN stretches the trained context by this; 0: as config.json asks

    def __post_init__(self):
        self.check_number("block_len", 1, 2**24)
        self.check_number("unit_len", 1, 2**24)
        self.check_number("window", 0, 2**16)
        self.check_number("chunk", 0, 2**24)
        self.check_number("local_window", -1, 2**24)
        self.check_number("sinks", 0, 2**24)
        if self.block_len % self.unit_len:
            raise ValueError(
                f"--unit-len {self.unit_len} does not divide --block-len {self.block_len}"
            )
        if not is_number(self.gamma) or not (0 <= self.gamma <= 1 or self.gamma == -1):
            raise ValueError(
                f"--gamma {self.gamma!r} must be an overlap within 0..1, "
                "or -1 to leave it to the rule"
            )
        if type(self.overlap) is not bool:
            raise ValueError(f"overlap is {self.overlap!r}; it must be a bool")
        if self.weights not in WEIGHTS:
            raise ValueError(f"--weights {self.weights!r} is unknown; use {', '.join(WEIGHTS)}")
        yarn = self.rope_yarn
        if not is_number(yarn) or not (yarn == 0 or 1 <= yarn <= 2**10):
            raise ValueError(
                f"--rope-yarn {yarn!r} must be a factor within 1..{2**10}, "
                "or 0 for what config.json says"
            )

    def check_number(self, name: str, least: int, most: int) -> None:
        value = getattr(self, name)
        if type(value) is not int or not least <= value <= most:
            flag = name.replace("_", "-")
            raise ValueError(
                f"--{flag} is {value!r}; it must be a whole number within {least}..{most}"
            )


def is_number(value) -> bool:
    return type(value) in (int, float)


def check_count(n, name: str, least: int = 0) -> None:
    if type(n) is not int or n < least:
        raise ValueError(f"{name} is {n!r}; it must be a whole number of tokens, {least} or more")


def check_sampling(max_new_tokens, temperature, top_p, seed) -> None:
    if type(max_new_tokens) is not int or not 1 <= max_new_tokens < 2**31:
        raise ValueError(
            f"--max-new-tokens {max_new_tokens} must be a whole number within 1..{2**31 - 1}"
        )
    warm = is_number(temperature) and 1e-6 <= temperature < float("inf")
    if not warm and not (is_number(temperature) and temperature == 0):
        raise ValueError(
            f"--temperature {temperature!r} must be 0 (greedy) or a number from 0.000001 up"
        )
    if not is_number(top_p) or not 0 < top_p <= 1:
        raise ValueError(
            f"--top-p {top_p!r} is outside 0..1 (0 excluded), the range of a probability"
        )
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
        raise ValueError(f"--seed {seed!r} is not a whole number within 0..{2**63 - 1}")


def check_draft(draft) -> None:
    if draft is not None and (type(draft) is not int or not 0 <= draft <= MOST_DRAFTED):
        raise ValueError(
            f"--draft {draft!r} must be a whole number of tokens within 0..{MOST_DRAFTED}; "
            "0 drafts none"
        )


def env_number(name: str, default: int = 1, least: int = 1) -> int:
    """Return a variable that torchrun sets, such as WORLD_SIZE, or the default.

    Raises ValueError if it is no whole number of at least `least`.
    """
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise ValueError(
            f"the environment variable {name} is {text!r}; it must be a whole number of at least "
            f"{least}, as torchrun sets it; unset it to run one process"
        )
    return int(text)
