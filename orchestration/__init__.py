"""Everything around the loaders: the command line, run history, embedded services, sample data, Dagster.

Imports ingestion, never the reverse.
"""
