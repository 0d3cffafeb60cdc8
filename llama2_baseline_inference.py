"""Score an untuned model, zero-shot or few-shot, on either task.

    python llama2_baseline_inference.py --task_type summarization --prompt_type few-shot
    python llama2_baseline_inference.py --pretrained_ckpt NousResearch/Llama-2-7b-chat-hf --chat_template auto

Few-shot examples are chosen from the train split by --seed. It leaves eval.json and predictions.jsonl under
experiments/baseline/<model>/<task>/<prompt type>/.
"""

import argparse

from study import checkpoint, cli, data, device, several
from study.records import cost, estimate, record, runs, summary


def main(process: device.Process) -> None:
    several.score_each(cli.parse_args(None, __doc__), None, process, score)


def score(args: argparse.Namespace, process: device.Process, bases: several.Base) -> None:
    method = args.prompt_type
    folder = runs.folder_of(args, method)
    path = folder / "eval.json"
    if args.dry_run:
        return estimate.say_dry_run(path, args, method, process)

    estimate.check_gpu_name(args)
    needs_train = args.task == "classification" or args.prompt_type == "few-shot"
    overlap = ["test"] if args.drop_overlap else []
    splits = data.load(args, ["train", args.split] if needs_train else [args.split], optional=overlap)
    test = data.sample_eval(splits[args.split], args)
    described = {args.split: test.describe()}
    if needs_train:
        train = splits["train"].keep(
            data.choose(len(splits["train"].examples), args.max_train_samples, args.seed)
        )
        described["train"] = train.describe()
    labels = data.labels_of(splits["train"]) if args.task == "classification" else []
    with record.locked(folder, process):
        content = runs.find_finished(path, args, method, described)
        if content:
            return print(f"finished   {path}\n{summary.result_block(content)}")

        print(
            f"run        {folder}\n"
            f"model      {args.pretrained_ckpt}, {args.prompt_type}, {args.decoding} decoding"
        )
        print(data.say_split(args.split, splits[args.split], test), flush=True)
        with record.recording(path, args, method, process) as content:
            checkpoint.refuse_other_kind(args.pretrained_ckpt, "causal")
            content |= {
                "data": described,
                "labels": labels,
                "checkpoint": checkpoint.identify(args.pretrained_ckpt, fetch=True),
            }

            # The libraries load here, so that --help, bad input and a finished run answer at once.
            from transformers import BitsAndBytesConfig

            from prompts import prompt_sha256
            from study import encoding, generation, metrics, model

            quantization = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=device.compute_dtype(),
            )
            tokenizer = bases.tokenizer(args.pretrained_ckpt)
            classes = encoding.label_answers(
                tokenizer, labels, args.max_new_tokens, encoding.chat_cue(tokenizer, args)
            )
            allowed = classes if args.decoding == "constrained" else None
            base = bases.load(folder, args.pretrained_ckpt, content["checkpoint"], quantization.to_dict())
            content.update(model.as_loaded(base, tokenizer))
            context = model.context_length(base, tokenizer)
            texts = [text for text, _ in test.examples]
            examples = []
            if args.prompt_type == "few-shot":
                shots = args.shots or cli.SHOTS[args.task]
                examples = encoding.choose_shots(train.examples, args.task, shots, args.seed)
            prompts, cut = encoding.encode_baseline(tokenizer, texts, labels, examples, context, args)
            content |= {
                "data": described | {args.split: described[args.split] | {"truncated": cut["texts"]}},
                "few_shot": {
                    "examples": len(examples),
                    "shortened": cut["examples"],
                    "tokens_cut": cut["example_tokens"],
                },
            }
            print(
                f"prompts    up to {max(map(len, prompts)):,} of {context:,} tokens; shortened: "
                f"{cut['texts']:,} texts; {cut['examples']} of {len(examples)} examples, "
                f"by {cut['example_tokens']:,} tokens in all",
                flush=True,
            )
            kept = generation.KeptAnswers(process, path, runs.identity(content), args.force)
            answers = generation.generate(
                base,
                tokenizer,
                prompts,
                args.max_new_tokens,
                args.eval_batch_size,
                allowed=allowed,
                merging=args.merge,
                kept=kept,
            )
            references = [answer for _, answer in test.examples]
            scores, rows = metrics.score(
                args.task, answers.texts, references, labels, test.numbers, test.places, answers.confidences
            )
            content |= {
                "eval": generation.describe(answers, process, scores, args.decoding) | bases.paid_by(folder),
                "prompt_sha256": prompt_sha256(args.task, args.prompt_type),
            }
            content["cost"] = cost.of_run(args, device.name(), content["eval"]["wall_seconds"], process.count)
            if process.main:
                record.write_rows(runs.predictions_beside(path), rows)
        kept.discard()
        print(summary.result_block(content))


if __name__ == "__main__":
    cli.run_script(main, distributed=True)
