"""What to do where the machine lacks what a test needs: skip and say why, but never silently in CI."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def lacking(reason: str) -> NoReturn:
    """Skip the test with this reason; where the environment says CI=true, fail it."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"this machine must not lack it: {reason}")
    pytest.skip(reason)
