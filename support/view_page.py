"""A run's page: what support/recorder.py wrote and metrics.jsonl, put into support/view.html.

page, n_steps, left_out = page_of("runs/grpo")

The page is one file that reads nothing else. Its data are JSON, gzipped, in base64. Text of the run is never markup:
the page's script writes it as text alone, and `visible` makes what one does not see readable.
"""

import base64
import gzip
import html
import unicodedata
from pathlib import Path

from support.errors import DataError
from support.files import to_json
from support.log import read_metrics
from support.recorder import read_recording

MOST = 4_800_000  # bytes of a page
POINTS = 300  # of a curve

# What the columns of a record mean: name -> (label, how it is tinted, what it is). Signed ones are blue above 0 and
# orange below, the others grow from white. The first that a run has tints its tokens. ratio, kl and log_ratio are
# worked out on the page, from logp, old and ref.
COLUMNS = {
    "gets": ("what it gets", "signed", "−∂loss/∂log π, without the KL: how far this update pulls the token's log π up"),
    "divergence": ("divergence", "plain", "what the loss sums up: how far the student is from the teacher here, nats"),
    "A": ("advantage", "signed", "the token's advantage A, as the loss takes it"),
    "log_ratio": ("log π − log π_ref", "signed", "how much likelier the token is than under the reference, nats"),
    "logp": ("log π", "surprise", "the token's log-probability, nats"),
    "ratio": ("ratio ρ", "log", "π / π_old of the token"),
    "kl": ("KL", "plain", "k3 of the token: x − 1 − log x with x = π_ref / π; of a teacher the KL of the vocabulary"),
    "forward_kl": ("KL(teacher ‖ student)", "plain", "over the vocabulary, nats"),
    "entropy": ("entropy", "plain", "of the policy's distribution at this place, nats"),
    "value": ("value V", "signed", "what the value head expects before the token"),
    "target": ("value target", "signed", "what V is fitted to"),
    "reward": ("reward r", "signed", "the token's reward: the KL penalty, and at the end `final`, the answer's worth"),
    "kl_gets": ("the KL's pull", "signed", "−∂loss/∂log π by the KL penalty alone"),
    "weight": ("trained", "plain", "the weight of the token in the loss; 0: masked"),
}

# The curves, each of the metrics that the run has. A policy gradient's loss says nothing: see grpo.py.
CURVES = [
    ("accuracy, validation", ("accuracy", "f1")),
    ("right, training answers", ("reward_correct", "correct")),
    ("reward model's score", ("score",)),
    ("loss", ("loss", "valid_loss")),
    ("pairs in the right order", ("pair_accuracy", "valid_pair_accuracy")),
    ("log π of the answers", ("logp_chosen", "logp_rejected")),
    ("KL, nats per token", ("kl", "reverse_kl", "forward_kl")),
    ("entropy, nats", ("entropy",)),
    ("share clipped", ("clip_fraction",)),
    ("groups without a signal", ("zero_variance",)),
    ("length, tokens", ("length",)),
    ("gradient norm", ("grad_norm",)),
]


def page_of(run_dir):
    """-> the page's text, the number of steps in it, and of those that had to be left out. DataError if the run has
    recorded nothing, or more than a page holds in two steps."""
    header, records = read_recording(run_dir)
    if not records:
        raise DataError(f"{run_dir} has recorded no step yet: wait for the first one")
    template = Path(__file__).with_name("view.html").read_text(encoding="utf-8")
    content = {"about": visible(header["about"]), "settings": settings_of(header["config"])}
    content |= {"name": visible(str(header["config"].get("name") or Path(run_dir).name)), "columns": COLUMNS}
    content |= {"steps": header["config"].get("steps"), "curves": curves_of(run_dir)}
    records, n_recorded = [readable(record) for record in records], len(records)
    while True:
        title = html.escape(f"{content['name']}: inside the run")
        page = template.replace("{{data}}", packed(content | {"records": records})).replace("{{title}}", title)
        if len(page.encode()) <= MOST or len(records) <= 2:
            break
        last = records[-1:] if len(records) % 2 == 0 else []
        records = records[::2] + last  # the first and the last step stay
    if len(page.encode()) > MOST:
        raise DataError(
            f"even the first and the last step of {run_dir} are too large for one page: train with a smaller "
            "--record_groups"
        )
    return page, len(records), n_recorded - len(records)


def packed(content):
    """As text that stands in a page: letters, digits, +, / and =."""
    return base64.b64encode(gzip.compress(to_json(content).encode(), mtime=0)).decode()


def readable(record):
    """A record with its texts made visible."""
    vocab = {token: visible(text) for token, text in record["vocab"].items()}
    groups = [
        group | {"question": visible(group["question"]), "answer": visible(str(group["answer"]))}
        for group in record["groups"]
    ]
    return record | {"vocab": vocab, "groups": groups}


def visible(text):
    """Text in which every character can be seen, and none changes the direction or the place of others: ⏎ stands before
    a line break, a tab is ⇥; control and format characters are written as Python would, \\x00, \\u202e."""
    shown = []
    for char in text:
        if char == "\n":
            shown.append("⏎\n")
        elif char == "\t":
            shown.append("⇥")
        elif unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
            shown.append(char.encode("unicode_escape").decode())
        else:
            shown.append(char)
    return "".join(shown)


def settings_of(config):
    """The settings in a line: those that say what was run."""
    names = ("data", "init", "algorithm", "variant", "loss", "beta", "lr", "prompts", "rollouts", "batch", "seed")
    return visible(", ".join(f"{name} {config[name]}" for name in names if config.get(name) is not None))


def curves_of(run_dir):
    """[{"title", "series": {name: [[step, …], [value, …]]}}, …], each series of at most POINTS points."""
    try:
        metrics = read_metrics(run_dir)
    except (OSError, ValueError):
        return []
    curves = []
    for title, names in CURVES:
        series = {name: thin(*metrics[name]) for name in names if len(metrics.get(name, ((), ()))[0]) > 1}
        if series and not (title == "loss" and "clip_fraction" in metrics):
            curves.append({"title": title, "series": series})
    return curves


def thin(steps, values):
    """At most POINTS points, each the mean of its neighbours."""
    size = -(-len(steps) // POINTS)
    parts = [slice(i, i + size) for i in range(0, len(steps), size)]
    means = [float(f"{sum(values[part]) / len(values[part]):.4g}") for part in parts]
    return [steps[part][-1] for part in parts], means
