"""The fast path of scoring: greedy decoding by Llama's layers, written out over one cache of keys and values.

Prompts lie end to end when they are read, so nothing is padded, and what all of them begin with is read once.
They are taken longest first; an answered example leaves at once, and its place in the cache, long enough for
every example that is left, goes to the next. A step of few examples is one CUDA graph. The weights are dense,
merged where memory allows (study/model.py), or stay in 4 bits (nf4.py).
"""

import itertools
import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from study import device
from study.fast import cache, kernels, nf4
from study.fast.decoder import head_size, linear_groups
from study.model import base_of
from study.packing import common_prefix, counting
from study.tokens import longest_first

# Chosen on an H200 with Llama-2-7B (benchmarks/results/inference-7b.json has the speed that came of it):
GRAPH_MOST = 512  # examples up to which a step may be bound by its launches, and so becomes a graph
GRAPH_SPARE = 2**27  # bytes beside twice what a graph needs, since memory comes in large pieces
READ_TOKENS = 16_384  # of prompts at once: enough for full speed
USABLE = 0.98  # of the memory given, in cache and reading: PyTorch's pieces do not fit each other wholly
# By construction:
GRAPH_USES = 2  # of a size until it becomes a graph: the first also compiles what the graph will launch
AHEAD = 2  # steps on their way at once, so that the GPU need not wait; places hold one token too many


class Linear:
    """Linear layers with the same input as one: x [rows, width] -> x W^T, with an adapter + (x A^T) B^T."""

    def __init__(self, modules: Sequence):
        bases = [getattr(module, "base_layer", module) for module in modules]
        sizes, self.width = [base.out_features for base in bases], bases[0].in_features
        self.size = sum(sizes)
        self.packed = self.dense = self.a = self.b = None
        if hasattr(bases[0].weight, "quant_state"):
            self.packed = nf4.PackedWeights([base.weight for base in bases])
        else:
            self.dense = torch.cat([base.weight.data for base in bases])
            for base, part in zip(bases, self.dense.split(sizes), strict=True):
                base.weight.data = part
        adapted = [module for module in modules if "default" in getattr(module, "lora_A", {})]
        if adapted:
            dtype = getattr(bases[0], "compute_dtype", bases[0].weight.dtype)
            self.a = torch.cat([module.lora_A["default"].weight.data.to(dtype) for module in adapted])
            self.b = self.a.new_zeros(self.size, len(self.a))
            column = 0
            for module, rows in zip(modules, self.b.split(sizes), strict=True):
                if module in adapted:
                    rank, scale = module.r["default"], module.scaling["default"]
                    rows[:, column : column + rank] = module.lora_B["default"].weight.data * scale
                    column += rank

    def __call__(self, x: torch.Tensor, buffer: torch.Tensor | None, permuted: bool) -> torch.Tensor:
        """x [rows, width] -> [rows, size]. 4-bit weights are unpacked into `buffer`, unless x is `permuted`,
        as `PackedWeights.multiply` takes it."""
        weight = self.dense
        if weight is None:
            if permuted:
                return self.packed.multiply(x, self.a, self.b)
            weight = buffer[: self.size * self.width].view(self.size, self.width)
            self.packed.unpack(weight)
        y = torch.mm(x, weight.T)  # [rows, width] @ [width, size]
        return (
            y if self.a is None else y.addmm_(torch.mm(x, self.a.T), self.b.T)
        )  # [rows, rank] @ [rank, size]


class DecodingLayer:
    """One decoder layer's weights."""

    def __init__(self, layer):
        self.qkv, self.out, self.gate_up, self.down = map(Linear, linear_groups(layer))
        self.norm_1, self.norm_2 = layer.input_layernorm.weight, layer.post_attention_layernorm.weight


