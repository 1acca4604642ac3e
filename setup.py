"""Packaging. `kernels/` is the root of the package `minipeft_kernels`, as `src/` is elsewhere: PyPI has a `kernels`."""

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

DEMO = ["gguf>=0.18", "accelerate>=1.10", "matplotlib>=3.11"]
SMOKE = ["pytest>=9", "pytest-timeout>=2.4", "pytest-xdist>=3.6", "accelerate>=1.10"]
DOCS = ["mkdocs-material>=9.6", "mkdocstrings[python]>=1.0", "jupytext>=1.16", "nbclient>=0.10", "ipykernel>=6", *DEMO]
TEST = [
    *DEMO,
    *SMOKE,
    "hypothesis>=6.100",
    "peft==0.21.2",
    # PEFT 0.21.2, which tests compare with, finds no cache in the models of 5.24, which gave it another name.
    "transformers>=5.23,<5.24",
    "bitsandbytes==0.50.2",
    "trl==1.16.0",
    "ruff==0.17.6",
    "mypy==2.4.1",
    "types-PyYAML",
    "types-tqdm",
]

# The compiled CPU code has no Python in it: ctypes loads it. Without a C compiler it is left out, and minipeft says so
# when it would have used it. No contraction of a*b+c, whose two roundings the definition keeps apart.
NATIVE = Extension(
    "minipeft_kernels._native",
    sources=[f"kernels/native/{name}.c" for name in ("decode", "avx2", "avx512", "neon", "entry")],
    depends=[f"kernels/native/{name}.h" for name in ("nf4", "scales", "panels", "thin")],
    extra_compile_args=["-O3", "-fopenmp", "-ffp-contract=off", "-fvisibility=hidden"],
    extra_link_args=["-fopenmp"],
    optional=True,
    # One wheel for every Python, then: its name says "abi3", although nothing of Python is called.
    py_limited_api=True,
)


class BuildNative(build_ext):
    """Builds the compiled part; by a compiler without OpenMP (clang without libomp, Apple's), for one thread."""

    def build_extension(self, ext: Extension) -> None:
        """Try with OpenMP, then without."""
        try:
            super().build_extension(ext)
        except (CompileError, LinkError) as error:
            ext.extra_compile_args.remove("-fopenmp")
            ext.extra_link_args.remove("-fopenmp")
            self.warn(f"{error}: once more without OpenMP")
            super().build_extension(ext)


setup(
    name="minipeft",
    version="0.2.0",
    description="Parameter-efficient fine-tuning written from scratch: NF4, LoRA, QLoRA",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["minipeft", "minipeft.*"]), *find_packages("kernels")],
    package_dir={"minipeft_kernels": "kernels/minipeft_kernels"},
    package_data={
        "minipeft": ["py.typed", "compare/constitution.txt", "show/explorer.html"],
        "minipeft_kernels": ["linear/tuned/*.json"],
    },
    ext_modules=[NATIVE],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    install_requires=[
        # Each lower bound is the oldest release that the smoke tests are run with, by .ci/matrix; nothing is held back.
        "torch>=2.6",
        'triton>=3.2; sys_platform == "linux"',
        "transformers>=5.6",
        "safetensors>=0.5",
        "numpy>=1.26",
        "tqdm>=4.66",
        "PyYAML>=6.0",
    ],
    extras_require={"demo": DEMO, "smoke": SMOKE, "docs": DOCS, "test": TEST},
    entry_points={"console_scripts": ["minipeft = minipeft.__main__:main"]},
)
