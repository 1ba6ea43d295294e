"""Rank slices of huge catalogs, losses over them, and AlterRec trained on top."""

__version__ = "0.1.0"
