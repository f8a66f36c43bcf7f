"""Everything that differs between releases of transformers; no other module asks for a version.

Importing it refuses a transformers that this package was not tested with, so `__init__` and the configuration, which
is the first module that remote code runs, import it before anything of transformers.
"""

import warnings
from importlib import metadata

from packaging import version


_FIRST, _FIRST_UNTESTED = (5, 20), (5, 25)  # setup.cfg says the same
_TRANSFORMERS = version.parse(metadata.version("transformers")).release[:2]
if not _FIRST <= _TRANSFORMERS < _FIRST_UNTESTED:
    _wanted = "transformers>={}.{},<{}.{}".format(*_FIRST, *_FIRST_UNTESTED)
    raise ImportError(
        f"This captioner needs {_wanted}, but {metadata.version('transformers')} is installed: "
        f"`pip install '{_wanted}'`."
    )

# The name of the keys and values: an argument and an output of models, and an input of `generate`.
CACHE = "cache" if _TRANSFORMERS >= (5, 24) else "past_key_values"
# Earlier releases lose the image if `generate` reads a prompt in chunks.
READS_IN_CHUNKS = _TRANSFORMERS >= (5, 23)


def one_cache(cache, past_key_values):
    """Take the cache by either of its names; from transformers 5.24 on, the older one warns as it does there."""
    if past_key_values is None:
        return cache
    if cache is not None:
        raise ValueError("`past_key_values` is the older name of `cache`: pass one of them.")
    if CACHE == "cache":
        message = "`past_key_values` is deprecated and will be removed in version 5.40. Use `cache` instead."
        warnings.warn(message, FutureWarning, stacklevel=4)
    return past_key_values


def keep_weights(module):
    """Mark the weights of a module and its submodules as final; `post_init` would otherwise initialise them again.

    The mark is private, but transformers has no other way to build a model around parts that were loaded before.
    """
    for submodule in module.modules():
        submodule._is_hf_initialized = True


def mark_adapted(language_model, adapted: bool):
    """Tell transformers whether PEFT has added adapters; then the language model's `save_pretrained` saves only them.

    Its public `add_adapter` does so, too, but in 5.24 it needs PEFT 0.22, which is not released. Without the mark, the
    adapters are saved together with the language model.
    """
    language_model._hf_peft_config_loaded = adapted
