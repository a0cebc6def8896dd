"""The package as a whole: what it exports, what it imports, its exceptions, and what its wheel holds."""

import ast
import copy
import importlib
import operator
import pickle
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import defense
from defense import errors

ROOT = Path(__file__).parents[1]
MAPPED = [name for name in ("export", "benchmarks", "demo") if (ROOT / name).is_dir()]
"""Top-level folders that are installed as `defense.<name>`."""


def run_python(code: str, *args: object, cwd: Path = ROOT) -> str:
    """Run code in a fresh interpreter that finds the checkout, and return what it printed."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- what it exports --------------------------------------------------------------------------------------------------


def test_all_is_sorted_and_equals_what_is_resolved_lazily() -> None:
    assert defense.__all__ == sorted(defense.__all__)
    assert defense.__all__ == sorted(defense._HOME_OF)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(defense.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {(alias.asname, node.module) for node in block.body for alias in node.names}
    assert imported == set(defense._HOME_OF.items())


@pytest.mark.parametrize("name", defense.__all__)
def test_every_exported_name_is_the_one_of_its_module(name: str) -> None:
    pytest.importorskip("torch")
    home = importlib.import_module(f"defense.{defense._HOME_OF[name]}")
    for _ in range(2):  # the first access imports the module, which must not change what the second one finds
        assert getattr(defense, name) is getattr(home, name)


@pytest.mark.parametrize(
    "first",
    [
        "defense.wrap",
        "from defense import wrap",
        "import defense.hosts.attach",
        "from defense import detach",
        "defense.Suppressor",
    ],
)
def test_wrap_is_the_function_whatever_was_imported_before(first: str) -> None:
    pytest.importorskip("torch")
    run_python(
        f"import defense; {first}\n"
        "from defense import wrap; from defense.hosts.attach import wrap as same, attached\n"
        "assert defense.wrap is wrap is same and callable(wrap), defense.wrap"
    )


@pytest.mark.parametrize("name", ["errors", "core.latents", "data.images", "data.labels", "store.defenses"])
def test_modules_that_export_no_name_like_their_own_are_attributes(name: str) -> None:
    assert importlib.import_module(f"defense.{name}") is operator.attrgetter(name)(defense)


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'defense' has no attribute 'Classifier'"):
        _ = defense.Classifier
    with pytest.raises(ImportError, match="cannot import name 'Classifier'"):
        exec("from defense import Classifier")


def test_dir_lists_every_exported_name_once() -> None:
    names = dir(defense)
    assert set(defense.__all__) <= set(names)
    assert len(names) == len(set(names))


# --- what it imports --------------------------------------------------------------------------------------------------

HEAVY = ("torch", "torchvision", "open_clip", "timm", "onnxruntime", "gradio", "tokenizers", "PIL", "typer", "numpy")


def test_importing_the_package_loads_no_backend_and_little_else() -> None:
    before, after, heavy = run_python(
        "import sys; before = len(sys.modules); import defense\n"
        f"print(before, len(sys.modules), ','.join(sorted(set(sys.modules) & set({HEAVY!r}))) or '-')"
    ).split()
    assert heavy == "-"
    assert int(after) - int(before) <= 40


NUMPY_ONLY = [
    "core.config",
    "core.latents",
    "data.images",
    "data.labels",
    "data.sources",
    "errors",
    "hosts.defense",
    "store.defenses",
    "world.draws",
    "cli",
    "export.bundle",
    "export.runtime",
    "export.batch",
]


@pytest.mark.parametrize("name", NUMPY_ONLY)
def test_modules_for_which_numpy_is_enough_load_no_torch(name: str) -> None:
    run_python(f"import defense.{name}, sys; sys.exit(bool({{'torch', 'open_clip'}} & set(sys.modules)))")


@pytest.mark.parametrize("name", ["wrap", "detach", "SparseAutoencoder", "Suppressor"])
def test_fault_70_without_torch_the_error_names_the_extra(name: str) -> None:
    message = run_python(
        "import sys; sys.modules['torch'] = None\n"
        f"try:\n import defense; defense.{name}\n"
        "except ImportError as error: print(type(error).__name__, error)"
    )
    assert message == f'MissingDependencyError torch is not installed; run: pip install -e "{ROOT}[torch]"'


def test_fault_70_without_torch_the_rest_of_the_package_works() -> None:
    run_python(
        "import sys; sys.modules['torch'] = sys.modules['open_clip'] = None\n"
        "import defense.store.defenses; from defense import Defense, LatentSet, ConfigError, SAEConfig; "
        "LatentSet('text', (1,))"
    )


def _python_files() -> list[Path]:
    folders = ["defense", "tests", *MAPPED]
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) if "build" not in path.parts]


def _imported(tree: ast.AST) -> set[str]:
    """Top-level names that a file imports absolutely."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", _python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_imports_a_mapped_folder_by_its_bare_name(path: Path) -> None:
    assert not _imported(ast.parse(path.read_text(encoding="utf-8"))) & {"export", "benchmarks", "demo"}


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import benchmarks.speed", {"benchmarks"}),
        ("def f():\n    from export import onnx", {"export"}),
        (
            "import torch.export; from . import export; from .demo import app; from defense.benchmarks import speed",
            set(),
        ),
    ],
)
def test_bare_imports_are_told_from_others(code: str, found: set[str]) -> None:
    assert _imported(ast.parse(code)) & {"export", "benchmarks", "demo"} == found


