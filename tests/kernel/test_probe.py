"""Probing: what is tried, what is said of it, and what a destination insists on."""

import errno
import os

import pytest

from postcopy.errors import HostError, KernelError
from postcopy.kernel import MEMORY_TYPES, Feature, Ioctl, Mode, Way, memory_type
from postcopy.kernel.memory_type import ModeGrant, TypeGrants
from postcopy.kernel.opening import OpenedBy, available_features
from postcopy.kernel.probe import Need, name_modes, probe_host, require
from tests.kernel.bodies import in_child, open_descriptors
from tests.kernel.test_opening import become_nobody

BOTH = Mode.MISSING | Mode.MINOR


@pytest.mark.usefixtures("root")
def test_root_may_do_all_of_it():
    before = open_descriptors()
    probe = probe_host()
    assert open_descriptors() == before
    assert probe.refusal is None
    assert probe.kernel == os.uname().release
    assert probe.features == available_features()
    assert probe.ioctls == Ioctl.API | Ioctl.REGISTER | Ioctl.UNREGISTER
    assert [way.by for way in probe.ways] == [OpenedBy.DEVICE, OpenedBy.SYSCALL, OpenedBy.USER_MODE_ONLY]
    assert [way.refusal for way in probe.ways] == [None] * 3
    assert [grants.name for grants in probe.types] == list(MEMORY_TYPES)
    shmem = probe.types[0]
    assert shmem.reason is None
    assert shmem.granted(BOTH) & Ioctl.CONTINUE
    assert not shmem.granted(Mode.MISSING) & Ioctl.CONTINUE


@pytest.mark.usefixtures("root")
def test_what_is_granted_is_performed_once(huge_pages):
    huge_pages("hugetlb-2M", 1)
    before = memory_type("hugetlb-2M").pool()
    types = {grants.name: grants for grants in probe_host().types}
    for name in ("shmem", "tmpfs"):
        for grant in types[name].modes:
            assert grant.ioctls & Ioctl.MOVE, "the answer lists it"
            assert (grant.refused, grant.untried) == ({Ioctl.MOVE: "EINVAL"}, 0)
    for grant in types["anonymous"].modes:
        assert (grant.refused, grant.untried) == ({}, 0)
    for grant in types["hugetlb-2M"].modes:
        assert (grant.refused, grant.untried) == ({}, 0)
    # Of a page of 1 GiB only what is done without one.
    assert {grant.untried for grant in types["hugetlb-1G"].modes} == {Ioctl.COPY, Ioctl.COPY | Ioctl.CONTINUE}
    assert memory_type("hugetlb-2M").pool() == before


@pytest.mark.usefixtures("root")
def test_without_a_huge_page_nothing_is_tried_on_one(monkeypatch):
    monkeypatch.setattr("postcopy.kernel.hugetlb.Hugetlb.spare", False)
    (grant,) = memory_type("hugetlb-2M").probe((BOTH,), performing=True).modes
    assert (grant.refused, grant.untried) == ({}, Ioctl.COPY | Ioctl.CONTINUE)


@pytest.mark.usefixtures("root")
@in_child
def test_nobody_is_shown_what_is_refused_and_what_still_works():
    become_nobody()
    probe = probe_host()
    assert probe.user == 65534
    device, syscall, user_mode = probe.ways
    assert "Permission denied" in device.refusal
    assert "Operation not permitted" in syscall.refusal
    assert user_mode.refusal is None
    assert probe.unprivileged_userfaultfd == "0"
    assert probe.types[0].granted(BOTH)


def test_a_kernel_without_userfaultfd_is_shown_not_raised(monkeypatch):
    def refuse(*_, **__):
        raise HostError("no userfaultfd here")

    monkeypatch.setattr("postcopy.kernel.probe.open_any_way", refuse)
    monkeypatch.setattr("postcopy.kernel.opening.open_any_way", refuse)
    probe = probe_host()
    assert probe.refusal == "no userfaultfd here"
    assert probe.features == 0
    assert [grants.reason for grants in probe.types] == ["no userfaultfd here"] * len(MEMORY_TYPES)


def test_what_is_there_is_no_error():
    shmem = memory_type("shmem")
    require(Feature.THREAD_ID, [Need(shmem, BOTH, (Way.COPY, Way.CONTINUE, Way.ZEROPAGE))])


def test_a_lacking_feature_is_named():
    with pytest.raises(HostError, match="lacks userfaultfd's bit 50"):
        require(Feature(1 << 50))


def test_the_features_of_the_needs_are_asked_for(monkeypatch):
    monkeypatch.setattr("postcopy.kernel.probe.available_features", lambda **_: Feature.MISSING_SHMEM)
    with pytest.raises(HostError, match="lacks userfaultfd's MINOR_SHMEM"):
        require(needs=[Need(memory_type("shmem"), BOTH, (Way.CONTINUE,))])


def test_an_ioctl_that_is_not_granted_is_named():
    with pytest.raises(HostError, match="shmem registered as missing is not granted CONTINUE by kernel"):
        require(needs=[Need(memory_type("shmem"), Mode.MISSING, (Way.COPY, Way.CONTINUE))])


def test_an_ioctl_that_is_granted_and_refused_is_no_ioctl():
    """REGISTER lists MOVE for shmem, and the kernel refuses it all the same."""
    need = Need(memory_type("shmem"), Mode.MISSING, (Way.COPY,), Ioctl.MOVE)
    with pytest.raises(HostError, match=r"is granted MOVE and refused it when it is performed \(EINVAL\)"):
        require(needs=[need])
    require(needs=[Need(memory_type("anonymous"), Mode.MISSING, (Way.MOVE,))])


def test_what_is_needed_besides_is_performed(monkeypatch):
    need = Need(memory_type("shmem"), Mode.WP, (), Ioctl.WRITEPROTECT)
    require(needs=[need])

    def refuse(*_, **__):
        raise KernelError("UFFDIO_WRITEPROTECT", errno.EINVAL)

    monkeypatch.setattr("postcopy.kernel.userfaultfd.Userfaultfd.writeprotect", refuse)
    with pytest.raises(HostError, match=r"is granted WRITEPROTECT and refused it when it is performed \(EINVAL\)"):
        require(needs=[need])


@pytest.mark.parametrize(
    ("grants", "text"),
    [
        (TypeGrants("shmem", 4096, (ModeGrant(BOTH, None, 22),), None), "missing\\+minor .*Invalid argument"),
        (TypeGrants("shmem", 4096, (), "no such memory"), "missing\\+minor .*no such memory"),
    ],
)
def test_modes_that_are_refused_are_named_with_the_reason(monkeypatch, grants, text):
    shmem = memory_type("shmem")
    monkeypatch.setattr(type(shmem), "probe", lambda self, combinations, *, performing: grants)
    with pytest.raises(HostError, match=text):
        require(needs=[Need(shmem, BOTH, (Way.COPY,))])


def test_modes_are_named_as_they_are_typed():
    assert name_modes(Mode.MISSING | Mode.MINOR | Mode.WP) == "missing+wp+minor"


@pytest.mark.usefixtures("root")
@in_child
def test_who_may_not_open_one_is_refused_with_the_ways_to_mend_it():
    become_nobody()
    with pytest.raises(HostError, match="CAP_SYS_PTRACE"):
        require()
    require(allow_user_mode_only=True)
