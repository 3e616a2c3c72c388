"""Find or fetch Qwen2.5-Coder-0.5B-Instruct (24 layers, context 32,768): python bench/qwen.py

Prints where it is. The first time this takes 490 MB and some minutes. Needs `pip install gguf`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.checkpoints import QWEN, command

if __name__ == "__main__":
    sys.exit(command(QWEN))
