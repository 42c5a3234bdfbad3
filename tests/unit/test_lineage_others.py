"""Three small projects in the shapes of others, by manifest and catalog alone: no crash, and what is resolved.

A shop (CTE after CTE, a surrogate key, a macro's union), an event log (JSON, windows, sessions, a snapshot) "
"and a ledger
(set operations, a recursive tree, lateral joins, grouping sets). `warehouse lineage coverage FOLDER...` takes any.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestration import cli
from orchestration.lineage.build import read_graph
from tests.harness.lineage import SCHEMA, manifest_of

SHOP = {
    "stg_orders": "with source as (select * from raw.orders), renamed as (select id as order_id, user_id as "
    "customer_id, "
    "order_date, status from source) select * from renamed",
    "stg_payments": "with source as (select * from raw.payments), renamed as (select id as payment_id, order_id, "
    "payment_method, amount / 100 as amount from source) select * from renamed",
    "orders": "with orders as (select * from main.stg_orders), payments as (select * from main.stg_payments), "
    "order_payments as (select order_id, sum(case when payment_method = 'card' then amount else 0 end) as card_amount, "
    "sum(case when payment_method = 'coupon' then amount else 0 end) as coupon_amount, sum(amount) as total_amount "
    "from payments group by order_id), final as (select orders.*, order_payments.card_amount, "
    "order_payments.coupon_amount, order_payments.total_amount as amount from orders left join order_payments "
    "on orders.order_id = order_payments.order_id) select * from final",
    "customers": "with o as (select * from main.orders), agg as (select customer_id, min(order_date) as first_order, "
    "max(order_date) as most_recent_order, count(order_id) as number_of_orders, sum(amount) as lifetime_value from o "
    "group by 1) select md5(cast(coalesce(cast(customer_id as text), '_null_') as text)) as customer_key, agg.* "
    "from agg",
}
EVENTS = {
    "base": "select (payload ->> 'id')::uuid as id, payload #>> '{user,email}' as email, payload -> 'items' as items, "
    "received_at at time zone 'utc' as received_at from raw.events where payload ? 'id'",
    "sessions": "with marked as (select *, case when received_at - lag(received_at) over w > interval '30 minutes' "
    "then 1 else 0 end as is_new from main.base window w as (partition by email order by received_at)), numbered as "
    "(select *, sum(is_new) over (partition by email order by received_at rows unbounded preceding) as n from marked) "
    "select email || '-' || n as session_id, min(received_at) as started_at, max(received_at) as ended_at, count(*) as "
    "events from numbered group by email, n",
    "items": "select base.id, item ->> 'sku' as sku, (item ->> 'qty')::int as qty, ordinality as line from main.base "
    "cross join lateral jsonb_array_elements(base.items) with ordinality as t (item, ordinality)",
    "latest": "select distinct on (email) email, id, received_at from main.base order by email, received_at desc",
    "funnel": "select date_trunc('day', started_at)::date as day, count(*) filter (where events > 1) as engaged, "
    "percentile_cont(0.5) within group (order by events) as median_events from main.sessions group by 1",
}
LEDGER = {
    "tree": "with recursive t as (select id, parent_id, name::text as path from raw.accounts where parent_id is null "
    "union all select a.id, a.parent_id, t.path || '/' || a.name from raw.accounts a join t on a.parent_id = t.id) "
    "select id, path from t",
    "moves": "select account_id, amount, booked_on from raw.entries where kind = 'debit' union all select account_id, "
    "-amount, booked_on from raw.entries where kind = 'credit' except select account_id, amount, booked_on from "
    "raw.voided",
    "balances": "select m.account_id, t.path, b.balance from (select distinct account_id from main.moves) as m "
    "join main.tree t on t.id = m.account_id cross join lateral (select sum(amount) as balance from main.moves x "
    "where x.account_id = m.account_id) as b",
    "totals": "select coalesce(path, 'all') as path, extract(year from booked_on) as year, sum(amount) as amount from "
    "main.moves join main.tree on tree.id = moves.account_id group by grouping sets ((path, extract(year from "
    "booked_on)), "
    "(path), ())",
    "odd": "select * from main.nowhere_known",
    "strange": "select )( from",
}
PROJECTS = {
    "shop": (SHOP, {"orders": "id user_id order_date status", "payments": "id order_id payment_method amount"}, 1.0),
    "events": (EVENTS, {"events": "payload received_at"}, 1.0),
    "ledger": (
        LEDGER,
        {
            "accounts": "id parent_id name",
            "entries": "account_id amount booked_on kind",
            "voided": "account_id amount booked_on",
        },
        1.0,
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The projects as folders of a manifest and a catalog, as `dbt docs generate` leaves them."""
    made = {}
    for name, (models, sources, _) in PROJECTS.items():
        folder = made[name] = tmp_path_factory.mktemp(name)
        manifest = manifest_of(models, sources={table: {} for table in sources})
        manifest["metadata"]["project_name"] = name
        columns: dict[str, Any] = {
            f"source.p.raw.{table}": {"columns": {one: {"name": one, "type": "text"} for one in listed.split()}}
            for table, listed in sources.items()
        }
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        (folder / "catalog.json").write_text(json.dumps({"nodes": {}, "sources": columns}), encoding="utf-8")
    return made


@pytest.mark.parametrize("name", PROJECTS)
def test_every_column_is_resolved(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    graph = read_graph(folders[name], tmp_path)
    unknown = {graph.show(where) for where, _ in graph.unknown()}
    # What cannot be read is listed, and costs the others nothing.
    assert unknown == ({"odd.*", "strange.*"} if name == "ledger" else set())
    for where, column in graph.columns("model"):
        assert column.generated or graph.origins(where), graph.show(where)


def test_values_of_the_three(folders: dict[str, Path], tmp_path: Path) -> None:
    def origins(project: str, model: str, column: str) -> set[str]:
        from orchestration.lineage.names import find_column

        graph = read_graph(folders[project], tmp_path)
        return {graph.show(one) for one in graph.origins(find_column(graph, f"{SCHEMA}.{model}.{column}"))}

    assert origins("shop", "customers", "lifetime_value") == {"raw.payments.amount"}
    assert origins("shop", "customers", "customer_key") == {"raw.orders.user_id"}
    assert origins("events", "items", "sku") == {"raw.events.payload"}
    assert origins("events", "sessions", "started_at") == {"raw.events.received_at"}
    assert origins("ledger", "tree", "path") == {"raw.accounts.name"}
    assert origins("ledger", "balances", "balance") == {"raw.entries.amount"}


def test_the_share_is_printed(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WAREHOUSE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["warehouse", "lineage", "coverage", *map(str, folders.values())])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[1:4]] == ["shop", "events", "ledger"]
    # Two of the ledger's models are not understood, and count.
    assert out.count("100.0%") == 2
    assert "\x1b" not in out
    assert "ledger: strange.*: not understood" in out
