"""Every error the warehouse names: what may be retried, what stops at once, and why a record was set aside.

Two families, never mixed. A `WarehouseError` is about a run: its class says whether trying again can help.
A `Reason` is about one record: it goes to the dead letters with its bytes while the run goes on.
"""

from enum import StrEnum


class ErrorClass(StrEnum):
    """What to do about a failed run."""

    CONFIGURATION = "configuration"  # stop at once; somebody has to change a setting or a declaration
    AUTHENTICATION = "authentication"  # stop at once; somebody has to change a secret or a grant
    TRANSIENT = "transient"  # an outage: the same run can succeed later
    BUSY = "busy"  # another writer holds the feed
    LOSS = "loss"  # the source no longer has records that were never read
    DATA = "data"  # a check on the data itself failed
    INTERNAL = "internal"  # a fault of ours


class Reason(StrEnum):
    """Why a record was dead-lettered."""

    EMPTY_VALUE = "empty_value"
    INVALID_UTF8 = "invalid_utf8"
    MALFORMED_JSON = "malformed_json"
    NOT_AN_OBJECT = "not_an_object"
    DUPLICATE_KEY = "duplicate_key"
    MISSING_FIELD = "missing_field"
    NULL_FIELD = "null_field"
    WRONG_TYPE = "wrong_type"
    INVALID_TEXT = "invalid_text"
    NOT_ACCEPTED = "not_accepted"
    OUT_OF_RANGE = "out_of_range"
    PATTERN_MISMATCH = "pattern_mismatch"
    INVALID_TIMESTAMP = "invalid_timestamp"
    POISON = "poison"


class WarehouseError(Exception):
    """A failure a user can act on: what happened and where, and (`hint`) what to do next.

    Messages never hold a record's payload: coordinates name it.
    """

    error_class = ErrorClass.INTERNAL

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigurationError(WarehouseError):
    """A setting or a declaration is missing or cannot be understood."""

    error_class = ErrorClass.CONFIGURATION


class AuthenticationError(WarehouseError):
    """A server answered and refused us."""

    error_class = ErrorClass.AUTHENTICATION


class TransientError(WarehouseError):
    """A server did not answer, or asked to come back later (`retry_after_s`)."""

    error_class = ErrorClass.TRANSIENT

    def __init__(self, message: str, *, hint: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class FeedBusyError(WarehouseError):
    """Another writer holds the feed, or has taken it over from us."""

    error_class = ErrorClass.BUSY


class SourceLossError(WarehouseError):
    """The source lost records before we read them, or is not the source we read before."""

    error_class = ErrorClass.LOSS


class RefusedDataError(WarehouseError):
    """The database refused a row that fits the contract: some record of the load is poison."""

    error_class = ErrorClass.DATA


class DataError(WarehouseError):
    """A data test, a model or a freshness check failed."""

    error_class = ErrorClass.DATA
