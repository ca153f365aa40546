"""Writes metrics.jsonl in the format of TensorBoard: scalars, the current genotype of a search, and the flags.

The event files always have the content of metrics.jsonl: when a run resumes or returns to a checkpoint, everything is
rewritten. A TensorBoard process that is open meanwhile may show both versions until it is restarted.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from experiment import metrics
from genotypes import GenotypeError, from_json
from plots.cell_graph import cell_figure
from plots.style import plain_style

FOLDER = "tensorboard"
POSITION_FIELDS = ("epoch", "step", "seconds")  # These fields locate a record and are no measurements.
HPARAM_METRICS = "epoch/valid_ppl"  # TensorBoard compares runs by this metric.


class TensorBoardLogger:
    """Writes the TensorBoard event files of the run in `folder`."""

    def __init__(self, folder: Path, flags: dict[str, Any]):
        self.folder = folder
        self.flags = {name: value for name, value in flags.items() if isinstance(value, bool | int | float | str)}
        self.writer: SummaryWriter | None = None
        self.cell: Any = None  # This genotype was drawn last.

    def restart(self) -> None:
        """Replaces the event files by new ones with everything that is in metrics.jsonl."""
        if self.writer is not None:
            self.writer.close()
        for path in (self.folder / FOLDER).glob("events.out.tfevents.*"):
            path.unlink()
        self.writer, self.cell = SummaryWriter(str(self.folder / FOLDER), purge_step=0), None
        for summary in hparams(self.flags, {HPARAM_METRICS: 0.0}):
            self.writer.file_writer.add_summary(summary)
        for record in metrics.records(self.folder):
            self.write(record)
        self.writer.flush()

    def add(self, record: dict[str, Any]) -> None:
        """Writes a record that has just been added to metrics.jsonl."""
        if self.writer is None:
            self.restart()
        else:
            self.write(record)
            self.writer.flush()

    def write(self, record: dict[str, Any]) -> None:
        kind, step = record["kind"], record.get("step")
        for name, value in record.items():
            if name not in POSITION_FIELDS and metrics.is_number(value):
                self.writer.add_scalar(f"{kind}/{name}", value, step)
        if kind == "epoch" and "genotype" in record and record["genotype"] != self.cell:
            self.cell = record["genotype"]
            with suppress(GenotypeError), plain_style():  # Someone may have edited metrics.jsonl.
                self.writer.add_figure("cell", cell_figure(from_json(self.cell)), step)
