"""What the index of a torch_dist checkpoint is made of: PyTorch's and Megatron's names in a file on the disk.

Leaned on:

- ``torch.distributed.checkpoint.filesystem._StorageInfo``: where a tensor lies in a file. The index is a pickle of
  these, and PyTorch has no public class or reader for one;
- the other classes and functions that such a pickle names, ``INDEX_CLASSES``, which is all that may be loaded of it.
"""

from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo

__all__ = ["INDEX_CLASSES", "StorageInfo"]

# Module -> names. All dtypes of torch come on top of these.
INDEX_CLASSES = {
    "torch": {"Size", "dtype", "device", "strided", "memory_format", "contiguous_format"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "collections": {"OrderedDict"},
}
