"""Packaging information of the cube."""

modname = "cubicweb_s3storage"
distname = "cubicweb-s3storage"

numversion = (5, 0, 0)
version = ".".join(str(number) for number in numversion)

license = "LGPL-2.1-or-later"
author = "The cubicweb-s3storage developers"
description = "CubicWeb storage that keeps Bytes attributes in an S3 bucket"
web = f"https://pypi.org/project/{distname}/"

__depends__ = {
    "cubicweb": ">= 4.10.0, < 6.0.0",
    # 1.36 is the first to know when_required, which other servers than AWS need.
    "boto3": ">= 1.36.0",
    # CubicWeb needs pyramid 1.10, which imports pkg_resources: a new virtual
    # environment has no setuptools since Python 3.12, and setuptools has no
    # pkg_resources since 82.
    "setuptools": ">= 78.1.1, < 82",
    # CubicWeb and pyramid import cgi, which Python 3.13 has removed.
    "legacy-cgi": "; python_version >= '3.13'",
}
__recommends__ = {}

classifiers = [
    "Environment :: Web Environment",
    "Framework :: CubicWeb",
    "Programming Language :: Python :: 3",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Programming Language :: Python :: 3.13",
]
