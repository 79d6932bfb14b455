"""The daemons for outside VMMs: a snapshot's memory as a source, a destination that processes hand memory to."""
