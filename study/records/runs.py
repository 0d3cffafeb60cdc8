"""Which settings make a run what it is: its folder's name, and whether it is finished already.

Nothing here needs torch, so a look-up answers at once.
"""

import argparse
import shlex
from collections.abc import Iterable
from pathlib import Path

from prompts import prompt_sha256
from study import checkpoint as checkpoints
from study import cli, device
from study.errors import UserError
from study.records.record import read, short_hash, status

NAMED = ("train_sample_fraction", "epochs", "lora_r", "dropout", "seed")  # stand in the run's name
READ = (  # what a model reads, in training and scoring alike
    *("pretrained_ckpt", "dataset", "train_file", "text_column", "label_column", "dialogue_column"),
    *("summary_column", "drop_overlap", "max_train_samples", "max_seq_length", "max_new_tokens"),
)
# With these a training is what it is; all other flags change its speed, its scoring or its place.
TRAINED = (*READ, "lora_alpha", "target_modules", "learning_rate", "batch_size", "loss_on")
# With these, beside the training, an evaluation is what it is.
SCORED = (*READ, "test_file", "validation_file", "max_eval_samples", "split", "decoding")
BASELINE = (*SCORED, "task", "prompt_type", "shots", "chat_template", "seed")


def changed(args: argparse.Namespace, names: Iterable[str], plain: dict) -> dict:
    """Those of the settings `names` that differ from `plain`, where both have them."""
    return {
        name: getattr(args, name)
        for name in names
        if hasattr(args, name) and name in plain and getattr(args, name) != plain[name]
    }


def training_settings(args: argparse.Namespace) -> tuple[str, ...]:
    """The flags that a training's result depends on."""
    return (*NAMED, *TRAINED, "test_file") if args.drop_overlap else (*NAMED, *TRAINED)


def experiment_dir(args: argparse.Namespace) -> Path:
    """Folder of a fine-tuning run: --experiment_dir, or a name built from its settings within --output_dir.

    Settings that the name does not spell out and that differ from their defaults add a short hash of
    themselves.
    """
    if args.experiment_dir:
        return Path(args.experiment_dir)
    name = (
        f"{args.task}-sampleFraction-{args.train_sample_fraction}_epochs-{args.epochs}_rank-{args.lora_r}"
        f"_dropout-{args.dropout}_seed-{args.seed}"
    )
    others = [setting for setting in training_settings(args) if setting not in NAMED]
    return Path(args.output_dir) / (name + suffix(changed(args, others, defaults(args.task)), "_"))


def baseline_dir(args: argparse.Namespace) -> Path:
    """Folder of a baseline's evaluation, named like `experiment_dir`."""
    if args.experiment_dir:
        return Path(args.experiment_dir)
    others = changed(args, BASELINE, {**defaults(None), **cli.DEFAULTS[args.task]})
    folder = Path(args.output_dir) / "baseline" / model_name(args.pretrained_ckpt) / args.task
    known = ("pretrained_ckpt", "prompt_type")
    return folder / (args.prompt_type + suffix({k: v for k, v in others.items() if k not in known}, "_"))


def model_name(checkpoint: str) -> str:
    """A hub id as one folder name, or the last part of a local path."""
    path = Path(checkpoint)
    return path.resolve().name if path.is_dir() else checkpoint.replace("/", "--")


def eval_name(args: argparse.Namespace, trained: dict) -> str:
    """The name eval.json, with a short hash if the settings differ from those of the training and the
    defaults."""
    plain = {**defaults(args.task), **trained, "max_eval_samples": None, "split": "test", "decoding": "free"}
    return f"eval{suffix(changed(args, SCORED, plain), '-')}.json"


def planned_eval(folder: Path, args: argparse.Namespace) -> str:
    """`eval_name` for --dry_run, where the training may be unfinished."""
    finished = not args.force and status(folder / "train.json") == "finished"
    return eval_name(args, finished_training(folder, args)["config"] if finished else vars(args))


def predictions_beside(path: Path) -> Path:
    """predictions.jsonl of an eval.json; both have the same hash, if any."""
    return path.with_name(path.name.replace("eval", "predictions", 1) + "l")


def defaults(task: str | None) -> dict:
    return vars(cli.build_parser(task, "").parse_args([]))


def suffix(settings: dict, mark: str) -> str:
    return mark + short_hash(settings) if settings else ""


