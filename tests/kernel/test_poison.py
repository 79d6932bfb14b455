"""POISON: a page that is lost for good gives SIGBUS, never zeros and never a hang."""

import signal

import pytest

from postcopy.kernel import Feature, Outcome, Placed, Userfaultfd, calls
from tests.child import ChildFailedError
from tests.kernel.bodies import Touch, in_child, next_message
from tests.kernel.memory import KINDS, PLAIN, page_size, registered
from tests.lacking import lacking


@pytest.fixture
def kind(request, huge_pages):
    with Userfaultfd.open(optional=Feature.POISON) as uffd:
        if not uffd.features:
            lacking("this kernel has no UFFDIO_POISON")
    if request.param.startswith("hugetlb"):
        huge_pages(request.param, 2)
    return request.param


@in_child
def touch_poisoned(kind):
    uffd, mapping = registered(kind)
    size = page_size(kind)
    assert uffd.poison(mapping.address, size) == Placed(Outcome.PLACED, size)
    calls.read_memory(mapping.address, 1)


@in_child
def poison_under_a_waiter(kind):
    uffd, mapping = registered(kind)
    touch = Touch(mapping.address)
    next_message(uffd)
    uffd.poison(mapping.address, page_size(kind))
    touch.finish()


@in_child
def poison_again(kind):
    uffd, mapping = registered(kind)
    size = page_size(kind)
    uffd.poison(mapping.address, size)
    assert uffd.poison(mapping.address, size) == Placed(Outcome.PRESENT, 0)
    # A page that turns up after all takes the mark away: late is better than lost.
    assert uffd.copy(mapping.address, b"x" * size) == Placed(Outcome.PLACED, size)
    assert calls.read_memory(mapping.address, size) == b"x" * size
    assert uffd.poison(mapping.address, size) == Placed(Outcome.PRESENT, 0)


@pytest.mark.parametrize("kind", KINDS, indirect=True)
@pytest.mark.parametrize("body", [touch_poisoned, poison_under_a_waiter])
def test_who_touches_it_gets_sigbus(kind, body):
    with pytest.raises(ChildFailedError, match=f"exit code -{int(signal.SIGBUS)}"):
        body(kind=kind)


@in_child
def touch_missing(kind):
    uffd, mapping = registered(kind, pages=2, features=PLAIN | Feature.SIGBUS)
    assert uffd.features & Feature.SIGBUS
    assert uffd.copy(mapping.address, bytes(page_size(kind))).outcome is Outcome.PLACED
    assert calls.read_memory(mapping.address, 1) == bytes(1)
    calls.read_memory(mapping.address + page_size(kind), 1)


@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_without_messages_a_missing_page_is_the_same(kind):
    with pytest.raises(ChildFailedError, match=f"exit code -{int(signal.SIGBUS)}"):
        touch_missing(kind=kind)


@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_it_is_marked_once_and_healed_by_a_late_copy(kind):
    poison_again(kind=kind)
