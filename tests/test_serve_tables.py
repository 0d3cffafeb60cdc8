"""Tables and plots of load tests: hand-made records, figures worked out by hand, and one real sweep."""

import csv
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import PROCESS
from loaded_server import LoadedServer
from matplotlib.text import Text
from test_load import flags_for
from test_report import printed

from serving import load_flags, load_shown, load_test, measuring
from study.records import record, runs, schema
from study.report import __main__ as command
from study.report import serving_plots
from study.report.published import FIGURES, with_published
from study.report.serving import serving_tables
from study.report.sweeps import find_sweeps

SCRIPT = "serving/load_test.py"
H100 = "NVIDIA H100 80GB HBM3"
SUSTAINED = "Sustained: the highest rate that each server sustains, and how it answers there"
COSTS = "Cost under load: what the sustained rate costs"
LOAD = "Inference under load: cost, rate and latency, as the published study has them"
METRICS = {
    "classification": {"accuracy": {"value": 75.0, "ci95": [60.0, 86.0]}},
    "summarization": {"rouge1": {"value": 40.0, "ci95": [38.0, 42.0]}},
}


def step(rate: float, share: float = 1.0, p90: float = 0.5, seconds: float = 30, **more) -> dict:
    """What a record says of a rate of which `share` is served: 100 tokens in and 5 out of each request."""
    count, good = round(rate * seconds), share >= measuring.SERVED
    places = {"mean": 0.6 * p90, "p50": 0.5 * p90, "p90": p90, "p99": 2 * p90}
    took = seconds / share
    return {
        **{"rate": rate, "status": "sustained" if good else "not sustained"},
        "why": None if good else f"{100 * share:.1f} % of the offered rate were served",
        **{"requests": count, "answered": count, "failures": {}, "seconds": took},
        **{"offered": count / seconds, "sent": rate, "served": count / took},
        **{"latency": places, "lag": places, "time_to_first_token": None, "seconds_per_token": None},
        **{"input_tokens": 100 * count, "output_tokens": 5 * count, "scored": count},
        **{"metrics_version": "2, r", **more},
    }


def save(
    folder: Path, server: str | None, rates: list[dict], words: str = "", gpu: str = H100, **more
) -> Path:
    """Write the record of a sweep as the script does; `more` replaces or adds parts of it."""
    words = f"{words} --server {server}" if server else words
    args = load_flags.parse("", shlex.split(f"--url http://127.0.0.1:8000 {words} --rates 1"))
    args.rates = [each["rate"] for each in rates]
    rates = [{"metrics": METRICS[args.task]} | each for each in rates]
    tried = {each["rate"]: each["status"] == "sustained" for each in rates}
    part = {"url": args.url, "api": args.api, "server": args.server, "rates": rates}
    part |= {"sustained": measuring.sustained(tried), "knee": not all(tried.values()), "requests": 9}
    part |= {"seconds": 90.0, "wall_seconds": 100.0, "earlier_seconds": 0, "prompts": 40}
    content = {
        **{"schema": 1, "status": "finished", "script": SCRIPT, "task": args.task},
        **{"model": "meta/Llama-2-7b-hf", "config": dict(vars(args)), "data": {}},
        "cost": {"device": gpu, "gpus": 1, "gpu": gpu, "price_per_hour": 3.6, "usd": 0.1},  # $0.001 a second
        "config_hash": record.short_hash({"words": words, "rates": args.rates, "gpu": gpu}),
        "environment": {"git_commit": "c0ffee"},
        "finished": "2026-01-01T00:00:00.000+00:00",
    }
    content |= more | {"serve": part | {"prompts_sha256": "a" * 64} | more.get("serve", {})}
    path = folder / f"serve-{content['config_hash']}.json"
    folder.mkdir(parents=True, exist_ok=True)
    schema.check(content, path)
    record.write_json(path, content)
    return path


