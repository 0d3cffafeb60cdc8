"""Fine-tune an adapter with transformers' Trainer, so that a killed run goes on and ends as it would have.

An optimizer step sees `batch_size` examples, in an order that depends on the seed alone. They are split into
rows of at most `max_tokens_per_batch` tokens; the loss of the step is the sum over its learned tokens divided
by their count, however it is split.
"""

import contextlib
import importlib.util
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate.utils import broadcast
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from study import checkpoint as checkpoints_of_models
from study import checks, device
from study.encoding import Example, sha256_of
from study.errors import UserError, is_out_of_memory
from study.fast import decoder, memory, self_check
from study.model import CONFIG, fingerprint
from study.packing import (
    choose_batching,
    learned_places,
    loss_sum,
    plan_steps,
    seed_of,
    shared_prefix,
    split_to_fit,
)
from study.records import record, runs

PROGRESS = "progress.json"  # stands in a checkpoint once all of it has been written
ENOUGH_TOKENS = 4_096  # in a row: where fewer fit, checkpointing pays
MOST_TOKENS = 16_384  # full speed on the largest cards; more only costs memory


def fit_memory(model, examples: Sequence[Example], args, padded: bool, device) -> tuple[int, bool]:
    """Tokens per forward pass and whether to checkpoint: the flags', and for "auto" what the device's memory
    allows.

    On CUDA the memory of a token is measured, without checkpointing and, where less than a few examples would
    fit, with.
    """
    tokens, checkpointing = args.max_tokens_per_batch, args.gradient_checkpointing
    longest = max(len(example.ids) for example in examples)
    if device.type != "cuda" or (tokens != "auto" and checkpointing != "auto"):
        return (4096 if tokens == "auto" else tokens), checkpointing == "on"
    enough = max(longest, min(ENOUGH_TOKENS, args.batch_size * longest)) if tokens == "auto" else tokens
    for on in [checkpointing == "on"] if checkpointing != "auto" else [False, True]:
        room = tokens_that_fit(model, examples, args, padded, on, device)
        if room >= enough:
            break
    return (max(longest, min(MOST_TOKENS, room)) if tokens == "auto" else tokens), on


def tokens_that_fit(model, examples, args, padded, checkpointing, device) -> int:
    """How many tokens one forward and backward pass can take, from the memory that a small one takes."""
    group = sorted(examples, key=lambda example: len(example.ids))[-4:]
    count = sum(len(example.ids) for example in group)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        with torch.autocast("cuda", torch.bfloat16, enabled=device.compute_dtype() == torch.bfloat16):
            loss_sum(model, group, args.loss_on, padded, device).backward()
        used = torch.cuda.max_memory_allocated(device) - before
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        used = math.inf
    model.zero_grad(set_to_none=True)
    if checkpointing:
        model.gradient_checkpointing_disable()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0] - trainable * 12  # gradients and two AdamW moments in float32
    torch.cuda.reset_peak_memory_stats(device)
    return int(0.85 * free / (used / count))


