"""Imported once, by the fork server: what every loader needs is in memory before it is forked."""

import gc

import pyarrow.csv  # type: ignore[import-untyped]  # noqa: F401
import sqlalchemy.engine  # noqa: F401
from dlt.common.pipeline import get_dlt_pipelines_dir
from dlt.destinations import postgres

import ingestion.batch
import ingestion.replay  # noqa: F401
from tests.prove.loader import declared

declared()
# dlt loads its plugins, and each destination, when they are first asked for.
get_dlt_pipelines_dir()
assert postgres("postgresql://nobody@nowhere/nothing").client_class
# Else each collection in a loader would walk, and copy, all of this.
gc.freeze()
