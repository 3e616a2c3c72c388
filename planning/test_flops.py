"""The formula of FLOPs: what it counts is what the model runs."""

import pytest

import prune
from loading.config import read_config
from model import FULL, Local
from planning import flops


@pytest.mark.parametrize("n", [1, 700, 1024, 5000])
@pytest.mark.parametrize("local", [FULL, Local(512, 64), Local(1, 0), Local(300, 900, last=100)])
def test_keys_of_local_attention_are_those_that_rows_see(n, local):
    """Counted row by row from the rule's words."""
    n_local = (n - local.last) // 256 * 256 if local.window else 0
    total = 0.0
    for row in range(n):
        own_tile = row - row % 256
        seen = row
        if row < n_local and own_tile - local.window > local.sinks:
            seen = local.sinks + row - (own_tile - local.window)
        total += seen + 0.5  # half of itself, as n / 2 keys a row are n * n / 2 in all
    assert flops.local_keys(n, local) == pytest.approx(total / n)


def test_local_attention_saves_below_the_first_boundary_alone(tiny):
    """And nothing where nothing is pruned, as there every row sees everything."""
    config = read_config(tiny / "config.json")
    local = Local(512, 64)
    n = 5000
    saved_keys = n / 2 - flops.local_keys(n, local)
    a_layer = 4 * n * saved_keys * config.n_heads * config.head_dim
    for schedule, layers in (({2: 1000, 4: 500}, 2), ({1: n, 3: 1000}, 3), ({1: n}, 0), ({}, 0)):
        full = flops.prefill_flops(config, n, schedule)
        saved = full - flops.prefill_flops(config, n, schedule, local=local)
        assert saved == pytest.approx(layers * a_layer)
        far = Local(512, 64, heads=((0, 3), (), (1,), (), ()))  # heads that see everything
        far_share = sum(len(heads) for heads in far.heads[:layers]) / config.n_heads
        saved = full - flops.prefill_flops(config, n, schedule, local=far)
        assert saved == pytest.approx((layers - far_share) * a_layer)
    assert prune.stage_blocks(n, {1: n}, 64) == [79, 79]
