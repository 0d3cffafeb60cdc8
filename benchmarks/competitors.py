"""Training speed of the competitors beside what their matrix products alone take, on this GPU.

    python competitors/encoder_classification.py --experiment_dir bert
    python competitors/flan_t5.py --task_type summarization --tuning lora --experiment_dir t5
    python -m benchmarks.competitors bert t5 --output competitors.json

Reads the records of finished runs, which should be of this machine and hour. The ceiling: the products of the
model's linear layers in bfloat16 with the tokens of a mean step, forward, for the gradient of the input, and
where all weights are trained for theirs, sustained over seconds; no padding, attention, optimizer or host.
The last line is the table as JSON.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

from benchmarks.provenance import headline, provenance
from benchmarks.workers import finish, sustained
from study import cli
from study.errors import UserError
from study.records import record

SECONDS = 4


def tokens_seen(name: str, read: float, written: float) -> float:
    """Tokens that the linear layer `name` multiplies, of those that a T5's encoder reads and its decoder
    writes; an encoder has the former alone. A classification head and its pooler see one a text: 0 here."""
    if "pooler" in name or name.startswith(("classifier", "pre_classifier", "head.")):
        return 0
    if name.startswith(("decoder.", "lm_head")):
        return read if name.endswith(("EncDecAttention.k", "EncDecAttention.v")) else written
    return read


def products(checkpoint: str, kind: str, read: float, written: float, weights: bool) -> Callable[[], None]:
    """What multiplies the tokens of a step with a checkpoint's linear layers, and does nothing else."""
    import torch
    from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

    loader = AutoModelForSeq2SeqLM if kind.startswith("t5") else AutoModelForSequenceClassification
    with torch.device("meta"):
        model = loader.from_config(AutoConfig.from_pretrained(checkpoint))
    draw = lambda *shape: torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    shapes = [
        (round(tokens_seen(name, read, written)), layer.out_features, layer.in_features)
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear)
    ]
    shapes = [shape for shape in shapes if shape[0]]
    of = {(n, out, into): (draw(n, into), draw(out, into), draw(n, out)) for n, out, into in set(shapes)}

    def run() -> None:
        for shape in shapes:
            inputs, weight, gradient = of[shape]
            torch.mm(inputs, weight.T)
            torch.mm(gradient, weight)
            if weights:
                torch.mm(gradient.T, inputs)

    return run


def row_of(folder: Path) -> dict:
    """A finished run beside its ceiling."""
    trained = record.read(folder / "train.json")
    if not trained or trained["status"] != "finished":
        raise UserError(f"{folder} holds no finished training: train there first")
    train, method = trained["train"], trained["method"]
    written = train["learned_tokens"] / train["steps"] if method.startswith("t5") else 0
    read = train["tokens"] / train["steps"] - written
    weights = method != "t5-lora"
    checkpoint = trained["config"]["pretrained_ckpt"]
    took = sustained(products(checkpoint, method, read, written, weights), SECONDS)
    scored = record.read(folder / "eval.json") or {"eval": {}}
    kept = ("tokens_per_second", "seconds", "wall_seconds", "peak_memory_gib", "tokens", "steps", "batching")
    return {
        "model": Path(checkpoint).name,
        "method": method,
        **{name: train[name] for name in kept},
        "ceiling": (read + written) / median(took),
        "eval": {name: scored["eval"].get(name) for name in ("examples", "seconds", "wall_seconds")},
    }


def show(rows: list[dict]) -> str:
    from tabulate import tabulate

    lines = [
        [
            row["model"],
            row["method"],
            f"{row['tokens'] / row['steps']:,.0f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['ceiling']:,.0f}",
            f"{100 * row['tokens_per_second'] / row['ceiling']:.0f} %",
            f"{row['seconds']:,.0f}",
            f"{row['peak_memory_gib']:.1f}",
            f"{row['eval']['examples']:,} in {row['eval']['seconds']:.1f}"
            if row["eval"]["examples"]
            else "—",
        ]
        for row in rows
    ]
    titles = ["model", "method", "tokens a step", "tokens/s", "ceiling", "of it", "training, s", "peak GiB"]
    titles.append("scored, s")
    return tabulate(lines, titles, tablefmt="github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table as JSON here, too")
    args = parser.parse_args()
    rows, about = [row_of(folder) for folder in args.runs], provenance()
    print(f"{headline(about)}\n\n{show(rows)}\n")
    finish({**about, "rows": rows}, rows, args.output)


if __name__ == "__main__":
    sys.exit(cli.run_script(lambda _: main()))
