"""Configuration files: what they may say, what is wrong in them and where, and what wins over what."""

import json
import os
import socket
from pathlib import Path

import click
import pytest

from agent import commands
from agent.cli import cli, status_of, words_of
from agent.config import keys, read
from agent.config.command import read_together, together
from postcopy.errors import UsageError
from postcopy.limits import CONFIG_BYTES_MAX

from .agents import destination, run, source

commands.register(cli)
KNOWN = keys.sections(cli)


def judged(folder, text):
    file = folder / "x.toml"
    file.write_text(text)
    settings, problems = read.read_file(file, KNOWN)
    return settings, [(one.line, one.text) for one in problems]


def test_every_option_is_a_key_but_acts_and_descriptors():
    assert set(KNOWN) == {"", *cli.commands} - {"config"}
    assert set(KNOWN[""]) == {"log-format", "debug"}
    assert {"memory", "size", "poll-max-ns", "admin", "metrics", "pin"} <= set(KNOWN["source"])
    assert not {"ready-fd", "end-with-fd", "scratch", "help"} & set(KNOWN["source"])


def test_what_a_file_says_is_what_would_be_typed(tmp_path):
    text = """
        log-format = "json"
        [source]
        memory = ["shmem:8MiB", "anonymous"]
        size = 8388608
        blank = 0.25
        thp = true
        [destination]
        memory-dir = "/dev/shm"
        [migrate]
        max-postcopy-bandwidth = "100MiB/s"
    """
    settings, problems = judged(tmp_path, text)
    assert problems == []
    assert settings["source"] == {
        "memory": ["shmem:8MiB", "anonymous"], "size": "8388608", "blank": "0.25", "thp": True,
    }  # fmt: skip
    found = read.defaults(settings, KNOWN)
    assert found["form"] == "json"
    assert found["destination"] == {"memory_dirs": ["/dev/shm"]}
    assert found["migrate"] == {"rate": "100MiB/s"}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("[source]\nsise = 1", 2, "[source] has no key 'sise'; did you mean size?"),
        ("\n[sauce]\nsize = 1", 2, "there is no section [sauce]; did you mean [source]?"),
        ("[zzzzz]", 1, "there is no section [zzzzz]"),
        (
            "listen = 'unix:x'",
            1,
            "before the first section there is no key 'listen'; it goes below [source] or [destination]",
        ),
        ("dbug = true", 1, "before the first section there is no key 'dbug'; did you mean debug?"),
        ("[source]\nready-fd = 3", 2, "[source] has no key 'ready-fd'"),
        ("[destination]\n\ninsecure = 'yes'", 3, "insecure: write true or false"),
        ("[source]\nvcpus = 'two'", 2, "vcpus: 'two' is not a valid integer"),
        ("[source]\nvcpus = [2]", 2, "vcpus: one value, not a list of them"),
        ("[source]\nvcpus = true", 2, "vcpus: write it as on the command line, in quotes"),
        ("[source]\nsize = 2026-01-01", 2, "size: write it as on the command line, in quotes"),
        ("[source]\nmemory = ['shmem', 3.5, {}]", 2, "memory: write it as on the command line, in quotes"),
        ("[source]\nseed = 1\nsize = '12 XB'", 3, "size: size '12 XB' is not understood: write it like"),
        ("source.sise = 1", 1, "[source] has no key 'sise'"),
        ("seed = 1\nsource = { sise = 1 }", 2, "[source] has no key 'sise'"),
        ("[source]\nsize = = 2", 2, "this is not TOML: Invalid value"),
        ("[source]\nsize = 1\nsize = 2", 3, "this is not TOML: Cannot overwrite a value"),
        ("[source", 1, "this is not TOML"),
        ("[source]\nworkload = 'zip'", 2, "workload: guest: unknown workload 'zip'; known are sequential"),
        ("[source]\nguest = 'xen'", 2, "guest: unknown kind of guest 'xen': known are emulated"),
        ("[source]\nvcpus = 0", 2, "vcpus: 0 is not in the range 1<=x<=512"),
        ("[source]\nseed = -1", 2, "seed: -1 is not in the range 0<=x<="),
        ("[source]\nsteps = -1", 2, "steps: -1 is not in the range 0<=x<="),
        ("[source]\nsteps-per-second = -5", 2, "steps-per-second: -5 is not in the range 0<=x<="),
        ("[source]\nblank = 1.5", 2, "blank: 1.5 is not in the range 0<=x<1"),
        ("[source]\nblank = nan", 2, "blank: 'nan' is no number"),
        ("[source]\nmemory = ['shmem', 'bogus']", 2, "memory: unknown memory type 'bogus': known are"),
        ("[source]\nmemory = 'tmpfs'", 2, "memory: memory tmpfs needs a place"),
        ("[source]\nmemory = 'shmem:/x'", 2, "memory: memory shmem has no place in the file system"),
        ("[source]\nadmin = '/run/x'", 2, "admin: address '/run/x'"),
        ("[status]\nadmin = 'tcp:127.0.0.1:1'", 2, "admin: admin address 'tcp:127.0.0.1:1': it has to be unix:PATH"),
        ("[source]\nkeeper = 'x'", 2, "keeper: address 'x'"),
        ("[destination]\nmode = 'mnior'", 2, "mode: unknown mode 'mnior': known are auto"),
        ("[destination]\nremoval = 'keep'", 2, "removal: unknown removal 'keep': known are auto"),
        ("\n[source.nested]\nsize = 1", 2, "[source] has no key 'nested'"),
        ("\n[config.check]\nx = 1", 2, "there is no section [config]"),
        ("lisen = 'x'", 1, "before the first section there is no key 'lisen'; did you mean listen? It goes below [so"),
        ("[destination]\nTLS-DIR = '/x'", 2, "[destination] has no key 'TLS-DIR'; did you mean tls-dir?"),
        ("\n[[destination]]\nonce = true", 2, "[[destination]] makes a list of sections"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(text, line, words, tmp_path):
    _, problems = judged(tmp_path, text)
    assert any(at == line and said.startswith(words) for at, said in problems), problems


def test_what_only_this_host_knows_waits_until_it_is_used(tmp_path):
    text = "\ufeff[source]\nmemory = ['tmpfs:/not/here', 'hugetlbfs-2M:/nor/here', 'file:/gone']"
    assert judged(tmp_path, text)[1] == []


def test_a_file_that_is_no_text(tmp_path):
    file = tmp_path / "x.toml"
    file.write_bytes(b"size = '\xff'")
    assert "is not text in UTF-8" in str(read.read_file(file, KNOWN)[1][0])
    assert "cannot be read: No such file" in str(read.read_file(tmp_path / "none", KNOWN)[1][0])


def test_a_file_that_never_ends_is_none(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for file in (tmp_path / "pipe", Path("/dev/zero"), tmp_path / "long"):
        if file.name == "long":
            file.write_bytes(b"#" * (CONFIG_BYTES_MAX + 1))
        assert str(read.read_file(file, KNOWN)[1][0]) == f"{file}: is no file of at most 1 MiB"
    assert read.read_file(Path(os.devnull), KNOWN) == ({}, [])


def test_a_variable_that_is_none_is_told_with_the_nearest_that_is(monkeypatch):
    keys.name_variables(cli)
    names = ["POSTCOPY_SOURCE_SISE", "POSTCOPY_SOURCE_SIZE", "POSTCOPY_CONFIG", "POSTCOPY_SERVICE_PORT_METRICS", "X"]
    line = "the environment's POSTCOPY_SOURCE_SISE means nothing here; did you mean POSTCOPY_SOURCE_SIZE?"
    assert list(keys.unknown_variables(cli, names)) == [line]
    monkeypatch.setitem(run.__globals__["ENVIRONMENT"], "POSTCOPY_SOURCE_SISE", "1")
    assert line in run("config", "check", os.devnull).err


def test_what_is_said_later_wins(tmp_path):
    first, second = tmp_path / "1.toml", tmp_path / "2.toml"
    first.write_text("[source]\nseed = 1\nvcpus = 1")
    second.write_text("[source]\nseed = 2")
    assert read.read([first, second], KNOWN) == {"source": {"seed": "2", "vcpus": "1"}}


def resolve(arguments, environment, file, monkeypatch):
    """Return with which parameters `source` would have run."""
    monkeypatch.setenv("POSTCOPY_CONFIG", str(file))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    keys.name_variables(cli)
    seen = {}
    monkeypatch.setattr(cli.commands["source"], "callback", lambda **values: seen.update(values))
    cli.main(["source", *arguments], standalone_mode=False)
    return seen


def test_flag_over_environment_over_file_over_default(tmp_path, monkeypatch):
    file = tmp_path / "x.toml"
    file.write_text("[source]\nseed = 10\nvcpus = 10\npoll-max-ns = 10")
    environment = {
        "POSTCOPY_SOURCE_SEED": "20",
        "POSTCOPY_SOURCE_VCPUS": "20",
        "POSTCOPY_SOURCE_MEMORY": "shmem:1M tmpfs:/x",
    }
    seen = resolve(["--seed", "30"], environment, file, monkeypatch)
    assert (seen["seed"], seen["vcpus"], seen["poll_max_ns"], seen["size"]) == (30, 20, 10, 256 << 20)
    assert [str(one) for one in seen["memory"]] == ["shmem:1048576", "tmpfs:/x"]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("seed", "x", "POSTCOPY_SOURCE_SEED: 'x' is not a valid integer"),
        ("size", "0", "POSTCOPY_SOURCE_SIZE: size '0': there is no memory of no size: write it like 256MiB"),
        ("vcpus", "0", "POSTCOPY_SOURCE_VCPUS: 0 is not in the range 1<=x<=512."),
    ],
)
def test_a_wrong_value_of_the_environment_names_its_variable(key, value, words, tmp_path, monkeypatch):
    file = tmp_path / "x.toml"
    file.touch()
    with pytest.raises(click.BadParameter) as caught:
        resolve([], {f"POSTCOPY_SOURCE_{key.upper()}": value}, file, monkeypatch)
    assert status_of(caught.value, debug=False) == 2
    assert words_of(caught.value)[0].startswith(words)


