"""The graph of columns as Dagster's metadata: for each model its columns, and the columns of assets they are made of.

Fields of messages, counted rows and the loader's own columns belong to no asset and are left out; `warehouse lineage
trace` and the page have them.
"""

from collections.abc import Mapping

import dagster as dg

from orchestration.lineage.graph import ROWS, ColumnId, Graph

COLUMN_LINEAGE = "dagster/column_lineage"


def column_lineage(graph: Graph, unique_id: str, keys: Mapping[str, dg.AssetKey]) -> dg.TableColumnLineage | None:
    """Column -> what it is made of, of a model, seed or snapshot; None of what has no lineage.

    Args:
        keys: dbt's unique ids -> keys of the assets.
    """
    dataset = graph.datasets.get(unique_id)
    if dataset is None or dataset.kind not in ("model", "snapshot"):
        return None
    deps = {}
    for column in dataset.columns:
        if column != ROWS:
            sources = {
                edge.source
                for edge in graph.into.get(ColumnId(unique_id, column), ())
                if edge.direct
                and edge.source.column != ROWS
                and edge.source.dataset in keys
                and edge.source.dataset != unique_id
            }
            deps[column] = [dg.TableColumnDep(keys[one.dataset], one.column) for one in sorted(sources)]
    return dg.TableColumnLineage(deps)
