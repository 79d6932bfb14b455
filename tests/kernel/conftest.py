"""What the tests of the kernel room need: a userfaultfd, and for some of them root."""

from __future__ import annotations

import os

import pytest

from postcopy.errors import PostcopyError
from postcopy.kernel.opening import available_features
from tests.lacking import lacking

NEED_NO_KERNEL = {"test_abi", "test_events", "test_outcome"}


@pytest.fixture(autouse=True)
def _userfaultfd(request):
    if request.module.__name__.rpartition(".")[2] in NEED_NO_KERNEL:
        return
    try:
        available_features()
    except PostcopyError as refused:
        lacking(str(refused))


@pytest.fixture
def root():
    """For tests that become another user, or may do what only root may."""
    if os.geteuid():
        lacking("only root can become another user")
