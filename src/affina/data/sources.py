"""Where records come from: files, folders, globs, compressed or not, hub data sets, and the data shipped with affina.

Every source reads one record at a time; nothing here grows with the size of the data. A fault of a record goes to the
`report` callable with its line and its fix, and reading goes on; a fault of a file is a `DataError`.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import os
import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from affina.data.decompress import SUFFIXES, compression_of_name, open_bytes
from affina.data.json_records import read_json, read_json_lines
from affina.data.records import ProblemReporter, RawRecord, RecordProblem, raise_problem
from affina.data.tables import estimate_bytes, read_arrow, read_parquet, read_table, read_text
from affina.errors import DataError, Location

FileKind = Literal["jsonl", "json", "csv", "tsv", "parquet", "arrow", "text"]

FILE_KINDS: Final[dict[str, FileKind]] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".md": "text",
}
"""What each extension holds; .gz, .zst, .bz2 and .xz may follow it."""

DEFAULT_MAX_RECORD_BYTES: Final = 4 * 1024 * 1024

# In a folder of records, these are about the data and not part of it.
_ABOUT_THE_DATA: Final = re.compile(r"(readme|licen[cs]e|notice|copying|changelog|dataset_infos?|state)\b.*", re.I)
_SPLIT_WORDS: Final[dict[str, tuple[str, ...]]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class Source(Protocol):
    """Somewhere to read records from, as often as needed and always in the same order."""

    @property
    def description(self) -> str:
        """What is read, in a few words for reports."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the choice of files."""
        ...

    def read(self, *, report: ProblemReporter = raise_problem) -> Generator[RawRecord, None, None]:
        """The records, in order. Faulty ones go to `report`; by default the first raises."""
        ...

    def fingerprint(self) -> str:
        """sha256 of the content: equal content, equal fingerprint, wherever it lies."""
        ...


def open_source(
    path: str | Path,
    *,
    split: str | None = None,
    subset: str | None = None,
    has_header: bool | None = None,
    max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES,
    cache_directory: Path | None = None,
    streaming: bool = False,
    where: Location | None = None,
) -> Source:
    """The source that `path` names.

    path:       a file, a folder, a glob, a hub data set id, or `affina/NAME`
    split:      which split of a hub data set, of a folder (`train.jsonl`, `test.jsonl`), of a JSON file with several
                lists; a hub data set's default is train, and so is that of a folder which has one
    subset:     configuration name of a hub data set
    has_header: of CSV and TSV; None looks at the first row
    cache_directory: where fingerprints of big files are remembered (by path, size and time of change); None: nowhere
    streaming:  read a hub data set over the network while it is used, instead of downloading it first
    where:      where the user wrote the path, for messages
    raises:     DataError when nothing readable is there
    """
    text = str(path)
    expanded = Path(text).expanduser()
    options = _ReadOptions(split, has_header, max_record_bytes, cache_directory)
    if expanded.is_file():
        return FileSource(_checked_files([expanded]), options, (), str(path))
    if expanded.is_dir():
        return _open_folder(expanded, options, where)
    if text.startswith("affina/"):
        return _open_embedded(text, options, where)
    if glob.has_magic(text):
        return _open_glob(text, options, where)
    if _may_be_hub_id(text):
        return HubSource(text, split or "train", subset, max_record_bytes, where, streaming)
    raise _missing(expanded, where)


@dataclass(frozen=True, slots=True)
class _ReadOptions:
    split: str | None
    has_header: bool | None
    max_record_bytes: int
    cache_directory: Path | None


@dataclass(frozen=True, slots=True)
class FileSource:
    """One or more local files, read one after the other."""

    files: tuple[Path, ...]
    options: _ReadOptions
    notes: tuple[str, ...]
    description: str

    def read(self, *, report: ProblemReporter = raise_problem) -> Generator[RawRecord, None, None]:
        for file in self.files:
            yield from _read_file(file, self.options, report)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.options.split}|{self.options.has_header}".encode())
        for file in self.files:
            digest.update(f"{kind_of(file)}:{file_sha256(file, self.options.cache_directory)};".encode())
        return digest.hexdigest()


def kind_of(path: Path) -> FileKind | None:
    """What a file holds, by its extension (without that of a compression); None when affina does not read it."""
    inner = path.with_suffix("") if path.suffix.lower() in SUFFIXES else path
    return FILE_KINDS.get(inner.suffix.lower())


