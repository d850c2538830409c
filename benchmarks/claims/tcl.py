"""What TCL's two contrasts add to ALBEF's on noisy captions, small: the paper's ablation on made-up pictures.

    python benchmarks/claims/tcl.py                    3 seeds, about six minutes on two cores
    python benchmarks/claims/tcl.py --steps 1000       for longer

emojiworld's scenes of one and two objects, 30 % of whose captions are those of other scenes. The same small network (the tiny
preset without the fusion half's losses) is trained from the same weights with

    cma             across modalities, momentum features, queue, soft targets: ALBEF's contrast
    cma + imc       and within each
    cma + imc + lmi and of the whole with its parts

and looked at on clean held-out data: how often the nearest other picture of a single object shows the same thing (images to
images; chance is that of a random other picture), and R@1 between scenes and captions in both directions. Expected, from the
paper: within the modality the second and third are clearly above the first; across modalities they are not below it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from _measure import ROOT, machine

from vlpfast.cli import assemble
from vlpfast.data import make_loader
from vlpfast.evaluation.features import encode_images, encode_pairs
from vlpfast.evaluation.retrieval import retrieval
from vlpfast.models.tcl import TCL, contrasts
from vlpfast.training.optim import learning_rate, set_learning_rate
from vlpfast.training.parallel import World
from vlpfast.training.rng import seed_everything
from vlpfast.types import Batch, Progress

VARIANTS = {"cma": ("cma",), "cma + imc": ("cma", "imc"), "cma + imc + lmi": ("cma", "imc", "lmi")}
FIGURES = ("image_1nn", "image_1nn_chance", "text_to_image_R@1", "image_to_text_R@1")


class Contrasts(TCL):
    """TCL's three contrasts without matching and masked words."""

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        e = self.encode_views(batch)
        self.keep(e)
        return contrasts(self, e)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--noise", type=float, default=0.3, help="share of the captions that are another scene's")
    parser.add_argument("--cache-dir", default=str(ROOT / ".cache/vlpfast"))
    parser.add_argument("--json", type=Path, help="default: results/MACHINE/claims-tcl.json, unless a choice is made")
    args = parser.parse_args()
    config = assemble.load_config(
        ROOT / "configs/tcl.yaml",
        [f"data.cache_dir={args.cache_dir}", f"train.steps={args.steps}", f"train.batch_size={args.batch_size}",
         f"train.run_dir={Path(args.cache_dir) / 'claims-tcl'}"],
    )  # fmt: skip
    sources = assemble.prepare_data(config)
    folder = Path(config.train.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizers = assemble.build_tokenizers(config, sources.train, folder)
    captions = every_caption(config, sources, tokenizers)
    rows = []
    for seed in range(args.seeds):
        for name, wanted in VARIANTS.items():
            begun = time.perf_counter()
            found = figures(trained(config, sources, tokenizers, captions, seed, wanted, args.noise), config, sources, tokenizers)
            rows.append({"variant": name, "seed": seed, "seconds": time.perf_counter() - begun, **found})
            shown = "  ".join(f"{key} {100 * found[key]:5.1f} %" for key in FIGURES)
            print(f"seed {seed}  {name:16} {shown}  {rows[-1]['seconds']:.0f} s", flush=True)
    summary = []
    for name in VARIANTS:
        chosen = [row for row in rows if row["variant"] == name]
        values = {key: [row[key] for row in chosen] for key in FIGURES}
        mean = {key: statistics.mean(value) for key, value in values.items()}
        spread = {key: statistics.stdev(value) if len(value) > 1 else 0.0 for key, value in values.items()}
        summary.append({"variant": name, "mean": mean, "standard_deviation": spread})
        print(f"{name:16} " + "  ".join(f"{key} {100 * mean[key]:5.1f} +- {100 * spread[key]:.1f} %" for key in FIGURES))
    base, *others = summary
    claims = {}
    for one in others:
        # Twice the standard error of a difference of two means over seeds.
        margin = {
            key: 2 * ((base["standard_deviation"][key] ** 2 + one["standard_deviation"][key] ** 2) / args.seeds) ** 0.5
            for key in FIGURES
        }
        gain = {key: one["mean"][key] - base["mean"][key] for key in FIGURES}
        claims[f"{one['variant']} is better than cma within pictures"] = gain["image_1nn"] > margin["image_1nn"]
        across = ("text_to_image_R@1", "image_to_text_R@1")
        claims[f"{one['variant']} is not worse across modalities"] = all(gain[key] > -margin[key] for key in across)
    for claim, held in claims.items():
        print(f"{'held' if held else 'DID NOT HOLD':15}{claim}")
    chosen = args.seeds != 3 or args.steps != 300 or args.batch_size != 48 or args.noise != 0.3
    about = machine("cpu", torch.get_num_threads())
    path = args.json or (None if chosen else ROOT / "benchmarks/results" / about["machine"] / "claims-tcl.json")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        settings = {"steps": args.steps, "batch_size": args.batch_size, "noise": args.noise}
        listed = [{"claim": claim, "held": held} for claim, held in claims.items()]
        found = about | settings | {"summary": summary, "claims": listed, "rows": rows}
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(f"written: {path}")


def every_caption(config, sources, tokenizers) -> tuple[Tensor, Tensor]:
    """text [N, L] and text_mask [N, L] of all training samples, by their index."""
    options = {"backend": config.data.loader, "threads": config.data.threads}
    loader = make_loader(sources.train, assemble.data_spec(config), tokenizers, 250, train=False, **options)
    found = [(batch["index"], batch["text"], batch["text_mask"]) for batch in loader]
    loader.close()
    index, text, mask = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = index.argsort()
    assert torch.equal(index[order], torch.arange(len(index)))
    return text[order], mask[order]


def trained(config, sources, tokenizers, captions, seed: int, wanted: tuple[str, ...], noise: float) -> TCL:
    """Trained on `wanted` of its losses; the weights it begins with, batches and wrong captions are the seed's."""
    config.train.seed = seed
    seed_everything(seed)
    model = Contrasts(config.model.config).train()
    text, mask = captions
    generator = torch.Generator().manual_seed(seed)
    wrong = (torch.rand(len(text), generator=generator) < noise).nonzero().flatten()
    source = torch.arange(len(text))
    source[wrong] = wrong.roll(1)[torch.randperm(len(wrong), generator=generator)]
    stage_name, stage = config.stage_list()[0]
    loader = assemble.open_loader(config, sources, tokenizers, World(), stage_name, stage)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if (p.ndim > 1) == decayed], "factor": 1.0} for decayed in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=config.train.lr, fused=True)
    optimizer.param_groups[1]["weight_decay"] = 0.0
    optimizer.param_groups[0]["weight_decay"] = config.train.weight_decay
    batches = iter(loader)
    for step in range(config.train.steps):
        batch = next(batches)
        chosen = source[batch["index"]]
        batch = {"image": batch["image"], "text": text[chosen], "text_mask": mask[chosen]}
        set_learning_rate(optimizer, learning_rate(step, config.train.steps, config.train))
        progress = Progress(step, config.train.steps, step / len(loader))
        model.before_step(progress)
        losses = model(batch, progress)
        sum(losses[key] for key in wanted).backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.train.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        model.after_step()
    loader.close()
    return model


def figures(model: TCL, config, sources, tokenizers) -> dict[str, float]:
    options = {"backend": config.data.loader, "threads": config.data.threads}
    loader = make_loader(sources.heldout, assemble.data_spec(config), tokenizers, 250, train=False, **options)
    pairs = encode_pairs(model, loader, "cpu")
    loader.close()
    metrics = retrieval(pairs.image, pairs.text).metrics
    loader = make_loader(
        sources.classes.patterns, assemble.data_spec(config), tokenizers, 250, train=False, with_meta=True, **options
    )
    single = encode_images(model, loader, "cpu")
    loader.close()
    image = F.normalize(single.image, dim=1)
    label = [record["label"] for record in single.meta]
    label = torch.tensor([sorted(set(label)).index(name) for name in label])
    nearest = (image @ image.T).fill_diagonal_(-2).argmax(1)
    same = label[:, None] == label
    chance = float((same.sum(1) - 1).float().mean() / (len(label) - 1))
    return {"image_1nn": float((label[nearest] == label).float().mean()), "image_1nn_chance": chance, **metrics}


if __name__ == "__main__":
    main()
