"""What docs/threats.md says is shown by a test has one."""

import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "threats.md"


def test_every_test_that_the_page_names_is_there() -> None:
    named = re.findall(r"`(test_[a-z_]+\.py)::(\w+)`", PAGE.read_text())
    assert len(named) > 30
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not re.search(rf"^ *(async def|def|class) {name}\b", (HERE / file).read_text(), re.M)
    ]
    assert missing == []
