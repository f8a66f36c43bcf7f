"""What captions say about objects and scenes, and what the tower would have found: for train_photo_mini.py."""

import re
import statistics

import numpy as np
import torch
from clipcap_hf.model.colors_detector import COLORS, GROUNDS


# COCO's classes of objects in the detector's order: words that captions use for it | ImageNet classes that show it.
OBJECTS = """
person: person persons people man men woman women boy boys girl girls child children kid kids lady ladies guy \
    guys player players toddler baby skier skiers surfer surfers snowboarder skateboarder rider riders batter \
    pitcher catcher umpire crowd male female adult adults gentleman someone couple bicyclist cyclist \
    motorcyclist tourists pedestrians family team | 981
bicycle: bicycle bicycles bike bikes | 444 671
car: car cars suv vehicle vehicles taxi cab cabs jeep minivan | 436 468 475 479 511 609 661 751 757 817
motorcycle: motorcycle motorcycles motorbike motorbikes scooter scooters moped mopeds | 665 670
airplane: airplane airplanes plane planes jet jets airliner aircraft jetliner | 404 726 895 908
bus: bus buses busses double-decker | 654 779 874
train: train trains locomotive subway trolley | 466 547 565 705 820
truck: truck trucks pickup van vans firetruck | 555 569 656 675 717 734 864 867
boat: boat boats sailboat sailboats ship canoe kayak kayaks raft yacht ferry gondola | 403 472 484 510 554 576 \
    625 780 814 871 914
traffic light: traffic_light traffic_lights stoplight stoplights stop_light stop_lights traffic_signal \
    traffic_signals | 920
fire hydrant: fire_hydrant fire_hydrants hydrant hydrants
stop sign: stop_sign stop_signs | 919
parking meter: parking_meter parking_meters meter meters | 704
bench: bench benches | 703
bird: bird birds pigeon pigeons seagull seagulls duck ducks goose geese parrot parrots owl swan swans hawk \
    eagle flamingos | 7-24 80-100 127-146
cat: cat cats kitten kittens kitty | 281-285
dog: dog dogs puppy puppies | 151-268 274-275
horse: horse horses pony ponies | 339 603
sheep: sheep lamb lambs goat goats ram | 348-349
cow: cow cows cattle bull bulls calf ox | 345-347 690
elephant: elephant elephants | 101 385-386
bear: bear bears polar_bear polar_bears | 294-297
zebra: zebra zebras | 340
giraffe: giraffe giraffes
backpack: backpack backpacks | 414
umbrella: umbrella umbrellas parasol parasols | 879
handbag: handbag handbags purse purses | 636 748
tie: tie ties necktie bow_tie | 451 457 906 982
suitcase: suitcase suitcases luggage suit_case
frisbee: frisbee frisbees frisbe
skis: ski skis | 795-796
snowboard: snowboard snowboards
sports ball: ball balls soccer_ball basketball | 430 522 574 722 768 805 852 890
kite: kite kites
baseball bat: bat bats baseball_bat | 429 981
baseball glove: glove mitt baseball_glove
skateboard: skateboard skateboards skate_board
surfboard: surfboard surfboards surf_board surf_boards
tennis racket: racket rackets racquet racquets tennis_racket tennis_racquet | 752 852
bottle: bottle bottles | 440 720 737 898 907
wine glass: wine_glass wine_glasses wine | 572 966
cup: cup cups mug mugs glass | 441 504 647 968
fork: fork forks
knife: knife knives
spoon: spoon spoons | 910
bowl: bowl bowls | 659 809
banana: banana bananas | 954
apple: apple apples | 948 956
sandwich: sandwich sandwiches burger hamburger | 933
orange: oranges tangerines | 950
broccoli: broccoli | 937
carrot: carrot carrots
hot dog: hot_dog hot_dogs hotdog hotdogs | 934
pizza: pizza pizzas | 963
donut: donut donuts doughnut doughnuts
cake: cake cakes cupcake cupcakes
chair: chair chairs stool | 423 559 765
couch: couch couches sofa sofas loveseat | 831
potted plant: plant plants potted_plant | 738
bed: bed beds | 564
dining table: table tables desk | 526 532
toilet: toilet toilets urinal urinals | 861 999
tv: tv television televisions tvs monitor monitors | 548 598 664 782 851
laptop: laptop laptops computer computers | 527 590 620 681
mouse: mouse | 673
remote: remote remotes remote_control controller controllers wii | 761
keyboard: keyboard keyboards | 508 878
cell phone: cell_phone cell_phones cellphone cellphones phone phones smartphone | 487
microwave: microwave microwaves | 651
oven: oven ovens stove | 544 827
toaster: toaster | 859
sink: sink sinks | 896
refrigerator: refrigerator refrigerators fridge | 760
book: book books | 453-454 624 917 921
clock: clock clocks | 409 530 892
vase: vase vases | 883
scissors: scissors
teddy bear: teddy_bear teddy_bears teddy teddies stuffed_animal stuffed_animals stuffed_bear stuffed_bears | 850
hair drier: hair_dryer blow_dryer hairdryer | 589
toothbrush: toothbrush toothbrushes
"""

