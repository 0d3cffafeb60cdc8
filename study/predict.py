"""Answers to new texts by a fine-tuned model: a file without labels -> the same file with the answers in more
columns.

Beside it stands FILE.json, a record of what it was made from, by which it is found again when finished.
"""

import argparse
import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from prompts import parse_label, parse_summary
from study import checkpoint, data, device, several, tabular
from study.errors import UserError
from study.files import DELIMITERS, bare_suffix, content_of, named, refuse_other_formats
from study.records import cost, estimate, record, runs
from study.records.schema import SCHEMA, part_of
from study.records.summary import MANY

SHOWN = 5  # rows without a text, beyond which their number must do


def run(folder: Path, args: argparse.Namespace, process: device.Process, bases: several.Base) -> None:
    """Answer the texts of --predict_file by the run in `folder`; with --dry_run say what that would be."""
    trained = runs.finished_training(folder, args)
    args = runs.with_settings_of(trained, args)
    estimate.check_gpu_name(args)
    source = Path(args.predict_file)
    unpacked = content_of(source, "--predict_file")
    sha256 = hashlib.sha256(unpacked).hexdigest()
    rows, texts, problems = read(args, source, unpacked)
    path = place_of(args, folder, source, sha256)
    made_from = made_of(args, trained) | {"input_sha256": sha256}
    what = say_texts(source, texts, problems)
    if args.dry_run:
        state = look_up(path, made_from, args.force)["status"]
        return print(f"{args.task} with {args.pretrained_ckpt} -> {path}\n{what}\n{state}\t{path}")

    with record.locked(folder, process):
        found = look_up(path, made_from, args.force)
        if found["status"] == "finished":
            return print(f"finished   {path}\n{outcome(found)}")
        print(f"run        {folder}\nmodel      {args.pretrained_ckpt} with its adapter")
        print(what, flush=True)
        with recorded(path, args, process, made_from) as content:
            content["rows"] = {"all": len(rows.values), "without_text": len(problems)}
            answers, kept = answer(content, [*texts.values()], path, trained, args, process, bases)
            columns = columns_of(answers, args, trained)
            if process.main:
                tabular.write(path, rows, in_rows(columns, [*texts], len(rows.values)))
            content["predictions"] = describe(answers, columns, process)
            spent = content["predictions"]["wall_seconds"]
            content["cost"] = cost.of_run(args, device.name(), spent, process.count)
        kept.discard()
        print(f"{outcome(content)}\nwrote      {path}")


def read(args: argparse.Namespace, source: Path, content: bytes) -> tuple[tabular.Rows, dict, list[str]]:
    """The rows of a file; the texts to answer, by the numbers of their rows; and what is wrong with each row
    that has none."""
    flag = f"--{data.COLUMNS[args.task][0]}"
    columns, marks = {flag: getattr(args, flag[2:])}, args.delimiter or ""
    if "delimiter" not in args.given:  # it is the training's, whose files may have had another
        marks += DELIMITERS.get(bare_suffix(source), "")
    rows = tabular.read(source, content, "--predict_file", columns, marks)
    taken = [name for name in ("prediction", "parsed", "confidence") if name in rows.names]
    if taken:
        raise UserError(
            f'--predict_file {source} has a column "{taken[0]}" already, where answers would stand: rename it'
        )
    texts, problems = {}, []
    for i, (row, place) in enumerate(zip(rows.values, rows.places, strict=True)):
        try:
            text = text_of(row, flag, columns, place, rows.faults.get(i))
        except UserError as error:
            problems.append(str(error))
        else:
            texts[i] = text
    if not texts:
        raise UserError(f"--predict_file {source} has no text to answer: {problems[0]}")
    return rows, texts, problems


def text_of(row: dict, flag: str, columns: dict, place: str, fault: str | None) -> str:
    """The text of a row, as training and scoring read it. Raises UserError for a row that has none."""
    if fault:
        raise UserError(f"{place} {fault}")
    twice = {*named(columns)} & {*getattr(row, "twice", ())}
    if twice:
        raise UserError(f'{place} has the key "{min(twice)}" twice')
    text = data.read_text(row, flag, columns, place)
    if not text:
        raise UserError(f"{place} is empty in {', '.join(named(columns))}")
    return text