def tables_of(*folders: Path, prices=(), published: bool = False) -> dict[str, list[dict[str, str]]]:
    """By name and title: the rows, each by its columns."""
    sweeps, problems = find_sweeps(folders)
    assert not problems
    made = serving_tables(sweeps, prices)
    text = "\n".join(table.markdown() for table in (with_published(made) if published else made))
    found = printed(text)
    return {name: [dict(zip(rows[0], row, strict=True)) for row in rows[1:]] for name, rows in found.items()}


def notes(*folders: Path) -> str:
    return serving_tables(find_sweeps(folders)[0], [])[0].note


def run_report(monkeypatch, capsys, *words: object) -> tuple[str, str, int]:
    """stdout, stderr and exit status of the command, in this process."""
    monkeypatch.setattr("sys.argv", ["report", *map(str, words)])
    try:
        command.main()
        status = 0
    except SystemExit as ended:
        status = ended.code
    return *capsys.readouterr(), status


@pytest.fixture
def load(monkeypatch, capsys):
    """The load test in this process: what it prints."""

    def run(*words: object) -> str:
        monkeypatch.setattr("sys.argv", [SCRIPT, *map(str, words)])
        load_test.main(replace(PROCESS, script=SCRIPT))
        return capsys.readouterr().out

    return run


# Tables


def test_figures_are_those_of_the_sustained_rate_worked_out_by_hand(tmp_path):
    first = {"mean": 0.1, "p50": 0.12, "p90": 0.2, "p99": 0.3}
    streamed = {"time_to_first_token": first, "seconds_per_token": first}
    rates = [step(10), step(40, 0.5, 9.0), step(20, 0.96, 0.8, **streamed)]
    save(tmp_path, "vllm", rates)
    found = tables_of(tmp_path)
    keys = {"server": "vllm", "model": "meta/Llama-2-7b-hf", "task": "classification", "GPU": H100}
    assert found[SUSTAINED] == [
        keys
        | {"sustained": "20", "served": "19.20", "p50": "0.400 s", "p90": "0.800 s", "p99": "1.600 s"}
        | {"first token p50": "0.120 s", "first token p90": "0.200 s", "accuracy": "75.00 [60.0, 86.0]"}
    ]
    # $0.001 a second; 19.2 requests, 1,920 tokens in and 96 out a second
    [load] = found[LOAD]
    assert load["per 1K tokens in"] == "$0.00052"  # 0.001 / 1.92
    assert load["per 1K tokens out"] == "$0.010"  # 0.001 / 0.096
    assert [load[name] for name in ("RPS", "throughput", "latency 90 %")] == ["20", "19.20", "0.800 s"]
    assert [load[name] for name in ("tokens/s in", "tokens/s out")] == ["1,920", "96"]
    [costs] = found[COSTS]
    assert costs["per 1,000 requests"] == "$0.052"  # 1 / 19.2
    assert costs["per 1,000 requests, by the rate offered"] == "$0.050"  # 1 / 20
    assert (costs["per 1M tokens in"], costs["per 1M tokens out"]) == ("$0.52", "$10.42")
    assert costs["per 1M tokens in, by the rate offered"] == "$0.50"
    assert costs["per 1M tokens out, by the rate offered"] == "$10.00"
    assert (costs["USD per hour"], costs["served"]) == ("$3.60", "19.20")


def test_a_rate_that_was_the_highest_tried_is_a_bound_and_no_number_for_programs(tmp_path):
    save(tmp_path, "ray", [step(10), step(20)])
    made = serving_tables(find_sweeps([tmp_path])[0], [])
    cells = [cell for table in made for cell in table.cells() if cell["column"] in {"sustained", "RPS"}]
    assert [(cell["text"], cell["value"]) for cell in cells] == [(">= 20", None)] * 2
    assert ">= 20" in [row[4] for row in made[0].csv_rows()]
    assert f"ray, classification, {H100}: no higher rate was tried, so it may sustain more" in notes(tmp_path)


