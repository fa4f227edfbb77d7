"""Agents: a policy that calls tools while it answers; several turns, one reward (the mask: ReTool, arXiv:2504.11536).

The policy writes an expression, a calculator replies inside the same row of tokens, and the policy goes on:

    Tom has <<3127+2489=5616>>5616 apples.           the policy wrote `Tom has <<3127+2489=`, the calculator `5616>>`

Such an answer to a question q, a trajectory y = y_1 … y_T, has two authors: m_t = 1 where the policy sampled y_t, 0
where a tool wrote it. What is the gradient of its mean reward?

    p(y | q)     = Π_t π(y_t | q, y_<t)^(m_t) · P(y_t | q, y_<t)^(1 − m_t)        P: the tools, whatever they do
    ∇log p(y)    = Σ_t m_t ∇log π(y_t | q, y_<t)                                  because ∇P = 0
    ∇E[r(y)]     = E[(r(y) − c) Σ_t m_t ∇log π(y_t | q, y_<t)]                    any c that does not see y

So this is grpo.py with the mask m: loss, ratio, clip, KL and |y| are those of the policy's tokens. (ReTool has this
mask in PPO; its tool runs code.) Attention sees all tokens, and --max_new_tokens counts them all. A trajectory is one
answer, however many turns it has: it earns one reward, has one advantage, and counts once in its group's statistics.

One step, for one process (main has the same parts; the loss and the advantages are grpo.py's):

    for t in range(max_new_tokens):                  one `generate` for all rows, each in a turn of its own  1. ask
        if queue: token = queue.pop(0)               a tool is replying: mask False
        else:     token = sample(π)                  mask True
                  if the policy's text now ends with a call:
                      queue = encode(reply_to(tools, text))      ids, never decoded and encoded again
    batch   = ids, mask, log π_old                   (N·R, T) each, T with the tools' tokens
    rewards = paid_rewards(batch)                    (N, R, 2) of whole trajectories                         2. judge
    A       = group_advantages(rewards · weights)    (N, R) one per trajectory                               3. compare
    for minibatch in minibatches_of(batch, mask):                                                            4. update
        for piece in minibatch:                      b answers
            logprobs = shared_answer_logprobs(model, piece)      entry t: log π of token t, whoever wrote it   (b, T)
            loss     = grpo_loss(logprobs, old, A, mask, ref)    old, ref: log π_old, log π_ref
            backward
        clip the gradient's norm, optimizer step
    log; every so often answer validation questions, with the tools                                          5. look

The defaults: 16 questions × 8 answers, β = 0.1, stories with numbers of up to four digits, in two or three steps; the
start is pretrained on them, then fine-tuned on 300 demonstrations of calls, the tools' tokens without a loss there too,
until half of the answers are right (at most 200 steps). support/calls_start.py refuses some of grpo.py's options.

Traps:
  * The tools' tokens in the loss (--train_on_tools true does it, to see what happens). π did not choose them: their
    ∇log π pulls at logits that have no part in E[r] (`demo`), and weights are shared, so at the policy's tokens too. It
    cost 4.7 points [2.6, 6.8] and made the logged KL meaningless (results/tools.md).
  * Decoding, appending the reply, encoding again. Many lists of ids make one text, and encoding gives one of them, not
    always the sampled one (`demo`: a merge across a reply's end). Then ρ compares log π of different tokens.
  * The end token is sampled, so m = 1 on it. A loop that drops it when it puts turns together never trains stopping.
  * An answer that the length limit cuts off, even inside a call, is scored and trained on as it stands: left out of the
    loss, too long an answer would cost nothing.
  * A call is seen only where a token ends: not at all where its `=` is part of a longer token, such as `=⏎`.
  * What a tool writes comes from outside: it is encoded as plain characters, so it cannot hold <|im_end|>. A call's
    argument comes from the policy: the function must survive any text, so no `eval`.
  * The tools are this script's. evaluate.py, generate.py and the other stages have none: there a policy that calls one
    has to guess the reply.

Simplified: a tool's tokens go through the model one by one, and all rows wait for a slow tool (verl and slime let other
rows go on). Where two patterns fit, the first tool replies.

Run it:
    python agent.py --demo                                             # masks and gradients by hand
    python agent.py                                                    # from nothing, minutes on two CPU cores
    python agent.py --tools '[]' --name alone                          # the same problems without a tool
    python agent.py --tools '[own:prices,calculator]'                  # `prices` in own.py, a Tool as in `demo`
    python agent.py --config configs/gsm8k_agent_smollm2.yaml          # GSM8K, whose solutions show calls
"""

