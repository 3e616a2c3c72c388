"""Conversation cache: goes on with the conversation that begins like a request.

The engine holds one conversation; others wait in files. A conversation can be rewound to any place
in its tail, which is never pruned, so only what follows that place is read. Chat clients send text
and question in one message: the next question parts from the first one inside the prompt. The last
TAIL tokens of a prompt therefore stay in the tail.

Files come and go: other servers and people may add, replace and delete them at any time. What the
folder holds is looked up for every request; a file that cannot be used is left alone, and its text
is read again.
"""

import contextlib
import datetime
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from safetensors import SafetensorError

from blockmap import Recorder
from kvcache import last_block_len
from loading.files import format_bytes, one_line, stamp, try_folder
from loading.saved import check_saved, read_saved
from planning.memory import NoRoom

TAIL = 512  # tokens at the end of a new prompt that stay in the tail, a quarter of it at most
LONG_TAIL = 2048  # tokens of a question on a text known already that may all stay in the tail
WORTH_A_FILE = 1024  # tokens of a text, or of a chat about it; less is read again as fast
FEW = 256  # tokens; a file that lacks no more than these of its conversation is not written again
MOST_DAYS = 3  # whose dates are tried for one request, as each has to be rendered
TRIES = 3  # to open a file that others change meanwhile


def common(a: list[int], b: list[int]) -> int:
    """Return how many tokens two conversations share at their beginning."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i, (x, y) in enumerate(zip(a, b)) if x != y)


def check_folder(folder: str) -> None:
    """Make the folder if it is not there; raise ValueError if it cannot be used."""
    try:
        Path(os.path.realpath(folder)).mkdir(parents=True, exist_ok=True)
        try_folder(Path(folder))
    except OSError as error:
        message = f"--cache-dir {folder} cannot be used ({error}); give another folder"
        raise ValueError(message) from None


def unpruned_end(n_prompt: int, shared: int) -> int:
    """Return how many tokens at the end of a new prompt to leave unpruned.

    Of a prompt that shares its beginning with another one, all that is new: the next question on
    the same text will part there too. But these tokens cost time and memory in every layer, so
    there are at most LONG_TAIL of them, or an eighth of the prompt, which is what the default
    schedule keeps in its last stage anyway. If more is new, it is pruned like any text, and the
    next question reads all again.
    """
    new = n_prompt - shared
    usual = min(TAIL, n_prompt // 4)
    longest = min(n_prompt // 2, max(LONG_TAIL, n_prompt // 8))
    return new if usual < new <= longest else usual


@dataclass(frozen=True)
class Day:
    """The date in a conversation's first message, which many templates write there."""

    opening: str  # tells conversations apart before they are rendered
    date: datetime.date


@dataclass(frozen=True)
class Text:
    """A conversation to go on with."""

    ids: list[int]
    first: int  # the first place that it can be rewound to
    day: Day | None = None
    talk: dict | None = None  # what the page shows of it, see serve/page.py
    dense: bool = False  # read without pruning, by a server that prunes

    def covers(self, other: "Text") -> bool:
        """Tell whether this conversation makes the other one's file unnecessary."""
        missing = len(other.ids) - common(self.ids, other.ids)
        shown = self.talk or not other.talk
        return missing <= FEW and self.first <= other.first and bool(shown)


