"""The benchmark measures what it says, and captioning fits into memory."""

import json

import pytest
import torch
from clipcap_hf import captioning
from clipcap_hf.benchmark.captioners import make_captioner
from clipcap_hf.benchmark.limits import weights_read
from clipcap_hf.benchmark.naive import naive_beams, naive_greedy
from clipcap_hf.captioning import caption_images
from clipcap_hf.cli import main


@pytest.fixture(scope="module")
def tiny():
    model, processor = make_captioner("tiny")
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)  # or all captions are the same
    return model, processor


def test_the_naive_way_writes_the_same_captions(tiny):
    model, _ = tiny
    pixels = torch.randn(3, 3, 224, 224)
    with torch.no_grad():
        embeds = model.get_clip_embeds(pixels)
    greedy = model.generate(pixel_values=pixels, max_new_tokens=6)[:, 10:]
    assert torch.equal(naive_greedy(model, pixels, 6), greedy)
    assert torch.equal(naive_greedy(model, embeds, 6), greedy)
    assert torch.equal(
        naive_beams(model, pixels, 6, 3), model.generate(pixel_values=pixels, max_new_tokens=6, num_beams=3)[:, 10:]
    )
    assert len(set(map(tuple, greedy.tolist()))) > 1


def test_bytes_of_weights(tiny):
    model, _ = tiny
    looked_up = model.language_model.transformer.wpe.weight.numel()  # the tied head is read
    expected = 4 * (sum(p.numel() for p in model.language_model.parameters()) - looked_up)
    assert weights_read(model) == expected


def test_report(tmp_path, capsys):
    out = tmp_path / "out"
    flags = (
        "--language-model tiny --repeats 1 --files 20 --batch-sizes 2 --beam-batch-sizes 2 --new-tokens 3 --device cpu"
    )
    assert main(["benchmark", *flags.split(), "--out", str(out)]) == 0
    report = json.loads((out / "benchmark.json").read_text())
    printed = capsys.readouterr().out
    for row in report["captioning"]:
        assert row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"]
        assert f"**{row['ratio']['median']:.1f}**" in printed
        assert 0 < row["share_of_limit"] < 1
    assert [row["beams"] for row in report["captioning"]] == [1, 5]
    assert report["files"]["files"] == 32 and "32 JPEG files" in printed
    assert {row["setting"] for row in report["scale"]} == {"prefix_length", "new_tokens", "batch", "num_beams"}
    pytest.importorskip("matplotlib")
    assert (out / "benchmark.png").stat().st_size > 10_000


def test_unknown_device(tmp_path, capsys):
    assert main(["benchmark", "--device", "abacus", "--out", str(tmp_path / "out")]) == 1
    assert "no device abacus here" in capsys.readouterr().err


def out_of_memory_above(most, model, monkeypatch):
    """Stand in for a full accelerator, which does not exist here: larger batches raise what torch raises then."""
    sizes = []
    features = model.get_image_features

    def limited(pixel_values, **kwargs):
        sizes.append(len(pixel_values))
        if len(pixel_values) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return features(pixel_values, **kwargs)

    monkeypatch.setattr(model, "get_image_features", limited)
    return sizes


def test_batches_that_do_not_fit_are_halved(make_model, processor, images, monkeypatch, caplog):
    model = make_model()
    expected = [
        found.captions for found in caption_images(model, processor, images * 5, batch_size=16, progress=False)
    ]
    sizes = out_of_memory_above(3, model, monkeypatch)
    found = [found.captions for found in caption_images(model, processor, images * 5, batch_size=16, progress=False)]
    assert found == expected
    assert "images do not fit into memory at once" in caplog.text
    assert sizes.count(16) <= 1, "what did not fit is not tried again"


def test_one_image_that_does_not_fit_is_an_error(make_model, processor, images, monkeypatch):
    model = make_model()
    out_of_memory_above(0, model, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        list(caption_images(model, processor, images, progress=False))


def test_the_first_batches_are_small():
    batches = captioning._growing_batches(100, 32)
    assert [len(batch) for batch in batches] == [1, 4, 16, 32, 32, 15]
    assert [index for batch in batches for index in batch] == list(range(100))
    assert captioning._growing_batches(3, 2) == [range(0, 1), range(1, 3)]


def test_results_of_others_stay_without_overwrite(tmp_path, capsys, monkeypatch):
    (tmp_path / "benchmark.json").write_text('{"mine": 1}')
    monkeypatch.setattr("clipcap_hf.benchmark.measure_speed", lambda **_: pytest.fail("measured"))
    assert main(["benchmark", "--out", str(tmp_path)]) == 1
    assert "did not write: benchmark.json." in capsys.readouterr().err
    assert (tmp_path / "benchmark.json").read_text() == '{"mine": 1}'
