"""Fine-tune an encoder in full to classify texts, and score it: by default BERT-base on 20 Newsgroups.

    python competitors/encoder_classification.py --train_sample_fraction 0.1
    python competitors/encoder_classification.py --pretrained_ckpt answerdotai/ModernBERT-base --seed 1
    python competitors/encoder_classification.py --train_file train.jsonl --test_file test.jsonl

It leaves the model (loads in plain transformers), train.json, eval.json and predictions.jsonl in a folder of
its own. Started again, it goes on where it was stopped, and prints what it has if it was done.
"""

import functools
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from study import checkpoint, classes, cli, data, device
from study.records import cost, estimate, record, runs, summary

TASK, METHOD = "classification", "encoder"


def main(process: device.Process) -> None:
    args = cli.parse_args(TASK, __doc__, kind=METHOD)
    folder = runs.folder_of(args, METHOD)
    path = folder / runs.eval_name(args, vars(args))
    if args.dry_run:
        return estimate.say_dry_run(path, args, METHOD, process)

    estimate.check_gpu_name(args)
    splits = data.load(args, ["train", args.split])
    train, test = data.sample_train(splits["train"], args), data.sample_eval(splits[args.split], args)
    labels = data.labels_of(splits["train"])
    with record.locked(folder, process):
        trained = runs.find_finished(folder / "train.json", args, METHOD, {"train": train.describe()})
        described = {args.split: test.describe()}
        content = trained and runs.find_finished(path, args, METHOD, described, trained)
        if content:
            return print(f"finished   {path}\n{summary.result_block(content)}")

        print(f"run        {folder}\nmodel      {args.pretrained_ckpt}, {args.epochs} epochs")
        print(data.say_split("train", splits["train"], train))
        print(classes.say(train, splits["train"]))
        print(data.say_split(args.split, splits[args.split], test), flush=True)
        if not trained:
            trained = fine_tune(args, folder, train, labels, process)
            process = process.from_here()
        score(args, path, test, trained, process)


def fine_tune(args, folder: Path, train: data.Split, labels: list[str], process: device.Process) -> dict:
    """Train, and leave the model and train.json. Returns that record."""
    with record.recording(folder / "train.json", args, METHOD, process) as content:
        content |= {"data": {"train": train.describe()}, "labels": labels}
        checkpoint.refuse_other_kind(args.pretrained_ckpt, "encoder")
        content["checkpoint"] = checkpoint.identify(args.pretrained_ckpt, fetch=True)

        # The libraries load here, so that --help, bad input and a finished run answer at once.
        from study import checks, encoder, loop, model, packing, resuming, tokens

        tokenizer = model.load_tokenizer(args.pretrained_ckpt, ends=False)
        rows, cut = encoder.encode(tokenizer, [text for text, _ in train.examples], args.max_seq_length)
        content["data"]["train"] |= {"truncated": cut}
        print(f"{'':11}{cut:,} texts cut to --max_seq_length {args.max_seq_length}", flush=True)
        classes = [labels.index(label) for _, label in train.examples]
        tuned = encoder.load(args.pretrained_ckpt, labels, args.seed)
        model.check_length(tuned, tokenizer, args)
        checks.refuse_unknown_tokens(tuned, tokenizer, rows)
        texts = encoder.Texts(rows, tokenizer.pad_token_id or 0, classes)
        steps = packing.steps_of_like_length(texts.sizes, args.batch_size, args.epochs, args.seed)
        # BERT's own recipe (Devlin et al., 2019; Mosbach et al., 2021): without the warm-up some seeds learn
        # nothing, and a rate that falls to 0 leaves less to where training happens to stop.
        recipe = loop.Recipe(
            learning_rate=args.learning_rate,
            warmup=math.ceil(0.1 * len(steps)),
            falls=True,
            weight_decay=0.01,
            max_grad_norm=1.0,
        )
        run = {name: content[name] for name in ("method", "config", "data", "checkpoint")}
        run["examples_sha256"] = tokens.sha256_of([rows, classes])
        training = loop.Training(tuned, texts, steps, recipe, args)
        save = functools.partial(encoder.save, tuned, tokenizer, folder)
        content["train"] = loop.train(training, folder, run, process, save)
        del content["train"]["learned_tokens"]  # it learned classes
        content["cost"] = cost.of_run(args, device.name(), content["train"]["wall_seconds"])
    resuming.discard_checkpoints(folder, process)
    content = record.read(folder / "train.json")
    print(summary.result_block(content), flush=True)
    return content


def score(args, path: Path, test: data.Split, trained: dict, process: device.Process) -> None:
    """Score the model of the record `trained`."""
    with record.recording(path, args, METHOD, process) as content:
        content |= {"data": {args.split: test.describe()}, "checkpoint": trained["checkpoint"]}
        content.update(runs.scored_adapter(trained))

        from study import encoder, metrics, model

        tuned = encoder.load_trained(path.parent / "model", trained["train"])
        tokenizer = model.load_tokenizer(str(path.parent / "model"), ends=False)
        rows, cut = encoder.encode(tokenizer, [text for text, _ in test.examples], args.max_seq_length)
        content["data"][args.split] |= {"truncated": cut}
        began = time.monotonic()
        texts = encoder.Texts(rows, tokenizer.pad_token_id or 0)
        classes, sure = encoder.classify(tuned, texts, args.eval_batch_size)
        seconds = time.monotonic() - began
        labels, references = trained["labels"], [label for _, label in test.examples]
        answers = [labels[i] for i in classes]
        scores, lines = metrics.score(TASK, answers, references, labels, test.numbers, test.places, sure)
        content["eval"] = {
            "examples": len(rows),
            "seconds": seconds,
            "wall_seconds": process.seconds(),
            "examples_per_second": len(rows) / seconds,
            "peak_memory_gib": device.peak_memory_gib(),
            "input_tokens": sum(texts.tokens),
            "output_tokens": 0,
            "decoding": "none",
            **scores,
        }
        content["cost"] = cost.of_run(args, device.name(), content["eval"]["wall_seconds"])
        record.write_rows(runs.predictions_beside(path), lines)
    print(summary.result_block(content))


if __name__ == "__main__":
    cli.run_script(main)
