"""Prompts and answers as tokens: one BOS, a learned EOS, and nothing but the text gives way when it gets too
long."""

import argparse
import json
import shutil
from datetime import datetime

import pytest
from conftest import DEMO_MODEL
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

import prompts
from study import cli, data, encoding, reading
from study.errors import UserError

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


def test_a_text_is_cut_where_its_next_token_begins(tokenizer):
    text = f"Grüße, 漢字\n\n  {long_text(9)}"
    begins = [begin for begin, _ in tokenizer(text, return_offsets_mapping=True)["offset_mapping"] if begin]
    assert len(begins) > 50
    for count, begin in enumerate(begins, 1):
        assert encoding.first_tokens(tokenizer, text, count) == text[:begin].rstrip()
    assert encoding.first_tokens(tokenizer, text, 0) == ""
    assert encoding.first_tokens(tokenizer, text, len(begins) + 1) == text


def test_many_texts_are_cut_together_as_each_would_be_alone(tokenizer, monkeypatch):
    monkeypatch.setattr(reading, "TOGETHER", 8)
    texts = [long_text(words % 37) for words in range(50)]
    rooms = [20 + i % 3 for i in range(50)]
    together = [*encoding.fit_tuning(tokenizer, "classification", texts, rooms, 200)]
    each = [
        next(encoding.fit_tuning(tokenizer, "classification", [text], [room], 200))
        for text, room in zip(texts, rooms, strict=True)
    ]
    assert together == each
    assert 10 < sum(cut for _, cut, _ in together) < 40
    assert all(len(ids) <= 200 - room for (*_, ids), room in zip(together, rooms, strict=True))


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


def beginning_with(tokenizer_json: dict, ids: dict[str, int]) -> dict:
    """A tokenizer.json that puts these tokens before a text and </s> behind it."""
    special = {name: {"id": name, "ids": [id], "tokens": [name]} for name, id in {**ids, "</s>": 2}.items()}
    single = [{"SpecialToken": {"id": name, "type_id": 0}} for name in ids]
    single += [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}
    return {**tokenizer_json, "post_processor": template}