# What else captions speak of, in the same form. The tower has no boxes for these.
SCENES = """
snow: ski skiing skis slope slopes snow snowboard snowboarding snowy | 450 537 795 802-803 970
beach: beach ocean sand sandy sea seashore shore wave waves | 460 976-978
water: bay canal dock harbor lake pier pond river water | 449 472 484 510 525 536 554 576 625 628 693 718 780 \
    814 871 914 975
mountain: cliff hill hills hillside mountain mountains rocks rocky valley | 970 972 976 979-980
field: field grass grassy hay lawn meadow pasture | 522 574 595 621 856 912 958 984
street: city highway intersection parking road sidewalk street traffic | 468 627 654 675 704 734 829 874 919-920
sign: sign signs | 919
building: building buildings castle church house tower | 437 442 483 497-498 538 663 668 682 698 832 858 873 900
clock tower: clock_tower steeple | 442 497
bridge: bridge | 821 839 888
kitchen: cabinets cooking counter kitchen microwave oven refrigerator stove | 534 544 550 567 651 729 760 827 \
    859 909
bathroom: bathroom bathtub restroom shower toilet tub | 435 648 700 731 794 804 861 876 896-897 999
living room: couch fireplace furniture living_room room sofa | 548 556 598 765 831 846 851 905
bedroom: bed bedroom blanket pillow pillows | 516 520 564 721 750
library: bookcase books bookshelf library shelf shelves | 453-454 624
office: computer desk keyboard laptop monitor office | 508 526-527 592 620 662 664 673 681 713 742 782 810
restaurant: cafe dining dinner meal restaurant | 532 762
plate: dish food meal plate plates | 868 923-924 933-935 959 962 964-965
soup: bowl soup | 659 809 925-926
bread: bagel bread bun sandwich toast | 415 930-934 965
vegetables: broccoli carrots salad vegetable vegetables | 936-947
fruit: apples bananas fruit fruits oranges | 948-957
dessert: birthday cake chocolate cream dessert frosting | 415 470 509 927-929 960
market: display market shop stand store | 415 467 509 582 788 860 865
coffee: coffee drink tea | 504-505 550 849 967-968
wine: bar beer bottles drinking wine | 440-441 503 572 907 966
flowers: flower flowers roses vase | 580 738 883 984-986
baseball: baseball batter pitch umpire | 429 781 981
tennis: court racket racquet tennis | 752 852
soccer: soccer | 805
basketball: basketball | 430
football: football rugby | 560 768
volleyball: volleyball | 890
swimming: bikini pool swim swimming swimsuit | 433 445 638-639 801 842 983
trick: air jump jumping ramp skate skateboard trick | 416 602 702 880
fence: fence fenced | 489 716 912
suit: dressed formal suit tie uniform | 400 451 457 652 834 906 982
wedding: bride groom wedding | 578 982
hat: cap hat hats | 452 515 808
helmet: helmet helmets | 518 560
phone: cellphone phone phones | 487 528 590 605 707
game: controller game remote video wii | 613 761
camera: camera photographer | 622 732 759 872
night: dark lights lit night | 818-819 862
stage: band concert guitar music stage | 402 486 541 546 650 776 819 889
park: park playground | 562 645 703 843
tent: camping tent tents | 672 915
balloon: balloon balloons | 405 417
parade: crowd parade | 523 557
station: platform railroad station track tracks | 466 547 565 705 820 829
airport: airport jet runway tarmac | 403-404 895 908
barn: barn farm shed | 425 690 730 866
stuffed: doll stuffed toy toys | 850 865
statue: monument sculpture statue | 649 708 863
umbrella: rain rainy umbrella umbrellas | 879
fire: fire | 470 555 862
wave: surf surfboard surfer surfing wave waves | 693 977-978
child: baby crib infant toddler | 431 443 516 520 529 680
window: window windows | 799 904-905
desktop: lamp | 619 846
"""


