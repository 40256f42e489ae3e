"""The plain path of prompt learners: their losses the way the official codes compute them, on the frozen CLIP and
the trained tensors of ours.

Tokens first ([length, batch, width]), all 77 tokens of a text, every block whole, and the images of each step
through the tower. Where the texts alone are learned, no graph is kept of the images: no weight of CLIP is
trained.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from open_clip import OPENAI_IMAGENET_TEMPLATES
from torch import Tensor

from benchmarks import plain
from heba.clip.features import Classes
from heba.clip.towers import text_tower

Loss = Callable[[Tensor, Tensor], Tensor]  # of preprocessed images [n, 3, size, size] and their labels [n]


def encode_text(clip: Any, tokens: Tensor, embedded: Tensor, deep: dict[int, Tensor] | None = None) -> Tensor:
    """Text features [n, E] of `tokens` [n, 77] with the embeddings [n, 77, width] for theirs.

    `deep`: by block (0-based), vectors [n, M, width] that take positions 1 to M before it.
    """
    text = text_tower(clip)
    x = (embedded + text.positional_embedding).permute(1, 0, 2)
    for i, block in enumerate(text.transformer.resblocks):
        if deep and i in deep:
            x = with_context(x.permute(1, 0, 2), deep[i]).permute(1, 0, 2)
        x = plain.run_block(block, x, None, None, text.attn_mask, None)
    x = text.ln_final(x.permute(1, 0, 2))
    return x[torch.arange(len(tokens), device=x.device), tokens.argmax(dim=-1)] @ text.text_projection


def encode_image(clip: Any, images: Tensor, prompts: Sequence[Tensor] = ()) -> Tensor:
    """Image features [n, E] of preprocessed `images` [n, 3, size, size].

    `prompts`: vectors [M, width], which come behind the patches and give way to the next before each block.
    """
    visual = clip.visual
    x = visual._embeds(images).permute(1, 0, 2)
    length = len(x)
    for i, block in enumerate(visual.transformer.resblocks):
        if i < len(prompts):
            vectors = visual.ln_pre(prompts[0]) if i == 0 else prompts[i]
            x = torch.cat([x[:length], vectors.unsqueeze(1).expand(-1, len(images), -1)])
        x = plain.run_block(block, x, None, None, None, None)
    return visual.ln_post(x[0]) @ visual.proj


def logits(clip: Any, images: Tensor, texts: Tensor) -> Tensor:
    """exp(logit_scale) cos(x, t) [n, n_classes], of features [n, E] and [n_classes, E]."""
    return clip.logit_scale.exp() * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T


def with_context(x: Tensor, context: Tensor) -> Tensor:
    """[n, 77, width] with `context` [M, width] or [n, M, width] at positions 1 to M."""
    context = context.expand(len(x), -1, -1)
    return torch.cat([x[:, :1], context, x[:, 1 + context.shape[1] :]], dim=1)


@torch.no_grad()
def embed(clip: Any, classes: Classes, m: int, words: str | None = None) -> tuple[Tensor, Tensor]:
    """The tokens [n, 77] of "X X <words> <name>.", where a letter or a word stands for each of `m` vectors, and
    their embeddings [n, 77, width]."""
    known = words.split() if words else []
    prefix = " ".join(["X"] * (m - len(known)) + known)
    tokens = classes.tokenizer([f"{prefix} {name}." for name in classes.names]).to(clip.logit_scale.device)
    return tokens, text_tower(clip).token_embedding(tokens)


def coop(clip: Any, learned: Any, classes: Classes, settings: Any) -> Loss:
    tokens, embedded = embed(clip, classes, len(learned["ctx"]), settings.words)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        texts = encode_text(clip, tokens, with_context(embedded, learned["ctx"]))
        return F.cross_entropy(logits(clip, encode_image(clip, images), texts), labels)

    return loss


def cocoop(clip: Any, learned: Any, classes: Classes, settings: Any) -> Loss:
    tokens, embedded = embed(clip, classes, len(learned["ctx"]), settings.words)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        found = []
        for x in F.normalize(encode_image(clip, images), dim=-1).split(1):
            context = learned["ctx"] + learned.meta_net(x)
            found.append(logits(clip, x, encode_text(clip, tokens, with_context(embedded, context))))
        return F.cross_entropy(torch.cat(found), labels)

    return loss


def kgcoop(clip: Any, learned: Any, classes: Classes, settings: Any) -> Loss:
    tokens, embedded = embed(clip, classes, len(learned["ctx"]), settings.words)
    known = classes.features.to(embedded.device)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        texts = encode_text(clip, tokens, with_context(embedded, learned["ctx"]))
        own = F.cross_entropy(logits(clip, encode_image(clip, images), texts), labels)
        return own + settings.weight * (1 - F.cosine_similarity(texts, known).mean())

    return loss


def prograd(clip: Any, learned: Any, classes: Classes, settings: Any) -> Loss:
    tokens, embedded = embed(clip, classes, len(learned["ctx"]), settings.words)
    known, t = classes.features.to(embedded.device), settings.temperature

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        ctx, x = learned["ctx"], encode_image(clip, images)
        p = logits(clip, x, encode_text(clip, tokens, with_context(embedded, ctx)))
        q = (logits(clip, x, known) / t).softmax(dim=-1)
        own, general = F.cross_entropy(p, labels), t**2 * F.cross_entropy(p / t, q)
        (b,) = torch.autograd.grad(general, ctx, retain_graph=True)
        (a,) = torch.autograd.grad(own, ctx)
        if (a * b).sum() < 0:
            a = a - settings.share * (a * b).sum() / (b * b).sum() * b
        step = (a * ctx).sum()  # its gradient is a
        return own.detach() + step - step.detach()

    return loss


def tcp(clip: Any, learned: Any, classes: Classes, settings: Any) -> Loss:
    tokens, embedded = embed(clip, classes, settings.context)
    known = F.normalize(classes.features.to(embedded.device), dim=-1)
    down, up = learned.meta_net["linear1"], learned.meta_net["linear2"]

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        h = down(known)
        made = up(h * torch.sigmoid(1.702 * h)).unflatten(-1, learned.ctx.shape)
        texts = encode_text(clip, tokens, with_context(embedded, learned.ctx), {settings.after: made})
        own = F.cross_entropy(logits(clip, encode_image(clip, images), texts), labels)
        return own + settings.weight * (1 - F.cosine_similarity(texts, known).mean())

    return loss


def maple(clip: Any, learned: Any, classes: Classes, settings: Any) -> Loss:
    # The context takes the first of the words; the others stay.
    tokens, embedded = embed(clip, classes, len(settings.words.split()), settings.words)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        first, *later = learned.text
        texts = encode_text(clip, tokens, with_context(embedded, first), dict(enumerate(later, 1)))
        vectors = [project(p) for project, p in zip(learned.project, learned.text, strict=True)]
        return F.cross_entropy(logits(clip, encode_image(clip, images, vectors), texts), labels)

    return loss


@torch.no_grad()
def openai_teacher(clip: Any, classes: Classes) -> Tensor:
    """[n_classes, E], the mean of the features of OpenAI's texts, which are encoded once."""
    texts = [[template(name) for template in OPENAI_IMAGENET_TEMPLATES[:60]] for name in classes.names]
    where = clip.logit_scale.device
    return torch.stack([clip.encode_text(classes.tokenizer(own).to(where)).mean(dim=0) for own in texts])


