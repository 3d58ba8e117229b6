"""Something of a running application dies, again and again; when, and how long until it is there again.

Processes are found by tests/e2e/parts.py and hear signals. What clients saw of it is for benchmarks/churn.py to say.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.server import OwnServer
from tests.e2e.parts import Part

VICTIMS = ("stage", "head", "supervisor", "ingress", "node")  # node: a random stage's, by its raylet
# Ray's own, and a process of ours that is no stage yet, by their titles: no stream needs what they do
BYSTANDERS = {
    "spare": "ray::_StageProcess",
    "gcs": "gcs_server",
    "raylet": "/raylet/raylet",
    "controller": "ray::ServeController",
}
HEALTH_EVERY_S = 0.25
LIST_EVERY_S = 1.0


@dataclass(slots=True)
class Death:
    """One of them; times are seconds on time.perf_counter's clock, or after the death where the name says after."""

    victim: str
    signal: str
    at_s: float
    missed: str = ""  # why nothing died
    back_after_s: float | None = None  # Ray lists another process for every part that died
    down_after_s: float | None = None  # /health said no
    ready_after_s: float | None = None  # and then yes


@dataclass(slots=True)
class Health:
    """When /health changed its mind."""

    changes: list[tuple[float, bool]] = field(default_factory=list)

    async def watch(self, url: str) -> None:
        """Until cancelled."""
        async with httpx.AsyncClient(timeout=2) as client:
            while True:
                try:
                    ok = (await client.get(f"{url}/health")).status_code == 200
                except httpx.HTTPError:
                    ok = False
                if not self.changes or self.changes[-1][1] != ok:
                    self.changes.append((time.perf_counter(), ok))
                await asyncio.sleep(HEALTH_EVERY_S)

    def mark(self, deaths: Sequence[Death]) -> None:
        """Each death knows when it was down and ready again, if that was before the next."""
        for i, death in enumerate(deaths):
            end = deaths[i + 1].at_s if i + 1 < len(deaths) else float("inf")
            within = [(at, ok) for at, ok in self.changes if death.at_s <= at < end]
            down = next((at for at, ok in within if not ok), None)
            ready = next((at for at, ok in within if ok and down is not None and at > down), None)
            death.down_after_s = None if down is None else round(down - death.at_s, 2)
            death.ready_after_s = None if ready is None else round(ready - death.at_s, 2)


class Reaper:
    """Draws who dies, in proportion to `shares`, from a seed."""

    def __init__(
        self,
        server: OwnServer,
        shares: Mapping[str, float],
        what: signal.Signals,
        stopped_s: float,
        seed: int,
        in_turn: bool = False,
    ) -> None:
        """stopped_s: a process that SIGSTOP stopped goes on after so long, if it is still there.

        in_turn: one after the other, in the order of `shares`, instead of at random.
        """
        self._server, self._shares, self._what, self._stopped_s = server, shares, what, stopped_s
        self._draw = random.Random(f"{seed}/deaths")
        self._turns = itertools.cycle(shares) if in_turn else None
        self._waking: set[asyncio.Task[None]] = set()

    async def reap(self, every_s: float, stop: asyncio.Event, deaths: list[Death]) -> None:
        """A death every `every_s` until `stop`; the last one is seen through as far as there is time."""
        began, n = time.perf_counter(), 0
        try:
            while not stop.is_set():
                n += 1
                if await _stopped(stop, began + n * every_s - time.perf_counter()):
                    return
                shares = list(self._shares.values())
                victim = next(self._turns) if self._turns else self._draw.choices(list(self._shares), shares)[0]
                deaths.append(await self._one(victim, stop, began + (n + 1) * every_s))
        finally:
            for task in self._waking:
                task.cancel()  # which wakes its process
            await asyncio.gather(*self._waking, return_exceptions=True)

    async def _one(self, victim: str, stop: asyncio.Event, end_s: float) -> Death:
        death = Death(victim, self._what.name, time.perf_counter())
        try:
            parts = self._server.parts()
            alive = await asyncio.to_thread(parts.alive)
            target, gone = self._target(victim, alive)
        except LookupError as e:
            death.missed = str(e)
            print(f"  {victim}: nothing died: {e}", flush=True)
            return death
        death.victim = victim if victim == "node" or victim in BYSTANDERS else str(target)
        death.at_s = time.perf_counter()
        if not target.hear(self._what):
            death.missed = "it had just ended"
            return death
        if self._what is signal.SIGSTOP:
            self._waking.add(asyncio.create_task(_wake(target, self._stopped_s)))
        joined = None
        if victim == "node" and self._what is signal.SIGKILL:
            joined = asyncio.create_task(asyncio.to_thread(self._server.start_node))
        lost, pids = {(part.kind, part.index) for part in gone}, {part.pid for part in gone}
        while time.perf_counter() < end_s - LIST_EVERY_S and not stop.is_set():
            try:
                now = await asyncio.to_thread(parts.alive, 3.0)
            except LookupError:
                now = []
            if lost <= {(part.kind, part.index) for part in now if part.pid not in pids}:
                death.back_after_s = round(time.perf_counter() - death.at_s, 2)
                break
            await _stopped(stop, LIST_EVERY_S)
        if joined is not None:
            try:
                await joined
            except RuntimeError as e:
                print(f"  no node joined in its place: {e}", flush=True)
        print(f"  {death.victim}: {self._what.name}, in its place after {death.back_after_s} s", flush=True)
        return death

    def _target(self, victim: str, alive: list[Part]) -> tuple[Part, list[Part]]:
        """Who hears the signal, and which parts end by that. Raises LookupError."""
        if victim in BYSTANDERS:
            stages = {part.pid for part in alive if part.kind == "stage"}
            found = sorted(set(self._server.processes(BYSTANDERS[victim])) - stages)
            if not found:
                raise LookupError(f"no {victim} is alive")
            return Part("supervisor", 0, found[0], ""), []
        kind = "stage" if victim == "node" else victim
        candidates = [part for part in alive if part.kind == kind]
        if not candidates:
            raise LookupError(f"no {kind} is alive")
        chosen = self._draw.choice(candidates)
        if victim != "node":
            return chosen, [chosen]
        raylet = _parent(chosen.pid)
        return Part(chosen.kind, chosen.index, raylet, chosen.node), [p for p in alive if p.node == chosen.node]


async def _stopped(stop: asyncio.Event, within_s: float) -> bool:
    try:
        await asyncio.wait_for(stop.wait(), max(0.0, within_s))
    except TimeoutError:
        pass
    return stop.is_set()


async def _wake(part: Part, after_s: float) -> None:
    try:
        await asyncio.sleep(after_s)
    finally:
        part.hear(signal.SIGCONT)


def _parent(pid: int) -> int:
    """Of a worker: the raylet of its node. Raises LookupError."""
    try:
        # The second field, in parentheses, may hold anything: proc(5).
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError as e:
        raise LookupError(f"process {pid} ended before it could be killed") from e
