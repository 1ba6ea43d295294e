"""The library of ops alterrec_fast:: that all engines register with, and which engines are installed.

An op's arguments are written once, as the fields of a NamedTuple: its schema comes from their types, and what runs it,
its fakes and its gradients name them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar, cast, get_args, get_type_hints

import torch
from torch import Tensor

# Schemas, fakes and autograd are registered from Python, in each op's file, so that every op exists without the
# extension too; the extension brings the kernels for CPU tensors, and some for CUDA.
LIBRARY = torch.library.Library("alterrec_fast", "DEF")

# Importing triton takes a second, so its kernels are imported by the first op that launches one.
TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # triton runs kernels in Python, on CPU tensors

EXTENSION = "alterrec_fast._C"
NO_EXTENSION = ""  # why the extension is missing; empty where it is not
try:
    importlib.import_module(EXTENSION)
except ImportError as error:
    NO_EXTENSION = str(error)
# The ops that the extension serves on CUDA tensors: none where it was built without nvcc.
CUDA_OPS: set[str] = set()
if not NO_EXTENSION:
    try:
        if torch._C._dispatch_has_kernel_for_dispatch_key("alterrec_fast::native_sampled_softmax", "CUDA"):
            CUDA_OPS.add("sampled_softmax")
    except RuntimeError as error:  # the extension has registered nothing of that name
        raise ImportError(
            f"{EXTENSION} was built from other sources than these: install alterrec-fast again"
        ) from error

Inputs = TypeVar("Inputs", bound=tuple[Any, ...])


class Op(Generic[Inputs]):
    """Two ops of torch's: alterrec_fast::native_NAME(*inputs), whose kernel is the extension's (csrc/binding*.cpp), and
    alterrec_fast::NAME(*inputs, engine), which runs the Triton kernels or calls native_NAME, from Python.

    Calling an `Op` calls native_NAME at once where that is the engine: the way through Python takes 7 us.

    Args:
        name: of the op.
        inputs: a NamedTuple of its arguments; the fields of a NamedTuple among them stand in its place.
        outputs: how many tensors it returns.
        triton: runs the Triton kernels.
        fake: returns empty tensors of the outputs' shapes and dtypes.
    """

    def __init__(
        self,
        name: str,
        inputs: type[Inputs],
        outputs: int,
        triton: Callable[[Inputs], tuple[Tensor, ...]],
        fake: Callable[[Inputs], tuple[Tensor, ...]],
    ):
        self.name, self.inputs, self.arguments = name, inputs, arguments_of(inputs)
        self._define(f"native_{name}", self.arguments, outputs)
        self._define(name, self.arguments | {"engine": str}, outputs)
        self._op = getattr(torch.ops.alterrec_fast, name).default
        self._native = getattr(torch.ops.alterrec_fast, f"native_{name}").default

        def run(*values: Any) -> tuple[Tensor, ...]:
            *arguments, engine = values
            result = triton(self._packed(arguments)) if engine == "triton" else self._native(*arguments)
            return cast(tuple[Tensor, ...], result)

        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, run, key)
        for op in self._names:
            torch.library.register_fake(op, lambda *values: fake(self._packed(values)), lib=LIBRARY)

    def __call__(self, inputs: Inputs, engine: str) -> tuple[Tensor, ...]:
        values = flattened(inputs)
        result = self._native(*values) if engine == "native" else self._op(*values, engine)
        return cast(tuple[Tensor, ...], result)

    def differentiate(
        self,
        names: tuple[str, ...],
        backward: Callable[[Any, str, Tensor, Tensor, Tensor, list[bool]], tuple[Tensor, ...]],
        reference: Callable[[Any], Tensor],
    ) -> None:
        """Registers the gradients of a loss, whose first argument is its problem and whose outputs are the losses, the
        log-sum-exp and what was saved.

        Args:
            names: of the arguments that have a gradient.
            backward: (problem, engine, gradient of the losses, log-sum-exp, saved, whether the gradient of each name is
                needed) -> their gradients, and empty tensors where they are not needed.
            reference: (problem) -> losses, in plain PyTorch: its gradients have gradients themselves.
        """

        problem_type: Any = next(iter(_field_types(self.inputs).values()))
        fields = _field_types(problem_type)
        tensors = [field for field, kind in fields.items() if Tensor in (kind, *get_args(kind))]
        places = [list(self.arguments).index(name) for name in names]

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            problem = problem_type._make(inputs[: len(fields)])
            ctx.engine = (*inputs, "native")[len(self.arguments)]  # native_NAME has no argument `engine`
            ctx.save_for_backward(*(getattr(problem, field) for field in tensors), *output[1:])
            ctx.problem = problem._replace(**dict.fromkeys(tensors))
            ctx.set_materialize_grads(False)  # what is saved, which may be large, has none

        def backward_by_name(ctx: Any, grad_losses: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
            *values, lse, saved = ctx.saved_tensors
            problem = ctx.problem._replace(**dict(zip(tensors, values, strict=True)))
            needs = [ctx.needs_input_grad[place] for place in places]
            if torch.is_grad_enabled():  # create_graph=True
                needed = [name for name, need in zip(names, needs, strict=True) if need]
                grads = dict(
                    zip(needed, _differentiable_gradients(reference, problem, needed, grad_losses), strict=True)
                )
            else:
                computed = zip(names, backward(problem, ctx.engine, grad_losses, lse, saved, needs), needs, strict=True)
                grads = {name: grad for name, grad, need in computed if need}
            in_order = [grads.get(name) for name in self.arguments]
            return (*in_order, *[None] * (len(ctx.needs_input_grad) - len(in_order)))

        for op in self._names:
            torch.library.register_autograd(op, backward_by_name, setup_context=setup_context, lib=LIBRARY)

    @property
    def _names(self) -> tuple[str, str]:
        return f"alterrec_fast::{self.name}", f"alterrec_fast::native_{self.name}"

    def _packed(self, values: Any) -> Inputs:
        """The inputs among an op's arguments, which an engine may follow."""
        return cast(Inputs, _pack(self.inputs, iter(values)))

    @staticmethod
    def _define(name: str, arguments: dict[str, Any], outputs: int) -> None:
        def prototype() -> None: ...

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(argument, kind, annotation=t) for argument, t in arguments.items()]
        signature = inspect.Signature(parameters, return_annotation=tuple[(Tensor,) * outputs])  # type: ignore[misc]
        prototype.__signature__ = signature  # type: ignore[attr-defined]
        LIBRARY.define(torch.library.infer_schema(prototype, op_name=name, mutates_args=()))


