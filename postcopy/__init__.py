"""Postcopy live migration of memory on Linux: run first, fetch each page when it is touched."""

__version__ = "0.1.0"
