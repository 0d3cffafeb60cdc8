"""Fine-tune an adapter with transformers' Trainer, by a fast or a plain path (paths.py), so that a killed run
goes on (resuming.py) and ends as it would have.

An optimizer step sees `batch_size` examples, in an order that depends on the seed alone. They are shared out
among the processes of the run (processes.py) and split into rows of at most `max_tokens_per_batch` tokens;
the loss of the step is the sum over its learned tokens divided by their count, however it is split.
"""

import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from peft import get_peft_model
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from study import checks, device, paths, processes, resuming, sharding
from study.device import Process
from study.encoding import ExampleRows, lengths
from study.errors import UserError, is_out_of_memory
from study.model import CONFIG, fingerprint
from study.packing import choose_batching, learned_places, plan_steps, seed_of
from study.tokens import sha256_of


class PackedTrainer(Trainer):
    """A Trainer whose batch is one whole optimizer step, split by `path` to fit the device within
    `training_step`."""

    def __init__(self, *, path, examples, steps, warmup, history, reporter, **options):
        super().__init__(train_dataset=list(range(len(steps))), callbacks=[reporter], **options)
        self.path, self.reporter, self.warmup = path, reporter, warmup
        self.examples, self.steps, self.history = examples, steps, history
        self.trained = [p for p in self.model.parameters() if p.requires_grad]

    def create_accelerator_and_postprocess(self) -> None:
        """Without DistributedDataParallel around the model: the path exchanges what is to be exchanged, once
        a step. In evaluation mode accelerate prepares a model as for training but for that."""
        with sharding.hidden():
            super().create_accelerator_and_postprocess()
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def store_flos(self) -> None:
        """Nobody reads them, and to add them up all processes would have to save."""

    def get_train_dataloader(self) -> DataLoader:
        """Step numbers in order: every process reads all of them and takes its own share of each step's
        examples."""
        return DataLoader(self.train_dataset, batch_size=1, collate_fn=lambda numbers: numbers)

    def create_scheduler(self, num_training_steps: int, optimizer=None) -> LambdaLR:
        """Constant after a linear warm-up, whose first step has a rate above 0, so that one step teaches
        something, and whose length does not depend on the number of epochs."""
        if self.lr_scheduler is None:
            share = lambda step: min(1.0, (step + 1) / self.warmup)
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, share)
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """What a tracker gets: loss and learning rate, as transformers logs them, with speed and memory."""
        if "loss" in logs:
            logs |= {
                "tokens_per_second": self.reporter.speed(self.state),
                "memory_gib": device.peak_memory_gib(),
            }
        super().log(logs, start_time)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Forward and backward of one optimizer step. Returns its loss, the mean over its learned tokens.

        Each process computes its share of the examples. One that exceeds its memory begins again with half as
        many tokens at once, while the others wait for its gradients.
        """
        [number] = inputs
        path, step = self.path, [self.examples[i] for i in self.steps[number]]
        learned = sum(len(learned_places(example, path.loss_on)) for example in step)
        path.begin(seed_of(self.args.seed, number), step)  # so a resumed run draws what the first would have
        mine = processes.mine(path.sizes())
        while True:
            try:
                with sharding.computing():
                    total = self.pass_by_pass(mine, learned)
                break
            except RuntimeError as error:
                longest = max(len(step[i].ids) for i in mine)
                given_up = path.max_tokens <= longest or sharding.asked()  # there no other would wait
                if given_up or not is_out_of_memory(error):
                    raise
                model.zero_grad(set_to_none=True)
                path.max_tokens = max(longest, path.max_tokens // 2)
            torch.cuda.empty_cache()
            tqdm.write(f"out of memory: going on with {path.max_tokens:,} tokens at once")
        total = processes.add_up(self.trained, total)
        self.history.append([number, total, learned])
        return total

    def pass_by_pass(self, places: list[int], learned: int) -> torch.Tensor:
        """Gradients of these examples of the step. Returns their share of its loss. Where the processes share
        the layers, one with fewer passes than another computes the first example again, for nothing."""
        total = torch.zeros((), device=self.args.device)
        groups = [(group, 1) for group in self.path.passes(places)]
        if sharding.asked():
            groups += [([0], 0)] * (max(processes.everyone(len(groups))) - len(groups))
        for group, weight in groups:
            loss = weight * self.path.loss_sum(group) / learned
            self.accelerator.backward(loss)
            total += loss.detach()
        return total


class Reporter(TrainerCallback):
    """Print a line now and then; save checkpoints as often as costs a twentieth of the time, and mark the
    whole ones."""

    def __init__(
        self,
        process: Process,
        path,
        run: dict,
        history: list,
        tokens: list[int],
        spent: dict,
        per_epoch: int,
        leave: dict[int, Callable[[dict], None]],
    ):
        self.process, self.path, self.run = process, path, run
        self.history, self.tokens, self.spent = history, tokens, spent
        self.per_epoch = per_epoch  # steps
        self.leave, self.aside = leave, 0.0  # by steps, who takes what a run of so many has; and its seconds
        self.saving = 0.1  # seconds that a checkpoint takes: a guess until one has been written

    def on_train_begin(self, args, state, control, **kwargs):
        self.began = self.saved = time.monotonic()
        self.first = state.global_step

    def seconds(self) -> float:
        return self.spent["seconds"] + time.monotonic() - self.began

    def taken(self, steps: int) -> dict:
        """What the record of a run that ends after so many `steps` says that it took."""
        seconds = self.seconds() - self.aside
        took = taken(
            self.history[:steps], self.per_epoch, self.tokens[:steps], seconds, self.spent, self.process
        )
        return took | {"wall_seconds": took["wall_seconds"] - self.aside}

    def on_step_end(self, args, state, control, **kwargs):
        last = state.global_step == state.max_steps
        if state.global_step % max(1, state.max_steps // 10) == 0 or last:
            self.say(args, state)
        if state.global_step in self.leave:
            began = time.monotonic()
            self.loss(args, state)
            self.leave[state.global_step](self.taken(state.global_step))
            self.aside += time.monotonic() - began
        due = time.monotonic() - self.saved > 20 * self.saving and not last
        if due and self.process.main:  # the others wait for its next gradients
            control.should_save, self.saved = True, time.monotonic()

    def speed(self, state) -> float:
        """Tokens per second since this process began to train."""
        return sum(self.tokens[self.first : state.global_step]) / (time.monotonic() - self.began)

    def loss(self, args, state) -> float:
        """The last step's. Raises UserError if it is not a number, as all later ones would be."""
        loss = float(self.history[-1][1])
        if not math.isfinite(loss):
            raise diverged(f"the loss is {loss} at step {state.global_step:,}", args)
        return loss

    def say(self, args, state) -> None:
        tqdm.write(step_line(state.global_step, self.tokens, self.loss(args, state), self.speed(state)))

    def on_save(self, args, state, control, **kwargs):
        check_finite(kwargs["model"], args)
        spent = resuming.so_far(self.spent, self.seconds(), self.process)
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        resuming.mark(checkpoint, self.run, spent, self.history, self.path.plan())
        self.saving, self.saved = time.monotonic() - self.saved, time.monotonic()


