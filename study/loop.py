"""A plain training loop of one process that goes on after a kill and ends as it would have.

A checkpoint is weights.safetensors, the trained weights and AdamW's two means of each, and progress.json
(resuming.py). It holds no random state: a step draws by its number.
"""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils import clip_grad_norm_

from study import device, resuming
from study.training import check_finite, diverged, losses

STATE = "weights.safetensors"
SPEED = 2**30  # bytes a second that a checkpoint is thought to be written with until one has been


class Loop:
    """Steps of an optimizer over the trained weights of a model; `run` and `process` as in training.train."""

    def __init__(self, model, optimizer, warmup: int, max_grad_norm: float, args, folder: Path, run, process):
        self.model, self.optimizer, self.warmup, self.most = model, optimizer, warmup, max_grad_norm
        self.args, self.folder, self.run, self.process = args, folder / "checkpoints", run, process
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.checkpoint, self.spent, self.history = resuming.resume(self.folder, run, args, process)
        if self.checkpoint:
            self.load(len(self.history))

    def load(self, step: int) -> None:
        state = load_file(self.checkpoint / STATE)
        for name, p in self.trained.items():
            p.data.copy_(state[name])
            means = {kind: state[f"{kind}:{name}"].to(p.device) for kind in ("exp_avg", "exp_avg_sq")}
            counter = p.device if self.optimizer.defaults["fused"] else "cpu"
            self.optimizer.state[p] = {"step": torch.tensor(float(step), device=counter), **means}

    def train(
        self, step: Callable[[int], torch.Tensor], learned: Sequence[int], tokens: Sequence[int]
    ) -> dict:
        """Run the steps that are left, one for each of `learned` and `tokens` (learned tokens, all tokens).
        `step(number)` leaves the gradients of one and returns its mean loss, on the device.

        Returns what a record's `train` says of it. Raises UserError if the loss or a weight is no number.
        """
        self.began = self.saved = time.monotonic()
        size = sum(p.numel() * p.element_size() for p in self.trained.values())
        self.saving, first, last = 3 * size / SPEED, len(self.history), len(learned) - 1
        for number in range(first, last + 1):
            for group in self.optimizer.param_groups:
                group["lr"] = self.args.learning_rate * min(1.0, (number + 1) / self.warmup)
            self.history.append([number, step(number), learned[number]])
            clip_grad_norm_(self.trained.values(), self.most)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if (number + 1) % max(1, (last + 1) // 10) == 0 or number == last:
                self.say(number, tokens, first)
            if time.monotonic() - self.saved > 20 * self.saving and number < last:
                self.save(number + 1)
        check_finite(self.model, self.args)
        seconds = self.seconds()
        return {
            **losses(self.history, len(learned) // self.args.epochs),
            "steps": len(learned),
            "tokens": sum(tokens),
            **resuming.so_far(self.spent, seconds, self.process),
            "earlier_seconds": self.spent["wall_seconds"],
            "tokens_per_second": sum(tokens) / seconds,
            "trainable_parameters": sum(p.numel() for p in self.trained.values()),
            "schedule": self.run["schedule"],
            "examples_sha256": self.run["examples_sha256"],
        }

    def seconds(self) -> float:
        return self.spent["seconds"] + time.monotonic() - self.began

    def say(self, number: int, tokens: Sequence[int], first: int) -> None:
        loss = float(self.history[-1][1])  # waits for the device
        if not math.isfinite(loss):
            raise diverged(f"the loss is {loss} at step {number + 1:,}", self.args)
        speed = sum(tokens[first : number + 1]) / (time.monotonic() - self.began)
        print(
            f"step {number + 1:>6,}/{len(tokens):,}  loss {loss:.4f}  {speed:,.0f} tokens/s  "
            f"{device.peak_memory_gib():.1f} GiB  {sum(tokens[number + 1 :]) / speed:,.0f} s left",
            flush=True,
        )

    def save(self, steps: int) -> None:
        check_finite(self.model, self.args)  # waits for the device: what follows is the time of saving alone
        began, folder = time.monotonic(), self.folder / f"checkpoint-{steps}"
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: p.data for name, p in self.trained.items()}
        for name, p in self.trained.items():
            state |= {f"{kind}:{name}": self.optimizer.state[p][kind] for kind in ("exp_avg", "exp_avg_sq")}
        save_file(state, folder / STATE)
        self.history = [[number, float(loss), learned] for number, loss, learned in self.history]
        spent = resuming.so_far(self.spent, self.seconds(), self.process)
        resuming.mark(folder, self.run, spent, self.history, plan={})
        self.saved = time.monotonic()
        self.saving = self.saved - began
