"""A new source is YAML and a staging model: in a copy of the project, with every declared type and kind of rule.

No line of Python knows the feeds of this test; `warehouse ingest` and plain `dbt build` take them as they are.
"""

import datetime as dt
import json
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import psycopg2
import psycopg2.extensions
import pytest
from confluent_kafka import Producer

from ingestion.settings import Settings
from tests.harness.project_copy import copy_project, environment_of, run_warehouse

ORDERS, REFUNDS = "raw_shop.orders", "raw_shop.refunds"
TOPIC = f"shop_orders_{uuid.uuid4().hex[:8]}"
TODAY = dt.datetime.now(dt.UTC).date()
START = TODAY - dt.timedelta(days=5)
CANARY = "canary41c9"

# Both feeds declare the same columns: one of each type, one with each kind of rule.
COLUMNS = """\
          - name: order_id
            description: The order.
            data_type: uuid
            data_tests: [not_null]
          - name: note
            description: Anything, or nothing.
            data_type: text
          - name: is_gift
            description: Whether it is wrapped.
            data_type: boolean
            data_tests: [not_null]
          - name: quantity
            description: Pieces.
            data_type: integer
            data_tests:
              - within_range:
                  arguments: {min_value: 1, max_value: 100}
          - name: serial
            description: Number of the till.
            data_type: bigint
          - name: total
            description: Amount in major units.
            data_type: numeric(20,6)
            data_tests:
              - within_range:
                  arguments: {min_value: 0}
              - exact_in_currency:
                  arguments: {currency_column: currency}
          - name: weight
            description: Kilograms.
            data_type: numeric(9,3)
          - name: currency
            description: ISO 4217 code.
            data_type: text
            data_tests:
              - not_null
              - relationships:
                  arguments: {to: ref('currencies'), field: currency_code}
          - name: channel
            description: Where it was sold.
            data_type: text
            data_tests:
              - accepted_values:
                  arguments: {values: [web, store]}
          - name: sku
            description: What was sold.
            data_type: text
            config:
              meta: {pii: true}
            data_tests:
              - matches_pattern:
                  arguments: {pattern: "^[A-Z]{2}-[0-9]{3}$"}
          - name: due_on
            description: When it is due.
            data_type: date
            data_tests:
              - within_range:
                  arguments: {min_value: "2020-01-01", max_value: "2030-12-31"}
          - name: ordered_at
            description: When it was ordered.
            data_type: timestamptz
            data_tests:
              - not_null
              - within_range:
                  arguments: {min_value: "2000-01-01T00:00:00Z"}
          - name: details
            description: Anything else.
            data_type: jsonb
"""

SOURCES = f"""\
version: 2

sources:
  - name: raw_shop
    description: The shop's tills.
    config:
      meta:
        owner: shop
    tables:
      - name: orders
        description: One row per landed order.
        config:
          meta:
            feed:
              kind: kafka
              topic: {TOPIC}
        columns:
{COLUMNS}
      - name: refunds
        description: One row per version of a refund.
        config:
          meta:
            feed:
              kind: rest
              base_url: SHOP_API
              path: /refunds
              params: {{since: "{{from}}", until: "{{to}}", currency: EUR}}
              window:
                start: {START}
                days: 3
              records:
                path: data.items
                page_fields: {{currency: currency}}
              key: [order_id]
        columns:
{COLUMNS}
"""

STAGING = """\
{{{{ config(unique_key='order_id') }}}}

with raw_rows as (
    select * from {{{{ from_raw('raw_shop', '{table}') }}}} as raw
),

final as (
    select distinct on (order_id)
        order_id,
        note,
        is_gift,
        quantity,
        serial,
        {{{{ to_minor_units('total', 2) }}}} as total_minor,
        weight,
        currency as currency_code,
        channel,
        sku,
        due_on,
        ordered_at,
        details,
        _dlt_load_id as _last_load_id
    from raw_rows
    order by order_id, _dlt_load_id desc
)

select * from final
"""

Query = Callable[[str], list[tuple]]
Record = dict[str, object]


def identifier(number: int) -> str:
    return str(uuid.UUID(int=number))


def order(number: int, **changes: object) -> Record:
    """A record that fits; a change of `...` leaves the field out."""
    fitting: Record = {
        "order_id": identifier(number),
        "note": "as usual",
        "is_gift": False,
        "quantity": 1,
        "serial": number,
        "total": 9.5,
        "weight": 0.25,
        "currency": "EUR",
        "channel": "web",
        "sku": "AB-123",
        "due_on": "2026-03-01",
        "ordered_at": "2026-02-28T23:30:00+02:00",
        "details": {"a": 1},
    }
    return {name: value for name, value in {**fitting, **changes}.items() if value is not ...}


