"""Stories are played on both event loops, in this process."""

import asyncio

import pytest
import uvloop

from tests.certificates import directory

SECONDS = 10


@pytest.fixture(params=["uvloop", "asyncio"])
def play(request):
    """Run a coroutine function on either loop, within a deadline."""

    def run(story):
        async def bounded():
            async with asyncio.timeout(SECONDS):
                return await story()

        if request.param == "uvloop":
            return uvloop.run(bounded())
        return asyncio.run(bounded())

    return run


@pytest.fixture
def right(tmp_path):
    """Certificates that are as they must be, of this host."""
    return directory(tmp_path / "right")
