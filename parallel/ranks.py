"""The processes that torchrun started, one a GPU (a rank each), and what they tell each other.

Rank 0 is the command line's leader: it alone reads, samples and prints. The other ranks are workers and do to their
part of the engine what the leader does to its own (`lead`, `follow`, `command`). In a script of the user's own, every
rank runs the script and calls the engine alike. Tensors meet in torch's collectives, NCCL on GPUs, gloo on CPUs.

How all end. An error that a rank meets before a step is told to all and raised on all (`together`). One inside a
step ends its rank; the connections to it then break, and every other rank ends on that, in a collective or in a
thread that watches the connection (`watch`), which also sees a rank that was killed while others wait on a GPU. A
line about it is printed once (`may_print`).
"""

import atexit
import contextlib
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

IDLE = timedelta(
    days=30
)  # for objects: ranks wait for a person, and for a disk; a rank that ends ends this too
STEP = timedelta(
    minutes=10
)  # for tensors: in a step, ranks wait for each other no longer than this
MEET = timedelta(minutes=1)  # until all have started
GRACE = 2.0  # seconds that a rank has to say itself why it ends


class Lost(RuntimeError):
    """Another rank has ended, or a step was broken off, so that no rank can go on."""


class Agreed(ValueError):
    """What some rank could not do, raised on every rank, none of which has changed anything."""


class Ranks:
    """This process among the others: `rank` of `n`."""

    def __init__(self):
        try:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            store, rank, n = next(dist.rendezvous("env://", timeout=MEET))
            store.set_timeout(STEP)
            if not dist.is_initialized():
                dist.init_process_group(backend, store=store, rank=rank, world_size=n, timeout=STEP)
                atexit.register(leave)
            self.rank, self.n = dist.get_rank(), dist.get_world_size()
            self.tensors = dist.new_group(
                backend=backend, timeout=STEP
            )  # a script's own group may lack CPU or GPU
            self.objects = dist.new_group(
                backend="gloo", timeout=IDLE
            )  # on the CPU; breaks with any rank
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"the ranks do not reach each other: {first_line(error)}; start them with torchrun, or unset "
                "WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT to run one process"
            ) from None
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(f"slim/{attempt}", store)
        self.role = ""  # "leader" or "worker"; in a user's own script neither
        self.inside = self.broken = False  # a command is under way; one was broken off
        self.calls = self.bytes = 0  # of tensors that met so far

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
        """Return the tensor of which every rank has a part: `where` along dim, n long; an empty part adds nothing."""
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

    def together(self, work):
        """Return what work() does on this rank; if it fails on any rank, raise on all what the first of them met."""
        result, error = None, None
        try:
            result = work()
        except (ValueError, OSError, MemoryError, RuntimeError) as caught:
            if isinstance(caught, Lost):
                raise
            error = caught
        errors = self.gather(None if error is None else " ".join(str(error).split()))
        for rank, text in enumerate(errors):
            if text is not None:
                raise Agreed(f"rank {rank}: {text}" if rank else text) from error
        return result

    @contextlib.contextmanager
    def command(self, name: str, *arguments):
        """Do something on this rank; the leader has the workers do it too.

        An error about the input, a ValueError, leaves all as they were. A rank that meets one alone, before
        its step, says so where the others are: where they ask each other whether to begin.
        """
        if self.inside:
            yield
            return
        if self.broken:
            raise Lost("a step was broken off, and the other ranks are still in it; start again")
        self.inside = self.broken = True
        if self.role == "leader":
            self.broadcast(name, *arguments)
        try:
            yield
            self.broken = False
        except ValueError as error:
            if not isinstance(error, Agreed):
                self.gather(" ".join(str(error).split()))
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
        self.may_print()  # whatever the others meet now, all is said
        if not self.broken:
            with contextlib.suppress(Lost):
                self.broadcast("end", code)
                self.set_done()
        return code

    def follow(self, start) -> int:
        """Carry out the leader's commands until it ends; return its exit code."""
        engine = None
        self.begin("worker")
        for ending in (
            signal.SIGINT,
            signal.SIGTERM,
        ):  # Ctrl-C under torchrun reaches every rank, and ends them all
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
                pass  # the leader has it too, and prints it
            except Lost as error:
                if self.may_print(after=GRACE):
                    print_error(error)
                return 2
            except BaseException as error:
                self.leave_cause(f"rank {self.rank}: {type(error).__name__}: {first_line(error)}")
                return 2

    # ---- how all end ------------------------------------------------------------------

    @contextlib.contextmanager
    def connection(self):
        """Turn torch's error about a connection into ours, which says what happened if anybody knows."""
        try:
            yield
        except RuntimeError as error:
            self.outlive_sigterm()
            why = (
                self.wait_for_cause() or f"the connection between ranks broke ({first_line(error)})"
            )
            raise Lost(f"{why}; all ranks end") from None

    def watch(self, peer: int) -> None:
        """End this process soon after a peer that ended otherwise than it should."""
        with contextlib.suppress(RuntimeError):
            dist.recv(torch.empty(1), src=peer, group=self.objects)  # never comes
        try:
            if self.store.check([f"done {peer}"]):
                return
            self.leave_cause(f"rank {peer} was lost")
        except RuntimeError:
            pass
        time.sleep(
            2 * GRACE
        )  # by now the main thread has met the loss, unless it waits for a GPU or a person
        if self.may_print():
            print_error(f"{self.wait_for_cause() or f'rank {peer} was lost'}; all ranks end")
        os._exit(2)

    def outlive_sigterm(self) -> None:
        """Ignore SIGTERM from now on: torchrun is about to send it, but this rank ends by itself and first says why."""
        if self.role:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def leave_cause(self, why: str) -> None:
        """Tell the others why ranks end, unless one has."""
        with contextlib.suppress(RuntimeError):
            self.store.compare_set("failed", "", why)

    def wait_for_cause(self) -> str:
        """Return the cause that some rank has left, or leaves within half a second; "" if none does."""
        with contextlib.suppress(RuntimeError):
            for _ in range(10):
                if self.store.check(["failed"]):
                    return self.store.get("failed").decode()
                time.sleep(0.05)
        return ""

    def may_print(self, after: float = 0.0) -> bool:
        """Say whether this rank is to print the line: the first that asks, rank 0 at once, others `after` seconds."""
        try:
            end = time.monotonic() + after
            while time.monotonic() < end and not self.store.check(["spoken"]):
                time.sleep(0.05)
            return self.store.add("spoken", 1) == 1
        except RuntimeError:  # the store went with its rank
            return self.rank == 1

    def set_done(self) -> None:
        """Tell the others that this rank ends as it should."""
        with contextlib.suppress(RuntimeError):
            self.store.set(f"done {self.rank}", "1")


def leave() -> None:
    """End torch's threads before Python ends, which now and then aborts a finished script otherwise."""
    if dist.is_initialized():
        dist.destroy_process_group()


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def print_error(error) -> None:
    print(f"slim: error: {one_line(error)}", file=sys.stderr, flush=True)
