"""Where an optimizer step of `recipes fit` spends its time: ``python -m benchmarks.profile_step sft|pretrain``.

Runs the recipe side of the comparison under torch's profiler for three steps after the warm-up and groups the seconds
of CPU: matrix products, attention, the head, copies between dtypes, other elementwise work, optimizer and clipping, and
everything outside of torch's operators (Python, Lightning, callbacks, data).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.inputs import data_folder

WARMUP, STEPS = 3, 3
GROUPS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::addmm_"),
    "attention: matrix products": ("aten::bmm", "aten::baddbmm"),
    "attention: softmax and masks": ("aten::_softmax", "aten::_softmax_backward_data", "aten::masked_fill_"),
    "copies and changes of dtype": ("aten::copy_", "aten::fill_", "aten::zero_"),
    "optimizer, clipping": ("aten::_fused_adamw_", "aten::linalg_vector_norm", "aten::_foreach_mul_"),
    "head: exponentials": ("aten::exp_", "aten::sub_", "aten::amax", "aten::logsumexp", "aten::scatter_add_"),
}
"""Operators by their own time. ``exp_``, ``sub_`` and ``amax`` occur in the head alone."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("sft", "pretrain"))
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "results" / "work")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--trace", type=Path, help="also write a Chrome trace")
    options = parser.parse_args()
    data_folder()
    work = (options.work / options.kind).absolute()
    work.mkdir(parents=True, exist_ok=True)
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-m", "benchmarks.prepare", options.kind, str(work)], cwd=root, check=True)

    import torch
    from lightning.pytorch import Callback
    from torch.profiler import ProfilerActivity, profile

    import benchmarks.recipe_side as ours
    from benchmarks import pretrain_sides, sft_sides
    from benchmarks.recorder import Recorder

    profiler = profile(activities=[ProfilerActivity.CPU])
    clock: dict[str, float] = {}

    class Profile(ours.Watch):
        """The recorder's callback, and the profiler around the steps after the warm-up."""

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == WARMUP:
                clock["cpu"] = time.process_time()
                profiler.start()

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == WARMUP + STEPS:
                profiler.stop()
                clock["cpu"] = time.process_time() - clock["cpu"]

    assert issubclass(Profile, Callback)
    ours.Watch = Profile  # type: ignore[misc]
    settings = {"sequence": 512, "batch": 8, "lr": 2e-4, "clip": 1.0, "precision": "bf16-mixed", "pad": 0}
    sides = sft_sides if options.kind == "sft" else pretrain_sides
    side = sides.recipe_compiled if options.compiled else sides.recipe
    side(work, settings, Recorder(work / "profile.json"), WARMUP + STEPS)
    print(report(profiler.key_averages(), torch.get_num_threads()))
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50))
    if options.trace:
        profiler.export_chrome_trace(str(options.trace))


def report(events: Any, threads: int) -> str:
    """The groups' shares of the time in operators, and the operators' own time a step."""
    own = {event.key: event.self_cpu_time_total / 1e6 for event in events}
    operators = {key: seconds for key, seconds in own.items() if key.startswith("aten::")}
    total = sum(own.values())
    lines = [f"{total / STEPS:.3f} s a step in the profile, {threads} threads"]
    named: set[str] = set()
    for name, keys in GROUPS.items():
        lines.append(_line(name, sum(operators.get(key, 0.0) for key in keys), total))
        named.update(keys)
    rest = sum(seconds for key, seconds in operators.items() if key not in named)
    lines.append(_line("other operators (norms, rotary, gates, sums)", rest, total))
    outside = total - sum(operators.values())
    lines.append(_line("outside of operators (Python, autograd, Lightning, data)", outside, total))
    return "\n".join(lines)


def _line(name: str, seconds: float, total: float) -> str:
    return f"  {name:<58} {seconds / STEPS:7.3f} s {100 * seconds / total:5.1f} %"


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
