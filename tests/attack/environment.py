"""Garbled variables and files, forks, signals, threads, memory limits: in processes of their own."""

import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from harness import LEVELS
from hypothesis import strategies as st

import coordatt_fast
from attack.cradle import Cradle

PACKAGE = Path(coordatt_fast.__file__).parent
ROOT = PACKAGE.parent
LIBRARY = PACKAGE / "lib" / "libcoordatt_fast.so"

cradle = Cradle()

BACKENDS = ("auto", "cpu", "cuda", "triton", "reference")
# Values that mean something; a value that matches is not complained of, and one that does not is named.
VALID = {
    "COORDATT_FAST_BACKEND": "|".join(BACKENDS),
    "COORDATT_FAST_SIMD": "|".join(LEVELS),
    "COORDATT_FAST_KEEP_MB": "[0-9]+",
    "COORDATT_FAST_POISON": "[01]",
    "COORDATT_FAST_LIBRARY": "(?!)",
}
GARBLED = (
    "abc", "-1", "0", "1", "2", "1e99", "nan", "256MB", "0x10", "8796093022208", "9223372036854775807",
    "99999999999999999999999", "1" * 400, "auto", "cpu", "CPU", "avx2", "avx512", "AVX2", "neon", "reference",
    "none", "True", "yes", "%s%n", "../..", "/", "/dev/null", "/dev/zero", "/proc/self/mem", "libm.so.6", "é", "{}",
)  # fmt: skip

# A call whose result lies in the library's own blocks, freed and taken again, beside plain PyTorch.
CALL = """
import logging, warnings
logging.basicConfig()
import torch
import coordatt_fast
from coordatt_fast import CoordAtt, use_backend
torch.manual_seed(0)
module, x = CoordAtt(16, 16).eval(), torch.randn(1, 16, 150, 151)
with torch.no_grad():
    with use_backend("reference"):
        expected = module(x)
    for _ in range(5):
        got = module(x)
        assert torch.allclose(got, expected, atol=1e-5), "another result"
        del got
    training = CoordAtt(16, 16)(x)
print("computed:", coordatt_fast.backends()["cpu"].reason)
"""


@dataclass(frozen=True)
class Situation:
    kind: str = "variable"
    name: str = ""
    value: str = ""
    seed: int = 0


@st.composite
def situations(draw, kinds=("variable",) * 5 + ("library", "build.json") * 2 + ("fork", "interrupt", "threads", "memory")):
    kind, seed = draw(st.sampled_from(kinds)), draw(st.integers(0, 2**31))
    if kind != "variable":
        return Situation(kind, seed=seed, value=draw(_files) if kind in ("library", "build.json") else "")
    text = st.text(st.characters(min_codepoint=1, max_codepoint=0x2FF, exclude_categories=["Cs"]), max_size=9)
    value = draw(st.one_of(st.sampled_from(GARBLED), st.sampled_from(GARBLED), text, st.integers().map(str)))
    return Situation(kind, draw(st.sampled_from(tuple(VALID))), value, seed)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ("version", "bytes", "platform", "torch", "skipped", "simd", "cuda")), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
_files = st.one_of(_json.map(json.dumps), st.text(max_size=20), st.sampled_from(("", "[]", "null", "3", "{", "[" * 100_000)))


def check(situation: Situation) -> str:
    """What was tried, for the counts; AssertionError with the process's output where a promise is broken."""
    run = {
        "variable": _variable, "library": _library, "build.json": _build, "fork": _fork,
        "interrupt": _interrupt, "threads": _threads, "memory": _memory,
    }[situation.kind]  # fmt: skip
    run(situation)
    return situation.kind


def _lived(answer, situation, statuses=(0,)):
    text = answer["text"][-3000:]
    assert answer["signal"] != -1, f"{situation}: hangs\n{text}"
    assert answer["signal"] == 0, f"{situation}: ended by signal {answer['signal']}\n{text}"
    assert answer["status"] in statuses, f"{situation}: exit status {answer['status']}\n{text}"


def _named(answer, situation):
    text = answer["text"]
    written = {situation.value, repr(situation.value), repr(situation.value)[1:-1]}
    found = situation.name in text and any(value.strip() in text for value in written)
    assert found, f"{situation}: nothing names the variable and its value\n{text[-3000:]}"


