"""Shared by the tests of the configuration: settings or faults from a few lines of TOML."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from proxy.config import ConfigError, Fault, Settings, load_settings

HARBOR = 'upstreams."harbor.example.com"'


def write(directory: Path, text: str) -> Path:
    path = directory / "pullpool.toml"
    path.write_text(text)
    return path


def load(
    directory: Path,
    text: str = "",
    environ: Mapping[str, str] | None = None,
    **flags: Any,
) -> Settings:
    return load_settings(write(directory, text), flags, environ or {})


def faults(
    directory: Path, text: str = "", environ: Mapping[str, str] | None = None, **flags: Any
) -> dict[str, Fault]:
    with pytest.raises(ConfigError) as caught:
        load(directory, text, environ, **flags)
    return {fault.path: fault for fault in caught.value.faults}
