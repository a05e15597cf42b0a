"""What a large fleet changes for each of its nodes.

A directory answers one question after the other. When a thousand nodes want an image at the same
moment each of them waits for the others, and when ten thousand do the first answers take seconds,
though nothing is wrong. A node that took the directory for gone then would go on alone, dial it
anew, and ask the upstream: all of which makes it worse. So how long an answer may take grows with
the number of nodes, as far as this one knows it; and so does a random pause before a node asks for
a blob the first time: those that begin together hinder each other less, and each gets more of what
it asks for at once. In a fleet of usual size nothing is different.

Pure.
"""

from __future__ import annotations

#: Of so many nodes all may ask at the same moment, and the last has its answer within a second or
#: so: a question costs the directory 0.3 to 0.4 ms of its processor.
AT_ONCE = 2500


def slack(nodes: int) -> float:
    """How many times as long as usual an answer may take, when there are so many nodes."""
    return max(1.0, nodes / AT_ONCE)


#: So many nodes ask as soon as they like; each one more lets all wait up to so many seconds longer.
FEW, EACH = 1000, 0.0001


def before_first(nodes: int, chance: float) -> float:
    """Seconds until one of so many nodes asks for a blob the first time; ``chance``: 0 to 1."""
    return chance * max(0, nodes - FEW) * EACH
