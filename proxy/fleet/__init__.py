"""The fleet: nodes that share one directory."""
