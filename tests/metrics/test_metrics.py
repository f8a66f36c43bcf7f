"""The metrics agree with pycocoevalcap, the usual reference, on generated captions."""

import json
import os
import random
import shutil
import socket
import stat
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from clipcap_hf import metrics
from clipcap_hf.metrics import formulas, java
from clipcap_hf.metrics.tokenization import tokenize


HAND_WRITTEN = [
    ("A man's dog isn't on the T-shirt.", ["A dog, brown & white, sits.", "the man's dog (brown) is on a t-shirt"]),
    ("", ["An empty caption scores nothing."]),
    ("a a a a a a a", ["a cat", "A a dog..."]),
    ("Two naïve cafés — one 猫", ["two naïve cafés", "“Two” cafés; one 猫!", "1 1/2 cups at 5 p.m."]),
    ("dog", ["dog", "cat"]),
    ("the U.S. flag, 1,000 of them", ["A U.S. flag", "flags: 1,000 'em"]),
    ("exactly this caption", ["Exactly this caption."]),
]


def make_captions(images: int, seed: int = 0):
    """Captions that share words with their references, some one word long, and 1 to 6 references per image."""
    rng = random.Random(seed)
    words = [f"w{int(rng.paretovariate(0.7)) % 300}" for _ in range(3000)] + ["a", "the", "on", "."] * 300
    predictions, references = [], []
    for _ in range(images):
        base = rng.choices(words, k=rng.randint(1, 18))
        group = []
        for _ in range(rng.randint(1, 6)):
            group.append(" ".join(w if rng.random() < 0.6 else rng.choice(words) for w in base[rng.randint(0, 3) :]))
        predictions.append(" ".join(w for w in base if rng.random() < 0.8))
        references.append([reference or "a" for reference in group])
    return predictions, references


@pytest.fixture(scope="module")
def corpus():
    predictions, references = make_captions(200)
    return predictions + [p for p, _ in HAND_WRITTEN], references + [r for _, r in HAND_WRITTEN]


@pytest.fixture(scope="module")
def peer(corpus):
    """Return (references, captions) in the form of pycocoevalcap's tokenizer."""
    ptb = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer", reason="pycocoevalcap is not installed")
    need_java()
    predictions, references = corpus
    tokenizer = ptb.PTBTokenizer()
    gts = tokenizer.tokenize({n: [{"caption": c} for c in group] for n, group in enumerate(references)})
    return gts, tokenizer.tokenize({n: [{"caption": c}] for n, c in enumerate(predictions)})


def need_java():
    if shutil.which("java") is None:
        pytest.skip("there is no java on the PATH")
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")


def fake_java(monkeypatch, folder, script: str):
    """Put a `java` with the given script first on the PATH."""
    path = folder / "java"
    path.write_text(script)
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(java, "find_jar", lambda path, purpose: folder / path)  # also without pycocoevalcap
    for module in ("tokenization", "java_scores"):
        monkeypatch.setattr(f"clipcap_hf.metrics.{module}.find_jar", java.find_jar)


# The standard


def test_equals_pycocoevalcap_on_every_image(corpus, peer):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    peer_meteor = Meteor()  # starts loading while ours does
    ours = metrics.score_captions(*corpus)
    expected = {"meteor": peer_meteor.compute_score(*peer)}
    for n, (total, each) in enumerate(zip(*Bleu(4).compute_score(*peer, verbose=0))):
        expected[f"bleu_{n + 1}"] = total, each
    expected["rouge_l"], expected["cider"] = Rouge().compute_score(*peer), Cider().compute_score(*peer)
    for name, (total, each) in expected.items():
        assert ours[name] == pytest.approx(total, abs=1e-9), name
        np.testing.assert_allclose(ours[f"{name}_per_image"], each, rtol=0, atol=1e-9, err_msg=name)
    assert (ours["num_images"], ours["tokenizer"]) == (len(corpus[0]), "ptb")


def test_ptb_tokens_equal_pycocoevalcaps(corpus, peer):
    assert tokenize(corpus[0]) == [peer[1][n][0] for n in range(len(corpus[0]))]