@dataclass(frozen=True)
class Token:
    """A number in the digits it is sent with."""

    text: str


def written(record: object) -> str:
    """A record as JSON text."""
    if isinstance(record, dict):
        return "{" + ",".join(f"{json.dumps(name)}:{written(value)}" for name, value in record.items()) + "}"
    return record.text if isinstance(record, Token) else json.dumps(record)


# What is sent -> what must stand in the row, by column; a row for each type's corners.
FITTING: list[tuple[Record, dict[str, object]]] = [
    (order(1), {"is_gift": False, "quantity": 1, "due_on": dt.date(2026, 3, 1), "details": '{"a": 1}'}),
    (
        order(2, is_gift=True, quantity=100, serial=2**63 - 1, note="", channel="store", due_on="2020-01-01"),
        {"is_gift": True, "quantity": 100, "serial": 2**63 - 1, "note": "", "due_on": dt.date(2020, 1, 1)},
    ),
    (
        order(3, serial=-(2**63), total=Token("12345678901234.560000"), weight=Token("-999999.999")),
        {"serial": -(2**63), "total": Decimal("12345678901234.560000"), "weight": Decimal("-999999.999")},
    ),
    (
        order(4, total=Token("1e3"), weight=Token("0.001"), ordered_at="2026-02-28T23:59:59.123456Z"),
        {
            "total": Decimal("1000.000000"),
            "weight": Decimal("0.001"),
            "ordered_at": dt.datetime(2026, 2, 28, 23, 59, 59, 123456, dt.UTC),
        },
    ),
    (
        order(5, ordered_at="2000-01-01T05:30:00+05:30", due_on="2028-02-29"),
        {"ordered_at": dt.datetime(2000, 1, 1, tzinfo=dt.UTC), "due_on": dt.date(2028, 2, 29)},
    ),
    (
        order(6, **dict.fromkeys(("note", "quantity", "serial", "total", "weight", "channel"), ...)),
        dict.fromkeys(("note", "quantity", "serial", "total", "weight", "channel")),
    ),
    (
        order(7, **dict.fromkeys(("note", "quantity", "serial", "total", "sku", "due_on", "details"))),
        # A null of a jsonb column is the column's null: the field may be left out, and says the same.
        dict.fromkeys(("note", "quantity", "serial", "total", "sku", "due_on", "details")),
    ),
    (order(8, details=[]), {"details": "[]"}),
    (order(9, details="text"), {"details": '"text"'}),
    (order(10, details=False), {"details": "false"}),
    (order(11, details=Token("1.10")), {"details": "1.10"}),
    (
        order(12, details={"b": Token("1.50"), "a": [None, True, {"é": '"\\"'}], "c": ""}),
        {"details": '{"a": [null, true, {"é": "\\"\\\\\\""}], "b": 1.50, "c": ""}'},
    ),
    (order(13, note='"a",b\n\\N\té'), {"note": '"a",b\n\\N\té'}),
    (order(14, undeclared={"x": Token("1.0")}, Note="case"), {"_extra": '{"Note": "case", "undeclared": {"x": 1.0}}'}),
]

# What is sent -> reason and path.
BROKEN: dict[str, tuple[Record, str, str]] = {
    "required, missing": (order(20, is_gift=...), "missing_field", "$.is_gift"),
    "required, null": (order(21, ordered_at=None), "null_field", "$.ordered_at"),
    "uuid": (order(22, order_id=CANARY), "wrong_type", "$.order_id"),
    "text": (order(23, note=7), "wrong_type", "$.note"),
    "boolean as text": (order(24, is_gift="true"), "wrong_type", "$.is_gift"),
    "boolean as number": (order(25, is_gift=1), "wrong_type", "$.is_gift"),
    "integer with decimals": (order(26, quantity=Token("1.0")), "wrong_type", "$.quantity"),
    "integer as text": (order(27, quantity="1"), "wrong_type", "$.quantity"),
    "bigint too large": (order(28, serial=2**63), "out_of_range", "$.serial"),
    "numeric as text": (order(29, total="9.5"), "wrong_type", "$.total"),
    "numeric too fine": (order(30, weight=Token("0.0001")), "out_of_range", "$.weight"),
    "numeric too large": (order(31, weight=Token("1000000")), "out_of_range", "$.weight"),
    "date off the calendar": (order(32, due_on="2026-02-29"), "invalid_timestamp", "$.due_on"),
    "date with a time": (order(33, due_on="2026-03-01T00:00:00Z"), "invalid_timestamp", "$.due_on"),
    "time without zone": (order(34, ordered_at="2026-03-01T00:00:00"), "invalid_timestamp", "$.ordered_at"),
    "jsonb with NUL": (order(35, details={"a": "\0"}), "invalid_text", "$.details.*"),
    "range, low": (order(36, quantity=0), "out_of_range", "$.quantity"),
    "range, high": (order(37, quantity=101), "out_of_range", "$.quantity"),
    "range of a numeric": (order(38, total=Token("-0.01")), "out_of_range", "$.total"),
    "range of a date": (order(39, due_on="2031-01-01"), "out_of_range", "$.due_on"),
    "range of a time": (order(40, ordered_at="1999-12-31T23:59:59Z"), "out_of_range", "$.ordered_at"),
    "accepted values": (order(41, channel=CANARY), "not_accepted", "$.channel"),
    "pattern": (order(42, sku=CANARY), "pattern_mismatch", "$.sku"),
    "pattern, a line more": (order(43, sku="AB-123\n"), "pattern_mismatch", "$.sku"),
    "relationship": (order(44, currency="EUX"), "not_accepted", "$.currency"),
    "exact in currency": (order(45, total=Token("9.505")), "out_of_range", "$.total"),
}


