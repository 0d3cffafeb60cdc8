"""Which settings make a run what it is: its folder's name, and whether it is finished already.

Nothing here needs torch, so a look-up answers at once.
"""

import argparse
import shlex
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from prompts import prompt_sha256
from study import checkpoint as checkpoints
from study import cli, device
from study.errors import UserError
from study.records import cost
from study.records.record import read, short_hash, status
from study.records.schema import HELD_OUT, LATER, METHODS, SCORING, check, lookup, part_of, settings_of


def changed(args: argparse.Namespace, names: Iterable[str], plain: dict) -> dict:
    """Those of the settings `names` that differ from `plain`, where both have them."""
    return {
        name: getattr(args, name)
        for name in names
        if hasattr(args, name) and name in plain and getattr(args, name) != plain[name]
    }


def folder_of(args: argparse.Namespace, method: str) -> Path:
    """Folder of a run: --experiment_dir, or a name built from the settings of its method, in --output_dir.

    Settings that the name does not spell out and that differ from their defaults add a short hash of
    themselves.
    """
    if isinstance(args.experiment_dir, list):
        raise UserError("--experiment_dir: a training has one folder; scoring takes several")
    if args.experiment_dir:
        return Path(args.experiment_dir)
    about, part = METHODS[method], "train" if METHODS[method].trains else "eval"
    named = {} if about.model else {"pretrained_ckpt": model_name(args.pretrained_ckpt)}
    name = about.folder.format(**vars(args) | named)
    settings = settings_of(method, part, args.drop_overlap)
    others = [setting for setting in settings if setting not in about.spelled]
    return Path(args.output_dir) / (name + suffix(changed(args, others, defaults(args)), "_"))


def model_name(checkpoint: str) -> str:
    """A hub id as one folder name, or the last part of a local path."""
    path = Path(checkpoint)
    return path.resolve().name if path.is_dir() else checkpoint.replace("/", "--")


def eval_name(args: argparse.Namespace, trained: dict) -> str:
    """The name eval.json, with a short hash if the settings differ from those of the training and the
    defaults."""
    plain = {**defaults(args), **trained, "max_eval_samples": None, "split": "test", "decoding": "free"}
    return f"eval{suffix(changed(args, SCORING, plain), '-')}.json"


def planned_eval(folder: Path, args: argparse.Namespace) -> tuple[argparse.Namespace, Path]:
    """The flags and the record of an evaluation for --dry_run, where the training may be unfinished."""
    if args.force or status(folder / "train.json") != "finished":
        return args, folder / eval_name(args, vars(args))
    trained = finished_training(folder, args)
    args = with_settings_of(trained, args)
    return args, folder / eval_name(args, trained["config"])


def predictions_beside(path: Path) -> Path:
    """predictions.jsonl of an eval.json; both have the same hash, if any."""
    return path.with_name(path.name.replace("eval", "predictions", 1) + "l")


def defaults(args: argparse.Namespace) -> dict:
    """The flags of the same script as nobody has changed them."""
    kind = getattr(args, "kind", "prompt" if hasattr(args, "prompt_type") else "causal")
    plain = plain_flags(None if hasattr(args, "task_type") else args.task, kind)
    return plain | {name: value for name, value in cli.open_defaults(args).items() if plain.get(name) is None}


@cache
def plain_flags(task: str | None, kind: str) -> dict:
    """Made once for all runs of a script, since a parser takes as long as a record to read. Not to be
    changed."""
    return vars(cli.build_parser(task, "", kind).parse_args([]))


def suffix(settings: dict, mark: str) -> str:
    return mark + short_hash(settings) if settings else ""


def find_finished(
    path: Path, args: argparse.Namespace, method: str, data: dict, trained: dict | None = None
) -> dict | None:
    """The finished record at `path` if there is one and --force is not given; None too if it scored another
    adapter than that of the record `trained`.

    Raises UserError where it lacks something, was made by another method or with other settings of `method`,
    naming the flags, from other `data` (splits, described) or with another checkpoint than is here.
    """
    content = None if args.force else read(path)
    if not content or content["status"] != "finished":
        return None
    check_same_method(content.get("method"), method, path)
    if trained and not has_scored(path, content, trained):
        return None
    check(content, path)
    check_same(content["config"], args, settings_of(method, part_of(path), args.drop_overlap), path)
    check_same_data(content["data"], data, path)
    if not METHODS[method].model:
        recorded, here = content.get("checkpoint"), checkpoints.identify(args.pretrained_ckpt)
        checkpoints.check_same(recorded, here, path, "--force redoes it", ends="eval" in content)
    return content


def scored_adapter(trained: dict) -> dict:
    """What an evaluation's record says of the adapter or model that it scored: the SHA-256 of its weights, or
    of a training that did not record it when that ended."""
    return learned(trained.get("train")) or {"training": trained["finished"]}


def learned(content: dict | None) -> dict:
    """The SHA-256 of what was trained, under its name: an adapter, or a whole model."""
    names = ("adapter_sha256", "model_sha256")
    return {name: content[name] for name in names if (content or {}).get(name)}


def has_scored(path: Path, content: dict, trained: dict) -> bool:
    """Whether the evaluation `content` at `path` is of the adapter of the training `trained`, and its file
    still named by what it has otherwise than that: a training redone with other flags may leave the same
    adapter. Raises UserError where that can't be told."""
    known = learned(content), learned(trained.get("train"))
    if not all(known):
        return content.get("training") == trained["finished"]
    if known[0] != known[1]:
        return False
    check(content, path)
    return eval_name(flags_of(content), trained["config"]) == path.name


