"""``patch``, ``unpatch`` and ``patched``: the public way in and out.

A patched encoder is the same object with another class: a subclass of its own class, of the same
name, that tries the fast path in its ``forward``. So are a head that reads one token of each text,
and a ``SentenceTransformer`` with its pooling.
Keys, hooks, ``isinstance``, ``save_pretrained`` and pickling stay as they were, and no other model
of that class is touched.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import nn

from encoder_fast.errors import UnsupportedModelError
from encoder_fast.families import find_family, unsupported
from encoder_fast.families.family import has_own_forward, patched_methods
from encoder_fast.patching.head import HeadState
from encoder_fast.patching.locate import STATE, original_class, root_module
from encoder_fast.patching.readers import Surroundings, ways_to
from encoder_fast.patching.sentence import SentenceState, sentence_states
from encoder_fast.patching.state import NOT_FAST, EncoderState

M = TypeVar("M")
State = EncoderState | HeadState | SentenceState


def patch(model: M, backend: str = "auto", *, cuda_graphs: bool = False, strict: bool = False) -> M:
    """Make the encoders inside a model run fast, in place.

    Calls, outputs, state dict and files stay what they were, with one difference: what the encoder
    returns at padded positions is zeros, so that a head's logits there are its bias. Where a
    library module inside ``model`` reads padding, the original forward runs. Code of the user's own
    gets the zeros, and the report names it. So patch the whole model, not the encoder in it.

    Weights changed later take effect at the next call. One kind of change may be noticed late: a
    weight written through ``.data``, NumPy or a CUDA graph, which PyTorch does not count. It takes
    effect once 1,024 more tokens have run on a CPU, 8,192 on a GPU, or at once after another
    ``patch``.

    Args:
        model: a supported Hugging Face encoder, bare or with a head; or any ``nn.Module`` or
            transformers pipeline that holds one.
        backend: ``auto`` (by device), ``cpu``, ``triton``, ``cuda`` or ``reference``. One asked for
            by name never gives way to another.
        cuda_graphs: run small batches as CUDA graphs, on an NVIDIA GPU where the model already is:
            from the second batch of a size on, its kernels are launched at once. Sizes are rounded
            up, at most 64 graphs are kept, and what runs without one is in the report.
        strict: raise :class:`~encoder_fast.FallbackError` where a call would run the original
            forward, instead of running and counting it.

    Returns:
        The same object. Patching it again replaces the options and starts the counts anew. A copy
        of it is patched; a pickle, such as a worker process gets, is not, and loads without
        encoder_fast.

    Raises:
        UnsupportedModelError: it holds no supported encoder, or one in a configuration that has no
            fast path. Nothing is changed then.
        BackendUnavailableError: the backend can't run where the model is, or ``cuda_graphs`` is set
            and there are none for it. Nothing is changed.
        ValueError: no backend of that name.
    """
    _patch(root_module(model), backend, cuda_graphs, strict)
    return model


def unpatch(model: M) -> M:
    """Give a model its original forward back, bit for bit. Harmless where nothing is patched."""
    for module in root_module(model).modules():
        _restore(module)
    return model


@contextmanager
def patched(
    model: M, backend: str = "auto", *, cuda_graphs: bool = False, strict: bool = False
) -> Iterator[M]:
    """Patch for the length of a ``with`` block; what was patched before is so again after it."""
    root = root_module(model)
    before = {m: m.__dict__[STATE] for m in root.modules() if STATE in m.__dict__}
    inside = _patch(root, backend, cuda_graphs, strict)
    try:
        yield model
    finally:
        # By what was patched, not by what the model holds now: a part may have been replaced.
        for module in inside:
            _restore(module)
        for module, state in before.items():
            _install(module, state)


def _patch(root: nn.Module, backend: str, cuda_graphs: bool, strict: bool) -> list[nn.Module]:
    """Patch every encoder below ``root``, or raise and change nothing; returns them."""
    found: list[tuple[nn.Module, EncoderState]] = []
    heads: list[tuple[nn.Module, HeadState]] = []
    modules = dict(root.named_modules())
    encoders = {
        path: module for path, module in modules.items() if find_family(original_class(module))
    }
    ways = ways_to(root, set(map(id, encoders.values())))
    for path, module in encoders.items():
        original = original_class(module)
        family = find_family(original)
        assert family is not None
        # An encoder may be shared.
        parents = [(m, n) for m in modules.values() for n, c in m._modules.items() if c is module]
        places = [(root, names) for names in ways[id(module)]]
        if isinstance(before := module.__dict__.get(STATE), EncoderState):
            # It may be patched again by itself: what holds it reads it as before.
            places += [place for place in before.surroundings.places() if place[0] is not root]
        surroundings = Surroundings(family, places)
        state = EncoderState(family, original, backend, strict, surroundings, cuda_graphs)
        try:
            if has_own_forward(module):
                raise UnsupportedModelError("its forward was replaced on the instance")
            state.read(module)
            for parent, _ in parents:
                family.check_head(parent)
        except UnsupportedModelError as error:
            where = f"{original.__name__}{f' at {path}' if path else ''}"
            raise UnsupportedModelError(f"{where}: {error}. Nothing was changed.") from None
        found.append((module, state))
        for parent, name in parents:
            cls = original_class(parent)
            if family.has_head(cls):
                heads.append((parent, HeadState(family, cls, name)))
    if not found:
        raise unsupported(root)
    patched: list[tuple[nn.Module, State]] = [*found, *heads, *sentence_states(modules.values())]
    for module, its_state in patched:
        _install(module, its_state)
    return [module for module, _ in patched]


def _install(module: nn.Module, state: State) -> None:
    module.__dict__[STATE] = state
    # The original method, left behind by a hook, would run in place of the one that asks the state.
    if "forward" in module.__dict__ and not has_own_forward(module):
        del module.__dict__["forward"]
    fast = _fast_class(state.original, state.entry)
    if not isinstance(module, fast):  # as it is below a class that somebody put on top
        module.__class__ = fast


def _restore(module: nn.Module) -> None:
    state = module.__dict__.pop(STATE, None)
    # Somebody may have put a class of their own on top; without its state, ours below it is inert.
    if state is not None and type(module) is _fast_class(state.original, state.entry):
        module.__class__ = state.original


class _Copier:
    """What makes the new object where a patched module is copied or loaded.

    Copying calls it as it is: the copy is patched, with a state of its own. A pickle has the plain
    ``object.__new__`` in its place.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, cls: Any) -> nn.Module:
        clone = object.__new__(type(self._module))
        state = self._module.__dict__.get(STATE)
        if state is not None:
            clone.__dict__[STATE] = copy.copy(state)
        return clone

    def __reduce__(self) -> Any:
        return getattr, (object, "__new__")


