"""`python -m benchmarks.micro [PYTEST'S ARGUMENTS]`: pytest-benchmark over these files.

The plugin is off everywhere else (pyproject.toml), so that it neither times nor slows the tests.
`--benchmark-disable` runs each once, which is what the tests do.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

COLUMNS = "min,median,iqr,ops,rounds"


def main() -> int:
    """The exit status of pytest."""
    here = Path(__file__).parent
    return pytest.main(
        [
            *("-p", "benchmark", "-p", "no:xdist", "-p", "no:cacheprovider", "-q"),
            *("-o", "python_files=bench_*.py", f"--benchmark-columns={COLUMNS}"),
            *("--benchmark-sort=name", str(here), *sys.argv[1:]),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
