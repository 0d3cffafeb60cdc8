"""A packed example has the loss and the gradients that it has alone, in every architecture, and padding takes
over if not."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from study.encoding import Example
from study.packing import choose_batching, isolates, learned_places, loss_sum, pack, plan_steps, split_to_fit

CPU = torch.device("cpu")
SHAPE = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**SHAPE, "intermediate_size": 96}
CONFIGS = {
    "llama": LlamaConfig(**WIDE, num_key_value_heads=2),
    "mistral": MistralConfig(**WIDE, num_key_value_heads=2, sliding_window=7),
    "qwen2": Qwen2Config(**WIDE, num_key_value_heads=2),
    "gpt_neox": GPTNeoXConfig(**WIDE),
    "falcon": FalconConfig(**SHAPE, new_decoder_architecture=False, parallel_attn=True),
    "falcon_alibi": FalconConfig(**SHAPE, alibi=True, parallel_attn=False),
}
PACKED = ("llama", "mistral", "qwen2", "gpt_neox")


def make_model(name: str, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation="sdpa").to(
        dtype
    )
    for parameter in model.parameters():
        parameter.data *= 3  # attention must matter, or a leak would hide
    return model


def make_adapted(name: str):
    """A model with an adapter that is not zero, in the attention chosen for training, and whether it pads."""
    model = make_model(name)
    padded = choose_batching(model, "auto", CPU)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model.train(), padded


def make_examples(*lengths: tuple[int, int]) -> list[Example]:
    generator = random.Random(1)
    return [Example([generator.randrange(3, 97) for _ in range(p + a)], p) for p, a in lengths]


def alone(model, example: Example, loss_on: str) -> torch.Tensor:
    """The plain reference: one example, the whole sequence, no mask, no positions, through sdpa."""
    used = model.config._attn_implementation
    model.base_model.model.set_attn_implementation("sdpa")
    ids = torch.tensor([example.ids])
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    model.base_model.model.set_attn_implementation(used)
    first = example.answer_start - 1 if loss_on == "answer" else 0
    return F.cross_entropy(logits[first:], ids[0, first + 1 :], reduction="sum")


def gradients(model, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("loss_on", ["answer", "all"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_has_the_loss_and_gradients_of_its_examples_one_by_one(name, loss_on):
    model, padded = make_adapted(name)
    examples = make_examples((20, 6), (37, 3), (7, 9), (33, 1))
    reference = sum(gradients(model, alone(model, example, loss_on)) for example in examples)
    total = sum(alone(model, example, loss_on).item() for example in examples)
    loss = loss_sum(model, examples, loss_on, padded, CPU)
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert (gradients(model, loss) - reference).norm() <= 1e-4 * reference.norm()
    assert padded == (name not in PACKED)


@pytest.mark.parametrize("name", PACKED)
def test_changing_one_packed_example_leaves_the_others_losses_alone(name):
    model, _ = make_adapted(name)
    one, two, other = make_examples((9, 4), (12, 5), (9, 4))
    with torch.no_grad():
        before = loss_sum(model, [one, two], "all", False, CPU) - alone(model, one, "all")
        after = loss_sum(model, [other, two], "all", False, CPU) - alone(model, other, "all")
    assert before.item() == pytest.approx(after.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["falcon", "falcon_alibi"])
def test_an_architecture_that_leaks_is_padded_and_says_so_in_one_line(name, capsys):
    assert choose_batching(make_model(name), "auto", CPU)
    assert len(capsys.readouterr().out.strip().splitlines()) == 1


@pytest.mark.parametrize("name", PACKED)
def test_the_probe_sees_a_leak(name, monkeypatch):
    model = make_model(name)
    model.set_attn_implementation("packed")
    assert isolates(model, CPU)

    def borderless(examples, loss_on, device):
        inputs, places, targets = pack(examples, loss_on, device)
        tokens = inputs["input_ids"].shape[1]
        return {**inputs, "cu_seq_lens_q": torch.tensor([0, tokens])}, places, targets

    monkeypatch.setattr("study.packing.pack", borderless)
    assert not isolates(model, CPU)


def test_a_row_in_bfloat16_is_as_exact_as_an_example_alone_in_bfloat16():
    exact, plain, packed = (
        make_model("llama", dtype) for dtype in (torch.float32, torch.bfloat16, torch.bfloat16)
    )
    assert not choose_batching(packed, "auto", CPU)
    examples = make_examples((20, 6), (37, 3))
    inputs, _, _ = pack(examples, "all", CPU)
    with torch.no_grad():
        truth = torch.cat([exact(torch.tensor([example.ids])).logits[0, :-1] for example in examples])
        rough = torch.cat([plain(torch.tensor([example.ids])).logits[0, :-1] for example in examples])
        ours = packed(**inputs, use_cache=False).logits[0]
    assert 0 < (ours - truth).norm() <= 1.2 * (rough - truth).norm()


def test_the_loss_is_on_the_answer_and_its_end_alone_or_on_all_but_the_first_token():
    example = Example([1, 10, 11, 12, 20, 21, 2], answer_start=4)
    assert [example.ids[place + 1] for place in learned_places(example, "answer")] == [20, 21, 2]
    assert [example.ids[place + 1] for place in learned_places(example, "all")] == example.ids[1:]


def test_every_epoch_shows_every_example_once_in_an_order_of_its_own_by_the_seed():
    steps = plan_steps(10, 4, 3, seed=1)
    epochs = [[i for step in steps[first : first + 3] for i in step] for first in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert steps == plan_steps(10, 4, 3, seed=1) != plan_steps(10, 4, 3, seed=2)


def test_a_row_lays_examples_end_to_end_and_counts_positions_anew_in_each():
    examples = [Example([1, 10, 11, 20, 2], answer_start=3), Example([1, 12, 21, 2], answer_start=2)]
    inputs, places, targets = pack(examples, "answer", CPU)
    assert inputs["input_ids"].tolist() == [[1, 10, 11, 20, 2, 1, 12, 21, 2]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert inputs["cu_seq_lens_q"].tolist() == [0, 5, 9]
    assert (places.tolist(), targets.tolist()) == ([2, 3, 6, 7], [20, 2, 21, 2])


@pytest.mark.parametrize("padded", [False, True])
def test_rows_hold_every_example_once_and_at_most_the_tokens_allowed(padded):
    lengths = [random.Random(i).randrange(1, 300) for i in range(50)] + [900]
    groups = split_to_fit(range(51), lengths, 512, padded)
    assert sorted(i for group in groups for i in group) == list(range(51))
    for group in groups:
        tokens = max(lengths[i] for i in group) * len(group) if padded else sum(lengths[i] for i in group)
        assert tokens <= 512 or group == [50]
    if not padded:
        assert len(groups) <= 1.25 * sum(lengths) / 512 + 1