class PackedTrainer(Trainer):
    """A Trainer whose batch is one whole optimizer step, split to fit the device within `training_step`."""

    def __init__(
        self, *, examples, steps, warmup, max_tokens, loss_on, padded, fast, history, progress, **options
    ):
        super().__init__(train_dataset=list(range(len(steps))), callbacks=[progress], **options)
        self.progress, self.warmup = progress, warmup
        self.examples, self.steps, self.max_tokens = examples, steps, max_tokens
        self.loss_on, self.padded, self.fast, self.history = loss_on, padded, fast, history
        self.lengths = [len(example.ids) for example in examples]

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
                "tokens_per_second": self.progress.speed(self.state),
                "memory_gib": device.peak_memory_gib(),
            }
        super().log(logs, start_time)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Forward and backward of one optimizer step. Returns its loss, the mean over its learned tokens.

        A step that exceeds the memory is begun again with half as many tokens at once.
        """
        [number] = inputs
        indices = self.steps[number]
        learned = sum(len(learned_places(self.examples[i], self.loss_on)) for i in indices)
        while True:
            try:
                total = self.pass_by_pass(model, number, indices, learned)
                break
            except RuntimeError as error:
                longest = max(self.lengths[i] for i in indices)
                given_up = self.max_tokens <= longest or self.args.world_size > 1
                if given_up or not is_out_of_memory(error):
                    raise
                model.zero_grad(set_to_none=True)
                self.max_tokens = max(longest, self.max_tokens // 2)
            torch.cuda.empty_cache()
            tqdm.write(f"out of memory: going on with {self.max_tokens:,} tokens at once")
        self.history.append([number, total, learned])
        return total

    def pass_by_pass(self, model, number: int, indices: list[int], learned: int) -> torch.Tensor:
        rank, world = self.args.process_index, self.args.world_size
        # A process without an example repeats the first one with weight 0, since all must take part in the
        # exchange.
        mine, weight = (indices[rank::world], 1) if rank < len(indices) else (indices[:1], 0)
        groups = split_to_fit(mine, self.lengths, self.max_tokens, self.padded)
        # The dropout of a step depends on seed and step only, so a resumed run draws what the first one would
        # have.
        seed = seed_of(self.args.seed, number, rank)
        torch.manual_seed(seed)
        total = torch.zeros((), device=self.args.device)
        for i, group in enumerate(groups):
            last = i == len(groups) - 1
            with (
                contextlib.nullcontext() if last else self.accelerator.no_sync(model),
                self.compute_loss_context_manager(),
            ):
                examples = [self.examples[j] for j in group]
                if self.fast:
                    loss = self.fast.loss_sum(examples, self.loss_on, (seed + i) % 2**31)
                else:
                    loss = loss_sum(model, examples, self.loss_on, self.padded, self.args.device)
            self.accelerator.backward(weight * world * loss / learned)  # the exchange averages over processes
            total += weight * loss.detach() / learned
        return self.accelerator.reduce(total, "sum") if world > 1 else total


class Progress(TrainerCallback):
    """Print a line now and then; save checkpoints as often as costs a twentieth of the time, and mark the
    whole ones."""

    def __init__(self, run: dict, history: list, tokens: list[int], spent: dict):
        self.run, self.history, self.tokens, self.spent = run, history, tokens, spent
        self.saving = 0.1  # seconds that a checkpoint takes: a guess until one has been written

    def on_train_begin(self, args, state, control, **kwargs):
        self.began = self.saved = time.monotonic()
        self.first = state.global_step

    def seconds(self) -> float:
        return self.spent["seconds"] + time.monotonic() - self.began

    def on_step_end(self, args, state, control, **kwargs):
        last = state.global_step == state.max_steps
        if state.global_step % max(1, state.max_steps // 10) == 0 or last:
            self.say(args, state)
        due = time.monotonic() - self.saved > 20 * self.saving and not last
        if args.world_size > 1:  # saving takes all processes, so the first one's clock counts
            due = bool(broadcast(torch.tensor(due, device=args.device)))
        if due:
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
        speed, left = self.speed(state), sum(self.tokens[state.global_step :])
        tqdm.write(
            f"step {state.global_step:>6,}/{state.max_steps:,}  loss {self.loss(args, state):.4f}  "
            f"{speed:,.0f} tokens/s  {device.peak_memory_gib():.1f} GiB  {left / speed:,.0f} s left"
        )

    def on_save(self, args, state, control, **kwargs):
        check_finite(kwargs["model"], args)
        if state.is_world_process_zero:
            spent = {
                "seconds": self.seconds(),
                "wall_seconds": self.spent["wall_seconds"] + record.wall_seconds(),
                "peak_memory_gib": max(self.spent["peak_memory_gib"], device.peak_memory_gib()),
            }
            history = [[step, float(loss), learned] for step, loss, learned in self.history]
            progress = {"schema": record.SCHEMA, **self.run, "spent": spent, "history": history}
            progress["plan"] = self.plan()
            folder = Path(args.output_dir)
            record.write_json(folder / f"checkpoint-{state.global_step}" / PROGRESS, progress)
            discard_older(folder)
        self.saving, self.saved = time.monotonic() - self.saved, time.monotonic()


def discard_older(folder: Path) -> None:
    """Keep the two newest checkpoints, by their steps: a clock that was set back makes new files old."""
    for old in checkpoints_in(folder)[:-2]:
        shutil.rmtree(old)


def check_finite(model, args) -> None:
    """Raise UserError if training has made a weight of the adapter infinite or no number."""
    if not all(torch.isfinite(p).all() for p in model.parameters() if p.requires_grad):
        raise diverged("the adapter's weights are no longer numbers", args)


def diverged(what: str, args) -> UserError:
    rate = f"--learning_rate {args.learning_rate:g}"
    return UserError(f"{what}: {rate} is too high for these examples; give a lower one")


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints that training has left, oldest first; copies that someone made of them are not ours."""
    ours = re.compile(r"checkpoint-[1-9][0-9]*")
    found = [path for path in folder.glob("checkpoint-*") if ours.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written whole; others are removed."""
    whole = None
    for checkpoint in checkpoints_in(folder):
        if (checkpoint / PROGRESS).is_file():
            whole = checkpoint
        elif device.is_main_process():
            shutil.rmtree(checkpoint)
    return whole


def settings(folder: Path, report_to: str, **chosen) -> TrainingArguments:
    """transformers' TrainingArguments: those `chosen` by a script, and what all runs share.

    Raises UserError for a tracker that transformers does not know or that is not installed.
    """
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
        save_strategy="no",  # Progress decides
        save_total_limit=None,  # it goes by the files' times, and Progress by the steps
        logging_nan_inf_filter=False,
        ddp_find_unused_parameters=False,
        disable_tqdm=not sys.stderr.isatty(),
        **chosen,
    )


def train(
    model,
    tokenizer,
    lora,
    training: TrainingArguments,
    examples: list[Example],
    args,
    folder: Path,
    run: dict,
) -> dict:
    """Train an adapter on `model` (4-bit, frozen) and leave it in `folder`/adapter. Returns the record's
    `train`.

    `run` says what is being trained ({"config", "data", "prompt_sha256", "checkpoint"}); a checkpoint of the
    same run is resumed, one of another refused."""
    checks.refuse_unknown_tokens(model, tokenizer, [example.ids for example in examples])
    padded = choose_batching(model, args.attn_implementation, training.device)
    model = with_adapter(model, lora, args)
    steps = plan_steps(len(examples), args.batch_size, args.epochs, args.seed)
    warmup = warmup_steps(training.warmup_steps, len(examples), args.batch_size)
    run = run | {
        "examples_sha256": sha256_of([[example.answer_start, example.ids] for example in examples]),
        "schedule": f"constant after a linear warm-up of {warmup} steps",
    }
    checkpoint, spent, history = resume(Path(training.output_dir), run, args)
    kept = kept_plan(checkpoint, args)
    tokens = [sum(len(examples[i].ids) for i in step) for step in steps]
    fast, slow = None, why_slow(model, args, padded, training)
    if kept and not kept["fused"]:
        slow = slow or "as before it was stopped"
    if slow is None:
        fast, slow = fast_path(model, examples, tokens, args, kept)
    if slow and kept and kept["fused"]:
        print("resumed    by other layers than it began with: its adapter will be another one by rounding")
    if fast:
        max_tokens, checkpointing = fast.plan.tokens, False
    elif kept and not kept["fused"]:
        max_tokens, checkpointing = kept["tokens"], kept["gradient_checkpointing"]
    else:
        max_tokens, checkpointing = fit_memory(model, examples, args, padded, training.device)
    training.gradient_checkpointing = checkpointing
    training.gradient_checkpointing_kwargs = {"use_reentrant": False}
    training.max_steps = len(steps)
    training._n_gpu = min(training.n_gpu, 1)  # a process drives one GPU; more take `accelerate launch`

    progress = Progress(run, history, tokens, spent)
    trainer = PackedTrainer(
        model=model,
        args=training,
        processing_class=tokenizer,
        examples=examples,
        steps=steps,
        warmup=warmup,
        max_tokens=max_tokens,
        loss_on=args.loss_on,
        padded=padded,
        fast=fast,
        history=history,
        progress=progress,
    )
    trainer.remove_callback(PrinterCallback)
    progress.plan = lambda: {
        "fused": bool(fast),
        "tokens": trainer.max_tokens,
        "gradient_checkpointing": checkpointing,
        **({"keep": fast.plan.keep, "on_host": fast.plan.on_host} if fast else {}),
    }
    plain = (
        f"plain layers ({slow}), {'padded' if padded else 'packed'}, {model.config._attn_implementation} "
        f"attention, checkpointing {'on' if checkpointing else 'off'}"
    )
    print(
        f"training   {len(examples):,} examples, {len(steps):,} steps, {sum(tokens):,} tokens, at most "
        f"{max_tokens:,} at once; "
        + (f"fused layers, {fast.plan}" if fast else plain)
        + (f"; resumed from {checkpoint.name}" if checkpoint else ""),
        flush=True,
    )
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = progress.seconds()
    check_finite(model, args)
    adapter = save_adapter(model, tokenizer, folder) if device.is_main_process() else None
    per_epoch = len(steps) // args.epochs
    return {
        "loss": mean_loss(history[-per_epoch:]),
        "examples": len(examples),
        "steps": len(steps),
        "tokens": sum(tokens),
        "learned_tokens": sum(learned for _, _, learned in history),
        "seconds": seconds,
        "wall_seconds": spent["wall_seconds"] + record.wall_seconds(),
        "tokens_per_second": sum(tokens) / seconds,
        "peak_memory_gib": max(spent["peak_memory_gib"], device.peak_memory_gib()),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "batching": {
            "padded": padded,
            "attention": "fused" if fast else model.config._attn_implementation,
            "max_tokens_per_batch": trainer.max_tokens,
            "gradient_checkpointing": fast.plan.keep != "all" if fast else checkpointing,
            "plan": str(fast.plan) if fast else None,
            "not_fused": slow,
            "processes": training.world_size,
        },
        "without_adapter": checks.without_adapter(model) if args.target_modules == ["all-linear"] else None,
        "schedule": run["schedule"],
        "examples_sha256": run["examples_sha256"],
        "adapter_sha256": adapter,
        "adapter_config_sha256": adapter and fingerprint(folder / "adapter", CONFIG),
        "loss_history": thin([[step + 1, float(loss)] for step, loss, _ in history]),
    }


def warmup_steps(share: float, examples: int, batch_size: int) -> int:
    """A `share` of the steps of one epoch, whatever --epochs says, so that a shorter run is the beginning of
    a longer one; at least one step."""
    return max(1, math.ceil(share * math.ceil(examples / batch_size)))


def with_adapter(model, lora, args):
    """`model` with new adapters by the seed, in train mode, once: nothing here evaluates. Raises UserError
    where PEFT can't give it some."""
    from peft import get_peft_model

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


def why_slow(model, args, padded: bool, training: TrainingArguments) -> str | None:
    """The reason why training can't take the fast path, or None."""
    if training.device.type != "cuda":
        return "no CUDA"
    if device.compute_dtype() != torch.bfloat16 or not importlib.util.find_spec("triton"):
        return "no bfloat16 or no triton here"
    if training.world_size > 1:
        return "several processes"
    if padded:
        return "padded"
    if args.attn_implementation != "auto":
        return f"--attn_implementation {args.attn_implementation}"

    return self_check.attempt(lambda: decoder.why_not_train(model))


def fast_path(
    model, examples: Sequence[Example], tokens: Sequence[int], args, kept: dict | None = None
) -> tuple:
    """The model's fused layers, with the plan that was `kept` or that fits the device's free memory, and
    None; or None and the reason why they can't be used."""
    made = []
    slow = self_check.attempt(lambda: made.append(fused_layers(model, examples, tokens, args, kept)))
    slow = slow or self_check.training(model, made[0], examples, args.loss_on)
    return (None, slow) if slow else (made[0], None)


def fused_layers(model, examples: Sequence[Example], tokens: Sequence[int], args, kept: dict | None):
    from study.fast.train import FusedModel  # needs Triton

    if kept:
        return FusedModel(model, memory.Plan(kept["tokens"], kept["keep"], kept["on_host"]))
    longest = max(len(example.ids) for example in examples)
    given = args.max_tokens_per_batch
    wanted = None if given == "auto" else max(longest, min(given, max(tokens)))
    torch.cuda.empty_cache()
    free = int(0.92 * torch.cuda.mem_get_info()[0])
    learned = args.batch_size * max(len(learned_places(example, args.loss_on)) for example in examples)
    step = min(MOST_TOKENS, max(tokens)), learned
    shared = shared_prefix(examples, args.loss_on)
    plan = memory.choose_plan(model, free, longest, step, wanted, args.gradient_checkpointing, shared)
    return FusedModel(model, plan)


def resume(checkpoints: Path, run: dict, args) -> tuple[Path | None, dict, list]:
    """The checkpoint to go on from, what the run has spent, and its losses so far."""
    nothing = {"seconds": 0.0, "wall_seconds": 0.0, "peak_memory_gib": 0.0}
    if args.force:
        remove_checkpoints(checkpoints)
        return None, nothing, []  # the other processes don't wait to see them gone
    checkpoint = last_checkpoint(checkpoints)
    if checkpoint is None:
        return None, nothing, []
    progress = read_progress(checkpoint)
    runs.check_same(progress["config"], args, runs.training_settings(args), checkpoint)
    runs.check_same_data(progress["data"], run["data"], checkpoint)
    redo = "--force redoes it"
    checkpoints_of_models.check_same(progress.get("checkpoint"), run.get("checkpoint"), checkpoint, redo)
    for name, what in {
        "prompt_sha256": "another prompt than prompts.py has now",
        "examples_sha256": "other tokens than the examples have now",
        "schedule": "another schedule of learning rates",
    }.items():
        before = progress.get(name, None if name == "schedule" else run.get(name))
        if name in run and before != run[name]:
            raise UserError(f"{checkpoint} was made with {what}: {redo}")
    return checkpoint, progress["spent"], progress["history"]


def read_progress(checkpoint: Path) -> dict:
    path = checkpoint / PROGRESS
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): remove {checkpoint} and start again") from None


