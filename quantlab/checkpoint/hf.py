"""A Hugging Face checkpoint folder, opened and checked from its JSON and headers alone.

Reads no tensor data (except to fingerprint it) and imports no torch, so a plan for 70B parameters takes a moment.
Knows nothing about architectures: what tensors there should be is given to `check_tensors`.
"""

import difflib
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from quantlab.checkpoint.folder import check_link, is_packed, pickle_files, read_json_object
from quantlab.checkpoint.header import TensorInfo, open_regular, read_header
from quantlab.errors import CheckpointError, UnsupportedModel

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}\.safetensors")
# What a model is called on the hub: an owner and a name.
HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
# Files that belong to the weights: none may lie in the folder without the index knowing it.
WEIGHT_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
FLOAT_DTYPES = ("BF16", "F16", "F32")
# Copied byte for byte: anything re-serialized comes out changed (truncation settings baked into tokenizer.json).
EXTRA_PATTERNS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "tekken.json",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
    "*.py",
)
HASH_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class HFCheckpoint:
    """An opened checkpoint: `config` is config.json, `tensors` every tensor by name, `files` the weight files."""

    folder: Path
    config: dict[str, object]
    tensors: dict[str, TensorInfo]
    files: tuple[Path, ...]

    @property
    def extra_files(self) -> list[Path]:
        """Tokenizer, chat template, generation, licence and code files, to be copied byte for byte."""
        found = {path for pattern in EXTRA_PATTERNS for path in self.folder.glob(pattern) if not path.is_dir()}
        for path in found:
            check_link(path, self.folder)
        return sorted(found)

    def check_tensors(
        self, expected: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, tuple[str, ...]] | None = None
    ) -> None:
        """Raises CheckpointError unless the tensors are exactly `expected` (name to shape).

        `dtypes` says what a tensor may be stored in; one that it does not name must be BF16, F16 or F32.
        """
        for problem in self.tensor_problems(expected, dtypes or {}):
            raise problem

    def tensor_problems(
        self, expected: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, tuple[str, ...]]
    ) -> Iterator[CheckpointError]:
        """Every way in which the tensors differ from `expected`, see `check_tensors`.

        Harmless extras are let through: buffers that some exporters save, and lm_head of a model with tied embeddings.
        """
        for name, shape in expected.items():
            problem = self._tensor_problem(name, tuple(shape), dtypes.get(name, FLOAT_DTYPES))
            if problem is not None:
                yield problem
        tied = self.config.get("tie_word_embeddings") is True
        for name, info in self.tensors.items():
            harmless = name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and tied)
            if name not in expected and not harmless:
                message = f"is not part of this architecture{_nearest(name, expected)}"
                yield CheckpointError(message, where=f"{info.file}: tensor {name}")

    def _tensor_problem(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> CheckpointError | None:
        info = self.tensors.get(name)
        if info is None:
            return CheckpointError(f"is missing{_nearest(name, self.tensors)}", where=f"{self._home()}: tensor {name}")
        where = f"{info.file}: tensor {name}"
        if info.shape != shape:
            return CheckpointError(f"has shape {list(info.shape)}; config.json asks for {list(shape)}", where=where)
        if info.dtype not in dtypes:
            return CheckpointError(f"has dtype {info.dtype}; it must be {', '.join(dtypes)}", where=where)
        return None

    def _home(self) -> Path:
        """The file that should have named a missing tensor."""
        return self.files[0] if len(self.files) == 1 else self.folder / INDEX_FILE

    def fingerprint(self) -> str:
        """sha256 (hex) of names, sizes and contents of config.json, weights and extra files; reads them all."""
        return self._digest([self.folder / "config.json", *self.files, *self.extra_files])

    def weights_digest(self) -> str:
        """The same of config.json and the weights alone, which are what a model's outputs depend on."""
        return self._digest([self.folder / "config.json", *self.files])

    def _digest(self, paths: Iterable[Path]) -> str:
        digest = hashlib.sha256()
        for path in paths:
            content, size = file_digest(path)
            digest.update(f"{path.relative_to(self.folder).as_posix()}\0{size}\0{content}\n".encode())
        return digest.hexdigest()


def open_checkpoint(folder: Path, *, allow_quantized: bool = False) -> HFCheckpoint:
    """The checkpoint in `folder`, its config and every weight file's header checked.

    Raises CheckpointError for what is damaged or hostile, UnsupportedModel for what is sound but not ours to read:
    pickled weights, and an already quantized source unless `allow_quantized`.
    """
    try:
        return _open(folder, allow_quantized)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(folder)) from error