import itertools
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from torch.nn.parallel import DistributedDataParallel

import grpo
from generate import generate
from grpo import grpo_loss, paid_rewards, reward_sums
from lora import add_lora
from optim import lr_at, optimizer_step
from support.calculator import calculator
from support.calls_start import calls_start, check_agent
from support.checks import Amount, Count
from support.cli import run_script
from support.family import loss_options
from support.grpo_report import rollout_sums, step_record, tally
from support.policy_run import begin_run, open_start, signals
from support.rewards import judge_batch
from support.rollouts import Sampler, cut, groups_in_turn, minibatches_of, piece_logprobs, reference_logprobs
from support.sharding import averaging
from support.shared_prompt import shared_answer_logprobs
from support.tasks import LARGE_TASK
from support.tools import END, ask, code_of_tools, load_tools
from tokenizer_bpe import BPETokenizer, ByteTokenizer

# ---------------------------------------------------------------------------------------------------------------
# Tools, and who wrote which token.


@dataclass(frozen=True)
class Tool:
    """pattern: a regular expression with one group, the argument of a call. Where the policy's text since the last
    reply ends with a match, function(argument) and END, the text >>, are written after it. seconds: how long the
    function may take, None if it is known to be quick. An error becomes a reply too: see support/tools.py."""

    name: str
    pattern: str
    function: Callable[[str], str]
    seconds: float | None = None


TOOLS = {"calculator": Tool("calculator", r"<<([^<>=\n]*)=", calculator)}


def reply_to(tools, text):
    """What is written after this text: the reply of the tool whose call ends here, or None."""
    for tool in tools:
        if call := re.search(rf"(?:{tool.pattern})\Z", text):
            return ask(tool, call[1]) + END
    return None


class Calls:
    """The calls in N·R rows while they are written: `generate` shows it the newest tokens, and asks for the next."""

    def __init__(self, tools, tokenizer, rows):
        self.tools, self.tokenizer = tools, tokenizer
        self.since_reply = [[] for _ in range(rows)]  # ids that the policy has sampled since a tool last replied
        self.queue = [[] for _ in range(rows)]  # ids of a reply that are still to come
        self.forced = [-1] * rows  # the id that the row takes instead of sampling, −1: it samples
        self.replies = []  # to all calls, for the record

    def __call__(self, ids, taken):
        """The newest tokens, and which rows took one -> the next ids, −1 where a row samples; (N·R,) each."""
        newest = ids.tolist()
        for row in taken.nonzero().flatten().tolist():
            if self.forced[row] < 0:  # the newest token was sampled
                self.since_reply[row].append(newest[row])
                text = self.tokenizer.decode_answer(self.since_reply[row])  # whole: a letter may span two tokens
                if (reply := reply_to(self.tools, text)) is not None:
                    self.replies.append(reply)
                    self.queue[row], self.since_reply[row] = self.tokenizer.encode(reply), []
            self.forced[row] = self.queue[row].pop(0) if self.queue[row] else -1  # for the next step
        return torch.tensor(self.forced)


