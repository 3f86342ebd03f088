"""What masks cost per generated token in evaluation: one decoder, masks on and off in turn.

    python benchmarks/generate.py [--rounds 40] [--tokens 64] [--threads 1] [--small] [--quick]

A decoder of Llama's kind with random weights (hidden 256, 4 layers; hidden 768, 12 layers) generates greedily from 8
tokens, with a cache. Both sides of a pair are one model in one place of memory: its masks are on, or taken off, its
modules of their own classes. "Off, again" is the same comparison where nothing differs. Prints the
median of the pairs' ratios with its 95 % bootstrap interval.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from contextlib import nullcontext

import torch
from overhead_measure import compared
from overhead_one_copy import masks_off
from overhead_report import machine
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import td_plugin as td

SHAPES = ((256, 4), (768, 12))
RECIPES = {"weights": td.recipes.targeted_weight(), "units": td.recipes.targeted_unit()}
SIDES = ("on", "off", "off, again")


def decoder(hidden: int, layers: int) -> LlamaForCausalLM:
    """With random weights, in evaluation mode."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        intermediate_size=3 * hidden,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def measure(hidden: int, layers: int, recipe: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds per token of every round, by side."""
    model, sparsifier = decoder(hidden, layers), td.TargetedDropout(RECIPES[recipe], 0.5)
    sparsifier.prepare(model)
    sparsifier.step()
    model.eval()
    start, shuffle = torch.randint(1, 8000, (1, 8)), random.Random(0)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for turn in tqdm(range(args.rounds + 2), desc=f"{recipe}, {hidden} x {layers}", file=sys.stderr):
        for side in shuffle.sample(SIDES, len(SIDES)):
            with nullcontext() if side == "on" else masks_off(model):
                # What a change of mode costs is paid once per evaluation, not per token.
                model(start)
                with torch.no_grad():
                    model(start)
                begun = time.perf_counter()
                model.generate(start, max_new_tokens=args.tokens, min_new_tokens=args.tokens, do_sample=False)
                taken = (time.perf_counter() - begun) / args.tokens
            if turn >= 2:
                seconds[side].append(taken)
    return seconds


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="the small decoder only")
    parser.add_argument("--quick", action="store_true", help="the small decoder, 3 rounds of 8 tokens")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.quick:
        args.rounds, args.tokens = 3, 8
    print(", ".join(f"{key} {value}" for key, value in machine("cpu").items()))
    print("\n| decoder | masks | ms per token, off | on over off [95 %] | off, again, over off [95 %] |")
    print("| --- | --- | --- | --- | --- |")
    for hidden, layers in SHAPES[:1] if args.quick or args.small else SHAPES:
        for recipe in RECIPES:
            seconds = measure(hidden, layers, recipe, args)
            rows = [compared(seconds[side], seconds["off"]) for side in ("on", "off, again")]
            cells = [f"{1 + row['median']:.3f} [{1 + row['low']:.3f}, {1 + row['high']:.3f}]" for row in rows]
            ms = 1e3 * sorted(seconds["off"])[len(seconds["off"]) // 2]
            print(f"| hidden {hidden}, {layers} layers | {recipe} | {ms:.2f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