class _Refunds(BaseHTTPRequestHandler):
    """`GET /refunds?since=...&until=...` -> {"currency": ..., "data": {"items": [...]}} with those days' records."""

    by_day: dict[dt.date, list[str]]
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        query = parse_qs(urlsplit(self.path).query)
        since, until = (dt.date.fromisoformat(query[name][0]) for name in ("since", "until"))
        items = [record for day, records in sorted(self.by_day.items()) if since <= day <= until for record in records]
        body = f'{{"currency": "{query["currency"][0]}", "data": {{"items": [{",".join(items)}]}}}}'.encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def shop(
    services: Settings, server_dsn: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, dict[str, str]]]:
    """The extended copy, and settings of its servers, with everything sent and landed once."""
    project = copy_project(tmp_path_factory.mktemp("shop") / "project")
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    folder = project / "models/staging/shop"
    folder.mkdir()
    (folder / "_shop__sources.yml").write_text(SOURCES)
    for table in ("orders", "refunds"):
        (folder / f"stg_shop__{table}.sql").write_text(STAGING.format(table=table))
    added = {path.suffix for path in project.rglob("*") if path.is_file() and path not in before}
    assert added == {".yml", ".sql"}, "nothing but declarations and models"

    handler = type("Refunds", (_Refunds,), {"by_day": {}, "asked": []})
    # The page says the currency once for all its records; one that says its own keeps it.
    sent = [
        written({name: value for name, value in record.items() if (name, value) != ("currency", "EUR")})
        for record in [*(record for record, _ in FITTING), *(record for record, *_ in BROKEN.values())]
    ]
    handler.by_day[START] = sent[:7]  # type: ignore[attr-defined]
    handler.by_day[TODAY] = [*sent[7:], '"no object"', "null"]  # type: ignore[attr-defined]
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()

    name = f"test_shop_{uuid.uuid4().hex[:8]}"
    admin = psycopg2.connect(server_dsn)
    admin.autocommit = True
    admin.cursor().execute(f"create database {name}")
    settings = {
        "WAREHOUSE_DSN": psycopg2.extensions.make_dsn(server_dsn, dbname=name),
        "KAFKA_BOOTSTRAP_SERVERS": services.require("KAFKA_BOOTSTRAP_SERVERS", "it is embedded"),
        "KAFKA_CLUSTER_INCARNATION": "cluster-of-the-tests",
        "WAREHOUSE_EMBEDDED": "kafka",
        "FX_API_BASE": services.require("FX_API_BASE", "it is embedded"),
        "SHOP_API": f"http://127.0.0.1:{server.server_address[1]}",
    }
    producer = Producer({"bootstrap.servers": settings["KAFKA_BOOTSTRAP_SERVERS"], "broker.address.family": "v4"})
    for record in [*(record for record, _ in FITTING), *(record for record, *_ in BROKEN.values())]:
        producer.produce(TOPIC, written(record).encode(), key=b"till 7", partition=0)
    producer.produce(TOPIC, None, key=b"till 7", partition=0)
    assert producer.flush(30) == 0
    try:
        yield project, settings
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        admin.cursor().execute(f"drop database {name} with (force)")
        admin.close()