def test_a_server_that_had_the_prompts_in_its_cache_is_told_of(tmp_path):
    save(tmp_path, "vllm", [step(10, cached_prompt_share=0.1), step(20, cached_prompt_share=0.87)])
    save(tmp_path, "fastapi", [step(10)])
    told = f"vllm, classification, {H100}: 87% of its prompts' tokens were in its cache"
    assert notes(tmp_path).count(told) == notes(tmp_path).count("in its cache") > 0


def test_where_not_even_the_lowest_rate_is_sustained_nothing_is_shown_but_why(tmp_path):
    save(tmp_path, "fastapi", [step(4, 0.25, 20)])
    for rows in tables_of(tmp_path).values():
        told = [text for name, text in rows[0].items() if name not in {"server", "model", "task", "GPU"}]
        assert set(told) <= {"none", "—", "$3.60"}
    assert "not even 4 requests/s, for 25.0 % of the offered rate were served" in notes(tmp_path)


def test_the_answers_of_random_weights_have_no_score(tmp_path):
    save(tmp_path, "ray", [step(4)], checkpoint={"random_weights": True})
    row = tables_of(tmp_path)[SUSTAINED][0]
    assert (row["model"], row["accuracy"]) == ("meta/Llama-2-7b-hf (random weights)", "—")


def test_an_answer_that_is_long_beside_the_run_is_told(tmp_path):
    save(tmp_path, "ray", [step(10, p90=4), step(20, 0.5)])  # p50 is 2 s, of 30
    assert "an answer takes over 1/20 of --seconds, so served is too low" in notes(tmp_path)


def test_a_server_without_a_name_is_its_urls_host_and_a_model_without_one_a_dash(tmp_path):
    save(tmp_path, None, [step(10)], model="http://127.0.0.1:8000")
    [row] = tables_of(tmp_path)[SUSTAINED]
    assert (row["server"], row["model"]) == ("127.0.0.1:8000", "—")


def test_an_older_record_has_no_name_of_its_server(tmp_path):
    path = save(tmp_path, None, [step(10)])
    content = json.loads(path.read_text())
    del content["serve"]["server"], content["config"]["server"], content["config"]["not_started"]
    record.write_json(path, content)
    assert tables_of(tmp_path)[SUSTAINED][0]["server"] == "127.0.0.1:8000"


def test_servers_stand_in_the_published_order_with_a_row_for_each_task_and_gpu(tmp_path):
    save(tmp_path, "vllm", [step(10)])
    save(tmp_path, "vllm", [step(5)], gpu="NVIDIA A10G")
    save(tmp_path, "other", [step(10)])
    save(tmp_path / "more", "FastAPI", [step(10)])
    save(tmp_path / "more", "vllm", [step(10)], "--task_type summarization")
    rows = tables_of(tmp_path)[SUSTAINED]
    assert [(row["server"], row["task"], row["GPU"]) for row in rows] == [
        ("FastAPI", "classification", H100),
        ("vllm", "classification", "NVIDIA A10G"),
        ("vllm", "classification", H100),
        ("other", "classification", H100),
        ("vllm", "summarization", H100),
    ]
    assert (rows[0]["accuracy"], rows[0]["ROUGE-1"]) == ("75.00 [60.0, 86.0]", "—")
    assert (rows[4]["accuracy"], rows[4]["ROUGE-1"]) == ("—", "40.00 [38.0, 42.0]")


def test_sweeps_that_were_held_to_other_things_say_so(tmp_path):
    save(tmp_path, "vllm", [step(10)], "--slo_seconds 1")
    save(tmp_path, "vllm", [step(20)], "--stream")
    save(tmp_path, "ray", [step(10)], "--slo_seconds 1")
    names = [row["server"] for row in tables_of(tmp_path)[SUSTAINED]]
    assert names == ["ray (slo_seconds 1.0)", "vllm (slo_seconds 1.0)", "vllm (stream)"]


