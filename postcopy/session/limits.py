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

SILENCE_SECONDS = 6.0
"""After Run: nothing heard although something was due. Progress comes twice a second, so this is a dozen missed;
together with what noticing and ending cost it stays under the 10 s within which a loss must be reported."""

PROGRESS_SECONDS = 0.5
"""Between two Progress messages."""

RELEASE_SECONDS = 5.0
"""For Released after AllPlaced: the destination needs nothing more from the source, so it does not wait long."""