# --- its exceptions ---------------------------------------------------------------------------------------------------

EXCEPTIONS = {
    "DefenseError": (errors.DefenseError("text"), Exception, errors.DefenseError),
    "ConfigError": (errors.ConfigError("text"), ValueError, errors.DefenseError),
    "GateError": (errors.GateError("text"), ValueError, errors.ConfigError),
    "ShapeError": (errors.ShapeError("text"), ValueError, errors.ConfigError),
    "HookPointError": (errors.HookPointError("text"), ValueError, errors.ConfigError),
    "CheckpointError": (errors.CheckpointError("text"), RuntimeError, errors.DefenseError),
    "IntegrityError": (
        errors.IntegrityError("f.safetensors", "a" * 64, "b" * 64),
        RuntimeError,
        errors.CheckpointError,
    ),
    "NotThereError": (errors.NotThereError("text"), RuntimeError, errors.CheckpointError),
    "InvalidImageError": (errors.InvalidImageError("empty", "no bytes"), ValueError, errors.DefenseError),
    "NonFiniteError": (errors.NonFiniteError("W_dec"), ValueError, errors.DefenseError),
    "CalibrationError": (errors.CalibrationError(0.9, 0.99, 200), RuntimeError, errors.DefenseError),
    "BackendError": (errors.BackendError("text"), RuntimeError, errors.DefenseError),
    "MissingDependencyError": (errors.MissingDependencyError("torch", "torch"), ImportError, errors.DefenseError),
}


def test_the_exceptions_here_are_all_there_are_and_all_are_exported() -> None:
    classes = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    defined = {name for name, value in classes.items() if value.__module__ == errors.__name__}
    assert defined == set(EXCEPTIONS)
    assert defined <= set(defense.__all__)


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_every_exception_is_of_this_package_and_a_builtin(name: str) -> None:
    error, builtin, parent = EXCEPTIONS[name]
    assert isinstance(error, errors.DefenseError)
    assert isinstance(error, builtin)
    assert isinstance(error, parent)


