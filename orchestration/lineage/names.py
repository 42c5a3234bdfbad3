"""What a person writes for a node or a column -> the node and the column.

`dim_users`, `dim_users.user_key`, `raw_users.user_events.email`, `user_events $.email`, a relation `marts.dim_users`
and dbt's unique ids are all understood.
"""

import difflib

from ingestion.errors import ConfigurationError
from orchestration.lineage.graph import ROWS, ColumnId, Graph


def find_node(graph: Graph, text: str) -> tuple[str, str]:
    """(dataset, column) of what is written; the column is '' where a dataset is named.

    Raises:
        ConfigurationError: there is none, or it may be several.
    """
    spelt = text.strip()
    names: dict[str, list[str]] = {}
    for dataset in graph.datasets.values():
        # A model before the source or topic of the same name: it is what people mean.
        for name in dict.fromkeys((dataset.id, dataset.name, dataset.relation)):
            if name:
                names.setdefault(name, []).append(dataset.id)
    if spelt in names:
        return _only(graph, spelt, names[spelt]), ""
    for separator in (" ", "."):
        for place in [at for at, letter in enumerate(spelt) if letter == separator][::-1]:
            dataset_name, column = spelt[:place], spelt[place + 1 :].strip()
            if dataset_name in names:
                having = [one for one in names[dataset_name] if column in graph.datasets[one].columns]
                if having:
                    return _only(graph, spelt, having), column
                known = sorted({c for one in names[dataset_name] for c in graph.datasets[one].columns if c != ROWS})
                near = difflib.get_close_matches(column, known, 3) or known[:6]
                raise ConfigurationError(f"{dataset_name} has no column {column}.", hint=f"It has {', '.join(near)}.")
    near = difflib.get_close_matches(spelt.partition(".")[0], list(names), 3)
    raise ConfigurationError(
        f"Nothing is called {spelt}.",
        hint=f"Near it: {', '.join(near)}." if near else "Models, seeds, sources, topics and exposures have names.",
    )


def find_column(graph: Graph, text: str) -> ColumnId:
    """The column that is written.

    Raises:
        ConfigurationError: there is none, or a node is named without one.
    """
    dataset, column = find_node(graph, text)
    if not column:
        known = ", ".join([name for name in graph.datasets[dataset].columns if name != ROWS][:8])
        raise ConfigurationError(f"{text} is a node; name a column of it.", hint=f"{text}.COLUMN; it has {known}.")
    return ColumnId(dataset, column)


def _only(graph: Graph, text: str, found: list[str]) -> str:
    ranks = {"model": 0, "snapshot": 0, "seed": 1, "source": 2, "exposure": 3}
    best = min(ranks.get(graph.datasets[one].kind, 4) for one in found)
    chosen = list(dict.fromkeys(one for one in found if ranks.get(graph.datasets[one].kind, 4) == best))
    if len(chosen) > 1:
        raise ConfigurationError(f"{text} may be any of {', '.join(sorted(chosen))}.", hint="Name it in full.")
    return chosen[0]
