"""`postcopy doctor`: it says what the kernel says, what it offers as a cure is one, and a question changes nothing."""

import asyncio
import copy
import signal
import threading
from pathlib import Path

import pytest
import uvloop

from agent.doctor.problems import problems_of
from postcopy.kernel import Feature
from postcopy.kernel.opening import DEVICE, available_features
from postcopy.link.host import describe_host
from postcopy.wire.control import Cancel, Probe, Probed, Welcome
from tests.child import run_in_child

from .agents import AS_NOBODY, Command, destination, run, source
from .fakes import OFFER, FakeDestination, FakeSource

POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


@pytest.fixture(scope="module")
def host():
    return describe_host()


# --- this host ------------------------------------------------------------------------------------------------------


def test_the_object_says_what_was_tried():
    done = run("doctor", "--json")
    assert (done.status, done.err) == (0, "")
    found = done.json
    assert found["schema_version"] == 1
    assert found["userfaultfd"]["features"] == {bit.name: bool(available_features() & bit) for bit in Feature}
    assert found["userfaultfd"]["ways"][0]["by"] == "/dev/userfaultfd"
    types = {kind["name"]: kind for kind in found["memory_types"]}
    modes = {mode["mode"]: mode for mode in types["shmem"]["modes"]}
    assert "CONTINUE" in modes["missing+minor"]["ioctls"]
    assert "CONTINUE" not in modes["missing"]["ioctls"]
    assert "MOVE" not in modes["missing"]["ioctls"], "REGISTER lists it, and it does not work"
    assert (modes["missing"]["refused"], modes["missing"]["untried"]) == ({"MOVE": "EINVAL"}, [])
    assert {mode["mode"]: mode["refusal"] for mode in types["anonymous"]["modes"]}["minor"] == "EINVAL"
    assert "guest_memfd" in types
    pools = {pool["page_size"]: pool for pool in found["hugetlb_pools"]}
    assert pools[2 << 20]["nr"] == int((POOL / "nr_hugepages").read_text())
    assert {"clock_source", "cpus", "kvm", "memlock", "openssl", "transparent_huge_pages"} <= found.keys()
    assert (found["needs"], found["peer"]) == ([], None)


def test_the_table_says_the_same():
    done = run("doctor")
    assert done.status == 0
    for text in (
        "kernel",
        "MISSING_SHMEM",
        "/dev/userfaultfd",
        "guest_memfd",
        "promised, and refused: MOVE (EINVAL)",
        "clock source",
        "Problems",
    ):
        assert text in done.out
    assert "\x1b" not in done.out


def test_what_is_needed_and_there():
    needs = ("shmem:minor", "anonymous:missing", "anonymous:move", "shmem:wp")
    done = run("doctor", *(word for need in needs for word in ("--need", need)), "--json")
    assert done.status == 0, done.err
    assert [(need["need"], need["met"]) for need in done.json["needs"]] == [(need, True) for need in needs]


def test_what_is_needed_and_missing_is_named():
    done = run("doctor", "--need", "shmem:missing", "--need", "anonymous:minor")
    assert done.status == 3
    assert done.one_line().startswith("postcopy: needed and missing here: anonymous:minor: ")
    assert "shmem:missing" not in done.err
    done = run("doctor", "--need", "anonymous:minor", "--json")
    (need,) = done.json["needs"]
    assert (done.status, need["met"]) == (3, False)
    done = run("doctor", "--need", "shmem:move")
    assert done.status == 3
    assert "a page cannot be placed by move, on no kernel; of shmem may be asked missing, minor, wp" in done.one_line()


def test_the_cure_of_an_empty_pool_is_one(set_kernel):
    pool = POOL / "nr_hugepages"
    set_kernel(pool, "0")
    if int((POOL / "free_hugepages").read_text()):
        pytest.skip("somebody holds huge pages")
    done = run("doctor", "--need", "hugetlb-2M:missing", "--json")
    assert done.status == 3
    assert "hugetlb-2M:missing" in done.one_line()
    (need,) = done.json["needs"]
    assert need["mend"] in [problem["mend"] for problem in done.json["problems"]]
    number, arrow, file = need["mend"].removeprefix("echo ").split()
    assert (arrow, Path(file)) == (">", pool)
    set_kernel(file, number)
    assert run("doctor", "--need", "hugetlb-2M:missing").status == 0


