"""Trains the small base model of the demonstration from scratch: demo/model, a Llama with its own tokenizer.

    python demo/make_data.py
    python demo/make_model.py

The model is pretrained on plain text of the grammar in make_data.py, with other seeds: posts, threads,
dialogues retold in prose, stories and notes. None of it is a text of demo/data, none has a prompt's headings,
and no post goes with the name of its class (all of which is checked before training): what fine-tuning
teaches is new.

Measured on two shared CPU cores: 4.7 million tokens, 12 minutes of training (13 with the corpus), loss 0.803.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from make_data import NAMES, TOPICS, draw_slots, expand, make_dialogue, make_post, tellable, topic_words
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = Path(__file__).resolve().parent
SEED = 40
VOCABULARY = 2048
PHASES = ((0.92, 256, 16), (0.08, 1024, 4))  # share of the documents, tokens of a row, rows of a step

# What was agreed, told in other words than in the summaries of the data: the model is to look up facts
# in a dialogue, and how a summary is worded is left to fine-tuning.
RETELLINGS = {
    "meet": [
        "So it is settled: when {day} comes, {a} and {b} {do}. The hour is {time}, the place {place}.",
        (
            "It was {a} who had the idea to {do}, and {b} liked it. At {time} both should be standing at "
            "{place}; {day} it is."
        ),
        (
            "Somebody passing {place} at {time} this {day} may see two people there, {b} and {a}, who are "
            "about to {do}."
        ),
    ],
    "borrow": [
        (
            "{b} owns a {item}, and {a} does not. That will change for a while, at {time}, when {a} fetches "
            "it from {place}."
        ),
        (
            "The {item} is going to change hands: {b} has it, {a} gets it, {place} is where it happens, "
            "{time} is when."
        ),
        "Come {day}, the {item} of {b} is in the hands of {a}. It gets there by way of {place}, {time}.",
    ],
    "shopping": [
        (
            "There was no {food} in the house, nor any {food2}. {a} noticed and {b} went shopping, back by "
            "{time}."
        ),
        (
            "{food} and {food2}: those were the two things on the list of {b}, and {a} had written it. The "
            "door opens at {time}."
        ),
        "{b} had an errand from {a}, namely {food} and also {food2}, and the kitchen gets both by {time}.",
    ],
    "move": [
        (
            "{day2} was the plan of {a} and {b}, but {reason} got in the way. The new plan says {day}, "
            "{time}: {do}."
        ),
        (
            "Had it not been for {reason}, {a} would be free this {day2}. Never mind, {b} said, and so they "
            "{do} the {day} after, {time}."
        ),
        "Now it is {day}, {time}, and no longer {day2}. {b} took it well that {a} had {reason}.",
    ],
    "gift": [
        (
            "A {gift}! That is what {c} is going to unwrap this {day}. {b} and {a} picked it, and {place} is "
            "where {a} finds one."
        ),
        (
            "The party of {c} is this {day}. Nothing is bought yet, but {a} knows the way to {place} and "
            "asks for a {gift} there."
        ),
        (
            "What do people like {b} and {a} choose for {c}? It is a {gift}, paid for by {a}, from {place}, "
            "in time for {day}."
        ),
    ],
    "ride": [
        (
            "There is a free seat in the car of {b}, and {a} is glad about it: {time}, then off to {place}, "
            "this {day}."
        ),
        (
            "How does {a} get to {place}? Not on foot. {b} stops at the door at {time}, it is {day}, and "
            "away they go."
        ),
        "{day}, {time}: {b} starts the car, {a} gets in, and the next stop is {place}.",
    ],
    "help": [
        "Alone, {a} would never {chore}. With {b} there, and a {item}, it should be easy: {day}, {time}.",
        (
            "{chore}, that was the task, and {a} did not like it. {b} comes along at {time} this {day}, "
            "carrying a {item}."
        ),
        (
            "A {item} and a friend are all it takes. The friend is {b}, the one in need is {a}, the time is "
            "{time}, {day}."
        ),
    ],
    "repair": [
        (
            "Poor {a}: the {device} does not do its job. {b} has heard of {c}, who sits at {place}, and "
            "{day} is the day to go."
        ),
        (
            "{c} knows all about a {device}. That is good news for {a}, who heard it from {b} and walks to "
            "{place} this {day}."
        ),
        (
            "This {day} the {device} travels to {place}, carried by {a}. There {c} has a look at it, if {b} "
            "was right."
        ),
    ],
}
LEADS = [
    (
        "[So much for the talk.|That was all they said.|They had no more to say.|Here the talk ends.|What "
        "came of it?] "
    ),
    (
        "[I heard of it later.|My {kin} told me the rest.|In other words:|In a letter one would read it like "
        "this.] "
    ),
    "",
]
ENDS = [
    "",
    " [Nobody complained.|All were content.|We shall see.|It may rain.|Such is life.|Time will tell.]",
]

STORIES = [
    "{a} lived [near|behind|next to] {place} with {c}. [Every|Each] {day} they [used to|would] {do}.",
    (
        "[One|On a cold|On a bright] {day} {a} found a {item} [near|behind|in front of] {place}. [Whose is "
        "it|Who lost it]?"
    ),
    '"It is mine," [said|called|answered] {b}, "I [need|use|want] the {item} [to {do}|to {chore}|for {c}]."',
    (
        "{a} [gave|handed|showed] {b} the {item}, and {b} gave {a} [some|a bag of] {food} [in return|and a "
        "{gift}]."
    ),
    (
        "At {time} [the bell rang|it began to rain|the lights went out], and {a} [ran|walked|hurried] to "
        "{place}."
    ),
    (
        "{b} [was late|came first|had forgotten the {gift}], because of {reason}. {a} [laughed|waited|was "
        "angry] all the same."
    ),
    (
        "[At school|In the evening class], the teacher wrote a [word|text|sentence|question] on the board: "
        "{food}, {item}, {gift}."
    ),
    (
        "[Name|Tell me|Give me] one [answer|word|example] for each line of the list, said {c}. {a} [did|"
        "tried|refused]."
    ),
    (
        "{a} [spells|reads|writes] the same text twice: {food}, {food2}, {food3}. And again: {food}, "
        "{food2}, {food3}."
    ),
    (
        "Between {place} and {place2} there [is|was] a [small|narrow|dark] street, where {b} [decided|began|"
        "used] to {do}."
    ),
    (
        "The third person in the room was {c}, who [added nothing|said nothing|belonged to nobody]. The "
        "speakers were {a} and {b}."
    ),
    (
        "In the end {a}, {b} and {c} went to {place} to {do}, and [the {item} was forgotten|they ate the "
        "{food}|everybody went home]."
    ),
]
TITLES = (
    "Notes|From last week|What people say|For {c}|Things to keep|A talk|In short|Read this first|{day}|"
    "Old papers"
)


def make_thread(rng: random.Random) -> str:
    """A post and answers to it, some of which quote it."""
    topic = rng.choice(list(TOPICS))
    posts = [make_post(rng, topic)]
    for _ in range(rng.randint(0, 3)):
        quote = rng.choice(rng.choice(posts).split(". ")).strip(". ")
        opening = rng.choice([f"> {quote}\n\n", f"{rng.choice(NAMES.split('|'))} wrote: {quote}.\n\n", ""])
        posts.append(opening + make_post(rng, topic))
    return "\n\n".join(posts)


def make_retold(rng: random.Random) -> str:
    """A dialogue and what came of it, in prose; now and then between fences, as in notes."""
    scenario, dialogue, slots = make_dialogue(rng)
    known = tellable(RETELLINGS[scenario], dialogue, slots)
    if not known:
        return dialogue
    slots |= topic_words(rng, rng.choice(list(TOPICS)))
    parts = (rng.choice(LEADS), rng.choice(known), rng.choice(ENDS))
    told = " ".join(filter(None, (expand(rng, part, slots) for part in parts)))
    told = told[0].upper() + told[1:]
    return f"```\n{dialogue}\n```\n\n{told}" if rng.random() < 0.3 else f"{dialogue}\n\n{told}"


def make_story(rng: random.Random) -> str:
    """Three to seven sentences about the same three people."""
    slots = draw_slots(rng)
    return " ".join(expand(rng, text, slots) for text in rng.sample(STORIES, rng.randint(3, 7)))


def make_notes(rng: random.Random) -> str:
    """A document with headings, lists, and posts or dialogues between fences."""
    slots = draw_slots(rng)
    parts = []
    for _ in range(rng.randint(1, 3)):
        parts.append("#" * rng.randint(1, 3) + " " + expand(rng, "[" + TITLES + "]", slots))
        words = [
            slots[key] for key in rng.sample(["food", "food2", "item", "gift", "place", "chore", "device"], 4)
        ]
        bullets = "\n".join(f"- {word}" for word in words)
        fenced = make_dialogue(rng)[1] if rng.random() < 0.5 else make_post(rng, rng.choice(list(TOPICS)))
        parts += rng.sample([bullets, f"```\n{fenced}\n```", make_story(rng)], rng.randint(1, 2))
    return "\n\n".join(parts)


def make_groups(rng: random.Random) -> str:
    """The names of the classes as a list, without any text that could belong to them."""
    names = rng.sample(list(TOPICS), rng.randint(4, len(TOPICS)))
    start = expand(rng, "[Groups on this server|Each of these groups is read here|The list of groups]:", {})
    return start + rng.choice(["\n\n- " + "\n- ".join(names), " " + ", ".join(names) + "."])


def make_corpus(count: int) -> list[str]:
    """The documents of pretraining, none of which repeats a text of the data."""
    rng = random.Random(SEED)
    makers = [make_thread, make_retold, make_story, make_notes, make_groups]
    corpus = [rng.choices(makers, [24, 56, 8, 10, 2])[0](rng) for _ in range(count)]
    check_corpus(corpus)
    return corpus


def check_corpus(corpus: list[str]) -> None:
    """Stops where pretraining would show a text of the data, a summary, a label, or a prompt's heading."""
    whole = "\n\n\n".join(corpus)
    for path in sorted((FOLDER / "data").glob("*.jsonl")):
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            texts = [row[key] for key in ("text", "dialogue", "summary") if key in row]
            assert not any(text in whole for text in texts), f"{path.name}: in the corpus: {row}"
    assert not any(f"### {cue}:" in whole for cue in ("Text", "Class", "Dialogue", "Summary"))
    with_labels = [text for text in corpus if any(label in text for label in TOPICS)]
    assert all("group" in text.splitlines()[0].lower() for text in with_labels)


