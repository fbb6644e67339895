"Packaging: what the package is comes from settings.ini, its version from cape/__init__.py."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
LICENSES = {"apache2": "License :: OSI Approved :: Apache Software License"}

ini = ConfigParser(delimiters=["="])
ini.read(ROOT / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
lib = cfg["lib_path"]
init = (ROOT / lib / "__init__.py").read_text(encoding="utf-8")
version = re.search(r'^__version__ = "([^"]+)"', init, re.M)[1]
readme = ROOT / "README.md"

setup(
    name=cfg["lib_name"], version=version, description=cfg["description"], author=cfg["author"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"].split(), license_files=["LICENSE"],
    classifiers=[LICENSES[cfg["license"]], "Development Status :: 4 - Beta",
                 "Intended Audience :: Science/Research", "Programming Language :: Python :: 3",
                 "Topic :: Scientific/Engineering :: Image Recognition"],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[lib, f"{lib}.*"]), package_data={"": ["*.json"], lib: ["py.typed", "weights/*", "weights/posezoo/*"]},
    install_requires=cfg["requirements"].split(),
    extras_require={key.rsplit("_", 1)[0]: cfg[key].split() for key in cfg if key.endswith("_requirements")},
    entry_points={"console_scripts": [f"cape = {lib}.cli:main"], "nbdev": [f"{lib} = {lib}._modidx:d"]},
)
