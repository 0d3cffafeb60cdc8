"""The load test: its arithmetic against numbers worked out by hand, and the whole against a server of known
service time and capacity."""

import ast
import asyncio
import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import DEMO_DATA, DEMO_MODEL, PROCESS, ROOT, error_line, run_script, write_rows
from loaded_server import CLOSED, OTHER, WORDS, LoadedServer

from serving import client, load_flags, load_prompts, load_test, measuring
from study.errors import UserError
from study.records import cost, record, schema
from study.report.collect import find_runs
from study.report.spent import spent_in_all

SCRIPT = "serving/load_test.py"


def row(due: float, end: float, status: str = "ok", **more) -> dict:
    told = {"first_token": None, "input_tokens": 10, "output_tokens": 5, "sent": due}
    return {"due": due, "end": end, "status": status, **told, **more}


def write_prompts(folder: Path, count: int = 40) -> Path:
    """Of which every fourth is answered with another class than its reference."""
    classes = ("red", "blue")
    rows = [
        {"prompt": f"text {i} is {classes[i % 2]}", "reference": classes[(i + (i % 4 == 3)) % 2]}
        for i in range(count)
    ]
    return write_rows(folder / "prompts.jsonl", rows)


def flags_for(server: LoadedServer, folder: Path, *more: object) -> list[str]:
    words = ["--url", server.url, "--prompts_file", write_prompts(folder), "--output_dir", folder / "out"]
    return [*map(str, [*words, "--max_lag_seconds", 2, *more])]  # 2 s: tests run on busy machines


@pytest.fixture
def load(monkeypatch):
    """The script in this process: the record that it leaves."""

    def run(words: list[str]) -> dict:
        monkeypatch.setattr(sys, "argv", [SCRIPT, *words])
        load_test.main(PROCESS)
        [path] = Path(words[words.index("--output_dir") + 1]).glob("serve-*.json")
        return record.read_whole(path)

    return run


def rows_of(folder: Path) -> list[dict]:
    [path] = (folder / "out").glob("requests-*.jsonl")
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def sent(server: LoadedServer, count: int, api: str, stream: bool, timeout: float = 20) -> list[dict]:
    """The rows of `count` requests, 20 a second."""
    asked = client.Server(server.url, api, "m", 5, stream, timeout, "secret")
    due = measuring.arrivals("constant", 20, count / 20, 0)
    return asyncio.run(client.send_all(asked, [f"prompt {i}" for i in range(count)], due, lambda: None))


# The arithmetic


def test_the_arithmetic_needs_no_server_and_no_library():
    tree = ast.parse(Path(measuring.__file__).read_text(encoding="utf-8"))
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names


def test_constant_arrivals_are_evenly_spaced():
    assert measuring.arrivals("constant", 4, 1.5, seed=1) == [0, 0.25, 0.5, 0.75, 1, 1.25]


def test_poisson_arrivals_are_seeded_as_many_and_spaced_as_a_poisson_process():
    due = measuring.arrivals("poisson", 100, 50, seed=1)
    assert due == measuring.arrivals("poisson", 100, 50, seed=1) == sorted(due)
    assert due != measuring.arrivals("poisson", 100, 50, seed=2)
    assert (len(due), due[0] >= 0, due[-1] <= 50) == (5000, True, True)
    gaps = [after - before for before, after in pairwise(due)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(0.01, rel=0.01)
    assert spread == pytest.approx(mean, rel=0.1)  # as of an exponential distribution; evenly spaced it is 0


def test_percentiles_are_those_of_numpy():
    import numpy as np

    values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]
    for percent in (0, 50, 90, 99, 100):
        assert measuring.percentile(values, percent) == pytest.approx(np.percentile(values, percent))
    assert measuring.percentile([2.0], 90) == 2


def test_no_more_is_served_than_is_offered():
    found = measuring.measure([row(0, 0.1), row(0.5, 0.6)], seconds=1, timeout=10)
    assert (found["offered"], found["served"], found["seconds"]) == (2, 2, 1)