def kept_plan(checkpoint: Path | None, args) -> dict | None:
    """How the run computed before it was stopped, which also decides what dropout draws; None where its flags
    now ask for something else, or other code wrote a plan that this one does not know."""
    progress = read_progress(checkpoint) if checkpoint else {}
    asked = ("max_tokens_per_batch", "gradient_checkpointing", "attn_implementation")
    same = all(progress["config"].get(name) == getattr(args, name) for name in asked if progress)
    plan = progress.get("plan")
    known = plan and (not plan["fused"] or plan.get("keep") in memory.KEEPS)
    return plan if same and known else None


def remove_checkpoints(folder: Path) -> None:
    """Remove a run's own checkpoints, and their folder if nothing else is in it."""
    if device.is_main_process():
        for checkpoint in checkpoints_in(folder):
            shutil.rmtree(checkpoint, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()


def discard_checkpoints(folder: Path) -> None:
    """Remove what only an unfinished run needs."""
    remove_checkpoints(folder / "checkpoints")


def save_adapter(model, tokenizer, folder: Path) -> str:
    """Write `folder`/adapter in one move; a reader never sees half of it. Returns its fingerprint."""
    new, final = folder / ".adapter", folder / "adapter"
    shutil.rmtree(new, ignore_errors=True)  # left by a run that was killed here
    model.save_pretrained(new, safe_serialization=True)
    tokenizer.save_pretrained(new)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(new, final)
    return fingerprint(final)


def mean_loss(history: Sequence[Sequence]) -> float:
    """Mean over the learned tokens of the steps in `history` ([step, loss, learned tokens])."""
    return sum(float(loss) * learned for _, loss, learned in history) / sum(
        learned for *_, learned in history
    )


def thin(history: list, most: int = 200) -> list:
    """Every n-th entry, the last included, so that at most `most` are left."""
    return history[:: -math.ceil(len(history) / most)][::-1]
