"""The sizes of an exported model."""

from transformers import AutoConfig, PretrainedConfig


class SimVLGConfig(PretrainedConfig):
    """Sizes.

    Attributes:
      vision: image_size, patch_size, width, depth, num_heads, mlp_dim, norm_eps, class_token, key_bias, patch_bias,
        activation (a key of vision.ACTIVATIONS), input_norm, temporal, merges (tokens merged away in each block;
        absent: none), max_frames (number of frames with learned temporal positions; absent: 0).
      connector: type (a key of connectors.CONNECTORS; absent: TomeFormer), width, and for TomeFormer depth, num_heads,
        class_token, merges (tokens merged away in each layer), dropout, places (patches of a frame, if tokens are of
        several; absent: 0); for MlpConnector dropped (number of class tokens), cells (rows and columns that patches are
        averaged in; []: none); for Perceiver depth, num_heads, queries, dropout.
      frames: of clips: count, way (a key of frames.WAYS; absent: mean), wanted (tokens that "merged" leaves; 0: as many
        as a frame has), positions (number of frames whose order is learned).
      text_config: the language model's own config, of OPT, LLaMA, Qwen2 or Qwen3.
      start_token_id, end_token_id, pad_token_id: of the captions; prompt_ids: what follows the start token.
      start_first: the start token stands before the soft prompt instead of after it.
      max_new_tokens, min_new_tokens, num_beams, length_penalty, repetition_penalty: of decoding, if `generate` is not
        told otherwise.
    """

    model_type = "simvlg"

    def __init__(
        self,
        vision: dict | None = None,
        connector: dict | None = None,
        frames: dict | None = None,
        text_config: dict | None = None,
        start_token_id: int = 2,
        end_token_id: int = 2,
        pad_token_id: int = 1,
        prompt_ids: list[int] | None = None,
        start_first: bool = False,
        max_new_tokens: int = 30,
        min_new_tokens: int = 0,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        repetition_penalty: float = 1.0,
        **kwargs,
    ):
        self.vision = vision or {}
        self.connector = connector or {}
        self.frames = frames or {}
        text_config = text_config or {"model_type": "opt"}
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config
        self.start_token_id, self.end_token_id = start_token_id, end_token_id
        self.prompt_ids = prompt_ids or []
        self.start_first = start_first
        self.max_new_tokens, self.min_new_tokens = max_new_tokens, min_new_tokens
        self.num_beams, self.length_penalty = num_beams, length_penalty
        self.repetition_penalty = repetition_penalty
        super().__init__(pad_token_id=pad_token_id, **kwargs)