def place_of(args: argparse.Namespace, folder: Path, source: Path, sha256: str) -> Path:
    """Where the answers shall stand. Raises UserError for a place that is another file's."""
    if not args.predictions_file:
        return folder / f"predictions-{sha256[:12]}{''.join(endings(source))}"
    path = Path(args.predictions_file)
    where = f"--predictions_file {path}"
    refuse_other_formats(path, "--predictions_file")
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{where} is a folder: name a file" if path.is_dir() else f"{where}: no such folder")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{where}: its folder can't be written to: name another")
    if any(place.exists() and place.samefile(source) for place in (path, record_of(path))):
        raise UserError(f"{where} would replace the --predict_file itself: name another")
    scored = path.parent.samefile(folder) and re.fullmatch(r"predictions(-\w{8})?\.jsonl", path.name)
    if scored or part_of(path) or part_of(record_of(path)):
        raise UserError(f"{where} is the name of what an evaluation leaves: name another")
    return path


def endings(source: Path) -> tuple[str, str]:
    """The format of a file, and ".gz" if it is unpacked."""
    return bare_suffix(source), ".gz" * (source.suffix == ".gz")


def record_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def made_of(args: argparse.Namespace, trained: dict) -> dict:
    """What answers to the same texts depend on."""
    names = [data.COLUMNS[args.task][0], "max_seq_length", "max_new_tokens"]
    names += ["decoding"] * (args.task == "classification")
    return runs.scored_adapter(trained) | {"settings": {name: getattr(args, name) for name in names}}


def look_up(path: Path, made_from: dict, force: bool) -> dict:
    """The record of the answers at `path`, with the status "not started" if there is none, "unfinished" if
    they have to be made or, by `force`, made again. Raises UserError where `path` is made from something
    else."""
    beside = record_of(path)
    try:
        found = record.read(beside)
    except UserError:
        raise UserError(f"{beside} is no record of predictions: name another --predictions_file") from None
    if not path.exists():
        return {"status": "unfinished" if found else "not started"}
    if not found or "made_from" not in found:
        raise UserError(
            f"{path} is there already, and no record {beside.name} says what it was made from: name another "
            "--predictions_file"
        )
    other = differences(found["made_from"], made_from)
    if other and not force:
        raise UserError(f"{path} was made from {other}: name another --predictions_file, or --force")
    return {"status": "unfinished"} if force or found["status"] != "finished" else found


def differences(before: dict, now: dict) -> str:
    """In words what of `before` is not so `now`."""
    was, settings = before.get("settings", {}), now["settings"]
    other = ["another input"] * (before.get("input_sha256") != now["input_sha256"])
    trained = [{name: of.get(name) for name in ("adapter_sha256", "training")} for of in (before, now)]
    other += ["another adapter"] * (trained[0] != trained[1])
    other += [
        f"--{name} {was.get(name)}, not {settings[name]}"
        for name in settings
        if was.get(name) != settings[name]
    ]
    return " and ".join(other)


