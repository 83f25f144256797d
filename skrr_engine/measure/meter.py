"""Measures candidates' discrepancies on one encoder and one set of prompts."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from ..encoder.actions import Assignment
from ..encoder.row import EncoderError
from ..encoder.trace import Reading, Tracer
from ..memory import Store, batch_tokens, retried
from .calibration import Calibration
from .discrepancy import Criterion, Discrepancy, Projection, features, read_only, token_norm, tokens_read
from .elimination import Board, lowest
from .processes import Team
from .walk import Prefix, Shelf, Walk, agree, forwards


class Meter:
    """Measures candidates' discrepancies on one encoder and one set of prompts.

    calibration: the prompts. projection: see `Projection`. limit: states held at once by the walk (0: as many as the
    memory allows). team: processes that share the work. criterion: what is measured. against: a tracer of the dense
    encoder, where the calibration's encoder is a twin of it in another precision.

    The dense conditioning is measured when it is first needed, so that this, too, is told step by step and can be
    stopped. What is not finite (an overflow in half precision) makes a candidate's discrepancy infinite. Raises
    EncoderError where the walk does not give what the encoder gives, or where that is not finite.

    share: of the work of measuring all candidates on all prompts (prefixes shared) that the last `lowest` did.
    """

    def __init__(
        self,
        calibration: Calibration,
        projection: Projection | None = None,
        limit: int = 0,
        team: Team | None = None,
        criterion: Criterion = Criterion(),  # noqa: B008 - frozen
        against: Tracer | None = None,
    ):
        self.calibration, self.projection, self.limit = calibration, projection, limit
        self.team, self.criterion = team or Team(), criterion
        self.tracer, self.row = calibration.tracer, calibration.tracer.row
        self.against, self._walk = against or self.tracer, Walk(self.tracer)
        self._dense, self._states = Store(calibration.memory // 4), Store(0)
        self._stack = 0  # tokens of streams that may pass a sub-block together
        self._known: dict[tuple[bool, frozenset], tuple[float, np.ndarray]] = {}  # by whether streams were stacked, too
        self._expected: np.ndarray | None = None  # the prompts' shares of the best candidates' discrepancies so far
        self.share, self._work = 0.5, Stepping(None, 0, 0)
        self._dense_size = 0
        numbers = range(len(calibration))
        elements = [self._guarded(b, functools.partial(self._elements, b)) for b in numbers]
        totals = np.concatenate([elements[0], *elements[1:]], axis=1)[:, elements[0].shape[1] :].sum(axis=1)
        self._scale = [elements[0].sum(axis=1), *[totals] * (len(calibration) - 1)]
        self._weights = [e[0] / totals[0] for e in elements[1:]]
        self._tokens = [self._guarded(b, functools.partial(calibration.tokens, b)) for b in numbers]
        self._stack = batch_tokens(calibration.memory // 2, self.row.width, calibration.device)
        # States take what the dense features and the traces leave of five eighths.
        dense = min(self._dense_size, self._dense.capacity)
        self._states.capacity = max(0, calibration.memory * 5 // 8 - dense - calibration.held)
        self._landmarks: frozenset[int] = frozenset()
        self._places: set[int] = set()
        self._prefixes: dict[int, list[Prefix]] = {}
        self._guarded(0, self._check)

    def _elements(self, batch: int) -> np.ndarray:
        """Number of read elements, `[tensors, prompts]`."""
        pieces, size = [], 0
        for piece in range(len(self.calibration.pieces[batch])):
            # Of nothing: the shapes, for next to no work.
            reading = self.tracer.read(self.calibration.trace(batch, piece), {})
            one_token = features([(t[:1, :1], None) for t, _ in reading], self.projection)
            widths = [t.shape[2] for t, _ in one_token]
            size += sum(t.shape[:2].numel() * w * 4 for (t, _), w in zip(reading, widths, strict=True))
            per_token = widths if self.criterion.elementwise else [1] * len(widths)
            pieces.append([tokens_read(*entry) * n for entry, n in zip(reading, per_token, strict=True)])
        self._dense_size += size
        return np.concatenate([torch.stack(found).numpy() for found in pieces], axis=1)

    def _check(self) -> None:
        """Hold the walk against the encoder's own forward, on the null prompt: an encoder that does more between its
        sub-blocks than was seen of it must not be searched."""
        own = features(self.calibration.pieces[0][0].run(self.calibration.encoder), self.projection)
        walked = self._dense_features(0, 0)
        if not agree([t for t, _ in own], [t for t, _ in walked]):
            raise EncoderError(
                "this encoder's sub-blocks, run one by one, do not give what it gives itself, so Skrr can't search it:"
                " nothing was changed; please report which file and loader it comes from"
            )

    def _dense_features(self, batch: int, piece: int, step: Callable[[], None] | None = None) -> Reading:
        def make() -> Reading:
            same = self.against is self.tracer
            run = self.calibration.pieces[batch][piece].run
            trace = self.calibration.trace(batch, piece) if same else self.against.trace(run)
            walk = self._walk if same else Walk(self.against)
            ((_, reading),) = walk(trace, [{}], step=step)
            dense = [(t.float(), mask) for t, mask in features(reading, self.projection)]
            if not all(bool(read_only(t, mask).isfinite().all()) for t, mask in dense):
                raise EncoderError(
                    "the encoder's own conditioning is not finite in this precision, so nothing can be compared with"
                    " it: load the encoder in bfloat16 or float32"
                )
            return dense

        return self._dense.get((batch, piece), make)

    def readable(self) -> int:
        """See Calibration.readable."""
        return self.calibration.readable()

    def null_norm(self) -> float:
        """Of the dense encoder."""
        return token_norm(self._dense_features(0, 0))

    def nothing(self) -> float:
        """The discrepancy of an encoder that gives zeros: the mean square of what is read of the dense one. Beside it,
        discrepancies of encoders that are read side by side are of one scale, and add up."""
        total = 0.0
        for batch, pieces in enumerate(self.calibration.pieces):
            for piece in range(len(pieces)):
                dense = self._dense_features(batch, piece)
                zeros = [(torch.zeros_like(t), mask) for t, mask in dense]
                total += float(self._shares(batch, dense, zeros).sum())
        return total

    def measure(
        self, candidates: Sequence[Assignment], tick: Callable[[float], None] | None = None, stack: bool = False
    ) -> list[Discrepancy]:
        """Each candidate's discrepancy. tick: called before every sub-block's forward with the share of this call's
        work that is done; what it raises ends the measurement. stack: whether their streams may pass a sub-block
        together, which is quicker and makes other sums, in the last bits; what they don't share is not kept then."""
        board = Board(len(candidates), self._weights)
        step = self._stepping(candidates, tick, 1.0)
        self._forget_fitted(candidates)
        everyone, pieces = range(len(candidates)), range(len(self.calibration.pieces))
        few = 0 if stack else len(candidates)
        norms = self._fill(board, candidates, everyone, pieces, few, step, stack)
        return [Discrepancy(board.conditional(c), float(board.null[c]), norm) for c, norm in enumerate(norms)]

    def lowest(
        self,
        candidates: Sequence[Assignment],
        keep: int,
        delta: float = 0.0,
        below: float = math.inf,
        tick: Callable[[float], None] | None = None,
    ) -> list[float]:
        """The total discrepancies of the `keep` best candidates (and of what ties with them); infinity for the others,
        which are measured only as far as needed (see elimination.py).

        delta: 0 for exactly the best, with bit for bit the discrepancies that `measure` gives; above it they race, and
        it is about how likely one of the best is lost; streams are then stacked, so the last bits may differ. below:
        candidates above this discrepancy are of no interest. tick: as for `measure`.
        """
        board = Board(len(candidates), self._weights, self._expected)
        for c, candidate in enumerate(candidates):
            known = self._known.get((delta > 0, frozenset(candidate.items())))
            if known is not None:
                board.null[c], board.values[c] = known
        step = self._stepping(candidates, tick, self.share)
        self._forget_fitted(candidates)
        self._states.turn()

        def evaluate(members: Sequence[int], batches: Sequence[int]) -> None:
            self._landmarks = self._likely(board, candidates, keep)
            self._fill(board, candidates, members, batches, 2 * keep, step, stack=delta > 0)

        unknown = [c for c in range(len(candidates)) if np.isnan(board.null[c])]
        if unknown:
            evaluate(unknown, [0])
        found = lowest(board, lambda members, batches: evaluate(members, [b + 1 for b in batches]), keep, delta, below)
        for c, candidate in enumerate(candidates):
            if found[c] < math.inf and not any(action.fitted for action in candidate.values()):
                self._known[delta > 0, frozenset(candidate.items())] = board.null[c], board.values[c].copy()
        self._expected = board.shares()
        self.share = min(max(step.share(), 0.01), 1.0)
        return found

    def _likely(self, board: Board, candidates: Sequence[Assignment], keep: int) -> frozenset[int]:
        """Sub-blocks that the next removals will probably be among: those of the candidates that look best now, as many
        as there is room to keep every candidate's state in front of."""
        if np.isnan(board.values).all():
            return self._landmarks  # nothing is known yet: those of the step before
        state = sum(self._tokens) * self.row.width * 4
        room = self._states.capacity // 2 // max(1, state * len(candidates) // 2)
        best = sorted(range(len(candidates)), key=board.estimate)[: min(room, 4 * keep)]
        common = frozenset.intersection(*map(frozenset, candidates))
        return frozenset().union(*(candidates[c] for c in best)) - common

    def _stepping(self, candidates: Sequence[Assignment], tick, share: float) -> "Stepping":
        work = forwards(len(self.row), candidates) * sum(self._tokens)
        missing = sum(tokens for b, tokens in enumerate(self._tokens) if (b, 0) not in self._dense)
        self._work = Stepping(tick, work, share, len(self.row) * missing)
        return self._work

    def _forget_fitted(self, candidates: Sequence[Assignment]) -> None:
        """Let go of the states of fitted actions that none of these candidates has: a fit is never made twice."""
        fitted = {action for candidate in candidates for action in candidate.values() if action.fitted}
        self._states.drop(lambda place: not place.fitted <= fitted)
        self._prefixes = {}

    @property
    def spent(self) -> float:
        """Sub-block forwards that the measurement under way, or the last one, has taken, over all prompts' tokens."""
        return self._work.done / sum(self._tokens)

    @property
    def prompts(self) -> int:
        """How many it measures on, the null prompt left out."""
        return sum(len(weights) for weights in self._weights)

    def _fill(
        self, board: Board, candidates: Sequence[Assignment], members: Sequence[int], batches: Iterable[int], few: int,
        step: "Stepping", stack: bool,
    ) -> list[float]:  # fmt: skip
        """Put some candidates' contributions on the board (batch 0 is the null prompt); returns their null norms.
        stack: whether streams may pass a sub-block together."""
        norms = [float("nan")] * len(members)
        for batch in batches:
            measure = functools.partial(self._contributions, batch, few=few, step=step, stack=stack)
            for i, (*values, norm) in enumerate(self.team.shared([candidates[m] for m in members], measure)):
                if batch == 0:
                    weight = self.criterion.null  # where it is zero, an overflow there is of no interest
                    board.null[members[i]], norms[i] = weight and weight * math.fsum(values), norm
                else:
                    board.values[members[i], board.spans[batch - 1]] = values
        return norms

    def _contributions(
        self, batch: int, candidates: Sequence[Assignment], few: int, step: "Stepping", stack: bool
    ) -> np.ndarray:
        """Of each candidate: what each prompt of a batch adds to its discrepancy, and its readings' token norm."""

        def act() -> np.ndarray:
            numbers = range(len(self.calibration.pieces[batch]))
            pieces = [self._errors(batch, piece, candidates, few, step, stack) for piece in numbers]
            return np.array([np.concatenate([v for v, _ in p] + [[p[0][1]]]) for p in zip(*pieces, strict=True)])

        return self._guarded(batch, act)

    def _errors(
        self, batch: int, piece: int, candidates: Sequence[Assignment], few: int, step: "Stepping", stack: bool
    ) -> list[tuple[np.ndarray, float]]:
        """Of each candidate, on a piece of a batch: the prompts' contributions, and the readings' token norm."""
        trace = self.calibration.trace(batch, piece)
        step.tokens = trace.x.shape[:2].numel()
        dense = self._dense_features(batch, piece, step)
        shelf = Shelf(self._states, (batch, piece), few, self._landmarks, self._places, stack, self._prefixes)
        together = self._stack if stack else 0
        # A forward takes about 16 times its stream; the walk holds each state twice where it passes a sub-block, and
        # up to as many streams again may wait.
        passing = max(trace.x.nbytes, together * trace.x[0, 0].nbytes)
        limit = self.limit or max(4, (self.calibration.memory // 4 - 16 * passing) // (4 * trace.x.nbytes))
        found: list = [None] * len(candidates)
        for member, reading in self._walk(trace, candidates, limit, step, shelf, together):
            pruned = features(reading, self.projection)
            values = self._shares(batch, dense, pruned)
            values[np.isnan(values)] = np.inf  # NaN would say that it was not measured
            found[member] = values, token_norm(pruned) if batch == 0 else float("nan")
        return found

    def _shares(self, batch: int, dense: Reading, other: Reading) -> np.ndarray:
        """What each prompt of a piece of a batch adds to the discrepancy of another reading."""
        errors = self.criterion.errors(dense, other)
        # A prompt of which nothing is read contributes nothing.
        return sum(e.numpy() / max(n, 1) for e, n in zip(errors, self._scale[batch], strict=True))

    def _guarded(self, batch: int, act: Callable):
        """What `act` returns; where the device runs out of memory, the batch is halved, and it is tried again."""
        return retried(act, functools.partial(self.shrink, [batch]))

    def shrink(self, batches: Iterable[int] | None = None) -> bool:
        """After an out-of-memory error: let go of what can be had again, hold and stack fewer states and halve some
        batches (all, where None); whether there is any sense in another try."""
        for store in (self._dense, self._states):
            store.clear()
            store.capacity //= 2
        self._stack //= 2
        return self.calibration.shrink(batches)


class Stepping:
    """Called before every sub-block's forward: counts the work done, and tells `tick` its share of what is expected.

    work: sub-block x token forwards that would measure everything; share: of them that are expected to be needed;
    tokens: of the batch at hand; more: what comes on top of that work, once.
    """

    def __init__(self, tick: Callable[[float], None] | None, work: float, share: float, more: float = 0.0):
        self.tick, self.work, self.expected, self.done, self.tokens = tick, work, work * share + more, 0, 0

    def __call__(self) -> None:
        if self.tick is not None:
            self.tick(min(self.done / max(self.expected, 1), 0.99))
        self.done += self.tokens

    def share(self) -> float:
        return self.done / max(self.work, 1)