def make_tokenizer(
    corpus: list[str], vocabulary: int = VOCABULARY, longest: int = 2048
) -> PreTrainedTokenizerFast:
    """Byte-level BPE that begins a text with <s> and never ends it, like Llama 2; no text is lost in it."""
    specials = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
    )


def make_rows(tokenizer: PreTrainedTokenizerFast, corpus: list[str], length: int) -> list[list[int]]:
    """Documents between <s> and </s>, in rows of equal length; a row begins where a document does."""
    rows = [[]]
    for ids in tokenizer(corpus)["input_ids"]:
        # What does not fit is dropped: a retelling without its dialogue would teach to make facts up.
        rows[-1] += [*ids, tokenizer.eos_token_id][: length - len(rows[-1])]
        if len(rows[-1]) == length:
            rows.append([])
    return rows[:-1]


def make_batches(tokenizer: PreTrainedTokenizerFast, corpus: list[str]) -> list[torch.Tensor]:
    """The steps of training: first short rows, which are quick, then long ones, for prompts with examples."""
    batches, start = [], 0
    for share, length, size in PHASES:
        end = start + round(share * len(corpus))
        rows = make_rows(tokenizer, corpus[start:end], length)
        batches += [
            torch.tensor(rows[first : first + size]) for first in range(0, len(rows) - size + 1, size)
        ]
        start = end
    return batches


