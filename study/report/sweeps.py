"""Records of load tests -> sweeps, in groups that may share a table."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf, isclose
from pathlib import Path
from urllib.parse import urlsplit

from study.errors import UserError
from study.records import cost, record
from study.records.schema import SCORES, lookup, part_of
from study.report.collect import name_of, records_in
from study.report.selection import in_order

SERVERS = ("fastapi", "tgi", "ray", "vllm")  # as the published tables have them; all others come after
# Settings that change what a server is asked for or held to; `rates` and `bisections` only say how closely.
ASKED = (
    *("max_new_tokens", "seconds", "arrivals", "seed", "repeat_prompts", "stream", "timeout_seconds"),
    "slo_seconds",
)


@dataclass(eq=False)
class Sweep:
    """A record of a load test. Without a result, `state` says why: "failed", "void", "unfinished", ..."""

    path: Path
    content: dict
    state: str
    model: str = ""  # as tables show it
    variant: str = ""  # what tells it from other sweeps of a table

    def __post_init__(self):
        self.task, self.config = self.content["task"], self.content["config"]
        self.finished = self.state == "finished"
        self.rates = self.content["serve"]["rates"] if self.finished else []
        self.sustained = self.content["serve"]["sustained"] if self.finished else None
        self.gpu = cost.shown(self.content["cost"]) if self.content.get("cost") else "unknown"

    @property
    def server(self) -> str:
        """--server, or the host of its url."""
        named = lookup(self.content, "serve.server")
        return named or urlsplit(lookup(self.content, "serve.url") or "").netloc or "unknown"

    @property
    def named(self) -> bool:
        """Whether its model has a name; else the url stands in its place."""
        return self.content["model"] != self.config.get("url")

    @property
    def random(self) -> bool:
        """Whether nobody trained its model: its answers have no score to show."""
        return bool(lookup(self.content, "checkpoint.random_weights"))

    @property
    def label(self) -> str:
        return self.server + (f" ({self.variant})" if self.variant else "")

    @property
    def step(self) -> dict | None:
        """What was measured at the sustained rate; None where there is none."""
        return next((step for step in self.rates if step["rate"] == self.sustained), None)

    @property
    def bound(self) -> bool:
        """Whether more might be sustained than was tried."""
        return self.finished and not self.content["serve"]["knee"]

    def identity(self) -> tuple:
        """What no two sweeps have in common."""
        return self.content.get("config_hash") or self.path, self.gpu

    def prompts(self) -> tuple[str, str]:
        """What its answers depend on beside the server: prompts, and the version of the metrics."""
        versions = (step.get("metrics_version") for step in self.rates)
        return lookup(self.content, "serve.prompts_sha256") or "", next(filter(None, versions), "")

    def keys(self) -> tuple[str, str, str, str]:
        return self.label, self.model, self.task, self.gpu

    def costs(self, prices: Sequence[dict], offered: bool = False) -> dict[str, float | None]:
        """Dollars at the sustained rate, by what was served, or as if all that was `offered` had been."""
        step = self.step
        seconds = step["answered"] / step["offered"] if offered else step["seconds"]
        return cost.of_served(self.per_hour(prices), step | {"seconds": seconds})

    def per_hour(self, prices: Sequence[dict]) -> float | None:
        """USD, by `prices` or else as recorded."""
        spent = self.content.get("cost")
        return cost.repriced(spent, prices, spent.get("gpus") or 1) if spent else None

    def records(self) -> list[Path]:
        return [self.path if self.path.exists() else record.beside(self.path)]


def find_sweeps(folders: Iterable[Path]) -> tuple[list[Sweep], list[str]]:
    """Every load test in the folders, and a line for each record that is left out, with the reason."""
    paths = {path.with_name(path.name.lstrip(".")) for folder in folders for path in records_in(folder)}
    found: dict[tuple, Sweep] = {}
    problems = []
    for path in sorted({path.resolve(): path for path in sorted(paths) if part_of(path) == "serve"}.values()):
        try:
            sweep = read_sweep(path)
        except UserError as error:
            problems.append(str(error))
            continue
        twin = found.setdefault(sweep.identity(), sweep)
        if twin is not sweep:
            old, new = sorted((twin, sweep), key=lambda s: (s.finished, s.content.get("finished") or ""))
            problems.append(f"{old.path} is left out: {new.path} has the same settings, and is newer")
            found[new.identity()] = new
    return list(found.values()), problems


def read_sweep(path: Path) -> Sweep:
    """Raises UserError for a record that is not as it should be."""
    content, state = record.read_standing(path)
    if state == "finished":
        check_rates(content, path)
    return Sweep(path, content, state)


def check_rates(content: dict, path: Path) -> None:
    """Raise UserError for a finished sweep whose rates are not what its counts give, or do not give what it
    sustains."""
    part, seconds = content["serve"], content["config"]["seconds"]
    for step in part["rates"]:
        if not adds_up(step, seconds):
            raise UserError(
                f"{path} has other numbers at {step['rate']:g} requests/s than its counts give: "
                "--force redoes the sweep"
            )
    bad = [step["rate"] for step in part["rates"] if step["status"] != "sustained"]
    good = [step["rate"] for step in part["rates"] if step["rate"] < min(bad, default=inf)]
    if not part["rates"] or part["sustained"] != max(good, default=None) or part["knee"] != bool(bad):
        raise UserError(f"{path} sustains another rate than its rates give: --force redoes the sweep")


def adds_up(step: dict, seconds: float) -> bool:
    """Whether the rates of one step follow from its counts, and its percentiles from each other."""
    places = [0, *(step["latency"][name] for name in ("p50", "p90", "p99"))]
    counts = [step[name] for name in ("input_tokens", "output_tokens") if step[name] is not None]
    return (
        step["status"] in {"sustained", "not sustained"}
        and places == sorted(places)
        and min(step["seconds"], seconds, step["rate"]) > 0
        and 0 <= step["answered"] <= step["requests"] != 0
        and all(count >= 0 for count in counts)
        and isclose(step["served"], step["answered"] / step["seconds"])
        and isclose(step["offered"], step["requests"] / seconds)
    )


def comparable_sweeps(found: Sequence[Sweep]) -> list[tuple[str, list[Sweep]]]:
    """Groups of sweeps that may share a table: (why the group stands apart, sweeps in the tables' order). Of
    each task those with the commonest prompts, scored by the same metrics, have no reason to."""
    groups = defaultdict(list)
    for task in SCORES:
        ours = [sweep for sweep in found if sweep.task == task]
        counts = Counter(sorted(sweep.prompts() for sweep in ours if sweep.finished))
        usual = max(counts, key=counts.get, default=("", ""))
        for sweep in ours:
            prompts, version = sweep.prompts()
            other = sweep.finished and (prompts, version) != usual
            told = f"metrics of version {version or 'unknown'}" if prompts == usual[0] else ""
            why = told or f"{lookup(sweep.content, 'serve.prompts')} prompts (sha256 {prompts[:8]})"
            groups[f"{task}, {why}" if other else ""].append(sweep)
    for group in groups.values():
        name_sweeps(group)
    return [(why, in_tables_order(group)) for why, group in sorted(groups.items())]


def name_sweeps(group: Sequence[Sweep]) -> None:
    """Give each sweep its `model` and its `variant`, as much as tells it from the others of its task."""
    names = {sweep.content["model"] for sweep in group if sweep.named}
    for sweep in group:
        same = [other.config for other in group if other.task == sweep.task]
        told = [
            setting_named(sweep.config, name)
            for name in ASKED
            if len({str(config.get(name)) for config in same}) > 1
        ]
        sweep.model = name_of(sweep.content["model"], names) if sweep.named else "—"
        sweep.variant = ", ".join(filter(None, told))
        sweep.model += " (random weights)" * sweep.random
    taken = Counter(sweep.keys() for sweep in group)
    for sweep in [sweep for sweep in group if taken[sweep.keys()] > 1]:
        settings = f"settings {sweep.content.get('config_hash')}"
        sweep.variant = ", ".join(filter(None, [sweep.variant, settings]))


def setting_named(config: dict, name: str) -> str:
    """E.g. "slo_seconds 1", or for a switch "stream"; "" where it is not set."""
    value = config.get(name)
    return "" if value in (None, False) else name if value is True else f"{name} {value}"


def in_tables_order(group: Iterable[Sweep]) -> list[Sweep]:
    group = list(group)
    models, tasks = in_order({sweep.model for sweep in group}), list(SCORES)

    def place(sweep: Sweep) -> tuple:
        server = sweep.server.casefold()
        known = SERVERS.index(server) if server in SERVERS else len(SERVERS)
        return tasks.index(sweep.task), models.index(sweep.model), known, server, sweep.gpu, sweep.variant

    return sorted(group, key=place)
