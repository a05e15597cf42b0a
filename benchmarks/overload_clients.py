"""The crowd of `benchmarks.load` for a registry that wants tokens.

`python -m benchmarks.overload_clients NAME:PASSWORD` speaks the same lines. Its clients do what
containerd and docker do: a 401 with a Bearer challenge sends them to its token service, once, and
they ask again with the token, which they keep for that repository; any other 401 is the end of
that answer. Without an argument they are those of `benchmarks.load` and know no login.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import socket
import subprocess
import sys
import time
from urllib.parse import urlsplit

import uvloop

from benchmarks.load import Client, Plan, Report, Want, crowd
from benchmarks.parts import PROJECT, PartFailed
from benchmarks.wire import ACCEPT, Head, Received, ShortAnswer, Wire

_FIELD = re.compile(r'(\w+)="([^"]*)"')


class LoginWire(Wire):
    """A connection that can show an Authorization header and remembers the last challenge."""

    def __init__(self, sock: socket.socket, rate: int | None = None) -> None:
        super().__init__(sock, rate)
        self.authorization = ""
        self.challenge = ""

    async def _ask(self, path: str, host: str) -> Head:
        lines = [
            f"GET {path} HTTP/1.1",
            f"Host: {host}",
            f"Accept: {ACCEPT}",
            "User-Agent: bench/1",
        ]
        if self.authorization:
            lines.append(f"Authorization: {self.authorization}")
        await self._loop.sock_sendall(self._sock, ("\r\n".join(lines) + "\r\n\r\n").encode())
        status, *fields = (await self._line(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (field.partition(":") for field in fields)
        head = Head(int(status.split()[1]), {n.lower(): value.strip() for n, _, value in pairs})
        self.challenge = head.headers.get("www-authenticate", "")
        return head


class LoginClient(Client):
    """One member of the crowd, with a login (`NAME:PASSWORD`) for the token service."""

    def __init__(self, number: int, plan: Plan, epoch: float, login: str) -> None:
        super().__init__(number, plan, epoch)
        self._login = f"Basic {base64.b64encode(login.encode()).decode()}"
        self._tokens: dict[str, str] = {}  # by repository: each is for one

    async def _exchange(self, want: Want, received: Received) -> None:
        used = self._tokens.get(want.repository)
        challenge = await self._try(want, received)
        if received.status != 401 or not challenge.lower().startswith("bearer "):
            return
        if self._tokens.get(want.repository) == used:
            await self._fetch_token(want.repository, challenge)
        if self._tokens.get(want.repository) != used:
            await self._try(want, received)

    async def _try(self, want: Want, received: Received) -> str:
        """One request; what came of it replaces what was there. Gives the challenge."""
        hashed, kept = received.hasher is not None, received.kept is not None
        latest = Received(hashed=hashed, kept=kept)
        try:
            return await self._show(want.path, self._tokens.get(want.repository, ""), latest)
        finally:
            for name in Received.__slots__:
                setattr(received, name, getattr(latest, name))

    async def _fetch_token(self, repository: str, challenge: str) -> None:
        """Raises ValueError when what came is no token."""
        fields = dict(_FIELD.findall(challenge))
        path = f"{urlsplit(fields['realm']).path}?service={fields['service']}"
        if "scope" in fields:
            path += f"&scope={fields['scope']}"
        reply = Received(hashed=False, kept=True)
        await self._show(path, self._login, reply)
        if reply.status == 200 and reply.kept is not None:
            token = json.loads(b"".join(reply.kept))["token"]
            self._tokens[repository] = f"Bearer {token}"

    async def _show(self, path: str, authorization: str, received: Received) -> str:
        """One request, on a connection of its own when the idle one has died; its challenge."""
        wire = self._idle.pop() if self._idle else None
        if isinstance(wire, LoginWire):
            try:
                return await self._ask_on(wire, path, authorization, received)
            except (ShortAnswer, ConnectionError):
                if received.status:
                    raise
        fresh = await LoginWire.dial(self._plan.host, self._plan.port, self._source)
        assert isinstance(fresh, LoginWire)
        return await self._ask_on(fresh, path, authorization, received)

    async def _ask_on(
        self, wire: LoginWire, path: str, authorization: str, received: Received
    ) -> str:
        reusable = False
        wire.authorization = authorization
        try:
            reusable = await wire.get(path, f"{self._plan.host}:{self._plan.port}", received)
        finally:
            if reusable:
                self._idle.append(wire)
            else:
                wire.close()
        return wire.challenge


async def crowd_with_login(plan: Plan, login: str) -> Report:
    """Lets all clients of a plan go at once and waits for the last of them."""
    before, epoch = time.process_time(), time.monotonic()
    clients = [LoginClient(number, plan, epoch, login) for number in range(len(plan.wants))]
    async with asyncio.TaskGroup() as group:
        for client in clients:
            group.create_task(client.run())
    answers = tuple(answer for client in clients for answer in client.answers)
    return Report(answers, time.process_time() - before, epoch)


def unleash(plan: Plan, login: str) -> Report:
    """Runs the crowd in a process of its own and waits for it. Raises PartFailed."""
    command = (sys.executable, "-m", "benchmarks.overload_clients", *((login,) if login else ()))
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=PROJECT
    ) as process:
        try:
            said, _ = process.communicate(plan.dump() + "\n")
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise PartFailed(f"the load generator ended with {process.returncode}")
    return Report.load(said)


def main() -> None:
    """Reads a plan from standard input and writes the report."""
    plan = Plan.load(sys.stdin.readline())
    login = sys.argv[1] if len(sys.argv) > 1 else ""
    print(uvloop.run(crowd_with_login(plan, login) if login else crowd(plan)).dump())


if __name__ == "__main__":
    main()