class _State(dict[str, Any]):
    """The attributes of a patched module on their way into a copy of it.

    A deep copy alone knows what else is copied, and so where the copy of an encoder sits. In a
    pickle this is a plain ``dict``.
    """

    def __init__(self, module: nn.Module, attributes: dict[str, Any]) -> None:
        super().__init__(attributes)
        self._module = module

    def __deepcopy__(self, memo: dict) -> dict[str, Any]:
        before, clone = self._module.__dict__.get(STATE), memo.get(id(self._module))
        if isinstance(before, EncoderState) and isinstance(clone, nn.Module):
            clone.__dict__[STATE].surroundings = before.surroundings.copied(memo, self._module)
        return copy.deepcopy(dict(self), memo)

    def __reduce__(self) -> Any:
        return dict, (), None, None, iter(self.items())


# A cache alone lets two threads make two of one class, and unpatch knows the later one.
_making = Lock()


def _fast_class(original: Any, entry: str) -> Any:
    """The subclass that patched instances of ``original`` get; one for each class.

    Its method ``entry`` asks the state that an instance carries first.
    """
    with _making:
        return _make_fast_class(original, entry)


@functools.cache
def _make_fast_class(original: Any, entry: str) -> Any:
    forward = getattr(original, entry)

    @functools.wraps(forward)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = self.__dict__.get(STATE)
        if state is not None and not torch.compiler.is_exporting():
            output = state.attempt(self, args, kwargs)
            if output is not NOT_FAST:
                return output
        # Looked up now: somebody may have replaced the class's own since.
        return getattr(original, entry)(self, *args, **kwargs)

    # accelerate unwraps a forward as far as it goes, which would take ours off as well.
    method.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    del method.__wrapped__
    if entry == "forward":
        patched_methods[method] = original

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        # A pickle holds the model as it was before: it loads without encoder_fast. The usual
        # constructor of pickles insists on the object's own class, which this is not to be. A class
        # that somebody put on top stays. There is no __deepcopy__: a wrapper that hands unknown
        # attributes on to this module would take it for its own.
        state = {key: value for key, value in self.__getstate__().items() if key != STATE}
        cls = original if type(self) is fast else type(self)
        return _Copier(self), (cls,), _State(self, state)

    def set_attribute(self: nn.Module, name: str, value: Any) -> None:
        super(fast, self).__setattr__(name, value)
        # Whoever takes a wrapper off puts back what stood there before patch(): the original
        # method, which would run in place of the one that asks the state.
        if name == "forward" and not has_own_forward(self):
            self.__dict__.pop(name, None)

    namespace = {
        entry: method,
        "__setattr__": set_attribute,
        "__reduce_ex__": reduce_ex,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }

    def make(cls: Any, *args: Any, **kwargs: Any) -> Any:
        # type(model)(config) and type(model).from_pretrained make models that are not patched.
        return meta.__call__(original if cls is fast else cls, *args, **kwargs)

    meta: Any = type(original)
    fast = type(meta.__name__, (meta,), {"__call__": make})(
        original.__name__, (original,), namespace
    )

    def reduce(cls: Any) -> Any:
        # A class by name, as ever; ours as the original, which is what a copy of it is. A process
        # pool of sentence-transformers sends a class method of the model, and so its class.
        return (copy.copy, (original,)) if cls is fast else cls.__qualname__

    copyreg.pickle(type(fast), reduce)
    return fast
