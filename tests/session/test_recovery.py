"""Two machines on a network that is cut again and again, at any message: never both, never neither, always through.

Everything is drawn from a seed: which message travels next, what is cut, whose work fails, which clock runs out. What
the library around the machines does (who proves himself, which connection is whose) is played here in its plain form.
"""

import random

import pytest

from postcopy.errors import ProtocolError
from postcopy.session import events
from postcopy.session.states import SWITCHED, State
from postcopy.wire.control import AllPlaced, Resume, Run, Welcome

from .samples import IDENTITY, REPORT, destination, source

ROLES = ("urgent", "push")


class Connection:
    """Messages under way in both directions; once cut, nothing arrives any more, and each end finds out in its time."""

    def __init__(self):
        self.to = {"source": [], "destination": []}
        self.cut = False
        self.accepted = False


class World:
    def __init__(self, seed):
        self.random = random.Random(seed)
        self.now = 0.0
        self.machines = {"source": source(), "destination": destination()}
        self.control = {"source": None, "destination": None}
        self.data = {"source": None, "destination": None}  # one Connection for both roles
        self.work = {"source": [events.Started(0.0, None)], "destination": []}
        self.runs = {"source": True, "destination": False}
        self.listening = []  # control connections that the destination has not accepted yet
        self.run_sent = self.started = self.whole = self.released = False
        self.trouble = True
        self.tokens = 0
        self.trace = []

    # --- what the machines say --------------------------------------------------------------------------------------

    def feed(self, side, event):
        machine = self.machines[side]
        self.trace.append((side, str(machine.step), type(event).__name__, getattr(event, "message", "")))
        try:
            commands = machine.handle(event)
        except ProtocolError as error:
            commands = machine.handle(events.Broken(self.now, str(error)))
        for command in commands:
            name = type(command).__name__
            self.trace.append((side, "  does", name, getattr(command, "message", "")))
            getattr(self, "do_" + name, lambda *_: None)(side, command)
            assert not (self.runs["source"] and self.runs["destination"]), "both run"

    def do_Send(self, side, command):  # noqa: N802
        connection = self.control[side]
        if connection is None or (connection.cut and self.random.random() < 0.5):
            self.feed(side, events.NotSent(self.now, command.message, "closed"))
            return
        if isinstance(command.message, Run):
            self.run_sent = True
        if not connection.cut:
            connection.to["destination" if side == "source" else "source"].append(command.message)

    def do_Connect(self, side, command):  # noqa: N802
        connection = Connection()
        self.control[side] = connection
        self.listening.append(connection)
        self.work[side].append(events.Connected(self.now))

    def do_DropControl(self, side, command):  # noqa: N802
        self.hang_up(self.control, side)
        self.work[side] = [event for event in self.work[side] if not isinstance(event, events.Connected)]

    def do_CloseLinks(self, side, command):  # noqa: N802
        self.do_DropControl(side, command)

    def hang_up(self, connections, side):
        connection, connections[side] = connections[side], None
        if connection is not None:
            connection.closing = True

    def do_DialData(self, side, command):  # noqa: N802
        there = self.machines["destination"]
        if there.wants_data and command.token == there.token and not there.attached:
            connection = self.data["source"] = self.data["destination"] = Connection()
            for role in ROLES:
                self.work["destination"].append((connection, events.DataAttached(self.now, role, command.token)))
            self.work[side].append(self.perhaps(events.DataConnected(self.now)))
        else:
            self.work[side].append(events.WorkFailed(self.now, "host", "not accepted"))

    def do_StopPump(self, side, command):  # noqa: N802
        self.cut_data(self.data[side])
        self.data[side] = None
        if side == "source":
            late = (events.DataConnected, events.WorkFailed)
            self.work[side] = [event for event in self.work[side] if not isinstance(event, late)]

    def do_DetachData(self, side, command):  # noqa: N802
        self.cut_data(self.data[side])
        self.data[side] = None

    def do_ResumePump(self, side, command):  # noqa: N802
        assert self.data[side] is not None

    def do_StopGuest(self, side, command):  # noqa: N802
        self.runs[side] = False
        self.work[side].append(self.perhaps(events.GuestStopped(self.now, b"", 0.0, "boot")))

    def do_ResumeGuest(self, side, command):  # noqa: N802
        assert not self.started, "the guest has run at the destination"
        self.runs[side] = True

    def do_Prepare(self, side, command):  # noqa: N802
        self.work[side].append(self.perhaps(events.Prepared(self.now)))

    def do_Load(self, side, command):  # noqa: N802
        self.work[side].append(self.perhaps(events.GuestLoaded(self.now)))

    def do_StartGuest(self, side, command):  # noqa: N802
        assert self.run_sent
        self.runs[side] = self.started = True
        self.work[side].append(events.GuestRunning(self.now, 1.0))

    def do_MakeReport(self, side, command):  # noqa: N802
        self.work[side].append(events.AllResident(self.now, REPORT))

    def do_ReleaseMemory(self, side, command):  # noqa: N802
        assert self.whole, "pages are let go of that are nowhere else"
        self.released = True

    def do_HoldMemory(self, side, command):  # noqa: N802
        assert not self.whole

    def perhaps(self, event):
        fails = self.trouble and self.random.random() < 0.02
        return events.WorkFailed(self.now, "host", "no room") if fails else event

    def cut_data(self, connection):
        if connection is not None:
            connection.cut = True

    # --- what may happen --------------------------------------------------------------------------------------------

    def choices(self):
        found = [(6, self.accept, connection) for connection in self.listening]
        for side in ("source", "destination"):
            machine = self.machines[side]
            if self.work[side]:
                found.append((8, self.finish_work, side))
            connection = self.control[side]
            if connection is not None and connection.to[side]:
                found.append((8, self.deliver, side))
            elif connection is not None and self.ended(connection):
                found.append((2, self.tell_end, side))
            data = self.data[side]
            if data is not None and data.cut:
                found.append((2, self.tell_broken, side))
            if machine.deadline is not None:
                found.append((1, self.elapse, side))
        if self.machines["destination"].step == "active" and self.data["destination"] is not None:
            found.append((1, self.all_came, "destination"))
        if self.trouble:
            found += [(1, self.cut_control, ""), (1, self.cut_all_data, ""), (1, self.by_hand, "")]
        return found

    def ended(self, connection):
        return connection.cut or getattr(connection, "closing", False)

    def step(self):
        found = self.choices()
        if not found:
            return False
        weights = [weight for weight, _, _ in found]
        _, act, subject = self.random.choices(found, weights)[0]
        self.now += 0.01
        act(subject)
        return True

    def accept(self, connection):
        """Be the destination's port: hear the first message and give the connection to whom it belongs."""
        if not connection.to["destination"]:
            if self.ended(connection):
                self.listening.remove(connection)
            return
        self.listening.remove(connection)
        first, machine = connection.to["destination"].pop(0), self.machines["destination"]
        if not isinstance(first, Resume):
            self.control["destination"] = connection
            self.feed("destination", events.Received(self.now, first))
            return
        assert (first.migration_id, first.token) == IDENTITY
        refusal = machine.refusal_of_return()
        if refusal is not None:
            connection.to["source"].append(refusal)
            connection.closing = True
        elif machine.ended:
            connection.to["source"] += [Welcome(3, *IDENTITY, "test"), AllPlaced(machine.report or {})]
            connection.closing = True
        else:
            self.hang_up(self.control, "destination")
            self.control["destination"] = connection
            self.tokens += 1
            self.feed("destination", events.Rejoined(self.now, self.tokens.to_bytes(32, "big")))

    def deliver(self, side):
        self.feed(side, events.Received(self.now, self.control[side].to[side].pop(0)))

    def finish_work(self, side):
        event = self.work[side].pop(0)
        if isinstance(event, tuple):
            connection, event = event
            if connection is not self.data[side] or self.machines[side].step not in {"waiting", "recovering"}:
                return
        self.feed(side, event)

    def tell_end(self, side):
        self.control[side] = None
        self.feed(side, events.ControlLost(self.now, "cut"))

    def tell_broken(self, side):
        self.data[side] = None
        if self.machines[side].step not in {"stopping", "loading"} or self.trouble:
            self.feed(side, events.PumpBroken(self.now, "cut"))

    def elapse(self, side):
        self.now = max(self.now, self.machines[side].deadline)
        self.feed(side, events.Elapsed(self.now))

    def all_came(self, side):
        if self.trouble and self.random.random() < 0.9:
            return
        self.whole = True
        self.feed(side, events.Resident(self.now))

    def cut_control(self, _):
        for connection in (*self.listening, *self.control.values()):
            if connection is not None and self.random.random() < 0.7:
                connection.cut = True
                for inbox in connection.to.values():
                    del inbox[self.random.randint(0, len(inbox)) :]

    def cut_all_data(self, _):
        for connection in self.data.values():
            self.cut_data(connection)

    def by_hand(self, _):
        side = self.random.choice(["source", "destination"])
        state = self.machines[side].state
        if state in SWITCHED and self.machines[side].recoverable:
            paused = state is not State.POSTCOPY_ACTIVE
            wish = events.ResumeAsked(self.now) if paused else events.PauseAsked(self.now, "user")
            self.feed(side, wish)

    # --- the end ----------------------------------------------------------------------------------------------------

    def settle(self):
        """Disturb nothing any more, let clocks run only where nothing else is to be done: it must end."""
        self.trouble = False
        for side, machine in self.machines.items():
            if machine.state in SWITCHED and machine.held:
                self.feed(side, events.ResumeAsked(self.now))
        for _ in range(3000):
            if all(machine.ended for machine in self.machines.values()):
                return
            found = [one for one in self.choices() if one[1] != self.elapse]
            useful = [one for one in found if one[1] != self.accept or one[2].to["destination"] or self.ended(one[2])]
            if useful:
                _, act, subject = self.random.choice(useful)
                self.now += 0.01
                act(subject)
                continue
            waiting = [side for side in self.machines if self.machines[side].deadline is not None]
            if not waiting:
                return
            self.elapse(min(waiting, key=lambda side: self.machines[side].deadline))


