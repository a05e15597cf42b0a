"""The README's promises that can be checked: every setting is in its table, as the model has it."""

from pathlib import Path

from proxy.config import settings_table

README = Path(__file__).parents[2] / "README.md"


def rows() -> list[str]:
    """The settings table as the README should have it."""
    return [
        f"| `{row.key}` | {row.type} | {row.default} | {row.meaning} |" for row in settings_table()
    ]


def test_the_settings_table_says_what_the_model_says() -> None:
    lines = README.read_text().splitlines()
    start = lines.index("| key | type | default | meaning |") + 2
    end = next(n for n in range(start, len(lines)) if not lines[n].startswith("|"))
    assert lines[start:end] == rows()


def test_the_readme_shows_the_two_commands() -> None:
    text = README.read_text()
    assert "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/pullpool demo" in text
    assert "\ntests/run\n" in text
