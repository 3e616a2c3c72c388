"""Find or fetch SmolLM2-135M-Instruct (30 layers, context 8,192): python bench/smollm2.py

Prints where it is. The first time this takes 98 MB and some seconds. Needs `pip install gguf`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.checkpoints import SMOLLM2, command

if __name__ == "__main__":
    sys.exit(command(SMOLLM2))