def find_finished(
    path: Path, args: argparse.Namespace, settings: Iterable[str], data: dict, training: str | None = None
) -> dict | None:
    """The finished record at `path` if there is one and --force is not given; None too if it scored an older
    `training`.

    Raises UserError where it lacks something, was made with other `settings`, naming the flags, from other
    `data` (splits, described) or with another checkpoint than is here.
    """
    content = None if args.force else read(path)
    if not content or content["status"] != "finished" or content.get("training") != training:
        return None
    from study.report.collect import check_whole  # which imports this

    check_whole(content, path, "train" if path.name == "train.json" else "eval")
    check_same(content["config"], args, settings, path)
    check_same_data(content["data"], data, path)
    recorded, here = content.get("checkpoint"), checkpoints.identify(args.pretrained_ckpt)
    checkpoints.check_same(recorded, here, path, "--force redoes it", ends="eval" in content)
    return content


def identity(content: dict) -> dict:
    """What an evaluation's answers depend on, by its record so far."""
    return {name: content.get(name) for name in ("config_hash", "training", "data", "checkpoint")}


def check_same_data(recorded: dict, data: dict, where: Path) -> None:
    """Raise UserError if the splits in `data` hold other examples than those `recorded`."""
    for name, split in data.items():
        if recorded[name]["sha256"] != split["sha256"]:
            raise UserError(
                f"{where} was made from other {name} data than {split['source']} holds now: --force redoes it"
            )


def check_same(
    config: dict,
    args: argparse.Namespace,
    settings: Iterable[str],
    where: Path,
    mend: str = "use another --experiment_dir, or --force",
) -> None:
    """Raise UserError if the recorded `config` has other values of `settings` than the flags."""
    other = [
        f"--{name} {config.get(name)}, not {getattr(args, name)}"
        for name in settings
        if hasattr(args, name) and name in config and config.get(name) != getattr(args, name)
    ]
    if other:
        raise UserError(f"{where} belongs to a run with {'; '.join(other)}: {mend}")


def finished_training(folder: Path, args: argparse.Namespace) -> dict:
    """The record of the finished training in `folder`; `args` takes its settings over, but for those given as
    flags.

    Raises UserError where there is none, or where a flag contradicts how the adapter was trained.
    """
    if not folder.is_dir():
        raise UserError(
            f"--experiment_dir {folder}: there is no such run; train it first with the same flags"
        )
    content = read(folder / "train.json")
    if not content or content["status"] != "finished":
        state = content["status"] if content else "unfinished"
        raise UserError(
            f"--experiment_dir {folder}: its training is {state}; start the training script again"
        )
    needed = {"task", "config", "quantization", "prompt_sha256", "train", "finished"}
    if content.get("task") == "classification":
        needed.add("labels")
    lacking = sorted(needed - content.keys())
    if lacking:
        raise UserError(
            f"{folder / 'train.json'} lacks {', '.join(lacking)}: train the run again with --force"
        )
    if content["task"] != args.task:
        raise UserError(
            f"--experiment_dir {folder} is a {content['task']} run: score it with that task's script"
        )
    if content["prompt_sha256"] != prompt_sha256(args.task, "instruction"):
        raise UserError(
            f"{folder} was trained with another prompt than prompts.py has now: put that back, or train the "
            "run again with --force"
        )
    config = content["config"]
    given = [
        name
        for name in (*NAMED, "lora_alpha", "target_modules", "learning_rate", "batch_size", "loss_on")
        if name in args.given
    ]
    check_same(config, args, given, folder, "leave them out, or name another --experiment_dir")
    price = () if other_price(content, args) else ("price_per_hour", "gpu_name")
    for name, value in config.items():
        if name in (*NAMED, *TRAINED, "test_file", "validation_file", *price) and name not in args.given:
            setattr(args, name, value)
    return content


def other_price(content: dict, args: argparse.Namespace) -> bool:
    """Whether a training's price is not that of its evaluation: another one is given, by its figure or by the
    name of a card, or the training ran on another device, which is said."""
    from study.records.estimate import measured_on

    config = content["config"]
    if {"price_per_hour", "gpu_name"} & set(args.given):
        return True
    if not config.get("price_per_hour") and not config.get("gpu_name"):
        return False
    there, here = measured_on(content), device.name()
    if there != here:
        print(
            f"price      not the training's, which ran on {there or config['gpu_name']}, and this is {here}"
        )
    return there != here


def command(content: dict) -> str:
    """The command line of a record: its script with the flags that differ from their defaults."""
    config = content["config"]
    plain = {
        **defaults(None if "prompt_type" in config else content["task"]),
        **cli.DEFAULTS[content["task"]],
    }
    words = ["python", content["script"]]
    for name, value in config.items():
        if name in plain and value != plain[name] and value is not None:
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{name}", *map(str, values)]
    return shlex.join(words)