def play(seed):
    world = World(seed)
    # first undisturbed for a while, so that trouble begins at every point of the way
    world.trouble = False
    for _ in range(world.random.randint(0, 40)):
        found = [one for one in world.choices() if one[1] not in {world.elapse, world.all_came}]
        if not found:
            break
        _, act, subject = world.random.choice(found)
        act(subject)
    world.trouble = True
    for _ in range(world.random.randint(0, 150)):
        if not world.step():
            break
    world.settle()
    return world


def judge(world):
    here, there = world.machines["source"], world.machines["destination"]
    if not world.started:
        # whatever was said, the guest is where it was
        assert world.runs["source"], (here.step, there.step)
        assert here.state in {State.FAILED, State.NONE, State.CANCELLED}
        return "source"
    assert not world.runs["source"]
    assert world.runs["destination"]
    # nobody gave up: it came through, however often it was cut
    assert (here.state, there.state) == (State.COMPLETED, State.COMPLETED)
    assert world.released
    return "resumed" if here.reconnects else "destination"


@pytest.mark.parametrize("block", range(10))
def test_however_often_it_is_cut(block):
    ends = {}
    for seed in range(block * 300, block * 300 + 300):
        world = play(seed)
        try:
            end = judge(world)
        except AssertionError as error:
            tail = "\n".join(map(str, world.trace[-60:]))
            raise AssertionError(f"seed {seed}: {error}\n{tail}") from error
        ends[end] = ends.get(end, 0) + 1
    assert {"source", "resumed"} <= ends.keys(), ends