def test_one_reference_and_one_image_equal_pycocoevalcap():
    cider = pytest.importorskip("pycocoevalcap.cider.cider", reason="pycocoevalcap is not installed")
    predictions, references = make_captions(50, seed=1)
    references = [group[0] for group in references]
    ours = metrics.score_captions(predictions, references, "cider", "none")
    expected = cider.Cider().compute_score(
        {n: [r] for n, r in enumerate(references)}, {n: [p] for n, p in enumerate(predictions)}
    )
    np.testing.assert_allclose(ours["cider_per_image"], expected[1], rtol=0, atol=1e-9)


# Tokenizers


def test_line_separators_inside_a_caption_do_not_shift_the_others():
    need_java()
    texts = ["a\u2028b", "c d", "e\u0085f", "g\x0bh\x0ci\rj\nk\x1cl\x1dm\x1en\u2029o", "", "p", ""]
    assert tokenize(texts) == ["a b", "c d", "e f", "g h i j k l m n o", "", "p", ""]
    clean = [text.replace("\u2028", " ") for text in texts]
    assert tokenize(texts[:2]) == tokenize(clean[:2])


def test_captions_survive_a_locale_without_utf8(monkeypatch):
    need_java()
    monkeypatch.setenv("LC_ALL", "C")
    assert tokenize(["Une café 猫 à Zürich"]) == ["une café 猫 à zürich"]


def test_java_writes_nothing_beside_the_jar():
    need_java()
    folder = java.find_jar("tokenizer/stanford-corenlp-3.4.1.jar", "The test").parent
    before = set(folder.iterdir())
    tokenize(["nothing to see here"])
    assert set(folder.iterdir()) == before


def test_the_python_tokenizer_is_close_and_says_that_it_is_not_exact(corpus):
    result = metrics.score_captions(*corpus, ("bleu", "cider"), "python")
    assert result["tokenizer"] == "python (not exact)"
    text = (
        "The man's \"dog\" isn't a T-shirt, (or can't be) at 5 p.m. in the U.S. -- 1,000 cats & a black/white one..."
    )
    expected = (
        "the man 's dog is n't a t-shirt -lrb- or ca n't be -rrb- at 5 p.m. in the u.s. 1,000 cats & a black/white one"
    )
    assert tokenize([text], "python") == [expected]
    if shutil.which("java"):
        need_java()
        assert tokenize([text], "ptb") == [expected]


def test_tokenizers_for_languages_without_spaces():
    assert tokenize(["猫が、２匹いる。ＡＢ"], "characters") == ["猫 が 2 匹 い る a b"]
    pytest.importorskip("fugashi", reason="fugashi is not installed")
    pytest.importorskip("ipadic", reason="ipadic is not installed")
    assert tokenize(["猫が２匹、ソファーにいる。"], "ja") == ["猫 が 2 匹 ソファー に いる"]


def test_tokens_given_are_taken_as_they_are():
    assert tokenize(["A  B ."], None) == tokenize(["A B ."], "none") == ["A B ."]


# Java that does not do its work


@pytest.mark.parametrize("metric", ["cider", "meteor", "spice"])
def test_java_that_hangs_is_ended(monkeypatch, tmp_path, metric):
    fake_java(monkeypatch, tmp_path, "#!/bin/sh\nsleep 60\n")  # the shell's child would keep a pipe open
    for jar in ("spice-1.0.jar", "stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"):
        (tmp_path / jar).touch()
    monkeypatch.setenv("CLIPCAP_JAVA_TIMEOUT", "0.5")
    start = time.monotonic()
    with pytest.raises(metrics.JavaError, match="0.5 s"):
        tokenizer = "ptb" if metric == "cider" else "none"
        metrics.score_captions([f"a hanging {metric}"], ["a"], metric, tokenizer, spice_home=tmp_path)
    assert time.monotonic() - start < 10


def test_java_that_fails_says_why(monkeypatch, tmp_path):
    fake_java(monkeypatch, tmp_path, "#!/bin/sh\necho no memory >&2\nexit 3\n")
    with pytest.raises(metrics.JavaError, match="(?s)exit code 3.*no memory"):
        tokenize(["a failure"])
    with pytest.raises(metrics.JavaError, match="(?s)METEOR.*stopped answering.*no memory"):
        metrics.score_captions(["a"], ["a"], "meteor", "none")


