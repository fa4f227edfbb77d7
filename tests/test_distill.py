"""distill.py: the divergences against torch and by enumeration, the sampled form's expectation, what the teacher sees,
and the guarantees of a run."""

import copy
import itertools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    assert_one_line_error,
    assert_rate_clip_decay,
    assert_resume_refuses_what_changed,
    assert_resumed_equals_whole,
    assert_same_metrics,
    assert_same_weights,
    assert_the_start_is_kept,
    cpu_without_bf16,
    flags_of,
    metrics,
    script,
)

import distill
import grpo
import pretrain
import sft
from data import TASKS, Problem, encode_prompt, load_problems
from distill import Config, distill_loss, sampled_loss, token_advantages
from generate import generate
from lora import LoraConfig
from sft import sft_loss
from support import devices, distill_report, distill_run, sft_start, taught, teachers, verified
from support.checkpoints import open_checkpoint
from support.errors import CheckpointError, ConfigError, DataError
from support.sampled_kl import sampled_kl
from support.shared_prompt import pack, shared_answer_logits, shared_answer_logprobs
from support.taught import Writers, pieces_of, written_by_student
from support.teachers import load_taught, open_teacher, student_start, teacher_start, with_context
from tokenizer_bpe import BPETokenizer, ByteTokenizer
from transformer import Transformer, TransformerConfig, answer_logprobs

SMALL = dict(init="start", teacher="teacher", data="twos.jsonl", steps=4, prompts=6, rollouts=2, micro_batch=6)
SMALL |= dict(max_new_tokens=8, warmup=1, lr=3e-3, eval_every=2, eval_problems=6, test_problems=6, pass_problems=3)
SMALL |= dict(pass_samples=2, device="cpu")
SELF = dict(teacher="self", teacher_sees="example")


def config(**changes):
    return Config(**(SMALL | changes))


def as_flags(**changes):
    return flags_of(SMALL | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """twos.jsonl, whose answers are all 2; `start`, a tiny model that says 1 as often; `teacher`, a wider one that says
    2; `other`, with another tokenizer."""
    folder = tmp_path_factory.mktemp("twos")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cpu_without_bf16(patch)
        for name, answer in (("coin", lambda i: 1 + i % 2), ("twos", lambda i: 2)):
            records = [{"question": f"Number {i}?", "answer": f"#### {answer(i)}"} for i in range(300)]
            Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
        text = (folder / "twos.jsonl").read_text(encoding="utf-8")
        few = dict(batch=16, micro_batch=16, max_new_tokens=8, eval_problems=4, test_problems=4, device="cpu")
        for name, width, data in (("start", 16, "coin.jsonl"), ("teacher", 24, "twos.jsonl")):
            tokenizer = BPETokenizer.train([text], 300)
            torch.manual_seed(0)
            layout = TransformerConfig(tokenizer.vocab_size, context=96, n_layer=1, n_head=2, n_kv_head=1, width=width)
            Transformer(layout).save_pretrained(f"random-{name}")
            tokenizer.save_pretrained(f"random-{name}")
            init = dict(init=f"random-{name}", name=f"sft-{name}", data=data)
            sft.main(sft.Config(**init, steps=120, lr=1e-2, eval_every=120, **few))
            shutil.copytree(f"runs/sft-{name}/last", name)
        tokenizer = BPETokenizer.train([text + "Zebra zebra zebra"], 299)
        Transformer(TransformerConfig(tokenizer.vocab_size, **vars_of(layout))).save_pretrained("other")
        tokenizer.save_pretrained("other")
    return folder


def vars_of(layout):
    return {k: v for k, v in vars(layout).items() if k != "vocab_size"}


@pytest.fixture
def here(scratch, folder):
    for name in ("start", "teacher", "other"):
        (scratch / name).symlink_to(folder / name)
    shutil.copy(folder / "twos.jsonl", scratch)
    return scratch


# ------------------------------------------------------------------------------------------------ the divergences


def logits_of(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, generator=generator, dtype=torch.float64)


def by_torch(student, teacher, mask, beta):
    """GKD, Eq. 1, with torch's kl_div(input = log q, target = log p), KL(p ‖ q)."""
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)

    def kl(log_p, log_q):
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)

    if beta in (0, 1):
        D = kl(log_s, log_t) if beta else kl(log_t, log_s)
    else:
        log_m = (beta * log_t.exp() + (1 - beta) * log_s.exp()).log()
        D = beta * kl(log_t, log_m) + (1 - beta) * kl(log_s, log_m)
    return (D * mask).sum() / mask.sum()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", [0, 0.01, 0.3, 0.5, 0.9, 1])
def test_value_and_gradient_are_those_of_torchs_kl_div(beta, temperature):
    student, teacher = logits_of(3, 5, 7).requires_grad_(), logits_of(3, 5, 7, seed=1).requires_grad_()
    mask = torch.arange(5) < torch.tensor([[5], [2], [3]])
    loss, figures = distill_loss(student, teacher, mask, beta, temperature=temperature)
    expected = by_torch(student / temperature, teacher.detach() / temperature, mask, beta)
    torch.testing.assert_close(loss, expected)
    ours, theirs = torch.autograd.grad(loss, student)[0], torch.autograd.grad(expected, student)[0]
    torch.testing.assert_close(ours, theirs)
    assert ours.abs().max() > 1e-4
    assert not loss.requires_grad or torch.autograd.grad(
        distill_loss(student, teacher, mask, beta)[0], teacher, allow_unused=True
    ) == (None,)
    for name, at in (("reverse_kl", 1), ("forward_kl", 0)):
        there = by_torch(student / temperature, teacher / temperature, mask, at).item()
        assert figures[name] == pytest.approx(there)
    assert figures["loss"] == pytest.approx(loss.item())