def test_a_rate_in_numbers_as_worked_out_by_hand():
    # 2 a second for 2 s; the last answer 4 s after the first due; one failed at once, one was sent late
    rows = [row(0, 0.5), row(0.5, 2.5, sent=0.6), row(1, 1.1, "http 500"), row(1.5, 4)]
    found = measuring.measure(rows, seconds=2, timeout=10)
    assert (found["offered"], found["served"], found["seconds"]) == (2, 3 / 4, 4)
    assert (found["requests"], found["answered"], found["failures"]) == (4, 3, {"http 500": 1})
    assert found["latency"]["mean"] == pytest.approx((0.5 + 2 + 10 + 2.5) / 4)  # the failure: the timeout
    assert found["latency"]["p50"] == pytest.approx(2.25)
    assert found["lag"]["mean"] == pytest.approx(0.025)
    assert (found["input_tokens"], found["output_tokens"]) == (30, 15)
    assert found["time_to_first_token"] is found["seconds_per_token"] is None


def test_a_failure_later_than_the_timeout_counts_in_full():
    assert measuring.latency(row(1, 13, "timeout"), timeout=10) == 12


def test_first_token_and_seconds_per_token():
    rows = [row(0, 3, first_token=1), row(1, 6, first_token=3, output_tokens=4)]
    found = measuring.measure([*rows, row(2, 2.1, "broken")], seconds=3, timeout=10)
    assert found["time_to_first_token"]["mean"] == pytest.approx((1 + 2 + 10) / 3)  # from due, failures too
    assert found["seconds_per_token"]["mean"] == pytest.approx((2 / 4 + 3 / 3) / 2)


def test_tokens_that_a_server_does_not_count_are_unknown():
    found = measuring.measure([row(0, 1), row(1, 2, output_tokens=None)], seconds=2, timeout=10)
    assert (found["input_tokens"], found["output_tokens"]) == (20, None)


@pytest.mark.parametrize(
    ("rows", "slo", "why"),
    [
        ([row(i / 10, i / 10 + 0.1) for i in range(100)], None, None),
        ([row(i / 10, i / 10 + 0.1) for i in range(100)], 0.05, "p90 is 0.100 s, over --slo_seconds 0.05"),
        ([row(i / 10, i / 8 + 0.1) for i in range(100)], None, "80.2 % of the offered rate were served"),
        (
            [*(row(i / 10, i / 10 + 0.1) for i in range(99)), row(9.9, 9.91, "http 429")],
            None,
            "of 100 requests failed 1 http 429",
        ),
    ],
    ids=["sustained", "slo", "served", "error"],
)
def test_when_a_rate_is_sustained(rows, slo, why):
    assert measuring.why_not_sustained(measuring.measure(rows, 10, 30), slo) == why


def test_a_run_is_void_where_the_client_lagged_or_was_at_its_end():
    late = [row(i / 10, i / 10 + 1, sent=i / 10 + 0.2 * (i > 90)) for i in range(100)]
    assert measuring.why_void(measuring.measure(late, 10, 30), 0.05).startswith("the client lagged: at p99")
    assert measuring.why_void(measuring.measure(late, 10, 30), 0.25) is None
    ended = [row(0, 1), row(1, 2, "client at its end")]
    assert "ulimit -n" in measuring.why_void(measuring.measure(ended, 2, 30), 0.05)


def sweep(capacity: float, rates: list[float], bisections: int) -> tuple[list[float], float | None]:
    tried = {}
    while (rate := measuring.next_rate(tried, rates, bisections)) is not None:
        tried[rate] = rate <= capacity
    return list(tried), measuring.sustained(tried)


def test_a_sweep_goes_up_to_the_knee_and_bisects_it():
    assert sweep(23, [5, 10, 20, 40, 80], 3) == ([5, 10, 20, 40, 30, 25, 22.5], 22.5)
    assert sweep(23, [5, 10, 20, 40, 80], 0) == ([5, 10, 20, 40], 20)
    assert sweep(1000, [1, 2], 3) == ([1, 2], 2)
    assert sweep(0.5, [1, 2], 3) == ([1], None)
    assert sweep(5.005, [5, 5.01], 3) == ([5, 5.01], 5)  # nothing lies between, to three digits


def test_a_rate_above_one_that_failed_is_not_the_sustained_one():
    assert measuring.sustained({10: True, 20: False, 15: True, 17: False, 40: True}) == 15


def test_costs_are_at_the_served_rate_and_unknown_where_price_or_tokens_are():
    served = {"seconds": 100, "answered": 200, "input_tokens": 20_000, "output_tokens": None}  # 2 a second
    found = cost.of_served(3.6, served)  # a tenth of a cent a second
    assert found == {
        "1,000 requests": pytest.approx(0.5),
        "1M tokens in": pytest.approx(5),
        "1M tokens out": None,
    }
    assert set(cost.of_served(None, served).values()) == {None}