def test_what_only_the_daemon_finds_names_the_line_the_variable_or_the_flag(tmp_path, monkeypatch):
    first, second = tmp_path / "1.toml", tmp_path / "2.toml"
    first.write_text('[destination]\ntls-dir = "/not/this"\n')
    second.write_text('[destination]\n\ntls-dir = "/nor/this"\n')
    done = run("--config", first, "--config", second, "--log-format", "text", "destination")
    assert (done.status, done.err.splitlines()[-1].startswith("postcopy: ")) == (2, True)
    assert f"{second}:3: tls-dir: /nor/this/ca-cert.pem: No such file or directory" in done.err
    monkeypatch.setitem(run.__globals__["ENVIRONMENT"], "POSTCOPY_SOURCE_MEMORY", "tmpfs:/not/here")
    done = run("source")
    assert (done.status, "POSTCOPY_SOURCE_MEMORY: /not/here: " in done.err) == (2, True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run("source", "--memory", "shmem", "--metrics", f"127.0.0.1:{taken.getsockname()[1]}")
    assert (done.status, "--metrics: cannot listen on tcp:127.0.0.1:" in done.err) == (2, True)


def test_hidden_options_are_no_variables():
    keys.name_variables(cli)
    hidden = [one for one in cli.commands["source"].params if isinstance(one, click.Option) and one.hidden]
    assert [one.envvar for one in hidden] == [None, None]


def test_files_of_this_host_and_their_order(tmp_path, monkeypatch):
    for name in ("b.toml", "a.toml", "c.txt"):
        (tmp_path / name).touch()
    monkeypatch.setattr(read, "FOLDER", tmp_path)
    assert read.installed() == [tmp_path / "a.toml", tmp_path / "b.toml"]


def test_check_names_every_problem(tmp_path):
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text("[source]\nseed = 1\n")
    bad.write_text("[source]\nsead = 1\nvcpus = 'x'\n")
    done = run("config", "check", good, bad)
    assert done.status == 2
    told = [line.partition(" ")[0] for line in done.out.splitlines()]
    assert told == [f"{good}:", "judged", f"{bad}:2:", f"{bad}:3:", "nothing"]
    assert f"{good}: right; settings: 1 of [source]" in done.out
    done = run("config", "check", bad, "--json")
    assert [one["line"] for one in done.json["problems"]] == [2, 3]
    assert run("config", "check", good).status == 0


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('[destination]\nlisten = "tcp:0.0.0.0:17790"', 2, "listen: tcp:0.0.0.0:17790 is beyond this host"),
        ('[destination]\ninsecure = true\ntls-dir = "/x"', 2, "insecure: all is encrypted, or nothing is"),
        ('[destination]\nallow = "x"', 2, "allow: who somebody is, only a certificate says"),
        (
            '[destination]\nkeeper = "unix:k"\nhandover = "unix:h"\nkeep = true',
            2,
            "keeper: it is for guests that leave",
        ),
        ('[destination]\nhandover = "tcp:127.0.0.1:1"', 2, "handover: tcp:127.0.0.1:1: descriptors travel over a Unix"),
        ("[destination]\n\nkeep = true", 3, "keep: it is for outside VMMs, --handover"),
        ('[source]\nmemory = ["hugetlb-2M:3MiB"]', 2, "memory: region 0: size 3145728 is not a multiple of the page"),
        ('[source]\nmemory = "hugetlb-2M"\nsize = "3MiB"', 3, "size: region 0: size 3145728 is not a multiple of"),
        ('[source]\nguest="kvm"\nvcpus=7\nworkload="zipf"', 4, "workload: guest: workload zipf is none of a guest of"),
        ('[source]\nguest="kvm"\nvcpus=200', 3, "vcpus: guest: 200 vCPUs are not in 1 to 128"),
        ('[source]\nguest="kvm"\nmemory="shmem:4KiB"', 3, "memory: guest: 1 pages of memory are too few"),
        ('[source]\nmemory = ["file:/x", "shmem"]', 2, "memory: a snapshot is one file"),
        ('[source]\nlisten = "tcp:127.0.0.1:0"', 2, "listen: it is for a snapshot"),
        ('[demo]\nmemory = ["shmem", "hugetlb-2M:3MiB"]', 2, "memory: region 1: size 3145728 is not a multiple of"),
        ('[demo]\nmemory = "file:/x"', 2, "memory: a snapshot has no guest"),
        ('[demo]\nguest="kvm"\nvcpus=200', 3, "vcpus: guest: 200 vCPUs are not in 1 to 128"),
        (
            "[demo]\ntls = true\nhandover = true",
            2,
            "tls: memory is handed over through a Unix socket, which has no TLS",
        ),
        ('[demo]\nhandover = true\nmode = "move"', 3, "mode: memory that is handed over is not copied"),
        ('[demo]\nmode = "minor"\nmemory = "anonymous"', 2, "mode: memory of type anonymous cannot be migrated in"),
    ],
)
def test_what_is_wrong_together_is_told_by_check_as_by_the_daemon(text, line, words, tmp_path):
    file = tmp_path / "x.toml"
    file.write_text(text)
    section = text[1 : text.index("]")]
    judged, problems = together(cli, [file], KNOWN)
    assert ([section], [line]) == (judged, [one.line for one in problems]), problems
    assert problems[0].text.startswith(words)
    with pytest.raises(UsageError) as caught:
        cli.main(["--config", str(file), "--log-format", "text", section], standalone_mode=False)
    assert str(caught.value) == str(problems[0])


