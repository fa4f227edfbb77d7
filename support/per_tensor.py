"""What the plain optimizers of optim.py share: the loop over the weight tensors."""

import torch


class PerTensor(torch.optim.Optimizer):
    """A subclass has `update(w, g, state, **settings)`, for one tensor w of any shape with its gradient g, its memory
    `state` (a dict, empty at first, part of state_dict) and the settings of its group. It changes w in place. A tensor
    without a gradient stands still."""

    def __init__(self, params, **settings):
        super().__init__(params, settings)
        self.names = list(settings)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            settings = {name: group[name] for name in self.names}
            for w in group["params"]:
                if w.grad is not None:
                    self.update(w, w.grad, self.state[w], **settings)
