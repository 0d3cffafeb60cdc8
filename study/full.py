"""Fine-tune all weights of a model, so that a killed run goes on (resuming.py) and ends as it would have.

Weights and AdamW's moments are float32. The loss of a step is the mean over its examples, in however many
passes it is computed. The host waits for the GPU only where it prints or saves.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from study import device, resuming
from study.device import Process
from study.errors import UserError, is_out_of_memory
from study.model import fingerprint
from study.packing import seed_of, split_to_fit
from study.training import check_finite, diverged, mean_loss, save_whole, thin

STATE, WEIGHTS, CONFIG = "state.safetensors", "model.safetensors", "config.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
MOST_TOKENS = 16_384  # at once, where nothing else is asked for
WRITTEN = 5e8  # bytes a second that a first checkpoint is expected to be written with


@dataclass(frozen=True)
class Recipe:
    """How weights are moved: AdamW, its rate after a linear warm-up falling linearly to 0."""

    learning_rate: float
    warmup: float  # share of all steps
    weight_decay: float  # of matrices; not of biases and norms
    max_grad_norm: float

    def optimizer(self, model) -> torch.optim.AdamW:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.learning_rate, fused=True)

    def rate(self, step: int, steps: int) -> float:
        """Above 0 in the first step and in the last, so that each teaches something."""
        warmup = max(1, math.ceil(self.warmup * steps))
        return self.learning_rate * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))

    def __str__(self) -> str:
        return f"linear warm-up over {100 * self.warmup:g} % of the steps, then linearly to 0"


class Training:
    """The steps of one training: what is done, what it took, and where it is kept.

    `loss_sum` gives the summed loss of some examples, computed in one pass and padded to the longest of them;
    `lengths` are theirs in tokens.
    """

    def __init__(
        self, model, loss_sum: Callable, steps: list[list[int]], lengths: Sequence[int], recipe, args
    ):
        self.model, self.loss_sum, self.steps, self.lengths = model.train(), loss_sum, steps, lengths
        self.recipe, self.args, self.optimizer = recipe, args, recipe.optimizer(model)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.tokens = [sum(lengths[i] for i in step) for step in steps]
        self.most = MOST_TOKENS if args.max_tokens_per_batch == "auto" else args.max_tokens_per_batch
        self.history, self.waiting = [], []  # [step, loss, examples], and losses that are on the device yet
        self.saving = 12 * sum(map(torch.numel, self.trained)) / WRITTEN  # seconds that a checkpoint takes

    def passes(self, step: Sequence[int]) -> list[list[int]]:
        return split_to_fit(step, self.lengths, self.most, padded=True)

    def step(self, number: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(number, len(self.steps))
        while True:
            try:
                self.waiting.append(self.backward(number))
                break
            except RuntimeError as error:
                longest = max(self.lengths[i] for i in self.steps[number])
                if self.most <= longest or not is_out_of_memory(error):
                    raise
                self.most = max(longest, self.most // 2)
            self.optimizer.zero_grad()
            torch.cuda.empty_cache()
            print(f"out of memory: going on with {self.most:,} tokens at once", flush=True)
        torch.nn.utils.clip_grad_norm_(self.trained, self.recipe.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def backward(self, number: int) -> torch.Tensor:
        """Gradients of one step. Returns its loss, the mean over its examples."""
        torch.manual_seed(seed_of(self.args.seed, number))  # a resumed run draws what the first would have
        total, step = 0.0, self.steps[number]
        for group in self.passes(step):
            loss = self.loss_sum(group) / len(step)
            loss.backward()
            total += loss.detach()
        return total

    def settle(self) -> float:
        """Fetch the losses that are on the device. Returns the last. Raises UserError if one is no number, as
        all later ones would be."""
        for loss in torch.stack(self.waiting).tolist() if self.waiting else []:
            number = len(self.history)
            if not math.isfinite(loss):
                raise diverged(f"the loss is {loss} at step {number + 1:,}", self.args)
            self.history.append([number, loss, len(self.steps[number])])
        self.waiting.clear()
        return self.history[-1][1]

    def save(self, checkpoint: Path) -> None:
        """Weights and moments, as safetensors."""
        self.settle()
        check_finite(self.model, self.args)
        tensors = {}
        for name, weight in self.model.named_parameters():
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
            for name, weight in self.model.named_parameters():
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


def train(training: Training, tokenizer, folder: Path, run: dict, process: Process) -> dict:
    """Train a model (float32) and leave it in `folder`/model. Returns the record's `train`.

    `run` says what is trained ({"method", "config", "data", "checkpoint", "examples_sha256"}); a checkpoint
    of the same run is resumed, one of another refused. They are saved as often as costs a twentieth of the
    time.
    """
    steps, tokens = training.steps, training.tokens
    run = run | {"schedule": str(training.recipe)}
    checkpoint, spent, history = resuming.resume(folder / "checkpoints", run, training.args, process)
    if checkpoint:
        training.restore(checkpoint, history)
    print(
        f"training   {len(training.lengths):,} examples, {len(steps):,} steps, {sum(tokens):,} tokens, at "
        f"most {training.most:,} at once" + (f"; resumed from {checkpoint.name}" if checkpoint else ""),
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
            print(
                f"step {done:>6,}/{len(steps):,}  loss {loss:.4f}  {speed:,.0f} tokens/s  "
                f"{device.peak_memory_gib():.1f} GiB  {sum(tokens[done:]) / speed:,.0f} s left",
                flush=True,
            )
        if time.monotonic() - saved > 20 * training.saving and done < len(steps):
            saved, checkpoint = time.monotonic(), folder / "checkpoints" / f"checkpoint-{done}"
            training.save(checkpoint)
            now = resuming.so_far(spent, seconds(), process)
            resuming.mark(checkpoint, run, now, training.history, {"tokens": training.most})
            training.saving, saved = time.monotonic() - saved, time.monotonic()
    check_finite(training.model, training.args)
    took = seconds()
    final = save_whole(folder / "model", training.model.save_pretrained, tokenizer.save_pretrained)
    computed = sum(
        len(group) * max(training.lengths[i] for i in group)
        for step in steps
        for group in training.passes(step)
    )
    return {
        "loss": mean_loss(training.history[-(len(steps) // training.args.epochs) :]),
        "loss_history": thin([[step + 1, loss] for step, loss, _ in training.history]),
        "examples": len(training.lengths),
        "steps": len(steps),
        "tokens": sum(tokens),
        **resuming.so_far(spent, took, process),
        "earlier_seconds": spent["wall_seconds"],
        "tokens_per_second": sum(tokens) / took,
        "trainable_parameters": sum(map(torch.numel, training.trained)),
        "batching": {
            "padding_share": 1 - sum(tokens) / computed,
            "max_tokens_per_batch": training.most,
            "attention": training.model.config._attn_implementation,
            "processes": 1,
        },
        "schedule": run["schedule"],
        "examples_sha256": run["examples_sha256"],
        "model_sha256": fingerprint(final, WEIGHTS),
        "model_config_sha256": fingerprint(final, CONFIG),
    }
