"""Another process that maps a guest's memory: what a device's backend does, and no more of the toolkit than it needs.

Over the socket whose descriptor is its argument comes the memory's file and its size; back go its userfaultfd and the
address. Then each line is a touch: `read PAGE`, answered with the page's first bytes in hex; `write PAGE HEX`; `unmap`.
"""

from __future__ import annotations

import socket
import sys
import threading

from postcopy.kernel import Mode, Userfaultfd, calls, memory_type

SHOWN = 16


def main(descriptor: int, type_name: str, modes: int) -> None:
    connection = socket.socket(fileno=descriptor)
    size, files, _, _ = socket.recv_fds(connection, 8, 1)
    kind = memory_type(type_name)
    length = int.from_bytes(size, "little")
    address = calls.map_shared(files[0], length)
    uffd = Userfaultfd.open(kind.features_for(kind.modes & (Mode.MISSING | Mode.MINOR)))
    uffd.register(address, length, Mode(modes))  # before it touches anything
    uffd.send(connection)
    connection.send(address.to_bytes(8, "little"))
    uffd.close()  # the destination's copy is the one that counts
    guard = threading.Lock()

    def say(*words: object) -> None:
        with guard:
            connection.sendall(f"{' '.join(map(str, words))}\n".encode())

    def touch(what: str, page: int, content: str = "") -> None:
        if what == "read":
            say("read", page, calls.read_memory(address + page * kind.page_size, SHOWN).hex())
        else:
            calls.write_memory(address + page * kind.page_size, bytes.fromhex(content))
            say("wrote", page)

    for line in connection.makefile("r"):
        words = line.split()
        if words[0] == "unmap":
            calls.unmap(address, length)
            say("unmapped")
            continue
        threading.Thread(target=touch, args=(words[0], int(words[1]), *words[2:]), daemon=True).start()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
