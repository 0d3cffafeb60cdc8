"""Answers do not depend on batching, come back in order, end where the model ends them, and keep to the
labels if asked."""

import copy
import json
import shutil

import pytest
import torch
from conftest import DEMO_DATA, DEMO_MODEL, PROCESS, confidence_by_hand
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from prompts import build_prompt
from study import generation
from study.encoding import label_answers, prompt_ids
from study.errors import UserError
from study.model import load_base, merge

NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


@pytest.fixture(scope="module")
def model():
    return load()


def load():
    """The demo checkpoint in real 4-bit weights, computing in float32 so that a tie can't be decided by
    rounding."""
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL, quantization_config=NF4, dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    rows = [json.loads(line) for line in (DEMO_DATA / "dialogues_test.jsonl").read_text().splitlines()[:10]]
    texts = [row["dialogue"][: 60 * (1 + i % 4)] for i, row in enumerate(rows)]
    return [prompt_ids(tokenizer, build_prompt("summarization", "instruction", text)) for text in texts]


def test_batched_and_single_answers_agree_and_keep_their_order(model, tokenizer, prompts):
    batched = generation.generate(model, tokenizer, prompts, 16, batch_size=4)
    plain = []
    for ids in prompts:  # plain generate, one prompt at a time, without padding
        config = GenerationConfig(max_new_tokens=16, do_sample=False, eos_token_id=2, pad_token_id=2)
        output = model.generate(input_ids=torch.tensor([ids]), generation_config=config)[0, len(ids) :]
        plain.append(tokenizer.decode(output, skip_special_tokens=True))
    assert batched.texts == plain
    assert len(set(plain)) > 3
    assert batched.texts == generation.generate(model, tokenizer, prompts, 16, "auto").texts
    assert batched.input_tokens == sum(map(len, prompts))


def test_every_answer_is_one_of_the_labels_when_constrained(model, tokenizer, prompts):
    labels = ["rec.autos", "rec.autos.old", "sci.space", "C++", "a longer class name"]
    allowed = label_answers(tokenizer, labels)
    answers = generation.generate(model, tokenizer, prompts, 20, 4, allowed)
    assert all(text.strip() in labels for text in answers.texts)
    free = generation.generate(model, tokenizer, prompts, 20, 4)
    assert not any(text.strip() in labels for text in free.texts)


TREES = {  # labels, and tokens that end an answer
    "of one branching": (["yes", "no", "so so"], [2]),
    "where classes go on from others": (["sci", "sci.med", "sci.med.news", "sci.space", "soc"], [2]),
    "of two classes, one of which the other goes on from": (["rec", "rec.autos"], [2]),
    "with several ends": (["a", "a lamp", "talk"], [2, 311]),  # of which answers have either, and " lamp"
}


@pytest.mark.parametrize(("labels", "ends"), TREES.values(), ids=TREES)
def test_confidences_are_those_of_every_answer_scored_by_hand(tokenizer, prompts, monkeypatch, labels, ends):
    exact = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)  # 4 bits round on a CPU
    monkeypatch.setattr(generation, "stop_tokens", lambda *_: ends)
    given = label_answers(tokenizer, labels)
    allowed = generation.with_all_ends(given, ends)
    found = generation.generate(exact, tokenizer, prompts, 20, 4, given)
    for prompt, text, confidence in zip(prompts, found.texts, found.confidences, strict=True):
        by_hand = {
            label: confidence_by_hand(exact, prompt, ids, allowed, ends)
            for label, ids in zip(labels, given, strict=True)
        }
        assert sum(by_hand.values()) == pytest.approx(1)
        label = text.removesuffix(tokenizer.decode(ends[1:])).strip()
        assert confidence == pytest.approx(by_hand[label], rel=1e-5)
    assert len(ends) == 1 or {" a", " a lamp", f" a{tokenizer.decode(ends[1:])}"} == {*found.texts}
    assert 0 < min(found.confidences) <= max(found.confidences) <= 1
    alone = generation.generate(exact, tokenizer, prompts, 20, 1, given)
    assert alone.confidences == pytest.approx(found.confidences, rel=1e-5)


def test_answers_that_are_not_chosen_among_have_no_confidence(model, tokenizer, prompts):
    assert generation.generate(model, tokenizer, prompts[:2], 4).confidences is None


def test_where_one_answer_alone_is_left_it_is_certain(model, tokenizer, prompts):
    assert generation.generate(model, tokenizer, prompts[:2], 5, 2, [[300, 500, 2]]).confidences == [1, 1]


