"""Every limit of the protocol, with its reason. README.md lists the same numbers and a test compares them."""

from __future__ import annotations

# Payload of one PAGES frame. A demand page waits behind the frame that the sender has begun, so this is
# kept near the amount that a fast link carries in a millisecond; it is also the run that is placed by one
# call of the kernel.
FRAME_BYTES_MAX = 2 << 20

# One control message. Only STATE comes near: it carries the guest's device state as one piece.
CONTROL_BYTES_MAX = 16 << 20

# The first control message in either direction: until then nothing is known of the other agent, and nobody
# may make this one hold 16 MiB for a stranger.
FIRST_BYTES_MAX = 8 << 10

# Elements of all maps and arrays of one control message: 16 MiB of empty arrays would otherwise be a
# gigabyte of objects. The largest layout has about 500, a report fewer.
ELEMENTS_MAX = 8192

# Elements of one map or array. The decoder of msgpack makes room for as many as are announced, at each depth.
ARRAY_MAX = 1024

# The same of a guest's device state, which is msgpack inside of the message STATE: some numbers for each vCPU.
GUEST_ELEMENTS_MAX = 65536
GUEST_ARRAY_MAX = 8192

# Bytes of one text; names and lines for people are far below, the texts of a report have no limit of their
# own.
TEXT_BYTES_MAX = 64 << 10

# Depth of the free part of a report; messages themselves are three deep.
REPORT_DEPTH_MAX = 8

# Regions of one layout. The pump keeps a fixed table of them.
REGIONS_MAX = 64

# Page sizes: those of the architectures that userfaultfd exists on, from 4 KiB to a gigabyte.
PAGE_SIZE_MIN = 4 << 10
PAGE_SIZE_MAX = 1 << 30

# vCPUs of one guest: more than KVM allows, few enough that a wrong number is noticed before memory is spent
# on it.
VCPUS_MAX = 8192

# Characters of a name (software, type of memory, kind of guest, boot id), and of a text for people, which
# is cut to fit when it is sent.
NAME_CHARS_MAX = 64
TEXT_CHARS_MAX = 1000

# Pages that one HAVE tells of: 1 MiB of bits, so that neither end makes more than that out of one message.
HAVE_PAGES_MAX = 8 << 20

# Bytes of bits in one HAVE, as they travel. Bits that nothing can be saved of grow a little by packing.
HAVE_BYTES_MAX = (1 << 20) + (4 << 10)

# Bytes of the migration id and of the token that data connections present.
MIGRATION_ID_BYTES = 16
TOKEN_BYTES = 32
