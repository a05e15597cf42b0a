"""pullpool: many pulls, few connections."""

__version__ = "0.1.0"
