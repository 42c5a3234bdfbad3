"""Pathway: Kafka to Postgres in its Rust engine, JSON read into typed columns, rows inserted in batches."""

import json
import resource
import sys
import time
from urllib.parse import urlparse

import pathway as pw
import psycopg2


class Transaction(pw.Schema):
    transaction_id: str
    amount: float
    currency: str
    user_id: str
    merchant_id: str
    country: str
    created_at: str
    status: str


def main() -> None:
    started, task = float(sys.argv[1]), json.loads(sys.argv[2])
    with psycopg2.connect(task["dsn"]) as connection, connection.cursor() as cursor:
        cursor.execute(
            "create table peer (transaction_id text not null, amount double precision not null, "
            "currency text not null, user_id text not null, merchant_id text not null, country text not null, "
            "created_at text not null, status text not null, time bigint not null, diff bigint not null)"
        )
    connection.close()
    read = pw.io.kafka.read(
        {
            "bootstrap.servers": task["bootstrap"],
            "broker.address.family": "v4",
            "group.id": "pathway",
            "auto.offset.reset": "earliest",
        },
        topic=task["topic"],
        format="json",
        schema=Transaction,
        mode="static",
    )
    place = urlparse(task["dsn"])
    pw.io.postgres.write(
        read,
        {
            "host": place.hostname,
            "port": str(place.port),
            "dbname": place.path.lstrip("/"),
            "user": place.username,
            "password": place.password,
        },
        "peer",
    )
    pw.run(monitoring_level=pw.MonitoringLevel.NONE)
    seconds = time.time() - started
    print(json.dumps({"seconds": seconds, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


if __name__ == "__main__":
    main()
