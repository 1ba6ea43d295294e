"""Build script: the compiled engines; all that is fixed stands in pyproject.toml.

ALTERREC_FAST_NO_EXT=1 leaves compiled code out; every op then runs on Triton or its PyTorch reference.
ALTERREC_FAST_NO_CUDA=1 leaves out what needs nvcc, which is found through CUDA_HOME or PATH.
ALTERREC_FAST_SANITIZE=1 builds with AddressSanitizer, for csrc/tests/sanitize_python.sh alone.
"""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
CUDA_BINDING = "csrc/binding_cuda.cpp"
GPUS = (80, 90, 100)


def files(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in CSRC.glob(pattern))


def find_nvcc() -> str | None:
    if os.environ.get("ALTERREC_FAST_NO_CUDA") == "1":
        return None
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


def compile_cuda(nvcc: str, folder: Path) -> tuple[list[str], list[str]]:
    """The objects of csrc/cuda, and what links them with the CUDA runtime, statically: no driver is needed to import.

    Registers that spill to memory fail the build.
    """
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    gpus = [gpu for gpu in GPUS if f"compute_{gpu}" in known]
    folder.mkdir(parents=True, exist_ok=True)
    command = [nvcc, "-c", "-std=c++17", "-O3", f"-I{CSRC}", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=0"]
    command += ["-Xptxas=-warn-spills,-Werror", "-odir", str(folder)]
    for gpu in gpus:
        command.append(f"--generate-code=arch=compute_{gpu},code=sm_{gpu}")
    command.append(f"--generate-code=arch=compute_{gpus[-1]},code=compute_{gpus[-1]}")  # for later GPUs
    sources = files("cuda/*.cu")
    subprocess.run(command + sources, cwd=ROOT, check=True)
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, check=True)
    libraries = re.search(r"LIBRARIES=(.*)", dry.stderr)
    link = shlex.split(libraries[1]) if libraries else []
    link += ["-lcudart_static", "-lculibos", "-lrt", "-ldl", "-pthread", "-Wl,--exclude-libs,ALL"]
    return [str(folder / Path(source).with_suffix(".o").name) for source in sources], link


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
                    f"alterrec-fast needs a C++20 compiler and found no {compiler!r}: install one, name yours in CXX, "
                    "or set ALTERREC_FAST_NO_EXT=1 to install without compiled code."
                )
            nvcc = find_nvcc()
            if nvcc is None:
                print("alterrec-fast: no nvcc, so the compiled engine is built for the CPU only.")
            else:
                objects, link = compile_cuda(nvcc, Path(self.build_temp).resolve() / "cuda")
                self.extensions[0].sources.append(CUDA_BINDING)
                self.extensions[0].extra_objects += objects
                self.extensions[0].extra_link_args += link
            super().build_extensions()

    flags = ["-O3", "-fopenmp", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
    flags.append("-Wno-maybe-uninitialized")  # GCC bug 105593: wrong within its own AVX-512 headers
    link = ["-fopenmp", "-s"]
    if os.environ.get("ALTERREC_FAST_SANITIZE") == "1":
        sanitize = ["-fsanitize=address", "-fno-omit-frame-pointer", "-g", "-w", "-DALTERREC_FAST_SANITIZED"]
        flags, link = [*flags, "-O1", *sanitize], ["-fopenmp", "-fsanitize=address"]
    extension = CppExtension(
        "alterrec_fast._C",
        [source for source in files("*.cpp") + files("cpu/*.cpp") if source != CUDA_BINDING],
        depends=files("**/*.h") + files("cuda/*"),
        include_dirs=[str(CSRC)],
        extra_compile_args={"cxx": flags},
        extra_link_args=link,
    )
    command: type[build_ext] = Build
    return {"ext_modules": [extension], "cmdclass": {"build_ext": command}}


setup(**compiled())
