"""Where an agent is dialled when somebody has said that it is elsewhere now."""

from postcopy.link.address import TcpAddress
from postcopy.link.endpoint import Endpoint

GOOD, ELSEWHERE = TcpAddress("good", 1), TcpAddress("elsewhere", 1)


def dialled(endpoint, times=5):
    return [endpoint.at(attempts).host for attempts in range(times)]


def test_both_are_tried_in_turn_until_one_has_answered():
    endpoint = Endpoint(GOOD)
    assert dialled(endpoint) == ["good"] * 5
    endpoint.move_to(ELSEWHERE)
    assert dialled(endpoint) == ["elsewhere", "good", "elsewhere", "good", "elsewhere"]
    endpoint.move_to(GOOD)
    assert dialled(endpoint) == ["good"] * 5
    for right, wrong in ((GOOD, ELSEWHERE), (ELSEWHERE, GOOD)):
        endpoint = Endpoint(GOOD, ELSEWHERE)
        endpoint.answered(right)
        assert wrong.host not in dialled(endpoint)
