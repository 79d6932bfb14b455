"""HOW is it said? Preambles, the frames of data connections, the control messages, versions.

Pure: bytes enter, values leave, and the other way round; README.md beside this file is the protocol's
specification. Frames and preambles are used by module (`frame.pack`, `preamble.unpack`), messages by name
from `control`.
"""
