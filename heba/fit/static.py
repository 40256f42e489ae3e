"""Forward and backward of a training step in shapes that never change, so that a GPU runs them as one CUDA graph.

An H100 is done with the arithmetic of a step long before Python has launched its kernels one by one.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from heba.clip.blocks import Packing
from heba.clip.hooks import HookedCLIP
from heba.clip.towers import embed_tokens
from heba.fit.draws import Recipe, Step, TextBank
from heba.fit.work import most_classes

LENGTH_STEP = 8  # text lengths are rounded up to its multiples: a graph each


def masked_cross_entropy(logits: Tensor, targets: Tensor, valid: Tensor, label_smoothing: float) -> Tensor:
    """F.cross_entropy with label smoothing over the columns of `logits` [batch, n] where `valid` [n] is true."""
    log_p = F.log_softmax(logits.masked_fill(~valid, -torch.inf), dim=-1)
    right = log_p.gather(1, targets.unsqueeze(1)).mean()
    all_classes = (log_p.masked_fill(~valid, 0.0).sum(-1) / valid.sum()).mean()
    return -(1 - label_smoothing) * right - label_smoothing * all_classes


class StaticStep:
    """Computes the loss of a step and leaves the gradients in the adapters' `grad`.

    Classes are padded to the most that a step can have and masked in the loss, texts to a multiple of 8 tokens. On
    a GPU the work is captured at the first step of each text length and replayed from then on. On a CPU it is done
    as it stands.

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
        device = model.logit_factor().device
        n, blocks = most_classes(bank.n_classes, batch_size, recipe.neg_ratio), model.end - model.start + 1
        self.images = torch.zeros(batch_size, 3, size, size, device=device)
        self.targets = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.prompts, self.eot = (torch.zeros(n, dtype=torch.long, device=device) for _ in range(2))
        self.valid = torch.zeros(n, dtype=torch.bool, device=device)
        self.text_scales, self.visual_scales = (torch.ones(blocks, device=device) for _ in range(2))
        self.loss = torch.zeros((), device=device)
        self.parameters = list(model.adapters.parameters())
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.graphs: dict[int, Callable[[], None]] = {}

    def __call__(self, images: Tensor, step: Step) -> Tensor:
        """The loss (0-dim) of `step` with its preprocessed `images` [batch, 3, size, size]."""
        n = len(step.prompts)
        self.images.copy_(images)
        self.targets.copy_(step.targets)
        self.valid.fill_(False)[:n] = True
        # The padding repeats the first prompt; its columns are masked.
        self.prompts.copy_(step.prompts[0])[:n] = step.prompts
        self.eot.copy_(step.packing.eot[0])[:n] = step.packing.eot
        self.text_scales.copy_(step.text_scales)
        self.visual_scales.copy_(step.visual_scales)
        length = min(-(-step.packing.length // LENGTH_STEP) * LENGTH_STEP, self.bank.tokens.shape[1])
        if length not in self.graphs:
            self.graphs[length] = self._capture(length)
        self.graphs[length]()
        return self.loss.clone()

    def _capture(self, length: int) -> Callable[[], None]:
        def run() -> None:
            self._run(length)

        if self.images.device.type != "cuda":
            return run
        # Kernels choose their algorithms and allocate their workspaces in the first runs, outside of a capture.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def _run(self, length: int) -> None:
        for parameter in self.parameters:
            assert parameter.grad is not None
            parameter.grad.zero_()
        model, bank = self.model, self.bank
        # Weights cast by autocast must not outlive a replay, so they are not cached.
        kind = self.images.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            if bank.hidden is None:
                with torch.no_grad():
                    hidden = embed_tokens(model.clip, bank.tokens[self.prompts, :length], model.start - 1)
            else:
                hidden = bank.hidden[self.prompts, :length]
            read = torch.arange(len(self.eot), device=self.eot.device) * length + self.eot
            packing = Packing(None, self.eot, read, length)
            image = F.normalize(model.encode_image(self.images, self.visual_scales).float(), dim=-1)
            text = F.normalize(model.encode_text_from(hidden, packing, self.text_scales).float(), dim=-1)
            logits = model.logit_factor() * image @ text.T
            loss = masked_cross_entropy(logits, self.targets, self.valid, self.recipe.label_smoothing)
        loss.backward()
        self.loss.copy_(loss.detach())
