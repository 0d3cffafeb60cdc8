"""What training keeps from the forward for the backward, the buffers that its layers share, and what fits.

What a layer keeps is described once, by the fields of `Activations`: under which plans each is kept, what
it takes, and what it takes to compute it again. All else follows from that: what is dropped after the
forward, what the backward computes again (whatever is None), the bytes and the time of a plan, and its words.
README.md has the formula. Nothing here needs Triton.
"""

import math
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields

import torch

from study.fast.decoder import head_size

# What a layer keeps, from most to least: all, all but the MLP's, not qkv either, its input only.
KEEPS = ("all", "attention", "residual", "input")
HEAD_ROWS = 4096  # rows of logits at a time; more are computed again in the backward
SHARED_CHUNK = 1024  # rows of queries that one sum of the shared prefix's gradient is taken over

# Bytes, counted: a trained parameter's gradient (4), AdamW's moments (8), the layers' own copy (2 and
# padding), and one in float32 while that is made (4); a logit in bfloat16 (2) and float32 (4), its softmax
# (4) and gradient (4).
TRAINED_BYTES, LOGIT_BYTES = 20, 14

# Time, of Llama-2-7B. To unpack all weights twice takes 10 of a step's 657 ms for 16,384 tokens on an H200
# (benchmarks/results/training-7b.json): some 250 tokens, and a little more. Launches bound steps below some
# 2,400 tokens on an H100 (training-7b-tokens.json): fewer, the larger a layer than its 4096 (3 * 11008 + 4 *
# 4096) weights. Half of a step's products are the forward's, and products are nine tenths of a step
# (training-7b.json). Copies to the host run beside the kernels: they only come second where both plans fit
# (chosen).
UNPACK_TOKENS = 300  # in whose time all weights are unpacked
LAUNCH_PRODUCTS = 4.86e11  # a layer's multiply-adds in whose time its kernels are launched
FORWARD_SHARE, HOST_SHARE = 0.45, 0.01  # of a step: products of all layers computed again, copies to the host

Saved = torch.Tensor | None


@dataclass(frozen=True)
class Sizes:
    """Columns of the matrices of a layer."""

    hidden: int
    inner: int
    out: int  # heads * head size
    qkv: int  # out + 2 key heads * head size
    rank: int  # of an adapter
    adapter_columns: int  # beside a product's input, for h: the ranks of q, k and v, in whole tiles of 64

    def weights(self) -> int:
        """Of a layer, frozen: as many multiply-adds as a row takes forward."""
        return self.hidden * (3 * self.inner + self.qkv + self.out)


def sizes_of(config, rank: int) -> Sizes:
    """The sizes of a transformers configuration with adapters of this rank."""
    out, keys = (n * head_size(config) for n in (config.num_attention_heads, config.num_key_value_heads))
    adapter_columns = math.ceil(3 * rank / 64) * 64
    return Sizes(config.hidden_size, config.intermediate_size, out, out + 2 * keys, rank, adapter_columns)


def kept(
    least: str, columns: Callable = lambda s: 0, product: Callable = lambda s: 0, words: str = ""
) -> dict:
    """What a field of `Activations` says of itself. It is kept under the plans of KEEPS down to `least`. From
    `Sizes` follow its `columns`, in the model's dtype, and a row's multiply-adds in the `product` that
    computes it again; `words` say what is computed again then."""
    plans = KEEPS[: KEEPS.index(least) + 1]
    return {"plans": plans, "columns": columns, "product": product, "words": words}