class Choices:
    """The allowed answers (token ids) as a tree. A node's tokens and its children are rows of two tables."""

    def __init__(self, answers: Sequence[list[int]], device):
        paths = {(): 0}
        for answer in answers:
            for i in range(len(answer)):
                paths.setdefault(tuple(answer[: i + 1]), len(paths))
        self.next: list[dict[int, int]] = [{} for _ in paths]
        for path, node in paths.items():
            if path:
                self.next[paths[path[:-1]]][path[-1]] = node
        most = max(map(len, self.next))
        rows = [sorted(node.items()) + [(0, 0)] * (most - len(node)) for node in self.next]
        self.tokens = torch.tensor([[token for token, _ in row] for row in rows], device=device)
        self.children = torch.tensor([[child for _, child in row] for row in rows], device=device)
        self.number = torch.tensor([len(node) for node in self.next], device=device)
        # An answer is whole where nothing follows, after an end of sequence.
        self.ends = torch.tensor([[not self.next[child] for _, child in row] for row in rows], device=device)

    def choose(
        self, logits: torch.Tensor, nodes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The likeliest next tokens [n] that the tree allows at `nodes` [n], the nodes they lead to, and
        their shares of the softmax over what is allowed; all ends of sequence are one choice."""
        tokens, ends = self.tokens[nodes], self.ends[nodes]  # [n, most]
        scores = logits.gather(1, tokens).float()
        outside = torch.arange(tokens.shape[1], device=nodes.device) >= self.number[nodes, None]
        best = scores.masked_fill_(outside, -math.inf).argmax(1, keepdim=True)
        shares = scores.softmax(1)
        ended = (shares * ends).sum(1).clamp(max=1)
        share = torch.where(ends.gather(1, best)[:, 0], ended, shares.gather(1, best)[:, 0])
        return tokens.gather(1, best)[:, 0], self.children[nodes].gather(1, best)[:, 0], share

    def forced(self, node: int) -> list[int] | None:
        """The rest of the answer, if only one is left below `node`."""
        rest = []
        while len(self.next[node]) == 1:
            [(token, node)] = self.next[node].items()
            rest.append(token)
        return None if self.next[node] else rest


@dataclass(eq=False)
class Running:
    """An example at work: its tokens beyond the shared ones, its place in the cache, its answer so far and
    the product of that answer's shares."""

    index: int
    tokens: list[int]
    place: int
    answer: list[int] = field(default_factory=list)
    node: int = 0
    confidence: float = 1.0
    done: bool = False


class Places:
    """Runs of rows in the cache. A freed one fits whatever is no longer than what it held."""

    def __init__(self, first: int, rows: int):
        self.first, self.rows = first, rows
        self.clear()

    def clear(self) -> None:
        """All rows are free, as in the beginning."""
        self.top, self.freed = self.first, []

    def take(self, size: int) -> int | None:
        """The first of `size` free rows, or None."""
        if self.freed:
            return self.freed.pop()
        if self.top + size > self.rows:
            return None
        self.top += size
        return self.top - size


class Engine:
    """A model's layers for greedy decoding, within `memory` bytes beside what this holds from the start."""

    def __init__(self, model, memory: float = 0.0):
        base = base_of(model)
        self.config, self.memory = base.config, memory
        self.embedding, self.norm = base.model.embed_tokens.weight.data, base.model.norm.weight.data
        self.head, self.rotary = base.lm_head.weight.data, base.model.rotary_emb
        self.layers = [DecodingLayer(layer) for layer in base.model.layers]
        groups = [
            group for layer in self.layers for group in (layer.qkv, layer.out, layer.gate_up, layer.down)
        ]
        widest = max(group.size * group.width for group in groups)
        packed = groups[0].packed is not None
        self.buffer = self.embedding.new_empty(widest) if packed else None
        fitting = packed and all(group.width % nf4.PERMUTED_COLUMNS == 0 for group in groups)
        self.few_rows = nf4.FEW_ROWS if fitting else 0  # up to which weights stay in 4 bits
        self.heads, self.size = self.config.num_attention_heads, head_size(self.config)
        self.key_heads = self.config.num_key_value_heads
        self.cache = None
        self.side = torch.cuda.Stream() if self.embedding.is_cuda else None  # where graphs are made

    # Memory

    def plan(self, longest: int, shared: int) -> tuple[int, int, int]:
        """Tokens of prompts that are read at once, rows of the cache, and the most examples of a step, within
        `memory`."""
        each, with_logits = self.bytes_each(shared)
        row = 2 * self.embedding.element_size() * self.config.num_hidden_layers * self.key_heads * self.size
        at_once = max(longest, min(READ_TOKENS, int(self.memory / (each + 2 * row))))  # half of what fits
        most = max(1, int(at_once * each / with_logits))
        return at_once, int((USABLE * self.memory - at_once * each) / row), most

    def bytes_each(self, shared: int) -> tuple[int, int]:
        """What a token takes on its way through the layers, without and with its logits."""
        c, width = self.config, self.embedding.element_size()
        qkv = (self.heads + 2 * self.key_heads) * self.size
        each = width * (4 * c.hidden_size + max(qkv + self.heads * self.size, 2 * c.intermediate_size))
        each += 4 * self.heads * self.size * (shared >= cache.APART)
        return each, each + width * len(self.head)

    def make_cache(self, shared: int, longest: int, total: int, new: int) -> None:
        """A cache for prompts with their answers of `new` tokens, at most `longest` tokens behind the shared
        ones and `total` in all."""
        self.cache, self.graphs, self.uses = None, {}, Counter()
        self.pool = torch.cuda.graph_pool_handle() if self.embedding.is_cuda else None
        self.at_once, rows, self.most = self.plan(max(longest, shared), shared)
        least = shared + longest + new
        if rows < least:
            raise torch.OutOfMemoryError(f"out of memory: no room for {least:,} tokens")
        rows = min(rows, shared + total + new)
        shape = self.config.num_hidden_layers, rows, self.key_heads * self.size
        keys, values = self.embedding.new_empty(shape), self.embedding.new_empty(shape)
        self.cache = cache.Cache(keys, values, self.heads, self.key_heads, self.size)
        self.idle_place = rows - new  # where the empty places of a graph write
        positions = torch.arange(shared + longest, device=keys.device)[None]
        cos, sin = self.rotary(torch.empty(0, dtype=torch.float32, device=keys.device), positions)
        self.cos, self.sin = (table[0, :, : self.size // 2].contiguous() for table in (cos, sin))

    # The model

    def forward(self, ids, positions, places, attend, last=None, attend_last=None) -> torch.Tensor:
        """Logits [n, vocabulary] after tokens [n], or after those numbered `last` alone, by `attend_last` in
        the last layer."""
        x, delta, epsilon = F.embedding(ids, self.embedding), None, self.config.rms_norm_eps  # [n, hidden]
        normed, few = torch.empty_like(x), len(x) <= self.few_rows
        for i, layer in enumerate(self.layers):
            x, _ = kernels.rms_norm(x, layer.norm_1, epsilon, normed, delta, permuted=few)
            qkv = layer.qkv(normed, self.buffer, few)  # [n, (heads + 2 key heads) size]
            self.cache.put(i, qkv, positions, self.cos, self.sin, places)
            if last is not None and i == len(self.layers) - 1:
                x, qkv, attend, normed = x[last], qkv[last], attend_last, normed[: len(last)]
                few = len(last) <= self.few_rows
            delta = layer.out(attend(i, qkv, few), self.buffer, few)  # [n, hidden]
            x, _ = kernels.rms_norm(x, layer.norm_2, epsilon, normed, delta, permuted=few)
            del qkv, delta  # their memory is wanted for the widest
            gate_up = layer.gate_up(normed, self.buffer, few)  # [n, 2 inner]
            inner = gate_up[:, : gate_up.shape[1] // 2]
            inner = torch.empty_like(inner) if few else inner  # columns can't change places within themselves
            kernels.swiglu(gate_up, inner, permuted=few)
            delta = layer.down(inner, self.buffer, few)
        kernels.rms_norm(x, self.norm, epsilon, normed, delta)
        return torch.mm(normed, self.head.T)

    def choose(self, logits, nodes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The next tokens [n] by logits [n, vocabulary], the nodes of `choices` they lead to [n], and their
        shares [n] where there are choices."""
        return self.choices.choose(logits, nodes) if self.choices else (logits.argmax(1), nodes, None)

    def read(self, examples: Sequence[Running]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Fill the cache with the prompts of `examples`. Returns what `choose` makes of the first tokens of
        their answers, from the nodes on that they are at."""
        device, shared = self.embedding.device, self.cache.shared
        lengths = np.array([len(example.tokens) for example in examples])
        firsts = np.array([example.place for example in examples])
        within, ends = counting(lengths), np.cumsum(lengths) - 1
        columns = (
            np.concatenate([example.tokens for example in examples]),
            within + shared,
            within + np.repeat(firsts, lengths),
            *(ends, firsts, lengths, np.array([example.node for example in examples])),
        )
        table = kernels.to_device(np.concatenate(columns), device)
        ids, positions, places, last, firsts, lengths_there, nodes = table.split(list(map(len, columns)))
        work = cache.prompts_work(lengths.tolist(), [example.place for example in examples], device)
        logits = self.forward(
            *(ids, positions, places, lambda *layer: self.cache.attend_prompts(*layer, work), last),
            lambda *layer: self.cache.attend_tokens(*layer, firsts, lengths_there),
        )
        return self.choose(logits, nodes)

    def advance(self, count: int) -> None:
        """One step of the first `count` examples in `state`, in place."""
        ids, positions, places, lengths, firsts, nodes, moves = self.state[:, :count]
        logits = self.forward(
            ids, positions, places, lambda *layer: self.cache.attend_tokens(*layer, firsts, lengths)
        )
        chosen, following, shares = self.choose(logits, nodes)
        ids.copy_(chosen)
        nodes.copy_(following)
        if shares is not None:
            self.shares[:count].copy_(shares)
        self.state[1:4, :count] += moves

    def step(self, count: int) -> Callable[[], list[tuple[int, float]]]:
        """Begin a step of the `count` examples in `state`. Returns what waits for their next tokens and these
        tokens' shares."""
        padded = self.padded(count)
        self.uses[padded] += 1
        if self.uses[padded] == GRAPH_USES and padded <= GRAPH_MOST and self.state.is_cuda:
            self.graphs[padded] = self.capture(padded)
        if padded in self.graphs:
            self.graphs[padded].replay()
        else:
            self.advance(padded)
        return self.on_its_way(self.state[0, :count], self.shares[:count] if self.choices else None)

    def on_its_way(self, tokens, shares) -> Callable[[], list[tuple[int, float]]]:
        """What waits for tokens [n] and their shares [n], or None, to come from the GPU."""
        columns = [tokens] if shares is None else [tokens, shares]
        found = [column.to("cpu", non_blocking=True, copy=True) for column in columns]
        done = torch.cuda.current_stream().record_event() if tokens.is_cuda else None

        def wait() -> list[tuple[int, float]]:
            if done:
                done.synchronize()
            return listed(*found)

        return wait

    def capture(self, count: int) -> torch.cuda.CUDAGraph:
        """`advance` as a graph. While that is made, no memory is freed to make room. `torch.cuda.graph` would
        always do it before, which takes longer than the rest."""
        needed = count * self.bytes_each(self.cache.shared)[1]
        if device.free_bytes() < 2 * needed + GRAPH_SPARE:
            torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.side):
            graph.capture_begin(self.pool)
            try:
                self.advance(count)
            finally:
                graph.capture_end()
        return graph

    def padded(self, count: int) -> int:
        """Few sizes for graphs: with empty places, which cost next to nothing, up to 16, 32 or a multiple of
        64."""
        if count > GRAPH_MOST or not self.embedding.is_cuda:
            return count
        return max(16, kernels.power_of_2(count)) if count <= 32 else math.ceil(count / 64) * 64

    def load(self, examples: Sequence[Running]) -> None:
        """Take `examples` over into `state`: last token, position, its place, tokens, first place, node, and
        by how much a step moves on: 0 at an empty place."""
        shared, rows = self.cache.shared, []
        for example in examples:
            own = len(example.tokens) + len(example.answer)  # the last token is yet to be read
            rows.append(
                (
                    example.answer[-1],
                    shared + own - 1,
                    example.place + own - 1,
                    own,
                    example.place,
                    example.node,
                    1,
                )
            )
        rows += [self.idle()] * (self.padded(len(rows)) - len(rows))
        self.state[:, : len(rows)] = kernels.to_device(np.array(rows).T.copy(), self.embedding.device)

    def idle(self) -> tuple[int, ...]:
        """An empty place's column of `state`."""
        return 0, 0, self.idle_place, 1, self.idle_place, 0, 0

    # Many prompts

    @torch.inference_mode()
    def answers(
        self,
        prompts: Mapping[int, list[int]],
        max_new_tokens: int,
        ends: Sequence[int],
        allowed: Sequence[list[int]] | None = None,
        most: int | None = None,
    ) -> Iterator[tuple[int, tuple[list[int], float | None]]]:
        """The answer to each of `prompts` (token ids by index) as it comes: its index, and its tokens with
        the end and, of `allowed` answers, its confidence.

        At most `most` examples are at work at once. Raises torch.OutOfMemoryError.
        """
        waiting = deque(longest_first(prompts))
        choices = Choices(allowed, self.embedding.device) if allowed else None
        places = self.prepare(prompts.values(), max_new_tokens, choices, most or len(prompts))
        shared = self.cache.shared
        print(f"{'':11}{shared:,} shared tokens, room for {self.idle_place - shared:,} others", flush=True)
        active: list[Running] = []
        loaded: list[Running] = []  # whose steps are on their way, those answered meanwhile among them
        begun: deque[Callable] = deque()
        while waiting or active:
            free = self.most - len(active)
            fresh = [] if begun else self.admit(prompts, waiting, places, free, not active, max_new_tokens)
            if fresh:
                tokens, _, shares = self.read_all(fresh)
                found = listed(tokens, shares if choices else None)
            else:
                least = min((len(example.answer) for example in active), default=0)
                while (
                    len(begun) < AHEAD and len(active) == len(loaded) and least + len(begun) < max_new_tokens
                ):
                    begun.append(self.step(len(loaded)))
                found = begun.popleft()()
            finished = [
                example
                for example, (token, share) in zip(fresh or loaded, found, strict=True)
                if not example.done and self.accept(example, token, share, max_new_tokens, ends)
            ]
            active = [example for example in active + fresh if not example.done]
            places.freed += [example.place for example in finished]
            for example in finished:
                yield example.index, (example.answer, example.confidence if choices else None)
            if active and not begun and (fresh or len(active) < len(loaded)):
                self.load(active)
                loaded = active

    def prepare(
        self, prompts: Collection[list[int]], max_new_tokens: int, choices: Choices | None, most: int
    ) -> Places:
        """Make the cache and read what all prompts begin with. Returns the places for what is their own."""
        shared, device = shared_prefix_of_prompts(prompts), self.embedding.device
        lengths = [len(prompt) - shared + max_new_tokens for prompt in prompts]
        self.choices = choices
        self.make_cache(shared, max(lengths), sum(lengths), max_new_tokens)
        self.most = min(self.most, most, len(prompts))
        self.state = torch.zeros(7, self.most + 64, dtype=torch.long, device=device)
        self.shares = torch.ones(self.most + 64, device=device)  # of the last tokens in `state`
        if shared:
            self.read([Running(-1, next(iter(prompts))[:shared], 0)])
        self.cache.shared = shared
        return Places(shared, self.idle_place)

    def admit(self, prompts, waiting: deque, places: Places, most: int, must: bool, new_tokens: int) -> list:
        """Examples to read now: none until there are enough, unless one `must` be."""
        if must:
            places.clear()
        shared, taken, before = self.cache.shared, [], (places.top, places.freed[:])
        while waiting and len(taken) < most:
            tokens = prompts[waiting[0]][shared:]
            place = places.take(len(tokens) + new_tokens)
            if place is None:
                break
            taken.append(Running(waiting.popleft(), tokens, place))
        tokens = sum(len(example.tokens) for example in taken)
        if must or not waiting or tokens >= self.at_once // 2 or len(taken) >= self.most / 4:
            return taken
        waiting.extendleft(example.index for example in reversed(taken))
        places.top, places.freed = before
        return []

    def read_all(self, examples: Sequence[Running]) -> tuple[torch.Tensor, ...]:
        """`read` in groups of at most `at_once` tokens, without waiting for any."""
        groups, count = [], 0
        for example in examples:
            if not groups or count + len(example.tokens) > self.at_once:
                groups.append([])
                count = 0
            groups[-1].append(example)
            count += len(example.tokens)
        *both, shares = zip(*[self.read(group) for group in groups], strict=True)
        return *map(torch.cat, both), torch.cat(shares) if self.choices else None

    def accept(
        self, example: Running, token: int, share: float, max_new_tokens: int, ends: Sequence[int]
    ) -> bool:
        """Take over an example's next token and its share. Returns whether its answer is whole, and sets
        `done`."""
        example.answer.append(token)
        if self.choices and example.node >= 0:
            example.confidence *= share
            example.node = self.choices.next[example.node][token]
            rest = self.choices.forced(example.node)
            if rest is not None:
                example.answer += rest
                del example.answer[max_new_tokens:]
                example.done = True
        example.done = example.done or token in ends or len(example.answer) == max_new_tokens
        return example.done


def listed(tokens: torch.Tensor, shares: torch.Tensor | None = None) -> list[tuple[int, float]]:
    """Tokens [n], each with its share: 1 where nothing was to be chosen among."""
    return list(
        zip(tokens.tolist(), itertools.repeat(1.0) if shares is None else shares.tolist(), strict=False)
    )


def shared_prefix_of_prompts(prompts: Collection[list[int]]) -> int:
    """How many tokens all prompts begin with; each keeps one of its own."""
    return min(common_prefix(prompts), min(map(len, prompts)) - 1) if len(prompts) > 1 else 0
