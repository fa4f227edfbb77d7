"""What a fine-tuning run measures and leaves to read: answers to validation problems, the test split, the curves."""

import torch

from evaluate import METRICS, evaluate, evaluate_samples, token_f1
from lora import merged
from support.answers import measure_of
from support.checkpoints import open_checkpoint
from support.held_out import add_figures, logged, metric_panels
from support.plots import draw_curves
from support.tables import metric_rows, sample_rows, text_table
from transformer import token_logprobs


class Look:
    """What a run shows beside its steps: before(), at_step() each, after(). problems: {"valid", "test"} at least.
    valid_loss: a function that returns the loss on the validation split's solutions, or None if there is none. respond:
    what answers the problems, as in `evaluate`; None: the policy alone."""

    def __init__(self, run, problems, valid_loss, respond=None):
        self.run, self.problems, self.valid_loss = run, problems, valid_loss
        self.sizes = run.config.max_new_tokens, run.dist
        self.answering = {"respond": respond, "dtype": run.config.dtype}
        self.metric = measure_of(problems["valid"])  # accuracy; f1 where no problem has an answer to verify

    def before(self, init, n_examples):
        """The line before the first step."""
        run, steps, batch = self.run, self.run.config.steps, self.run.config.batch
        if run.dist.is_main:
            print(
                f"{run.model.num_params():,} parameters from {init}; {n_examples:,} training examples, {steps} steps "
                f"of {batch} = {steps * batch / n_examples:.1f} epochs"
            )

    def at_step(self, record):
        """Log a step's record; every --eval_every steps answer the validation problems too, and keep the best
        checkpoint."""
        run, config, metric = self.run, self.run.config, self.metric
        step, loss = run.done + 1, f"{record['loss']:.3f}"
        if run.due(config.eval_every):
            with merged(run.model):  # LoRA's adapters, if any, are merged for the time of the evaluation
                result = evaluate(run.model, run.tokenizer, self.problems["valid"], *self.sizes, **self.answering)
            held_out = ""
            if self.valid_loss:
                record["valid_loss"] = self.valid_loss()
                held_out = f", held out {record['valid_loss']:.3f}"
            add_figures(record, logged(result, "f1", "length") | {metric: result[metric]})
            run.say(f"step {step}  loss {loss}{held_out}  validation {metric} {result[metric]:.1%}")
            write_samples(run.log, step, result["answers"][:3])
            run.keep_best(result[metric])
        run.log(step, **record)
        run.bar.set_postfix(loss=loss, lr=f"{record['lr']:.1e}", **run.best_so_far())

    def after(self):
        """The test split, with the checkpoint that the validation split chose -> what sft.main returns."""
        run, config, test = self.run, self.run.config, self.problems["test"]
        policy, tokenizer, path = open_checkpoint(run.path, run.dist.device)
        sampled, result = {}, evaluate(policy, tokenizer, test, *self.sizes, **self.answering)
        if config.samples:
            asked = self.answering | {"seed": config.seed}
            sampled = evaluate_samples(policy, tokenizer, test, config.samples, *self.sizes, **asked)
        test_metric = measure_of(test)
        if run.dist.is_main:
            report(config, run.path, result, sampled, (self.metric, test_metric), policy.num_params(), path)
        figures = {k: result[k] for k in ("accuracy", "low", "high", "f1")} | sampled
        return figures | {"valid": run.state.best, "test": result[test_metric], "path": str(path)}


@torch.no_grad()
def validation_loss(model, examples, pad, micro_batch, autocast, dist, collate, sft_loss):
    """sft_loss of all the examples, (ids, flags) each, as one batch: nats per token that counts. The ranks share them.
    A rank with no examples left reads one with a mask of 0: under FSDP every forward pass needs all ranks. collate,
    sft_loss: sft.py's, which imports this file."""
    model.eval()
    total, by_length = 0.0, sorted(examples, key=lambda example: len(example[0]))  # less padding
    nothing = [(ids, [0] * len(ids)) for ids, _ in by_length[:1]]
    for i in range(0, len(examples), micro_batch * dist.world):
        own = by_length[i + dist.rank * micro_batch :][:micro_batch] or nothing
        micro = collate(own, pad).to(dist.device)  # (b, T)
        loss_mask = micro.loss_mask[:, 1:]
        with autocast():
            logprobs = token_logprobs(model, micro.tokens, counted=loss_mask > 0)  # (b, T − 1)
        total += sft_loss(logprobs, loss_mask, n_tokens=1)[1]["loss"]  # divided by 1: the sum
    (total,) = dist.sum(total)
    return total / sum(sum(flags) for _, flags in examples)


def write_samples(log, step, samples):
    """Answers to validation problems, and whether they are right, to samples.md."""
    shown = []
    for s in samples:
        verdict = "right" if s.correct else f"wrong, the answer is {s.problem.answer}"
        verdict = verdict if s.problem.answer else f"token F1 {token_f1(s.text, s.problem.solution):.2f}"
        shown.append(f"**step {step}, {verdict}**\n\n> {s.problem.question}\n\n```\n{s.text}\n```")
    log.samples(step, "\n\n".join(shown))


def report(config, run_path, result, sampled, metrics, n_params, path):
    """Print the table of the test split, draw the curves. metrics: `measure_of` the validation split and of the test
    split."""
    hidden, hidden_in_test = (("accuracy",) if metric == "f1" else () for metric in metrics)
    both_kinds = [("right, or token F1", {"own_measure": "validation"}, "mean of problems", {})]
    draw_curves(
        run_path,
        f"SFT on {config.data}, seed {config.seed}, {n_params / 1e6:.1f} M parameters",
        [
            ("loss on the answers", {"loss": "train", "valid_loss": "validation"}, "nats per token", {}),
            *metric_panels("f1", without=hidden),
            *(both_kinds if metrics[0] == "own_measure" else []),
            ("gradient norm", {"grad_norm": "before clipping"}, "norm", {}),
        ],
    )
    rows = metric_rows([result], METRICS, hidden_in_test)
    rows += [] if hidden_in_test else sample_rows([sampled], result["n"])
    print(text_table([["held-out test", f"{result['n']} problems"], *rows]))
    print(f"{path}, {run_path}/curves.png")