def _variable(situation):
    name, value = situation.name, situation.value
    answer = cradle.run(CALL, {name: value}, (ROOT,))
    _lived(answer, situation, (0, 1))
    if not value or re.fullmatch(VALID[name], value):
        if value not in ("cuda", "triton"):
            _lived(answer, situation)
            return
    if name == "COORDATT_FAST_BACKEND":
        assert answer["status"] == 1, f"{situation}: taken silently\n{answer['text']}"
    elif value.strip() == value:
        _lived(answer, situation)
    if answer["status"] == 1 and value in ("cuda", "triton"):
        assert f"backend {value!r} was chosen but cannot run" in answer["text"], answer["text"]
    else:
        _named(answer, situation)


def _copy(folder):
    """The package without its library, in a folder."""
    shutil.copytree(PACKAGE, folder / "coordatt_fast", ignore=shutil.ignore_patterns("lib", "__pycache__"))
    if not (PACKAGE / "kernels").exists():
        shutil.copytree(ROOT / "kernels", folder / "coordatt_fast/kernels")
    (folder / "coordatt_fast/lib").mkdir()
    return folder / "coordatt_fast/lib"


def _library(situation):
    """A library that was cut short, written over or replaced, with and without its build.json."""
    with tempfile.TemporaryDirectory(prefix="attack-") as name:
        lib = _copy(Path(name))
        seed, whole = situation.seed, LIBRARY.read_bytes()
        kind = seed % 4
        length = (seed // 16) % len(whole)
        garbage = situation.value.encode(errors="replace")
        content = [whole[:length], garbage, whole[: 4096 * (seed % 97)], whole[:64] + garbage + whole[:length]][kind]
        (lib / LIBRARY.name).write_bytes(content)
        if seed // 4 % 3:
            shutil.copy(LIBRARY.with_name("build.json"), lib)
        if seed // 4 % 3 == 1:
            built = json.loads((lib / "build.json").read_text())
            (lib / "build.json").write_text(json.dumps({k: v for k, v in built.items() if k != "bytes"}))
        by_name = seed // 12 % 2
        env = {"COORDATT_FAST_LIBRARY": str(lib / LIBRARY.name)} if by_name else {}
        answer = cradle.run(CALL, env, (ROOT,) if by_name else (name,))
        _lived(answer, situation)
        if by_name:
            _named(answer, Situation("variable", "COORDATT_FAST_LIBRARY", env["COORDATT_FAST_LIBRARY"]))


def _build(situation):
    """A whole library beside a build.json of anything."""
    with tempfile.TemporaryDirectory(prefix="attack-") as name:
        lib = _copy(Path(name))
        (lib / LIBRARY.name).symlink_to(LIBRARY)
        (lib / "build.json").write_text(situation.value)
        _lived(cradle.run(CALL, {}, (name,)), situation)


_BESIDE = """
import os, random, signal, sys, threading, time
import torch
from coordatt_fast import CoordAtt
rng = random.Random(SEED)
torch.set_num_threads(1)
going = True
def work(shape, training):
    module, x = CoordAtt(shape[1], shape[1]).train(training), torch.randn(shape)
    while going:
        with torch.set_grad_enabled(training):
            module(x)
threads = [
    threading.Thread(target=work, args=((1, 16, rng.choice((30, 140, 300)), 150), rng.random() < 0.3), daemon=True)
    for _ in range(3)
]
[t.start() for t in threads]
module, x = CoordAtt(16, 16).eval(), torch.randn(1, 16, 140, 150)
with torch.no_grad():
    expected = module(x)
"""


# Forks per situation.
FORKS = 25


def _fork(situation):
    code = _BESIDE.replace("SEED", str(situation.seed)) + f"""
for number in range({FORKS}):
    time.sleep(rng.random() * 0.004)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        with torch.no_grad():
            got = [module(x) for _ in range(2)]
        os._exit(0 if torch.equal(got[1], expected) else 7)
    until = time.monotonic() + 20
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.001)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        sys.exit(f"child {{number}} hangs")
    assert status == 0, f"child {{number}}: status {{status}}"
going = False
"""
    _lived(cradle.run(code, {}, (ROOT,), 300), situation)


def _interrupt(situation):
    """SIGINT at random times in calls of any kind: KeyboardInterrupt, and the same results afterwards."""
    code = f"""
import os, random, signal, threading, time
import torch
from coordatt_fast import CoordAtt
rng = random.Random({situation.seed})
torch.set_num_threads(rng.choice((1, 2)))
shape = (2, 16, rng.choice((3, 40, 150)), 150)
module, x = CoordAtt(16, 16), torch.randn(shape)
state = {{n: t.clone() for n, t in module.state_dict().items()}}
def run():
    module.load_state_dict(state)
    module.train()
    leaf = x.clone().requires_grad_()
    module.zero_grad()
    module(leaf).sum().backward()
    moved = module.bn1.running_mean.clone()
    return leaf.grad, module.eval()(x).detach(), moved
expected, interrupted = run(), 0
for _ in range(40):
    signal.setitimer(signal.ITIMER_REAL, 10.0)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-5 + rng.random() * 0.01)
        while True:
            run()
    except KeyboardInterrupt:
        interrupted += 1
        torch.set_grad_enabled(True)  # load_state_dict's no_grad may have been entered and not left
    signal.setitimer(signal.ITIMER_REAL, 0)
    for a, b in zip(run(), expected):
        assert torch.equal(a, b), "another result after an interrupt"
assert interrupted == 40
"""
    _lived(cradle.run(code, {}, (ROOT,), 300), situation)


def _threads(situation):
    """Many threads on one module and on modules of their own: the bits of one thread alone."""
    code = f"""
import random, threading
import torch
from coordatt_fast import CoordAtt, use_backend
rng = random.Random({situation.seed})
torch.set_num_threads(rng.choice((1, 2)))
shared = CoordAtt(16, 16).eval()
jobs = []
for _ in range(8):
    shape = (rng.choice((1, 3)), 16, rng.choice((1, 7, 60, 150)), rng.choice((1, 9, 33, 150)))
    own, x = CoordAtt(16, 16), torch.randn(shape)
    jobs.append((own, {{n: t.clone() for n, t in own.state_dict().items()}}, x))
def once(own, state, x):
    own.load_state_dict(state)
    leaf = x.clone().requires_grad_()
    out = own(leaf)
    out.backward(x)
    with torch.no_grad():
        return shared(x), out.detach(), leaf.grad, own.bn1.running_var.clone()
expected = [once(*job) for job in jobs]
wrong = []
def work(number):
    for _ in range(12):
        own, state, x = jobs[number]
        with use_backend("cpu" if number % 2 else "auto"):
            got = once(own, state, x)
        if not all(torch.equal(a, b) for a, b in zip(got, expected[number])):
            wrong.append(number)
threads = [threading.Thread(target=work, args=(number,)) for number in range(len(jobs))]
[t.start() for t in threads]
[t.join() for t in threads]
assert not wrong, f"other bits in {{wrong}}"
"""
    _lived(cradle.run(code, {}, (ROOT,), 300), situation)


def _memory(situation):
    """Under a limit of the address space calls raise or are right."""
    code = f"""
import random, resource
import torch
from coordatt_fast import CoordAtt
rng = random.Random({situation.seed})
torch.set_num_threads(rng.choice((1, 2)))
module = CoordAtt(16, 16)
shapes = [(1, 16, 30, 31), (1, 16, 140, 150), (4, 16, 200, 210), (2, 16, 300, 310)]
def run(x):
    leaf = x.clone().requires_grad_()
    out = module.eval()(leaf)
    out.backward(x)
    return out.detach(), leaf.grad
inputs = [torch.randn(s) for s in shapes]
sums = [[t.double().sum().item() for t in run(x)] for x in inputs]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
done = refused = 0
for _ in range(60):
    room = rng.choice((0, 1, 3, 10, 40, 90)) * 2**20 + rng.randrange(2**20)
    resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))
    number = rng.randrange(len(inputs))
    try:
        got = [t.double().sum().item() for t in run(inputs[number])]
        assert got == sums[number], f"another result: {{got}}, {{sums[number]}}"
        done += 1
    except (RuntimeError, MemoryError):
        refused += 1
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(done, refused)
"""
    answer = cradle.run(code, {}, (ROOT,), 300)
    _lived(answer, situation)
