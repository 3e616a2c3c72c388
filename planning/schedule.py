"""A schedule, {boundary: budget}: a named one, or read from text or a dict; checked."""

from bisect import bisect_left
from fractions import Fraction

from torch import Tensor

import prune
from model import Config
from planning.probe import ENOUGH, lookup_heads, strength_below

# Used when no lookup heads are known: shares at the paper's boundaries, in a model of 30 layers.
AUTO = {9: Fraction(1, 4), 19: Fraction(1, 8), 28: Fraction(1, 16)}
# By the lookup heads: one cut, right after the layer by which ENOUGH of their total strength lies
# below, that keeps this share of the prompt. That is 9 of 30 layers in SmolLM2, 4 of 24 in
# Qwen2.5-Coder-0.5B, chosen on both. A second cut costs Qwen's answers more than it saves. With
# 512 of 2,048 tokens, half the chains of facts were lost; with 1,024, a tenth.
KEPT = prune.Share(Fraction(1, 4), least=1024)
# The paper's tokens at boundaries 10, 20 and 30 of 32 layers.
PAPER = {"llama": (8192, 4096, 2048), "qwen2": (12288, 6144, 4096)}


def is_tokens(budget) -> bool:
    return type(budget) is int


def auto_schedule(n_layers: int) -> dict[int, prune.Budget]:
    """Return the default, as shares of the prompt, for any depth."""
    return scaled(AUTO, 30, n_layers)


def schedule_by_heads(strengths: Tensor) -> dict[int, prune.Budget]:
    """Return the default for a model whose lookup heads are known; strengths (L, H)."""
    below = strength_below(strengths)
    boundary = 1 + bisect_left(below, ENOUGH * below[-1])
    if boundary == len(strengths):  # all heads are in the last layer
        return auto_schedule(boundary)
    return {boundary: KEPT}


def paper_schedule(n_layers: int, model_type: str = "llama") -> dict[int, prune.Budget]:
    """Return the paper's token budgets for 32 layers (Llama) or 28 (Qwen2), else by depth."""
    budgets = PAPER["qwen2" if model_type == "qwen2" else "llama"]
    return scaled(dict(zip((10, 20, 30), budgets)), 32, n_layers)


def scaled(schedule: dict, depth: int, n_layers: int) -> dict[int, prune.Budget]:
    """Return a schedule for another depth; boundaries stay within 1..n_layers-1.

    Where rounding makes two boundaries the same, the first stays.
    """
    result: dict[int, prune.Budget] = {}
    for layer, budget in schedule.items():
        boundary = at_depth(n_layers, layer, depth)
        if 1 <= boundary < n_layers:
            result.setdefault(boundary, budget)
    return result


def at_depth(n_layers: int, layer: int, of: int) -> int:
    """Return the layer that lies as deep in n_layers as `layer` in `of`, rounded half up."""
    return int(n_layers * layer / of + 0.5)


def parse_schedule(text: str) -> dict[int, prune.Budget] | str:
    """Read '9:1/4,20:4096' as {9: 1/4, 20: 4096}; the names auto, paper and dense pass through.

    '9:1/4:1024' is {9: Share(1/4, least=1024)}.
    """
    if text in ("auto", "paper", "dense"):
        return text
    layers = []
    budgets = []
    try:
        for part in text.split(","):
            layer, budget, *least = part.split(":")
            layers.append(int(layer))
            budgets.append(parse_budget(budget, *least))
    except (ValueError, TypeError, ArithmeticError):
        raise ValueError(
            f"--schedule {text!r} is not of the form LAYER:BUDGET,LAYER:BUDGET; a budget is a "
            "number of tokens or a share of the prompt, as in 10:8192,20:4096 or 9:1/4,19:1/8, or "
            "a share and the tokens it keeps at least, as in 9:1/4:1024; or auto, paper or dense"
        ) from None
    check_increasing(layers)  # a dict would hide a boundary given twice
    return dict(zip(layers, budgets))


def parse_budget(text: str, least: str | None = None) -> prune.Budget:
    if least is not None:
        return prune.Share(Fraction(parse_part(text)), int(least))
    return int(text) if text.isdecimal() else parse_part(text)


def parse_part(text: str) -> float | Fraction:
    return Fraction(text) if "/" in text else float(text)  # Fraction("1e999999999") does not end