def test_sweeps_alike_in_all_but_how_closely_they_looked_are_told_apart(tmp_path):
    paths = [save(tmp_path, "vllm", [step(rate)]) for rate in (10, 20)]
    names = {row["server"] for row in tables_of(tmp_path)[SUSTAINED]}
    assert names == {f"vllm (settings {path.stem.removeprefix('serve-')})" for path in paths}


def test_of_two_records_of_the_same_settings_the_finished_and_newer_counts(tmp_path):
    old = save(tmp_path / "a", "vllm", [step(10)])
    new = save(tmp_path / "b", "vllm", [step(10, p90=0.7)], finished="2026-02-01T00:00:00.000+00:00")
    late = "2026-03-01T00:00:00.000+00:00"
    failed = save(tmp_path / "c", "vllm", [step(10)], status="failed", finished=late)
    sweeps, problems = find_sweeps([tmp_path, tmp_path / "a"])
    assert [sweep.path for sweep in sweeps] == [new]
    assert [line.partition(" is left out: ")[0] for line in problems] == [str(old), str(failed)]


def test_other_prompts_and_other_metrics_share_no_table(tmp_path):
    save(tmp_path, "ray", [step(10)])
    save(tmp_path, "vllm", [step(10)])
    save(tmp_path, "tgi", [step(10)], serve={"prompts_sha256": "b" * 64, "prompts": 7})
    save(tmp_path, "fastapi", [step(10, metrics_version="3, r")])
    found = tables_of(tmp_path)
    assert {
        name.partition(", apart: ")[2]: [row["server"] for row in rows] for name, rows in found.items()
    } == {
        "": ["ray", "vllm"],
        "classification, 7 prompts (sha256 bbbbbbbb)": ["tgi"],
        "classification, metrics of version 3, r": ["fastapi"],
    }


def test_an_unknown_price_or_count_of_tokens_is_unknown_and_a_price_list_counts(tmp_path):
    unknown = {"device": "odd", "gpus": 1, "gpu": "odd", "price_per_hour": None, "usd": None}
    save(tmp_path, "ray", [step(10, output_tokens=None)], cost=unknown)
    row = tables_of(tmp_path)[COSTS][0]
    assert {row[name] for name in row if name.startswith("per ")} == {"unknown"}
    entry = {"gpu": "odd", "instance": "x", "usd_per_hour": 36.0, "source": "x", "date": "x"}
    row = tables_of(tmp_path, prices=[entry])[COSTS][0]
    assert (row["per 1,000 requests"], row["per 1M tokens out"]) == ("$1.00", "unknown")
    assert tables_of(tmp_path)[LOAD][0]["tokens/s out"] == "—"


# Gaps


def test_a_sweep_that_did_not_end_is_a_gap_with_its_reason(tmp_path):
    error = {"type": "UserError", "message": "no room", "advice": "mend it"}
    save(tmp_path / "a", "tgi", [step(10)], status="failed", error=error)
    void = {"rate": 20, "status": "void", "why": "20 requests and 9 prompts"}
    save(tmp_path / "b", "ray", [step(10), void], status="void")
    path = save(tmp_path / "c", "vllm", [step(10)], status="running")
    path.rename(record.beside(path))
    rows = tables_of(tmp_path)[SUSTAINED]
    assert [(row["server"], row["sustained"], row["p90"]) for row in rows] == [
        ("tgi", "failed", "—"),
        ("ray", "void", "—"),
        ("vllm", "unfinished", "—"),
    ]
    told = notes(tmp_path)
    assert f"- tgi, classification, {H100}: failed, no room." in told
    assert f"- ray, classification, {H100}: void, 20 requests and 9 prompts." in told
    assert f"- vllm, classification, {H100}: unfinished." in told


