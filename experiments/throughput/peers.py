"""The loaders other projects use, each as its own documentation shows it, without worker processes.

Runs in the second virtual environment (peers.txt). Every contender yields (key, record, encoded picture) of a whole
epoch in its own shuffled order; `webdataset_pil` also prepares pictures with the references' own transform.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from experiments.throughput.reference_transform import prepare as prepare_picture
from experiments.throughput.workload import samples

Item = tuple[Any, ...]
SHUFFLE = 1000


def open_contender(task: str, folder: str, *, loader: str) -> Callable[[], Iterator[Item]]:
    """The epochs of one loader over the data below `folder`."""
    read = _LOADERS[loader](Path(folder))
    if task == "read":
        return read

    def prepared() -> Iterator[Item]:
        for key, _, image in read():
            yield key, prepare_picture(image)

    return prepared


def make(folder: Path, num: int) -> None:
    """The same samples in the formats of webdataset's own writer, litdata and energon."""
    import webdataset

    (folder / "wds").mkdir()
    with webdataset.ShardWriter(str(folder / "wds" / "shard-%05d.tar"), maxcount=1000, verbose=0) as writer:
        for key, record, jpeg in samples(num):
            writer.write({"__key__": key, "json": json.dumps(record).encode(), "jpg": jpeg})
    _make_litdata(folder / "litdata", num)
    _make_energon(folder, num)


def _make_litdata(folder: Path, num: int) -> None:
    from litdata.streaming.cache import Cache

    folder.mkdir()
    cache = Cache(input_dir=str(folder), chunk_bytes=64 << 20)  # what `litdata.optimize` writes with, in one process
    for number, (key, record, jpeg) in enumerate(samples(num)):
        cache[number] = {"key": key, "json": json.dumps(record).encode(), "jpg": jpeg}
    cache.done()
    cache.merge()


def _make_energon(folder: Path, num: int) -> None:
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    target = folder / "energon"
    target.mkdir()
    for tar in sorted((folder / "wds").glob("*.tar")):
        shutil.copyfile(tar, target / tar.name)
    names = [tar.name for tar in sorted(target.glob("*.tar"))]
    WebdatasetPreparator.prepare_dataset(target, names, split_parts_ratio=[("train", 1.0)], workers=1)
    kind = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
    (target / ".nv-meta" / "dataset.yaml").write_text(kind, encoding="utf-8")


def _webdataset(tars: str) -> Callable[[Path], Callable[[], Iterator[Item]]]:
    def open_(folder: Path) -> Callable[[], Iterator[Item]]:
        import webdataset

        urls = [str(tar) for tar in sorted((folder / tars).glob("*.tar"))]

        def epoch() -> Iterator[Item]:
            pipeline = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0, empty_check=False).shuffle(SHUFFLE)
            for sample in pipeline:
                yield sample["__key__"], json.loads(sample["json"]), sample["jpg"]

        return epoch

    return open_


def _litdata(folder: Path) -> Callable[[], Iterator[Item]]:
    from litdata import StreamingDataset

    dataset = StreamingDataset(str(folder / "litdata"), shuffle=True, seed=0)

    def epoch() -> Iterator[Item]:
        for sample in dataset:
            yield sample["key"], json.loads(sample["json"]), sample["jpg"]

    return epoch


def _energon(folder: Path) -> Callable[[], Iterator[Item]]:
    from megatron.energon import Cooker, DefaultTaskEncoder, WorkerConfig, get_loader, get_train_dataset, stateless

    class Plain(DefaultTaskEncoder):  # type: ignore[misc]
        """Samples as they are."""

        decoder = None
        cookers: ClassVar[list[Any]] = [Cooker(stateless(lambda sample: sample))]

        @stateless  # type: ignore[untyped-decorator]
        def encode_sample(self, sample: Any) -> Any:
            return sample

    def epoch() -> Iterator[Item]:
        config = WorkerConfig(rank=0, world_size=1, num_workers=0)
        dataset = get_train_dataset(
            folder / "energon",
            worker_config=config,
            batch_size=None,
            shuffle_buffer_size=SHUFFLE,
            max_samples_per_sequence=100,
            task_encoder=Plain(),
            repeat=False,
        )
        for sample in get_loader(dataset):
            yield sample["__key__"].rpartition("/")[2], json.loads(sample["json"]), sample["jpg"]

    return epoch


def _datasets(folder: Path) -> Callable[[], Iterator[Item]]:
    import datasets

    urls = [str(tar) for tar in sorted((folder / "ours").glob("*.tar"))]
    table = datasets.load_dataset("webdataset", data_files={"train": urls}, split="train", streaming=True)
    table = table.cast_column("jpg", datasets.Image(decode=False)).shuffle(seed=0, buffer_size=SHUFFLE)

    def epoch() -> Iterator[Item]:
        for sample in table:
            yield sample["__key__"], sample["json"], sample["jpg"]["bytes"]

    return epoch


_LOADERS: dict[str, Callable[[Path], Callable[[], Iterator[Item]]]] = {
    "webdataset": _webdataset("ours"),
    "webdataset_own_tars": _webdataset("wds"),
    "litdata": _litdata,
    "energon": _energon,
    "datasets": _datasets,
}
