"""Packaging of the cube, with what `cubicweb_s3storage/__pkginfo__.py` says."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
pkginfo = runpy.run_path(str(here / "cubicweb_s3storage" / "__pkginfo__.py"))

setup(
    name=pkginfo["distname"],
    version=pkginfo["version"],
    license=pkginfo["license"],
    description=pkginfo["description"],
    long_description=(here / "README.rst").read_text(encoding="utf-8"),
    long_description_content_type="text/x-rst",
    author=pkginfo["author"],
    url=pkginfo["web"],
    classifiers=pkginfo["classifiers"],
    python_requires=">=3.11",
    packages=find_packages(include=["cubicweb_s3storage*"]),
    install_requires=[
        f"{name} {version}".strip() for name, version in pkginfo["__depends__"].items()
    ],
    extras_require={
        # What `cubicweb_s3storage.testing` needs.
        "testing": ["moto[s3] >= 5"],
        "demo": ["cubicweb-file", "moto[s3] >= 5", "flask", "flask-cors"],
        "bench": ["matplotlib"],
        "test": [
            "cubicweb-file",
            "docutils",
            "flask",
            "flask-cors",
            "hypothesis",
            "moto[s3] >= 5",
            "psycopg2-binary",
            "pytest",
        ],
    },
    entry_points={"cubicweb.cubes": ["s3storage=cubicweb_s3storage"]},
    zip_safe=False,
)
