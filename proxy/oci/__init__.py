"""The protocol, without input or output: grammar, decisions and errors."""
