"""Puts the package together as a kernel of the Hugging Face Hub: make hub, docs/kernels.md.

In the folder build/hub:

    build.toml, flake.nix, CARD.md, torch-ext/    a project for kernel-builder: the package, without library
    build/torch-stable-abi211-cpu-x86_64-linux/   what kernels loads: the package, with the library built here
    build/torch-cpu/, build/torch-cuda/, ...      what it loads elsewhere: the package, without library

The Hub loads a kernel as a package of another, unique name. So imports become relative, and that name is the
operators' namespace, in the Python files and in the copy of the library.
"""

import argparse
import base64
import hashlib
import json
import re
import shutil
from pathlib import Path

import tomllib  # Python 3.11

ROOT = Path(__file__).resolve().parent.parent
LIBRARY, BUILD = "lib/libcoordatt_fast.so", "lib/build.json"
# A kernel is not run from the command line, nor does it know of other projects' models.
LEFT_OUT = ("__main__", "side_by_side", "ultralytics", "models", "checkpoints")

# What manylinux_2_28 has, which the Hub asks for.
NEWEST = {b"GLIBC": (2, 28), b"GLIBCXX": (3, 4, 24), b"CXXABI": (1, 3, 11)}

# Without quotes of the kind that may be around it in an f-string.
_REWRITES = (
    (r"torch\.ops\.coordatt_fast\b", "getattr(torch.ops, __spec__.parent)"),
    (r"torch\.ops\.coordatt_fast_triton\b", 'getattr(torch.ops, __spec__.parent + "_triton")'),
    (r'^COMPILED = "coordatt_fast"', "COMPILED = __spec__.parent"),
    (r'"coordatt_fast_triton"', '__spec__.parent + "_triton"'),
)
_LEFT = re.compile(r'^\s*(from|import) coordatt_fast\b|ops\.coordatt_fast|"coordatt_fast(_triton"|::)', re.M)
_NAME = re.compile(rb"operators registered under:(coordatt_fast\0*)")

# In the folder of the kernel's own name, where older versions of kernels look for it.
OLDER = """\
import importlib.util
import json
import sys
from pathlib import Path

_folder = Path(__file__).absolute().parent.parent
_name = json.loads((_folder / "metadata.json").read_text())["id"]
if _name not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_name, _folder / "__init__.py")
    sys.modules[_name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_name])
__all__ = sys.modules[_name].__all__
globals().update({name: getattr(sys.modules[_name], name) for name in __all__})
"""


def rewritten(text: str, dots: str) -> str:
    """A module of the package as one of the kernel; dots: what leads from its folder to the package's."""
    text = re.sub(
        r"^(\s*)from coordatt_fast(?:\.([\w.]+))? import", rf"\1from {dots}\2 import", text, flags=re.M
    )
    for old, new in _REWRITES if dots == "." else ():
        text = re.sub(old, new, text, flags=re.M)
    if found := _LEFT.search(text):
        raise SystemExit(f"hub: do not know how to rewrite {found[0]!r}")
    return text


def python_files() -> dict[str, bytes]:
    """The kernel's files, by their paths in it, where there is no library."""
    files = {BUILD: json.dumps({"skipped": "this variant of the kernel has none"}).encode()}
    for folder, dots, inside in (("coordatt_fast", ".", ""), ("kernels", "..", "kernels/")):
        for path in sorted((ROOT / folder).glob("*.py")):
            if path.stem not in LEFT_OUT:
                files[inside + path.name] = rewritten(path.read_text(), dots).encode()
    return files


def compiled() -> tuple[bytes | None, dict]:
    """The library that is built here, and its build.json; None, and why, where there is none."""
    path = ROOT / "coordatt_fast" / LIBRARY
    about = path.with_name("build.json")
    build = json.loads(about.read_text()) if about.exists() else {"skipped": "it was not built (make venv)"}
    if "skipped" in build:
        return None, build
    version = re.search(r'__version__ = "(.+?)"', (ROOT / "coordatt_fast/__init__.py").read_text())[1]
    if (build["version"], build["mode"]) != (version, "release"):
        raise SystemExit(
            f"hub: the library is {build['version']} {build['mode']}, expected {version} release"
        )
    return path.read_bytes(), build


