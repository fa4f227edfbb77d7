"""The text of the copying experiment: lines such as `k.......|k`, a letter, some dots, and the same letter. A model
must remember one letter across the dots; how far it can depends on its position encoding."""

import torch

from support.files import must_write, write_whole
from support.runs import RUNS

MOST_DOTS = 48  # in training
DISTANCES = [0, 1, 2, 4, 8, 16, 32, 48, 64, 80, 96]  # numbers of dots at which a trained model is tested


def copy_line(index, least, most):
    """Line number `index`: a random letter, `least` to `most` dots, the same letter. The number of dots is log-uniform:
    with a uniform one most lines would be long, and long lines are hardly learned without short ones."""
    generator = torch.Generator().manual_seed(index)
    letter = chr(97 + torch.randint(26, (1,), generator=generator).item())
    dots = least - 1 + int((most - least + 2) ** torch.rand(1, generator=generator).item())
    return letter + "." * dots + "|" + letter


def copy_file():
    """The path of the training text, 20,000 lines. It is written again each time (one second), so that it never comes
    from an older version of the code."""
    path = RUNS / "ablate" / "copy.txt"
    text = "\n".join(copy_line(i, 0, MOST_DOTS) for i in range(20_000)) + "\n"
    with must_write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)  # several runs may write it at the same time
    return str(path)
