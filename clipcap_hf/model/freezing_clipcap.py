"""Which parts of a captioner are trained."""

from torch import nn

from .base_clipcap import CaptionerParts
from .lora_clipcap import freeze_beside_lora


class FreezesParts(CaptionerParts):
    """Adds to a captioner the freezing of its vision tower and its language model, as the configuration says."""

    def _freeze(self):
        if self.config.freeze_vision and self.vision_tower is not None:
            self.vision_tower.requires_grad_(False)
        if self.config.lora is not None:
            freeze_beside_lora(self.language_model)
        elif self.config.freeze_language_model:
            self.language_model.requires_grad_(False)
            # A frozen language model works without dropout. `eval()` would do the same, but it would silently switch
            # gradient checkpointing off, too.
            for module in self.language_model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
                for name, value in vars(module).items():
                    if "drop" in name and isinstance(value, float):  # also OPT's `layerdrop`
                        setattr(module, name, 0.0)

    def train(self, mode: bool = True):
        super().train(mode)
        if self.config.freeze_vision and self.vision_tower is not None:
            self.vision_tower.eval()  # the running statistics of ResNet towers would drift
        return self

    def parameter_counts(self) -> dict[str, tuple[int, int]]:
        """Count `(trainable, all)` parameters of each part and in `"total"`; tied weights count once."""
        parts = {name: list(part.parameters()) for name, part in self.named_children()}
        counts = {
            name: (sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))
            for name, parameters in parts.items()
        }
        trainable, everything = zip(*counts.values())
        return {**counts, "total": (sum(trainable), sum(everything))}
