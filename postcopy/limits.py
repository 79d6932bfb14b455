"""Every limit there is, with the reason beside it: what others may have of us, and how long they are waited for.

Any room may import it, and C is built with what IN_C names. A test holds that no limit is defined anywhere else. What
is no limit is not here: formats and the kernel's ABI, how often something is looked at, what a benchmark measures with.
"""

from __future__ import annotations

# --- what is said: wire, whose README lists the same numbers ----------------------------------------------------------

# Payload of one PAGES frame; a larger page travels alone. A demand page waits behind the frame that the sender has
# begun, so this is kept near the amount that a fast link carries in a millisecond; it is also the run that is placed by
# one call of the kernel.
FRAME_BYTES_MAX = 2 << 20

# One control message. Only STATE comes near: it carries the guest's device state as one piece.
CONTROL_BYTES_MAX = 16 << 20

# The first control message in either direction: until then nothing is known of the other agent, and nobody may make
# this one hold 16 MiB for a stranger.
FIRST_BYTES_MAX = 8 << 10

# Elements of all maps and arrays of one control message: 16 MiB of empty arrays would otherwise be a gigabyte of
# objects. The largest layout has about 500, a report fewer.
ELEMENTS_MAX = 8192

# Elements of one map or array. The decoder of msgpack makes room for as many as are announced, at each depth.
ARRAY_MAX = 1024

# The same of a guest's device state, which is msgpack inside of the message STATE: some numbers for each vCPU.
GUEST_ELEMENTS_MAX = 65536
GUEST_ARRAY_MAX = 8192

# Bytes of one text; names and lines for people are far below, the texts of a report have no limit of their own.
TEXT_BYTES_MAX = 64 << 10

# Maps and arrays inside each other, in whatever is unpacked. The decoder takes a thousand; whoever then shows one in an
# error, or packs it again, calls itself for each and comes to the end of the interpreter's stack. The answers of a
# daemon are the deepest, and less than ten.
NESTED_MAX = 32

# Depth of the free part of a report; messages themselves are three deep.
REPORT_DEPTH_MAX = 8

# Regions of one layout, and mappings that a process hands over. A fixed table of them is part of each pump; a guest's
# memory has a handful.
REGIONS_MAX = 64

# No region reaches this far: offsets travel as unsigned 64-bit numbers, but the kernel keeps file offsets in signed
# ones.
REGION_SIZE_MAX = 1 << 63

# Those of the architectures that userfaultfd exists on, from 4 KiB to a gigabyte.
PAGE_SIZE_MIN = 4 << 10
PAGE_SIZE_MAX = 1 << 30

# vCPUs of one guest: more than KVM allows, few enough that a wrong number is noticed before memory is spent on it.
VCPUS_MAX = 8192

# Characters of a name (software, type of memory, kind of guest, boot id), and of a text for people, which is cut to fit
# when it is sent.
NAME_CHARS_MAX = 64
TEXT_CHARS_MAX = 1000
# A configuration file: what is longer was not written by hand.
CONFIG_BYTES_MAX = 1 << 20

# Pages that one HAVE tells of: 1 MiB of bits, so that neither end makes more than that out of one message.
HAVE_PAGES_MAX = 8 << 20

# Bytes of bits in one HAVE, as they travel. Bits that nothing can be saved of grow a little by packing.
HAVE_BYTES_MAX = (1 << 20) + (4 << 10)

# Bytes of the migration id and of the token that data connections present.
MIGRATION_ID_BYTES = 16
TOKEN_BYTES = 32
SECRET_BYTES = 16  # of a fetch's token: what stays the same from attempt to attempt

# Bytes by which a source names the memory of a snapshot; whoever fetches it keeps them.
MEMORY_NAME_BYTES = 16

# Runs of lost pages in a report: of a guest that lost pages all over it might be as many as it has pages.
LOST_EXTENTS_MAX = 256

# Looks at a migration that its report tells of; after some, the time between two doubles, so an hour is 270. Buckets of
# a histogram: one that has more travels with buckets four times as wide. A report's lists have an end.
COURSE_LOOKS_MAX = 400
COURSE_BUCKETS_MAX = 500

# A guest with more vCPUs has no stalls told in PROGRESS. A histogram has 1 or 2 KB, at most 12; to make and write one
# takes 0.1 to 0.2 ms, twice a second while the guest waits for pages: eight take 1 or 2 ms.
HISTOGRAM_VCPUS_MAX = 8

