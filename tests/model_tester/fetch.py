"""Fetches transformers' own model tests, in the version that is installed, from its source archive.

They are not in the wheel. What the archive leaves out but its tests import is replaced by empty stand-ins, each with
its reason below; so export and generation tests do not run here.

    python tests/model_tester/fetch.py     # into build/transformers_tests/<version>/, once
"""

import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "hf_tests"  # the name under which the archive's tests/ is importable
STAND_INS = {
    "hf_tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",  # tests of torch.export
    "hf_tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",  # OneR does not generate
    "hf_tests/utils/test_configuration_utils.py": "config_common_kwargs = {}\n",  # generation's settings
    "utils/fetch_hub_objects_for_ci.py": "def url_to_local_path(url):\n    return url\n",  # the CI's file cache
}


def tests_folder() -> Path:
    """Where the tests of the installed transformers belong."""
    return ROOT / "build" / "transformers_tests" / version("transformers")


def fetch() -> Path:
    """Downloads the archive with pip, keeps its tests and adds the stand-ins; returns the folder."""
    target = tests_folder()
    if (target / PACKAGE / "test_modeling_common.py").is_file():
        return target
    with tempfile.TemporaryDirectory() as scratch:
        options = ["--quiet", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", scratch]
        requirement = f"transformers=={version('transformers')}"
        subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement], check=True)
        archive = next(Path(scratch).glob("*.tar.gz"))
        shutil.unpack_archive(archive, scratch, filter="data")
        source = next(path for path in Path(scratch).iterdir() if path.is_dir() and (path / "tests").is_dir())
        new = Path(scratch) / "new"
        shutil.copytree(source / "tests", new / PACKAGE)
        for name, text in STAND_INS.items():
            path = new / name
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
        for folder in [new / PACKAGE, *(path for path in (new / PACKAGE).iterdir() if path.is_dir())]:
            (folder / "__init__.py").touch()
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(new, target)
    return target


if __name__ == "__main__":
    print(fetch())
