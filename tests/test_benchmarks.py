"""The benchmarks, as far as they can be tested without a GPU: what they read, refuse, sort and draw."""

import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import DEMO_DATA, DEMO_MODEL, ROOT
from preloaded import run_together
from test_processes import IN_FLOAT32

from benchmarks import (
    checkpoint,
    competitors,
    curves,
    inference,
    profiling,
    scaling,
    sharding,
    training,
    workers,
)
from study import cli, data, device, encoding
from study.errors import UserError

KERNELS = {  # of libraries, as an H200 names them
    "products with the frozen weights": [
        "nvjet_sm90_tst_128x248_64x4_2x1_v_bz_coopA_NNT",
        "nvjet_sm90_tst_256x160_64x4_1x2_h_bz_coopA_TNT",
        "nvjet_sm90_tst_192x208_64x4_2x1_v_bz_coopB_NNT",
    ],
    "adapters' products": [
        "nvjet_sm90_tst_32x128_64x10_1x2_h_bz_NNN",
        "nvjet_sm90_tst_32x256_64x5_1x2_h_bz_splitK_NNN",
        "nvjet_sm90_tst_8x128_64x12_1x2_h_bz_TNN",
        "nvjet_sm90_tss_128x32_64x10_2x1_v_bz_splitK_NTT",
        "nvjet_sm90_tss_32x192_64x7_1x2_h_bz_NTT",
        "nvjet_sm90_tst_24x128_64x11_1x2_h_bz_TNN",
        "void cublasLt::splitKreduce_kernel<32, 16, int, __nv_bfloat16, float>(cublasSplitKParams<float>)",
    ],
    "unpacking NF4": ["void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>(float*)"],
    "optimizer and refresh": ["void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdam>"],
    "host copies": ["Memcpy HtoD (Pageable -> Device)", "Memcpy DtoH (Device -> Pinned)"],
    "head, loss and rest": [
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>(int)",
    ],
}


@pytest.mark.parametrize(
    ("kind", "kernel"), [(kind, name) for kind, names in KERNELS.items() for name in names]
)
def test_a_librarys_kernel_is_told_by_its_name(kind, kernel):
    assert profiling.kind_of(kernel) == kind


def test_every_kernel_of_the_fast_paths_has_a_kind_and_one_of_an_adapter_is_no_frozen_product():
    sources = [path.read_text() for path in (ROOT / "study" / "fast").glob("*.py")]
    found = {name for text in sources for name in re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE)}
    assert {"add_adapter_kernel", "add_up_kernel"} <= found
    kinds = {name: profiling.kind_of(name) for name in found}
    assert [name for name, kind in kinds.items() if kind == "head, loss and rest"] == []
    assert kinds["add_adapter_kernel"] == "adapters' products"
    assert kinds["add_up_kernel"] == "products with the frozen weights"


def test_in_decoding_small_tiles_are_of_the_frozen_weights():
    for kernel in KERNELS["adapters' products"]:
        assert profiling.kind_of(kernel, adapters=False) == "products with the frozen weights"
    assert profiling.kind_of("cached_attention_kernel", adapters=False) == "attention"


def test_times_of_a_kind_add_up_and_the_rest_of_the_step_is_idle():
    kernels = [("rotate_kernel", 1.0, 2), ("swiglu_kernel", 4.0, 3), ("swiglu_backward_kernel", 2.0, 1)]
    rows = profiling.by_kind(kernels, 10.0)
    assert rows == [("SwiGLU", 6.0, 4), ("rotary positions", 1.0, 2), ("idle", 3.0, 0)]
    assert profiling.by_kind(kernels, 5.0)[-1] == ("idle", 0.0, 0)  # streams may overlap
    assert "60.0 %" in profiling.show_kinds(rows)


def flags(*words: str):
    needed = ["--model", str(DEMO_MODEL), "--dataset", str(DEMO_DATA / "posts_train.jsonl")]
    return training.flags([*needed, *words])


@pytest.fixture(scope="module")
def tokenizer():
    from study.model import load_tokenizer

    return load_tokenizer(str(DEMO_MODEL))


@pytest.fixture(scope="module")
def all_examples(tokenizer):
    """Every post of the demo, encoded at once."""
    words = ["--train_file", str(DEMO_DATA / "posts_train.jsonl"), "--max_seq_length", "128"]
    args = cli.parse_args("classification", "", words)
    pairs = data.load(args, ["train"])["train"].examples
    return encoding.encode_examples(tokenizer, "classification", pairs, args)[0]