def test_what_is_right_together_in_several_files_and_what_the_host_knows_pass(tmp_path):
    first, second = tmp_path / "1.toml", tmp_path / "2.toml"
    first.write_text('[destination]\nlisten = "tcp:0.0.0.0:1"\n[source]\nmemory = "hugetlbfs:/not/here"\n')
    second.write_text('[destination]\ntls-dir = "/not/here"\n[migrate]\nno-push = true\n')
    both = run("--config", first, "--config", second, "config", "check")
    whole = "judged as a whole: [source], [destination] of these 2 files, in this order"
    assert (both.status, both.out.splitlines()[-1]) == (0, whole)
    first_alone = run("config", "check", first)
    assert (first_alone.status, first_alone.out.startswith(f"{first}:2: listen: ")) == (2, True)
    each = run("config", "check", first, second, "--json").json
    assert ([one["file"] for one in each["problems"]], each["judged"]) == ([str(first)], ["source", "destination"])
    beside = run("--config", second, "config", "check", first)  # which holds: first is none of it
    assert (beside.status, beside.out) == (2, first_alone.out)


def test_files_that_lead_to_each_other_lead_nowhere_and_others_are_checked(tmp_path):
    one, other, good = (tmp_path / name for name in ("a.toml", "b.toml", "good.toml"))
    one.symlink_to(other)
    other.symlink_to(one)
    good.write_text("[source]\nseed = 1\n")
    alone = run("config", "check", one)
    assert (alone.status, alone.out.splitlines()[0]) == (2, f"{one}: cannot be read: Too many levels of symbolic links")
    both = run("config", "check", good, one)
    assert (both.status, both.out) == (2, run("config", "check", good).out + alone.out)


