"""Where a run of encoder.py stands: its log, both validations, and at the end the test split beside a bag of words."""

from evaluate import wilson
from support.classification import bag_of_words, confusion_table, judge_labels, predict, validate_mlm, write_mistakes
from support.encoder_start import open_encoder
from support.plots import draw_curves

SENTIMENTS = ("negative", "positive")


class Look:
    """What a run shows beside its steps: before(), at_step() each, after().

    reviews: {split: Reviews}; examples: {split: [(ids, label)]} of them; streams {split: ids} and held_out, a TextBatch
    with masked tokens: the texts of masked-LM, None without it.
    """

    def __init__(self, run, reviews, examples, streams, held_out):
        self.run, self.reviews, self.examples, self.streams, self.held_out = run, reviews, examples, streams, held_out

    def before(self):
        """Print what the run will do, a line for each of its two parts."""
        run, config, examples = self.run, self.run.config, self.examples["train"]
        if not run.dist.is_main:
            return
        print(f"{run.model.num_params():,} parameters, vocabulary {run.tokenizer.vocab_size}")
        if self.streams:
            seen, n_text = config.mlm_steps * config.mlm_batch * config.model.context, len(self.streams["train"])
            print(f"masked-LM: {config.mlm_steps} steps, {seen / n_text:.1f} epochs of {n_text:,} tokens")
        n, length = len(examples), sum(len(ids) for ids, _ in examples) / len(examples)
        epochs = config.steps * config.batch / n
        print(f"labels: {config.steps} steps, {epochs:.1f} epochs of {n:,} texts of {length:.0f} tokens")

    def at_step(self, record, due):
        """Log a step's record, {"mlm_loss" or "loss", …}; if a validation is due, validate that objective, and keep the
        best classifier."""
        run, step, loss = self.run, self.run.done + 1, record.get("mlm_loss", record.get("loss"))
        if due and "mlm_loss" in record:
            record["mlm_valid_loss"] = validate_mlm(run.model, self.held_out, run.dist)
            run.say(f"step {step}  masked-LM {loss:.3f}  valid {record['mlm_valid_loss']:.3f}")
        elif due:
            result = judge_labels(run.model, self.examples["valid"], run.tokenizer.endoftext_id, run.dist)
            record |= {"accuracy": result["accuracy"], "valid_loss": result["loss"]}
            run.say(f"step {step}  loss {loss:.3f}  valid {result['loss']:.3f}, {result['accuracy']:.1%}")
            run.keep_best(result["accuracy"])
        run.log(step, **record)
        run.bar.set_postfix(loss=f"{loss:.3f}", lr=f"{record['lr']:.1e}", **run.best_so_far())

    def after(self, Encoder):
        """Judge the best checkpoint, an `Encoder`, on the test split -> what encoder.main returns. On rank 0, which
        alone has the baseline, print it beside a bag of words, write the mistakes and draw the curves."""
        run, seconds, test = self.run, self.run.seconds, self.examples["test"]
        encoder, tokenizer, path = open_encoder(Encoder, run.path, run.dist.device)
        result, words = judge_labels(encoder, test, tokenizer.endoftext_id, run.dist), {"accuracy": None}
        if run.dist.is_main:
            words = bag_of_words(self.reviews["train"], self.reviews["valid"], self.reviews["test"])
            log_p = predict(encoder, [ids for ids, _ in test], tokenizer.endoftext_id)  # (N, n_class)
            write_mistakes(run.path, self.reviews["test"], log_p.exp(), SENTIMENTS)
            report(run, encoder, result, words, f"{seconds:.0f} s; {path}")
        figures = {"accuracy": result["accuracy"], "baseline": words["accuracy"], "confusion": result["confusion"]}
        return figures | {"path": str(path)}


def report(run, encoder, result, words, where):
    """Print the confusion table and the accuracy beside that of a bag of words; draw the curves."""
    config = run.config
    panels = [
        ("classification", {"loss": "train", "valid_loss": "validation"}, "nats per text", {}),
        ("accuracy", {"train_accuracy": "train", "accuracy": "validation"}, "share right", {}),
    ]
    if config.mlm_steps:
        names = {"mlm_loss": "train", "mlm_valid_loss": "validation"}
        panels.insert(0, ("masked-LM", names, "nats per masked token", {}))
    title = f"an encoder on {config.data}, seed {config.seed}, {encoder.num_params() / 1e6:.1f} M parameters"
    draw_curves(run.path, title, panels)
    print(confusion_table(result["confusion"], SENTIMENTS))
    n = sum(map(sum, result["confusion"]))
    low, high = wilson(sum(row[i] for i, row in enumerate(result["confusion"])), n)
    print(
        f"test accuracy {result['accuracy']:.1%} [{low:.1%}, {high:.1%}] on {n} texts (validation "
        f"{run.state.best:.1%}); bag of words {words['accuracy']:.1%} (validation {words['valid']:.1%}, weight decay "
        f"{words['strength']:g}); {where}, {run.path}/curves.png"
    )
