"""Train the tiny CLIP on clean drawings and their captions: `python -m heba.embedded.pretrain --help`."""

import argparse
import math
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from heba.clip.preprocess import Preprocess, normalise
from heba.clip.tiny import TOKEN_TABLE, new_tiny_clip
from heba.clip.towers import cut_texts
from heba.data import datasets
from heba.data.prompts import build_prompts
from heba.embedded import canvas, suite

GENERAL = ("a photo of a {}.", "a picture of a {}.", "a {}.", "{}")


def classes() -> list[tuple[str, str]]:
    """All (data set, class) pairs of the 11 sets."""
    return [(k, n) for k, info in suite.DATASETS.items() if k not in suite.VARIANTS for n in info.class_names]


def captions(key: str, name: str) -> list[str]:
    """Captions of a class: general templates, the data set's template, the prompts with descriptions."""
    template = datasets.template(key, embedded=True)
    described = build_prompts(
        [name], {n: d for n, d in suite.descriptions(key).items() if n == name and d}, template
    ).texts
    return [t.format(name) for t in (*GENERAL, template)] + described


def render(index: int, n_images: int, seed: int) -> np.ndarray:
    """`n_images` clean pictures [n, 3, 32, 32] of one class."""
    key, name = classes()[index]
    rng = np.random.default_rng([seed, index])
    out = []
    for _ in range(n_images):
        # A weak shift keeps the features from resting on flawless pixels; the gap to the benchmarks stays.
        picture = canvas.shrink(suite.DATASETS[key].draw[name](rng))
        out.append(np.asarray(canvas.shift(picture, rng, rng.uniform(0, 0.35))).transpose(2, 0, 1))
    return np.stack(out)


def contrastive_loss(image: Tensor, text: Tensor, labels: Tensor, factor: Tensor) -> Tensor:
    """CLIP's symmetric loss; images and captions of the same class in a batch all count as positives."""
    logits = factor * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    same = (labels[:, None] == labels[None, :]).float()
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def save_tiny_clip(model: nn.Module, token_ids: Tensor, folder: Path) -> None:
    """Weights in fp16, with the used rows of the token table only."""
    state = {k: v.detach().half().contiguous() for k, v in model.state_dict().items() if k != "attn_mask"}
    state[TOKEN_TABLE] = state[TOKEN_TABLE][token_ids].contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state | {"token_ids": token_ids}, folder / "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for model.safetensors")
    parser.add_argument("--seed", type=int, default=0, help="of drawings, initialisation and batches")
    parser.add_argument("--steps", type=int, default=600, help="of 256 image-caption pairs each")
    parser.add_argument("--per-class", type=int, default=300, help="clean drawings per class")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of AdamW")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    pairs = classes()
    with ProcessPoolExecutor() as pool:
        job = partial(render, n_images=args.per_class, seed=args.seed)
        drawn = list(tqdm(pool.map(job, range(len(pairs))), total=len(pairs), desc="draw"))
    images = torch.from_numpy(np.stack(drawn))
    model, tokenizer = new_tiny_clip()
    tokens = [cut_texts(model, tokenizer(captions(*pair))) for pair in pairs]
    length = max(t.shape[1] for t in tokens)
    tokens = [F.pad(t, (0, length - t.shape[1])) for t in tokens]
    token_ids = torch.cat([t.flatten() for t in tokens]).unique()
    model.context_length = length
    # Only the rows in use are trained: the full table would cost more than the rest of the step.
    full = model.token_embedding.weight.detach()
    table = nn.Embedding.from_pretrained(full[token_ids].clone(), freeze=False)
    tokens = [torch.searchsorted(token_ids, t) for t in tokens]
    parameters = [p for n, p in model.named_parameters() if n != TOKEN_TABLE] + [table.weight]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.1, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(args.seed)
    eot = len(token_ids) - 1

    def encode_text(ids: Tensor) -> Tensor:
        x = table(ids) + model.positional_embedding[:length]
        x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
        x = x[torch.arange(len(x)), (ids == eot).int().argmax(-1)]
        return model.ln_final(x) @ model.text_projection

    model.train()
    with tqdm(range(args.steps), desc="train") as bar:
        for step in bar:
            warm = min(1.0, (step + 1) / 60)
            lr = args.lr * warm * 0.5 * (1 + math.cos(math.pi * step / args.steps))
            for group in optimizer.param_groups:
                group["lr"] = lr
            labels = torch.randint(len(pairs), (256,), generator=generator)
            picks = torch.randint(args.per_class, (256,), generator=generator)
            texts = torch.rand(256, generator=generator)
            ids = torch.stack(
                [tokens[c][int(u * len(tokens[c]))] for c, u in zip(labels.tolist(), texts, strict=True)]
            )
            loss = contrastive_loss(
                model.encode_image(normalise(images[labels, picks], Preprocess())),
                encode_text(ids),
                labels,
                model.logit_scale.exp(),
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=math.log(100))
            bar.set_postfix(loss=f"{loss.item():.3f}")
    with torch.no_grad():
        model.token_embedding.weight[token_ids] = table.weight
    save_tiny_clip(model, token_ids, args.out)


if __name__ == "__main__":
    main()
