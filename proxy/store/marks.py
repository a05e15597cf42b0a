"""Marks: how somebody who prepared something in advance hears that it is true no more.

A mark stands for one fact (this blob is held, this repository has it, this tag is that digest).
Whoever relies on the fact keeps the mark and looks at ``holds``; whoever changes the fact withdraws
the mark in the same step, before anybody else can run. There is one mark for a fact however many
rely on it, and none for facts that nobody relies on: the book holds marks weakly.

A fact that comes back (a blob that is fetched again) gets a new mark: what was prepared before
stays withdrawn.

Who relies on many facts (an image on all its layers) takes the one mark that stands for all of a
kind. It is withdrawn by any change; then he looks again at those that matter to him.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Mark:
    """Holds until what it stands for has changed; then never again."""

    __slots__ = ("__weakref__", "holds")

    def __init__(self) -> None:
        self.holds = True

    def __repr__(self) -> str:
        return f"<Mark {'holds' if self.holds else 'withdrawn'}>"


class Marks(Generic[K]):
    """The marks of one kind of fact, by what the fact is about."""

    def __init__(self) -> None:
        self._marks: weakref.WeakValueDictionary[K, Mark] = weakref.WeakValueDictionary()
        self._all = Mark()

    def __len__(self) -> int:
        return len(self._marks)

    def of(self, key: K) -> Mark:
        """The mark of a fact that is true now."""
        mark = self._marks.get(key)
        if mark is None:
            mark = self._marks[key] = Mark()
        return mark

    def all(self) -> Mark:
        """A mark that holds until any of the facts changes."""
        return self._all

    def withdraw(self, key: K) -> None:
        """The fact has changed."""
        mark = self._marks.pop(key, None)
        if mark is not None:
            mark.holds = False
        self._withdraw_all()

    def clear(self) -> None:
        """Any of the facts may have changed."""
        for key in list(self._marks):
            self.withdraw(key)
        self._withdraw_all()

    def _withdraw_all(self) -> None:
        self._all.holds = False
        self._all = Mark()
