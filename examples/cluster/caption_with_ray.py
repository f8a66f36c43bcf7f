"""Caption a folder of WebDataset shards (.tar) or Parquet files on a Ray cluster; the captions go to JSON lines.

    python examples/cluster/caption_with_ray.py shards/ --out captions --model my-captioner --captioners 8 --gpus 1

Ray streams the shards, spreads the images over actors that each hold the model, and repeats failed work. Parquet files
need a column with the image's bytes (or Hugging Face's {"bytes", "path"}): --image-column.
"""

import argparse
import io
from pathlib import Path

import clipcap_hf
import ray
from clipcap_hf import ClipCapForConditionalGeneration, ClipCapProcessor
from clipcap_hf.model.processing_clipcap import to_rgb
from PIL import Image


class Captioner:
    """Actor that loads the model once and captions batch after batch."""

    def __init__(self, model: str, device: str, image_column: str, id_column: str):
        self.model = ClipCapForConditionalGeneration.from_pretrained(model).to(device).eval()
        self.processor = ClipCapProcessor.from_pretrained(model)
        self.image_column, self.id_column = image_column, id_column

    def __call__(self, batch: dict) -> dict:
        images, errors = [], []
        for value in batch[self.image_column]:
            try:
                content = value["bytes"] if isinstance(value, dict) else value
                images.append(to_rgb(Image.open(io.BytesIO(content))))
                errors.append(None)
            except Exception as error:  # one broken image must not make its batch fail again and again
                errors.append(str(error))
        captions = iter(self.caption(images))
        return {
            "image_id": [str(image_id) for image_id in batch[self.id_column]],
            "caption": [None if error else next(captions) for error in errors],
            "error": errors,
        }

    def caption(self, images: list) -> list[str]:
        if not images:
            return []
        inputs = self.processor(images=images, return_tensors="pt").to(self.model.device)
        texts = self.processor.batch_decode(self.model.generate(**inputs), skip_special_tokens=True)
        return [text.strip() for text in texts]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", help="folder of .tar or .parquet files; also s3://..., gs://...")
    parser.add_argument("--out", required=True, help="folder for the JSON lines")
    parser.add_argument("--model", default=clipcap_hf.EMOJI_MINI, help="a captioner: a folder or a Hub id")
    parser.add_argument("--captioners", type=int, default=1, help="actors that hold the model")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs for each of them; 0 captions on CPUs")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--parquet", action="store_true", help="the shards are Parquet files")
    parser.add_argument("--image-column", help="default: jpg in .tar shards, image in Parquet files")
    parser.add_argument("--id-column", help="default: __key__ in .tar shards, image_id in Parquet files")
    arguments = parser.parse_args()

    image_column = arguments.image_column or ("image" if arguments.parquet else "jpg")
    id_column = arguments.id_column or ("image_id" if arguments.parquet else "__key__")
    if arguments.parquet:
        shards = ray.data.read_parquet(arguments.shards, columns=[image_column, id_column])
    else:
        # Without a decoder the images stay bytes, so that the captioner reports broken ones.
        shards = ray.data.read_webdataset(arguments.shards, decoder=None, suffixes=[image_column])
    captions = shards.map_batches(
        Captioner,
        fn_constructor_args=(arguments.model, "cuda" if arguments.gpus else "cpu", image_column, id_column),
        compute=ray.data.ActorPoolStrategy(size=arguments.captioners),
        num_gpus=arguments.gpus,
        batch_size=arguments.batch_size,
    )
    captions.write_json(str(Path(arguments.out).absolute()) if "://" not in arguments.out else arguments.out)


if __name__ == "__main__":
    main()
