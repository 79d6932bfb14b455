"""The texts that are made of something: that they are what it would be made of it now."""

from __future__ import annotations

import runpy

from tests.agent.agents import ROOT

DOCS = ROOT / "deploy/docs"


def test_the_reference_is_what_the_commands_say() -> None:
    made = runpy.run_path(str(DOCS / "make_reference.py"))["reference"]()
    assert (DOCS / "reference.md").read_text() == made, "run: .venv/bin/python deploy/docs/make_reference.py"
