"""Score a summarizer that llama2_summarization.py has fine-tuned, on the test split.

    python llama2_summarization_inference.py --experiment_dir experiments/summarization-...
    python llama2_summarization_inference.py --lora_r 8 --epochs 5  # the run these flags trained
    python llama2_summarization_inference.py --experiment_dir RUN RUN...  # each, the base model loaded once
    python llama2_summarization_inference.py --experiment_dir RUN --predict_file new.csv  # new texts

Model, prompts and data settings come from the run's record; flags override those of the data and the model's
place. It leaves eval.json and predictions.jsonl beside the adapter.
"""

import argparse

from study import checkpoint, cli, data, device, predict, several
from study.records import cost, estimate, record, runs, summary

TASK, METHOD = "summarization", "qlora"


def main(process: device.Process) -> None:
    several.score_each(cli.parse_args(TASK, __doc__), METHOD, process, score)


def score(args: argparse.Namespace, process: device.Process, bases: several.Base) -> None:
    folder = runs.folder_of(args, METHOD)
    if args.predict_file:
        return predict.run(folder, args, process, bases)
    if args.dry_run:
        args, path = runs.planned_eval(folder, args)
        return estimate.say_dry_run(path, args, METHOD, process)

    trained = runs.finished_training(folder, args)
    args = runs.with_settings_of(trained, args)
    estimate.check_gpu_name(args)
    path = folder / runs.eval_name(args, trained["config"])
    splits = data.load(args, [args.split], trained=trained)
    test = data.sample_eval(splits[args.split], args)
    described = {args.split: test.describe()}
    with record.locked(folder, process):
        content = runs.find_finished(path, args, METHOD, described, trained)
        if content:
            return print(f"finished   {path}\n{summary.result_block(content)}")

        print(f"run        {folder}\nmodel      {args.pretrained_ckpt} with its adapter")
        print(data.say_split(args.split, splits[args.split], test), flush=True)
        with record.recording(path, args, METHOD, process) as content:
            checkpoint.refuse_other_kind(args.pretrained_ckpt, "causal")
            here = checkpoint.identify(args.pretrained_ckpt, fetch=True)
            checkpoint.check_same(
                trained.get("checkpoint"), here, folder / "adapter", "name the one it was trained on"
            )
            content.update(runs.scored_adapter(trained))
            content.update(data=described, checkpoint=here, prompt_sha256=trained["prompt_sha256"])

            # The libraries load here, so that --help, bad input and a finished run answer at once.
            from study import encoding, generation, metrics, model

            tokenizer = bases.tokenizer(args.pretrained_ckpt)
            texts = [text for text, _ in test.examples]
            prompts, shortened = encoding.encode_prompts(tokenizer, TASK, texts, args)
            content["data"] = {args.split: described[args.split] | {"truncated": shortened}}
            base = bases.load(folder, args.pretrained_ckpt, here, trained["quantization"])
            model.check_length(base, tokenizer, args)
            content.update(model.as_loaded(base, tokenizer))
            tuned = bases.with_adapter(folder, trained)
            kept = generation.KeptAnswers(process, path, runs.identity(content), args.force)
            answers = generation.generate(
                tuned,
                tokenizer,
                prompts,
                args.max_new_tokens,
                args.eval_batch_size,
                merging=args.merge,
                kept=kept,
            )
            references = [summary for _, summary in test.examples]
            scores, rows = metrics.score(TASK, answers.texts, references, (), test.numbers, test.places)
            content["eval"] = generation.describe(answers, process, scores, "free")
            content["eval"] |= bases.paid_by(folder)
            content["cost"] = cost.of_run(args, device.name(), content["eval"]["wall_seconds"], process.count)
            if process.main:
                record.write_rows(runs.predictions_beside(path), rows)
        kept.discard()
        print(summary.result_block(content))


if __name__ == "__main__":
    cli.run_script(main, distributed=True)
