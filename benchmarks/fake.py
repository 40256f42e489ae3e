"""A GPU that has devices, types and shapes, and no values: work for a GPU runs here as far as torch can check it.

Tensors on the GPU are torch's FakeTensors; those on the CPU are real, so that a training draws as it always does.
What waits for the GPU is recorded, and so is every kernel, which `benchmarks.kernels` counts.
"""

import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import heba

aten = torch.ops.aten
OURS = f"{Path(heba.__file__).parent}/"
# They make a tensor without a kernel.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh", "alias"}
FREE |= {"device", "_unsafe_view", "_reshape_alias", "set_", "is_pinned", "_pin_memory"}
# Kernels of a GPU that take weights and values of one type only; shapes alone would let them pass.
ONE_TYPE = {"native_layer_norm", "native_layer_norm_backward", "mm", "addmm", "bmm", "convolution"}
ONE_TYPE |= {"convolution_backward", "_scaled_dot_product_attention_math"}


class FakeGPU(TorchDispatchMode):
    """Records what runs on the GPU.

    Attributes:
        kernels: by operator, how many run on the GPU. moved: bytes that they read and write, each on its own.
        waits: what waits for the GPU, or keeps it waiting: a copy to the CPU, or one to the GPU of memory that is
            not pinned or without `non_blocking`, and indices on the CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.moved = 0
        self.waits: list[str] = []
        self._pinned = WeakIdKeyDictionary()

    def clear(self) -> None:
        """Forget what was recorded."""
        self.kernels.clear()
        self.waits.clear()
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        ours = [x for x in tensors if x.device.type == "cuda"]
        there = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        if name == "is_pinned":
            return args[0] in self._pinned
        if not ours and there != "cuda":
            with unset_fake_temporarily():
                out = args[0].clone() if name == "_pin_memory" else func(*args, **kwargs)
            if name == "_pin_memory":
                self._pinned[out] = True
            return out
        if name == "_local_scalar_dense" or (name == "_to_copy" and there == "cpu"):
            self._wait(f"{name} {tuple(args[0].shape)}")
            if name == "_local_scalar_dense":
                return 0.5 if args[0].is_floating_point() else 0
            with unset_fake_temporarily():
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        self._check(name, tensors, args, kwargs)
        out = None if name == "_fused_sgd_" else func(*args, **kwargs)  # torch knows no shapes of that one
        if not func.is_view and name not in FREE:
            self.kernels[name] += 1
            made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
            self.moved += sum(x.numel() * x.element_size() for x in [*tensors, *made])
        return out

    def _wait(self, what: str) -> None:
        frames = [f for f in traceback.extract_stack() if f.filename.startswith(OURS)]
        where = f"{frames[-1].filename.removeprefix(OURS)} {frames[-1].name}" if frames else "elsewhere"
        self.waits.append(f"{where}: {what}")

    def _check(self, name: str, tensors: list[Tensor], args: Any, kwargs: Any) -> None:
        here = [x for x in tensors if x.device.type == "cpu" and x.dim()]
        if name in ("_to_copy", "copy_") and here:
            source = args[0] if name == "_to_copy" else args[1]
            free = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            if not free or source not in self._pinned:
                self._wait(f"{name} {tuple(source.shape)} from the CPU")
        elif here:
            raise TypeError(f"{name}: a tensor {tuple(here[0].shape)} is on the CPU, the others on the GPU")
        if name in ("nonzero", "masked_select", "_unique2", "unique_dim", "bincount"):
            self._wait(name)
        if name.startswith(("index", "_index")) and any(x.dtype == torch.bool for x in tensors):
            self._wait(f"{name} by a mask")
        if name in ONE_TYPE:
            kinds = {x.dtype for x in tensors if x.is_floating_point()}
            if name == "native_layer_norm_backward":  # its mean and deviation are in fp32
                kinds = {x.dtype for x in (args[0], args[1], args[5]) if x is not None}
            if len(kinds) > 1:
                raise TypeError(f"{name}: {', '.join(sorted(map(str, kinds)))}, and a GPU takes one type")


def gradients(outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of the sum of `outputs`, by a walk over autograd's graph; torch's own engine needs a GPU."""
    nodes: list[Any] = []
    seen: set[Any] = set()
    stack: list[tuple[Any, bool]] = [(x.grad_fn, False) for x in outputs]
    while stack:  # depth first, to an order in which a node comes after all that it gets its gradients from
        node, done = stack.pop()
        if done:
            nodes.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((after, False) for after, _ in node.next_functions if after is not None)
    coming: dict[Any, dict[int, Tensor]] = {x.grad_fn: {x.output_nr: torch.ones_like(x)} for x in outputs}
    found: dict[int, Tensor] = {}
    places = {(x.grad_fn, x.output_nr): x for x in wanted if x.grad_fn is not None}
    with torch.no_grad():
        for node in reversed(nodes):
            parts = coming.pop(node, None)
            if parts is None:
                continue
            for i, grad in parts.items():
                if (node, i) in places:
                    found[id(places[node, i])] = grad
            if hasattr(node, "variable"):
                found[id(node.variable)] = parts[0]
                continue
            about = node._input_metadata
            given = [parts.get(i) for i in range(len(about))]
            edges = node.next_functions
            if hasattr(node, "needs_input_grad"):  # a function written in Python, which takes no None
                made = [torch.zeros(tuple(m.shape), dtype=m.dtype, device=m.device) for m in about]
                out = node.apply(*(new if g is None else g for g, new in zip(given, made, strict=True)))
                out = (out,) if isinstance(out, Tensor) else out
                out = [g for g, need in zip(out, node.needs_input_grad, strict=True) if need]
                edges = [edge for edge in edges if edge[0] is not None]
            else:
                out = node(*given)
            for (after, i), grad in zip(edges, out if isinstance(out, tuple | list) else (out,), strict=True):
                if after is None or grad is None:
                    continue
                grad = _as(grad, after._input_metadata[i])
                slot = coming.setdefault(after, {})
                slot[i] = slot[i] + grad if i in slot else grad
    return [found.get(id(x)) for x in wanted]


