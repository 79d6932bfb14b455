"""What strangers and the other agent may take of this one before they are trusted, with the reason beside each number.

Limits of what is said are in wire/limits.py, of how long a step of a migration may take in session/limits.py, of the
data connections in pump/pump_limits.h.
"""

from __future__ import annotations

PREAMBLE_SECONDS = 5.0
"""How long a connection may take to say what it is for. A source sends its preamble with the first packet."""

MESSAGE_SECONDS = 5.0
"""The same for its first message, which a source sends behind the preamble or the TLS handshake."""

HANDSHAKE_SECONDS = 5.0
"""How long a TLS handshake may take: two round trips, and a signature of each end."""

FAREWELL_SECONDS = 1.0
FAREWELL_BYTES = 64 << 10
"""To whom is refused, what was said last should arrive: a connection closed with bytes unread would lose it. So it is
read on for so long, and so much."""

UNPROVEN_MAX = 64
"""Connections that have not proved themselves yet, at one time. A source needs one at a time and three in all, for a
few round trips. Beyond, the oldest from where most of them come gives its place to the newest: whoever opens a thousand
and says nothing is in the way of nobody but himself."""

ACCEPT_BACKLOG = 128
"""Those that the kernel holds for us until they are accepted."""

ACCEPT_PAUSE_SECONDS = 0.1
"""After accept() failed for want of descriptors or memory: time for some to be given back."""

LINES_MAX = 50
LINES_SECONDS = 5.0
"""Lines of the log that strangers can cause in so many seconds; what is beyond is counted and told once."""

GREETED_MAX = 16
"""Sources that were greeted and have made no offer yet, at one time: they cost a connection each, hold nothing up."""

MESSAGES_AHEAD_MAX = 64
BYTES_AHEAD_MAX = 1 << 20
"""Messages that are read ahead of the machine, and their bytes: the other side may not fill this one's memory with
them. One that is larger than all of it (a guest's state) is read all the same, and nothing behind it."""

FETCHED_BYTES_MAX = 4 << 30
"""Of all destinations that fetch from one source together: a buffer for each connection, as large as the pages that are
asked for, and a byte for each page. Who takes 4 KiB pages costs 4 MiB, so it is of no matter to 256 of them; who says
that his pages have 1 GiB costs 2 GiB, and anybody may say so."""
