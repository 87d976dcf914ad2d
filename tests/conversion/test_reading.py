"""Damaged, truncated and malicious files are refused with their name; nothing of theirs is run."""

import json
import os
import pickle
import shutil

import checkpoint_cases as cases
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex
from worlds import WorldError

from megatron_eagle.checkpoint import safe_index
from megatron_eagle.compat.checkpoint_index import StorageInfo
from megatron_eagle.config.layout import Layout
from megatron_eagle.conversion.convert import Options, hf_to_megatron
from megatron_eagle.conversion.logits import logits_of_rank, probe_batch
from megatron_eagle.conversion.released import Dialect, recognise
from megatron_eagle.conversion.safetensors_folder import INDEX, SafetensorsFolder, write_safetensors
from megatron_eagle.conversion.tensors import TensorInfo
from megatron_eagle.conversion.torch_dist import TorchDist
from megatron_eagle.errors import UserError


class Given:
    def __init__(self, tensors):
        self.tensors = tensors
        self.infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}

    def read(self, name):
        return self.tensors[name]


def tensors():
    generator = torch.Generator().manual_seed(1)
    random = {f"layer.{n}": torch.randn(n + 1, 7, generator=generator) for n in range(6)}
    odd = {"scalar": torch.tensor(3), "empty": torch.zeros(0, 4), "half": torch.randn(5).bfloat16()}
    return {**random, **odd, "transposed": torch.randn(4, 3).t(), "bool": torch.tensor([True, False])}


def test_files_of_the_safetensors_library_and_back(tmp_path):
    state = tensors()
    write_safetensors(Given(state), tmp_path, shard_bytes=200)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    theirs = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert theirs.keys() == state.keys() and all(torch.equal(theirs[name], state[name]) for name in state)
    ours = SafetensorsFolder(tmp_path)
    assert all(torch.equal(ours.read(name), state[name]) for name in state)
    other = tmp_path / "theirs"
    other.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, other / "model.safetensors")
    assert all(torch.equal(SafetensorsFolder(other).read(name), state[name]) for name in state)


@pytest.mark.parametrize("path", ["../secret.safetensors", "/etc/passwd", "a/../../b.safetensors", "C:\\x", ""])
def test_an_index_cannot_leave_its_folder(tmp_path, path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": path}}))
    with pytest.raises(UserError, match="not inside its folder"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path, name):
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    (tmp_path / name).write_bytes(pickle.dumps(Evil()))
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=r"is a pickle.*weights_only=True.*save_file"):
            SafetensorsFolder(path)
    assert not ran.exists()


@pytest.mark.parametrize("cut", [0, 4, 30, -1, 1])
def test_a_truncated_safetensors_file_is_named(tmp_path, cut):
    write_safetensors(Given(tensors()), tmp_path)
    file = tmp_path / "model.safetensors"
    size = cut if cut not in (-1, 1) else file.stat().st_size + cut
    os.truncate(file, size)
    with pytest.raises(UserError, match=rf"model\.safetensors is damaged or truncated at {size} bytes"):
        SafetensorsFolder(tmp_path)


def write_raw(file, text, data=bytes(8)):
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HEADERS = {
    "not JSON": b"nonsense",
    "no object": b"[1]",
    "two tensors in one place": json.dumps({"a": entry(), "b": entry()}).encode(),
    "overlapping": json.dumps({"a": entry(shape=(1,), offsets=(0, 4)), "b": entry(offsets=(2, 8))}).encode(),
    "a gap": json.dumps({"a": entry(shape=(1,), offsets=(4, 8))}).encode(),
    "behind the end": json.dumps({"a": entry(shape=(4,), offsets=(0, 16))}).encode(),
    "before the start": json.dumps({"a": entry(offsets=(-8, 0))}).encode(),
    "fewer bytes than numbers": json.dumps({"a": entry(shape=(4,))}).encode(),
    "a negative shape": json.dumps({"a": entry(shape=(-2,))}).encode(),
    "more numbers than can be counted": json.dumps({"a": entry(shape=(1 << 63, 1 << 63))}).encode(),
    "an unknown type": json.dumps({"a": entry(dtype="F99")}).encode(),
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS.keys())
def test_a_header_that_does_not_fit_its_file_is_refused(tmp_path, header):
    """By the library, in our words: the checks that were ours are not repeated."""
    write_raw(tmp_path / "model.safetensors", header)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged or truncated at \d+ bytes: .*header"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("length", [1 << 62, 100_000_001])
