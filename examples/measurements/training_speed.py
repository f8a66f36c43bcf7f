"""Compare captions trained per second by `ClipCapTrainer` and by the official code's step, at the paper's size.

python examples/measurements/training_speed.py --steps 6 --out training-speed.json

Weights are random, sizes are real: GPT-2 small, embeddings of ViT-B/32 (512), batches of 40 captions of 11.5 tokens on
average, including the end token, and at most 20. The trainer groups captions of similar length. The official step pads
to the longest caption of the data set, computes logits for every position, including the prefix, and gradients for
every weight, frozen or not, and updates with a loop over the weights. Attention and mapping network are ours in both,
so the ratio does not cover them. The steps take turns, each with a matrix product that shows how fast the machine
multiplies at that moment.

On a CPU everything is measured twice: with the C library's default, and then keeping freed memory, as `clipcap train`
does and any script can (`clipcap_hf.processes.keep_freed_memory`). The official step gains the most from it.
"""

import argparse
import json
import statistics
import tempfile
import time

import clipcap_hf  # noqa: F401  (before transformers)
import torch
from clipcap_hf import CaptioningCollator, ClipCapForConditionalGeneration, ClipCapProcessor, ClipCapTrainer
from clipcap_hf.files import write_text
from clipcap_hf.processes import keep_freed_memory
from clipcap_hf.training.arguments import CaptioningArguments
from clipcap_hf.training.rows import EpochRows
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback, set_seed
from transformers.activations import NewGELUActivation


RECIPES = {
    "mlp, GPT-2 tuned": {"mapping_type": "mlp", "prefix_length": 10},
    "transformer 40/40, GPT-2 frozen": {
        "mapping_type": "transformer",
        "prefix_length": 40,
        "freeze_language_model": True,
    },
}
VOCABULARY, LONGEST, BATCH_SIZE = 50257, 20, 40


def make_data(steps: int) -> Dataset:
    """Make embeddings, and captions whose words are one token each."""
    rows = BATCH_SIZE * (steps + 2)
    # Without the end token.
    lengths = (10.5 + 2.6 * torch.randn(rows)).round().clamp(5, LONGEST - 1).long().tolist()
    captions = [" ".join(f"w{word}" for word in torch.randint(VOCABULARY - 1, (length,))) for length in lengths]
    data = Dataset.from_dict({"clip_embeds": torch.randn(rows, 512).numpy(), "captions": captions})
    return data.with_format("numpy", columns=["clip_embeds"], output_all_columns=True)


def make_processor(prefix_length: int) -> ClipCapProcessor:
    words = {f"w{index}": index for index in range(VOCABULARY - 1)} | {"<end>": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return ClipCapProcessor(
        None, PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>"), prefix_length=prefix_length
    )


def make_model(recipe: dict) -> ClipCapForConditionalGeneration:
    language_model = GPT2LMHeadModel(GPT2Config())
    return ClipCapForConditionalGeneration.from_vision_text_pretrained(
        None, language_model, clip_embed_dim=512, **recipe
    )


class OfficialWay:
    """Training step of the official code."""

    def __init__(self, recipe: dict, device: str):
        self.model = make_model(recipe).to(device).train()
        self.model.language_model.requires_grad_(True)
        for block in self.model.language_model.transformer.h:
            block.mlp.act = NewGELUActivation()
        trained = self.model
        if recipe.get("freeze_language_model"):
            self.model.language_model.eval()
            trained = self.model.mapping_network
        self.optimizer = torch.optim.AdamW(
            trained.parameters(), lr=2e-5, weight_decay=0, eps=1e-6, foreach=False, fused=False
        )

    def __call__(self, tokens: torch.Tensor, embeds: torch.Tensor):
        real = tokens >= 0
        tokens = tokens.masked_fill(~real, 0)
        prefix = self.model.mapping_network(embeds)
        inputs = torch.cat([prefix, self.model.get_input_embeddings()(tokens)], 1)
        mask = torch.cat([torch.ones(prefix.shape[:2], dtype=torch.long, device=tokens.device), real.long()], 1)
        logits = self.model.language_model(inputs_embeds=inputs, attention_mask=mask).logits
        logits = logits[:, prefix.shape[1] - 1 : -1]
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens.flatten(), ignore_index=0)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()  # leaves the gradients of a frozen language model, which add up unused