def promptsrc(clip: Any, learned: Any, classes: Classes, settings: Any) -> Loss:
    tokens, embedded = embed(clip, classes, len(settings.words.split()), settings.words)
    teacher = F.normalize(openai_teacher(clip, classes), dim=-1)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        first, *later = learned.text
        texts = encode_text(clip, tokens, with_context(embedded, first), dict(enumerate(later, 1)))
        texts, x = F.normalize(texts, dim=-1), F.normalize(encode_image(clip, images, list(learned.image)), dim=-1)
        with torch.no_grad():
            frozen = F.normalize(encode_image(clip, images), dim=-1)
            q = logits(clip, frozen, teacher).log_softmax(dim=-1)
        p = logits(clip, x, texts)
        far = settings.text_weight * F.l1_loss(texts, teacher) + settings.image_weight * F.l1_loss(x, frozen)
        divergence = F.kl_div(p.log_softmax(dim=-1), q, reduction="sum", log_target=True) / p.numel()
        return F.cross_entropy(p, labels) + far + divergence

    return loss


def vpt(clip: Any, learned: Any, classes: Classes, settings: Any) -> Loss:
    tokens, embedded = embed(clip, classes, len(settings.words.split()), settings.words)
    with torch.no_grad():
        texts = encode_text(clip, tokens, embedded)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits(clip, encode_image(clip, images, list(learned["image"])), texts), labels)

    return loss


# By the name of a method, from its frozen CLIP, its trained module, classes with a prompt each, and its settings.
LOSSES: dict[str, Callable[[Any, Any, Classes, Any], Loss]] = {
    "coop": coop,
    "cocoop": cocoop,
    "kgcoop": kgcoop,
    "prograd": prograd,
    "maple": maple,
    "promptsrc": promptsrc,
    "tcp": tcp,
    "vpt": vpt,
}
