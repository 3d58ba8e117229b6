"""One request on its way through the scheduler: what it has drawn, which rows have run, which pages it holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from serve_app.messages.request import FinishReason, Sampling
from serve_app.scheduling.speculation import Guesser

# One level of priority is worth so many arrivals: per level between them, no more of those that come later overtake a
# request. So it ages as others arrive, and needs no clock. The order of two never changes, which is why the first in
# rank always gets on. 64 are what runs at a time by default: a whole turn of the house.
LEVEL_ARRIVALS = 64


@dataclass(frozen=True, slots=True)
class Ticket:
    """A request as the scheduler needs it. seq: the Head's number for it, never reused."""

    seq: int
    request_hash: bytes
    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    sampling_key: bytes
    stop_ids: frozenset[int]
    priority: int = 0  # the larger goes first
    cache_salt: bytes = b""  # only requests of the same one share pages
    # Of a request that a pipeline before this one had begun: what it had drawn, whether that is all, and how often it
    # had begun anew at most.
    drawn: tuple[int, ...] = ()
    final: Literal["stop", "length"] | None = None
    attempt: int = 0


class Committed(NamedTuple):
    """What a step gave one sequence. token None: nothing was drawn. reason None: it goes on.

    attempt: how often it had begun anew; told with the reason.
    """

    seq: int
    token: int | None
    reason: FinishReason | None
    attempt: int = 0


@dataclass(slots=True, eq=False)
class Sequence:
    """The state of one request. Its scheduler alone changes it."""

    ticket: Ticket
    rank: tuple[int, int]  # order among all: the least goes first and is preempted last
    n_prompt: int
    limit: int  # tokens at most
    tokens: list[int]  # prompt, then what was drawn
    fill: int = 0  # rows that run as a prompt does: of the tokens known when it was seated
    length: int = 0  # tokens, those on their way counted
    guesser: Guesser | None = None  # of one that may guess
    guesses: tuple[int, ...] = ()  # on their way: rows of tokens that it may not draw
    pages: list[int] = field(default_factory=list)
    computed: int = 0  # rows that have run, or run in a step in flight
    done: int = 0  # rows whose step has come back
    cached: int = 0  # rows that lay in its pages when it was seated
    offered: int = 0  # of its pages, those that others can find
    offers: bool = True  # whether others may find its pages
    names: list[bytes] = field(default_factory=list)  # of its full pages (scheduling/pages.py)
    seated: bool = False  # among the running
    opened: bool = False  # the stages know this attempt
    attempt: int = 0
    cohort: int | None = None  # those it steps with (scheduling/cohorts.py)
    flights: int = 0  # steps on their way that hold rows of it, of this attempt or the last
    ending: Literal["stop", "cancelled"] | None = None  # asked for; the next step to come back ends it
    final: FinishReason | None = None  # known; what is still being drawn is void
    ended: bool = False

    @classmethod
    def of(cls, ticket: Ticket, arrival: int) -> Sequence:
        """Of the request that is the `arrival`-th to arrive."""
        n = len(ticket.prompt_ids)
        rank = arrival - ticket.priority * LEVEL_ARRIVALS, arrival
        tokens = [*ticket.prompt_ids, *ticket.drawn]
        limit = n + ticket.max_tokens
        return cls(ticket, rank, n, limit, tokens, final=ticket.final, attempt=ticket.attempt)

    @property
    def drew(self) -> bool:
        """Whether a token of it is known that was drawn."""
        return len(self.tokens) > self.n_prompt

    @property
    def rows_to_fill(self) -> int:
        """Rows of the tokens known now that must run; one that has ended draws nothing and lacks the last."""
        return len(self.tokens) - (self.final is not None)

    @property
    def is_whole(self) -> bool:
        """Whether every row that a receipt must account for has run. One that drew nothing gets none."""
        return not self.drew or self.done >= len(self.tokens) - 1

    def guessed(self, most: int) -> list[int]:
        """What it may draw next, up to so many tokens, if guessing pays and all it drew is known."""
        if not self.guessing or self.length > len(self.tokens):
            return []
        assert self.guesser is not None
        return self.guesser.guesses(self.tokens, min(most, self.guesser.run, self.limit - len(self.tokens) - 1))

    @property
    def guessing(self) -> bool:
        """Whether guessing its next tokens pays."""
        if self.guesser is None:
            return False
        self.guesser.learn(self.tokens)
        return self.guesser.pays

    def take(self, drawn: list[int]) -> list[int]:
        """Which of the drawn tokens are its next ones: behind its end, or a guess that was wrong, they are void."""
        right = 0
        while right < len(self.guesses) and self.guesses[right] == drawn[right]:
            right += 1
        for i, token in enumerate(drawn[: right + 1], 1):
            self.tokens.append(token)
            self.final = self.ending
            if self.final is None and token in self.ticket.stop_ids:
                self.final = "stop"
            if self.final is None and len(self.tokens) >= self.limit:
                self.final = "length"
            if self.final is not None:
                return drawn[:i]
        return drawn[: right + 1]

    def seat(self, pages: list[int], cached: int) -> None:
        """It may run, behind the rows that these pages hold already."""
        self.fill, self.length = self.rows_to_fill, len(self.tokens)
        self.pages, self.offered, self.offers = pages, len(pages), True
        self.computed = self.done = self.cached = cached
        self.seated = True

    def unseat(self) -> None:
        """It holds nothing, and the stages forget it."""
        self.pages = []
        self.seated = self.opened = False