def test_answers_longer_than_what_may_be_written_are_refused(model, tokenizer, prompts):
    with pytest.raises(UserError, match="--max_new_tokens 2 cuts class names: the longest has 3 tokens"):
        generation.generate(model, tokenizer, prompts, 2, allowed=[[5, 2], [5, 6, 7, 2]])


def test_constrained_greedy_takes_the_likeliest_allowed_token(model, tokenizer, prompts):
    first = [[token, tokenizer.eos_token_id] for token in (300, 500, 700, 900)]
    answers = generation.continue_batch(model, prompts[:3], 5, [tokenizer.eos_token_id], first)
    for ids, (answer, _) in zip(prompts[:3], answers, strict=True):
        logits = model(torch.tensor([ids])).logits[0, -1]
        assert answer[0] == max((300, 500, 700, 900), key=lambda token: logits[token])
        assert answer[1:] == [tokenizer.eos_token_id]


ODD = {  # what a checkpoint's generation_config.json may say, beside the ends of sequence
    **{"min_new_tokens": 9, "min_length": 90, "max_length": 3, "suppress_tokens": list(range(300))},
    **{"begin_suppress_tokens": list(range(300, 2048)), "forced_eos_token_id": 7, "forced_bos_token_id": 9},
    **{
        "bad_words_ids": [[i] for i in range(3, 900)],
        "sequence_bias": [[[5], 90.0]],
        "repetition_penalty": 9.0,
    },
    **{
        "no_repeat_ngram_size": 1,
        "encoder_no_repeat_ngram_size": 1,
        "exponential_decay_length_penalty": [1, 9.0],
    },
    **{
        "guidance_scale": 3.0,
        "do_sample": True,
        "temperature": 9.0,
        "top_k": 3,
        "num_beams": 3,
        "num_return_sequences": 2,
    },
    **{
        "length_penalty": 9.0,
        "early_stopping": True,
        "max_time": 1e-9,
        "stop_strings": ["e"],
        "use_cache": False,
    },
    **{"cache_implementation": "static", "prompt_lookup_num_tokens": 3, "return_dict_in_generate": True},
    **{
        "output_scores": True,
        "output_logits": True,
        "renormalize_logits": True,
        "remove_invalid_values": True,
    },
    **{
        "penalty_alpha": 0.6,
        "dola_layers": "low",
        "epsilon_cutoff": 0.1,
        "eta_cutoff": 0.1,
        "typical_p": 0.1,
    },
    **{"min_p": 0.5, "top_h": 0.5, "diversity_penalty": 1.0, "num_beam_groups": 3, "constraints": None},
    **{
        "force_words_ids": [[7]],
        "low_memory": True,
        "token_healing": True,
        "pad_token_id": 5,
        "bos_token_id": 9,
    },
    **{
        "decoder_start_token_id": 9,
        "watermarking_config": {"greenlist_ratio": 0.1, "bias": 9.0, "context_width": 1},
    },
    **{"assistant_early_exit": 1, "is_assistant": True, "num_assistant_tokens": 9, "prefill_chunk_size": 2},
    **{"encoder_repetition_penalty": 9.0, "disable_compile": True, "max_matching_ngram_size": 2},
}


def test_nothing_of_a_checkpoints_generation_config_changes_greedy_answers(model, prompts):
    allowed = [[300, 2], [500, 700, 2], [500, 2]]
    plain = [generation.continue_batch(model, prompts[:3], 8, [2], given) for given in (None, allowed)]
    own = model.generation_config
    try:
        fields = [name for name in vars(GenerationConfig()) if not name.startswith("_")]
        for name, value in (dict.fromkeys(fields, 1) | ODD).items():  # those of later versions, too
            model.generation_config = GenerationConfig()
            setattr(model.generation_config, name, value)  # unchecked, as a file may hold it
            odd = [generation.continue_batch(model, prompts[:3], 8, [2], given) for given in (None, allowed)]
            assert odd == plain, name
            assert getattr(model.generation_config, name) == value
    finally:
        model.generation_config = own


def test_the_ends_of_sequence_a_checkpoint_adds_are_kept_and_recorded(tmp_path, tokenizer, prompts):
    folder = shutil.copytree(DEMO_MODEL, tmp_path / "model")
    odd = {"min_new_tokens": 5, "eos_token_id": [2, 311], "no_such_field": 1}
    (folder / "generation_config.json").write_text(json.dumps(odd))
    base = load_base(str(folder), NF4)
    assert base.generation_config.to_diff_dict().keys() <= {"eos_token_id", "transformers_version"}
    answers = generation.generate(base, tokenizer, prompts[:2], 4)
    assert answers.ends == [2, 311]
    assert generation.describe(answers, PROCESS, {"metrics": {}}, "free")["ends"] == [2, 311]