# Values in one bucket of such a histogram: a million a second for nine years. All buckets of one add up to a number of
# 64 bits with a sign, and the difference of two is one as well.
HISTOGRAM_COUNT_MAX = (1 << 48) - 1

# --- strangers, and the other agent before it is trusted: link --------------------------------------------------------

# How long a connection may take to say what it is for, for a TLS handshake (two round trips, and a signature of each
# end), and for its first message. A source sends its preamble with the first packet, the message right behind.
PREAMBLE_SECONDS = 5.0
HANDSHAKE_SECONDS = 5.0
FIRST_MESSAGE_SECONDS = 5.0

# To whom is refused, what was said last should arrive: a connection closed with bytes unread would lose it. So it is
# read on for so long, and so much.
FAREWELL_SECONDS = 1.0
FAREWELL_BYTES = 64 << 10

# Connections that have not proved themselves yet, at one time. A source needs one at a time and three in all, for a few
# round trips. Beyond, the oldest from where most of them come gives its place to the newest: whoever opens a thousand
# and says nothing is in the way of nobody but himself.
UNPROVEN_MAX = 64

# Those that the kernel holds for us until they are accepted; where accept() failed for want of descriptors or memory,
# after time for some to be given back.
ACCEPT_BACKLOG = 128
ACCEPT_PAUSE_SECONDS = 0.1

# Lines of the log that strangers can cause in so many seconds; what is beyond is counted and told once.
LINES_MAX = 50
LINES_SECONDS = 5.0

# Migrations whose source may still ask what became of them.
KNOWN_MAX = 16

# Messages that are read ahead of the machine, and their bytes: the other side may not fill this one's memory with them.
# One that is larger than all of it (a guest's state) is read all the same, and nothing behind it.
MESSAGES_AHEAD_MAX = 64
BYTES_AHEAD_MAX = 1 << 20

# Destinations that fetch from one source at one time: each has two threads and some megabytes of buffers. And those
# whose memory is gone and who may come back to be told: a line of text each.
DESTINATIONS_MAX = 256
GONE_MAX = 4096

# Of all of them together: a buffer for each connection, as large as the pages that are asked for, and a byte for each
# page. Who takes 4 KiB pages costs 4 MiB, so it is of no matter to 256 of them; who says that his pages have 1 GiB
# costs 2 GiB, and anybody may say so.
FETCHED_BYTES_MAX = 4 << 30

# struct sockaddr_un holds 108 bytes with the final zero (unix(7)).
UNIX_PATH_BYTES_MAX = 107

# A host that vanished answers nothing: after two quiet seconds it is asked, then once a second, and given up after four
# questions. Together with what ending costs that is below the 10 s in which a loss must be told.
KEEPALIVE_IDLE_SECONDS = 2
KEEPALIVE_INTERVAL_SECONDS = 1
KEEPALIVE_COUNT = 4

# Bytes that were sent and not acknowledged for so long are taken for lost (tcp(7), TCP_USER_TIMEOUT). It also overrules
# the keepalive's count, so it is the same time.
UNACKNOWLEDGED_MS = 6000

# Bytes of the push that the kernel may hold at either end: enough that neither end waits for the other's turn on the
# CPU. What stands in front of a demand page on a shared link is bounded by the window that the destination offers,
# below.
PUSH_SEND_BYTES = 4 << 20
PUSH_RECEIVE_BYTES = 4 << 20

# --- how long a step of a migration may take: session, and link, which performs it ------------------------------------

# For a TCP connection: three lost SYNs take 7 s, a fourth would not help.
DIAL_SECONDS = 10.0

# For an answer that costs the other side no work (Welcome, the accepted data connections).
ANSWER_SECONDS = 10.0

# For LayoutOffer after Welcome: a source has it ready. Whoever says no more than Hello does not stay longer.
OFFER_SECONDS = 5.0

# Where processes wait for any source that dials: from a source's offer until it is refused or asked to cancel, and from
# there until it is left. Together they are less than the ANSWER_SECONDS for which another source's offer waits there.
OFFERED_SECONDS = 7.0
HEARD_OUT_SECONDS = 2.0

# From where offers there came to nothing: these give way to all others. A name each; with more hosts than that somebody
# may be forgotten before his turn is over.
ORIGINS_MAX = 1024