@pytest.mark.parametrize(
    "copied", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy], ids=["pickle", "copy", "deepcopy"]
)
@pytest.mark.parametrize("name", EXCEPTIONS)
def test_every_exception_survives_being_copied(name: str, copied) -> None:
    error = EXCEPTIONS[name][0]
    other = copied(error)
    assert type(other) is type(error)
    assert str(other) == str(error)
    assert vars(other) == vars(error)


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_the_tree_is_drawn_at_the_top_of_its_module(name: str) -> None:
    assert errors.__doc__ is not None
    line = next(line for line in errors.__doc__.splitlines() if name in line.replace("─", " ").split())
    builtin = EXCEPTIONS[name][1].__name__
    inherits = not any(base.__name__ == builtin for base in type(EXCEPTIONS[name][0]).__bases__)
    assert inherits or name == "DefenseError" or f"({builtin})" in line


# --- its wheel --------------------------------------------------------------------------------------------------------

NOT_SHIPPED = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info", "build", "dist", "results")


def _shipped(folder: Path) -> set[str]:
    """Files below a folder, by their path in it, less what building and running leave there."""
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, so that building leaves nothing in the real one."""
    copied = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if path.name in NOT_SHIPPED(str(ROOT), [path.name]):
            continue
        if path.is_dir():
            shutil.copytree(path, copied / path.name, ignore=NOT_SHIPPED)
        else:
            shutil.copy(path, copied)
    return copied


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of that copy, built by setuptools without an isolated environment."""
    out = tmp_path_factory.mktemp("wheel")
    run_python("import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])", out, cwd=checkout)
    return zipfile.ZipFile(next(out.glob("*.whl")))


@pytest.fixture(scope="module")
def unpacked(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what site-packages would after installing the wheel."""
    site = tmp_path_factory.mktemp("site-packages")
    wheel.extractall(site)
    return site


def test_the_wheel_has_one_top_level_package(unpacked: Path) -> None:
    names = sorted(path.name for path in unpacked.iterdir())
    assert [name for name in names if not name.endswith(".dist-info")] == ["defense"]
    assert len(names) == 2


def test_the_wheel_holds_every_file_of_the_library_and_the_mapped_folders_and_no_other(
    checkout: Path, unpacked: Path
) -> None:
    mapped = {f"{name}/{file}" for name in MAPPED for file in _shipped(checkout / name)}
    assert _shipped(unpacked / "defense") == _shipped(checkout / "defense") | mapped


def test_the_wheel_holds_no_tests(wheel: zipfile.ZipFile) -> None:
    assert not [name for name in wheel.namelist() if "test" in Path(name).name and name.endswith(".py")]
    assert not [name for name in wheel.namelist() if "conftest" in name or "tests/" in name]


@pytest.mark.parametrize(
    "file",
    [
        "py.typed",
        "data/bpe_simple_vocab_16e6.txt.gz",
        "data/templates.json",
        "world/atlas.webp",
        "world/NOTICE.md",
    ],
)
def test_the_wheel_holds_what_is_no_python(unpacked: Path, file: str) -> None:
    assert (unpacked / "defense" / file).is_file()


def test_the_wheel_states_its_license_command_and_extras(unpacked: Path) -> None:
    info = next(unpacked.glob("*.dist-info"))
    metadata = (info / "METADATA").read_text(encoding="utf-8")
    assert "License-Expression: MIT" in metadata
    assert "Provides-Extra: torch" in metadata
    assert (info / "licenses" / "LICENSE").is_file()
    assert "defense = defense.cli:main" in (info / "entry_points.txt").read_text(encoding="utf-8")


def test_the_base_install_needs_no_backend(unpacked: Path) -> None:
    metadata = (next(unpacked.glob("*.dist-info")) / "METADATA").read_text(encoding="utf-8")
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert required
    assert not [line for line in required if any(name in line for name in ("torch", "open_clip", "onnx", "gradio"))]


def test_what_the_wheel_installs_can_be_imported_and_finds_its_data(unpacked: Path) -> None:
    where = run_python(
        "import sys; sys.path[0] = sys.argv[1]\n"
        "import defense, defense.store.defenses, defense.data.labels as labels, defense.data.tokenizer as tokenizer\n"
        "tokenizer.ClipTokenizer; assert labels.TEMPLATES; print(defense.__file__)",
        unpacked,
        cwd=unpacked.parent,
    )
    assert Path(where) == unpacked / "defense" / "__init__.py"


# --- its extras -------------------------------------------------------------------------------------------------------

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _advised_extras(tree: ast.AST) -> set[str]:
    """Extras that a file's errors and texts tell the user to install; "?" for one that is no literal."""
    found: set[str] = set()
    for node in ast.walk(tree):
        called = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
        if called in ("MissingDependencyError", "install_command"):
            extra = node.args[-1] if node.args else None
            known = set(errors.EXTRAS.values()) if ast.unparse(extra or node).startswith("EXTRAS.get(") else {"?"}
            found |= {str(extra.value)} if isinstance(extra, ast.Constant) else known
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            for extras in re.findall(r"(?:clip-defense|CHECKOUT|pip install -e \"?\.)\[([\w,-]+)\]", node.value):
                found |= set(extras.split(","))
    return found


def test_every_extra_that_is_advised_exists() -> None:
    own = ROOT / "defense" / "errors.py"  # where the advice is put together, of any extra
    sources = [path for path in _python_files() if path.relative_to(ROOT).parts[0] != "tests" and path != own]
    advised = {
        (str(path.relative_to(ROOT)), extra)
        for path in sources
        for extra in _advised_extras(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert len({extra for _, extra in advised}) > 5
    assert not {each for each in advised if each[1] not in PYPROJECT["project"]["optional-dependencies"]}


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ('raise MissingDependencyError("pyarrow", "train")', {"train"}),
        ('raise MissingDependencyError("pyarrow", extra)', {"?"}),
        ("print(f'run: {install_command(\"onnx\")}')", {"onnx"}),
        ("def f():\n    print('pip install -e \".[torch,demo]\"')", {"torch", "demo"}),
    ],
)
def test_advised_extras_are_found(code: str, found: set[str]) -> None:
    assert _advised_extras(ast.parse(code)) == found


def test_a_missing_extra_is_installed_from_the_checkout_or_the_wheel(monkeypatch, tmp_path) -> None:
    assert errors.install_command("onnx") == f'pip install -e "{ROOT}[onnx]"'
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "site-packages" / "defense" / "errors.py"))
    assert errors.wheel_name() == f"clip_defense-{version('clip-defense')}-py3-none-any.whl"
    assert errors.install_command("onnx") == f'pip install "{errors.wheel_name()}[onnx]"'