@pytest.mark.parametrize("beta", [0, 0.25, 0.5, 1])
def test_two_tokens_by_enumeration(beta):
    """Sums over both tokens in Python's floats, and the slope by central differences."""

    def D(z):
        p = [1 / (1 + math.exp(-z)), 1 / (1 + math.exp(z))]
        m = [beta * t + (1 - beta) * s for t, s in zip(q, p, strict=True)]
        forward, reverse = (sum(a * math.log(a / b) for a, b in zip(*pair, strict=True)) for pair in ((q, p), (p, q)))
        to_m = [sum(a * math.log(a / b) for a, b in zip(x, m, strict=True)) for x in (q, p)]
        return forward if beta == 0 else reverse if beta == 1 else beta * to_m[0] + (1 - beta) * to_m[1]

    for z, q in itertools.product((-3.0, 0.2, 1.5), ([0.5, 0.5], [0.9, 0.1], [0.02, 0.98])):
        logits = torch.tensor([[[z, 0.0]]], dtype=torch.float64, requires_grad=True)
        teacher = torch.tensor(q, dtype=torch.float64).log().view(1, 1, 2)
        loss, _ = distill_loss(logits, teacher, torch.ones(1, 1), beta)
        assert loss.item() == pytest.approx(D(z), abs=1e-12)
        slope = (D(z + 1e-5) - D(z - 1e-5)) / 2e-5
        gradient = torch.autograd.grad(loss, logits)[0].flatten().tolist()
        assert gradient == pytest.approx([slope, -slope], abs=1e-8)


def test_beta_goes_from_the_teachers_view_to_the_students():
    """The convention: 0 is KL(teacher ‖ student), infinite where the student never says what the teacher does."""
    sure, open_minded = torch.tensor([[[30.0, 0.0]]]), torch.zeros(1, 1, 2)
    one = torch.ones(1, 1)
    assert distill_loss(sure, open_minded, one, 0)[0] > 10
    assert distill_loss(sure, open_minded, one, 1)[0] == pytest.approx(math.log(2))
    assert distill_loss(open_minded, sure, one, 0)[0] == pytest.approx(math.log(2))


def test_the_ends_jump_and_the_middle_is_symmetric():
    student, teacher, mask = logits_of(2, 3, 5).requires_grad_(), logits_of(2, 3, 5, seed=1), torch.ones(2, 3)
    ends = [distill_loss(student, teacher, mask, beta)[0] for beta in (0, 1)]
    for share, limit in ((1e-6, ends[0]), (1 - 1e-6, ends[1])):
        loss = distill_loss(student, teacher, mask, share)[0] / 1e-6
        torch.testing.assert_close(loss, limit, rtol=1e-4, atol=0)
        slopes = [torch.autograd.grad(x, student, retain_graph=True)[0] for x in (loss, limit)]
        torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-6)
        assert distill_loss(student, teacher, mask, share)[0] < 1e-5 * limit
    pair = student.detach(), teacher
    forth, back = (distill_loss(*x, mask, 0.5)[0] for x in (pair, pair[::-1]))
    torch.testing.assert_close(forth, back)
    forth, back = distill_loss(*pair, mask, 0.3)[0], distill_loss(*pair[::-1], mask, 0.7)[0]
    torch.testing.assert_close(forth, back)
    assert not torch.isclose(*ends, rtol=0.05)


@pytest.mark.parametrize("beta", [0, 0.4, 1])
def test_outside_the_mask_anything_may_stand_and_pieces_add_up(beta):
    student, teacher = logits_of(4, 5, 6).requires_grad_(), logits_of(4, 5, 6, seed=1)
    mask = torch.arange(5) < torch.tensor([[5], [2], [3], [0]])
    whole = distill_loss(student, teacher, mask, beta)[0]
    pieces = sum(
        distill_loss(student[i : i + 1], teacher[i : i + 1], mask[i : i + 1], beta, n_tokens=10)[0] for i in range(4)
    )
    torch.testing.assert_close(whole, pieces)
    wild, off = student.detach().clone(), ~mask
    wild[off], other = math.inf, teacher.clone()
    other[off] = math.nan
    loss, figures = distill_loss(wild.requires_grad_(), other, mask, beta)
    torch.testing.assert_close(loss, whole)
    gradient = torch.autograd.grad(loss, wild)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(whole, student)[0])
    assert (gradient[off] == 0).all()
    assert all(map(math.isfinite, figures.values()))
    nothing, figures = distill_loss(student, teacher, torch.zeros(4, 5), beta)
    assert nothing == 0
    assert figures == {"loss": 0, "reverse_kl": 0, "forward_kl": 0}


def test_bf16_logits_are_compared_in_fp32():
    student, teacher = logits_of(2, 3, 50).bfloat16(), logits_of(2, 3, 50, seed=1).bfloat16()
    for beta in (0, 0.5, 1):
        loss = distill_loss(student, teacher, torch.ones(2, 3), beta)[0]
        assert loss.dtype == torch.float32
        exact = by_torch(student.double(), teacher.double(), torch.ones(2, 3), beta)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------ the sampled token

L = 3  # tokens of a text; two tokens in the vocabulary


class Table:
    """A distribution of texts of L tokens 0 or 1: a logit for each prefix."""

    def __init__(self, seed):
        self.prefixes = [p for n in range(L) for p in itertools.product((0, 1), repeat=n)]
        self.logits = logits_of(len(self.prefixes), 2, seed=seed).requires_grad_()

    def at(self, text):
        """The logits at each token (L, 2)."""
        return self.logits[[self.prefixes.index(text[:t]) for t in range(L)]]

    def logprobs(self, text):
        return self.at(text).log_softmax(-1)[range(L), text]  # (L,)


