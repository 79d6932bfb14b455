"""Outcomes: the errno decides, the result field counts."""

from errno import EAGAIN, EBUSY, EEXIST, EFAULT, EINVAL, ENOENT, ESRCH

import pytest

from postcopy.errors import KernelError
from postcopy.kernel.outcome import Outcome, Placed, settle


@pytest.mark.parametrize(
    ("result", "done", "expected"),
    [
        (0, 8192, Placed(Outcome.PLACED, 8192)),
        (-EEXIST, -EEXIST, Placed(Outcome.PRESENT, 0)),
        (-EAGAIN, 4096, Placed(Outcome.RETRY, 4096)),
        (-EAGAIN, -EAGAIN, Placed(Outcome.RETRY, 0)),
        (-EAGAIN, 0, Placed(Outcome.RETRY, 0)),
        (-ESRCH, 0, Placed(Outcome.GONE, 0)),
        (-ENOENT, -ENOENT, Placed(Outcome.GONE, 0)),
    ],
)
def test_documented_results_are_outcomes(result, done, expected):
    assert settle("UFFDIO_COPY", result, 0x1000, 8192, done) == expected


@pytest.mark.parametrize("number", [EINVAL, EFAULT, EBUSY])
def test_anything_else_is_an_error_with_its_operation_and_number(number):
    with pytest.raises(KernelError, match=r"UFFDIO_COPY.*4096 bytes at 0x7000") as caught:
        settle("UFFDIO_COPY", -number, 0x7000, 4096, 0)
    assert caught.value.number == number


def test_busy_is_an_outcome_of_a_move_only():
    assert settle("UFFDIO_MOVE", -EBUSY, 0x1000, 4096, -EBUSY, movable=True) == Placed(Outcome.BUSY, 0)


def test_outcomes_are_the_labels_of_the_metrics():
    assert [str(outcome) for outcome in Outcome] == ["placed", "present", "retry", "gone", "busy"]
