"""Deliberate faults, one at a time, and the tests that must see each: a fault that all of them pass is a survivor.

    python -m tests.mutants                     # all of them; exit code 1 and their names if any survives
    python -m tests.mutants --only files.py     # those whose file or name has this in it
    python -m tests.mutants --list

Works on a copy of the tracked files in a temporary folder, with the compiled part that lies beside the sources.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
# Seconds that the tests of one fault may take: a fault may also show by a test that hangs.
LIMIT = 600


class Mutant(NamedTuple):
    """A fault: `old`, which the file has once, becomes `new`; `tests` are pytest's arguments, without `tests/`."""

    file: str
    old: str
    new: str
    tests: str


K, M = "kernels/minipeft_kernels/", "minipeft/"
MUTANTS = [
    # The linear layer and its update.
    Mutant(
        K + "linear/thin.py",
        "cast(lora_A, dtype), scaling)",
        "cast(lora_A, dtype))",
        "kernels/linear/test_lora_linear.py",
    ),
    Mutant(
        K + "linear/thin.py",
        "cast(lora_B, dtype).T, scaling)",
        "cast(lora_B, dtype).T)",
        "kernels/linear/test_lora_linear.py",
    ),
    Mutant(
        K + "linear/dense.py",
        "return total.addmm_(a, b) if",
        "return total.addmm_(a, b, alpha=-1) if",
        "kernels/linear/test_lora_linear.py",
    ),
    Mutant(K + "linear/op.py", ".sum(0, dtype=torch.float32)", ".mean(0, dtype=torch.float32)", "kernels/linear"),
    Mutant(
        K + "linear/op.py",
        "kept = (x if needs_A else None, lora_A, lora_B, low)",
        "kept = (x if needs_A else None, lora_A, lora_B, -low)",
        "kernels/linear/test_lora_linear.py",
    ),
    Mutant(K + "linear/cpu.py", "y += bias.to(y.dtype)", "y -= bias.to(y.dtype)", "kernels/linear"),
    Mutant(
        K + "linear/reference.py",
        "first = start * k // blocksize * blocksize",
        "first = start * k // blocksize",
        "kernels/linear/test_nf4_matmul.py kernels/nf4",
    ),
    Mutant(
        K + "linear/reference.py",
        "w = w[start * k - first : stop * k - first]",
        "w = w[: stop * k - start * k]",
        "kernels/linear/test_nf4_matmul.py kernels/nf4",
    ),
    Mutant(
        K + "linear/twice.py",
        "dA = (back.T @ inputs).to(lora_A.dtype)",
        "dA = (2 * back.T @ inputs).to(lora_A.dtype)",
        "kernels/linear/test_lora_matmul.py kernels/linear/test_nf4_matmul.py",
    ),
    # NF4.
    Mutant(K + "nf4/dequantize.py", "scales += offset", "scales -= offset", "kernels/nf4 nf4/test_nf4.py"),
    Mutant(
        K + "nf4/dequantize.py",
        "scales = all_scales[start // blocksize :]",
        "scales = all_scales[start // blocksize + (start > 0) :]",
        "kernels/nf4 nf4/test_nf4.py",
    ),
    Mutant(
        K + "nf4/dequantize.py",
        "quant_map[byte >> 4], quant_map[byte & 15]",
        "quant_map[byte & 15], quant_map[byte >> 4]",
        "kernels/nf4 nf4/test_nf4.py",
    ),
    Mutant(
        K + "nf4/dequantize.py",
        "out[full * blocksize :].mul_(absmax[full])",
        "out[full * blocksize :].mul_(absmax[full - 1])",
        "kernels/nf4 nf4/test_nf4.py",
    ),
    Mutant(
        K + "nf4/quantize.py",
        "tail = tail / scales[-1]",
        "tail = tail * scales[-1].reciprocal()",
        "kernels/nf4 nf4/test_nf4.py",
    ),
    Mutant(
        K + "nf4/quantize.py",
        "torch.bitwise_or(codes[0::2] << 4, codes[1::2], out=out)",
        "torch.bitwise_or(codes[1::2] << 4, codes[0::2], out=out)",
        "kernels/nf4 nf4/test_nf4.py",
    ),
    Mutant(
        K + "nf4/quantize.py",
        "torch.amax(blocks.abs(), dim=1, out=whole)",
        "torch.amax(blocks, dim=1, out=whole)",
        "kernels/nf4 nf4/test_nf4.py",
    ),
    Mutant(
        K + "nf4/quantize.py",
        "nested = centred.abs().amax(dim=1)",
        "nested = centred.amax(dim=1)",
        "kernels/nf4 nf4/test_nf4.py",
    ),
    Mutant(
        K + "nf4/quantize.py",
        "start = int(bad.nonzero()[0, 0]) * blocksize",
        "start = int(bad.nonzero()[0, 0])",
        "kernels/nf4 nf4/test_nf4.py",
    ),
    Mutant(
        M + "nf4/weight.py",
        '"nested_offset"] = 0.0 if',
        '"nested_offset"] = 1.0 if not',
        "nf4/test_nf4.py nf4/test_hf_save.py",
    ),
    # Experts.
    Mutant(K + "experts/op.py", "rows = x[start:stop]", "rows = x[start : stop - 1 or stop]", "kernels/experts"),
    Mutant(
        M + "experts.py",
        "_ToTokens.apply(out * weights[order].unsqueeze(-1), rows)",
        "_ToTokens.apply(out * weights.unsqueeze(-1), rows)",
        "test_run_experts.py",
    ),
    Mutant(M + "experts.py", "return self.order // self.k", "return self.order % self.k", "test_run_experts.py"),
    Mutant(M + "experts.py", "right=True)", "right=False)", "test_run_experts.py"),
    Mutant(
        M + "lora/experts.py",
        "return lora_B @ lora_A * scaling",
        "return lora_B @ lora_A",
        "lora/test_lora_parameters.py",
    ),
    Mutant(
        M + "lora/experts.py",
        "dropped = x if factors.dropout is None else factors.dropout(x)",
        "dropped = x",
        "lora/test_lora_parameters.py",
    ),
    # AdamW and its pages.
    Mutant(
        K + "adamw/reference.py",
        "return self.lr / (1 - self.beta1**step)",
        "return self.lr / (1 - self.beta1 ** (step + 1))",
        "kernels/adamw optim/test_eight_bit.py",
    ),
    Mutant(
        K + "adamw/reference.py",
        "return 1 - self.lr * self.weight_decay",
        "return 1 - self.weight_decay",
        "kernels/adamw optim/test_eight_bit.py",
    ),
    Mutant(K + "adamw/reference.py", "        g = -g\n", "        pass\n", "kernels/adamw optim/test_eight_bit.py"),
    Mutant(
        K + "adamw/reference.py",
        "if not t.is_contiguous():\n            t.copy_",
        "if t.is_contiguous():\n            t.copy_",
        "kernels/adamw optim/test_paged_adamw.py",
    ),
    Mutant(M + "optim/pager.py", "self.cursor = use + 1", "self.cursor = use", "optim/test_pager.py"),
    Mutant(
        M + "optim/pager.py",
        "if place.users or place.moving or page == kept:",
        "if place.moving or page == kept:",
        "optim/test_pager.py optim/test_spill.py",
    ),
    Mutant(M + "optim/pager.py", "(-place.next_use, page)", "(place.next_use, page)", "optim/test_pager.py"),
    # LoRA's variants, merging, switching.
    Mutant(
        M + "lora/variants.py",
        "return wide(layer.lora_B[adapter].bias) * layer.scaling[adapter]",
        "return wide(layer.lora_B[adapter].bias)",
        "lora",
    ),
    Mutant(
        M + "lora/variants.py", "(ratio - 1) * unbiased", "ratio * unbiased", "lora/test_lora.py lora/test_starts.py"
    ),
    Mutant(
        M + "lora/variants.py",
        "[lora_B, -start.lora_B.to(lora_B)]",
        "[lora_B, start.lora_B.to(lora_B)]",
        "lora/test_starts.py lora/test_lora_init.py",
    ),
    Mutant(
        M + "lora/config.py",
        "alpha / (math.sqrt(r) if self.use_rslora else r)",
        "alpha / (r if self.use_rslora else math.sqrt(r))",
        "lora/test_lora.py",
    ),
    Mutant(M + "lora/layer.py", "return [] if self.merged_adapters else [", "return [", "lora/test_lora.py"),
    Mutant(
        M + "lora/layer.py",
        "weight += self.delta_weight(adapter)",
        "weight -= self.delta_weight(adapter)",
        "lora/test_lora.py",
    ),
    Mutant(
        M + "lora/layers.py",
        "super().unmerge()\n        self._hold_dense(None)",
        "super().unmerge()",
        "lora nf4 test_model.py",
    ),
    Mutant(
        M + "adapter.py",
        "self._originals.setdefault(path, original)",
        "self._originals[path] = original",
        "lora test_model.py test_trained_whole.py test_adapter_sequences.py",
    ),
    Mutant(
        M + "merge.py",
        "new = tuple(name for name in dict.fromkeys(names) if name not in before)",
        "new = tuple(dict.fromkeys(names))",
        "test_model.py lora test_adapter_sequences.py",
    ),
    Mutant(
        M + "switch.py",
        "return self.active if self.enabled and self.by_row is None else ()",
        "return self.active if self.by_row is None else ()",
        "test_model.py lora/test_lora.py",
    ),
    Mutant(
        M + "rows.py",
        "self.names[row // times]",
        "self.names[row % len(self.names)]",
        "lora/test_lora_rows.py lora/test_lora_parameters.py",
    ),
    # Bottleneck adapters, prefixes, prompts.
    Mutant(M + "bottleneck/layer.py", "bias = bias + weight @ self.norm.bias", "bias = bias", "bottlenecks"),
    Mutant(
        M + "bottleneck/layer.py",
        "weight, bias = weight * rows, bias * self.scaling",
        "weight, bias = weight * rows, bias",
        "bottlenecks",
    ),
    Mutant(
        M + "bottleneck/layer.py",
        "grad_x = (grad @ weight).to(x.dtype)",
        "grad_x = (-grad @ weight).to(x.dtype)",
        "bottlenecks",
    ),
    Mutant(
        M + "virtual/masks.py",
        "return torch.cat([seen, mask], dim=-1)",
        "return torch.cat([mask, seen], dim=-1)",
        "virtual",
    ),
    Mutant(M + "virtual/masks.py", "0.0 if added else 1)", "0.0)", "virtual"),
    Mutant(
        M + "virtual/prompt.py",
        "if of is not weight or version != weight._version or not _in_use(cache):",
        "if of is not weight or not _in_use(cache):",
        "virtual",
    ),
    Mutant(
        M + "virtual/prompt.py",
        "itertools.islice(itertools.cycle(ids), number)",
        "itertools.islice(itertools.cycle(ids[1:] or ids), number)",
        "virtual",
    ),
    Mutant(
        M + "virtual/prefix.py",
        "return (self.num_virtual_tokens or 0) if model_type in LEARNED else 0",
        "return 0",
        "train/test_train_models.py",
    ),
    # Files.
    Mutant(
        M + "files.py",
        "        sync(temporary)\n        os.replace(temporary, path)",
        "        os.replace(temporary, path)",
        "test_files.py test_checkpoint.py",
    ),
    Mutant(
        M + "files.py",
        "        os.replace(temporary, path)\n        sync(path.parent)",
        "        os.replace(temporary, path)",
        "test_files.py test_checkpoint.py",
    ),
    Mutant(M + "files.py", "        sync_tree(temporary)\n", "", "test_files.py test_checkpoint.py"),
    Mutant(
        M + "files.py",
        "os.replace(target, old / target.name)\n            os.replace(temporary, target)",
        "shutil.rmtree(target)\n            os.replace(temporary, target)",
        "test_files.py test_checkpoint.py",
    ),
    Mutant(
        M + "files.py",
        "    finally:\n        temporary.unlink(missing_ok=True)",
        "    finally:\n        pass",
        "test_files.py test_checkpoint.py",
    ),
    # Training.
    Mutant(
        M + "train/batches.py",
        "for label in (IGNORE, *doc.labels[1:])",
        "for label in doc.labels",
        "train/test_train_packing.py",
    ),
    Mutant(
        M + "train/batches.py",
        "for length in row for at in range(length)]",
        "for length in [sum(row)] for at in range(length)]",
        "train/test_train_packing.py",
    ),
    Mutant(
        M + "train/batches.py",
        "attention_mask = _padded([[1] * len(example) for example in examples], 0)",
        "attention_mask = _padded([[1] * len(example) for example in examples], 1)",
        "train/test_train_loop.py train/test_train_evaluation.py",
    ),
    Mutant(
        M + "train/loss.py",
        "return F.pad(learned, (0, 1)), following[learned]",
        "return F.pad(learned, (1, 0)), following[learned]",
        "train/test_head_loss.py train/test_train_evaluation.py",
    ),
    Mutant(
        M + "train/loss.py",
        "else loss + share * balance * len(labels)",
        "else loss + share * balance",
        "train",
    ),
    Mutant(
        M + "train/loss.py",
        "device=labels.device), labels] -= 1",
        "device=labels.device), labels] -= 0",
        "train/test_head_loss.py",
    ),
    Mutant(
        M + "train/loop.py",
        "(loss * (count * counts / tokens)).backward()",
        "(loss * (count * counts / batch.loss_tokens)).backward()",
        "train/test_train_loop.py",
    ),
    Mutant(
        M + "train/loop.py",
        "progress.epoch, progress.batch = progress.epoch + 1, 0",
        "progress.epoch, progress.batch = progress.epoch + 1, 1",
        "train/test_train_loop.py train/test_train_resume.py",
    ),
    Mutant(
        M + "train/loop.py",
        "        self._random = capture_random()\n        self._report.step",
        "        self._report.step",
        "train/test_train_resume.py",
    ),
    Mutant(
        M + "train/checkpoint.py",
        '"schedule": schedule.state_dict(),',
        '"schedule": {**schedule.state_dict(), "last_epoch": 0},',
        "train/test_train_resume.py",
    ),
    Mutant(M + "train/checkpoint.py", "        write_manifest(folder)\n", "", "train/test_checkpoint_damage.py"),
    Mutant(
        M + "train/evaluation.py",
        "return EvalResult(total / tokens, tokens)",
        "return EvalResult(total / len(list(batches)), tokens)",
        "train/test_train_evaluation.py",
    ),
    Mutant(
        M + "train/processes.py",
        "own = [(item, True) for item in items[self.rank :: self.count]]",
        "own = [(item, True) for item in items]",
        "train/test_several_processes.py",
    ),
    Mutant(
        M + "train/processes.py",
        "return own + [(items[-1], False)] * (most - len(own))",
        "return own + [(items[-1], True)] * (most - len(own))",
        "train/test_several_processes.py",
    ),
    # The emulator of GPU code.
    Mutant(
        K + "emulator/async_copy.py",
        "due = copy.group < limit",
        "due = copy.group <= limit",
        "kernels/emulator/test_emulator_*.py",
    ),
    Mutant(
        K + "emulator/rounding.py",
        "wrong, toward = back > value, np.full_like(nearest, -np.inf)",
        "wrong, toward = back >= value, np.full_like(nearest, -np.inf)",
        "kernels/emulator/test_emulator_*.py",
    ),
    Mutant(
        K + "emulator/rounding.py",
        "return np.where(inexact, bits | np.uint32(1), bits).view(np.float32)",
        "return bits.view(np.float32)",
        "kernels/emulator/test_emulator_*.py",
    ),
    Mutant(
        K + "emulator/rounding.py",
        "return np.where(small, np.copysign(np.float32(0), value), value)",
        "return np.where(small, np.float32(0), value)",
        "kernels/emulator/test_emulator_*.py",
    ),
    Mutant(
        K + "emulator/rounding.py",
        "(bits >> half & np.uint32(1))) >> half",
        "np.uint32(1)) >> half",
        "kernels/emulator/test_emulator_*.py",
    ),
    Mutant(
        K + "emulator/barriers.py",
        "done = (arrived >= wanted) & (arrived > 0)",
        "done = (arrived + 1 >= wanted) & (arrived > 0)",
        "kernels/emulator/test_emulator_*.py",
    ),
    Mutant(K + "emulator/barriers.py", "        counted[done] = 0\n", "", "kernels/emulator/test_emulator_*.py"),
    Mutant(
        K + "emulator/tensor_cores.py",
        "return values.reshape(-1, 8, 4, 2, 2).transpose(0, 3, 1, 2, 4)",
        "return values.reshape(-1, 8, 4, 2, 2).transpose(0, 4, 1, 2, 3)",
        "kernels/emulator/test_emulator_tensor_cores.py",
    ),
    Mutant(
        K + "emulator/tensor_cores.py",
        "values = np.clip(values, -(2**31), 2**31 - 1)",
        "values = np.clip(values, -(2**31), 2**31)",
        "kernels/emulator/test_emulator_*.py",
    ),
]


