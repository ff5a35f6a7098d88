"""Metadata and installation. The one unusual thing: fairseq_compat.pth goes into site-packages, so that fairseq
imports.
"""

import re
from pathlib import Path

from setuptools import Distribution, find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "momentum_lm/__init__.py").read_text("utf-8"), re.MULTILINE)
README = ROOT / "README.md"
TRANSFORMERS = ["transformers>=4.56", "gguf", "accelerate"]  # other people's models
# torch for CUDA brings its own, torch for CPUs none
TRITON = "triton; platform_system == 'Linux' and platform_machine == 'x86_64'"


class WithData(Distribution):
    """An editable installation asks ``has_data()`` before it installs data_files, and setuptools forgot
    to define that.
    """

    has_data = Distribution.has_data_files


setup(
    distclass=WithData,
    name="momentum_lm",
    version=VERSION[1],
    description="Momentum attention language models and in-context learning measurements, as a fairseq plugin",
    long_description=README.read_text("utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="momentum_lm contributors",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # One folder on sys.path, also when editable: setuptools' import hook for editable packages would slow every Python
    # start.
    package_dir={"": "."},
    packages=find_packages(include=["momentum_lm", "momentum_lm.*"]),
    py_modules=["fairseq_compat"],
    package_data={"momentum_lm": ["py.typed", "**/*.yaml", "**/*.html", "**/*.md"]},
    # Relative to a wheel's data/ folder, this is its purelib/ folder: installers put the file into site-packages, list
    # it in
    # RECORD (so that uninstalling removes it), and do so for editable installations too.
    data_files=[("../purelib", ["fairseq_compat.pth"])],
    # fairseq==0.12.2 is not here, on purpose: its own metadata asks for omegaconf<2.1 and hydra-core<1.1, which
    # contradict what
    # it needs on a modern Python, so pip would refuse the pair. `READTHEDOCS=1 pip install --no-deps fairseq==0.12.2`
    # installs it, and compiles nothing.
    install_requires=[
        "torch>=2.6",
        "numpy",
        "hydra-core>=1.3.2,<1.4",
        "omegaconf>=2.3,<2.4",
        "bitarray",
        "regex",
        "sacrebleu",
        "tqdm",
        "tensorboard",
        "sentencepiece",
        "datasets",
        "matplotlib",
        "jinja2",
        "markupsafe",
        "pyyaml",
        "zstandard",
    ],
    extras_require={
        "transformers": TRANSFORMERS,
        "harness": ["lm_eval>=0.4.13"],  # not in dev: 33 packages come with it, scipy among them
        "dev": [*TRANSFORMERS, TRITON, "pytest", "pytest-xdist", "ruff", "mypy", "types-PyYAML", "setuptools>=77"],
    },
    entry_points={
        "console_scripts": [
            "momentum-lm = momentum_lm.cli.main:main",
            "fairseq-eval = momentum_lm.cli.evaluate:main",
        ],
        "fairseq.plugins": ["momentum_lm = momentum_lm:register"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Typing :: Typed",
    ],
)
