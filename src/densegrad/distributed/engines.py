"""What carries numbers from rank to rank: MPI, torch.distributed and NCCL, each behind the same few methods.

    engine       recognises                               buffers lie on            adds
    Mpi          a communicator of mpi4py                 the host; a GPU if asked  float32, float64
    Torch        a process group of torch.distributed     the host; of nccl a GPU   all four dtypes
    CupyNccl     cupy.cuda.nccl.NcclCommunicator          a GPU                     all four dtypes
    CupyBackend  cupyx.distributed.NCCLBackend            a GPU                     float16, float32, float64
    Nccl4py      nccl.core.Communicator of nccl4py        a GPU                     all four dtypes

No library is imported here: whoever hands over a communicator has done that. Buffers are flat and contiguous, NumPy's
on the host and CuPy's on a GPU. Each method starts something and returns what waits for it, to a time of
`time.monotonic`. What a GPU's engine starts is queued on CuPy's current stream, so there is nothing to wait for.
"""
from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import numpy as np

from .. import tensors

#: of messages between two ranks, in MPI and torch.distributed: descriptors, answers, pieces
DESCRIPTOR_TAG, ANSWER_TAG, PIECE_TAG = 32101, 32102, 32103

#: the longest sleep between two looks at whether MPI is done
_NAP_SECONDS = 1e-3

#: where buffers lie
HOST, GPU = "the host", "a GPU"
_EVERY = frozenset(("float16", "bfloat16", "float32", "float64"))
#: requests of MPI that nobody waits for any more: it may still write into their buffers
_abandoned: list[Any] = []


class Late(Exception):
    """The time is up."""


class Broken(Exception):
    """The engine has failed, in its own words."""


class Pending(Protocol):
    """What was started."""

    def wait(self, until: float) -> None:
        """Return when it is done; raise Late at the time `until`, Broken if the engine fails."""


class Engine(Protocol):
    """One rank's end of a communicator."""

    name: str
    rank: int
    size: int
    #: where its buffers may lie
    places: frozenset[str]
    #: the dtypes that it adds
    carries: frozenset[str]

    def send(self, buffer: Any, to: int) -> Pending:
        """Send a buffer, which must not be changed until that is done."""

    def receive(self, buffer: Any, source: int) -> Pending:
        """Fill a buffer with what the source sends; in the order in which it was sent."""

    def broadcast(self, buffer: Any, root: int) -> Pending:
        """Fill every rank's buffer with the root's."""

    def all_reduce(self, buffer: Any) -> Pending:
        """Replace every rank's buffer by the sum of all, in an order of the engine's own."""

    def abort(self) -> None:
        """Give up what was started, where the engine can."""


def place_of(buffer: Any) -> str:
    """Where an array of NumPy or CuPy lies."""
    return HOST if isinstance(buffer, np.ndarray) else GPU


class Done:
    """What there is nothing to wait for."""

    def wait(self, until: float) -> None:
        """At once."""


def poll(done: Callable[[], bool], until: float) -> None:
    """Return when it is done, looking less often the longer it takes.

    Raises
    ------
    Late
        At the time `until`.
    """
    nap = 0.0
    while not done():
        if time.monotonic() > until:
            raise Late
        time.sleep(nap)
        nap = min(nap + 2e-5, _NAP_SECONDS)


class MpiRequest:
    """A request of mpi4py, which keeps its buffer."""

    def __init__(self, request: Any):
        self.request = request

    def wait(self, until: float) -> None:
        """Ask MPI again and again, which is what lets it get on."""
        try:
            poll(self.request.Test, until)
        except Late:
            _abandoned.append(self.request)
            raise
        except sys.modules["mpi4py.MPI"].Exception as error:
            raise Broken(f"MPI says: {error}") from error


