"""The models that the study compares, in the order in which it was published: facts for a loop over them."""

from typing import NamedTuple

from study.errors import UserError

TASKS = ("classification", "summarization")


class Preset(NamedTuple):
    checkpoint: str  # its hub id
    kind: str  # of the scripts that take it, as study/cli.py has them
    context: int  # tokens that it was trained to read
    tasks: tuple[str, ...] = TASKS  # that it was published for


PRESETS = {
    "distilbert": Preset("distilbert/distilbert-base-uncased", "encoder", 512, TASKS[:1]),
    "bert": Preset("google-bert/bert-base-uncased", "encoder", 512, TASKS[:1]),
    "flan-t5-base": Preset("google/flan-t5-base", "t5", 512, TASKS[1:]),
    "flan-t5-large": Preset("google/flan-t5-large", "t5", 512),
    "falcon-7b": Preset("tiiuae/falcon-7b", "causal", 2048),
    "redpajama-3b": Preset("togethercomputer/RedPajama-INCITE-Base-3B-v1", "causal", 2048),
    "redpajama-7b": Preset("togethercomputer/RedPajama-INCITE-7B-Base", "causal", 2048),
    "llama-2-7b": Preset("NousResearch/Llama-2-7b-hf", "causal", 4096),
    "llama-2-13b": Preset("NousResearch/Llama-2-13b-hf", "causal", 4096),
}


def preset(name: str) -> Preset:
    """Raises UserError for a name that is not in the table."""
    if name not in PRESETS:
        raise UserError(f"there is no model {name}: it is one of {', '.join(PRESETS)}")
    return PRESETS[name]