def test_steps_hold_the_examples_in_order_and_are_full(tokenizer, all_examples):
    steps = training.read_steps(flags("--steps", "5"), tokenizer, 1000, 128)
    read = [example for step in steps for example in step]
    assert read == all_examples[: len(read)]
    assert len(steps) == 5
    for step, following in pairwise(steps):
        tokens = training.step_tokens(step)
        assert tokens <= 1000 < tokens + len(following[0].ids)


def test_only_the_examples_that_the_steps_need_are_encoded(tokenizer, monkeypatch):
    most = sum(map(len, training.read_steps(flags("--steps", "3"), tokenizer, 1000, 128))) + 1
    encoded, encode = [], encoding.encode_examples
    monkeypatch.setattr(encoding, "encode_examples", lambda *given: encoded.append(1) or encode(*given))
    training.read_steps(flags("--steps", "2"), tokenizer, 1000, 128)
    assert len(encoded) == most  # of two steps, and of the next, which shows that the second is full


def test_steps_of_an_epoch_hold_every_example(all_examples):
    steps = list(training.split_to_steps(all_examples[:30], 1000))
    assert [example for step in steps for example in step] == all_examples[:30]


def test_data_too_small_for_a_step_are_refused(tokenizer):
    with pytest.raises(SystemExit, match="does not fill a step of 10000000 tokens"):
        training.read_steps(flags(), tokenizer, 10_000_000, 128)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--modes", "fast,quick"], "--modes quick: choose among fast, dropout, plain"),
        (["--peers", "trl,axolotl"], "--peers axolotl: choose among trl, unsloth"),
        (["--samples", "100,0"], "argument --samples: 0 is not 1 or more"),
    ],
)
def test_what_is_not_known_is_refused(capsys, words, message):
    with pytest.raises(SystemExit):
        flags(*words)
    assert message in capsys.readouterr().err


def test_a_peer_that_is_not_installed_is_named_and_left_out(capsys, monkeypatch):
    monkeypatch.setattr(workers, "find_spec", lambda name: None if name in {"liger_kernel", "vllm"} else name)
    assert workers.installed(["trl", "published", "unsloth"], training.PEERS) == ["published", "unsloth"]
    assert capsys.readouterr().err == "trl is left out: liger_kernel not installed\n"
    assert workers.installed(["vllm", "generate"], inference.PEERS) == ["generate"]
    assert capsys.readouterr().err == "vllm is left out: vllm not installed\n"


def test_the_tables_show_measured_and_failed_rows():
    start = {"tokens": 16384, "length": 512}
    measured = {"tokens_per_second": 2000, "spread": [1900, 2100], "peak_gib": 5.0, "how": "so"}
    rows = [start | measured | {"mode": "ceiling"}, start | {"mode": "fast", "failed": "out of memory"}]
    assert "100 %" in training.show(rows)
    assert "out of memory" in training.show(rows)
    epoch = {"examples": 100, "tokens": 20000, "seconds": 4.0, "peak_gib": 5.0}
    table = training.show_samples([start | {"how": "so", "epochs": [epoch]}, start | {"failed": "no GPU"}])
    assert all(text in table for text in ("5,000", "0.0400", "no GPU"))


def inference_flags(*words: str):
    files = ["--train_file", "train.jsonl", "--test_file", "test.jsonl"]
    return inference.flags(["--model", str(DEMO_MODEL), *files, *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--modes", "8,quick"], "--modes quick: choose among fast, few-shot, zero-shot, constrained"),
        (["--peers", "generate,tgi"], "--peers tgi: choose among published, generate"),
        (["--task", "summarization", "--modes", "constrained"], "it goes with classification"),
        (["--examples", "100,0"], "argument --examples: 0 is not 1 or more"),
        (["--equality", "0"], "argument --equality: 0 is not 1 or more"),
    ],
)
def test_what_can_not_be_decoded_is_refused(capsys, words, message):
    with pytest.raises(SystemExit):
        inference_flags(*words)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("task", ["classification", "summarization"])
def test_answers_are_as_long_as_those_of_the_scripts_unless_told_otherwise(task):
    script = cli.parse_args(task, "", [])
    assert inference_flags("--task", task).max_new_tokens == script.max_new_tokens
    assert inference_flags("--task", task, "--max_new_tokens", "7").max_new_tokens == 7


