"""By how much logits would have to be others for a token to be the one that is drawn from them.

The unit is that of logits, whatever the temperature. Law: if no logit of two machines differs by more than e, what one
draws has on the other a margin of at most 2 e; and what a machine itself draws has none. So honest rounding gives small
margins wherever it gives any, and a token that the sampling asked for could not have given has a large one.
The edges of top-k, top-p and min-p are margins too: a token past an edge needs its logit lifted to that edge, or the
weight before it to shrink by so much. Moving each logit by up to e either way moves the log-odds of a share by 2 e.
Knows nothing of requests, of thresholds, or of how logits came to be.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from serve_app.engine.sampler import Draw, gumbel
from serve_app.messages.request import MICRO

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def margin(draw: Draw, logits: npt.NDArray[np.float32], position: int, token: int) -> float:
    """How far `token` was from being drawn. logits: [vocab] float32, finite, biased and penalised. Infinite: no way."""
    if draw.token(logits, position) == token:  # by the sampler itself: nearly always, and then all is said
        return 0.0
    if draw.temperature_micro == 0:
        return float(logits.max()) - float(logits[token])
    temperature = draw.temperature_micro / MICRO
    scaled = logits.astype(np.float64) / temperature
    order = np.lexsort((np.arange(len(scaled)), -scaled))
    ranked, own = scaled[order], int(np.flatnonzero(order == token)[0])
    inside, share = _inside(draw, ranked), _inside_share(draw, ranked)
    # For the share it may change places with a better one, and is inside as far as that one is.
    by_share = float(np.maximum(ranked[: own + 1] - ranked[own], -share[: own + 1]).min())
    needed = max(0.0, -float(inside[own]), by_share)
    ahead = ranked + gumbel(draw.key, position, order)
    ahead -= ahead[own]
    rivals = np.flatnonzero((ahead > needed) & (np.minimum(inside, share) > needed))
    if len(rivals):
        # Each was past an edge, which it may reach by changing places with a worse one; or it was not, and lost.
        outside = _place_outside(ranked, share, rivals)
        needed = max(needed, float(np.minimum(np.minimum(ahead, inside)[rivals], outside).max()))
    return needed * temperature


def _place_outside(ranked: Floats, share: Floats, ranks: Ints) -> Floats:
    """For each rank: the least distance that takes it past the edge of the share, in a worse one's place or its own.

    The larger of a distance, which rises with the rank of that place, and of the place's share, which falls: the least
    is where they cross. Looked for place by place, one wrong token of 128,000 that are all likely took 8 s.
    """
    crossing = np.searchsorted(-(share + ranked), -ranked[ranks])
    near = np.stack(
        [np.clip(crossing + step, ranks, len(ranked) - 1) for step in (-1, 0, 1)]
    )  # rounding may miss by one
    least: Floats = np.maximum(ranked[ranks] - ranked[near], share[near]).min(0)
    return least


def _inside(draw: Draw, ranked: Floats) -> Floats:
    """By rank, how far a token is from the edges of top-k and min-p: below 0 outside. ranked: falling."""
    n = len(ranked)
    inside = np.full(n, np.inf)
    if 0 < draw.top_k < n:
        edge = np.arange(n) < draw.top_k
        inside = ranked - np.where(edge, ranked[draw.top_k], ranked[draw.top_k - 1])
    if draw.min_p_micro:
        inside = np.minimum(inside, ranked - ranked[0] - math.log(draw.min_p_micro / MICRO))
    return inside


def _inside_share(draw: Draw, ranked: Floats) -> Floats:
    """The same for the edge of top-p: the log-odds of that share over those of what lies before the token."""
    if draw.top_p_micro == MICRO:
        return np.full(len(ranked), np.inf)
    k = min(draw.top_k or len(ranked), len(ranked))
    weights = np.exp(ranked[:k] - ranked[0])
    after = np.cumsum(weights[::-1])[::-1]  # summed from the small end: of a tail of 1e-9, some digits are left
    before = np.concatenate([[0.0], np.cumsum(weights)[:-1]])
    with np.errstate(divide="ignore"):
        odds = np.log(before) - np.log(after)
    share = draw.top_p_micro / MICRO
    inside = math.log(share) - math.log1p(-share) - odds
    return np.concatenate([inside, np.full(len(ranked) - k, inside[-1])])