def test_what_the_model_read_is_fingerprinted(model, tokenizer, prompts):
    one, same, other = (
        generation.generate(model, tokenizer, read, 1).prompts_sha256
        for read in (prompts[:2], [list(prompt) for prompt in prompts[:2]], prompts[1:3])
    )
    assert one == same != other


def test_a_class_that_another_goes_on_from_may_end_as_the_checkpoint_ends():
    allowed = [[5, 2], [5, 6, 2], [7, 2]]
    assert generation.with_all_ends(allowed, [2, 9]) == [*allowed, [5, 9]]
    assert generation.with_all_ends(allowed, [2]) == allowed


def test_an_answer_ends_at_the_first_end_token_and_counts_it():
    assert generation.up_to_end([5, 6, 2, 2, 2], [2]) == [5, 6, 2]
    assert generation.up_to_end([5, 6, 7], [2]) == [5, 6, 7]
    assert generation.up_to_end([5, 9, 2], [2, 9]) == [5, 9]


def test_merging_changes_no_answer(model, tokenizer, prompts):
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    # In eval mode bitsandbytes would repack the weights on the CPU.
    tuned = get_peft_model(load(), lora).train()
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn_like(parameter)
    ids = torch.tensor([prompts[0]])
    with torch.no_grad():
        adapted, plain = tuned(ids).logits, model(ids).logits
        merged = merge(copy.deepcopy(tuned))
        assert not [name for name, _ in merged.named_parameters() if "lora" in name]
        assert (merged(ids).logits - adapted).norm() < 1e-4 * (plain - adapted).norm()
    answers = generation.generate(copy.deepcopy(tuned), tokenizer, prompts, 16, merging="on")
    assert answers.texts == generation.generate(tuned, tokenizer, prompts, 16).texts


def test_every_answer_is_kept_at_once_for_those_decoded_alike(tmp_path, capsys):
    prompts, kept = [[1], [2], [3]], []
    for how in ("dense", "dense", "in 4 bits"):
        answers = generation.KeptAnswers(PROCESS, tmp_path / "eval.json", {"config_hash": "a"})
        answers.resume(prompts, how)
        kept.append(dict(answers.answers))
        for i in (0, 2):
            answers.add(i, ([i], i / 3))
    assert kept == [{}, {0: ([0], 0), 2: ([2], 2 / 3)}, {}]
    shown = capsys.readouterr().out
    assert "2 of 3 answers are there" in shown
    assert "no answer: the earlier attempt decoded with dense" in shown


class Stopped(Exception):
    pass


def test_a_killed_evaluation_goes_on_with_the_answers_it_has(
    model, tokenizer, prompts, tmp_path, monkeypatch, capsys
):
    path, run, asked = tmp_path / "eval.json", {"config_hash": "a"}, []

    def attempt(most: int, run: dict, force: bool = False) -> tuple[list[str], list[float]]:
        def answer(model, batch, *_):
            if len(asked) + len(batch) > most:
                raise Stopped
            asked.extend(map(tuple, batch))
            return [([len(prompt)], 1 / len(prompt)) for prompt in batch]

        asked.clear()
        monkeypatch.setattr(generation, "continue_batch", answer)
        kept = generation.KeptAnswers(PROCESS, path, run, force)
        answers = generation.generate(model, tokenizer, prompts, 16, 2, kept=kept)
        kept.discard()
        return answers.texts, answers.confidences

    with pytest.raises(Stopped):
        attempt(5, run)
    [kept] = tmp_path.iterdir()
    kept.write_text(kept.read_text() + '{"answers": {"0": [1, ')  # killed while it wrote
    before = set(asked)
    assert len(before) == 4
    with pytest.raises(Stopped):
        attempt(4, run)
    assert not before & set(asked)
    whole = attempt(len(prompts), run)
    assert whole[1] == [1 / len(prompt) for prompt in prompts]
    assert len(asked) == len(prompts) - 8
    assert "8 of 10 answers are there" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert whole == attempt(len(prompts), {"config_hash": "b"})

    with pytest.raises(Stopped):
        attempt(5, run)
    attempt(len(prompts), {"config_hash": "b"})  # another run takes over nothing
    assert len(asked) == len(prompts)
    with pytest.raises(Stopped):
        attempt(5, run)
    attempt(len(prompts), run, force=True)
    assert len(asked) == len(prompts)