def test_a_sample_of_the_prompts_is_as_long_on_average():
    prompts = {i: [1] * (20 + i * i % 450) for i in range(1000)}
    whole = sum(map(len, prompts.values())) / len(prompts)
    for most in (8, 64, 256):
        sample = inference.spaced(prompts, most)
        assert len(sample) == most
        assert sum(map(len, sample.values())) / most == pytest.approx(whole, rel=0.03)
        assert list(map(len, sample.values())) == sorted(map(len, sample.values()))
    assert inference.spaced(prompts, 5000) == prompts


@pytest.mark.parametrize("mode", ["fast", "zero-shot", "few-shot"])
def test_prompts_are_those_of_the_scripts(tokenizer, mode):
    from torch.nn import Module
    from transformers import AutoConfig

    files = [f"{DEMO_DATA}/posts_{name}.jsonl" for name in ("train", "test")]
    args = inference_flags("--train_file", files[0], "--test_file", files[1])
    base = Module()
    base.config = AutoConfig.from_pretrained(DEMO_MODEL)
    tests = inference.read_tests(args, tokenizer, 20, mode, base)
    assert len(tests.prompts) == len(tests.references) == 20
    assert set(tests.references) <= set(tests.labels)
    shown = tokenizer.decode(tests.prompts[0])
    assert shown.count("Class:") == {"few-shot": len(tests.labels) + 1}.get(mode, 1)


def test_frozen_products_follow_the_number_of_key_heads():
    from transformers import LlamaConfig

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=1)
    assert workers.frozen_shapes(config) == [(96, 64), (64, 64), (192, 64), (64, 96)]
    config = LlamaConfig(**sizes, num_key_value_heads=4, head_dim=32)
    assert workers.frozen_shapes(config) == [(384, 64), (64, 128), (192, 64), (64, 96)]


def test_the_float32_truth_is_the_dequantized_weights_with_the_adapter_unrounded():
    import torch
    from bitsandbytes.functional import dequantize_4bit

    from study.model import four_bit_layers

    args = inference_flags()
    tuned, exact = torch.nn.Module.float(inference.load(args, True)), inference.in_float32(args)
    layers = four_bit_layers(tuned.get_base_model())
    assert layers
    for name, layer in layers.items():
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        expected = weight.float() + layer.get_delta_weight("default")
        got = exact.get_submodule(name).weight
        assert got.dtype == torch.float32
        assert (got - expected).abs().max() < 1e-6 * expected.abs().max()


def test_the_tables_of_inference_show_measured_and_failed_rows():
    cost = {"seconds": 4.0, "output_tokens": 1600, "peak_gib": 30.0}
    rows = [
        {"mode": "ceiling", "examples_per_second": 80, "peak_gib": 1.0},
        {"mode": "fast", "examples_per_second": 20, **cost},
        {"mode": "generate", "examples_per_second": 10, **cost},
    ]
    rows = [{"examples": 80, "input_tokens": 16000, "spread": [9, 81], "how": "so"} | row for row in rows]
    rows.append({"mode": "few-shot", "examples": 0, "failed": "out of memory"})
    table = inference.show_all(rows).splitlines()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert lines[3][:9] == ["fast", "80", "200", "20.0", "4.0", "20", "9 to 81", "1.00", "25 %"]
    assert lines[4][7:9] == ["0.50", "12 %"]
    assert lines[5][:2] + lines[5][-1:] == ["few-shot", "all", "out of memory"]
    ways = {
        way: {"same": same, "exact": exact, "scores": {"accuracy": accuracy}}
        for way, same, exact, accuracy in (
            ("engine", 39, 36, 70.0),
            ("generate", 40, 34, 71.0),
            ("batches", 38, 30, 72.0),
        )
    }
    row = {"mode": "fast", "examples": 40, "how": "dense weights"} | ways
    table = inference.show_equality([row, {"mode": "unmerged", "failed": "no GPU"}])
    assert all(
        text in table
        for text in (
            "39 (97.5 %)",
            "38 (95.0 %)",
            "36 (90.0 %), 34 (85.0 %), 30 (75.0 %)",
            "accuracy 70.0, 71.0, 72.0",
            "no GPU",
        )
    )


