"""The same training step in PyTorch: the model that `to_torch --format hf` writes, with the same weights and batch.

It is what its users would write: the vision encoder and the language model frozen, scaled-dot-product attention, the
loss of transformers (the mean over all targets), fused AdamW, and captions padded to the longest of the batch. If
`dtype` is bfloat16, it runs under autocast with frozen weights in `frozen_dtype`; otherwise all is float32. It gets
pictures that are normalised already. The learning rate stays constant.
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import torch
from ml_collections import ConfigDict
from transformers import AutoModel

from simvlg_jax.benchmark.setting import Setting
from simvlg_jax.benchmark.timing import cores
from simvlg_jax.convert import evlgen, stacking
from simvlg_jax.data.batching import pad
from simvlg_jax.data.text import IGNORE
from simvlg_jax.huggingface.export import write_hf
from simvlg_jax.tasks import params as partition
from simvlg_jax.utils.errors import first_line

# Module of the PyTorch model -> its entry of `optimizer.lr_multipliers`.
GROUPS = dict(
    visual_encoder="vit",
    ln_vision="ln_vision",
    VL_proj="vl_proj",
    VLconnector="connector",
    opt_proj="llm_proj",
    llm_proj="llm_proj",
    opt_model="llm",
    llm_model="llm",
)


def texts_of(batch: Mapping[str, np.ndarray]) -> list[tuple[list[int], list[int]]]:
    """Returns (ids, targets) of each picture's caption, without padding.

    A row of the batch holds one caption, or several after each other, whose lengths are in its row of caption_lengths.
    """
    ids, targets, mask = (batch[f"caption_{name}"] for name in ("ids", "targets", "mask"))
    ends = np.cumsum(batch.get("caption_lengths", (mask > 0).sum(1, keepdims=True)), 1)
    rows = ([np.split(row, end)[:-1] for row, end in zip(array, ends, strict=True)] for array in (ids, targets))
    return [(i.tolist(), t.tolist()) for pair in zip(*rows, strict=True) for i, t in zip(*pair, strict=True)]


class TorchStep:
    """The step; each operation runs on its own until `compile` succeeds.

    Args:
      folder: gets the exported model.

    Raises:
      UserError: the model has no PyTorch form.
    """

    def __init__(self, setting: Setting, folder: Path):
        config = setting.config
        params = stacking.stack_all(jax.device_get(partition.join(setting.frozen, setting.state.params)))
        encoder = setting.task.batch.texts["caption"].encoder
        write_hf(folder, setting.task.model, params, encoder, config)
        torch.set_num_threads(cores())
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
        self._low = config.dtype == "bfloat16"
        self._clip = config.optimizer.clip_norm
        trained = evlgen.to_evlgen(setting.task.model, stacking.stack_all(jax.device_get(setting.state.params)))
        self._freeze(set(trained), getattr(torch, config.frozen_dtype if self._low else "float32"))
        self.model.to(self.device)
        self.model.language_model.config.use_cache = False
        self._optimizer = torch.optim.AdamW(self._groups(config.optimizer), **_adamw(config.optimizer), fused=True)
        self._batch = self._on_device(setting, encoder.pad_id)
        self._forward = self.model
        self.training(True)

    @property
    def tokens(self) -> int:
        """The number of text places of the batch."""
        return self._batch["input_ids"].numel()

    @property
    def attention(self) -> str:
        return self.model.language_model.config._attn_implementation

    def training(self, on: bool) -> None:
        """Switches dropout of the connector on or off; that of frozen modules stays off, as in our step."""
        self.model.eval()
        self.model.VLconnector.train(on)

    def loss(self) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._low):
            return self._forward(**self._batch).loss

    def __call__(self) -> torch.Tensor:
        """Takes a step and returns its loss."""
        self._optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        if self._clip:
            torch.nn.utils.clip_grad_norm_(self._trained(), self._clip)
        self._optimizer.step()
        return loss

    def wait(self) -> None:
        """Waits until all steps are done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def gradients(self) -> tuple[float, dict[str, np.ndarray]]:
        """Returns the loss without dropout, and the gradient of each trained parameter by name."""
        self.training(False)
        self.model.zero_grad()
        loss = self.loss()
        loss.backward()
        self.training(True)
        named = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        return float(loss.detach()), {name: grad.float().cpu().numpy() for name, grad in named.items()}

    def compile(self) -> str:
        """Tries torch.compile; returns "", or why it failed. The step then stays as it was."""
        try:
            self._forward = torch.compile(self.model)
            self()
        except Exception as error:  # the compiler raises what its backends raise
            self._forward = self.model
            return first_line(error)
        return ""

    def _freeze(self, trained: set[str], dtype: torch.dtype) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in trained)
            if name not in trained:
                parameter.data = parameter.data.to(dtype)

    def _trained(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _groups(self, optimizer: ConfigDict) -> list[dict]:
        groups: dict[tuple, list] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((GROUPS[name.split(".")[0]], parameter.ndim > 1), []).append(parameter)
        return [
            {
                "params": parameters,
                "lr": optimizer.lr * optimizer.lr_multipliers[group],
                "weight_decay": optimizer.weight_decay * decays,
            }
            for (group, decays), parameters in groups.items()
        ]

    def _on_device(self, setting: Setting, pad_id: int) -> dict[str, torch.Tensor]:
        batch = setting.host_batch
        pictures = np.moveaxis(np.asarray(jax.jit(setting.task.model.vit.normalize)(batch["image"])), -1, 1)
        ids, targets = zip(*texts_of(batch), strict=True)
        length = max(map(len, ids))
        arrays = {
            "pixel_values": np.array(pictures, np.float32),
            "input_ids": pad(ids, length, pad_id).astype(np.int64),
            "attention_mask": pad([[1] * len(row) for row in ids], length, 0).astype(np.int64),
            "labels": pad(targets, length, IGNORE).astype(np.int64),
        }
        return {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}


def _adamw(optimizer: ConfigDict) -> dict:
    return dict(betas=(optimizer.b1, optimizer.b2), eps=optimizer.eps)
