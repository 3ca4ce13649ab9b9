"""How sharp the suite is: deliberate one-line breaks of the CPU kernels, each of which has to make a test fail.

    python tests/breaks.py                  all of them
    python tests/breaks.py mean "no eps"    those whose name has one of these words
    python tests/breaks.py --list

Each break is applied to a copy of the tree in a temporary folder, the library built there (the files that it touches),
and the tests of its passes run, then those of NUMERIC, until one fails. Prints caught or missed; exit status 1 where a
break was missed. Takes the better part of an hour. Not part of make test.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# In this order: quick ones first.
NUMERIC = ["pool", "gate", "hybrid", "registration", "strides", "forward", "training", "simd", "determinism", "nonfinite"]
NUMERIC += ["tails", "gradcheck", "before", "integration_syncbn"]

MIX, BACKWARD, FORWARD, SIMD = "mix.cpp", "backward.cpp", "forward.cpp", "simd.h"
BINDINGS, MIDDLE, ACTIVATION = "bindings.cpp", "middle.cpp", "activation.h"
POOL, GATE, NORM, APPLY, WALKS = "pool.cpp", "gate.cpp", "norm.cpp", "apply.h", "walks.h"
BEFORE, SPREAD = "before.h", "spread.h"

# Name, file in csrc/cpu, the tests that look there first, what the line is, what it becomes.
BREAKS = [
    ("pool: columns by W", POOL, "pool", "return sum * by_h;", "return sum * by_w;"),
    ("pool backward: no rows", SPREAD, "pool", ": column[0] + row[0];", ": column[0];"),
    ("spread: no skip", SPREAD, "training", "if (skip) dx += grad;", ""),
    ("spread: a row's gate for the column's", SPREAD, "training", "fma(grad * column[0], row[0],", "fma(grad * row[0], row[0],"),
    ("gate: a column's gate for the row's", GATE, "gate", "x * column[0] * row[0]", "x * column[0] * column[0]"),
    ("gate: no skip", GATE, "gate", "if (skip) out += x;", ""),
    ("reduce: no slope", GATE, "gate", "sum * (gate * (1 - gate))", "sum * gate"),
    ("reduce: without the other gate", GATE, "gate", "return fma(t, gate, sum);", "return sum + t;"),
    ("planes: no tail", APPLY, "gate", "part((NV - 1) * n, kept[NV - 1], tail);", "part((NV - 1) * n, kept[NV - 1]);"),
    ("runs: columns as rows", APPLY, "gate", "next * 16 + h + in % w", "next * 16 + in % w"),
    ("flat: rows as columns", APPLY, "gate", "s.column[i] = (int32_t)w;", "s.column[i] = (int32_t)h;"),
    ("runs: of planes that lie apart", WALKS, "strides", "return step == size;", "return true;"),
    ("dot: no tail of one", MIX, "forward", "if (tail.k) step(full, tail);", "if (tail.k > 1) step(full, tail);"),
    ("dot: bias of another row", MIX, "forward", "((const A*)d.bias)[m + j]", "((const A*)d.bias)[m]"),
    ("axpy: three rows as two", MIX, "training", "case 3: axpy_tile<3, CV, A>", "case 3: axpy_tile<2, CV, A>"),
    ("axpy: bias of the first vector", MIX, "forward", "get((const A*)x.bias + c + j * n)", "get((const A*)x.bias + c)"),
    ("axpy: nothing added up", MIX, "training", "if (x.accumulate) v += get(to);", ""),
    (
        "hard-swish in float32",
        ACTIVATION,
        "training",
        "return u * (clamp(u + 3.0f, 0.0f, 6.0f) * (decltype(u[0] + 0))(1.0 / 6.0));",
        "return u * (clamp(u + 3.0f, 0.0f, 6.0f) * (decltype(u[0] + 0))(1.0f / 6.0f));",
    ),
    ("hard-swish: slope beyond 3", ACTIVATION, "training", "slope = u >= 3.0f ? zero : slope;", ""),
    ("silu: sign in the slope", ACTIVATION, "training", "(1.0f + u * (1.0f - s))", "(1.0f - u * (1.0f - s))"),
    ("relu: slope at zero", ACTIVATION, "nonfinite", "return u <= 0.0f ? zero : dy;", "return u < 0.0f ? zero : dy;"),
    ("relu6: slope beyond 6", ACTIVATION, "training", "return u < 6.0f ? dy : zero;", "return dy;"),
    (
        "sums of bn: lanes beyond the tail",
        MIX,
        "training",
        "store(sum_dev + j, fma(du, dev, load(sum_dev + j, cut...)), cut...);",
        "store(sum_dev + j, fma(du, dev, load(sum_dev + j, cut...)));",
    ),
    (
        "variance: deviations in float32",
        MIX,
        "training",
        "double d = (double)z[r * a.m + m0 + m] - sum[m];",
        "float d = (float)((double)z[r * a.m + m0 + m] - sum[m]);",
    ),
    (
        "variance: unbiased",
        MIX,
        "training",
        "var[m0 + m] = (A)(square[m] / (double)a.rows);",
        "var[m0 + m] = (A)(square[m] / (double)(a.rows - 1));",
    ),
    ("normalisation: no mean of the gradient", MIX, "training", "(du[i] - offset[m] -", "(du[i] -"),
    ("bias: sums of 256 rows lost", MIX, "training", "total += middle;", "total = middle;"),
    ("transpose: a column too few", MIX, "training", "if (i < nc) {", "if (i < nc - (nc == 5)) {"),
    ("backward: no eps", BACKWARD, "training", "1 / sqrt((double)var[i] + b.params.eps)", "1 / sqrt((double)var[i])"),
    (
        "backward: slope without a factor",
        BACKWARD,
        "training",
        "slope[i] = (A)(inv * inv * all_sums",
        "slope[i] = (A)(inv * all_sums",
    ),
    (
        "backward: conv1.bias is rounding",
        BACKWARD,
        "training",
        "put<A>(b.out.conv1_bias, i, batch ? 0.0 : scale[i] * du);",
        "put<A>(b.out.conv1_bias, i, batch ? 1e-20 * du : scale[i] * du);",
    ),
    (
        "backward: bn.bias by way of float32",
        BACKWARD,
        "training",
        "put<A>(b.out.bn_bias, i, du);",
        "put<A>(b.out.bn_bias, i, (float)du);",
    ),
    (
        "backward: first block of rows",
        BACKWARD,
        "training",
        "for (int64_t j = 0; j < tasks.count(); ++j) sums[i]",
        "for (int64_t j = 1; j < tasks.count(); ++j) sums[i]",
    ),
    ("backward: x steps as the gradient", BACKWARD, "strides", "a.x_step = x.step;", "a.x_step = grad.step;"),
    (
        "backward of an empty batch",
        BACKWARD,
        "training",
        "zero(g.bn_weight, s.m); zero(g.bn_bias, s.m);",
        "zero(g.bn_weight, s.m);",
    ),
    (
        "joined: rows of this process",
        BACKWARD,
        "integration_syncbn",
        "offset[i] = (A)(all_sums[i] / (double)all_rows);",
        "offset[i] = (A)(all_sums[i] / (double)rows);",
    ),
    (
        "joined: one process's sums",
        BACKWARD,
        "integration_syncbn",
        "total[i] += all_sums[p * width + i];",
        "total[i] += all_sums[i];",
    ),
    ("panels: bias of the first", FORWARD, "forward", "e.bias = bias ? at((void*)bias, c, bytes) : nullptr;", "e.bias = bias;"),
    ("squeeze: rows of a block", FORWARD, "forward", "a.rows = r1 - r0;", "a.rows = r1 - r0 - (r1 - r0 == 16);"),
    (
        "joined: between the processes",
        FORWARD,
        "integration_syncbn",
        "square += of[1 + m + i] + of[0] * (of[1 + i] - centre) * (of[1 + i] - centre);",
        "square += of[1 + m + i];",
    ),
    (
        "images left over by the threads",
        FORWARD,
        "determinism",
        "if (whole < s.n) infer(f, k, middle, threads, whole, s.n - whole);",
        "if (whole < s.n) infer(f, k, middle, threads, whole, 1);",
    ),
    (
        "running mean for the variance",
        FORWARD,
        "forward",
        "fixed ? given(f.params.var, s.m, f.saved.var)",
        "fixed ? given(f.params.mean, s.m, f.saved.var)",
    ),
    ("before: no shift", BEFORE, "before", "act.value(fma(x, scale, shift))", "act.value(x * scale)"),
    ("before: lanes beyond the tail", BEFORE, "before", "if constexpr (CUT) return first(y, cut...);", ""),
    ("before: another bound of relu6", BEFORE, "before", "A(6) : (A)", "A(5) : (A)"),
    ("before: relu6's slope beyond 6", BEFORE, "before", "dv = u >= high ? zero : dv;", ""),
    ("before: relu6 lets a NaN's gradient through", BEFORE, "before", "nan_passes ? dv : u == u ? dv : zero", "dv"),
    ("before: no eps", MIDDLE, "before", "sqrt((double)var[i] + before.eps)", "sqrt((double)var[i])"),
    (
        "moments: stretches not joined",
        NORM,
        "before",
        "m.join(before, count, off - off == 0",
        "m.join(0, count, off - off == 0",
    ),
    (
        "moments: between the stretches",
        NORM,
        "before",
        "square += other_square + delta * delta * ((double)before * share);",
        "square += other_square;",
    ),
    (
        "moments: between the images",
        FORWARD,
        "before",
        "square_of[c] += next[s.c + c] + delta * delta * weight;",
        "square_of[c] += next[s.c + c];",
    ),
    (
        "moments: lanes beyond the tail",
        NORM,
        "before",
        "add(0, first(load(x + i, tail) - mean, tail));",
        "add(0, load(x + i, tail) - mean);",
    ),
    ("sums before: deviations from zero", NORM, "before", "du * (p.seen.x - p.seen.mean)", "du * p.seen.x"),
    ("sums before: lanes beyond the tail", NORM, "before", "du += first(v.du, cut...);", "du += v.du;"),
    ("sums before: the last vectors lost", NORM, "before", "flush();\n      *to_du", "*to_du"),
    (
        "sums before: pixels counted twice",
        NORM,
        "before",
        "parts[c - begin] = parts[ld + c - begin] = 0;",
        "parts[ld + c - begin] = 0;",
    ),
    (
        "sums before: of the first image",
        BACKWARD,
        "before",
        "for (int64_t i = 0; i < 2 * c; ++i) sums[i] += sums[n * 2 * c + i];",
        "",
    ),
    ("dx before: sign of the offset", NORM, "before", "s.slope, s.offset)", "s.slope, -s.offset)"),
    ("dx before: sign of the slope", NORM, "before", "-fma(s.x - s.mean,", "-fma(s.mean - s.x,"),
    ("dx before: no scale", NORM, "before", "return s.scale * du;", "return du;"),
    (
        "backward before: slope without a factor",
        BACKWARD,
        "before",
        "(double)scale[i] * inv * inv * dev / count",
        "(double)scale[i] * inv * dev / count",
    ),
    ("logits: any stride is one", BINDINGS, "gate", "if (t.stride(1) == 1) {", "if (true) {"),
    ("running variance: biased", BINDINGS, "training", "rows > 1 ? (double)rows / (double)(rows - 1) : 1", "1"),
    (
        "hybrid: gradient in its own layout",
        BINDINGS,
        "strides",
        "g = native(grad, args.nhwc), dx = empty_map(x, args.nhwc);\n  args.x = map_of(in, args.nhwc);\n"
        "  args.grad = map_of(g, args.nhwc);\n  args.out",
        "g = grad, dx = empty_map(x, args.nhwc);\n  args.x = map_of(in, args.nhwc);\n"
        "  args.grad = map_of(g, args.nhwc);\n  args.out",
    ),
    ("exp: a coefficient", SIMD, "gate", "splat(1.9875691500e-4f)", "splat(1.9875691500e-3f)"),
    ("exp: one part of log 2", SIMD, "gate", "r = fma(k, splat(2.12194440e-4f), r);", "r = fma(k, splat(2.1219e-4f), r);"),
    ("sigmoid at the infinities", SIMD, "gate", "vint inf = d > 3e38f;", "vint inf = d < 0.0f;"),
    ("bfloat16 cut off", SIMD, "pool", "(u + 0x7fffu + ((u >> 16) & 1u)) >> 16", "u >> 16"),
    ("bfloat16: ties away from zero", SIMD, "pool", "u + 0x7fffu + ((u >> 16) & 1u)", "u + 0x8000u"),
]


def tests(names):
    return [f"tests/test_{name}.py" for name in names]


def build(tree):
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    result = subprocess.run(command, cwd=tree, env=os.environ | {"FORCE_CUDA": "0"}, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(result.stdout[-4000:] + result.stderr[-4000:])


def failing(tree, first):
    """The first test that fails, or nothing."""
    env = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    for names in ([first], [n for n in NUMERIC if n != first]):
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-p", "no:cacheprovider", *tests(names)]
        result = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
        if result.returncode:
            lines = result.stdout.splitlines() or result.stderr.splitlines() or ["ended by a signal"]
            return next((line for line in lines if line.startswith(("FAILED", "ERROR"))), lines[-1])
    return ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="parts of the names of the breaks to try (default: all)")
    parser.add_argument("--list", action="store_true", help="names them and ends")
    chosen = parser.parse_args()
    breaks = [b for b in BREAKS if not chosen.words or any(word in b[0] for word in chosen.words)]
    for name, file, _, old, _ in breaks:
        count = (ROOT / "csrc/cpu" / file).read_text().count(old)
        if count != 1:
            raise SystemExit(f"{name}: its line occurs {count} times in {file}")
        if chosen.list:
            print(f"{file}: {name}")
    if chosen.list:
        return 0
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "lib", "build", "__pycache__"))
        build(tree)
        for name, file, first, old, new in breaks:
            path, start = tree / "csrc/cpu" / file, time.monotonic()
            text = path.read_text()
            path.write_text(text.replace(old, new))
            build(tree)
            found = failing(tree, first)
            path.write_text(text)
            print(f"{'caught' if found else 'MISSED'}: {name} ({time.monotonic() - start:.0f} s) {found}", flush=True)
            missed += [] if found else [name]
    print(f"{len(breaks) - len(missed)} of {len(breaks)} caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