def copy_of_the_tree(folder: Path) -> Path:
    """The tracked files of the repository, and the compiled part, in `folder`."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    compiled = [str(path.relative_to(ROOT)) for path in (ROOT / "kernels").rglob("_native*.so")]
    for name in [name for name in listed.decode().split("\0") if name] + compiled:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    return folder


def is_seen(mutant: Mutant, tree: Path) -> bool:
    """True if a test fails with the fault in the tree, which is as it was afterwards."""
    path = tree / mutant.file
    plain = path.read_text(encoding="utf-8")
    if plain.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.file} has {plain.count(mutant.old)} times, and should have once: {mutant.old!r}")
    path.write_text(plain.replace(mutant.old, mutant.new), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'kernels'}", "PYTHONDONTWRITEBYTECODE": "1"}
    tests = [str(path) for name in mutant.tests.split() for path in sorted(tree.glob(f"tests/{name}"))]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, timeout=LIMIT, text=True)
    except subprocess.TimeoutExpired:
        return True
    finally:
        path.write_text(plain, encoding="utf-8")
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest could not run {tests}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 1


def main() -> int:
    """Plant the faults and say which survive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a file's name or of the code")
    parser.add_argument("--first", type=int, default=1, help="number of the first one to plant")
    parser.add_argument("--list", action="store_true", help="print the faults and plant none")
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if args.only in m.file or args.only in m.old]
    survivors = []
    with tempfile.TemporaryDirectory(prefix="minipeft-mutants-") as temporary:
        tree = copy_of_the_tree(Path(temporary))
        for number, mutant in enumerate(chosen, 1):
            if number < args.first:
                continue
            line = f"{number}/{len(chosen)} {mutant.file}: {mutant.old.strip().splitlines()[0]!r}"
            if args.list:
                print(line)
                continue
            start = time.perf_counter()
            seen = is_seen(mutant, tree)
            print(f"{line} {'seen' if seen else 'SURVIVES'} ({time.perf_counter() - start:.0f} s)", flush=True)
            survivors += [] if seen else [mutant]
    if not args.list:
        planted = len(chosen) - args.first + 1
        print(f"{planted - len(survivors)} of {planted} faults were seen")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
