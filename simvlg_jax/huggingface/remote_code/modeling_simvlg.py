"""SimVLG (EVLGen, arXiv 2310.03291) in PyTorch: pictures or clips in, captions out.

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    ids = model.generate(pixel_values)  # (B, 3, H, W), or clips (B, 3, F, H, W)

Needs torch and transformers alone. Parameters carry the names of the published checkpoints.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .configuration_simvlg import SimVLGConfig
from .connectors import CONNECTORS
from .frames import WAYS
from .merging import attention  # noqa: F401  older transformers copy only what this file imports
from .vision import VisionTransformer


class SimVLG(PreTrainedModel):
    """Frozen vision encoder -> connector -> linear layer -> soft prompt of a frozen language model."""

    config_class = SimVLGConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: SimVLGConfig):
        super().__init__(config)
        self.visual_encoder = VisionTransformer(config.vision)
        width, hidden = config.connector["width"], config.text_config.hidden_size
        self.ln_vision = nn.LayerNorm(config.vision["width"], 1e-5)
        self.VL_proj = nn.Linear(config.vision["width"], width)
        self.VLconnector = CONNECTORS[config.connector.get("type", "TomeFormer")](config.connector)
        family = "opt" if config.text_config.model_type == "opt" else "llm"
        self.add_module(f"{family}_proj", nn.Linear(width, hidden))
        self.add_module(f"{family}_model", AutoModelForCausalLM.from_config(config.text_config))
        positions = config.frames.get("positions", 0)
        if positions:
            name = "frame_weight" if config.frames.get("way", "mean") == "mean" else "frame_embedding"
            self.register_parameter(name, nn.Parameter(torch.zeros(positions, config.vision["width"])))
        self.post_init()

    @property
    def language_model(self) -> PreTrainedModel:
        return self.opt_model if hasattr(self, "opt_model") else self.llm_model

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: weights come from a checkpoint."""

    def soft_prompt(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) or (B, 3, F, H, W), normalised -> (B, P, width of the language model)."""
        tokens, places = self.visual_encoder(pixel_values)
        tokens, places = self.of_clips(tokens) if tokens.ndim == 4 else (self.ln_vision(tokens), places)
        project = self.opt_proj if hasattr(self, "opt_proj") else self.llm_proj
        return project(self.VLconnector(self.VL_proj(tokens), places))

    def of_clips(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, F, T, D) of frames -> normed (B, M, D), and the token of each class token and patch (B, N), or None.

        The class tokens become their mean. Each token gets the positions of the frames that it is made of, and a mean
        over all frames weighs them, each channel in its own way.
        """
        way, wanted = self.config.frames.get("way", "mean"), self.config.frames.get("wanted", 0)
        first = int(self.config.vision["class_token"])
        if hasattr(self, "frame_weight"):
            weights = self.frame_weight[: tokens.shape[1]]
            tokens = tokens * (1 + weights - weights.mean(0))[:, None].to(tokens.dtype)
        joined, shares, places = WAYS[way](tokens[:, :, first:], wanted)
        joined = self.ln_vision(torch.cat([tokens[:, :, :first].mean(1), joined], 1))
        if hasattr(self, "frame_embedding"):
            frames = tokens.shape[1]
            shares = torch.cat([shares.new_full((len(shares), first, frames), 1 / frames), shares], 1)
            joined = joined + (shares @ self.frame_embedding[:frames].float()).to(joined.dtype)
        return joined, None if places is None else F.pad(places + first, (first, 0))

    def prompted(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        """Embeddings (B, P + L, E) of the soft prompt and a text whose first id is the start token."""
        prefix = self.soft_prompt(pixel_values)
        text = self.language_model.get_input_embeddings()(input_ids).to(prefix.dtype)
        start = [text[:, :1], prefix] if self.config.start_first else [prefix, text[:, :1]]
        return torch.cat([*start, text[:, 1:]], 1)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ):
        """The language model's output over [soft prompt; text]; `labels` (B, L) as for it, -100 where no loss is taken.

        The mean loss is over all labels but those of a start token that stands before the soft prompt.
        """
        embeddings = self.prompted(pixel_values, input_ids)
        prefix = embeddings.shape[1] - input_ids.shape[1]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = F.pad(mask, (prefix, 0), value=1)
        if labels is not None:
            labels = F.pad(labels, (prefix, 0), value=-100)
            if self.config.start_first:
                labels[:, prefix] = -100
        return self.language_model(inputs_embeds=embeddings, attention_mask=mask, labels=labels)

    @torch.no_grad()
    def generate(self, pixel_values: Tensor, prompt_ids: list[int] | None = None, **kwargs) -> Tensor:
        """New token ids (B, T), by the config's settings; keyword arguments go to the language model's generate."""
        config = self.config
        ids = [config.start_token_id, *(config.prompt_ids if prompt_ids is None else prompt_ids)]
        input_ids = torch.tensor([ids], device=pixel_values.device).expand(len(pixel_values), -1)
        embeddings = self.prompted(pixel_values, input_ids)
        settings = {
            "max_new_tokens": config.max_new_tokens,
            "min_new_tokens": config.min_new_tokens or None,
            "num_beams": config.num_beams,
            "length_penalty": config.length_penalty,
            "repetition_penalty": config.repetition_penalty,
            "do_sample": False,
            "bos_token_id": config.start_token_id,
            "eos_token_id": config.end_token_id,
            "pad_token_id": config.pad_token_id,
            **kwargs,
        }
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
        return self.language_model.generate(inputs_embeds=embeddings, attention_mask=mask, **settings)