def check_finite(model, args) -> None:
    """Raise UserError if training has made a weight infinite or no number."""
    if not all(torch.isfinite(p).all() for p in model.parameters() if p.requires_grad):
        raise diverged("the trained weights are no longer numbers", args)


def diverged(what: str, args) -> UserError:
    rate = f"--learning_rate {args.learning_rate:g}"
    return UserError(f"{what}: {rate} is too high for these examples; give a lower one")


def settings(folder: Path, report_to: str, **chosen) -> TrainingArguments:
    """transformers' TrainingArguments: those `chosen` by a script, and what all runs share.

    Raises UserError for a tracker that transformers does not know or that is not installed.
    """
    processes.join()
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard"))
    try:
        for tracker in get_reporting_integration_callbacks(report_to):
            tracker()
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"--report_to {report_to}: {error}") from None
    return TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        report_to=report_to,
        logging_strategy="no" if report_to == "none" else "steps",
        logging_steps=0.005,  # of all steps
        use_cpu=not torch.cuda.is_available(),
        per_device_train_batch_size=1,  # one optimizer step, see PackedTrainer
        gradient_accumulation_steps=1,
        remove_unused_columns=False,
        label_names=[],
        save_strategy="no",  # Reporter decides
        save_total_limit=None,  # it goes by the files' times, and Reporter by the steps
        logging_nan_inf_filter=False,
        disable_tqdm=not sys.stderr.isatty(),
        **chosen,
    )