@pytest.fixture(scope="module")
def landed(shop: tuple[Path, dict[str, str]]) -> dict[str, dict[str, int]]:
    """What `warehouse ingest` says it did to each new feed."""
    project, settings = shop
    result = run_warehouse(project, "ingest", "--json", "orders", REFUNDS, **settings)
    assert result.returncode == 0, result.stderr
    assert CANARY not in result.stdout + result.stderr
    return {one["feed"]: one for one in json.loads(result.stdout)}


@pytest.fixture
def ask(shop: tuple[Path, dict[str, str]]) -> Iterator[Query]:
    connection = psycopg2.connect(shop[1]["WAREHOUSE_DSN"], options="-c timezone=UTC")

    def query(statement: str) -> list[tuple]:
        with connection, connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchall()

    yield query
    connection.close()


def test_the_new_feeds_are_declared(shop: tuple[Path, dict[str, str]]) -> None:
    project, settings = shop
    declared = {one["feed"]: one for one in json.loads(run_warehouse(project, "feeds", "--json", **settings).stdout)}
    assert {ORDERS, REFUNDS} < set(declared)
    types = ["uuid", "text", "boolean", "integer", "bigint", "numeric(20,6)", "numeric(9,3)", "text", "text", "text"]
    for feed in (ORDERS, REFUNDS):
        assert list(declared[feed]["columns"].values()) == [*types, "date", "timestamptz", "jsonb"]
        assert declared[feed]["owner"] == "shop"
        assert declared[feed]["personal_data"] == ["sku"]


def test_both_feeds_land_and_the_account_adds_up(landed: dict[str, dict[str, int]], ask: Query) -> None:
    counts = ("offered", "landed", "dead", "tombstones", "unchanged")
    expected = {
        ORDERS: (len(FITTING) + len(BROKEN) + 1, len(FITTING), len(BROKEN), 1, 0),
        # Two items that are no objects, beside those of the topic.
        REFUNDS: (len(FITTING) + len(BROKEN) + 2, len(FITTING), len(BROKEN) + 2, 0, 0),
    }
    assert {feed: tuple(one[name] for name in counts) for feed, one in landed.items()} == expected
    ledger = ask(f"select feed, {', '.join(f'sum({name})::int' for name in counts)} from ops.ledger group by feed")
    assert {row[0]: row[1:] for row in ledger} == expected
    assert ask("select source_name, feed, count(*) from ops.loads group by 1, 2 order by 2") == [
        ("raw_shop", ORDERS, 1),
        ("raw_shop", REFUNDS, 1),
    ]


@pytest.mark.parametrize("feed", [ORDERS, REFUNDS])
def test_every_value_lands_exactly(landed: dict[str, dict[str, int]], ask: Query, feed: str) -> None:
    names = [*order(0), "_extra"]
    columns = ", ".join(f"{name}::text" if name in ("details", "_extra") else name for name in names)
    rows = {row[0]: dict(zip(names, row, strict=True)) for row in ask(f"select {columns} from {feed}")}
    assert len(rows) == len(FITTING)
    for record, expected in FITTING:
        row = rows[str(record["order_id"])]
        plain = {
            "due_on": dt.date(2026, 3, 1),
            "ordered_at": dt.datetime(2026, 2, 28, 21, 30, tzinfo=dt.UTC),
            "total": Decimal("9.500000"),
            "weight": Decimal("0.250"),
            "details": '{"a": 1}',
            "_extra": None,
        }
        wanted = {name: expected.get(name, plain.get(name, record.get(name))) for name in names}
        assert row == wanted
        # Equal decimals may differ in digits, and True equals 1.
        assert {n: (type(v), str(v)) for n, v in row.items()} == {n: (type(v), str(v)) for n, v in wanted.items()}


def test_types_in_the_database_are_the_declared_ones(landed: dict[str, dict[str, int]], ask: Query) -> None:
    for table in ("orders", "refunds"):
        found = ask(
            "select a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull from pg_attribute a "
            f"where a.attrelid = 'raw_shop.{table}'::regclass and a.attnum between 1 and 13 order by a.attnum"
        )
        assert {name: type_ for name, type_, _ in found} == {
            "order_id": "uuid",
            "note": "text",
            "is_gift": "boolean",
            "quantity": "integer",
            "serial": "bigint",
            "total": "numeric(20,6)",
            "weight": "numeric(9,3)",
            "currency": "text",
            "channel": "text",
            "sku": "text",
            "due_on": "date",
            "ordered_at": "timestamp with time zone",
            "details": "jsonb",
        }
        assert {name for name, _, required in found if required} == {"order_id", "is_gift", "currency", "ordered_at"}


