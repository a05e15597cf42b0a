"""The results of the last runs as one JSON document, and as the page that people read, with charts.

A run replaces the scenarios that it played and keeps the others, each with the machine, the
versions and the day of its own run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.charts import Bar, Chart, draw
from benchmarks.scenario import Findings

DOCUMENT, PAGE, CHARTS = "results.json", "results.md", "results"

_HEAD = """\
# Results

Measured by `python -m benchmarks`, which starts every part itself on one machine, prints these
tables and writes this page, its charts and [results.json](results.json), where every round's
figures are. `python -m benchmarks SCENARIO… --rounds N` (of {names}) plays some alone and leaves
the others.

Counts of what must not happen are from the worst round, times are medians. Clients, rivals,
upstream and pullpool share the cores of one machine. What else kept it busy is told in the table
below each scenario (*meanwhile*): with more than a tenth of a core of other work times are slower
for everybody and mean little; counts hold all the same. A ratio to a rival is the median of the
rounds' own ratios, since neighbours in a round share the machine's slow minutes. In a chart the
thin line leads from the least to the most of the rounds.
"""


def entry(findings: Findings, environment: Mapping[str, str], command: str) -> dict[str, Any]:
    """One scenario of the document: plain JSON types."""
    return {"command": command, "environment": dict(environment), **asdict(findings)}


def read_document(directory: Path) -> dict[str, Any]:
    """The scenarios of earlier runs; none when there is no document."""
    path = directory / DOCUMENT
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def write(directory: Path, played: Mapping[str, Any], order: Iterable[str]) -> None:
    """Put the scenarios that were played into document and page."""
    known = {**read_document(directory), **played}
    document = {name: known[name] for name in order if name in known}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / DOCUMENT).write_text(json.dumps(document, indent=1) + "\n")
    (directory / PAGE).write_text(render(document))
    for name, picture in charts(document).items():
        (directory / CHARTS).mkdir(exist_ok=True)
        (directory / CHARTS / name).write_text(picture)


def charts(document: Mapping[str, Any]) -> dict[str, str]:
    """The pictures of the page, by the file's name."""
    found = [read_chart(each) for played in document.values() for each in played.get("charts", ())]
    return {f"{chart.name}.svg": draw(chart) for chart in found}


def read_chart(fields: Mapping[str, Any]) -> Chart:
    """A chart as the document has it."""
    return Chart(**{**fields, "bars": tuple(Bar(**bar) for bar in fields["bars"])})


def render(document: Mapping[str, Any]) -> str:
    """The page."""
    parts = [_HEAD.format(names=", ".join(document))]
    for name, scenario in document.items():
        parts.append(f"## {name}\n\n{scenario['about'].strip()}\n")
        parts += [_sheet(sheet) for sheet in scenario["sheets"]]
        parts += [_chart(chart) for chart in scenario.get("charts", ())]
        if scenario["promises"]:
            parts.append(_promises(scenario["promises"]))
        parts.append(f"Measured by `{scenario['command']}`:\n")
        parts.append(_table(("", ""), scenario["environment"].items()))
        if scenario["configurations"]:
            parts.append(_configurations(scenario["configurations"]))
    return "\n".join(parts)


def _sheet(sheet: Mapping[str, Any]) -> str:
    caption = f"\n{sheet['caption']}\n" if sheet["caption"] else ""
    return f"**{sheet['title']}**\n\n{_table(sheet['columns'], sheet['rows'])}{caption}"


def _chart(chart: Mapping[str, Any]) -> str:
    return f"![{_cell(chart['title'])}]({CHARTS}/{chart['name']}.svg)\n"


def _promises(promises: Iterable[Mapping[str, Any]]) -> str:
    rows = [
        (each["what"], each["wanted"], each["measured"], "yes" if each["kept"] else "**no**")
        for each in promises
    ]
    return _table(("pullpool has to", "wanted", "measured", "reached"), rows)


def _configurations(configurations: Mapping[str, str]) -> str:
    shown = [f"{part}:\n\n```\n{text.strip()}\n```\n" for part, text in configurations.items()]
    return (
        "<details><summary>How the parts were set up</summary>\n\n"
        + "\n".join(shown)
        + ("\n</details>\n")
    )


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = list(columns)
    lines = [heads, ["---", *("---:" for _ in heads[1:])], *map(list, rows)]
    return "".join(f"| {' | '.join(_cell(text) for text in line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