def format_schedule(schedule: dict[int, prune.Budget]) -> str:
    """Write a schedule as --schedule takes it."""
    parts = []
    for layer, budget in schedule.items():
        text = f"{layer}:{budget if is_tokens(budget) else prune.share(budget)}"
        parts.append(f"{text}:{budget.least}" if isinstance(budget, prune.Share) else text)
    return ",".join(parts) or "dense"


def check_increasing(layers: list[int]) -> None:
    if sorted(set(layers)) != layers:
        raise ValueError(
            f"schedule boundaries {layers} do not increase; "
            "give them in ascending layer order, each once"
        )


def check_schedule(schedule: dict[int, prune.Budget], n_layers: int, block_len: int) -> None:
    """Raise ValueError unless boundaries rise within 1..n_layers-1 and budgets of a kind fall."""
    layers = list(schedule)
    types = {type(budget) for budget in schedule.values()}
    if not all(map(is_tokens, layers)) or not types <= {int, float, Fraction, prune.Share}:
        raise ValueError(
            f"schedule {schedule} must map whole layer numbers to token budgets "
            "or shares of the prompt"
        )
    check_increasing(layers)
    for layer, budget in schedule.items():
        if not 1 <= layer < n_layers:
            raise ValueError(
                f"schedule boundary {layer} is outside 1..{n_layers - 1}, "
                f"the boundaries of a model of {n_layers} layers"
            )
        check_budget(layer, budget, block_len)
    check_decreasing([budget for budget in schedule.values() if is_tokens(budget)])
    check_decreasing([prune.share(n) for n in schedule.values() if not is_tokens(n)])
    floors = [n.least for n in schedule.values() if isinstance(n, prune.Share)]
    if sorted(floors, reverse=True) != floors:
        shown = ", ".join(map(str, floors))
        raise ValueError(
            f"schedule shares keep at least {shown} tokens; a later boundary must not keep more"
        )


def check_budget(layer: int, budget: prune.Budget, block_len: int) -> None:
    """Raise ValueError unless a budget is at least 2 blocks of tokens, or a share within 0..1."""
    if is_tokens(budget):
        if budget < 2 * block_len:
            raise ValueError(
                f"schedule budget {budget} at layer {layer} is below 2 blocks = "
                f"{2 * block_len} tokens; raise it or lower --block-len"
            )
        return
    part = budget
    if isinstance(budget, prune.Share):
        part = budget.part
        if not is_tokens(budget.least) or not 0 <= budget.least < 2**40:
            raise ValueError(
                f"the schedule keeps at least {budget.least!r:.60} tokens at layer {layer}; "
                f"it must be a whole number of them within 0..{2**40 - 1}"
            )
    is_number = isinstance(part, (int, float, Fraction)) and part == part  # else NaN
    if not is_number or not 1e-6 <= prune.share(min(max(part, 0), 2)) < 1:
        raise ValueError(
            f"schedule budget {part!s:.20} at layer {layer} is not a share within 0..1 "
            "(0 and 1 excluded); give one such as 1/4"
        )


def check_decreasing(budgets: list[prune.Budget]) -> None:
    if sorted(set(budgets), reverse=True) != budgets:
        shown = ", ".join(map(str, budgets))
        raise ValueError(
            f"schedule budgets {shown} do not decrease; a later boundary must keep fewer tokens"
        )


def resolve_schedule(
    schedule, config: Config, block_len: int, strengths: Tensor | None = None
) -> dict[int, prune.Budget]:
    """Return {boundary: budget} for "auto", "paper", "dense", a string or a dict, checked.

    strengths: of the model's heads (L, H), by which "auto" goes; without them, by depth.
    """
    if isinstance(schedule, str):
        schedule = parse_schedule(schedule)
    if schedule == "auto":
        if strengths is not None and any(lookup_heads(strengths)):
            schedule = schedule_by_heads(strengths)
        else:
            schedule = auto_schedule(config.n_layers)
    elif schedule == "paper":
        schedule = paper_schedule(config.n_layers, config.model_type)
    elif schedule == "dense":
        schedule = {}
    if not isinstance(schedule, dict):
        raise ValueError(
            f"schedule {schedule!r} must be 'auto', 'paper', 'dense' or a dict of boundary: budget"
        )
    check_schedule(schedule, config.n_layers, block_len)
    return dict(schedule)  # the caller's may change later
