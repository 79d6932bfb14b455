"""WHEN is it allowed? Two pure state machines, events in, commands out. See README.md of this room.

Events (`events.py`) enter the `handle` of `SourceMachine` and `DestinationMachine`, commands (`commands.py`) leave.
"""