def test_a_server_that_could_not_be_started_is_recorded_and_the_sweep_takes_its_place(tmp_path, load):
    with LoadedServer() as server:
        words = [*flags_for(server, tmp_path, "--rates", "8", "--seconds", 0.5), "--server", "tgi"]
        gone = [*words, "--not_started", "docker:\n  not found", "--model", "served"]
        said = load(*gone)
        [path] = (tmp_path / "out").glob("serve-*.json")
        assert said == f"failed     {path}: docker: not found\n"
        content = record.read_whole(path)
        assert (content["status"], content["error"]["message"]) == ("failed", "docker: not found")
        [row] = tables_of(tmp_path)[SUSTAINED]
        assert (row["server"], row["model"], row["sustained"]) == ("tgi", "served", "failed")
        assert "failed, docker: not found." in notes(tmp_path)
        assert not server.asked
        load(*words, "--model", "served")
        assert tables_of(tmp_path)[SUSTAINED][0]["sustained"] == ">= 8"
    assert "it stays as it is" in load(*gone)
    content = record.read_whole(path)
    assert content["status"] == "finished"
    check_a_real_sweep(path, content)


def check_a_real_sweep(path: Path, content: dict) -> None:
    """The tables say what the record and the script's last lines say, and a trace gives the command back."""
    [found] = content["serve"]["rates"]
    [row] = tables_of(path.parent)[SUSTAINED]
    assert row["p90"] == f"{found['latency']['p90']:.3f} s"
    accuracy = found["metrics"]["accuracy"]["value"]
    assert row["accuracy"].startswith(f"{accuracy:.2f} [")
    assert f"accuracy        {accuracy:6.2f} %" in load_shown.result_block(content)
    words = shlex.split(runs.command(content))
    assert words[:2] == ["python", SCRIPT]
    again = load_flags.parse("", words[2:])
    settings = {name: value for name, value in content["config"].items() if name != "kind"}
    assert vars(again) == settings


def test_rates_that_were_measured_outlive_a_server_that_does_not_come_up_again(tmp_path, load):
    with LoadedServer() as server:
        words = flags_for(server, tmp_path, "--rates", "8,16", "--seconds", 0.5)
        load(*words)
        [path] = (tmp_path / "out").glob("serve-*.json")
        content = record.read_whole(path)
        stopped = content["serve"] | {"rates": content["serve"]["rates"][:1]}
        record.write_json(path, content | {"status": "interrupted", "serve": stopped})
        [rows] = (tmp_path / "out").glob("requests-*.jsonl")
        rows.rename(record.beside(rows))
        load(*words, "--not_started", "gone")
        assert record.read_whole(path)["serve"]["rates"] == stopped["rates"]
        server.asked.clear()
        load(*words)
        assert len(server.asked) == 1 + 8  # the rate of 16 alone
    assert record.read_whole(path)["status"] == "finished"


@pytest.mark.parametrize("flag", ["--server", "--not_started"])
def test_a_label_that_is_empty_or_no_text_is_refused(capsys, flag):
    for word in ("", "\n", "a\x1b[1mb"):
        with pytest.raises(SystemExit):
            load_flags.parse("", ["--url", "http://h", "--rates", "1", flag, word])
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.endswith(f"argument {flag}: it should be a text that can be printed")


def test_the_name_of_a_server_names_the_sweep_and_none_leaves_older_names_as_they_are(tmp_path, load):
    base = ["--url", "http://127.0.0.1:1", "--rates", "1", "--output_dir", str(tmp_path)]
    for words in ([], ["--server", "a"], ["--server", "b"]):
        load(*base, *words, "--not_started", "x")
    args = load_flags.parse("", base)
    unnamed = record.short_hash({name: getattr(args, name) for name in load_test.SETTINGS})
    names = {path.name for path in tmp_path.glob("serve-*.json")}
    assert len(names) == 3
    assert f"serve-{unnamed}.json" in names


