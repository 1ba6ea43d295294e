"""Build script: the compiled engine; all that is fixed stands in pyproject.toml.

ALTERREC_FAST_NO_EXT=1 leaves the compiled engine out; every op then runs on its PyTorch reference.
"""

import os
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = sorted(
    str(path.relative_to(ROOT)) for folder in (".", "cpu") for path in (ROOT / "csrc" / folder).glob("*.cpp")
)
HEADERS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))


def compiled() -> dict[str, object]:
    """The keywords of setup() that build alterrec_fast._C, or none of them where it is not wanted."""
    if os.environ.get("ALTERREC_FAST_NO_EXT") == "1":
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        """One binary for all CPUs: the instruction set is chosen at run time, so there is no -march here."""

        def build_extensions(self) -> None:
            compiler = os.environ.get("CXX", "c++").split()[0]
            if shutil.which(compiler) is None:
                raise SystemExit(
                    f"alterrec-fast needs a C++ compiler and found no {compiler!r}: install one, name yours in CXX, "
                    "or set ALTERREC_FAST_NO_EXT=1 to install without compiled code."
                )
            super().build_extensions()

    flags = ["-O3", "-fopenmp", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
    flags.append("-Wno-maybe-uninitialized")  # GCC bug 105593: wrong within its own AVX-512 headers
    extension = CppExtension(
        "alterrec_fast._C",
        SOURCES,
        depends=HEADERS,
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": flags},
        extra_link_args=["-fopenmp", "-s"],
    )
    command: type[build_ext] = Build
    return {"ext_modules": [extension], "cmdclass": {"build_ext": command}}


setup(**compiled())
