"""How long each side waits for the other, in seconds, with the reason beside each number."""

from __future__ import annotations

DIAL_SECONDS = 10.0
"""For a TCP connection: three lost SYNs take 7 s, a fourth would not help."""

ANSWER_SECONDS = 10.0
"""For an answer that costs the other side no work (Welcome, the accepted data connections)."""

OFFER_SECONDS = 5.0
"""For LayoutOffer after Welcome: a source has it ready. Whoever says no more than Hello does not stay longer."""

PREPARE_SECONDS = 20.0
"""For Ready: the destination reserves and registers, and clears nothing, so it takes milliseconds whatever the size
(pages are made when they are placed). The rest is for a host under pressure and for a probe that is being answered. One
that says Welcome and then nothing holds the source no longer than this."""

LOAD_SECONDS = 5.0
"""For Loaded: the guest stands still meanwhile, so the source rather takes it back than waits longer."""

STOP_SECONDS = 20.0
"""For the guest to park its vCPUs: one that does not would hold the migration, not itself."""

SILENCE_SECONDS = 2.5
"""After Run: nothing heard on the control connection. Progress and Alive come twice a second, so this is four missed;
a break has to be noticed within 3 s. What a host that is merely slow makes of it is a pause, which mends itself."""

OLD_SILENCE_SECONDS = 6.0
"""The same where the other side knows no recovery, so that silence is a loss."""

OWED_SECONDS = 6.0
"""After Run: a source that owes pages and sends none of them, though it says that it is there."""

PROGRESS_SECONDS = 0.5
"""Between two Progress messages, and between two Alive."""

BEAT_SECONDS = 0.5
"""The tick of the data connections' heartbeats: silent after four, so within the same 2.5 s."""

REDIAL_SECONDS = 3.0
"""For the control connection of a migration that is paused: shorter than at first, for the next try follows at once."""

REJOIN_SECONDS = 4.0
"""For the next word of a destination that is asked to resume: it is up and has it ready, and the next try follows."""

RECONNECT_SECONDS = (0.05, 0.25, 0.5, 1.0, 2.0, 5.0)
"""Between two attempts to reconnect: a connection that was cut is back at once, and a host that is away for an hour is
asked every five seconds, which costs nothing and is no longer than anybody waits."""

RELEASE_SECONDS = 5.0
"""For Released after AllPlaced: the destination needs nothing more from the source, so it does not wait long."""