def _read_file(path: Path, options: _ReadOptions, report: ProblemReporter) -> Generator[RawRecord, None, None]:
    kind = kind_of(path)
    name = str(path)
    limit = options.max_record_bytes
    if kind in ("parquet", "arrow"):
        _check_columnar(path, kind)
        read = read_parquet if kind == "parquet" else read_arrow
        yield from read(path, name=name, max_record_bytes=limit, report=report)
        return
    with open_bytes(path) as stream:
        if kind == "jsonl":
            yield from read_json_lines(stream, name=name, max_record_bytes=limit, report=report)
        elif kind == "json":
            yield from read_json(stream, name=name, split=options.split, max_record_bytes=limit, report=report)
        elif kind == "text":
            yield from read_text(stream, name=name, max_record_bytes=limit, report=report)
        else:
            yield from read_table(
                stream,
                name=name,
                is_tsv=kind == "tsv",
                has_header=options.has_header,
                max_record_bytes=limit,
                report=report,
            )


def _check_columnar(path: Path, kind: str) -> None:
    if compression_of_name(path) is not None:
        raise DataError(
            "compressed-columnar",
            f"{path.name} is {kind} inside another compression",
            why=f"{kind} needs random access, and compresses its own columns",
            fix=f"decompress it and name it {path.stem}",
            where=Location(path),
        )
    with open_bytes(path) as stream:  # permission, emptiness, and a wrong compression signature
        head = stream.read(6)
    if kind == "parquet" and not head.startswith(b"PAR1"):
        raise DataError(
            "wrong-extension",
            f"{path.name} is not Parquet data: it starts with {head!r}",
            fix="give it the extension of what it holds, or download it again",
            where=Location(path),
        )


# Finding files -------------------------------------------------------------------------------------------------------


def _checked_files(files: Sequence[Path]) -> tuple[Path, ...]:
    for file in files:
        if kind_of(file) is None:
            raise DataError(
                "unknown-extension",
                f'cannot tell what {file.name} holds from its extension "{file.suffix}"',
                why=f"affina reads {', '.join(FILE_KINDS)}, each also as .gz, .zst, .bz2, .xz",
                fix="rename it to what it holds",
                where=Location(file),
            )
    return tuple(files)


def _open_folder(folder: Path, options: _ReadOptions, where: Location | None) -> Source:
    folder, options, notes = _saved_dataset_split(folder, options)
    found = _readable_files(folder)
    if not found:
        others = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))[:8]
        raise DataError(
            "no-data-files",
            f"the folder {folder} holds no file that affina reads",
            why=f"it holds {', '.join(others)}" if others else "it is empty",
            fix=f"put files there that end in {', '.join(FILE_KINDS)} (also .gz, .zst, .bz2, .xz)",
            where=where or Location(folder),
        )
    records = [file for file in found if kind_of(file) != "text"]
    if records:
        about = [file for file in found if _ABOUT_THE_DATA.fullmatch(file.name)]
        kept = [file for file in found if file not in about]
        if about and kept:
            notes += (f"not read as data: {', '.join(file.name for file in about)}",)
            found = kept
    files, split_notes = _files_of_split(folder, found, options.split, where)
    return FileSource(files, options, notes + split_notes, str(folder))


def _readable_files(folder: Path) -> list[Path]:
    """Files with a known extension, recursively, sorted by their path; hidden ones and hidden folders are ignored."""
    found = []
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(root, name) for name in names if not name.startswith(".") and kind_of(Path(name))]
    return sorted(found, key=lambda file: file.relative_to(folder).parts)


def _split_of(path: Path) -> str | None:
    """The split that a file's or folder's name announces."""
    words = set(re.split(r"[^a-z]+", path.name.lower().partition(".")[0]))
    for split, names in _SPLIT_WORDS.items():
        if words & set(names):
            return split
    return None


