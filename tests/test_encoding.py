"""Prompts and answers as tokens: one BOS, a learned EOS, and nothing but the text gives way when it gets too
long."""

import argparse
import shutil

import pytest
from conftest import DEMO_MODEL
from transformers import AddedToken, AutoTokenizer

import prompts
from study import cli, data, encoding
from study.cli import UserError

LABELS = ["rec.autos", "sci.space", "C++"]
CHAT = "{{ bos_token }}[INST] {{ messages[0]['content'] }} [/INST]"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


@pytest.fixture(scope="module")
def llama(real_data):
    return AutoTokenizer.from_pretrained(real_data / "llama2_tokenizer")


def flags(**changes) -> argparse.Namespace:
    plain = {"task": "classification", "prompt_type": "few-shot", "chat_template": "none"}
    return argparse.Namespace(**{**plain, "max_new_tokens": 20, "max_seq_length": 200, **changes})


def long_text(words: int) -> str:
    return " ".join(f"word{i} about ``` and ### Class: rec.autos" for i in range(words))


def check_sequence(tokenizer, text: str, label: str) -> None:
    [example], _ = encoding.encode_examples(tokenizer, "classification", [(text, label)], flags())
    assert example.ids[0] == tokenizer.bos_token_id
    assert example.ids.count(tokenizer.bos_token_id) == 1
    assert example.ids[-1] == tokenizer.eos_token_id
    assert example.ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(example.ids[example.answer_start : -1]).strip() == label


@pytest.mark.parametrize("text", ["short", "", "with <s> and </s> inside </s>", long_text(400)])
@pytest.mark.parametrize("label", LABELS)
def test_a_sequence_has_one_bos_and_ends_in_the_label_and_one_eos(tokenizer, text, label):
    check_sequence(tokenizer, text, label)


def test_an_added_control_token_inside_a_text_stays_text():
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.add_tokens(AddedToken("<|end|>", special=True))
    [end] = tokenizer("<|end|>", add_special_tokens=False)["input_ids"]
    [example], _ = encoding.encode_examples(tokenizer, "summarization", [("a<|end|>b", "c <|end|>")], flags())
    assert end not in example.ids


def test_an_answer_that_leaves_no_room_is_named(tokenizer):
    pairs = [("short", "fine"), ("short", long_text(40))]
    with pytest.raises(UserError, match=r'--max_seq_length 200 is too few for the answer "word0 about'):
        encoding.encode_examples(tokenizer, "summarization", pairs, flags())


def test_so_it_is_with_the_llama_2_tokenizer(llama):
    for text in ("short", "with <s> and </s> inside </s>", long_text(400)):
        check_sequence(llama, text, "comp.os.ms-windows.misc")


def test_training_and_inference_see_the_same_prompt_tokens(tokenizer):
    pairs = [(text, "sci.space") for text in ("short", long_text(30), long_text(3000), "  spaced\n\n")]
    examples, cut = encoding.encode_examples(tokenizer, "classification", pairs, flags())
    prompts_seen, cut_too = encoding.encode_prompts(
        tokenizer, "classification", [t for t, _ in pairs], flags()
    )
    assert [example.ids[: example.answer_start] for example in examples] == prompts_seen
    assert cut == cut_too == 2


def test_a_long_text_is_cut_to_fill_the_budget_and_instruction_label_and_cue_stay(tokenizer):
    [example], cut = encoding.encode_examples(tokenizer, "classification", [(long_text(500), "C++")], flags())
    prompt = tokenizer.decode(example.ids[1 : example.answer_start])
    assert cut == 1
    assert prompt.startswith(
        "Name the class of the text between the fences.\n\n### Text:\n````\nword0 about ```"
    )
    assert prompt.endswith("\n````\n\n### Class:")
    assert 180 - 12 <= example.answer_start <= 180


def test_an_answer_longer_than_its_room_takes_from_the_text_and_not_from_itself(tokenizer):
    summary = "Anna meets Tom at the station and then they walk along the river to the old mill. " * 2
    settings = flags(max_new_tokens=5)
    [example], cut = encoding.encode_examples(
        tokenizer, "summarization", [(long_text(99), summary)], settings
    )
    assert cut == 1
    assert len(example.ids) <= 200
    assert tokenizer.decode(example.ids[example.answer_start : -1]).strip() == summary.strip()


def test_a_class_longer_than_the_answers_room_is_refused_by_name(tokenizer):
    with pytest.raises(UserError, match=r'--max_new_tokens 2 .*"rec.autos"'):
        encoding.encode_examples(tokenizer, "classification", [("a", "rec.autos")], flags(max_new_tokens=2))


