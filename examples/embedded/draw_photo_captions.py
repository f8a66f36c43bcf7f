"""Draw `examples/photo-captions.webp`: openly licensed photographs with the captions that photo-mini writes.

    pip download --no-deps scikit-image==0.25.2 scikit-learn==1.9.1
    unzip scikit_image-*.whl 'skimage/data/*' && unzip scikit_learn-*.whl 'sklearn/datasets/images/*'
    python examples/embedded/draw_photo_captions.py . --out examples/photo-captions.webp

They are all the coloured photographs of everyday scale in these two packages that anyone may pass on, so none was
picked for its caption. Each is captioned as `clipcap caption --beams 3` does.
"""

import argparse
from pathlib import Path

from clipcap_hf import PHOTO_MINI, ClipCapForConditionalGeneration, ClipCapProcessor
from clipcap_hf.assets import FONT
from clipcap_hf.captioning import caption_files
from clipcap_hf.files import whole_file
from PIL import Image, ImageDraw, ImageFont, ImageOps


# File and credit, which must stand beside the picture.
PHOTOGRAPHS = {
    "skimage/data/astronaut.png": "NASA, public domain",
    "skimage/data/chelsea.png": "Stefan van der Walt, CC0",
    "skimage/data/coffee.png": "Rachel Michetti, CC0",
    "skimage/data/rocket.jpg": "SpaceX, public domain",
    "sklearn/datasets/images/china.jpg": "danielbuechele, CC BY 2.0",
    "sklearn/datasets/images/flower.jpg": "vultilion, CC BY 2.0",
}
WIDTH, HEIGHT, COLUMNS, TEXT = 300, 200, 3, 70


def wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Break a text into lines of at most this width."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines[-1:] = [longer] if font.getlength(longer) <= width else [lines[-1], word]
    return lines


def draw(path: Path, photographs: list[tuple[Image.Image, str, str]]):
    """Draw a grid of photographs with caption and credit below each."""
    rows = -(-len(photographs) // COLUMNS)
    grid = Image.new("RGB", (COLUMNS * (WIDTH + 10), rows * (HEIGHT + TEXT)), "white")
    canvas, font, small = ImageDraw.Draw(grid), *(ImageFont.truetype(str(FONT), points) for points in (15, 11))
    for place, (image, caption, credit) in enumerate(photographs):
        left, top = place % COLUMNS * (WIDTH + 10) + 5, place // COLUMNS * (HEIGHT + TEXT)
        grid.paste(ImageOps.pad(image, (WIDTH, HEIGHT), Image.Resampling.LANCZOS, color="white"), (left, top))
        lines = wrap(caption, font, WIDTH)[:2]
        for number, line in enumerate(lines):
            canvas.text((left, top + HEIGHT + 4 + 19 * number), line, fill="black", font=font)
        canvas.text((left, top + HEIGHT + 6 + 19 * len(lines)), credit, fill="#5f6368", font=small)
    with whole_file(path) as scratch:
        grid.save(scratch, format="WEBP", quality=80, method=6)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the two packages were unpacked")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    paths = [arguments.folder / name for name in PHOTOGRAPHS]
    model = ClipCapForConditionalGeneration.from_pretrained(PHOTO_MINI).eval()
    processor = ClipCapProcessor.from_pretrained(PHOTO_MINI)
    results = caption_files(model, processor, [str(path) for path in paths], num_beams=3, progress=False)
    captions = [result.captions[0] for result in results]
    for path, caption in zip(paths, captions):
        print(path.name, caption, sep="\t")
    images = [Image.open(path).convert("RGB") for path in paths]
    draw(arguments.out, list(zip(images, captions, PHOTOGRAPHS.values())))


if __name__ == "__main__":
    main()
