"""RoPE computes what transformers computes, in the same precision."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import slim
from conftest import FAMILIES, draw
from loading.config import read_config
from loading.rope import inverse_frequencies
from model import rotate


@pytest.mark.parametrize("family", FAMILIES)
def test_inverse_frequencies_are_those_of_transformers_to_the_last_bit(checkpoints, family):
    """One unit in the last place is an angle of 0.01 at a million tokens."""
    folder, reference = checkpoints[family]
    config, rope = read_config(folder / "config.json"), reference.model.rotary_emb
    assert torch.equal(inverse_frequencies(config, long=False), rope.original_inv_freq)
    factor = config.rope_scaling.get("attention_factor", 1.0)
    assert math.isclose(factor, rope.attention_scaling)
    if config.rope_scaling["rope_type"] == "longrope":
        rope(torch.ones(1), torch.arange(100)[None])  # above the 64 tokens it was trained on
        assert torch.equal(inverse_frequencies(config, long=True), rope.inv_freq)


def test_position_0_is_not_turned():
    x, angle = torch.randn(1, 1, 8), torch.zeros(1, 1, 8)
    turned = x.clone()
    rotate(turned, angle.cos(), angle.sin())
    assert torch.equal(turned, x)


def exact(reference):
    """Return a float64 copy of a transformers model, its norms in float64 too, RoPE as it is."""
    model = copy.deepcopy(reference).double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            shape, eps = module.weight.shape, module.variance_epsilon
            weight = module.weight
            module.forward = lambda x, shape=shape, weight=weight, eps=eps: F.rms_norm(
                x, shape, weight, eps
            )
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_float64_runs_equal_transformers_over_a_thousand_tokens(checkpoints, family):
    """Angles in float64 were off by 1e-4: the reference's are in float32 for any dtype."""
    folder, reference = checkpoints[family]
    ids = draw(1100, seed=3)
    with torch.no_grad():
        want = exact(reference)(torch.tensor([ids])).logits[0, -101:]
    engine = slim.load(folder, "cpu", "float64", schedule="dense")
    first = engine.prefill(ids[:1000])
    rest = engine.extend(ids[1000:], all_logits=True)
    torch.testing.assert_close(torch.cat([first[None], rest]), want, atol=1e-9, rtol=0)