TEXTS = list(itertools.product((0, 1), repeat=L))


def mean_gradient(student, writer, loss_of):
    """Σ_y P(y) ∇loss(y) over all texts, P the writer's."""
    total = torch.zeros_like(student.logits)
    for text in TEXTS:
        p = writer.logprobs(text).sum().exp().detach()
        total += p * torch.autograd.grad(loss_of(text), student.logits)[0]
    return total


def of_sample(student, teacher, by_student, gamma=0.0):
    def loss_of(text):
        rows = student.logprobs(text)[None], teacher.logprobs(text)[None].detach()
        return sampled_loss(*rows, torch.ones(1, L), torch.tensor([by_student]), gamma, n_tokens=1)[0]

    return loss_of


def of_vocabulary(student, teacher, beta):
    return lambda text: distill_loss(
        student.at(text)[None], teacher.at(text)[None], torch.ones(1, L), beta, n_tokens=1
    )[0]


def sequence_kl(p, q):
    """KL of the whole texts, by enumeration."""
    return sum(p.logprobs(y).sum().exp() * (p.logprobs(y).sum() - q.logprobs(y).sum()) for y in TEXTS)


def test_the_sampled_tokens_mean_gradient_is_that_of_the_vocabulary():
    student, teacher = Table(0), Table(1)
    sampled = mean_gradient(student, student, of_sample(student, teacher, True))
    torch.testing.assert_close(sampled, mean_gradient(student, student, of_vocabulary(student, teacher, 1)))
    whole = torch.autograd.grad(sequence_kl(student, teacher), student.logits)[0]
    assert (sampled - whole).norm() > 0.05 * whole.norm()  # what a token does to later ones is left out
    with_return = mean_gradient(student, student, of_sample(student, teacher, True, gamma=1.0))
    torch.testing.assert_close(with_return, whole)


def test_on_the_teachers_texts_it_is_the_forward_kl():
    student, teacher = Table(0), Table(1)
    sampled = mean_gradient(student, teacher, of_sample(student, teacher, False))
    torch.testing.assert_close(sampled, mean_gradient(student, teacher, of_vocabulary(student, teacher, 0)))
    whole = torch.autograd.grad(sequence_kl(teacher, student), student.logits)[0]
    torch.testing.assert_close(sampled, whole)  # no gradient goes through the teacher's sampling
    on_own = mean_gradient(student, student, of_sample(student, teacher, False))
    assert (sampled - on_own).norm() > 0.05 * whole.norm()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_advantages_against_a_loop(gamma):
    logprobs, theirs = -logits_of(3, 5).abs().requires_grad_(), -logits_of(3, 5, seed=1).abs()
    mask = torch.arange(5) < torch.tensor([[5], [2], [3]])
    A = token_advantages(logprobs, theirs.masked_fill(~mask, math.nan), mask, gamma)
    assert not A.requires_grad
    for i, t in itertools.product(range(3), range(5)):
        later = [s for s in range(t, 5) if mask[i, s]] if mask[i, t] else []
        expected = sum(gamma ** (s - t) * (theirs[i, s] - logprobs[i, s]).item() for s in later)
        assert A[i, t].item() == pytest.approx(expected)


