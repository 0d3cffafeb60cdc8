"""Forward and backward of batches without the host's work for every kernel: on CUDA a shape of batch that
comes again is recorded as one graph, which then runs at one call.

A small model's step has thousands of kernels, each of which the host takes longer to start than the GPU to
run.
"""

import warnings
from collections.abc import Callable

import torch

from study.errors import is_out_of_memory


class Passes:
    """Adds the gradients of share * loss_sum(model, batch) to those of the model, and returns this loss.

    A model is recorded if the host never waits for the GPU in it, which its first batch finds out. Gradients
    must then stay the same tensors from step to step.
    """

    def __init__(self, model, loss_sum: Callable):
        self.model, self.loss_sum = model, loss_sum
        self.recorded = None if torch.cuda.is_available() else False  # None: not yet known
        self.seen, self.graphs, self.pool = set(), {}, None

    def __call__(self, batch: dict[str, torch.Tensor], share: float) -> torch.Tensor:
        """`batch` are tensors on the device, which no graph keeps. The next call may overwrite the loss."""
        if self.recorded is None:
            self.recorded = not self.waits(batch)
        shape = tuple((name, tensor.shape) for name, tensor in batch.items())
        if not self.recorded or shape not in self.seen:
            self.seen.add(shape)
            return self.run(batch, share)
        if shape not in self.graphs:
            self.graphs[shape] = self.record(batch, share)
        graph, inputs, loss = self.graphs[shape]
        for name, tensor in batch.items():
            inputs[name].copy_(tensor)
        inputs["share"].fill_(share)
        graph.replay()
        return loss

    def run(self, batch: dict[str, torch.Tensor], share) -> torch.Tensor:
        loss = self.loss_sum(self.model, batch) * share
        loss.backward()
        return loss.detach()

    def record(self, batch: dict[str, torch.Tensor], share: float) -> tuple:
        """The graph of a batch, the tensors that it reads, and the one that it writes its loss to."""
        inputs = {name: tensor.clone() for name, tensor in batch.items()}
        inputs["share"] = torch.tensor(share, device=next(iter(batch.values())).device)
        graph = torch.cuda.CUDAGraph()
        self.pool = self.pool or torch.cuda.graph_pool_handle()  # one for all: they run one after another
        with torch.cuda.graph(graph, pool=self.pool):
            loss = self.run({name: inputs[name] for name in batch}, inputs["share"])
        return graph, inputs, loss

    def waits(self, batch: dict[str, torch.Tensor]) -> bool:
        """Whether the host waits for the GPU in a pass. The gradients are as before, none."""
        state = torch.cuda.get_rng_state()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this mode is new
            torch.cuda.set_sync_debug_mode("error")
        try:
            self.run(batch, 1.0)
            return False
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            return True
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.set_rng_state(state)
            self.model.zero_grad()

    def forget(self) -> None:
        """Give back the graphs' memory."""
        self.seen, self.graphs, self.pool = set(), {}, None
