"""WHICH page next? The order of the push: what is sent before anybody asks for it.

Pure: what was found and what was asked for enters, extents to send leave. Demand pages are no matter of
this room: they are answered by the pump at once, on a connection of their own, and are only a hint here.
"""

from postcopy.plan.intervals import IntervalSet
from postcopy.plan.push import PushExtent, PushPlan

__all__ = ["IntervalSet", "PushExtent", "PushPlan"]
