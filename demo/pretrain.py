"""Pretrains a base model from scratch on plain texts, within minutes on one GPU: a Llama of some 70 million
weights with a tokenizer of its own. It has seen no label, no summary and no test text.

    python demo/pretrain.py base --texts posts_train.jsonl:text dialogues_train.jsonl:dialogue \\
        --exclude posts_test.jsonl:text dialogues_test.jsonl:dialogue dialogues_train.jsonl:summary

Of each file one column is read. A text that stands under --exclude, spaces apart, is left out; one in fifty,
by its hash, is held out. The perplexity of these is taken after each pass, the best weights are kept, and
training ends early once --patience passes brought nothing. Killed and started again, it goes on. The folder
gets the model in bfloat16, and pretraining.json, which says how it came about.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from study import cli, data, device, files
from study.errors import UserError
from study.records import record

HELD_OUT = 50  # one text in so many
WARM_UP = 100  # steps
SAVE_SECONDS = 60  # between two checkpoints at least
FALLING = 0.4  # share of the steps, at the end, over which the learning rate falls to 0


@dataclass
class Source:
    """One column of a file: texts to learn, texts held out, and what became of the others."""

    place: str
    sha256: str
    learned: list[str]
    held: list[str]
    repeated: int = 0
    excluded: int = 0

    def describe(self) -> dict:
        counts = {"learned": len(self.learned), "held": len(self.held)}
        left = {"repeated": self.repeated, "excluded": self.excluded}
        return {"source": self.place, "sha256": self.sha256, **counts, **left}


def main(process: device.Process) -> None:
    args = parse()
    sources = read_sources(args.texts, args.exclude)
    apart = ("folder", "texts", "exclude")
    settings = {name: value for name, value in vars(args).items() if name not in apart}
    about = {"settings": settings, "sources": [source.describe() for source in sources]}
    about["excluded_from"] = [Path(place).name for place in args.exclude]
    for source in sources:
        print(f"texts      {source.place}: {', '.join(f'{n:,} {k}' for k, n in counts(source).items())}")
    finished = args.folder / "pretraining.json"
    if finished.exists():
        check_same(json.loads(finished.read_text(encoding="utf-8")), about, args.folder)
        return print(f"finished   {args.folder}")
    if args.folder.exists() and not (args.folder / ".state").is_dir():
        raise UserError(f"{args.folder} exists: remove it or name another folder")
    (args.folder / ".state").mkdir(parents=True, exist_ok=True)

    fix_order_of_sums()
    tokenizer = tokenizer_of(args, sources)
    training = Training(args, sources, tokenizer, about)
    training.run()
    training.write(about, process)


def fix_order_of_sums() -> None:
    """Let every kernel add up in one order, and choose none by how long it takes, so that the same command
    on the same kind of GPU makes the same weights."""
    os.environ |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TORCHINDUCTOR_DETERMINISTIC": "1"}
    import torch

    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # which takes time, and shows no fault here
    torch.set_float32_matmul_precision("high")


def counts(source: Source) -> dict[str, int]:
    return {name: count for name, count in source.describe().items() if isinstance(count, int)}


def parse() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=Path, help="where to write the model")
    add("--texts", nargs="+", required=True, metavar="FILE:COLUMN", help="what to learn from")
    add("--exclude", nargs="*", default=[], metavar="FILE:COLUMN", help="texts that must not be learned from")
    add("--tokenizer", metavar="CKPT", help="an existing one, in place of one made from the texts")
    add("--vocabulary", type=cli.positive_int, default=16384, help="tokens of the tokenizer (%(default)s)")
    add(
        "--hidden",
        type=cli.positive_int,
        default=640,
        help="width, a multiple of 64, the size of a head (%(default)s)",
    )
    add("--inner", type=cli.positive_int, default=1792, help="width inside the MLP (%(default)s)")
    add("--layers", type=cli.positive_int, default=12, help="decoder layers (%(default)s)")
    add(
        "--block",
        type=cli.positive_int,
        default=1024,
        help="tokens of a row: the longest text and prompt (%(default)s)",
    )
    add("--rows", type=cli.positive_int, default=64, help="rows of a step (%(default)s)")
    add("--passes", type=cli.positive_int, default=16, help="over all texts (%(default)s)")
    add(
        "--patience",
        type=cli.positive_int,
        default=3,
        help="passes without a better perplexity to end after (%(default)s)",
    )
    add("--dropout", type=float, default=0.1, help="of what each sublayer adds (%(default)s)")
    add("--learning_rate", type=float, default=2e-3, help="of Muon and AdamW (%(default)s)")
    add("--weight_decay", type=float, default=0.1, help="of the matrices (%(default)s)")
    add("--seed", type=int, default=42, help="of weights, order and dropout (%(default)s)")
    args = parser.parse_args([cli.underscored(word) for word in sys.argv[1:]])
    if args.hidden % 64:
        parser.error(f"--hidden {args.hidden} is no multiple of 64")
    return args


# Texts


def key(text: str) -> str:
    """Texts that differ in spaces alone have the same."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()


