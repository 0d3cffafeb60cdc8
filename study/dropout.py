"""Dropout before the adapters of a model's own layers, drawn for each example by itself: which activations
of it are dropped does not depend on what else is in its pass, nor on the process that computes it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from study.packing import seed_of


class ByExample:
    """The dropout of all adapters of a model: what its layers need to know of the pass at hand."""

    def __init__(self):
        self.seed, self.places, self.lengths, self.padded = 0, [], [], False

    @classmethod
    def of(cls, model) -> "ByExample":
        """Take the place of PEFT's dropout in every adapter of `model`."""
        drawn = cls()
        kinds = (getattr(module, "lora_dropout", None) for module in model.modules())
        for number, adapters in enumerate(filter(None, kinds)):
            for name, before in adapters.items():
                if getattr(before, "p", 0.0):
                    adapters[name] = Dropout(before.p, number, drawn)
        return drawn

    def begin(self, seed: int) -> None:
        """Of a step."""
        self.seed = seed

    def place(self, places: Sequence[int], lengths: Sequence[int], padded: bool) -> None:
        """The places in the step of the examples of a pass, and their tokens; they lie end to end in one row,
        or each in its own, `padded` on the right."""
        self.places, self.lengths, self.padded = list(places), list(lengths), padded

    def rows(self) -> int:
        """Of a matrix that has a row for each token of the pass."""
        return len(self.lengths) * max(self.lengths) if self.padded else sum(self.lengths)

    def kept(self, number: int, width: int, p: float, device: torch.device) -> torch.Tensor:
        """What adapter `number` keeps of its input: booleans [rows, width]."""
        masks = []
        for place, length in zip(self.places, self.lengths, strict=True):
            generator = torch.Generator(device).manual_seed(seed_of(self.seed, place, number))
            masks.append(torch.rand(length, width, generator=generator, device=device) >= p)
        if self.padded:
            return torch.nn.utils.rnn.pad_sequence(masks, batch_first=True).flatten(0, 1)
        return torch.cat(masks)


class Dropout(torch.nn.Module):
    """That of one adapter, in training."""

    def __init__(self, p: float, number: int, drawn: ByExample):
        super().__init__()
        self.p, self.number, self.drawn = p, number, drawn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., width]; of rows that are not the pass's tokens (an expert's, the head's) PyTorch draws."""
        width = x.shape[-1]
        if not self.training or x.numel() != self.drawn.rows() * width:
            return F.dropout(x, self.p, self.training)
        kept = self.drawn.kept(self.number, width, self.p, x.device)
        return x * kept.view(x.shape) * (1 / (1 - self.p))
