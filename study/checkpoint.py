"""What a checkpoint is, by content: the files that transformers would load, read once, checked and hashed.

A name says little: other weights may lie at the same path tomorrow, a hub model may move. So every record
holds the fingerprint of the checkpoint that it was made with, and nothing goes on, is served again or takes
an adapter where the fingerprints differ. Nothing here needs torch.
"""

import functools
import hashlib
import json
import mmap
import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from study.errors import UserError
from study.files import hub_answers, is_lfs_pointer, write_text

PIECE = 2**25  # bytes that are hashed or looked through at once
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "spiece.model", "spm.model", "sentencepiece.bpe.model", "tekken.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spm.model")  # one of which must be
# Masks and tables that older checkpoints hold as tensors, and models make by themselves today.
OUTDATED = re.compile(r"(masked_bias|causal_mask|inv_freq|\.attn\.bias|\.attention\.bias)$")
TAKEN_BY = {  # by kind of model: what it is, and the scripts that take it
    "causal": "a causal language model ({}): llama2_classification.py or llama2_summarization.py fine-tunes "
    "those",
    "encoder": "an encoder ({}): competitors/encoder_classification.py fine-tunes those",
    "t5": "a T5 ({}): competitors/flan_t5.py fine-tunes those",
    "other": "an encoder-decoder other than T5 ({}): no script here takes those, name another checkpoint",
}
HUB = ["*.json", "model*.safetensors", "tokenizer.model", "spm.model", "*.txt", "*.jinja"]
UNIMPORTANT = ("_name_or_path", "transformers_version")  # of config.json
NOT_NUMBERS = {  # a safetensors dtype's words, and the exponent that infinities and NaNs have
    "BF16": ("<u2", 0x7F80),
    "F16": ("<u2", 0x7C00),
    "F32": ("<u4", 0x7F800000),
    "F64": ("<u8", 0x7FF << 52),
}