# Damaged records


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        ("serve.rates.0.latency.p90", None, "lacks serve.rates.0.latency.p90"),
        ("serve.rates.0.latency.p50", 0.9, "has other numbers at 10 requests/s than its counts give"),
        ("serve.rates.0.served", 100, "has other numbers at 10 requests/s"),
        ("serve.rates.0.offered", 0, "has other numbers at 10 requests/s"),
        ("serve.rates.0.answered", 299, "has other numbers at 10 requests/s"),
        ("serve.rates.0.input_tokens", -1, "has other numbers at 10 requests/s"),
        ("serve.rates.0.metrics.accuracy.ci95", [1], "lacks serve.rates.0.metrics.accuracy.ci95.1"),
        ("serve.rates.0.metrics.accuracy.value", "?", "lacks serve.rates.0.metrics.accuracy.value"),
        ("serve.rates.0.time_to_first_token", {"p50": 1}, "lacks serve.rates.0.time_to_first_token.mean"),
        ("serve.rates", [], "sustains another rate than its rates give"),
        ("serve.sustained", 20, "sustains another rate than its rates give"),
        ("serve.knee", False, "sustains another rate than its rates give"),
        ("serve.rates", {}, "lacks serve.rates"),
        ("serve.server", 3, "lacks serve.server"),
        ("config.seconds", "x", "lacks config.seconds"),
        ("schema", 0, "is not a record of schema 1"),
        ("serve.seconds", -1, "has a time that is negative"),
        ("serve.sustained", float("nan"), "is not a readable record (NaN is no measurement)"),
        ("serve.rates.0.latency.p90", float("inf"), "is not a readable record (Infinity is no measurement)"),
        ("task", "?", "lacks a task of ours"),
    ],
)
def test_a_damaged_record_is_one_line_and_the_others_show(tmp_path, place, value, reason):
    save(tmp_path / "good", "vllm", [step(10)])
    path = save(tmp_path / "bad", "ray", [step(10), step(20, 0.5)])
    content = json.loads(path.read_text())
    folder, _, name = place.rpartition(".")
    (schema.lookup(content, folder) if folder else content)[name] = value
    path.write_text(json.dumps(content))
    sweeps, [problem] = find_sweeps([tmp_path])
    assert [sweep.server for sweep in sweeps] == ["vllm"]
    assert problem.startswith(f"{path} {reason}")
    assert len(problem.splitlines()) == 1


def test_half_a_record_is_one_line_on_stderr_and_the_exit_status_1(tmp_path, monkeypatch, capsys):
    path = save(tmp_path, "ray", [step(10)])
    save(tmp_path, "vllm", [step(10)])
    path.write_text(path.read_text()[:500])
    said, error, status = run_report(monkeypatch, capsys, tmp_path)
    assert (status, len(error.splitlines())) == (1, 1)
    assert error.startswith(f"error: {path} is not a readable record")
    assert "| vllm " in said


# The command


def test_a_trace_gives_record_commit_and_command(tmp_path, monkeypatch, capsys):
    path = save(tmp_path, "vllm", [step(10), step(20, 0.5)], "--slo_seconds 1 --stream --text_column a b")
    said, error, status = run_report(monkeypatch, capsys, tmp_path, "--trace", "sustained, vllm, p90")
    assert (error, status) == ("", 0)
    place, where, words = said.splitlines()[:3]
    assert place.startswith("Sustained | ")
    assert place.endswith("| p90 = 0.500 s")
    assert where == f"  {path}: finished 2026-01-01T00:00:00.000+00:00, commit c0ffee"
    assert words.startswith(f"    python {SCRIPT} --url http://127.0.0.1:8000")
    assert "--server vllm" in words
    assert "--rates 10,20 " in words
    assert "--text_column a b" in words


