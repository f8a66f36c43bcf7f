"""Split captions into tokens. Scores can be compared only if they were made with the same tokenizer.

| name           | what                                                                        | needs                |
|----------------|-----------------------------------------------------------------------------|----------------------|
| `"ptb"`        | the usual standard: Stanford's PTBTokenizer, lower case, no punctuation     | Java, pycocoevalcap  |
| `"python"`     | an approximation of it; results say `"python (not exact)"`                  | nothing              |
| `"ja"`         | Japanese words: NFKC, MeCab with the IPA dictionary, no punctuation         | fugashi, ipadic      |
| `"characters"` | single characters, for languages without spaces: NFKC, lower, no punctuation| nothing              |
| `"none"`/None  | text that is tokenized already, with spaces between tokens                  | nothing              |

The PTB tokenizer keeps brackets as words ("-lrb-") and drops emoji; both are part of the standard.
"""

import functools
import re
import string
import tempfile
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

from ..extras import install_hint
from .java import JavaError, find_jar, run_java


PTB_JAR = "tokenizer/stanford-corenlp-3.4.1.jar"
TOKENIZERS = ("ptb", "python", "ja", "characters", "none")
# Characters that Java, the PTB tokenizer or Python's str.splitlines takes for the end of a line. If a caption held
# one, the tokenizer would write an extra line, and all later captions would go to the wrong image.
LINE_SEPARATORS = re.compile("[\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029]+")
# Tokens that the COCO caption evaluation drops after PTB tokenization. Its list has "-LRB-" in capitals although the
# text is in lower case, so brackets are kept as "-lrb-"; to reproduce its scores, this must not be fixed.
PTB_PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)


def check_tokenizer(tokenizer: str | None) -> str:
    """Return the tokenizer's name (`None` becomes `"none"`), or raise a ValueError that lists the names."""
    name = "none" if tokenizer is None else tokenizer
    if name not in TOKENIZERS:
        raise ValueError(f"Unknown tokenizer {tokenizer!r:.80}; choose one of {', '.join(map(repr, TOKENIZERS))}.")
    return name


def tokenizer_record(tokenizer: str | None) -> str:
    """Return what results say about the tokenizer: its name, and that `"python"` is not the standard."""
    name = check_tokenizer(tokenizer)
    return "python (not exact)" if name == "python" else name


def tokenize(texts: Sequence[str], tokenizer: str | None = "ptb") -> list[str]:
    """Tokenize texts.

    Args:
        texts (`Sequence[str]`): n texts.
        tokenizer (`str`, *optional*): A name in the table above.

    Returns:
        `list[str]`: n strings of tokens separated by spaces; empty for texts of punctuation only.

    Raises:
        ValueError: If the tokenizer is unknown, or a text is not valid Unicode.
        JavaError: If Java or pycocoevalcap is missing, or Java failed or hung.
        ImportError: If the tokenizer is `"ja"` and fugashi or ipadic is missing.
    """
    return tokenize_streams((texts,), tokenizer)[0]


def tokenize_streams(streams: Sequence[Sequence[str]], tokenizer: str | None = "ptb") -> list[list[str]]:
    """Tokenize several lists of texts, starting the tokenizer only once; the lists keep their lengths."""
    return [list(stream) for stream in _tokenize(tuple(map(tuple, streams)), check_tokenizer(tokenizer))]


# `evaluate.combine` passes the same texts to each metric; with the last ones remembered, Java starts only once.
@functools.lru_cache(maxsize=2)
def _tokenize(streams: tuple[tuple[str, ...], ...], name: str) -> list[list[str]]:
    texts = [[LINE_SEPARATORS.sub(" ", text) for text in stream] for stream in streams]
    if name == "ptb":
        return _tokenize_ptb(texts)
    splitters: dict[str, Callable[[str], list[str]]] = {
        "python": _split_like_ptb,
        "ja": _split_japanese,
        "characters": _split_characters,
        "none": lambda text: text.split(),
    }
    return [[" ".join(splitters[name](text)) for text in stream] for stream in texts]