def test_a_user_without_rights_is_told_how_to_get_them():
    if DEVICE.stat().st_mode & 0o006:
        pytest.skip("here anybody may open a userfaultfd")
    done = run("doctor", "--need", "shmem:missing", "--json", program=AS_NOBODY)
    assert done.status == 3
    assert "may not open a userfaultfd" in done.one_line()
    (need,) = done.json["needs"]
    assert need["mend"] in {f"setfacl -m u:65534:rw {DEVICE}", f"chown 65534 {DEVICE}"}
    problems = {problem["hinders"]: problem["mend"] for problem in done.json["problems"]}
    assert problems["every migration to this host"] == need["mend"]
    assert done.json["userfaultfd"]["ways"][2]["refusal"] is None  # user mode only: not enough, and said so


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--need", "shmem"], "write it TYPE:MODE, like shmem:minor; types are shmem, "),
        (["--need", "shmem:sideways"], "unknown mode 'sideways': of shmem may be asked missing, minor, wp"),
        (["--need", "anonymous:sideways"], "unknown mode 'sideways': of anonymous may be asked missing, move, wp"),
        (["--need", "paper:minor"], "unknown memory type 'paper'"),
        (["--size", "1GiB"], "they go with --peer"),
        (["--peer", "tcp:192.0.2.1:7000"], "add --insecure"),
        (["--peer", "tcp:127.0.0.1:1", "--size", "0"], "there is no memory of no size"),
        (["--peer", "tcp:127.0.0.1:1", "--vcpus", "8193"], "not in the range 1<=x<=8192"),
        (["--peer", "tcp:127.0.0.1:1", "--size", "4097"], "multiple of the page size"),
        (["--peer", "tcp:127.0.0.1:1", "--memory", "paper"], "unknown memory type 'paper'"),
        (["--peer", "tcp:127.0.0.1:1", "--mode", "sideways"], "unknown mode 'sideways'"),
        (["--peer", "tcp:127.0.0.1:1", "--guest", "ghost"], "unknown kind of guest 'ghost'"),
    ],
)
def test_what_makes_no_sense(arguments, text):
    done = run("doctor", *arguments)
    assert (done.status, done.out) == (2, "")
    assert text in done.one_line()


def changed(host, *path, to):
    """The description of a host that differs in one place."""
    other = copy.deepcopy(host)
    place = other
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return other


def new_problems(host, *path, to):
    known = problems_of(host)
    return [(one["problem"], one["mend"]) for one in problems_of(changed(host, *path, to=to)) if one not in known]


def test_each_problem_has_its_cure(host):
    assert new_problems(host, "userfaultfd", "features", "THREAD_ID", to=False) == [
        ("the kernel lacks THREAD_ID: Linux 4.14 has it", None)
    ]
    assert new_problems(host, "openssl", "refusal", to="no such file") == [
        ("OpenSSL 3 cannot be loaded: no such file", "apt-get install libssl3")
    ]
    slow = changed(host, "clock_source", "available", to=["hpet", "tsc"])
    assert new_problems(slow, "clock_source", "current", to="hpet") == [
        (
            "the clock source hpet is slow to read",
            "echo tsc > /sys/devices/system/clocksource/clocksource0/current_clocksource",
        )
    ]
    nobody = [{"by": way["by"], "refusal": "no"} for way in host["userfaultfd"]["ways"]]
    without = changed(host, "userfaultfd", "device", to=None)
    assert new_problems(without, "userfaultfd", "ways", to=nobody)[0][1] == "sysctl -w vm.unprivileged_userfaultfd=1"
    intel = changed(changed(host, "processor", to="GenuineIntel"), "kvm", "device", to=None)
    assert new_problems(intel, "kvm", "refusal", to="no") == [
        ("no virtual machine can be made: no", "modprobe kvm_intel")
    ]


# --- two hosts ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A destination that ends with its first migration: questions are none."""
    with destination(tmp_path_factory.mktemp("destination"), "--once") as daemon:
        yield daemon
        status = daemon.status()
        assert (status["state"], status["ended"]) == ("none", None)
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0


def test_a_migration_that_would_work(there):
    done = run("doctor", "--peer", there.address, "--memory", "shmem", "--size", "64MiB", "--json")
    assert done.status == 0, done.err
    peer = done.json["peer"]
    assert (peer["works"], peer["answer"], peer["reason"]) == (True, "ready", None)
    assert peer["migration"] == {"memory": "shmem", "size_bytes": 64 << 20, "mode": "auto"}
    assert peer["host"]["kernel"] == done.json["kernel"]
    assert {one["what"] for one in peer["differences"]} <= {"hugetlb-2M", "hugetlbfs-2M", "huge pages of 2 MiB"}
    assert "would work" in run("doctor", "--peer", there.address).out


def test_a_migration_that_would_not_work_says_why(there):
    free = (POOL / "free_hugepages").read_text(), (POOL / "resv_hugepages").read_text()
    done = run("doctor", "--peer", there.address, "--memory", "hugetlb-2M", "--size", "64TiB", "--json")
    assert done.status == 3
    assert f"a migration to {there.address} would not work: hugetlb-2M: " in done.one_line()
    assert (done.json["peer"]["works"], done.json["peer"]["answer"]) == (False, "memory")
    assert ((POOL / "free_hugepages").read_text(), (POOL / "resv_hugepages").read_text()) == free


