"""A text is read once: which conversation a request goes on with, where it goes on, and where the others wait.

The engine holds one conversation. A request goes on with the one that shares the longest beginning with
it, token by token: the one at hand, or one that waits in a file. Where the two part, the conversation is
rewound; only what is new is read. A conversation can be rewound to any place in its tail, which is never
pruned. So a text is read with its last TAIL tokens as a part of the tail: a client that sends text and
question in one message parts there when it sends the same text with another question.
"""

import contextlib
import hashlib
import os
from pathlib import Path

from kvcache import last_block_len
from loading.saved import check_saved, read_saved
from planning.memory import NoRoom

TAIL = 512  # tokens at the end of a new prompt that stay in the tail, a quarter of it at most
WORTH_A_FILE = 1024  # tokens of a text, or of what was said about it; less is sooner read again
FEW = 256  # tokens; a file that lacks no more than these of its conversation is not written again


def common(a: list[int], b: list[int]) -> int:
    """Return how many tokens two conversations begin with alike."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i, (x, y) in enumerate(zip(a, b)) if x != y)


def check_folder(folder: str) -> None:
    """Make the folder if it is not there; raise ValueError if it cannot be used."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OSError("it does not allow writing")
    except OSError as error:
        raise ValueError(
            f"--cache-dir {folder} cannot be used ({error}); give another folder"
        ) from None


class Texts:
    """The conversation at hand, and those that wait in `folder`: files of `gib` at most; the least recently used go."""

    def __init__(self, engine, folder=None, gib: float = 8.0, say=print):
        self.engine, self.most, self.say = engine, int(gib * 2**30), say
        self.saved: dict[
            Path, tuple[list[int], int]
        ] = {}  # file -> its ids, the first place it can be rewound to
        self.folder = Path(folder) if folder else None
        for path in self.files():
            with contextlib.suppress(
                ValueError
            ):  # of another model or other settings: it waits for those
                header, _ = read_saved(path)
                check_saved(path, header, engine.ckpt.identity)
                n = header["kv"]["n_prompt"]
                first = n - last_block_len(n, engine.ckpt.settings.block_len)
                self.saved[path] = header["ids"] + header["pending"], first

    def files(self) -> list[Path]:
        """Return all files of the folder that this class wrote, the newest first."""
        found = self.folder.glob("text-*.slim") if self.folder else []
        return sorted(found, key=lambda path: -path.stat().st_mtime)

    def find(self, ids: list[int]) -> tuple[Path | None, int, int]:
        """Return the file to go on with (None: what is at hand), the tokens to keep, and the most that any one shares.

        Tokens to keep are 0 if the prompt is to be read afresh: where none shares enough, or where so much is new
        that it had better be pruned. At least one id is left to run.
        """
        engine, found, longest = self.engine, (None, 0), 0
        at_hand = (
            [(None, (engine.ids + engine.pending, engine.kv.tail_start))] if engine.usable else []
        )
        for path, (known, first) in [*at_hand, *self.saved.items()]:
            kept = min(common(known, ids), len(ids) - 1)
            longest = max(longest, kept)
            if (
                kept >= max(1, first)
                and kept > found[1]
                and len(ids) - kept <= max(kept, WORTH_A_FILE)
            ):
                found = path, kept
        return *found, longest

    def reuse(self, ids: list[int], room: int = 0) -> tuple[int, int]:
        """Make ready to run ids: return the tokens that need not be read again, and the tail for a new reading.

        room: new tokens to make room for.
        """
        engine = self.engine
        path, kept, shared = self.find(ids)
        if path is not None:
            self.put_away(wanted=path)
            try:
                engine.resume(path, len(ids) - kept + room)
                os.utime(path)
            except NoRoom:  # the file is good
                raise
            except (
                ValueError,
                OSError,
            ) as error:  # damaged, or removed by somebody else: read the text again
                self.say(f"slim: {error}")
                self.drop(path)
                return self.reuse(ids, room)
        elif len(at_hand := engine.ids + engine.pending) - common(at_hand, ids) > WORTH_A_FILE:
            self.put_away()  # else that much would be lost
        if not kept:
            if 2 * shared < len(ids):
                shared = len(ids)
            # else the same text parted before its tail began: this time the tail begins there
            return 0, max(min(TAIL, len(ids) // 4), len(ids) - shared)
        if kept < len(engine.ids) + len(engine.pending):
            engine.rewind(min(kept, len(engine.ids)))
        return kept, 0

    def put_away(self, wanted: Path | None = None) -> None:
        """Save the conversation at hand, if there is a folder and it is worth it; what goes wrong is said, no more.

        wanted: the file that is used next, and so the last to leave.
        """
        engine = self.engine
        if self.folder is None or not engine.usable or engine.kv.tail_start < WORTH_A_FILE:
            return
        ids, first = engine.ids + engine.pending, engine.kv.tail_start
        self.saved = {path: known for path, known in self.saved.items() if path.exists()}
        shared = {
            path: (common(known, ids), len(known), start)
            for path, (known, start) in self.saved.items()
        }
        if not any(len(ids) - same <= FEW and start <= first for same, _, start in shared.values()):
            name = hashlib.sha256(repr((engine.ckpt.identity, ids)).encode()).hexdigest()[:16]
            path = self.folder / f"text-{name}.slim"
            try:
                engine.save(path)
            except ValueError as error:
                self.say(f"slim: {error}")
                return
            self.saved[path] = ids, first
            for old, (same, length, start) in shared.items():
                if length - same <= FEW and first <= start and old not in (path, wanted):
                    self.drop(old)  # the new file goes on from it
        if wanted:
            with contextlib.suppress(OSError):
                os.utime(wanted)
        size = 0
        for path in self.files():
            size += path.stat().st_size
            if size > self.most:
                self.drop(path)

    def drop(self, path: Path) -> None:
        self.saved.pop(path, None)
        with contextlib.suppress(OSError):
            path.unlink()
