"""Packaging of odeopt; see README.md."""

from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = next(
    line.split('"')[1]
    for line in (here / "odeopt" / "_version.py").read_text().splitlines()
    if line.startswith("__version__")
)

search_requires = ["optuna>=4.0"]
opponents_requires = ["schedulefree>=1.4", "prodigyopt>=1.1.2"]
docs_requires = ["sphinx>=8.1", "myst-parser>=4.0.1", "furo>=2024.8.6"]

setup(
    name="odeopt",
    version=version,
    description="Optimizers learned as port-Hamiltonian systems and integrated by ODE solvers, for PyTorch",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["odeopt", "odeopt.*"]),
    package_data={
        "odeopt": ["pretrained/*.safetensors", "pretrained/*.json", "configs/*.toml", "configs/search/*.toml"],
    },
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
        "docs": docs_requires,
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
        ],
    },
)
