"""A schedule, {boundary: budget}: one of the named ones, or read from text or a dict; checked against the model."""

from fractions import Fraction

import prune
from model import Config

# The paper's boundaries by depth, with shares of the prompt for its budgets; our measurements found nothing better.
AUTO = (
    (9, Fraction(1, 4)),
    (19, Fraction(1, 8)),
    (28, Fraction(1, 16)),
)  # boundary of 30 layers, share of the prompt
PAPER = {
    "llama": (8192, 4096, 2048),
    "qwen2": (12288, 6144, 4096),
}  # tokens at 10, 20 and 30 of 32 layers


def is_tokens(budget) -> bool:
    return type(budget) is int


def at_depth(n_layers: int, layer: int, of: int) -> int:
    """Return the layer that lies as deep in n_layers as `layer` in `of`, rounded half up."""
    return int(n_layers * layer / of + 0.5)


def auto_schedule(n_layers: int) -> dict[int, prune.Budget]:
    """Return the default, as shares of the prompt, for any depth."""
    return first_of_each(
        [(at_depth(n_layers, layer, 30), budget) for layer, budget in AUTO], n_layers
    )


def paper_schedule(n_layers: int, model_type: str = "llama") -> dict[int, prune.Budget]:
    """Return the paper's token budgets: for 32 layers (Llama) and 28 (Qwen2), by depth for others."""
    budgets = PAPER["qwen2" if model_type == "qwen2" else "llama"]
    return first_of_each(
        [(at_depth(n_layers, 10 * i, 32), n) for i, n in enumerate(budgets, 1)], n_layers
    )


def first_of_each(pairs: list[tuple[int, prune.Budget]], n_layers: int) -> dict[int, prune.Budget]:
    """Return {boundary: budget} of the boundaries within 1..n_layers-1; where rounding made two the same, the first."""
    schedule: dict[int, prune.Budget] = {}
    for layer, budget in pairs:
        if 1 <= layer < n_layers:
            schedule.setdefault(layer, budget)
    return schedule


def parse_schedule(text: str) -> dict[int, prune.Budget] | str:
    """Read '9:1/4,20:4096' as {9: 1/4, 20: 4096}; the names auto, paper and dense pass through."""
    if text in ("auto", "paper", "dense"):
        return text
    try:
        share = lambda text: (
            Fraction(text) if "/" in text else float(text)
        )  # of 1e999999999 a fraction would not end
        pairs = [part.split(":") for part in text.split(",")]
        pairs = [
            (int(layer), int(budget) if budget.isdecimal() else share(budget))
            for layer, budget in pairs
        ]
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f"--schedule {text!r} is not of the form LAYER:BUDGET,LAYER:BUDGET; a budget is a number of tokens "
            "or a share of the prompt, as in 10:8192,20:4096 or 9:1/4,19:1/8"
        ) from None
    check_increasing(
        [layer for layer, _ in pairs]
    )  # before a dict would hide a boundary given twice
    return dict(pairs)


def format_schedule(schedule: dict[int, prune.Budget]) -> str:
    """Write a schedule as --schedule takes it."""
    budgets = {layer: n if is_tokens(n) else prune.share(n) for layer, n in schedule.items()}
    return ",".join(f"{layer}:{n}" for layer, n in budgets.items()) or "dense"


def check_increasing(layers: list[int]) -> None:
    if any(b <= a for a, b in zip(layers, layers[1:])):
        raise ValueError(
            f"schedule boundaries {layers} do not increase; give them in ascending layer order, each once"
        )


def check_schedule(schedule: dict[int, prune.Budget], n_layers: int, block_len: int) -> None:
    """Raise ValueError unless boundaries rise within 1..n_layers-1 and budgets of a kind fall.

    A budget is a whole number of tokens, at least 2 blocks, or a share within 0..1, both excluded.
    """
    layers = list(schedule)
    if not all(map(is_tokens, layers)) or not all(
        type(n) in (int, float, Fraction) for n in schedule.values()
    ):
        raise ValueError(
            f"schedule {schedule} must map whole layer numbers to token budgets or shares of the prompt"
        )
    check_increasing(layers)
    for layer, budget in schedule.items():
        if not 1 <= layer < n_layers:
            raise ValueError(
                f"schedule boundary {layer} is outside 1..{n_layers - 1}, the boundaries of a {n_layers}-layer model"
            )
        if is_tokens(budget) and budget < 2 * block_len:
            raise ValueError(
                f"schedule budget {budget} at layer {layer} is below 2 blocks = {2 * block_len} tokens; "
                "raise it or lower --block-len"
            )
        if not is_tokens(budget) and not (
            budget == budget and 1e-6 <= prune.share(min(max(budget, 0), 2)) < 1
        ):
            raise ValueError(
                f"schedule budget {budget!s:.20} at layer {layer} is not a share within 0..1; give one such as 1/4"
            )
    for kind in (True, False):
        budgets = [n for n in schedule.values() if is_tokens(n) is kind]
        if any(b >= a for a, b in zip(budgets, budgets[1:])):
            shown = ", ".join(str(n if kind else prune.share(n)) for n in budgets)
            raise ValueError(
                f"schedule budgets {shown} do not decrease; a later boundary must keep fewer tokens"
            )


def resolve_schedule(schedule, config: Config, block_len: int) -> dict[int, prune.Budget]:
    """Return {boundary: budget} for "auto", "paper", "dense", a string or a dict, checked against the model."""
    if isinstance(schedule, str):
        schedule = parse_schedule(schedule)
    if schedule == "auto":
        schedule = auto_schedule(config.n_layers)
    elif schedule == "paper":
        schedule = paper_schedule(config.n_layers, config.model_type)
    schedule = {} if schedule == "dense" else schedule
    if not isinstance(schedule, dict):
        raise ValueError(
            f"schedule {schedule!r} must be 'auto', 'paper', 'dense' or a dict of boundary: budget"
        )
    check_schedule(schedule, config.n_layers, block_len)
    return dict(schedule)  # the caller's may change later
