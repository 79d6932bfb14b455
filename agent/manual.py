"""What help says beyond options: which commands belong together, and commands that one can type as they stand.

The command line enters; its --help leaves, in sections and with examples. The reference and the manual pages are made
of the same (deploy/docs/make_reference.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import click

SECTIONS = {
    "Try it": ("demo", "doctor", "bench"),
    "Run agents": ("source", "destination"),
    "Migrate": ("migrate", "status", "check", "set", "pause", "resume", "cancel"),
    "Look at it": ("top", "report"),
    "Set it up": ("certs", "config"),
}

# Of each command: what one wants, and the line that does it.
EXAMPLES: dict[str, list[tuple[str | None, str]]] = {
    "postcopy": [
        ("the shortest way to see it work", "postcopy demo"),
        ("what this host can do, and how to mend what it cannot", "postcopy doctor"),
        ("what a command is for, with examples", "postcopy migrate --help"),
    ],
    "demo": [
        ("a guest of 256 MiB, from one daemon to another", "postcopy demo"),
        ("the same on huge pages, encrypted, as JSON for `report`", "postcopy demo --memory hugetlb-2M --tls --json"),
        (
            "every page fetched by a fault, each fault recorded",
            "postcopy demo --no-push --seconds 5 --trace faults.trace",
        ),
        ("within one host, without copying: how long is the guest down?", "postcopy demo --handover --size 8GiB"),
    ],
    "doctor": [
        ("all that this host can do", "postcopy doctor"),
        ("in a script: status 3 unless this works", "postcopy doctor --need shmem:minor --need hugetlb-2M:missing"),
        (
            "would 4 GiB migrate from here to there?",
            "postcopy doctor --peer tcp:b.example:7000 --size 4GiB --tls-dir tls/a.example",
        ),
    ],
    "bench": [
        ("everything that fits into a minute", "postcopy bench --quick"),
        ("some scenarios, kept to compare with", "postcopy bench 'demand/*' stream/shmem --json >before.json"),
        ("the same again, and what changed", "postcopy bench 'demand/*' stream/shmem --compare before.json"),
    ],
    "source": [
        (
            "4 GiB that two vCPUs write to; commands come by its admin socket",
            "postcopy source --size 4GiB --admin unix:/run/pc-a.sock --metrics 127.0.0.1:9401",
        ),
        (
            "two regions of different kinds",
            "postcopy source --memory shmem:1GiB --memory hugetlb-2M:2GiB --admin unix:/run/pc-a.sock",
        ),
        ("a virtual machine of KVM", "postcopy source --guest kvm --size 64MiB --admin unix:/run/pc-a.sock"),
        (
            "memory that survives this agent, and how another one takes its place",
            "postcopy source --admin unix:/run/pc-a.sock --keeper unix:/run/pc-keeper.sock",
        ),
        (
            None,
            "postcopy source --admin unix:/run/pc-a.sock --resume unix:/run/pc-keeper.sock",
        ),
        (
            "a snapshot of memory, for as many restores as like",
            "postcopy source --memory file:/var/snap/memory.snap --listen tcp:0.0.0.0:7101 --tls-dir tls/a.example",
        ),
    ],
    "destination": [
        ("on this host, at a port that it names", "postcopy destination --admin unix:/run/pc-b.sock"),
        (
            "for other hosts: encrypted, and only for guests of a.example",
            "postcopy destination --listen tcp:0.0.0.0:7000 --tls-dir tls/b.example --allow a.example",
        ),
        ("for a hand-over within this host", "postcopy destination --listen unix:/run/pc-memory.sock"),
        (
            "as page server of Firecracker and the like, with pages from a source",
            "postcopy destination --handover unix:/run/uffd.sock --from tcp:127.0.0.1:7101 --no-push",
        ),
    ],
    "migrate": [
        (
            "encrypted, as the source was told to by its own --tls-dir",
            "postcopy migrate --admin unix:/run/pc-a.sock tcp:b.example:7000",
        ),
        (
            "with a push that leaves room on the link; the report as JSON",
            "postcopy migrate --admin unix:/run/pc-a.sock --max-postcopy-bandwidth 100MiB/s --json tcp:127.0.0.1:7000",
        ),
        (
            "within this host: the memory itself is handed over",
            "postcopy migrate --admin unix:/run/pc-a.sock unix:/run/pc-memory.sock",
        ),
    ],
    "status": [("of either agent", "postcopy status --admin unix:/run/pc-b.sock")],
    "check": [("where the guest is", "postcopy check --admin unix:/run/pc-b.sock")],
    "set": [
        ("a slower push", "postcopy set --admin unix:/run/pc-a.sock --max-postcopy-bandwidth 50MiB/s"),
        ("begin the push after all", "postcopy set --admin unix:/run/pc-a.sock --push"),
    ],
    "pause": [("before work on the network", "postcopy pause --admin unix:/run/pc-a.sock")],
    "resume": [
        ("after it", "postcopy resume --admin unix:/run/pc-a.sock"),
        (
            "by another way to the same destination",
            "postcopy resume --admin unix:/run/pc-a.sock --to tcp:b-other-network.example:7000",
        ),
    ],
    "cancel": [
        ("before the switchover", "postcopy cancel --admin unix:/run/pc-a.sock"),
        ("a paused one that will never go on: its guest is lost", "postcopy cancel --lost --admin unix:/run/pc-b.sock"),
    ],
    "top": [
        ("until Ctrl-C", "postcopy top --admin unix:/run/pc-b.sock"),
        (
            "for a program, ten times a second",
            "postcopy top --admin unix:/run/pc-b.sock --json --interval 0.1 --until-over",
        ),
    ],
    "report": [
        ("one run", "postcopy report run.json --output run.html"),
        (
            "with the verdict of `postcopy check --json`, which `migrate` leaves to you",
            "postcopy report run.json --check check.json",
        ),
        ("two side by side, and where the first one's faults were", "postcopy report a.json b.json --trace a.trace"),
    ],
    "certs": [
        ("a CA of your own, and two hosts", "postcopy certs tls a.example b.example,10.0.0.2"),
        ("one more host, signed by the same CA", "postcopy certs tls c.example --days 30"),
    ],
    "config check": [("before a daemon is restarted", "postcopy config check /etc/postcopy/destination.toml")],
}


# Options by what they are about, where a command has many; all others come first.
OPTIONS = {
    "The guest": {
        "memory", "size", "thp", "guest", "vcpus", "pin",
        "workload", "seed", "steps_per_second", "steps", "blank", "holes",
    },
    "The agent": {
        "admin", "metrics", "ready_fd", "poll_max_ns", "give_up_after", "keeper", "resume", "trace", "once", "logs",
    },
    "Encryption": {"tls", "tls_dir", "allow", "insecure"},
}  # fmt: skip


class Grouped(click.Command):
    """A command that lists its options by what they are about."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a list of options for each group."""
        sorted_out: dict[str, list[tuple[str, str]]] = {title: [] for title in ("Options", *OPTIONS)}
        for one in self.get_params(ctx):
            record = one.get_help_record(ctx)
            if record is not None:
                sorted_out[group_of(one)].append(record)
        for title, records in sorted_out.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def group_of(option: click.Parameter) -> str:
    """Return the title below which an option is listed."""
    return next((title for title, names in OPTIONS.items() if option.name in names), "Options")