def _read(table: str) -> tuple[list[str], list[list[str]], list[list[int]]]:
    """Return the names, words and ImageNet classes of a table's lines."""
    names, words, classes = [], [], []
    for line in table.strip().splitlines():
        name, _, rest = line.partition(": ")
        texts, _, ranges = rest.partition(" | ")
        names.append(name)
        words.append(texts.split())
        ends = [part.split("-") for part in ranges.split()]
        classes.append([index for end in ends for index in range(int(end[0]), int(end[-1]) + 1)])
    return names, words, classes


CLASSES, _words, _classes = _read(OBJECTS)
SCENE_NAMES, _scene_words, _scene_classes = _read(SCENES)
CLASS_OF_WORD = {word: index for index, words in enumerate(_words) for word in words}
SCENES_OF_WORD: dict[str, list[int]] = {}
for _index, _texts in enumerate(_scene_words):
    for _text in _texts:
        SCENES_OF_WORD.setdefault(_text, []).append(_index)
PLURALS = {"people", "men", "women", "children", "geese", "cattle", "ladies", "team", "family", "luggage"}
NUMBERS = {
    "two": 2, "both": 2, "couple": 2, "pair": 2, "three": 3, "four": 4, "five": 5, "six": 6, "some": 3,
    "several": 4, "few": 3,
    "group": 4, "bunch": 4, "row": 4, "many": 6, "herd": 5, "flock": 6, "crowd": 8, "lots": 6, "rows": 6,
    "multiple": 4,
    "various": 4, "different": 3, "stack": 3, "another": 1, "one": 1,
}  # fmt: skip
# Words that speak of objects without naming them.
IMPLIED = {
    "skis": "skiing skier skiers",
    "snowboard": "snowboarding snowboarder snowboarders",
    "surfboard": "surfing surfer surfers",
    "skateboard": "skateboarding skateboarder skateboarders skater skateboards",
    "tennis racket": "tennis",
    "baseball bat": "batter batting baseball",
    "baseball glove": "pitcher catcher umpire",
    "bicycle": "bicyclist cyclist cyclists biker bikers",
    "motorcycle": "motorcyclist motorcyclists",
    "sports ball": "soccer basketball volleyball",
    "car": "traffic",
    "bed": "bedroom",
    "couch": "living_room",
    "oven": "kitchen",
    "refrigerator": "kitchen",
    "toilet": "bathroom",
    "sink": "bathroom kitchen",
    "chair": "dining_room desk",
    "train": "railroad",
    "tie": "suit tuxedo",
}
IMPLIED_BY: dict[str, list[int]] = {}
for _name, _implied in IMPLIED.items():
    for _word in _implied.split():
        IMPLIED_BY.setdefault(_word, []).append(CLASSES.index(_name))
MOST = 8
UNSURE = 0.12  # scenes that are less likely are not worth a word
GROUND_WORDS = {
    "green": {"grass", "grassy", "field", "lawn", "pasture", "meadow"},
    "white": {"snow", "snowy", "ski", "skiing", "snowboard", "snowboarding"},
    "blue": {"water", "ocean", "sea", "lake", "pool", "wave", "waves", "surfing"},
}
COLOR_OF_WORD = {color: index for index, color in enumerate(COLORS)} | {
    word: COLORS.index(color)
    for word, color in {"grey": "gray", "silver": "gray", "tan": "brown", "wooden": "brown", "pink": "purple"}.items()
}
# How often things have these colours, at a guess.
COLOR_SHARES = np.array([0.2, 0.2, 0.17, 0.25, 0.04, 0.02, 0.03, 0.04, 0.04, 0.01])