def say_texts(source: Path, texts: dict, problems: list[str]) -> str:
    """How many texts there are, and which rows have none."""
    lines = [f"texts      {len(texts):,} of {len(texts) + len(problems):,} rows of {source}"]
    if problems:
        lines.append(
            f"{'':11}{len(problems):,} without a text, which are kept, with nothing (null) as answer:"
        )
        lines += [f"{'':11}{problem}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"{'':11}and {len(problems) - SHOWN:,} more")
    return "\n".join(lines)


@contextlib.contextmanager
def recorded(
    path: Path, args: argparse.Namespace, process: device.Process, made_from: dict
) -> Iterator[dict]:
    """Yield the record of the predictions at `path` to fill; write it as running, and at the end as finished
    or as how it failed. Out of the block come only UserError and KeyboardInterrupt."""
    content = {
        "schema": SCHEMA,
        "status": "running",
        "script": process.script,
        "task": args.task,
        "config": {name: value for name, value in vars(args).items() if name != "given"},
        "made_from": made_from,
        "started": record.now(),
    }
    beside = record_of(path)
    write = record.write_json if process.main else lambda *_: None
    write(beside, content)
    try:
        yield content
        content |= {"status": "finished", "environment": record.environment(args.seed)}
        write(beside, content | {"finished": record.now()})
    except (Exception, KeyboardInterrupt) as error:
        content |= record.describe_error(error, vars(args)) | {"wall_seconds": process.seconds()}
        with contextlib.suppress(UserError):  # the error at hand says more than that it can't be recorded
            write(beside, content | {"finished": record.now()})
        if isinstance(error, UserError | KeyboardInterrupt):
            raise
        raise UserError(f"{content['error']['message']}; {content['error']['advice']}") from error


def answer(content: dict, texts: list[str], path: Path, trained: dict, args, process, bases) -> tuple:
    """The answers to `texts`, as an evaluation gets them, and the file that keeps them until they are
    written; `content` is told the checkpoint."""
    folder = runs.folder_of(args, trained["method"])
    checkpoint.refuse_other_kind(args.pretrained_ckpt, "causal")
    here = checkpoint.identify(args.pretrained_ckpt, fetch=True)
    checkpoint.check_same(
        trained.get("checkpoint"), here, folder / "adapter", "name the one it was trained on"
    )

    # The libraries load here, so that --help, bad input and a finished file answer at once.
    from study import encoding, generation, model

    tokenizer = bases.tokenizer(args.pretrained_ckpt)
    prompts, shortened = encoding.encode_prompts(tokenizer, args.task, texts, args)
    content["rows"]["truncated"] = shortened
    allowed = None
    if args.task == "classification":
        classes = encoding.label_answers(tokenizer, trained["labels"], args.max_new_tokens)
        allowed = classes if args.decoding == "constrained" else None
    base = bases.load(folder, args.pretrained_ckpt, here, trained["quantization"])
    model.check_length(base, tokenizer, args)
    content.update({"checkpoint": here} | model.as_loaded(base, tokenizer))
    tuned = bases.with_adapter(folder, trained)
    run = content["made_from"] | {"checkpoint": here}
    kept = generation.KeptAnswers(process, record_of(path), run, args.force)
    answers = generation.generate(
        tuned,
        tokenizer,
        prompts,
        args.max_new_tokens,
        args.eval_batch_size,
        allowed=allowed,
        merging=args.merge,
        kept=kept,
    )
    return answers, kept


def columns_of(answers, args: argparse.Namespace, trained: dict) -> dict[str, list]:
    """The columns that `answers` fill, one value for each text."""
    classes = args.task == "classification"
    parsed = [
        parse_label(text, trained["labels"]) if classes else parse_summary(text) for text in answers.texts
    ]
    sure = {} if answers.confidences is None else {"confidence": answers.confidences}
    return {"prediction": answers.texts, "parsed": parsed, **sure}


def in_rows(columns: dict[str, list], places: list[int], count: int) -> dict[str, list]:
    """The same columns for `count` rows, with None where no text was."""
    found = {}
    for name, column in columns.items():
        by_row = dict(zip(places, column, strict=True))
        found[name] = [by_row.get(i) for i in range(count)]
    return found


def describe(answers, columns: dict[str, list], process: device.Process) -> dict:
    """What the record says of the answers."""
    return {
        "texts": len(answers.texts),
        "invalid_answers": columns["parsed"].count(None),
        "seconds": answers.seconds,
        "wall_seconds": answers.earlier_seconds + process.seconds(),
        "earlier_seconds": answers.earlier_seconds,
        "peak_memory_gib": device.peak_memory_gib(),
        "input_tokens": answers.input_tokens,
        "output_tokens": answers.output_tokens,
        "processes": process.count,
        "how": answers.how,
    }


def outcome(content: dict) -> str:
    """What is printed at the end, and of predictions that are finished already."""
    part, rows = content["predictions"], content["rows"]
    lines = [
        f"predicted  {part['texts']:,} texts, {rows['truncated']:,} of them shortened, "
        f"{part['input_tokens']:,} tokens in, {part['output_tokens']:,} out"
    ]
    if part["invalid_answers"]:
        many = 100 * part["invalid_answers"] > MANY * part["texts"]
        mend = ": --decoding constrained lets the model choose among the class names only" if many else ""
        lines.append(f"invalid    {part['invalid_answers']:,} answers name no class{mend}")
    speed = f"{part['texts'] / part['seconds']:,.1f} texts/s"
    lines.append(
        f"spent      {part['wall_seconds']:,.0f} s in all, {part['seconds']:,.0f} s at {speed}, peak "
        f"{part['peak_memory_gib']:.2f} GiB, {cost.usd_text(content['cost']['usd'])} on "
        f"{cost.shown(content['cost'])}"
    )
    return "\n".join(lines)
