"""The ledger: one Parquet file with everything that any operator had to say of any sample, in the order of the sources.

Every sample has exactly one row that is ``final``: kept, rejected or left, and by which operator. Rows of a whole
source have no sample. Anything that reads Parquet reads it; ``explain`` prints what happened to one sample.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_eagle.config.schema import meant
from megatron_eagle.errors import UserError

LEDGER_FILE = "ledger.parquet"
SCHEMA = pa.schema([
    ("source", pa.string()),
    ("number", pa.int64()),  # of the sample in its source, from 0
    ("sample", pa.string()),  # its id
    ("turn", pa.int32()),  # from 1; null: the whole sample
    ("operator", pa.string()),
    ("decision", pa.string()),  # kept, rejected, left, changed, added, noted
    ("final", pa.bool_()),
    ("reason", pa.string()),
    ("detail", pa.string()),
    ("scores", pa.map_(pa.string(), pa.float64())),
    ("before", pa.string()),  # the turn's text, where it was changed; null of an added turn
    ("after", pa.string()),
])  # fmt: skip


class LedgerWriter:
    """Writes rows of one block after another; a row group each."""

    def __init__(self, path: Path) -> None:
        self._writer = pq.ParquetWriter(path, SCHEMA, compression="zstd")

    def __enter__(self) -> "LedgerWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def write(self, source: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Rows as ``block.Result`` has them."""
        full = [
            {
                **{name: row.get(name) for name in SCHEMA.names},
                "source": source,
                "sample": row.get("id"),
                "final": row.get("final", False),
                "scores": sorted(row.get("scores", {}).items()),
            }
            for row in rows
        ]
        if full:
            self._writer.write_table(pa.Table.from_pylist(full, schema=SCHEMA))


def explain(out: Path, sample: str) -> list[str]:
    """Everything that happened to a sample, a line each. sample: its id, or source/id; UserError if there is none."""
    path = out / LEDGER_FILE
    try:
        table = pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{out} is no finished curation: {path} cannot be read ({str(error)[:100]})") from None
    found: list[dict[str, Any]] = []
    near: list[str] = []
    for number in range(table.num_row_groups):
        group = table.read_row_group(number)
        full = pc.binary_join_element_wise(group["source"], group["sample"], "/")
        hit = pc.fill_null(pc.or_(pc.equal(group["sample"], sample), pc.equal(full, sample)), False)
        found += group.filter(hit).to_pylist()
        if not found and len(near) < 1000:
            near += [one for one in group["sample"].unique().to_pylist() if one is not None]
    if not found:
        raise UserError(f"the ledger of {out} has no sample {sample[:100]!r}{meant(sample, near)}")
    lines = []
    for place in dict.fromkeys((row["source"], row["number"]) for row in found):
        rows = [row for row in found if (row["source"], row["number"]) == place]
        lines += [f"{place[0]}/{rows[0]['sample']} (sample {place[1]} of {place[0]})", *map(_line, rows)]
    return lines


def _line(row: Mapping[str, Any]) -> str:
    where = f"turn {row['turn']}: " if row["turn"] is not None else ""
    why = ": ".join(part for part in (row["reason"], row["detail"]) if part)
    scores = "".join(f", {name} {value:g}" for name, value in row["scores"] or ())
    by = f" by {row['operator']}" if row["operator"] else ""
    text = ""
    if row["after"] is not None:
        text = f"; {row['after'][-80:]!r}" if row["before"] is None else ""
        text = text or f"; {row['before'][-80:]!r} became {row['after'][-80:]!r}"
    return f"  {where}{row['decision']}{by}{': ' * bool(why)}{why}{scores}{text}"
