"""Everything that differs between the releases of the libraries below us; no other module asks for a version.

Importing it refuses a transformers that this package was not tested with, so `__init__` and the configuration, which
is the first module that remote code runs, import it before anything of transformers.
"""

from importlib import metadata

from packaging import version


_FIRST, _FIRST_UNTESTED = (5, 20), (5, 25)  # setup.cfg says the same
_TRANSFORMERS = version.parse(metadata.version("transformers")).release[:2]
if not _FIRST <= _TRANSFORMERS < _FIRST_UNTESTED:
    _wanted = "transformers>={}.{},<{}.{}".format(*_FIRST, *_FIRST_UNTESTED)
    raise ImportError(
        f"This captioner needs {_wanted}, but {metadata.version('transformers')} is installed: `pip install '{_wanted}'`."
    )

# What a model's argument and output, and an input of `generate`, for the keys and values is called.
CACHE = "cache" if _TRANSFORMERS >= (5, 24) else "past_key_values"
# Earlier releases lose the image if `generate` reads a prompt in chunks.
READS_IN_CHUNKS = _TRANSFORMERS >= (5, 23)


def keep_weights(module):
    """Mark the weights of a module and of its submodules as final, which `post_init` would otherwise draw anew.

    The mark is private, but transformers has no other way to build a model around parts that were loaded before.
    """
    for submodule in module.modules():
        submodule._is_hf_initialized = True


def mark_adapted(language_model, adapted: bool):
    """Tell transformers whether PEFT has put adapters in, so that `save_pretrained` of the language model saves those alone.

    Its public `add_adapter` does so, but that of 5.24 wants PEFT 0.22, which is not out. Without the mark the adapters
    are saved together with the language model.
    """
    language_model._hf_peft_config_loaded = adapted