class Mpi:
    """A communicator of mpi4py, whose buffers are a GPU's if MPI is said to be CUDA-aware."""

    name, carries = "MPI", frozenset(("float32", "float64"))

    def __init__(self, comm: Any, cuda_aware: bool = False):
        self.comm, self.places = comm, frozenset((HOST, GPU) if cuda_aware else (HOST,))
        self.rank, self.size = comm.Get_rank(), comm.Get_size()

    def send(self, buffer: Any, to: int) -> Pending:
        """As Engine says."""
        return MpiRequest(self.comm.Isend(self._ready(buffer), to, PIECE_TAG))

    def receive(self, buffer: Any, source: int) -> Pending:
        """As Engine says."""
        return MpiRequest(self.comm.Irecv(self._ready(buffer), source, PIECE_TAG))

    def broadcast(self, buffer: Any, root: int) -> Pending:
        """As Engine says."""
        return MpiRequest(self.comm.Ibcast(self._ready(buffer), root))

    def all_reduce(self, buffer: Any) -> Pending:
        """As Engine says."""
        return MpiRequest(self.comm.Iallreduce(sys.modules["mpi4py.MPI"].IN_PLACE, self._ready(buffer)))

    def _ready(self, buffer: Any) -> Any:
        """The buffer, when what is queued on the stream has written it: MPI knows no streams."""
        if place_of(buffer) == GPU:
            sys.modules["cupy"].cuda.get_current_stream().synchronize()
        return buffer

    def abort(self) -> None:
        """MPI has no way but to end the job, which is the user's to choose."""


class _Work:
    """A work handle of torch.distributed, and the tensor that it is about."""

    def __init__(self, work: Any, tensor: Any):
        self.work, self.tensor = work, tensor

    def wait(self, until: float) -> None:
        """In PyTorch; on a GPU the stream waits, not the host."""
        left = max(until - time.monotonic(), 1e-3)
        try:
            self.work.wait(timedelta(seconds=left))
        except RuntimeError as error:
            if time.monotonic() >= until:
                raise Late from error
            raise Broken(f"torch.distributed says: {error}") from error


class Torch:
    """A process group of torch.distributed."""

    name, carries = "torch.distributed", _EVERY

    def __init__(self, group: Any):
        self.dist, self.group = sys.modules["torch.distributed"], group
        self.places = frozenset((GPU if "nccl" in self.dist.get_backend(group) else HOST,))
        self.rank, self.size = group.rank(), group.size()

    def send(self, buffer: Any, to: int) -> Pending:
        """As Engine says."""
        return self._start(self.dist.isend, buffer, self._global(to), tag=PIECE_TAG)

    def receive(self, buffer: Any, source: int) -> Pending:
        """As Engine says."""
        return self._start(self.dist.irecv, buffer, self._global(source), tag=PIECE_TAG)

    def broadcast(self, buffer: Any, root: int) -> Pending:
        """As Engine says."""
        return self._start(self.dist.broadcast, buffer, self._global(root), async_op=True)

    def all_reduce(self, buffer: Any) -> Pending:
        """As Engine says."""
        return self._start(self.dist.all_reduce, buffer, async_op=True)

    def _start(self, function: Any, buffer: Any, *others: Any, **options: Any) -> Pending:
        torch = sys.modules["torch"]
        try:
            if place_of(buffer) == HOST:
                tensor = tensors.host_tensor(buffer)
                return _Work(function(tensor, *others, group=self.group, **options), tensor)
            pointer, where = sys.modules["cupy"].cuda.get_current_stream().ptr, torch.device("cuda", buffer.device.id)
            with torch.cuda.stream(torch.cuda.ExternalStream(pointer, device=where)):
                work = function(torch.from_dlpack(buffer), *others, group=self.group, **options)
                work.wait()  # the stream does: what is queued next comes after it
            return Done()
        except RuntimeError as error:
            raise Broken(f"torch.distributed says: {error}") from error

    def _global(self, rank: int) -> int:
        return self.dist.get_global_rank(self.group, rank)

    def abort(self) -> None:
        """Left to PyTorch's own watchdog: groups are ended together."""


class CupyNccl:
    """CuPy's communicator of NCCL."""

    name, places, carries = "NCCL", frozenset((GPU,)), _EVERY

    def __init__(self, comm: Any):
        self.comm, self.cuda = comm, sys.modules["cupy"].cuda
        self.rank, self.size = comm.rank_id(), comm.size()

    def send(self, buffer: Any, to: int) -> Pending:
        """As Engine says."""
        return self._queued(self.comm.send, buffer, to)

    def receive(self, buffer: Any, source: int) -> Pending:
        """As Engine says."""
        return self._queued(self.comm.recv, buffer, source)

    def broadcast(self, buffer: Any, root: int) -> Pending:
        """As Engine says."""
        return self._queued(self.comm.bcast, buffer, root)

    def all_reduce(self, buffer: Any) -> Pending:
        """As Engine says."""
        pointer = buffer.data.ptr
        self.comm.allReduce(pointer, pointer, buffer.size, self._dtype(buffer), self.cuda.nccl.NCCL_SUM, self._stream())
        return Done()

    def _queued(self, function: Any, buffer: Any, peer: int) -> Pending:
        function(buffer.data.ptr, buffer.size, self._dtype(buffer), peer, self._stream())
        return Done()

    def _dtype(self, buffer: Any) -> int:
        return getattr(self.cuda.nccl, f"NCCL_{buffer.dtype.name.upper()}")

    def _stream(self) -> int:
        return self.cuda.get_current_stream().ptr

    def abort(self) -> None:
        """End what NCCL has queued, on this rank."""
        self.comm.abort()