# The square root of the share of a photograph that its largest thing of a class usually covers: a guess.
SMALL = """traffic light, bird, backpack, handbag, tie, frisbee, skis, snowboard, sports ball, kite, baseball bat,
    baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, apple, orange,
    carrot, mouse, remote, cell phone, book, clock, scissors, toothbrush, hair drier, parking meter, potted plant"""
LARGE = """bus, train, airplane, motorcycle, cat, elephant, bear, zebra, giraffe, pizza, cake, sandwich, couch, bed,
    dining table, toilet, laptop, oven, refrigerator, fire hydrant, teddy bear, stop sign, truck, horse"""
_small, _large = (" ".join(names.split()).split(", ") for names in (SMALL, LARGE))
USUAL_SIZES = np.array([0.14 if name in _small else 0.5 if name in _large else 0.33 for name in CLASSES])

# Things that stand about on photographs of anything, and that captions seldom name.
_background = """person, car, chair, bench, handbag, backpack, tie, bottle, cup, potted plant, book, cell phone,
    dining table, bird, truck"""
BACKGROUND = np.array([3.0 if name in " ".join(_background.split()).split(", ") else 1.0 for name in CLASSES])


def class_map() -> torch.Tensor:
    """Return which ImageNet class shows which object or scene, (1000, objects + scenes) of 0 and 1."""
    table = torch.zeros(1000, len(CLASSES) + len(SCENE_NAMES))
    for column, classes in enumerate(_classes + _scene_classes):
        table[classes, column] = 1
    return table


def clean(caption: str) -> str:
    """Put a caption into one form: a capital letter, single spaces, a full stop."""
    words = " ".join(caption.lower().replace('"', "").split()).rstrip(" .!,")
    return words[:1].upper() + words[1:] + "."


def count_objects(caption: str) -> dict[int, int]:
    """How many objects of each class a caption speaks of."""
    words = re.findall(r"[a-z]+(?:-[a-z]+)?", caption.lower())
    counts, start = {}, 0
    while start < len(words):
        pair = "_".join(words[start : start + 2])
        word = pair if pair in CLASS_OF_WORD or pair in IMPLIED_BY else words[start]
        length = 2 if word == pair and "_" in pair else 1
        if word in CLASS_OF_WORD:
            before = [NUMBERS[other] for other in words[max(0, start - 3) : start] if other in NUMBERS]
            plural = word in PLURALS or (
                word.endswith("s") and not word.endswith("ss") and word not in ("skis", "scissors")
            )
            found = before[-1] if before else 2 + (word == "people") if plural else 1
            counts[CLASS_OF_WORD[word]] = min(MOST, counts.get(CLASS_OF_WORD[word], 0) + found)
        for index in IMPLIED_BY.get(word, ()):
            counts[index] = max(counts.get(index, 0), 1)
        start += length
    return counts


def objects_of_image(captions: list[str]) -> list[tuple[int, int, float]]:
    """Class, count and share of the captions that name it, of all objects that an image's captions name."""
    counts = [count_objects(caption) for caption in captions]
    classes = sorted({index for count in counts for index in count})
    found = []
    for index in classes:
        named = [count[index] for count in counts if index in count]
        found.append((index, round(statistics.median(named)), len(named) / len(captions)))
    return found


def scenes_of_image(captions: list[str]) -> np.ndarray:
    """Share of an image's captions that speak of each scene, (scenes,)."""
    shares = np.zeros(len(SCENE_NAMES), np.float32)
    for caption in captions:
        words = re.findall(r"[a-z]+", caption.lower())
        words += ["_".join(pair) for pair in zip(words, words[1:])]
        shares[list({scene for word in words for scene in SCENES_OF_WORD.get(word, ())})] += 1
    return shares / len(captions)


def grounds_of_image(captions: list[str]) -> list[float]:
    """Share of an image's captions that speak of each kind of ground: grass, snow and water."""
    texts = [set(re.findall(r"[a-z]+", caption.lower())) for caption in captions]
    return [sum(bool(GROUND_WORDS[ground] & text) for text in texts) / len(texts) for ground in GROUNDS]