def _as(grad: Tensor, about: Any) -> Tensor:
    """A gradient as autograd's engine hands it on: in the type of what it is of, and in its shape."""
    if tuple(grad.shape) != tuple(about.shape):
        grad = grad.sum_to_size(tuple(about.shape))
    return grad if grad.dtype == about.dtype else grad.to(about.dtype)


def _backward(self: Tensor, *_: object, **__: object) -> None:
    leaves = [x for x in _leaves(self.grad_fn) if x.requires_grad]
    for leaf, grad in zip(leaves, gradients([self], leaves), strict=True):
        if grad is not None:
            leaf.grad = grad if leaf.grad is None else leaf.grad.add_(grad)


def _leaves(root: Any) -> list[Tensor]:
    found, seen, stack = [], set(), [root]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        stack.extend(after for after, _ in node.next_functions)
    return found


def _grad(outputs: Any, inputs: Any, *_: object, **__: object) -> tuple[Tensor | None, ...]:
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    return tuple(gradients(outputs, inputs))


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    """The kernel that a GPU has for it, one forward and one backward."""
    if attn_mask is None and q.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]
    bias = attn_mask
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            bias = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(~attn_mask, -torch.inf)
        assert bias is not None
        bias = bias.expand(*q.shape[:-1], k.shape[-2])
    grad = torch.is_grad_enabled()
    return aten._scaled_dot_product_efficient_attention(q, k, v, bias, grad, dropout_p, is_causal)[0]


def move(self: nn.Module, *_: object, **__: object) -> nn.Module:
    """A module with its parameters and buffers on the fake GPU, in place."""
    for part in self.modules():
        for name, value in part._parameters.items():
            if value is not None and value.device.type == "cpu":
                part._parameters[name] = nn.Parameter(value.detach().to("cuda"), value.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to("cuda")
    return self


@contextmanager
def fake_gpu() -> Iterator[FakeGPU]:
    """Within it, "cuda" is the fake GPU. What torch refuses where there is no GPU is put in its place: autocast,
    modules that move, the walk of a backward, and the kernels of an attention."""
    yes, no = (lambda *_: True), (lambda *_: False)
    with (
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", no),
        mock.patch("torch.cuda.is_bf16_supported", yes),
        mock.patch.object(nn.Module, "to", move),
        mock.patch.object(Tensor, "backward", _backward),
        mock.patch.object(torch.autograd, "grad", _grad),
        mock.patch("torch.nn.functional.scaled_dot_product_attention", _attention),
        FakeTensorMode(allow_non_fake_inputs=True),
        FakeGPU() as gpu,
    ):
        yield gpu
