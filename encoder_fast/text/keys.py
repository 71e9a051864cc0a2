"""The keys of a model's files, and what each may say: one table for all of them.

A key is honoured, harmless or refused by name. What a table does not list is refused, so that a
newer sentence-transformers can't change a model's vectors without a word. ``HARMLESS`` is for keys
that change nothing in what :class:`~encoder_fast.TextEncoder` computes; they are not passed on.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from encoder_fast.errors import ModelFilesError
from encoder_fast.patching.sentence import POOLING_FLAGS


@dataclass(frozen=True, slots=True)
class Rule:
    """What a key may say.

    Attributes:
        takes: whether a value is one of those.
        says: what these are, for an error.
    """

    takes: Callable[[Any], bool]
    says: str


Table: TypeAlias = Mapping[str, "Rule | Table"]


def check(given: Mapping[str, Any], table: Table, file: str, prefix: str = "") -> None:
    """Hold what a file says against its table.

    Raises:
        ModelFilesError: a key that the table has not, or a value that it does not take.
    """
    for key, value in given.items():
        name, rule = prefix + key, table.get(key)
        if rule is None:
            raise ModelFilesError(f"{file} has {name!r}, which TextEncoder does not know")
        if isinstance(rule, Rule):
            if not rule.takes(value):
                shown = reprlib.repr(value)
                raise ModelFilesError(f"{file} has {name} = {shown}; it may be {rule.says}")
        elif isinstance(value, dict):
            check(value, rule, file, f"{name}.")
        elif value is not None:
            raise ModelFilesError(f"{file} has {name} = {reprlib.repr(value)}; it may be an object")


def passed_on(given: Mapping[str, Any] | None, table: Table) -> dict[str, Any]:
    """What is left of checked options without the harmless ones and those that are not set."""
    return {
        key: value
        for key, value in (given or {}).items()
        if table[key] is not HARMLESS and value is not None
    }


def _one_of(*values: Any) -> Rule:
    def takes(given: Any) -> bool:
        return any(type(given) is type(value) and given == value for value in values)

    return Rule(takes, " or ".join("null" if value is None else repr(value) for value in values))


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_prompts(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict) and all(isinstance(v, str | None) for v in value.values())
    )


def _is_modes(value: Any) -> bool:
    modes = value if isinstance(value, list | tuple) else [value]
    return bool(modes) and all(isinstance(mode, str) for mode in modes)


def _is_tokenizer(value: Any) -> bool:
    """Whether transformers finds a tokenizer under a name, or nothing at all.

    It looks for the name among everything it has, and calls ``from_pretrained`` of what it finds: a
    model's or an image processor's asks on the terminal whether the folder's code may run.
    """
    from transformers import PreTrainedTokenizerBase
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    if not isinstance(value, str):
        return value is None
    try:
        # it tries all three
        names = (value, f"{value}Fast", value.removesuffix("Fast"))
        found = [tokenizer_class_from_name(name) for name in names]
    except Exception:
        # part of transformers that can't be imported here
        return False
    # a dummy stands for a class that lacks a package, and says which when it is used
    return all(
        one is None
        or (isinstance(one, type) and issubclass(one, PreTrainedTokenizerBase))
        or getattr(one, "is_dummy", False) is True
        for one in found
    )


def _is_own_files(value: Any) -> bool:
    """Whether a list names files that stand beside the one that names them."""
    return value is None or (
        _is_names(value) and not any(set("/\\\\") & set(name) for name in value)
    )


def _reads_text_alone(value: Any) -> bool:
    """Whether texts go to the model as they are: no images, no messages of a chat."""
    if value is None:
        return True
    if not isinstance(value, dict) or list(value) != ["text"]:
        return False
    if not isinstance(value["text"], dict):
        return False
    way = dict(value["text"])
    output = way.pop("method_output_name", None)
    if isinstance(output, list | tuple) and len(output) == 1:
        output = output[0]
    return way == {"method": "forward"} and output in ("last_hidden_state", "logits")


HARMLESS = Rule(lambda value: True, "anything")
_FLAG = Rule(lambda value: value is None or isinstance(value, bool), "true, false or null")
# null is one more value to a tokenizer: no lower case, or no limit
_BOOL = Rule(lambda value: isinstance(value, bool), "true or false")
_TEXT = Rule(lambda value: isinstance(value, str), "a string")
_TEXT_OR_NOT = Rule(lambda value: isinstance(value, str | None), "a string or null")
_COUNT = Rule(lambda value: value is None or _is_count(value), "a whole number above 0, or null")
_NOTHING = _one_of(None)
# A name with a slash is a kernel that would be fetched from the hub and run. So may the names of
# flash attention be, where the package is missing.
_ATTENTION = _one_of("eager", "sdpa", None)
# On the left it moves the positions of the shorter texts in a batch, in most families.
_PADDING_SIDE = _one_of("right")

_ACTIVATIONS = (nn.Identity, nn.Sigmoid, nn.Tanh, nn.ReLU, nn.Softplus, nn.LogSigmoid)
ACTIVATIONS: Mapping[str, nn.Module] = {
    name: kind()
    for kind in _ACTIVATIONS
    for name in (f"{kind.__module__}.{kind.__name__}", f"torch.nn.{kind.__name__}")
}
"""The activations of scores that a file may name: these, and no import by a name in a file."""

SIMILARITIES = ("cosine", "dot")

MODULE: Table = {
    "idx": HARMLESS,
    "name": HARMLESS,
    "path": HARMLESS,  # settings.py checks it
    "type": _TEXT,
    # which of encode's own arguments a module of the model's own would be given
    "kwargs": HARMLESS,
}
"""An entry of ``modules.json``."""

_EVERY_MODEL: Table = {
    "__version__": HARMLESS,
    "model_type": HARMLESS,  # it chooses the table
    "prompts": Rule(_is_prompts, "an object of strings"),
    "default_prompt_name": _TEXT_OR_NOT,
    "requirements": _one_of({}, None),
}
WHOLE: Mapping[str, Table] = {
    "SentenceTransformer": {
        **_EVERY_MODEL,
        "similarity_fn_name": _one_of(*SIMILARITIES, None),
        "truncate_dim": _COUNT,
    },
    "CrossEncoder": {
        **_EVERY_MODEL,
        "activation_fn": _one_of(*ACTIVATIONS, None),
        "keep_in_fp32_modules": _one_of([], None),
    },
}
"""``config_sentence_transformers.json``, by the kind of model."""

MODEL_OPTIONS: Table = {
    "dtype": _one_of("auto", "float32", "float16", "bfloat16"),
    "torch_dtype": _one_of("auto", "float32", "float16", "bfloat16"),
    "attn_implementation": _ATTENTION,
    "add_pooling_layer": _FLAG,
    "use_safetensors": _FLAG,
    "weights_only": _one_of(True, None),
    # sentence-transformers leaves it out too: only the user can trust a model's own code
    "trust_remote_code": HARMLESS,
    "low_cpu_mem_usage": HARMLESS,
    "device_map": HARMLESS,
}
TOKENIZER_OPTIONS: Table = {
    "model_max_length": Rule(_is_count, "a whole number above 0"),
    "padding_side": _PADDING_SIDE,
    "truncation_side": _one_of("right", "left"),
    **{
        name: _BOOL
        for name in (
            *("use_fast", "do_lower_case", "strip_accents", "tokenize_chinese_chars"),
            *("add_prefix_space", "clean_up_tokenization_spaces", "fix_mistral_regex"),
        )
    },
    "trust_remote_code": HARMLESS,
}
_CALL: Table = {
    # rows are cut to the longest input and run without padding, whatever these say
    "padding": HARMLESS,
    "pad_to_multiple_of": HARMLESS,
    "verbose": HARMLESS,
    "padding_side": _PADDING_SIDE,
    "return_tensors": _one_of("pt"),
    "truncation": _one_of(True, "longest_first"),  # null means that nothing is cut
    "max_length": _COUNT,
    "add_special_tokens": _one_of(True),
    "logits_to_keep": HARMLESS,  # for models that generate
}
TRANSFORMER: Table = {
    "max_seq_length": _COUNT,
    "do_lower_case": _FLAG,
    "model_args": MODEL_OPTIONS,
    "model_kwargs": MODEL_OPTIONS,
    "tokenizer_args": TOKENIZER_OPTIONS,
    "processor_kwargs": TOKENIZER_OPTIONS,
    "config_args": {"trust_remote_code": HARMLESS},
    "config_kwargs": {"trust_remote_code": HARMLESS},
    "processing_kwargs": {
        "text": _CALL,
        "common": _CALL,
        # for inputs that are no plain texts
        **dict.fromkeys(("audio", "image", "video", "chat_template"), HARMLESS),
    },
    "transformer_task": _one_of("feature-extraction", "sequence-classification"),
    "modality_config": Rule(_reads_text_alone, "text alone, by the model's forward"),
    "module_output_name": _one_of("token_embeddings", "scores", None),
    "unpad_inputs": HARMLESS,  # how sentence-transformers makes its batches
    "query_length": _NOTHING,
    "document_length": _NOTHING,
    "query_expansion": _NOTHING,
    "tokenizer_name_or_path": _NOTHING,
}
"""``sentence_bert_config.json``, and the names that it had before."""

POOLING: Table = {
    "embedding_dimension": HARMLESS,  # the model has its own
    "word_embedding_dimension": HARMLESS,
    "pooling_mode": Rule(_is_modes, "a string or a list of strings"),
    **dict.fromkeys(POOLING_FLAGS, _FLAG),
    "include_prompt": _one_of(True),  # null means that it is left out
}
NORMALIZE: Table = {
    "module_input_name": _one_of("sentence_embedding"),
    "module_output_name": _one_of("sentence_embedding", None),
}
MODULES: Mapping[str, Table] = {
    "Transformer": TRANSFORMER,
    "Pooling": POOLING,
    "Normalize": NORMALIZE,
}
"""The modules that :class:`~encoder_fast.TextEncoder` has, with what their files may say."""

_TOKENIZER = Rule(_is_tokenizer, "the name of a tokenizer of transformers' own")


def _at_most(limit: int) -> Rule:
    # what is no whole number is for transformers to refuse
    return Rule(lambda value: type(value) is not int or value <= limit, f"at most {limit:,}")


# What transformers makes one by one, for hours, before it sees that the weights don't fit.
_DEPTHS = (
    *("num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers", "decoder_layers"),
    *("num_hidden_groups", "inner_group_num", "num_experts", "num_local_experts"),
)

CONFIG: Table = {
    **dict.fromkeys(_DEPTHS, _at_most(1_000)),
    "num_labels": _at_most(1_000_000),
    "tokenizer_class": _TOKENIZER,
    "attn_implementation": _ATTENTION,
    "_attn_implementation": _ATTENTION,
    "_attn_implementation_internal": _ATTENTION,
    "experts_implementation": _one_of("eager", None),
    "_experts_implementation": _one_of("eager", None),
    # some of its methods fetch kernels from the hub
    "quantization_config": _NOTHING,
    # another model, from wherever it says
    "use_pretrained_backbone": _one_of(False, None),
    "model_type": Rule(
        lambda value: isinstance(value, str) and not value.startswith("timm_"),
        "the name of a model of transformers' own",
    ),
    "transformers_weights": HARMLESS,  # files.py checks that it stays in the folder
    "architectures": Rule(
        lambda value: (
            value is None
            or (isinstance(value, list) and all(isinstance(name, str) for name in value))
        ),
        "a list of strings",
    ),
}
"""What ``config.json`` says beside sizes and numbers; the rest is transformers' own."""

# transformers is told not to trust code for the whole model, and asks again for a model inside.
INNER_CONFIG: Table = {**CONFIG, "auto_map": _NOTHING}
"""What a configuration inside of ``config.json`` says."""

TOKENIZER_FILE: Table = {
    "tokenizer_class": _TOKENIZER,
    "fast_tokenizer_files": Rule(_is_own_files, "a list of names without a folder, or null"),
    "gguf_file": _NOTHING,
    "model_max_length": Rule(
        lambda value: value is None or (type(value) in (int, float) and value >= 1),
        "a number of at least 1, or null",
    ),
    "model_input_names": Rule(_is_names, "a list of strings"),
    "mecab_kwargs": {"mecab_dic": _one_of("ipadic", "unidic", "unidic_lite", None)},
    # a configuration of sudachi can name a library to load
    "sudachi_kwargs": {},
    "jumanpp_kwargs": {},
    # a model_file of its own, or random tokens
    "sp_model_kwargs": {},
}
"""What ``tokenizer_config.json`` says that is read here too, or could reach beyond the folder."""
