"""Compiles the pre-training recipes for TPU slices and writes the table in launch/README.md.

    pip install libtpu
    python launch/table.py [--again]

Each compile takes a minute or two on two cores. Results are kept in launch/table.json; only what is missing there is
compiled, all of it with --again.
"""

import argparse
import json
import math
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
RESULTS, README = HERE / "table.json", HERE / "README.md"
BEGIN, END = "<!-- table: python launch/table.py -->", "<!-- end of table -->"
EFFORT = "O0"

RECIPES = ("llm=opt2.7b", "llm=opt6.7b", "llm=vicuna7b", "llm=vicuna13b", "llm=opt2.7b,vit=clip_l")
TOPOLOGIES = ("v5e:4x4", "v5e:16x16", "v4:2x2x4", "v5p:2x2x2", "v6e:4x4")
# Int8 pays where bfloat16 must be split over chips, or where a chip multiplies int8 faster.
INT8 = tuple((f"llm={llm},frozen=int8_compute", "v5e:4x4") for llm in ("opt2.7b", "opt6.7b", "vicuna7b", "vicuna13b"))
LARGE_BATCH = {1600: 2048, 160: 256}  # the batch is the recipe's, or on 256 chips the next multiple we would choose

# (micro-batches, tensor) where they are not the config's, which is made for v5e:4x4.
CHOICES = {
    ("llm=opt2.7b", "v5e:16x16"): (1, 1),
    ("llm=opt2.7b", "v4:2x2x4"): (2, 1),
    ("llm=opt2.7b", "v5p:2x2x2"): (1, 1),
    ("llm=opt2.7b", "v6e:4x4"): (2, 1),
    ("llm=opt6.7b", "v5e:16x16"): (1, 2),
    ("llm=opt6.7b", "v4:2x2x4"): (4, 1),
    ("llm=opt6.7b", "v5p:2x2x2"): (2, 1),
    ("llm=opt6.7b", "v6e:4x4"): (4, 1),
    ("llm=vicuna7b", "v5e:16x16"): (1, 2),
    ("llm=vicuna7b", "v4:2x2x4"): (1, 1),
    ("llm=vicuna7b", "v5p:2x2x2"): (1, 1),
    ("llm=vicuna7b", "v6e:4x4"): (1, 1),
    ("llm=vicuna13b", "v5e:16x16"): (1, 4),
    ("llm=vicuna13b", "v4:2x2x4"): (1, 2),
    ("llm=vicuna13b", "v5p:2x2x2"): (1, 1),
    ("llm=vicuna13b", "v6e:4x4"): (1, 2),
    ("llm=opt2.7b,vit=clip_l", "v5e:16x16"): (1, 1),
    ("llm=opt2.7b,vit=clip_l", "v4:2x2x4"): (2, 1),
    ("llm=opt2.7b,vit=clip_l", "v5p:2x2x2"): (1, 1),
    ("llm=opt2.7b,vit=clip_l", "v6e:4x4"): (2, 1),
}


def chips(topology: str) -> int:
    return math.prod(map(int, topology.partition(":")[2].split("x")))


def accelerator_type(topology: str) -> str:
    """What launch/tpu.sh calls a slice: v5e and v6e count chips, the others TensorCores, of which a chip has two."""
    kind, count = topology.partition(":")[0], chips(topology)
    return {"v5e": f"v5litepod-{count}", "v6e": f"v6e-{count}"}.get(kind, f"{kind}-{2 * count}")


def command(recipe: str, topology: str) -> list[str]:
    """The arguments of simvlg_jax.train_compile for a row."""
    flags = ["--config", f"configs/pretrain_image.py:{recipe}", "--topology", topology]
    if (recipe, topology) in CHOICES:
        accumulate, tensor = CHOICES[recipe, topology]
        flags += [f"--config.train.accumulate={accumulate}", f"--config.mesh.tensor={tensor}"]
    if chips(topology) == 256:
        flags += [f"--config.train.batch_size={LARGE_BATCH[160 if 'vicuna' in recipe else 1600]}"]
    return flags


def compile_row(recipe: str, topology: str) -> dict:
    flags = command(recipe, topology)
    print("python -m simvlg_jax.train_compile", *flags, file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "simvlg_jax.train_compile", *flags, "--effort", EFFORT, "--json"],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 3):
        sys.exit(done.returncode)
    return json.loads(done.stdout) | {
        "flags": flags,
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("jax", "libtpu")},
    }


def row(result: dict) -> str:
    accumulate, mesh = result["micro_batches"], result["mesh"]
    split = f"{accumulate} x {result['global_batch'] // accumulate}" if accumulate > 1 else str(result["global_batch"])
    cells = [result["config"].partition(":")[2], result["topology"], accelerator_type(result["topology"])]
    cells += [split, str(mesh["tensor"])]
    cells += ["yes" if result["fits"] else "**no**"]
    if result["peak_bytes"] is None:
        cells += ["more", f"{result['hbm_bytes'] / 1e9:.1f}", "", "", ""]
    else:
        cells += [f"{result['peak_bytes'] / 1e9:.1f}", f"{result['hbm_bytes'] / 1e9:.1f}"]
        cells += [f"{result['tflop_per_step']:.0f}", f"{result['images_per_s']:,.0f}"]
        cells += [f"{result['communication_s'] / result['roofline_step_s']:.0%}"]
    return f"| {' | '.join(cells)} |"


def write(results: dict[str, dict]) -> None:
    names = ("recipe", "slice", "TYPE", "batch", "tensor", "fits", "GB a chip", "of", "TFLOP a chip")
    names += ("images/s, roofline", "communication")
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names), *map(row, results.values())]
    dates = sorted({result["date"] for result in results.values()})
    versions = sorted({" ".join(f"{k} {v}" for k, v in result["versions"].items()) for result in results.values()})
    lines += [
        "",
        f"Compiled {' to '.join(dict.fromkeys((dates[0], dates[-1])))} with {', '.join(versions)}, effort {EFFORT}.",
    ]
    before, _, rest = README.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    README.write_text("\n".join([before + BEGIN, "", *lines, "", END + after]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="compile every row anew")
    again = parser.parse_args().again
    results = {} if again or not RESULTS.exists() else json.loads(RESULTS.read_text())
    wanted = [*((recipe, topology) for recipe in RECIPES for topology in TOPOLOGIES), *INT8]
    for recipe, topology in wanted:
        key = f"{recipe} {topology}"
        if results.get(key, {}).get("flags") != command(recipe, topology):
            results[key] = compile_row(recipe, topology)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write({f"{recipe} {topology}": results[f"{recipe} {topology}"] for recipe, topology in wanted})


if __name__ == "__main__":
    main()