def write_run(folder, losses):
    folder.mkdir()
    history = [[step + 1, loss] for step, loss in enumerate(losses)]
    content = {"schema": 1, "status": "finished", "train": {"loss_history": history}}
    (folder / "train.json").write_text(json.dumps(content))
    return folder


def test_two_curves_are_tabled_and_drawn(tmp_path, monkeypatch, capsys):
    runs = [
        write_run(tmp_path / "one", [2.0] * 25 + [1.0] * 5),
        write_run(tmp_path / "two", [1.5] * 25 + [1.0, 1.0, 1.0, 1.0, 1.5]),
    ]
    plot = tmp_path / "curves.png"
    monkeypatch.setattr(
        "sys.argv", ["curves", *map(str, runs), "--names", "fused", "plain", "--output", str(plot)]
    )
    curves.main()
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines()[:4]]
    assert rows[0] == ["steps", "fused", "plain", "difference"]
    assert rows[2:] == [
        ["1 to 25", "2.0000", "1.5000", "+0.5000"],
        ["26 to 30", "1.0000", "1.1000", "-0.1000"],
    ]
    assert "0.2380 over 30 steps" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_curves_that_can_not_be_compared_are_refused(tmp_path):
    run, shorter = write_run(tmp_path / "run", [1.0] * 4), write_run(tmp_path / "shorter", [1.0] * 3)
    for other, message in (
        (shorter, "differ in their steps"),
        (tmp_path / "none", "there is no such record"),
        (ROOT / "pyproject.toml", "is not a readable record"),
    ):
        with pytest.raises(UserError, match=message):
            curves.read_curves([run, other])


def test_the_ceiling_of_a_competitor_counts_the_tokens_that_a_layer_sees():
    of = {
        "encoder.block.0.layer.0.SelfAttention.q": 100,
        "decoder.block.0.layer.1.EncDecAttention.k": 100,  # of what the encoder has read
        "decoder.block.0.layer.1.EncDecAttention.q": 9,
        "decoder.block.0.layer.2.DenseReluDense.wo": 9,
        "lm_head": 9,
        "bert.encoder.layer.0.output.dense": 100,
        "bert.pooler.dense": 0,
        "classifier": 0,
    }
    assert {name: competitors.tokens_seen(name, 100, 9) for name in of} == of


def test_a_ceiling_is_of_a_finished_training(tmp_path):
    with pytest.raises(UserError, match="holds no finished training: train there first"):
        competitors.row_of(tmp_path)


def test_where_nothing_was_measured_an_earlier_result_stays(tmp_path):
    output = tmp_path / "speed.json"
    output.write_text("{}")
    with pytest.raises(SystemExit, match="nothing could be measured"):
        workers.finish({"rows": 1}, [{"failed": "no GPU"}], output)
    assert output.read_text() == "{}"
    workers.finish({"rows": 2}, [{"failed": "no GPU"}, {"mode": "fast"}], output)
    assert json.loads(output.read_text()) == {"rows": 2}


def test_several_gpus_are_shown_beside_one():
    measured = {"spread": [1.0, 2.0], "peak_gib": 46.04, "how": "fused", "exchange": [0.001, 0.02]}
    one = {"what": "train", "size": 16_384, "gpus": 1, "tokens_per_second": 20_000.0} | measured
    two = one | {"gpus": 2, "tokens_per_second": 37_000.0}
    failed = {"what": "score", "size": 0, "gpus": 2, "failed": "no memory"}
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in scaling.show([one, two, failed]).splitlines()
    ]
    assert lines[2][:4] == ["train", "16,384", "1", "20,000"]
    assert lines[3][2:] == ["2", "37,000", "1 to 2", "1.85", "0.1% to 2.0%", "46.0", "fused"]
    assert lines[4][-1] == "no memory"


ROUND = """
import sys
sys.path.insert(0, "{root}")
from benchmarks import scaling
from study import cli, device, generation, model, processes

def main(process):
    if processes.count() > 1:
        processes.meet("gloo")
    tokenizer, base = model.load_tokenizer("{model}"), model.load_base("{model}", None)

    class Engine:
        def answers(self, prompts, new, ends):
            print("own", sorted(prompts))
            return generation.plain_answers(base, prompts, new, [tokenizer.eos_token_id], None, 8)

    prompts = [tokenizer(f"a post about {{'bread ' * i}}")["input_ids"] for i in range(7)]
    seconds, own = scaling.round_of(Engine(), prompts, 3)
    assert seconds >= own > 0

cli.run_script(main)
"""


