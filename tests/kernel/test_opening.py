"""Opening: the ways, the features, and what a user is told who may not."""

import contextlib
import ctypes
import os
import resource
from errno import EINVAL, EMFILE, EPERM
from functools import partial

import pytest

from postcopy.errors import HostError, KernelError
from postcopy.kernel import Feature, Mode, Userfaultfd, calls
from postcopy.kernel.opening import (
    DEVICE,
    OpenedBy,
    available_features,
    handshake,
    name_features,
    open_any_way,
    open_one_way,
)
from tests.kernel.bodies import PAGE, WAIT, Touch, in_child, open_descriptors
from tests.kernel.memory import registered
from tests.lacking import lacking

NOBODY = 65534
pytestmark = pytest.mark.usefixtures("root")


def become_nobody():
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


@pytest.mark.parametrize("way", [way for way in OpenedBy if way is not OpenedBy.HANDED_OVER])
def test_each_way_gives_a_descriptor_that_is_closed_on_exec_and_does_not_block(way):
    descriptor = open_one_way(way)
    try:
        assert not os.get_inheritable(descriptor)
        assert not os.get_blocking(descriptor)
    finally:
        os.close(descriptor)


def test_it_can_be_asked_to_block():
    with Userfaultfd.open(blocking=True) as uffd:
        assert os.get_blocking(uffd.fd)
        with pytest.raises(KernelError, match=r"poll of a userfaultfd.*EINVAL.*opened to block: read\(\) waits"):
            uffd.poll(0)
    with pytest.raises(KernelError, match=r"poll of a userfaultfd.*EBADF"):
        uffd.poll(0)


@in_child
def test_it_is_polled_whatever_another_holder_made_of_it():
    uffd, mapping = registered("shmem")
    os.set_blocking(uffd.fd, True)
    assert not uffd.poll(0)
    os.set_blocking(uffd.fd, True)
    touch = Touch(mapping.address)
    assert uffd.poll(WAIT)
    assert [message.address for message in uffd.read()] == [mapping.address]
    uffd.zeropage(mapping.address, mapping.region.size)
    touch.finish()
    number = uffd.fd
    os.close(number)
    with pytest.raises(KernelError, match=r"poll of a userfaultfd.*EBADF"):
        uffd.poll(0)


def test_the_device_is_preferred_and_only_what_was_asked_for_is_enabled():
    if not DEVICE.exists():
        lacking(f"no {DEVICE}")
    with Userfaultfd.open(Feature.THREAD_ID, Feature.EXACT_ADDRESS | Feature(1 << 40)) as uffd:
        assert uffd.opened_by is OpenedBy.DEVICE
        assert uffd.features == Feature.THREAD_ID | Feature.EXACT_ADDRESS


def test_without_the_device_the_system_call_is_taken(monkeypatch, tmp_path):
    monkeypatch.setattr("postcopy.kernel.opening.DEVICE", tmp_path / "userfaultfd")
    with Userfaultfd.open() as uffd:
        assert uffd.opened_by is OpenedBy.SYSCALL


def test_a_lacking_feature_is_named():
    with pytest.raises(HostError, match="lacks userfaultfd's bit 40"):
        Userfaultfd.open(Feature.THREAD_ID | Feature(1 << 40))


def test_features_without_a_name_are_shown_by_their_bit():
    assert name_features(Feature.THREAD_ID | Feature(1 << 20)) == "THREAD_ID, bit 20"


def test_a_descriptor_has_one_handshake():
    descriptor, _ = open_any_way()
    try:
        assert handshake(descriptor, Feature(0))[0] == available_features()
        with pytest.raises(KernelError) as caught:
            handshake(descriptor, Feature.THREAD_ID)
        assert caught.value.number == EINVAL
    finally:
        os.close(descriptor)


@in_child
def test_who_may_not_is_told_all_three_ways_to_mend_it():
    become_nobody()
    with pytest.raises(HostError) as caught:
        Userfaultfd.open()
    text = str(caught.value)
    assert caught.value.exit_status == 3
    for word in ("/dev/userfaultfd", "vm.unprivileged_userfaultfd", "CAP_SYS_PTRACE", "65534"):
        assert word in text, text
    assert "\n" not in text


@in_child
def test_user_mode_only_is_taken_where_it_is_allowed_and_says_so():
    become_nobody()
    with Userfaultfd.open(allow_user_mode_only=True) as uffd:
        assert uffd.opened_by is OpenedBy.USER_MODE_ONLY


@in_child
def test_user_mode_only_is_deaf_to_faults_of_system_calls():
    become_nobody()
    with Userfaultfd.open(allow_user_mode_only=True) as uffd:
        address = calls.map_anonymous(PAGE)
        uffd.register(address, PAGE, Mode.MISSING)
        reader, writer = os.pipe()
        os.write(writer, b"x")
        # readv's buffer must be at that address: the kernel touches the page on our behalf and is refused.
        failed = Touch(action=partial(read_into, reader, address))
        assert failed.finish() == -14
        assert not uffd.read()


def read_into(descriptor, address):
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.read(descriptor, ctypes.c_void_p(address), ctypes.c_size_t(1))
    return result if result >= 0 else -ctypes.get_errno()


@in_child
def test_a_privileged_one_is_told_of_faults_of_system_calls():
    with Userfaultfd.open() as uffd:
        address = calls.map_anonymous(PAGE)
        uffd.register(address, PAGE, Mode.MISSING)
        reader, writer = os.pipe()
        os.write(writer, b"x")
        reading = Touch(action=partial(read_into, reader, address))
        assert uffd.poll(WAIT)
        (fault,) = uffd.read()
        assert fault.address == address
        uffd.zeropage(address, PAGE)
        assert reading.finish() == 1
        assert calls.read_memory(address, 1) == b"x"


@in_child
def test_fork_events_need_a_capability():
    become_nobody()
    with Userfaultfd.open(optional=Feature.EVENT_FORK | Feature.THREAD_ID, allow_user_mode_only=True) as uffd:
        assert uffd.features == Feature.THREAD_ID
    with pytest.raises(HostError, match="EVENT_FORK needs CAP_SYS_PTRACE"):
        Userfaultfd.open(Feature.EVENT_FORK, allow_user_mode_only=True)


@in_child
def test_exhausted_descriptors_are_no_question_of_permission():
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_descriptors(), 4096))
    with contextlib.suppress(OSError):
        while True:
            os.dup(0)
    with pytest.raises(KernelError) as caught:
        Userfaultfd.open()
    assert caught.value.number == EMFILE


@in_child
def test_failed_openings_leave_no_descriptor_behind():
    before = open_descriptors()
    with pytest.raises(HostError):
        Userfaultfd.open(Feature(1 << 40))
    become_nobody()
    for features in (Feature(0), Feature.EVENT_FORK):
        with pytest.raises(HostError):
            Userfaultfd.open(features, allow_user_mode_only=bool(features))
    assert open_descriptors() == before


def test_the_handshake_of_a_stranger_is_refused(monkeypatch):
    monkeypatch.setattr("postcopy.kernel.abi.API", 0xAB)
    descriptor, _ = open_any_way()
    try:
        with pytest.raises(KernelError) as caught:
            handshake(descriptor, Feature(0))
        assert caught.value.number in {EINVAL, EPERM}
    finally:
        os.close(descriptor)