def test_a_mode_that_the_destination_was_not_started_with(there):
    done = run("doctor", "--peer", there.address, "--mode", "minor")
    assert done.status == 3
    assert "it places pages in mode auto: start it with --mode minor" in done.one_line()


def test_nothing_is_kept_at_the_destination(there, huge_pages):
    huge_pages("hugetlb-2M", 8)
    descriptors = len(list(Path(f"/proc/{there.process.pid}/fd").iterdir()))
    free = (POOL / "free_hugepages").read_text(), (POOL / "resv_hugepages").read_text()
    for _ in range(3):
        assert run("doctor", "--peer", there.address, "--memory", "hugetlb-2M", "--size", "16MiB").status == 0
    assert ((POOL / "free_hugepages").read_text(), (POOL / "resv_hugepages").read_text()) == free
    assert len(list(Path(f"/proc/{there.process.pid}/fd").iterdir())) <= descriptors
    assert "memfd:" not in Path(f"/proc/{there.process.pid}/maps").read_text()


def test_a_probe_that_breaks_off_is_no_migration(there):
    with FakeSource(there.address) as fake:
        fake.greet()
        fake.control.send(Probe(OFFER.regions, OFFER.guest))
    with FakeSource(there.address) as fake:
        fake.greet()
        fake.control.send(Probe(OFFER.regions, OFFER.guest))
        assert fake.control.expect(Probed).answer == "ready"
        assert fake.control.receive() is None
    assert there.status()["ended"] is None


def test_a_migration_after_a_question_and_a_question_after_it(tmp_path):
    with destination(tmp_path) as there, source(tmp_path, size="8MiB") as here:
        assert run("doctor", "--peer", there.address, "--size", "8MiB").status == 0
        assert run("migrate", "--admin", here.admin, there.address).status == 0
        asked = run("doctor", "--peer", there.address)
        assert asked.status == 4
        assert asked.one_line() == "postcopy: the destination refused: this destination has a guest already"
        there.runs_on()


def test_nobody_answers():
    asked = run("doctor", "--peer", "tcp:127.0.0.1:1")
    assert asked.status == 4
    assert asked.one_line() == "postcopy: cannot connect to tcp:127.0.0.1:1: Connection refused"


def test_a_destination_of_version_1_is_named():
    with FakeDestination() as fake, Command("doctor", "--peer", fake.address) as asking:
        fake.upto_hello()
        fake.control.send(Welcome(1, b"i" * 16, b"t" * 32, "an old one"))
        text = "the destination speaks version 1 of the protocol, a probe needs version 2"
        assert fake.control.expect(Cancel).text == text
        done = asking.result()
        assert (done.status, done.one_line()) == (4, f"postcopy: {text}")


@pytest.mark.parametrize("understood", [True, False])
def test_what_another_host_says_is_neither_believed_nor_performed(host, understood):
    evil = {"kernel": "\x1b[2J[red]evil"} if understood else {"userfaultfd": {"ways": 1}}
    with FakeDestination() as fake, Command("doctor", "--peer", fake.address) as asking:
        fake.upto_hello()
        fake.control.send(Welcome(3, b"i" * 16, b"t" * 32, "a fake"))
        fake.control.expect(Probe)
        fake.control.send(Probed("ready", "", "auto", host | evil))
        done = asking.result()
        assert done.status == 0, done.err
        assert ("[2J[red]evil" if understood else "not understood") in done.out
        assert "\x1b" not in done.out


def ask_while_another_is_answered():
    """A migration that comes in the middle of a probe waits for its answer and is let in."""
    from postcopy.guest.kinds import kinds
    from postcopy.link import Destination, Source, destination_interpreter
    from postcopy.link.address import parse_address
    from postcopy.link.probe import ask
    from tests.link.test_library import make_source

    trying, go_on = threading.Event(), threading.Event()
    really = destination_interpreter.try_out

    def slowly(*arguments):
        trying.set()
        go_on.wait(20)
        return really(*arguments)

    destination_interpreter.try_out = slowly

    async def story():
        mapping, guest = make_source("shmem", size=1 << 20)
        async with (
            Destination("tcp:127.0.0.1:0", kinds()) as there,
            Source([mapping], guest) as here,
        ):
            question = asyncio.create_task(ask(parse_address(str(there.address)), OFFER.layout(), OFFER.guest))
            await asyncio.to_thread(trying.wait, 20)
            migration = asyncio.create_task(here.migrate(str(there.address)))
            while here.state != "setup":
                await asyncio.sleep(0.001)
            go_on.set()
            assert (await question).answer == "ready"
            assert (await migration)["outcome"] == "completed"
            assert (await there.migrated()).owner == "destination"

    uvloop.run(story())


def test_a_question_does_not_turn_a_guest_away():
    run_in_child(ask_while_another_is_answered)
