"""Write a fine-tuned model as one that any server loads: its adapter merged, in bfloat16, as safetensors.

    python serving/export.py RUN --output_dir FOLDER
    python serving/export.py RUN --output_dir FOLDER --adapter_on_dequantized  # in FOLDER/adapter

The adapter is added to the dequantized 4-bit weights, which are what it was trained on, not to the
checkpoint's own. The folder is loaded again by plain transformers and held to the run's own merged model
before it appears, whole or not at all. export.json in it says what it was made from. On a machine with less
memory than the model has: a shard at a time beside the model in 4 bits.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prompts import build_prompt
from study import checkpoint, cli, device
from study.errors import UserError, is_out_of_memory
from study.records import record, runs

ABOUT = "export.json"
# How far apart, relatively, rounding alone may bring logits: 0 was measured of a merged model, 1 % where the
# adapter is by itself, which is not rounded with the weights then.
OFF, OFF_UNMERGED = 0.01, 0.1
TEXTS = (  # that the export is verified on, whatever the task
    "Anna: hi Tom, shall we go swimming on Monday?\nTom: sure! where?\nAnna: the lake, at 3\nTom: ok, bye",
    "After two years of practising scales I still wonder why the strings buzz. Any advice is welcome.",
    "The new graphics card does not fit: 31 cm, and the case has 29. Is there a shorter one for $250?",
    "Ça marche, größer; 你好 :)",
)


def main(process: device.Process) -> None:
    args = parse_args()
    run, folder = Path(args.run), Path(os.path.abspath(args.output_dir))
    refuse_taken(folder, args.force)
    recorded = record.read(run / "train.json") or {}
    trained = runs.finished_training(run, argparse.Namespace(task=recorded.get("task"), given=[]))
    checkpt = args.pretrained_ckpt or trained["config"]["pretrained_ckpt"]
    settings = argparse.Namespace(**trained["config"] | {"pretrained_ckpt": checkpt})
    kind = "the adapter beside its dequantized base" if args.adapter_on_dequantized else "merged"
    print(f"run        {run}\nmodel      {checkpt} with its adapter, {kind}", flush=True)
    with record.locked(run, process), less_memory(), appearing(folder, process) as partial:
        checkpoint.refuse_other_kind(checkpt, "causal")
        here = checkpoint.identify(checkpt, fetch=True)
        mend = "name the one it was trained on by --pretrained_ckpt"
        checkpoint.check_same(trained.get("checkpoint"), here, run / "adapter", mend)

        # The libraries load here, so that --help and bad input answer at once.
        from study import encoding, model

        tokenizer = model.load_tokenizer(checkpt)
        prompts, _ = encoding.encode_prompts(tokenizer, trained["task"], TEXTS, settings)
        base = model.load_base(checkpt, model.quantization_from(trained["quantization"]))
        model.check_length(base, tokenizer, settings)
        hashes = (trained["train"].get(name) for name in ("adapter_sha256", "adapter_config_sha256"))
        base = model.base_of(model.load_adapter(base, run / "adapter", *hashes))
        expected, attention, dtype = write(base, tokenizer, prompts, partial, folder, run, args)
        del base  # what is loaded again has its place
        verified = verify(partial, trained["task"], settings, prompts, expected, attention)
        about = describe(trained, run, partial, here, settings) | {"dtype": dtype, "verified": verified}
        about["adapter"] = "adapter" if args.adapter_on_dequantized else None
        record.write_json(partial / ABOUT, about)
    print(outcome(folder, about, process))


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="folder of a finished run of llama2_*.py")
    parser.add_argument("--output_dir", required=True, metavar="FOLDER", help="where to write the model")
    parser.add_argument(
        "--adapter_on_dequantized",
        action="store_true",
        help="write the dequantized base, and the adapter in FOLDER/adapter, for servers that load adapters",
    )
    parser.add_argument(
        "--pretrained_ckpt", metavar="CKPT", help="where the run's checkpoint is now (as the run names it)"
    )
    parser.add_argument(
        "--max_shard_gb", type=cli.positive_float, default=2.0, help="largest file of weights, in GB (2)"
    )
    parser.add_argument("--force", action="store_true", help="replace the export that FOLDER holds")
    return parser.parse_args([cli.underscored(word) for word in sys.argv[1:]])


# The folder


def refuse_taken(folder: Path, force: bool) -> None:
    """Raise UserError for an --output_dir that is there already, unless it is an export to be replaced by
    `force`."""
    if not folder.exists():
        return
    if not (folder / ABOUT).is_file():
        raise UserError(
            f"--output_dir {folder} is there already, and is no export (no {ABOUT}): name another"
        )
    if not force:
        raise UserError(f"--output_dir {folder} is there already: name another, or --force replaces it")


@contextlib.contextmanager
def appearing(folder: Path, process: device.Process) -> Iterator[Path]:
    """Yield a hidden folder beside `folder` to fill, which becomes `folder` at the end, readable by others;
    without an end it goes, and what a killed export left goes at the next start."""
    partial, old = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "old"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with record.locked(partial, process):
            try:
                empty(partial)
                yield partial
                settle(partial)
                shutil.rmtree(old, ignore_errors=True)
                if folder.exists():
                    os.rename(folder, old)
                os.rename(partial, folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
                shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise UserError(
            f"--output_dir {folder} can't be written: {reason}; make room or name another"
        ) from None


def empty(folder: Path) -> None:
    """Of all but the lock."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def settle(folder: Path) -> None:
    """Bring every file to the disk, readable by others (transformers writes weights for the owner alone)."""
    (folder / ".lock").unlink()
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