class Texts:
    """The conversation at hand, and those that wait in `folder`: files of `gib` in all.

    Other threads than the engine's call `day_of`, `talks` and `talk_of`, which change nothing.
    """

    def __init__(self, engine, folder=None, gib: float = 8.0, say=print):
        self.engine = engine
        self.folder = Path(folder) if folder else None
        self.most = int(gib * 2**30)
        self.say = say
        self.day: Day | None = None  # of the conversation at hand
        self.talk: dict | None = None  # of the conversation at hand
        self.recorder = Recorder(engine)
        self.running: Text | None = None  # the request that is being read or answered
        self.saved: dict[Path, Text] = {}
        self.looked: dict[tuple, Text | None] = {}  # files by version; None: of no use here
        self.refresh()

    # ---- to find and open -------------------------------------------------------------

    def reuse(self, ids: list[int], room: int = 0, dense: bool = False) -> tuple[int, int]:
        """Make ready to run ids; return how many need not be read again, and `keep_last`.

        keep_last: tokens to leave unpruned at the end of a new reading. room: new tokens to come.
        """
        self.refresh()
        path, kept, shared = self.find(ids, dense)
        at_hand = self.at_hand().ids
        if path is not None or len(at_hand) - common(at_hand, ids) > WORTH_A_FILE:
            self.put_away(wanted=path)  # the engine is about to lose it
        if path is not None and not self.open(path, len(ids) - kept + room):
            return self.reuse(ids, room, dense)
        if not kept:
            return 0, unpruned_end(len(ids), shared)
        if kept < len(self.at_hand().ids):
            self.engine.rewind(min(kept, len(self.engine.ids)))
        return kept, 0

    def hold(self, ids: list[int], but: int, dense: bool = False) -> bool:
        """Take up the whole conversation that begins with ids; return False if there is none.

        but: ids at the end that may be missing.
        """
        self.refresh()
        path, kept, _ = self.find(ids, dense)
        if kept < len(ids) - but:
            return False
        if path is None:
            return True
        self.put_away(wanted=path)
        return self.open(path, 0) or self.hold(ids, but, dense)

    def find(self, ids: list[int], dense: bool = False) -> tuple[Path | None, int, int]:
        """Return the file to go on with, the tokens to keep, and the most that any file shares.

        The file is None for the conversation at hand. Tokens to keep are 0 if the prompt is to be
        read afresh: where none shares enough, or where so much is new that pruning is better.
        At least one id is left to run.
        """
        found = None
        kept = longest = 0
        at_hand = {None: self.at_hand()} if self.running or self.engine.usable else {}
        for path, text in (at_hand | self.saved).items():
            if text.dense != dense:
                continue
            shared = min(common(text.ids, ids), len(ids) - 1)
            longest = max(longest, shared)
            little_is_new = len(ids) - shared <= max(shared, WORTH_A_FILE)
            if shared >= max(1, text.first) and little_is_new and shared > kept:
                found = path
                kept = shared
        return found, kept, longest

    def at_hand(self) -> Text:
        """Return the conversation in the engine; while a request runs, what it asked for."""
        engine = self.engine
        ids = engine.ids + engine.pending
        return self.running or Text(ids, engine.kv.shortest, self.day, self.talk, self.dense())

    def dense(self) -> bool:
        """Tell whether the conversation at hand is dense, and the server is not."""
        return self.engine.running.schedule != self.engine.ckpt.schedule

    def talks(self) -> list[dict]:
        """Return the texts that the page may open.

        kept: in a file. open: at hand, which costs nothing to go on with.
        """
        found = {}
        for text in list(self.saved.values()):
            if text.talk:
                found[text.talk["id"]] = in_list(text.talk, kept=True, open=False)
        talk = self.at_hand().talk
        if talk and self.engine.ids:
            found[talk["id"]] = in_list(talk, kept=talk["id"] in found, open=True)
        return list(found.values())

    def talk_of(self, id: str) -> dict | None:
        """Return what the page shows of a text in that list; None if it is gone."""
        for text in [self.at_hand(), *list(self.saved.values())]:
            if text.talk and text.talk["id"] == id:
                return text.talk
        return None

    def day_of(self, opening: str, render, dense: bool = False) -> tuple[Day, list[int]]:
        """Return the day of the conversation that a request goes on with, and the request's ids.

        With the date of another day, they would part in the first message, and all be read again.
        render: returns the ids of the request for a date. A new conversation has today's.
        """
        today = datetime.date.today()
        ids_today = render(today)
        known = [*list(self.saved.values()), self.at_hand()]
        days = {text.day for text in known if text.day and text.day.opening == opening}
        days.discard(Day(opening, today))
        if self.find(ids_today, dense)[1] == 0:
            for day in sorted(days, key=lambda day: day.date, reverse=True)[:MOST_DAYS]:
                ids = render(day.date)
                if self.find(ids, dense)[1] > 0:
                    return day, ids
        return Day(opening, today), ids_today

    def open(self, path: Path, room: int) -> bool:
        """Let the engine go on with a file; return False, and forget it, if it cannot be used."""
        if path not in self.saved:  # deleted while another one was written
            return False
        expected = self.saved[path].ids
        for _ in range(TRIES):
            before = version(path)
            problem = "other programs change it all the time"
            try:
                extra = self.engine.resume(path, room)
            except NoRoom:  # the file is good
                raise
            except (ValueError, OSError, SafetensorError) as error:
                problem = one_line(error)
            else:
                self.talk = extra.get("talk")
                self.recorder.record = extra.get("map", {})
                self.recorder.looked = None
                if self.at_hand().ids == expected:
                    self.touch(path)
                    return True
            if version(path) == before:
                break
        if version(path) is None:
            problem = "it was deleted"
        self.say(f"slim: {path} is not used: {problem}")
        self.forget(path)
        return False

    # ---- to save ----------------------------------------------------------------------

    def put_away(self, wanted: Path | None = None) -> None:
        """Save the conversation at hand if there is a folder and it is worth it.

        A text without a question chooses its blocks first. A failure is a line in the log. wanted:
        the file that is used next, which therefore stays.
        """
        engine = self.engine
        worth_it = engine.usable and engine.kv.tail_start >= WORTH_A_FILE
        if self.folder is None or not worth_it:
            return
        if self.dense():  # a file is resumed with the server's own schedule
            return
        self.refresh()
        here = self.at_hand()
        covered = any(text.covers(here) for text in self.saved.values())
        if covered or not self.fits(self.size(), wanted):
            return
        name = hashlib.sha256(repr((engine.ckpt.identity, here.ids)).encode()).hexdigest()[:16]
        path = self.folder / f"text-{name}.slim"
        try:
            engine.finish()  # first: the choice is a part of the map, and it may find no room
            if not self.fits(self.size(), wanted):
                return
            self.make_room(self.size(), wanted)
            engine.save(path, self.extra())
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            self.say(f"slim: {one_line(error)}")
            return
        for old, text in list(self.saved.items()):
            if old not in (path, wanted) and here.covers(text):
                self.drop(old)  # the new file goes on from it
        self.refresh()  # `day_of` must find the new file while the next request runs

    def size(self) -> int:
        """Return the bytes that a file of the conversation at hand takes, its header included."""
        n_bytes = self.engine.kv.state_bytes() + 16 * len(self.engine.ids)
        return n_bytes + 2 * len(json.dumps(self.extra()))  # a header in a header has more escapes

    def extra(self) -> dict:
        """Return the JSON that is saved with the conversation at hand."""
        here = self.at_hand()
        extra = {"map": self.recorder.record}
        if here.talk:
            extra["talk"] = here.talk
        if here.day:
            extra |= {"opening": here.day.opening, "date": here.day.date.isoformat()}
        return extra

    def fits(self, size: int, wanted: Path | None) -> bool:
        """Tell whether there can be room for `size` bytes beside the wanted file; else say so."""
        files = self.files()
        beside = files[wanted].st_size if wanted in files else 0
        if size + beside <= self.most:
            return True
        most = format_bytes(self.most)
        self.say(f"slim: a text of {format_bytes(size)} is not kept: --cache-gib allows {most}")
        return False

    def make_room(self, size: int, wanted: Path | None) -> None:
        """Delete files, the least recently used first, until `size` bytes fit."""
        sizes = {path: stat.st_size for path, stat in self.files().items()}
        total = size + sum(sizes.values())
        for path in sizes:
            if total > self.most and path != wanted:
                self.drop(path)
                total -= sizes[path]

    # ---- the folder -------------------------------------------------------------------

    def files(self) -> dict[Path, os.stat_result]:
        """Return the files that servers wrote to the folder, the least recently used first."""
        found = {}
        for path in self.folder.glob("text-*.slim") if self.folder else ():
            with contextlib.suppress(OSError):  # gone again, or a link to nothing
                stat = path.stat()
                if S_ISREG(stat.st_mode):
                    found[path] = stat
        return dict(sorted(found.items(), key=lambda item: item[1].st_mtime))

    def refresh(self) -> None:
        """Learn what the folder holds now."""
        looked = {}
        for path in self.files():
            key = path, version(path)
            looked[key] = self.looked[key] if key in self.looked else self.look(path)
            if path in self.saved and not looked[key]:
                self.say(f"slim: {path} is not used any more: it changed and cannot be read")
        self.looked = looked
        self.saved = {path: text for (path, _), text in looked.items() if text}

    def look(self, path: Path) -> Text | None:
        """Return what a file holds; None for another model or other settings, or if it is bad."""
        identity = self.engine.ckpt.identity
        try:
            header, _ = read_saved(path)
            check_saved(path, header, identity)
            n_prunable = header["kv"]["n_prunable"]
            last = last_block_len(n_prunable, self.engine.ckpt.settings.block_len)
            ids = header["ids"] + header["pending"]
            extra = header["extra"]
            day = None
            if "date" in extra:
                day = Day(extra["opening"], datetime.date.fromisoformat(extra["date"]))
            talk = extra.get("talk")
            if talk:
                in_list(talk, kept=True, open=False)  # raises KeyError
            return Text(ids, n_prunable - last, day, talk)
        except Exception:  # anything may lie in a folder
            return None

    def touch(self, path: Path) -> None:
        """Mark a file as used now."""
        with contextlib.suppress(OSError):
            os.utime(path)
        self.looked[path, version(path)] = self.saved[path]

    def forget(self, path: Path) -> None:
        """Stop using a file until it changes."""
        self.saved.pop(path, None)
        self.looked[path, version(path)] = None

    def drop(self, path: Path) -> None:
        self.saved.pop(path, None)
        with contextlib.suppress(OSError):
            path.unlink()


def in_list(talk: dict, kept: bool, open: bool) -> dict:
    """Return what the list of texts tells of one; raise KeyError if parts are missing."""
    names = "id", "name", "dense", "tokens"
    return {name: talk[name] for name in names} | {"kept": kept, "open": open}


def version(path: Path) -> tuple | None:
    """Return what tells whether a file is still the same; None if it is gone."""
    try:
        return stamp(path)
    except OSError:
        return None
