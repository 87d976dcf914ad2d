"""Every file of a folder or of a tar file: found with its place, or left with the reason.

Nothing is passed over in silence. A link within a tar is the file it points to; names that stand twice in one tar are
refused, since whoever unpacks it keeps only the last.
"""

import contextlib
import gzip
import os
import posixpath
import tarfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_eagle.data.build.groups import FoundFile
from megatron_eagle.data.media.file_slice import FileSlice

LINKS = 40  # symbolic links that may point to one another


@dataclass
class Ledger:
    """What became of the files of a source; ``files`` are used, part of a rejected sample, or left with a reason.

    shared: those that are used, but part of no sample alone.
    """

    files: int = 0
    shared: int = 0
    left: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def leave(self, name: str, reason: str, count: int = 1) -> None:
        """Counts files that are not used; the first one's name is kept."""
        if count:
            self.left[reason] += count
            self.examples.setdefault(reason, name)

    def lines(self) -> list[str]:
        """Each reason with its count and the first file."""
        return [f"{count} {reason} ({self.examples[reason]})" for reason, count in sorted(self.left.items())]


def walk_folder(folder: Path, ledger: Ledger) -> list[FoundFile]:
    """All files of a folder and those below it, sorted by folder and name; raises OSError if one cannot be listed."""
    found: list[FoundFile] = []
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders.sort()
        for name in list(folders):
            if Path(parent, name).is_symlink():
                ledger.files += 1
                ledger.leave(str(Path(parent, name).relative_to(folder)), "link to a folder")
        for name in sorted(names):
            path = Path(parent, name)
            relative = str(path.relative_to(folder))
            ledger.files += 1
            if name.startswith("."):
                ledger.leave(relative, "hidden")
            elif path.is_file():
                found.append(FoundFile(relative, FileSlice.whole(path)))
            else:
                ledger.leave(relative, "link that leads nowhere" if path.is_symlink() else "not a regular file")
    return found


def _raise(error: OSError) -> None:
    raise error


@dataclass(frozen=True)
class WalkedTar:
    """files: all that were found. damage: what ended reading before the end mark, or None; in: the file before it."""

    files: list[FoundFile]
    damage: str | None
    after: str


def walk_tar(path: Path, ledger: Ledger) -> WalkedTar:
    """All files of a tar file in its order, links as what they point to."""
    members: list[tarfile.TarInfo] = []
    damage: str | None = None
    try:
        with tarfile.open(path, "r:") as tar:
            members += [member for member in tar if not member.isdir()]
            if path.stat().st_size < tar.offset + tarfile.BLOCKSIZE:  # Python takes a cut-off header for the end
                damage = "the end mark is missing"
    except (OSError, tarfile.TarError) as error:
        damage = " ".join(str(error).split())
    seen = Counter(member.name for member in members)
    slices: dict[str, FileSlice] = {}
    files: dict[str, FoundFile] = {}
    for member in members:
        ledger.files += 1
        if member.isfile():
            slices[member.name] = FileSlice(path, member.offset_data, member.size)
        if member.name.rpartition("/")[2].startswith("."):
            ledger.leave(member.name, "hidden")
        elif member.name in files:
            ledger.leave(member.name, "repeated name")
        elif seen[member.name] > 1:
            files[member.name] = FoundFile(member.name, None, f"{member.name} stands {seen[member.name]} times in it")
        elif not (member.isfile() or member.islnk() or member.issym()):
            ledger.leave(member.name, "not a regular file")
        else:
            files[member.name] = FoundFile(member.name, None)
    by_name = {member.name: member for member in members}
    resolved = [file if file.refused else _resolve(by_name[file.name], by_name, slices) for file in files.values()]
    return WalkedTar(resolved, damage, members[-1].name if members else "")


def _resolve(member: tarfile.TarInfo, by_name: dict[str, tarfile.TarInfo], slices: dict[str, FileSlice]) -> FoundFile:
    target: tarfile.TarInfo | None = member
    for _ in range(LINKS):
        if target is None or target.isfile():
            break
        # A hard link names a member, a symbolic one a path from where it lies.
        name = target.linkname
        if target.issym():
            name = posixpath.normpath(posixpath.join(posixpath.dirname(target.name), name))
        target = by_name.get(name)
    if target is None or not target.isfile():
        return FoundFile(member.name, None, f"{member.name} is a link to {member.linkname[:100]}, which is not in it")
    if target.issparse():
        return FoundFile(member.name, None, f"{member.name} is a sparse file")
    return FoundFile(member.name, slices[target.name])


def unpack_gzip(path: Path, scratch: Path) -> Path:
    """A tar.gz as a plain tar in a folder, for files in it are read in place; of a damaged one what can be read."""
    unpacked = scratch / f"unpacked-{path.name}.tar"
    scratch.mkdir(parents=True, exist_ok=True)
    partial = unpacked.with_name(f"{unpacked.name}.{os.getpid()}")
    try:
        # What there is of a damaged one is a tar that is cut off, which is reported as one.
        damaged = contextlib.suppress(EOFError, zlib.error, gzip.BadGzipFile)
        with gzip.open(path, "rb") as source, open(partial, "wb") as copy, damaged:
            while data := source.read1(1 << 20):
                copy.write(data)
        os.replace(partial, unpacked)
    finally:
        partial.unlink(missing_ok=True)
    return unpacked


def names_text(names: Sequence[str], most: int = 8) -> str:
    """Names for a reason: the first ones, and how many there are beyond."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name[:100] for name in names[:most]) + more
