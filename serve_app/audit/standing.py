"""A node's standing: what many verdicts about it come to. A pure state machine, without clock or I/O.

    ACTIVE ──a fault or much evidence by one auditor──> SUSPECT ──the same by another owner's──> QUARANTINED
       ^  <──CLEARED passes by others, none of the accuser──┘                                        │ the operator
       └───────────────PASSES passes in a row──────────── PROBATION <────────────────────────────────┘ readmits it
    any state ──a proof that everybody can check (equivocation, its own signature against it)──> QUARANTINED

One auditor's statistics never quarantine, however many verdicts it signs: auditors of one owner count as one.
Evidence adds up over audits and forgets what is good: E <- max(E, 1) x e-value, per owner. (A plain product would let a
node save up honest audits, each of which halves it, and spend them on lies. An honest node crosses a bound B at most
once in B audits on average: Shin, Ramdas and Rinaldo 2023, "E-detectors".)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from serve_app.audit.draw_verdict import DrawVerdict
from serve_app.audit.tail import MICRO
from serve_app.audit.verdict import Verdict

SUSPECT_EVIDENCE = 10_000.0  # by one owner: crossed by an honest node once in 10,000 audits, and then cleared again
CLEARED = 20  # passes by others than who accused, before a suspect is trusted again
PASSES = 50  # on probation
STRIKES = 3  # refused or missing openings, before a node is suspected for them
_MOST = 1e18  # evidence is not counted beyond


class State(Enum):
    """ACTIVE: audited at the operator's rate; SUSPECT, PROBATION: every request is; QUARANTINED: gets none."""

    ACTIVE = "active"
    SUSPECT = "suspect"
    QUARANTINED = "quarantined"
    PROBATION = "probation"


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known of one node."""

    state: State = State.ACTIVE
    evidence: Mapping[str, float] = field(default_factory=dict)  # by owner of auditors
    accusers: frozenset[str] = frozenset()  # owners whose auditors found a fault or other bits, or gathered so much
    passes: int = 0  # in a row, by owners that do not accuse
    strikes: int = 0  # openings refused in a row
    reason: str = ""  # of the state, for people

    @property
    def audited_always(self) -> bool:
        """Whether every request is drawn."""
        return self.state in (State.SUSPECT, State.PROBATION)

    @property
    def serves(self) -> bool:
        """Whether it is given requests."""
        return self.state is not State.QUARANTINED


def after_verdict(standing: Standing, verdict: Verdict, owner: str) -> Standing:
    """The standing once an auditor of `owner` has said this of the node; "forged" is a proof: see after_proof."""
    assert verdict.finding != "forged", "rows that do not open are a proof, not a statistic"
    if not standing.serves or verdict.finding == "uncalibrated":
        return standing
    gathered = min(max(standing.evidence.get(owner, 1.0), 1.0) * verdict.evidence_micro / MICRO, _MOST)
    now = replace(standing, evidence={**standing.evidence, owner: gathered}, strikes=0)
    found = {"fault": "found a fault", "unequal": "found other bits than its profile's"}.get(verdict.finding)
    if found is not None or gathered >= SUSPECT_EVIDENCE:
        what = found or f"gathered evidence of {gathered:.0f}"
        return _accused(now, owner, f"{owner} {what}")
    if verdict.finding == "suspect":
        return replace(now, passes=0)
    return _passed(now, owner)


def after_draws(standing: Standing, verdict: DrawVerdict, owner: str) -> Standing:
    """The standing once an auditor of `owner` has drawn again what the node signed for drawing.

    Tokens that its rows do not give are a fault. That they are right clears nobody: layers may be wrong all the same.
    """
    if not standing.serves or not verdict.accuses:
        return standing
    return _accused(replace(standing, strikes=0), owner, f"{owner} found tokens that its rows do not give")


def after_proof(standing: Standing, what: str) -> Standing:
    """The standing once what anybody can check convicts the node: two signatures of its own, a forged opening."""
    return replace(standing, state=State.QUARANTINED, passes=0, reason=f"proven: {what}")


def after_refusal(standing: Standing, what: str) -> Standing:
    """The standing once the node did not open what it holds. Refusing is no lie; but who refuses cannot be audited."""
    strikes = standing.strikes + 1
    if strikes < STRIKES or standing.state is not State.ACTIVE:
        return replace(standing, strikes=strikes)
    return replace(
        standing, state=State.SUSPECT, strikes=strikes, passes=0, reason=f"{strikes} openings refused: {what}"
    )


def readmitted(standing: Standing) -> Standing:
    """The standing once the operator has looked at a quarantined node. What was gathered against it before is spent."""
    assert standing.state is State.QUARANTINED
    return Standing(State.PROBATION, reason=f"readmitted after: {standing.reason}"[:200])


def _accused(now: Standing, owner: str, why: str) -> Standing:
    accusers = now.accusers | {owner}
    if len(accusers) > 1:
        return replace(now, state=State.QUARANTINED, accusers=accusers, passes=0, reason=f"{why}; {now.reason}"[:200])
    return replace(now, state=State.SUSPECT, accusers=accusers, passes=0, reason=why)


def _passed(now: Standing, owner: str) -> Standing:
    if owner in now.accusers:
        return now  # it cannot clear whom it accuses, nor does it count against itself
    passes = now.passes + 1
    if now.state is State.PROBATION and passes >= PASSES:
        return Standing()
    if now.state is State.SUSPECT and passes >= CLEARED:
        return Standing(evidence={o: e for o, e in now.evidence.items() if o not in now.accusers})
    return replace(now, passes=passes)
