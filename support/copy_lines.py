"""The text of the copying experiment: `k·······|k`, a letter, some dots, the same letter. What a model must carry over
the dots is one letter; how far it can depends on how it knows positions."""

import os

import torch

from support.runs import RUNS

MOST_DOTS = 48  # in training
DISTANCES = [0, 1, 2, 4, 8, 16, 32, 48, 64, 80, 96]  # dots at which a trained model is asked


def copy_line(index, least, most):
    """The line of an index: a random letter, least to most dots, the same letter. The number of dots is log-uniform:
    evenly spread, most lines would be long, and those are hardly learnt without the short ones."""
    generator = torch.Generator().manual_seed(index)
    letter = chr(97 + torch.randint(26, (1,), generator=generator).item())
    dots = least - 1 + int((most - least + 2) ** torch.rand(1, generator=generator).item())
    return letter + "." * dots + "|" + letter


def copy_file():
    """The path of the training text, 20,000 lines; written each time, in a second, so that it is never that of older
    code."""
    path = RUNS / "ablate" / "copy.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(copy_line(i, 0, MOST_DOTS) for i in range(20_000)) + "\n"
    partial = path.with_suffix(f".{os.getpid()}.tmp")  # several runs may write it at a time
    partial.write_text(text)
    partial.replace(path)
    return str(path)
