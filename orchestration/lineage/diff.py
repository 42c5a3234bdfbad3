"""Two graphs compared, to review a change: what is added, removed, means something else, where personal data goes.

    git archive REF -> a copy of the project as it was -> its graph; against the graph of the files as they stand

A column changed its meaning when its type did, or the SQL that makes it: its expressions, what it has its value from.
"""

import io
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ingestion.errors import ConfigurationError
from ingestion.settings import Settings
from orchestration.lineage.build import load_graph
from orchestration.lineage.graph import ORIGINS, ROWS, Column, ColumnId, Graph
from orchestration.lineage.personal import Personal, Violation, follow_personal_data


@dataclass(frozen=True)
class Difference:
    """What a change does to the graph; `before` and `after` of a changed column say how it is made."""

    added: tuple[ColumnId, ...]
    removed: tuple[ColumnId, ...]
    changed: tuple[tuple[ColumnId, str, str], ...]
    newly_personal: tuple[tuple[ColumnId, tuple[ColumnId, ...]], ...]
    ended_no_more: tuple[ColumnId, ...]
    violations: tuple[Violation, ...]

    @property
    def harmful(self) -> bool:
        """Whether personal data reaches where it did not, or the policy is broken."""
        return bool(self.newly_personal or self.violations)


def graph_at(settings: Settings, reference: str) -> Graph:
    """The graph of the project as it was at a git reference.

    Raises:
        ConfigurationError: git does not know the reference, or the project did not parse there.
    """
    prefix = _git(settings.project_dir, "rev-parse", "--show-prefix").decode().strip()
    _git(settings.project_dir, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{reference}^{{commit}}")
    archive = _git(settings.project_dir, "archive", "--format=tar", f"{reference}:{prefix}" if prefix else reference)
    with tempfile.TemporaryDirectory(prefix="lineage-") as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        if not (Path(folder) / "dbt_project.yml").is_file():
            raise ConfigurationError(f"{reference} has no dbt_project.yml in {prefix or 'its root'}.")
        return load_graph(replace(settings, project_dir=Path(folder)))


def _git(folder: Path, *arguments: str) -> bytes:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=False)
    except OSError as error:
        raise ConfigurationError(f"git cannot be run: {error.strerror}.") from None
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise ConfigurationError(
            f"git {arguments[0]} {arguments[-1]}: {said[0] if said else 'not known'}.",
            hint="--against takes a branch, a tag or a commit of this repository.",
        )
    return done.stdout


def compare(before: Graph, after: Graph) -> Difference:
    """What changed from one graph to the other."""
    old, new = _by_name(before), _by_name(after)
    changed = []
    for name in sorted(old.keys() & new.keys()):
        said, says = _meaning(before, *old[name]), _meaning(after, *new[name])
        if said != says:
            changed.append((new[name][0], said, says))
    was, now = follow_personal_data(before), follow_personal_data(after)
    held = {before.show(one) for one in was.reached}
    ended = {before.show(one.column) for one in was.endings}
    newly = [(one, now.way_to(one)) for one in _held(now) if after.show(one) not in held]
    known = {(before.show(one.column), one.reason) for one in was.violations}
    return Difference(
        added=tuple(new[name][0] for name in sorted(new.keys() - old.keys())),
        removed=tuple(old[name][0] for name in sorted(old.keys() - new.keys())),
        changed=tuple(changed),
        newly_personal=tuple(newly),
        ended_no_more=tuple(one for one, _ in newly if after.show(one) in ended),
        violations=tuple(one for one in now.violations if (after.show(one.column), one.reason) not in known),
    )


def _held(personal: Personal) -> Sequence[ColumnId]:
    return [one for one in personal.holding if personal.graph.datasets[one.dataset].kind != "external"]


def _by_name(graph: Graph) -> dict[str, tuple[ColumnId, Column]]:
    kinds = ("source", "seed", "model", "snapshot", *ORIGINS)
    return {graph.show(where): (where, column) for where, column in graph.columns(*kinds)}


def _meaning(graph: Graph, where: ColumnId, column: Column) -> str:
    """How a column is made, in one line that differs when its meaning does."""
    sources = sorted(
        f"{graph.show(edge.source)}{edge.path}"
        for edge in graph.into.get(where, ())
        if edge.direct and edge.source != where and not edge.again
    )
    rows = sorted(
        f"{graph.show(edge.source)} ({', '.join(edge.kinds)})"
        for edge in graph.into.get(where, ())
        if not edge.direct and edge.source.column != ROWS and not edge.again
    )
    steps = [text for _, text in column.expressions]
    parts = [column.type, " <- ".join(steps), ", ".join(sources), ", ".join(rows)]
    return "; ".join(part for part in parts if part)