def identity(content: dict) -> dict:
    """What an evaluation's answers depend on, by its record so far."""
    known = {name: content.get(name) for name in ("config_hash", "training", "data", "checkpoint")}
    return known | learned(content)


def check_same_method(recorded: str | None, method: str, where: Path) -> None:
    """Raise UserError if what lies at `where` is of another method; a record that names none is damaged."""
    if recorded not in (None, method):
        raise UserError(
            f"{where} belongs to a run of {recorded}, not of {method}: use another --experiment_dir, or "
            "--force"
        )


def check_same_data(recorded: dict, data: dict, where: Path) -> None:
    """Raise UserError if the splits in `data` hold other examples than those `recorded`."""
    for name, split in data.items():
        if lookup(recorded, f"{name}.sha256") != split["sha256"]:
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
        if hasattr(args, name)
        and (name in config or name in LATER)
        and config.get(name) != getattr(args, name)
    ]
    if other:
        raise UserError(f"{where} belongs to a run with {'; '.join(other)}: {mend}")


def finished_training(folder: Path, args: argparse.Namespace) -> dict:
    """The record of the finished QLoRA training in `folder`.

    Raises UserError where there is none or one of another method, or where a flag contradicts how the adapter
    was trained.
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
    if content.get("method") in [method for method in METHODS if method != "qlora"]:
        raise UserError(
            f"{folder / 'train.json'} is of the method {content['method']}, which {content.get('script')} "
            "scores too: start that instead"
        )
    needed = {"task", "method", "config", "quantization", "prompt_sha256", "train", "finished"}
    if content.get("task") == "classification":
        needed.add("labels")
    lacking = sorted(needed - content.keys())
    if lacking:
        raise UserError(
            f"{folder / 'train.json'} lacks {', '.join(lacking)}: train the run again with --force"
        )
    check(content, folder / "train.json")
    if content["task"] != args.task:
        raise UserError(
            f"--experiment_dir {folder} is a {content['task']} run: score it with that task's script"
        )
    if content["prompt_sha256"] != prompt_sha256(args.task, "instruction"):
        raise UserError(
            f"{folder} was trained with another prompt than prompts.py has now: put that back, or train the "
            "run again with --force"
        )
    given = [name for name in learned_with(content) if name in args.given]
    check_same(content["config"], args, given, folder, "leave them out, or name another --experiment_dir")
    return content


def learned_with(trained: dict) -> list[str]:
    """The settings of a training that an evaluation of it can't have otherwise: not those of the texts, which
    it may read elsewhere, but which of them it never saw."""
    return [name for name in METHODS[trained["method"]].settings if name not in SCORING or name in HELD_OUT]


def with_settings_of(trained: dict, args: argparse.Namespace) -> argparse.Namespace:
    """The flags of an evaluation: those given, and of the others the settings of the training `trained`."""
    settings = {
        *METHODS[trained["method"]].settings,
        "test_file",
        "validation_file",
        "unseen_labels",
        "delimiter",
    }
    if not has_other_price(trained, args):
        settings |= {"price_per_hour", "gpu_name"}
    if f"{args.split}_file" in args.given:  # instead of what the training held out
        settings -= {f"{args.split}_fraction"}
    config, given = trained["config"], {*args.given}
    for held_out in HELD_OUT:  # a file in the place of what is not scored changes nothing
        other = held_out.removesuffix("_fraction")
        given -= {f"{other}_file"} if config.get(held_out) and other != args.split else set()
    taken = {name: config[name] for name in settings - given if name in config}
    return argparse.Namespace(**vars(args) | taken)


def has_other_price(trained: dict, args: argparse.Namespace) -> bool:
    """Whether a training's price is not that of its evaluation: another one is given, by its figure or by the
    name of a card, or the training ran on another device, which is said."""
    config = trained["config"]
    if {"price_per_hour", "gpu_name"} & {*args.given}:
        return True
    if not config.get("price_per_hour") and not config.get("gpu_name"):
        return False
    there, here = cost.measured_on(trained), device.name()
    if there != here:
        print(
            f"price      not the training's, which ran on {there or config['gpu_name']}, and this is {here}"
        )
    return there != here


def flags_of(content: dict) -> argparse.Namespace:
    """The flags that a record was made with."""
    return argparse.Namespace(**content["config"] | {"task": content["task"]})


def command(content: dict) -> str:
    """The command line of a record: its script with the flags that differ from their defaults."""
    if "serve" in content:
        return load_command(content)
    plain = defaults(flags_of(content))
    chosen = {name: value for name, value in content["config"].items() if value != plain.get(name, value)}
    return shlex.join(["python", content["script"], *words_of(chosen)])


def load_command(content: dict) -> str:
    """That of a load test, whose own flags' defaults are not known here: these all stand there."""
    flags = flags_of(content)
    flags.kind = "prompt"
    plain = defaults(flags) | {"task": flags.task}
    config = {name: value for name, value in content["config"].items() if value is not False}
    chosen = {name: value for name, value in config.items() if value != plain.get(name)}
    if isinstance(chosen.get("rates"), list):
        chosen["rates"] = ",".join(f"{rate:g}" for rate in chosen["rates"])
    return shlex.join(["python", content["script"], *words_of(chosen)])


def words_of(flags: dict) -> list[str]:
    """Of a command line: flags with their values, a switch without one."""
    words = []
    for name, value in flags.items():
        if value is not None:
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{name}", *map(str, values)]
    return words
