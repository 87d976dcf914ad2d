"""compat/energon.py."""

import inspect
import io
import json
import tarfile

import pytest
from contracts import the
from megatron.energon import Cooker, DefaultTaskEncoder, WorkerConfig, reraise_exception, stateless

from megatron_eagle.compat.energon import ShardFiles, load_blend, open_loader, pack_quietly, prepare_index

WORKERS = WorkerConfig(rank=0, world_size=1, num_workers=0, global_error_handler=reraise_exception)


@stateless
def keep(sample):
    return sample


class Keeping(DefaultTaskEncoder):
    decoder = None
    cookers = [Cooker(keep)]

    def build_batch(self, dataset, *, worker_config, **unused):
        return pack_quietly(
            dataset,
            buffer_size=2,
            pre_packer=lambda samples: [samples],
            final_packer=lambda samples: samples,
            worker_config=worker_config,
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set of one shard with two samples."""
    folder = tmp_path_factory.mktemp("energon")
    with tarfile.open(folder / "shard_0.tar", "w") as tar:
        for key in ("first", "second"):
            entry = tarfile.TarInfo(f"{key}.txt")
            entry.size = len(key)
            tar.addfile(entry, io.BytesIO(key.encode()))
    prepare_index(folder, ["shard_0.tar"])
    kind = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    (folder / ".nv-meta" / "dataset.yaml").write_text(json.dumps(kind))
    return folder


def test_contract_writing_an_index(folder):
    words = (
        "Energon's WebdatasetPreparator.prepare_dataset no longer writes .nv-meta/.info.json with the samples of each "
        "shard: data/build/index.py has it do so"
    )
    info = json.loads((folder / ".nv-meta" / ".info.json").read_text())
    assert info["shard_counts"] == {"shard_0.tar": 2}, words


def test_contract_files_by_random_access(folder):
    words = (
        "Energon's WebdatasetFileStore no longer gives a file by its name, or says by sqlite_reader.get_sample_part "
        "where it lies: data/stream/pack_reader.py reads planned packs by it, and videos in place"
    )
    files = ShardFiles(folder)
    assert files.read("second", "txt") == b"second", words
    shard, start, length = files.locate("second", "txt")
    assert (folder / "shard_0.tar").read_bytes()[start : start + length] == b"second", words
    assert str(shard).endswith("shard_0.tar"), words
    with pytest.raises(KeyError):
        files.read("third", "txt")


def test_contract_blending_packing_and_a_place_in_the_stream(folder, capfd):
    words = (
        "Energon's MetadatasetBlend, PackingDataset or loader changed, or a progress bar is drawn again: "
        "data/stream/streams.py reads, packs and continues by them"
    )

    def open_stream():
        packs = Keeping().build_train_datasets(
            **load_blend([(str(folder), 1.0)], WORKERS, max_samples_per_sequence=100),
            worker_config=WORKERS,
            batch_size=None,
            shuffle_buffer_size=None,
        )
        return open_loader(packs, pin_memory=False, gc_collect_every_n_steps=0, watchdog_timeout_seconds=None)

    loader = open_stream()
    assert loader.pin_memory is False, words
    packs = iter(loader)
    assert sorted(bytes(sample["txt"]) for sample in next(packs)) == [b"first", b"second"], words
    position = loader.save_state_rank()
    following = [sample["__key__"] for sample in next(packs)]
    again = open_stream()
    again.restore_state_rank(position)
    assert [sample["__key__"] for sample in next(iter(again))] == following, words
    assert "reading buffer" not in capfd.readouterr().err, words


def test_contract_the_progress_bar():
    words = (
        "Energon's PackingDataset no longer fills its buffer in _fill_reading_buffer(source_iter, log_progress): "
        "compat/energon.py keeps its progress bar off there"
    )
    fill = the("megatron.energon:PackingDataset._fill_reading_buffer", words)
    assert list(inspect.signature(fill).parameters) == ["self", "source_iter", "log_progress"], words


def test_the_class_that_saved_positions_name_keeps_its_name():
    the("megatron_eagle.compat.energon:_QuietPackingDataset", "positions saved before could not be continued")
