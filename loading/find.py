"""Where a checkpoint is: a path, a name, or a Hugging Face id in the local cache; no downloads."""

import os
import re
from pathlib import Path

ALIASES = {
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama3-8b-instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama3.2-1b-instruct": "meta-llama/Llama-3.2-1B-Instruct",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B",
    "llama3.2-3b-instruct": "meta-llama/Llama-3.2-3B-Instruct",
    "llama3.3-70b-instruct": "meta-llama/Llama-3.3-70B-Instruct",
    "tinyllama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm3-3b": "HuggingFaceTB/SmolLM3-3B",
    "phi4-mini": "microsoft/Phi-4-mini-instruct",
    "phi4": "microsoft/phi-4",
    "mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.3",
    "mistral-nemo-instruct": "mistralai/Mistral-Nemo-Instruct-2407",
    **{f"qwen3-{size}b": f"Qwen/Qwen3-{size}B" for size in ("0.6", "1.7", "4", "8", "14", "32")},
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen2.5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
}


ROOT = Path(__file__).resolve().parent.parent  # of the repository


def find_checkpoint(name: str | Path) -> Path:
    """Return the folder of a checkpoint: a path, a name in a checkpoints folder, or a cached id.

    Raises ValueError for an unusable name, FileNotFoundError with the command that downloads it.
    """
    try:
        path = Path(name).expanduser()
        path.is_dir()
    except (RuntimeError, TypeError, OSError, ValueError):
        raise ValueError(
            f"--ckpt {name!r:.200} is neither a path nor a name of a checkpoint"
        ) from None
    if not str(name):
        raise ValueError("--ckpt is empty; give a folder, a name or a Hugging Face id")
    if path.is_file():
        return check_file(path)
    repo = ALIASES.get(str(name).lower(), str(name))
    places = possible_places(path, repo)
    for place in places:
        if place.is_dir():
            return gguf_in(place)
        for file in (place, place.with_name(f"{place.name}.gguf")):
            if file.is_file():
                return check_file(file)
    known = repo if repo.count("/") == 1 else "ORG/NAME"
    looked = ", ".join(dict.fromkeys(str(place) for place in places))
    command = f"hf download {known} --local-dir checkpoints/{path.name}"
    raise FileNotFoundError(
        f"no checkpoint {str(name)!r} (looked at {looked}); to download one: {command}"
    )


def check_file(path: Path) -> Path:
    """Return a GGUF file, which stands for a folder; raise ValueError for any other."""
    with path.open("rb") as file:
        is_gguf = file.read(4) == b"GGUF"
    if path.suffix == ".gguf" or is_gguf:  # `gguf_file` says what is wrong with it
        return path
    raise ValueError(
        f"--ckpt {path} is a file, and not GGUF; "
        "give the folder that holds config.json and the safetensors"
    )


def gguf_in(folder: Path) -> Path:
    """Return a folder, or the GGUF file in it if there is nothing else to load.

    Raises ValueError if there are several, of which one has to be named.
    """
    files = sorted(folder.glob("*.gguf"))
    firsts = [
        file for file in files if not re.search(r"-(?!00001)\d{5}-of-\d{5}\.gguf$", file.name)
    ]
    if not firsts or (folder / "config.json").is_file():
        return folder
    if len(firsts) > 1:
        names = ", ".join(file.name for file in firsts[:20])
        raise ValueError(f"--ckpt {folder} holds {len(firsts)} models; name one of {names}")
    return firsts[0]


def possible_places(path: Path, repo: str) -> list[Path]:
    """Return where a checkpoint may lie: here, with the others, in the cache, in the repository."""
    places = [path, Path("checkpoints") / path, ROOT / "checkpoints" / path]
    if "SLIM_CHECKPOINTS" in os.environ:
        places.append(Path(os.environ["SLIM_CHECKPOINTS"]).expanduser() / path)
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    if repo.count("/") == 1:
        for repo_id in (repo, repo.replace("/Llama-3", "/Meta-Llama-3")):  # 3 and 3.1 were renamed
            places.append(main_snapshot(hub / f"models--{repo_id.replace('/', '--')}"))
    return [*places, ROOT / path]  # the last one so that "demo" works from anywhere


def main_snapshot(folder: Path) -> Path:
    """Return the snapshot that a cache folder calls main, or a pattern if there is none."""
    main = folder / "refs" / "main"
    return folder / "snapshots" / (main.read_text().strip() if main.is_file() else "*")