def test_an_instruction_that_does_not_fit_is_refused_naming_the_flag(tokenizer):
    with pytest.raises(UserError, match="--max_seq_length"):
        encoding.encode_prompts(tokenizer, "classification", ["text"], flags(max_seq_length=25))


def test_few_shot_prompts_fit_and_keep_every_label_and_the_query(tokenizer):
    shots = [(f"{label} {long_text(60)}", label) for label in LABELS]
    queries = ["a short query", f"the query {long_text(60)}"]
    encoded, cut = encoding.encode_baseline(tokenizer, queries, LABELS, shots, 420, flags())
    for ids, query in zip(encoded, queries, strict=True):
        prompt = tokenizer.decode(ids[1:])
        assert len(ids) <= 420 - 20
        assert all(f"### Class: {label}\n\n### Text:" in prompt for label in LABELS)
        assert f"\n{query[:9]}" in prompt
        assert prompt.endswith("### Class:")
    assert cut["examples"] == 3
    assert cut["example_tokens"] > 100
    assert cut["texts"] == 1


def test_few_shot_examples_that_fit_are_whole(tokenizer):
    shots = [("one text", "C++"), ("another text", "rec.autos")]
    [ids], cut = encoding.encode_baseline(tokenizer, ["query"], LABELS, shots, 2048, flags())
    assert tokenizer.decode(ids[1:]) == prompts.build_prompt(
        "classification", "few-shot", "query", LABELS, shots
    )
    assert cut == {"examples": 0, "example_tokens": 0, "texts": 0}


def test_a_context_too_small_for_the_examples_is_refused(tokenizer):
    with pytest.raises(UserError, match="--shots"):
        encoding.encode_baseline(tokenizer, ["q"], LABELS, [("text " * 9, "C++")] * 9, 150, flags())


def test_shots_are_one_of_each_class_by_the_seed():
    pairs = [(f"{label} {i}", label) for label in LABELS for i in range(20)]
    chosen = encoding.choose_shots(pairs, "classification", 1, seed=1)
    assert sorted(label for _, label in chosen) == sorted(LABELS)
    assert chosen == encoding.choose_shots(pairs, "classification", 1, seed=1)
    assert chosen != encoding.choose_shots(pairs, "classification", 1, seed=2)
    assert len(encoding.choose_shots(pairs, "classification", 3, seed=1)) == 9
    assert len(encoding.choose_shots(pairs, "summarization", 2, seed=1)) == 2
    with pytest.raises(UserError, match="--shots 21"):
        encoding.choose_shots(pairs, "classification", 21, seed=1)


def test_the_chat_template_is_the_tokenizers_own_and_adds_no_second_bos(tokenizer, tmp_path):
    shutil.copytree(DEMO_MODEL, tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text(CHAT)
    chat = AutoTokenizer.from_pretrained(tmp_path / "chat")
    settings = flags(prompt_type="zero-shot", chat_template="auto")
    [ids], _ = encoding.encode_baseline(chat, ["a </s> b"], LABELS, [], 2048, settings)
    plain = prompts.build_prompt("classification", "zero-shot", "a < /s> b", LABELS)
    assert chat.decode(ids) == f"<s>[INST] {plain} [/INST]"
    assert ids.count(chat.bos_token_id) == 1
    [without], _ = encoding.encode_baseline(tokenizer, ["a </s> b"], LABELS, [], 2048, settings)
    assert tokenizer.decode(without[1:]) == plain


def test_every_real_post_and_dialogue_gives_a_whole_sequence(llama, real_data):
    for task, name, longest in (("classification", "newsgroups", 20), ("summarization", "samsum", 100)):
        file = real_data / f"{name}_test.jsonl.gz"
        split = data.load(cli.parse_args(task, "", ["--test_file", str(file)]), ["test"])["test"]
        settings = flags(task=task, max_seq_length=512, max_new_tokens=longest)
        examples, cut = encoding.encode_examples(llama, task, split.examples, settings)
        assert 0 < cut < len(examples) / 3
        cue = llama("### Class:" if task == "classification" else "### Summary:")["input_ids"][-2:]
        for example in examples:
            assert len(example.ids) <= 512
            assert example.ids[example.answer_start - 2 : example.answer_start] == cue
            assert example.ids.count(llama.bos_token_id) == example.ids.count(llama.eos_token_id) == 1
