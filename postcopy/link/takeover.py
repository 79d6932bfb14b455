"""Memory that is handed over, as its destination takes it: not copied, not allocated, mapped as it is.

An offer and the memory connection enter; mapped memory leaves that is whole from the first moment, or the one reason
why it is not taken. Until the source has sent Run its guest goes on upon the same memory: nothing here writes to it.
"""

from __future__ import annotations

import contextlib
import socket
from collections import deque
from contextlib import ExitStack

from postcopy.errors import ProtocolError, UsageError
from postcopy.kernel import Mapping, memory_type
from postcopy.kernel import Way as PlacingWay
from postcopy.kernel.handover import close_files, receive_files, seal_files
from postcopy.link.guest import Kinds
from postcopy.link.placement import handling, traps_handed_over
from postcopy.link.prepare import Memory, check_guest, open_userfaultfd, register
from postcopy.link.sockets import ready
from postcopy.wire.control import LayoutOffer
from postcopy.wire.preamble import ACCEPTED, FILES


async def take_files(connection: socket.socket, count: int) -> list[int]:
    """Accept the memory connection and wait for the files of `count` regions; FilesError where others came."""
    connection.send(ACCEPTED)
    while True:
        await ready(connection)
        with contextlib.suppress(BlockingIOError):
            return receive_files(connection, FILES, count)


def take_over(offer: LayoutOffer, files: list[int], mode: str, kinds: Kinds) -> Memory:
    """Check, seal and map the files of an offer; they are this function's, whatever comes of it. In a thread.

    Raises UsageError (a file that is not as offered, a mode that has no meaning here), HostError, GuestError.
    """
    owned = deque(files)
    with ExitStack() as undo:
        undo.callback(lambda: close_files(list(owned)))
        check_guest(offer.guest, kinds)
        try:
            layout = offer.layout()
        except ProtocolError as error:
            raise UsageError(str(error)) from error
        trapped = traps_handed_over(mode)
        for region in layout.regions:
            memory_type(region.type).check_region(region)
        seal_files(layout.regions, list(owned))
        handlings = [handling("minor", region.type) for region in layout.regions] if trapped else []
        uffd = undo.enter_context(open_userfaultfd(layout, handlings)) if trapped else None
        mappings = []
        for region in layout.regions:
            mapping = undo.enter_context(Mapping(region, owned.popleft(), alias=trapped))
            mappings.append(mapping)
        for mapping, way in zip(mappings, handlings, strict=False):
            memory_type(mapping.region.type).prepare(mapping)
            if uffd is not None:
                register(uffd, mapping, way)
        zeropage = [memory_type(region.type).zero_way(alias=True) is PlacingWay.ZEROPAGE for region in layout.regions]
        guest = kinds[offer.guest.kind].empty(mappings, offer.guest.vcpus)
        undo.pop_all()
        return Memory(layout, mappings, uffd, handlings, zeropage, guest, resident=True)
