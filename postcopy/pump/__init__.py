"""HOW do pages move? The data plane: C threads carry pages, Python decides which and watches.

In: sockets, regions' mappings, a userfaultfd, extents to push. Out: pages placed, counters, one event at the end.
"""
