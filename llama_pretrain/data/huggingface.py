"""Hugging Face datasets: on disk, as a directory of data files, or streamed from the hub."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama_pretrain.config.data import Source
from llama_pretrain.config.problems import UserError
from llama_pretrain.data.cache import Cache, data_error
from llama_pretrain.data.hashing import File, hash_files
from llama_pretrain.data.read import Record, import_optional, read_rows
from llama_pretrain.data.text import MAX_TASK, Span, TextSource
from llama_pretrain.files import hash_text


@dataclass(frozen=True, kw_only=True)
class DatasetSource(TextSource):
    """The documents of a dataset; spans are ranges of rows, or shards if it is streamed."""

    def spans(self, target: int) -> Iterator[Span]:
        dataset = load_dataset(self.config, self.path)
        if hasattr(dataset, "num_rows"):
            rows = dataset.num_rows
            step = max(1, rows * target // max(1, self.num_bytes))
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                size = self.num_bytes * (stop - start) // rows
                yield Span(file=0, start=start, stop=stop, size=size)
            return
        shards = dataset.num_shards
        for shard in range(shards):
            yield Span(file=0, start=shard, stop=shard + 1, size=self.num_bytes // shards)

    def read(self, span: Span) -> Iterator[Record]:
        dataset = load_dataset(self.config, self.path)
        name, first = str(self.config.dataset), span.start
        if hasattr(dataset, "num_rows"):
            rows = dataset.select(range(span.start, span.stop or dataset.num_rows))
        else:
            rows = dataset.shard(num_shards=dataset.num_shards, index=span.start)
            name, first = f"{name}, shard {span.start}", 0
        yield from read_rows(iter(rows), name=name, first=first, field=self.config.text_field)

    def name(self, span: Span) -> str:
        return str(self.config.dataset)


def open_dataset(config: Source, *, path: str, cache: Cache) -> DatasetSource:
    """Open a dataset; a directory is hashed, and a name on the hub becomes its current commit.

    Raises:
        UserError: if it cannot be loaded.
    """
    folder = Path(str(config.dataset)).expanduser()
    recipe = [config.text_field, config.dataset_config, config.dataset_split]
    files: list[File] = []
    if folder.is_dir():
        names = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
        files = hash_files([name.resolve() for name in names], cache)
        num_bytes = sum(file.size for file in files)
        recipe += [file.digest for file in files]
        load_dataset(config, path)  # an error is reported before anything starts
    else:
        config = replace(config, dataset_revision=_find_commit(config, path))
        recipe += [config.dataset, config.dataset_revision]
        num_bytes = load_dataset(config, path).info.size_in_bytes or MAX_TASK
    return DatasetSource(
        path=path,
        config=config,
        files=files,
        fingerprint=hash_text(repr(recipe)),
        num_bytes=num_bytes,
    )


def load_dataset(config: Source, path: str) -> Any:
    """A dataset on disk, which has `num_rows`, or a streamed one, which has `num_shards`.

    Raises:
        UserError: if it cannot be loaded, with the library's reason.
    """
    datasets = import_optional("datasets", extra="huggingface", path=f"{path}.name")
    folder, split = Path(str(config.dataset)).expanduser(), config.dataset_split
    try:
        if not (folder / "state.json").is_file() and not (folder / "dataset_dict.json").is_file():
            return datasets.load_dataset(
                str(folder) if folder.is_dir() else config.dataset,
                config.dataset_config,
                split=split,
                revision=None if folder.is_dir() else config.dataset_revision,
                streaming=True,
            )
        loaded = datasets.load_from_disk(str(folder))
        if not isinstance(loaded, datasets.DatasetDict):
            return loaded
        if split in loaded:
            return loaded[split]
        message = f"{folder} has no split {split!r} (got {', '.join(loaded)})"
        raise data_error(f"{path}.dataset_split", message)
    except UserError:
        raise
    except Exception as error:  # the library raises many types
        message = f"{config.dataset} cannot be loaded: {_first_line(error)}"
        raise data_error(f"{path}.dataset", message) from error


def _find_commit(config: Source, path: str) -> str:
    """The commit that a dataset's name refers to now, so that the cache is exact."""
    from huggingface_hub import HfApi  # only a name on the hub needs it

    try:
        info = HfApi().dataset_info(str(config.dataset), revision=config.dataset_revision)
    except Exception as error:  # no network, no such dataset, or no access
        message = f"{config.dataset} is not a directory, and the hub reports: {_first_line(error)}"
        raise data_error(f"{path}.dataset", message) from error
    return str(info.sha)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
