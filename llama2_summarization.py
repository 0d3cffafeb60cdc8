"""Fine-tune a causal language model with QLoRA to summarize dialogues: by default Llama-2-7B on SAMSum.

    python llama2_summarization.py --train_sample_fraction 0.1
    python llama2_summarization.py --pretrained_ckpt FOLDER --train_file train.jsonl --test_file test.jsonl

It leaves the adapter and train.json in a folder of its own (its settings are in the name); started again, it
goes on where it was stopped, and prints what it has if it was done. Score it with
llama2_summarization_inference.py and the same flags.
"""

from prompts import prompt_sha256
from study import also, checkpoint, cli, data, device
from study.records import cost, estimate, record, runs, summary

TASK, METHOD = "summarization", "qlora"


def main(process: device.Process) -> None:
    args = cli.parse_args(TASK, __doc__)
    if args.dry_run:
        args = also.what_is_missing(args, METHOD)
        return estimate.say_dry_run(runs.folder_of(args, METHOD) / "train.json", args, METHOD, process)

    estimate.check_gpu_name(args)
    splits = data.load(args, ["train"], optional=["test"])
    train = data.sample_train(splits["train"], args)
    described = {"train": train.describe()}
    args = also.what_is_missing(args, METHOD, described)
    folder = runs.folder_of(args, METHOD)
    path = folder / "train.json"
    with record.locked(folder, process), also.beside(args, METHOD, process) as earlier:
        content = runs.find_finished(path, args, METHOD, described)
        if content:
            return print(f"finished   {path}\n{summary.result_block(content)}")

        print(
            f"run        {folder}\n"
            f"model      {args.pretrained_ckpt}, rank {args.lora_r}, {args.epochs} epochs"
        )
        print(data.say_split("train", splits["train"], train), flush=True)
        if "test" not in splits and not (args.validation_file or args.validation_fraction):
            print("test       none named: scoring will need --test_file", flush=True)
        with record.recording(path, args, METHOD, process) as content:
            content |= {"data": described, "prompt_sha256": prompt_sha256(TASK, "instruction")}
            checkpoint.refuse_other_kind(args.pretrained_ckpt, "causal")
            content["checkpoint"] = checkpoint.identify(args.pretrained_ckpt, fetch=True)

            # The libraries load here, so that --help, bad input and a finished run answer at once.
            import torch
            from peft import LoraConfig
            from transformers import BitsAndBytesConfig

            from study import encoding, model, packing, resuming, training

            quantization = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=device.compute_dtype(),
            )
            lora = LoraConfig(
                r=args.lora_r,
                lora_alpha=args.lora_alpha,
                lora_dropout=args.dropout,
                target_modules="all-linear" if args.target_modules == ["all-linear"] else args.target_modules,
                bias="none",
                task_type="CAUSAL_LM",
            )
            # Learning rate, clipping and the constant schedule are those of QLoRA (Dettmers et al., 2023,
            # B.2); the warm-up takes their 3 % of the steps of one epoch.
            schedule = training.settings(
                folder,
                report_to=args.report_to,
                optim="adamw_torch_fused" if torch.cuda.is_available() else "adamw_torch",
                learning_rate=args.learning_rate,
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=0.03,  # of the steps of one epoch
                max_grad_norm=0.3,
                weight_decay=0.0,
                bf16=device.compute_dtype() == torch.bfloat16,
                seed=args.seed,
            )

            tokenizer = model.load_tokenizer(args.pretrained_ckpt)
            examples, shortened = encoding.encode_examples(tokenizer, TASK, train.examples, args)
            content["data"] = {"train": described["train"] | {"truncated": shortened}}
            print(
                f"{'':11}{shortened:,} texts shortened to fit --max_seq_length {args.max_seq_length}",
                flush=True,
            )
            base = model.load_base(
                args.pretrained_ckpt, quantization, packing.training_attention(args.attn_implementation)
            )
            content.update(model.as_loaded(base, tokenizer))
            model.check_length(base, tokenizer, args)
            known = ("method", "config", "data", "prompt_sha256", "checkpoint")
            run = {name: content[name] for name in known}
            earlier.content = content
            content["train"] = training.train(
                base, tokenizer, lora, schedule, examples, args, folder, run, process, earlier
            )
            spent, gpus = content["train"]["wall_seconds"], cost.gpus_of(content["train"])
            content["cost"] = cost.of_run(args, device.name(), spent, gpus)
        resuming.discard_checkpoints(folder, process)
        print(summary.result_block(content))


if __name__ == "__main__":
    cli.run_script(main, distributed=True)
