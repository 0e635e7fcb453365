"""Packaging of odeopt; see README.md."""

import os
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

here = Path(__file__).parent
version = next(
    line.split('"')[1]
    for line in (here / "odeopt" / "_version.py").read_text().splitlines()
    if line.startswith("__version__")
)

search_requires = ["optuna>=4.0"]
opponents_requires = ["schedulefree>=1.4", "prodigyopt>=1.1.2"]
lightning_requires = ["lightning>=2.4"]
clients_requires = [*lightning_requires, "accelerate>=1.1", "transformers>=4.48", "skorch>=1.1"]
hub_requires = ["huggingface_hub>=0.30"]
triton_requires = ["triton>=3.2; platform_system == 'Linux'"]  # comes with torch's builds for CUDA
docs_requires = ["sphinx>=8.1", "myst-parser>=4.0.1", "furo>=2024.8.6"]


class BuildStep(build_ext):
    """Build the step in C: no module, but a library that is loaded by its path, under any version of Python."""

    def build_extensions(self):
        # -ffast-math, or -march=native, would give wrong numbers here, or none elsewhere
        flags = ["-std=gnu11", "-O3", "-fno-fast-math", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
        flags += ["-fopenmp-simd", "-fvisibility=hidden", "-pthread"]
        is_msvc = self.compiler.compiler_type == "msvc"
        for extension in self.extensions:
            extension.extra_compile_args = ["/O2", "/std:c11", "/fp:precise"] if is_msvc else flags
            extension.extra_link_args = [] if is_msvc else ["-pthread"]
            extension.libraries = [] if is_msvc else ["m"]
        super().build_extensions()

    def get_ext_filename(self, fullname):
        # the point keeps it from being found as a module
        return fullname.replace(".", os.sep) + (".native.dll" if os.name == "nt" else ".native.so")

    def get_export_symbols(self, extension):
        return extension.export_symbols


native = "odeopt/stepping/native"
step = Extension(
    "odeopt.stepping.native.step",
    sources=[f"{native}/step.c"],
    depends=[f"{native}/kernels.h", f"{native}/products.h", f"{native}/tiles.h"],
    optional=True,  # without a compiler steps are slower, and all else is as it is
)

setup(
    name="odeopt",
    version=version,
    description="Optimizers learned as port-Hamiltonian systems and integrated by ODE solvers, for PyTorch",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    ext_modules=[step],
    cmdclass={"build_ext": BuildStep},
    packages=find_packages(include=["odeopt", "odeopt.*"]),
    package_dir={"": "."},  # so that an editable install is on the path, and is found from the parent folder too
    package_data={
        "odeopt": ["pretrained/*.safetensors", "pretrained/*.json", "configs/*.toml", "configs/search/*.toml"],
        "odeopt.stepping.native": ["*.c", "*.h"],
    },
    entry_points={"console_scripts": ["odeopt = odeopt.cli.main:main"]},
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "torchdiffeq>=0.2.5",
        "numpy>=1.26",
        "scipy>=1.11.1",
        "scikit-learn>=1.4",
        "matplotlib>=3.8",
        "safetensors>=0.4.3",
        "tensorboard>=2.16.2",
        "tqdm>=4.66",
    ],
    extras_require={
        "search": search_requires,
        "opponents": opponents_requires,
        "hub": hub_requires,
        "lightning": lightning_requires,
        "clients": clients_requires,
        "docs": docs_requires,
        "triton": triton_requires,
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.6",
            "build>=1.2",
            "wheel>=0.43",
            "setuptools>=70",
            *search_requires,
            *opponents_requires,
            *hub_requires,
        ],
    },
)