@contextlib.contextmanager
def less_memory() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "out of memory: export with a smaller --max_shard_gb, or without the GPU (CUDA_VISIBLE_DEVICES= "
            "before the command)"
        ) from None


# What it holds


def write(base, tokenizer, prompts: Sequence[list[int]], partial: Path, folder: Path, run: Path, args):
    """Write model, tokenizer and settings, and with --adapter_on_dequantized the adapter. Returns the merged
    model's logits of each prompt, the name of its attention, and that of its dtype."""
    from study import dense

    merged = not args.adapter_on_dequantized
    if merged:
        dense.refuse_unmergeable(base, str(run))
    needed, free = dense.bytes_of(base), shutil.disk_usage(partial).free
    if needed > free:
        raise UserError(
            f"--output_dir {folder}: {needed / 1e9:.1f} GB of weights, and {free / 1e9:.1f} GB are free: "
            "name another"
        )
    expected = dense.merged_logits(base, prompts)
    dense.write(base, partial, int(args.max_shard_gb * 1e9), merged)
    write_settings(base, tokenizer, checkpoint.folder_of(base.name_or_path), partial)
    if not merged:
        write_adapter(run / "adapter", partial / "adapter", folder)
    return expected, base.config._attn_implementation, name_of(base.dtype)


def write_settings(base, tokenizer, checkpt: Path, folder: Path) -> None:
    """Write the checkpoint's config.json as of a model never quantized, generation_config.json for greedy
    answers that end where the run's do, and the tokenizer under a class that transformers 4 knows, too."""
    from transformers import GenerationConfig

    from study import generation

    # Its own file: transformers 5 would write rotary settings where servers of transformers 4 don't look.
    config = checkpoint.read_json(checkpt / "config.json", str(checkpt))
    for name in ("quantization_config", "compression_config", "auto_map", "_name_or_path", "dtype"):
        config.pop(name, None)
    config |= {"architectures": [type(base).__name__], "torch_dtype": name_of(base.dtype)}
    config["tie_word_embeddings"] = base.config.tie_word_embeddings
    write_json(folder / "config.json", config)
    ends = generation.stop_tokens(base, tokenizer)
    padding = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, pad_token_id=padding, do_sample=False
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name in ("auto_map", "is_local", "local_files_only"):  # of how it was loaded here
        settings.pop(name, None)
    write_json(path, settings)