# Against a server


def test_the_sustained_rate_is_the_servers_capacity_and_latency_shows_its_queue(tmp_path):
    with LoadedServer(workers=4, service=0.05) as server:  # 80 requests a second
        rates = ("--rates", "50,100", "--seconds", 1.5, "--bisections", 1, "--price_per_hour", 3.6)
        done = run_script(SCRIPT, *flags_for(server, tmp_path, *rates, "--repeat_prompts"))
    assert (done.returncode, done.stderr) == (0, "")
    [path] = (tmp_path / "out").glob("serve-*.json")
    content = record.read_whole(path)
    assert (content["status"], content["script"], content["model"]) == ("finished", SCRIPT, "served")
    part = content["serve"]
    assert part["sustained"] == pytest.approx(80, rel=0.15)
    assert f"sustained  {part['sustained']:g} requests/s" in done.stdout
    low, over = part["rates"][:2]
    assert (low["status"], over["status"]) == ("sustained", "not sustained")
    assert over["served"] == pytest.approx(80, rel=0.1)
    assert over["offered"] == 100
    # Request i is due at i / 100 and done at i / 80 + 0.05: it waits, though each is served in 0.05 s
    assert 0.05 <= low["latency"]["p50"] < 0.2
    assert over["latency"]["p90"] == pytest.approx(0.9 * 150 * (1 / 80 - 1 / 100) + 0.05, abs=0.15)
    rows = [row for row in rows_of(tmp_path) if row["rate"] == 100]
    assert len(rows) == over["requests"] == 150
    right = sum(row["answer"].strip() == row["reference"] for row in rows)
    assert over["metrics"]["accuracy"]["value"] == pytest.approx(100 * right / 150)
    assert 60 < 100 * right / 150 < 90  # 75 of 100 prompts
    assert over["metrics"]["accuracy"]["ci95"] is None  # some were sent several times


def test_a_server_that_drops_one_of_twenty_is_not_sustained(tmp_path, load, capsys):
    with LoadedServer(status=lambda number: 500 if number % 20 == 0 else 200) as server:
        words = ("--rates", "20,40", "--seconds", 1, "--timeout_seconds", 7)
        content = load(flags_for(server, tmp_path, *words))
    [step] = content["serve"]["rates"]
    assert step["failures"] == {"http 500": 1}
    assert step["latency"]["p99"] > 5  # as the timeout, though it failed at once
    assert content["serve"]["sustained"] is None
    assert step["scored"] == 19  # a failure is no wrong answer
    assert step["metrics"]["accuracy"]["ci95"]
    assert "sustained  none: not even 20 requests/s" in capsys.readouterr().out


@pytest.mark.parametrize(("tokens", "share"), [(6, 6 / 7), (0, 0), (None, None)])
def test_prompts_that_a_server_has_in_its_cache_are_told(tokens, share, tmp_path, load, capsys):
    with LoadedServer() as server:
        server.cached = tokens
        content = load(flags_for(server, tmp_path, "--rates", 20, "--seconds", 1))
    [step] = content["serve"]["rates"]
    assert step["cached_prompt_share"] == (share if share is None else pytest.approx(share))
    told = "cache      86% of the prompts' tokens were there from earlier ones" in capsys.readouterr().out
    assert told == bool(tokens)


@pytest.mark.parametrize("api", ["openai", "tgi"])
def test_a_stream_gives_the_time_to_its_first_token_and_between_two(api):
    with LoadedServer(service=0.3, token=0.1) as server:
        rows = sent(server, 4, api, stream=True)
    found = measuring.measure(rows, 0.2, 20)
    assert (found["failures"], found["output_tokens"]) == ({}, 4 * len(WORDS))
    assert found["time_to_first_token"]["p50"] == pytest.approx(0.3, abs=0.1)
    assert found["seconds_per_token"]["p50"] == pytest.approx(0.1, abs=0.04)
    assert rows[0]["answer"] == "".join(WORDS)


@pytest.mark.parametrize("api", ["openai", "tgi"])
def test_what_is_asked_and_what_is_told(api):
    with LoadedServer() as server:
        rows = sent(server, 2, api, stream=False)
    assert [(row["answer"], row["input_tokens"], row["output_tokens"]) for row in rows] == [
        (" 0", 7, 2),
        (" 1", 7, 2),
    ]
    asked = server.asked[0]
    assert asked.pop("key") == "Bearer secret"
    if api == "openai":
        rest = {"max_tokens": 5, "temperature": 0, "stream": False}
        assert asked == {"model": "m", "prompt": "prompt 0", **rest}
    else:
        greedy = {"max_new_tokens": 5, "do_sample": False, "details": True, "decoder_input_details": True}
        assert asked == {"inputs": "prompt 0", "parameters": greedy}