def read_column(place: str, flag: str) -> tuple[str, list[str]]:
    """The SHA-256 of a file and its column's texts. Raises UserError."""
    name, colon, column = place.rpartition(":")
    if not colon:
        raise UserError(f"{flag} {place}: name the column too, as in {place}:text")
    columns = {flag: column}
    rows = files.read_file(Path(name), flag, columns)
    texts = [data.read_text(row, flag, columns, f"{name}, row {number}") for number, row in rows]
    return hashlib.sha256(Path(name).read_bytes()).hexdigest(), [text for text in texts if text.strip()]


def read_sources(places: Sequence[str], exclude: Sequence[str]) -> list[Source]:
    """Raises UserError, also where nothing is left to learn or to hold out."""
    never = {key(text) for place in exclude for text in read_column(place, "--exclude")[1]}
    sources, seen, names = [], set(), [Path(place).name for place in places]
    for place in places:
        if names.count(Path(place).name) > 1:
            raise UserError(
                f"--texts {place}: another file has that name: rename one, to tell their figures apart"
            )
        sha256, texts = read_column(place, "--texts")
        source = Source(f"{Path(place).name}", sha256, [], [])
        for text in texts:
            name = key(text)
            if name in never:
                source.excluded += 1
            elif name in seen:
                source.repeated += 1
            else:
                (source.held if int(name, 16) % HELD_OUT == 0 else source.learned).append(text)
                seen.add(name)
        if not source.learned or not source.held:
            raise UserError(
                f"--texts {place}: no text is left to {'hold out' if source.learned else 'learn'}"
            )
        sources.append(source)
    return sources


def tokenizer_of(args: argparse.Namespace, sources: Sequence[Source]):
    """--tokenizer, or byte-level BPE of the texts to learn, made once."""
    from study import model

    made = args.folder / ".state" / "tokenizer"
    if not args.tokenizer and not made.exists():
        from make_model import make_tokenizer

        texts = [text for source in sources for text in source.learned]
        make_tokenizer(texts, args.vocabulary, args.block).save_pretrained(made)
    try:
        return model.load_tokenizer(args.tokenizer or str(made))
    except UserError as error:  # which names the flag of the other scripts
        raise UserError(str(error).replace("--pretrained_ckpt", "--tokenizer")) from None