def train(
    model,
    tokenizer,
    lora,
    training: TrainingArguments,
    examples: ExampleRows,
    args,
    folder: Path,
    run: dict,
    process: Process,
    earlier,
) -> dict:
    """Train an adapter on `model` (4-bit, frozen) and leave it in `folder`/adapter, and on the way those of
    the runs that `earlier` (also.Also) lacks. Returns the record's `train`.

    `run` says what is being trained ({"method", "config", "data", "prompt_sha256", "checkpoint"}); a
    checkpoint of the same run is resumed, one of another refused."""
    checks.refuse_unknown_tokens(model, tokenizer, [[examples.rows.largest()]])
    padded = choose_batching(model, args.attn_implementation, training.device)
    model = with_adapter(model, lora, args)
    steps = plan_steps(len(examples), args.batch_size, args.epochs, args.seed)
    warmup = warmup_steps(training.warmup_steps, len(examples), args.batch_size)
    run = run | {
        "examples_sha256": sha256_of(examples),
        "schedule": f"constant after a linear warm-up of {warmup} steps",
    }
    checkpoint, spent, history = resuming.resume(Path(training.output_dir), run, args, process)
    each = lengths(examples)
    tokens = [sum(each[i] for i in step) for step in steps]
    kept = resuming.kept_plan(checkpoint, args)
    path = paths.choose(model, examples, tokens, args, padded, kept, training)
    training.gradient_checkpointing = path.checkpointing
    training.gradient_checkpointing_kwargs = {"use_reentrant": False}
    training.max_steps = len(steps)
    training._n_gpu = min(training.n_gpu, 1)  # a process drives one GPU; more take `accelerate launch`

    per_epoch = len(steps) // args.epochs
    if checkpoint:
        earlier.refuse_passed(len(history) / per_epoch, checkpoint)

    def described(took: dict) -> dict:
        """The record's `train` but for the adapter's hashes, from what the Reporter says of it."""
        return took | {
            "examples": len(examples),
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "batching": path.batching() | {"processes": processes.count()},
            "without_adapter": checks.without_adapter(model)
            if args.target_modules == ["all-linear"]
            else None,
            "schedule": run["schedule"],
            "examples_sha256": run["examples_sha256"],
        }

    def save(into: Path) -> dict:
        check_finite(model, args)
        adapter = save_adapter(model, tokenizer, into) if process.main else None
        config = adapter and fingerprint(into / "adapter", CONFIG)
        return {"adapter_sha256": adapter, "adapter_config_sha256": config}

    def leave(epochs: int) -> Callable[[dict], None]:
        return lambda took: earlier.leave(epochs, described(took), save)

    ends = {epochs * per_epoch: leave(epochs) for epochs in earlier.missing}
    reporter = Reporter(process, path, run, history, tokens, spent, per_epoch, ends)
    trainer = PackedTrainer(
        model=model,
        args=training,
        processing_class=tokenizer,
        path=path,
        examples=examples,
        steps=steps,
        warmup=warmup,
        history=history,
        reporter=reporter,
    )
    trainer.remove_callback(PrinterCallback)
    print(
        f"training   {len(examples):,} examples, {len(steps):,} steps, {sum(tokens):,} tokens, at most "
        f"{path.max_tokens:,} at once; {path.describe()}"
        + (f"; {processes.count()} processes" if processes.count() > 1 else "")
        + (f"; resumed from {checkpoint.name}" if checkpoint else ""),
        flush=True,
    )
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    took = reporter.taken(len(steps))
    hashes = save(folder)
    took["wall_seconds"] = spent["wall_seconds"] + process.seconds() - reporter.aside
    return described(took) | hashes