def colors_of_image(captions: list[str]) -> dict[int, list[int]]:
    """List the colours that an image's captions give to each class of objects: "a red and white bus" is red."""
    colors: dict[int, list[int]] = {}
    for caption in captions:
        words = re.findall(r"[a-z]+", caption.lower())
        for place, word in enumerate(words):
            named = [COLOR_OF_WORD[before] for before in words[max(0, place - 4) : place] if before in COLOR_OF_WORD]
            if word in CLASS_OF_WORD and named:
                colors.setdefault(CLASS_OF_WORD[word], []).append(named[0])
    return colors


class DetectorNoise:
    """Draws what the tower would have found on photographs that show what captions name.

    Which class is taken for which comes from the detector's own weights. The other figures were set by hand, until
    scores, sizes, counts and scenes were spread as on photographs (`compare_detector_noise.py`); no caption of a
    photograph was used.

    Args:
        texts (`list[list[str]]`): The captions of each image.
        class_weights (`torch.Tensor` of shape `(classes, channels)`): Of the detector's last layer. Classes of similar
            weights are confused.
        threshold (`float`): Boxes with lower scores are not counted.
    """

    def __init__(self, texts: list[list[str]], class_weights: torch.Tensor, threshold: float, seed: int = 0):
        self.random, self.threshold = np.random.default_rng(seed), threshold
        self.share, self.count = np.zeros((2, len(texts), len(CLASSES)), np.float32)
        for image, captions in enumerate(texts):
            for index, count, share in objects_of_image(captions):
                self.share[image, index], self.count[image, index] = share, count
        self.scenes = np.stack([scenes_of_image(captions) for captions in texts])
        self.grounds = np.array([grounds_of_image(captions) for captions in texts])
        self.colors = [colors_of_image(captions) for captions in texts]
        self.images_with = [np.flatnonzero(column) for column in self.share.T]
        self.popularity = np.sqrt((self.share > 0).sum(0)) * BACKGROUND
        self.popularity /= self.popularity.sum()
        # Animals have many classes in ImageNet, so one of them is nearly always the likeliest.
        classes = class_map()[:, : len(CLASSES)].sum(0).numpy()
        self.classifier_knows = np.select([classes > 20, classes > 0], [0.8, 0.35], 0.0)
        directions = torch.nn.functional.normalize(class_weights - class_weights.mean(0), dim=-1)
        confusion = (12 * directions @ directions.T).exp().fill_diagonal_(0).double().numpy()
        self.confusion = confusion / confusion.sum(1, keepdims=True)

    def _confuse(self, share: np.ndarray, count: np.ndarray):
        """Take some things for others, in place; of several things, perhaps only some."""
        random = self.random
        for row, index in zip(*np.nonzero((share > 0) & (random.random(share.shape) < 0.12 * (1.3 - share)))):
            other = random.choice(len(CLASSES), p=self.confusion[index])
            if share[row, other] == 0:
                share[row, other], count[row, other] = share[row, index] * 0.5, count[row, index]
                if count[row, index] == 1 or random.random() < 0.5:
                    share[row, index] = 0

    def _unnamed(self, named: np.ndarray):
        """Classes found on one image that its captions do not name: things beside the named, and mistakes."""
        random = self.random
        if 0 not in named and random.random() < 0.15:
            yield 0
        for _ in range(random.poisson(1.3)):
            kind = random.random()
            if kind < 0.4 and len(named):  # what other captions name together with these
                images = self.images_with[random.choice(named)]
                if len(images):
                    yield random.choice(np.flatnonzero(self.share[random.choice(images)]))
            elif kind < 0.6 and len(named):
                yield random.choice(len(CLASSES), p=self.confusion[random.choice(named)])
            else:
                yield random.choice(len(CLASSES), p=self.popularity)

    def _colors(self, images: np.ndarray, score: np.ndarray, size: np.ndarray) -> np.ndarray:
        """Shares of the kinds of ground, and the colour of the main thing, (images, 3 + 10)."""
        random = self.random
        grounds = self.grounds[images]
        seen = (grounds > 0) & (random.random(grounds.shape) < 0.2 + 0.6 * grounds)
        share = np.where(seen, random.beta(2, 1.5, grounds.shape), random.beta(0.35, 2.5, grounds.shape))
        colors = np.zeros((len(images), len(COLORS)))
        main = (score * size)[:, 1:]
        for row in np.flatnonzero(main.max(1) > 0):
            known = self.colors[images[row]].get(int(main[row].argmax()) + 1)
            told = known is not None and random.random() < 0.45
            colors[row, random.choice(known) if told else random.choice(len(COLORS), p=COLOR_SHARES)] = 1
        return np.concatenate([share, colors], axis=1)

    def _objects(self, share: np.ndarray, named: np.ndarray) -> tuple[np.ndarray, ...]:
        """Scores, counts and sizes of the classes, (images, classes), and what the classifier leaves for scenes."""
        random, shape = self.random, share.shape
        size = USUAL_SIZES * (0.6 + 0.6 * share) * np.exp(random.normal(0, 0.5, shape))
        size = size.clip(0.03, 1)
        # Large things are found more often and with higher scores.
        found = (share > 0) & (random.random(shape) < 0.35 + 0.35 * share + 0.5 * size)
        score = random.normal(0.28 + 0.2 * share + 0.35 * size, 0.15)
        sure = found & (random.random(shape) < self.classifier_knows * share)
        belief = random.uniform(0.4, 1, shape) * sure
        score = (score + (1 - score) * 0.7 * belief).clip(self.threshold, 0.95)
        count = named + (random.random(shape) < 0.15) + (named > 3) * random.poisson(1.0, shape)
        count = count - (random.random(shape) < 0.3) * (named > 1) - (random.random(shape) < 0.3) * (named > 2)
        count = count.clip(1, MOST)
        for row in range(len(share)):
            for index in self._unnamed(np.flatnonzero(share[row])):
                if not found[row, index]:
                    found[row, index] = True
                    score[row, index] = min(0.9, self.threshold + random.exponential(0.1))
                    size[row, index] = (0.6 * USUAL_SIZES[index] * np.exp(random.normal(0, 0.6))).clip(0.02, 1)
                    count[row, index] = 1 + random.poisson(0.3)
        return score * found, count * found, size * found, 1 - belief.max(1)

    def embed(self, images: np.ndarray, nothing: float = 0.0) -> torch.Tensor:
        """Embeddings (images, width), as the tower would give them, of the images with these indices.

        On a share `nothing` of the images, nothing was found.
        """
        random = self.random
        share, named = self.share[images], self.count[images]
        self._confuse(share, named)
        score, count, size, rest = self._objects(share, named)
        scenes = self.scenes[images]
        seen = (scenes > 0) & (random.random(scenes.shape) < 0.1 + 0.55 * scenes)
        belief = np.where(seen, random.beta(0.7, 1.3, scenes.shape) * (0.3 + 0.7 * scenes), 0)
        wrong = ~seen & (random.random(scenes.shape) < 0.025)
        belief = np.where(wrong, random.beta(0.5, 3, scenes.shape), belief)
        # The classifier's probabilities add up to 1.
        belief *= rest[:, None]
        blank = random.random(len(images)) < nothing
        for part in (score, count, size):
            part[blank] = 0
        belief[blank] = (random.random(scenes.shape) < 0.03)[blank] * random.uniform(0, UNSURE, scenes.shape)[blank]
        belief[belief <= 0.03] = 0
        colors = self._colors(images, score, size)
        colors[blank, : len(GROUNDS)] *= random.uniform(0, 4, (blank.sum(), 1))
        parts = [score, count / 4, size, belief, colors.clip(0, 1)]
        return torch.from_numpy(np.concatenate(parts, axis=1)).float()


def show_nothing(embeds: torch.Tensor) -> torch.Tensor:
    """Tell in which embeddings (images, width) there is no object and no scene that is likely, (images,)."""
    objects, scenes = embeds[:, : len(CLASSES)], embeds[:, 3 * len(CLASSES) :][:, : len(SCENE_NAMES)]
    return (objects.amax(1) == 0) & (scenes.amax(1) < UNSURE)
