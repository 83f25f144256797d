"""Which of many candidates have the smallest discrepancy, without measuring all of them on all prompts.

`D` is a sum of non-negative contributions, one of each prompt and one of the null prompt. A candidate drops out

- exactly: once its contributions so far add up to more than the keep-th smallest complete sum. It can't be among the
  best, so what is returned does not depend on the order in which things were measured;
- in a race (delta > 0): once it is behind the keep-th best with confidence, by the paired differences of their
  contributions on the same prompts. Those left get all prompts.

Sums are correctly rounded (`math.fsum`): they depend on no order, and never fall as contributions come in. A
contribution may be infinite (the encoder overflowed): its candidate is never among the best. In a race, contributions
are right but for rounding (streams are stacked): what is no further apart than that counts as equal.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from .calibration import chunks

Evaluate = Callable[[Sequence[int], Sequence[int]], None]
"""Measures candidates on batches, and puts the contributions on the board."""

ROUNDING = 1e-5
"""How far apart equal discrepancies may be in a race, beside the keep-th best."""


class Board:
    """What is known of candidates' contributions.

    weights: each batch's prompts' shares of all read tokens, adding up to 1 over all prompts. expected: what shares of
    a discrepancy the prompts are likely to contribute (None: their weights). It says in which order to measure, never
    what is found.
    """

    def __init__(self, candidates: int, weights: Sequence[np.ndarray], expected: np.ndarray | None = None):
        self.weights = np.concatenate(weights)
        self.expected = self.weights if expected is None else expected
        ends = np.cumsum([len(w) for w in weights])
        self.spans = [slice(end - len(w), end) for w, end in zip(weights, ends, strict=True)]
        self.null = np.full(candidates, np.nan)
        self.values = np.full((candidates, len(self.weights)), np.nan)
        self._sums: dict[int, tuple[int, float]] = {}

    def known(self, candidate: int) -> np.ndarray:
        """Mask over prompts."""
        return ~np.isnan(self.values[candidate])

    def has(self, candidate: int, batch: int) -> bool:
        return not math.isnan(self.values[candidate, self.spans[batch].start])

    def complete(self, candidate: int) -> bool:
        return bool(self.known(candidate).all())

    def conditional(self, candidate: int) -> float:
        """The sum of the contributions known so far, without the null prompt's."""
        known = self.known(candidate)
        count = int(known.sum())
        if self._sums.get(candidate, (-1,))[0] != count:
            self._sums[candidate] = count, math.fsum(self.values[candidate, known].tolist())
        return self._sums[candidate][1]

    def bound(self, candidate: int) -> float:
        """What the candidate's discrepancy is at least; its discrepancy itself where it is complete."""
        return self.conditional(candidate) + float(self.null[candidate])

    def estimate(self, candidate: int) -> float:
        """The discrepancy that the prompts known so far let expect."""
        share = float(self.expected[self.known(candidate)].sum())
        return float(self.null[candidate]) + (self.conditional(candidate) / share if share else 0.0)

    def shares(self) -> np.ndarray:
        """Of the prompts in the complete candidates' discrepancies; as expected where these tell none."""
        complete = [c for c in range(len(self.null)) if self.complete(c) and self.bound(c) < math.inf]
        sums = self.values[complete].sum(axis=0)
        return sums / sums.sum() if 0 < sums.sum() < math.inf else self.expected

    def density(self, batch: int) -> float:
        """What a batch is expected to contribute, beside its share of the tokens."""
        span = self.spans[batch]
        weight = self.weights[span].sum()
        return float(self.expected[span].sum() / weight) if weight else 0.0


def lowest(board: Board, evaluate: Evaluate, keep: int, delta: float = 0.0, below: float = math.inf) -> list[float]:
    """The discrepancies of the `keep` best candidates, and of those that tie with them; infinity for others.

    evaluate: see `Evaluate`; the null prompt is already on the board. delta: about how likely a race may lose one of
    the best; 0 for none. below: candidates above it are of no interest.
    """
    lanes = Lanes(board, evaluate, keep, delta, below)
    (lanes.race if delta > 0 else lanes.exact)()
    limit = lanes.limit()
    sums = [board.bound(c) if board.complete(c) else math.inf for c in range(len(board.null))]
    return [s if s <= limit else math.inf for s in sums]


