"""Packaging. `kernels/` is the root of the package `minipeft_kernels`, as `src/` is elsewhere: PyPI has a `kernels`."""

from setuptools import Extension, find_packages, setup

DEMO = ["gguf>=0.18", "accelerate>=1.10", "matplotlib>=3.11"]
SMOKE = ["pytest>=9", "pytest-timeout>=2.4", "pytest-xdist>=3.6", "accelerate>=1.10"]
TEST = [
    *DEMO,
    *SMOKE,
    "hypothesis>=6.100",
    "peft==0.21.2",
    # PEFT 0.21.2, which tests compare with, finds no cache in the models of 5.24, which gave it another name.
    "transformers>=5.23,<5.24",
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
    version="0.2.0",
    description="Parameter-efficient fine-tuning written from scratch: NF4, LoRA, QLoRA",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["minipeft", "minipeft.*"]), *find_packages("kernels")],
    package_dir={"minipeft_kernels": "kernels/minipeft_kernels"},
    package_data={"minipeft": ["py.typed", "compare/constitution.txt"]},
    ext_modules=[NATIVE],
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
    extras_require={"demo": DEMO, "smoke": SMOKE, "test": TEST},
    entry_points={"console_scripts": ["minipeft = minipeft.__main__:main"]},
)
