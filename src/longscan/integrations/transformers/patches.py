"""Which methods of Transformers are replaced, under which conditions, and how they come back."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any

from longscan.errors import ArgumentError, IntegrationError
from longscan.integrations.transformers import mixers, models

#: Families of models in Transformers whose layers are Mamba-1.
FAMILIES = ("mamba", "falcon_mamba", "jamba", "zamba")


@dataclasses.dataclass(frozen=True)
class Patch:
    """A method that is replaced.

    Attributes:
        family, owner: where the class is, and its name.
        make: from the method to what replaces it.
        parameters: the method's first parameters, by name.
        names: what its code must speak of: the parts of the class that the replacement reads in its stead.
        name: of the method.
    """

    family: str
    owner: str
    make: Callable[[Callable[..., Any]], Callable[..., Any]]
    parameters: tuple[str, ...]
    names: tuple[str, ...]
    name: str = "forward"

    @property
    def module(self) -> str:
        return f"transformers.models.{self.family}.modeling_{self.family}"


_CACHE = ("update_conv_state", "update_recurrent_state", "layer_idx")
_PARTS = ("in_proj", "conv1d", "conv_kernel_size", "activation", "time_step_rank", "ssm_state_size")
_LINEAR = ("x_proj", "dt_proj", "out_proj", "A_log", "D")
_NORMS = ("dt_layernorm", "b_layernorm", "c_layernorm")
_BACKBONE = ("backbone", "float")
_HEADS = ("n_mamba_heads", "x_proj_weight", "dt_proj_weight", "dt_proj_bias", "out_proj", "A_log", "D")


def _mixer(family: str, owner: str, shape: mixers.Shape, *names: str, hooked: Sequence[str]) -> Patch:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        from transformers.integrations.accelerate import force_accelerate_hooks

        # These parts are not called, only read: accelerate is to bring their weights here first, as for the original.
        hooks: Any = force_accelerate_hooks(list(hooked))
        replacement: Callable[..., Any] = hooks(mixers.make_forward(shape, original))
        return replacement

    parameters = ("self", "hidden_states", "cache_params", "attention_mask")
    return Patch(family, owner, make, parameters, (*_CACHE, *_PARTS, *names))


def _model(family: str, owner: str, *names: str) -> Patch:
    return Patch(family, owner, models.make_model_forward, ("self", "input_ids"), ("layers", *names))


def _language_model(family: str, owner: str, output: str, *names: str) -> Patch:
    make = functools.partial(models.make_language_model_forward, output)
    return Patch(family, owner, make, ("self", "input_ids", "attention_mask"), ("lm_head", "logits_to_keep", *names))


PATCHES = (
    _mixer("mamba", "MambaMixer", mixers.MAMBA, *_LINEAR, hooked=("conv1d", "dt_proj")),
    _mixer("falcon_mamba", "FalconMambaMixer", mixers.NORMED, *_LINEAR, *_NORMS, hooked=("conv1d", "dt_proj")),
    _mixer("jamba", "JambaMambaMixer", mixers.NORMED, *_LINEAR, *_NORMS, hooked=("conv1d", "dt_proj")),
    _mixer("zamba", "ZambaMambaMixer", mixers.ZAMBA, *_HEADS, hooked=("conv1d",)),
    _model("mamba", "MambaModel", "embeddings", "norm_f"),
    _model("falcon_mamba", "FalconMambaModel", "embeddings", "norm_f"),
    _model("jamba", "JambaModel", "embed_tokens", "final_layernorm"),
    _model("zamba", "ZambaModel", "embed_tokens", "final_layernorm"),
    _language_model("mamba", "MambaForCausalLM", "MambaCausalLMOutput", *_BACKBONE),
    _language_model("falcon_mamba", "FalconMambaForCausalLM", "FalconMambaCausalLMOutput", *_BACKBONE),
    _language_model("jamba", "JambaForCausalLM", "MoeCausalLMOutputWithPast", "model"),
    _language_model("zamba", "ZambaForCausalLM", "CausalLMOutputWithPast", "model"),
)

# What is replaced at present: (class, name) to the original and the replacement.
_active: dict[tuple[type, str], tuple[Any, Any]] = {}
_lock = threading.RLock()


class Enabled:
    """What :func:`enable` returns: as a context, it puts back at its end what was there before."""

    def __init__(self, before: tuple[str, ...]) -> None:
        self._before = before

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *error: object) -> None:
        with _lock:
            disable()
            if self._before:
                enable(self._before)


def enable(families: Sequence[str] = FAMILIES) -> Enabled:
    """Put longscan's operators under Transformers' Mamba-1 models, those that exist and those that are made later.

    Args:
        families: which of "mamba", "falcon_mamba", "jamba", "zamba"; those enabled already stay so.

    Returns:
        An object that can be used as a context (``with enable(): ...``); it may as well be dropped.

    Raises:
        ArgumentError: an unknown family.
        IntegrationError: Transformers is not installed, or its classes are not of the shape this version knows; then
            nothing is replaced.
    """
    for family in families:
        if family not in FAMILIES:
            raise ArgumentError(f"families: got {family!r}; allowed are {', '.join(FAMILIES)}")
    with _lock:
        before = enabled()
        chosen = [patch for patch in PATCHES if patch.family in families and patch.family not in before]
        found = [(patch, *_find(patch)) for patch in chosen]
        made = [(owner, patch.name, original, _wrap(patch, original)) for patch, owner, original in found]
        for owner, name, original, replacement in made:
            _active[owner, name] = (original, replacement)
            setattr(owner, name, replacement)
    return Enabled(before)


def disable() -> None:
    """Give Transformers its own methods back, the very same objects.

    Raises:
        IntegrationError: a method has been replaced by somebody else since; all others are put back.
    """
    with _lock:
        strangers = []
        for (owner, name), (original, replacement) in list(_active.items()):
            if owner.__dict__.get(name) is replacement:
                setattr(owner, name, original)
            else:
                strangers.append(f"{owner.__name__}.{name}")
            del _active[owner, name]
    if strangers:
        raise IntegrationError(
            f"{', '.join(strangers)}: replaced by somebody else since enable(), so left as it is; undo that first next "
            "time"
        )


def enabled() -> tuple[str, ...]:
    """The families whose methods are replaced at present."""
    owners = {owner.__name__ for owner, _ in _active}
    return tuple(
        family for family in FAMILIES if any(patch.owner in owners for patch in PATCHES if patch.family == family)
    )


def _wrap(patch: Patch, original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement, with the name, the documentation and (for inspection) the signature of the original."""
    return functools.wraps(original)(patch.make(original))