@pytest.mark.parametrize("ids", [{"</s>": 2, "<s>": 1}, {"<s>": 1}, {"<unk>": 0}, {}], ids=str)
@pytest.mark.parametrize("named", [True, False])
def test_a_prompt_begins_with_what_the_tokenizer_itself_puts_there_and_has_no_end(tmp_path, ids, named):
    folder = shutil.copytree(DEMO_MODEL, tmp_path / "model")
    content = beginning_with(json.loads((folder / "tokenizer.json").read_text()), ids)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if not named:
        config.pop("bos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bare = tokenizer("hi", add_special_tokens=False)["input_ids"]
    assert encoding.prompt_ids(tokenizer, "hi") == [*ids.values(), *bare]
    assert encoding.prompt_ids(tokenizer, "hi") == tokenizer("hi")["input_ids"][:-1]
    if "<s>" in ids:  # as a chat template may write it
        assert encoding.prompt_ids(tokenizer, "<s>hi").count(1) == 1


def lossy():
    """A tokenizer of lower case that knows no Chinese."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    letters = ["<unk>", "</s>", *map(chr, range(32, 127))]
    made = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["Hockey", "hockey"], '"Hockey" and "hockey" have the same tokens'),
        (["北", "京"], '"北" and "京" have the same tokens|class "北" comes back'),
        (["a", "京"], 'class "京" comes back from this tokenizer as'),
        (["a", "b</s>c"], 'class "b</s>c" comes back from this tokenizer as'),
        (["a", "a much longer name"], '--max_new_tokens 9 is too few for class "a much longer name", of'),
    ],
)
def test_a_class_that_would_not_come_back_as_itself_is_refused(labels, message):
    with pytest.raises(UserError, match=message):
        encoding.label_answers(lossy(), labels, 9)


def test_classes_that_come_back_are_taken(tokenizer):
    for reader, labels in (
        (lossy(), ["Hockey", "C++", "ﬁne"]),
        (tokenizer, [*LABELS, "Müller", "北京", "a</b>"]),
    ):
        assert len(encoding.label_answers(reader, labels, 60)) == len(labels)


def test_free_decoding_refuses_a_class_that_can_not_be_written_too(tokenizer):
    with pytest.raises(UserError, match=r'--max_new_tokens 2 is too few for class "rec\.autos", of'):
        encoding.label_answers(tokenizer, LABELS, 2)


def chatty(template: str):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.chat_template = template
    return tokenizer


TURNS = "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}\n{% endfor %}{{ '[assistant]\n' }}"


def test_behind_a_chat_template_a_class_has_the_tokens_that_follow_it_with_and_without_a_space():
    tokenizer, settings = chatty(TURNS), flags(prompt_type="zero-shot", chat_template="auto")
    cue = encoding.chat_cue(tokenizer, settings)
    assert cue == "\n[assistant]\n"
    [prompt], _ = encoding.encode_baseline(tokenizer, ["text"], LABELS, [], 2048, settings)
    answers = encoding.label_answers(tokenizer, LABELS, 20, cue)
    texts = {tokenizer.decode([*prompt, *answer]) for answer in answers}
    whole = tokenizer.decode(prompt)
    assert texts == {f"{whole}{space}{label}</s>" for label in LABELS for space in ("", " ")}
    for answer in answers:
        assert tokenizer(tokenizer.decode(answer[:-1]), add_special_tokens=False)["input_ids"] == answer[:-1]
    assert encoding.chat_cue(tokenizer, flags()) is None
    assert encoding.chat_cue(chatty(""), settings) is None


def test_a_template_that_writes_the_date_writes_the_same_every_day(monkeypatch):
    import transformers.utils.chat_template_utils as rendering

    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2031, 1, 1)

    settings = flags(prompt_type="zero-shot", chat_template="auto")
    seen = []
    for clock in (datetime, Later):
        monkeypatch.setattr(rendering, "datetime", clock)
        tokenizer = chatty("{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}")
        seen.append(encoding.encode_baseline(tokenizer, ["text"], LABELS, [], 2048, settings)[0])
    assert seen[0] == seen[1]
    assert tokenizer.decode(seen[0][0]).startswith("<s>26 Jul 2024: Each text belongs")


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('roles must alternate') }}", "{{ messages[0]['content'] + 1 }}", "{% if %}"],
)
def test_a_template_that_fails_is_one_line(template):
    settings = flags(prompt_type="zero-shot", chat_template="auto")
    with pytest.raises(
        UserError, match="--chat_template auto: the checkpoint's own template fails: "
    ) as error:
        encoding.encode_baseline(chatty(template), ["text"], LABELS, [], 2048, settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "template",
    [
        "[user] [assistant]",
        "{{ messages[0].content | upper }}",
        "{{ messages[0].content.split('\\n')[0] }}",
        "{{ messages[0].content[:40] }}",
    ],
)
def test_a_template_that_does_not_write_the_prompt_is_refused(template):
    settings = flags(prompt_type="zero-shot", chat_template="auto")
    for _ in range(2):
        with pytest.raises(UserError, match=r"--chat_template auto: .* (does not write the prompt|fails)"):
            encoding.encode_baseline(chatty(template), ["one\ntext"], LABELS, [], 2048, settings)


@pytest.mark.parametrize("greeting", ["{{ ['Hi', 'Hello'] | random }} ", "{{ lipsum(1) }}"])
def test_a_template_that_draws_at_random_is_refused(greeting):
    settings = flags(prompt_type="zero-shot", chat_template="auto")
    with pytest.raises(UserError, match=r"writes something else each time|fails"):
        encoding.chat_cue(chatty(f"{greeting}{{{{ messages[0].content }}}}"), settings)


def test_a_template_for_parts_of_several_kinds_is_given_the_prompt_as_one():
    parts = "{% for part in messages[0].content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    settings = flags(prompt_type="zero-shot", chat_template="auto")
    tokenizer = chatty(f"USER: {parts} ASSISTANT:")
    [prompt], _ = encoding.encode_baseline(tokenizer, ["the text"], LABELS, [], 2048, settings)
    assert "```\nthe text\n```" in tokenizer.decode(prompt)
    assert encoding.chat_cue(tokenizer, settings) == " ASSISTANT:"


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