class CupyBackend:
    """cupyx.distributed's backend of NCCL."""

    name, places, carries = "NCCL", frozenset((GPU,)), frozenset(("float16", "float32", "float64"))

    def __init__(self, backend: Any):
        self.backend, self.rank, self.size = backend, backend.rank, backend._n_devices

    def send(self, buffer: Any, to: int) -> Pending:
        """As Engine says."""
        return self._queued(self.backend.send, buffer, to)

    def receive(self, buffer: Any, source: int) -> Pending:
        """As Engine says."""
        return self._queued(self.backend.recv, buffer, source)

    def broadcast(self, buffer: Any, root: int) -> Pending:
        """As Engine says."""
        return self._queued(self.backend.broadcast, buffer, root)

    def all_reduce(self, buffer: Any) -> Pending:
        """As Engine says."""
        return self._queued(self.backend.all_reduce, buffer, buffer)

    def _queued(self, function: Any, buffer: Any, other: Any) -> Pending:
        function(buffer, other, stream=sys.modules["cupy"].cuda.get_current_stream())
        return Done()

    def abort(self) -> None:
        """It has no way to."""


class Nccl4py:
    """The communicator of nccl4py."""

    name, places, carries = "NCCL", frozenset((GPU,)), _EVERY

    def __init__(self, comm: Any):
        self.comm, self.rank, self.size = comm, comm.rank, comm.nranks

    def send(self, buffer: Any, to: int) -> Pending:
        """As Engine says."""
        return self._queued(self.comm.send, buffer, to)

    def receive(self, buffer: Any, source: int) -> Pending:
        """As Engine says."""
        return self._queued(self.comm.recv, buffer, source)

    def broadcast(self, buffer: Any, root: int) -> Pending:
        """As Engine says."""
        return self._queued(self.comm.broadcast, buffer, buffer, root)

    def all_reduce(self, buffer: Any) -> Pending:
        """As Engine says."""
        return self._queued(self.comm.allreduce, buffer, buffer, sys.modules["nccl.core"].SUM)

    def _queued(self, function: Any, *arguments: Any) -> Pending:
        function(*arguments, stream=sys.modules["cupy"].cuda.get_current_stream().ptr)
        return Done()

    def abort(self) -> None:
        """End what NCCL has queued, on this rank."""
        self.comm.abort()


def _is(comm: Any, module: str, name: str) -> bool:
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(comm, kind)


def is_mpi(comm: Any) -> bool:
    """Whether it is a communicator of mpi4py."""
    return _is(comm, "mpi4py.MPI", "Intracomm")


def is_torch(comm: Any) -> bool:
    """Whether it is a process group of torch.distributed."""
    return _is(comm, "torch.distributed", "ProcessGroup")


def engine_of(comm: Any, cuda_aware: bool = False) -> Engine:
    """The engine of a communicator.

    Raises
    ------
    TypeError
        If it is none that is known.
    """
    if is_mpi(comm):
        return Mpi(comm, cuda_aware)
    if cuda_aware:
        raise TypeError(f"cuda_aware is about MPI's communicators; got {type(comm).__name__} (leave it out)")
    if is_torch(comm):
        return Torch(comm)
    if _is(comm, "cupy.cuda.nccl", "NcclCommunicator"):
        return CupyNccl(comm)
    if _is(comm, "cupyx.distributed", "NCCLBackend"):
        return CupyBackend(comm)
    if _is(comm, "nccl.core", "Communicator"):
        return Nccl4py(comm)
    raise TypeError("comm must be a communicator of mpi4py, a process group of torch.distributed, CuPy's "
                    "NcclCommunicator or NCCLBackend, nccl4py's Communicator, or a densegrad.distributed.Ranks of one; "
                    f"got {type(comm).__name__} (pass mpi4py.MPI.COMM_WORLD or torch.distributed.group.WORLD, for "
                    "example)")
