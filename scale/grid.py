"""The units of a loop on Ray's cluster: which run, what has come of them, which nodes are left out."""

import time
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from scale import carry, on_node, units
from scale.on_node import Job, Outcome
from scale.units import Budget, Unit
from study.dry_run import Sum
from study.errors import UserError

RETRIES = 3  # of a unit whose worker or node has died
CLOCKS = 3.0  # seconds by which a node's clock may differ unsaid
NODE = "ray.io/node-id"  # the label that Ray gives every node
BUDGET_ENDS = "the budget ends here"  # as study/loop.sh says it


class Grid:
    """One grid. `failed` says why units failed, `done` names those that ended well, both by their cells."""

    def __init__(self, ray, job: Job, budget: Budget, cpus: float, out: TextIO):
        self.ray, self.job, self.budget, self.cpus, self.out = ray, job, budget, cpus, out
        self.names: dict[str, str] = {}  # of the nodes that were looked at, by Ray's ids
        self.left_out: dict[str, str] = {}  # why
        self.gone: set[str] = set()
        self.all_share = True
        self.running: dict = {}  # units, by what Ray gives for their outcome
        self.failed: dict[str, str] = {}
        self.done: set[str] = set()
        self.over = False  # the budget, for a unit that was admitted

    def do(self, todo: list[Unit]) -> None:
        """Do what the budget lets. Raises UserError where no node is left that can."""
        waiting = list(todo)
        self.look_at_nodes()
        self.estimate(waiting)
        with tqdm(total=len(todo), unit="unit", disable=None) as bar:
            try:
                while True:
                    while waiting and not self.over and self.budget.admits(waiting[0].left, self.reserved()):
                        self.begin(waiting.pop(0))
                    if not self.running:
                        return
                    ended, _ = self.ray.wait([*self.running], timeout=10)
                    self.look_at_nodes()
                    for ref in ended:
                        bar.update(self.settle(ref, waiting))
                    if ended:
                        self.estimate(waiting)
            except BaseException:
                self.stop()
                raise

    def look_at_nodes(self) -> None:
        """Ask nodes that are new what they lack, and say which can't do cells and which have gone."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = {node["NodeID"]: node for node in self.ray.nodes() if node["Alive"]}
        look, asked, began = self.ray.remote(on_node.look), {}, time.time()
        for node_id in nodes.keys() - self.names.keys():
            there = NodeAffinitySchedulingStrategy(node_id, soft=False)
            asked[node_id] = look.options(num_cpus=0, scheduling_strategy=there).remote(self.job)
        for node_id, ref in asked.items():
            self.names[node_id] = f"{nodes[node_id]['NodeManagerHostname']}/{node_id[:6]}"
            self.hear(node_id, ref, began)
        for node_id in self.names.keys() - nodes.keys() - self.gone:
            self.gone.add(node_id)
            self.say(f"node       {self.names[node_id]} has gone; what it did is done again elsewhere")
        self.check_nodes([nodes[node_id] for node_id in nodes.keys() - self.left_out.keys()])

    def hear(self, node_id: str, ref, began: float) -> None:
        """Take in what a node has said of itself, which was asked when the clock here was at `began`."""
        try:
            why, clock, shares = self.ray.get(ref, timeout=120)
        except self.ray.exceptions.RayError as error:
            why, clock, shares = why_lost(error), began, True
        off = min(0, clock - began) + max(0, clock - time.time())
        if abs(off) > CLOCKS:
            way = "ahead" if off > 0 else "behind"
            self.say(f"clock      that of {self.names[node_id]} is {abs(off):.0f} s {way}")
        self.all_share = self.all_share and shares
        if why:
            self.leave_out(node_id, why)

    def check_nodes(self, usable: list[dict]) -> None:
        need = {"GPU": self.job.gpus, "CPU": self.cpus}
        if any(all(node["Resources"].get(name, 0) >= n for name, n in need.items()) for node in usable):
            return
        if not usable:
            whys = "; ".join(f"{self.names[node_id]}: {why}" for node_id, why in self.left_out.items())
            raise UserError(f"no node is left that can do cells ({whys}): mend that and start again")
        raise UserError(
            f"no node that is left has {self.job.gpus:g} GPUs and {self.cpus:g} CPUs, which a cell takes: "
            "start again once one is there, or give fewer by --gpus_per_cell or --cpus_per_cell"
        )

    def leave_out(self, node_id: str, why: str) -> None:
        if node_id not in self.left_out:
            self.say(f"node       {self.names.get(node_id, node_id[:6])} is left out: {why}")
        self.left_out[node_id] = why

    def reserved(self) -> list[Sum]:
        return [unit.left for unit in self.running.values()]

    def estimate(self, waiting: list[Unit]) -> None:
        """On a budget: look anew what units that nobody could estimate will take, by what has been measured
        since, and where GPUs are on one of them."""
        if not any(self.budget.unknown(unit.left) for unit in waiting):
            return
        job, on_gpu = self.job, self.job.gpus and self.all_share
        words = job.loop, job.flags, job.variables, job.cwd
        try:
            cells, *_ = (
                self.ray.get(self.task(units.list_cells, self.job.gpus).remote(*words))
                if on_gpu
                else units.list_cells(*words)
            )
        except self.ray.exceptions.RayError:
            return
        found = {unit.only: unit for unit in units.units_of(cells)}
        for unit in waiting:
            unit.cells = found[unit.only].cells if unit.only in found else unit.cells

    def task(self, function, gpus: float):
        """A function as a task for a node that is not left out."""
        labels = {NODE: f"!in({','.join(sorted(self.left_out))})"} if self.left_out else None
        options = {"num_cpus": self.cpus, "num_gpus": gpus, "max_retries": RETRIES}
        return self.ray.remote(function).options(**options, label_selector=labels)

    def begin(self, unit: Unit) -> None:
        sent = {} if self.all_share else carry.pack(unit.folders, Path(self.job.cwd))
        words = unit.only, self.budget.flags(self.reserved()), unit.folders, sent
        self.running[self.task(on_node.run_unit, self.job.gpus).remote(self.job, *words)] = unit

    def settle(self, ref, waiting: list[Unit]) -> bool:
        """Take in what has come of a unit. Whether it has ended, and waits for no other node."""
        unit = self.running.pop(ref)
        try:
            outcome = self.ray.get(ref)
        except self.ray.exceptions.RayError as error:
            outcome = Outcome("?", "", status=1, said=why_lost(error))
        if outcome.refused:
            self.leave_out(outcome.node_id, outcome.refused)
            waiting.insert(0, unit)
            return False
        for folder in carry.unpack(outcome.left or {}, Path(self.job.cwd)):
            self.say(f"kept       {folder} is finished here: what {outcome.node} has made is dropped")
        self.budget.spend(unit.left, outcome.seconds, outcome.usd_per_hour)
        state = "finished"
        if outcome.status:
            state, self.failed[unit.only] = "failed", last_words(outcome)
        elif BUDGET_ENDS in outcome.said:
            state, self.over = "left", True
        else:
            self.done.add(unit.only)
        why = f": {self.failed[unit.only]}" if state == "failed" else ""
        self.say(f"cells {unit.only:<9} {state:<8} {outcome.seconds:7.1f} s  {outcome.node}{why}")
        return True

    def say(self, line: str) -> None:
        tqdm.write(line, file=self.out)

    def stop(self) -> None:
        """End what runs, so that a start after this one goes on from there."""
        for ref in self.running:
            self.ray.cancel(ref)
        if self.running:
            self.ray.wait([*self.running], num_returns=len(self.running), timeout=on_node.PATIENCE + 5)


def last_words(outcome: Outcome) -> str:
    """The error among the last lines of a loop, or else the very last of them."""
    lines = [line.strip() for line in outcome.said.splitlines() if line.strip()] or ["it said nothing"]
    errors = [line for line in lines if line.startswith("error: ") and not line.endswith(" cells failed:")]
    return f"{(errors or lines)[-1].removeprefix('error: ')} (exit {outcome.status})"


def why_lost(error: Exception) -> str:
    """What Ray says of a task that has no outcome, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if "Traceback" in str(error) or "ray::" in str(error) else lines[0])[:300]