@pytest.mark.parametrize("count", [1, 2])
def test_several_processes_answer_each_its_share_of_a_round(count, tmp_path):
    script = tmp_path / "round.py"
    script.write_text(ROUND.format(root=ROOT, model=DEMO_MODEL))
    done = run_together(count, script)
    assert [process.returncode for process in done] == [0] * count, [process.stderr for process in done]
    own = [
        json.loads(line[4:]) for process in done for line in process.stdout.splitlines() if line[:4] == "own "
    ]
    assert sorted(index for indices in own for index in indices) == list(range(7))
    assert all(own)


def test_a_training_that_is_killed_and_resumed_stands_beside_one_that_was_not(tmp_path, monkeypatch):
    script = tmp_path / "training.py"  # whose first checkpoint comes at once, not after two seconds
    script.write_text(IN_FLOAT32.format(script=sharding.SCRIPT))
    monkeypatch.setattr(sharding, "SCRIPT", str(script))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    posts = [f"--{split}_file={DEMO_DATA}/posts_{split}.jsonl" for split in ("train", "test")]
    args = sharding.flags([f"--model={DEMO_MODEL}", *posts, "--gib=1", "--examples=64"])
    whole = sharding.train(args, tmp_path / "whole", 1, 1024)
    killed = sharding.train(args, tmp_path / "killed", 1, 1024, killed=True)
    assert whole["resumed_from"] is None
    assert re.fullmatch(r"checkpoint-\d+", killed["resumed_from"])
    assert whole["steps"] == killed["steps"] == len(killed["loss_history"]) == 4
    killed |= sharding.apart(killed, tmp_path / "killed", whole, tmp_path / "whole")
    assert killed["loss_apart"] < 1e-4
    assert killed["adapter_apart"] < 1e-2
    args.model = str(tmp_path)
    none = sharding.train(args, tmp_path / "none", 1, 1024)
    assert none["exit"] == 1
    assert none["failed"].startswith("error: --pretrained_ckpt")
    rows = [
        {"what": "x", "gpus": 1, "gib": gib} | row for gib, row in ((None, whole), (4, killed), (4, none))
    ]
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in sharding.show(rows).splitlines()[2:]
    ]
    assert lines[0][:3] == ["x", "1", "all"]
    assert lines[1][-1] == killed["resumed_from"]
    assert lines[2][-1] == none["failed"]


def test_a_mode_in_gib_is_a_card_of_that_size(monkeypatch):
    card, shares = 80 * workers.GIB, []
    monkeypatch.setenv("GPU_SHARE", "1")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (card - workers.GIB, card))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 3 * workers.GIB)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    workers.limit_memory("fast")
    assert not shares
    workers.limit_memory("8")
    assert shares == [7.5 / 80]  # CUDA takes half a GiB
    assert device.free_bytes() == 4.5 * workers.GIB
    for mode in ("0", "81"):
        with pytest.raises(UserError, match=f"--modes {mode}: it takes 1 to 80 GiB"):
            workers.limit_memory(mode)


def test_an_adapter_that_is_further_apart_than_rounding_explains_is_an_error():
    rows = [{"what": "one GPU"}] + [
        {"what": name, "adapter_apart": 0.12} for name in ("other passes", "shared")
    ]
    rows.insert(2, {"what": "in little memory", "failed": "error: out of memory"})
    assert sharding.too_far(rows) is None
    rows[-1]["adapter_apart"] = 1.1
    assert sharding.too_far(rows) == "shared: another adapter than rounding explains (1.2e-01)"


