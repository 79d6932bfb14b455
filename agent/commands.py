"""The commands, as click sees them. Each imports what it needs when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent import manual
from agent.parameters import (
    ADDRESS,
    ADMIN,
    BLANK,
    CPUS,
    GUEST_KIND,
    HOST_PORT,
    LIMIT,
    MEMORY,
    MODE,
    RATE,
    RATE_HELP,
    READ_FD,
    REMOVAL,
    SECONDS,
    SEED,
    SIZE,
    SNAPSHOT,
    STEPS,
    STEPS_PER_SECOND,
    VCPUS,
    WORKLOAD,
    WRITE_FD,
    Memory,
    json_option,
    keeper_option,
)
from agent.security.options import allow_option, credentials, insecure_option, tls_option
from postcopy.limits import POLL_LIMIT_NS, POLL_MAX_NS

if TYPE_CHECKING:
    from postcopy.link.address import Address


trace_option = click.option(
    "--trace",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Record each fault there, for `report --trace`: of more than 1048576 the latest, and how many there were.",
)


def guest_options(command: Any) -> Any:
    """Add the options that say which guest runs."""
    for option in reversed(
        (
            click.option(
                "--memory",
                type=MEMORY,
                multiple=True,
                default=("shmem",),
                show_default=True,
                metavar="TYPE[:/PATH][:SIZE]",
                help="shmem, hugetlb-2M, hugetlb-1G, anonymous, tmpfs:/PATH or hugetlbfs:/PATH (a directory, or a file "
                "to be made). Several make several regions.",
            ),
            click.option(
                "--size", type=SIZE, default="256MiB", show_default=True, help="Size of each memory that names none."
            ),
            click.option("--thp", is_flag=True, help="Ask for transparent huge pages at the source (madvise)."),
            click.option(
                "--guest",
                type=GUEST_KIND,
                default="emulated",
                show_default=True,
                metavar="KIND",
                help="emulated: threads that write by a workload; kvm: a small virtual machine (needs /dev/kvm).",
            ),
            click.option(
                "--vcpus", type=VCPUS, default=2, show_default=True, metavar="N", help="vCPUs that use the memory."
            ),
            click.option(
                "--workload",
                type=WORKLOAD,
                default="random",
                show_default=True,
                metavar="NAME",
                help="How the vCPUs go over memory: sequential, random, zipf, stride or increment.",
            ),
            click.option(
                "--seed",
                type=SEED,
                default=1,
                show_default=True,
                metavar="N",
                help="What the guest writes, and where, follows from it.",
            ),
        )
    ):
        command = option(command)
    return command


def sized(memory: tuple[Memory, ...], size: int) -> tuple[Memory, ...]:
    """Return the memory with a size each."""
    return tuple(Memory(one.type, one.place, one.size or size) for one in memory)


def daemon_options(command: Any) -> Any:
    """Add the options that both daemons have."""
    for option in reversed(
        (
            click.option(
                "--admin", type=ADMIN, metavar="unix:PATH", help="Where commands reach this agent (mode 0600)."
            ),
            click.option(
                "--metrics", type=HOST_PORT, metavar="HOST:PORT", help="Serve Prometheus metrics there, to anybody."
            ),
            click.option(
                "--give-up-after",
                type=LIMIT,
                metavar="SECONDS",
                help="Give up a migration that was paused for so long after its switchover.  [default: never]",
            ),
            click.option(
                "--ready-fd",
                type=WRITE_FD,
                metavar="N",
                help="Write READY=1 to this open descriptor once the agent is ready.",
            ),
            click.option("--end-with-fd", type=READ_FD, hidden=True),
            click.option("--scratch", type=click.Path(path_type=Path), hidden=True),
            click.option(
                "--poll-max-ns",
                type=click.IntRange(0, POLL_LIMIT_NS),
                default=POLL_MAX_NS,
                show_default=True,
                metavar="NANOSECONDS",
                help="How long a thread that waits for a page polls before it blocks; 0: not at all.",
            ),
            click.option(
                "--pin", type=CPUS, default=(), metavar="CPUS", help="CPUs for the guest's vCPUs, like 0,2-3."
            ),
        )
    ):
        command = option(command)
    return command


@click.command(cls=manual.Grouped)
@guest_options
@daemon_options
@click.option(
    "--steps-per-second",
    type=STEPS_PER_SECOND,
    default=0,
    show_default=True,
    metavar="N",
    help="How fast each vCPU goes; 0: as fast as it can.",
)
@click.option("--steps", type=STEPS, metavar="N", help="Each vCPU rests after so many steps, wherever it made them.")
@click.option(
    "--blank",
    type=BLANK,
    default=0.125,
    show_default=True,
    metavar="PART",
    help="Part of the memory, 0 to 1, that the guest never touches: half holes, half zeros.",
)
@click.option("--holes", is_flag=True, help="Leave all of the blank part holes: write no zeros.")
@keeper_option
@click.option(
    "--resume",
    type=ADMIN,
    metavar="unix:PATH",
    help="Run no guest: go on with what a killed agent left with its keeper.",
)
@tls_option
@allow_option
@insecure_option
@click.option(
    "--listen",
    type=ADDRESS,
    metavar="ADDRESS",
    help="With --memory file:/PATH: where destinations fetch it, tcp:HOST:PORT.  [default: tcp:127.0.0.1:0]",
)
@click.option(
    "--max-postcopy-bandwidth",
    "rate",
    type=RATE,
    metavar="RATE",
    help="With --memory file:/PATH: limit each push, like 100MiB/s.",
)
def source(memory: tuple[Memory, ...], size: int, vcpus: int, workload: str, seed: int, **rest: Any) -> None:
    """Run a guest, and send it away when asked to.

    `migrate`, with this agent's --admin, asks for it. With --memory file:/PATH no guest runs: a snapshot's memory is
    served, read-only, to every destination that fetches it.
    """
    from agent.together import judge_source  # noqa: PLC0415 - see the module's docstring, here and below

    judge_source(click.get_current_context().params)
    if memory[0].type == SNAPSHOT and memory[0].place is not None:
        from agent.outside.command import run_snapshot  # noqa: PLC0415

        run_snapshot(memory[0].place, rest)
    from agent.admin import admin_address  # noqa: PLC0415
    from agent.daemon import run, shared  # noqa: PLC0415
    from agent.new_source import SourceOptions, serve_source  # noqa: PLC0415
    from agent.returned_source import ReturnOptions, serve_return  # noqa: PLC0415

    if rest["resume"]:
        keeper = admin_address(rest["resume"])
        run("source", serve_return(ReturnOptions(keeper=keeper, tls_dir=rest["tls_dir"], **shared(rest))))
    options = SourceOptions(
        memory=sized(memory, size),
        guest=rest["guest"],
        vcpus=vcpus,
        workload=workload,
        seed=seed,
        cpus=rest["pin"],
        steps_per_second=rest["steps_per_second"],
        steps_max=rest["steps"],
        blank=rest["blank"],
        holes=rest["holes"],
        tls_dir=rest["tls_dir"],
        thp=rest["thp"],
        keeper=admin_address(rest["keeper"]) if rest["keeper"] else None,
        **shared(rest),
    )
    run("source", serve_source(options))


@click.command(cls=manual.Grouped)
@click.option(
    "--listen",
    type=ADDRESS,
    default="tcp:127.0.0.1:0",
    show_default=True,
    metavar="ADDRESS",
    help="Where guests come in: tcp:HOST:PORT (port 0: any free one), or unix:PATH, which takes memory over.",
)
@click.option(
    "--mode",
    type=MODE,
    default="auto",
    show_default=True,
    metavar="NAME",
    help="How pages are placed: auto, minor, missing or move.",
)
@click.option(
    "--removal",
    type=REMOVAL,
    default="auto",
    show_default=True,
    metavar="NAME",
    help="What madvise(2) of the guest on shared memory means: auto, or discards where it is a balloon's alone.",
)
@click.option(
    "--memory-dir",
    "memory_dirs",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="DIR",
    help="Where memory of type tmpfs or hugetlbfs is put, as DIR is mounted; without one it is a memfd.",
)
@click.option("--once", is_flag=True, help="End after one migration, whatever came of it, once its source knows.")
@keeper_option
@trace_option
@tls_option
@allow_option
@insecure_option
@daemon_options
@click.option(
    "--handover", type=ADDRESS, metavar="unix:PATH", help="Serve outside VMMs that hand their memory over there."
)
@click.option(
    "--from",
    "fetch",
    type=ADDRESS,
    metavar="ADDRESS",
    help="With --handover: fetch their pages from that source, tcp:HOST:PORT.",
)
@click.option("--no-push", is_flag=True, help="With --from: fetch no page that is not touched.")
@click.option(
    "--keep",
    is_flag=True,
    help="With --handover: leave what each process needs in systemd's descriptor store, and go on with what is there.",
)
def destination(listen: Address, mode: str, once: bool, **rest: Any) -> None:
    """Wait for a guest, and run it while its memory arrives.

    It keeps the guest afterwards, and ends with it. With --handover it serves outside VMMs instead, that run their
    guests themselves.
    """
    from agent.admin import admin_address  # noqa: PLC0415
    from agent.daemon import run, shared  # noqa: PLC0415
    from agent.destination_daemon import DestinationOptions, serve_destination  # noqa: PLC0415
    from agent.outside.store import close, left_behind  # noqa: PLC0415
    from agent.together import judge_destination  # noqa: PLC0415

    judge_destination(click.get_current_context().params)
    if rest["handover"] is not None:
        from agent.outside.command import run_outside  # noqa: PLC0415

        run_outside(rest["handover"], listen, rest["fetch"], rest)
    close(left_behind())
    options = DestinationOptions(
        listen=listen,
        tls=credentials(listen, rest["tls_dir"], insecure=rest["insecure"], allow=rest["allow"]),
        mode=mode,
        removal=rest["removal"],
        memory_dirs=rest["memory_dirs"],
        cpus=rest["pin"],
        once=once,
        trace=rest["trace"],
        keeper=admin_address(rest["keeper"]) if rest["keeper"] else None,
        **shared(rest),
    )
    run("destination", serve_destination(options))


@click.command(cls=manual.Grouped)
@guest_options
@click.option(
    "--mode",
    type=MODE,
    default="auto",
    show_default=True,
    metavar="NAME",
    help="How pages are placed: auto, minor, missing or move.",
)
@click.option("--handover", is_flag=True, help="Hand the memory over through a Unix socket: nothing of it is copied.")
@click.option("--tls", is_flag=True, help="Encrypt, with certificates that are made for it and thrown away.")
@click.option("--no-push", is_flag=True, help="Let the guest fetch its pages by touching them, then push the rest.")
@click.option(
    "--seconds",
    type=SECONDS,
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="With --no-push: how long it may.",
)
@click.option("--max-postcopy-bandwidth", "rate", type=RATE, metavar="RATE", help=RATE_HELP)
@click.option("--timeout", type=LIMIT, metavar="SECONDS", help="Cancel unless the switchover came by then.")
@trace_option
@click.option(
    "--logs",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Keep both daemons' logs there.",
)
@json_option
def demo(memory: tuple[Memory, ...], size: int, as_json: bool, no_push: bool, logs: Path | None, **rest: Any) -> None:
    """Migrate a guest on this host, and check every byte of it.

    Two daemons are started, a guest runs in one and moves to the other while it writes; they end with it, and the
    report is printed.
    """
    import uvloop  # noqa: PLC0415

    from agent.demo import DemoOptions, run_demo  # noqa: PLC0415
    from agent.interrupt import unless_interrupted  # noqa: PLC0415
    from agent.output import print_json, print_rows, progress  # noqa: PLC0415
    from agent.summary import rows  # noqa: PLC0415
    from agent.together import judge_demo  # noqa: PLC0415

    judge_demo(click.get_current_context().params)
    if logs is not None:
        logs.mkdir(parents=True, exist_ok=True)
    options = DemoOptions(memory=sized(memory, size), push=not no_push, keep_logs=logs, **rest)
    with progress("migration") as tell:
        report = uvloop.run(unless_interrupted(run_demo(options, tell)))
    if as_json:
        print_json(report)
    else:
        print_rows(rows(report))
    if report["integrity"]["pages_mismatched"]:
        raise SystemExit(1)


def register(group: click.Group) -> None:
    """Add every command to the program."""
    from agent.asking import check, migrate, set_, status  # noqa: PLC0415 - as below
    from agent.bench.command import bench  # noqa: PLC0415
    from agent.config.command import config  # noqa: PLC0415
    from agent.doctor.command import doctor  # noqa: PLC0415
    from agent.pausing import cancel, pause, resume  # noqa: PLC0415
    from agent.report.command import report  # noqa: PLC0415
    from agent.security.command import certs  # noqa: PLC0415
    from agent.top.command import top  # noqa: PLC0415

    own = (demo, source, destination, migrate, status, cancel, check, set_)
    for command in (*own, pause, resume, top, report, config, doctor, bench, certs):
        group.add_command(command)
