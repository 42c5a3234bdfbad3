"""Measured, not claimed: landing against a limit measured in the same run. `make bench` runs it."""
