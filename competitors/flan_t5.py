"""Fine-tune an encoder-decoder, by default Flan-T5, and score it beside the language models.

    python competitors/flan_t5.py --train_sample_fraction 0.1  # all weights of Flan-T5 Base
    python competitors/flan_t5.py --task_type summarization --tuning lora \\
        --pretrained_ckpt google/flan-t5-large

It trains, then scores, and leaves train.json, eval.json, predictions.jsonl and the model (model/ or adapter/)
in a folder of its own; started again, it goes on where it was stopped. Flan-T5 was instruction-tuned on
SAMSum's train split among others, so that summaries are of a data set that it knows.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prompts import prompt_sha256
from study import checkpoint, classes, cli, data, device
from study.errors import UserError
from study.records import cost, estimate, record, runs, summary

KIND = "t5"


def main(process: device.Process) -> None:
    args = cli.parse_args(None, __doc__, kind=KIND)
    task, method = args.task, f"t5-{args.tuning}"
    folder = runs.folder_of(args, method)
    trained_path, path = folder / "train.json", folder / runs.eval_name(args, vars(args))
    if args.dry_run:
        return estimate.say_dry_run(path, args, method, process)

    estimate.check_gpu_name(args)
    splits = data.load(args, ["train", args.split])
    train, test = data.sample_train(splits["train"], args), data.sample_eval(splits[args.split], args)
    described = {"train": train.describe()}, {args.split: test.describe()}
    prompt = prompt_sha256(task, "instruction")
    with record.locked(folder, process):
        trained = runs.find_finished(trained_path, args, method, described[0])
        if trained and trained["prompt_sha256"] != prompt:
            raise UserError(
                f"{folder} was trained with another prompt than prompts.py has now: --force redoes it"
            )
        content = trained and runs.find_finished(path, args, method, described[1], trained)
        if content:
            return print(f"finished   {path}\n{summary.result_block(content)}")

        print(f"run        {folder}\nmodel      {args.pretrained_ckpt}, {args.tuning}, {args.epochs} epochs")
        if not trained:
            print(data.say_split("train", splits["train"], train), flush=True)
            if task == "classification":
                print(classes.say(train, splits["train"]), flush=True)
            with record.recording(trained_path, args, method, process) as content:
                content |= {"data": described[0], "prompt_sha256": prompt}
                checkpoint.refuse_other_kind(args.pretrained_ckpt, KIND)
                content["checkpoint"] = checkpoint.identify(args.pretrained_ckpt, fetch=True)
                if task == "classification":
                    content["labels"] = data.labels_of(splits["train"])
                content["train"] = fit(train.examples, args, folder, content, process)
                content["cost"] = cost.of_run(args, device.name(), content["train"]["wall_seconds"])
            trained = record.read(trained_path)
            print(summary.result_block(trained))
            process = process.from_here()
        print(data.say_split(args.split, splits[args.split], test), flush=True)
        with record.recording(path, args, method, process) as content:
            here = checkpoint.identify(args.pretrained_ckpt, fetch=True)
            mend = "name the one it was trained on"
            checkpoint.check_same(trained.get("checkpoint"), here, trained_path, mend)
            content.update(data=described[1], checkpoint=here, prompt_sha256=prompt)
            content.update(runs.scored_adapter(trained))
            kept = score(test, path, trained, args, content, process)
        kept.discard()
        print(summary.result_block(content))


def score(test: data.Split, path: Path, trained: dict, args, content: dict, process: device.Process):
    """Answer `test`, put the record's `eval` into `content` and write predictions.jsonl. Returns the answers
    as they are kept until the record is written."""
    # Here, so that a finished run answers at once.
    import torch

    from study import generation, metrics, model, resuming, t5

    resuming.discard_checkpoints(path.parent, process)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # those so far are the training's
    tokenizer = model.load_tokenizer(args.pretrained_ckpt)
    texts, references = (list(column) for column in zip(*test.examples, strict=True))
    prompts, shortened = t5.encode_prompts(tokenizer, args.task, texts, args.max_seq_length)
    lost = {"truncated": shortened, **t5.lost(tokenizer, prompts, references)}
    content["data"] = {args.split: content["data"][args.split] | lost}
    t5.say_lost(lost)
    tuned = t5.load_tuned(args.pretrained_ckpt, path.parent, args.tuning, trained)
    kept = generation.KeptAnswers(process, path, runs.identity(content), args.force)
    answers = t5.answer(tuned, tokenizer, prompts, args, kept)
    labels = trained.get("labels", ())
    scores, rows = metrics.score(args.task, answers.texts, references, labels, test.numbers, test.places)
    content["eval"] = generation.describe(answers, process, scores, "free")
    content["cost"] = cost.of_run(args, device.name(), content["eval"]["wall_seconds"])
    record.write_rows(runs.predictions_beside(path), rows)
    return kept


def fit(examples: list[tuple[str, str]], args, folder: Path, content: dict, process: device.Process) -> dict:
    """Train, leave the model in `folder`, and return the record's `train`."""
    from peft import LoraConfig

    from study import checks, loop, model, packing, t5, tokens, training

    tokenizer = model.load_tokenizer(args.pretrained_ckpt)
    pairs, shortened = t5.encode_pairs(tokenizer, args.task, examples, args)
    rows = [[*pair.prompt, *pair.answer] for pair in pairs]
    lost = t5.lost(tokenizer, rows, [answer for _, answer in examples])
    content["data"] = {"train": content["data"]["train"] | {"truncated": shortened, **lost}}
    t5.say_lost(content["data"]["train"])
    tuned = t5.load(args.pretrained_ckpt)
    checks.refuse_unknown_tokens(tuned, tokenizer, rows)
    if args.tuning == "lora":
        lora = LoraConfig(
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.dropout,
            target_modules=["q", "v"],
            bias="none",
            task_type="SEQ_2_SEQ_LM",
        )
        tuned = t5.with_lora(tuned, lora, args.seed)
    # T5 fine-tunes at a constant rate (Raffel et al., 2020, 3.1.2). With AdamW, all weights together learn
    # well at 1e-4 to 3e-4, less than Adafactor's 1e-3, whose steps scale with the weights; adapters at 1e-3.
    # The checkpoint's own dropout, 0.1 in Flan-T5, is on.
    recipe = loop.Recipe(
        learning_rate=args.learning_rate,
        warmup=training.warmup_steps(0.03, len(pairs), args.batch_size),
        falls=False,
        weight_decay=0.0,
        max_grad_norm=1.0,
    )
    run = {name: content[name] for name in ("method", "config", "data", "prompt_sha256", "checkpoint")}
    run["examples_sha256"] = tokens.sha256_of([[pair.prompt, pair.answer] for pair in pairs])
    steps = packing.plan_steps(len(pairs), args.batch_size, args.epochs, args.seed)
    looping = loop.Training(tuned, t5.learnable(pairs, tuned), steps, recipe, args)
    save = functools.partial(t5.save, tuned, args.pretrained_ckpt, args.tuning, tokenizer, folder)
    own = {
        "dropout_of_checkpoint": tuned.config.dropout_rate,
        "dtype": str(t5.dtype()).removeprefix("torch."),
    }
    return loop.train(looping, folder, run, process, save) | own


if __name__ == "__main__":
    cli.run_script(main)