def test_the_environment_counts_as_for_the_command(tmp_path, monkeypatch):
    file = tmp_path / "x.toml"
    file.write_text('[destination]\nlisten = "tcp:0.0.0.0:1"\n')
    assert run("config", "check", file).status == 2
    monkeypatch.setitem(run.__globals__["ENVIRONMENT"], "POSTCOPY_DESTINATION_TLS_DIR", "/not/here")
    assert run("config", "check", file).status == 0


def test_a_file_that_holds_is_judged_with_those_beside_it(tmp_path, monkeypatch):
    """No command reads one of them alone."""
    first, second, other = (tmp_path / name for name in ("1.toml", "2.toml", "other.toml"))
    first.write_text('[destination]\nlisten = "tcp:0.0.0.0:1"\n')
    second.write_text('[destination]\ntls-dir = "/not/here"\n')
    other.write_text("[demo]\nvcpus = 1\n")
    held = ("--config", first, "--config", second)
    for named in ([], [first], [second, first], [tmp_path / "x/.." / "1.toml"]):
        done = run(*held, "config", "check", *named, "--json")
        assert (done.status, done.json["problems"]) == (0, []), done.out
        assert (done.json["files"], done.json["judged"]) == ([str(first), str(second)], ["destination"])
    with_other = run(*held, "config", "check", other, first, "--json").json
    assert (with_other["files"], with_other["judged"]) == ([*map(str, (first, second, other))], ["destination", "demo"])
    assert run(*held, "config", "check", other, "--json").json["files"] == [str(other)]
    monkeypatch.setattr(read, "FOLDER", tmp_path)
    assert read_together([second], read.installed()) == [[first, second, other]]