def ids_of(tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Each text between BOS and EOS."""
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [np.array(bos + row + eos, dtype=np.int32) for row in rows]


def blocks(texts: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Texts end to end in rows [rows, length]; the rest, less than a row, is left out."""
    ids = np.concatenate(texts)
    return ids[: len(ids) // length * length].reshape(-1, length)


# Training


def make_llama(args: argparse.Namespace, tokenizer):
    """An untrained Llama, with dropout on its embedding and on what each sublayer adds."""
    import torch
    from torch.nn.functional import dropout
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.inner,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        max_position_embeddings=args.block,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    added = [part for layer in model.model.layers for part in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    for part in (model.model.embed_tokens, *added):
        part.register_forward_hook(lambda part, _, out: dropout(out, args.dropout, part.training))
    return model


def cross_entropy(hidden, head, ids):
    """Of tokens `ids` [rows, block] given what the model has before each, [rows, block, hidden]; the mean of
    each row [rows]."""
    import torch

    logits = (hidden @ head.T).float()  # [rows, block, vocabulary]
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none")
    return each.view(ids.shape).mean(1)


class Training:
    """The model, its optimizers, and how far it has come."""

    def __init__(self, args: argparse.Namespace, sources: Sequence[Source], tokenizer, about: dict):
        import torch

        self.args, self.tokenizer, self.state = args, tokenizer, args.folder / ".state"
        self.learned = [ids for source in sources for ids in ids_of(tokenizer, source.learned)]
        held = {source.place: ids_of(tokenizer, source.held) for source in sources}
        self.held = {place: blocks(ids, args.block) for place, ids in held.items()}
        if not all(map(len, self.held.values())):
            raise UserError(f"--block {args.block}: the texts held out of a file do not fill one: lower it")
        self.tokens_per_byte = sum(len(ids) - 1 for of in held.values() for ids in of) / sum(
            len(text.encode()) for source in sources for text in source.held
        )
        self.tokens = sum(map(len, self.learned))
        self.steps_a_pass = self.tokens // (args.block * args.rows)
        self.steps = self.steps_a_pass * args.passes
        if not self.steps_a_pass:
            raise UserError(f"--rows {args.rows}: a pass has {self.tokens:,} tokens, not one step: lower it")
        self.model = make_llama(args, tokenizer).to(device.current())
        self.named = dict(self.model.named_parameters())
        matrices = [weight for name, weight in self.named.items() if weight.ndim == 2 and "embed" not in name]
        others = [weight for name, weight in self.named.items() if weight.ndim == 1 or "embed" in name]
        rate, decay = args.learning_rate, args.weight_decay
        muon = torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        self.optimizers = [muon, torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)]
        self.cross_entropy = cross_entropy
        if torch.cuda.is_available():
            self.cross_entropy = torch.compile(cross_entropy)
            for layer in self.model.model.layers:
                layer.compile()
        self.history: list[dict] = []
        self.step, self.spent, self.kept = 0, 0.0, time.monotonic()
        self.resume(about)
        resumed = f"; resumed at {self.step}" if self.step else ""
        print(
            f"model      {self.model.num_parameters():,} weights, {len(tokenizer):,} tokens; a pass has "
            f"{self.tokens:,} tokens in {self.steps_a_pass:,} steps{resumed}"
        )

    def losses(self, rows: np.ndarray):
        """Of rows [rows, block] each one's mean cross-entropy [rows]."""
        import torch

        ids = torch.from_numpy(rows.astype(np.int64)).to(device.current(), non_blocking=True)
        with torch.autocast(ids.device.type, dtype=torch.bfloat16):
            hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
            return self.cross_entropy(hidden[:, :-1], self.model.lm_head.weight, ids[:, 1:])

    def run(self) -> None:
        """Train to the end, or until a better perplexity is no longer to be had."""
        while self.step < self.steps and not self.is_past_its_best():
            began, done = time.monotonic(), self.step
            rows = self.rows_of(self.step // self.steps_a_pass)
            losses = [self.train(rows[i : i + self.args.rows]) for i in range(0, len(rows), self.args.rows)]
            loss = sum(map(float, losses[-20:])) / len(losses[-20:])
            took = time.monotonic() - began
            self.spent += took
            speed = (self.step - done) * rows.shape[1] * self.args.rows / took
            measured = {"step": self.step, "loss": loss, "tokens_per_second": speed}
            self.history.append(measured | self.evaluate())
            self.keep()
            last = self.history[-1]
            each = ", ".join(f"{place} {ppl:.2f}" for place, ppl in last["perplexity"].items())
            print(
                f"step {self.step}/{self.steps}  loss {loss:.3f}  held out: perplexity {each}, "
                f"{last['bits_per_byte']:.4f} bits a byte  {speed:,.0f} tokens/s  {self.spent:.0f} s",
                flush=True,
            )

    def rows_of(self, number: int) -> np.ndarray:
        """The rows of a pass, its texts in an order of their own."""
        order = np.random.default_rng([self.args.seed, number]).permutation(len(self.learned))
        rows = blocks([self.learned[i] for i in order], self.args.block)
        return rows[: self.steps_a_pass * self.args.rows]

    def train(self, rows: np.ndarray):
        """One step; its loss."""
        import torch

        torch.manual_seed(self.args.seed * 1_000_003 + self.step)  # so a resumed run drops out the same
        left = (1 - self.step / self.steps) / FALLING
        rate = self.args.learning_rate * min(1.0, (self.step + 1) / WARM_UP, left)
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = rate
        loss = self.losses(rows).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return loss.detach()

    def evaluate(self) -> dict:
        """The perplexity of each file's held-out texts, and bits a byte over them all."""
        import torch

        self.model.eval()
        sums, sizes = {}, {place: len(rows) for place, rows in self.held.items()}
        with torch.no_grad():
            for place, rows in self.held.items():
                full = np.resize(rows, (-(-len(rows) // self.args.rows) * self.args.rows, self.args.block))
                parts = np.split(full, len(full) // self.args.rows)  # of a step's shape, which is compiled
                sums[place] = float(sum(torch.cat([self.losses(part) for part in parts])[: len(rows)]))
        self.model.train()
        mean = sum(sums.values()) / sum(sizes.values())
        perplexity = {place: math.exp(total / sizes[place]) for place, total in sums.items()}
        return {"perplexity": perplexity, "bits_per_byte": mean / math.log(2) * self.tokens_per_byte}

    def best(self) -> int:
        """Index in `history`."""
        return min(range(len(self.history)), key=lambda i: self.history[i]["bits_per_byte"])

    def is_past_its_best(self) -> bool:
        return bool(self.history) and len(self.history) - 1 - self.best() >= self.args.patience

    def tensors(self) -> Iterator[tuple[str, object]]:
        for i, optimizer in enumerate(self.optimizers):
            for number, values in optimizer.state_dict()["state"].items():
                yield from ((f"{i} {number} {name}", value) for name, value in values.items())

    def keep(self) -> None:
        """Save the best weights, and now and then all that going on needs."""
        import torch
        from safetensors.torch import save_file

        weights = {name: weight.detach() for name, weight in self.named.items()}
        if self.best() == len(self.history) - 1:
            rounded = {name: weight.to(torch.bfloat16) for name, weight in weights.items()}
            save_whole(rounded, self.state / "best.safetensors", save_file)
        if time.monotonic() - self.kept < SAVE_SECONDS and self.step < self.steps:
            return
        progress = json.dumps({"history": self.history, "spent": self.spent, "about": self.about})
        more = {f"weights {name}": weight for name, weight in weights.items()} | dict(self.tensors())
        save_whole(more, self.state / "last.safetensors", save_file, {"progress": progress})
        self.kept = time.monotonic()

    def take(self, weights: dict) -> None:
        """Let these be the model's weights: all of them, by their names."""
        for name, weight in self.named.items():
            weight.data.copy_(weights[name])

    def resume(self, about: dict) -> None:
        """Go on from what `keep` saved, if anything. Raises UserError where that is of another training."""
        from safetensors import safe_open

        self.about, path = about, self.state / "last.safetensors"
        if not path.exists():
            return
        with safe_open(path, "pt", device=str(device.current())) as file:
            progress = json.loads(file.metadata()["progress"])
            check_same(progress["about"], about, self.args.folder)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
        self.take({name: tensors.pop(f"weights {name}") for name in self.named})
        for i, optimizer in enumerate(self.optimizers):
            state: dict[int, dict] = {}
            for name, value in tensors.items():
                which, number, part = name.split()
                if int(which) == i:
                    state.setdefault(int(number), {})[part] = value
            optimizer.load_state_dict(
                {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
            )
        self.history, self.spent = progress["history"], progress["spent"]
        self.step = self.history[-1]["step"]

    def write(self, about: dict, process: device.Process) -> None:
        """The best weights as a checkpoint, and how it came about."""
        import torch
        from safetensors.torch import load_file
        from transformers import GenerationConfig

        self.take(load_file(self.state / "best.safetensors"))
        ids = {name: getattr(self.tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
        self.model.generation_config = GenerationConfig(**ids)
        self.model.to(torch.bfloat16).save_pretrained(self.args.folder)
        self.tokenizer.save_pretrained(self.args.folder)
        best = self.history[self.best()]
        result = about | {
            **{"weights": self.model.num_parameters(), "tokens_a_pass": self.tokens, "best": best},
            **{"history": self.history, "seconds": self.spent, "wall_seconds": process.seconds()},
            **{"device": device.name(), "peak_memory_gib": device.peak_memory_gib()},
            **{"commit": record.commit(), "torch": torch.__version__},
        }
        record.write_json(self.args.folder / "pretraining.json", result)
        shutil.rmtree(self.state)
        print(f"wrote      {self.args.folder}: step {best['step']}, {best['bits_per_byte']:.4f} bits a byte")


def save_whole(tensors: dict, path: Path, save_file, metadata: dict | None = None) -> None:
    """So that `path` holds all of it or what it held before."""
    save_file({name: value.contiguous() for name, value in tensors.items()}, f"{path}.partial", metadata)
    Path(f"{path}.partial").replace(path)


def check_same(before: dict, now: dict, folder: Path) -> None:
    """Raise UserError unless settings and texts are the same."""
    names = ("settings", "sources", "excluded_from")
    changed = [name for name in names if json.loads(json.dumps(now[name])) != before.get(name)]
    if changed:
        raise UserError(f"{folder} is of other {' and '.join(changed)}: remove it or name another folder")


if __name__ == "__main__":
    cli.run_script(main)