def name_of(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_adapter(adapter: Path, folder: Path, base: Path) -> None:
    """The adapter as it is, of the base in `base`."""
    from study import model

    folder.mkdir()
    shutil.copyfile(adapter / model.ADAPTER, folder / model.ADAPTER)
    config = json.loads((adapter / model.CONFIG).read_text(encoding="utf-8"))
    write_json(folder / model.CONFIG, config | {"base_model_name_or_path": str(base)})


def describe(trained: dict, run: Path, folder: Path, here: dict, settings: argparse.Namespace) -> dict:
    """What the folder is made from, for a server, which needs to know task and classes."""
    from study import model

    weights = sorted(folder.glob("*.safetensors"))
    return {
        "run": str(run.resolve()),
        **{name: trained[name] for name in ("task", "method", "prompt_sha256")},
        "labels": trained.get("labels"),
        "pretrained_ckpt": settings.pretrained_ckpt,
        "checkpoint": here,
        **{name: getattr(settings, name) for name in ("max_seq_length", "max_new_tokens")},
        **runs.scored_adapter(trained),
        "weights": {path.name: model.fingerprint(folder, path.name) for path in weights},
        "bytes": sum(path.stat().st_size for path in weights),
        "written": record.now(),
        "environment": record.environment(settings.seed),
    }


# Is it the run's model?


def verify(folder: Path, task: str, settings, prompts, expected, attention: str) -> dict:
    """Load what stands in `folder` as anybody would, and hold its tokens and logits to the run's own. Raises
    UserError where they are others."""
    import torch
    from transformers import AutoTokenizer

    from study import checks, dense, encoding

    reader = AutoTokenizer.from_pretrained(folder)
    again, shortened = encoding.encode_prompts(reader, task, TEXTS, settings)
    if again != prompts:
        raise UserError(
            "the exported tokenizer reads the prompts otherwise than the run's: nothing was written"
        )
    found = dense.logits(load_again(folder, attention), prompts)
    pairs = list(zip(found, expected, strict=True))
    equal = torch.cat([one.argmax(-1) == other.argmax(-1) for one, other in pairs])  # [tokens]
    verified = {
        "prompts": len(prompts),
        "tokens": len(equal),
        "largest_difference": max((one - other).abs().max().item() for one, other in pairs),
        "largest_logit": max(other.abs().max().item() for other in expected),
        "relative": max(checks.apart(one, other) for one, other in pairs),
        "equal_next_tokens": 100 * equal.float().mean().item(),
    }
    if not shortened:
        texts = [build_prompt(task, "instruction", text) for text in TEXTS]
        verified["text_gives_same_tokens"] = [reader(text)["input_ids"] for text in texts] == prompts
    if not verified["relative"] <= (OFF_UNMERGED if (folder / "adapter").exists() else OFF):
        raise UserError(f"nothing was written: it is not the run's model, {in_words(verified)}")
    return verified


def load_again(folder: Path, attention: str):
    """The exported model, by transformers and PEFT alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from study import checks

    loaded, found = AutoModelForCausalLM.from_pretrained(
        folder, device_map={"": device.current()}, output_loading_info=True
    )
    checks.refuse_other_tensors(found, str(folder))
    if attention != loaded.config._attn_implementation:  # the run's is its model's own
        loaded.set_attn_implementation(attention)
    if (folder / "adapter").exists():
        loaded = PeftModel.from_pretrained(loaded, folder / "adapter").get_base_model()
    return loaded.eval()


def in_words(verified: dict) -> str:
    return (
        f"logits at most {verified['largest_difference']:.3g} apart (of at most "
        f"{verified['largest_logit']:.3g}; {100 * verified['relative']:.2g} % in all), "
        f"{verified['equal_next_tokens']:.2f} % of next tokens equal"
    )


def outcome(folder: Path, about: dict, process: device.Process) -> str:
    """What is printed at the end."""
    verified = about["verified"]
    lines = [f"verified   {verified['prompts']} prompts, {verified['tokens']:,} tokens: {in_words(verified)}"]
    if not verified.get("text_gives_same_tokens", True):
        lines.append(f"{'':11}a server that is given text reads other tokens than the run: give it token ids")
    many = f"{len(about['weights'])} file{'s' * (len(about['weights']) > 1)}"
    lines.append(f"wrote      {folder}: {about['bytes'] / 1e9:.3g} GB of {about['dtype']} in {many}")
    peak = f"peak {device.peak_memory_gib():.2f} GiB"
    return "\n".join([*lines, f"spent      {process.seconds():,.0f} s, {peak}"])


if __name__ == "__main__":
    cli.run_script(main)