def _tokenize_ptb(streams: list[list[str]]) -> list[list[str]]:
    """Start Java once for all streams; each is a file with one caption per line."""
    if not all(streams):  # Java would turn an empty stream into an empty line
        rest = iter(_tokenize_ptb(filled) if (filled := [stream for stream in streams if stream]) else ())
        return [next(rest) if stream else [] for stream in streams]
    jar = find_jar(PTB_JAR, "The PTB tokenizer")
    with tempfile.TemporaryDirectory(prefix="clipcap_ptb_") as folder:
        names = [f"{number}.txt" for number in range(len(streams))]
        for name, stream in zip(names, streams):
            try:
                Path(folder, name).write_bytes("\n".join(stream).encode("utf-8"))
            except UnicodeEncodeError as error:
                raise ValueError(f"A caption is not valid Unicode (a lone surrogate): {error}") from None
        Path(folder, "files").write_text("\n".join(names))
        command = ("-cp", jar, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase")
        # For each file named in the list, this option writes NAME.tok.
        run_java((*command, "-encoding", "UTF-8", "-ioFileList", "files"), "The PTB tokenizer", folder)
        tokenized = []
        for name, stream in zip(names, streams):
            lines = Path(folder, name + ".tok").read_bytes().decode("utf-8").split("\n")
            if len(lines) != len(stream):
                raise JavaError(
                    f"The PTB tokenizer returned {len(lines)} lines for {len(stream)} captions; scoring would give "
                    "captions to the wrong images. Please report the captions that cause this."
                )
            tokenized.append(
                [" ".join(word for word in line.rstrip().split(" ") if word not in PTB_PUNCTUATION) for line in lines]
            )
    return tokenized


_WORD = re.compile(
    r"""
    (?:[^\W\d_]\.){2,}                                  # u.s.  p.m.
    | (?:mr|mrs|ms|dr|st|rd|jr|sr|vs|etc|inc|ft|mt)\.   # abbreviations keep their full stop
    | \d+(?:[,.:]\d+)+                                  # 1,000  3.5  12:30
    | [\w@](?:[\w@]|[-./'\u2019](?=\w))*                # well-known  black/white  isn't  o'clock
    | [^\w\s]                                           # a symbol
    """,
    re.VERBOSE,
)
_CONTRACTION = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))$")
_COMPOUNDS = {"cannot": "can not", "gonna": "gon na", "wanna": "wan na", "gotta": "got ta", "lemme": "lem me"}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_SYMBOLS_DROPPED = frozenset("\"'`.?!,:;-\u2010\u2013\u2014\u2018\u2019\u201c\u201d\u2026\u00ab\u00bb")


def _split_like_ptb(text: str) -> list[str]:
    """Split without Java, for nearly all English captions as PTB tokenization and punctuation removal do."""
    tokens = []
    for word in _WORD.findall(text.lower()):
        if word in _SYMBOLS_DROPPED:
            continue
        word = _BRACKETS.get(word, word).replace("\u2019", "'")
        word = _COMPOUNDS.get(word) or _CONTRACTION.sub(r" \1", word)
        tokens.extend(word.split())
    return tokens


def _is_punctuation(text: str) -> bool:
    """Tell whether a text has only Unicode punctuation and spaces: no letters, digits or emoji."""
    return all(unicodedata.category(character)[0] in "PZ" for character in text)


@functools.lru_cache(maxsize=1)
def _japanese_tagger():
    try:
        import fugashi
        import ipadic
    except ImportError as error:
        raise ImportError(
            f'tokenizer="ja" needs fugashi and ipadic: {install_hint("japanese")}. '
            'Without them, tokenizer="characters" scores Japanese by characters.'
        ) from error
    return fugashi.GenericTagger(ipadic.MECAB_ARGS)


# Without the middle dot, which joins the parts of foreign names and occurs inside dictionary words.
_JAPANESE_PUNCTUATION = frozenset(string.punctuation + "、。「」『』【】…〜")


def _split_japanese(text: str) -> list[str]:
    """Split into words of the IPA dictionary, after NFKC, which turns full-width characters into ASCII."""
    words = (word.surface for word in _japanese_tagger()(unicodedata.normalize("NFKC", text)))
    return [word for word in words if not _JAPANESE_PUNCTUATION.issuperset(word)]


def _split_characters(text: str) -> list[str]:
    return [character for character in unicodedata.normalize("NFKC", text).lower() if not _is_punctuation(character)]
