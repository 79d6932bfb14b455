"""What tests of KVM guests need of the machine."""

import pytest

from postcopy.errors import HostError
from postcopy.guest.kvm.machine import check_host
from tests.lacking import lacking


@pytest.fixture(autouse=True)
def _kvm():
    try:
        check_host()
    except HostError as missing:
        lacking(str(missing))