def _check_folder(folder: Path) -> None:
    """Raises CheckpointError, with the way to get one, for what is no checkpoint's folder at all."""
    where = str(folder)
    if not folder.exists() and HUB_ID.fullmatch(where):
        fix = f"hf download {folder} --local-dir {folder.name}"
        raise CheckpointError("no such folder; a model from the hub must be downloaded first", where=where, fix=fix)
    if not folder.is_dir():
        fix = "give a local folder; `hf download NAME --local-dir DIR` fetches one from the hub"
        raise CheckpointError("is not a folder", where=where, fix=fix)
    config = folder / "config.json"
    if not config.exists() and not config.is_symlink():
        fix = "give the folder that holds config.json and the .safetensors files"
        raise CheckpointError("holds no config.json, so it is no Hugging Face checkpoint", where=where, fix=fix)


def _open(folder: Path, allow_quantized: bool) -> HFCheckpoint:
    """`open_checkpoint`, save for folders that may not be listed."""
    _check_folder(folder)
    config = read_json_object(folder / "config.json", folder)
    if not allow_quantized and (method := is_packed(config)):
        where = str(folder / "config.json")
        raise UnsupportedModel(f"is already quantized ({method})", where=where, fix="start from the 16-bit checkpoint")
    files, weight_map = _weight_files(folder)
    tensors = _read_headers(files, folder)
    if weight_map is not None:
        _check_index(weight_map, tensors, folder)
    if not tensors:
        raise CheckpointError("holds no tensors", where=str(files[0]))
    return HFCheckpoint(folder, config, tensors, files)


def _weight_files(folder: Path) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    """The weight files and, when they are shards, the index's map from tensor to file name."""
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    present = {path.name for path in folder.iterdir() if WEIGHT_FILE.fullmatch(path.name)}
    if index.exists() or index.is_symlink():
        weight_map = _weight_map(folder)
        named = set(weight_map.values())
    elif single.exists() or single.is_symlink():
        weight_map, named = None, {SINGLE_FILE}
    else:
        raise _no_weights(folder, present)
    for name in sorted(present - named):
        home = INDEX_FILE if weight_map is not None else SINGLE_FILE
        raise CheckpointError(f"is an extra shard that {home} does not know", where=str(folder / name))
    return tuple(folder / name for name in sorted(named)), weight_map


def _no_weights(folder: Path, shards: Iterable[str]) -> CheckpointError | UnsupportedModel:
    """Why a folder without model.safetensors and without an index cannot be read."""
    if shards:
        return CheckpointError(f"has shards but no {INDEX_FILE}", where=str(folder))
    if pickles := pickle_files(folder):
        fix = "convert them to safetensors first (transformers: save_pretrained), on a machine you can lose"
        message = "holds only pickled weights, and unpickling runs whatever code they carry"
        return UnsupportedModel(message, where=str(folder / pickles[0]), fix=fix)
    return CheckpointError(f"holds neither {SINGLE_FILE} nor {INDEX_FILE}", where=str(folder))


def _weight_map(folder: Path) -> dict[str, str]:
    """The index's weight_map: every value a plain file name inside the folder."""
    path = folder / INDEX_FILE
    weight_map = read_json_object(path, folder).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("weight_map is missing, empty or not a table", where=str(path))
    for tensor, name in weight_map.items():
        where = f"{path}: tensor {tensor[:80]}"
        if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
            message = f"weight_map entry {str(name)[:80]!r} is not a plain .safetensors file name"
            raise CheckpointError(message, where=where)
        if not (folder / name).exists() and not (folder / name).is_symlink():
            raise CheckpointError(f"shard {name} is missing", where=where, fix="download the checkpoint again")
    return weight_map


def _read_headers(files: Iterable[Path], folder: Path) -> dict[str, TensorInfo]:
    """All tensors of all files; a name in two files is refused."""
    tensors: dict[str, TensorInfo] = {}
    for path in files:
        check_link(path, folder)
        for name, info in read_header(path).items():
            if name in tensors:
                where = f"{path}: tensor {name}"
                raise CheckpointError(f"is also in {tensors[name].file.name}", where=where)
            tensors[name] = info
    return tensors


def _check_index(weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo], folder: Path) -> None:
    """Refuses an index and shards that disagree about which tensor is where."""
    for name, file in weight_map.items():
        info = tensors.get(name)
        if info is None or info.file.name != file:
            where = f"{folder / file}: tensor {name[:80]}"
            raise CheckpointError(f"is missing, though {INDEX_FILE} places it here", where=where)
    for name, info in tensors.items():
        if name not in weight_map:
            raise CheckpointError(f"is not in {INDEX_FILE}", where=f"{info.file}: tensor {name}")


def _nearest(name: str, names: Iterable[str]) -> str:
    """A hint that names the most similar tensor, if one is similar; looks at 2000 names, for difflib is slow."""
    close = difflib.get_close_matches(name, list(names)[:2000], n=1, cutoff=0.8)
    return f" (the nearest name is {close[0]})" if close else ""


def file_digest(path: Path) -> tuple[str, int]:
    """sha256 (hex) and size of a file, streamed."""
    digest, size = hashlib.sha256(), 0
    with open_regular(path) as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return digest.hexdigest(), size