@pytest.mark.parametrize(
    ("status", "said"), [(CLOSED, "broken"), (OTHER, "no answer of this API"), (429, "http 429")]
)
def test_an_answer_that_is_none_is_a_failure_by_its_kind(status, said):
    with LoadedServer(status=lambda number: status) as server:
        rows = sent(server, 1, "openai", stream=False) + sent(server, 1, "tgi", stream=False)
    assert [(row["status"], row["answer"], row["output_tokens"]) for row in rows] == [(said, None, None)] * 2
    assert all(row["error"] for row in rows)


@pytest.mark.parametrize("api", ["openai", "tgi"])
def test_a_stream_that_is_cut_is_a_failure(api):
    with LoadedServer() as server:
        server.cut = 3
        [row] = sent(server, 1, api, stream=True)
    assert (row["status"], row["answer"], row["first_token"]) == ("no answer of this API", None, None)
    assert "the stream ends before the answer does" in row["error"]


def test_no_request_is_left_behind_and_one_without_an_answer_failed():
    with LoadedServer(workers=1, service=0.4) as server:
        rows = sent(server, 3, "openai", stream=False, timeout=0.6)
    assert [row["status"] for row in rows] == ["ok", "timeout", "timeout"]
    assert rows[2]["end"] >= 0.6 + 0.1


def test_a_sweep_goes_on_with_the_rates_that_are_recorded(tmp_path, load, capsys):
    with LoadedServer() as server:
        words = flags_for(server, tmp_path, "--rates", "8,16", "--seconds", 0.5)
        whole = load(words)
        assert len(server.asked) == 1 + 4 + 8  # the first to see whether it answers
        [path] = (tmp_path / "out").glob("serve-*.json")
        killed = whole | {"status": "running"}
        killed["serve"] = whole["serve"] | {"rates": whole["serve"]["rates"][:1]}
        record.write_json(record.beside(path), killed)
        path.unlink()
        [rows] = (tmp_path / "out").glob("requests-*.jsonl")
        with pytest.raises(UserError, match=r"\.requests-.* can't be read .*: --force begins the sweep anew"):
            load(words)
        record.write_json(record.beside(path), killed)
        rows.rename(record.beside(rows))
        capsys.readouterr()
        server.asked.clear()
        again = load(words)
        assert len(server.asked) == 1 + 8
        assert again["serve"]["rates"][0] == whole["serve"]["rates"][0]
        assert [len([row for row in rows_of(tmp_path) if row["rate"] == rate]) for rate in (8, 16)] == [4, 8]
        assert "(recorded)" in capsys.readouterr().out
        assert not list((tmp_path / "out").glob(".*.json*"))  # nothing is left beside
        load(words)
        assert len(server.asked) == 1 + 8  # finished: nothing is sent
        load([*words, "--force"])
        assert len(server.asked) == 1 + 8 + 13
    assert load(words)["status"] == "finished"  # without a server


def test_a_sweep_that_is_stopped_says_so_and_goes_on(tmp_path):
    with LoadedServer() as server:
        words = flags_for(server, tmp_path, "--rates", "8,10", "--seconds", 0.5, "--api", "tgi")
        write_rows(
            tmp_path / "prompts.jsonl", [{"prompt": f"text {i}"} for i in range(9)]
        )  # nothing to score
        command = [sys.executable, str(ROOT / SCRIPT), *words]
        server.status = lambda number: 200 if number <= 5 else started.terminate() or 200
        started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        said = started.communicate()[1]
        assert (started.returncode, said) == (130, "interrupted: start it again and it goes on\n")
        [path] = (tmp_path / "out").glob("serve-*.json")
        content = record.read_whole(path)
        assert (content["status"], len(content["serve"]["rates"])) == ("interrupted", 1)
        server.status = lambda number: 200
        done = run_script(SCRIPT, *words)
    assert (done.returncode, done.stderr) == (0, "")
    content = record.read_whole(path)
    assert (content["status"], len(content["serve"]["rates"])) == ("finished", 2)
    assert [spent["status"] for spent in content["spent_before"]] == ["interrupted"]
    assert [(step["scored"], step["metrics"]) for step in content["serve"]["rates"]] == [(0, {})] * 2


