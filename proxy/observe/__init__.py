"""What others may see of a running proxy: metrics and logs."""

import sys

# structlog takes rich along where it is installed, for tracebacks that are not asked for here
# (logs.py): 70 modules, which every start would pay for. `None` says that there is none.
if "rich" not in sys.modules:
    sys.modules["rich"] = None  # type: ignore[assignment]  # None is the documented way
    import structlog as structlog

    del sys.modules["rich"]
