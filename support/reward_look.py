"""What a reward model's run measures, and what it prints and draws."""

from collections import Counter
from functools import partial

import torch

from data import task_of
from support.reward_report import calibration, consistency, length_figures, write_report
from support.reward_samples import probe_samples, rank_pairs, score_texts


class Look:
    """What a run shows beside its steps: before(), at_step() each, after().

    pairs, groups: of each split, see `fitting_groups`. sampler: (policy, its tokenizer), on whose answers the report
    measures best-of-n; or None. loss_of: a row of reward_model.LOSSES; the last two are functions of reward_model.py.
    """

    def __init__(self, run, pairs, groups, sampler, autocast, loss_of, open_reward_model, best_of_n):
        self.run, self.pairs, self.groups, self.sampler, self.autocast = run, pairs, groups, sampler, autocast
        self.loss_of, self.open_reward_model, self.best_of_n = loss_of, open_reward_model, best_of_n

    def loss(self, chosen, rejected):
        """The loss of scores (n,) each, a float."""
        return self.loss_of(chosen, rejected, self.run.config.margin)[1]["loss"]

    def rank(self, model, split):
        """See `rank_pairs`."""
        run, pad = self.run, self.run.tokenizer.endoftext_id
        return rank_pairs(model, self.groups[split], self.pairs[split], pad, run.dist, self.autocast)

    def before(self, init):
        """The test split under the new head, unless an earlier part of the run has read it; and the line before the
        first step."""
        run, pairs = self.run, self.pairs["train"]
        if run.state.before is None:
            run.state.before = self.rank(run.model, "test")[1]["all"]
        if run.dist.is_main:
            accuracy, low, high, _ = run.state.before
            kinds = Counter(pair.kind for pair in pairs)
            print(
                f"{run.model.num_params():,} parameters from {init}; {len(pairs):,} training pairs "
                f"({', '.join(f'{n:,} {kind}' for kind, n in kinds.items())}), {run.config.steps} steps of "
                f"{run.config.batch} = {run.config.steps * run.config.batch / len(pairs):.1f} epochs; test pairs "
                f"ranked rightly before: {accuracy:.1%} [{low:.1%}, {high:.1%}]"
            )

    def at_step(self, step, record):
        """Log a step, and every --eval_every steps how the validation pairs are ranked; keep the best checkpoint."""
        run, record = self.run, dict(record)
        if run.due(run.config.eval_every):
            scores, by_kind = self.rank(run.model, "valid")
            record |= {f"valid_{kind}": row[0] for kind, row in by_kind.items()}
            record["valid_loss"] = self.loss(*torch.from_numpy(scores).unbind(1))
            shown = ", ".join(f"{kind} {row[0]:.1%}" for kind, row in by_kind.items())
            run.say(f"step {step + 1}  loss {record['loss']:.3f}  validation accuracy: {shown}")
            run.keep_best(by_kind["all"][0])
        run.log(step + 1, **record)
        run.bar.set_postfix(loss=f"{record['loss']:.3f}", **run.best_so_far())

    def after(self):
        """The test split again, with the checkpoint of the highest validation accuracy; the report."""
        run, config, dist = self.run, self.run.config, self.run.dist
        judge, tokenizer, path = self.open_reward_model(run.path, dist.device)
        scores, by_kind = self.rank(judge, "test")
        report = {"by_kind": by_kind, "before": run.state.before, "scores": scores.tolist()}
        if config.loss == "bradley_terry" and config.margin == 0:  # then differences of scores are log-odds
            report["calibration"], report["calibration_error"] = calibration(scores[:, 0] - scores[:, 1])
        report |= length_figures(self.groups["test"], scores)
        task = task_of(config.data)
        if task.rename and task.corruptions:  # scores under new names can be compared
            score = partial(score_texts, judge, tokenizer, dist=dist, autocast=self.autocast)
            report |= consistency(score, 200, config.seed, tuple(config.levels), config.data)
        if self.sampler is not None:
            sizes = [2**i for i in range(config.best_of.bit_length())]  # 1, 2, 4 … up to --best_of
            samples = (*self.sampler, tokenizer, config, sizes)
            sampled_scores, correct, figures = probe_samples(judge, *samples, dist, self.autocast)
            accuracies = self.best_of_n(sampled_scores, correct, sizes)
            report |= {"best_of": {str(n): x for n, x in zip(sizes, accuracies, strict=True)}} | figures
        if dist.is_main:
            equal_loss = self.loss(torch.zeros(1), torch.zeros(1))
            write_report(config, run.path, len(self.pairs["test"]), report, judge.num_params(), equal_loss)
            print(f"{path}, {run.path}/curves.png, {run.path}/report.png, {run.path}/report.json")
        accuracy, low, high, _ = by_kind["all"]
        return {"accuracy": accuracy, "low": low, "high": high, "path": str(path)} | report