def folder_of(name: str, fetch: bool = False) -> Path | None:
    """The folder that --pretrained_ckpt `name` means: itself, or a hub id's snapshot in the hub's cache,
    after a look at the hub with `fetch`. None for a hub id that is not there. Raises UserError where it
    should be."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"--pretrained_ckpt {name}: there is no such folder")
    try:
        return fetched(name) if fetch else snapshot(name, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        if not fetch:
            return None
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--pretrained_ckpt {name} can't be loaded (offline? fetch it first, or name a local folder): "
            f"{reason}"
        ) from None


@functools.cache
def fetched(name: str) -> Path:
    """The snapshot that this process works with from now on, whatever the hub holds a second later."""
    return snapshot(name, local_files_only=False)


def snapshot(name: str, local_files_only: bool, files: Sequence[str] = HUB) -> Path:
    local_files_only = local_files_only or not hub_answers()
    import huggingface_hub

    options = {"allow_patterns": files, "local_files_only": local_files_only}
    return Path(huggingface_hub.snapshot_download(name, **options))


def refuse_other_kind(name: str, kind: str) -> None:
    """Raise UserError for a checkpoint of another kind (TAKEN_BY) than a script takes, naming the script that
    does; for an adapter, and for a configuration that does not say what it is.

    Looks at the configuration alone: what is not there, or of no kind that transformers lists, is left to
    `identify` and to loading."""
    folder, where = configured(name), f"--pretrained_ckpt {name}"
    path = folder and folder / "config.json"
    if path and path.is_file():
        refuse_pointer(path, where)
        config = read_json(path, where)
        if not isinstance(config.get("model_type"), str):
            raise UserError(f"{where}: its config.json does not say what it is (model_type): fetch it again")
        found = kind_of(config)
        if found not in (None, kind):
            named = (config.get("architectures") or [config["model_type"]])[0]
            raise UserError(f"{where} is {TAKEN_BY[found].format(named)}")
    elif path and path.with_name("adapter_config.json").is_file():
        base = read_json(path.with_name("adapter_config.json"), where).get("base_model_name_or_path")
        raise UserError(
            f"{where} is an adapter, no whole model: name the checkpoint that it was trained on ({base})"
        )


def configured(name: str) -> Path | None:
    """The folder of a checkpoint's configuration, which is fetched alone where the hub's cache has none; None
    where there is none to be had."""
    try:
        return folder_of(name) or snapshot(name, False, ("config.json", "adapter_config.json"))
    except (OSError, ValueError, RuntimeError, UserError):
        return None


def kind_of(config: dict) -> str | None:
    """The kind of model (TAKEN_BY) that a config.json is of, by transformers' lists; None where in none. An
    encoder that is told to be a decoder is a causal language model."""
    from transformers.models.auto import modeling_auto as lists  # loads torch, as what follows does

    name, decodes = config["model_type"], config.get("is_decoder")
    pairs = name in lists.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES and not decodes
    if config.get("is_encoder_decoder", pairs):
        return "t5" if name == "t5" else "other"
    if name in lists.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decodes:
        return "encoder"
    return "causal" if name in lists.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else None


def identify(name: str, fetch: bool = False) -> dict | None:
    """What a record keeps of a checkpoint: the SHA-256 of its configuration, tokenizer and weights, the
    commit of a hub's snapshot, the ends of sequence that its generation_config.json adds, and `is_random`.

    None where it is not on this machine. Raises UserError for a checkpoint that is not whole or whose weights
    are not numbers, naming the file or tensor.
    """
    try:
        folder = folder_of(name, fetch)
    except UserError:
        if fetch:
            raise
        return None
    if folder is None:
        return None
    where, is_snapshot = f"--pretrained_ckpt {name}", folder.parent.name == "snapshots"
    try:
        weights = check_files(folder, where)
    except UserError:
        if is_snapshot and not fetch:  # whose download is not whole yet
            return None
        raise
    config = read_json(folder / "config.json", where)
    texts = [*map(folder.joinpath, TOKENIZER), *sorted(folder.glob("additional_chat_templates/*"))]
    parts = [["config", canonical(config)]]
    parts += [[path.name, hash_of(path.read_bytes())] for path in texts if path.is_file()]
    parts += [[path.name, hash_of_weights(path, where, "quantization_config" in config)] for path in weights]
    return {
        "sha256": hash_of(json.dumps(parts).encode()),
        "commit": folder.name if is_snapshot else None,
        "eos_token_id": ends_of(folder, where),
        **is_random(config),
    }


def is_random(config: dict) -> dict:
    """{"random_weights": True} by a config.json that says so (benchmarks/checkpoint.py's): what such a model
    takes is a real one's, what it scores says nothing. Else {}."""
    return {"random_weights": True} if config.get("random_weights") else {}


def hash_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def canonical(config: dict) -> str:
    """What of a configuration says how the model computes."""
    kept = {key: value for key, value in config.items() if key not in UNIMPORTANT}
    return json.dumps(kept, sort_keys=True)


def read_json(path: Path, where: str) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: its {path.name} is damaged ({error}): fetch it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: its {path.name} is not a JSON object: fetch it again")
    return content


def ends_of(folder: Path, where: str) -> list[int]:
    """The end-of-sequence tokens of generation_config.json, or without one of config.json; nothing else there
    counts in greedy decoding."""
    path = folder / "generation_config.json"
    settings = read_json(path if path.is_file() else folder / "config.json", where)
    ends = settings.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    return [end for end in ends if isinstance(end, int) and not isinstance(end, bool)]


def check_files(folder: Path, where: str) -> list[Path]:
    """The files of weights that transformers would load. Raises UserError if a part of the checkpoint is
    missing, or a pointer stands in place of a file."""
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{where} has not a configuration (config.json): name a whole checkpoint folder or a hub id"
        )
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{where} holds an adapter too (adapter_config.json), which would be applied: move it elsewhere"
        )
    weights = weight_files(folder, where)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"{where} has not a tokenizer (tokenizer.json): name a whole checkpoint folder or a hub id"
        )
    others = [folder / name for name in ("config.json", "generation_config.json", *TOKENIZER)]
    for path in [*others, *weights]:
        if path.is_file():
            refuse_pointer(path, where)
    return weights


def refuse_pointer(path: Path, where: str) -> None:
    """Raise UserError for a file that git left as a pointer to a large one."""
    with open(path, "rb") as file:
        if is_lfs_pointer(file.read(64)):
            raise UserError(
                f"{where}: {path.name} is a Git LFS pointer, not the file itself: run `git lfs pull` there"
            )


def weight_files(folder: Path, where: str) -> list[Path]:
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        if any(folder.glob("pytorch_model*.bin")):
            raise UserError(
                f"{where} has its weights as pickle alone (pytorch_model.bin), which no script here loads: "
                "fetch its model.safetensors, or save it so by transformers' save_pretrained"
            )
        raise UserError(
            f"{where} has not weights (model.safetensors): name a whole checkpoint folder or a hub id"
        )
    refuse_pointer(index, where)
    names = read_json(index, where).get("weight_map")
    if not isinstance(names, dict):
        raise UserError(f"{where}: {index.name} has no weight_map: fetch it again")
    files = [folder / name for name in sorted(set(map(str, names.values())))]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}, which {index.name} names: fetch it whole")
    return files


