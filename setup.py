"""Build script; all that is fixed stands in pyproject.toml."""

from setuptools import setup

setup()
