"""Canaries: values nobody else has, in every personal field, followed through everything the warehouse writes.

    a copy of the project with topics of its own -> messages with canaries -> `run_all` -> every column of every table,
    every file of the project and of its home -> found only where the graph of columns says

A value is looked for as text, also inside bytes and JSON. Where the services keep their own data is not looked at.
"""

import json
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg2
from confluent_kafka import Producer
from psycopg2 import sql

from ingestion.feeds import load_feeds
from ingestion.settings import Settings
from orchestration import transform
from orchestration.console import Reporter
from orchestration.lineage.build import load_graph
from orchestration.lineage.graph import ORIGINS, Graph, without_edges
from orchestration.lineage.personal import follow_personal_data
from orchestration.run import run_all
from tests.harness.project_copy import copy_project

RECORDS = 12
# In every canary but the ids, which a pattern of the contract holds to digits.
WORD = "canary7f3e91"
USERS = {"usr_917300": "user_events", "usr_917400": "payments_transaction_created"}
# Of the user ids, all that the messages hold begin so.
ID_STARTS = ("usr_9173", "usr_9174")


@dataclass
class Search:
    """Where canaries were found: `schema.table.column` and files; `rows` looked at say that there was something."""

    columns: set[str] = field(default_factory=set)
    files: set[str] = field(default_factory=set)
    tables: int = 0


def make_site(settings: Settings, folder: Path) -> Settings:
    """A copy of the project that reads topics of its own."""
    project = copy_project(folder / "project")
    mark = uuid.uuid4().hex[:8]
    for topic in USERS.values():
        for path in (project / "models").rglob("*__sources.yml"):
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace(f"topic: {topic}\n", f"topic: taint_{mark}_{topic}\n"), encoding="utf-8")
    return replace(settings, project_dir=project, home=folder / "home")


def send_canaries(settings: Settings) -> None:
    """Messages of both topics: good ones, some with fields nobody declared, and broken ones."""
    topics = {feed.table: feed.origin.topic for feed in load_feeds(settings) if feed.origin.kind == "kafka"}
    producer = Producer(
        {"bootstrap.servers": settings.require("KAFKA_BOOTSTRAP_SERVERS", "canaries"), "broker.address.family": "v4"}
    )
    for topic, messages in ((topics["user_events"], _user_events()), (topics["transaction_created"], _payments())):
        for number, message in enumerate(messages):
            producer.produce(
                topic,
                key=f"{WORD}-key-{number}".encode(),
                value=json.dumps(message).encode(),
                headers=[("trace", f"{WORD}-header-{number}".encode())],
            )
    assert producer.flush(30) == 0


