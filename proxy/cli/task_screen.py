"""What a person sees of a task: bars on a terminal, elsewhere a line for each image that ends."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

Document = dict[str, Any]

#: With more images than this only those are shown that are on their way or have failed.
MANY = 20

_STYLES = {
    "PENDING": "dim",
    "RUNNING": "cyan",
    "SUCCEEDED": "green",
    "FAILED": "red",
    "CANCELLED": "yellow",
}


def ended(result: Document) -> str:
    """What became of one image, in one line."""
    image = result["image"]
    if result["error"] is not None:
        return f"{image}: {result['error']['code']}: {result['error']['message']}"
    if result["state"] != "SUCCEEDED":
        return f"{image}: {result['state']}"
    size = decimal(result["bytes"])
    return f"{image}: {result['digest']}, {result['blobs']} blobs, {size}"


def ended_at(result: Document) -> str:
    """What became of a task for a fleet at one node, in one line."""
    if result["gone"] and result["state"] != "SUCCEEDED":
        return f"node {result['node']}: gone"
    if result["state"] != "SUCCEEDED":
        error = f": {result['error']}" if result["error"] else ""
        return f"node {result['node']}: {result['state']}{error}"
    return f"node {result['node']}: {result['blobs']} blobs, {decimal(result['bytes'])}"


def summed_up(task: Document) -> str:
    """What became of all of it."""
    count = len(task["images"])
    images = f"{count} image{'s' if count != 1 else ''}"
    if "nodes" in task:
        nodes = len(task["by_node"])
        images += f" on {nodes} node{'s' if nodes != 1 else ''}"
    failed = f", {task['failed']} failed" if task["failed"] else ""
    return f"task {task['id']}: {task['state']}, {images}{failed}, {decimal(task['bytes_done'])}"


class Screen(Protocol):
    """Shows a task, in a ``with`` block."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def show(self, task: Document) -> None: ...


class Lines:
    """A line for each image that is over, and one about all of it."""

    def __init__(self, out: Console, err: Console) -> None:
        self._out = out
        self._err = err
        self._told: set[str] = set()
        self._note: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def show(self, task: Document) -> None:
        for result in task["results"]:
            if result["state"] in ("PENDING", "RUNNING") or result["image"] in self._told:
                continue
            self._told.add(result["image"])
            where = self._out if result["state"] == "SUCCEEDED" else self._err
            _print(where, ended(result))
        self._show_nodes(task)
        if task["ended"] is not None:
            _print(self._out, summed_up(task))

    def _show_nodes(self, task: Document) -> None:
        for result in task.get("by_node", ()):
            line = ended_at(result)
            is_over = result["gone"] or result["state"] not in ("PENDING", "RUNNING")
            if is_over and line not in self._told:
                self._told.add(line)
                _print(self._out if result["state"] == "SUCCEEDED" else self._err, line)
        if (note := task.get("note")) != self._note:
            self._note = note
            if note is not None:
                _print(self._err, note)


class Bars:
    """A bar for each image, and one for all of them when there are several."""

    def __init__(self, out: Console, err: Console) -> None:
        self._out = out
        self._err = err
        self._rows: dict[str, TaskID] = {}
        self._note: str | None = None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("[green]{task.fields[size]:>19}"),
            TextColumn("{task.fields[done]:>3}/{task.fields[blobs]} blobs"),
            TextColumn("[{task.fields[style]}]{task.fields[state]:<9}"),
            TimeElapsedColumn(),
            console=out,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def show(self, task: Document) -> None:
        results = task["results"]
        for result in results:
            on_its_way = result["state"] in ("RUNNING", "FAILED")
            self._row(result["image"], result, visible=on_its_way or len(results) <= MANY)
        if len(results) > 1:
            self._row(f"{len(results)} images", task, visible=True)
        nodes = task.get("by_node", ())
        for result in nodes:
            on_its_way = result["state"] in ("RUNNING", "FAILED")
            self._row(f"node {result['node']}", result, visible=on_its_way or len(nodes) <= MANY)
        if (note := task.get("note")) != self._note:
            self._note = note
            if note is not None:
                _print(self._progress.console, note)
        if task["ended"] is None:
            return
        self._progress.stop()
        for result in results:
            if result["state"] != "SUCCEEDED":
                _print(self._err, ended(result))
        for result in nodes:
            if result["state"] != "SUCCEEDED":
                _print(self._err, ended_at(result))
        _print(self._out, summed_up(task))

    def _row(self, name: str, said: Document, *, visible: bool) -> None:
        state = said["state"]
        total, done = said["bytes"], said["bytes_done"]
        fields = {
            "size": f"{decimal(done)}/{decimal(total)}" if total else "",
            "done": said["blobs_done"],
            "blobs": said["blobs"],
            "state": state,
            "style": _STYLES[state],
        }
        row = self._rows.get(name)
        if row is None:
            row = self._progress.add_task(escape(name), total=None, visible=visible, **fields)
            self._rows[name] = row
        is_over = state not in ("PENDING", "RUNNING")
        if is_over:
            self._progress.stop_task(row)
        # What is not known yet is shown by a bar that moves; of what is over nothing moves.
        known = total or (1 if is_over else None)
        self._progress.update(row, total=known, completed=done, visible=visible, **fields)


def _print(console: Console, line: str) -> None:
    """As it is, however long: it may be read by a program."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def screen_for(out: Console, err: Console) -> Screen:
    """Bars where they can be drawn."""
    if out.is_terminal and not out.is_dumb_terminal:
        return Bars(out, err)
    return Lines(out, err)
