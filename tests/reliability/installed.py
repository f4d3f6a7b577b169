"""The wheel far from any checkout: what its user types, what comes back, and how long it takes. `make wheel-test`.

python tests/reliability/installed.py [--fresh] [--pictures 600] [--wheel FILE] [--folder DIR] [--report FILE]

Builds the wheel, installs it into an environment of its own, and follows installed_steps.py in an empty folder, with a
home of its own: --help of every command, mistakes, a first answer, a folder trained on and searched, and what the
pages tell to do afterwards. Nothing printed or written may name the checkout, and no file of the installed package may
change. Times are printed and judged by nobody: by the clock, and of processors, which other work does not lengthen.
"""

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "reliability")]

import installed_steps as steps  # noqa: E402
from tiny_folder import write_named  # noqa: E402

ROOMS = ("modeling", "processing", "training", "oner", "examples")
FEW = 24
# of the caller's environment a user has none
HIDDEN = ("PYTHONPATH", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "HF_HOME", "VIRTUAL_ENV")
AIMS = {"first answer": 60, "three commands": 300}
HELP_AIM = 1.0


def build_wheel(folder: Path) -> Path:
    """From a tree of links to the checkout, so that nothing is left in it."""
    tree = folder / "tree"
    tree.mkdir()
    for place in (*(ROOT / name for name in ROOMS), *(path for path in ROOT.iterdir() if path.is_file())):
        (tree / place.name).symlink_to(place)
    build = f"from setuptools import build_meta as b; b.build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=tree, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path, fresh: bool) -> Path:
    """An environment with the wheel; its folder of programs. Not fresh: it leans on the packages of this one."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    options = ["--quiet"]
    if not fresh:
        site = next(folder.glob("lib/python*/site-packages"))
        (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
        options += ["--no-deps", "--no-index"]
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", *options, str(wheel)], check=True)
    return python.parent


class Road:
    """
    Steps in a folder of their own.

    Args:
        programs: The folder of `oner` and `python`.
        place: Where they are typed; empty.
    """

    def __init__(self, programs: Path, place: Path) -> None:
        self.programs, self.place = programs, place
        home = place.parent / "home"
        home.mkdir(exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if name not in HIDDEN}
        self.environment = {**environment, "HOME": str(home), "PATH": f"{programs}:/usr/bin:/bin"}
        self.done: list[dict[str, Any]] = []
        self.wrong: list[str] = []

    def has(self, package: str) -> bool:
        """Whether the environment can import it."""
        code = f"import importlib.util as u, sys; sys.exit(u.find_spec({package!r}) is None)"
        return subprocess.run([self.programs / "python", "-c", code], env=self.environment).returncode == 0

    def walk(self, step: steps.Step) -> float:
        """Types one, and returns its seconds; what is wrong with what came back joins `wrong`."""
        if any(map(self.has, step.without)) or not all(map(self.has, step.needs)):
            return 0.0
        before, started = processor_seconds(), time.monotonic()
        words = [str(self.programs / step.words[0]), *step.words[1:]]
        result = subprocess.run(
            words, cwd=self.place, env=self.environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        seconds, said = time.monotonic() - started, result.stdout + result.stderr
        told = {"typed": step.title, "kind": step.kind, "seconds": seconds, "processor": processor_seconds() - before}
        self.done.append({key: round(value, 2) if isinstance(value, float) else value for key, value in told.items()})
        print(f"{seconds:8.1f} {self.done[-1]['processor']:8.1f}  {step.title}", flush=True)

        # what it must say, and what it must not
        faults = [f"said nothing of {pattern!r}" for pattern in step.says if not re.search(pattern, said)]
        if result.returncode not in step.status:
            faults.append(f"status {result.returncode}, expected {step.status}")
        if step.kind == "mistake" and (result.stdout or len(result.stderr.splitlines()) > 1):
            faults.append("a mistake is one line")
        if "Traceback" in said or str(ROOT) in said:
            faults.append("a traceback, or the checkout")
        if faults:
            self.wrong.append(f"{step.title}: {'; '.join(faults)}\n{said[-2000:]}")
            print(f"{'wrong':>17}  {'; '.join(faults)}", flush=True)
        if estimate := re.search(r"this will take .*", said):
            self.done[-1]["estimate"] = estimate[0]
        return seconds


def processor_seconds() -> float:
    """Of all processes that were waited for so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def contents(package: Path) -> dict[str, int]:
    """Size of each file of the installed package but for caches."""
    files = (path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(package)): path.stat().st_size for path in files}


def places_named(folder: Path) -> Iterator[str]:
    """Published files that name the checkout, or the folder itself."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".md", ".py", ".txt"):
            text = path.read_text(encoding="utf-8")
            if str(ROOT) in text or str(folder.parents[1]) in text:
                yield str(path)


def follow(programs: Path, place: Path, pictures: int) -> tuple[dict[str, float], Road]:
    """All steps; seconds by what is aimed at, and the road that was walked."""
    place.mkdir()
    write_named(place / "photos", pictures)
    write_named(place / "few", FEW)
    shutil.copy(sorted((place / "few").iterdir())[0], place / "photo.png")
    road = Road(programs, place)
    package = next(programs.parent.glob("lib/python*/site-packages/oner"))
    untouched = contents(package)

    # the first answer comes first, when nothing is in the system's memory yet
    aims = {"first answer": road.walk(steps.first_answer())}
    for step in (*steps.helps(), *steps.mistakes()):
        road.walk(step)
    aims["three commands"] = sum(map(road.walk, steps.three_commands(pictures)))
    for step in steps.afterwards():
        road.walk(step)

    if changed := set(untouched.items()) ^ set(contents(package).items()):
        road.wrong.append(f"the installed package was written into: {sorted(changed)}")
    for published in (place / "runs/photos/model", place / "runs/oner-emoji", place / "space"):
        road.wrong += [f"{path} names a place of this machine" for path in places_named(published)]
    return aims, road


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="dependencies from the package index, today's newest")
    parser.add_argument("--pictures", type=int, default=600)
    parser.add_argument("--wheel", type=Path, help="one that is built already")
    parser.add_argument("--programs", type=Path, help="the bin of an environment that has it already")
    parser.add_argument("--folder", type=Path, help="new; one that is removed at the end by default")
    parser.add_argument("--report", type=Path)
    a = parser.parse_args(argv)
    if a.folder is not None:
        a.folder.mkdir(parents=True)
    folder = a.folder or Path(tempfile.mkdtemp(prefix="oner-installed-"))
    try:
        started = time.monotonic()
        programs = a.programs or install(a.wheel or build_wheel(folder), folder / "venv", a.fresh)
        print(f"{time.monotonic() - started:8.1f}           built and installed\n\n   clock processor", flush=True)
        aims, road = follow(programs.absolute(), folder / "place", a.pictures)
    finally:
        if a.folder is None:
            shutil.rmtree(folder)

    # what was aimed at, on quiet cores
    slow = [one["typed"] for one in road.done if one["kind"] == "help" and one["processor"] > HELP_AIM]
    print(f"\n--help above {HELP_AIM} s of processor: {', '.join(slow) or 'none'}")
    for name, aim in AIMS.items():
        print(f"{name}: {aims[name]:.0f} s by the clock, aim {aim} s")
    for estimate in {one["estimate"] for one in road.done if "estimate" in one}:
        print(f"the run said: {estimate}")
    if a.report is not None:
        a.report.write_text(json.dumps({"aims": aims, "steps": road.done}, indent=1) + "\n", encoding="utf-8")
    for wrong in road.wrong:
        print(f"\nWRONG  {wrong}")
    return 1 if road.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
