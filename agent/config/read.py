"""Files of TOML to settings: each value is judged by the option that it stands for, and each problem has its line.

Text enters; settings by section and key leave, as they would have been typed, or problems for whoever wrote the file.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from agent.config.keys import TOP, Keys
from postcopy.errors import PostcopyError, UsageError
from postcopy.limits import CONFIG_BYTES_MAX, TEXT_CHARS_MAX

FOLDER = Path("/etc/postcopy")

Typed = str | bool | list[str]
Settings = dict[str, dict[str, Typed]]
"""By section and key."""

_TABLE = re.compile(r"\s*\[{1,2}\s*([^\[\]]+?)\s*\]")
_KEY = re.compile(r"""\s*["']?([\w-]+)["']?\s*(?:\.\s*["']?([\w-]+)["']?\s*)?=""")
_AT = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong in a file, and where; line 0: nowhere in particular."""

    file: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}" if self.line else f"{self.file}: {self.text}"


def installed() -> list[Path]:
    """Return the files that hold where no other are named, in their order: what is said later wins."""
    return sorted(FOLDER.glob("*.toml"))


def read(files: list[Path], known: Mapping[str, Keys]) -> Settings:
    """Return what the files say together; UsageError with the first problem of all."""
    whole: Settings = {}
    for file in files:
        settings, problems = read_file(file, known)
        if problems:
            more = f" (and {len(problems) - 1} more: postcopy config check {file})" if problems[1:] else ""
            raise UsageError(f"{problems[0]}{more}")
        for section, values in settings.items():
            whole.setdefault(section, {}).update(values)
    return whole


def read_file(file: Path, known: Mapping[str, Keys]) -> tuple[Settings, list[Problem]]:
    """Return what one file says, and all that is wrong in it, in the order of its lines."""
    try:
        said = file_bytes(file, CONFIG_BYTES_MAX)
        if said is None:
            return {}, [Problem(file, 0, f"is no file of at most {CONFIG_BYTES_MAX >> 20} MiB")]
        text = said.decode().removeprefix("\ufeff")  # a mark of its encoding is no part of it
        document = tomllib.loads(text)
    except OSError as error:
        return {}, [Problem(file, 0, f"cannot be read: {error.strerror}")]
    except UnicodeDecodeError:
        return {}, [Problem(file, 0, "is not text in UTF-8")]
    except tomllib.TOMLDecodeError as error:
        where = _AT.search(str(error))
        line = int(where[1]) if where and where[1] else len(text.splitlines())
        return {}, [Problem(file, line, f"this is not TOML: {_AT.sub('', str(error))}")]
    except (ValueError, RecursionError):  # numbers of thousands of digits, lists within lists
        return {}, [Problem(file, 0, "this is not TOML that anybody can read: a number too long, or lists too deep")]
    lines = lines_of(text)
    settings: Settings = {}
    problems = []
    for section, key, value in entries(document, known):
        line = lines.get((section, key)) or lines.get((section, "")) or lines.get((TOP, section), 0)
        try:
            option = option_of(section, key, known)
            settings.setdefault(section, {})[key] = judged(option, key, value)
        except PostcopyError as error:
            problems.append(Problem(file, line, in_one_line(str(error))))
    return settings, sorted(problems, key=lambda one: one.line)


def file_bytes(file: Path, most: int) -> bytes | None:
    """Return what a file holds; None where it is too long, or none: a pipe that nobody writes to. Raises OSError."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as opened:  # noqa: PTH123 - a descriptor
        if not stat.S_ISREG(os.fstat(descriptor).st_mode) and not is_nothing(descriptor):
            return None
        found = opened.read(most + 1)
        return found if len(found) <= most else None


def is_nothing(descriptor: int) -> bool:
    """Whether this is /dev/null: a file in which nothing is said."""
    return os.fstat(descriptor).st_rdev == Path(os.devnull).stat().st_rdev


def in_one_line(text: str) -> str:
    """Return a text that quotes a file in such a way that it can be shown: no control characters, no pages of it."""
    shown = "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)
    return shown if len(shown) <= TEXT_CHARS_MAX else shown[: TEXT_CHARS_MAX - 1] + "…"