def test_sampled_loss_by_hand():
    """Two texts of the student's, one of the teacher's: −Σ A log π / n, and what is logged."""
    logprobs = torch.tensor([[-0.1, -2.0], [-1.0, 5.0], [-0.7, -0.3]], dtype=torch.float64, requires_grad=True)
    theirs = torch.tensor([[-0.5, -1.0], [-0.2, math.nan], [-0.1, -0.9]], dtype=torch.float64)
    mask, by_student = torch.tensor([[1, 1], [1, 0], [1, 1]]), torch.tensor([True, True, False])
    loss, figures = sampled_loss(logprobs, theirs, mask, by_student)
    A = torch.tensor([[-0.4, 1.0], [0.8, 0.0], [1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(loss, -(A * logprobs * mask).sum() / 5)
    torch.testing.assert_close(torch.autograd.grad(loss, logprobs)[0], -A * mask / 5)
    k3 = [math.exp(r) - 1 - r for r in (-0.4, 1.0, 0.8)]  # r = log T − log π
    assert figures["reverse_kl"] == pytest.approx(sum(k3) / 3)
    k3 = [math.exp(r) - 1 - r for r in (-0.6, 0.6)]  # r = log π − log T
    assert figures["forward_kl"] == pytest.approx(sum(k3) / 2)
    alone, _ = sampled_loss(logprobs[2:], theirs[2:], mask[2:], by_student[2:])
    torch.testing.assert_close(alone, sft_loss(logprobs[2:], mask[2:])[0])  # SFT on the teacher's text


# ------------------------------------------------------------------------------------------------ who reads what


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_the_share_is_kept_and_spread(share):
    own = [written_by_student(slot, share) for slot in range(100)]
    assert sum(own) == round(100 * share)
    for start in range(0, 100, 10):
        assert abs(sum(own[start : start + 10]) - 10 * share) <= 1


def test_a_small_share_is_kept_over_the_steps():
    """8 questions a step, of which the student has 0.8: 8 in ten steps, not 0."""
    problems, config = load_problems("word", "train", 16), SimpleNamespace(on_policy=0.1, prompts=8)
    writers, asked = object.__new__(Writers), []
    writers.config, writers.tokenizer, writers.seen_alike = config, ByteTokenizer(), True
    writers.teacher = writers.student = lambda step, own: SimpleNamespace(answers=[[[1]]] * len(own))
    writers.teacher.asked = lambda step: problems
    for step in range(10):
        asked.append(writers(step, [*range(8)]).by_student)
    assert sum(map(sum, asked)) == 8


def plain_logits(model, prompt, answer):
    """(T, V): those that predict the answer's tokens, in one row without any padding."""
    return model(torch.tensor([[*prompt, *answer]]))[0, len(prompt) - 1 : -1]


def some_texts():
    torch.manual_seed(1)
    shapes = [(5, 3, 4), (9, 1, 6), (2, 7, 2)]
    prompts = [torch.randint(3, 30, (n,)).tolist() for n, *_ in shapes]
    longer = [
        torch.randint(3, 30, (11 - n,)).tolist() + prompt for (n, *_), prompt in zip(shapes, prompts, strict=True)
    ]
    answers = [[torch.randint(3, 30, (n,)).tolist() for n in lengths] for _, *lengths in shapes]
    return taught.Texts(prompts, longer, answers, [True, False, True])


def tiny(width=16, vocab=30, seed=0):
    torch.manual_seed(seed)
    layout = TransformerConfig(vocab, context=64, n_layer=1, n_head=2, n_kv_head=1, width=width)
    model = Transformer(layout).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def gradient_of(model, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize(
    "choices", [dict(beta=0.0), dict(beta=0.3), dict(beta=1.0), dict(loss="sample"), dict(loss="sample", gamma=0.5)]
)
@pytest.mark.parametrize("size", [2, 4, 64])
def test_a_batch_against_the_plain_form_however_it_is_cut(size, choices):
    """Each answer in a row of its own, after the student's prompt and after the teacher's; values and gradients."""
    settings = Config(**(SMALL | choices | dict(temperature=0.8)))
    student, teacher, texts, n = tiny(), tiny(24, seed=1), some_texts(), 23
    pieces = pieces_of(texts, size, 0, torch.device("cpu"))
    assert sum(piece.mask.sum() for piece in pieces) == n == texts.n_tokens
    assert [len(piece.by_student) for piece in pieces] == {2: [2, 2, 2], 4: [4, 2], 64: [6]}[size]
    loss = sum(distill.piece_loss(student, teacher, piece, settings, n)[0] for piece in pieces)
    expected = 0.0
    for prompt, longer, answers, own in zip(*vars(texts).values(), strict=True):
        for answer in answers:
            ours, theirs = plain_logits(student, prompt, answer) / 0.8, plain_logits(teacher, longer, answer) / 0.8
            if settings.loss == "sample":
                picked = [x.log_softmax(-1)[range(len(answer)), answer] for x in (ours, theirs)]
                r = (picked[1] - picked[0]).detach()
                later = [sum(settings.gamma ** (s - t) * r[s] for s in range(t, len(r))) for t in range(len(r))]
                A = torch.stack(later) if own else torch.ones(len(answer))
                expected = expected - (A * picked[0]).sum() / n
            else:
                mask = torch.ones(len(answer))
                expected = expected + by_torch(ours, theirs.detach(), mask, settings.beta) * len(answer) / n
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient_of(student, loss), gradient_of(student, expected))


def test_logits_in_the_fast_form_are_those_of_the_plain_one():
    model, texts = tiny(), some_texts()
    packed = pack(texts.prompts, texts.answers, 0, part_size=2)
    logits = shared_answer_logits(model, packed)
    flat = [(p, answer) for p, group in zip(texts.prompts, texts.answers, strict=True) for answer in group]
    for row, (prompt, answer) in zip(logits, flat, strict=True):
        torch.testing.assert_close(row[: len(answer)], plain_logits(model, prompt, answer))
        assert (row[len(answer) :] == 0).all()
    picked = logits.log_softmax(-1)[0, range(3), flat[0][1]]
    torch.testing.assert_close(picked, shared_answer_logprobs(model, packed)[0, :3].double(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_a_teacher_with_a_padded_vocabulary_is_cut_to_the_students(here, tied):
    """Where it is compared, in both losses, and where it writes: ids that no text has get no probability."""
    _, tokenizer, _ = open_checkpoint("teacher")
    student, V = tiny(vocab=tokenizer.vocab_size).float(), tokenizer.vocab_size
    torch.manual_seed(1)
    layout = TransformerConfig(V + 40, context=96, n_layer=1, n_head=2, n_kv_head=1, width=24, tie_embeddings=tied)
    padded = Transformer(layout)
    for p in padded.parameters():
        torch.nn.init.normal_(p, std=0.3)
    padded.save_pretrained("padded")
    tokenizer.save_pretrained("padded")
    teacher, texts = open_teacher("padded", "start", student, tokenizer, "question", "cpu"), some_texts()
    (piece,) = pieces_of(texts, 64, 0, torch.device("cpu"))
    for choices in (dict(beta=0.0), dict(loss="sample")):
        expected, settings = 0.0, config(**choices)
        for prompt, longer, answers, own in zip(*vars(texts).values(), strict=True):
            for answer in answers:
                ours = plain_logits(student, prompt, answer)
                theirs = plain_logits(padded, longer, answer).detach()[:, :V]
                if settings.loss == "sample":
                    picked = [x.log_softmax(-1)[range(len(answer)), answer] for x in (ours, theirs)]
                    A = (picked[1] - picked[0]).detach() if own else torch.ones(len(answer))
                    expected = expected - (A * picked[0]).sum() / 23
                else:
                    expected = expected + by_torch(ours, theirs, torch.ones(len(answer)), 0) * len(answer) / 23
        loss, _ = distill.piece_loss(student, teacher, piece, settings, 23)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    written = [generate(model, [[5, 6]], 60, 8, uniforms=UNIFORMS).ids for model in (padded, teacher)]
    assert (written[0] >= V).any()
    assert not (written[1] >= V).any()
    distill.main(config(teacher="padded", steps=1, on_policy=0.0))  # the student reads what the teacher has written


UNIFORMS = torch.rand(8, 60, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("choices", [dict(beta=0.0), dict(loss="sample")])
def test_in_bf16_a_teacher_that_is_the_student_takes_no_gradient_away(choices):
    """One autocast keeps the bf16 weights of both passes: were those of the pass without gradients used again in the
    other (older versions of torch do so), the weights would get none."""
    model, texts = tiny().float(), some_texts()
    (piece,) = pieces_of(texts, 64, 0, torch.device("cpu"))
    gradients = []
    for teacher in (model, copy.deepcopy(model)):
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = distill.piece_loss(model, teacher, piece, config(**choices), 23)
        gradients.append(gradient_of(model, loss))
    assert torch.equal(*gradients)
    exact, _ = distill.piece_loss(model, model, piece, config(**choices), 23)
    torch.testing.assert_close(
        gradients[0], gradient_of(model, exact), rtol=0.1, atol=0.02 * gradients[0].norm().item()
    )


def test_what_the_student_never_says_the_forward_kl_alone_teaches():
    pi, p = torch.tensor([[0.989, 0.01, 0.001], [0.5, 0.1, 0.4]], dtype=torch.float64)
    logits = pi.log().view(1, 1, 3).requires_grad_()
    pulls = []
    for beta in (0, 1):
        loss, _ = distill_loss(logits, p.log().view(1, 1, 3), torch.ones(1, 1), beta)
        pulls.append(-torch.autograd.grad(loss, logits)[0][0, 0, 2].item())
    assert pulls[0] == pytest.approx(0.4 - 0.001)
    assert 0 < pulls[1] < 0.01


@pytest.mark.parametrize("name", ["start", "copy"])
def test_a_teacher_that_is_the_student_and_sees_the_same_is_refused(here, name):
    shutil.copytree(here / "start", "copy/best")
    with pytest.raises(ConfigError, match=f"the teacher {name} has the weights of start and sees what it sees"):
        distill.main(config(teacher=name))
    assert not (here / "runs").exists()
    distill.main(config(teacher=name, teacher_sees="example", steps=1))
    assert metrics("runs/distill", "loss")[1] > 0


def test_what_the_teacher_sees():
    problems = [Problem(f"{i}?", f"#### {i}", str(i), history=(("user", "hi"), ("assistant", "ho"))) for i in range(3)]
    assert with_context(problems, "question", problems) is problems
    own = with_context(problems, "solution", problems)
    assert own[1].history == (("user", "1?"), ("assistant", "#### 1"), ("user", "hi"), ("assistant", "ho"))
    other = with_context(problems, "example", problems)
    assert [p.history[1][1] for p in other] == ["#### 1", "#### 2", "#### 0"]
    assert [p.question for p in other] == ["0?", "1?", "2?"]
    asked = Problem("1?", "#### 1", "1", history=(("system", "Be brief."), *problems[1].history))
    (shown,) = with_context([asked], "solution", problems)
    assert shown.history == (("system", "Be brief."), *own[1].history)  # else it would be the second system turn


@pytest.mark.parametrize("teacher", ["teacher", "self"])
@pytest.mark.parametrize("sees", ["example", "solution"])
def test_student_and_teacher_read_the_same_answers_after_different_prompts(here, monkeypatch, calls_of, teacher, sees):
    """The example is a training problem's, not this one's; the teacher's own texts are written after it too."""
    cuts, sampled = calls_of(distill, "pieces_of"), []
    monkeypatch.setattr(taught.Sampler, "__call__", watched(taught.Sampler.__call__, sampled))
    distill.main(config(steps=1, teacher=teacher, teacher_sees=sees, on_policy=0.5))
    (texts,) = (call.args[0] for call in cuts)
    tokenizer = open_checkpoint("start")[1]
    problems = {tuple(encode_prompt(tokenizer, p)): p for p in load_problems("twos.jsonl", "train")}
    assert texts.by_student == [False, True] * 3
    for prompt, longer in zip(texts.prompts, texts.teacher_prompts, strict=True):
        problem = problems[tuple(prompt)]
        assert longer[-len(prompt) :] == prompt
        earlier = tokenizer.decode(longer[: -len(prompt)])
        assert "#### 2" in earlier
        assert (problem.question in earlier) == (sees == "solution")
    assert sampled[0] == texts.prompts[1::2]
    assert sampled[1] == texts.teacher_prompts[::2]


def watched(call, prompts):
    def sample(self, step, slots, *more):
        batch = call(self, step, slots, *more)
        prompts.append(batch.prompts)
        return batch

    return sample


def test_without_more_context_a_model_agrees_with_itself():
    model, texts = tiny(), some_texts()
    for name, value in (("prompts", texts.prompts), ("teacher_prompts", texts.prompts)):
        setattr(texts, name, value)
    (piece,) = pieces_of(texts, 64, 0, torch.device("cpu"))
    for choices in (dict(beta=0.0), dict(beta=0.3), dict(beta=1.0)):
        loss, figures = distill.piece_loss(model, model, piece, config(**choices), 23)
        assert abs(loss.item()) < 1e-12
        assert gradient_of(model, loss).abs().max() < 1e-12
        assert figures["reverse_kl"] == pytest.approx(0, abs=1e-12)


def test_the_kl_to_a_teacher_that_sees_more(here):
    """sampled_kl's ref_prompts: k3 of each token after either prompt."""
    model, tokenizer, _ = open_checkpoint("start")
    teacher, dist = open_checkpoint("teacher")[0], devices.setup("cpu")
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    longer = [[20, 21, 22, *p] for p in prompts]
    kl = sampled_kl(model, teacher, tokenizer, prompts, 6, dist, batch=2, ref_prompts=longer)
    uniforms = torch.rand(3, 6, generator=torch.Generator().manual_seed(0))
    k3 = []
    for i, prompt in enumerate(prompts):
        rollout = generate(model, [prompt], 6, stop_ids=tokenizer.stop_ids, uniforms=uniforms[i : i + 1])
        answer = rollout.ids[0][rollout.mask[0]].tolist()
        ours, theirs = (answer_logprobs(m, [p], [answer])[0] for m, p in ((model, prompt), (teacher, longer[i])))
        k3 += ((theirs - ours).exp() - 1 - (theirs - ours)).flatten().tolist()
    assert kl == pytest.approx(sum(k3) / len(k3), rel=1e-4)
    assert kl != pytest.approx(sampled_kl(model, teacher, tokenizer, prompts, 6, dist, batch=2), rel=1e-3)


# ------------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize("loss", ["vocabulary", "sample"])
def test_a_student_learns_what_its_teacher_knows(here, capsys, loss):
    sizes = dict(prompts=16, micro_batch=32, eval_problems=20, test_problems=20, steps=40, eval_every=20)
    result = distill.main(config(**sizes, lr=1e-2, loss=loss))
    assert result["before"]["accuracy"] < 0.8
    assert result["teacher"]["accuracy"] == 1.0
    assert result["after"]["accuracy"] > 0.9
    assert result["closed"] > 0.5
    assert result["teacher_kl"] < 0.3 * result["teacher_kl_before"]
    assert result["tokens"] == pytest.approx(32 * sum(metrics("runs/distill", "length").values()))
    kl = list(metrics("runs/distill", "reverse_kl").values())
    assert kl[-1] < 0.5 * kl[0]
    for name in ("best/model.safetensors", "last/trainer_state.pt", "curves.png", "samples.md"):
        assert (here / "runs" / "distill" / name).exists(), name
    printed = capsys.readouterr().out
    assert "KL to the teacher" in printed
    assert "of what it lacked" in printed


@pytest.mark.parametrize(("best", "share"), [(0.8, 0.5), (0.1, math.nan)])
def test_the_share_of_the_gap_that_is_closed(monkeypatch, best, share):
    """From 20 % to 50 %, where the teacher has 80 %; it may be worse than the student."""
    told = {"before": {"accuracy": 0.2}, "after": {"accuracy": 0.5}}
    monkeypatch.setattr(distill_report, "measure_end", lambda *_: dict(told))
    monkeypatch.setattr(distill_report, "open_checkpoint", lambda *_: (None, None, None))
    monkeypatch.setattr(distill_report, "kl_to_teacher", lambda *_: 0.0)
    state = SimpleNamespace(teacher={"accuracy": best, "kl": 0.0}, tokens=7)
    run = SimpleNamespace(path="", dist=devices.setup("cpu"), config=config(), state=state)
    closed = distill_report.measure_student(run, SimpleNamespace(problems=None, init=None, teacher=None))["closed"]
    assert closed == pytest.approx(share, nan_ok=True)


@pytest.mark.parametrize(
    "changes", [{}, {"beta": 0.5, "on_policy": 0.5}, {"loss": "sample", "on_policy": 0.5, "gamma": 0.5}, SELF]
)
def test_a_step_of_a_run_is_the_gradient_of_its_texts(here, calls_of, changes):
    """Loss and gradient norm of the first step, against one forward pass over all of its texts."""
    cuts = calls_of(distill, "pieces_of")
    distill.main(config(steps=1, **changes))
    (texts,) = (call.args[0] for call in cuts)
    settings, student = config(**changes), open_checkpoint("start")[0]
    teacher = student if settings.teacher == "self" else open_checkpoint("teacher")[0]
    assert sum(texts.by_student) == 6 * settings.on_policy
    (piece,) = pieces_of(texts, 64, 0, torch.device("cpu"))
    loss, _ = distill.piece_loss(student, teacher, piece, settings, texts.n_tokens)
    assert metrics("runs/distill", "loss")[1] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    norm = gradient_of(student, loss).norm().item()
    assert metrics("runs/distill", "grad_norm")[1] == pytest.approx(norm, rel=1e-3)
    assert norm > 1e-4


@pytest.mark.parametrize("changes", [{}, SELF])
def test_the_kls_of_the_report(here, monkeypatch, changes):
    """Of best/ on its own texts: to the teacher, which reads them after its own prompts, and to the start."""
    measured = lambda *_, step=None: {"accuracy": float(step is None), "story_kept": 0.0}  # noqa: E731
    monkeypatch.setattr(verified, "measure_valid", measured)  # a later step is best
    result, dist = distill.main(config(steps=2, lr=1e-2, **changes)), devices.setup("cpu")
    (before, tokenizer, _), (after, *_) = open_checkpoint("start"), open_checkpoint("runs/distill")
    views = load_taught(config(**changes), tokenizer, 96, 96, dist)
    prompts, shown = ([encode_prompt(tokenizer, p) for p in problems["test"]] for problems in views)
    for name, student in (("teacher_kl_before", before), ("teacher_kl", after)):
        teacher = student if changes else open_checkpoint("teacher")[0]
        expected = sampled_kl(student, teacher, tokenizer, prompts, 8, dist, ref_prompts=shown)
        assert result[name] == pytest.approx(expected, rel=1e-4)
        assert expected > 1e-4
    to_start = sampled_kl(after, before, tokenizer, prompts, 8, dist)
    assert result["kl"] == pytest.approx(to_start, rel=1e-4)
    assert to_start > 1e-6


def test_by_sample_each_kl_is_logged_of_its_own_texts(here):
    distill.main(config(steps=2, loss="sample", on_policy=0.0, name="taught"))
    distill.main(config(steps=2, loss="sample", name="own"))
    assert not metrics("runs/taught", "reverse_kl")
    assert list(metrics("runs/taught", "forward_kl")) == [1, 2]
    assert list(metrics("runs/own", "reverse_kl")) == [1, 2]
    assert not metrics("runs/own", "forward_kl")


def test_the_teacher_does_not_move_and_self_does(here, monkeypatch):
    kept = []

    def keep(policy, teacher, *more):
        kept.append((policy, teacher, {k: v.clone() for k, v in teacher.state_dict().items()}))
        return taught.Writers(policy, teacher, *more)

    monkeypatch.setattr(distill, "Writers", keep)
    distill.main(config())
    distill.main(config(**SELF))
    (policy, teacher, before), (student, same, _) = kept
    assert policy is not teacher
    assert all(torch.equal(w, before[k]) for k, w in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert student is same


def test_the_start_stays_best_until_something_beats_it(here, monkeypatch):
    monkeypatch.setattr(
        verified, "measure_valid", lambda *_, step=None: {"accuracy": float(step == 0), "story_kept": 0.0}
    )
    distill.main(config(steps=3))
    assert_same_weights("runs/distill/best", "start")


def test_a_run_that_was_stopped_before_its_first_step_keeps_the_start(here, monkeypatch):
    assert_the_start_is_kept(distill, config, "runs/distill", monkeypatch)


@pytest.mark.parametrize("changes", [{}, {"loss": "sample", "on_policy": 0.5}, SELF])
def test_the_cut_into_micro_batches_changes_nothing(here, scaled, changes):
    """Nor does a gradient scaler."""
    distill.main(config(name="whole", micro_batch=64, **changes))
    scaled("support.distill_run")
    distill.main(config(name="cut", micro_batch=2, **changes))
    names = ("loss", "grad_norm", "reverse_kl", "forward_kl", "accuracy")
    assert_same_metrics("runs/whole", "runs/cut", names, rel=2e-3, abs=1e-5)


def test_the_rate_the_clip_and_the_decay_of_each_step(here, steps_of):
    seen = steps_of(distill)
    distill.main(config(steps=5, warmup=3, lr=1e-2, clip=0.3, weight_decay=0.2))
    assert_rate_clip_decay(seen, "cosine", 0.1)


@pytest.mark.parametrize("changes", [{}, {"on_policy": 0.5, "loss": "sample", "lora": LoraConfig(rank=2)}, SELF])
def test_resumed_equals_uninterrupted_bit_for_bit(here, changes):
    names = ("loss", "reverse_kl", "accuracy")
    whole, parts = assert_resumed_equals_whole(distill, config, 2, names, **changes)
    assert parts["tokens"] == whole["tokens"]
    assert parts["teacher"] == whole["teacher"]


def test_an_example_is_of_another_question_where_a_file_holds_one_twice():
    problems = [Problem(q, f"#### {a}", a, 1, "x") for q, a in (("a?", "1"), ("a?", "1.0"), ("b?", "2"))]
    shown = [p.history[0][1] for p in with_context(problems, "example", problems)]
    assert shown == ["b?", "b?", "a?"]


def test_only_a_teacher_that_is_to_be_made_needs_questions_that_the_processes_share(here, monkeypatch):
    def refuse(world):
        raise ConfigError("cannot share")

    monkeypatch.setattr(distill_run, "check_shared_by", refuse)
    with pytest.raises(ConfigError, match="cannot share"):
        distill.main(config(teacher=None, data="word"))
    distill.main(config(steps=1))


def test_resume_refuses_what_changed(here):
    shutil.copytree("start", "own")
    shutil.copytree("teacher", "master")
    assert_resume_refuses_what_changed(
        distill,
        lambda **c: config(init="own", teacher="master", **c),
        ["own", "master", "twos.jsonl"],
        {"twos.jsonl": "split"},
    )


@pytest.mark.parametrize("changes", [{"on_policy": 0.5}, {"loss": "sample", **SELF}])
def test_two_processes_equal_one(here, changes):
    distill.main(config(name="one", **changes))
    two = script("distill.py", *as_flags(name="two", **changes), cwd=here, processes=2)
    assert two.returncode == 0, two.stderr
    names = ("loss", "grad_norm", "reverse_kl", "length", "accuracy")
    assert_same_metrics("runs/one", "runs/two", names, rel=1e-3, abs=1e-5)
    assert_same_weights("runs/one/last", "runs/two/last", atol=1e-5, rtol=1e-3)


# ------------------------------------------------------------------------------------------------ what is refused


def test_another_tokenizer_is_refused_in_one_line(here):
    (here / "runs/distill").mkdir(parents=True)
    failed = script("distill.py", *as_flags(teacher="other"), cwd=here)
    assert_one_line_error(failed, "the teacher other has another tokenizer than start", "sft.py")
    assert not (here / "runs/distill.1").exists()


def test_a_teacher_that_knows_fewer_ids_is_refused(here):
    _, tokenizer, _ = open_checkpoint("start")
    with pytest.raises(ConfigError, match=r"start may sample 310 ids, the teacher teacher knows 285"):
        open_teacher("teacher", "start", tiny(vocab=310), tokenizer, "question", "cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": None}, "--data twos.jsonl needs a teacher"),
        ({"init": None}, "needs an SFT checkpoint to start from"),
        ({"teacher": "self"}, "--teacher self sees what the student sees"),
        ({"loss": "sample", "beta": 0.5}, "--beta has no meaning with --loss sample"),
        ({"gamma": 1.0}, "--gamma has no meaning with --loss vocabulary"),
        ({"gamma": 1.0, "loss": "sample", "on_policy": 0.0}, "--gamma has no meaning with --on_policy 0"),
        ({"beta": 1.5}, "--beta is 1.5"),
        ({"on_policy": -0.1}, "--on_policy is -0.1"),
        ({"temperature": 0.0}, "--temperature is 0"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "nowhere"}, "nowhere is not there"),
        ({"max_new_tokens": 90}, "no train prompt fits"),
        ({"data": "nothing.jsonl"}, "nothing.jsonl"),
    ],
)
def test_what_cannot_run_leaves_nothing(here, changes, message):
    with pytest.raises((ConfigError, CheckpointError, DataError), match=message) as caught:
        distill.main(config(**changes))
    assert "\n" not in str(caught.value)
    assert not (here / "runs").exists()


def test_a_teacher_that_would_be_moved_aside_is_refused(here):
    shutil.copytree(here / "teacher", "runs/distill/best")
    with pytest.raises(ConfigError, match="--teacher runs/distill/best is in the run that --name distill would move"):
        distill.main(config(teacher="runs/distill/best"))
    assert (here / "runs/distill/best").exists()


def test_problems_whose_longer_prompt_does_not_fit_are_left_out(here, capsys, monkeypatch):
    records = [{"question": f"Number {i}{' and' * (8 if i % 3 == 0 else 0)}?", "answer": "#### 2"} for i in range(300)]
    Path("long.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    seen = []
    monkeypatch.setattr(distill, "Writers", lambda *a: seen.append(a[3:5]) or taught.Writers(*a))
    distill.main(config(data="long.jsonl", steps=1, **(SELF | {"teacher_sees": "solution"})))
    ((problems, longer),) = seen
    assert 0 < len(problems) == len(longer) < 240
    assert [p.question for p in problems] == [p.question for p in longer]
    assert "teacher's train prompts are longer" in capsys.readouterr().out


def test_a_teacher_with_a_shorter_context_decides(here, capsys):
    dist, tokenizer = devices.setup("cpu"), open_checkpoint("start")[1]
    lengths = [len(encode_prompt(tokenizer, p)) for p in load_problems("twos.jsonl", "train")]
    problems, seen = load_taught(config(), tokenizer, 96, sorted(lengths)[10] + 8, dist)
    assert seen is problems
    assert len(problems["train"]) == sum(n <= sorted(lengths)[10] for n in lengths) < len(lengths)
    assert "teacher's train prompts are longer than" in capsys.readouterr().out


def test_the_instruction_stands_after_each_question_in_all_splits(here, monkeypatch):
    dist, tokenizer = devices.setup("cpu"), open_checkpoint("start")[1]
    plain, _ = load_taught(config(), tokenizer, 96, 96, dist)
    told, seen = load_taught(config(instruction="Add.", teacher_sees="example"), tokenizer, 96, 96, dist)
    for split in ("train", "valid", "test"):
        assert [p.question for p in told[split]] == [f"{p.question}\nAdd." for p in plain[split]]
        assert [p.question for p in seen[split]] == [p.question for p in told[split]]
    assert all(p.history[0][1].endswith("\nAdd.") for p in seen["test"])
    with pytest.raises(ConfigError, match="no train prompt fits"):
        load_taught(config(instruction="Add. " * 60), tokenizer, 96, 96, dist)
    monkeypatch.setattr(teachers, "open_problems", lambda *_, **__: {"train": told["train"][:1]})
    with pytest.raises(ConfigError, match="--teacher_sees example needs two training problems"):
        load_taught(config(**SELF), tokenizer, 96, 96, dist)


# ------------------------------------------------------------------------------------------------ the starts


def test_both_starts_are_made_once_and_the_student_is_half_as_wide(scratch, monkeypatch):
    asked = []

    def make(name, message, stage, settings, dist):
        asked.append((name, stage, settings))
        return f"runs/{name}"

    for module in (teachers, sft_start):
        monkeypatch.setattr(module, "make_start_once", make)
    advice = "give one; a run of one process leaves one in runs/start"  # which is then to be named
    with pytest.raises(ConfigError, match=f"no --teacher given, and 8 processes cannot share the 12 .*: {advice}"):
        teachers.check_shared_by(8)
    teachers.check_shared_by(6)
    settings, dist = Config(seed=3, levels=[1]), devices.setup("cpu")
    assert student_start(settings, dist) == "runs/start/word-seed3-student-levels1"
    assert teacher_start(settings, dist) == "runs/start/word-seed3-teacher-levels1"
    (_, a, first), (_, b, second), (name, c, third), (_, d, fourth) = asked
    assert (a, b, c, d) == (pretrain, sft, sft, grpo)
    assert first["model"].width == TransformerConfig().width // 2
    assert first["model"].resolved().head_dim == TransformerConfig().resolved().head_dim // 2
    assert second["init"] == "runs/start/word-seed3-student-pretrain"
    assert name == "start/word-seed3-sft-levels1"  # the other stages' start
    assert fourth["init"] == "runs/start/word-seed3-sft-levels1"
    alike = [{k: v for k, v in s.items() if k not in ("init", "data")} for s in (second, third)]
    assert alike[0] == alike[1]  # fine-tuned as the teacher's start was
    for stage, s in ((pretrain, first), (sft, second), (grpo, fourth)):
        assert stage.Config(name="x", **s).seed == 3
    assert second["levels"] == fourth["levels"] == [1]


def test_a_run_with_no_flags_takes_both(scratch, monkeypatch, folder):
    """A task of 300 questions stands in for the built-in one."""
    row = TASKS["word"]
    monkeypatch.setattr(distill_run, "student_start", lambda *_: str(folder / "start"))
    monkeypatch.setattr(distill_run, "teacher_start", lambda *_: str(folder / "teacher"))
    few = {k: v for k, v in SMALL.items() if k not in ("init", "teacher", "data", "prompts", "rollouts", "micro_batch")}
    distill.main(Config(**(few | dict(steps=1, max_new_tokens=2))))
    assert Config().micro_batch == row.micro_batch
    assert metrics("runs/distill", "length")[1] <= 2
