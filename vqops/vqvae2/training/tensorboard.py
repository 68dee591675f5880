"""The metrics of a run as TensorBoard events, where TensorBoard is installed."""

from pathlib import Path


class TensorBoard:
    """Adds rows of metrics to the events in a folder; without TensorBoard it does nothing."""

    def __init__(self, folder: Path, step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.writer = None
        else:
            self.writer = SummaryWriter(folder, purge_step=step + 1)  # rows that a cut-off run wrote after `step`

    def row(self, row: dict[str, float]) -> None:
        if self.writer is not None:
            for name, value in row.items():
                if name != "step":
                    self.writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