@dataclass
class Activations:
    """What a layer keeps for its backward; None is what has to be computed again, or waits on the host.

    h is the product of a group's input, after dropout, with the adapters' A, times their scale: B's gradient
    takes it, and no plan can do without. The last layer has all from `h_out` on for `Batch.rows` only. Single
    numbers of a row (float32) have no columns: `costs` counts them together as one more rank, which is 0.1 %
    of a Llama-2-7B's layer less than they take. Nor do attention's own products count as computed again: they
    are few beside those with weights.
    """

    x: Saved = field(default=None, metadata=kept("input", lambda s: s.hidden))  # [rows, hidden]
    inverse_1: Saved = field(default=None, metadata=kept("input"))  # [rows], of the norm of x
    qkv: Saved = field(  # [rows, qkv], queries and keys rotated
        default=None,
        metadata=kept("attention", lambda s: s.qkv, lambda s: s.hidden * s.qkv, "attention's projections"),
    )
    h_qkv: Saved = field(default=None, metadata=kept("input", lambda s: 3 * s.rank))  # [rows, ranks]
    attended: Saved = field(  # [rows, out + adapter_columns], attention's output with room for its h
        default=None, metadata=kept("residual", lambda s: s.out + s.adapter_columns)
    )
    logsumexp: Saved = field(default=None, metadata=kept("residual"))  # [heads, rows], of attention's softmax
    h_out: Saved = field(default=None, metadata=kept("input", lambda s: s.rank))  # [rows, ranks]
    residual: Saved = field(  # [rows, hidden], x + attention's part
        default=None, metadata=kept("residual", lambda s: s.hidden, lambda s: s.out * s.hidden)
    )
    inverse_2: Saved = field(default=None, metadata=kept("input"))  # [rows], of the norm of residual
    gate_up: Saved = field(  # [rows, 2 inner + adapter_columns]; the backward turns it into its gradient
        default=None,
        metadata=kept(
            "all", lambda s: 2 * s.inner + s.adapter_columns, lambda s: s.hidden * 2 * s.inner, "MLPs"
        ),
    )
    h_gate_up: Saved = field(default=None, metadata=kept("input", lambda s: 2 * s.rank))  # [rows, ranks]
    h_down: Saved = field(default=None, metadata=kept("input", lambda s: s.rank))  # [rows, ranks]

    def drop(self, keep: str) -> None:
        """Forget what is not kept at this level of KEEPS."""
        for part in dropped_at(keep):
            setattr(self, part.name, None)


def dropped_at(keep: str) -> list[Field]:
    """The fields of `Activations` that a level of KEEPS does without."""
    return [part for part in fields(Activations) if keep not in part.metadata["plans"]]


@dataclass(frozen=True)
class Plan:
    """How a step is computed: at most `tokens` at once, what each layer keeps (a level of KEEPS), and whether
    the layers' inputs wait on the host."""

    tokens: int
    keep: str
    on_host: bool = False

    def __str__(self) -> str:
        again = [part.metadata["words"] for part in reversed(dropped_at(self.keep))]
        words = "layers" if self.keep == KEEPS[-1] else " and ".join(filter(None, again)) or "nothing"
        return f"{words} computed twice" + (", their inputs in host memory" if self.on_host else "")


def choose_plan(
    model,
    free: float,
    longest: int,
    step: tuple[int, int],
    tokens: int | None = None,
    checkpointing: str = "auto",
    shared: int = 0,
) -> Plan:
    """The fastest plan for steps of `step` (tokens, learned tokens) that fits `free` bytes, of those that
    --max_tokens_per_batch (or None) and --gradient_checkpointing allow; if none fits, the most frugal.
    `longest` and `shared` are tokens of the longest example and of the prefix that all examples share."""
    step_tokens, learned = max(step[0], longest), step[1]
    keeps = {"on": ("input",), "off": ("all",)}.get(checkpointing, KEEPS)
    best, least_time = Plan(tokens or longest, keeps[-1], keeps[-1] == "input"), math.inf
    lora = next(iter(model.peft_config.values()))
    launch_tokens = LAUNCH_PRODUCTS / sizes_of(model.config, lora.r).weights()
    for keep, on_host in [*((keep, False) for keep in keeps), *[("input", True)] * ("input" in keeps)]:
        fixed, each, extra = costs(model, keep, on_host, learned, shared)
        fitting = int((free - fixed) / each)
        if fitting < (tokens or longest):
            continue
        most = tokens or min(fitting, step_tokens)
        passes = math.ceil(step_tokens / most)
        time = (1 + extra) * max(launch_tokens, step_tokens / passes + UNPACK_TOKENS) * passes
        if time < least_time:
            least_time = time
            best = Plan(min(most, math.ceil(step_tokens / passes) + longest), keep, on_host)
    return best