def _user_events() -> Iterator[dict[str, Any]]:
    start = datetime.now(UTC) - timedelta(days=2)
    for number in range(RECORDS):
        event = {
            "event_id": str(uuid.uuid4()),
            "event_type": "signed_up",
            "user_id": f"usr_9173{number:02d}",
            "email": f"{WORD}-email-{number}@example.com",
            "full_name": f"{WORD} name {number}",
            "phone": f"{WORD}-phone-{number}",
            "ip_address": f"{WORD}-address-{number}",
            "country": "DE",
            "occurred_at": (start + timedelta(minutes=number)).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        yield event | ({"nickname": f"{WORD}-nickname-{number}"} if number % 3 == 0 else {})
    yield event | {"event_id": "no uuid", "email": f"{WORD}-dead@example.com"}


def _payments() -> Iterator[dict[str, Any]]:
    start = datetime.now(UTC) - timedelta(days=2)
    for number in range(RECORDS):
        payment = {
            "transaction_id": str(uuid.uuid4()),
            "amount": 12.34,
            "currency": "USD",
            # Some who also have a profile.
            "user_id": f"usr_917{3 + number % 2}{number:02d}",
            "merchant_id": f"mer_{number:05d}",
            "country": "DE",
            "created_at": (start + timedelta(minutes=number)).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "status": "completed",
        }
        yield payment | ({"card_holder": f"{WORD}-holder-{number}"} if number % 3 == 0 else {})


def run_everything(settings: Settings) -> None:
    """Landing, models and tests, freshness, both pages."""
    run_all(settings, Reporter(quiet=True))


def search(settings: Settings) -> Search:
    """Every column of every table and view, and every file."""
    found = Search()
    connection = psycopg2.connect(settings.require("WAREHOUSE_DSN", "canaries"))
    connection.autocommit = True
    with connection.cursor() as cursor:
        for (schema, table), columns in _tables(cursor).items():
            found.tables += 1
            looks = [_look(name, type_) for name, type_ in columns]
            cursor.execute(
                sql.SQL("select {} from {}").format(sql.SQL(", ").join(looks), sql.Identifier(schema, table)),
                # Each column is held against each canary.
                {"word": f"%{WORD}%", "first": f"%{ID_STARTS[0]}%", "second": f"%{ID_STARTS[1]}%"},
            )
            hits = cursor.fetchone() or ()
            found.columns |= {f"{schema}.{table}.{name}" for (name, _), hit in zip(columns, hits, strict=True) if hit}
    connection.close()
    marks = [text.encode() for text in (WORD, *ID_STARTS)]
    for path in [*settings.project_dir.rglob("*"), *settings.home.rglob("*")]:
        if path.is_file() and "postgres" not in path.relative_to(path.anchor).parts:
            content = path.read_bytes()
            if any(mark in content for mark in marks):
                found.files.add(path.name)
    return found


def _tables(cursor: Any) -> Mapping[tuple[str, str], list[tuple[str, str]]]:
    cursor.execute(
        "select n.nspname, c.relname, a.attname, format_type(a.atttypid, null) from pg_class as c "
        "inner join pg_namespace as n on c.relnamespace = n.oid inner join pg_attribute as a on a.attrelid = c.oid "
        "where c.relkind in ('r', 'v', 'm', 'p') and n.nspname !~ '^(pg_|information_schema$)' and a.attnum > 0 "
        "and not a.attisdropped order by 1, 2, a.attnum"
    )
    tables: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for schema, table, column, type_ in cursor.fetchall():
        tables.setdefault((schema, table), []).append((column, type_))
    return tables


def _look(column: str, type_: str) -> sql.Composable:
    text = sql.SQL("encode({}, 'escape')" if type_ == "bytea" else "{}::text").format(sql.Identifier(column))
    return sql.SQL("coalesce(bool_or({t} like %(word)s or {t} like %(first)s or {t} like %(second)s), false)").format(
        t=text
    )


def allowed(graph: Graph) -> set[str]:
    """`schema.table.column` of what the graph says may hold personal data."""
    personal = follow_personal_data(graph)
    return {
        f"{graph.datasets[where.dataset].relation}.{where.column}"
        for where in personal.reached
        if graph.datasets[where.dataset].kind not in ORIGINS
    }


def find_leaks(found: Search, graph: Graph) -> list[str]:
    """Where a canary is and should not be."""
    return sorted({*(found.columns - allowed(graph)), *(f"file {name}" for name in found.files)})


def find_unseen(found: Search, graph: Graph, expected: Iterable[str]) -> list[str]:
    """Of the layers named, columns the graph says hold personal data and in which no canary came.

    Tables of dead letters are left out: not every feed has one, and few messages quote.
    """
    wanted = {one for one in allowed(graph) if one.partition(".")[0] in expected and "._" not in one.rpartition(".")[0]}
    return sorted(wanted - found.columns)


def judge(site: Settings) -> list[str]:
    """Canaries sent, everything run, all of it searched; what is wrong, [] for nothing. Twins are part of it."""
    send_canaries(site)
    run_everything(site)
    found, graph = search(site), load_graph(site)
    wrong = [f"a canary in {one}, which the graph does not say" for one in find_leaks(found, graph)]
    layers = ("raw_users", "raw_payments", "staging", "intermediate")
    wrong += [f"no canary in {one}, which the graph says" for one in find_unseen(found, graph, layers)]
    if found.tables < 40:
        wrong.append(f"only {found.tables} tables were looked at")

    # Twin: the graph without an edge.
    name = "int_users__latest.email"
    cut = without_edges(without_mark(graph, name), lambda edge: graph.show(edge.target) == name)
    if find_leaks(found, cut) != [f"intermediate.{name}"]:
        wrong.append("a graph without an edge was not caught")

    # Twin: a model without its barrier, built past the guard.
    model = site.project_dir / "models" / "marts" / "core" / "dim_users.sql"
    model.write_text(model.read_text().replace("{{ token('user_id') }} as user_key", "user_id as user_key"))
    described = model.with_name("_core__models.yml")
    text = described.read_text()
    place = text.index("doc('user_key')")
    described.write_text(text[:place] + text[place:].replace("data_type: uuid", "data_type: text", 1))
    built = transform.run_dbt(site, ["run", "--full-refresh", "--select", "dim_users"])
    leaks = find_leaks(search(site), graph)
    if not built.success or "marts.dim_users.user_key" not in leaks:
        wrong.append("a model without its barrier was not caught")
    return wrong


def without_mark(graph: Graph, column: str) -> Graph:
    """The graph with a column that is not declared personal; what reaches it still makes it so."""
    datasets = {}
    for unique_id, dataset in graph.datasets.items():
        columns = {
            name: replace(one, pii=False) if f"{dataset.name}.{name}" == column else one
            for name, one in dataset.columns.items()
        }
        datasets[unique_id] = replace(dataset, columns=columns)
    return replace(graph, datasets=datasets)
