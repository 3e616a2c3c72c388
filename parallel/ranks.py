"""The ranks: processes that torchrun started, one for each GPU, and what they send each other.

On the command line rank 0 is the leader: it alone reads, samples and prints. The other ranks are
workers and do to their part of the engine what the leader does to its own (`lead`, `follow`,
`command`). A user's script runs on every rank and makes the same calls on each; this is checked
(`check_same`). Tensors are summed or gathered by torch's collectives, NCCL on GPUs, gloo on CPUs.

How ranks end. An error of one rank before a step is raised on all ranks (`together`). An error
inside a step ends its rank. The connections to it then break, and every other rank ends: in a
collective, or in a thread that watches the connection (`watch`), which also notices a killed rank
while others wait for a GPU. One rank prints one line about it (`may_print`).
"""

import atexit
import contextlib
import hashlib
import os
import signal
import sys
import threading
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from loading.files import one_line

IDLE = timedelta(days=30)  # wait for objects: a person or a disk may be slow; a lost rank ends it
STEP = timedelta(minutes=10)  # wait for tensors in a step
MEET = timedelta(minutes=1)  # wait until all ranks have started
GRACE = 2.0  # seconds in which a rank may print its own error, before another rank does


class Lost(RuntimeError):
    """Raised when another rank has ended, or a step was interrupted: no rank can go on."""


class Agreed(ValueError):
    """Raised on every rank when one rank cannot go on. No rank has changed state."""


