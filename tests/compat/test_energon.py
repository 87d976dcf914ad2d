"""compat/energon.py."""

import gc
import inspect
import io
import json
import tarfile

import pytest
from contracts import contract, the
from megatron.energon import Cooker, DefaultTaskEncoder, WorkerConfig, reraise_exception, stateless

WORKERS = WorkerConfig(rank=0, world_size=1, num_workers=0, global_error_handler=reraise_exception)


@stateless
def keep(sample):
    return sample


class Keeping(DefaultTaskEncoder):
    decoder = None
    cookers = [Cooker(keep)]

    def build_batch(self, dataset, *, worker_config, **unused):
        from megatron_eagle.compat.energon import pack_quietly

        return pack_quietly(
            dataset,
            buffer_size=2,
            pre_packer=lambda samples: [samples],
            final_packer=lambda samples: samples,
            worker_config=worker_config,
        )


def make_dataset(folder):
    """One shard with two samples."""
    from megatron_eagle.compat.energon import prepare_index

    with tarfile.open(folder / "shard_0.tar", "w") as tar:
        for key in ("first", "second"):
            entry = tarfile.TarInfo(f"{key}.txt")
            entry.size = len(key)
            tar.addfile(entry, io.BytesIO(key.encode()))
    gc.collect()  # Energon forks, and what other contracts left of Gloo's threads must not be taken apart in there
    prepare_index(folder, ["shard_0.tar"])
    kind = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    (folder / ".nv-meta" / "dataset.yaml").write_text(json.dumps(kind))


@contract(
    "Energon's WebdatasetPreparator.prepare_dataset no longer writes .nv-meta/.info.json with the samples of each "
    "shard: data/build/index.py has it do so"
)
def test_contract_writing_an_index(tmp_path):
    make_dataset(tmp_path)
    info = json.loads((tmp_path / ".nv-meta" / ".info.json").read_text())
    assert info["shard_counts"] == {"shard_0.tar": 2}


@contract(
    "Energon's index.sqlite or .idx changed: data/stream/sample_files.py reads planned packs by it, and "
    "data/reports/shard_check.py holds every shard against them, whose numbers follow .info.json"
)
def test_contract_what_the_index_has_of_a_shard(tmp_path):
    from megatron_eagle.compat.energon import IndexedSample, ShardIndex, sample_borders

    make_dataset(tmp_path)
    with ShardIndex(tmp_path / ".nv-meta" / "index.sqlite") as index:
        assert index.files("second") == (0, {"txt": (1536, 6)})
        with pytest.raises(KeyError):
            index.files("third")
        first = IndexedSample("first", 0, 1024, (("txt", 512, 5),))
        assert index.samples(0) == [first, IndexedSample("second", 1024, 2048, (("txt", 1536, 6),))]
        assert (index.samples(1), index.count(), index.shard_of("second"), index.shard_of("third")) == ([], 2, 0, None)
    assert sample_borders(tmp_path / "shard_0.tar") == [0, 1024, 2048]


@contract("Energon's reader has other words for a damaged shard: data/stream/streams.py makes a line of them")
def test_contract_words_for_a_damaged_shard(tmp_path):
    from megatron_eagle.compat.energon import damaged_shard, load_blend, open_loader

    def read():
        packs = Keeping().build_train_datasets(
            **load_blend([(str(tmp_path), 1.0)], WORKERS, max_samples_per_sequence=100),
            worker_config=WORKERS,
            batch_size=None,
            shuffle_buffer_size=None,
        )
        next(iter(open_loader(packs, pin_memory=False, gc_collect_every_n_steps=0, watchdog_timeout_seconds=None)))

    make_dataset(tmp_path)
    shard = tmp_path / "shard_0.tar"
    whole, borders = shard.read_bytes(), (tmp_path / "shard_0.tar.idx").read_bytes()
    said = []
    for data, index in (
        (whole[:1024], borders),
        (whole[:1540], borders),
        (whole, borders[:8] + borders[16:] + borders[16:]),
        (None, borders),
    ):
        (tmp_path / "shard_0.tar.idx").write_bytes(index)
        shard.unlink(missing_ok=True)
        if data is not None:
            shard.write_bytes(data)
        with pytest.raises((ValueError, OSError, tarfile.TarError)) as caught:
            read()
        said.append(damaged_shard(caught.value))
    assert said[0] == "Unexpected end of tar file: shard_0.tar" and "unexpected end of data" in said[1]
    assert said[2] == "Inconsistent sample base name: first vs second" and said[3].startswith("No such file")
    assert damaged_shard(ValueError("a bug")) is None


@contract(
    "Energon's MetadatasetBlend, PackingDataset or loader changed, or a progress bar is drawn again: "
    "data/stream/streams.py reads, packs and continues by them"
)
def test_contract_blending_packing_and_a_place_in_the_stream(tmp_path, capfd):
    make_dataset(tmp_path)

    from megatron_eagle.compat.energon import load_blend, open_loader

    def open_stream():
        packs = Keeping().build_train_datasets(
            **load_blend([(str(tmp_path), 1.0)], WORKERS, max_samples_per_sequence=100),
            worker_config=WORKERS,
            batch_size=None,
            shuffle_buffer_size=None,
        )
        return open_loader(packs, pin_memory=False, gc_collect_every_n_steps=0, watchdog_timeout_seconds=None)

    loader = open_stream()
    assert loader.pin_memory is False
    packs = iter(loader)
    assert sorted(bytes(sample["txt"]) for sample in next(packs)) == [b"first", b"second"]
    position = loader.save_state_rank()
    following = [sample["__key__"] for sample in next(packs)]
    again = open_stream()
    again.restore_state_rank(position)
    assert [sample["__key__"] for sample in next(iter(again))] == following
    assert "reading buffer" not in capfd.readouterr().err


@contract(
    "Energon's PackingDataset no longer fills its buffer in _fill_reading_buffer(source_iter, log_progress): "
    "compat/energon.py keeps its progress bar off there"
)
def test_contract_the_progress_bar():
    fill = the("megatron.energon:PackingDataset._fill_reading_buffer")
    assert list(inspect.signature(fill).parameters) == ["self", "source_iter", "log_progress"]


@contract("compat/energon.py renamed its class for packing: positions that were saved by its name cannot be continued")
def test_the_class_that_saved_positions_name_keeps_its_name():
    assert the("megatron_eagle.compat.energon:_QuietPackingDataset").__name__ == "_QuietPackingDataset"
