"""Checkpoints of random weights: a shape, and tensors that are drawn where they are needed."""

import sys
import zlib
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import parallel
import prune
import slim
from loading.config import parse_config
from loading.weights import tensor_shapes
from model import Config
from planning.checkpoint import Checkpoint, pick_device, pick_dtype
from planning.schedule import resolve_schedule
from planning.settings import Settings


def shape(dim: int, hidden: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
    }


SHAPES = {
    "llama3.1-8b": shape(4096, 14336, 32, 32, 8, 128256),
    "tiny": shape(64, 172, 5, 8, 4, 512),
}


class RandomTensors(dict):
    """A checkpoint's tensors by name, drawn on the device when asked for, the same each time."""

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype):
        super().__init__(tensor_shapes(config))
        self.device = device
        self.dtype = dtype

    def __getitem__(self, name):
        return self  # stands for the open file

    def get_tensor(self, name: str) -> torch.Tensor:
        size = self.get(name)
        if len(size) == 1:
            return torch.ones(size, device=self.device, dtype=self.dtype)
        seed = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
        drawn = torch.randn(size, generator=seed, device=self.device, dtype=self.dtype)
        return drawn.mul_(0.02)


def random_checkpoint(name: str, device: str, dtype: str, schedule: str, **options) -> Checkpoint:
    """Return a checkpoint of a shape whose weights are drawn when they are loaded."""
    config = parse_config(SHAPES[name], name)
    settings = Settings(**options)
    place = pick_device(device)
    kind = pick_dtype(dtype, config, place)
    rule = prune.RULES["peak"]  # random weights have no lookup heads
    return Checkpoint(
        folder=Path(name),
        config=config,
        tensors=RandomTensors(config, place, kind),
        stop=set(),
        device=place,
        dtype=kind,
        schedule=resolve_schedule(schedule, config, settings.block_len),
        rule=rule,
        settings=settings,
        asked_schedule=schedule,
        asked_rule=rule,
        strengths=None,
    )


def make_engine(name: str, device: str, dtype: str, schedule: str, chunk: int) -> slim.Engine:
    """Return this rank's engine of a shape with random weights."""
    return parallel.start(random_checkpoint(name, device, dtype, schedule, chunk=chunk))