@pytest.mark.parametrize("feed", [ORDERS, REFUNDS])
def test_a_record_that_breaks_a_rule_is_set_aside(landed: dict[str, dict[str, int]], ask: Query, feed: str) -> None:
    dead = {
        json.loads(bytes(value)).get("order_id"): (reason, path, json.loads(bytes(value)), message)
        for reason, path, value, message in ask(
            f"select reason, path, raw_value, message from ops.dead_letters where feed = '{feed}' and path <> '$'"
        )
    }
    for name, (record, reason, path) in BROKEN.items():
        found_reason, found_path, found_record, message = dead.pop(record["order_id"])
        assert (found_reason, found_path) == (reason, path), name
        assert found_record == json.loads(written(record)), name
        assert CANARY not in message, name
    assert not dead
    others = ask(f"select reason, raw_value from ops.dead_letters where feed = '{feed}' and path = '$' order by 2")
    expected = [("not_an_object", b'"no object"'), ("not_an_object", b"null")] if feed == REFUNDS else []
    assert [(reason, bytes(value)) for reason, value in others] == expected


def test_the_windows_were_asked_for_as_declared(landed: dict[str, dict[str, int]], ask: Query) -> None:
    ((first, last, pages),) = ask(
        f"select window_from::date, window_to::date, pages from ops.ledger where feed = '{REFUNDS}'"
    )
    assert (first, last, pages) == (START, TODAY + dt.timedelta(days=1), 2)


def test_plain_dbt_builds_the_staging_models_and_the_rules_hold(
    shop: tuple[Path, dict[str, str]], landed: dict[str, dict[str, int]], ask: Query
) -> None:
    """The rules of the declaration are dbt's tests too: what landed passes every one of them."""
    project, settings = shop
    # What `warehouse` wrote into profiles.yml is all that dbt is told.
    select = ("--select", "path:seeds", "source:raw_shop+", "audit_ledger", "audit_dead_letters", "audit_runs")
    # Not the tests of other models that look at the seeds too.
    select += ("--indirect-selection", "buildable")
    environment = environment_of(project, DBT_SEND_ANONYMOUS_USAGE_STATS="false")
    built = subprocess.run(
        [Path(sys.executable).with_name("dbt"), "build", *select],
        cwd=project,
        env={name: value for name, value in environment.items() if name not in settings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout
    results = json.loads((project / "target/run_results.json").read_text())["results"]
    statuses = {one["unique_id"].removeprefix("test.payments_warehouse."): one["status"] for one in results}
    tests = {name: status for name, status in statuses.items() if "raw_shop" in name}
    assert set(tests.values()) == {"pass"}
    # not_null 4, range 4, and one of each other rule, for each feed.
    assert len(tests) == 2 * (4 + 4 + 4)
    totals = [expected.get("total", Decimal("9.5")) for _, expected in FITTING]
    minor = sum(int(total * 100) for total in totals if isinstance(total, Decimal))
    for table in ("orders", "refunds"):
        assert ask(f"select count(*)::int, sum(total_minor)::bigint from staging.stg_shop__{table}") == [
            (len(FITTING), minor)
        ]

    audited = ask("select feed, offered::int, landed::int, dead::int from audit.audit_ledger order by feed")
    assert audited == [(feed, one["offered"], one["landed"], one["dead"]) for feed, one in sorted(landed.items())]
    reasons = ask("select feed, count(*)::int from audit.audit_dead_letters group by feed order by feed")
    assert reasons == [(feed, one["dead"]) for feed, one in sorted(landed.items())]
    assert ask("select command, outcome, landed_rows::int from audit.audit_runs") == [
        ("ingest", "success", 2 * len(FITTING))
    ]


def test_the_status_shows_the_new_feeds_and_a_second_run_lands_nothing(
    shop: tuple[Path, dict[str, str]], landed: dict[str, dict[str, int]]
) -> None:
    project, settings = shop
    again = run_warehouse(project, "ingest", "-q", "--json", ORDERS, "refunds", **settings)
    assert [(one["landed"], one["dead"], one["loads"]) for one in json.loads(again.stdout)] == [(0, 0, [])] * 2
    told = json.loads(run_warehouse(project, "status", "--json", **settings).stdout)
    status = {one["feed"]: one for one in told["feeds"]}
    for feed, one in landed.items():
        assert {name: status[feed][name] for name in ("landed", "dead")} == {
            name: one[name] for name in ("landed", "dead")
        }
    assert status[ORDERS]["lag"] == 0
    listed = run_warehouse(project, "dead-letters", "list", "--feed", "refunds", "--limit", "1000", **settings)
    assert len(listed.stdout.splitlines()) == 1 + landed[REFUNDS]["dead"]
    assert CANARY not in listed.stdout
