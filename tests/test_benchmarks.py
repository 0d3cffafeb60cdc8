"""The benchmarks, as far as they can be tested without a GPU: what they read, refuse, sort and draw."""

import json
from itertools import pairwise

import pytest
from conftest import DEMO_DATA, DEMO_MODEL, ROOT

from benchmarks import curves, profiling, training
from study import cli, data, encoding
from study.cli import UserError

KERNELS = {  # as an H200 names them
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
        "add_adapter_kernel",
    ],
    "attention": ["attention_kernel", "attention_dq_kernel", "attention_dkv_kernel"],
    "SwiGLU": ["swiglu_kernel", "swiglu_backward_kernel"],
    "RMSNorm": ["rms_norm_kernel", "rms_norm_backward_kernel"],
    "rotary positions": ["rotate_kernel"],
    "unpacking NF4": ["unpack_nf4_kernel", "void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>(float*)"],
    "dropout": ["dropout_kernel"],
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
def test_a_kernel_is_told_by_its_name(kind, kernel):
    assert profiling.kind_of(kernel) == kind


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
        (["--samples", "100,0"], "--samples"),
    ],
)
def test_what_is_not_known_is_refused(capsys, words, message):
    with pytest.raises(SystemExit):
        flags(*words)
    assert message in capsys.readouterr().err


def test_a_peer_that_is_not_installed_is_named_and_left_out(capsys, monkeypatch):
    monkeypatch.setattr(training, "find_spec", lambda name: None if name == "liger_kernel" else name)
    assert training.installed(["trl", "published", "unsloth"]) == ["published", "unsloth"]
    assert capsys.readouterr().err == "trl is left out: liger_kernel not installed\n"


def test_the_tables_show_measured_and_failed_rows():
    start = {"tokens": 16384, "length": 512}
    measured = {"tokens_per_second": 2000, "spread": [1900, 2100], "peak_gib": 5.0, "how": "so"}
    rows = [start | measured | {"mode": "ceiling"}, start | {"mode": "fast", "failed": "out of memory"}]
    assert "100 %" in training.show(rows)
    assert "out of memory" in training.show(rows)
    epoch = {"examples": 100, "tokens": 20000, "seconds": 4.0, "peak_gib": 5.0}
    table = training.show_samples([start | {"how": "so", "epochs": [epoch]}, start | {"failed": "no GPU"}])
    assert all(text in table for text in ("5,000", "0.0400", "no GPU"))


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