class WithTools:
    """`generate` with tools: the same arguments, the same Rollout, whose mask is False on what a tool wrote."""

    def __init__(self, tools, tokenizer):
        self.tools, self.tokenizer, self.replies = tools, tokenizer, []

    def __call__(self, model, prompts, max_new_tokens, n=1, *more, **options):
        calls = Calls(self.tools, self.tokenizer, len(prompts) * n)
        self.replies = calls.replies  # of the last `generate`, for the record
        return generate(model, prompts, max_new_tokens, n, *more, write=calls, **options)

    def sums(self):
        """Of the last `generate`, over its rows: {metric: number}."""
        return {"calls": len(self.replies), "call_errors": sum(r.startswith("error") for r in self.replies)}


# ---------------------------------------------------------------------------------------------------------------
# By hand.


def demo():
    """Two rows in different turns; a border that encoding again would move; the gradient with and without the mask."""
    prices = Tool("prices", r"<<price of (\w+)=", lambda thing: {"kite": "12"}.get(thing, "error: no such thing"))
    tokenizer, texts = ByteTokenizer(), ["<<price of kite=A kite: 12.", "<<3*(4=?<<3*4=12."]  # an id is a letter
    calls, live = Calls([prices, TOOLS["calculator"]], tokenizer, 2), torch.tensor([True, True])
    sampled = [[*tokenizer.encode(text), tokenizer.im_end_id] for text in texts]  # what the policy is going to sample
    rows, masks, forced = [[], []], ["", ""], [-1, -1]
    while live.any():  # as `generate` does
        for row in live.nonzero().flatten().tolist():
            rows[row].append(sampled[row].pop(0) if forced[row] < 0 else forced[row])
            masks[row] += "1" if forced[row] < 0 else "0"
        newest = torch.tensor([ids[-1] for ids in rows])
        forced, live = calls(newest, live).tolist(), live & (newest != tokenizer.im_end_id)
    shown = ["".join("∎" if i == tokenizer.im_end_id else chr(i) for i in ids) for ids in rows]
    assert shown == ["<<price of kite=12>>A kite: 12.∎", "<<3*(4=error: a ( without its )>>?<<3*4=12>>12.∎"]
    assert masks == ["1" * 16 + "0" * 4 + "1" * 12, "1" * 7 + "0" * 26 + "1" * 7 + "0" * 4 + "1" * 4]
    print("two rows of tokens, here of one letter each, and their masks; ∎ is the end token")
    print("".join(f"  {text}\n  {mask}\n" for text, mask in zip(shown, masks, strict=True)), end="")

    tokenizer = BPETokenizer.train(["1>>1>>.1>>."], 261)  # it learns >>, then >>.
    both = tokenizer.encode("12>>") + tokenizer.encode("."), tokenizer.encode("12>>.")
    written, again = (" ".join(tokenizer.decode([i]) for i in ids) for ids in both)
    assert (written, again) == ("1 2 >> .", "1 2 >>.")
    print(f"a tool wrote 12>>, the policy a full stop: the tokens are {written}   encoded again they would be {again}")

    # The policy calls a or b, the tool replies 1 with probability 3/4 or 1/4, the policy writes 0 or 1. The reward is 1
    # if the tool replied 1 and the policy wrote 1.
    P = torch.tensor([[1 / 4, 3 / 4], [3 / 4, 1 / 4]])  # (call, reply)
    logits = [torch.zeros(shape, requires_grad=True) for shape in ((2,), (2, 2), (2, 2, 2))]  # of each token, all π = ½
    call, guess, last = (x.log_softmax(-1) for x in logits)  # guess: π of the tool's token, drawn by P
    i, j, k = torch.tensor(list(itertools.product((0, 1), repeat=3))).T  # (8,) each: all trajectories
    logprobs = torch.stack([call[i], guess[i, j], last[i, j, k]], dim=1)  # (8, 3)
    p, r = (call[i] + last[i, j, k]).exp() * P[i, j], (j * k).float()  # (8,) their probabilities, and rewards
    exact = torch.autograd.grad((p * r).sum(), (logits[0], logits[2]), retain_graph=True)
    assert exact[0].tolist() == [1 / 16, -1 / 16]  # π(a) (E[r | a] − E[r]) = ½ (3/8 − 1/4)
    print("call a or b, reply 1 with P = 3/4, 1/4, write 0 or 1, π = 1/2, r = 1 if both are 1: the gradient of E[r]")
    print(f"  {'by the logit of':<24}call a   the tool's 1 after a\n  {'exact':<24}{exact[0][0]:+.4f}  {0:+.4f}")
    for name, mask, wrong in (("m = 1 0 1", [1, 0, 1], 0.0), ("all tokens", [1, 1, 1], 1 / 16)):
        A = 8 * p.detach() * (r - 1 / 4)  # the loss is a plain mean over 8 rows: 8 p weighs each by its probability
        options = {"mask": torch.tensor([mask] * 8), "loss_type": "dr_grpo", "max_length": 1}  # v_t = 1/8
        loss, _ = grpo_loss(logprobs, logprobs.detach(), A, **options)
        of_call, of_guess, of_last = (-g for g in torch.autograd.grad(loss, logits, retain_graph=True))
        torch.testing.assert_close([of_call, of_last], list(exact))
        torch.testing.assert_close(of_guess[0, 1], torch.tensor(wrong))  # ½ Σ_j P(j | a) (j/2 − ¼) (1[j = 1] − ½)
        print(f"  {'−∇loss, ' + name:<24}{of_call[0]:+.4f}  {of_guess[0, 1] + 0.0:+.4f}")


