"""The newest step as gauges for Prometheus: a file that node exporter's textfile collector reads.

A cluster is watched there, not in a terminal: an alert on ``megatron_eagle_time_seconds`` says that a run stands still,
one on ``megatron_eagle_stragglers`` that it waits for a slow process.
"""

import importlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_eagle.errors import UserError
from megatron_eagle.training.dashboards import Sender


def write_for_prometheus(folder: Path, run: str, stage: str) -> Sender:
    """Writes to ``folder``, the collector's own; UserError without the package or the folder."""
    try:
        library = importlib.import_module("prometheus_client")
    except ImportError as error:
        install = "pip install '.[prometheus]'"
        raise UserError(f"gauges for Prometheus were asked for and its client is not installed: {install}") from error
    if not folder.is_dir():
        raise UserError(f"log.prometheus_folder: {folder} is no folder; give node exporter's textfile directory")
    return Sender("Prometheus", lambda: PrometheusFile(library, folder, run, stage))


class PrometheusFile:
    """``megatron_eagle_RUN.prom``, there whole or not at all; gone when the stage ends in order."""

    def __init__(self, library: Any, folder: Path, run: str, stage: str) -> None:
        self._library = library
        self._path = folder / f"megatron_eagle_{run}.prom"
        self._labels = {"run": run, "stage": stage}

    def log(self, values: Mapping[str, float], step: int) -> None:
        """The numbers of one step, ``megatron_eagle_NAME`` each; those of earlier steps go."""
        registry = self._library.CollectorRegistry()
        for name, value in {**values, "step": step, "time_seconds": time.time()}.items():
            plain = "".join(sign if sign.isascii() and sign.isalnum() else "_" for sign in name)
            gauge = self._library.Gauge(f"megatron_eagle_{plain}", name, self._labels.keys(), registry=registry)
            gauge.labels(**self._labels).set(value)
        self._library.write_to_textfile(str(self._path), registry)

    def finish(self) -> None:
        """Takes the file away: a run that is over is none that stands still."""
        self._path.unlink(missing_ok=True)
