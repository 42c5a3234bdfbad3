"""The warehouse's connection in the form dlt takes, handed to libpq in libpq's own.

dlt writes a connection as a URL in which a space becomes `+`, which libpq does not read back, and imports SQLAlchemy
(half a second of CPU) to do so.
"""

import psycopg2.extensions
from dlt.common.configuration import configspec
from dlt.destinations.impl.postgres.configuration import PostgresCredentials

from ingestion import ledger
from ingestion.feeds import FeedSpec
from ingestion.settings import Settings

# What the open connection says, or the session has of its own.
TAKEN_FROM_CONNECTION = ("host", "hostaddr", "port", "user", "password", "dbname", "connect_timeout")


@configspec(init=False)
class LibpqCredentials(PostgresCredentials):
    """dlt's Postgres credentials, written as `name='value'` pairs."""

    def to_native_representation(self) -> str:
        """What psycopg2 connects with; `open_connection` of dlt adds the search path to `options`."""
        return psycopg2.extensions.make_dsn(
            host=self.host,
            port=self.port,
            user=self.username,
            password=self.password,
            dbname=self.database,
            **self.get_query(),
        )

    def __str__(self) -> str:
        return f"postgresql://{self.username}@{self.host}:{self.port}/{self.database}"


def build_credentials(
    settings: Settings, connection: psycopg2.extensions.connection, feed: FeedSpec
) -> LibpqCredentials:
    """The open connection's server and user, the parameters of WAREHOUSE_DSN, and a session named for the feed.

    Taken from the connection, because libpq may have the password from a file of its own.
    """
    options = psycopg2.extensions.parse_dsn(settings.require("WAREHOUSE_DSN", "to land into"))
    info = connection.info
    credentials = LibpqCredentials(
        {
            "host": info.host,
            "port": info.port,
            "username": info.user,
            "password": info.password or "",
            "database": info.dbname,
            "query": {
                **{name: value for name, value in options.items() if name not in TAKEN_FROM_CONNECTION},
                "application_name": ledger.load_session_name(feed),
            },
        }
    )
    # Resolved, dlt takes the object as it is; any other it copies into a class of its own.
    return credentials.resolve()