# ---------------------------------------------------------------------------------------------------------------
# The stage. All other flags, such as --rollouts (R) and --clip_low, are those of grpo.py.


@dataclass
class Config(grpo.Config):
    """Train a policy that calls tools, with verifiable rewards (GRPO)."""

    data: str = LARGE_TASK
    levels: list[int] = field(default_factory=lambda: [2, 3])
    name: str = "agent"
    tools: list[str] = field(default_factory=lambda: ["calculator"])
    """What the policy may call: calculator, or tools of your own as module:name. '[]': none."""
    teach: str | None = None
    """Checkpoint that is first fine-tuned on demonstrations of calls; default: one that is pretrained for it."""
    demonstrations: Count = 300
    """How many of them."""
    train_on_tools: bool = False
    """The mistake, to see it: the tools' tokens count in the loss as if the policy had sampled them."""
    steps: Count = 300
    prompts: Count = 16
    max_new_tokens: Count = 120
    """Longest answer, in tokens, with those of the tools."""
    lr: Amount = 3e-4
    beta: Amount | None = None
    """Weight of the KL to the reference; default 0.1, with another --algorithm what that sets."""

    def __post_init__(self):
        if self.beta is None and self.algorithm == "grpo":
            self.beta = 0.1
        super().__post_init__()
        check_agent(self)