class Ranks:
    """The connection of this process, `rank` of `n`, to the other ranks."""

    def __init__(self):
        try:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            store, rank, n = next(dist.rendezvous("env://", timeout=MEET))
            store.set_timeout(STEP)
            if not dist.is_initialized():
                dist.init_process_group(backend, store=store, rank=rank, world_size=n, timeout=STEP)
                atexit.register(leave)
            self.rank = dist.get_rank()
            self.n = dist.get_world_size()
            # groups of our own: a script's group may lack CPU or GPU
            self.tensors = dist.new_group(backend=backend, timeout=STEP)
            self.objects = dist.new_group(backend="gloo", timeout=IDLE)  # of the CPU
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"the ranks do not reach each other: {first_line(error)}; start them with "
                "torchrun, or unset WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT to run one "
                "process, which a script loads with slim.load"
            ) from None
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(f"slim/{attempt}", store)
        self.role = ""  # "leader" or "worker" on the command line; "" in a user's script
        self.inside = False  # a command is under way
        self.broken = False  # a command was interrupted
        self.calls = 0  # collectives on tensors so far
        self.bytes = 0  # of their tensors

    # ---- tensors ----------------------------------------------------------------------

    def meet(self, collective, x: Tensor, *args) -> None:
        """Run a collective of torch's on a tensor in place."""
        self.calls += 1
        self.bytes += x.nbytes
        with self.connection():
            collective(x, *args, group=self.tensors)

    def sum(self, x: Tensor) -> Tensor:
        self.meet(dist.all_reduce, x)
        return x

    def max(self, x: Tensor) -> Tensor:
        self.meet(dist.all_reduce, x, dist.ReduceOp.MAX)
        return x

    def first(self, x: Tensor) -> Tensor:
        """Return rank 0's x on every rank."""
        self.meet(dist.broadcast, x, 0)
        return x

    def assemble(self, part: Tensor, dim: int, where: slice, n: int) -> Tensor:
        """Return the tensor, n long along dim, of which a rank has the part `where`, or nothing."""
        shape = list(part.shape)
        shape[dim] = n
        out = part.new_zeros(shape)
        if part.shape[dim]:
            out.narrow(dim, where.start, part.shape[dim]).copy_(part)
        return self.sum(out)  # of one number and zeros: exact, in any order

    # ---- objects ----------------------------------------------------------------------

    def gather(self, value) -> list:
        """Return every rank's value, by rank."""
        values = [None] * self.n
        with self.connection():
            dist.all_gather_object(values, value, group=self.objects)
        return values

    def broadcast(self, *values) -> tuple:
        """Return rank 0's values on every rank."""
        box = [values]
        with self.connection():
            dist.broadcast_object_list(box, src=0, group=self.objects)
        return box[0]

    def max_number(self, *numbers: int) -> list[int]:
        """Return each number's maximum over ranks; a third of the time that objects take."""
        box = torch.tensor(numbers, dtype=torch.int64)
        with self.connection():
            dist.all_reduce(box, dist.ReduceOp.MAX, group=self.objects)
        return box.tolist()

    # ---- agreement --------------------------------------------------------------------

    def together(self, work):
        """Return work() of this rank; if it fails on any rank, raise that error on all ranks."""
        result = None
        error = None
        try:
            result = work()
        except (Lost, Agreed):
            raise
        except (ValueError, OSError, MemoryError, RuntimeError) as caught:
            error = caught
        self.share_error(error)
        return result

    def share_error(self, error: Exception | None) -> None:
        """Raise an error of any rank on all ranks; each rank gives its own, or None."""
        if self.max_number(int(error is not None)) == [0]:
            return
        texts = self.gather(None if error is None else " ".join(str(error).split()))
        for rank, text in enumerate(texts):
            if text is not None:
                raise Agreed(f"rank {rank}: {text}" if rank else text) from error

    def check_same(self, name: str, arguments) -> None:
        """Raise ValueError on every rank unless all make the same call with the same arguments."""
        text = repr((name, arguments)).encode()
        digest = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")
        largest, smallest = self.max_number(digest, -digest)
        if largest == -smallest:
            return
        calls = self.gather((name, digest))
        rank = next(i for i, call in enumerate(calls) if call != calls[0])
        its, first = calls[rank][0], calls[0][0]
        how = f"{its} with other arguments than" if its == first else f"{its}, not {first} as"
        raise Agreed(
            f"rank {rank} calls {how} rank 0; give every rank the same ids and settings, or each "
            "an engine of its own with slim.load"
        )

    @contextlib.contextmanager
    def command(self, name: str, arguments: tuple, compared: tuple | None):
        """Do something on this rank; the leader has the workers do it too.

        In a script, the name and what is compared must be the same on every rank. A ValueError
        leaves all ranks as they were. A rank that raises one alone, before its step, shares it in
        the place where the other ranks ask for errors.
        """
        if self.inside:
            yield
            return
        if self.broken:
            raise Lost("a step was interrupted, and the other ranks are still in it; start again")
        self.inside = self.broken = True
        if self.role == "leader":
            self.broadcast(name, *arguments)
        try:
            if not self.role:
                self.check_same(name, compared)
            yield
            self.broken = False
        except ValueError as error:
            if not isinstance(error, Agreed):
                with contextlib.suppress(Agreed):
                    self.share_error(error)
            self.broken = False
            raise
        finally:
            self.inside = False

    # ---- the command line -------------------------------------------------------------

    def begin(self, role: str) -> None:
        """Take a role, and watch the others."""
        self.role = role
        for peer in set(range(self.n)) - {self.rank}:
            threading.Thread(target=self.watch, args=(peer,), daemon=True).start()

    def lead(self, program) -> int:
        """Run a program that uses the engine; return its exit code."""
        code = 1
        self.begin("leader")
        try:
            code = program()
        except Lost as error:
            code = 2
            if self.may_print():
                print_error(error)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
            if code == 143 and self.may_print():  # by torchrun, mostly
                print_error(f"{self.wait_for_cause() or 'ended by SIGTERM'}; all ranks end")
        except BaseException:
            traceback.print_exc()
        self.may_print()  # from now on no other rank prints
        if not self.broken:
            with contextlib.suppress(Lost):
                self.broadcast("end", code)
                self.set_done()
        return code

    def follow(self, start) -> int:
        """Carry out the leader's commands until it ends; return its exit code."""
        engine = None
        self.begin("worker")
        for ending in (signal.SIGINT, signal.SIGTERM):  # torchrun sends Ctrl-C to every rank
            signal.signal(ending, signal.SIG_DFL)
        while True:
            try:
                name, *arguments = self.broadcast()
                if name == "end":
                    self.set_done()
                    return arguments[0]
                if name == "start":
                    engine = start(*arguments)
                else:
                    engine.pending, args, options = arguments
                    getattr(engine, name)(*args, **options)
            except ValueError:
                pass  # the leader raises it too, and prints it
            except Lost as error:
                if self.may_print(after=GRACE):
                    print_error(error)
                return 2
            except BaseException as error:
                self.leave_cause(f"rank {self.rank}: {type(error).__name__}: {first_line(error)}")
                return 2

    # ---- how ranks end ----------------------------------------------------------------

    @contextlib.contextmanager
    def connection(self):
        """Turn torch's error about a connection into Lost, with the cause if one is stored."""
        try:
            yield
        except RuntimeError as error:
            self.outlive_sigterm()
            cause = self.wait_for_cause()
            cause = cause or f"the connection between ranks broke ({first_line(error)})"
            raise Lost(f"{cause}; all ranks end") from None

    def watch(self, peer: int) -> None:
        """End this process soon after a peer ends without `set_done`."""
        with contextlib.suppress(RuntimeError):
            dist.recv(torch.empty(1), src=peer, group=self.objects)  # never comes
        try:
            if self.store.check([f"done {peer}"]):
                return
            self.leave_cause(f"rank {peer} was lost")
        except RuntimeError:
            pass
        # the main thread ends by itself, unless it waits for a GPU or a person
        time.sleep(2 * GRACE)
        if self.may_print():
            print_error(f"{self.wait_for_cause() or f'rank {peer} was lost'}; all ranks end")
        os._exit(2)

    def outlive_sigterm(self) -> None:
        """Ignore SIGTERM, which torchrun is about to send: this rank prints why, then ends."""
        if self.role:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def leave_cause(self, why: str) -> None:
        """Store why ranks end, for the others, unless a rank already has."""
        with contextlib.suppress(RuntimeError):
            self.store.compare_set("failed", "", why)

    def wait_for_cause(self) -> str:
        """Return the cause that a rank has stored, or stores within half a second; else ""."""
        with contextlib.suppress(RuntimeError):
            for _ in range(10):
                if self.store.check(["failed"]):
                    return self.store.get("failed").decode()
                time.sleep(0.05)
        return ""

    def may_print(self, after: float = 0.0) -> bool:
        """Return whether this rank prints the error: the first that asks, after `after` seconds."""
        try:
            end = time.monotonic() + after
            while time.monotonic() < end and not self.store.check(["spoken"]):
                time.sleep(0.05)
            return self.store.add("spoken", 1) == 1
        except RuntimeError:  # the store went with its rank
            return self.rank == 1

    def set_done(self) -> None:
        """Store that this rank ends as it should."""
        with contextlib.suppress(RuntimeError):
            self.store.set(f"done {self.rank}", "1")


def leave() -> None:
    """End torch's threads before Python ends; otherwise a finished script sometimes aborts."""
    if dist.is_initialized():
        dist.destroy_process_group()


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def print_error(error) -> None:
    print(f"slim: error: {one_line(error)}", file=sys.stderr, flush=True)