def test_loads_and_runs_stand_in_one_report_with_what_was_spent(tmp_path, monkeypatch, capsys):
    save(tmp_path, "vllm", [step(10), step(20, 0.5)])
    said, _, status = run_report(monkeypatch, capsys, tmp_path, "--output_dir", tmp_path / "out")
    assert status == 0
    assert "Spent in all: 1.7 min, $0.10." in said
    with open(tmp_path / "out" / "01-sustained.csv", newline="") as file:
        [row] = csv.DictReader(file)
    assert (row["sustained"], row["accuracy"], row["accuracy low"]) == ("10", "75.0", "60.0")
    assert "(classification-latency-by-the-rate-offered.png)" in (tmp_path / "out" / "report.md").read_text()


# Plots


def drawn(*folders: Path) -> dict[str, tuple]:
    """By file name: the texts of each figure, and its axes' lines (x, y, hollow)."""
    found = {}
    for name, _, figure in serving_plots.figures(find_sweeps(folders)[0], []):
        lines = [line for axes in figure.axes for line in axes.get_lines()]
        points = {
            (*line.get_xydata()[0], line.get_mfc() == "white") for line in lines if len(line.get_xdata()) == 1
        }
        found[name] = {text.get_text() for text in figure.findobj(Text)}, points
    return found


def test_every_plot_of_several_servers_and_gpus_is_drawn_with_its_axes_named(tmp_path):
    save(tmp_path, "vllm", [step(10), step(20, 0.5, 9.0)], "--slo_seconds 1")
    save(tmp_path, "vllm", [step(5), step(8, 0.5, 9.0)], "--slo_seconds 1", gpu="NVIDIA A10G")
    save(tmp_path, "tgi", [], "--slo_seconds 1", status="failed")
    found = drawn(tmp_path)
    latency, points = found.pop("classification-latency-by-the-rate-offered")
    assert {"requests/s offered", "latency (s)", "p50", "p90", "SLO, p90 within 1 s"} <= latency
    assert {"vllm, NVIDIA A10G", f"vllm, {H100}", "hollow: not sustained"} <= latency
    assert points == {(10, 0.25, False), (20, 4.5, True), (5, 0.25, False), (8, 4.5, True)} | {
        *((10, 0.5, False), (20, 9.0, True), (5, 0.5, False), (8, 9.0, True))
    }
    served, points = found.pop("classification-rate-served-by-the-rate-offered")
    assert {"requests/s served", "all that is offered; grey: 95 % or more of it"} <= served
    assert points == {(10, 10, False), (20, 10, True), (5, 5, False), (8, 4, True)}
    servers, _ = found.pop("classification-servers-the-rate-sustained-and-its-cost")
    assert {"requests/s sustained", "USD per 1,000 requests at that rate", "failed", "10", "$0.10"} <= servers
    gpus, _ = found.pop("classification-gpus-the-rate-sustained-and-its-cost")
    assert {f"vllm\n{H100}", "vllm\nNVIDIA A10G", "5", "$0.20"} <= gpus
    assert not found


def test_one_server_has_no_plot_beside_others_and_gaps_alone_have_none(tmp_path):
    save(tmp_path / "a", "vllm", [step(10)])
    kinds = ("latency-by-the-rate-offered", "rate-served-by-the-rate-offered")
    assert [*drawn(tmp_path)] == [f"classification-{kind}" for kind in kinds]
    save(tmp_path / "b", "tgi", [], status="failed")
    assert drawn(tmp_path / "b") == {}