def main(config):
    """Train; returns {"before", "after"} (test figures), "kl", "path" and the wall time in seconds.

    grpo.main's loop: `respond` lets tools reply, the mask leaves out what they wrote. No --refill, --stale, --fsdp."""
    tools = load_tools(config.tools, TOOLS)
    start = open_start(config, grpo.REWARDS, partial(calls_start, tools=tools, with_tools=WithTools))
    dist, autocast, scaler = start.dist, start.autocast, start.scaler
    policy, reference = start.policy, start.reference  # with LoRA π_ref is the policy itself, its adapters off
    n, slots = start.n, start.slots  # this rank asks n of a step's N questions; their numbers among the N
    functions, reward_weights, pad = start.functions, start.reward_weights, start.tokenizer.endoftext_id
    add_lora(policy, **asdict(config.lora), seed=config.seed)  # --lora.rank 0, the default, changes nothing
    policy.eval()  # throughout: with dropout the ratio on fresh rollouts would not be 1

    respond = WithTools(tools, start.tokenizer)
    sample = Sampler(policy, start.tokenizer, start.problems["train"], config, autocast, respond=respond)
    signal_of = signals(config, reward_weights, grpo.advantages_of, paid_rewards)  # batch -> (n,) bool
    reads = code_of_tools(config.tools, respond.tools)  # a resumed run must have the same
    run, look, recorder = begin_run(start, sample, signal_of, reads=reads)  # recorder: what view.py shows
    model = DistributedDataParallel(policy, broadcast_buffers=False) if dist.world > 1 else policy

    groups = groups_in_turn(slots, config.minibatches)  # of each minibatch: which of this rank's n groups are in it
    loss_of = recorder.noted(partial(grpo.grpo_loss, **loss_options(config)))
    for step in run.steps():
        # 1. ask: the policy answers each question R times, with the tools
        batch = sample(step, slots)

        # 2. judge: {name: (n, R)} in batch.rewards
        judge_batch(functions, batch, config)
        paid = paid_rewards(batch, reward_weights, config)  # (n, R, M)
        rollout_totals = rollout_sums(batch, paid, reward_weights, signal_of(batch)) | respond.sums()
        mask, old_logprobs = batch.rollout.mask, batch.rollout.logprobs  # (n·R, T) each: m, and log π_old where m = 1
        if config.train_on_tools:
            mask = mask | batch.rollout.written  # (n·R, T) True on what a tool wrote, which has no sampled log π_old
            pieces = cut(batch, range(n), mask, config.micro_batch, pad)
            old_logprobs = piece_logprobs(policy, pieces, batch, config.temperature, autocast)

        # 3. compare within the group, over all ranks; a trajectory counts once, however many turns it has
        lengths = dist.gather(mask.sum(1).view(n, -1).cpu())  # (N, R)
        advantages, _ = grpo.advantages_of(dist.gather(paid), reward_weights, config, lengths)  # (N, R)
        advantages = advantages[slots]  # (n, R)
        recorder.answers(batch, advantages)

        # 4. update: an optimizer step for each minibatch, from the second on ρ ≠ 1; none where no group has a signal
        minibatches = minibatches_of(batch, groups, mask, config, pad, dist, advantages)  # of groups with an A ≠ 0
        ref_logprobs = None
        if config.beta or step == 0 or run.due(config.eval_every):  # to pay the KL, or to log it now and then
            pieces = [piece for minibatch in minibatches for piece in minibatch.pieces]
            ref_logprobs = reference_logprobs(reference, policy, pieces, batch, config, autocast)
        A = advantages.flatten().to(dist.device)  # (n·R,)
        lr = lr_at(step, config.steps, config.lr, config.warmup, floor=0.0, schedule="linear")
        update_sums, norm = {}, 0.0
        for minibatch in minibatches * config.inner_epochs:
            for piece in minibatch.pieces:
                rows, T = piece.rows, piece.mask.shape[1]  # its b rows of the batch; its mask, (b, T), is m
                # The ranks average their gradients in the last backward alone
                with averaging(model, piece is minibatch.pieces[-1]):
                    with autocast():  # of all tokens, whoever wrote them, without the padding to a multiple of 8
                        logprobs = shared_answer_logprobs(model, piece.packed, config.temperature)[:, :T]  # (b, T)
                    ref = None if ref_logprobs is None else ref_logprobs[rows, :T]  # (b, T)
                    old = old_logprobs[rows, :T]  # (b, T)
                    loss, metrics = loss_of(logprobs, old, A[rows], piece.mask, ref, **minibatch.counts)  # A[rows] (b,)
                    recorder.tokens(rows)
                    # × world, because DDP averages over the ranks, and the counts are of all ranks
                    scaler.scale(loss * dist.world).backward()
                tally(update_sums, metrics, piece.mask.sum().item())
            norm = optimizer_step(policy, run.optimizers, scaler, autocast, lr, config.clip)
            run.check_finite(lr, norm)

        # 5. look: log the step; every so often answer validation questions, with the tools
        record = step_record(rollout_totals, update_sums, len(minibatches) * config.inner_epochs, config, dist)
        look.at_step(record, batch, reward_sums(paid, reward_weights), norm, lr)
    run.close()
    return look.after()


if __name__ == "__main__":
    run_script(main, Config, __doc__, demo)