class TakingTurns(TrainerCallback):
    """Run, after each step of the trainer, an official step on as many captions and a matrix product."""

    def __init__(self, official: OfficialWay, batches: list, device: str, dtype: torch.dtype):
        self.official, self.batches, self.device = official, batches, device
        self.seconds = {"ClipCapTrainer": [], "official way": []}
        self.multiplications = []
        self.factors = [torch.randn(*shape, device=device, dtype=dtype) for shape in ((1200, 768), (768, 3072))]

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = self.now()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds["ClipCapTrainer"].append(self.now() - self.started)
        started = self.now()
        self.official(*self.batches[state.global_step - 1])
        self.seconds["official way"].append(self.now() - started)
        left, right = self.factors
        started = self.now()
        for _ in range(20):
            left @ right
        self.multiplications.append(20 * 2 * 1200 * 768 * 3072 / (self.now() - started))
        self.started = self.now()

    def now(self) -> float:
        if self.device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()


def measure(recipe: dict, steps: int, bf16: bool) -> dict:
    set_seed(0)
    data = make_data(steps)
    processor = make_processor(recipe["prefix_length"])
    model = make_model(recipe)
    collator = CaptioningCollator(processor)
    with tempfile.TemporaryDirectory() as folder:
        args = CaptioningArguments(
            output_dir=folder,
            max_steps=steps + 1,  # the first step is not counted
            eval_strategy="no",
            save_strategy="no",
            logging_steps=10_000,
            train_sampling_strategy="group_by_length",
            disable_tqdm=True,
            bf16=bf16,
            use_cpu=not torch.accelerator.is_available(),
            report_to="none",
        )
        device = str(args.device)
        ends = processor.tokenizer.eos_token
        tokens = [processor.tokenizer(caption + f" {ends}")["input_ids"] for caption in data["captions"]]
        padded = torch.tensor([row + [-1] * (LONGEST - len(row)) for row in tokens])
        embeds = torch.as_tensor(data["clip_embeds"][:]).float()
        batches = list(zip(padded.to(device).split(BATCH_SIZE), embeds.to(device).split(BATCH_SIZE)))
        turns = TakingTurns(OfficialWay(recipe, device), batches, device, torch.bfloat16 if bf16 else torch.float32)
        trainer = ClipCapTrainer(
            model=model,
            args=args,
            train_dataset=EpochRows(data),
            data_collator=collator,
            processing_class=processor,
            callbacks=[turns],
        )
        counts = []
        batch = {name: value.to(device) for name, value in collator([data[i] for i in range(BATCH_SIZE)]).items()}
        with FlopCounterMode(display=False) as counter:
            trainer.compute_loss(model.to(device).train(), batch).backward()
        counts.append(counter.get_total_flops())
        model.zero_grad()
        trainer.train()
    seconds = {name: values[1:] for name, values in turns.seconds.items()}
    result = {
        name: {
            "seconds_per_step": {
                "median": statistics.median(values),
                "min": min(values),
                "max": max(values),
            },
            "captions_per_second": BATCH_SIZE / statistics.median(values),
        }
        for name, values in seconds.items()
    }
    ratios = [official / ours for official, ours in zip(seconds["official way"], seconds["ClipCapTrainer"])]
    peak = statistics.median(turns.multiplications[1:])
    result["ratio"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    result["share_of_matmul_limit"] = counts[0] / statistics.median(seconds["ClipCapTrainer"]) / peak
    result["matmul_gflops_per_second"] = peak / 1e9
    result["tokens_per_caption"] = sum(map(len, tokens)) / len(tokens)
    if device.startswith("cuda"):
        result["peak_memory_gib_of_both"] = torch.cuda.max_memory_allocated() / 2**30
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="steps of each kind")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--bf16", action="store_true", help="autocast in ClipCapTrainer; the official step is float32")
    parser.add_argument("--recipe", choices=list(RECIPES), help="measure one recipe only")
    parser.add_argument("--out", help="JSON file for the figures")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    recipes = {name: recipe for name, recipe in RECIPES.items() if arguments.recipe in (None, name)}
    report = {"threads": torch.get_num_threads(), "torch": torch.__version__, "steps": arguments.steps}
    print(f"{'recipe':<34}{'ClipCapTrainer':>16}{'official way':>14}{'ratio (min to max)':>22}{'of matmul limit':>17}")
    for memory in ("as it is", "kept"):
        if memory == "kept" and (torch.accelerator.is_available() or not keep_freed_memory()):
            break
        print(f"freed memory {memory}:")
        report[memory] = {name: measure(recipe, arguments.steps, arguments.bf16) for name, recipe in recipes.items()}
        for name, found in report[memory].items():
            ours, theirs = (found[way]["captions_per_second"] for way in ("ClipCapTrainer", "official way"))
            ratio = found["ratio"]
            spread = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
            print(
                f"{name:<34}{ours:>11.2f} c/s{theirs:>10.2f} c/s{spread:>22}{found['share_of_matmul_limit']:>16.0%}",
                flush=True,
            )
    if arguments.out:
        write_text(arguments.out, json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
