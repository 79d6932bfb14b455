"""Postcopy live migration of memory on Linux: run first, fetch each page when it is touched.

What programs may build on is what these name in `__all__`: `postcopy.link` (Source, Destination, a guest of one's own),
`postcopy.kernel` (userfaultfd, pagemap, memory types), `postcopy.pages` (regions, sizes), `postcopy.guest` (guests to
try with), and `postcopy.errors`. Other modules may change with any version.
"""

__version__ = "0.1.0"