def test_a_line_too_many_is_an_error_not_a_shift(monkeypatch, tmp_path):
    fake_java(monkeypatch, tmp_path, '#!/bin/sh\nfor f in *.txt; do { cat $f; printf "\\nmore"; } > $f.tok; done\n')
    with pytest.raises(metrics.JavaError, match="3 lines for 2 captions"):
        tokenize(["one line", "and another"])


def test_missing_parts_are_named_with_the_remedy(monkeypatch, tmp_path):
    with pytest.raises(metrics.JavaError, match="CLIPCAP_SPICE_HOME"):
        monkeypatch.delenv("CLIPCAP_SPICE_HOME", raising=False)
        metrics.score_captions(["a"], ["a"], "spice", "none")
    with pytest.raises(metrics.JavaError, match="stanford-corenlp-3.6.0.jar"):
        metrics.score_captions(["a"], ["a"], "spice", "none", spice_home=tmp_path)
    monkeypatch.setattr(java, "find_jar", lambda path, purpose: tmp_path / path)
    monkeypatch.setattr("clipcap_hf.metrics.tokenization.find_jar", java.find_jar)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(metrics.JavaError, match='Java.*tokenizer="python"'):
        tokenize(["no java"])
    monkeypatch.undo()
    monkeypatch.setattr(java.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(metrics.JavaError, match='pip install \'pycocoevalcap.*tokenizer="python"'):
        tokenize(["no pycocoevalcap"])


def test_spice_opens_the_modules_and_keeps_the_order(monkeypatch, tmp_path):
    """The real jars are not available here: check how they are called and how their answer is read."""
    script = f"""#!{sys.executable}
import json, sys
options = sys.argv[1:]
assert options[options.index("--add-opens") + 1] == "java.base/java.lang=ALL-UNNAMED"
assert options[options.index("-cp") + 1].startswith({str(tmp_path)!r})
images = json.load(open("in.json"))
f = lambda image: None if image["test"] == "x" else 1 / len(image["refs"])
scored = [dict(image_id=image["image_id"], scores=dict(All=dict(f=f(image)))) for image in reversed(images)]
json.dump(scored, open(options[options.index("-out") + 1], "w"))
"""
    fake_java(monkeypatch, tmp_path, script)
    for jar in ("spice-1.0.jar", "stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"):
        (tmp_path / jar).touch()
    monkeypatch.setenv("CLIPCAP_SPICE_HOME", str(tmp_path))
    result = metrics.score_captions(["é", "b"], [["é"], ["a", "b"]], "spice", "none")
    assert result["spice"] == 0.75 and result["spice_per_image"].tolist() == [1, 0.5]


# Bad input


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "no predictions"),
        (["a", "b"], [["a"]], "2 predictions and 1 references"),
        (["a", "b"], [["a"], []], "Image 1 has no references"),
        (["a"], [["a", " "]], r"references\[0\]\[1\] is empty.*drop"),
        (["a", None], [["a"], ["b"]], r"predictions\[1\] must be a string"),
        (["a"], [["a", 3]], r"references\[0\]\[1\] must be a string"),
        ([["a"]], [["a"]], r"predictions\[0\] must be a string"),
        ("a", ["a"], "predictions must be a list"),
        (["a"], None, "references is missing"),
    ],
)
def test_bad_input_is_named(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        metrics.score_captions(predictions, references, ("bleu",), "python")


def test_unknown_names_are_refused():
    for arguments in ({"metrics": ["blue"]}, {"tokenizer": "pbt"}, {"empty_references": "ignore"}):
        with pytest.raises(ValueError, match="choose|one of"):
            metrics.score_captions(["a"], ["a"], **arguments)
    with pytest.raises(ValueError, match="There is no metric 'blue'"):
        metrics.load("blue")
    with pytest.raises(ValueError, match="document_frequencies must be"):
        metrics.score_captions(["a"], ["a"], "cider", "none", document_frequencies={"num_documents": 1})


def test_empty_references_are_dropped_or_kept_on_demand():
    def score(empty):
        arguments = {"metrics": "cider", "tokenizer": "none", "empty_references": empty}
        return metrics.score_captions(["a b", "c"], [["a b", ""], ["c"]], **arguments)["cider_per_image"]

    np.testing.assert_allclose(score("keep"), score("drop") * [0.5, 1])
    with pytest.raises(ValueError, match="Image 0 has only empty references"):
        metrics.score_captions(["a"], [["", " "]], "cider", "none", empty_references="drop")


def test_captions_without_words_score_zero():
    names = ("bleu", "rouge_l", "cider", "exact_match", "diversity")
    result = metrics.score_captions(["", "..."], ["a", "..."], names, "python")
    assert all(abs(result[name]) < 1e-12 for name in ("bleu_4", "rouge_l", "cider", "exact_match", "distinct_2"))


def test_cider_of_one_image_is_zero_and_says_so():
    with pytest.warns(UserWarning, match="single image is 0 by definition"):
        assert metrics.score_captions(["a cat"], [["a cat"]], "cider", "none")["cider"] == 0
    frequencies = metrics.document_frequencies([["a cat"], ["a dog"], ["a bird"]], "none")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = metrics.score_captions(["a cat"], ["a cat"], "cider", "none", document_frequencies=frequencies)
    assert result["cider"] == pytest.approx(5)  # 1-grams and 2-grams agree wholly; there are no longer ones


def test_supplied_document_frequencies_of_the_same_references_change_nothing(corpus, tmp_path):
    path = tmp_path / "frequencies.json"
    path.write_text(json.dumps(metrics.document_frequencies(corpus[1], "python")))
    plain = metrics.score_captions(*corpus, "cider", "python")
    supplied = metrics.score_captions(*corpus, "cider", "python", document_frequencies=path)
    np.testing.assert_allclose(supplied["cider_per_image"], plain["cider_per_image"], rtol=0, atol=1e-12)


# Scores that pycocoevalcap does not have


def test_exact_match():
    predictions = ["A Cat!", "a  ｃａｔ", "a dog", "", "it's"]
    references = [["the cat", "a cat."], ["A cat"], ["a cat"], ["!"], ["It\u2019s"]]
    result = metrics.score_captions(predictions, references, "exact_match")
    assert result["exact_match"] == 0.6 and "tokenizer" not in result
    assert result["exact_match_per_image"].tolist() == [1, 1, 0, 0, 1]


def test_diversity():
    result = metrics.score_captions(["a cat sat", "a cat ran", "a"], metrics="diversity", tokenizer="none")
    expected = {"distinct_1": 4 / 7, "distinct_2": 3 / 7, "vocabulary_size": 4, "mean_length": 7 / 3}
    assert {name: result[name] for name in expected} == pytest.approx(expected)


# As evaluate modules


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a metric reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


SETTINGS = {"tokenizer": "python"}


def test_modules_load_offline_and_equal_score_captions(corpus, no_network, tmp_path):
    import evaluate

    names = ("bleu", "rouge_l", "cider", "exact_match", "diversity")
    expected = metrics.score_captions(*corpus, names, **SETTINGS)
    folder = os.path.dirname(metrics.__file__)
    for name in names:
        module = evaluate.load(os.path.join(folder, name), cache_dir=str(tmp_path), **SETTINGS)
        assert isinstance(module, evaluate.Metric) and module.name == name
        result = module.compute(predictions=corpus[0], references=corpus[1], per_image=True)
        assert result.keys() >= {"num_images"} and result.keys() <= expected.keys()
        for key, value in result.items():
            np.testing.assert_array_equal(value, expected[key], err_msg=key)
        for start in range(0, len(corpus[0]), 50):
            module.add_batch(predictions=corpus[0][start : start + 50], references=corpus[1][start : start + 50])
        module.add(prediction="one more", reference="One more.")
        assert module.compute()["num_images"] == len(corpus[0]) + 1
    for name in ("meteor", "spice", "clip_score"):
        assert metrics.load(name).name == name


def test_batches_may_mix_strings_and_lists(tmp_path):
    module = metrics.load("cider", cache_dir=str(tmp_path), tokenizer="none")
    module.add_batch(predictions=[], references=[])
    module.add_batch(predictions=["a cat", "a dog"], references=["a cat", ["a dog", "dogs"]])
    module.add(prediction="b", reference=["c"])
    expected = metrics.score_captions(["a cat", "a dog", "b"], ["a cat", ["a dog", "dogs"], "c"], "cider", "none")
    assert module.compute()["cider"] == expected["cider"]
    with pytest.raises(ValueError, match="2 predictions and 1 references"):
        module.add_batch(predictions=["a", "b"], references=["a"])
    with pytest.raises(ValueError, match="no predictions"):
        module.compute(predictions=[], references=[])


def test_combine_gives_the_same_values_and_tokenizes_once(corpus, tmp_path, monkeypatch):
    import evaluate
    from clipcap_hf.metrics import tokenization

    splits = []
    original = tokenization._split_like_ptb
    monkeypatch.setattr(tokenization, "_split_like_ptb", lambda text: splits.append(text) or original(text))
    tokenization._tokenize.cache_clear()
    names = ("bleu", "rouge_l", "cider")
    combined = evaluate.combine([metrics.load(name, cache_dir=str(tmp_path)) for name in names])
    result = combined.compute(predictions=corpus[0], references=corpus[1], **SETTINGS)
    assert len(splits) == len(corpus[0]) + sum(map(len, corpus[1]))
    expected = metrics.score_captions(*corpus, names, per_image=False, **SETTINGS)
    assert {key: result[key] for key in expected if key in result} == {
        key: value for key, value in expected.items() if key not in ("tokenizer", "num_images")
    }
    assert result["cider_tokenizer"] == "python (not exact)"


SCORE_A_SHARE = """
import json, sys
from clipcap_hf import metrics

share = json.load(sys.stdin)
module = metrics.load("cider", **share["process"], **share["settings"])
result = module.compute(predictions=share["predictions"], references=share["references"])
print(json.dumps(result))
"""


def test_several_processes_give_the_same_value(tmp_path):
    predictions, references = make_captions(40)
    processes = []
    for number, share in enumerate((slice(0, 25), slice(25, 40))):
        process = {"num_process": 2, "process_id": number, "experiment_id": "shares", "cache_dir": str(tmp_path)}
        data = {"predictions": predictions[share], "references": references[share], "process": process}
        command = [sys.executable, "-c", SCORE_A_SHARE]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        processes[-1].stdin.write(json.dumps({**data, "settings": SETTINGS}))
        processes[-1].stdin.close()
    printed = [process.stdout.read() for process in processes]
    assert [process.wait(60) for process in processes] == [0, 0]
    result = json.loads(printed[0])  # the first process scores for all
    assert result == metrics.score_captions(predictions, references, "cider", per_image=False, **SETTINGS)


# CLIPScore


def test_longest_common_subsequence_by_the_table():
    rng = random.Random(0)
    for _ in range(200):
        left, right = rng.choices("abcd", k=rng.randint(1, 90)), rng.choices("abcd", k=rng.randint(1, 90))
        table = [0] * (len(right) + 1)
        for word in left:
            before = 0
            for n, other in enumerate(right):
                before, table[n + 1] = table[n + 1], before + 1 if word == other else max(table[n + 1], table[n])
        positions = {}
        for place, word in enumerate(left):
            positions[word] = positions.get(word, 0) | 1 << place
        assert formulas._common_subsequence(positions, len(left), right) == table[-1]


def test_diversity_needs_no_references():
    need_java()
    found = metrics.load("diversity").compute(predictions=["a dog", "a cat"], tokenizer="ptb")
    assert found["vocabulary_size"] == 3


def test_captions_that_are_no_unicode():
    with pytest.raises(ValueError, match=r"predictions\[1\] is not valid Unicode"):
        metrics.load("bleu").compute(predictions=["a", "b \ud800"], references=[["a"], ["b"]], tokenizer="python")
