"""Measurements, each behind a command of its own; installed as ``alterrec_fast.benchmarks``."""
