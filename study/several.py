"""Several evaluations by one process, which loads the base model and puts it in 4 bits once."""

import argparse
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

from study import also, cli
from study.device import Process
from study.errors import UserError
from study.files import write_text
from study.records import record, runs

END = b"\x1e\0"
SHARED = ("checkpoint", "quantization")  # what a base is, by the record of a training


class Base:
    """The base model of the evaluations of a process, one after the other."""

    def __init__(self, several: bool):
        self.several = several
        self.loaded_by = None  # the folder of the run that it was loaded for
        self.kind = self.model = self.tuned = self.reader = None

    def tokenizer(self, checkpoint: str):
        """The tokenizer of the base, proven once."""
        from study import model

        if self.reader is None or self.reader[0] != checkpoint:
            self.reader = checkpoint, model.load_tokenizer(checkpoint)
        return self.reader[1]

    def load(self, folder: Path, checkpoint: str, here: dict, quantization: dict):
        """The base for the run in `folder`, as `model.load_base` leaves it: one that is loaded already only
        where the checkpoint is the same by content, as `here` says."""
        from study import model

        kind = checkpoint, here, quantization
        if self.model is not None and self.kind == kind:
            self.model, self.tuned = model.take_off(self.tuned or self.model), None
            return self.model
        self.forget()
        self.model = model.load_base(checkpoint, model.quantization_from(quantization))
        if self.several:
            model.remember(self.model)
        self.kind, self.loaded_by = kind, folder
        return self.model

    def with_adapter(self, folder: Path, trained: dict):
        """The base with the adapter of the run in `folder`."""
        from study import model

        hashes = (trained["train"].get(name) for name in ("adapter_sha256", "adapter_config_sha256"))
        self.tuned = model.load_adapter(self.model, folder / "adapter", *hashes)
        return self.tuned

    def paid_by(self, folder: Path) -> dict:
        """What a record says of a base that another run has loaded."""
        return {} if self.loaded_by in (None, folder) else {"loaded_by": self.loaded_by.name}

    def forget(self) -> None:
        self.kind = self.model = self.tuned = self.loaded_by = None
        gc.collect()
        torch = sys.modules.get("torch")
        if torch and torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def flags_of_each(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The flags of each run that the flags name: by several --experiment_dir, or by --also_epochs. A loop
    over untrained models names them by a file, RUNS_TO_SCORE: each word ends in a NUL, each run in END."""
    if args.kind == "prompt":
        text = Path(os.environ["RUNS_TO_SCORE"]).read_bytes() if os.environ.get("RUNS_TO_SCORE") else b""
        runs_of = [os.fsdecode(words).split("\0")[:-1] for words in text.split(END)[:-1]]
        return [cli.parse_args(None, "", words) for words in runs_of] or [args]
    if isinstance(args.experiment_dir, list):
        return [argparse.Namespace(**vars(args) | {"experiment_dir": name}) for name in args.experiment_dir]
    return [also.of_epochs(args, epochs) for epochs in sorted({args.epochs, *args.also_epochs})]


def refuse_other_bases(folders: list[Path]) -> None:
    """Raise UserError if finished trainings are of other bases, tasks or prompts than the first of them."""
    first = None
    for folder in folders:
        trained = record.read(folder / "train.json")
        if not trained or trained["status"] != "finished":
            continue  # fails by itself
        kind = {name: trained.get(name) for name in ("task", "prompt_sha256", *SHARED)}
        kind["pretrained_ckpt"] = trained.get("config", {}).get("pretrained_ckpt")
        first = first or (folder, kind)
        other = [name for name in kind if kind[name] != first[1][name]]
        if other:
            raise UserError(
                f"--experiment_dir {folder}: its {other[0]} is not that of {first[0]}: name them in two calls"
            )


def score_each(args: argparse.Namespace, method: str | None, process: Process, score: Callable) -> None:
    """`score(args, process, base)` for each run that the flags name; one that fails does not stop the others.

    Raises UserError if one has failed; the file that FAILED_RUNS names then has the folders of those, a line
    each, for a loop.
    """
    each = {runs.folder_of(one, getattr(one, "prompt_type", method)): one for one in flags_of_each(args)}
    base, of_a_loop = Base(len(each) > 1), os.environ.get("FAILED_RUNS")
    if not base.several:
        return score(args, process, base)
    if not of_a_loop:  # whose cells may have been trained by other versions: each has its base
        refuse_other_bases(list(each))
    failed = []
    for folder, one in each.items():
        before = records_in(folder)
        try:
            score(one, process, base)
        except UserError as error:
            if process.count > 1:  # which must stay in step: those that are left have failed, too
                say_failed([*each][[*each].index(folder) :], process)
                raise
            print(f"error: {folder}: {error}", file=sys.stderr, flush=True)
            failed.append(folder)
        if failed[-1:] == [folder]:  # here, where the error holds no tensors any more
            base.forget()  # it may be half merged
        if records_in(folder) != before:
            process = process.from_here()
        print(flush=True)
    say_failed(failed, process)
    if failed:
        raise UserError(f"{len(failed)} of {len(each)} runs failed: {', '.join(map(str, failed))}")


def say_failed(folders: list[Path], process: Process) -> None:
    """To the file that FAILED_RUNS names, for a loop."""
    if folders and process.main and os.environ.get("FAILED_RUNS"):
        write_text(Path(os.environ["FAILED_RUNS"]), "".join(f"{folder}\n" for folder in folders))


def records_in(folder: Path) -> dict[Path, int]:
    """When each evaluation's record was written: what a process took until then has been accounted for."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("eval*.json")}
