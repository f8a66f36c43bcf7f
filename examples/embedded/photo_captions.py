"""What captions say about objects, and what a detector would have found: for train_photo_captioner.py."""

import re
import statistics

import numpy as np
import torch


# COCO's classes of objects in the detector's order, each with the words that captions use for it.
OBJECTS = """
person: person persons people man men woman women boy boys girl girls child children kid kids lady ladies guy \
    guys player players toddler baby skier skiers surfer surfers snowboarder skateboarder rider riders batter \
    pitcher catcher umpire crowd male female adult adults gentleman someone couple bicyclist cyclist \
    motorcyclist tourists pedestrians family team
bicycle: bicycle bicycles bike bikes
car: car cars suv vehicle vehicles taxi cab cabs jeep minivan
motorcycle: motorcycle motorcycles motorbike motorbikes scooter scooters moped mopeds
airplane: airplane airplanes plane planes jet jets airliner aircraft jetliner
bus: bus buses busses double-decker
train: train trains locomotive subway trolley
truck: truck trucks pickup van vans firetruck
boat: boat boats sailboat sailboats ship canoe kayak kayaks raft yacht ferry gondola
traffic light: traffic_light traffic_lights stoplight stoplights stop_light stop_lights traffic_signal traffic_signals
fire hydrant: fire_hydrant fire_hydrants hydrant hydrants
stop sign: stop_sign stop_signs
parking meter: parking_meter parking_meters meter meters
bench: bench benches
bird: bird birds pigeon pigeons seagull seagulls duck ducks goose geese parrot parrots owl swan swans hawk \
    eagle flamingos
cat: cat cats kitten kittens kitty
dog: dog dogs puppy puppies
horse: horse horses pony ponies
sheep: sheep lamb lambs goat goats ram
cow: cow cows cattle bull bulls calf ox
elephant: elephant elephants
bear: bear bears polar_bear polar_bears
zebra: zebra zebras
giraffe: giraffe giraffes
backpack: backpack backpacks
umbrella: umbrella umbrellas parasol parasols
handbag: handbag handbags purse purses
tie: tie ties necktie bow_tie
suitcase: suitcase suitcases luggage suit_case
frisbee: frisbee frisbees frisbe
skis: ski skis
snowboard: snowboard snowboards
sports ball: ball balls soccer_ball basketball
kite: kite kites
baseball bat: bat bats baseball_bat
baseball glove: glove mitt baseball_glove
skateboard: skateboard skateboards skate_board
surfboard: surfboard surfboards surf_board surf_boards
tennis racket: racket rackets racquet racquets tennis_racket tennis_racquet
bottle: bottle bottles
wine glass: wine_glass wine_glasses wine
cup: cup cups mug mugs glass
fork: fork forks
knife: knife knives
spoon: spoon spoons
bowl: bowl bowls
banana: banana bananas
apple: apple apples
sandwich: sandwich sandwiches burger hamburger
orange: oranges tangerines
broccoli: broccoli
carrot: carrot carrots
hot dog: hot_dog hot_dogs hotdog hotdogs
pizza: pizza pizzas
donut: donut donuts doughnut doughnuts
cake: cake cakes cupcake cupcakes
chair: chair chairs stool
couch: couch couches sofa sofas loveseat
potted plant: plant plants potted_plant
bed: bed beds
dining table: table tables desk
toilet: toilet toilets urinal urinals
tv: tv television televisions tvs monitor monitors
laptop: laptop laptops computer computers
mouse: mouse
remote: remote remotes remote_control controller controllers wii
keyboard: keyboard keyboards
cell phone: cell_phone cell_phones cellphone cellphones phone phones smartphone
microwave: microwave microwaves
oven: oven ovens stove
toaster: toaster
sink: sink sinks
refrigerator: refrigerator refrigerators fridge
book: book books
clock: clock clocks
vase: vase vases
scissors: scissors
teddy bear: teddy_bear teddy_bears teddy teddies stuffed_animal stuffed_animals stuffed_bear stuffed_bears
hair drier: hair_dryer blow_dryer hairdryer
toothbrush: toothbrush toothbrushes
"""
CLASSES = [line.partition(":")[0] for line in OBJECTS.strip().splitlines()]
CLASS_OF_WORD = {
    word: index for index, line in enumerate(OBJECTS.strip().splitlines()) for word in line.partition(": ")[2].split()
}
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
IMPLIED_BY = {}
for _name, _words in IMPLIED.items():
    for _word in _words.split():
        IMPLIED_BY.setdefault(_word, []).append(CLASSES.index(_name))
MOST = 8


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