def test_an_absurd_header_is_refused_before_it_is_read(tmp_path, length):
    file = tmp_path / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + b"{}")
    os.truncate(file, 100_000_100)
    with pytest.raises(UserError, match="header too large"):
        SafetensorsFolder(tmp_path)


def test_types_that_no_weight_has_are_refused_by_name(tmp_path):
    write_raw(tmp_path / "model.safetensors", json.dumps({"scale": entry("F8_E4M3", (8,))}).encode())
    with pytest.raises(UserError, match=r"scale is of type F8_E4M3; known are F64, .*BOOL"):
        SafetensorsFolder(tmp_path)


def test_a_name_in_two_files_is_refused(tmp_path):
    for name in ("one", "two"):
        save_file({"twice": torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"twice is in one\.safetensors and in two\.safetensors"):
        SafetensorsFolder(tmp_path)


def test_an_index_that_names_another_file_is_refused(tmp_path):
    for name in ("one", "two"):
        save_file({name: torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"one": "two.safetensors", "two": "two.safetensors"}}))
    with pytest.raises(UserError, match=r"says that one is in two\.safetensors, which does not have it"):
        SafetensorsFolder(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    write_safetensors(Given(tensors()), tmp_path, shard_bytes=200)
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(UserError, match=gone.name):
        SafetensorsFolder(tmp_path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    config = cases.reduced("eagle2-1b")
    cases.write_released(folder / "hf", config, Dialect.published(config, "B"))
    hf_to_megatron([folder / "hf"], folder / "in", Options(logits=False))
    return folder / "in"


def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def test_shards_of_megatron_missing_and_truncated(checkpoint, tmp_path):
    folder = copy(checkpoint, tmp_path)
    os.truncate(folder / "__0_0.distcp", 1000)
    with pytest.raises(UserError, match=r"__0_0\.distcp is truncated: it has 1000 bytes"):
        TorchDist(folder)
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(UserError, match=r"the shard __0_0\.distcp is missing"):
        TorchDist(folder)


class MakesFolder:
    """A pickle that makes a folder when it is read."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def load_as_training_does(worlds, folder):
    config = cases.reduced("eagle2-1b")
    worlds(1).run(logits_of_rank, str(folder), config, Layout(), probe_batch(config))


def test_metadata_that_would_run_code_is_refused(worlds, checkpoint, tmp_path):
    folder, ran = copy(checkpoint, tmp_path), tmp_path / "ran"
    load_as_training_does(worlds, folder)
    (folder / ".metadata").write_bytes(pickle.dumps(MakesFolder(ran)))
    with pytest.raises(UserError, match=r"\.metadata is damaged: it asks for posix\.mkdir"):
        TorchDist(folder)
    with pytest.raises(WorldError, match=r"UserError: .*\.metadata is damaged: it asks for posix\.mkdir"):
        load_as_training_does(worlds, folder)
    assert not ran.exists()


def test_objects_that_would_run_code_are_refused(worlds, checkpoint, tmp_path):
    """Megatron loads what is no tensor with a plain unpickler."""
    folder, ran = copy(checkpoint, tmp_path), tmp_path / "ran"
    torch.save([MakesFolder(ran)], folder / "evil.distcp")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    place = MetadataIndex("language.decoder.layers.mlp.linear_fc1._extra_state/shard_0_4")
    metadata.state_dict_metadata[place.fqn] = BytesStorageMetadata()
    metadata.storage_data[place] = StorageInfo("evil.distcp", 0, (folder / "evil.distcp").stat().st_size)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(WorldError, match=r"UserError: .*evil\.distcp holds .*, which cannot be loaded without running"):
        load_as_training_does(worlds, folder)
    assert not ran.exists()


def test_metadata_cannot_leave_its_folder(checkpoint, tmp_path):
    folder = copy(checkpoint, tmp_path)
    file = folder / ".metadata"
    file.write_bytes(file.read_bytes().replace(b"__0_0.distcp", b"../../secret"))
    for read in (TorchDist, safe_index.verify):
        with pytest.raises(UserError, match="not inside its folder"):
            read(folder)


def test_a_model_that_does_not_fit_is_refused_by_name():
    config = cases.reduced("eagle2-9b")
    with pytest.raises(UserError, match="format B holds one siglip encoder"):
        Dialect.published(config, "B")
    with pytest.raises(UserError, match=r"one tensor should end with model\.embed_tokens\.weight, 0 do"):
        recognise({}, {}, "folder")
