"""One page of HTML that opens anywhere: a table and plots enter; text that asks nothing of any network leaves."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from agent.report.plots import colour
from agent.report.runs import Row, Run, rows
from postcopy import __version__

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #22222a; background: #f4f4f7; margin: 0; }
main { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; }
p.sub { color: #62626e; margin: 0 0 1.5rem; }
section { background: #fff; border: 1px solid #e4e4ea; border-radius: 8px; padding: 1rem 1.2rem; margin: 0 0 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid #eeeef2; vertical-align: top; }
th[scope=row] { font-weight: 400; color: #62626e; white-space: nowrap; }
td.ratio { color: #62626e; }
td.worse { color: #b3402a; } td.better { color: #2b7a49; }
figure { margin: 0; } figure svg { width: 100%; height: auto; }
figcaption { color: #62626e; font-size: .9rem; }
.wrong { color: #b3402a; font-weight: 600; }
i.run { display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin-right: .4em; }
"""
# A difference below is none: runs differ by as much.
NOTABLE = 0.05
MORE_IS_BETTER = {"throughput"}
NEITHER = {"faults", "stalls", "on the wire"}


def page(runs: Sequence[Run], plots: Sequence[tuple[str, str]]) -> str:
    """Return the page."""
    title = "A migration" if len(runs) == 1 else f"{len(runs)} migrations side by side"
    figures = "\n".join(
        f"<section><figure>{svg}<figcaption>{escape(text)}</figcaption></figure></section>" for text, svg in plots
    )
    lacking = "" if any(run.course for run in runs) else "<p>There is nothing over time in these reports.</p>"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>postcopy: {escape(", ".join(run.name for run in runs))}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="sub">postcopy {__version__}. Times of faults are the agent's, from a fault read to its page placed; stalls are
what the guest's own clock felt.</p>
<section>{table(runs)}</section>
{lacking}{figures}
</main>
</body>
</html>
"""


def table(runs: Sequence[Run]) -> str:
    """Return the table of all figures."""
    heads = "".join(
        f'<th scope="col"><i class="run" style="background:{colour(index)}"></i>{escape(run.name)}</th>'
        + ('<th scope="col">of the first</th>' if index else "")
        for index, run in enumerate(runs)
    )
    body = "\n".join(f'<tr><th scope="row">{escape(row.name)}</th>{cells(row)}</tr>' for row in rows(runs))
    return f"<table><thead><tr><th></th>{heads}</tr></thead><tbody>{body}</tbody></table>"


def cells(row: Row) -> str:
    """Return a line's cells: each run's figure, and from the second run on its ratio to the first one's."""
    found = ""
    for index, words in enumerate(row.words):
        wrong = ' class="wrong"' if words.startswith("WRONG") else ""
        found += f"<td{wrong}>{escape(words)}</td>"
        if index:
            ratio = row.ratios[index - 1] if row.ratios else None
            times = f"{multiple(ratio)} &times;" if ratio is not None else ""
            found += f'<td class="ratio {judged(row.name, ratio)}">{times}</td>'
    return found


def multiple(ratio: float) -> str:
    """Write a ratio so that one which is small is not nothing."""
    return f"{ratio:.2f}" if ratio >= 0.1 or not ratio else f"{ratio:.1g}"


def judged(name: str, ratio: float | None) -> str:
    """Say whether a ratio is better or worse, where it is either."""
    if ratio is None or name in NEITHER or abs(ratio - 1) < NOTABLE:
        return ""
    return "better" if (ratio > 1) == (name in MORE_IS_BETTER) else "worse"
