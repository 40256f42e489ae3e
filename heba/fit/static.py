"""Forward and backward of a training step in shapes that never change, so that a GPU runs them as one CUDA graph.

An H100 is done with the arithmetic of a step long before Python has launched its kernels one by one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from heba.clip.blocks import Packing
from heba.clip.hooks import HookedCLIP
from heba.clip.towers import embed_tokens
from heba.fit.draws import Recipe, Step, TextBank
from heba.fit.work import most_classes

TOKEN_STEP, LENGTH_STEP = 128, 8  # the tokens of a step are rounded up to multiples: a graph each


def masked_cross_entropy(logits: Tensor, targets: Tensor, valid: Tensor, label_smoothing: float) -> Tensor:
    """F.cross_entropy with label smoothing over the columns of `logits` [batch, n] where `valid` [n] is true."""
    log_p = F.log_softmax(logits.masked_fill(~valid, -torch.inf), dim=-1)
    right = log_p.gather(1, targets.unsqueeze(1)).mean()
    all_classes = (log_p.masked_fill(~valid, 0.0).sum(-1) / valid.sum()).mean()
    return -(1 - label_smoothing) * right - label_smoothing * all_classes


class StaticStep:
    """Computes the loss of a step and leaves the gradients in the adapters' `grad`.

    Classes are padded to the most that a step can have, with texts of one token, and masked in the loss. The
    number of tokens is rounded up with such as stand behind an EOT, where they change nothing. Texts that are
    equally long (`HookedCLIP.pack`) are made longer instead. On a GPU the work is captured at the first step of
    each number and replayed from then on; the graphs share their memory, for nothing in it outlives a replay. On
    a CPU it is done as it stands.

    Args:
        batch_size: images in every step. size: their side in pixels.
    """

    def __init__(
        self, model: HookedCLIP, bank: TextBank, batch_size: int, size: int, recipe: Recipe, bf16: bool
    ) -> None:
        from open_clip.transformer import VisionTransformer

        if type(model.clip.visual) is not VisionTransformer:
            raise ValueError("cuda_graphs: only with an image tower of open_clip, not of timm; set it to false")
        self.model, self.bank, self.recipe, self.bf16 = model, bank, recipe, bf16
        self.packed = model.context is None and not model.reach
        device = model.logit_factor().device
        n, blocks = most_classes(bank.n_classes, batch_size, recipe.neg_ratio), model.end - model.start + 1
        self.images = torch.zeros(batch_size, 3, size, size, device=device)
        self.targets = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.prompts, self.eot = (torch.zeros(n, dtype=torch.long, device=device) for _ in range(2))
        self.valid = torch.zeros(n, dtype=torch.bool, device=device)
        self.text_scales, self.visual_scales = (torch.ones(blocks, device=device) for _ in range(2))
        self.loss = torch.zeros((), device=device)
        self.parameters = list(model.adapters.parameters())
        # Of what no loss depends on they stay zero, as in `update`.
        self.gradients = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def __call__(self, images: Tensor, step: Step) -> Tensor:
        """The loss (0-dim) of `step` with its preprocessed `images` [batch, 3, size, size]."""
        tokens = self.fill(images, step)
        if self.images.device.type != "cuda":
            self.compute(tokens)
        else:
            if tokens not in self.graphs:
                self.graphs[tokens] = self._capture(tokens)
            self.graphs[tokens].replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.loss.clone()

    def fill(self, images: Tensor, step: Step) -> int:
        """Put a step into its place; returns the number of tokens that it is computed with."""
        n, packing = len(step.prompts), step.packing
        self.images.copy_(images)
        self.targets.copy_(step.targets)
        self.valid.fill_(False)[:n] = True
        # The padding has the first prompt; its columns are masked.
        self.prompts.copy_(step.prompts[0])[:n] = step.prompts
        self.eot.copy_(packing.eot[0] * (not self.packed))[:n] = packing.eot
        self.text_scales.copy_(step.text_scales)
        self.visual_scales.copy_(step.visual_scales)
        longest = self.bank.tokens.shape[1]
        if not self.packed:
            return len(self.eot) * min(_up(packing.length, LENGTH_STEP), longest)
        used = n * packing.length if packing.rows is None else len(packing.rows)
        return min(_up(used + len(self.eot) - n, TOKEN_STEP), len(self.eot) * longest)

    def _capture(self, tokens: int) -> torch.cuda.CUDAGraph:
        # Kernels choose their algorithms and allocate their workspaces in the first runs, outside of a capture.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.compute(tokens)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.graphs.values())).pool() if self.graphs else None
        with torch.cuda.graph(graph, pool=pool):
            self.compute(tokens)
        return graph

    def _packing(self, tokens: int) -> Packing:
        """Of the texts that lie in `eot`, with so many tokens."""
        n, device = len(self.eot), self.eot.device
        if not self.packed:
            length = tokens // n
            return Packing(None, self.eot, torch.arange(n, device=device) * length + self.eot, length)
        length = self.bank.tokens.shape[1]
        behind = (torch.arange(length, device=device) > self.eot.unsqueeze(1)).flatten()
        rows = behind.to(torch.uint8).argsort(stable=True)[:tokens]  # the texts, then what is behind them
        return Packing(rows, self.eot, (self.eot + 1).cumsum(0) - 1, length)

    def compute(self, tokens: int) -> None:
        """Loss and gradients of what lies in the static tensors."""
        model, bank, packing = self.model, self.bank, self._packing(tokens)
        # Weights cast by autocast must not outlive a replay, so they are not cached.
        kind = self.images.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            if bank.hidden is None:
                with torch.no_grad():
                    hidden = embed_tokens(model.clip, bank.tokens[self.prompts, : packing.length], model.start - 1)
            else:
                hidden = bank.hidden[self.prompts, : packing.length]
            image = F.normalize(model.encode_image(self.images, self.visual_scales).float(), dim=-1)
            text = F.normalize(model.encode_text_from(hidden, packing, self.text_scales).float(), dim=-1)
            logits = model.logit_factor() * image @ text.T
            loss = masked_cross_entropy(logits, self.targets, self.valid, self.recipe.label_smoothing)
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        pairs = [(old, new) for old, new in zip(self.gradients, found, strict=True) if new is not None]
        torch._foreach_copy_([old for old, _ in pairs], [new for _, new in pairs])
        self.loss.copy_(loss.detach())


def _up(n: int, step: int) -> int:
    return -(-n // step) * step