def _differentiable_gradients(
    reference: Callable[[Any], Tensor], problem: Any, names: list[str], grad_losses: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of the arguments of these names, which have gradients themselves."""
    with torch.enable_grad():
        # Two arguments may be one tensor: each is a view of its own, so that their gradients stay apart.
        views = {name: getattr(problem, name).view_as(getattr(problem, name)) for name in names}
        losses = reference(problem._replace(**views))
        return torch.autograd.grad(losses, list(views.values()), grad_losses, create_graph=True)


def arguments_of(inputs: type[tuple[Any, ...]]) -> dict[str, Any]:
    """Names and types of a NamedTuple's fields, those of a NamedTuple among them in its place."""
    arguments: dict[str, Any] = {}
    for name, kind in _field_types(inputs).items():
        arguments |= _field_types(kind) if hasattr(kind, "_fields") else {name: kind}
    return arguments


def flattened(inputs: tuple[Any, ...]) -> list[Any]:
    """The values of `arguments_of`, in their order."""
    values: list[Any] = []
    for value in inputs:
        if isinstance(value, tuple):
            values += value
        else:
            values.append(value)
    return values


def _pack(kind: type[tuple[Any, ...]], values: Iterator[Any]) -> tuple[Any, ...]:
    """The inverse of `flattened`."""
    return kind(*(_pack(k, values) if hasattr(k, "_fields") else next(values) for k in _field_types(kind).values()))


@functools.cache
def _field_types(kind: type[tuple[Any, ...]]) -> dict[str, Any]:
    return get_type_hints(kind)
