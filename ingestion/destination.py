"""How dlt's Postgres destination loads our files: COPY in Postgres' binary or text format, in large pieces.

dlt's own job takes CSV, which costs Postgres nearly twice as much to read, and hands it over in pieces of 8 kB: each
piece takes Python's lock from the thread that decodes the next load. And dlt connects anew for each of its steps; here
a load keeps its connection.
"""

from typing import Any

import psycopg2.extensions
from dlt.common.destination import DestinationCapabilitiesContext
from dlt.common.destination.client import LoadJob, RunnableLoadJob
from dlt.common.normalizers.naming import NamingConvention
from dlt.destinations import postgres
from dlt.destinations.impl.postgres.postgres import PostgresClient, PostgresCsvCopyJob
from dlt.destinations.impl.postgres.sql_client import Psycopg2SqlClient

from ingestion.package import BINARY_HEADER

PIECE_BYTES = 2 << 20


class CopyJob(RunnableLoadJob):
    """One file into one table, in a transaction of its own. See `ingestion.package` for what stands in it."""

    _job_client: PostgresClient

    def run(self) -> None:
        """Copy the file."""
        client = self._job_client.sql_client
        with open(self._file_path, "rb") as file:
            names = file.readline().decode().split()
            columns = ",".join(client.escape_column_name(name) for name in names)
            form = "binary" if file.peek(len(BINARY_HEADER)).startswith(BINARY_HEADER) else "text"
            table = client.make_qualified_table_name(self.load_table_name)
            copy = f"copy {table} ({columns}) from stdin (format {form})"
            with client.begin_transaction(), client.native_connection.cursor() as cursor:
                cursor.copy_expert(copy, file, size=PIECE_BYTES)


class KeptConnections(Psycopg2SqlClient):
    """dlt's access to Postgres; a connection that was given up in good order is taken up again."""

    def __init__(self, given: Psycopg2SqlClient) -> None:
        super().__init__(given.dataset_name, given.staging_dataset_name, given.credentials, given.capabilities)
        self.kept: list[psycopg2.extensions.connection] = []

    def open_connection(self) -> Any:
        """A connection in autocommit."""
        if not self.kept:
            return super().open_connection()
        self._conn = self.kept.pop()
        return self._conn

    def close_connection(self) -> None:
        """Give the connection up."""
        if self._conn is not None and not self._conn.closed and self._conn.status == psycopg2.extensions.STATUS_READY:
            self.kept.append(self._conn)
            self._conn = None
        else:
            super().close_connection()


class CopyClient(PostgresClient):
    """dlt's Postgres client, with our job for files and connections kept for the next one."""

    sql_client: KeptConnections

    def __init__(self, schema: Any, config: Any, capabilities: DestinationCapabilitiesContext) -> None:
        super().__init__(schema, config, capabilities)
        self.sql_client = KeptConnections(self.sql_client)

    def create_load_job(self, table: Any, file_path: str, load_id: str, restore: bool = False) -> LoadJob:
        """The job that loads a file of a package."""
        job = super().create_load_job(table, file_path, load_id, restore)
        return CopyJob(file_path) if isinstance(job, PostgresCsvCopyJob) else job


class copying_postgres(postgres):
    """dlt's Postgres destination, loaded by `CopyJob`."""

    def capabilities(
        self, config: Any = None, naming: NamingConvention | None = None
    ) -> DestinationCapabilitiesContext:
        """What it can do: worked out once. dlt asks twenty times a load, and resolves its configuration each time."""
        if config is not None:
            return super().capabilities(config, naming)
        known: dict[str | None, DestinationCapabilitiesContext] = self.__dict__.setdefault("_known_capabilities", {})
        name = None if naming is None else naming.name()
        if name not in known:
            known[name] = super().capabilities(None, naming)
        # dlt writes into what it is given.
        return known[name].copy()

    def client(self, schema: Any, initial_config: Any = None) -> CopyClient:
        """A client with the connections of those before it."""
        client = super().client(schema, initial_config)
        assert isinstance(client, CopyClient)
        client.sql_client.kept = self.__dict__.setdefault("_kept", [])
        return client

    def close(self) -> None:
        """End the connections that were kept."""
        kept = self.__dict__.get("_kept", [])
        while kept:
            kept.pop().close()

    @property
    def client_class(self) -> type[PostgresClient]:
        """The client dlt opens."""
        return CopyClient

    @property
    def destination_type(self) -> str:
        """For `dlt pipeline`, which knows dlt's own only."""
        return "dlt.destinations.postgres"
