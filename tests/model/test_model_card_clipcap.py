import pytest
from clipcap_hf import write_model_card
from huggingface_hub import ModelCard
from transformers import pipeline
from transformers.utils.hub import create_and_tag_model_card


def test_card_tells_what_a_captioner_is(model_folder):
    write_model_card(model_folder, repo_id="me/cap", license="mit", language="en", datasets="me/data", tags=["mine"])
    card = ModelCard.load(model_folder / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "image-to-text",
        "license": "mit",
        "language": "en",
        "datasets": ["me/data"],
        "tags": ["image-captioning", "clipcap", "mine"],
    }
    for part in (
        "`clip_vision_model`",
        "`gpt2`",
        "`mlp`, from an embedding of width 16 to a prefix of 4 vectors",
        "me/cap",
    ):
        assert part in card.text
    assert "trust_remote_code" not in card.text


def test_card_of_a_captioner_without_tower(tmp_path, make_model):
    make_model(None).save_pretrained(tmp_path)
    write_model_card(tmp_path)
    assert "model.generate(clip_embeds=embeds)" in (tmp_path / "README.md").read_text()


def test_pipeline_saves_a_card_with_how_to_load_its_code(tmp_path, make_model, processor):
    captioner = pipeline("image-captioning", model=make_model("vit"), processor=processor)
    captioner.save_pretrained(tmp_path, with_code=True)
    card = (tmp_path / "README.md").read_text()
    assert "trust_remote_code=True" in card and "`open_clip_torch`" in card


def test_card_of_adapters_and_patches(tmp_path, make_model, processor):
    model = make_model("vit", mapping_type="transformer", vision_feature="patches", lora={"r": 2})
    pipeline("image-captioning", model=model, processor=processor).save_pretrained(tmp_path, with_code=True)
    card = (tmp_path / "README.md").read_text()
    assert "| language model | `gpt2`, frozen, with LoRA adapters |" in card
    assert "the packages `clipcap_hf` and `peft` installed" in card
    assert "(and `open_clip_torch` and `peft`)" in card
    assert "`transformer`, from patch tokens of width 64 to a prefix of 4 vectors" in card


def test_edited_cards_are_kept(model_folder):
    path = write_model_card(model_folder)
    generated = path.read_text()
    path.write_text(generated.replace("## Limits", "## Limits I found"))
    edited = path.read_text()
    write_model_card(model_folder, license="mit")
    assert path.read_text() == edited
    path.write_text("A card of my own, without metadata.")
    write_model_card(model_folder)
    assert path.read_text() == "A card of my own, without metadata."


def test_generated_cards_are_made_anew_and_keep_metadata(model_folder):
    path = write_model_card(model_folder, repo_id="me/first", license="mit")
    path.write_text(path.read_text().replace("license: mit", "license: bsd-3-clause"))
    write_model_card(model_folder, repo_id="me/second", license="mit", language="en")
    card = ModelCard.load(path)
    assert (card.data.license, card.data.language) == ("bsd-3-clause", "en")
    assert "me/second" in card.text and "me/first" not in card.text


def test_draft_of_transformers_is_replaced(model_folder, monkeypatch):
    from huggingface_hub.errors import EntryNotFoundError

    def load(*args, **kwargs):
        raise EntryNotFoundError("no card there")

    with monkeypatch.context() as patch:
        patch.setattr(ModelCard, "load", load)
        create_and_tag_model_card("me/cap", ["one-of-theirs"]).save(model_folder / "README.md")
    write_model_card(model_folder, repo_id="me/cap")
    card = ModelCard.load(model_folder / "README.md")
    assert "ClipCap" in card.text
    assert "one-of-theirs" in card.data.tags


def test_not_a_captioner(tmp_path):
    with pytest.raises(ValueError, match="no captioner there"):
        write_model_card(tmp_path)
