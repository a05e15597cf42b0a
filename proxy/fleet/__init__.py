"""The fleet: nodes that share one directory, a Redis or Valkey of their own.

One module, one part of it. Nothing here knows `upstream` or `store`: what they need of the fleet
they name themselves as a small Protocol.
"""
