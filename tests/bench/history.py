"""A past to measure on: transactions of many days already landed, written by Postgres itself, and a day's new ones.

fill(settings, connection, 20_000_000)          # 20,000 a day up to 31 May 2025, a load a day; users and rates too
log.land(TRANSACTIONS, new_day(connection, 1))  # 20,000 more: 2 % late, 2 % redelivered, 4 % with a new status
"""

from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from random import Random

import psycopg2.extensions

from ingestion.ddl import ensure_schema
from ingestion.feeds import load_feeds
from ingestion.settings import Settings
from tests.harness.models import RATES, SAMPLE_CURRENCIES, Payment, Rate, RawLog, uuid_of

PER_DAY = 20_000
PER_USER_EVENT = 20  # transactions
USERS, MERCHANTS = 200_000, 5_000
LAST_DAY = date(2025, 5, 31)
CHUNK = 1_000_000

# Load ids below those of RawLog; the days end on LAST_DAY.
_LOAD = "(1000000000 + {n})::text || '.' || lpad(({n} %% 100000)::text, 5, '0')"
_DAY = f"(date '{LAST_DAY}' - (%(days)s - 1 - {{n}})::int)"


def fill(settings: Settings, connection: psycopg2.extensions.connection, transactions: int) -> None:
    """Land so many transactions, a twentieth as many users' events, and the rates of their days."""
    ensure_schema(connection, load_feeds(settings))
    days = -(-transactions // PER_DAY)
    n = f"((i - 1) / {PER_DAY})"
    given = {"days": days}
    with connection, connection.cursor() as cursor:
        for schema, table in (("raw_payments", "transaction_created"), ("raw_users", "user_events")):
            cursor.execute(
                f"insert into {schema}._streams (feed, kind, origin, name, incarnation) "
                f"values ('{schema}.{table}', 'test', 'embedded-history', '', '') returning stream_id"
            )
            (stream,) = cursor.fetchone() or (None,)
            given[schema] = stream
            rows = PER_DAY if schema == "raw_payments" else PER_DAY // PER_USER_EVENT
            cursor.execute(
                f"insert into {schema}._ledger (feed, stream_id, kind, partition, first_position, last_position, "
                "pages, offered, landed, dead, tombstones, unchanged, control, lost, restored, drifted, bytes, "
                "contract_version, writer_token, loaded_at, _dlt_load_id) "
                f"select '{schema}.{table}', {stream}, 'kafka', 0, n * {rows} + 1, (n + 1) * {rows}, 0, "
                f"{rows}, {rows}, 0, 0, 0, 0, 0, 0, 0, 0, 'test', 0, "
                f"{_DAY.format(n='n')} + interval '24 h' - interval '1 s', {_LOAD.format(n='n')} "
                "from generate_series(0, %(days)s - 1) as n",
                given,
            )
            cursor.execute(
                f"insert into {schema}._dlt_loads "
                f"select {_LOAD.format(n='n')}, '{table}', 0, {_DAY.format(n='n')}, 'test' "
                "from generate_series(0, %(days)s - 1) as n",
                given,
            )
    for first in range(1, transactions + 1, CHUNK):
        with connection, connection.cursor() as cursor:
            cursor.execute(
                "insert into raw_payments.transaction_created (transaction_id, amount, currency, user_id, merchant_id, "
                "country, created_at, status, _stream_id, _kafka_partition, _kafka_offset, _kafka_timestamp, "
                "_loaded_at, _dlt_load_id) "
                "select md5('transaction ' || i)::uuid, case when i %% 5 = 3 then i * 7919 %% 20000 "
                "else round(i * 7919 %% 2000000 / 100.0, 2) end, (%(currencies)s)[1 + i %% 5], "
                f"'usr_' || lpad((i * 104729 %% {USERS})::text, 6, '0'), "
                f"'mer_' || lpad((i * 1299709 %% {MERCHANTS})::text, 5, '0'), "
                "(array['DE', 'FR', 'US', 'GB', 'JP', 'NL', 'CA'])[1 + i %% 7], at, "
                "(array['completed', 'completed', 'completed', 'pending', 'failed'])[1 + i / 7 %% 5], "
                f"%(raw_payments)s, 0, i, at, landed_at, {_LOAD.format(n=n)} "
                "from (select i, "
                f"{_DAY.format(n=n)} + (i %% {PER_DAY}) * interval '4.3 s' as at, "
                f"{_DAY.format(n=n)} + interval '24 h' - interval '1 s' as landed_at "
                "from generate_series(%(first)s::bigint, %(last)s::bigint) as i) as made",
                {
                    **given,
                    "currencies": SAMPLE_CURRENCIES,
                    "first": first,
                    "last": min(first + CHUNK - 1, transactions),
                },
            )
    n = f"((i - 1) / {PER_DAY // PER_USER_EVENT})"
    with connection, connection.cursor() as cursor:
        cursor.execute(
            "insert into raw_users.user_events (event_id, event_type, user_id, email, full_name, country, occurred_at, "
            "_stream_id, _kafka_partition, _kafka_offset, _kafka_timestamp, _loaded_at, _dlt_load_id) "
            "select md5('event ' || i)::uuid, (array['signed_up', 'signed_in', 'profile_updated'])[1 + i %% 3], "
            f"'usr_' || lpad((i * 104729 %% {USERS})::text, 6, '0'), 'user' || i || '@example.com', "
            f"'User ' || i, 'DE', at, %(raw_users)s, 0, i, at, landed_at, {_LOAD.format(n=n)} "
            f"from (select i, {_DAY.format(n=n)} + interval '9 h' as at, "
            f"{_DAY.format(n=n)} + interval '24 h' - interval '1 s' as landed_at "
            "from generate_series(1::bigint, %(events)s::bigint) as i) as made",
            {**given, "events": days * (PER_DAY // PER_USER_EVENT)},
        )
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute("vacuum analyze raw_payments.transaction_created, raw_users.user_events")
    connection.autocommit = False
    log = RawLog(connection)
    published = [LAST_DAY - timedelta(days=age) for age in range(-30, days)]
    rates = [
        Rate(day, "USD", code, Decimal(80 + number) / 100)
        for day in published
        for number, code in enumerate(SAMPLE_CURRENCIES)
        if code != "USD"
    ]
    log.land(RATES, rates)


def new_day(connection: psycopg2.extensions.connection, number: int) -> list[Payment]:
    """The events of the `number`th day after the past: new, late, redelivered, and with a new status."""
    chance = Random(number)
    day = datetime(LAST_DAY.year, LAST_DAY.month, LAST_DAY.day, tzinfo=UTC) + timedelta(days=number)
    late, again, changed = PER_DAY * 2 // 100, PER_DAY * 2 // 100, PER_DAY * 4 // 100
    with connection, connection.cursor() as cursor:
        cursor.execute(
            "select transaction_id::text, amount, currency, user_id, merchant_id, country, created_at, status "
            "from raw_payments.transaction_created where _kafka_offset %% 97 = %s "
            "and _dlt_load_id in (select load_id from raw_payments._dlt_loads where load_id < '11' "
            "order by load_id desc limit 7) limit %s",
            (number, again + changed),
        )
        known = [Payment(*row) for row in cursor.fetchall()]
    assert len(known) == again + changed
    events = known[:again]
    for event in known[again:]:
        later = event.created_at + timedelta(hours=chance.randrange(1, 72))
        events.append(replace(event, created_at=later, status=chance.choice(["completed", "failed"])))
    for index in range(PER_DAY - len(events)):
        age = timedelta(days=chance.randrange(1, 30)) if index < late else timedelta()
        currency = chance.choice(SAMPLE_CURRENCIES)
        events.append(
            Payment(
                uuid_of(number * 1_000_000 + index), Decimal(chance.randrange(1, 20_000)), currency,
                f"usr_{chance.randrange(USERS):06d}", f"mer_{chance.randrange(MERCHANTS):05d}", "DE",
                day - age + timedelta(seconds=index * 4), chance.choice(["completed", "pending", "failed"]),
            )
        )  # fmt: skip
    return events
