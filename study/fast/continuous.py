"""Continuous batching: the engine of decode.py for requests that join and leave between its steps.

A turn reads the prompts of those that joined, begins one step of all that are at work, and then takes over
what the turn before has found: so the GPU has work while the host looks at tokens. An answer is thus known to
be whole one step late, and that step's token is dropped.

What nearly all prompts begin with is read once. A prompt that begins otherwise goes to a lane of its own,
which shares nothing: steps are of one lane, over one cache.
"""

from bisect import bisect
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from study.fast import kernels
from study.fast.decode import GRAPH_MOST, GRAPH_USES, Choices, Engine, Running

TURN_TOKENS = 4096  # of prompts that a turn reads at most, or the longest: those at work wait meanwhile
# Reading few tokens takes as long as launching the layers for them does, which a step's graph need not. So
# prompts wait until they are so many tokens, or for so many turns. Chosen on an H200 with Llama-2-7B.
LEAST_TOKENS, LEAST_TURNS = 1024, 4
SPARE = 2  # rows behind an answer for the steps that are begun before it is known to be whole
FREE = -1  # the node of an answer that may be anything


@dataclass(eq=False)
class Request(Running):
    """A prompt to be answered: `tokens` are all of its tokens until it has a place."""

    max_new_tokens: int = 1
    place: int | None = None
    seat: int | None = None  # its column in the state of its lane
    rows: int = 0  # of the cache, from its place on
    node: int = FREE  # 0: the answer is one of the choices


class Rows:
    """The cache's rows, given out in runs and taken back."""

    def __init__(self, first: int, end: int):
        self.free = [(first, end)]  # runs, ascending, with rows between them that are taken

    def take(self, size: int) -> int | None:
        """The first of `size` free rows, or None."""
        for i, (first, end) in enumerate(self.free):
            if end - first >= size:
                self.free[i : i + 1] = [(first + size, end)] if end - first > size else []
                return first
        return None

    def give(self, first: int, size: int) -> None:
        """Take back what `take` gave."""
        end, i = first + size, bisect(self.free, (first, first))
        before, after = self.free[:i], self.free[i:]
        if before and before[-1][1] == first:
            first = before.pop()[0]
        if after and after[0][0] == end:
            end = after.pop(0)[1]
        self.free = [*before, (first, end), *after]


@dataclass
class Lane:
    """Requests whose prompts begin alike, and their columns of `Engine.state`."""

    shared: int
    state: torch.Tensor  # [7, seats]
    shares: torch.Tensor  # [seats]
    seats: list[Request | None]
    fresh: list[Request] = field(default_factory=list)  # which are yet to be read
    left: list[int] = field(default_factory=list)  # seats whose columns are yet to be emptied
    graphs: dict = field(default_factory=dict)
    uses: Counter = field(default_factory=Counter)
    turns: int = 0  # since prompts were read

    def reads(self) -> bool:
        """Whether its fresh requests are to be read now, and not with more of them later."""
        alone = len(self.fresh) == sum(map(bool, self.seats))
        tokens = sum(len(request.tokens) for request in self.fresh)
        return alone or tokens >= LEAST_TOKENS or self.turns >= LEAST_TURNS

    def taken(self) -> int:
        """Seats up to the last that is taken: what a step computes."""
        return next((i + 1 for i in reversed(range(len(self.seats))) if self.seats[i]), 0)