def lines_of(text: str) -> dict[tuple[str, str], int]:
    """Return where each (section, key) is said, (section, "") for a table's head: the parser of TOML does not tell."""
    found: dict[tuple[str, str], int] = {}
    table = TOP
    for number, line in enumerate(text.splitlines(), 1):
        if head := _TABLE.match(line):
            names = [name.strip().strip("\"'") for name in head[1].split(".")]
            table = ".".join(names)
            found.setdefault((table, ""), number)
            if len(names) > 1:  # a table in a section stands where a key would, and says the section by the way
                found.setdefault((names[0], names[1]), number)
                found.setdefault((names[0], ""), number)
        elif said := _KEY.match(line):
            pair = (said[1], said[2]) if said[2] and table == TOP else (table, said[1])
            found.setdefault(pair, number)
    return found


def entries(document: dict[str, Any], known: Mapping[str, Keys]) -> Iterator[tuple[str, str, Any]]:
    """Yield section, key and value of all that a document says; key "" for one that is no command, or several."""
    for name, value in document.items():
        if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            yield name, "", value
        elif not isinstance(value, dict):
            yield TOP, name, value
        elif name not in known or name == TOP:
            yield name, "", value
        else:
            yield from ((name, key, inner) for key, inner in value.items())


def option_of(section: str, key: str, known: Mapping[str, Keys]) -> click.Option:
    """Return the option that a key stands for; UsageError, with the nearest one that there is, where there is none."""
    if section not in known:
        raise UsageError(f"there is no section [{section}]" + nearest(section, known, "[{}]"))
    keys = known[section]
    if section and not key:
        raise UsageError(f"[[{section}]] makes a list of sections, and of each there is one: write [{section}]")
    if key in keys:
        return keys[key]
    place = f"[{section}] has no key" if section else "before the first section there is no key"
    raise UsageError(f"{place} {key!r}{nearest(key, keys, '{}') or ('' if section else elsewhere(key, known))}")


def elsewhere(key: str, known: Mapping[str, Keys]) -> str:
    """Return below which sections a key goes, or the one that was probably meant."""
    near = nearest_of(key, {other for keys in known.values() for other in keys})
    if near is None:
        return ""
    below = " or ".join(f"[{name}]" for name, keys in known.items() if name and near in keys)
    return f"; it goes below {below}" if near == key else f"; did you mean {near}? It goes below {below}"


def nearest(word: str, words: Iterable[str], form: str) -> str:
    """Return a question for the word that was probably meant, and nothing where none is near."""
    found = nearest_of(word, words)
    return f"; did you mean {form.format(found)}?" if found else ""


def nearest_of(word: str, words: Iterable[str]) -> str | None:
    """Return the word that is nearest, whatever its case, if one is near."""
    by_small = {one.lower(): one for one in words if one}
    found = difflib.get_close_matches(word.lower(), by_small, n=1)
    return by_small[found[0]] if found else None


def judged(option: click.Option, key: str, value: Any) -> Typed:
    """Return a value as it would be typed; UsageError unless the option takes it."""
    if option.is_flag:
        if not isinstance(value, bool):
            raise UsageError(f"{key}: write true or false")
        return value
    if isinstance(value, list) and not option.multiple:
        raise UsageError(f"{key}: one value, not a list of them")
    words = [typed(key, one) for one in (value if isinstance(value, list) else [value])]
    said: Typed = words if option.multiple else words[0]
    try:
        option.type_cast_value(click.Context(click.Command(key)), said)
    except (click.ClickException, PostcopyError) as error:
        text = error.message if isinstance(error, click.ClickException) else str(error)
        raise UsageError(f"{key}: {text}") from error
    return said


def typed(key: str, value: Any) -> str:
    """Return text or a number as it would be typed."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UsageError(f"{key}: write it as on the command line, in quotes")
    return str(value)


def defaults(settings: Settings, known: Mapping[str, Keys]) -> dict[str, Any]:
    """Return the settings as click looks them up: by the names of parameters, a map for each command."""
    found: dict[str, Any] = {}
    for section, values in settings.items():
        named = {str(known[section][key].name): value for key, value in values.items()}
        if section == TOP:
            found.update(named)
        else:
            found[section] = named
    return found
