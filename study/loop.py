"""A training loop for models that need no fast path: an encoder or a T5, all weights or adapters.

A killed run goes on (resuming.py) and ends as it would have. Trained weights and AdamW's moments are float32.
The loss of a step is the mean over what is learned in it, in however many passes it is computed. The host
waits for the GPU only where it prints or saves.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from study import resuming
from study.device import Process
from study.errors import UserError, is_out_of_memory
from study.fast.replay import Passes
from study.packing import seed_of
from study.training import check_finite, diverged, step_line, taken

STATE = "state.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")
WRITTEN = 5e8  # bytes a second that a first checkpoint is expected to be written with


@dataclass(frozen=True)
class Recipe:
    """How weights are moved: AdamW, its rate after a linear warm-up constant or falling linearly to 0."""

    learning_rate: float
    warmup: int  # steps
    falls: bool
    weight_decay: float  # of matrices; not of biases and norms
    max_grad_norm: float

    def optimizer(self, weights: Sequence[torch.nn.Parameter]) -> torch.optim.AdamW:
        groups = [
            {"params": [p for p in weights if p.dim() > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in weights if p.dim() <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=True)

    def rate(self, step: int, steps: int) -> float:
        """Above 0 in the first step and in the last, so that each teaches something."""
        left = (steps - step) / max(1, steps - self.warmup) if self.falls else 1.0
        return self.learning_rate * min((step + 1) / self.warmup, left)

    def __str__(self) -> str:
        how = "falling linearly to 0" if self.falls else "constant"
        return f"{how} after a linear warm-up of {self.warmup} steps"


class Examples:
    """Training examples as tokens, and what a model computes of some of them.

    `sizes` are the tokens of each in every stack of the model (an encoder's; an encoder's and a decoder's);
    a batch is as wide as its longest, on CUDA rounded up to `multiples`: kernels want that, and few shapes
    come again often. `learned` counts the terms of each one's loss, `most` the tokens at once where no flag
    says it.
    """

    most: int
    packed = False  # a batch is as wide as its longest

    def __init__(self, sizes: Sequence[tuple[int, ...]], learned: Sequence[int], multiples: tuple[int, ...]):
        self.sizes, self.learned = sizes, learned
        self.multiples = multiples if torch.cuda.is_available() else (1,) * len(multiples)
        self.tokens = [sum(size) for size in sizes]
        self.widest = tuple(map(max, zip(*sizes, strict=True)))

    def widths(self, group: Sequence[int]) -> tuple[int, ...]:
        """Of a batch in every stack; none is wider than the longest example."""
        longest = map(max, zip(*(self.sizes[i] for i in group), strict=True))
        rounded = (-(-n // m) * m for n, m in zip(longest, self.multiples, strict=True))
        return tuple(map(min, rounded, self.widest))

    def area(self, group: Sequence[int]) -> int:
        """Tokens of a batch, padding included."""
        return len(group) * sum(self.widths(group))

    def split(self, step: Sequence[int], most: int) -> list[list[int]]:
        """A step's examples in few groups of at most `most` tokens, or one example that alone exceeds that;
        the longest first."""
        groups: list[list[int]] = []
        for i in sorted(step, key=lambda i: (self.sizes[i], i), reverse=True):
            if groups and self.area([*groups[-1], i]) <= most:
                groups[-1].append(i)
            else:
                groups.append([i])
        return groups

    def batch(self, group: Sequence[int]) -> dict[str, torch.Tensor]:
        """What `loss_sum` takes, on the device; the host does not wait."""
        raise NotImplementedError

    def loss_sum(self, model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        raise NotImplementedError


class Training:
    """The steps of one training: what is done, what it took, and where it is kept."""

    def __init__(self, model, examples: Examples, steps: list[list[int]], recipe: Recipe, args):
        self.model, self.examples, self.steps = model.train(), examples, steps
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.recipe, self.args, self.optimizer = recipe, args, recipe.optimizer([*self.trained.values()])
        self.learned = [sum(examples.learned[i] for i in step) for step in steps]
        self.tokens = [sum(examples.tokens[i] for i in step) for step in steps]
        self.most = examples.most if args.max_tokens_per_batch == "auto" else args.max_tokens_per_batch
        self.passes = Passes(model, examples.loss_sum)
        self.history = []  # [step, loss, learned]; the last losses may be on the device yet
        self.saving = 12 * sum(map(torch.numel, self.trained.values())) / WRITTEN  # seconds of a checkpoint

    def step(self, number: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(number, len(self.steps))
        while True:
            groups = self.examples.split(self.steps[number], self.most)
            try:
                loss = self.backward(number, groups)
                break
            except RuntimeError as error:
                if max(map(len, groups)) == 1 or not is_out_of_memory(error):
                    raise
            self.passes.forget()
            self.optimizer.zero_grad()
            torch.cuda.empty_cache()
            self.most = max(map(self.examples.area, groups)) // 2
            print(f"out of memory: going on with {self.most:,} tokens at once", flush=True)
        self.history.append([number, loss, self.learned[number]])
        torch.nn.utils.clip_grad_norm_(self.trained.values(), self.recipe.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(
            set_to_none=not self.passes.recorded
        )  # what is recorded adds to these tensors

    def backward(self, number: int, groups: list[list[int]]) -> torch.Tensor:
        """Gradients of one step. Returns its loss, the mean over what is learned, on the device."""
        total = 0.0
        for i, group in enumerate(groups):
            # A resumed run draws what the first would have.
            torch.manual_seed(seed_of(self.args.seed, number, i))
            total = total + self.passes(self.examples.batch(group), 1 / self.learned[number])
        return total

    def padding(self) -> float:
        """The share of padding in what the device computes."""
        groups = (group for step in self.steps for group in self.examples.split(step, self.most))
        return 1 - sum(self.tokens) / sum(map(self.examples.area, groups))

    def settle(self) -> float:
        """Fetch the losses that are on the device. Returns the last. Raises UserError if one is no number, as
        all later ones would be."""
        waiting = [entry for entry in self.history if isinstance(entry[1], torch.Tensor)]
        found = torch.stack([loss for _, loss, _ in waiting]).tolist() if waiting else []
        for entry, loss in zip(waiting, found, strict=True):
            if not math.isfinite(loss):
                raise diverged(f"the loss is {loss} at step {entry[0] + 1:,}", self.args)
            entry[1] = loss
        return self.history[-1][1]

    def save(self, checkpoint: Path) -> None:
        """Weights and moments, as safetensors; every loss is settled."""
        check_finite(self.model, self.args)
        tensors = {}
        for name, weight in self.trained.items():
            moments = self.optimizer.state.get(weight, {})
            kept = {"weight": weight.detach()} | {kind: moments[kind] for kind in MOMENTS if moments}
            tensors |= {f"{kind} {name}": tensor for kind, tensor in kept.items()}
        checkpoint.mkdir(parents=True)
        save_file(tensors, checkpoint / STATE)

    def restore(self, checkpoint: Path, history: list) -> None:
        """Go on from a checkpoint. Raises UserError for one that is damaged."""
        self.history, before = history, resuming.read_progress(checkpoint)
        if before["config"]["max_tokens_per_batch"] == self.args.max_tokens_per_batch:
            self.most = before["plan"]["tokens"]  # dropout is drawn pass by pass
        try:
            tensors = load_file(checkpoint / STATE)
            for name, weight in self.trained.items():
                weight.data.copy_(tensors[f"weight {name}"])
                moments = {kind: tensors.get(f"{kind} {name}") for kind in MOMENTS}
                if moments[MOMENTS[0]] is not None:
                    step = torch.tensor(float(len(history)), device=weight.device)
                    moments = {kind: moment.to(weight.device) for kind, moment in moments.items()}
                    self.optimizer.state[weight] = {"step": step, **moments}
        except (OSError, KeyError, RuntimeError, SafetensorError) as error:
            if is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:100]
            raise UserError(f"{checkpoint} is damaged ({reason}): remove it and start again") from None


def train(
    training: Training, folder: Path, run: dict, process: Process, save: Callable[[], dict[str, str]]
) -> dict:
    """Run the steps that are left, and `save`, which leaves what was trained in `folder` and returns its
    fingerprints. Returns the record's `train`.

    `run` says what is trained ({"method", "config", "data", "checkpoint", "examples_sha256"}); a checkpoint
    of the same run is resumed, one of another refused. They are saved as often as costs a twentieth of the
    time.
    """
    count, steps, tokens = len(training.examples.sizes), training.steps, training.tokens
    run = run | {"schedule": str(training.recipe)}
    checkpoint, spent, history = resuming.resume(folder / "checkpoints", run, training.args, process)
    if checkpoint:
        training.restore(checkpoint, history)
    print(
        f"training   {count:,} examples, {len(steps):,} steps, {sum(tokens):,} tokens, "
        f"at most {training.most:,} at once" + (f"; resumed from {checkpoint.name}" if checkpoint else ""),
        flush=True,
    )
    first, began = len(training.history), time.monotonic()
    saved = began
    seconds = lambda: spent["seconds"] + time.monotonic() - began
    for number in range(first, len(steps)):
        training.step(number)
        done = number + 1
        if done % max(1, len(steps) // 10) == 0 or done == len(steps):
            loss, speed = training.settle(), sum(tokens[first:done]) / (time.monotonic() - began)
            print(step_line(done, tokens, loss, speed), flush=True)
        if time.monotonic() - saved > 20 * training.saving and done < len(steps):
            training.settle()  # waits for the device: what follows is the time of saving alone
            saved, checkpoint = time.monotonic(), folder / "checkpoints" / f"checkpoint-{done}"
            training.save(checkpoint)
            now = resuming.so_far(spent, seconds(), process)
            resuming.mark(checkpoint, run, now, training.history, {"tokens": training.most})
            training.saving, saved = time.monotonic() - saved, time.monotonic()
    check_finite(training.model, training.args)
    took, fingerprints = seconds(), save()
    return {
        **taken(training.history, len(steps) // training.args.epochs, tokens, took, spent, process),
        "examples": count,
        "trainable_parameters": sum(map(torch.numel, training.trained.values())),
        "batching": {
            "padding_share": training.padding(),
            "max_tokens_per_batch": training.most,
            "attention": "kernels"
            if training.examples.packed
            else training.model.config._attn_implementation,
            "packed": training.examples.packed,
            "cuda_graphs": len(training.passes.graphs),
            "processes": 1,
        },
        "schedule": run["schedule"],
        "examples_sha256": run["examples_sha256"],
        **fingerprints,
    }