def _files_of_split(
    folder: Path, files: list[Path], split: str | None, where: Location | None
) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """The files of the wanted split, and a note when a choice was made that the user did not ask for."""

    def split_of_file(file: Path) -> str | None:
        parents = reversed(file.relative_to(folder).parents[:-1])
        return _split_of(file) or next((name for parent in parents if (name := _split_of(parent))), None)

    splits = {file: split_of_file(file) for file in files}
    named = {name for name in splits.values() if name}
    if split is None:
        if "train" in named and len(named) > 1:
            chosen = tuple(file for file in files if splits[file] == "train")
            rest = ", ".join(str(file.relative_to(folder)) for file in files if splits[file] != "train")
            return chosen, (f"read as the train split, because the folder has one; not read: {rest}",)
        return tuple(files), ()
    wanted = next((name for name, words in _SPLIT_WORDS.items() if split.lower() in words), split)
    chosen = tuple(file for file in files if splits[file] == wanted or split in file.relative_to(folder).parts)
    if not chosen and all(kind_of(file) == "json" for file in files):
        return tuple(files), ()  # the split may be a key inside the JSON
    if not chosen:
        raise DataError(
            "split-not-found",
            f'no file of {folder} belongs to the split "{split}"',
            why=f"it holds {', '.join(str(file.relative_to(folder)) for file in files[:8])}",
            fix=f"use one of: {', '.join(sorted(named))}" if named else "leave `split` out, or name one file",
            where=where or Location(folder),
        )
    return chosen, ()


def _saved_dataset_split(folder: Path, options: _ReadOptions) -> tuple[Path, _ReadOptions, tuple[str, ...]]:
    """Goes into the split's folder of what `DatasetDict.save_to_disk` wrote; other folders are returned as they are."""
    listing = folder / "dataset_dict.json"
    if not listing.is_file():
        return folder, options, ()
    splits = list(json.loads(listing.read_text("utf-8"))["splits"])
    split = options.split or ("train" if "train" in splits else splits[0])
    if split not in splits:
        raise DataError(
            "split-not-found",
            f'the data set {folder} has no split "{split}"',
            fix=f"use one of: {', '.join(splits)}",
            where=Location(folder),
        )
    notes = (f"read as the {split} split; not read: {', '.join(s for s in splits if s != split)}",)
    inside = _ReadOptions(None, options.has_header, options.max_record_bytes, options.cache_directory)
    return folder / split, inside, notes if len(splits) > 1 and options.split is None else ()


def _open_glob(pattern: str, options: _ReadOptions, where: Location | None) -> Source:
    found = sorted(Path(match) for match in glob.glob(os.path.expanduser(pattern), recursive=True))
    files = [file for file in found if file.is_file() and not file.name.startswith(".")]
    if not files:
        raise DataError(
            "no-data-files",
            f"no file matches {pattern}",
            why="relative patterns start at the folder where affina was started",
            fix="check the pattern; ** goes into folders",
            where=where or Location(pattern),
        )
    return FileSource(_checked_files(files), options, (), pattern)


def _open_embedded(name: str, options: _ReadOptions, where: Location | None) -> Source:
    from affina.catalog.embedded import embedded_dataset_path

    split = options.split or "train"
    if split not in ("train", "validation"):
        raise DataError(
            "split-not-found",
            f'{name} has no split "{split}"',
            fix="use one of: train, validation",
            where=where,
        )
    path = embedded_dataset_path(name, "train" if split == "train" else "validation")
    assert path is not None, f"{name} is one of affina's own names, or was refused"
    inside = _ReadOptions(None, options.has_header, options.max_record_bytes, options.cache_directory)
    return FileSource(_checked_files([path]), inside, (), name)


def _may_be_hub_id(text: str) -> bool:
    return (
        _HUB_ID.fullmatch(text) is not None
        and kind_of(Path(text)) is None
        and Path(text).suffix.lower() not in SUFFIXES
    )


def _missing(path: Path, where: Location | None) -> DataError:
    parent = path.parent
    if not parent.is_dir():
        existing = next((folder for folder in parent.parents if folder.is_dir()), None)
        why = f"the folder {parent} does not exist" + (f"; {existing} does" if existing and existing.name else "")
        return DataError("file-not-found", f"{path} does not exist", why=why, fix="check the path", where=where)
    names = [entry.name for entry in parent.iterdir() if not entry.name.startswith(".")]
    if close := _close_names(path):
        fix = f"did you mean {' or '.join(close)}?"
    elif names:
        fix = f"the folder holds {', '.join(sorted(names)[:8])}"
    else:
        fix = f"the folder {parent} is empty"
    return DataError("file-not-found", f"{path} does not exist", fix=fix, where=where)


def _close_names(path: Path) -> list[str]:
    """Existing neighbours of a missing path whose names are like its own."""
    if not path.parent.is_dir():
        return []
    names = sorted(entry.name for entry in path.parent.iterdir() if not entry.name.startswith("."))
    close = [name for name in names if name.startswith(path.name + ".")]
    close += [name for name in difflib.get_close_matches(path.name, names, n=3, cutoff=0.6) if name not in close]
    return [str(path.parent / name) for name in close[:3]]