def costs(model, keep: str, on_host: bool, learned: int, shared: int) -> tuple[float, float, float]:
    """What a plan takes: bytes, bytes for each token, and the share of a step's time that it adds.

    `learned` tokens of a step have logits. Examples that share more than `shared` tokens save more rows than
    that takes. The formula stands in README.md, with every constant.
    """
    lora, config = next(iter(model.peft_config.values())), model.config
    s, trained = sizes_of(config, lora.r), sum(p.numel() for p in model.parameters() if p.requires_grad)
    parts = {part.name: part.metadata["columns"](s) for part in fields(Activations)}
    dropped = dropped_at(keep)
    columns = sum(parts.values()) + s.rank - sum(parts[part.name] for part in dropped) - on_host * parts["x"]
    # At work a layer has what it could drop, the product's and the residual stream's matrices, and dropout's.
    work = sum(parts[part.name] for part in dropped_at(KEEPS[-1]))
    work += max(s.inner, s.qkv) + 3 * (s.hidden + s.adapter_columns)
    work += max(s.inner, s.hidden) if lora.lora_dropout else 0
    weight = 2 * max(s.qkv, 2 * s.inner) * (s.hidden + s.adapter_columns)
    logits = min(HEAD_ROWS, learned) * config.vocab_size * LOGIT_BYTES
    # `Attention.shared_dkv`, in float32, for each chunk of rows
    chunk = shared * config.num_key_value_heads * 2 * head_size(config) * 4
    again = sum(part.metadata["product"](s) for part in dropped)
    return (
        weight + trained * TRAINED_BYTES + logits + chunk,
        2 * (columns * config.num_hidden_layers + work) + chunk / SHARED_CHUNK,
        FORWARD_SHARE * again / s.weights() + HOST_SHARE * on_host,
    )


@dataclass
class Buffers:
    """Memory that all layers share, each for as long as one product takes."""

    weight: torch.Tensor  # flat: a group's unpacked weights, with the adapters' A or B beside them
    input: torch.Tensor  # [tokens, hidden + adapter_columns]: a normed input, and h
    inner: torch.Tensor  # [tokens, max(inner, qkv) + adapter_columns]: the MLP's product and h; gradients
    masked: torch.Tensor | None  # flat: what dropout leaves of an input; None without dropout
    adapter_columns: int  # beside an input, for the h of any group

    def dropped(self, rows: int, width: int) -> torch.Tensor | None:
        """A matrix [rows, width] for what dropout leaves, or None without dropout."""
        return None if self.masked is None else self.masked[: rows * width].view(rows, width)


class OnDevice:
    """Layer inputs stay on the device."""

    def put(self, number: int, kept: Activations) -> None:
        """Nothing is moved; nor does `get` have to bring anything back."""

    get = put


@dataclass
class OnHost:
    """Layer inputs wait in pinned host memory; each is fetched while the layer above it is at work."""

    host: list[torch.Tensor]  # of each layer [tokens, hidden]
    stream: torch.cuda.Stream = field(default_factory=torch.cuda.Stream)
    coming: dict[int, tuple] = field(default_factory=dict)

    def put(self, number: int, kept: Activations) -> None:
        """Take the input of the layer of this number away from what it keeps."""
        self.coming.pop(number, None)  # of a pass that ran out of memory
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.host[number][: len(kept.x)].copy_(kept.x, non_blocking=True)
        kept.x.record_stream(self.stream)
        kept.x = None

    def get(self, number: int, kept: Activations) -> None:
        """Give it back, and begin to fetch that of the layer below."""
        rows = len(kept.inverse_1)
        if number not in self.coming:
            self.fetch(number, rows)
        kept.x, ready = self.coming.pop(number)
        torch.cuda.current_stream().wait_event(ready)
        if number:
            self.fetch(number - 1, rows)

    def fetch(self, number: int, rows: int) -> None:
        """Begin to copy a layer's input to the device, beside the kernels."""
        x = torch.empty(rows, self.host[number].shape[1], dtype=self.host[number].dtype, device="cuda")
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            x.copy_(self.host[number][:rows], non_blocking=True)
            ready = torch.cuda.Event()
            ready.record(self.stream)
        x.record_stream(self.stream)
        self.coming[number] = x, ready
