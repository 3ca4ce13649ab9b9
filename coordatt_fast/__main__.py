"""python -m coordatt_fast: versions, backends with reasons, SIMD level, threads and the compiled library."""

import json
import platform
import sys

import torch

import coordatt_fast
from coordatt_fast import library
from coordatt_fast.backends import choice


def main() -> int:
    found = library.load()
    print(f"coordatt_fast {coordatt_fast.__version__}")
    print(f"torch         {torch.__version__}")
    print(f"python        {platform.python_version()} on {sys.platform}-{platform.machine()}")
    print(f"threads       {torch.get_num_threads()}")
    print("backends")
    for name, backend in coordatt_fast.backends().items():
        print(f"  {name:<10}  {'yes' if backend.available else 'no ':<3}  {backend.reason}")
    print(f"chosen        {choice.name}")
    if found.loaded:
        print(f"SIMD level    {torch.ops.coordatt_fast.simd_level()}")
        print(f"build         {torch.ops.coordatt_fast.build_info()}")
    elif found.build:
        print(f"build         {json.dumps(found.build)}")
    print(f"library       {found.path}{'' if found.loaded else ' (not loaded)'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