class Sections(click.Group):
    """A group that lists its commands by what they are for; those of no section come last."""

    def format_commands(self, _context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a list of commands for each section."""
        width = max(map(len, self.commands))
        for title, names in self.sections():
            with formatter.section(title):
                limit = formatter.width - width - 6
                formatter.write_dl(
                    [(f"{name:{width}}", self.commands[name].get_short_help_str(limit)) for name in names]
                )

    def sections(self) -> list[tuple[str, list[str]]]:
        """Return each section's title and commands."""
        return [(title, [name for name in names if name in self.commands]) for title, names in SECTIONS.items()]


def commands_of(group: click.Group, path: str = "") -> Iterator[tuple[str, click.Command]]:
    """Yield every command that does something, by what is typed behind `postcopy`, in the order of the sections."""
    names = [name for _, names in group.sections() for name in names] if isinstance(group, Sections) else group.commands
    for name in names:
        command = group.commands[name]
        if isinstance(command, click.Group):
            yield from commands_of(command, f"{path}{name} ")
        else:
            yield path + name, command


def add_examples(group: click.Group) -> None:
    """Give the help of each command its examples."""
    for name, command in [("postcopy", group), *commands_of(group)]:
        lines = [f"  # {what}\n  {line}" if what else f"  {line}" for what, line in EXAMPLES.get(name, [])]
        shown = "\b\nExamples:\n" + "\n".join(lines)
        if not (command.epilog or "").startswith(shown):
            command.epilog = "\n\n".join(filter(None, (shown, command.epilog)))