def step_line(done: int, tokens: Sequence[int], loss: float, speed: float) -> str:
    """How a training stands after `done` of the steps that have so many `tokens`, at `speed` tokens/s."""
    return (
        f"step {done:>6,}/{len(tokens):,}  loss {loss:.4f}  {speed:,.0f} tokens/s  "
        f"{device.peak_memory_gib():.1f} GiB  {sum(tokens[done:]) / speed:,.0f} s left"
    )


def taken(
    history: Sequence[Sequence],
    per_epoch: int,
    tokens: Sequence[int],
    seconds: float,
    spent: dict,
    process: Process,
) -> dict:
    """What the record says that these steps took, each of so many `tokens`: `seconds` of training, and what
    the attempts before have `spent`."""
    return {
        **losses(history, per_epoch),
        "steps": len(tokens),
        "tokens": sum(tokens),
        **resuming.so_far(spent, seconds, process),
        "earlier_seconds": spent["wall_seconds"],
        "tokens_per_second": sum(tokens) / seconds,
    }


def losses(history: Sequence[Sequence], per_epoch: int) -> dict:
    """What the record says of all steps ([step, loss, learned tokens]): the mean loss of the last epoch."""
    return {
        "loss": mean_loss(history[-per_epoch:]),
        "learned_tokens": sum(learned for _, _, learned in history),
        "loss_history": thin([[step + 1, float(loss)] for step, loss, _ in history]),
    }


def warmup_steps(share: float, examples: int, batch_size: int) -> int:
    """A `share` of the steps of one epoch, whatever --epochs says, so that a shorter run is the beginning of
    a longer one; at least one step."""
    return max(1, math.ceil(share * math.ceil(examples / batch_size)))


def with_adapter(model, lora, args):
    """`model` with new adapters by the seed, in train mode, once: nothing here evaluates. Raises UserError
    where PEFT can't give it some."""
    torch.manual_seed(args.seed)
    try:
        model = get_peft_model(model, lora).train()
    except (ValueError, TypeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        mend = "give --dropout 0" if "dropout" in reason else "name others by --target_modules"
        raise UserError(
            f"PEFT can't put these adapters on {type(model).__name__} ({reason}): {mend}"
        ) from None
    check_targets(model, args.target_modules)
    config = model.peft_config["default"]
    config.target_modules = sorted(config.target_modules)  # a set's order would differ from run to run
    bare = checks.without_adapter(model) if args.target_modules == ["all-linear"] else None
    if bare:
        print(f"adapters   none on {bare}", flush=True)
    return model


def check_targets(model, names: Sequence[str]) -> None:
    """Raise UserError for a name of --target_modules that no layer has."""
    adapted = [f".{name}" for name in model.base_model.targeted_module_names]
    for name in names:
        if name != "all-linear" and not any(layer.endswith(f".{name}") for layer in adapted):
            raise UserError(f"--target_modules {name}: the model has no such layer")


def save_adapter(model, tokenizer, folder: Path) -> str:
    """Write `folder`/adapter in one move; a reader never sees half of it. Returns its fingerprint."""
    return fingerprint(save_whole(folder / "adapter", model.save_pretrained, tokenizer.save_pretrained))


def save_whole(final: Path, *writers: Callable[[Path], object]) -> Path:
    """Let the `writers` write into one folder, in their order, which then appears in one move."""
    new = final.with_name(f".{final.name}")
    shutil.rmtree(new, ignore_errors=True)  # left by a run that was killed here
    for write in writers:
        write(new)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(new, final)
    return final


def mean_loss(history: Sequence[Sequence]) -> float:
    """Mean over the learned tokens of the steps in `history` ([step, loss, learned tokens])."""
    return sum(float(loss) * learned for _, loss, learned in history) / sum(
        learned for *_, learned in history
    )


def thin(history: list, most: int = 200) -> list:
    """Every n-th entry, the last included, so that at most `most` are left."""
    return history[:: -math.ceil(len(history) / most)][::-1]
