"""How long each side waits for the other, in seconds, with the reason beside each number."""

from __future__ import annotations

DIAL_SECONDS = 10.0
"""For a TCP connection: three lost SYNs take 7 s, a fourth would not help."""

ANSWER_SECONDS = 10.0
"""For an answer that costs the other side no work (Welcome, the accepted data connections)."""

PREPARE_SECONDS = 120.0
"""For Ready: the destination allocates and registers; a terabyte of huge pages has to be cleared for it."""

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
