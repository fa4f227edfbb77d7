"""The bidirectional form of a reward model: python reward_model.py --backbone encoder."""

from dataclasses import replace

from encoder import Encoder
from support.text_batches import pad_rows


class RewardEncoder(Encoder):
    """The bidirectional form: nothing has to be predicted, so every token may see the whole answer. The score is a
    linear function of the mean of the states, (B, 1). Its checkpoint opens here alone, not in transformers."""

    pad_id = None

    def __init__(self, config):
        super().__init__(replace(config, n_class=1))
        for part in (self.transform, self.transform_norm):  # unused here, and DDP would wait for their gradients
            part.requires_grad_(False)
        self.token_bias.requires_grad_(False)

    @classmethod
    def from_policy(cls, policy, dropout=0.0, seed=0, extra=0):
        """From an encoder or a decoder."""
        return cls.from_trunk(policy, dropout, seed, n_class=1, n_layer=policy.config.n_layer + extra)

    @staticmethod
    def pack(groups, pad, device="cpu"):
        """-> tokens, real (k, T). No prompt is shared: its states depend on the answer after it."""
        texts = [[*prompt, *answer] for prompt, answers in groups for answer in answers]
        tokens, real = pad_rows(texts, pad)
        return tokens.to(device), real.to(device)

    @staticmethod
    def read(model, packed):
        """-> the score of each answer, (k,)."""
        return model(*packed).squeeze(1).float()