def hash_of_weights(path: Path, where: str, quantized: bool) -> str:
    """The SHA-256 of the SHA-256s of a safetensors file's pieces, each of PIECE bytes; remembered for a file
    that has not changed since. Raises UserError if it is damaged, a weight is infinite or no number, or is of
    few bits in a checkpoint that is not `quantized`."""
    stat = path.stat()
    key = json.dumps([quantized, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino])
    known = remembered()
    if known.get(str(path.resolve()), [None])[0] == key:
        return known[str(path.resolve())][1]
    with open(path, "rb") as file:
        tensors = header_of(file, stat.st_size, f"{where}: {path.name}")
        if not quantized:
            refuse_few_bits(tensors, f"{where}: {path.name}")
        with (
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
            ThreadPoolExecutor(os.cpu_count()) as pool,
        ):
            hashed = lambda first: hashlib.sha256(memoryview(content)[first : first + PIECE]).digest()
            digests = pool.map(hashed, range(0, stat.st_size, PIECE))
            bad = pool.map(lambda piece: holds_no_number(content, *piece), pieces_of(tensors))
            names = sorted({name for name in bad if name})
            digest = hash_of(b"".join(digests))
    if names:
        raise UserError(
            f"{where}: {names[0]} in {path.name} holds weights that are infinite or no numbers"
            f"{f' (so do {len(names) - 1} others)' if names[1:] else ''}: the checkpoint is broken"
        )
    if time.time_ns() - stat.st_ctime_ns > 2 * 10**9:  # a younger file may change without its times changing
        remember(str(path.resolve()), [key, digest])
    return digest


def header_of(file, size: int, where: str) -> dict[str, tuple[str, int, int]]:
    """A safetensors file's tensors: their dtype and first and last byte in the file."""
    damaged = UserError(f"{where} is damaged or half-written: fetch it again")
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= size - 8:
        raise damaged
    try:
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors = {
            name: (entry["dtype"], *(8 + length + offset for offset in entry["data_offsets"]))
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise damaged from None
    if max((end for _, _, end in tensors.values()), default=8 + length) != size:
        raise damaged
    return tensors


def refuse_few_bits(tensors: dict[str, tuple[str, int, int]], where: str) -> None:
    """Raise UserError for weights of 8 bits or fewer, whose scales nothing would apply."""
    for name, (dtype, _, _) in tensors.items():
        if name.endswith(".weight") and dtype not in NOT_NUMBERS:
            raise UserError(
                f"{where} holds {name} in {dtype}, and config.json has no quantization_config that says how "
                "to read it: name the checkpoint in full precision"
            )


def pieces_of(tensors: dict[str, tuple[str, int, int]]) -> Iterator[tuple[str, str, int, int]]:
    """What to look through: tensor, dtype, first and last byte. Not weights in 4 bits, which may be stored
    under another dtype, nor masks."""
    for name, (dtype, begin, end) in tensors.items():
        if dtype in NOT_NUMBERS and f"{name}.absmax" not in tensors and not OUTDATED.search(name):
            yield from ((name, dtype, first, min(first + PIECE, end)) for first in range(begin, end, PIECE))


def holds_no_number(content: mmap.mmap, name: str, dtype: str, begin: int, end: int) -> str | None:
    """The tensor's name if a weight between two bytes is infinite or no number."""
    import numpy as np

    words, exponent = NOT_NUMBERS[dtype]
    step = 2**19  # bytes that stay in a core's cache
    for first in range(begin, end, step):
        last = min(first + step, end)
        numbers = np.frombuffer(content[first:last], words)
        if (numbers & np.array(exponent, words)).max(initial=0) == exponent:
            return name
    return None


def memory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama2-study" / "weights.json"


def remembered() -> dict[str, list[str]]:
    """Hashes of files by path, each with the times and size that the file had and what it was checked for."""
    try:
        known = json.loads(memory().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: there is no home
        return {}
    fits = isinstance(known, dict) and all(isinstance(entry, list) and entry for entry in known.values())
    return known if fits else {}


def remember(path: str, entry: list[str]) -> None:
    """Where nothing can be written, nothing is remembered."""
    try:
        memory().parent.mkdir(parents=True, exist_ok=True)
        write_text(memory(), json.dumps(remembered() | {path: entry}))
    except (OSError, RuntimeError, UserError):
        pass


def check_same(
    recorded: dict | None, found: dict | None, where: object, mend: str, ends: bool = False
) -> None:
    """Raise UserError if two fingerprints are of other checkpoints, or with `ends` of other ends of sequence.
    What can't be compared is said, where the checkpoint is here."""
    if not recorded or not found:
        if found:
            print(f"note       {where} does not say which weights it was made with: they are not compared")
        return
    if recorded["sha256"] != found["sha256"]:
        raise UserError(
            f"{where} was made with another checkpoint than --pretrained_ckpt holds now (sha256 "
            f"{recorded['sha256'][:8]}, not {found['sha256'][:8]}): {mend}"
        )
    if ends and recorded["eos_token_id"] != found["eos_token_id"]:
        raise UserError(
            f"{where} was made with the ends of sequence {recorded['eos_token_id']}, and "
            f"generation_config.json in --pretrained_ckpt has {found['eos_token_id']} now: {mend}"
        )