# For Ready: the destination reserves and registers, and clears nothing, so it takes milliseconds whatever the size
# (pages are made when they are placed). The rest is for a host under pressure and for a probe that is being answered.
# One that says Welcome and then nothing holds the source no longer than this.
PREPARE_SECONDS = 20.0

# For Loaded: the guest stands still meanwhile, so the source rather takes it back than waits longer.
LOAD_SECONDS = 5.0

# For the guest to park its vCPUs: one that does not would hold the migration, not itself. The loop itself waits for the
# first of them, a thread for the rest.
STOP_SECONDS = 20.0
PARK_AT_ONCE_SECONDS = 0.002

# After the last page a first step is due at once; a guest that makes none is told of without it.
FIRST_STEP_SECONDS = 1.0

# And for the pump to note how long the last faults took, which are over by then.
SETTLED_SECONDS = 0.25

# After Run: nothing heard on the control connection. Progress and Alive come twice a second, so this is four missed; a
# break has to be noticed within 3 s. What a host that is merely slow makes of it is a pause, which mends itself.
SILENCE_SECONDS = 2.5

# The same where the other side knows no recovery, so that silence is a loss.
OLD_SILENCE_SECONDS = 6.0

# After Run: a source that owes pages and sends none of them, though it says that it is there.
OWED_SECONDS = 6.0

# Between two Progress messages, and between two Alive.
PROGRESS_SECONDS = 0.5

# The tick of the data connections' heartbeats, and how many without a word are silence: the same 2.5 s.
BEAT_SECONDS = 0.5
QUIET_TICKS = 4

# For the control connection of a migration that is paused, and for the next word of a destination that is asked to
# resume, which has it ready: shorter than at first, for the next try follows at once.
REDIAL_SECONDS = 3.0
REJOIN_SECONDS = 4.0

# Between two attempts to reconnect: a connection that was cut is back at once, and a host that is away for an hour is
# asked every five seconds, which costs nothing and is no longer than anybody waits.
RECONNECT_SECONDS = (0.05, 0.25, 0.5, 1.0, 2.0, 5.0)

# For a source to ask whether all of a completed migration came, where an agent would end by itself and nobody has said
# how long a source may be away: one that waits asks every five seconds, one that has let go of its memory never does.
UNHEARD_SECONDS = 300.0

# For Released after AllPlaced: the destination needs nothing more from the source, so it does not wait long.
RELEASE_SECONDS = 5.0

# What was said last (a refusal, Released, an answer to a command) should arrive; for who reads no more nobody waits
# longer.
FLUSH_SECONDS = 2.0

# Once this side wants to end: how long it waits for a source that may just be sending Run, for destinations to notice.
CLOSE_SECONDS = 5.0

# --- which page next: plan --------------------------------------------------------------------------------------------

# Demands whose surroundings are still of interest: about as many as there are vCPUs. Older ones are forgotten, as their
# guest has moved on.
DEMANDS_MAX = 16

# --- the pump: in C but for two ---------------------------------------------------------------------------------------

# How long a thread may poll before it blocks, unless another time is asked for: twice what a demand page takes. Beyond
# a second it is no polling any more but a CPU given away.
POLL_MAX_NS = 200_000
POLL_LIMIT_NS = 1_000_000_000

# Faults accounted at a time. A thread has one fault at most, so this bounds the threads served at once, not the work;
# while it is full no further message is read and those threads wait in the kernel's queue.
PENDING_MAX = 1024

# Messages of a userfaultfd read by one call: 2 KiB of stack, and more than vCPUs fault between two looks.
MESSAGES_MAX = 64

# Other processes that map the guest's files, in the life of one pump: backends of devices, one or two queues each.
PUMP_VIEWS_MAX = 16

# Bytes read beyond the header being waited for, so that a demand page comes with one system call.
READ_AHEAD = 4096

# A claimed run is placed once it is this long, so that a page early in a frame does not wait for the whole of it. Where
# events are told of the push places no more than the second at a time: the thread that reads them waits for it.
RUN_BYTES_MAX = 256 << 10
GATE_BYTES_MAX = 64 << 10

# For so long nothing could be placed because the mappings were changing: that is not coming to an end. It may take a
# thread of the guest to end it, and a machine with more to do than CPUs lets that wait for seconds.
CHANGES_NS_MAX = 20_000_000_000

