"""What densegrad raises. Every message names the argument, what was expected, what came and the cure."""


class DensegradError(Exception):
    """The base of all of them."""


class ShapeError(DensegradError, ValueError):
    """Sizes or numbers of dimensions that do not fit together."""


class DTypeError(DensegradError, TypeError):
    """An element type that is not supported, or two that should be equal."""


class DeviceError(DensegradError, RuntimeError):
    """No device to run on, or arrays that lie on different ones."""


class OutError(DensegradError, ValueError):
    """An ``out`` that cannot be written: read-only, overlapping an input, or missing where it is needed."""


class OutDeviceError(OutError, DeviceError):
    """An ``out`` that lies on another device than the inputs."""


class PlanError(DensegradError, ValueError):
    """A plan that was made for other sizes or types, that no kernel can carry out, or a file of plans that is none."""


class PrepareError(DensegradError, ValueError):
    """A call that cannot be prepared, since it copies arrays, or one that has to be before it is captured."""


class DistributedError(DensegradError, RuntimeError):
    """Ranks that disagree, failed, or did not come in time; the message names them.

    `ranks` has their numbers. `agreed` says whether rank 0 has told this error to all that came: the communicator can
    be used again then. Otherwise the rank stopped waiting by itself, and takes part in nothing more of it.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = (), agreed: bool = False):
        super().__init__(message)
        self.ranks, self.agreed = ranks, agreed


class AccumulatorError(DensegradError, RuntimeError):
    """A `GradientAccumulator` that takes nothing more: closed, done, or failed half-way."""