def test_a_record_of_a_sweep_is_checked_and_counts_as_spent_but_is_no_run_of_the_report(tmp_path, load):
    with LoadedServer() as server:
        words = flags_for(server, tmp_path, "--rates", "8", "--seconds", 0.25, "--price_per_hour", 3600)
        content = load(words)
    [path] = (tmp_path / "out").glob("serve-*.json")
    assert find_runs([tmp_path]) == ([], [])
    seconds = content["serve"]["wall_seconds"]
    assert content["cost"]["usd"] == pytest.approx(seconds)  # at a dollar a second
    assert f"${seconds:,.2f}" in spent_in_all([tmp_path], [])
    for lacking in ("serve.sustained", "serve.rates.0.latency.p90", "cost.gpu"):
        place, _, name = lacking.rpartition(".")
        damaged = json.loads(json.dumps(content))
        schema.lookup(damaged, place)[name] = "?" if name != "gpu" else 3
        with pytest.raises(UserError, match=f"lacks {lacking}"):
            schema.check(damaged, path)


def test_a_finished_sweep_of_other_prompts_is_refused(tmp_path, load):
    with LoadedServer() as server:
        words = flags_for(server, tmp_path, "--rates", "8", "--seconds", 0.25)
        load(words)
        write_prompts(tmp_path, count=39)
        with pytest.raises(UserError, match="was made from other prompts data"):
            load(words)


def test_a_run_without_enough_prompts_is_void_and_done_again(tmp_path, load):
    with LoadedServer() as server:
        words = flags_for(server, tmp_path, "--rates", "20,200", "--seconds", 0.5)
        with pytest.raises(UserError, match="void at 200 requests/s: 100 requests and 40 prompts") as raised:
            load(words)
        assert "sustained so far: 20 requests/s" in str(raised.value)
        [path] = (tmp_path / "out").glob("serve-*.json")
        content = record.read(path)
        assert content["status"] == "void"
        assert [step["status"] for step in content["serve"]["rates"]] == ["sustained", "void"]
        assert len(server.asked) == 11
        with pytest.raises(UserError, match="void at 200"):
            load(words)
        assert len(server.asked) == 12  # the first rate is recorded


def test_prompts_are_drawn_by_seed_and_once_each(tmp_path):
    words = ["--url", "http://h", "--rates", "1", "--prompts_file", str(write_prompts(tmp_path))]
    args = load_flags.parse("", words)
    prompts = load_prompts.build(load_prompts.read_source(args)[1], args)
    drawn = load_prompts.draw(prompts, 40, 5, args)
    assert sorted(drawn) == sorted(prompts)
    assert drawn == load_prompts.draw(prompts, 40, 5, args) != prompts
    assert drawn != load_prompts.draw(prompts, 40, 5, load_flags.parse("", [*words, "--seed", "7"]))
    assert load_prompts.draw(prompts, 41, 5, args) is None
    assert len(load_prompts.draw(prompts, 41, 5, load_flags.parse("", [*words, "--repeat_prompts"]))) == 41


def test_prompts_are_built_from_the_test_texts_of_about_the_tokens_asked_for():
    from prompts import build_prompt
    from study import encoding, model

    words = ["--url", "http://h", "--rates", "1", "--test_file", str(DEMO_DATA / "posts_test.jsonl")]
    words += ["--pretrained_ckpt", str(DEMO_MODEL), "--prompt_tokens", "100"]
    args = load_flags.parse("", words)
    name, source = load_prompts.read_source(args)
    built = load_prompts.build(source, args)
    tokenizer = model.load_tokenizer(str(DEMO_MODEL))
    lengths = {len(encoding.prompt_ids(tokenizer, prompt.text)) for prompt in built}
    assert (name, min(lengths) >= 75, max(lengths) <= 125) == ("test", True, True)
    texts = {build_prompt("classification", "instruction", text): label for text, label in source.examples}
    assert all(texts[prompt.text] == prompt.reference for prompt in built)
    with pytest.raises(UserError, match=r"--prompt_tokens 9: no prompt of .* has about so many tokens"):
        load_prompts.build(source, load_flags.parse("", [*words, "--prompt_tokens", "9"]))