# Hub -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HubSource:
    """One split of a data set on the Hugging Face hub, downloaded once and memory-mapped, or streamed."""

    path: str
    split: str
    subset: str | None
    max_record_bytes: int
    where: Location | None
    streaming: bool = False
    notes: tuple[str, ...] = ()
    _loaded: list[Any] = field(default_factory=list, compare=False)

    @property
    def description(self) -> str:
        return f"{self.path}{f' ({self.subset})' if self.subset else ''}, split {self.split}"

    def read(self, *, report: ProblemReporter = raise_problem) -> Generator[RawRecord, None, None]:
        for index, value in enumerate(self._dataset()):
            where = Location(f"{self.path}[{self.split}]#{index}")
            size = estimate_bytes(value)
            if size > self.max_record_bytes:
                report(
                    RecordProblem(
                        "record-too-large",
                        where,
                        f"the record has about {size:,} bytes, the limit is {self.max_record_bytes:,}",
                        "raise data.max_record_bytes if it is meant",
                    )
                )
                continue
            yield RawRecord(dict(value), where, size)

    def fingerprint(self) -> str:
        # A stream has no content hash before it was read; its name has to do.
        content = f"stream:{self.split}" if self.streaming else self._dataset()._fingerprint
        return hashlib.sha256(f"{self.path}|{self.subset}|{content}".encode()).hexdigest()

    def _dataset(self) -> Any:
        if not self._loaded:
            self._loaded.append(self._load())
        return self._loaded[0]

    def _load(self) -> Any:
        import datasets
        from datasets.exceptions import DatasetNotFoundError
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        is_offline = datasets.config.HF_HUB_OFFLINE
        # requests' and httpx's connection errors, and datasets' own, are all OSError or ConnectionError.
        try:
            return datasets.load_dataset(self.path, name=self.subset, split=self.split, streaming=self.streaming)
        except (DatasetNotFoundError, HfHubHTTPError, OfflineModeIsEnabled, ConnectionError, OSError) as error:
            raise self._unavailable(error, is_offline=bool(is_offline)) from None
        except ValueError as error:
            raise DataError(
                "hub-dataset",
                f"cannot load {self.description}",
                why=str(error).strip().splitlines()[0],
                fix="set `split` and `subset` of the source to what the data set offers",
                where=self.where,
            ) from None

    def _unavailable(self, error: Exception, *, is_offline: bool) -> DataError:
        if is_offline:
            return DataError(
                "hub-offline",
                f"{self.path} is neither a file nor a folder here, and the hub is switched off",
                why="HF_HUB_OFFLINE is set and the data set is not in the local cache",
                fix=self._did_you_mean() + "check the path, or unset HF_HUB_OFFLINE, or download the data set first",
                where=self.where,
            )
        return DataError(
            "hub-dataset",
            f"{self.path} is neither a file nor a folder here, and could not be loaded from the hub",
            why=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            fix=self._did_you_mean() + "check the name and the network; private data sets need `hf auth login`",
            where=self.where,
        )

    def _did_you_mean(self) -> str:
        close = _close_names(Path(self.path))
        return f"did you mean {' or '.join(close)}? Otherwise " if close else ""


# Fingerprints --------------------------------------------------------------------------------------------------------

_FINGERPRINTS = "file-sha256.json"
_known_sha256: dict[str, str] = {}


def file_sha256(path: Path, cache_directory: Path | None = None) -> str:
    """sha256 of a file's bytes; remembered by path, size and time of change, also across processes with a cache."""
    status = path.stat()
    key = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"
    if key not in _known_sha256 and cache_directory is not None:
        _known_sha256.update(_stored_fingerprints(cache_directory))
    if key not in _known_sha256:
        with path.open("rb") as stream:
            _known_sha256[key] = hashlib.file_digest(stream, "sha256").hexdigest()
        if cache_directory is not None:
            _store_fingerprint(cache_directory, key, _known_sha256[key])
    return _known_sha256[key]


def _stored_fingerprints(folder: Path) -> dict[str, str]:
    """What an earlier process wrote; nothing when it is missing or damaged, since it can always be computed again."""
    try:
        stored = json.loads((folder / _FINGERPRINTS).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def _store_fingerprint(folder: Path, key: str, digest: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{_FINGERPRINTS}.{os.getpid()}"
    temporary.write_text(json.dumps({**_stored_fingerprints(folder), key: digest}), "utf-8")
    temporary.replace(folder / _FINGERPRINTS)