# How long it is tried again at once after something was read that stood against it; else there is a sleep between.
CHANGES_SPIN_NS = 200_000
CHANGES_SLEEP_NS = 50_000

# The same for memory that is not the guest's own, which others are not to wait for: views, a child that was forked.
OTHERS_NS_MAX = 100_000_000

# Requests answered with one system call; none is read while answers wait, so the destination cannot pile them up. Where
# content is read from a file so many bytes of answers are made at a time, at least one page.
ANSWERS_MAX = 64
ANSWERS_BYTES_MAX = 2 << 20

# A request for a page that the push has sent already: up to this size it is sent once more, ahead of whatever the push
# connection still holds, which may be several huge pages; the destination drops the copy that comes second. A page of a
# gibibyte is not worth twice its time on the wire.
AGAIN_BYTES_MAX = 2 << 20

# Extents that the owner may queue ahead: 64 MiB, for what is queued follows no fault any more. It hears when a quarter
# is left, some milliseconds before the push runs dry.
PUMP_RING_EXTENTS = 32

# The window that a destination offers the push: below the first the link runs dry between two wake-ups, above the last
# nothing is gained. In between, on a link of which nothing is known yet: half a millisecond of queue at 1 Gbit/s.
WINDOW_BYTES_MIN = 24 << 10
WINDOW_BYTES_START = 64 << 10
WINDOW_BYTES_MAX = 4 << 20

# Records that are sent with one key of TLS; AES-GCM stays safe up to 2^24.5 of them (RFC 8446, 5.5). Bytes of the name
# that a key is known by: more than our own names have, and less than OpenSSL takes.
TLS_RECORDS_MAX = 1 << 23
TLS_IDENTITY_BYTES_MAX = 127

# Pages of a piece of memory that is looked through for what is resident: all of it together has to be over in a moment.
PIECE_PAGES_MAX = 4096

# --- kernel -----------------------------------------------------------------------------------------------------------

# Pages that are tried with one's own hands: clearing and copying one of this size takes below a millisecond, of a
# gibibyte a second.
TRIED_BYTES_MAX = 16 << 20

# --- guests -----------------------------------------------------------------------------------------------------------

# Of the emulated guest: 2^30 pages are 4 TiB, a page's weight is below 2^31 then and its visits in one pass fit 32
# bits. vCPUs have a word each in a page. More steps than a vCPU makes in 5,000 years keep every sum in C below 2**64.
GUEST_PAGES_MAX = 1 << 30
GUEST_VCPUS_MAX = 512
STEPS_MAX = (1 << 62) - 1
STEPS_PER_SECOND_MAX = 1_000_000_000

# For vCPUs that are to end with the interpreter.
AT_EXIT_SECONDS = 1.0

# Of the guest of KVM: more vCPUs than anybody has needed here; KVM's own limit is not below it, nor is what an APIC of
# the first kind can number. Its memory fills one table of level 3, whose first four entries are what lies below it.
KVM_VCPUS_MAX = 128
KVM_MEMORY_BYTES_MAX = (512 - 4) << 30

# What is asked of KVM in one list: a processor of today has some 50 leaves and 100 such registers. How long vCPUs may
# take to come out of KVM: an instruction of theirs may wait for a page.
KVM_CPUID_ENTRIES_MAX = 256
KVM_MSRS_MAX = 1024
KVM_SETTLE_SECONDS = 10.0

# --- memory of outside VMMs -------------------------------------------------------------------------------------------

# Processes at one time, each that is served has two threads; and as many are heard out at one time.
PROCESSES_MAX = 256

# The message by which memory is handed over: two hundred bytes a mapping is more than any says, and everything is sent
# at once by whoever means it.
HAND_OVER_BYTES_MAX = 64 << 10
HAND_OVER_SECONDS = 5.0

# All its mappings together. Each page has a byte of state: that of small pages is then a quarter of a GiB.
HAND_OVER_SIZE_MAX = 1 << 40

# Room for more descriptors than anybody may send: those that came are to be closed, not left to the kernel.
DESCRIPTORS_ROOM = 16

# Each piece of a mapping that is trapped by itself takes some tries to find, where a process may have told of memory
# that it has not got: a VMM's memory has a handful.
MAPPING_TRIES_MAX = 4096

