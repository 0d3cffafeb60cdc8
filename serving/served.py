"""The model behind a server: a finished run or an export of one, ready to answer, with its task's prompts and
how its answers are read."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from prompts import parse_label, parse_summary, prompt_sha256
from serving.export import ABOUT, TEXTS
from study import checkpoint, device, several
from study.errors import UserError
from study.records import record, runs

# What a server needs of an export.json, and whether that is what `export.py` writes.
TOLD = {
    "task": ("classification", "summarization").__contains__,
    "prompt_sha256": lambda value: isinstance(value, str),
    "weights": lambda value: isinstance(value, dict),
    "max_seq_length": lambda value: isinstance(value, int),
    "max_new_tokens": lambda value: isinstance(value, int),
}


@dataclass
class Served:
    """A model that is ready, and what its requests need."""

    name: str
    task: str
    labels: list[str] | None
    settings: argparse.Namespace  # max_seq_length and max_new_tokens, as the run has them
    tokenizer: object
    model: object
    slow: str | None  # why `generate` decodes, or None
    ends: list[int]
    allowed: list[list[int]] | None  # the classes' tokens
    longest: int  # tokens of a prompt with its answer
    vocabulary: int
    prefix: list[int]  # what all prompts of the task begin with

    def prompt(self, text: str) -> tuple[list[int], bool]:
        """The tokens of the task's prompt about `text`, as scoring builds it, and whether the text was
        shortened."""
        from study import encoding

        [ids], shortened = encoding.encode_prompts(self.tokenizer, self.task, [text], self.settings)
        return ids, bool(shortened)

    def tokens(self, prompt: str) -> list[int]:
        return self.tokenizer(prompt)["input_ids"]

    def text(self, answer: list[int]) -> str:
        return self.tokenizer.decode(answer, skip_special_tokens=True)

    def parsed(self, answer: list[int]) -> str | None:
        """The class, or None for none, or the summary that an answer names."""
        text = self.text(answer)
        return parse_label(text, self.labels) if self.labels else parse_summary(text)


def look(folder: Path) -> dict:
    """What `folder` says of itself: the record of its training, or its export.json. Needs no torch. Raises
    UserError for what is neither, or of another prompt than prompts.py has."""
    if (folder / ABOUT).is_file():
        about = checkpoint.read_json(folder / ABOUT, str(folder))
        lacking = [name for name, holds in TOLD.items() if not holds(about.get(name))]
        if lacking:
            raise UserError(f"{folder / ABOUT} lacks {', '.join(lacking)}: export the run again")
        if about["prompt_sha256"] != prompt_sha256(about["task"], "instruction"):
            raise UserError(
                f"{folder} was trained with another prompt than prompts.py has now: put that back"
            )
        return about
    if not (folder / "train.json").is_file():
        raise UserError(f"{folder} is neither a run (no train.json) nor an export (no {ABOUT}): name one")
    recorded = record.read(folder / "train.json") or {}
    return runs.finished_training(folder, argparse.Namespace(task=recorded.get("task"), given=[]))


def load(folder: Path, name: str, merging: str) -> Served:
    """Load what `folder` holds, as scoring does, held to its record by content. `merging` is --merge."""
    about = look(folder)
    if (folder / ABOUT).is_file():
        settings = argparse.Namespace(
            **{key: about[key] for key in ("max_seq_length", "max_new_tokens")}, pretrained_ckpt=str(folder)
        )
        tokenizer, model = load_export(folder, about)
    else:
        settings = argparse.Namespace(**about["config"])
        tokenizer, model = load_run(folder, about)
    return made_ready(name, about, settings, tokenizer, model, merging)


def load_run(folder: Path, trained: dict) -> tuple:
    """Tokenizer, and base with adapter."""
    place = trained["config"]["pretrained_ckpt"]
    checkpoint.refuse_other_kind(place, "causal")
    here = checkpoint.identify(place, fetch=True)
    checkpoint.check_same(
        trained.get("checkpoint"), here, folder / "adapter", "put the one it was trained on back"
    )
    bases = several.Base(several=False)
    tokenizer = bases.tokenizer(place)
    bases.load(folder, place, here, trained["quantization"])
    return tokenizer, bases.with_adapter(folder, trained)


def load_export(folder: Path, about: dict) -> tuple:
    """Tokenizer and dense model, with the adapter where that is by itself."""
    from transformers import AutoModelForCausalLM

    from study import checks, model

    for name, sha256 in about["weights"].items():
        if not (folder / name).is_file() or model.fingerprint(folder, name) != sha256:
            raise UserError(f"{folder / name} is not the file that {ABOUT} tells of: export the run again")
    options = {
        "dtype": device.compute_dtype(),
        "device_map": {"": device.current()},
        "use_safetensors": True,
        "output_loading_info": True,
    }
    base, found = model.load_with_attention(AutoModelForCausalLM, str(folder), "auto", options)
    checks.refuse_other_tensors(found, str(folder))
    tokenizer = model.load_tokenizer(str(folder))
    if about.get("adapter"):
        base = model.load_adapter(base, folder / about["adapter"], about.get("adapter_sha256"))
    return tokenizer, base.requires_grad_(False).eval()


def made_ready(name: str, about: dict, settings, tokenizer, loaded, merging: str) -> Served:
    from study import encoding, generation, model
    from study.packing import common_prefix

    base, task, labels = model.base_of(loaded), about["task"], about.get("labels")
    model.check_length(base, tokenizer, settings)
    prompts, _ = encoding.encode_prompts(tokenizer, task, TEXTS, settings)
    ends = generation.stop_tokens(base, tokenizer)
    allowed = labels and generation.with_all_ends(
        encoding.label_answers(tokenizer, labels, settings.max_new_tokens), ends
    )
    loaded, slow, _ = generation.made_ready(loaded, prompts, merging)
    return Served(
        name=name,
        task=task,
        labels=labels,
        settings=settings,
        tokenizer=tokenizer,
        model=loaded,
        slow=slow,
        ends=ends,
        allowed=allowed,
        longest=model.context_length(base, tokenizer),
        vocabulary=model.base_of(loaded).get_input_embeddings().weight.shape[0],
        prefix=prompts[0][: common_prefix(prompts)],
    )