class DetectorNoise:
    """Draws what the detector would have found on photographs that show given objects.

    Args:
        statistics (`dict[str, torch.Tensor]`): From [`measure`].
    """

    def __init__(self, statistics: dict[str, torch.Tensor], threshold: float, seed: int = 0):
        self.statistics, self.threshold = statistics, threshold
        self.random = np.random.default_rng(seed)
        self.scores = statistics["scores"].numpy()
        self.sizes = statistics["sizes"].numpy()
        self.popularity = statistics["popularity"].numpy()

    def _quantile(self, quantiles: np.ndarray) -> float:
        return float(np.interp(self.random.random(), np.linspace(0, 1, len(quantiles)), quantiles))

    def _instances(self, objects: list[tuple[int, int, float]]):
        """Class, score and size of each thing found on one photograph."""
        random = self.random
        for index, count, share in objects:
            if random.random() > 0.75 + 0.2 * share:  # missed altogether
                continue
            count = count + int(random.random() < 0.1) - int(random.random() < 0.15 and count > 1)
            for instance in range(max(1, count)):
                if instance and random.random() < 0.25:
                    continue
                score = max(self._quantile(self.scores), self._quantile(self.scores) if share > 0.5 else 0)
                size = max(self._quantile(self.sizes[index]), self._quantile(self.sizes[index]) if share > 0.5 else 0)
                yield index, score, size * max(1, count) ** -0.25
        for _ in range(random.poisson(0.5)):  # things that nobody speaks of
            index = int(random.choice(len(self.popularity), p=self.popularity))
            score = self.threshold + 0.6 * (self._quantile(self.scores) - self.threshold)
            yield index, score, min(self._quantile(self.sizes[index]), self._quantile(self.sizes[index]))

    def embed(self, images: list[list[tuple[int, int, float]]]) -> torch.Tensor:
        """Embeddings (images, 3 * classes), as the tower would give them, of photographs with these objects."""
        measured = self.statistics
        classes = len(self.popularity)
        generator = torch.Generator().manual_seed(int(self.random.integers(2**31)))
        common = torch.randn(len(images), 1, generator=generator)
        own = torch.randn(len(images), classes, generator=generator)
        highest = (measured["background_mean"] + measured["background_std"] * (0.6 * common + 0.8 * own)).sigmoid()
        count, size = torch.zeros_like(highest), torch.zeros_like(highest)
        found = [(image, *thing) for image, objects in enumerate(images) for thing in self._instances(objects)]
        if not found:
            return torch.cat([highest, count, size], dim=1)
        image, index, score, side = (torch.tensor(column) for column in zip(*found))
        noise = (0.4 * torch.randn(len(found), classes, generator=generator)).exp()
        rows = (score[:, None] * measured["confusion"][index] * noise).clamp(max=0.95)
        rows[torch.arange(len(found)), index] = score.float()
        place = image[:, None].expand(-1, classes)
        highest = highest.scatter_reduce(0, place, rows, "amax")
        boxed = rows * (rows > self.threshold)
        count = count.scatter_add(0, place, boxed)
        best = (rows == highest[image]) & (boxed > 0)
        size = size.scatter_reduce(0, place, best * side[:, None].float(), "amax")
        return torch.cat([highest, count, size], dim=1)


def measure(
    embeds: torch.Tensor,
    detections: list[tuple[torch.Tensor, torch.Tensor]],
    class_weights: torch.Tensor,
    threshold: float,
):
    """Statistics of a detector on photographs whose contents nobody told.

    Args:
        embeds (`torch.Tensor` of shape `(photographs, 3 * classes)`): The tower's embeddings.
        detections (`list`): For each photograph the class scores (boxes, classes) and the sizes (boxes,) of its boxes.
        class_weights (`torch.Tensor` of shape `(classes, channels)`): Of the detector's last layer: classes of similar
            weights are confused, also those that are on none of the photographs.
        threshold (`float`): Boxes with lower scores are not counted.
    """
    classes = embeds.shape[1] // 3
    rows = torch.cat([scores.float() for scores, _ in detections])
    sides = torch.cat([sizes.float() for _, sizes in detections])
    top, index = rows.max(1)
    sure = top > threshold
    rows, sides, top, index = rows[sure], sides[sure], top[sure], index[sure]
    ratios = rows / top[:, None]
    number = torch.bincount(index, minlength=classes).float()
    confusion = torch.zeros(classes, classes).index_add(0, index, ratios) / number.clamp(min=1)[:, None]
    similarity = torch.nn.functional.normalize(class_weights, dim=-1)
    similarity = similarity @ similarity.T
    known = (number >= 50)[:, None] & ~torch.eye(classes, dtype=torch.bool)
    slope, offset = np.polyfit(similarity[known].numpy(), confusion[known].clamp(min=1e-3).log().numpy(), 1)
    guess = (slope * similarity + offset).exp().clamp(max=0.9)
    confusion = (number[:, None] * confusion + 20 * guess) / (number[:, None] + 20)
    confusion.fill_diagonal_(1)

    highest = embeds[:, :classes].clamp(1e-4, 1 - 1e-4)
    absent = highest < threshold
    logits = highest.logit()
    mean = (logits * absent).sum(0) / absent.sum(0)
    std = (((logits - mean) ** 2 * absent).sum(0) / absent.sum(0)).sqrt()
    steps = torch.linspace(0, 1, 21)
    pooled = sides.quantile(steps)
    sizes = torch.stack([
        sides[index == one].quantile(steps) if number[one] >= 20 else pooled for one in range(classes)
    ])  # fmt: skip
    best = highest[highest > threshold + 0.05]
    popularity = number.sqrt() + 1
    return {
        "confusion": confusion,
        "background_mean": mean,
        "background_std": std,
        "scores": best.quantile(steps),
        "sizes": sizes,
        "popularity": popularity / popularity.sum(),
    }