class Continuous(Engine):
    """Answers requests greedily; `turn` again and again."""

    def __init__(
        self,
        model,
        memory: float,
        prefix: Sequence[int],
        longest: int,
        ends: Sequence[int],
        allowed: Sequence[list[int]] | None = None,
        seats: int | None = None,
    ):
        """For prompts that most often begin with `prefix` and have, with their answers, at most `longest`
        tokens; `allowed` answers (token ids) are the choices of a request at node 0. Raises
        torch.OutOfMemoryError."""
        super().__init__(model, memory)
        self.ends, self.prefix, self.longest = set(ends), list(prefix), longest
        self.choices = Choices(allowed, self.embedding.device) if allowed else None
        self.wanted_seats = min(seats or GRAPH_MOST, GRAPH_MOST)
        self.reset()

    @torch.inference_mode()
    def reset(self) -> None:
        """Make the cache and read the prefix; whatever was at work is forgotten."""
        shared = len(self.prefix)
        longest = self.longest + SPARE
        self.make_cache(shared, longest, self.wanted_seats * longest, 1)
        seats = min(self.wanted_seats, self.most)
        self.at_once = max(self.longest, min(self.at_once, TURN_TOKENS))
        self.lanes = [self.lane(shared, seats)] if shared else []
        self.lanes.append(self.lane(0, seats))
        self.begun: deque[Callable] = deque()
        self.use(self.lanes[-1])
        if shared:
            self.read([Running(-1, self.prefix, 0)])
        self.rows = Rows(shared, self.idle_place)

    def lane(self, shared: int, seats: int) -> Lane:
        device = self.embedding.device
        empty = torch.tensor(self.idle(), device=device)[:, None]
        state = empty.repeat(1, self.padded(seats))
        return Lane(shared, state, torch.ones(state.shape[1], device=device), [None] * seats)

    def use(self, lane: Lane) -> None:
        """Let what the engine does be of this lane."""
        self.cache.shared = lane.shared
        self.state, self.shares, self.graphs, self.uses = lane.state, lane.shares, lane.graphs, lane.uses

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Make the graphs of all sizes of the first lane's steps, which would hold up requests later."""
        self.use(self.lanes[0])
        for count in sorted({self.padded(count + 1) for count in range(len(self.lanes[0].seats))}):
            for _ in range(GRAPH_USES if self.state.is_cuda else 0):
                self.step(count)()

    # Requests

    def join(self, request: Request) -> bool:
        """Give a request a place, from which on it is at work; False where there is none now."""
        alike = len(self.prefix) < len(request.tokens) and request.tokens[: len(self.prefix)] == self.prefix
        lane = self.lanes[0] if alike else self.lanes[-1]
        own = len(request.tokens) - lane.shared
        unread = sum(len(other.tokens) for lane in self.lanes for other in lane.fresh)
        if unread and unread + own > self.at_once:
            return False
        seat = next((i for i, other in enumerate(lane.seats) if other is None), None)
        rows = own + request.max_new_tokens + SPARE
        place = None if seat is None else self.rows.take(rows)
        if place is None:
            return False
        request.tokens = request.tokens[lane.shared :]
        request.place, request.rows, request.seat = place, rows, seat
        lane.seats[seat] = request
        lane.fresh.append(request)
        return True

    def leave(self, request: Request) -> None:
        """Free the place of a request, answered or not."""
        lane = next(lane for lane in self.lanes if lane.seats[request.seat] is request)
        lane.seats[request.seat] = None
        self.rows.give(request.place, request.rows)
        if request in lane.fresh:
            lane.fresh.remove(request)
        else:
            lane.left.append(request.seat)

    @property
    def busy(self) -> bool:
        """Whether a turn would do anything."""
        return bool(self.begun) or any(any(lane.seats) for lane in self.lanes)

    # Turns

    @torch.inference_mode()
    def turn(self) -> list[Request]:
        """One turn. Returns the requests whose answers it has made longer; of these those that are `done`
        have left."""
        before = len(self.begun)
        for lane in self.lanes:
            if any(lane.seats):
                self.use(lane)
                self.seat(lane)
                self.begin_step(lane)
        changed = {request: None for _ in range(before) for request in self.begun.popleft()()}
        for request in changed:
            if request.done:
                self.leave(request)
        return list(changed)

    def seat(self, lane: Lane) -> None:
        """Read the lane's fresh requests into the cache, and bring its columns up to date."""
        fresh = lane.fresh if lane.reads() else []
        lane.fresh, lane.turns = lane.fresh[len(fresh) :], 0 if fresh else lane.turns + 1
        taken = [request.seat for request in fresh]
        empty = [seat for seat in lane.left if seat not in taken]
        seats, lane.left = empty + taken, []
        if not seats:
            return
        columns = [self.idle()] * len(empty)
        for request in fresh:
            own = len(request.tokens)  # and one more when the first token of its answer is read
            position, place = lane.shared + own, request.place + own
            columns.append((0, position, place, own + 1, request.place, 0, 1))
        table = np.concatenate([np.array(columns).T, [seats]])  # [8, changed]
        table = kernels.to_device(table.reshape(-1), self.embedding.device).view(8, -1)
        if fresh:
            tokens, nodes, shares = self.read_all(fresh)  # [fresh] each
            table[0, -len(fresh) :], table[5, -len(fresh) :] = tokens, nodes
            wait = self.on_its_way(tokens, shares)
            self.begun.append(lambda: self.take_over(zip(fresh, wait(), strict=True)))
        self.state[:, table[7]] = table[:7]

    def begin_step(self, lane: Lane) -> None:
        """One step of the lane, as far as it has been read."""
        unread = set(lane.fresh)
        seats = [None if request in unread else request for request in lane.seats[: lane.taken()]]
        wait = self.step(len(seats))
        self.begun.append(lambda: self.take_over(zip(seats, wait(), strict=True)))

    def take_over(self, found) -> list[Request]:
        """Take over pairs of a request and its next token and share: those that are still at work."""
        changed = []
        for request, (token, share) in found:
            if request and not request.done and self.seated(request):
                self.accept(request, token, share, request.max_new_tokens, self.ends)
                changed.append(request)
        return changed

    def seated(self, request: Request) -> bool:
        """Whether it is at work yet, and has not left."""
        return any(lane.seats[request.seat] is request for lane in self.lanes)

    def choose(self, logits, nodes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """As the engine's, but free at negative nodes."""
        free = logits.argmax(1)  # [n]
        if not self.choices:
            return free, nodes, None
        tokens, following, shares = self.choices.choose(logits, nodes.clamp(min=0))
        bound = nodes >= 0
        return (
            torch.where(bound, tokens, free),
            torch.where(bound, following, nodes),
            torch.where(bound, shares, torch.ones_like(shares)),
        )