# --- its version ------------------------------------------------------------------------------------------------------


def test_the_version_is_the_same_wherever_it_stands() -> None:
    stated = PYPROJECT["project"]["version"]
    citation = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    changelog = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert citation is not None
    assert citation[1] == stated
    assert changelog[:2] == ["Unreleased", stated]


# --- its packages -----------------------------------------------------------------------------------------------------


def test_every_package_on_disk_is_listed_in_pyproject() -> None:
    setuptools = PYPROJECT["tool"]["setuptools"]
    inner = {path.parent for name in ("defense", *MAPPED) for path in (ROOT / name).rglob("__init__.py")}
    names = {".".join(path.relative_to(ROOT).parts) for path in inner}
    assert set(setuptools["packages"]) == {
        name if name.split(".")[0] == "defense" else f"defense.{name}" for name in names
    }
    assert setuptools["package-dir"] == {f"defense.{name}": name for name in MAPPED}


def test_the_lowest_version_is_the_one_that_a_requirement_states() -> None:
    (lowest,) = runpy.run_path(str(ROOT / ".ci" / "lowest.py"))["lowest"](["name[a,b-c]>=1.2,<3"])
    assert lowest == "name==1.2"


@pytest.mark.parametrize("requirement", ["torchvision", "name<3", "name==1"])
def test_a_requirement_without_a_lowest_version_is_refused(requirement: str) -> None:
    with pytest.raises(ValueError, match=requirement):
        runpy.run_path(str(ROOT / ".ci" / "lowest.py"))["lowest"]([requirement])