def test_a_training_is_killed_with_the_processes_that_its_launcher_began_in_sessions_of_their_own(tmp_path):
    folder = tmp_path / "run"
    checkpoint = (
        f"mkdir -p {folder}/checkpoints/checkpoint-7; touch {folder}/checkpoints/checkpoint-7/progress.json"
    )
    words = ["bash", "-c", f"setsid sleep 600 & echo $! >{tmp_path}/pid; {checkpoint}; wait"]
    with (tmp_path / "log").open("w") as log:
        assert sharding.kill_after_checkpoint(words, folder, log) == "checkpoint-7"
    state = Path("/proc", (tmp_path / "pid").read_text().strip(), "stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


@pytest.mark.parametrize("module", ["scaling", "sharding", "training"])
def test_a_benchmark_without_a_place_for_its_result_is_refused_at_once(module, tmp_path):
    files = ["--dataset=x"] if module == "training" else ["--train_file=x", "--test_file=x"]
    files += ["--gib=1"] if module == "sharding" else []
    words = [sys.executable, "-m", f"benchmarks.{module}", "--model=x", *files]
    words += [f"--output={tmp_path}/none/result.json"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"there is no folder {tmp_path}/none: make it first" in done.stderr


def test_a_step_that_all_does_not_have_is_refused(tmp_path):
    words = ["bash", ROOT / "benchmarks/all.sh", tmp_path, tmp_path, "train"]  # a function, but no step
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "there is no step train" in done.stderr


def test_a_random_checkpoint_is_one_that_the_fast_paths_take(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from study import model
    from study.fast.decoder import why_not

    monkeypatch.setattr(checkpoint, "MODELS", {"7b": checkpoint.llama(128, 192, 2, 2)})
    monkeypatch.setattr(
        "sys.argv", ["checkpoint", "7b", str(tmp_path / "7b"), "--tokenizer", str(DEMO_MODEL)]
    )
    checkpoint.main()
    base = model.load_base(str(tmp_path / "7b"), workers.nf4())
    assert len(model.four_bit_layers(base)) == 2 * 7
    assert why_not(base) is None
    with pytest.raises(UserError, match="exists"):
        checkpoint.main()


def test_a_random_falcon_is_in_4_bits(tmp_path, monkeypatch):
    from study import model

    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    monkeypatch.setattr(checkpoint, "MODELS", {"falcon-7b": checkpoint.FALCON | sizes})
    words = ["checkpoint", "falcon-7b", str(tmp_path / "falcon"), "--tokenizer", str(DEMO_MODEL)]
    monkeypatch.setattr("sys.argv", words)
    checkpoint.main()
    assert len(model.four_bit_layers(model.load_base(str(tmp_path / "falcon"), workers.nf4()))) == 2 * 4


@pytest.mark.parametrize(
    "shape",
    [
        checkpoint.llama(128, 192, 3, 8, 1),
        checkpoint.FALCON | {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
        checkpoint.NEOX
        | {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2},
    ],
    ids=["llama", "falcon", "neox"],
)
def test_a_random_checkpoint_written_by_layers_is_what_saving_the_whole_model_writes(
    tmp_path, monkeypatch, shape
):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from study import checkpoint as checkpoints

    drawn, draw, options = [], checkpoint.dense, {"dtype": torch.bfloat16, "device_map": {"": "cpu"}}

    def drawing(config, dtype):
        assert config.num_hidden_layers == 1  # never more in memory
        drawn.append(draw(config, dtype))
        return drawn[-1]

    monkeypatch.setattr(checkpoint, "MODELS", {"7b": shape})
    monkeypatch.setattr(checkpoint, "dense", drawing)
    by_layers = tmp_path / "by-layers"
    monkeypatch.setattr("sys.argv", ["checkpoint", "7b", str(by_layers), "--tokenizer", str(DEMO_MODEL)])
    checkpoint.main()

    weights = drawn[0].state_dict()
    for i, model in enumerate(drawn):
        weights |= {
            checkpoint.LAYER.sub(rf"\g<1>{i}.", name): tensor
            for name, tensor in model.state_dict().items()
            if checkpoint.LAYER.search(name)
        }
    config = drawn[0].config
    config.num_hidden_layers = len(drawn)
    whole = type(drawn[0]).from_pretrained(
        None, config=config, state_dict=weights, quantization_config=workers.nf4(), **options
    )
    whole.save_pretrained(tmp_path / "whole")
    assert (by_layers / "config.json").read_text() == (tmp_path / "whole" / "config.json").read_text()
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    files = checkpoints.weight_files(by_layers, "here")
    assert len(files) == len(drawn) > 1
    found = [load_file(file) for file in files]
    assert sum(map(len, found)) == len(expected)  # none is in two files
    for name, tensor in {name: tensor for part in found for name, tensor in part.items()}.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
    _, info = AutoModelForCausalLM.from_pretrained(by_layers, output_loading_info=True, **options)
    assert not any(info.values())


def test_every_result_names_the_commit_that_it_is_of():
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        commit = content.get("commit") or content["environment"]["git_commit"]
        assert re.match("[0-9a-f]{40}", commit), path