def make_llama() -> LlamaForCausalLM:
    """An untrained Llama of 1.5 million weights; all widths are multiples of 64, the block size of NF4."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=True,
    )
    return LlamaForCausalLM(config)


def make_optimizers(model: LlamaForCausalLM, steps: int) -> Iterator[tuple]:
    """Muon for the matrices, AdamW for the rest."""
    matrices = [
        weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name
    ]
    others = [weight for name, weight in model.named_parameters() if weight.ndim == 1 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=4e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adamw):
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / 30, 1.25 * (1 - step / steps) + 0.01)
        )
        yield optimizer, schedule


def pretrain(model: LlamaForCausalLM, batches: list[torch.Tensor]) -> float:
    """One pass over the batches; the mean loss of the last 20."""
    started, losses = time.monotonic(), []
    optimizers = list(make_optimizers(model, len(batches)))
    for step, batch in enumerate(batches, start=1):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in optimizers:
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if step % 20 == 0 or step == len(batches):
            mean, spent = sum(losses[-20:]) / len(losses[-20:]), time.monotonic() - started
            print(f"step {step}/{len(batches)}  loss {mean:.3f}  {spent:.0f} s", flush=True)
    return mean


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--documents", type=int, default=48000, help="documents to pretrain on (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=FOLDER / "model", help="folder to write (default: demo/model)"
    )
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    started = time.monotonic()
    corpus = make_corpus(arguments.documents)
    tokenizer = make_tokenizer(corpus[:8000])
    batches = make_batches(tokenizer, corpus)
    model = make_llama()
    tokens = sum(batch.numel() for batch in batches)
    print(
        f"{tokens:,} tokens, {model.num_parameters():,} weights, {time.monotonic() - started:.0f} s",
        flush=True,
    )
    loss = pretrain(model.train(), batches)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2)
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    size = sum(path.stat().st_size for path in arguments.out.iterdir())
    print(f"loss {loss:.3f}, {time.monotonic() - started:.0f} s, {arguments.out}: {size:,} bytes")


if __name__ == "__main__":
    main()
