"""A stage on problems whose answers can be checked: its flags, judged samples, its figures.

groups   = judged_answers(sample, step, config, dist)            N of (prompt, R of (ids, right, ended))
figures  = measure_start(run, problems, init), measure_valid(run, problems), measure_end(run, problems, init)
look_at_step(run, problems, record)                              what a step logs, validation, best/
"""

import itertools
from dataclasses import dataclass, field

from tqdm import tqdm

from data import DEFAULT_TASK, TASKS, encode_prompt, task_of
from evaluate import evaluate, is_correct
from lora import LoraConfig, merged
from support.checkpoints import open_checkpoint
from support.checks import Amount, Count
from support.errors import ConfigError
from support.held_out import add_figures, logged
from support.questions import measure_test
from support.runs import RunConfig
from support.sampled_kl import sampled_kl
from support.sft_report import write_samples
from support.tasks import refuse_levels


@dataclass
class PolicyConfig(RunConfig):
    """The flags of a stage that trains a policy from its own answers, beside those of every stage."""

    data: str = DEFAULT_TASK
    """The name of a task (default: built-in problems), gsm8k, or the path of a .jsonl of questions and answers."""
    levels: list[int] = field(default_factory=lambda: [1, 2])
    """Difficulty levels of the task's problems; the built-in ones have 1 to 3 steps."""
    init: str | None = None
    """SFT checkpoint to start from, and the reference if there is one; default: one trained once into runs/start."""
    lr: Amount = 2e-4
    """Peak learning rate: a tenth of SFT's, as the policy is to stay near what it samples."""
    max_new_tokens: Count = 64
    """Longest answer, in tokens."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Train low-rank adapters instead of all weights: --lora.rank 8."""

    def __post_init__(self):
        super().__post_init__()
        if self.init is None and self.data not in TASKS and not getattr(self, "teach", None):
            raise ConfigError(f"--data {self.data} needs an SFT checkpoint to start from: --init runs/sft")
        refuse_levels(self)


@dataclass
class VerifiedConfig(PolicyConfig):
    """Of one whose answers can be checked."""

    instruction: str = ""
    """Text after each question that says how to answer, for models that were not fine-tuned on this data."""
    prompts: Count = 512
    """Problems N that are answered at a time, over all ranks."""
    rollouts: Count = 8
    """Sampled answers R to each problem."""
    temperature: Amount = 1.0
    """Sampling temperature; 0 is greedy."""
    eval_problems: Count = 200
    """Validation problems per evaluation."""
    test_problems: Count = 1000
    """Test problems of the evaluations before and after training."""
    pass_problems: Count = 100
    """How many of the test problems are sampled for pass@k."""
    pass_samples: Count = 16
    """Samples per problem, and the largest k."""
    micro_batch: Count | None = None
    """Answers per forward pass of one rank, whole groups; default 128 for `word` (short rows), else 32."""

    def __post_init__(self):
        super().__post_init__()
        if self.micro_batch is None:
            self.micro_batch = task_of(self.data).micro_batch
        if self.temperature == 0 and self.rollouts > 1:
            raise ConfigError(f"--temperature 0 samples the same answer {self.rollouts} times; use --rollouts 1")


def judged_answers(sample, step, config, dist, chunk=64):
    """The answers to the `config.prompts` problems of a step, and what the verifier says: N of (prompt ids, [(answer
    ids, right, ended), …R]). sample: a `support.rollouts.Sampler`. The ranks split the work, `chunk` problems at a
    time; every rank gets the answers that one would."""
    R = config.rollouts

    def work(chunks):
        shown = {"desc": "sampling", "unit": "chunk", "leave": False}
        for slots in tqdm(chunks, **shown, disable=None if dist.is_main else True):  # None: on a terminal alone
            batch = sample(step, slots)
            problems = [problem for problem in batch.problems for _ in range(R)]
            right = [is_correct(text, problem) for text, problem in zip(batch.texts, problems, strict=True)]  # n·R
            groups = zip(batch.prompts, batch.answers, batch.ended.tolist(), strict=True)
            yield [
                (prompt, list(zip(answers, right[g * R : g * R + R], ended, strict=True)))
                for g, (prompt, answers, ended) in enumerate(groups)
            ]

    sizes = [len(problem.question) for problem in sample.asked(step)]
    slots = sorted(range(config.prompts), key=sizes.__getitem__)  # by length: less padding
    results = dist.split_work([slots[i : i + chunk] for i in range(0, len(slots), chunk)], work)
    by_slot = dict(zip(slots, itertools.chain(*results), strict=True))
    return [by_slot[slot] for slot in range(config.prompts)]


def measure_valid(run, problems, step=None):
    """Greedy answers to the validation problems -> {metric: value}, what is logged of them; three go to samples.md.
    step: default the current one."""
    with merged(run.model):
        sizes = run.config.max_new_tokens, run.dist
        result = evaluate(run.model, run.tokenizer, problems["valid"], *sizes, dtype=run.config.dtype)
    write_samples(run.log, run.done + 1 if step is None else step, result["answers"][:3])
    return logged(result)


def measure_start(run, problems, init):
    """Before the first step: `run.state.before`, the test split; `run.state.start`, the validation split, which is
    logged as step 0; and best/, the start itself. A resumed run knows all three."""
    if run.state.before is None:
        run.state.before = measure_test(run.model, run.tokenizer, problems, run.config, run.dist)
        run.state.start = measure_valid(run, problems, step=0)
        run.keep_best(run.state.start["accuracy"])
    if run.first == 0:  # a run that was stopped before its first step has not kept it
        run.log(0, **run.state.start)
    if run.dist.is_main:
        accuracy = f"{run.state.before['accuracy']:.1%}"
        print(f"{run.model.num_params():,} parameters from {init}; test accuracy before: {accuracy}")


def look_at_step(run, problems, record, shown=(), **more):
    """Log the record of a step, with validation figures if they are due, by whose accuracy best/ is kept. On the
    progress bar: the figures `shown` of the record, and `more`."""
    if run.due(run.config.eval_every):
        add_figures(record, measure_valid(run, problems))
        run.keep_best(record["accuracy"])
    run.log(run.done + 1, **record)
    brief = {name: f"{record[name]:.3f}" for name in shown if name in record}
    run.bar.set_postfix(brief | more | run.best_so_far())


def measure_end(run, problems, init):
    """After the last step, of best/: {"before", "after"} (test figures), "kl" to the checkpoint `init` (nats per token,
    one answer to each of 200 test problems), "seconds" and "path"."""
    config, dist = run.config, run.dist
    policy, tokenizer, path = open_checkpoint(run.path, dist.device)
    after = measure_test(policy, tokenizer, problems, config, dist)
    prompts = [encode_prompt(tokenizer, p) for p in problems["test"][:200]]
    start, _, _ = open_checkpoint(init, dist.device)
    kl = sampled_kl(policy, start, tokenizer, prompts, config.max_new_tokens, dist, config.seed)
    return {"before": run.state.before, "after": after, "kl": kl, "seconds": run.seconds, "path": str(path)}
