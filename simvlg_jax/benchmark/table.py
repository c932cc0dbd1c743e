"""The dictionary of `measure` as text."""

from simvlg_jax.benchmark.timing import compared

LABELS = {
    "host input": ("host input", "one thread; training makes it beside the step"),
    "ViT": ("ViT", ""),
    "connector": ("connector", "forward and backward"),
    "merge": ("  of it the merge", ""),
    "LLM forward": ("LLM forward", ""),
    "LLM backward": ("LLM backward", "forward and backward less forward"),
    "head and loss": ("head and loss", "forward and backward"),
    "optimizer": ("optimizer", ""),
}


def describe(name: str, result: dict) -> str:
    """Returns the text.

    Args:
      name: of the config.
    """
    device, batch, step = result["device"], result["batch"], result["step"]
    weights = ", ".join(f"{part}: {source}" for part, source in result["frozen_weights"].items())
    mesh = ", ".join(f"{axis} {size}" for axis, size in device["mesh"].items())
    lines = [
        f"{name} on {device['count']} x {device['kind']} ({device['platform']}; {mesh}), JAX {device['jax']}, "
        f"{result['dtype']}, frozen weights {result['frozen_dtype']} ({weights})",
        f"batch: {batch['images']} pictures of the {result['data']} data in {batch['micro_batches']} micro-batch(es), "
        f"text {' x '.join(map(str, batch['text_shape']))}, {batch['soft_prompt_tokens']} soft prompt tokens a picture",
        f"padding: {batch['padding_share']:.1%} of the language model's tokens in {batch['batches']} batches",
        "",
        f"{'part':20}{'ms':>10}{'TFLOP':>11}{'TFLOP/s':>10}",
        *(_row(*LABELS[part], cost) for part, cost in result["parts"].items()),
        _row("sum of the parts", "without host input", result["sum_of_parts"]),
        _row("the rest", "step less sum", result["rest"]),
        _row("whole step", "", step),
        "Each part is compiled on its own and the step fuses them, so they need not add up. FLOPs are those of the",
        "matrix products.",
        "",
        f"step: {step['ms']:.4g} ms, {step['images_per_s']:.4g} images/s, {step['tflop']:.4g} TFLOP, {_mfu(result)}",
        f"peak memory of the {step['memory_of']}: {step['memory_gb']:.2f} GB; traced and compiled in "
        f"{step['compile_s']:.1f} s",
    ]
    if decode := result.get("decode"):
        lines.append("captions/s: " + ", ".join(f"{way} {speed:.4g}" for way, speed in decode.items()))
    if against := result.get("against"):
        lines += _against(against)
    if trace := result.get("trace"):
        lines.append(trace)
    return "\n".join(lines)


def _row(label: str, remark: str, cost: dict) -> str:
    rate = f"{1e3 * cost['tflop'] / cost['ms']:10.3g}" if cost["tflop"] and cost["ms"] > 0 else f"{'':10}"
    return f"{label:20}{cost['ms']:10.3f}{cost['tflop']:11.4g}{rate}  {remark}".rstrip()


def _mfu(result: dict) -> str:
    step = result["step"]
    if step["mfu"] is None:
        return f"no MFU, since no peak is known of {result['device']['kind']!r}"
    return f"MFU {step['mfu']:.1%} of {step['peak_tflops']:.4g} bfloat16 TFLOP/s a device"


def _against(a: dict) -> list[str]:
    loss, places, speeds = a["loss"], a["text_places"], a["images_per_s"]
    compiled = "torch.compile" if a["compiled"] else "not compiled"
    if a["compile_error"]:
        compiled += f"; torch.compile failed: {a['compile_error']}"
    return [
        "",
        f"PyTorch {a['torch']} on {a['device']}, attention {a['attention']}, {compiled}, "
        f"{places['torch']} text places (ours {places['ours']})",
        f"without dropout: loss ours {loss['ours']:.6f}, PyTorch {loss['torch']:.6f}, relative difference "
        f"{loss['relative_difference']:.1e}",
        f"gradients: the difference is {a['connector_gradient_difference']:.1e} of the norm in the connector, "
        f"{a['gradient_difference']:.1e} over all trained parameters",
        f"training, {len(speeds['ours'])} rounds in turns: {compared(speeds['ours'], speeds['torch'])}",
    ]
