"""Connections to the warehouse: one way to open them, with failures classed for the reader and the retry.

Refuses to guess: a wrong password is not retried, a server that does not answer is.
"""

import re

import psycopg2
import psycopg2.extensions

from ingestion.errors import AuthenticationError, ConfigurationError, TransientError, WarehouseError
from ingestion.settings import Settings

Connection = psycopg2.extensions.connection

CONNECT_TIMEOUT_S = 10


def connect(settings: Settings, *, purpose: str = "warehouse") -> Connection:
    """A connection with `application_name` = payments-warehouse <purpose>, in UTC.

    Raises:
        ConfigurationError, AuthenticationError, TransientError: named by what the server or libpq answered.
    """
    dsn = settings.require("WAREHOUSE_DSN", "the commands need a Postgres to land in")
    try:
        options = psycopg2.extensions.parse_dsn(dsn).get("options", "")
        return psycopg2.connect(
            dsn,
            connect_timeout=CONNECT_TIMEOUT_S,
            application_name=f"payments-warehouse {purpose}",
            options=f"{options} -c timezone=UTC",
        )
    except psycopg2.Error as error:
        raise classify_connect_error(error, dsn) from None


def where(dsn: str) -> str:
    """host:port/dbname of a DSN, without its secrets."""
    try:
        parts = psycopg2.extensions.parse_dsn(dsn)
    except psycopg2.ProgrammingError:
        return "the server named by WAREHOUSE_DSN"
    return f"{parts.get('host', 'localhost')}:{parts.get('port', '5432')}/{parts.get('dbname', '')}"


def classify_connect_error(error: Exception, dsn: str) -> WarehouseError:
    """The warehouse's error for a failed connection; libpq gives text only, so text decides."""
    text = " ".join(str(error).split())
    place = where(dsn)
    if isinstance(error, psycopg2.ProgrammingError):
        return ConfigurationError(
            "WAREHOUSE_DSN cannot be read as a Postgres connection string.",
            hint="Its form is postgresql://user:password@host:5432/database.",
        )
    if re.search(r"password authentication failed|no password supplied|pg_hba\.conf|role .* does not exist", text):
        return AuthenticationError(
            f"Postgres at {place} refused the user or the password.", hint="Check WAREHOUSE_DSN; see .env.example."
        )
    if re.search(r"permission denied for database", text):
        return AuthenticationError(
            f"Postgres at {place} does not let the user in.", hint="grant connect on database ... to ..."
        )
    if re.search(r"invalid (integer value|port number|\S+ value)", text):
        return ConfigurationError(
            f"WAREHOUSE_DSN has a parameter Postgres does not understand: {place}.",
            hint="Its form is postgresql://user:password@host:5432/database.",
        )
    if re.search(r"does not support SSL|SSL support is not compiled in|sslmode", text):
        return ConfigurationError(
            f"Postgres at {place} and WAREHOUSE_DSN do not agree on SSL.", hint="Check sslmode in WAREHOUSE_DSN."
        )
    if re.search(r"database .* does not exist", text):
        return ConfigurationError(
            f"Postgres at {place} has no such database.", hint="Create it, or name another in WAREHOUSE_DSN."
        )
    if re.search(r"could not translate host name", text):
        return ConfigurationError(f"The host of {place} cannot be found.", hint="Check the host in WAREHOUSE_DSN.")
    return TransientError(
        f"Postgres at {place} does not answer.", hint="Is the server running and reachable? `warehouse doctor` checks."
    )


def classify_error(error: psycopg2.Error) -> WarehouseError | None:
    """What a failed statement of ours means to the user; None where the statement itself is at fault.

    Only what Postgres says of itself is passed on: for some errors it quotes values.
    """
    code = error.pgcode or ""
    if code == "42501":
        return AuthenticationError(
            f"Postgres refused the user of WAREHOUSE_DSN: {error.diag.message_primary}.",
            hint="Grant it; `warehouse doctor` checks what is needed.",
        )
    if code.startswith(("08", "40", "53", "55P03", "57")) or (
        not code and isinstance(error, psycopg2.OperationalError | psycopg2.InterfaceError)
    ):
        said = error.diag.message_primary or "the connection was lost"
        return TransientError(
            f"Postgres went away or cannot serve us now: {said}.", hint="Run again; what was committed stays."
        )
    return None