def _find(patch: Patch) -> tuple[type, Callable[..., Any]]:
    """The class of a patch, and the method that it replaces, if they are what it takes them for."""
    try:
        import transformers
    except ImportError as error:
        raise IntegrationError(f"transformers cannot be imported ({error}); install longscan[transformers]") from error
    where = f"transformers {transformers.__version__}: {patch.module}.{patch.owner}.{patch.name}"
    advice = "this version of longscan knows Transformers 5.20 to 5.24; nothing was replaced"
    try:
        module = importlib.import_module(patch.module)
        owner = getattr(module, patch.owner)
        original = owner.__dict__[patch.name]
        code = inspect.unwrap(original).__code__
        parameters = tuple(inspect.signature(original).parameters)
    except (ImportError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise IntegrationError(f"{where} is not there ({error!r}); {advice}") from error
    expected = patch.parameters
    # Until 5.23 it was `cache_params`.
    if tuple("cache_params" if name == "cache" else name for name in parameters[: len(expected)]) != expected:
        raise IntegrationError(f"{where} takes {parameters}, expected {expected} first; {advice}")
    spoken = {*code.co_names, *code.co_varnames, *code.co_consts}
    if missing := [name for name in patch.names if name not in spoken]:
        raise IntegrationError(f"{where} does not speak of {', '.join(missing)}; {advice}")
    return owner, original
