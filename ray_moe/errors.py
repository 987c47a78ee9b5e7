"""Every error a caller can meet, one class per thing the caller can do about it.

The class decides the gRPC and HTTP code (one table, in `wire/status.py`). All of them are built from one
message and, where a time to retry is known, `retry_after_s`; so they survive pickling and can be rebuilt on the other
side of a wire. A message says what was wrong, what was expected, and what to do.
"""


class RayMoEError(Exception):
    """Base of all errors of this package."""

    def __init__(self, *args: object, retry_after_s: float | None = None, request_id: str = "") -> None:
        """Keeps what it is told.

        Args:
            args: the message.
            retry_after_s: seconds from now after which the same call may succeed, for `Overloaded` and `Unavailable`.
                None: not known.
            request_id: under which the service's log has the request, for the errors that a client raises.
        """
        super().__init__(*args)
        self.retry_after_s = retry_after_s  # no default on the class: Ray's stand-ins look absent attributes up here
        self.request_id = request_id

    @property
    def message(self) -> str:
        return str(self)


# --- The caller's input -------------------------------------------------------------------------------------
class InvalidRequest(RayMoEError):
    """The request is malformed (dtype, shape, range, NaN ...): change it, a retry cannot help."""


class WireError(InvalidRequest):
    """Bytes that are not a message of this protocol."""


class NotFound(RayMoEError):
    """The model, layer or expert that was named does not exist; the message names those that do."""


class InvalidConfig(RayMoEError):
    """The configuration contradicts itself, the model or the machine: change the named setting."""


class Unauthenticated(RayMoEError):
    """The API key is absent, unknown or expired: send a valid one."""


class PermissionDenied(RayMoEError):
    """The API key is valid but lacks the role that the call needs: use a key that has it."""


# --- The checkpoint -----------------------------------------------------------------------------------------
class InvalidCheckpoint(RayMoEError):
    """The checkpoint is missing, incomplete or inconsistent: repair the named file."""


class UnsupportedModel(RayMoEError):
    """The checkpoint is sound, but this model cannot be served with its experts apart; the message says why."""


# --- The machine --------------------------------------------------------------------------------------------
class InsufficientResources(RayMoEError):
    """Memory, CPUs, GPUs or a port that were asked for are not there; the message has both numbers."""


class Overloaded(RayMoEError):
    """Too much work is queued already, or the caller's own limit is reached: retry later (`retry_after_s`)."""


class Unavailable(RayMoEError):
    """The service cannot answer now (starting, stopping, experts not recovered in time): retry."""


class DeadlineExceeded(RayMoEError):
    """No answer within the caller's time."""


class Cancelled(RayMoEError):
    """The caller went away, or asked to stop."""


# --- Training -----------------------------------------------------------------------------------------------
class StepRefused(RayMoEError):
    """A training step that must not be made (NaN, made already, out of order): nothing has changed; see the message."""


class StepInterrupted(Unavailable):
    """A training step lost a host or a worker on the way: it is repeated from the last snapshot."""


# --- Between router and host (retried inside the dispatcher; never reach a client as they are) --------------
class HostLost(Unavailable):
    """The stream to an expert host broke, or the host stopped answering: send the rows elsewhere."""


class StaleRouting(RayMoEError):
    """The host does not hold an expert that the routing table of that epoch sent to it: refresh the table."""


class ExpertFailed(RayMoEError):
    """An expert's computation itself raised; the same call would raise again."""
