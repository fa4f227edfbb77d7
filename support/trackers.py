"""Where a run is watched: TensorBoard, and Weights & Biases with --wandb PROJECT.

Both have .numbers(step, {name: number}), .text(step, text), .show(step, {name: PNG file}, {name: tensor}), .flush()
and .close(); support/recorder.py is a third.
A tracker that cannot begin is an error; one that fails later says so once, and the run goes on.
"""

import html
import json
import os
import secrets
import threading

from support.errors import ConfigError
from support.files import may_fail, reason, say_once, say_unwritten, to_json, write_whole


class TensorBoard:
    """A folder of TensorBoard's event files. When the disk refuses a record, the file is cut back to its last whole
    one, and later records go into a new file."""

    def __init__(self, folder, first_step):
        """first_step: the number of steps that the run has already done. OSError if the disk is full."""
        self.folder, self.writer, self.file = folder, None, None
        self.begin(purge_step=first_step + 1)

    def begin(self, **options):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, so only where it is used

        before = set(self.event_files())
        self.usual_hook, threading.excepthook = threading.excepthook, self.hook
        try:
            self.writer = SummaryWriter(self.folder, **options)
        finally:
            self.file = next((path for path in self.event_files() if path not in before), None)
            if self.writer is None:
                self.drop()

    def event_files(self):
        return self.folder.glob("events.out.tfevents.*")

    def hook(self, thread):
        """SummaryWriter writes in a thread of its own, and its next call raises what went wrong there: no traceback."""
        if not (isinstance(thread.exc_value, OSError) and type(thread.thread).__module__.startswith("tensorboard.")):
            self.usual_hook(thread)

    def write(self, action):
        """Call action(the writer)."""
        try:
            if self.writer is None:
                self.begin()
            action(self.writer)
        except Exception as error:  # OSError; where TensorFlow is installed, it does the writing and has its own
            say_unwritten(self.folder, reason(error))
            if self.writer is not None:
                self.drop()

    def drop(self):
        """Close the writer, and cut its file back to the last whole record."""
        with may_fail(self.folder):
            if self.writer is not None:
                self.writer.close()
        with may_fail(self.folder):
            if self.file is not None:
                cut_events(self.file)
        self.writer, self.file, threading.excepthook = None, None, self.usual_hook

    def numbers(self, step, record):
        def action(writer):
            for name, value in record.items():
                writer.add_scalar(name, value, step)

        self.write(action)

    def text(self, step, text):
        self.write(lambda writer: writer.add_text("samples", text, step))

    def show(self, step, pictures, histograms):
        from matplotlib.image import imread

        def action(writer):
            for name, path in pictures.items():
                writer.add_image(name, imread(path), step, dataformats="HWC")
            for name, values in histograms.items():
                writer.add_histogram(name, values, step)

        self.write(action)

    def flush(self):
        """Write what the writer still holds. Where TensorFlow is installed, its own thread does so now and then."""
        if self.writer is not None:
            self.write(lambda writer: writer.flush())

    def close(self):
        self.flush()
        if self.writer is not None:
            self.drop()


def cut_events(path):
    """Cut an event file back to its last whole record, which is 8 bytes of the length n, 4 of a checksum, n of data, 4
    of another checksum. A file without a record is removed."""
    with open(path, "r+b") as file:
        size, end = file.seek(0, os.SEEK_END), 0
        while file.seek(end) + 16 <= size:
            record = 16 + int.from_bytes(file.read(8), "little")
            if end + record > size:
                break
            end += record
        file.truncate(end)
    if not end:
        path.unlink()


class WandB:
    """A run of Weights & Biases. A resumed run continues the one whose id the file wandb_id holds."""

    def __init__(self, run_dir, config, header, resumed):
        """header: the settings to show. ConfigError if the run cannot begin, OSError if the disk is full."""
        self.label, id_file = f"--wandb {config.wandb}", run_dir / "wandb_id"
        run_id = id_file.read_text(encoding="utf-8").strip() if resumed and id_file.is_file() else secrets.token_hex(8)
        settings = {"project": config.wandb, "name": config.name, "config": json.loads(to_json(header))}
        try:
            import wandb

            self.wandb, self.run = wandb, wandb.init(**settings, id=run_id, resume="allow")
        except Exception as error:  # of wandb, of its service, of the network
            remedy = "log in (wandb login), or set WANDB_MODE=offline"
            problem = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise ConfigError(f"{self.label} cannot begin: {problem}; {remedy}") from None
        write_whole(id_file, self.run.id)  # a sweep chooses its own id

    def write(self, action):
        try:
            action()
        except Exception as error:
            say_once(self.label, f"{self.label} failed ({reason(error)}); the run goes on")

    def numbers(self, step, record):
        self.write(lambda: self.run.log(record, step=step))

    def text(self, step, text):
        self.write(lambda: self.run.log({"samples": self.wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step=step))

    def show(self, step, pictures, histograms):
        def action():
            media = {name: self.wandb.Image(str(path)) for name, path in pictures.items()}
            media |= {name: self.wandb.Histogram(values.numpy()) for name, values in histograms.items()}
            self.run.log(media, step=step)

        self.write(action)

    def flush(self):
        """Nothing: wandb writes as it goes."""

    def close(self):
        self.write(self.run.finish)