def test_what_no_command_judges_as_a_whole_is_not_said_to_be(tmp_path):
    file = tmp_path / "x.toml"
    file.write_text("[migrate]\nno-push = true\n")
    assert run("config", "check", file).out == f"{file}: right; settings: 1 of [migrate]\n"
    file.write_text("[demo]\nvcpu = 1\n")
    assert run("config", "check", file).out.splitlines()[-1].startswith("nothing was judged as a whole")


@pytest.mark.parametrize(
    ("arguments", "text", "status"),
    [
        (["destination", "--listen", "tcp:0.0.0.0:17790"], "", 2),
        (["source", "--bogus"], "", 2),
        (["destination"], "[destination]\nmode = 'x'\n", 2),
        (["destination"], "[destination]\nkeeper = 'unix:k'\nhandover = 'unix:h'\n", 2),
    ],
)
def test_all_errors_of_a_daemon_are_in_one_form(arguments, text, status, tmp_path):
    file = tmp_path / "x.toml"
    file.write_text(text)
    done = run("--config", file, "--log-format", "json", *arguments)
    said = json.loads(done.err)
    assert (done.status, said["level"], said["role"]) == (status, "error", arguments[0])
    assert said["message"]


def test_a_command_refuses_what_is_wrong_and_check_still_runs(tmp_path):
    bad = tmp_path / "bad.toml"
    bad.write_text("[source]\nsead = 1\nvcpus = 'x'\n")
    done = run("--config", bad, "status", "--admin", "unix:/nowhere")
    said = f"{bad}:2: [source] has no key 'sead'; did you mean seed? (and 1 more: postcopy config check {bad})"
    assert (done.status, done.one_line()) == (2, f"postcopy: {said}")
    assert run("--config", bad, "config", "check", bad).status == 2


def test_a_daemon_runs_as_configured_and_a_demo_does_not(tmp_path, monkeypatch):
    file = tmp_path / "x.toml"
    file.write_text('[source]\nsize = "8MiB"\nworkload = "zipf"\nvcpus = 1\n[destination]\nmode = "minor"\n')
    monkeypatch.setitem(run.__globals__["ENVIRONMENT"], "POSTCOPY_CONFIG", str(file))
    with source(tmp_path, size="16MiB") as here, destination(tmp_path) as there:
        status = here.status()
        assert status["memory"][0]["size_bytes"] == 16 << 20  # typed
        assert (status["guest"]["workload"], status["guest"]["vcpus"]) == ("zipf", 1)
        assert there.status()["mode"] == "minor"
    done = run("demo", "--size", "8MiB", "--json")
    assert (done.status, json.loads(done.out)["mode"]) == (0, "auto")