class Lanes:
    """A comparison under way: which candidates are still in it."""

    def __init__(self, board: Board, evaluate: Evaluate, keep: int, delta: float, below: float):
        self.board, self.evaluate, self.keep, self.delta, self.below = board, evaluate, keep, delta, below
        self.live = list(range(len(board.null)))
        self.batches = list(range(len(board.spans)))

    def threshold(self) -> float:
        """No candidate whose discrepancy is above this is among the best."""
        sums = sorted(self.board.bound(c) for c in range(len(self.board.null)) if self.board.complete(c))
        return min(self.below, sums[self.keep - 1] if len(sums) >= self.keep else math.inf)

    def limit(self) -> float:
        """The same, with room for what is equal but for rounding."""
        return self.threshold() * (1 + ROUNDING) if self.delta > 0 else self.threshold()

    def incomplete(self) -> list[int]:
        return [c for c in self.live if not self.board.complete(c)]

    def measure(self, candidates: Sequence[int], batches: Sequence[int]) -> None:
        """Have what is missing evaluated, a batch at a time; between batches, those that can't win drop out."""
        for batch in batches:
            lacking = [c for c in candidates if c in self.live and not self.board.has(c, batch)]
            if lacking:
                self.evaluate(lacking, [batch])
                self.abandon()

    def abandon(self) -> None:
        """Candidates that can't be among the best any more are out."""
        limit = self.limit()
        self.live = [c for c in self.live if self.board.bound(c) <= limit and self.board.bound(c) < math.inf]

    def exact(self) -> None:
        """The most promising candidates are completed first, on the batches that tell most for their tokens, so that
        the others are abandoned early."""
        self.abandon()
        order = sorted(
            self.batches, key=lambda b: (-self.board.density(b), -self.board.weights[self.board.spans[b]].sum())
        )
        for batch in order:
            self.measure(self.incomplete(), [batch])
            while True:
                limit = self.threshold()
                lacking = sorted(self.incomplete(), key=self.board.estimate)
                promising = [c for c in lacking if self.board.estimate(c) < limit]
                if not promising:
                    break
                self.measure(promising[: self.keep], order)

    def race(self) -> None:
        """All on the same growing set of prompts, in the order of the batches (see `grouped`)."""
        self.abandon()
        looks = list(chunks(self.batches, [len(self.board.weights[s]) for s in self.board.spans]))
        seen: list[int] = []
        for chunk in looks:
            if len(self.live) <= self.keep:
                break
            self.measure(self.incomplete(), chunk)
            seen += chunk
            self.drop(seen, len(looks))
        self.measure(self.incomplete(), self.batches)
        if len(self.live) < self.keep:  # some that were ahead have overflowed since: who fell behind is in again
            self.live = [c for c in range(len(self.board.null)) if self.board.bound(c) < math.inf]
            self.exact()

    def drop(self, seen: Sequence[int], looks: int) -> None:
        """Candidates that are behind the keep-th best with confidence, on the prompts of the batches seen, are out."""
        prompts = np.concatenate([np.arange(s.start, s.stop) for s in (self.board.spans[b] for b in seen)])
        count = len(prompts)
        if len(self.live) <= self.keep or count < 4:  # nothing can be told from so few
            return
        values, null = self.board.values[self.live][:, prompts], self.board.null[self.live]
        weights, total = self.board.weights[prompts], len(self.board.weights)
        rates = values.sum(axis=1) / weights.sum()
        estimates = null + rates
        rival = int(np.argsort(estimates, kind="stable")[self.keep - 1])
        ahead = estimates - estimates[rival]
        # A ratio estimate's error, from the residuals of the paired differences; prompts are drawn without replacement.
        residuals = (values - values[rival]) - np.outer(rates - rates[rival], weights)
        variance = (residuals**2).sum(axis=1) / (count - 1) * total**2 / count * (1 - count / total)
        margin = t_margin(self.delta / (self.keep * looks), count - 1) * np.sqrt(variance)
        margin += ROUNDING * estimates[rival]
        self.live = [c for c, lead, m in zip(self.live, ahead, margin, strict=True) if not lead > m]


LEAST_SHARE = 1e-100
"""Below this scipy's quantile of few degrees of freedom is wrong, down to its sign."""


def t_margin(share: float, freedom: int) -> float:
    """What Student's t passes in such a share of the cases."""
    from scipy.special import stdtrit  # here: importing it takes longer than the whole pack may

    return -float(stdtrit(freedom, max(share, LEAST_SHARE)))