def of_library(build: dict, abi: str) -> list[tuple[str, str, list[str] | None]]:
    """The variants that the library is for: backend, folder, GPU architectures. abi: as in "211" for 2.11."""
    system, machine = build["platform"].split("-")
    variants = [("cpu", f"torch-stable-abi{abi}-cpu-{machine}-{system}", None)]
    if cuda := build["cuda"]:
        toolkit = "cu" + cuda["nvcc"].replace(".", "")
        archs = [re.sub(r"sm_(\d+)(\d)([af]?)", r"\1.\2\3", arch) for arch in cuda["archs"]]
        variants.append(("cuda", f"torch-stable-abi{abi}-{toolkit}-{machine}-{system}", archs))
    return variants


def renamed(library: bytes, name: str) -> bytes:
    """The library with another namespace for its operators."""
    places = _NAME.findall(library)
    if len(places) != 1 or len(places[0]) <= len(name):
        raise SystemExit("hub: the library has no place for the operators' namespace: build it again")
    start, end = _NAME.search(library).span(1)
    return library[:start] + name.encode().ljust(end - start, b"\0") + library[end:]


def too_new(library: bytes) -> list[str]:
    """What the library asks of the system's libraries that manylinux_2_28 does not have."""
    found = re.findall(rb"\0(GLIBC|GLIBCXX|CXXABI)_([\d.]+)(?=\0)", library)
    wanted = {(name, tuple(map(int, version.split(b".")))) for name, version in found}
    newer = sorted((name, version) for name, version in wanted if version > NEWEST[name])
    return [f"{name.decode()} {'.'.join(map(str, version))}" for name, version in newer]


def variant(
    general: dict, backend: str, archs: list[str] | None, files: dict[str, bytes]
) -> dict[str, bytes]:
    """All files of a variant, under a name made from their content."""
    name, content = general["name"].replace("-", "_"), hashlib.sha256()
    for path in sorted(files):
        content.update(path.encode() + b"\0" + hashlib.sha256(files[path]).digest())
    unique = f"_{name}_{backend}_{content.hexdigest()[:10]}"
    files = files | {f"{name}/__init__.py": OLDER.encode()}
    if LIBRARY in files:
        files[LIBRARY] = renamed(files[LIBRARY], unique)
    hashes = {path: base64.b64encode(hashlib.sha256(files[path]).digest()).decode() for path in sorted(files)}
    about = {
        "id": unique,
        **{key: general[key] for key in ("name", "version", "license")},
        "python-depends": [],
        "backend": {"type": backend} | ({"archs": archs} if archs else {}),
        "digest": {"algorithm": "sha256", "files": hashes},
    }
    return files | {"metadata.json": (json.dumps(about, indent=2) + "\n").encode()}


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def assemble(out: Path) -> list[str]:
    """Writes all of it into the folder out, emptied first. Returns the variants, and what there is to say."""
    general = tomllib.loads((ROOT / "hub/build.toml").read_text())["general"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    abi = "".join(re.fullmatch(r"torch>=(\d)\.(\d+)", project["dependencies"][0]).groups())
    python, (library, build) = python_files(), compiled()
    variants = [(f"torch-{backend}", backend, None, python) for backend in general["backends"]]
    said = [f"without compiled kernels: {build.get('skipped')}"]
    if library is not None:
        complete = python | {LIBRARY: library, BUILD: json.dumps(build).encode()}
        variants += [(folder, backend, archs, complete) for backend, folder, archs in of_library(build, abi)]
        newer = ", ".join(too_new(library))
        said = [f"not for an upload: built for newer systems than manylinux_2_28 ({newer})"] if newer else []
    shutil.rmtree(out, ignore_errors=True)
    write(out, {name: (ROOT / "hub" / name).read_bytes() for name in ("build.toml", "flake.nix", "CARD.md")})
    write(out / "torch-ext" / general["name"].replace("-", "_"), python)
    write(out / "build", {"CARD.md": (ROOT / "hub/CARD.md").read_bytes()})  # where an upload looks for it
    for folder, *what in variants:
        write(out / "build" / folder, variant(general, *what))
    return [folder for folder, *_ in variants] + said


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hub.assemble", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build/hub", help="emptied first (build/hub)")
    print("\n".join(assemble(parser.parse_args().out)))


if __name__ == "__main__":
    main()
