"""Decoding: turn a model into text, one row or a thousand at a time.

    token_t ~ softmax(logits_{t−1} / temperature)            drawn by token = CDF⁻¹(u), u uniform in [0, 1)

`generate`, for N prompts and n rollouts of each (a rollout is one sampled continuation, up to a *stop token*, such as
the end of a turn); B = N·n rows, fewer as rows end:

    logits, decoder = prefill(prompts, n)         each prompt is read once, all in one pass; the n rollouts
                                                  of a prompt start from copies of its cache              (N·n, V)
    for t in range(max_new_tokens):               decode: one token per row and step
        token, logprob = sample(logits, u[:, t])  u (N·n, max_new_tokens) is drawn beforehand             (B,)
        live = live and token is no stop          a row keeps its stop token
        decoder.keep(the live rows)               rows that have ended leave the batch, once that pays
        logits = decoder(token)                                                                           (B, V)
    -> ids, mask, logprobs                        completions only, padded on the right                   (N·n, T)

`generate` samples at temperature 1 from the full softmax unless told otherwise; the script is greedy (temperature 0).
Truncation and the repetition penalty are off.

    temperature           divides the logits; 0 takes the likeliest token
    top_k, top_p, min_p   the k likeliest tokens only (Fan et al. 2018); the smallest set that holds probability p
                          (arXiv:1904.09751); tokens at least min_p times as likely as the likeliest (arXiv:2407.01082)
    repetition_penalty    tokens that were there before become less likely (CTRL, arXiv:1909.05858)

The trap: rollouts for RL must sample by temperature alone. The log-probabilities that come back, and the loss that
scores them, are those of the full softmax; a truncated sampler would not be the policy that is trained. Truncation and
the penalty are for text that people read.

What makes it fast:

* the prompts of a batch are padded on the *left*, so that all rows write their next token into the same cache slot; a
  mask hides the pads, and each row counts its own positions;
* rows that have met a stop token leave the batch as soon as a quarter of it is done (half, with a CUDA graph); what
  stays is a multiple of four rows, filled up with ended ones;
* with one token per row a step is mostly the cost of starting operations: for the usual layouts `Decoder`
  (support/fast_decode.py) computes the same logits with fewer, larger operations, and on a GPU is to start them all
  at once, as a CUDA graph (not run on a GPU yet). Every other model decodes with its own forward.

What a row says does not depend on the rows beside it, on when they leave, or on how a batch is spread over GPUs: the
table u fixes all randomness beforehand. That holds up to rounding. In fp32 the rows agree; in bf16 a batch of another
size rounds differently, and a u on the border of two tokens may draw the other.

Letters: N prompts, n rollouts each (R in the chapters that train on them), B rows still in the batch, S length of the
longest prompt, T of the longest completion, V vocabulary.

Run it:
    python generate.py --checkpoint runs/sft --prompt "Tom has 5 apples. He buys 3 more. How many now?"
    python generate.py --checkpoint runs/sft          # chat; an empty line ends it
    python generate.py --demo
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from support.checkpoints import is_chat_model, open_checkpoint
from support.cli import run_script
from support.devices import answer_autocast, setup, traits
from support.errors import ConfigError
from support.fast_decode import Decoder, decoding_dtype
from support.finite import check_logprobs
from support.generate_setup import Config, check_request, prompts_that_fit, room_after, seen_in
from support.streaming import StreamedText, chat
from transformer import Transformer, TransformerConfig


@dataclass
class Rollout:
    """Completions only. T is the length of the longest; a row that ended earlier is padded."""

    ids: torch.Tensor  # (N·n, T) int64, 0 after a row's end
    mask: torch.Tensor  # (N·n, T) bool, True on sampled tokens, the stop token included
    # (N·n, T) fp32: log π of each sampled token at the sampling temperature (greedy: at 1), 0 elsewhere
    logprobs: torch.Tensor
    written: torch.Tensor | None = None  # (N·n, T) bool, True on tokens that `write` gave; None: there are none

    @property
    def rows(self):
        """N·n lists of ids, without the padding; what `write` gave is among them."""
        real = self.mask if self.written is None else self.mask | self.written
        return [ids[:length] for ids, length in zip(self.ids.tolist(), real.sum(1).tolist(), strict=True)]

    def texts(self, tokenizer):
        """The completions as strings, as rewards, metrics and reports judge them: see Tokenizer.decode_answer."""
        return [tokenizer.decode_answer(ids) for ids in self.rows]

    def ended(self, stop_ids):
        """(N·n,) bool: which rows met one of these ids, and so stopped by themselves instead of being cut off."""
        return (torch.isin(self.ids, torch.tensor(stop_ids, device=self.ids.device)) & self.mask).any(1)


# ---------------------------------------------------------------------------------------------------------------
# Sampling: one token per row.


def truncate(probs, top_k=None, top_p=None, min_p=None):
    """Zero the tail of each row of probs (B, V): all below the k-th largest (ties stay); all but the smallest set that
    holds the share p of what top_k left; all less than min_p times as likely as the likeliest. Rows need
    not sum to 1 afterwards."""
    if top_k is not None and top_k < probs.shape[-1]:
        kth = probs.topk(top_k, dim=-1).values[:, -1:]  # (B, 1)
        probs = probs.masked_fill(probs < kth, 0.0)
    if top_p is not None and top_p < 1.0:
        ordered, order = probs.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # probability before each token: the first one always stays
        # a share of the sum: after top_k the row no longer sums to 1
        ordered = ordered.masked_fill(before >= top_p * ordered.sum(-1, keepdim=True), 0.0)
        probs = torch.zeros_like(probs).scatter(-1, order, ordered)
    if min_p is not None:
        probs = probs.masked_fill(probs < min_p * probs.max(-1, keepdim=True).values, 0.0)
    return probs


def sample(logits, u, temperature=1.0, top_k=None, top_p=None, min_p=None, penalty=1.0, seen=None):
    """One token per row: logits (B, V), u (B,) uniform in [0, 1) -> ids (B,), log-probabilities (B,) in fp32.

    Temperature 0 is greedy. penalty divides the positive logits, and multiplies the negative ones, of the tokens that
    `seen` (B, V) marks. (CTRL's paper divides both, which makes a token of negative logit likelier.) The
    log-probabilities are those of the model's own softmax at the temperature (at 1 if greedy), never of the truncated
    or penalised one; NaN for a row whose logits are no distribution, because one is NaN or +inf, or all are −inf: its
    token means nothing.
    """

    def scale(logits):  # dividing by 1 would be one more pass over (B, V), and so would .float()
        return logits if temperature in (0, 1) else logits.float() / temperature

    penalised = scaled = scale(logits)  # (B, V)
    if penalty != 1.0:
        logits = logits.float()
        penalised = scale(torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits))
    if temperature == 0:
        ids = penalised.argmax(-1, keepdim=True)  # (B, 1)
    else:
        probs = penalised.softmax(-1, dtype=torch.float32)
        cdf = truncate(probs, top_k, top_p, min_p).cumsum(-1)  # (B, V)
        # right=True: the first token whose cumulative mass exceeds u, so one of probability 0 is never drawn. The clamp
        # is for rows of NaN.
        ids = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)
        if penalty == 1.0:  # probs is the model's own softmax
            return ids.squeeze(-1), probs.gather(-1, ids).log().squeeze(-1)
    return ids.squeeze(-1), scaled.log_softmax(-1, dtype=torch.float32).gather(-1, ids).squeeze(-1)


# ---------------------------------------------------------------------------------------------------------------
# Rollouts: prefill, then decode.


def generate(
    model,
    prompts,
    max_new_tokens,
    n=1,
    temperature=1.0,
    top_k=None,
    top_p=None,
    stop_ids=(),
    generator=None,
    *,
    min_p=None,
    repetition_penalty=1.0,
    uniforms=None,
    on_tokens=None,
    write=None,
    memory=None,
    static=None,
):
    """Continue N prompts (lists of ids), n rollouts each; rows i·n … i·n + n − 1 belong to prompt i. -> Rollout

    A row ends with a stop id, which it keeps, or after max_new_tokens. Raises ConfigError on an empty prompt, or one
    that leaves no room in the context; DivergedError, a ConfigError too, on logits that are not finite.

    generator: a CPU torch.Generator that draws the table u; or give `uniforms`, u (N·n, max_new_tokens), yourself.
    on_tokens: called at each step as on_tokens(ids, sampled), (N·n,) each, for streaming: `sampled` is False on rows
        that did not sample, whose id is 0. May return the rows to end there, (N·n,) bool.
    write: for tokens that are not the policy's, such as a tool's reply (agent.py). Called at each step as
        write(ids, taken), (N·n,) each: `taken` is True on rows that took an id, sampled or written. Returns the id that
        each row takes next, −1: it samples. A written id has mask False, counts in max_new_tokens, may be a stop id.
    memory: bytes for the key/value cache, default half of what is free. Prompts that do not fit together are taken one
        batch after the other, which changes no row except by rounding. With on_tokens or write all are one batch.
    static: decode with fixed shapes (StaticStep of support/fast_decode.py) where the layout allows it, default on a
        GPU.
    """
    sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, penalty=repetition_penalty)
    check_request(model, prompts, max_new_tokens, n, uniforms, **sampling)
    if uniforms is None:  # greedy decoding draws nothing: an evaluation leaves the random numbers of dropout alone
        shape = len(prompts) * n, max_new_tokens
        uniforms = torch.rand(shape, generator=generator) if temperature else torch.zeros(shape)
    uniforms = uniforms.to(model.embed.weight.device)
    static = traits(uniforms).cuda_graphs if static is None else static
    size = len(prompts)  # prompts per batch; on_tokens and write address rows by number: one batch
    if on_tokens is None and write is None:
        size = prompts_that_fit(model, prompts, max_new_tokens, n, memory)
    was_training = model.training
    model.eval()
    try:
        batches = []
        for i in range(0, len(prompts), size):
            u = uniforms[i * n : (i + size) * n]
            batch = roll_out(model, prompts[i : i + size], u, n, stop_ids, on_tokens, write, sampling, static)
            batches.append(batch)
    finally:
        model.train(was_training)
    T = max(ids.shape[1] for ids, *_ in batches)
    joined = [torch.cat([F.pad(x, (0, T - x.shape[1])) for x in parts]) for parts in zip(*batches, strict=True)]
    return Rollout(*joined)  # copies made outside inference mode: a loss may use them


def prefill(model, prompts, n, max_new_tokens, static):
    """Read each prompt once, all of them in one pass, for n rollouts each -> the logits of the first new token
    (N·n, V), and the Decoder that takes this token and those after it."""
    device, longest = model.embed.weight.device, max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)  # (N, S)
    real = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], device=device)  # (N, S)
    positions = (real.cumsum(1) - 1).clamp(min=0)  # (N, S) each row counts its own tokens from 0
    padded = min(map(len, prompts)) < longest

    cache = model.make_cache(len(prompts), longest)
    logits = model(tokens, positions, real if padded else None, cache, last_only=True)[:, -1]  # (N, V)
    dtype = decoding_dtype(model, cache)  # bf16 where that is faster: half as much to read in each step
    logits, cache = logits.repeat_interleave(n, dim=0), cache.repeat(n, longest + max_new_tokens, dtype)  # N·n rows
    position, visible = positions[:1, -1], None  # (1,) of the last token read, for all; None: all slots are seen
    if padded:
        position, visible = (x.repeat_interleave(n, dim=0) for x in (positions[:, -1], real))  # (N·n,), (N·n, S)
        visible = F.pad(visible, (0, max_new_tokens), value=True)  # (N·n, S + max_new_tokens)
    return logits, Decoder(model, cache, position, visible, static)


@torch.inference_mode()
def roll_out(model, prompts, uniforms, n, stop_ids, on_tokens, write, sampling, static):
    """One batch -> ids, mask, logprobs, with `write` also written, (N·n, T) each. sampling: arguments of `sample`."""
    device, (rows, max_new_tokens) = uniforms.device, uniforms.shape
    logits, decoder = prefill(model, prompts, n, max_new_tokens, static)  # (N·n, V)
    stop = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
    seen = None  # (N·n, V) the tokens that a row holds already, for the penalty
    if sampling["penalty"] != 1.0:
        seen = seen_in(prompts, logits.shape[1], device).repeat_interleave(n, dim=0)

    ids = torch.zeros(rows, max_new_tokens, dtype=torch.long, device=device)
    mask = torch.zeros(rows, max_new_tokens, dtype=torch.bool, device=device)  # tokens that were sampled
    real = torch.zeros_like(mask)  # those, and the tokens that `write` gave
    logprobs = torch.zeros(rows, max_new_tokens, device=device)
    row = slice(None)  # which output row each batch row is: all, in order; once rows have left, their indices (B,)
    live = torch.ones(rows, dtype=torch.bool, device=device)
    given = None  # what `write` returned: (N·n,) the id that a row must take next, or −1
    for t in range(max_new_tokens):
        token, logprob = sample(logits, uniforms[row, t], seen=seen, **sampling)  # (B,), (B,)
        sampled = live  # (B,)
        if given is not None:
            sampled = live & (given[row] < 0)
            token = torch.where(given[row] < 0, token, given[row])
        ids[row, t], real[row, t], mask[row, t], logprobs[row, t] = token, live, sampled, logprob
        if t == 0 or on_tokens is not None:  # before a token is shown; all others once, after the loop
            check_logprobs(logprob, live)
        if stop_ids:
            live = live & ~torch.isin(token, stop)
        if on_tokens is not None:
            end = on_tokens(ids[:, t] * mask[:, t], mask[:, t])
            if end is not None:
                live = live & ~end.to(device)[row]
        if write is not None:
            given = write(ids[:, t], real[:, t]).to(device)
        n_live = int(live.sum()) if stop_ids or on_tokens is not None else rows
        if n_live == 0 or t + 1 == max_new_tokens:
            break
        if seen is not None:
            seen[torch.arange(len(token), device=device), token] = True
        # Finished rows fill the batch up to a multiple of 4: for each new number of rows a CPU's bf16 kernels are
        # compiled anew.
        n_stay = -(-n_live // 4) * 4
        if n_stay <= decoder.shrink_below * len(live):
            stay = live.argsort(descending=True, stable=True)[:n_stay]  # the live ones first
            decoder.keep(stay)
            row = stay if isinstance(row, slice) else row[stay]
            live, token, seen = live[stay], token[stay], None if seen is None else seen[stay]
        logits = decoder(token)  # (B, V)
    ids, real, mask, logprobs = (x[:, : t + 1] for x in (ids, real, mask, logprobs))
    check_logprobs(logprobs, mask)
    # A row that has ended reads on until it leaves the batch. Its logprobs may be NaN there, and 0 · NaN is NaN.
    parts = ids * real, mask, logprobs.masked_fill(~mask, 0.0)
    return parts if write is None else (*parts, real & ~mask)


# ---------------------------------------------------------------------------------------------------------------
# The script: continue a prompt, or chat.


def answer(model, tokenizer, ids, stop_ids, config, generator):
    """Stream the continuation of `ids` to stdout; returns its text."""
    text = StreamedText(tokenizer, config.stop, stop_ids)
    most = min(config.max_new_tokens, room_after(ids, model))
    generate(model, [ids], most, stop_ids=stop_ids, generator=generator, on_tokens=text.on_tokens, **config.sampling)
    return text.end()


def main(config):
    device = setup(config.device).device
    model, tokenizer, path = open_checkpoint(config.checkpoint, device)
    is_chat = is_chat_model(path, tokenizer)
    stop_ids = tokenizer.stop_ids if is_chat else (tokenizer.endoftext_id,)
    generator = torch.Generator().manual_seed(config.seed)

    def reply(ids):
        with answer_autocast(device):
            return answer(model, tokenizer, ids, stop_ids, config, generator)

    if config.prompt is None and not is_chat:
        raise ConfigError(f"{path} is a base model, not trained to chat; give it a --prompt to continue")
    if config.prompt is None:
        chat(tokenizer, model.config.context, reply)
    elif is_chat:
        reply(tokenizer.encode_chat([{"role": "user", "content": config.prompt}], True)[0])
    else:
        reply(tokenizer.encode(config.prompt) or [tokenizer.endoftext_id])


def demo():
    """Sampling three tokens by hand; then a batch, whose rows do not depend on each other."""
    probs, u = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([0.4, 0.6, 0.9])
    by_hand = {  # the first token whose cumulative probability exceeds u times the sum
        "temperature 1": ({}, (0.5, 0.8, 1.0), (0, 1, 2)),
        "temperature 1/2": ({"temperature": 0.5}, (25 / 38, 34 / 38, 1.0), (0, 0, 2)),  # squares: 25, 9, 4
        "greedy": ({"temperature": 0}, None, (0, 0, 0)),
        "top-k 2": ({"top_k": 2}, (0.5, 0.8, 0.8), (0, 0, 1)),  # 0.6 · 0.8 = 0.48
        "top-p 0.4": ({"top_p": 0.4}, (0.5, 0.5, 0.5), (0, 0, 0)),
        "min-p 0.5": ({"min_p": 0.5}, (0.5, 0.8, 0.8), (0, 0, 1)),  # 0.2 < 0.5 · 0.5
    }
    print("probabilities 0.5, 0.3, 0.2; u = 0.4, 0.6, 0.9 draws the first whose cumulative is above u · the last one")
    for name, (options, cdf, tokens) in by_hand.items():
        ids, logprobs = sample(probs.log().expand(3, 3), u, **options)
        assert tuple(ids.tolist()) == tokens
        full = probs[0] ** 2 / 0.38 if name == "temperature 1/2" else probs[0]  # never the truncated one
        torch.testing.assert_close(logprobs, full.log()[ids])
        numbers = "" if cdf is None else "cumulative " + "  ".join(f"{x:.2f}" for x in cdf)
        print(f"  {name:<17}{numbers:<30}{'  '.join(map(str, tokens))}")

    torch.manual_seed(0)
    model = Transformer(TransformerConfig(vocab_size=50, context=64)).eval()
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11]]
    uniforms = torch.rand(6, 20)
    batch = generate(model, prompts, 20, n=2, stop_ids=(7,), uniforms=uniforms)
    print("\n3 prompts of 3, 7 and 1 tokens, 2 rollouts each, stop token 7: each as if alone, log π as in a loss")
    for i, prompt in enumerate(prompts):
        for r in (2 * i, 2 * i + 1):
            alone = generate(model, [prompt], 20, stop_ids=(7,), uniforms=uniforms[r : r + 1])
            length = alone.mask.sum().item()
            assert batch.ids[r, :length].tolist() == alone.ids[0].tolist()
            assert batch.mask[r].sum() == length
            text = torch.tensor([prompt + alone.ids[0].tolist()])
            scored = model(text[:, :-1], targets=text[:, 1:])[0, -length:]  # (length,) log π, as in a loss
            torch.testing.assert_close(batch.logprobs[r, :length], scored, rtol=0, atol=1e-4)
            print(f"  prompt {i} rollout {r % 2}: {length:2d} tokens, log π {batch.logprobs[r].sum().item():7.2f}")


if __name__ == "__main__":
    hint = "to use a checkpoint: python generate.py --checkpoint DIR --prompt TEXT (see --help)"
    run_script(main, Config, __doc__, demo, without_flags=hint)
