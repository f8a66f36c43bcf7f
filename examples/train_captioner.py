"""Train a captioner with `Trainer` on images: here the embedded emoji, in your copy a data set of your own.

python examples/train_captioner.py

The vision tower is that of `emoji-mini` and the language model a new, small GPT-2, so that everything is at hand offline. On
your images, start from `ClipCapForConditionalGeneration.from_vision_text_pretrained("openai/clip-vit-base-patch32",
"openai-community/gpt2")` and the processor of the same names, and load them with `datasets`. It takes two minutes on two CPU cores,
which is too short for good captions; `clipcap demo` encodes each image once and so trains nine times as long in four.
"""

import clipcap_hf
from clipcap_hf import CaptioningCollator, ClipCapForConditionalGeneration, ClipCapProcessor
from clipcap_hf.data import load_emoji
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, pipeline


embedded = ClipCapForConditionalGeneration.from_pretrained(clipcap_hf.EMOJI_MINI)
processor = ClipCapProcessor.from_pretrained(clipcap_hf.EMOJI_MINI)
eos_token_id = processor.tokenizer.eos_token_id
language_model = GPT2LMHeadModel(
    GPT2Config(
        vocab_size=processor.image_token_id,
        n_positions=64,
        n_embd=192,
        n_layer=3,
        n_head=6,
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
    )
)
model = ClipCapForConditionalGeneration.from_vision_text_pretrained(
    embedded.vision_tower, language_model, prefix_length=processor.prefix_length, normalize_clip_embeds=True
)

train_dataset = load_emoji("train").select_columns(["image", "captions"])
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir="emoji-captioner",
        max_steps=300,
        per_device_train_batch_size=32,
        learning_rate=2e-3,
        warmup_steps=30,
        logging_steps=50,
        report_to="none",
        dataloader_num_workers=2,  # images are read and resized beside the training
        remove_unused_columns=False,  # the collator reads the columns of images and captions
    ),
    train_dataset=train_dataset,
    data_collator=CaptioningCollator(processor, sample_captions=False),
    processing_class=processor,
)
trainer.train()
trainer.save_model()

captioner = pipeline("image-captioning", model="emoji-captioner", num_beams=3)
for row in load_emoji("new_design").select(range(0, 100, 10)):
    print(f"{row['name']:<30} {captioner(row['image'])[0]['generated_text']}")