def test_a_model_that_says_its_weights_are_random_is_recorded_as_such(tmp_path):
    def weights(*words: str) -> dict:
        return load_test.weights_of(load_flags.parse("", ["--url", "http://h", "--rates", "1", *words]))

    (tmp_path / "config.json").write_text('{"random_weights": true}')
    assert weights("--pretrained_ckpt", str(tmp_path)) == {"random_weights": True}
    assert weights("--pretrained_ckpt", str(DEMO_MODEL)) == {}
    assert weights("--prompts_file", str(write_prompts(tmp_path))) == {}


# Bad input


@pytest.mark.parametrize(
    ("status", "line"),
    [
        (401, "http 401 .*: name the file of its key by --api_key_file"),
        (404, "http 404 .*: name the server by --url, its kind by --api and a model that it has by --model"),
        (500, "http 500 .*no such luck.*: look into the server's log"),
    ],
)
def test_a_server_that_refuses_the_first_request(tmp_path, load, status, line):
    with LoadedServer(status=lambda number: status) as server, pytest.raises(UserError, match=line) as raised:
        load(flags_for(server, tmp_path, "--rates", "1", "--model", "m"))
    assert len(str(raised.value).splitlines()) == 1
    assert not list((tmp_path / "out").glob("*.json*"))


def test_a_url_that_nothing_listens_at(tmp_path):
    with LoadedServer() as server:
        words = flags_for(server, tmp_path, "--rates", "1")
    line = error_line(run_script(SCRIPT, *words))
    assert line.startswith(f"error: --url {server.url}: nothing listens there (")
    line = error_line(run_script(SCRIPT, *words, "--api", "tgi"))
    assert line.startswith(f"error: --url {server.url}: nothing listens there (")


@pytest.mark.parametrize(
    ("rates", "why"),
    [
        ("1,x", "1,x is not numbers with commas between them"),
        ("", " is not numbers with commas between them"),
        ("2,1", "2,1 does not rise from above 0"),
        ("0,1", "0,1 does not rise from above 0"),
        ("1,1", "1,1 does not rise from above 0"),
        ("1,inf", "1,inf does not rise from above 0"),
        ("nan", "nan does not rise from above 0"),
    ],
)
def test_rates_that_are_no_ascending_numbers(capsys, rates, why):
    with pytest.raises(SystemExit):
        load_flags.parse("", ["--url", "http://h", "--rates", rates])
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"argument --rates: {why}")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://h", "http://", "http://h?x=1", "http://h:port"])
def test_a_url_that_is_none(capsys, url):
    with pytest.raises(SystemExit):
        load_flags.parse("", ["--url", url, "--rates", "1"])
    line = f"argument --url: {url} is not like http://127.0.0.1:8000"
    assert capsys.readouterr().err.splitlines()[-1].endswith(line)


@pytest.mark.parametrize("ctrl_c", [signal.default_int_handler, signal.SIG_IGN])
def test_sigterm_ends_a_run_also_where_ctrl_c_is_ignored(ctrl_c):
    async def terminated():
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(10)

    before = signal.signal(signal.SIGINT, ctrl_c)
    try:
        with pytest.raises(KeyboardInterrupt):
            client.run(terminated())
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_url_may_end_with_its_version():
    for url in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"):
        assert load_flags.parse("", ["--url", url, "--rates", "1"]).url == "http://h:1"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "holds no prompts"),
        ('{"text": "a"}\n', 'row 1: "prompt" is no text'),
        ('{"prompt": "a"}\n{"prompt": " "}\n', 'row 2: "prompt" is no text'),
        ('{"prompt": "a", "reference": 3}\n', 'row 1: "reference" is no text'),
    ],
)
def test_a_prompts_file_without_prompts(tmp_path, text, why):
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    args = load_flags.parse("", ["--url", "http://h", "--rates", "1", "--prompts_file", str(file)])
    with pytest.raises(UserError, match=f"^--prompts_file {file} {why}"):
        load_prompts.read_source(args)


@pytest.mark.parametrize(
    ("text", "why"),
    [("", "is empty"), (" \n", "is empty"), ("a b", "should hold one key"), ("é", "should hold")],
)
def test_an_api_key_file_without_a_key(tmp_path, text, why):
    file = tmp_path / "key"
    file.write_text(text)
    with pytest.raises(UserError, match=f"^--api_key_file {file} {why}"):
        load_flags.read_key(str(file))
    with pytest.raises(UserError, match="can't be read"):
        load_flags.read_key(str(tmp_path / "none"))
