"""Embedded services: Postgres, a Kafka broker and sample rates for whoever has no servers of their own.

Data flow: settings -> `running` (for the length of a block) or `start`/`stop` (until told otherwise) -> settings in
which every service has an address. One supervisor process per home runs what is embedded; what a setting names
(WAREHOUSE_DSN, KAFKA_BOOTSTRAP_SERVERS, FX_API_BASE) is never started. Importing this starts and loads nothing.
"""

from orchestration.services.client import (
    Lease,
    ServicesStatus,
    ServiceState,
    erase,
    running,
    start,
    status,
    stop,
)
from orchestration.services.plan import KAFKA, POSTGRES, RATES

__all__ = [
    "KAFKA",
    "POSTGRES",
    "RATES",
    "Lease",
    "ServiceState",
    "ServicesStatus",
    "erase",
    "running",
    "start",
    "status",
    "stop",
]