def test_a_single_rate_has_axes_with_numbers(tmp_path):
    save(tmp_path, "vllm", [step(8, p90=0.8)])
    for name, _, figure in serving_plots.figures(find_sweeps([tmp_path])[0], []):
        figure.canvas.draw()
        for axes in figure.axes:
            (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
            assert [tick for tick in axes.get_xticks() if left < tick < right], name
            assert [tick for tick in axes.get_yticks() if low < tick < high], name


def test_a_bar_of_a_bound_and_of_an_unknown_price_says_so(tmp_path):
    unknown = {"device": "odd", "gpus": 1, "gpu": "odd", "price_per_hour": None, "usd": None}
    save(tmp_path, "vllm", [step(10)], cost=unknown)
    save(tmp_path, "ray", [step(4, 0.5)])
    texts, _ = drawn(tmp_path)["classification-servers-the-rate-sustained-and-its-cost"]
    assert {">= 10", "unknown", "none", "—"} <= texts


# Published figures


def test_published_figures_stand_beside_the_same_server_model_and_task(tmp_path):
    save(tmp_path, "vllm", [step(10)])
    save(tmp_path, "vllm", [step(10)], "--model other", model="meta/Llama-2-70b")
    rows = tables_of(tmp_path, published=True)[LOAD]
    ours = next(row for row in rows if row["model"] == "meta/Llama-2-7b-hf")
    a10, a100 = ([ours[f"{gpu}: {name} †"] for name in COLUMNS] for gpu in ("A10G", "A100 40GB"))
    assert a10 == ["< $0.00002", "$0.00021", "> 185", "21.03", "8.15 s"]
    assert a100 == ["< $0.00001", "$0.00012", "> 280", "87.96", "2.9 s"]
    other = next(row for row in rows if row["model"] == "meta/Llama-2-70b")
    assert other["A10G: RPS †"] == "—"
    theirs = [row for row in rows if row["server"].endswith(" †")]
    assert len(theirs) == 16 - 1  # 4 servers, 2 models, 2 tasks
    assert {row["RPS"] for row in theirs} == {"—"}


COLUMNS = ("per 1K tokens", "per 1K tokens, served", "RPS", "throughput", "latency 90 %")


def test_the_published_inference_tables_are_transcribed():
    table = FIGURES["tables"]["Inference, published"]
    rows = {tuple(row[i] for i in (0, 1, 2, 4)): [*row[3:4], *row[5:]] for row in table["rows"]}
    assert len(rows) == len(table["rows"]) == 30
    a10, a100 = "A10G", "A100 40GB"
    for key, values in {  # typed from the study's README
        ("Llama-7B", "classification", a10, "FastApi"): ["1.624", "$0.001", "4", "0.11", "27.3 s"],
        ("Llama-7B", "classification", a100, "TGI"): ["3.81", "$0.00007", "145", "54.41", "1.74 s"],
        ("Llama-13B", "classification", a10, "TGI"): ["1.624", "$0.00003", "125", "9.60", "12.04 s"],
        ("Llama-13B", "classification", a100, "vLLm"): ["3.81", "< $0.00003", "> 280", "51.46", "4.4 s"],
        ("Llama-7B", "summarization", a10, "Ray"): ["1.624", "$0.00002", "125", "4.04", "28.5 s"],
        ("Llama-7B", "summarization", a100, "vLLm"): ["3.81", "< $0.00002", "290", "99.39", "2.01 s"],
        ("Llama-13B", "summarization", a10, "Ray"): ["1.624", "$0.00006", "55", "2.18", "24.6 s"],
        ("Llama-13B", "summarization", a100, "FastApi"): ["3.81", "$0.0001", "85", "2.83", "27.8 s"],
    }.items():
        assert rows[key] == values
    # sums over the study's four tables, in its order, of RPS, throughput and latency
    sums = {}
    for (model, task, *_), (_, _, *numbers) in rows.items():
        for name, text in zip(("rps", "throughput", "latency"), numbers, strict=True):
            key = model, task, name
            sums[key] = sums.get(key, 0) + float(text.strip("> s"))
    assert [round(total, 3) for total in sums.values()] == PUBLISHED_SUMS


PUBLISHED_SUMS = [
    *(808, 189.68, 84.92),
    *(619, 132.31, 78.545),
    *(1480, 313.76, 110.76),
    *(865, 160.81, 78.79),
]
