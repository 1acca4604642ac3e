"""Packaging. `kernels/` is the root of the package `minipeft_kernels`, as `src/` is elsewhere: PyPI has a `kernels`."""

from setuptools import Extension, find_packages, setup

DEMO = ["gguf>=0.18", "accelerate>=1.10", "matplotlib>=3.11"]
TEST = [
    *DEMO,
    "pytest>=9",
    "pytest-timeout>=2.4",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "peft==0.21.2",
    "bitsandbytes==0.50.2",
    "ruff==0.17.6",
    "mypy==2.4.1",
    "types-PyYAML",
    "types-tqdm",
]

# The compiled CPU code has no Python in it: ctypes loads it. Without a C compiler that knows OpenMP it is left out, and
# minipeft says so when it would have used it. No contraction of a*b+c, whose two roundings the definition keeps apart.
NATIVE = Extension(
    "minipeft_kernels._native",
    sources=[f"kernels/native/{name}.c" for name in ("decode", "product", "thin", "entry")],
    depends=["kernels/native/nf4.h", "kernels/native/scales.h"],
    extra_compile_args=["-O3", "-fopenmp", "-ffp-contract=off", "-fvisibility=hidden"],
    extra_link_args=["-fopenmp"],
    optional=True,
)

setup(
    name="minipeft",
    version="0.1.0",
    description="Parameter-efficient fine-tuning written from scratch: NF4, LoRA, QLoRA",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["minipeft", "minipeft.*"]), *find_packages("kernels")],
    package_dir={"minipeft_kernels": "kernels/minipeft_kernels"},
    package_data={"minipeft": ["py.typed", "compare/constitution.txt"]},
    ext_modules=[NATIVE],
    install_requires=[
        # Each lower bound is the oldest release that the tests were run with.
        "torch>=2.13",
        'triton>=3.8; sys_platform == "linux"',
        # 5.24 calls the cache by another name throughout; PEFT 0.21.2, which tests compare with, fails there.
        "transformers>=5.23,<5.24",
        "safetensors>=0.8",
        "numpy>=1.26",
        "tqdm>=4.66",
        "PyYAML>=6.0",
    ],
    extras_require={"demo": DEMO, "test": TEST},
    entry_points={"console_scripts": ["minipeft = minipeft.__main__:main"]},
)
