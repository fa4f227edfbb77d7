"""Which layers of a model get an adapter: the patterns of --lora.targets (lora.py)."""

from fnmatch import fnmatchcase

from torch import nn

from support.errors import CheckpointError


def chosen_linears(model, targets):
    """{name: Linear} of the layers that `targets` name: patterns of fnmatch; one counts where it matches a layer's
    name, or the end of it after a dot. CheckpointError on a pattern that matches no Linear, and on a layer that shares
    its weight with another one."""
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    chosen = {}
    for pattern in targets:
        hits = [n for n in linears if fnmatchcase(n, pattern) or fnmatchcase(n, f"*.{pattern}")]
        if not hits:
            kinds = ", ".join(sorted({name.rpartition(".")[2] for name in linears})) or "none at all"
            raise CheckpointError(f"lora target {pattern!r} matches no Linear layer; there are {kinds}")
        chosen |= {name: linears[name] for name in hits}
    holders = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    for name, linear in chosen.items():
        if holders.count(id(linear.weight)) > 1:  # a merge would change one side of the tie alone
            raise CheckpointError(f"lora target {name} shares its weight with another layer; leave it out")
    return chosen