# Mappings that keep changing so often in a row, while their pages are poisoned, are not coming to rest.
POISON_RETRIES_MAX = 100_000

# --- the programs: what a command line and a daemon take of each other ------------------------------------------------

# A command line sends its request at once. A report is a few KiB, and the longest list is one of vCPUs or of a
# command's own figures; whoever sends more is no `postcopy` command.
ADMIN_REQUEST_SECONDS = 5.0
ADMIN_FRAME_BYTES_MAX = 1 << 20
ADMIN_ELEMENTS_MAX = 65536
ADMIN_ARRAY_MAX = 8192

# While a command takes its time, the daemon says that it is there; one that says nothing for so long is not waited for.
ADMIN_ALIVE_SECONDS = 1.0
ADMIN_SILENCE_SECONDS = 10.0

# What waits for a command that does not read; what it misses of a progress is told again.
ADMIN_UNREAD_BYTES_MAX = 64 << 10

# For what needs nobody else (closing connections, giving pages up), and for one attempt to reconnect: dialling, what
# the destination has, the data connections.
DONE_SECONDS = 5.0
RESUME_SECONDS = 20.0

# For a source to take its guest back, which it does in far less, or to cross its switchover on the way.
CANCEL_SECONDS = 5.0

# For an agent's last words: a destination will find out by itself that nobody is here, but not that nobody comes back.
PART_FROM_DESTINATION_SECONDS = 1.0
PART_FROM_SOURCE_SECONDS = 2.0

# Connections for metrics at one time (a Prometheus has one; where more come, the one that waits longest goes), and what
# the kernel holds until then. Of one scrape its bytes, and the time for it: also that up to the next on its connection.
SCRAPERS_MAX = 16
SCRAPE_BACKLOG = 2048
SCRAPE_BYTES_MAX = 16 << 10
SCRAPE_SECONDS = 10.0

# For a keeper: to start an interpreter, on a host under pressure; to answer, where all of it was swapped out meanwhile;
# to end, doing nothing else, which nobody depends on; and to be gone, where its agent is and left it nothing.
KEEPER_START_SECONDS = 20.0
KEEPER_ANSWER_SECONDS = 20.0
KEEPER_END_SECONDS = 2.0
KEEPER_GONE_SECONDS = 0.5

# For a daemon that `demo` or `bench` started to be ready, and to end; for its guest to be seen running before it
# leaves.
CHILD_READY_SECONDS = 60.0
CHILD_END_SECONDS = 10.0
DEMO_SECONDS = 30.0

# What users type: the most CPUs that Linux can be built for (CONFIG_NR_CPUS), a rate that is none any more, and a
# certificate's days (beyond a century it is a mistake; X.509 itself ends with the year 9999).
CPU_MAX = 8191
RATE_MAX = 1 << 50
CERTIFICATE_DAYS_MAX = 36500

# What a report or a trace may say: no figure is beyond these but those that are endless, or no number at all.
REPORT_NUMBER_MAX = 1e100
TRACE_NUMBER_MAX = 1 << 56

# --- what C is built with: each as a macro of the same name -----------------------------------------------------------

PUMP_IN_C: tuple[str, ...] = ("FRAME_BYTES_MAX", "REGIONS_MAX", "QUIET_TICKS", "PENDING_MAX", "MESSAGES_MAX")
PUMP_IN_C += ("PUMP_VIEWS_MAX",)
PUMP_IN_C += ("READ_AHEAD", "RUN_BYTES_MAX", "GATE_BYTES_MAX", "CHANGES_NS_MAX", "CHANGES_SPIN_NS", "CHANGES_SLEEP_NS")
PUMP_IN_C += ("OTHERS_NS_MAX", "ANSWERS_MAX", "ANSWERS_BYTES_MAX", "AGAIN_BYTES_MAX", "PUMP_RING_EXTENTS")
PUMP_IN_C += ("WINDOW_BYTES_MIN", "WINDOW_BYTES_START", "WINDOW_BYTES_MAX", "TLS_RECORDS_MAX", "TLS_IDENTITY_BYTES_MAX")
GUEST_IN_C = ("GUEST_PAGES_MAX", "GUEST_VCPUS_MAX")


def macros(names: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return the definitions that a C compiler is given, as distutils and cffi want them."""
    return [(name, f"{globals()[name]}u") for name in names]
